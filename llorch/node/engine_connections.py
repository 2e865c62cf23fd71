"""Requests to engines, on connections that are kept for a moment: the node's hot path to what generates.

Owns connecting, which connection serves which request, and that whoever asks learns of the answer's end, however it
comes. A request that finds its kept connection closed under it is sent again, once, on a new one: engines close idle
connections when they like (of 300 requests on kept ones, 4 at a time, llama.cpp's server so failed 5), and one that has
said nothing has shown nothing. Never looks into a body, never quotes what came.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Protocol, cast
from urllib.parse import urlsplit

from llorch import link
from llorch.http_answer import Answer, BadAnswer
from llorch.tasks import Guard

CONNECT_TIMEOUT_S = 5.0
KEPT_IDLE_S = 1.0  # a kept connection holds one of llama.cpp's threads; it, and uvicorn, close after 5 s themselves
LINGER_S = 0.25  # for the end of an answer that has said all: its connection is kept if that comes
MOST_PLACES = 1_024  # engines that are remembered: each start of one may have another port


class Taker(Protocol):
    """Who asked. Each is called in turn: `answered` once, `received` for each piece, `ended` last and always, unless
    the exchange was aborted or finished before."""

    def answered(self, status: int, headers: Mapping[str, str]) -> None: ...
    def received(self, data: bytes) -> None: ...
    def ended(self, broken: str | None) -> None:
        """`broken`: the kind of failure that cut it off; None: the answer is whole."""


class Exchange:
    """One request and its answer, as its taker holds it."""

    __slots__ = ("_again", "_connecting", "_connection", "_engines", "_place", "_request", "taker")

    def __init__(self, engines: Engines, place: _Place, request: bytes, taker: Taker) -> None:
        self._engines = engines
        self._place = place
        self._request = request  # until the answer begins
        self._again = True  # it may be sent once more, on a new connection
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self.taker: Taker | None = taker

    def abort(self) -> None:
        """The answer is wanted no longer: its connection is closed, which ends what generates it."""
        self.taker = None
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abort()

    def finish(self) -> None:
        """The answer has said all that it will, though its end may be under way."""
        self.taker = None
        if self._connection is not None:
            self._connection.linger()
            self._connection = None  # it may serve another one now

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    # ---- inside

    def begin(self) -> None:
        kept = self._place.idle.pop() if self._place.idle else None
        if kept is not None:
            kept.serve(self, self._request)
        else:
            self._connect()

    def _connect(self) -> None:
        self._again = False
        self._connecting = self._engines.guard.spawn(self._connected(), "connect")

    async def _connected(self) -> None:
        try:
            connection = await self._place.connect(self._engines)
        except (OSError, ValueError) as error:  # TimeoutError and SSLError are OSErrors
            self._connecting = None
            self.lost(type(error).__name__)
            return
        self._connecting = None
        connection.serve(self, self._request)

    def on(self, connection: _Connection) -> None:
        self._connection = connection

    def heard(self) -> None:
        """The first byte of the answer: from now on it is this connection's, for good."""
        self._again, self._request = False, b""

    def off(self) -> None:
        self._connection = None

    def lost(self, why: str) -> None:
        self._connection = None
        taker = self.taker
        if taker is None:
            return
        if self._again:
            self._connect()
            return
        self.taker = None
        taker.ended(why)


