"""HTTP as every role of llorch serves and calls it.

Owns the route table's meaning (one scope per route, checked before the handler and before a body is asked for), request
ids, the one error shape, bounded body reads, `serve()` as the one hardened way to listen, and the one factory of client
sessions. What a route does is its role's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import re
import resource
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from aiohttp import HttpVersion11, web, web_protocol
from pydantic import BaseModel

from llorch import link
from llorch.auth import ANONYMOUS, Principal, Scope, TokenRing, authorize
from llorch.errors import Code, ConfigError, LlorchError
from llorch.logs import Log
from llorch.messages import decode_object, parse
from llorch.tasks import Guard

KEEPALIVE_S = 75.0  # aiohttp's own default keeps an idle connection for an hour
HEAD_TIMEOUT_S = 10.0  # a connection that has sent no whole request head by then is closed
REAP_EVERY_S = 2.0
BODY_TIMEOUT_S = 30.0  # for any body; a large one gets the time that it takes at MIN_BODY_RATE on top
MIN_BODY_RATE = 32 * 1024  # bytes/s, less than a poor upload; slower senders only hold memory
PEER_TIMEOUT_MS = 60_000  # a client's machine that is gone, for the kernel; twice what a slow reader is given
PEER_IDLE_S = 15  # silence before the kernel asks whether a client's machine is still there
MAX_SMALL_BODY_BYTES = 4 * 1024 * 1024  # reports and other JSON that is not a prompt
_NOT_HERE = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
STREAM_SEND_BUFFER_BYTES = 64 * 1024  # a stalled reader holds this in the kernel, not 3 MB
STREAM_WRITE_BUFFER_BYTES = 16 * 1024  # and about this here, if `drained` is waited for; under TLS 64 KiB more

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
    """What stands before every handler: who may pass, and what a refusal is counted as."""

    ring: Callable[[], TokenRing]
    refused: Callable[[Code], None] = field(default=lambda _code: None)
    metrics_open: bool = False  # the listener is loopback only


def request_id_of(headers: Any) -> str:
    """The client's id if it is sane, else a new one."""
    given = headers.get("X-Request-Id") or headers.get("X-Correlation-Id")
    return given if given and _SANE_ID.fullmatch(given) else secrets.token_hex(8)


def json_response(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace"),
        status=status,
        content_type="application/json",
        charset="utf-8",
        headers=headers,
    )


