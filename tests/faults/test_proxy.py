"""The proxy does to connections what it says, and to nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from tests.cluster import eventually
from tests.faults.proxy import Proxy

SOON_S = 0.2


class Echo:
    """A server that sends back what it gets, and knows who is connected."""

    def __init__(self) -> None:
        self.connected = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected += 1
        try:
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.connected -= 1
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    echo.port = server.sockets[0].getsockname()[1]
    yield echo
    server.close()
    await server.wait_closed()
    await eventually(lambda: not echo.connected)


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    proxy = await Proxy(lambda: echo.port).start()
    yield proxy
    await proxy.close()


class Caller:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def asks(self, data: bytes) -> bytes:
        self.writer.write(data)
        return await asyncio.wait_for(self.reader.readexactly(len(data)), 5.0)

    async def hears(self, within_s: float) -> bytes | None:
        """What comes; b"" for its end; None for nothing."""
        try:
            return await asyncio.wait_for(self.reader.read(4096), within_s)
        except TimeoutError:
            return None


@contextlib.asynccontextmanager
async def calling(proxy: Proxy) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_bytes_pass_both_ways_and_an_end_does_too(proxy: Proxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        large = bytes(range(256)) * 4_000
        assert await caller.asks(large) == large
        caller.writer.write_eof()
        assert await caller.hears(5.0) == b""
    await eventually(lambda: not echo.connected)


async def test_a_cut_ends_both_sides_in_order(proxy: Proxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        await caller.asks(b"a")
        proxy.cut()
        assert await caller.hears(5.0) == b""
        await eventually(lambda: not echo.connected)


async def test_a_reset_is_no_end_in_order(proxy: Proxy, echo: Echo) -> None:
    async with calling(proxy) as caller:
        await caller.asks(b"a")
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await caller.hears(5.0)
        await eventually(lambda: not echo.connected)


async def test_half_open_swallows_bytes_and_ends_until_it_is_healed_by_a_reset(proxy: Proxy, echo: Echo) -> None:
    async with calling(proxy) as caller, calling(proxy) as leaving:
        await caller.asks(b"a")
        await leaving.asks(b"a")
        proxy.half_open()
        caller.writer.write(b"b")
        leaving.writer.close()
        assert await caller.hears(SOON_S) is None
        assert echo.connected == 2
        async with calling(proxy) as later:
            assert await later.asks(b"c") == b"c"
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            await caller.hears(5.0)
        await eventually(lambda: not echo.connected)


async def test_a_half_open_connection_that_is_left_is_dead_until_both_of_its_ends_have_gone(
    proxy: Proxy, echo: Echo
) -> None:
    async with calling(proxy) as caller:
        await caller.asks(b"a")
        proxy.half_open()
        proxy.heal(leave_dead=True)
        caller.writer.write(b"b")
        assert await caller.hears(SOON_S) is None
    assert (proxy.dead, echo.connected) == (1, 1)


async def test_a_partition_swallows_new_connections_too(proxy: Proxy, echo: Echo) -> None:
    proxy.half_open(new_too=True)
    async with calling(proxy) as caller:
        caller.writer.write(b"a")
        assert await caller.hears(SOON_S) is None
        assert not echo.connected
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            await caller.hears(5.0)
    async with calling(proxy) as caller:
        assert await caller.asks(b"b") == b"b"


async def test_who_is_cut_off_is_reset_now_and_whenever_it_comes_back_until_it_is_healed(
    proxy: Proxy, echo: Echo
) -> None:
    async with calling(proxy) as caller:
        await caller.asks(b"a")
        proxy.cut_off()
        with pytest.raises(ConnectionResetError):
            await caller.hears(5.0)
    async with calling(proxy) as caller:
        with pytest.raises(ConnectionResetError):
            await caller.hears(5.0)
    await eventually(lambda: not echo.connected)
    proxy.heal()
    async with calling(proxy) as caller:
        assert await caller.asks(b"b") == b"b"


async def test_bytes_are_late_or_few_for_as_long_as_it_is_slow(proxy: Proxy) -> None:
    async with calling(proxy) as caller:
        for slow in ({"delay_s": 0.1}, {"bytes_per_s": 50.0}):
            proxy.slow(**slow)
            started = time.monotonic()
            assert await caller.asks(b"12345") == b"12345"
            assert time.monotonic() - started >= 0.2
        proxy.heal()
        started = time.monotonic()
        await caller.asks(b"12345")
        assert time.monotonic() - started < 0.2


async def test_where_nobody_listens_a_connection_ends(proxy: Proxy) -> None:
    proxy._target = lambda: 1
    async with calling(proxy) as caller:
        with contextlib.suppress(ConnectionResetError):
            assert await caller.hears(5.0) == b""
