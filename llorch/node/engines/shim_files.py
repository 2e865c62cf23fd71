"""The files of an engine as its shim keeps them: the log with its bounds, and records that are written whole.

Owns how a log is rotated and what becomes of words that the disk does not take (they are dropped and counted: an engine
never waits for a disk), and the lock under which a pid file is changed, for its shim and the agent both do. Imports
little, for it is loaded once for every engine: that is why it does not use `whole_file`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time

LOG_BYTES = 8 * 1024 * 1024  # of one file
LOG_FILES = 3  # with the one that is being written
TAIL_BYTES = 32 * 1024
REOPEN_S = 1.0  # a log that can't be opened is tried no more often
LOCK_WITHIN_S = 0.5  # what the other side does under the lock takes less than a millisecond
MAX_RECORD_BYTES = 64 * 1024
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace(path: str, content: object) -> None:
    """Put a JSON file at `path`, for this user alone: whoever looks sees the old one or the new one. Raises OSError."""
    raw = json.dumps(content).encode()
    temporary = f"{os.path.dirname(path)}/.{os.urandom(8).hex()}.tmp"  # noqa: PTH120
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(raw)
        os.rename(temporary, path)  # noqa: PTH104
    except OSError:
        remove(temporary)
        raise


def remove(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108
    except OSError:
        pass


def read(path: str) -> dict[str, object]:
    """A JSON object of ours; an empty one if there is none that can be read."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            content = json.loads(file.read(MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class Locked:
    """`with Locked(folder):` nobody else changes the records in it. Raises OSError after half a second of waiting: the
    other side may have been stopped in the middle.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        until = time.monotonic() + LOCK_WITHIN_S
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES) or time.monotonic() > until:
                    os.close(self._descriptor)
                    raise
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def generations(path: str) -> list[str]:
    """The files of a log, the one that is being written first."""
    return [path, *(f"{path}.{number}" for number in range(1, LOG_FILES))]


class RotatedLog:
    """A log of bounded size that never keeps its writer waiting. `tail` is the last of it, whatever the disk took."""

    def __init__(self, path: str, limit: int = LOG_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._descriptor: int | None = None
        self._size = 0
        self._closed_until = 0.0
        self._untold = 0
        self.lost_bytes = 0
        self.tail = bytearray()

    def open(self) -> None:
        """Raises OSError where it could not be written at all; a full disk is no reason not to start."""
        try:
            self._open()
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._closed_until = time.monotonic() + REOPEN_S

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._descriptor = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        names = generations(self._path)
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            try:
                os.rename(newer, older)  # noqa: PTH104
            except FileNotFoundError:
                pass
        self.close()
        self._open()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def write(self, words: bytes) -> None:
        """What an engine said."""
        self.tail += words[-TAIL_BYTES:]
        del self.tail[:-TAIL_BYTES]
        self._put(words)

    def note(self, words: str) -> None:
        """What the shim itself has to say, on a line of its own with its time; no part of the tail."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        begun = "\n" if self.tail and not self.tail.endswith(b"\n") else ""
        self._put(f"{begun}-- {stamp} llorch: {words}\n".encode())

    def _put(self, words: bytes) -> None:
        left = len(words)
        try:
            self._make_ready(left)
            if self._untold:
                self._append(f"\n-- llorch: {self._untold} bytes of this log could not be written\n".encode())
                self._untold = 0
            while left:
                left -= self._append(words[-left:])
        except OSError:
            if self._descriptor is None:
                self._closed_until = time.monotonic() + REOPEN_S
        self.lost_bytes += left
        self._untold += left

    def _make_ready(self, count: int) -> None:
        if self._descriptor is None:
            if time.monotonic() < self._closed_until:
                raise OSError(errno.EAGAIN, "it could not be opened a moment ago")
            self._open()
        if self._size and self._size + count > self._limit:
            self._rotate()

    def _append(self, words: bytes) -> int:
        assert self._descriptor is not None  # _make_ready() opened it
        count = os.write(self._descriptor, words)
        self._size += count
        return count

    def last_lines(self, most: int, chars: int) -> list[str]:
        text = self.tail.decode("utf-8", "replace").splitlines()
        return ["".join(c for c in line if c == "\t" or c.isprintable())[:chars] for line in text[-most:]]