def error_headers(error: LlorchError) -> dict[str, str]:
    if error.status not in (429, 503):
        return {}
    after_ms = 1_000 if error.retry_after_ms is None else error.retry_after_ms
    return {"Retry-After": str(max(1, -(-after_ms // 1_000))), "X-Backoff-Ms": str(after_ms)}


def error_response(error: LlorchError, request_id: str, task_id: str | None = None) -> web.Response:
    headers = error_headers(error)
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="llorch"'
    return json_response(error.envelope(request_id=request_id, task_id=task_id), status=error.status, headers=headers)


async def read_body(request: web.Request, *, most_bytes: int) -> bytes:
    """The whole body, or PAYLOAD_TOO_LARGE / REQUEST_TIMEOUT. A stated length is believed before a byte is read."""
    if request.content_length is not None and request.content_length > most_bytes:
        raise LlorchError(Code.PAYLOAD_TOO_LARGE, f"the body is over {most_bytes} bytes")
    chunks: list[bytes] = []
    size = 0
    until = asyncio.get_running_loop().time() + BODY_TIMEOUT_S
    try:
        async with asyncio.timeout_at(until) as limit:
            while chunk := await request.content.readany():
                size += len(chunk)
                if size > most_bytes:
                    raise LlorchError(Code.PAYLOAD_TOO_LARGE, f"the body is over {most_bytes} bytes")
                chunks.append(chunk)
                limit.reschedule(until + size / MIN_BODY_RATE)
    except TimeoutError:
        raise LlorchError(Code.REQUEST_TIMEOUT, "the body did not arrive in time") from None
    except (web_protocol.RequestPayloadError, aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError):
        raise LlorchError(Code.INVALID_REQUEST, "the body could not be read") from None
    return b"".join(chunks)


async def read_object(request: web.Request, *, most_bytes: int = MAX_SMALL_BODY_BYTES) -> dict[str, Any]:
    return decode_object(await read_body(request, most_bytes=most_bytes))


async def read_model(request: web.Request, model: type[M]) -> M:
    return parse(model, await read_object(request))


def make_app(routes: Sequence[Route], gate: Gate, *, max_body_bytes: int) -> web.Application:
    """An application that serves exactly `routes`. Everything else is 404 or 405 in the one error shape."""
    scopes: dict[Handler, tuple[Scope, ...]] = {}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request[REQUEST_ID] = request_id_of(request.headers)
        request[PRINCIPAL] = ANONYMOUS
        try:
            wanted = scopes.get(request.match_info.handler)
            if wanted is not None:
                if Scope.METRICS in wanted and gate.metrics_open:
                    wanted = (Scope.OPEN,)
                request[PRINCIPAL] = authorize(gate.ring(), request.headers, *wanted)
            expects = wanted is not None and request.version >= HttpVersion11
            if expects and request.headers.get("Expect", "").lower() == "100-continue":
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # the answer itself has not begun
            return await handler(request)
        except LlorchError as error:
            if error.code in (Code.UNAUTHENTICATED, Code.FORBIDDEN):
                gate.refused(error.code)
                log.warning(
                    "auth.failed", code=error.code, path=request.path, peer=request.remote, request_id=request_id
                )
            return error_response(error, request_id)
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
    app.on_response_prepare.append(stamp)
    for route in routes:
        if scopes.setdefault(route.handler, route.scopes) != route.scopes:
            raise ValueError(f"{route.path}: one handler, two scopes")
        app.router.add_route(route.method, route.path, route.handler, expect_handler=_say_nothing)
    return app


async def _say_nothing(_request: web.Request) -> None:
    """`Expect` is answered by the guard: who may not send is told so before its body is on the way."""


def _from_http(error: web.HTTPException) -> LlorchError:
    if error.status == 404:
        return LlorchError(Code.NOT_FOUND, "there is no such route")
    if error.status == 405:
        return LlorchError(Code.METHOD_NOT_ALLOWED, "this route does not have this method")
    if error.status == 413:
        return LlorchError(Code.PAYLOAD_TOO_LARGE, "the body is too large")
    return LlorchError(Code.INVALID_REQUEST, "the request could not be understood", status=error.status)


# ---------------------------------------------------------------- listening


class Server:
    """An application that listens. `url` is where; `close` ends it: no new connections, then what runs, then all."""

    def __init__(self, runner: web.AppRunner, url: str, host: str, port: int, guard: Guard) -> None:
        self._runner = runner
        self._guard = guard
        self.url, self.host, self.port = url, host, port

    async def close(self) -> None:
        await self._guard.close()
        await self._runner.cleanup()


_CONNECTION: dict[str, Any] = {
    "access_log": None,
    "keepalive_timeout": KEEPALIVE_S,
    "auto_decompress": False,  # a body is what was sent; no bomb unpacks here
}


class _Connection(web_protocol.RequestHandler):
    """aiohttp's side of one connection. What it could not read is answered in our shape, and is never logged."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """aiohttp queues a malformed piece of a body behind the request that waits for it: that one is told here."""
        super().data_received(data)
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
            log.info("request.malformed", peer=request.remote, why=type(exc).__name__, request_id=request_id)
            error = LlorchError(Code.INVALID_REQUEST, "the request is not well-formed HTTP", status=status)
        else:
            log.error("request.failed", peer=request.remote, why=type(exc).__name__, request_id=request_id)
            error = LlorchError(Code.INTERNAL, "an unexpected fault; it was logged")
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun; another can't be sent")
        response = error_response(error, request_id)
        response.headers["X-Request-Id"] = response.headers["X-Correlation-Id"] = request_id
        response.force_close()
        return response


class _Site(web.SockSite):
    """One listening socket of a runner."""

    async def start(self) -> None:
        await web.BaseSite.start(self)
        loop, manager = asyncio.get_running_loop(), self._runner.server
        assert manager is not None
        self._server = await loop.create_server(
            lambda: _Connection(manager, loop=loop, **_CONNECTION),
            sock=self._sock,
            ssl=self._ssl_context,
            backlog=self._backlog,
        )


async def serve(
    app: web.Application, host: str, port: int, *, tls: ssl.SSLContext | None = None, shutdown_timeout_s: float = 5.0
) -> Server:
    """Listen on host:port (0: a free one). Raises ConfigError if it is taken, or is no loopback and has no TLS."""
    shown = f"[{host}]" if ":" in host else host
    try:
        sockets = await _listening(host, port, loopback_only=tls is None)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigError(f"{shown}:{port} can't be listened on: {why}", hint="give another --bind HOST:PORT") from None
    _allow_many_files()
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # a client that leaves cancels its handler: the task's slot goes free
        shutdown_timeout=shutdown_timeout_s,
    )
    await runner.setup()
    try:
        for sock in sockets:
            await _Site(runner, sock, ssl_context=tls, backlog=1024).start()
    except BaseException:
        for sock in sockets:
            sock.close()
        await runner.cleanup()
        raise
    bound_port = int(runner.addresses[0][1])
    guard = Guard("web")
    guard.loop(_reaper(runner), "reaper")
    return Server(runner, f"{'https' if tls else 'http'}://{shown}:{bound_port}", host, bound_port, guard)


async def _listening(host: str, port: int, *, loopback_only: bool) -> list[socket.socket]:
    """A bound socket for each address that `host` means here, all on one port; accepted ones inherit what is set."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, *_, address in dict.fromkeys(found):
            number = ipaddress.ip_address(str(address[0]).partition("%")[0])
            if loopback_only and not (getattr(number, "ipv4_mapped", None) or number).is_loopback:
                raise OSError(errno.EACCES, f"{host} leads beyond this machine, and there is no TLS")
            try:
                sockets.append(_bound(family, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error  # `localhost` leads to ::1 also where the kernel has no IPv6
            else:
                port = sockets[-1].getsockname()[1]
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    if missing is not None and not sockets:
        raise missing
    return sockets


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        link.tune_socket(sock, idle_s=PEER_IDLE_S, user_timeout_ms=PEER_TIMEOUT_MS)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _allow_many_files() -> None:
    """A connection is a file; the soft limit of 1,024 is for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _reaper(runner: web.AppRunner) -> Callable[[], Awaitable[float]]:
    """Closes connections that never finish their first request head; aiohttp waits for them without end."""
    first_seen: dict[Any, float] = {}

    async def step() -> float:
        now = time.monotonic()
        open_now = list(runner.server.connections) if runner.server is not None else []
        for connection in open_now:
            since = first_seen.setdefault(connection, now)
            started = connection._request_count > 0 or connection._request_in_progress
            if not started and now - since > HEAD_TIMEOUT_S:
                connection.force_close()
        for gone in set(first_seen).difference(open_now):
            del first_seen[gone]
        return REAP_EVERY_S

    return step


def limit_send_buffer(request: web.Request) -> None:
    """For streams: a reader that stalls holds little memory, in the kernel and here."""
    if request.transport is not None:
        request.transport.set_write_buffer_limits(high=STREAM_WRITE_BUFFER_BYTES)
        sock = request.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_SEND_BUFFER_BYTES)


async def drained(request: web.Request) -> None:
    """Returns once little of a stream waits in its transport; aiohttp looks only every 64 KiB that were written."""
    to = request.transport
    if to is not None and not to.is_closing() and to.get_write_buffer_size() > STREAM_WRITE_BUFFER_BYTES:
        await request.writer.drain()


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
) -> AsyncIterator[aiohttp.ClientSession]:
    """A session that never follows, unpacks or believes what a peer did not have to say.

    `read_timeout_s` is between two reads; None leaves it to the caller. No proxy from the environment is used. Without
    `reuse` each request has a connection of its own.
    """
    connector = aiohttp.TCPConnector(
        limit=0, ttl_dns_cache=30, ssl=tls or True, socket_factory=_tuned_socket, force_close=not reuse
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
        yield session


# ---------------------------------------------------------------- OpenAPI


def openapi(routes: Sequence[Route], *, title: str, version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a route table."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for route in routes:
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.path)
        operation: dict[str, Any] = {
            "summary": route.summary,
            "responses": {
                str(route.status): {"description": "done", "content": {route.returns: {}}},
                "default": {
                    "description": "an error",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
            "security": [] if route.scope is Scope.OPEN else [{"bearer": [scope.value]} for scope in route.scopes],
        }
        names = re.findall(r"\{(\w+)\}", path)
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        if route.body is not None:
            schema = route.body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[route.body.__name__] = schema
            reference = {"$ref": f"#/components/schemas/{route.body.__name__}"}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
        paths.setdefault(path, {})[route.method.lower()] = operation
    schemas["Error"] = _ERROR_SCHEMA
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "type", "retriable", "request_id"],
            "properties": {
                "code": {"enum": [code.value for code in Code]},
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "retriable": {"type": "boolean"},
                "retry_after_ms": {"type": "integer"},
                "hint": {"type": "string"},
                "task_id": {"type": "string"},
                "request_id": {"type": ["string", "null"]},
                "details": {"type": "object"},
            },
        }
    },
}
