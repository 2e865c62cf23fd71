"""The audit log of a role: who was let in, who was refused, and what was done by whom, on disk in a chain.

Owns the way of a record to the disk: a queue, one thread that writes it, the alarm when it can't. `record` costs its
caller microseconds and never fails; `require` returns once the record is on disk and fails closed, for what must not
happen unrecorded. On a full disk records wait in memory, within a bound; what is beyond it is counted, and the chain
says how much was lost. Never holds a prompt, a token or a body: there is no field for one (see `audit_chain.FIELDS`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llorch.audit_chain import (
    CHECKPOINT,
    CHECKPOINT_EVERY_RECORDS,
    CHECKPOINT_EVERY_S,
    FIELDS,
    GAP,
    REMOVED,
    TORN,
    Chain,
    Value,
)
from llorch.audit_files import FOLDER, ChainFiles, Keys, make_folder
from llorch.errors import Code, ConfigError, LlorchError
from llorch.logs import Log

GATHER_S = 0.04  # records that come within it are written together; with the writing, 50 ms until they are in the file
SYNC_EVERY_S = 1.0  # what a power cut may cost of the records that nobody waited for
RETRY_AFTER_S = 1.0  # after a write that failed
ALARM_EVERY_S = 60.0
REQUIRE_WITHIN_S = 5.0  # a disk that hangs is as bad as a full one
CLOSE_WITHIN_S = 5.0
MAX_WAITING_RECORDS = 10_000  # about 20 MB at the very most, 5 MB as records are
MAX_BATCH_RECORDS = 1_000
YIELD_EVERY_RECORDS = 32  # the event loop of this process waits no longer for this thread than these take: 1 ms
MAX_FILE_BYTES = 64 * 1024 * 1024  # some 200,000 records; verified in seconds, sent by mail when it has to be

_FIELDS = frozenset(FIELDS)

log = Log("audit")


class Audit(Protocol):
    """What those see who have something to put on record."""

    def record(self, event: str, **fields: Value) -> None:
        """Put it on record soon. From the event loop's thread only. `fields` are some of `audit_chain.FIELDS`."""

    async def require(self, event: str, **fields: Value) -> None:
        """Put it on record now. Raises INSUFFICIENT_STORAGE if it is not on disk: then it must not be done."""

    async def start(self) -> None:
        """Raises ConfigError where the log can't be gone on with."""

    async def close(self) -> None:
        """What was put on record is on disk, or was said not to be."""


class Unaudited:
    """For `llorch dev`: a run that leaves nothing behind."""

    def record(self, event: str, **fields: Value) -> None:
        pass

    async def require(self, event: str, **fields: Value) -> None:
        pass

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


@dataclass(slots=True)
class _Entry:
    wall_s: float
    event: str
    fields: Mapping[str, Value]
    waiter: asyncio.Future[None] | None = None


def _check(event: str, fields: Mapping[str, Value]) -> None:
    if event == CHECKPOINT or not fields.keys() <= _FIELDS:
        raise TypeError(f"{event}: {sorted(fields.keys() - _FIELDS)} can't be put on record")


