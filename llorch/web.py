"""HTTP as every role of llorch serves and calls it.

Owns the route table's meaning (one scope per route, checked before the handler and before a body is asked for), request
ids, the one error shape, bounded body reads, and the one factory of client sessions. What a route does is its role's;
how connections come in is `listen`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from aiohttp import HttpVersion11, web, web_protocol
from aiohttp.abc import AbstractResolver
from pydantic import BaseModel

from llorch import link, tls
from llorch.auth import ANONYMOUS, Principal, Scope, TokenRing, authorize, presented_token
from llorch.errors import Code, LlorchError
from llorch.ids import new_request_id
from llorch.logs import Log
from llorch.messages import decode_object, parse
from llorch.quotas import Quotas, of_the_cluster
from llorch.ratelimit import OncePer
from llorch.sessions import Sessions

BODY_TIMEOUT_S = 30.0  # for any body; a large one gets the time that it takes at MIN_BODY_RATE on top
MIN_BODY_RATE = 32 * 1024  # bytes/s, less than a poor upload; slower senders only hold memory
BODIES_AT_ONCE = 2  # of the largest size, or as many bytes of smaller ones, may be arriving from clients
MIN_ARRIVING_BYTES = 32 * 1024 * 1024  # where the largest size is small
BODIES_RETRY_MS = 1_000
MAX_SMALL_BODY_BYTES = 4 * 1024 * 1024  # reports and other JSON that is not a prompt
STREAM_SEND_BUFFER_BYTES = 64 * 1024  # a stalled reader holds this in the kernel, not 3 MB
STREAM_WRITE_BUFFER_BYTES = 16 * 1024  # and about this here, for who waits until it is less; under TLS 64 KiB more

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
M = TypeVar("M", bound=BaseModel)

log = Log("web")

PRINCIPAL = web.RequestKey("principal", Principal)
REQUEST_ID = web.RequestKey("request_id", str)
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(frozen=True, slots=True)
class Route:
    """One line of a role's route table. The OpenAPI document and the scope checks come from it."""

    method: str
    path: str
    scope: Scope
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    status: int = 200
    returns: str = "application/json"
    also: tuple[Scope, ...] = ()  # other scopes that will do

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return (self.scope, *self.also)


@dataclass(frozen=True, slots=True)
class Gate:
    """What stands before every handler: who may pass, what a refusal is counted as, and who is told of it."""

    ring: Callable[[], TokenRing]
    refused: Callable[[Code], None] = field(default=lambda _code: None)
    denied: Callable[[web.Request, Code, Sequence[Scope]], None] = field(default=lambda _request, _code, _wanted: None)
    metrics_open: bool = False  # the listener is loopback only
    look_again: Callable[[str], bool] = field(default=lambda _token: False)  # a strange token: is the ring another now?
    certified: Callable[[tls.Peer], Principal] | None = None  # whom a certificate stands for; raises LlorchError
    identified: Callable[[Principal], None] = field(default=lambda _principal: None)  # hears of each that is served
    sessions: Sessions = field(default_factory=Sessions)
    quotas: Quotas = field(default_factory=Quotas)

    def identify(self, request: web.Request) -> Principal | None:
        """Who sends this. Where a certificate was shown it alone counts. Raises LlorchError for one that is no good."""
        if self.certified is not None and request.transport is not None:
            try:
                peer = tls.peer_of(request.transport.get_extra_info("ssl_object"))
            except ValueError as error:
                raise LlorchError(Code.UNAUTHENTICATED, str(error)) from None
            if peer is not None:
                return self.certified(peer)
        return self.of_token(request.headers)

    def of_token(self, headers: Mapping[str, str]) -> Principal | None:
        """Whom the token of a request stands for."""
        token = presented_token(headers)
        if token is None:
            return None
        found = self.ring().identify(token, time.time())
        if found is None and self.look_again(token):
            found = self.ring().identify(token, time.time())
        return found

    def too_many(self, error: LlorchError, peer: str | None) -> LlorchError | None:
        """What a request without a valid token is told instead, if there were too many from its address."""
        if error.code is not Code.UNAUTHENTICATED:
            return None
        try:
            self.quotas.failed(peer, time.monotonic())
        except LlorchError as too_many:
            return too_many
        return None


def request_id_of(headers: Any) -> str:
    """The client's id if it is sane, else a new one."""
    given = headers.get("X-Request-Id") or headers.get("X-Correlation-Id")
    return given if given and sane_id(given) else new_request_id()


def sane_id(given: str) -> bool:
    return _SANE_ID.fullmatch(given) is not None


def json_response(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace"),
        status=status,
        content_type="application/json",
        charset="utf-8",
        headers=headers,
    )


