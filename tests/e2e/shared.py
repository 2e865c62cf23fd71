"""What end-to-end tests have in common: commands as processes, and one cluster for several tests that only ask it
things, for starting one takes longer than most of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
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


async def start(llorch: Cluster, *argv: str, stdin: int = DEVNULL, nice: bool = False, **env: str) -> Process:
    """A command of llorch's. `nice`: one of so many that what else runs on the machine is to come first."""
    return await asyncio.create_subprocess_exec(
        *(("nice", "-n", "19") if nice else ()), sys.executable, "-m", "llorch", *argv,
        env=llorch.client_env() | env, stdin=stdin, stdout=PIPE, stderr=PIPE, cwd=llorch.folder,
    )  # fmt: skip


async def end_of(process: Process, stdin: bytes | None = None, *, within_s: float = 30.0) -> tuple[int, str, str]:
    try:
        async with asyncio.timeout(within_s):
            out, err = await process.communicate(stdin)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise AssertionError(f"the command did not end within {within_s:g} s") from None
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def run(llorch: Cluster, *argv: str, stdin: bytes | None = None, **env: str) -> tuple[int, str, str]:
    return await end_of(await start(llorch, *argv, stdin=DEVNULL if stdin is None else PIPE, **env), stdin)
