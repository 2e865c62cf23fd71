"""One HTTP connection: aiohttp's side of it, behind a strict reader and within bounds of time and memory.

Owns what reaches aiohttp's parser: one request at a time, whose head is whole (`framing`); how long a head may take,
the first as every other; what waits behind a request that is served; and the answer to bytes that are no request, in
our shape and never quoted in a log.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web, web_protocol
from aiohttp.streams import EMPTY_PAYLOAD

from llorch.doors import Doors, Place
from llorch.errors import Code, LlorchError
from llorch.framing import MAX_FIELDS, MAX_LINE_BYTES, MAX_WAITING_BYTES, Framer, Malformed
from llorch.logs import Log
from llorch.ratelimit import OncePer
from llorch.web import error_response, request_id_of

KEEPALIVE_S = 75.0  # aiohttp's own default keeps an idle connection for an hour

log = Log("listen")

CONNECTION: dict[str, Any] = {
    "access_log": None,
    "keepalive_timeout": KEEPALIVE_S,
    "auto_decompress": False,  # a body is what was sent; no bomb unpacks here
    "max_line_size": MAX_LINE_BYTES,
    "max_field_size": MAX_LINE_BYTES,
    "max_headers": MAX_FIELDS,
}


class Connection(web_protocol.RequestHandler):
    """What could not be read is answered with 4xx, and nothing after it is looked at."""

    __slots__ = ("_answered", "_doors", "_framer", "_pace", "_place", "bounded", "head_since")

    def __init__(
        self, manager: web.Server, loop: asyncio.AbstractEventLoop, doors: Doors, place: Place, pace: OncePer
    ) -> None:
        super().__init__(manager, loop=loop, **CONNECTION)
        self._framer = Framer()
        self._doors = doors
        self._place = place
        self._pace = pace
        self.bounded = False  # what may wait in its send buffer was bounded, for streams
        self._answered = False  # the request that is under way; its body may still be coming
        self.head_since: float | None = None  # when the head that is awaited began; None while none is

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.head_since = now = self._loop.time()
        self._place.close = self.force_close
        if not self._doors.enter(self._place, now):
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._doors.leave(self._place)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._force_close or self._close:
            return
        if not data:  # aiohttp goes on with a parser that it had paused
            super().data_received(data)
            return
        framer = self._framer
        first = framer.between
        ours = framer.feed(data)
        if first and framer.rested:  # one whole request, and no more: nearly always so
            self._begin()
            super().data_received(ours)
        else:
            self._pass_on(ours, first)

    # ---- from one request to the next

    def _pass_on(self, ours: bytes, first: bool) -> None:
        """Give aiohttp what belongs to the present request; `first`: its head is in it, if there is anything."""
        framer = self._framer
        if ours:
            if first:
                self._begin()
            super().data_received(ours)
            self._tell_its_reader()
        if framer.fault is not None:
            self._refuse(framer.fault)
        elif framer.between:
            if framer.held_bytes and self.head_since is None:
                self.head_since = self._loop.time()
        elif framer.done and self._answered:
            self._next()
        elif framer.held_bytes > MAX_WAITING_BYTES and not self._buffer_paused:
            self._pause_reading_for_buffer()

    def _begin(self) -> None:
        """The head of a request has come."""
        self._answered, self.head_since = False, None
        self._doors.busy(self._place)

    def _next(self) -> None:
        """A request has come whole and is answered: go on with what waits behind it."""
        ours = self._framer.proceed()
        if not ours:
            self._doors.idle(self._place)
        self._pass_on(ours, True)
        if self._buffer_paused:
            self._resume_reading_if_drained()

    def _resume_reading_if_drained(self) -> None:
        if self._framer.held_bytes <= MAX_WAITING_BYTES:
            super()._resume_reading_if_drained()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        finished = await super().finish_response(request, resp, start_time)
        self._answered = True
        framer = self._framer
        if framer.rested:
            framer.proceed()
            self._doors.idle(self._place)
        elif framer.done:
            self._next()
        return finished

    # ---- what is no request

    def _refuse(self, fault: Malformed) -> None:
        if not self._framer.between:
            self._break_body()
        else:
            self._messages.append((web_protocol._ErrInfo(fault.status, fault, fault.why), EMPTY_PAYLOAD))
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        self._close = True  # once what is under way is answered

    def _break_body(self) -> None:
        """Whoever reads the body is told; where nobody does, the connection ends."""
        if self._messages:
            self._messages[-1][1].set_exception(web_protocol.RequestPayloadError())
        elif self._current_request is not None:
            self._current_request.content.set_exception(web_protocol.RequestPayloadError())
        else:
            self.force_close()

    def _tell_its_reader(self) -> None:
        """aiohttp queues a fault that its own parser finds in a body behind the request that waits for that body."""
        if self._messages and isinstance(self._messages[-1][0], web_protocol._ErrInfo):
            request = self._current_request
            if request is not None and not request.content.is_eof():
                request.content.set_exception(web_protocol.RequestPayloadError())

    def log_exception(self, *args: Any, **kw: Any) -> None:
        if not isinstance(kw.get("exc_info"), web_protocol.RequestPayloadError):  # which has been answered
            super().log_exception(*args, **kw)

    def handle_error(
        self, request: Any, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc  # the client is gone, or the connection has become a link and ended: no answer, and no fault
        request_id = request_id_of(request.headers)
        if status < 500:
            # aiohttp's own message and log line quote the request: a token may stand in the line that was malformed.
            why = exc.why if isinstance(exc, Malformed) else "the request is not well-formed HTTP"
            held = self._pace.told(f"malformed: {why}", self._loop.time())
            if held is not None:
                log.info("request.malformed", peer=request.remote, why=why, request_id=request_id, more=held or None)
            error = LlorchError(Code.INVALID_REQUEST, why, status=status)
        else:
            log.error("request.failed", peer=request.remote, why=type(exc).__name__, request_id=request_id)
            error = LlorchError(Code.INTERNAL, "an unexpected fault; it was logged")
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun; another can't be sent")
        response = error_response(error, request_id)
        response.headers["X-Request-Id"] = response.headers["X-Correlation-Id"] = request_id
        response.force_close()
        return response
