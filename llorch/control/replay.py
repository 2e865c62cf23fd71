"""Requests that come twice: whether a task that is asked for is one that this cluster has already, and where.

Owns what a repeated Idempotency-Key or task id means (the same task, a conflict, or a new one because the earlier one
came to nothing), and the search for a task among the nodes. Decides one key at a time, so that two requests at once
can't both be the first. Never reads or runs anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from llorch.control.node_client import NodeClient
from llorch.control.recovery import Recovery
from llorch.control.registry import Registry
from llorch.control.task_reports import came_to_nothing
from llorch.control.tasks import State, Task, TaskStore
from llorch.errors import Code, LlorchError
from llorch.messages import TaskReport, parse

MOST_ASKED_AT_ONCE = 8  # searches; each asks every node
ASK_S = 1.0  # one node that hangs must not hold up the answer for long


@dataclass(frozen=True, slots=True)
class _Known:
    """What there is of an earlier task. `gone`: it came to nothing that anybody was shown, so that it may run anew.

    `doubtful`: that is only what one node says; another may have taken the task on.
    """

    task_id: str
    attempt: int
    owner: str
    path: str
    body_digest: str | None
    gone: bool
    doubtful: bool = False


@dataclass(slots=True)
class _Turn:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted_by: int = 0


class Replays:
    """What is asked before a task is run, and before one is said not to exist."""

    def __init__(self, tasks: TaskStore, registry: Registry, nodes: NodeClient, recovery: Recovery) -> None:
        self._tasks = tasks
        self._registry = registry
        self._nodes = nodes
        self._recovery = recovery
        self._deciding: dict[str, _Turn] = {}
        self._asking = asyncio.Semaphore(MOST_ASKED_AT_ONCE)

    @contextlib.asynccontextmanager
    async def one_at_a_time(self, word: str) -> AsyncIterator[None]:
        turn = self._deciding.setdefault(word, _Turn())
        turn.wanted_by += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.wanted_by -= 1
            if not turn.wanted_by:
                del self._deciding[word]

    async def earlier(self, task: Task) -> str | None:
        """The id of the task that `task` repeats, to be read again; None: it has to be run, and be started at once.

        Raises IDEMPOTENCY_MISMATCH or CONFLICT for another request under the same name, RECOVERING while it can't be
        told.
        """
        if task.key_digest is None and not task.named:
            return None
        async with self.one_at_a_time(task.key_digest or task.task_id):
            known = await self._by_key(task) if task.key_digest is not None else None
            if known is None and task.named:
                known = await self._by_id(task)
            if (known is None or known.doubtful) and not task.first_try:
                self._recovery.check(time.monotonic(), "this request may be running already")
            if known is None or known.gone:
                if known is not None and known.task_id == task.task_id:
                    task.attempt = known.attempt  # the next one fences it
                return None
            return known.task_id

    async def _by_key(self, task: Task) -> _Known | None:
        assert task.key_digest is not None
        known = await self._of_key(task.key_digest)
        if known is None:
            return None
        if known.path != task.path or known.body_digest not in (None, task.body_digest):
            if known.gone:
                return None
            raise LlorchError(
                Code.IDEMPOTENCY_MISMATCH,
                "this Idempotency-Key belongs to another request",
                param="Idempotency-Key",
                details={"task_id": known.task_id},
            )
        return known

    async def _by_id(self, task: Task) -> _Known | None:
        earlier = self._tasks.get(task.task_id)
        known: _Known | None
        if earlier is not None:
            keyed, never_ran = task.key_digest is not None, earlier.ended and not earlier.attempt
            known = _as_it_is(earlier, gone=never_ran or (keyed and await self._came_to_nothing(earlier)))
        else:
            found = self._registry.task(task.task_id)
            known = None if found is None else _reported(*found[1:], keyed=task.key_digest is not None)
        if known is not None and (known.owner != task.owner or known.body_digest not in (None, task.body_digest)):
            raise LlorchError(
                Code.CONFLICT, "this task_id is taken", param="task_id", hint="leave task_id out, or make a new one"
            )
        return known

    async def seek(self, task_id: str) -> None:
        """Ask every node for a task that nobody has reported: reports carry the newest only."""
        if self._tasks.get(task_id) is not None or self._registry.task(task_id) is not None:
            return
        async with self._asking:
            await asyncio.gather(*(self._ask(node_id, task_id) for node_id in list(self._registry.nodes)))

    async def _ask(self, node_id: str, task_id: str) -> None:
        node = self._registry.nodes.get(node_id)
        if node is None or not node.reachable:
            return
        with contextlib.suppress(LlorchError):
            report = parse(TaskReport, await self._nodes.call(node_id, "GET", f"/v2/tasks/{task_id}", timeout_s=ASK_S))
            if report.task_id == task_id:
                self._registry.take_task(node_id, report)

    async def _of_key(self, key_digest: str) -> _Known | None:
        task = self._tasks.by_key(key_digest)
        if task is not None:
            return _as_it_is(task, gone=await self._came_to_nothing(task))
        found = self._registry.task_of_key(key_digest)
        if found is None or not self._registry.nodes[found[0]].online:
            return None
        return _reported(found[1], keyed=True)

    async def _came_to_nothing(self, task: Task) -> bool:
        """Whether a keyed task may be run again: it ended before it had shown anything, its reader left it, or no node
        remembers it."""
        if not task.ended:
            return False
        left = task.abandoned and not task.cancel_wanted
        shown = task.offset > 0 or (task.tail is not None and task.tail.length > 0)
        if task.abandoned:
            if task.node_id is None:
                return True
        elif not shown:
            return True
        elif task.state is State.FAILED and task.tail is None:
            return False  # its end was made here, and is told again
        assert task.node_id is not None
        path = f"/v2/tasks/{task.task_id}"
        try:
            report = parse(TaskReport, await self._nodes.call(task.node_id, "GET", path, timeout_s=ASK_S))
        except LlorchError as error:
            if error.code is Code.TASK_NOT_FOUND:
                return True
            report = None
        node = self._registry.nodes.get(task.node_id)
        if report is None or report.task_id != task.task_id:
            if node is None or not node.online:
                return True
            raise LlorchError(Code.RECOVERING, "the node that ran this request does not answer", retry_after_ms=1_000)
        task.attempt = max(task.attempt, report.attempt)
        if report.state != "sealed":
            return False
        return report.offset == 0 or (left and report.finish_reason == "canceled")


def _as_it_is(task: Task, *, gone: bool) -> _Known:
    return _Known(task.task_id, task.attempt, task.owner, task.path, task.body_digest or None, gone)


def _reported(report: TaskReport, *, keyed: bool) -> _Known:
    """Of a task from before this control's time. Why it was canceled is not known: mostly, its reader had left."""
    nothing = came_to_nothing(report)
    return _Known(
        report.task_id, report.attempt, report.owner, report.path, report.body_digest, keyed and nothing, nothing
    )
