"""One HTTP/1.1 answer as it is read by `llorch bench`: bytes in, the bytes of its body out.

A load generator takes the time of each read and must cost little beside what it measures, so this reads what is needed
of an answer and no more: status, a few headers, where the body ends. https://www.rfc-editor.org/rfc/rfc9112.
"""

from __future__ import annotations

import re

MAX_HEAD_BYTES = 64 * 1024
MAX_LINE_BYTES = 1024  # the size of a chunk, or a line of a trailer
_STATUS = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: |$)")
_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")


class NotHttpError(Exception):
    """The peer does not speak HTTP/1.1."""


class Response:
    """`status` is 0 until the head is whole. `done`: all of the answer has come. `reusable`: the connection may carry
    another request then. Header names are lower case.
    """

    __slots__ = ("_chunked", "_left", "_rest", "_to_the_end", "done", "headers", "reusable", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self.reusable = False
        self._rest = b""
        self._chunked = False
        self._to_the_end = False  # the body ends with its connection
        self._left = 0  # bytes of the body, or of this chunk; -1: a line that ends a chunk is next, -2: a trailer

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body that `data` brings. Raises NotHttpError."""
        if self.status == 0:
            data = self._read_head(self._rest + data)
            if self.status == 0:
                return b""
        if self._chunked:
            return self._read_chunks(self._rest + data if self._rest else data)
        if self._to_the_end:
            return data
        if len(data) > self._left:
            raise NotHttpError("more came than was announced")
        self._left -= len(data)
        self.done = self._left == 0
        return data

    def end(self) -> bool:
        """The connection has ended: whether the answer is whole."""
        self.done = self.done or (self.status != 0 and self._to_the_end)
        return self.done

    # ------------------------------------------------------------ the head

    def _read_head(self, data: bytes) -> bytes:
        """What follows the head, if it is whole."""
        self._rest = data
        while (end := self._rest.find(b"\r\n\r\n")) >= 0:
            head, self._rest = self._rest[:end], self._rest[end + 4 :]
            first, *lines = head.split(b"\r\n")
            matched = _STATUS.match(first)
            if matched is None:
                raise NotHttpError("no status line")
            if (status := int(matched[2])) >= 200:
                self._settle(status, matched[1] == b"1", lines)
                rest, self._rest = self._rest, b""
                return rest
        if len(self._rest) > MAX_HEAD_BYTES or not b"HTTP/1.".startswith(self._rest[:7]):
            raise NotHttpError("no head of an answer")
        return b""

    def _settle(self, status: int, persistent: bool, lines: list[bytes]) -> None:
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon:
                raise NotHttpError("a header without a colon")
            self.headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        said = self.headers.get("connection", "").lower()
        self.reusable = "close" not in said and (persistent or "keep-alive" in said)
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length")
        if self._chunked:
            pass
        elif status in (204, 304):
            self.done = True
        elif length is None:
            self._to_the_end, self.reusable = True, False
        elif not length.isascii() or not length.isdigit():
            raise NotHttpError("a length that is no number")
        else:
            self._left = int(length)
            self.done = self._left == 0
        self.status = status

    # ------------------------------------------------------------ chunks

    def _read_chunks(self, data: bytes) -> bytes:
        body: list[bytes] = []
        at, size = 0, len(data)
        while at < size and not self.done:
            if self._left > 0:
                part = data[at : at + self._left]
                body.append(part)
                at += len(part)
                self._left -= len(part)
                if self._left == 0:
                    self._left = -1
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                if size - at > MAX_LINE_BYTES:
                    raise NotHttpError("a chunk's line that does not end")
                break
            self._take_line(data[at:end])
            at = end + 2
        self._rest = data[at:]
        return body[0] if len(body) == 1 else b"".join(body)

    def _take_line(self, line: bytes) -> None:
        """A line between chunks: a size, the end of one, or of the trailer."""
        if self._left == -1:
            if line:
                raise NotHttpError("a chunk that is longer than it said")
            self._left = 0
        elif self._left == -2:
            self.done = not line
        else:
            matched = _SIZE.match(line)
            if matched is None:
                raise NotHttpError("a chunk without a size")
            self._left = int(matched[0], 16) or -2
