"""One cluster for several tests that only ask it things: starting one takes longer than most of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp

from tests.cluster import Cluster


@contextlib.contextmanager
def kept(folder: Path, start: Callable[[Cluster], Awaitable[None]]) -> Iterator[Cluster]:
    """A cluster that outlives the event loop of a test. Each test brings its own session: see `visiting`."""
    running: list[Cluster] = []

    async def begin() -> Cluster:
        async with aiohttp.ClientSession() as session:
            running.append(Cluster(folder, session))
            await start(running[0])
        return running[0]

    try:
        yield asyncio.run(begin())
    finally:
        for one in running:
            asyncio.run(one.close())


@contextlib.asynccontextmanager
async def visiting(cluster: Cluster) -> AsyncIterator[Cluster]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        cluster.session = session
        yield cluster
