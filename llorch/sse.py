"""Server-sent events, both ways: https://html.spec.whatwg.org/multipage/server-sent-events.html.

Owns cutting a byte stream into whole events whatever its split points, reading one event's fields, and writing one.
Never decodes more than it must: `Splitter` hands out raw event blocks, so that a relay can pass them on as they came.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_EVENT_BYTES = 4 * 1024 * 1024  # one event larger than a whole task log is a broken peer

_LINE_END = re.compile(rb"\r\n|\n|\r")
_TEXT_LINE_END = re.compile(r"\r\n|\n|\r")  # not str.splitlines: that also splits at U+2028 and others
_BLANK = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")


class SseError(Exception):
    """The peer sent what can't be an event stream."""


class Event(NamedTuple):
    event: str  # "" when the stream named none
    data: str
    id: str | None = None


class Splitter:
    """Cuts a byte stream into event blocks, each with the blank line that ends it.

    A block may hold only comments. A CR at the very end of the input waits for the next byte: it may be half a CRLF.
    """

    __slots__ = ("_begin", "_limit", "_plain", "_rest", "_searched")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._rest = b""
        self._searched = 0
        self._limit = limit
        self._begin = 0  # where in what was joined the first end may be
        self._plain = True  # every line in it ends with LF

    def feed(self, data: bytes) -> list[bytes]:
        """The blocks that `data` completes. Raises SseError when one grows past the limit."""
        buffer = self.join(data)
        blocks: list[bytes] = []
        at = 0
        while end := self.end(buffer, at):
            blocks.append(buffer[at:end])
            at = end
        self.hold(buffer, at)
        return blocks

    # `feed` in three steps, for who recognises some blocks before they are cut.

    def join(self, data: bytes) -> bytes:
        """What waited, and `data` after it: to be given to `end` and then to `hold`."""
        buffer = self._rest + data if self._rest else data
        self._plain = b"\r" not in buffer  # as every engine writes; a hundred times as fast as the expression
        self._begin, self._rest = max(0, self._searched - 3), b""
        return buffer

    def end(self, buffer: bytes, at: int) -> int:
        """Where the block ends that begins at `at`; 0 if it is not whole."""
        search = max(at, self._begin)
        if self._plain:
            blank = buffer.find(b"\n\n", search)
            return blank + 2 if blank >= 0 else 0
        found = _BLANK.search(buffer, search)
        if found is None or (found.end() == len(buffer) and buffer[-1:] == b"\r"):
            return 0
        return found.end()

    def hold(self, buffer: bytes, at: int) -> None:
        """What begins at `at` waits for its end. Raises SseError if it is past the limit."""
        self._rest = buffer[at:]
        self._searched = len(self._rest)
        if self._searched > self._limit:
            raise SseError(f"an event is larger than {self._limit} bytes")

    @property
    def waiting(self) -> int:
        """Bytes of an event that has not ended yet."""
        return len(self._rest)

    def finish(self) -> bytes:
        """What is left at the end of the stream: b"" if it ended at an event boundary.

        A last CR that waited for its LF does end its event: `b"data: x\\r\\r"` is whole, and is returned as such.
        """
        rest, self._rest, self._searched = self._rest, b"", 0
        return rest


def parse(block: bytes) -> Event | None:
    """The event in a block, or None if it carries no data (comments only, or an event without `data`)."""
    kind, ident = "", None
    data: list[str] = []
    if block.startswith(b"\xef\xbb\xbf"):
        block = block[3:]
    for raw in _LINE_END.split(block):
        if not raw or raw.startswith(b":"):
            continue
        name, _, value = raw.partition(b":")
        text = (value[1:] if value.startswith(b" ") else value).decode("utf-8", "replace")
        if name == b"data":
            data.append(text)
        elif name == b"event":
            kind = text
        elif name == b"id" and "\0" not in text:
            ident = text
    return Event(kind, "\n".join(data), ident) if data else None


class Decoder:
    """Events from a byte stream, for readers that want the fields."""

    __slots__ = ("_splitter",)

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._splitter = Splitter(limit)

    def feed(self, data: bytes) -> list[Event]:
        return [event for block in self._splitter.feed(data) if (event := parse(block)) is not None]

    def finish(self) -> Event | None:
        """The event that a final, so far undecided CR ended; a cut one is dropped, as the standard says."""
        rest = self._splitter.finish()
        return parse(rest) if rest.endswith(b"\r") and _BLANK.search(rest) else None


def encode(event: str, data: str, *, id: str | None = None) -> bytes:
    """One event. `data` may have several lines."""
    lines = [f"id: {id}"] if id is not None else []
    if event:
        lines.append(f"event: {event}")
    lines += [f"data: {line}" for line in _TEXT_LINE_END.split(data)]
    return ("\n".join(lines) + "\n\n").encode()


def comment(text: str) -> bytes:
    return f": {text}\n\n".encode()
