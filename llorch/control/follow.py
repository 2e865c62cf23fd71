"""Reading a task that was begun before: for a client that came back, at its offset, or that asks a second time.

Owns what such a reader sees: the log's own bytes from there, 204 at a sealed end, and the terminal event where no log
holds one. A reader that loses its node gets no terminal event unless the task has ended by that: it may live on, and
the reader come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from aiohttp import web

from llorch.control.answers import Answer, NativeStream
from llorch.control.audience import Audience, ShuttingDown
from llorch.control.dispatch import PING_AFTER_S
from llorch.control.feed import Refused, Stopped
from llorch.control.log_reader import LogReader
from llorch.control.state import Control
from llorch.control.tasks import State, Task
from llorch.errors import Code, LlorchError
from llorch.messages import Head, Tail, TaskReport

LOOK_AGAIN_S = 1.0  # while it waits, how often a reader is told its place in the queue
END_WITHIN_S = 1.0  # for a task that runs here to end after its node was lost under one of its readers


async def follow(
    control: Control, mine: Task, answer: Answer, offset: int = 0, *, attempt: int | None = None
) -> web.StreamResponse:
    """Read the log of `mine.task_id` into `answer`; `mine` is what the reader knows of it, and is filled in.

    `attempt`: the one whose log the offset is of, where the reader knows. Raises LlorchError as long as
    nothing was sent.
    """
    audience = control.dispatcher.audience(mine.task_id)
    try:
        with audience.listening() if audience is not None else contextlib.nullcontext():
            return await _follow(control, mine, answer, offset, attempt, audience)
    except ShuttingDown:
        return answer.stopped(mine.request_id)
    except LlorchError as error:
        if not answer.committed:
            raise
        return answer.failed(error, mine.request_id)


async def _follow(
    control: Control, mine: Task, answer: Answer, offset: int, attempt: int | None, audience: Audience | None
) -> web.StreamResponse:
    if audience is not None:
        await _begun(control, audience, answer)
    task = control.dispatcher.tasks.get(mine.task_id)
    if task is not None and task.owner != mine.owner:
        task = None  # another's, under an id that both chose
    if task is not None and _control_ended(task, offset):
        return await _last_word(mine, task, answer, offset)
    known = control.registry.task(mine.task_id)
    mine.node_id, mine.pool_id, mine.attempt = _place_of(task, known)
    beyond = known is not None and known[1].state == "sealed" and known[1].offset < offset
    if attempt != mine.attempt or (task is None and beyond):
        _check_attempt(control, task, offset, attempt, beyond)
    left = False
    try:
        # What failed with its node has no log to wait for; what its engine failed has, and its node is soon back.
        patience_s = 0.0 if task is not None and _failed_here(task) and task.tail is None else None
        async with control.dispatcher.attached(mine.node_id, mine, offset, patience_s=patience_s) as reader:
            return await _relay(mine, reader, answer, offset)
    except LlorchError as error:
        if error.code is not Code.NODE_LOST:
            raise
        if audience is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(audience.gone.wait(), END_WITHIN_S)
        if task is not None and _failed_here(task):
            return await _last_word(mine, task, answer, offset)  # what is missing went with its node
        if answer.committed and isinstance(answer, NativeStream):
            return answer.broken_off()
        raise
    except (asyncio.CancelledError, ConnectionError):
        left = True
        raise
    finally:
        # Its node, having sent the TAIL, will not report it any more; perhaps it just did so as this reader left.
        before = task if task is not None else Task.of_report(*known, now=mine.received_at) if known else None
        if before is not None and (mine.tail is not None or (left and task is None)):
            control.dispatcher.tasks.remember(before.as_read(mine.tail))


async def _begun(control: Control, audience: Audience, answer: Answer) -> None:
    """Wait until the task has shown its first byte, or has ended."""
    ping_at = time.monotonic() + PING_AFTER_S
    while not audience.begun.is_set():
        position, eta_ms = control.dispatcher.place_in_line(audience.task)
        if position is not None:
            await answer.waiting(position, eta_ms)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(audience.begun.wait(), min(LOOK_AGAIN_S, max(0.0, ping_at - time.monotonic())))
        if time.monotonic() >= ping_at:
            ping_at += PING_AFTER_S
            await answer.idle()


def _control_ended(task: Task, offset: int) -> bool:
    """Whether what is left of the task for this reader is an end that this control made, and no log has."""
    if not task.ended or (task.abandoned and task.node_id is not None):
        return False
    if task.tail is not None:
        return task.tail.length == 0
    return offset >= task.offset


def _failed_here(task: Task) -> bool:
    return task.ended and not task.abandoned and task.error is not None


async def _last_word(mine: Task, task: Task, answer: Answer, offset: int) -> web.StreamResponse:
    """The end that the task has, to one who reads it again."""
    if task.stopped:
        raise ShuttingDown
    if offset and task.tail is not None and task.tail.length == offset and not answer.committed:
        return _nothing_more(mine)
    mine.node_id, mine.pool_id, mine.attempt = task.node_id, task.pool_id, task.attempt
    if task.tail is not None and task.tail.length == 0:
        return answer.ended(task.tail)
    return answer.failed(task.error or LlorchError(Code.CANCELED, "the task was canceled"), mine.request_id)


def _nothing_more(mine: Task) -> web.Response:
    """To one who has seen the end."""
    return web.Response(status=204, headers={"X-Llorch-Task": mine.task_id})


def _check_attempt(control: Control, task: Task | None, offset: int, wanted: int | None, beyond: bool) -> None:
    """An offset is of one attempt's log, and of a task one attempt is shown. A control that has just started may know
    of an earlier one alone, whose bytes nobody saw: raises RECOVERING while a later one may turn up, NODE_LOST once the
    one that was read is gone."""
    if task is None:
        control.recovery.check(time.monotonic(), "its nodes may still bring the attempt that was shown")
    if offset and (wanted is not None or (task is None and beyond)):
        raise LlorchError(Code.NODE_LOST, "the node of the attempt that was read is gone")


def _place_of(task: Task | None, known: tuple[str, TaskReport] | None) -> tuple[str, str | None, int]:
    if task is not None and task.node_id is not None:
        return task.node_id, task.pool_id, task.attempt
    if known is None:
        raise LlorchError(Code.TASK_NOT_FOUND, "no such task")
    return known[0], known[1].pool_id, known[1].attempt


async def _relay(mine: Task, reader: LogReader, answer: Answer, offset: int) -> web.StreamResponse:
    mine.offset = offset
    head: Head | None = None
    while True:
        item = await reader.next(PING_AFTER_S)
        if isinstance(item, Head):
            head = item
        elif isinstance(item, bytes):
            if head is not None:
                answer.begin(head)
                head = None
            await answer.write(item)
            mine.offset += len(item)
            reader.passed_on(len(item))
        elif item is None:
            await answer.idle()
        elif isinstance(item, Tail):
            mine.enter(State.PLACED)
            mine.end(item, None)
            if offset and item.length == offset and not answer.committed:
                return _nothing_more(mine)
            return answer.ended(item)
        elif isinstance(item, Refused):
            raise item.error
        elif isinstance(item, Stopped):
            raise ShuttingDown
