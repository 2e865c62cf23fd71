"""An answer's bytes on their way to a client: HTTP/1.1 head and body, written to the connection as they are.

For answers that are passed on piece by piece: once a request is understood, a piece costs one write, and no object of a
library. Owns the framing of such an answer and when a client is behind. Whole answers that are made here are aiohttp's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, cast

from aiohttp import HttpVersion11, web

from llorch.http_connection import Connection
from llorch.web import REQUEST_ID, STREAM_WRITE_BUFFER_BYTES, limit_send_buffer

_REASONS = {status.value: status.phrase for status in HTTPStatus}
_second, _date = 0, ""


def date_now() -> str:
    """The Date header, made once a second."""
    global _second, _date
    now = int(time.time())
    if now != _second:
        _second, _date = now, formatdate(now, usegmt=True)
    return _date


def head_of(status: int, fields: Mapping[str, str]) -> bytes:
    """A head in bytes. Raises ValueError for a field that would break it."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in fields.items()]
    text = "".join(lines)
    if text.count("\n") != len(lines) or text.count("\r") != len(lines):
        raise ValueError("a field of an answer's head has a line break")
    return f"{text}Date: {date_now()}\r\n\r\n".encode()


class Sent:
    """What aiohttp is given in place of a response: there is nothing left for it to send."""

    prepared = True

    def __init__(self, status: int, keep_alive: bool) -> None:
        self.status = status
        self.keep_alive = keep_alive

    async def prepare(self, _request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, _data: bytes = b"") -> None:
        return None


class Outlet:
    """One answer on one connection. Everything but `drained` is done at once; writing to a client that has gone raises
    ConnectionResetError."""

    __slots__ = ("_chunked", "_connection", "_held", "_keep_alive", "_old", "_request_id", "_status", "_writer")

    def __init__(
        self,
        connection: Connection,
        request_id: str,
        *,
        keep_alive: bool = True,
        old: bool = False,
        writer: Any = None,
    ) -> None:
        """`old`: the client speaks HTTP/1.0. `writer`: aiohttp's, which learns that the answer has begun."""
        self._connection = connection
        self._request_id = request_id
        self._keep_alive = keep_alive
        self._old = old
        self._writer = writer
        self._chunked = not old
        self._held = b""
        self._status = 0

    @classmethod
    def of(cls, request: web.Request) -> Outlet:
        return cls(
            cast(Connection, request.protocol),
            request[REQUEST_ID],
            keep_alive=request.keep_alive,
            old=request.version < HttpVersion11,
            writer=request.writer,
        )

    def begin(self, status: int, headers: Mapping[str, str], *, hold: bool = False) -> None:
        """The head. With a content-length the body is what is written, and has to be that long. `hold`: the body is at
        hand, and the head goes with it.
        """
        fields = {**headers, "X-Request-Id": self._request_id, "X-Correlation-Id": self._request_id}
        whole = "content-length" in headers
        self._chunked = not whole and not self._old
        if self._chunked:
            fields["Transfer-Encoding"] = "chunked"
        elif not whole:
            self._keep_alive = False  # its end is that of the connection
        if not self._keep_alive:
            fields["Connection"] = "close"
        elif self._old:
            fields["Connection"] = "keep-alive"
        head = head_of(status, fields)
        self._status = status
        if self._writer is not None:
            self._writer.output_size = len(head)
        self._bound()
        if hold:
            self._held = head
        else:
            self._send(head)

    def _bound(self) -> None:
        """Once for each connection."""
        connection = self._connection
        if not connection.bounded:
            connection.bounded = True
            limit_send_buffer(connection.transport)

    def write(self, data: bytes) -> None:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._held:
            data, self._held = self._held + data, b""
        self._send(data)

    def flush(self) -> None:
        """A head that was held leaves alone."""
        if self._held:
            head, self._held = self._held, b""
            self._send(head)

    def write_now(self, data: bytes) -> bool:
        """As `write`, to a client that is there and not behind. False: nothing was done."""
        transport = self._connection.transport
        if transport is None or transport.is_closing():
            return False
        if self._held or transport.get_write_buffer_size() > STREAM_WRITE_BUFFER_BYTES:
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return True

    @property
    def behind(self) -> bool:
        """Much of what was written still waits here: it is better to wait, too."""
        transport = self._connection.transport
        return transport is None or transport.get_write_buffer_size() > STREAM_WRITE_BUFFER_BYTES

    async def drained(self) -> None:
        """Returns once the client has caught up. Raises ConnectionResetError if it has gone."""
        await self._connection._drain_helper()
        if self._connection.transport is None:  # one that went in good order only wakes who waits
            raise ConnectionResetError("the client has gone")

    def whole(self, response: web.Response) -> None:
        """A whole answer that was made as aiohttp sends it."""
        body = response.body
        assert isinstance(body, bytes)
        self.begin(response.status, {**response.headers, "content-length": str(len(body))})
        self.write(body)

    def finish(self) -> web.StreamResponse:
        """The end of the answer."""
        self.flush()
        if self._chunked:
            self._send(b"0\r\n\r\n")
        return cast(web.StreamResponse, Sent(self._status, self._keep_alive))

    def cut(self) -> web.StreamResponse:
        """End the connection in the midst of the answer."""
        self.abort()
        return cast(web.StreamResponse, Sent(self._status, False))

    def abort(self) -> None:
        transport = self._connection.transport
        if transport is not None:
            transport.abort()

    def _send(self, data: bytes) -> None:
        transport = self._connection.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has gone")
        transport.write(data)
