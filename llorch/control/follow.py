"""Following a task that was begun before: a client that came back, at the offset it names.

Owns what such a reader sees: the log's own bytes from there, 204 at a sealed end, and the terminal event where no log
holds one. A reader that loses its node gets no terminal event: the task may live on, and the reader come back.
"""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from llorch.control.answers import SSE_HEADERS, Stream, canceled_event, empty_end, error_event, stopping
from llorch.control.dispatch import PING_AFTER_S
from llorch.control.feed import Feed, Lost, Refused, Stopped, Upstream
from llorch.control.state import Control
from llorch.control.tasks import State, Task
from llorch.errors import Code, LlorchError
from llorch.messages import Tail
from llorch.web import REQUEST_ID

LOOK_AGAIN_S = 0.1  # a reader of a task without a byte looks this often whether it has one

_BEFORE_ITS_FIRST_BYTE = (State.QUEUED, State.PLACED)  # it may still move to another node


async def follow_log(
    request: web.Request, control: Control, task_id: str, offset: int, headers: dict[str, str]
) -> web.StreamResponse:
    """Relay a native task's log from `offset`. Raises LlorchError as long as nothing was sent."""
    stream = Stream(request, control.slow_reader_timeout_s)
    task: Task | None = None
    headers = SSE_HEADERS | {"X-Llorch-Task": task_id} | headers
    try:
        task = await _begun(control, task_id, stream, headers)
        if task is not None and _control_ended(task, offset):
            return await _last_word(request, stream, task, headers)
        node_id = _node_of(control, task_id, task)
        headers["X-Llorch-Node"] = node_id
        with control.dispatcher.attached(node_id, task_id, offset) as (feed, upstream):
            return await _relay(request, stream, feed, upstream, task_id, headers)
    except LlorchError as error:
        if not stream.committed:
            if error.code is Code.NODE_LOST and task is not None and _failed_here(task):
                return await _last_word(request, stream, task, headers)  # what is missing went with its node
            raise
        if error.code is Code.NODE_LOST:
            stream.abort()
        return stream.finished()


async def _begun(control: Control, task_id: str, stream: Stream, headers: dict[str, str]) -> Task | None:
    """The task, once it has shown something or has ended; None if this control did not run it."""
    ping_at = time.monotonic() + PING_AFTER_S
    while True:
        task = control.dispatcher.tasks.get(task_id)
        if task is None or task.state not in _BEFORE_ITS_FIRST_BYTE:
            return task
        await asyncio.sleep(LOOK_AGAIN_S)
        if time.monotonic() >= ping_at:
            ping_at += PING_AFTER_S
            await stream.commit(200, headers)
            await stream.ping()


def _control_ended(task: Task, offset: int) -> bool:
    """Whether what is left of the task for this reader is an end that this control made, and no log has."""
    if not task.ended or (task.abandoned and task.node_id is not None):
        return False
    if task.tail is not None:
        return task.tail.length == 0
    return offset >= task.offset


def _failed_here(task: Task) -> bool:
    return task.ended and not task.abandoned and task.error is not None


async def _last_word(request: web.Request, stream: Stream, task: Task, headers: dict[str, str]) -> web.StreamResponse:
    request_id = request[REQUEST_ID]
    if task.error is not None and task.error.code is Code.DRAINING:
        raise stopping()
    await stream.commit(200, headers)
    if task.tail is not None:
        await stream.write(empty_end(task.tail, request_id, task.task_id))
    elif task.error is not None:
        await stream.write(error_event(task.error, request_id, task.task_id))
    else:
        await stream.write(canceled_event(None))
    return stream.finished()


def _node_of(control: Control, task_id: str, task: Task | None) -> str:
    if task is not None and task.node_id is not None:
        return task.node_id
    known = control.registry.task(task_id)
    if known is None:
        raise LlorchError(Code.TASK_NOT_FOUND, "no such task")
    return known[0]


async def _relay(
    request: web.Request, stream: Stream, feed: Feed, upstream: Upstream, task_id: str, headers: dict[str, str]
) -> web.StreamResponse:
    while True:
        item = await feed.next(PING_AFTER_S)
        if isinstance(item, bytes):
            await stream.commit(200, headers)
            await stream.write(item)
            upstream.passed_on(len(item))
        elif item is None:
            await stream.commit(200, headers)
            await stream.ping()
        elif isinstance(item, Tail):
            if item.length == 0:
                await stream.commit(200, headers)
                await stream.write(empty_end(item, request[REQUEST_ID], task_id))
            elif not stream.committed:
                return web.Response(status=204, headers={"X-Llorch-Task": task_id})
            return stream.finished()
        elif isinstance(item, Refused):
            raise item.error
        elif isinstance(item, Lost):
            raise LlorchError(Code.NODE_LOST, f"the node was lost: {item.reason}")
        elif isinstance(item, Stopped):
            raise stopping()
