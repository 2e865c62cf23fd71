"""One HTTP connection: aiohttp's side of it, behind a strict reader and within bounds of time and memory.

Owns what reaches aiohttp's parser: one request at a time, whose head is whole (`framing`); how long a head may take,
the first as every other; what waits behind a request that is served; and the answer to bytes that are no request, in
our shape and never quoted in a log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

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


class Ride(Protocol):
    """A request that is answered beside aiohttp."""

    def lost(self) -> None:
        """The connection has gone before `Connection.answered` was called."""


Lane = Callable[["Connection", bytes], Ride | None]  # a whole request; None: it is aiohttp's


class Connection(web_protocol.RequestHandler):
    """What could not be read is answered with 4xx, and nothing after it is looked at.

    A request that has come in one piece is offered to the `lane` first, for roles that have one: what takes it answers
    it by itself, and says so with `answered`. While it does, aiohttp sees nothing of this connection.
    """

    __slots__ = (
        "_answered",
        "_doors",
        "_framer",
        "_free",
        "_lane",
        "_pace",
        "_place",
        "_refused",
        "_ride",
        "bounded",
        "head_since",
    )

    def __init__(
        self,
        manager: web.Server,
        loop: asyncio.AbstractEventLoop,
        doors: Doors,
        place: Place,
        pace: OncePer,
        lane: Lane | None = None,
    ) -> None:
        super().__init__(manager, loop=loop, **CONNECTION)
        self._framer = Framer()
        self._doors = doors
        self._place = place
        self._pace = pace
        self._lane = lane
        self._ride: Ride | None = None
        self._free: asyncio.Future[None] | None = None  # for who waits until the ride is over
        self.bounded = False  # what may wait in its send buffer was bounded, for streams
        self._refused = False  # what came is no request, and will be answered as such; nothing after it is looked at
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
        ride, self._ride = self._ride, None
        if ride is not None:
            ride.lost()
            self._over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._force_close or self._close or self._refused:
            return
        if not data:  # aiohttp goes on with a parser that it had paused
            super().data_received(data)
            return
        framer = self._framer
        first = framer.between
        ours = framer.feed(data)
        if first and framer.rested:
            self._whole(ours)
        else:
            self._pass_on(ours, first)

    def _whole(self, request: bytes) -> None:
        """One whole request, and no more: nearly always so."""
        self._begin()
        if self._lane is None or not self._take(self._lane, request):
            super().data_received(request)

    # ---- beside aiohttp

    def _take(self, lane: Lane, request: bytes) -> bool:
        ride = lane(self, request)
        if ride is None:
            return False
        if not self._answered:  # it may be answered by now
            self._ride = ride
        return True

    def answered(self, *, keep: bool) -> None:
        """The ride is over. `keep`: the connection may serve another request."""
        self._ride = None
        self._over()
        if self.transport is None:
            return
        if not keep or self._close:
            self.force_close()
            return
        self._keepalive = True
        self._next_keepalive_close_time = close_at = self._loop.time() + KEEPALIVE_S
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(close_at, self._process_keepalive)
        self._next_or_rest()

    def _process_keepalive(self) -> None:
        if self._ride is None:
            super()._process_keepalive()
        else:  # it is not idle
            self._keepalive_handle = self._loop.call_later(KEEPALIVE_S, self._process_keepalive)

    def _over(self) -> None:
        free, self._free = self._free, None
        if free is not None and not free.done():
            free.set_result(None)

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        if self._ride is not None:
            free = self._free = self._loop.create_future()
            await asyncio.wait((free,), timeout=timeout)
        await super().shutdown(timeout)

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
        if ours and self._framer.rested:
            self._whole(ours)
        else:
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
        if finished[0].keep_alive:  # else nothing behind it is looked at: a task would begin, and be cut off at once
            self._next_or_rest()
        return finished

    def _next_or_rest(self) -> None:
        """What was asked is answered."""
        self._answered = True
        framer = self._framer
        if framer.rested:
            framer.proceed()
            self._doors.idle(self._place)
        elif framer.done:
            self._next()

    # ---- what is no request

    def _refuse(self, fault: Malformed) -> None:
        self._refused = True  # `_close` would end the connection before this is answered, behind an answer just given
        if not self._framer.between:
            self._break_body()
        else:
            self._messages.append((web_protocol._ErrInfo(fault.status, fault, fault.why), EMPTY_PAYLOAD))
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

    def _break_body(self) -> None:
        """Whoever reads the body is told, and the connection ends behind the answer; where nobody does, at once."""
        if self._messages:
            self._messages[-1][1].set_exception(web_protocol.RequestPayloadError())
        elif self._current_request is not None:
            self._current_request.content.set_exception(web_protocol.RequestPayloadError())
            self._close = True
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
