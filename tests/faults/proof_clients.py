"""Many clients in a process of their own: `python -m tests.faults.proof_clients`, the wish as JSON on its first line.

Each task is a stream of LlorchClient. Ends when all have ended, or when standard input does; then says as JSON what
every one of them was told, and when (CLOCK_MONOTONIC, which is the same for all processes of a machine).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

from llorch.client.api import LlorchClient
from llorch.client.events import End, Failed, Token
from tests.cluster import Cluster

RESULT_BYTES = 256 * 1024 * 1024


@dataclass
class Told:
    """What one client was told."""

    wanted: int  # tokens
    times: list[float] = field(default_factory=list)  # of each token
    wrong: list[str] = field(
        default_factory=list
    )  # tokens lost, repeated or changed, or without their place in the log
    ends: list[str] = field(default_factory=list)  # its terminal events
    fault: str = ""  # what it raised
    ended_at: float | None = None

    @property
    def exact(self) -> bool:
        return len(self.times) == self.wanted and not self.wrong and self.ends == ["length"] and not self.fault

    def complaint(self) -> str:
        return f"{len(self.times)} of {self.wanted} tokens, {self.wrong[:3]} {self.ends} {self.fault}"


async def follow(client: LlorchClient, body: dict[str, Any], told: Told) -> None:
    last: str | None = None  # where in the log the token before it ended
    try:
        async with contextlib.aclosing(client.submit(body)) as events:
            async for event in events:
                if isinstance(event, Token):
                    place = len(told.times)
                    told.times.append(monotonic())
                    if (event.text, event.index) != (f"t{place} ", place) or event.id in (None, last):
                        told.wrong.append(f"at {place}: {event.text!r}, {event.index}, id {event.id}")
                    last = event.id
                elif isinstance(event, End):
                    told.ends.append(event.finish_reason)
                elif isinstance(event, Failed):
                    told.ends.append(event.error.code)
    except Exception as error:
        told.fault = repr(error)
    told.ended_at = monotonic()


async def main() -> None:
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader(limit=16 * 1024 * 1024)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    wish = json.loads(await stdin.readline())
    all_told = [Told(body["max_tokens"]) for body in wish["bodies"]]
    async with LlorchClient(wish["url"], wish["token"]) as client:
        streams = []
        for body, told in zip(wish["bodies"], all_told, strict=True):
            streams.append(asyncio.ensure_future(follow(client, body, told)))
            await asyncio.sleep(wish["apart_s"])
        ended = asyncio.ensure_future(stdin.read())
        done = asyncio.gather(*streams)
        await asyncio.wait((ended, done), return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await done
        ended.cancel()
    print(json.dumps([asdict(told) for told in all_told]), flush=True)


class Clients:
    """The process, from outside."""

    def __init__(self, process: Process) -> None:
        self.process = process
        assert process.stdout is not None
        self._result = asyncio.ensure_future(process.stdout.read(RESULT_BYTES))

    @classmethod
    async def start(cls, cluster: Cluster, bodies: Sequence[dict[str, Any]], *, apart_s: float = 0.0) -> Clients:
        argv = (sys.executable, "-m", "tests.faults.proof_clients")
        process = await asyncio.create_subprocess_exec(*argv, stdin=PIPE, stdout=PIPE, env=cluster.env())
        wish = {"url": cluster.url, "token": cluster.token, "bodies": list(bodies), "apart_s": apart_s}
        assert process.stdin is not None
        process.stdin.write(json.dumps(wish).encode() + b"\n")
        await process.stdin.drain()
        return cls(process)

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None

    async def told(self, *, within_s: float, stop: bool = False) -> list[Told]:
        """What all were told; with `stop`, up to now."""
        assert self.process.stdin is not None
        try:
            if stop:
                self.process.stdin.close()
            async with asyncio.timeout(within_s):
                parts = []
                while part := await self._result:
                    parts.append(part)
                    assert self.process.stdout is not None
                    self._result = asyncio.ensure_future(self.process.stdout.read(RESULT_BYTES))
                await self.process.wait()
        finally:
            self.process.stdin.close()
            if self.process.returncode is None:
                self.process.kill()
                await self.process.wait()
        return [Told(**told) for told in json.loads(b"".join(parts))]


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
