"""Where a request begins and ends on a connection: a strict reader of HTTP/1.1's framing, in front of aiohttp's parser.

Requests are smuggled between two readers who disagree about where one ends. This one refuses whatever could be read in
two ways (RFC 9112 lets a server do so), and every bound on what it takes has its place here: the head's lines, their
number, its size, the chunks of a body, what may wait behind a request. It passes on one request at a time; the next one
is not looked at before this one is answered. Never changes a byte, never reads what a request means. Pure.
"""

from __future__ import annotations

import re

MAX_LINE_BYTES = 8 * 1024  # of a head; what nginx and most proxies take
MAX_FIELDS = 64  # header lines; a browser behind two proxies sends thirty
LEAST_FIELD_BYTES = 4  # `a:` and the end of the line
MAX_HEAD_BYTES = 32 * 1024  # all of it: a prompt belongs into a body
MAX_WAITING_BYTES = 64 * 1024  # of requests behind the one that is served; what is more waits at its sender
MAX_CHUNKS = 64 * 1024  # of one body; each costs as much as a kilobyte

# A target has a path of visible ASCII and no fragment: not `*`, not another server's URL.
_FIRST = rb"[A-Z]{1,20} /[!\"$-~]*+ HTTP/1\.([01])\r\n"
_FIELDS = rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:[\t\x20-\x7e\x80-\xff]*+\r\n)*+"
_REQUEST_LINE, _FIELD_LINES = re.compile(_FIRST), re.compile(_FIELDS)
_HEAD_AT_ONCE = re.compile(_FIRST + _FIELDS + rb"(?=\r\n)")  # nearly every head comes in one piece
# Those that say where a body ends or who asks: of each there may be one. It begins at the end of the line before.
_SINGLE = re.compile(
    rb"\r\n((?i:host|content-length|transfer-encoding|authorization|api-key|x-api-key)):[ \t]*+([^\r]*+)"
)
_HOST = re.compile(rb"[A-Za-z0-9._~%:\[\]-]{0,260}[ \t]*")
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,15}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")  # no extensions: nobody uses them, and parsers differ over them
_MAX_CHUNK_LINE = 10


class Malformed(Exception):
    """The peer's bytes are no request that this server takes. `why` is in our words and quotes nothing.

    `good`: how many of the bytes before it still belong to the request.
    """

    def __init__(self, why: str, status: int = 400, good: int = 0) -> None:
        super().__init__(why)
        self.why = why
        self.status = status
        self.good = good


# Where a reader is. Plain numbers: they are looked at for every piece that arrives.
_HEAD, _LENGTH, _SIZE, _CHUNK, _CHUNK_END, _LAST, _DONE = range(7)


