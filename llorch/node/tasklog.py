"""Task logs: what a task shows, kept as append-only bytes that any reader may open at any offset.

Owns the bytes of one log, their offsets and sha256, and who reads them. Never does I/O, starts work or decodes a byte:
readers are woken by a plain call. Which logs there are is `retention`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Protocol

from llorch.errors import Code, LlorchError, invalid
from llorch.messages import Head, Tail

KEPT_BYTES = 4 * 1024 * 1024
HASHED_AT_ONCE_BYTES = 16 * 1024


class Reader(Protocol):
    """Someone who reads a log. `offset` is the next byte it wants; `TaskLog.take` moves it on."""

    offset: int

    def wake(self) -> None:
        """There is something new: a head, bytes, or the tail. Must not raise or wait."""

    def fresh(self, data: bytes) -> None:
        """As `wake`, and what is new is `data`, the last bytes of the log. Called once a token."""


class Kept:
    """How many bytes the logs have that were given this, and that are not sealed."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class TaskLog:
    """The bytes of one attempt, exactly as a client is to see them."""

    __slots__ = (
        "_blocked", "_buffer", "_digest", "_hashed", "_kept", "_latest", "_readers", "_start",
        "head", "kept_bytes", "tail",
    )  # fmt: skip

    def __init__(self, kept_bytes: int = KEPT_BYTES, kept: Kept | None = None) -> None:
        self._kept = kept if kept is not None else Kept()
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

    def begin(self, head: Head, first: bytes, *, wake: bool = True) -> None:
        """HEAD, together with the first bytes: until now this attempt could have run anywhere else. Without `wake`
        readers learn of them with the tail, which the caller has at hand.
        """
        self._check_open()
        if self.head is not None:
            raise RuntimeError("a log begins once")
        self.head = head
        self._put(first)
        if wake:
            self._wake()

    def append(self, data: bytes) -> None:
        if self.tail is not None or self.head is None:
            self._check_open()
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
        self._kept.count -= len(self._buffer)
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
        self._kept.count += len(data)
        self._latest = data
        size = len(buffer)
        if self._start + size - self._hashed >= HASHED_AT_ONCE_BYTES:
            self._hash()
        excess = size - self.kept_bytes
        if excess > 0:
            self._hash()
            del buffer[:excess]
            self._start += excess
            self._kept.count -= excess

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