class AuditLog:
    """The log under `data_dir`, for one process. `keep_files`: how many files of it stay; None: all.

    `unwritten` is called, from any thread, with the number of records that could not be written when they were made.
    What is put on record before `start` waits for it.
    """

    def __init__(
        self,
        data_dir: str | Path,
        *,
        keep_files: int | None = None,
        unwritten: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._data_dir = data_dir
        self._keep_files = keep_files
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Entry] = deque()
        self._wake = threading.Event()  # there is something to write
        self._hurry = threading.Event()  # and somebody waits for it
        self._closing = False
        self._lost = 0  # counted by the loop's thread only
        self._alarm = _Alarm(unwritten)
        self._thread: threading.Thread | None = None
        self._failing = False
        self._late = 0  # entries at the left of the queue that were counted as unwritten

    async def start(self) -> None:
        """Go on with the log, or begin one. Raises ConfigError where that can't be."""
        files, chain, torn = await asyncio.to_thread(_open, self._data_dir)
        log.info("audit.opened", path=files.folder, seq=chain.seq, key=chain.fingerprint)
        if torn is not None:
            log.warning("audit.torn", **torn)
            self._queue.appendleft(_Entry(time.time(), TORN, torn))
        self._thread = threading.Thread(
            target=self._run, args=(_Writer(files, chain, self._keep_files),), name="audit", daemon=True
        )
        self._wake.set()
        self._thread.start()

    # ---- what the event loop calls

    def record(self, event: str, **fields: Value) -> None:
        _check(event, fields)
        if len(self._queue) >= MAX_WAITING_RECORDS:
            self._lost += 1
            self._alarm.unwritten(1, "too many wait to be written", waiting=len(self._queue), lost=self._lost)
            return
        self._queue.append(_Entry(time.time(), event, fields))
        if not self._wake.is_set():
            self._wake.set()

    async def require(self, event: str, **fields: Value) -> None:
        _check(event, fields)
        if self._closing:
            raise _no_storage("it is closed")
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._queue.append(_Entry(time.time(), event, fields, waiter))
        self._hurry.set()
        self._wake.set()
        try:
            async with asyncio.timeout(REQUIRE_WITHIN_S):
                await waiter
        except TimeoutError:
            self.record(event, **fields | {"decision": "refused", "reason": "not on record in time"})
            raise _no_storage("the disk does not answer") from None

    async def close(self) -> None:
        """Write what waits, and a last checkpoint."""
        self._closing = True
        if self._thread is None:
            return
        self._hurry.set()
        self._wake.set()
        await asyncio.to_thread(self._thread.join, CLOSE_WITHIN_S)
        if self._queue or self._thread.is_alive():
            log.error("audit.unwritten", count=len(self._queue), reason="the control ends, and they can't be written")

    # ---- the thread

    def _run(self, writer: _Writer) -> None:
        with contextlib.closing(writer):
            closing = False
            while not closing:
                self._pause(writer)
                self._wake.clear()
                self._hurry.clear()
                closing = self._closing
                while self._write_some(writer, closing) and self._queue:
                    pass

    def _pause(self, writer: _Writer) -> None:
        """Until there is something to do, and enough of it."""
        if self._failing:
            self._hurry.wait(RETRY_AFTER_S)
        elif self._wake.wait(writer.idle_s(time.monotonic())):
            self._hurry.wait(GATHER_S)

    def _write_some(self, writer: _Writer, closing: bool) -> bool:
        """Write what waits, up to a batch. False if that can't be done now."""
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), MAX_BATCH_RECORDS))]
        last = not self._queue
        try:
            writer.write(batch, lost=self._lost if last else None, closing=closing and last)
        except OSError as error:
            self._failed(batch, error.strerror or type(error).__name__)
            return False
        except Exception:
            log.fault("audit.failed")
            self._failed(batch, "an unexpected fault; it was logged")
            return False
        if self._failing:
            self._failing = False
            log.info("audit.written_again", lost=self._lost)
        self._late = max(0, self._late - len(batch))
        for entry in batch:
            if entry.waiter is not None:
                self._settle(entry.waiter, None)
        return True

    def _failed(self, batch: list[_Entry], reason: str) -> None:
        """Those who wait are refused, and that goes on record; all the rest waits for the next try."""
        self._failing = True
        waiting = [*batch, *(self._queue.popleft() for _ in range(len(self._queue)))]
        for entry in waiting:
            if entry.waiter is not None:
                self._settle(entry.waiter, _no_storage(reason))
                entry.waiter = None
                entry.fields = {**entry.fields, "decision": "refused", "reason": f"not on record: {reason}"}
        self._queue.extendleft(reversed(waiting))
        late, self._late = self._late, len(waiting)
        self._alarm.unwritten(len(waiting) - late, reason, waiting=len(waiting), lost=self._lost)

    def _settle(self, waiter: asyncio.Future[None], error: LlorchError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            self._loop.call_soon_threadsafe(_settle, waiter, error)


def _settle(waiter: asyncio.Future[None], error: LlorchError | None) -> None:
    if waiter.done():
        return
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)


def _no_storage(reason: str) -> LlorchError:
    return LlorchError(Code.INSUFFICIENT_STORAGE, f"the audit log can't be written: {reason}")


