"""Bounds of connections and rates, through a real listener and a real control."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web as aiohttp_web

from llorch import listen, web
from llorch.auth import CLIENT_SCOPES, Scope, TokenRing
from llorch.doors import Doors, Limits
from llorch.listen import Server
from llorch.quotas import Quotas, Rates
from llorch.tls import CONTROL_NAME, Identities, server_context
from llorch.web import Gate, Route
from tests.certificates import certificate
from tests.cluster import eventually
from tests.component.control_harness import TOKENS, a_control

TOKEN, HEAD = secrets.token_hex(16), "GET /open HTTP/1.1\r\nHost: x\r\n"
GOOD = f"{HEAD}Authorization: Bearer {TOKEN}\r\n\r\n".encode()
CLIENT, NODE = "127.0.0.2", "127.0.0.3"


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback addresses count like any others: what comes from elsewhere can't be had in one process."""
    monkeypatch.setattr(Doors, "_key", lambda _doors, address: address)


async def _open(request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
    return web.json_response({})


async def _mine(request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
    return web.json_response({})


async def _nodes(request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
    return web.json_response({})


@asynccontextmanager
async def serving(
    limits: Limits | None = None, *, tls: Identities | None = None, rates: Rates | None = None, refused: Any = print
) -> AsyncIterator[Server]:
    ring = TokenRing([("me", TOKEN, CLIENT_SCOPES)])
    routes = [
        Route("GET", "/open", Scope.OPEN, _open, ""),
        Route("GET", "/mine", Scope.SUBMIT, _mine, ""),
        Route("GET", "/nodes", Scope.NODE, _nodes, ""),
    ]
    app = web.make_app(routes, Gate(lambda: ring, quotas=Quotas(rates)), max_body_bytes=1_000)
    doors = listen.watched_doors(limits or Limits(), is_node=lambda address: address == NODE, refused=refused)
    server = await listen.serve(app, "127.0.0.1", 0, tls=tls, doors=doors, shutdown_timeout_s=0.1)
    try:
        yield server
    finally:
        await server.close()


class Visitor:
    """One connection from an address."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def status(self, sent: bytes = GOOD) -> int:
        """Of the answer; 0 if the connection ended instead."""
        try:
            self.writer.write(sent)
            head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            self.head, self.body = head.decode(), await self.reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0
        return int(head.split()[1])

    async def closed(self) -> bool:
        try:
            return await asyncio.wait_for(self.reader.read(), 5) == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def visits(server: Server) -> AsyncIterator[Any]:
    """Connections that are all closed at the end: `await visit(address)`."""
    there: list[Visitor] = []  # a writer that nobody holds closes its connection

    async def visit(address: str = CLIENT, name: str | None = None) -> Visitor:
        context = None
        if name is not None:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        reader, writer = await asyncio.open_connection(
            server.host, server.port, local_addr=(address, 0), ssl=context, server_hostname=name
        )
        there.append(Visitor(reader, writer))
        return there[-1]

    try:
        yield visit
    finally:
        for each in there:
            each.writer.transport.abort()


async def test_an_address_with_all_its_connections_gets_no_more_and_others_do(addresses: None) -> None:
    refused: list[str] = []
    async with serving(Limits(per_address=3), refused=refused.append) as server, visits(server) as visit:
        for _ in range(3):
            assert await (await visit()).status() == 200
        assert await (await visit()).closed()
        assert await (await visit("127.0.0.9")).status() == 200
        assert await (await visit(NODE)).status() == 200
        assert refused == ["address"]


async def test_who_leaves_gives_its_place_back(addresses: None) -> None:
    async with serving(Limits(per_address=1)) as server, visits(server) as visit:
        for _ in range(5):
            visitor = await visit()
            assert await visitor.status() == 200
            visitor.writer.close()
            await eventually(lambda: server.doors.clients == 0)
        assert server.doors._per_key == {}


async def test_idle_clients_make_room_for_one_that_asks_and_none_takes_a_nodes_place(addresses: None) -> None:
    async with serving(Limits(most=16, per_address=100)) as server, visits(server) as visit:
        idle = [await visit() for _ in range(12)]
        for each in idle:
            assert await each.status() == 200
        late = await visit("127.0.0.9")
        assert await late.status() == 200
        assert await idle[0].closed()
        assert await idle[1].status() == 200
        for _ in range(4):
            assert await (await visit(NODE)).status() == 200
        assert (server.doors.clients, server.doors.nodes) == (12, 4)


async def test_half_open_connections_make_room_for_those_that_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.doors.ARRIVE_S", 0.05)
    async with serving(Limits(arriving=8)) as server, visits(server) as visit:
        silent = [await visit() for _ in range(30)]
        assert await asyncio.wait_for((await visit()).status(), 5) == 200
        assert server.doors.arriving <= 8
        assert await silent[0].closed()


async def test_refusals_are_logged_once_a_second_however_many_there_are(
    addresses: None, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[str] = []
    with caplog.at_level(logging.INFO):
        async with serving(Limits(per_address=1), refused=refused.append) as server, visits(server) as visit:
            assert await (await visit()).status() == 200
            for _ in range(50):
                assert await (await visit()).closed()
    assert len(refused) == 50
    assert 1 <= len([line for line in caplog.messages if "connection.refused" in line]) <= 3


@asynccontextmanager
async def two_names(folder: Path) -> AsyncIterator[Identities]:
    cert, key = certificate(folder)
    own = server_context(str(cert), str(key))
    yield Identities(own, {CONTROL_NAME: server_context(str(cert), str(key))})


async def test_the_name_of_the_control_opens_the_reserve_and_no_other_does(tmp_path: Path, addresses: None) -> None:
    refused: list[str] = []
    async with (
        two_names(tmp_path) as tls,
        serving(Limits(most=16, per_address=12), tls=tls, refused=refused.append) as server,
        visits(server) as visit,
    ):
        for _ in range(12):
            assert await (await visit(name="desk")).status() == 200
        with pytest.raises((OSError, ssl.SSLError)):
            await visit(name="desk")
        assert refused == ["address"]
        assert await (await visit(name=CONTROL_NAME)).status() == 200  # from the very same address
        assert (server.doors.clients, server.doors.nodes) == (12, 1)


async def test_a_second_listener_has_the_doors_and_the_end_of_the_first(tmp_path: Path, addresses: None) -> None:
    refused: list[str] = []
    async with (
        two_names(tmp_path) as tls,
        serving(Limits(per_address=2), tls=tls, refused=refused.append) as server,
        visits(server) as visit,
    ):
        host, _, port = (await server.serve_without_tls("127.0.0.1", 0)).removeprefix("http://").rpartition(":")

        async def plain() -> Visitor:
            return Visitor(*await asyncio.open_connection(host, int(port), local_addr=(CLIENT, 0)))

        first, second, third = await plain(), await visit(name="desk"), await plain()
        assert (await first.status(), await second.status(), server.doors.clients) == (200, 200, 2)
        assert await third.closed()
        assert refused == ["address"]
        await server.close()
        assert await first.closed()
        with pytest.raises(ConnectionRefusedError):
            await plain()
        for each in (first, third):
            each.writer.close()


async def test_a_greeting_that_does_not_come_is_given_up_and_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "HANDSHAKE_TIMEOUT_S", 0.1)
    async with two_names(tmp_path) as tls, serving(Limits(most=16), tls=tls) as server, visits(server) as visit:
        silent = [await visit() for _ in range(20)]
        silent[3].writer.write(b"\x16\x03\x01\x02\x00\x01\x00")
        silent[4].writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await (await visit(name=CONTROL_NAME)).status() == 200
        for each in silent:
            each.writer.transport.abort() if each is silent[4] else None
            assert each is silent[4] or await each.closed()
        await eventually(lambda: server.doors.arriving == 0)
        assert (server.doors.clients, server.doors.nodes) == (0, 1)


async def test_a_greeting_is_read_again_only_when_more_is_there_and_looked_for_ever_more_seldom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, reads, pauses = [b"\x16"] * 8 + [b"\x16\x03"] * 2 + [b""], list[bytes](), list[float]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(listen.asyncio, "sleep", sleep)
    names = SimpleNamespace(read=lambda hello: reads.append(hello) or (False, None))
    sock = SimpleNamespace(recv=lambda _size, _flags: looks.pop(0))
    with pytest.raises(ConnectionResetError):
        await listen.Acceptor._server_name(SimpleNamespace(_names=names), sock)  # type: ignore[arg-type]
    assert reads == [b"\x16", b"\x16\x03"]
    assert pauses == [0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5, 0.5, 0.5, 0.5]


# ---------------------------------------------------------------- rates


async def test_bodies_that_arrive_at_once_are_bounded_in_all_and_a_nodes_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web, "MIN_ARRIVING_BYTES", 100_000)
    async with a_control(max_body=50_000) as control:
        node = await control.join("a")
        server, name = control.server, "Authorization: Bearer"
        head = f"POST /v2/tasks HTTP/1.1\r\nHost: x\r\n{name} {TOKENS['alice']}\r\nContent-Length: 40000\r\n\r\n"
        async with visits(server) as visit:
            slow = [await visit() for _ in range(2)]
            for each in slow:
                each.writer.write(head.encode() + b" " * 39_999)
            arriving = server._runner.app[web.ARRIVING]
            await eventually(lambda: arriving._now == 2 * 39_999)
            third = await control.whole(prompt="x" * 40_000).answer()
            assert (third.status, third.json["error"]["details"]) == (429, {"limit": "bodies"})
            assert third.headers["X-Backoff-Ms"] == "1000"
            assert (await node.beat(padding="x" * 40_000))[0] == 200
            assert await slow[0].status(b" ") == 400  # an empty body
            await eventually(lambda: arriving._now == 39_999)
            other = control.whole(prompt="x" * 40_000)
            (await node.asked()).begin().end()
            assert (await other.answer()).status == 200
        await eventually(lambda: arriving._now == 0)


async def test_requests_over_the_rate_are_429_until_the_time_they_were_told() -> None:
    async with serving(rates=Rates(requests_per_s=5)) as server, visits(server) as visit:
        client = await visit()
        for _ in range(10):
            assert await client.status() == 200
        assert await client.status() == 429
        error = json.loads(client.body)["error"]
        assert (error["code"], error["details"]) == ("RATE_LIMITED", {"limit": "requests"})
        assert 0 < error["retry_after_ms"] <= 200
        assert f"X-Backoff-Ms: {error['retry_after_ms']}\r\n" in client.head
        assert "Retry-After: 1\r\n" in client.head
        assert await client.status(f"{HEAD}\r\n".encode()) == 200  # nobody's
        await asyncio.sleep(error["retry_after_ms"] / 1_000)
        assert await client.status() == 200


async def test_wrong_tokens_are_429_after_a_while_and_a_valid_one_never_is(caplog: pytest.LogCaptureFixture) -> None:
    mine = HEAD.replace("open", "mine")
    wrong, none = f"{mine}Authorization: Bearer {TOKEN[::-1]}\r\n\r\n".encode(), f"{mine}\r\n".encode()
    async with serving(rates=Rates(failures_per_min=20)) as server, visits(server) as visit:
        client = await visit()
        assert [await client.status(wrong if number % 2 else none) for number in range(20)] == [401] * 20
        for sent in (wrong, none) * 20:
            assert await client.status(sent) == 429
            assert "WWW-Authenticate" not in client.head
        assert 2_000 < json.loads(client.body)["error"]["retry_after_ms"] <= 3_000
        assert await client.status(f"{mine}Authorization: Bearer {TOKEN}\r\n\r\n".encode()) == 200
        assert await (await visit("127.0.0.9")).status(wrong) == 401
    assert 1 <= len([line for line in caplog.messages if "auth.failed" in line]) <= 2
    assert len([line for line in caplog.messages if "auth.limited" in line]) <= 2


async def test_who_may_not_ask_is_403_at_the_rate_of_all_that_he_asks_and_floods_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = GOOD.replace(b"/open", b"/nodes")
    async with serving(rates=Rates(requests_per_s=1)) as server, visits(server) as visit:
        client = await visit()
        assert [await client.status(nodes) for _ in range(10)] == [403] * 2 + [429] * 8
        assert await client.status(GOOD) == 429
    told = [line for line in caplog.messages if "auth.failed" in line]
    assert len(told) == 1 and "code=FORBIDDEN" in told[0]


async def test_a_principal_has_so_many_answers_at_a_time() -> None:
    async with a_control(rate_streams=2) as control:
        node = await control.join("a")
        first, second = control.submit(), control.chat()
        attempts = [(await node.asked()).begin().say("x"), (await node.asked()).accept().head()]
        await first.has(b"x")
        third = await control.submit().answer()
        assert (third.status, third.json["error"]["details"]) == (429, {"limit": "streams"})
        assert third.headers["X-Backoff-Ms"] == "1000"
        assert (await control.events(attempts[0].task_id).answer()).status == 429
        other = control.submit(who="bob")
        attempts[0].end()
        await first.answer()
        (await node.asked()).begin().end()
        assert (await other.answer()).status == 200
        again = control.submit()
        (await node.asked()).begin().end()
        assert (await again.answer()).names[-1] == "end"
        await second.leave()
        assert await control.metric("llorch_rate_limited_total", limit="streams") == 2


async def test_tokens_are_charged_when_a_task_is_taken_in_and_settled_when_it_ends() -> None:
    async with a_control(rate_tokens=1_000) as control:
        node = await control.join("a")
        first = control.whole(max_tokens=900)
        attempt = await node.asked()
        refused = await control.whole(max_tokens=900).answer()
        assert (refused.status, refused.json["error"]["details"]) == (429, {"limit": "tokens"})
        assert refused.json["error"]["retry_after_ms"] > 30_000
        assert (await control.chat(max_completion_tokens=900).answer()).status == 429
        attempt.begin().say("a").end()  # which cost two
        assert (await first.answer()).status == 200
        second = control.whole(max_tokens=900)
        (await node.asked()).begin().end()
        assert (await second.answer()).status == 200
        # One that is refused for another reason costs nothing.
        assert (await control.whole(model="nobody-has-it", max_tokens=950).answer()).status == 404
        third = control.whole(max_tokens=950)
        (await node.asked()).begin().end()
        assert (await third.answer()).status == 200
        assert control.control.quotas._charged == {}


async def test_nodes_beat_as_often_as_they_like_and_clients_do_not() -> None:
    async with a_control(rate_requests=1) as control:
        node = await control.join("a")
        for _ in range(20):
            assert (await node.beat())[0] == 200
        statuses = [(await control.ask("GET", "/v2/nodes").answer()).status for _ in range(4)]
        assert statuses[:2] == [200, 200]
        assert 429 in statuses


async def test_the_connections_of_a_control_are_a_metric_by_whose_they_are() -> None:
    async with a_control() as control:
        await control.join("a")
        assert await control.metric("llorch_connections", kind="node") >= 0
        assert await control.metric("llorch_connections", kind="client") >= 1
        assert control.server.doors.limits.per_address == 512
