"""Task logs: what a task shows, kept as append-only bytes that any reader may open at any offset.

Owns the bytes of each log, their offsets and sha256, who reads them, how long they stay, and when a task whose readers
have gone is to end. Never does I/O, starts work or decodes a byte: time comes in as an argument, readers are woken by a
plain call, and cancelling a task is for whoever runs it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol

from llorch.errors import Code, LlorchError, invalid
from llorch.messages import Head, Open, Tail

KEPT_BYTES = 4 * 1024 * 1024
HASHED_AT_ONCE_BYTES = 16 * 1024
ENTRY_BYTES = 4 * 1024  # what a task costs besides its bytes, measured: thousands of short answers are not free
SEALED_V1_S = 30.0
LOST_GRACE_S = 30.0  # a /v1 client can't come back, but a control that restarts may
MOST_REPORTED_SEALED = 1_000
MOST_EPOCHS = 8  # controls, and their restarts, for which it is kept what they were not told
NATIVE = "native"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept for how long; the settings of the node."""

    kept_bytes: int = KEPT_BYTES  # of one log; beyond it the oldest bytes go
    all_kept_bytes: int = 256 * 1024 * 1024  # of all logs together; the oldest sealed ones go first
    sealed_native_s: float = 600.0
    reconnect_grace_s: float = 10.0  # a native task's client may come back within this


class Reader(Protocol):
    """Someone who reads a log. `offset` is the next byte it wants; `TaskLog.take` moves it on."""

    offset: int

    def wake(self) -> None:
        """There is something new: a head, bytes, or the tail. Must not raise or wait."""

    def fresh(self, data: bytes) -> None:
        """As `wake`, and what is new is `data`, the last bytes of the log. Called once a token."""


