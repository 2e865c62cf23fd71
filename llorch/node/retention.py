"""Which tasks a node remembers, for how long, and which controls have still to hear of them.

Owns the newest attempt of each task, what of the sealed ones goes first when time or memory is up, whose readers did
not come back, and what is reported. The bytes of a log are `tasklog`'s. Pure but for the logs that it holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llorch.errors import Code, LlorchError
from llorch.messages import Open
from llorch.node.task_entry import Gone, State, TaskEntry, orphan_until
from llorch.node.tasklog import KEPT_BYTES, Kept, Reader, TaskLog

ENTRY_BYTES = 4 * 1024  # what a task costs besides its bytes, measured: thousands of short answers are not free
SEALED_V1_S = 30.0
MOST_REPORTED_SEALED = 1_000
MOST_EPOCHS = 8  # controls, and their restarts, for which it is kept what they were not told


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept for how long; the settings of the node."""

    kept_bytes: int = KEPT_BYTES  # of one log; beyond it the oldest bytes go
    all_kept_bytes: int = 256 * 1024 * 1024  # of all logs together; the oldest sealed ones go first
    sealed_native_s: float = 600.0
    reconnect_grace_s: float = 10.0  # a native task's client may come back within this


class TaskLogs:
    """Every task this node runs or still remembers: the newest attempt of each."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: dict[str, TaskEntry] = {}
        self._running: dict[str, TaskEntry] = {}
        self._sealed_native: deque[TaskEntry] = deque()  # both in the order of sealing
        self._sealed_v1: deque[TaskEntry] = deque()
        self._sealed_bytes = 0
        self._running_bytes = Kept()
        self._orphans: dict[str, tuple[TaskEntry, float]] = {}
        self._untold: dict[str, dict[str, TaskEntry]] = {}  # by epoch and task, in the order of sealing

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[TaskEntry]:
        return iter(list(self._entries.values()))

    @property
    def running(self) -> list[TaskEntry]:
        return list(self._running.values())

    @property
    def being_read(self) -> bool:
        """Somebody still reads a log of a task that is remembered here."""
        return any(entry.log.readers for entry in self._entries.values())

    def get(self, task_id: str, attempt: int | None = None) -> TaskEntry:
        """The newest attempt of a task, or the one that is named: an offset means nothing in another's log."""
        entry = self._entries.get(task_id)
        if entry is None or attempt not in (None, entry.opening.attempt):
            raise LlorchError(Code.TASK_NOT_FOUND, "this node does not know the task, or no longer")
        return entry

    # ---- attempts

    def known(self, opening: Open) -> TaskEntry | None:
        """The entry that a repeated OPEN attaches to; None if `opening` is new. Raises CONFLICT for a stale one."""
        entry = self._entries.get(opening.task_id)
        if entry is None:
            return None
        known = entry.opening
        bodies_differ = None not in (known.body_digest, opening.body_digest) and (
            known.body_digest != opening.body_digest
        )
        if known.owner != opening.owner or bodies_differ:
            raise LlorchError(Code.CONFLICT, "the task_id belongs to another task", param="task_id")
        if known.attempt > opening.attempt:
            raise LlorchError(
                Code.CONFLICT, "a later attempt of this task is known", details={"attempt": known.attempt}
            )
        return entry if known.attempt == opening.attempt else None

    def overtaken(self, opening: Open) -> TaskEntry | None:
        """The lower attempt that `opening` overtakes and that has to be cancelled, if one still runs."""
        older = self._running.get(opening.task_id)
        return older if older is not None and older.opening.attempt < opening.attempt else None

    def add(self, opening: Open, now: float, wall: float) -> TaskEntry:
        """A new task, in the place of a lower attempt of it."""
        entry = TaskEntry(opening, TaskLog(self._limits.kept_bytes, self._running_bytes), now, wall)
        for untold in self._untold.values():
            untold.pop(entry.task_id, None)
        self._entries[entry.task_id] = entry
        self._running[entry.task_id] = entry
        self._orphans.pop(entry.task_id, None)
        return entry

    def sealed(self, entry: TaskEntry, now: float, wall: float) -> None:
        """`entry`'s log was sealed: its retention begins."""
        entry.state = State.SEALED
        entry.sealed_at, entry.sealed_wall = now, wall
        if self._running.get(entry.task_id) is entry:
            del self._running[entry.task_id]
        if self._entries.get(entry.task_id) is not entry:
            return  # overtaken: nobody can find it any more, its last readers keep it alive
        self._orphans.pop(entry.task_id, None)
        (self._sealed_native if entry.native else self._sealed_v1).append(entry)
        if _reported(entry):
            for epoch, untold in self._untold.items():
                if epoch not in entry.told:
                    untold[entry.task_id] = entry
        self._sealed_bytes += _weight(entry)
        if self._too_much:
            self.expire(now)  # of time the sweep takes care, twice a second

    def discard(self, entry: TaskEntry) -> None:
        """Nobody is to find this attempt any more, or its end."""
        if self._entries.get(entry.task_id) is entry:
            del self._entries[entry.task_id]

    # ---- readers

    def attach(self, entry: TaskEntry, reader: Reader) -> None:
        """Raises GAP or INVALID_REQUEST when `reader.offset` can't be read."""
        entry.log.attach(reader)
        if entry.log.readers == 1:
            entry.lost_at = None
            self._orphans.pop(entry.task_id, None)

    def leave(self, entry: TaskEntry, reader: Reader, why: Gone, now: float) -> bool:
        """`reader` goes. True if the task has to be cancelled now; later ones come out of `orphaned`."""
        if not entry.log.detach(reader) or entry.log.sealed:
            return False
        if why is Gone.LOST:
            entry.lost_at = now
        if entry.log.readers:
            return False
        until = orphan_until(
            native=entry.native,
            detach=entry.opening.detach,
            left_at=now,
            lost_at=entry.lost_at,
            reconnect_grace_s=self._limits.reconnect_grace_s,
        )
        if until is None:
            return False
        if until <= now:
            return True
        if self._entries.get(entry.task_id) is entry:
            self._orphans[entry.task_id] = (entry, until)
        return False

    def orphaned(self, now: float) -> list[TaskEntry]:
        """Tasks whose readers did not come back in time. Each is returned once."""
        due = [entry for entry, until in self._orphans.values() if until <= now]
        for entry in due:
            del self._orphans[entry.task_id]
        return due

    # ---- retention

    def expire(self, now: float) -> None:
        """Forget sealed logs that are past their time, and the oldest ones while all together are too much."""
        for queue, keep_s in ((self._sealed_native, self._limits.sealed_native_s), (self._sealed_v1, SEALED_V1_S)):
            while queue and (_when(queue[0]) + keep_s <= now or self._entries.get(queue[0].task_id) is not queue[0]):
                self._forget(queue)
        while self._sealed_bytes and self._too_much:
            native, v1 = self._sealed_native, self._sealed_v1
            self._forget(native if native and (not v1 or _when(native[0]) <= _when(v1[0])) else v1)

    @property
    def _too_much(self) -> bool:
        running = self._running_bytes.count + len(self._running) * ENTRY_BYTES
        return self._sealed_bytes + running > self._limits.all_kept_bytes

    def _forget(self, queue: deque[TaskEntry]) -> None:
        entry = queue.popleft()
        self._sealed_bytes -= _weight(entry)
        if self._entries.get(entry.task_id) is entry:
            del self._entries[entry.task_id]
        for untold in self._untold.values():
            if untold.get(entry.task_id) is entry:
                del untold[entry.task_id]

    # ---- reports

    def tell(self, entry: TaskEntry, epoch: str) -> None:
        """The control of `epoch` was sent the TAIL: it need not hear of this task again."""
        entry.told.add(epoch)
        untold = self._untold.get(epoch)
        if untold is not None and untold.get(entry.task_id) is entry:
            del untold[entry.task_id]

    def reports(self, epoch: str | None) -> list[dict[str, Any]]:
        """TaskReports for the control of `epoch`: what runs, and what ended without its having been told."""
        running = [entry.report() for entry in self._running.values()]
        if epoch is None:
            sealed = self._sealed_reported(None)
        elif epoch in self._untold:
            sealed = list(self._untold[epoch].values())
        else:
            while len(self._untold) >= MOST_EPOCHS:
                del self._untold[next(iter(self._untold))]
            sealed = self._sealed_reported(epoch)
            self._untold[epoch] = {entry.task_id: entry for entry in sealed}
        return running + [entry.report() for entry in sealed[-MOST_REPORTED_SEALED:]]

    def _sealed_reported(self, epoch: str | None) -> list[TaskEntry]:
        every = (entry for queue in (self._sealed_native, self._sealed_v1) for entry in queue)
        wanted = (entry for entry in every if _reported(entry) and self._entries.get(entry.task_id) is entry)
        return sorted((entry for entry in wanted if epoch not in entry.told), key=_when)


def _reported(entry: TaskEntry) -> bool:
    """Native tasks can be read again, keyed ones must not run again; of others nobody asks once they have ended."""
    return entry.native or entry.opening.key_digest is not None


def _when(entry: TaskEntry) -> float:
    return entry.sealed_at if entry.sealed_at is not None else 0.0


def _weight(entry: TaskEntry) -> int:
    return entry.log.end - entry.log.start + ENTRY_BYTES
