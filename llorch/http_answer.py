"""An engine's HTTP/1.1 answer, from the bytes of its connection: https://www.rfc-editor.org/rfc/rfc9112.html.

Owns where the head, the body and the answer end, and whether the connection can serve another one. Strict where two
readings would be possible. Sans-I/O: bytes in, body bytes out; what is no answer raises BadAnswer, which quotes
nothing. Never looks into a body. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_HEAD_BYTES = 32 * 1024  # some engines explain themselves in headers; none needs a tenth of it
MAX_SIZE_LINE_BYTES = 256  # of a chunk, with its extensions
MAX_TRAILER_BYTES = 8 * 1024
MOST_SIZES = 4_096  # size lines of chunks whose meaning is remembered

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?\r\n")
# With one way to match, however much space there is.
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]++):([^\r\n\0]*+)\r\n")
_FIELDS = re.compile(r"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:[^\r\n\0]*+\r\n)*+")
_LENGTH = re.compile(r"[0-9]{1,15}")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")


class BadAnswer(Exception):
    """What came is no HTTP answer, or ended before it was one."""


# Where a reader is. Plain numbers: they are looked at for every piece that arrives.
_HEAD, _LENGTH_BODY, _TO_THE_END, _SIZE_LINE, _CHUNK, _CHUNK_END, _TRAILER, _DONE = range(8)

_sizes: dict[bytes, int] = {}


class Answer:
    """One answer. `status` is 0 until its head is whole; then `headers` has its fields, their names in lower case."""

    __slots__ = ("_at", "_held", "_left", "_old", "headers", "status")

    def __init__(self) -> None:
        self._at = _HEAD
        self._held = b""
        self._left = 0  # bytes of the body, or of a chunk; before them, of the interim answers that came
        self._old = False  # HTTP/1.0
        self.status = 0
        self.headers: Mapping[str, str] = {}

    @property
    def done(self) -> bool:
        return self._at == _DONE

    @property
    def reusable(self) -> bool:
        """Whether its connection may be used again, once it is done."""
        return (
            self.done and not self._held and not self._old and "close" not in self.headers.get("connection", "").lower()
        )

    def feed(self, data: bytes) -> bytes:
        """The body's bytes in `data`. Raises BadAnswer."""
        at = self._at
        if at == _SIZE_LINE and not self._held:
            stop = data.find(b"\r\n")
            count = _sizes.get(data[:stop])
            if count and stop + count + 4 == len(data) and data.endswith(b"\r\n"):  # one chunk, as tokens mostly come
                return data[stop + 2 : -2]
            return self._chunked(data, 0)
        if at == _LENGTH_BODY:
            return self._counted(data)
        if at == _TO_THE_END:
            return data
        if self._held:
            data, self._held = self._held + data, b""
        if at != _HEAD:
            return self._chunked(data, 0)
        while data and self._at == _HEAD:
            data = self._head(data)
        return self.feed(data) if data else b""

    def eof(self) -> None:
        """The connection has ended. Raises BadAnswer if the answer had not."""
        if self._at == _TO_THE_END:
            self._at = _DONE
        elif self._at != _DONE:
            raise BadAnswer("it ended early")

    # ---- inside

    def _head(self, data: bytes) -> bytes:
        """What follows the head, or an interim one; b"" while that is not whole."""
        end = data.find(b"\r\n\r\n")
        if end < 0 or end > MAX_HEAD_BYTES:
            if len(data) > MAX_HEAD_BYTES:
                raise BadAnswer("its head is too large")
            if not b"HTTP/1.".startswith(data[:7]):
                raise BadAnswer("it speaks no HTTP/1")
            self._held = data
            return b""
        line = _STATUS.match(data)
        if line is None:
            raise BadAnswer("its status line is malformed")
        status = int(line[2])
        if status < 200:  # an interim answer; one that changes the protocol was not asked for
            if status == 101:
                raise BadAnswer("it changes the protocol")
            self._left += end + 4
            if self._left > MAX_HEAD_BYTES:
                raise BadAnswer("its interim answers are too many")
            return data[end + 4 :]
        self._old = line[1] == b"0"
        self._fields(data, line.end(), end + 2)
        self.status = status
        self._frame()
        return data[end + 4 :]

    def _fields(self, data: bytes, at: int, end: int) -> None:
        text = data[at:end].decode("latin-1")
        if _FIELDS.fullmatch(text) is None:
            raise BadAnswer("its head is malformed")
        fields: dict[str, str] = {}
        for name, value in _FIELD.findall(text):
            name, value = name.lower(), value.strip(" \t")
            # A list of lengths, or of codings, is none that is read.
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
        self.headers = fields

    def _frame(self) -> None:
        length, coding = self.headers.get("content-length"), self.headers.get("transfer-encoding")
        if self.status in (204, 304):
            self._at = _DONE
        elif coding is not None:
            if coding.lower() != "chunked" or length is not None or self._old:
                raise BadAnswer("where it ends is ambiguous")
            self._at = _SIZE_LINE
        elif length is not None:
            if _LENGTH.fullmatch(length) is None:
                raise BadAnswer("its length is no number")
            self._left = int(length)
            self._at = _LENGTH_BODY if self._left else _DONE
        else:
            self._at = _TO_THE_END

    def _counted(self, data: bytes) -> bytes:
        left = self._left - len(data)
        if left > 0:
            self._left = left
            return data
        self._at = _DONE
        if left:
            self._held = data[self._left :]
            data = data[: self._left]
        return data

    def _chunked(self, data: bytes, at: int) -> bytes:
        parts: list[bytes] = []
        size = len(data)
        while at < size:
            if self._at == _SIZE_LINE:
                stop = data.find(b"\r\n", at)
                if stop < 0:
                    if size - at > MAX_SIZE_LINE_BYTES:
                        raise BadAnswer("a chunk's size is too long")
                    break
                line = data[at:stop]
                count = _sizes.get(line)
                if count is None:
                    count = _size_of(line)
                at = stop + 2
                end = at + count
                if count and end + 2 <= size:  # nearly always a chunk comes whole
                    parts.append(data[at:end])
                    # Pieces of a stream have much the same length: as long as they do, a chunk costs one comparison.
                    between = b"\r\n" + line + b"\r\n"
                    step = count + len(between)
                    while data.startswith(between, end):
                        end += step
                        if end + 2 > size:
                            end -= step
                            break
                        parts.append(data[end - count : end])
                    if not data.startswith(b"\r\n", end):
                        raise BadAnswer("a chunk is longer than it said")
                    at = end + 2
                    continue
                self._left = count
                self._at = _CHUNK if count else _TRAILER
            elif self._at == _CHUNK:
                part = data[at : at + self._left]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                if not self._left:
                    self._at = _CHUNK_END
            elif self._at == _CHUNK_END:
                if size - at < 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise BadAnswer("a chunk is longer than it said")
                at += 2
                self._at = _SIZE_LINE
            elif self._at == _TRAILER:
                stop = data.find(b"\r\n", at)
                if stop < 0:
                    if size - at > MAX_TRAILER_BYTES:
                        raise BadAnswer("a trailer is too long")
                    break
                if stop == at:
                    self._at = _DONE
                at = stop + 2
            else:
                break
        self._held = data[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _size_of(line: bytes) -> int:
    found = _SIZE.fullmatch(line)
    if found is None or len(line) > MAX_SIZE_LINE_BYTES:
        raise BadAnswer("a chunk's size is malformed")
    if len(_sizes) >= MOST_SIZES:
        _sizes.clear()
    count = _sizes[line] = int(found[1], 16)
    return count