class TaskLog:
    """The bytes of one attempt, exactly as a client is to see them."""

    __slots__ = (
        "_blocked", "_buffer", "_digest", "_hashed", "_latest", "_readers", "_start", "head", "kept_bytes", "tail"
    )  # fmt: skip

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._buffer = bytearray()
        self._start = 0  # the offset of the oldest byte that is kept
        self._digest = hashlib.sha256()
        self._hashed = 0  # the offset up to which the digest has come
        self._latest = b""  # what was appended last: what readers take who keep up
        self._readers: tuple[Reader, ...] = ()
        self.kept_bytes = kept_bytes
        self._blocked: asyncio.Future[None] | None = None  # the writer, while it waits for readers
        self.head: Head | None = None
        self.tail: Tail | None = None

    @property
    def start(self) -> int:
        return self._start

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return self._start + len(self._buffer)

    @property
    def sealed(self) -> bool:
        return self.tail is not None

    @property
    def readers(self) -> int:
        return len(self._readers)

    @property
    def sha256(self) -> str:
        """Of every byte that was ever appended, also of those no longer kept."""
        self._hash()
        return self._digest.hexdigest()

    # ---- writing

    def begin(self, head: Head, first: bytes) -> None:
        """HEAD, together with the first bytes: until now this attempt could have run anywhere else."""
        self._check_open()
        if self.head is not None:
            raise RuntimeError("a log begins once")
        self.head = head
        self._put(first)
        self._wake()

    def append(self, data: bytes) -> None:
        self._check_open()
        if self.head is None:
            raise RuntimeError("a log has no bytes before its head")
        self._put(data)
        for reader in self._readers:
            reader.fresh(data)

    def seal(self, tail: Tail) -> None:
        """TAIL: no byte follows."""
        self._check_open()
        if tail.length != self.end:
            raise RuntimeError("a tail states the length of its log")
        self.tail = tail
        self._latest = b""
        self._wake()

    def fits(self, count: int) -> bool:
        """True if `count` more bytes (at most `kept_bytes`) push out nothing that a reader has yet to read."""
        if len(self._buffer) + count <= self.kept_bytes:
            return True
        oldest_kept = self.end + count - self.kept_bytes
        return all(reader.offset >= oldest_kept or reader.offset < self._start for reader in self._readers)

    async def room(self, count: int, timeout_s: float) -> bool:
        """Wait until `count` bytes fit; False if slow readers did not make room within `timeout_s`."""
        if self.fits(count):
            return True
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while not self.fits(count):
            if loop.time() >= until:
                return False
            blocked = self._blocked = loop.create_future()
            try:
                await asyncio.wait((blocked,), timeout=until - loop.time())
            finally:
                self._blocked = None
        return True

    def _put(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        self._latest = data
        size = len(buffer)
        if self._start + size - self._hashed >= HASHED_AT_ONCE_BYTES:
            self._hash()
        excess = size - self.kept_bytes
        if excess > 0:
            self._hash()
            del buffer[:excess]
            self._start += excess

    def _hash(self) -> None:
        """A token is hashed with those around it: one by one, the calls would cost more than the work."""
        end = self.end
        if self._hashed < end:
            with memoryview(self._buffer) as view:
                self._digest.update(view[self._hashed - self._start :])
            self._hashed = end

    def _check_open(self) -> None:
        if self.tail is not None:
            raise RuntimeError("a sealed log never grows")

    def _wake(self) -> None:
        for reader in self._readers:  # a tuple: a reader that leaves while it is woken disturbs nobody
            reader.wake()

    def _unblock(self) -> None:
        if self._blocked is not None and not self._blocked.done():
            self._blocked.set_result(None)

    # ---- reading

    def check(self, offset: int) -> None:
        """Raises GAP for bytes that are no longer kept, INVALID_REQUEST for an offset past the end."""
        if offset < self._start:
            raise LlorchError(
                Code.GAP,
                f"the log is kept from offset {self._start} on",
                details={"offset": offset, "kept_from": self._start},
            )
        if offset > self.end:
            raise invalid(f"the log has {self.end} bytes, offset {offset} is past its end", param="offset")

    def read(self, offset: int, limit: int) -> bytes:
        """Up to `limit` bytes from `offset`; b"" at the end. Raises as `check` does."""
        latest = self._latest
        if self._start <= offset == self._start + len(self._buffer) - len(latest) and 0 < len(latest) <= limit:
            return latest
        self.check(offset)
        at = offset - self._start
        return bytes(self._buffer[at : at + limit])

    def took(self) -> None:
        """A reader has moved on without `take`: it had what was appended last."""
        if self._blocked is not None:
            self._unblock()

    def take(self, reader: Reader, limit: int, *, tear: bool = True) -> bytes:
        """The next bytes for `reader`, which moves on: whole events, as many as `limit` has room for; if for none, a
        part of one if it may be torn, else nothing. Raises GAP if it was overtaken."""
        data = self.read(reader.offset, limit)
        if reader.offset + len(data) != self.end:
            whole = data.rfind(b"\n\n") + 2
            if whole > 1:
                data = data[:whole]
            elif not tear:
                return b""
        reader.offset += len(data)
        if self._blocked is not None:
            self._unblock()
        return data

    def attach(self, reader: Reader) -> None:
        """`reader` is woken from now on. Raises as `check` does; does not wake it for what is there already."""
        self.check(reader.offset)
        self._readers = (*self._readers, reader)

    def detach(self, reader: Reader) -> bool:
        """`reader` is woken no more. False if it was not attached."""
        rest = tuple(other for other in self._readers if other is not reader)
        was = len(rest) != len(self._readers)
        self._readers = rest
        self._unblock()  # the writer may have waited for this one
        return was


class Gone(StrEnum):
    """Why a reader went: its client left, or it ended with no word and its control may have died."""

    LEFT = "left"
    LOST = "lost"


def orphan_until(
    *, native: bool, detach: bool, left_at: float, lost_at: float | None, reconnect_grace_s: float
) -> float | None:
    """When a task whose last reader went at `left_at` ends for want of readers; None: it runs to its end.

    `lost_at` is when a reader was last lost since somebody first read again. Such a reader may come back, whatever the
    others meant by leaving: two controls that read one task never cancel each other's.
    """
    if detach:
        return None
    if native:
        return None if lost_at is not None else left_at + reconnect_grace_s
    return left_at if lost_at is None else lost_at + LOST_GRACE_S


class State(StrEnum):
    ACCEPTED = "accepted"
    RUNNING = "running"
    SEALED = "sealed"


class Run(Protocol):
    """The execution of a task, for those who read its log. It ends for the first reason given; ending is idempotent."""

    def give_body(self, body: bytes) -> None: ...
    def cancel(self) -> None: ...
    def stop(self, why: LlorchError) -> None: ...


@dataclass(slots=True, eq=False)
class TaskEntry:
    """One attempt of one task on this node. `accepted_at` and `sealed_at` measure; the `_wall` times are for people."""

    opening: Open
    log: TaskLog
    accepted_at: float
    accepted_wall: float
    state: State = State.ACCEPTED
    run: Run | None = None
    sealed_at: float | None = None
    sealed_wall: float | None = None
    lost_at: float | None = None
    streamed: bool = True  # events, which can carry an error; not one whole answer
    tokens_out: int = 0
    told: set[str] = field(default_factory=set)  # epochs of the controls that were sent the TAIL
    final: dict[str, Any] | None = None  # the report, once nothing in it can change

    @property
    def task_id(self) -> str:
        return self.opening.task_id

    @property
    def native(self) -> bool:
        return self.opening.path == NATIVE

    @property
    def key(self) -> tuple[str, int]:
        return self.opening.task_id, self.opening.attempt

    def report(self) -> dict[str, Any]:
        """TaskReport: what a control or a person may know. Fields that are unknown are left out."""
        if self.final is not None:
            return self.final
        opening, tail = self.opening, self.log.tail
        out: dict[str, Any] = {
            "task_id": opening.task_id,
            "attempt": opening.attempt,
            "epoch": opening.epoch,
            "owner": opening.owner,
            "path": opening.path,
            "key_digest": opening.key_digest,
            "body_digest": opening.body_digest,
            "model": opening.model,
            "pool_id": opening.pool_id,
            "state": self.state.value,
            "offset": self.log.end,
            "tokens_out": self.tokens_out,
            "started_at": _rfc3339(self.accepted_wall),
        }
        if self.sealed_wall is not None:
            out["ended_at"] = _rfc3339(self.sealed_wall)
        if tail is not None:
            out["tokens_in"], out["tokens_out"] = tail.tokens_in, tail.tokens_out
            out["cached_tokens"] = tail.cached_tokens
            out["finish_reason"] = tail.finish_reason
            out["ttft_ms"], out["decode_ms"] = tail.timings.ttft_ms, tail.timings.decode_ms
            out["code"] = tail.error["code"] if tail.error is not None else None
        out = {name: value for name, value in out.items() if value is not None}
        if self.sealed_wall is not None:
            self.final = out
        return out


def _rfc3339(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TaskLogs:
    """Every task this node runs or still remembers: the newest attempt of each."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: dict[str, TaskEntry] = {}
        self._running: dict[str, TaskEntry] = {}
        self._sealed_native: deque[TaskEntry] = deque()  # both in the order of sealing
        self._sealed_v1: deque[TaskEntry] = deque()
        self._sealed_bytes = 0
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
        entry = TaskEntry(opening, TaskLog(self._limits.kept_bytes), now, wall)
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
        self.expire(now)

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
        running = sum(map(_weight, self._running.values()))
        while self._sealed_bytes and self._sealed_bytes + running > self._limits.all_kept_bytes:
            native, v1 = self._sealed_native, self._sealed_v1
            self._forget(native if native and (not v1 or _when(native[0]) <= _when(v1[0])) else v1)

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
