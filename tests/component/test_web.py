"""HTTP as every role serves and calls it: the measured traps of aiohttp, through `serve()` and `client_session()`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import json
import logging
import secrets
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from aiohttp import web as aiohttp_web

from llorch import framing, http_connection, link, listen, logs, web
from llorch.auth import CLIENT_SCOPES, Scope, TokenRing
from llorch.doors import Doors
from llorch.errors import ConfigError
from llorch.listen import Server
from llorch.outlet import Outlet
from llorch.web import Gate, Route
from tests.certificates import certificate
from tests.cluster import eventually

TOKEN = secrets.token_hex(16)
AUTH = f"Authorization: Bearer {TOKEN}\r\n"

AUTHORIZED_POST = f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Content-Length: 5\r\n\r\nhello"


class Room:
    """What the handlers of these tests saw, and what holds them up."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.go_on = asyncio.Event()
        self.sent_bytes = 0
        self.kept_bytes = 0
        self.bodies: list[bytes] = []
        self.refused: list[str] = []

    async def open(self, request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
        return web.json_response({"ok": True})

    async def read(self, request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
        self.started.set()
        self.bodies.append(await web.read_body(request, most_bytes=8 * 1024 * 1024))
        return web.json_response({"bytes": len(self.bodies[-1])})

    async def strict(self, request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
        return web.json_response(await web.read_object(request))

    async def wait(self, request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
        self.started.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return web.json_response({"ok": True})

    async def stream(self, request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
        outlet = Outlet.of(request)
        outlet.begin(200, {"Content-Type": "application/octet-stream"})
        self.started.set()
        while not self.go_on.is_set():
            outlet.write(b"x" * 4_096)
            self.sent_bytes += 4_096
            assert request.transport is not None
            self.kept_bytes = request.transport.get_write_buffer_size()
            if outlet.behind:
                await outlet.drained()
            else:
                await asyncio.sleep(0)  # a turn of the loop, in which it may be cancelled
        return outlet.finish()

    async def broken(self, request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
        raise ValueError(f"a library that quotes: {request.headers.get('X-Canary')}")


@asynccontextmanager
async def serving(
    room: Room | None = None, *, host: str = "127.0.0.1", ring: TokenRing | None = None, metrics_open: bool = False
) -> AsyncIterator[Server]:
    room = room or Room()
    tokens = TokenRing([("me", TOKEN, CLIENT_SCOPES)]) if ring is None else ring
    gate = Gate(lambda: tokens, refused=lambda code: room.refused.append(code.value), metrics_open=metrics_open)
    routes = [
        Route("GET", "/open", Scope.OPEN, room.open, ""),
        Route("POST", "/read", Scope.SUBMIT, room.read, ""),
        Route("POST", "/strict", Scope.SUBMIT, room.strict, ""),
        Route("GET", "/wait", Scope.SUBMIT, room.wait, ""),
        Route("GET", "/stream", Scope.SUBMIT, room.stream, ""),
        Route("GET", "/broken", Scope.OPEN, room.broken, ""),
        Route("GET", "/things/{thing}", Scope.READ, _echo, ""),
        Route("GET", "/metrics", Scope.METRICS, _metrics, ""),
        Route("GET", "/admin", Scope.ADMIN, _admin, ""),
    ]
    server = await listen.serve(
        web.make_app(routes, gate, max_body_bytes=8 * 1024 * 1024), host, 0, shutdown_timeout_s=1
    )
    try:
        yield server
    finally:
        room.go_on.set()
        await server.close()


async def _echo(request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
    return web.json_response({"thing": request.match_info["thing"]})


async def _metrics(request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
    return web.json_response({})


async def _admin(request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
    return web.json_response({})


class Wire:
    """A client that sends exactly the bytes it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, text: str | bytes) -> None:
        self.writer.write(text.encode("latin-1") if isinstance(text, str) else text)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split()[1]), headers, await self.reader.readexactly(int(headers.get("content-length", 0)))

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""


@asynccontextmanager
async def wire(server: Server) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


def request(method: str, path: str, headers: str = "", body: str = "") -> str:
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}{length}\r\n{body}"


def error_of(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert {"code", "message", "type", "param", "retriable", "request_id"} <= set(error)
    return error


@pytest.fixture
async def log_text() -> AsyncIterator[Callable[[], str]]:
    """What a role would write to stderr at level debug, with the format it has there."""
    written: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    root, ours = logging.getLogger(), logging.getLogger(logs.ROOT)
    before, levels = root.handlers[:], (root.level, ours.level)
    logs.configure("debug")
    (theirs,) = root.handlers
    handler = Kept()
    handler.setFormatter(theirs.formatter)
    root.handlers[:] = [handler]
    yield lambda: "\n".join(written)
    root.handlers[:] = before
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


# ---------------------------------------------------------------- a connection's life


async def test_a_client_that_leaves_cancels_its_handler() -> None:
    room = Room()
    async with serving(room) as server, wire(server) as client:
        client.send(request("GET", "/wait", AUTH))
        await asyncio.wait_for(room.started.wait(), 5)
        client.writer.close()
        await asyncio.wait_for(room.cancelled.wait(), 5)


@pytest.mark.parametrize("sent", ["", "GET /open HT", "GET /open HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_connection_without_a_whole_head_is_closed(monkeypatch: pytest.MonkeyPatch, sent: str) -> None:
    monkeypatch.setattr(listen, "HEAD_TIMEOUT_S", 0.1)
    monkeypatch.setattr(listen, "REAP_EVERY_S", 0.02)
    async with serving() as server, wire(server) as slow:
        slow.send(sent)
        assert await asyncio.wait_for(slow.rest(), 5) == b""


async def test_a_running_request_and_one_that_is_done_are_not_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "HEAD_TIMEOUT_S", 0.05)
    monkeypatch.setattr(listen, "REAP_EVERY_S", 0.01)
    room = Room()
    async with serving(room) as server, wire(server) as running, wire(server) as idle, wire(server) as late:
        running.send(request("GET", "/wait", AUTH))
        idle.send(request("GET", "/open"))
        assert (await idle.answer())[0] == 200
        assert await asyncio.wait_for(late.rest(), 5) == b""  # the reaper has been round
        idle.send(request("GET", "/open"))
        assert (await idle.answer())[0] == 200
        room.go_on.set()
        assert (await running.answer())[0] == 200


@pytest.mark.parametrize("second", ["", "GET /open HTTP/1.1\r\nHost"])
async def test_an_idle_connection_is_closed_after_the_keepalive(monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    """Also if the next request has begun and does not go on."""
    monkeypatch.setitem(http_connection.CONNECTION, "keepalive_timeout", 0.1)
    async with serving() as server, wire(server) as client:
        client.send(request("GET", "/open"))
        assert (await client.answer())[0] == 200
        client.send(second)
        assert await asyncio.wait_for(client.rest(), 5) == b""


@pytest.mark.parametrize("first", ["GET /open HTTP/1.1\r\nHost: x\r\n\r\n", AUTHORIZED_POST])
@pytest.mark.parametrize("second", ["\r", "G", "GET /open HTTP/1.1\r\nHost: x\r\nX-Slow"])
@pytest.mark.parametrize("together", [True, False])
async def test_a_later_head_has_no_more_time_than_the_first_had(
    monkeypatch: pytest.MonkeyPatch, first: str, second: str, together: bool
) -> None:
    monkeypatch.setattr(listen, "REAP_EVERY_S", 0.02)
    async with serving() as server, wire(server) as client, wire(server) as idle:
        for one in (client, idle):
            one.send(first + second if together and one is client else first)
            assert (await one.answer())[0] == 200
        monkeypatch.setattr(listen, "HEAD_TIMEOUT_S", 0.1)
        if not together:
            client.send(second)
        assert await asyncio.wait_for(client.rest(), 5) == b""
        idle.send(first)  # which had begun none
        assert (await idle.answer())[0] == 200


def test_an_idle_connection_is_kept_longer_than_a_proxy_in_front_keeps_it() -> None:
    assert http_connection.CONNECTION["keepalive_timeout"] == http_connection.KEEPALIVE_S == 75  # nginx: 60 s


async def test_a_connection_that_has_just_come_is_closed_with_its_listener() -> None:
    """Before its own task has begun: what was taken from the kernel is nobody else's to close."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        doors = Doors()
        acceptor = listen.Acceptor(listening, lambda _place: asyncio.Protocol(), None, lambda *_why: None, doors)
        with socket.create_connection(listening.getsockname()) as client:
            while not doors.arriving:
                await asyncio.sleep(0)
            acceptor.close()
            client.settimeout(5)
            assert await asyncio.to_thread(client.recv, 1) == b""
        assert doors.arriving == 0


def test_a_connection_that_is_closed_as_it_comes_is_answered_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its request came with it. The roles' own loop closes such a connection, and its transport does not say so."""
    take = http_connection.Connection.data_received

    def take_and_close(self: http_connection.Connection, data: bytes) -> None:
        take(self, data)
        for task in asyncio.all_tasks():
            if task.get_name() == "listen.arrive":
                task.cancel()

    async def main() -> None:
        room = Room()
        async with serving(room) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(request("GET", "/wait", AUTH).encode())
                client.settimeout(5)
                assert await asyncio.to_thread(client.recv, 1) == b""
                room.go_on.set()
                await asyncio.sleep(0.05)

    monkeypatch.setattr(http_connection.Connection, "data_received", take_and_close)
    uvloop.run(main())
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_closing_ends_idle_connections_at_once_and_running_ones_within_the_grace() -> None:
    room = Room()
    async with serving(room) as server, wire(server) as idle, wire(server) as running:
        idle.send(request("GET", "/open"))
        assert (await idle.answer())[0] == 200
        running.send(request("GET", "/stream", AUTH))
        await asyncio.wait_for(room.started.wait(), 5)
        closing = asyncio.ensure_future(server.close())
        assert await asyncio.wait_for(idle.rest(), 5) == b""
        assert not closing.done()
        room.go_on.set()
        assert (await asyncio.wait_for(running.rest(), 5)).endswith(b"0\r\n\r\n")
        await asyncio.wait_for(closing, 5)
    with pytest.raises(OSError):
        await asyncio.open_connection(server.host, server.port)


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize("sent", ["", "half"])
async def test_a_body_that_does_not_come_is_408(monkeypatch: pytest.MonkeyPatch, sent: str) -> None:
    monkeypatch.setattr(web, "BODY_TIMEOUT_S", 0.05)
    async with serving() as server, wire(server) as client:
        client.send(f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Content-Length: 1000\r\n\r\n{sent}")
        status, _, body = await asyncio.wait_for(client.answer(), 5)
    assert (status, error_of(body)["code"]) == (408, "REQUEST_TIMEOUT")


async def test_a_body_that_trickles_is_408_though_it_never_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "BODY_TIMEOUT_S", 0.1)
    async with serving() as server, wire(server) as client:
        client.send(f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Content-Length: 100000\r\n\r\n")
        answer = asyncio.ensure_future(client.answer())
        for _ in range(1_000):
            if answer.done():
                break
            client.send("x")
            await asyncio.sleep(0.005)
        else:
            pytest.fail("the server waits as long as a byte comes now and then")
        assert (await answer)[0] == 408


async def test_a_large_body_has_the_time_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes at the least rate is not cut off, however long the whole takes."""
    monkeypatch.setattr(web, "BODY_TIMEOUT_S", 1.0)
    piece = "x" * 20_480  # bought with it: 0.625 s
    async with serving() as server, wire(server) as client:
        client.send(f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Content-Length: {8 * len(piece)}\r\n\r\n")
        for _ in range(8):
            client.send(piece)
            await asyncio.sleep(0.16)  # the last one is sent after more than the time that any body has
        assert (await client.answer())[0] == 200


async def test_a_body_over_a_mebibyte_is_read_and_one_over_the_limit_is_413() -> None:
    room, large = Room(), "x" * (2 * 1024 * 1024)
    async with serving(room) as server, wire(server) as client:
        client.send(request("POST", "/read", AUTH, large))
        assert (await client.answer())[0] == 200
        assert len(room.bodies[0]) == len(large)
        client.send(f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Content-Length: {10**12}\r\n\r\n")
        status, _, body = await asyncio.wait_for(client.answer(), 5)  # told before a byte of it was sent
        assert (status, error_of(body)["code"]) == (413, "PAYLOAD_TOO_LARGE")


async def test_a_body_of_unknown_length_is_413_when_it_passes_the_limit() -> None:
    async with serving() as server, wire(server) as client:
        client.send(f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Transfer-Encoding: chunked\r\n\r\n")
        chunk = f"{1 << 20:x}\r\n{'x' * (1 << 20)}\r\n"
        for _ in range(9):
            client.send(chunk)
        status, _, body = await asyncio.wait_for(client.answer(), 10)
        assert (status, error_of(body)["code"]) == (413, "PAYLOAD_TOO_LARGE")
        client.writer.transport.abort()


async def test_a_gzip_bomb_is_not_unpacked() -> None:
    room, bomb = Room(), gzip.compress(b"\0" * (64 << 20))
    async with serving(room) as server, wire(server) as client:
        client.send(
            f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Content-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
        )
        client.send(bomb)
        assert (await client.answer())[0] == 200
    assert room.bodies == [bomb]


@pytest.mark.parametrize("chunked", ["zz\r\nhello\r\n", "5\r\nhello!!\r\n", "-1\r\n\r\n"])
@pytest.mark.parametrize("late", [True, False])
async def test_a_malformed_chunked_body_is_400_in_the_one_shape(
    chunked: str, late: bool, log_text: Callable[[], str]
) -> None:
    room = Room()
    async with serving(room) as server, wire(server) as client:
        client.send(f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Transfer-Encoding: chunked\r\n\r\n")
        if late:
            await asyncio.wait_for(room.started.wait(), 5)
        client.send(chunked)
        status, _, body = await asyncio.wait_for(client.answer(), 5)
        assert (status, error_of(body)["code"]) == (400, "INVALID_REQUEST")
        assert await asyncio.wait_for(client.rest(), 5) == b""
    assert "Traceback" not in log_text()
    assert "File" not in log_text()


@pytest.mark.parametrize(
    "raw",
    ["", "[]", "{", '{"a":1,"a":2}', '{"a":NaN}', '{"a":"\\ud800"}', "\xef\xbb\xbf{}", '{"a":"\xff"}', "9" * 5_000,
     "[" * 100_000, '{"a":' * 100_000, '{"a":1e999}', "{}{}", "null"],
)  # fmt: skip
async def test_json_that_is_not_strict_is_400_and_quotes_nothing(raw: str) -> None:
    async with serving() as server, wire(server) as client:
        client.send(request("POST", "/strict", AUTH, raw) if raw else request("POST", "/strict", AUTH))
        status, _, body = await asyncio.wait_for(client.answer(), 5)
    assert (status, error_of(body)["code"]) == (400, "INVALID_REQUEST")
    assert len(body) < 500


async def test_a_body_is_asked_for_only_of_those_who_may_send_it() -> None:
    async with serving() as server:
        async with wire(server) as stranger:
            stranger.send("POST /read HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            assert (await stranger.answer())[0] == 401
        async with wire(server) as client:
            client.send(f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            assert (await client.answer())[0] == 100
            client.send("hello")
            assert (await client.answer())[0] == 200
        async with wire(server) as client:
            client.send(
                f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Expect: the unexpected\r\nContent-Length: 2\r\n\r\nhi"
            )
            assert (await client.answer())[0] == 200
        async with wire(server) as old:  # HTTP/1.0 knows no 100
            old.send(f"POST /read HTTP/1.0\r\n{AUTH}Expect: 100-continue\r\nContent-Length: 2\r\n\r\nhi")
            assert (await old.answer())[0] == 200


# ---------------------------------------------------------------- streams


async def test_the_buffer_of_a_connection_that_has_just_gone_is_nobodys_to_bound(tmp_path: Path) -> None:
    """A transport of asyncio's with TLS keeps its socket for itself once its peer has gone, and one that serves a
    stream learns of that later."""
    cert, key = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    accepted: asyncio.Future[asyncio.Transport] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(
        lambda _reader, writer: accepted.set_result(writer.transport), "127.0.0.1", 0, ssl=context
    )
    async with server:
        trusting = ssl.create_default_context(cafile=str(cert))
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), ssl=trusting)
        transport = await accepted
        web.bound_kernel_buffer(transport, socket.SO_SNDBUF, 8_192)
        assert transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 8_192
        writer.transport.abort()
        await eventually(lambda: transport.get_extra_info("socket") is None)
        web.bound_kernel_buffer(transport, socket.SO_SNDBUF, 8_192)


async def test_a_reader_that_stalls_holds_little_memory() -> None:
    room = Room()
    async with serving(room) as server:
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            reader.setblocking(False)
            await asyncio.get_running_loop().sock_connect(reader, (server.host, server.port))
            await asyncio.get_running_loop().sock_sendall(reader, request("GET", "/stream", AUTH).encode())
            await asyncio.wait_for(room.started.wait(), 5)
            last = -1

            async def stalled() -> bool:
                nonlocal last
                before, last = last, room.sent_bytes
                await asyncio.sleep(0.05)
                return before == room.sent_bytes > 0

            await eventually(stalled)
            assert room.sent_bytes < 400_000  # without the small send buffer it is 2 MB and more
            assert 16_384 < room.kept_bytes < 16_384 + 3 * 4_096  # aiohttp alone lets 64 KiB and more lie there


def options(sock: socket.socket) -> dict[str, int]:
    return {
        "keepalive": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        "idle": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        "user_timeout": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        "nodelay": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
    }


async def test_every_socket_notices_a_peer_that_is_gone() -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        serving() as server,
        web.client_session() as session,
        session.get(f"{server.url}/stream", headers=headers, allow_redirects=False) as response,
    ):
        assert response.connection is not None
        assert response.connection.transport is not None
        assert options(response.connection.transport.get_extra_info("socket")) == {
            "keepalive": 1, "idle": link.KEEPALIVE_IDLE_S, "user_timeout": link.USER_TIMEOUT_MS, "nodelay": 1,
        }  # fmt: skip
        assert server._runner.server is not None
        (connection,) = server._runner.server.connections
        assert connection.transport is not None
        assert options(connection.transport.get_extra_info("socket")) == {
            "keepalive": 1, "idle": listen.PEER_IDLE_S, "user_timeout": listen.PEER_TIMEOUT_MS, "nodelay": 1,
        }  # fmt: skip


# ---------------------------------------------------------------- who may, and what they are told


async def test_no_route_is_open_by_accident_and_every_refusal_is_counted() -> None:
    room = Room()
    async with serving(room) as server, wire(server) as client:
        for path, headers, status in (
            ("/open", "", 200),
            ("/things/x", "", 401),
            ("/things/x", AUTH, 200),
            ("/things/x", f"Authorization: Bearer {TOKEN[::-1]}\r\n", 401),
            ("/metrics", AUTH, 403),
            ("/admin", AUTH, 403),
            ("/nowhere", "", 404),
        ):
            client.send(request("GET", path, headers))
            got, answered, body = await client.answer()
            assert got == status, path
            assert answered["x-request-id"] == answered["x-correlation-id"]
            if status != 200:
                assert error_of(body)["request_id"] == answered["x-request-id"]
            assert ("www-authenticate" in answered) == (status == 401)
        client.send(request("POST", "/open", AUTH, "{}"))
        got, _, body = await client.answer()
        assert (got, error_of(body)["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert room.refused == ["UNAUTHENTICATED", "UNAUTHENTICATED", "FORBIDDEN", "FORBIDDEN"]


async def test_without_tokens_nobody_gets_in() -> None:
    async with serving(ring=TokenRing()) as server, wire(server) as client:
        client.send(request("GET", "/things/x", AUTH))
        assert (await client.answer())[0] == 401


async def test_metrics_are_open_only_where_nobody_else_can_ask() -> None:
    for metrics_open, status in ((True, 200), (False, 401)):
        async with serving(metrics_open=metrics_open) as server, wire(server) as client:
            client.send(request("GET", "/metrics"))
            assert (await client.answer())[0] == status


@pytest.mark.parametrize("given", ["abc-1", "x" * 128, "a b", "x" * 129, 'a"b', "\u00e9", "a,b", "%0d%0aX: 1", ""])
@pytest.mark.parametrize("header", ["X-Request-Id", "X-Correlation-Id"])
async def test_a_sane_request_id_is_kept_and_another_is_replaced(header: str, given: str) -> None:
    async with serving() as server, wire(server) as client:
        client.send(request("GET", "/nowhere", f"{header}: {given}\r\n"))
        _, headers, body = await client.answer()
    kept = given in ("abc-1", "x" * 128)
    assert (headers["x-request-id"] == given) == kept
    assert error_of(body)["request_id"] == headers["x-request-id"]
    assert headers["x-request-id"].isascii()


CANARY = secrets.token_hex(16)


@pytest.mark.parametrize(
    "sent",
    [
        "GET /open HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer CANARY\x00\r\n\r\n",
        "GET /open HTTP/1.1\r\nHost: x\r\nAuthorization Bearer CANARY\r\n\r\n",
        "GET /open HTTP/1.1\r\nHost: x\r\nAuth\x01orization: Bearer CANARY\r\n\r\n",
        f"GET /open HTTP/1.1\r\nHost: x\r\nX: {'a' * 9_000}CANARY\r\n\r\n",
        f"GET /open?{'a' * 9_000}CANARY HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /open HTTP/1.1\r\nHost: x\r\n" + "X: CANARY\r\n" * 200 + "\r\n",
        "CANARY /open HTTP/9.9\r\n\r\n",
        "\x16\x03\x01 CANARY\r\n\r\n",
        "GET /open HTTP/1.1\r\nHost: x\r\nContent-Length: 5, CANARY\r\n\r\n",
        "POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\nX: CANARY\r\n\r\nhello",
        "POST /read HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nX: CANARY\r\n\r\n0\r\n\r\n",
        "POST /read HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\nX: CANARY\r\n\r\n0\r\n\r\n",
        "POST /read HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xCANARY\r\n\r\n0\r\n\r\n",
        "POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\nX: CANARY\r\n\r\n",
    ],
)  # fmt: skip
async def test_what_is_not_http_is_4xx_in_the_one_shape_then_closed_and_never_quoted(
    sent: str, log_text: Callable[[], str]
) -> None:
    async with serving() as server, wire(server) as client:
        client.send(sent.replace("CANARY", CANARY))
        status, _, body = await asyncio.wait_for(client.answer(), 5)
        assert status in (400, 414, 431)
        assert error_of(body)["code"] == "INVALID_REQUEST"
        client.send(request("GET", "/open"))  # what follows is not taken for a request
        assert await asyncio.wait_for(client.rest(), 5) == b""
    assert CANARY not in body.decode()
    assert "request.malformed" in log_text()
    assert CANARY not in log_text()
    assert "Traceback" not in log_text()


async def test_a_fault_of_ours_is_logged_without_what_it_says_and_answered_without_it(
    log_text: Callable[[], str],
) -> None:
    async with serving() as server, wire(server) as client:
        client.send(request("GET", "/broken", f"X-Canary: {CANARY}\r\nX-Request-Id: r1\r\n"))
        status, _, body = await client.answer()
    assert (status, error_of(body)["code"]) == (500, "INTERNAL")
    assert CANARY not in body.decode() + log_text()
    assert "request.failed path=/broken request_id=r1" in log_text()
    assert "in broken" in log_text()
    assert log_text().endswith("ValueError")


@pytest.mark.parametrize("thing", ["..", "..%2f..", "%2e%2e", "a%0ab", "a%0d%0aX:1", "%00", "a%2fb", "%ff", "\u00e9"])
async def test_a_name_in_a_path_is_a_name_whatever_it_holds(thing: str, log_text: Callable[[], str]) -> None:
    async with serving() as server, wire(server) as client:
        client.send(request("GET", f"/things/{thing}", ""))
        status, headers, body = await client.answer()
        assert status in (400, 401, 404)
        error_of(body)
        assert "x" not in headers
    assert all(line.startswith("20") for line in log_text().splitlines())  # no line that a peer began


async def test_pipelined_requests_are_answered_in_order_and_held_back_in_number() -> None:
    room = Room()
    async with serving(room) as server, wire(server) as client:
        client.send(request("GET", "/wait", AUTH))
        await asyncio.wait_for(room.started.wait(), 5)
        client.send(request("GET", "/open").encode() * 10_000)
        assert server._runner.server is not None
        (connection,) = server._runner.server.connections
        await eventually(lambda: connection._buffer_paused)  # what it does not take waits with its sender
        assert len(connection._messages) == 0
        assert isinstance(connection, http_connection.Connection)
        assert connection._framer.held_bytes <= framing.MAX_WAITING_BYTES + 256 * 1024  # one read of the transport
        room.go_on.set()
        for _ in range(101):
            assert (await client.answer())[0] == 200
        client.writer.transport.abort()


async def test_hundreds_of_idle_connections_leave_room_for_the_next_request() -> None:
    async with serving() as server:
        idle = await asyncio.gather(*(asyncio.open_connection(server.host, server.port) for _ in range(300)))
        async with wire(server) as client:
            client.send(request("GET", "/open"))
            assert (await asyncio.wait_for(client.answer(), 5))[0] == 200
        for _, writer in idle:
            writer.close()


# ---------------------------------------------------------------- where it listens


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_nothing_listens_beyond_loopback_without_tls_whoever_asks(host: str) -> None:
    with pytest.raises(ConfigError, match="no TLS"):
        async with serving(host=host):
            pass
    async with serving() as server:
        with pytest.raises(ConfigError, match="no TLS"):
            await server.serve_without_tls(host, 0)


async def test_a_taken_port_is_said_and_nothing_is_left_open() -> None:
    async with serving() as server:
        app = web.make_app([], Gate(TokenRing), max_body_bytes=1)
        with pytest.raises(ConfigError, match="already in use"):
            await listen.serve(app, server.host, server.port)


async def test_localhost_is_served_where_the_kernel_lacks_one_of_its_families(monkeypatch: pytest.MonkeyPatch) -> None:
    async def both(*_: object, **__: object) -> list[Any]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        ]

    opened = listen._bound

    def no_v6(family: int, address: tuple[Any, ...]) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return opened(family, address)

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", both)
    monkeypatch.setattr(listen, "_bound", no_v6)
    [only] = await listen._listening("localhost", 0, loopback_only=True)
    with only:
        assert only.getsockname()[0] == "127.0.0.1"


async def test_a_name_is_served_at_each_of_its_addresses_on_one_port() -> None:
    async with serving(host="localhost") as server:
        found = await asyncio.get_running_loop().getaddrinfo("localhost", server.port, type=socket.SOCK_STREAM)
        for *_, address in found:
            _, writer = await asyncio.open_connection(*address[:2])
            writer.close()


# ---------------------------------------------------------------- calling


@asynccontextmanager
async def peer(answer: Callable[[bytes], Awaitable[bytes] | bytes]) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers each connection's first request with the bytes that `answer` gives, then closes."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(head)
        given = answer(head)
        writer.write(given if isinstance(given, bytes) else await given)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()
        await server.wait_closed()


async def test_a_session_sets_no_limit_that_long_streams_would_meet() -> None:
    async with web.client_session() as session:
        assert session.timeout == aiohttp.ClientTimeout(total=None, connect=None, sock_connect=5.0, sock_read=None)
        assert session.connector is not None
        assert session.connector.limit == 0
        assert session.connector.limit_per_host == 0


async def test_the_hundred_and_first_stream_waits_for_no_other_to_end() -> None:
    room, headers = Room(), {"Authorization": f"Bearer {TOKEN}"}
    async with serving(room) as server, web.client_session() as session, contextlib.AsyncExitStack() as open_streams:

        async def begin() -> None:
            streaming = session.get(f"{server.url}/stream", headers=headers, allow_redirects=False)
            response = await open_streams.enter_async_context(streaming)
            await response.content.readany()

        async with asyncio.timeout(5):
            await asyncio.gather(*(begin() for _ in range(101)))  # aiohttp's own bound is 100
        room.go_on.set()


@pytest.mark.parametrize(("reuse", "connections"), [(True, 1), (False, 3)])
async def test_requests_in_a_row_share_one_connection_unless_each_is_to_have_its_own(
    reuse: bool, connections: int
) -> None:
    came: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(asyncio.current_task())  # type: ignore[arg-type]
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with web.client_session(reuse=reuse) as session:
        for _ in range(3):
            async with session.get(url, allow_redirects=False) as response:
                await response.read()
    await asyncio.gather(*came)
    server.close()
    await server.wait_closed()
    assert len(came) == connections


async def test_an_answer_is_not_unpacked() -> None:
    bomb = gzip.compress(b"\0" * (16 << 20))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
    async with (
        peer(lambda _: head + bomb) as (url, seen),
        web.client_session() as session,
        session.get(url, allow_redirects=False) as response,
    ):
        assert await response.read() == bomb
    assert b"accept-encoding: identity" in seen[0].lower()


async def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    async with peer(lambda _: ok) as (proxy, asked), peer(lambda _: ok) as (url, seen), web.client_session() as session:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("http_proxy", proxy)
        async with session.get(url, allow_redirects=False) as response:
            assert response.status == 200
    assert (len(asked), len(seen)) == (0, 1)


async def test_a_peer_can_plant_no_cookie() -> None:
    ok = b"HTTP/1.1 200 OK\r\nSet-Cookie: planted=1; Path=/\r\nContent-Length: 0\r\n\r\n"
    async with peer(lambda _: ok) as (url, seen), web.client_session() as session:
        for _ in range(2):
            async with session.get(url.replace("127.0.0.1", "localhost"), allow_redirects=False) as response:
                assert response.status == 200
    assert b"planted" not in b"".join(seen)


async def test_a_peer_that_stops_answering_is_given_up() -> None:
    hung = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await hung
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with web.client_session(read_timeout_s=0.1) as session:
        with pytest.raises(aiohttp.SocketTimeoutError):
            await session.get(f"http://127.0.0.1:{port}", allow_redirects=False)
    hung.set_result(None)
    server.close()
    await server.wait_closed()


async def test_a_cut_answer_is_an_error_and_an_end_in_order_is_none() -> None:
    chunk = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    async with web.client_session() as session:
        async with peer(lambda _: chunk) as (url, _), session.get(url, allow_redirects=False) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        async with (
            peer(lambda _: chunk + b"0\r\n\r\n") as (url, _),
            session.get(url, allow_redirects=False) as response,
        ):
            assert await response.read() == b"hello"


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection the hard way: with a RST."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_a_client_that_resets_leaves_no_trace_in_the_log(log_text: Callable[[], str]) -> None:
    room = Room()
    async with serving(room) as server, wire(server) as client:
        client.send(f"POST /read HTTP/1.1\r\nHost: x\r\n{AUTH}Content-Length: 1000\r\n\r\nhalf")
        await asyncio.wait_for(room.started.wait(), 5)
        reset(client.writer)
        assert server._runner.server is not None
        await eventually(lambda: not server._runner.server.connections)  # type: ignore[union-attr]
    assert log_text() == ""
