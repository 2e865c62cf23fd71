"""How a role listens: the one hardened way for connections to come in.

Owns the listening sockets, the acceptor, the choice of the certificate that a connection is shown, and the reaper of
those whose request does not come. Who may come in is decided by `doors`, what is a request by `http_connection`. Never
listens beyond loopback without TLS, whoever asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import resource
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from llorch import link
from llorch.doors import Doors, Limits, Place
from llorch.errors import ConfigError
from llorch.http_connection import Connection, Lane
from llorch.logs import Log
from llorch.ratelimit import OncePer
from llorch.tasks import Guard
from llorch.tls import CONTROL_NAME, Identities, NameReader, why_refused

HEAD_TIMEOUT_S = 10.0  # for a head, from the connection's beginning or from its own first byte; then it is closed
HANDSHAKE_TIMEOUT_S = 10.0  # from the accepted connection to the end of its TLS handshake
HELLO_PAUSE_S = 0.02  # to the second look at a greeting that has begun to arrive, and twice as long to each further one
MOST_HELLO_PAUSE_S = 0.5
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
_MakeSite = Callable[[socket.socket, Identities | None], web.BaseSite]

log = Log("listen")


class Server:
    """An application that listens. `url` is where; `close` ends it: no new connections, then what runs, then all."""

    def __init__(
        self, runner: web.AppRunner, site: _MakeSite, url: str, host: str, port: int, guard: Guard, doors: Doors
    ) -> None:
        self._runner = runner
        self._site = site
        self._guard = guard
        self.doors = doors
        self.url, self.host, self.port = url, host, port

    async def serve_without_tls(self, host: str, port: int) -> str:
        """Serve the same on host:port, too: without TLS, through the same doors and lane. Returns the URL.

        Raises ConfigError beyond loopback. For a program that measures: no setting of a role leads here.
        """
        sockets = await _listening(host, port, loopback_only=True)
        await _start(sockets, None, self._site)
        return f"http://{_shown(host)}:{sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        await self._guard.close()
        await self._runner.cleanup()


class Acceptor:
    """Takes the connections of one listening socket; what aiohttp calls a server.

    All that wait are taken in one turn of the loop (uvloop's own server takes one), and a TLS handshake that fails has
    a reason here (with the loop's own server it has none).
    """

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[Place], asyncio.Protocol],
        tls: Identities | None,
        refused: Refused,
        doors: Doors,
    ) -> None:
        self.sockets = (sock,)
        self._sock = sock
        self._make = make
        self._tls = tls
        self._doors = doors
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
            now = self._loop.time()
            if pause_s := self._doors.pause_s(now):
                self._pause(pause_s)
                return
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_FILES:
                    raise
                log.error("accept.failed", reason=error.strerror)
                self._pause(NO_FILES_PAUSE_S)
                return
            self._take(sock, str(address[0]), now)

    def _pause(self, seconds: float) -> None:
        """Who comes meanwhile waits with the kernel."""
        self._loop.remove_reader(self._sock)
        self._resume = self._loop.call_later(seconds, self._loop.add_reader, self._sock, self._accept)

    def _take(self, sock: socket.socket, peer: str, now: float) -> None:
        place = self._doors.arrive(peer, now, sock.close)
        named = self._tls is not None and CONTROL_NAME in self._tls.named
        # Where nodes come by name, the greeting is heard before anybody is admitted: it may be a node's.
        if place is None or (not named and not self._doors.admit(place)):
            sock.close()
            return
        sock.setblocking(False)
        task = self._loop.create_task(self._arrive(sock, peer, place), name="listen.arrive")
        place.close = task.cancel
        self._arriving.add(task)
        task.add_done_callback(lambda task: self._arrived(task, sock, place))

    def _arrived(self, task: asyncio.Task[None], sock: socket.socket, place: Place) -> None:
        self._arriving.discard(task)
        if task.cancelled():  # perhaps before it began: then nothing else has done this
            self._doors.leave(place)
            sock.close()

    async def _arrive(self, sock: socket.socket, peer: str, place: Place) -> None:
        """From an accepted socket to a protocol that reads requests."""
        try:
            if self._tls is None:
                await self._plain(sock, place)
                return
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                name = await self._server_name(sock) if self._tls.named else None
                if CONTROL_NAME in self._tls.named and not self._doors.admit(place, named=is_control(name)):
                    sock.close()
                    return
                await self._loop.connect_accepted_socket(
                    lambda: self._make(place),
                    sock,
                    ssl=self._tls.choose(name),
                    ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                )
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:  # TimeoutError and SSLError are OSErrors
            self._doors.leave(place)
            sock.close()
            why = why_refused(error)
            if why is not None:
                self._refused(peer, why)
        except BaseException:
            self._doors.leave(place)
            sock.close()
            raise

    async def _plain(self, sock: socket.socket, place: Place) -> None:
        protocol = self._make(place)
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, sock)
        except BaseException:
            # uvloop (0.23) closes what was cancelled on its way in and tells its protocol nothing. That may be about to
            # answer, and the transport does not look closed to it: it raises RuntimeError.
            protocol.connection_lost(None)
            raise

    async def _server_name(self, sock: socket.socket) -> str | None:
        """The name that a connection asks for, from its greeting, which stays to be read.

        Read anew only when more of it is there, and looked for ever more seldom: a thousand strangers that send one
        byte each cost nothing.
        """
        seen, pause_s = 0, HELLO_PAUSE_S
        while True:
            try:
                hello = sock.recv(MAX_HELLO_BYTES, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                await self._readable(sock)
                continue
            if not hello:
                raise ConnectionResetError
            if len(hello) > seen:
                seen = len(hello)
                found, name = self._names.read(hello)
                if found or seen >= MAX_HELLO_BYTES:
                    return name
            await asyncio.sleep(pause_s)  # the kernel calls it readable: the beginning is there
            pause_s = min(2 * pause_s, MOST_HELLO_PAUSE_S)

    async def _readable(self, sock: socket.socket) -> None:
        ready = asyncio.Event()
        self._loop.add_reader(sock, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(sock)


def is_control(server_name: str | None) -> bool:
    return server_name is not None and server_name.lower() == CONTROL_NAME


class _Site(web.SockSite):
    """One listening socket of a runner."""

    def __init__(
        self,
        runner: web.AppRunner,
        sock: socket.socket,
        tls: Identities | None,
        refused: Refused,
        doors: Doors,
        lane: Lane | None,
    ) -> None:
        super().__init__(runner, sock)
        self._tls, self._refused, self._doors, self._lane = tls, refused, doors, lane

    async def start(self) -> None:
        await web.BaseSite.start(self)
        loop, manager, doors, pace = asyncio.get_running_loop(), self._runner.server, self._doors, OncePer()
        assert manager is not None

        def make(place: Place) -> Connection:
            return Connection(manager, loop, doors, place, pace, self._lane)

        self._server = Acceptor(self._sock, make, self._tls, self._refused, doors)  # type: ignore[assignment]


def _says(pace: OncePer, refused: Refused) -> Refused:
    """Pass every refusal on, and log it; no flood of them floods the log."""
    loop = asyncio.get_running_loop()

    def say(peer: str, why: str) -> None:
        refused(peer, why)
        more = pace.told(why, loop.time())
        if more is not None:
            log.warning("auth.failed", layer="tls", reason=why, peer=peer, more=more or None)

    return say


def watched_doors(
    limits: Limits,
    *,
    is_node: Callable[[str], bool] = lambda _address: False,
    refused: Callable[[str], None] = lambda _reason: None,
) -> Doors:
    """Doors that say whom they refuse: `refused` hears of each, the log once a second."""
    loop, pace = asyncio.get_running_loop(), OncePer()

    def say(reason: str) -> None:
        refused(reason)
        more = pace.told(reason, loop.time())
        if more is not None:
            log.warning("connection.refused", reason=reason, more=more or None)

    return Doors(limits, is_node=is_node, refused=say)


def bound(doors: Doors, limits: Limits) -> None:
    """Have these limits from now on, as far as the process may have files open."""
    doors.limits = limits.within(_allow_many_files())


async def serve(
    app: web.Application,
    host: str,
    port: int,
    *,
    tls: Identities | None = None,
    mesh: bool = False,
    refused: Refused = lambda _peer, _why: None,
    doors: Doors | None = None,
    lane: Lane | None = None,
    shutdown_timeout_s: float = 5.0,
) -> Server:
    """Listen on host:port (0: a free one). Raises ConfigError if it is taken, or is no loopback and has no TLS.

    `mesh`: beyond loopback without TLS all the same, for something around this process encrypts what it sends.
    `refused` hears of every TLS handshake that failed for a reason. `doors`: who may come in; the default bounds, if
    there is nothing to say of it. `lane`: is offered each request that has come whole, before aiohttp sees it.
    """
    sockets = await _listening(host, port, loopback_only=tls is None and not mesh)
    doors, told = doors or Doors(), _says(OncePer(), refused)
    bound(doors, doors.limits)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # a client that leaves cancels its handler: the task's slot goes free
        shutdown_timeout=shutdown_timeout_s,
    )
    await runner.setup()

    def site(sock: socket.socket, tls: Identities | None) -> _Site:
        return _Site(runner, sock, tls, told, doors, lane)

    try:
        await _start(sockets, tls, site)
    except BaseException:
        await runner.cleanup()
        raise
    bound_port = int(runner.addresses[0][1])
    guard = Guard("listen")
    guard.loop(_reaper(runner), "reaper")
    url = f"{'https' if tls else 'http'}://{_shown(host)}:{bound_port}"
    return Server(runner, site, url, host, bound_port, guard, doors)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _start(sockets: list[socket.socket], tls: Identities | None, site: _MakeSite) -> None:
    try:
        for sock in sockets:
            await site(sock, tls).start()
    except BaseException:
        for sock in sockets:
            sock.close()
        raise


async def _listening(host: str, port: int, *, loopback_only: bool) -> list[socket.socket]:
    """Bound sockets. Raises ConfigError."""
    try:
        return await _all_bound(host, port, loopback_only=loopback_only)
    except OSError as error:
        why, hint = error.strerror or type(error).__name__, "give another --bind HOST:PORT"
        raise ConfigError(f"{_shown(host)}:{port} can't be listened on: {why}", hint=hint) from None


async def _all_bound(host: str, port: int, *, loopback_only: bool) -> list[socket.socket]:
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


def _allow_many_files() -> int:
    """A connection is a file; the soft limit of 1,024 is for programs that use select(2). Returns how many may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if most == resource.RLIM_INFINITY else most


def _reaper(runner: web.AppRunner) -> Callable[[], Awaitable[float]]:
    """Closes connections whose request does not come; aiohttp waits for a head without end."""

    async def step() -> float:
        before = asyncio.get_running_loop().time() - HEAD_TIMEOUT_S
        for connection in runner.server.connections if runner.server is not None else ():
            if isinstance(connection, Connection) and (connection.head_since or before) < before:
                connection.force_close()
        return REAP_EVERY_S

    return step
