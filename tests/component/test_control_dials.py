"""Whom a control can be made to connect to: what a node's name meant when it registered may be something else later."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import pytest
from aiohttp import web as aioweb

from llorch import web
from llorch.control import node_client, resolver
from llorch.control.addresses import Network
from llorch.control.resolver import NodeResolver
from llorch.errors import Code, LlorchError
from tests.certificates import certificate
from tests.component.control_harness import ControlUnderTest, a_control, eventually

PEER = "10.0.0.5"


class Names:
    """A name server that answers as the test says."""

    def __init__(self, *numbers: str) -> None:
        self.numbers: Sequence[str] = numbers
        self.asked: list[str] = []

    async def __call__(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        if not self.numbers:
            raise OSError("no such name")
        return self.numbers


@contextlib.contextmanager
def watched_sockets() -> Iterator[list[str]]:
    """Where the session would connect to, in order. Nothing is connected."""
    opened: list[str] = []

    def factory(address: Any) -> socket.socket:
        opened.append(address[4][0])
        raise OSError("not in a test")

    with mock.patch.object(web, "_tuned_socket", factory):
        yield opened


@contextlib.asynccontextmanager
async def listening() -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server on loopback that no node may make a control call, and what arrived there."""
    arrived: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append(await reader.read(1024))
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], arrived


@contextlib.asynccontextmanager
async def dialling(
    names: Names, *peers: str | None, networks: Sequence[Network] = ()
) -> AsyncIterator[aiohttp.ClientSession]:
    async with web.client_session(resolver=NodeResolver(networks, lambda _host: peers, names)) as session:
        yield session


async def fails_to_connect(session: aiohttp.ClientSession, url: str) -> None:
    with pytest.raises(aiohttp.ClientConnectorError):
        await session.get(url, allow_redirects=False)


@pytest.mark.parametrize(
    "flipped",
    [
        ("127.0.0.1",),
        ("169.254.169.254",),
        ("::1",),
        ("::ffff:127.0.0.1",),
        ("::ffff:169.254.169.254",),
        ("64:ff9b::a9fe:a9fe",),
        ("fe80::1%eth0",),
        ("10.0.0.6",),
        ("127.0.0.1", "169.254.169.254", "0.0.0.0", "::"),
        ("nonsense",),
        (),
    ],
    ids=str,
)
async def test_a_name_that_means_something_else_at_the_next_dial_is_not_dialled(flipped: tuple[str, ...]) -> None:
    names = Names(PEER)
    with watched_sockets() as opened:
        async with dialling(names, PEER) as session:
            await fails_to_connect(session, "http://gpu.example:9200/v2/pools")
            assert opened == [PEER]
            names.numbers = flipped
            await fails_to_connect(session, "http://gpu.example:9200/v2/pools")
            await fails_to_connect(session, "https://GPU.example.:9200/v2/pools")
            assert opened == [PEER]
    assert len(names.asked) == 3, "an answer of before was used again"


async def test_nothing_arrives_at_a_server_on_loopback_when_a_name_flips_to_it() -> None:
    names = Names("127.0.0.1")
    async with listening() as (port, arrived), dialling(names, PEER) as session:
        await fails_to_connect(session, f"http://gpu.example:{port}/")
        assert arrived == []
    async with listening() as (port, arrived), dialling(names, "127.0.0.1") as session:
        with contextlib.suppress(aiohttp.ClientError):
            await session.get(f"http://gpu.example:{port}/")
        assert arrived, "a node of this machine may be called; else the test above shows nothing"


async def test_of_several_answers_only_those_that_the_node_may_have_are_dialled() -> None:
    names = Names("169.254.169.254", "10.0.0.9", "127.0.0.1", PEER, "2001:db8::5")
    with watched_sockets() as opened:
        async with dialling(names, PEER, networks=(ip_network("2001:db8::/64"),)) as session:
            await fails_to_connect(session, "http://gpu.example:9200/")
    assert sorted(opened) == [PEER, "2001:db8::5"]


async def test_a_host_that_no_node_advertises_is_not_dialled_at_all() -> None:
    with watched_sockets() as opened:
        async with dialling(Names(PEER)) as session:
            await fails_to_connect(session, "http://gpu.example:9200/")
    assert opened == []


async def test_at_a_registration_every_answer_has_to_be_the_nodes() -> None:
    for numbers, accepted in (
        ((PEER,), True),
        ((PEER, "10.0.0.6"), False),
        ((PEER, "127.0.0.1"), False),
        (("169.254.169.254",), False),
        ((), False),
    ):
        asked = NodeResolver((), lambda _host: (), Names(*numbers))
        with contextlib.nullcontext() if accepted else pytest.raises(LlorchError) as caught:
            await asked.check("http://gpu.example:9200", PEER)
        if not accepted:
            assert caught.value.code is Code.UNTRUSTED_ADDRESS
        await asked.close()


async def test_a_name_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "LOOKUP_TIMEOUT_S", 0.02)

    async def never(_host: str) -> Sequence[str]:
        await asyncio.Event().wait()
        return ()

    asked = NodeResolver((), lambda _host: (PEER,), never)
    with pytest.raises(LlorchError):
        await asked.check("gpu.example:9200", PEER)
    with pytest.raises(OSError, match="in time"):
        await asked.resolve("gpu.example")
    await asked.close()


