"""The tasks of this node: accepted against a slot, each run as an `execution`, and their slots given back.

Owns which attempts run and which of two survives, what becomes of one whose reader goes, and that a slot is given back
on every path. How an attempt runs is `execution`; who reads its log is nothing to this module. Never runs more than the
pools have slots for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from llorch.errors import Code, LlorchError, invalid
from llorch.logs import Log
from llorch.messages import Open, Tail
from llorch.node.engine_connections import Engines
from llorch.node.engine_keys import EngineKeys
from llorch.node.execution import Execution
from llorch.node.replicas import Lease
from llorch.node.retention import TaskLogs
from llorch.node.task_entry import NATIVE, Gone, TaskEntry
from llorch.node.tasklog import Reader
from llorch.openai_paths import served
from llorch.tasks import Guard

SWEEP_S = 0.5
READ_POLL_S = 0.05  # how often a node that drains looks whether ended tasks have been read

# It failed, fell silent, or can't be reached.
_ENGINES_FAULT = frozenset({Code.ENGINE_FAILED, Code.ENGINE_STALLED})

log = Log("node.runner")


class SlotHolder(Protocol):
    """The pools, as a task sees them."""

    def acquire(self, pool_id: str, task_id: str, model: str | None = None) -> Lease: ...
    def told(self, task_id: str, failed: bool, now: float) -> None: ...
    def release(self, task_id: str) -> None: ...
    def measured(self, pool_id: str, *, prompt_tps: float | None, decode_tps: float | None) -> None: ...


class Counted(Protocol):
    """Who counts tasks."""

    def began(self, model: str) -> None: ...
    def ended(self, model: str, outcome: str, code: str, tail: Tail) -> None: ...


class Runner:
    """Every task that runs on this node. One caller, on one loop."""

    def __init__(
        self,
        node_id: str,
        pools: SlotHolder,
        logs: TaskLogs,
        engines: Engines,
        counted: Counted,
        *,
        max_body_bytes: int,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.node_id = node_id
        self.logs = logs
        self.pools = pools
        self.engines = engines
        self.counted = counted
        self.keys = EngineKeys()
        self.changed = changed
        self.clock, self.wall = clock, wall
        self.max_body_bytes = max_body_bytes
        self._guard = Guard("node.runner")
        self._executions: dict[str, Execution] = {}  # by who holds their slots
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._executions)

    # ---- what links and routes call

    def accept(self, opening: Open) -> tuple[TaskEntry, bool]:
        """The task of an OPEN, and whether it is new: then its body has to be given. Raises LlorchError to refuse.

        A slot is held from here on. Nothing of the body is needed to say yes or no.
        """
        known = self.logs.known(opening)
        if known is not None:
            return known, False
        if opening.body_len > self.max_body_bytes:
            raise LlorchError(Code.PAYLOAD_TOO_LARGE, f"the body is over {self.max_body_bytes} bytes")
        if opening.prefix_len:
            raise invalid("this node does not continue tasks that began elsewhere", param="prefix_len")
        if opening.path != NATIVE:
            served(opening.path)
        self._fence(opening)
        lease = self.pools.acquire(opening.pool_id, _slot(opening), opening.model)
        entry = self.logs.add(opening, self.clock(), self.wall())
        execution = Execution(self, entry, lease, self._guard)
        entry.run = execution
        self._executions[_slot(opening)] = execution
        self._idle.clear()
        self.counted.began(lease.model)
        self.changed()
        return entry, True

    def _fence(self, opening: Open) -> None:
        """A higher attempt ends a lower one, also where there is no slot for it yet: the lower one may hold it."""
        older = self.logs.overtaken(opening)
        if older is not None:
            self.cancel(older)

    def attach(self, entry: TaskEntry, reader: Reader) -> None:
        self.logs.attach(entry, reader)

    def leave(self, entry: TaskEntry, reader: Reader, why: Gone) -> None:
        """`reader` goes; what becomes of the task is decided here, now or later."""
        if self.logs.leave(entry, reader, why, self.clock()):
            self.cancel(entry)

    def cancel(self, entry: TaskEntry) -> None:
        """End a task; a task that has ended stays as it is."""
        if entry.run is not None:
            entry.run.cancel()

    def discard(self, entry: TaskEntry) -> None:
        """End a task that its control has taken elsewhere: nobody is to find this attempt any more, or its end."""
        self.logs.discard(entry)
        self.cancel(entry)

    def never_came(self, entry: TaskEntry) -> None:
        """The rest of its body can't come: it is as if it had never been here, and whoever asks again has it run."""
        if entry.run is not None:
            self.logs.discard(entry)
            entry.run.stop(LlorchError(Code.NODE_LOST, "the task did not come here whole"))

    # ---- what the engines' side tells

    def seated(self, slot: str, replica_id: str, url: str, api_key_file: str | None, *, trial: bool) -> None:
        """The model that a task waits for is there, and this is the engine that has it."""
        execution = self._executions.get(slot)
        if execution is not None:
            lease = execution.lease
            execution.seat(replace(lease, replica_id=replica_id, url=url, api_key_file=api_key_file, trial=trial))

    def end(self, slots: Iterable[str], why: LlorchError) -> None:
        """End the tasks that hold these slots: their engine will not go on with them, or their time is over."""
        for slot in slots:
            if slot in self._executions:
                self._executions[slot].stop(why)

    def heard_at(self, pool_id: str, replica_id: str) -> float | None:
        """When a task last had a byte from this engine; None if none of those that run now has."""
        heard = (
            execution.heard_at
            for execution in self._executions.values()
            if (execution.lease.pool_id, execution.lease.replica_id) == (pool_id, replica_id)
        )
        return max((at for at in heard if at), default=None)

    # ---- the life of the node

    async def sweep(self) -> float:
        """A step of a loop: readers that did not come back, engines that fell silent, logs past their time."""
        now = self.clock()
        for entry in self.logs.orphaned(now):
            log.info("task.orphaned", task_id=entry.task_id, node_id=self.node_id)
            self.cancel(entry)
        for execution in list(self._executions.values()):
            execution.check(now)
        self.logs.expire(now)
        return SWEEP_S

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing runs and what has ended was read by those who are still reading it."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                while self.logs.being_read:  # noqa: ASYNC110
                    await asyncio.sleep(READ_POLL_S)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End what still runs, with a word to its readers."""
        for execution in list(self._executions.values()):
            execution.stop(LlorchError(Code.NODE_LOST, "the node was stopped before the task had ended"))
        await self._idle.wait()
        await self._guard.close()

    def ended(self, execution: Execution, tail: Tail) -> None:
        """`execution` has sealed its log."""
        entry = execution.entry
        entry.run = None  # what it took to run it is not kept with what it said
        slot, failed = _slot(entry.opening), _failed(tail)
        self._executions.pop(slot, None)
        if not self._executions:
            self._idle.set()
        if failed is not None:
            self.pools.told(slot, failed, self.clock())
        self.pools.release(slot)
        self.logs.sealed(entry, self.clock(), self.wall())
        self.pools.measured(
            entry.opening.pool_id, prompt_tps=tail.timings.prompt_tps, decode_tps=tail.timings.decode_tps
        )
        code = str(tail.error["code"]) if tail.error is not None else ""
        canceled = tail.finish_reason == "canceled"
        outcome = "canceled" if canceled else "failed" if tail.error is not None else "done"
        self.counted.ended(execution.lease.model, outcome, code, tail)
        (log.info if code and not canceled else log.debug)(
            "task.ended",
            task_id=entry.task_id,
            node_id=self.node_id,
            pool_id=entry.opening.pool_id,
            attempt=entry.opening.attempt,
            outcome=outcome,
            code=code or None,
            tokens_out=tail.tokens_out,
        )
        self.changed()


def _slot(opening: Open) -> str:
    """Who holds the slot: an attempt that overtakes another holds one of its own while the other still ends."""
    return f"{opening.task_id}/{opening.attempt}"


def _failed(tail: Tail) -> bool | None:
    """Whether the engine is to blame for a task that ended like this; None where its end says nothing of the engine:
    a cancel, a deadline, a body that can't be served, this node's own stop."""
    if tail.error is None:
        return None if tail.finish_reason == "canceled" else False
    return True if tail.error["code"] in _ENGINES_FAULT else None
