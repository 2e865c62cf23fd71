"""How a role listens: the one hardened way for connections to come in.

Owns the listening sockets, the acceptor, the choice of the certificate that a connection is shown, what aiohttp's side
of a connection does with what it can't read, and the reaper of those that never ask for anything. Never listens beyond
loopback without TLS, whoever asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import resource
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web, web_protocol

from llorch import link
from llorch.errors import Code, ConfigError, LlorchError
from llorch.logs import Log
from llorch.tasks import Guard
from llorch.tls import Identities, NameReader, why_refused
from llorch.web import error_response, request_id_of

KEEPALIVE_S = 75.0  # aiohttp's own default keeps an idle connection for an hour
HEAD_TIMEOUT_S = 10.0  # a connection that has sent no whole request head by then is closed
HANDSHAKE_TIMEOUT_S = 10.0  # from the accepted connection to the end of its TLS handshake
HELLO_PAUSE_S = 0.02  # between two looks at a greeting that has begun to arrive
MAX_HELLO_BYTES = 16 * 1024 + 5  # one TLS record
REAP_EVERY_S = 2.0
BACKLOG = 1024
ACCEPT_AT_ONCE = 128  # connections taken in one turn of the loop; the others wait for the next
NO_FILES_PAUSE_S = 1.0  # while no descriptor is free for another connection
PEER_TIMEOUT_MS = 60_000  # a client's machine that is gone, for the kernel; twice what a slow reader is given
PEER_IDLE_S = 15  # silence before the kernel asks whether a client's machine is still there
_NOT_HERE = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Refused = Callable[[str, str], None]  # peer, why

log = Log("listen")


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


class Acceptor:
    """Takes the connections of one listening socket; what aiohttp calls a server.

    All that wait are taken in one turn of the loop (uvloop's own server takes one), and a TLS handshake that fails has
    a reason here (with the loop's own server it has none).
    """

    def __init__(
        self, sock: socket.socket, make: Callable[[], asyncio.Protocol], tls: Identities | None, refused: Refused
    ) -> None:
        self.sockets = (sock,)
        self._sock = sock
        self._make = make
        self._tls = tls
        self._names = NameReader()
        self._refused = refused
        self._arriving: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None
        sock.listen(BACKLOG)
        self._loop.add_reader(sock, self._accept)

    def close(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for task in self._arriving:
            task.cancel()

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_FILES:
                    raise
                log.error("accept.failed", reason=error.strerror)
                self._loop.remove_reader(self._sock)
                self._resume = self._loop.call_later(NO_FILES_PAUSE_S, self._loop.add_reader, self._sock, self._accept)
                return
            sock.setblocking(False)
            task = self._loop.create_task(self._arrive(sock, str(address[0])), name="listen.arrive")
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)

    async def _arrive(self, sock: socket.socket, peer: str) -> None:
        """From an accepted socket to a protocol that reads requests."""
        try:
            if self._tls is None:
                await self._loop.connect_accepted_socket(self._make, sock)
                return
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                name = await self._server_name(sock) if self._tls.named else None
                await self._loop.connect_accepted_socket(
                    self._make, sock, ssl=self._tls.choose(name), ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S
                )
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:  # TimeoutError and SSLError are OSErrors
            sock.close()
            why = why_refused(error)
            if why is not None:
                self._refused(peer, why)
        except BaseException:
            sock.close()
            raise

    async def _server_name(self, sock: socket.socket) -> str | None:
        """The name that a connection asks for, from its greeting, which stays to be read."""
        while True:
            try:
                hello = sock.recv(MAX_HELLO_BYTES, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                await self._readable(sock)
                continue
            if not hello:
                raise ConnectionResetError
            found, name = self._names.read(hello)
            if found or len(hello) >= MAX_HELLO_BYTES:
                return name
            await asyncio.sleep(HELLO_PAUSE_S)  # the kernel calls it readable: the beginning is there

    async def _readable(self, sock: socket.socket) -> None:
        ready = asyncio.Event()
        self._loop.add_reader(sock, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(sock)


class _Site(web.SockSite):
    """One listening socket of a runner."""

    def __init__(self, runner: web.AppRunner, sock: socket.socket, tls: Identities | None, refused: Refused) -> None:
        super().__init__(runner, sock)
        self._tls, self._refused = tls, refused

    async def start(self) -> None:
        await web.BaseSite.start(self)
        loop, manager = asyncio.get_running_loop(), self._runner.server
        assert manager is not None
        self._server = Acceptor(  # type: ignore[assignment]
            self._sock, lambda: _Connection(manager, loop=loop, **_CONNECTION), self._tls, self._refused
        )


def _refused_quietly(peer: str, why: str) -> None:
    log.info("tls.refused", peer=peer, why=why)


async def serve(
    app: web.Application,
    host: str,
    port: int,
    *,
    tls: Identities | None = None,
    mesh: bool = False,
    refused: Refused = _refused_quietly,
    shutdown_timeout_s: float = 5.0,
) -> Server:
    """Listen on host:port (0: a free one). Raises ConfigError if it is taken, or is no loopback and has no TLS.

    `mesh`: beyond loopback without TLS all the same, for something around this process encrypts what it sends.
    `refused` hears of every TLS handshake that failed for a reason.
    """
    shown = f"[{host}]" if ":" in host else host
    try:
        sockets = await _listening(host, port, loopback_only=tls is None and not mesh)
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
            await _Site(runner, sock, tls, refused).start()
    except BaseException:
        for sock in sockets:
            sock.close()
        await runner.cleanup()
        raise
    bound_port = int(runner.addresses[0][1])
    guard = Guard("listen")
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