async def test_the_system_is_asked_by_default_and_a_name_it_can_not_look_up_is_no_fault() -> None:
    asked = NodeResolver((), lambda _host: ("127.0.0.1",))
    assert {entry["host"] for entry in await asked.resolve("localhost", 80)} <= {"127.0.0.1", "::1"}
    with pytest.raises(LlorchError):
        await asked.check("http://" + "x" * 70 + ".example", PEER)
    await asked.close()


# ---------------------------------------------------------------- through a whole control


@contextlib.asynccontextmanager
async def serving(*routes: aioweb.RouteDef) -> AsyncIterator[int]:
    server = aioweb.Application()
    server.router.add_routes(routes)
    runner = aioweb.AppRunner(server, access_log=None)
    await runner.setup()
    await aioweb.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def register(control: ControlUnderTest, address: str) -> tuple[int, Any]:
    body = {"node_id": "h", "address": address, "pools": ["p0"]}
    return await control.post("/v2/nodes/register", body, who="node")


async def test_a_node_whose_name_flips_after_its_registration_gets_no_more_calls() -> None:
    called = 0

    async def pools(_request: aioweb.Request) -> aioweb.Response:
        nonlocal called
        called += 1
        response = aioweb.json_response({"pools": []})
        response.force_close()  # so that the next call is another dial
        return response

    names = Names("127.0.0.1")
    async with serving(aioweb.get("/v2/pools", pools)) as port, a_control(probe_interval=0.02) as control:
        control.control.nodes.resolver._lookup = names
        assert (await register(control, f"gpu.example:{port}"))[0] == 200
        await eventually(lambda: called, within_s=5)
        control.control.registry.nodes["h"].peer = "192.0.2.7"  # as if it were on another machine
        asked = len(names.asked)
        await eventually(lambda: len(names.asked) > asked + 3, within_s=5)
        before = called
        await eventually(lambda: len(names.asked) > asked + 6, within_s=5)
        assert called == before
        assert (await control.get("/v2/nodes/h"))["reachable"] is False


async def test_an_address_that_is_not_the_nodes_is_refused_with_the_mend_unless_the_settings_allow_it() -> None:
    async with a_control() as control:
        status, answer = await register(control, "10.1.2.3:9200")
        assert (status, answer["error"]["code"]) == (422, "UNTRUSTED_ADDRESS")
        assert "--node-cidr" in answer["error"]["hint"]
    with watched_sockets() as opened:
        async with a_control(node_cidr=(ip_network("10.1.2.0/24"),)) as control:
            assert (await register(control, "10.1.2.3:9200"))[0] == 200
            await eventually(lambda: opened, within_s=5)
            assert (await register(control, "169.254.169.254:80"))[0] == 422
    assert set(opened) == {"10.1.2.3"}


async def test_a_redirect_is_not_followed() -> None:
    async with listening() as (elsewhere, arrived):
        asked = asyncio.Event()

        async def away(_request: aioweb.Request) -> aioweb.Response:
            asked.set()
            return aioweb.Response(status=307, headers={"Location": f"http://127.0.0.1:{elsewhere}/"})

        routes = (aioweb.get("/v2/pools", away), aioweb.get("/v2/pools/p0", away))
        async with serving(*routes) as port, a_control(probe_interval=600.0) as control:
            assert (await register(control, f"127.0.0.1:{port}"))[0] == 200
            await eventually(asked.is_set, within_s=5)
            with pytest.raises(LlorchError) as caught:
                await control.control.nodes.call("h", "GET", "/v2/pools/p0")
            assert caught.value.code is Code.NODE_LOST
        assert arrived == []


async def test_an_answer_without_end_is_read_no_further_than_it_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_client, "MAX_CALL_BYTES", 100_000)
    sent = 0

    async def endless(request: aioweb.Request) -> aioweb.StreamResponse:
        nonlocal sent
        response = aioweb.StreamResponse(status=int(request.query.get("status", "200")))
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" " * 10_000)
                sent += 10_000
        return response

    routes = (aioweb.get("/v2/pools", endless), aioweb.get("/v2/pools/p0", endless))
    async with serving(*routes) as port, a_control(probe_interval=600.0) as control:
        assert (await register(control, f"127.0.0.1:{port}"))[0] == 200
        for status in (200, 500):
            with pytest.raises(LlorchError) as caught:
                await control.control.nodes.call("h", "GET", f"/v2/pools/p0?status={status}")
            assert caught.value.code is Code.NODE_LOST
        assert sent < 50_000_000  # and what lies in the kernel


# ---------------------------------------------------------------- certificates are the name's, not the number's


async def test_a_certificate_is_checked_for_the_name_and_not_for_the_number_that_was_dialled(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "gpu.example")
    serving_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving_context.load_cert_chain(cert, key)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=serving_context)
    port = server.sockets[0].getsockname()[1]
    trusting = ssl.create_default_context(cafile=str(cert))
    asked = NodeResolver((), lambda _host: ("127.0.0.1",), Names("127.0.0.1"))
    async with server, web.client_session(tls=trusting, resolver=asked) as session:
        async with session.get(f"https://gpu.example:{port}/") as response:
            assert response.status == 200
        for other in ("other.example", "127.0.0.1"):
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get(f"https://{other}:{port}/")
