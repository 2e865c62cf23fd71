"""One that asks for far too much: `python -m tests.faults.proof_greedy`, the wish as JSON on its first line.

Offers a task every `every_s`, and each one that is refused again after what the refusal's Retry-After says, until
standard input ends. Then it leaves all of them, which ends /v1 tasks at once, and says as JSON what it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

import aiohttp

from tests.cluster import Cluster

MOST_TASKS = 10_000


@dataclass
class Did:
    """What it asked for, and what became of it."""

    seconds: float = 0.0
    offered: int = 0  # tasks
    sent: int = 0  # requests: each task at least once
    refused: int = 0
    served: int = 0
    wrong: int = 0  # answers that are none of these


async def insist(session: aiohttp.ClientSession, wish: dict[str, Any], did: Did) -> None:
    headers = {"Authorization": f"Bearer {wish['token']}"}
    for _ in range(1_000):
        did.sent += 1
        async with session.post(wish["url"] + "/v1/completions", json=wish["body"], headers=headers) as response:
            await response.read()
        if response.status != 429:
            break
        did.refused += 1
        await asyncio.sleep(float(response.headers["Retry-After"]))
    did.served += response.status == 200
    did.wrong += response.status != 200


async def main() -> None:
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    wish = json.loads(await stdin.readline())
    did, tasks = Did(), set[asyncio.Task[None]]()
    ended = asyncio.ensure_future(stdin.read())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = monotonic()
        while not ended.done() and did.offered < MOST_TASKS:
            did.offered += 1
            tasks.add(task := asyncio.ensure_future(insist(session, wish, did)))
            task.add_done_callback(tasks.discard)
            wait_s = began + did.offered * wish["every_s"] - monotonic()
            await asyncio.wait((ended,), timeout=max(0.0, wait_s))
        did.seconds = monotonic() - began
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps(asdict(did)), flush=True)


class Greedy:
    """The process, from outside."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, cluster: Cluster, token: str, body: dict[str, Any], every_s: float) -> Greedy:
        argv = (sys.executable, "-m", "tests.faults.proof_greedy")
        process = await asyncio.create_subprocess_exec(*argv, stdin=PIPE, stdout=PIPE, env=cluster.env())
        wish = {"url": cluster.url, "token": token, "body": body, "every_s": every_s}
        assert process.stdin is not None
        process.stdin.write(json.dumps(wish).encode() + b"\n")
        await process.stdin.drain()
        return cls(process)

    async def stop(self) -> Did:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            async with asyncio.timeout(20.0):
                assert self._process.stdout is not None
                said = await self._process.stdout.read()
                await self._process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        return Did(**json.loads(said))


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
