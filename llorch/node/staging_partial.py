"""A file that is on its way: its bytes so far, what they are of, and their digest.

    <name>.partial         the bytes
    <name>.partial.json    what they are the beginning of (catalog_file.PartialState)

Owns these two files: going on with one that an earlier agent left, writing, making sure, and the end: the whole file
under its name, or nothing. Blocking throughout: call it off the event loop. Never asks anybody for a byte.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from llorch import whole_file
from llorch.node.catalog_file import (
    MAX_PARTIAL_STATE_BYTES,
    PARTIAL,
    PARTIAL_STATE,
    PartialState,
    dump_partial,
    load_partial,
)

SYNC_EVERY_BYTES = 64 * 1024 * 1024  # what a power cut may cost, where a digest can't tell
READ_BYTES = 4 * 1024 * 1024
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


P = ParamSpec("P")
R = TypeVar("R")


def _alone(call: Callable[Concatenate[Partial, P], R]) -> Callable[Concatenate[Partial, P], R]:
    @functools.wraps(call)
    def wrapped(self: Partial, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return call(self, *args, **kwargs)

    return wrapped


class Partial:
    """`length` is what is there and hashed. Calls wait for one another: one whose caller has gone may still run."""

    def __init__(self, folder: Path, name: str) -> None:
        self.final = folder / name
        self.path = folder / (name + PARTIAL)
        self._state_path = folder / (name + PARTIAL_STATE)
        self._state: PartialState | None = None
        self._descriptor = -1
        self._hash = hashlib.sha256()
        self._lock = threading.RLock()
        self.length = 0

    @property
    def state(self) -> PartialState | None:
        """What the bytes that are there are of; None: there is nothing that could be continued."""
        return self._state

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def look(self) -> int:
        """How many bytes an earlier attempt has left, believed for now."""
        try:
            with self._state_path.open("rb") as file:
                state = load_partial(file.read(MAX_PARTIAL_STATE_BYTES))
            found = self.path.lstat()
        except (OSError, ValueError):
            self._state = None
            return 0
        if not stat.S_ISREG(found.st_mode) or found.st_size > state.size_bytes:
            self._state = None
            return 0
        self._state = state
        return found.st_size if state.boot == _boot() else min(found.st_size, state.synced)

    @_alone
    def resume(self, at: Callable[[int], None], given_up: Callable[[], bool]) -> None:
        """Open what `look` has found, and hash it, for a hash can't be kept. Raises OSError, InterruptedError."""
        there = self.look()
        self._open(os.O_RDWR)
        os.ftruncate(self._descriptor, there)
        if self._state is not None and self._state.boot != _boot():
            self._keep(self._state.model_copy(update={"boot": _boot()}))
        self._hash, self.length = hashlib.sha256(), 0
        while self.length < there:
            if given_up():
                raise InterruptedError
            data = os.pread(self._descriptor, min(READ_BYTES, there - self.length), self.length)
            if not data:
                break
            self._hash.update(data)
            self.length += len(data)
            at(self.length)

    @_alone
    def adopt(self, given_up: Callable[[], bool]) -> str:
        """The digest of a whole file that has been put here under the partial's name. Raises OSError, InterruptedError.

        Never written to: it may be another program's as well.
        """
        self._open(os.O_RDONLY)
        self._hash, self.length = hashlib.sha256(), 0
        while data := os.pread(self._descriptor, READ_BYTES, self.length):
            if given_up():
                raise InterruptedError
            self._hash.update(data)
            self.length += len(data)
        return self.digest

    @_alone
    def begin(self, state: PartialState) -> None:
        """Start from nothing. Raises OSError."""
        self.close()
        self._state_path.unlink(missing_ok=True)  # first: it must never speak of another file's bytes
        self.path.unlink(missing_ok=True)
        self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._hash, self.length = hashlib.sha256(), 0
        self._keep(state.model_copy(update={"synced": 0, "boot": _boot()}))

    @_alone
    def write(self, data: bytes) -> None:
        """Raises OSError; what was written before stays."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, self.length)
            self._hash.update(view[:written])
            self.length += written
            view = view[written:]
        if self._state is not None and self.length - self._state.synced >= SYNC_EVERY_BYTES:
            os.fdatasync(self._descriptor)
            self._keep(self._state.model_copy(update={"synced": self.length}))

    @_alone
    def finish(self) -> None:
        """The whole file under its name, on disk. Raises OSError."""
        os.fsync(self._descriptor)
        self.close()
        self.path.replace(self.final)
        self._state_path.unlink(missing_ok=True)
        whole_file.sync_directory(self.final.parent)

    @_alone
    def discard(self) -> None:
        self.close()
        self._state = None
        self.length = 0
        for path in (self._state_path, self.path):
            with contextlib.suppress(OSError):
                path.unlink()

    @_alone
    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _open(self, flags: int) -> None:
        self.close()
        self._descriptor = os.open(self.path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def _keep(self, state: PartialState) -> None:
        whole_file.replace(self._state_path, dump_partial(state), durable=state.synced > 0)
        self._state = state


def _boot() -> str:
    """Which run of this machine it is: what an earlier one had not synced may be missing in its midst."""
    try:
        return _BOOT_ID.read_text().strip()[:64]
    except OSError:
        return ""