class _Place:
    """Where one engine listens, and the connections to it that wait for a request."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not the URL of an engine")
        self.tls = parts.scheme == "https"
        self.host, self.port = parts.hostname, parts.port or (443 if self.tls else 80)
        self.path = parts.path.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.fields = f"Host: {host}:{self.port}\r\nAccept: */*\r\nAccept-Encoding: identity\r\n"
        self.idle: list[_Connection] = []  # the newest last, which is used first

    async def connect(self, engines: Engines) -> _Connection:
        context = engines.tls_context() if self.tls else None
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(engines, self), self.host, self.port, ssl=context
            )
        return connection


class _Connection(asyncio.Protocol):
    """One connection: it serves an exchange, lingers at its end, or waits in its place."""

    __slots__ = (
        "_answer",
        "_engines",
        "_exchange",
        "_fresh",
        "_idle",
        "_paused",
        "_place",
        "_timer",
        "_transport",
        "idle_since",
    )

    def __init__(self, engines: Engines, place: _Place) -> None:
        self._engines = engines
        self._place = place
        self._idle = False  # it waits in its place
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._answer = Answer()
        self._exchange: Exchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._fresh = True  # nothing of the answer has come

    # ---- what exchanges ask

    def serve(self, exchange: Exchange, request: bytes) -> None:
        self._idle = False
        if exchange.taker is None or self._transport is None:  # aborted meanwhile, or closed
            self.abort()
            exchange.lost("ConnectionResetError")
            return
        self._answer, self._exchange, self._fresh = Answer(), exchange, True
        exchange.on(self)
        self._transport.write(request)

    def pause(self) -> None:
        if self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and self._paused:
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        self._exchange = None
        if self._idle:
            self._idle = False
            self._place.idle.remove(self)
        if self._transport is not None:
            self._transport.abort()

    def linger(self) -> None:
        self._exchange = None
        if self._answer.done:
            self._rest()
        elif self._transport is not None:
            self.resume()
            self._timer = self._engines.loop.call_later(LINGER_S, self._transport.abort)

    def close_idle(self, since: float) -> bool:
        """Close it if it has waited since `since` (loop time), or longer. True if it goes on waiting."""
        if self._idle and self.idle_since <= since:
            self.abort()
        return self._idle

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not derived from it
        self._engines.open.add(self)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            link.tune_socket(sock)

    def data_received(self, data: bytes) -> None:
        answer, exchange = self._answer, self._exchange
        if self._idle:  # nothing was asked
            self.abort()
            return
        if self._fresh:
            self._fresh = False
            if exchange is not None:
                exchange.heard()
        before = answer.status
        try:
            body = answer.feed(data)
        except BadAnswer:
            self._broken("BadAnswer")
            return
        if exchange is None:  # it lingers
            if answer.done:
                self._rest()
            return
        taker = exchange.taker
        if taker is None:
            return
        if not before and answer.status:
            taker.answered(answer.status, answer.headers)
        if body and exchange.taker is taker:
            taker.received(body)
        if answer.done and exchange.taker is taker:
            self._exchange = exchange.taker = None
            exchange.off()
            self._rest()
            taker.ended(None)

    def eof_received(self) -> None:
        self._closed("ServerDisconnectedError")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._engines.open.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._idle:
            self._idle = False
            self._place.idle.remove(self)
        if exc is None:
            self._closed("ServerDisconnectedError")
        else:  # what was to end with the connection has not ended so
            self._broken("ConnectionResetError")

    # ---- inside

    def _closed(self, why: str) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        try:
            self._answer.eof()
        except BadAnswer:
            self._broken(why)
            return
        taker, self._exchange = exchange.taker, None
        exchange.taker = None
        exchange.off()
        if self._transport is not None:
            self._transport.abort()
        if taker is not None:
            taker.ended(None)

    def _broken(self, why: str) -> None:
        exchange, self._exchange = self._exchange, None
        if self._transport is not None:
            self._transport.abort()
        if exchange is not None:
            exchange.lost(why)

    def _rest(self) -> None:
        """Its answer is over: wait for the next request, if the engine lets it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if not self._answer.reusable:
            transport.abort()
            return
        self.resume()
        self._idle = True
        self._place.idle.append(self)
        self._engines.waits(self)


class Engines:
    """Asks engines. Use `engines()`, which closes what is open at the end."""

    def __init__(self) -> None:
        self.guard = Guard("node.engines")
        self.loop = asyncio.get_running_loop()
        self._look: asyncio.TimerHandle | None = None
        self._places: dict[str, _Place] = {}
        self.open: set[_Connection] = set()
        self._context: ssl.SSLContext | None = None

    def ask(self, url: str, path: str, headers: Mapping[str, str], body: bytes, taker: Taker) -> Exchange:
        """POST `body` to an engine's `path`. Raises ValueError for a URL that is none.

        `headers` are printable ASCII. The first call of `taker` comes later, never from within this one.
        """
        place = self._places.get(url)
        if place is None:
            if len(self._places) >= MOST_PLACES:
                self._places = {known: each for known, each in self._places.items() if each.idle}
            place = self._places[url] = _Place(url)
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        head = f"POST {place.path}{path} HTTP/1.1\r\n{place.fields}{''.join(lines)}Content-Length: {len(body)}\r\n\r\n"
        exchange = Exchange(self, place, head.encode("ascii") + body, taker)
        exchange.begin()
        return exchange

    def tls_context(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = ssl.create_default_context()
        return self._context

    def waits(self, connection: _Connection) -> None:
        """It is kept for a while."""
        connection.idle_since = self.loop.time()
        if self._look is None:
            self._look = self.loop.call_later(KEPT_IDLE_S, self._close_idle)

    def _close_idle(self) -> None:
        since = self.loop.time() - KEPT_IDLE_S
        others = [connection.close_idle(since) for connection in list(self.open)]
        self._look = self.loop.call_later(KEPT_IDLE_S / 2, self._close_idle) if any(others) else None

    async def close(self) -> None:
        """Close every connection. Who still asks is told nothing more."""
        if self._look is not None:
            self._look.cancel()
        await self.guard.close()
        for connection in list(self.open):
            connection.abort()


@contextlib.asynccontextmanager
async def engines() -> AsyncIterator[Engines]:
    asking = Engines()
    try:
        yield asking
    finally:
        await asking.close()