class Framer:
    """One connection's bytes, cut at the ends of requests.

    `feed` and `proceed` return what the parser may see. `fault` says that nothing after it can be trusted.
    """

    __slots__ = ("_at", "_begin", "_checked", "_chunks", "_held", "_left", "fault")

    def __init__(self) -> None:
        self._at = _HEAD
        self._held = b""  # not passed on, from `_begin`: an unfinished head, a piece of a chunk's frame, later requests
        self._begin = 0
        self._checked = 0  # bytes of a held head that are whole lines, and good
        self._left = 0  # of a body, or of a chunk
        self._chunks = 0
        self.fault: Malformed | None = None

    @property
    def between(self) -> bool:
        """No request is under way: the next byte begins a head, or goes on with one."""
        return self._at == _HEAD

    @property
    def done(self) -> bool:
        """All of a request was passed on; the next one waits for `proceed`."""
        return self._at == _DONE

    @property
    def rested(self) -> bool:
        """As `done`, and nothing waits behind it."""
        return self._at == _DONE and not self._held

    @property
    def held_bytes(self) -> int:
        return len(self._held) - self._begin

    def feed(self, data: bytes) -> bytes:
        """What of `data`, and of what was held, belongs to the request that is read now."""
        if self._held:
            data, self._held, self._begin = self._held[self._begin :] + data, b"", 0
        return self._take(data, 0)

    def proceed(self) -> bytes:
        """The request was answered: begin the next one, with what is here of it."""
        self._at, self._checked = _HEAD, 0
        return self._take(self._held, self._begin) if self._held else b""

    # ---- inside

    def _take(self, data: bytes, begin: int) -> bytes:
        if self.fault is not None:
            return b""
        try:
            end = begin if self._at == _DONE else self._advance(data, begin)
        except Malformed as fault:
            self.fault, self._held, self._begin = fault, b"", 0
            return data[begin : fault.good]
        if end < len(data):
            self._held, self._begin = data, end
        else:
            self._held, self._begin = b"", 0
        return data[begin:end]

    def _advance(self, data: bytes, at: int) -> int:
        """How far the present request reaches in `data`, from `at` on."""
        if self._at == _HEAD:
            head_end = self._head(data, at)
            if not head_end:
                return at
            at = head_end
        if self._at == _LENGTH:
            taken = min(self._left, len(data) - at)
            self._left -= taken
            if not self._left:
                self._at = _DONE
            return at + taken
        return self._chunked(data, at)

    def _head(self, data: bytes, begin: int) -> int:
        """The end of the head that begins there, 0 if it is not whole. Raises Malformed."""
        whole = None if self._checked else _HEAD_AT_ONCE.match(data, begin)
        if whole is not None:
            end = whole.end()
            if end - begin > LEAST_FIELD_BYTES * MAX_FIELDS:
                self._check_size(data, begin, end)
            self._frame(data, whole.end(1), end)
            return end + 2
        start = begin + 2 if data.startswith(b"\r\n", begin) else begin  # RFC 9112, 2.2: one empty line is passed over
        if self._checked:
            at = begin + self._checked
        else:
            line = _REQUEST_LINE.match(data, start)
            if line is None:
                self._check_first(data, start)
                return 0
            at = line.end()
        end = _FIELD_LINES.match(data, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        self._check_size(data, start, end)
        if not data.startswith(b"\r\n", end):
            self._check_rest(data, end, "a header line is malformed", 431)
            self._checked = end - begin
            return 0
        self._frame(data, data.index(b"\r\n", start), end)
        return end + 2

    def _check_first(self, data: bytes, start: int) -> None:
        if len(data) > start and not 65 <= data[start] <= 90 and data[start:] != b"\r":
            raise Malformed("no HTTP request")
        self._check_rest(data, start, "the request line is malformed", 414)

    def _check_rest(self, data: bytes, at: int, why: str, too_long: int) -> None:
        """A line that is not good may still be unfinished."""
        end = data.find(b"\n", at)
        if (len(data) if end < 0 else end) - at > MAX_LINE_BYTES:
            raise Malformed(f"a line of the head is over {MAX_LINE_BYTES} bytes", too_long)
        if end >= 0:
            raise Malformed(why)

    def _check_size(self, data: bytes, start: int, end: int) -> None:
        """`end`: of the lines that are here, and good."""
        if data.count(b"\n", start, end) - 1 > MAX_FIELDS:
            raise Malformed(f"there are more than {MAX_FIELDS} header lines", 431)
        if end - start > MAX_HEAD_BYTES:
            raise Malformed(f"the head is over {MAX_HEAD_BYTES} bytes", 431)
        if end - start > MAX_LINE_BYTES:
            first, *lines = data[start:end].split(b"\r\n")
            if len(first) > MAX_LINE_BYTES:
                raise Malformed(f"the request line is over {MAX_LINE_BYTES} bytes", 414)
            if max(map(len, lines)) > MAX_LINE_BYTES:
                raise Malformed(f"a line of the head is over {MAX_LINE_BYTES} bytes", 431)

    def _frame(self, data: bytes, first_end: int, end: int) -> None:
        """How long the body is, from a head whose lines are good. Raises Malformed where there are two ways to say."""
        old = data[first_end - 1] == 48  # the 0 of HTTP/1.0
        found = _SINGLE.findall(data, first_end, end)
        fields = {name.lower(): value for name, value in found}
        if len(fields) < len(found):
            raise Malformed("a header that there may be one of is there twice")
        host = fields.get(b"host", b"" if old else b"?")
        if _HOST.fullmatch(host) is None:
            raise Malformed("there is no Host, or no valid one")
        length, coding = fields.get(b"content-length"), fields.get(b"transfer-encoding")
        self._left = self._chunks = 0
        if coding is not None:
            if length is not None or old or coding.rstrip(b" \t").lower() != b"chunked":
                raise Malformed("where the body ends is ambiguous: there may be `chunked` alone, in HTTP/1.1")
            self._at = _SIZE
            return
        if length is not None:
            if not _CONTENT_LENGTH.fullmatch(length.rstrip(b" \t")):
                raise Malformed("Content-Length is no number of bytes")
            self._left = int(length)
        self._at = _LENGTH

    def _chunked(self, data: bytes, at: int) -> int:
        """As far as whole frames go; a piece of one is held until it is whole. Raises Malformed."""
        size = len(data)
        while at < size:
            if self._at == _SIZE:
                line = _CHUNK_SIZE.match(data, at)
                if line is None:
                    if size - at < _MAX_CHUNK_LINE and b"\n" not in data[at:]:
                        return at
                    raise Malformed("a chunk's size is malformed", good=at)
                self._chunks += 1
                if self._chunks > MAX_CHUNKS:
                    raise Malformed(f"there are more than {MAX_CHUNKS} chunks", good=at)
                at, self._left = line.end(), int(line[1], 16)
                self._at = _CHUNK if self._left else _LAST
            elif self._at == _CHUNK:
                taken = min(self._left, size - at)
                at, self._left = at + taken, self._left - taken
                if not self._left:
                    self._at = _CHUNK_END
            else:
                if size - at < 2 and data[at:] == b"\r":
                    return at
                if data[at : at + 2] != b"\r\n":
                    raise Malformed("a chunk is longer than it said, or has trailers", good=at)
                at += 2
                if self._at == _LAST:
                    self._at = _DONE
                    return at
                self._at = _SIZE
        return at