class _Alarm:
    """Tells that records are not on disk: the metric each time, the log once a minute. From any thread."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._untold = 0
        self._told_at = float("-inf")

    def unwritten(self, count: int, reason: str, *, waiting: int, lost: int) -> None:
        if count > 0:
            self._tell(count)
        with self._lock:
            self._untold += max(0, count)
            now = time.monotonic()
            if not self._untold or now - self._told_at < ALARM_EVERY_S:
                return
            count, self._untold, self._told_at = self._untold, 0, now
        log.error("audit.unwritten", count=count, waiting=waiting, lost=lost, reason=reason)


class _Writer:
    """Makes lines of records and puts them into the files; after an error all is as it was before. In one thread."""

    def __init__(self, files: ChainFiles, chain: Chain, keep_files: int | None) -> None:
        self._files = files
        self._chain = chain
        self._keep_files = keep_files
        self._lost_told = 0
        self._sync_at: float | None = None  # what is in the file, but perhaps not on disk, is to be there by then
        self._checkpoint_at: float | None = None
        self._begun = False  # the first lines of a run are signed at once, and with them what a crash has left

    def idle_s(self, now: float) -> float | None:
        """How long there is nothing to do if nothing comes."""
        due = [at for at in (self._sync_at, self._checkpoint_at) if at is not None]
        return max(0.0, min(due) - now) if due else None

    def write(self, batch: Sequence[_Entry], *, lost: int | None, closing: bool) -> None:
        """`lost`: how many records were lost so far, if those of the batch are the last that wait. Raises OSError."""
        if batch and self._files.length >= MAX_FILE_BYTES:
            self._rotate()
        now = time.monotonic()
        untold = 0 if lost is None else lost - self._lost_told
        gap = [_Entry(time.time(), GAP, {"count": untold})] if untold else []
        made = self._chain.since + len(batch) + len(gap)
        due = not self._begun or (self._checkpoint_at is not None and now >= self._checkpoint_at)
        checkpoint = made > 0 and (closing or due or made >= CHECKPOINT_EVERY_RECORDS)
        waited_for = any(entry.waiter is not None for entry in batch)
        self._put([*batch, *gap], checkpoint, sync=checkpoint or closing or waited_for or self._sync_due(now))
        self._lost_told += untold
        self._begun = self._begun or made > 0

    def _sync_due(self, now: float) -> bool:
        return self._sync_at is not None and now >= self._sync_at

    def _put(self, entries: Sequence[_Entry], checkpoint: bool, *, sync: bool) -> None:
        before, length = self._chain.position, self._files.length
        try:
            data = self._lines(entries, checkpoint)
            if data:
                self._files.append(data)
            if sync:
                self._files.sync()
        except BaseException:
            self._chain.rewind(before)
            self._files.undo(length)
            raise
        now = time.monotonic()
        if sync:
            self._sync_at = None
        elif data and self._sync_at is None:
            self._sync_at = now + SYNC_EVERY_S
        if not self._chain.since:
            self._checkpoint_at = None
        elif self._checkpoint_at is None:
            self._checkpoint_at = now + CHECKPOINT_EVERY_S

    def _lines(self, entries: Sequence[_Entry], checkpoint: bool) -> bytes:
        lines: list[bytes] = []
        if entries and self._files.length == 0:
            lines.append(self._chain.checkpoint(time.time()))
        for number, entry in enumerate(entries, 1):
            lines.append(self._chain.record(entry.wall_s, entry.event, entry.fields))
            if number % YIELD_EVERY_RECORDS == 0:
                time.sleep(0)  # the event loop may have the interpreter
        if checkpoint:
            lines.append(self._chain.checkpoint(time.time()))
        return b"".join(lines)

    def _rotate(self) -> None:
        """A file that can't be closed is gone on with, and one that can't be removed stays."""
        try:
            self._files.rotate()
            if self._keep_files is not None:
                for path, to_seq in self._files.surplus(self._keep_files):
                    self._put([_Entry(time.time(), REMOVED, {"file": path.name, "to_seq": to_seq})], True, sync=True)
                    path.unlink()
        except OSError as error:
            log.error("audit.not_rotated", path=self._files.folder, reason=error.strerror)

    def close(self) -> None:
        self._files.close()


def _open(at: str | Path) -> tuple[ChainFiles, Chain, dict[str, Value] | None]:
    """The files, the chain, and what is to be said of a line that a crash tore. Blocking."""
    data_dir = Path(at).expanduser()
    root = data_dir / FOLDER
    make_folder(data_dir, others_may_change=True)
    make_folder(root)
    keys = Keys.read_or_make(root)
    files = ChainFiles.take(root)
    try:
        chain, torn = files.resume(keys)
        if not torn:
            return files, chain, None
        name = files.keep_torn(torn)
        return files, chain, {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest(), "file": name}
    except OSError as error:
        files.close()
        raise ConfigError(f"the audit log in {files.folder} can't be opened: {error.strerror}") from None
    except BaseException:
        files.close()
        raise