def error_headers(error: LlorchError) -> dict[str, str]:
    if error.status not in (429, 503) and error.code is not Code.NODE_QUARANTINED:
        return {}
    after_ms = 1_000 if error.retry_after_ms is None else error.retry_after_ms
    return {"Retry-After": str(max(1, -(-after_ms // 1_000))), "X-Backoff-Ms": str(after_ms)}


def error_response(error: LlorchError, request_id: str, task_id: str | None = None) -> web.Response:
    headers = error_headers(error)
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="llorch"'
    return json_response(error.envelope(request_id=request_id, task_id=task_id), status=error.status, headers=headers)


class Arriving:
    """Bytes of the clients' bodies that are being read: those who send much and never finish hold no more than this."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._now = 0

    def add(self, size: int) -> None:
        """Raises RATE_LIMITED if there is no room; what was added counts until it is taken off."""
        self._now += size
        if self._now > self._most:
            words = "too many large requests are arriving at once"
            raise LlorchError(Code.RATE_LIMITED, words, retry_after_ms=BODIES_RETRY_MS, details={"limit": "bodies"})

    def take_off(self, size: int) -> None:
        self._now -= size


ARRIVING = web.AppKey("arriving", Arriving)


async def read_body(request: web.Request, *, most_bytes: int) -> bytes:
    """The whole body, or PAYLOAD_TOO_LARGE, REQUEST_TIMEOUT, or RATE_LIMITED where too much arrives at once.

    A stated length is believed before a byte is read.
    """
    if request.content_length is not None and request.content_length > most_bytes:
        raise LlorchError(Code.PAYLOAD_TOO_LARGE, f"the body is over {most_bytes} bytes")
    chunks: list[bytes] = []
    size = 0
    arriving = None if of_the_cluster(request[PRINCIPAL]) else request.app[ARRIVING]
    until = asyncio.get_running_loop().time() + BODY_TIMEOUT_S
    try:
        async with asyncio.timeout_at(until) as limit:
            while chunk := await request.content.readany():
                if size + len(chunk) > most_bytes:
                    raise LlorchError(Code.PAYLOAD_TOO_LARGE, f"the body is over {most_bytes} bytes")
                size += len(chunk)
                if arriving is not None:
                    arriving.add(len(chunk))
                chunks.append(chunk)
                limit.reschedule(until + size / MIN_BODY_RATE)
    except TimeoutError:
        raise LlorchError(Code.REQUEST_TIMEOUT, "the body did not arrive in time") from None
    except (web_protocol.RequestPayloadError, aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError):
        raise LlorchError(Code.INVALID_REQUEST, "the body could not be read") from None
    finally:
        if arriving is not None:
            arriving.take_off(size)
    return b"".join(chunks)


@contextlib.contextmanager
def arriving(request: web.Request, size: int) -> Iterator[None]:
    """Count `size` bytes of a body that was read among those that are being read. Raises RATE_LIMITED."""
    bodies = None if of_the_cluster(request[PRINCIPAL]) else request.app[ARRIVING]
    try:
        if bodies is not None:
            bodies.add(size)
        yield
    finally:
        if bodies is not None:
            bodies.take_off(size)


async def read_object(request: web.Request, *, most_bytes: int = MAX_SMALL_BODY_BYTES) -> dict[str, Any]:
    return decode_object(await read_body(request, most_bytes=most_bytes))


async def read_model(request: web.Request, model: type[M]) -> M:
    return parse(model, await read_object(request))


def make_app(routes: Sequence[Route], gate: Gate, *, max_body_bytes: int) -> web.Application:
    """An application that serves exactly `routes`. Everything else is 404 or 405 in the one error shape."""
    scopes: dict[Handler, tuple[Scope, ...]] = {}
    pace = OncePer()

    def refuse(request: web.Request, error: LlorchError, request_id: str) -> web.Response:
        """Not in the guard itself: an error that its frame keeps would keep that frame, and the body, for a while."""
        too_many = gate.too_many(error, request.remote)
        if too_many is not None:
            if (more := pace.told("auth", time.monotonic())) is not None:
                log.warning("auth.limited", peer=request.remote, more=more or None)
            return error_response(too_many, request_id)
        if error.code in (Code.UNAUTHENTICATED, Code.FORBIDDEN):
            gate.refused(error.code)
            gate.denied(request, error.code, scopes.get(request.match_info.handler) or ())
            if (more := pace.told(error.code, time.monotonic())) is not None:
                log.warning(
                    "auth.failed",
                    code=error.code,
                    reason=error.message,
                    path=request.path,
                    peer=request.remote,
                    request_id=request_id,
                    more=more or None,
                )
        return error_response(error, request_id)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request[REQUEST_ID] = request_id_of(request.headers)
        request[PRINCIPAL] = ANONYMOUS
        wanted = scopes.get(request.match_info.handler)
        try:
            if wanted is not None:
                if Scope.METRICS in wanted and gate.metrics_open:
                    wanted = (Scope.OPEN,)
                found = gate.identify(request)
                request[PRINCIPAL] = found or ANONYMOUS  # known also where it is refused
                if found is not None:
                    gate.quotas.request(found, time.monotonic())
                request[PRINCIPAL] = authorize(found, *wanted)
            expects = wanted is not None and request.version >= HttpVersion11
            if expects and request.headers.get("Expect", "").lower() == "100-continue":
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # the answer itself has not begun
            if request[PRINCIPAL] is ANONYMOUS:
                return await handler(request)
            gate.identified(request[PRINCIPAL])
            with gate.sessions.serving(request[PRINCIPAL]):
                return await handler(request)
        except LlorchError as error:
            return refuse(request, error, request_id)
        except web.HTTPException as error:
            return error_response(_from_http(error), request_id)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.fault("request.failed", path=request.path, request_id=request_id)
            return error_response(LlorchError(Code.INTERNAL, "an unexpected fault; it was logged"), request_id)

    async def stamp(request: web.Request, response: web.StreamResponse) -> None:
        request_id = request.get(REQUEST_ID) or request_id_of(request.headers)
        response.headers["X-Request-Id"] = response.headers["X-Correlation-Id"] = request_id

    app = web.Application(middlewares=[guard], client_max_size=max_body_bytes)
    app[ARRIVING] = Arriving(max(BODIES_AT_ONCE * max_body_bytes, MIN_ARRIVING_BYTES))
    app.on_response_prepare.append(stamp)
    for route in routes:
        if not all(isinstance(scope, Scope) for scope in route.scopes):
            raise ValueError(f"{route.method} {route.path}: it has no scope, so nobody knows who may ask")
        if scopes.setdefault(route.handler, route.scopes) != route.scopes:
            raise ValueError(f"{route.path}: one handler, two scopes")
        app.router.add_route(route.method, route.path, route.handler, expect_handler=_say_nothing)
    # aiohttp's own 404 and 405 answer an `Expect` themselves, in their shape, and with a 500 if it is not UTF-8.
    for path in dict.fromkeys(route.path for route in routes):
        app.router.add_route("*", path, _wrong_method, expect_handler=_say_nothing)
    app.router.add_route("*", r"/{path:[\s\S]*}", _no_route, expect_handler=_say_nothing)
    return app


async def _say_nothing(_request: web.Request) -> None:
    """`Expect` is answered by the guard: who may not send is told so before its body is on the way."""


async def _wrong_method(_request: web.Request) -> web.StreamResponse:
    raise LlorchError(Code.METHOD_NOT_ALLOWED, "this route does not have this method")


async def _no_route(_request: web.Request) -> web.StreamResponse:
    raise LlorchError(Code.NOT_FOUND, "there is no such route")


def _from_http(error: web.HTTPException) -> LlorchError:
    if error.status == 413:
        return LlorchError(Code.PAYLOAD_TOO_LARGE, "the body is too large")
    return LlorchError(Code.INVALID_REQUEST, "the request could not be understood", status=error.status)


# ---------------------------------------------------------------- streams


def limit_send_buffer(transport: asyncio.Transport | None) -> None:
    """For streams: a reader that stalls holds little memory, in the kernel and here."""
    if transport is not None:
        transport.set_write_buffer_limits(high=STREAM_WRITE_BUFFER_BYTES)
        bound_kernel_buffer(transport, socket.SO_SNDBUF, STREAM_SEND_BUFFER_BYTES)


def bound_kernel_buffer(transport: asyncio.BaseTransport, which: int, most_bytes: int) -> None:
    """What the kernel keeps for a connection: `which` is SO_SNDBUF or SO_RCVBUF. Never raises: one whose peer has just
    gone has no socket any more (with TLS), or one that takes no option; who writes to it learns that."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, which, most_bytes)


# ---------------------------------------------------------------- calling


def _tuned_socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    link.tune_socket(sock)
    return sock


@contextlib.asynccontextmanager
async def client_session(
    *,
    tls: ssl.SSLContext | None = None,
    read_timeout_s: float | None = None,
    connect_timeout_s: float = 5.0,
    reuse: bool = True,
    resolver: AbstractResolver | None = None,
) -> AsyncIterator[aiohttp.ClientSession]:
    """A session that never follows, unpacks or believes what a peer did not have to say.

    `read_timeout_s` is between two reads; None leaves it to the caller. No proxy from the environment is used. Without
    `reuse` each request has a connection of its own. A `resolver` is asked at every connection, and closed at the end.
    """
    connector = aiohttp.TCPConnector(
        limit=0,
        ttl_dns_cache=30,
        use_dns_cache=resolver is None,
        resolver=resolver,
        ssl=tls or True,
        socket_factory=_tuned_socket,
        force_close=not reuse,
    )
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=read_timeout_s),
        auto_decompress=False,
        trust_env=False,
        headers={"Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        raise_for_status=False,
    ) as session:
        try:
            yield session
        finally:
            if resolver is not None:
                await resolver.close()
