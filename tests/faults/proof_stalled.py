"""A thousand readers that stopped reading: what they cost the control, and that they hold up nobody.

A process of healthy readers notes when each token reaches it, all the time. Phases with and without the stalled readers
take turns in the same run, and only their ratio is judged: the machine's own noise is in both. The memory is the growth
of the control's RSS, before the slow-reader drop takes the stalled ones away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import Cluster, cluster, eventually, lasting_port, simulated
from tests.faults.proof_clients import Clients, Told
from tests.faults.proof_parts import Verdict, cpu_s, percentile, rss_bytes, spread

EACH_BYTES = 256 * 1024
RATIO = 1.5
DELAY_MS = 50  # between a healthy reader's tokens
SLICE = 10  # stalled readers that come at once


@dataclass(frozen=True, slots=True)
class Size:
    stalled: int
    healthy: int
    turns: int
    phase_s: float
    ratio: float | None  # None: too few and too short to tell
    slack_bytes: int  # what the control's memory may grow by for other reasons
    come_within_s: float
    slow_reader_timeout_s: float
    pace_s: float  # between the pieces that their engine says


FULL = Size(
    stalled=1_000,
    healthy=50,
    turns=5,
    phase_s=5.0,
    ratio=RATIO,
    slack_bytes=0,
    come_within_s=45.0,
    slow_reader_timeout_s=30.0,
    pace_s=0.25,
)
SMALL = Size(
    stalled=60,
    healthy=8,
    turns=1,
    phase_s=0.7,
    ratio=None,
    slack_bytes=4 * 1024 * 1024,
    come_within_s=10.0,
    slow_reader_timeout_s=5.0,
    pace_s=0.02,
)


def stalled_reader(url: str, token: str, path: str, body: object) -> socket.socket:
    """A client that asks for a stream and never reads it."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, int(port)))
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(raw)}\r\n\r\n"
    sock.sendall(head.encode() + raw)
    return sock


@contextlib.asynccontextmanager
async def flood(running: Cluster, slots: int, pace_s: float) -> AsyncIterator[subprocess.Popen[bytes]]:
    """The engine of the stalled ones, handed over to node a."""
    port = lasting_port()
    argv = [sys.executable, "-m", "tests.faults.proof_flood", str(port), str(pace_s)]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=running.env())
    folder = running.folder / "a" / ".runtime" / "engines"
    wish = {"pool_id": "flood", "engine": "vllm", "url": f"http://127.0.0.1:{port}", "model": "flood", "slots": slots}
    temporary = folder / ".flood-r0.json.tmp"
    temporary.write_text(json.dumps(wish))
    temporary.replace(folder / "flood-r0.json")
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


class Stall:
    """The stalled readers, which come and go together."""

    def __init__(self, running: Cluster, count: int, engine: subprocess.Popen[bytes], within_s: float) -> None:
        self._running = running
        self._count = count
        self._engine = engine
        self._within_s = within_s
        self.sockets: list[socket.socket] = []

    async def come(self) -> None:
        """Half with native tasks and half with /v1. Returns when nothing moves for them any more."""
        for i in range(self._count):
            body: dict[str, Any] = {"model": "flood", "prompt": "x", "max_tokens": 1_000_000}
            path = "/v2/tasks" if i % 2 else "/v1/completions"
            body |= {} if i % 2 else {"stream": True}
            self.sockets.append(stalled_reader(self._running.url, self._running.token, path, body))
            if i % SLICE == 0:
                await asyncio.sleep(0.05)

        await eventually(self._stands_still, within_s=self._within_s, what="every stalled reader's stream stands still")

    async def _stands_still(self) -> bool:
        """Their engine has said all it could, and rests; the node has worked off what it read; all are served."""
        spent_s = cpu_s(self._engine.pid)
        await asyncio.sleep(0.5)
        asked_at = time.monotonic()
        async with self._running.session.get(self._running.nodes["a"].url + "/livez") as response:
            await response.read()
        lag_s = time.monotonic() - asked_at
        return cpu_s(self._engine.pid) - spent_s <= 0.02 and lag_s < 0.1 and await self.streaming() == self._count

    async def streaming(self) -> int:
        """How many of them the control still serves. It lists a thousand tasks, which is work: not while measuring."""
        tasks = (await self._running.get("/v2/tasks"))["tasks"]
        return sum(task["state"] == "streaming" and task["model"] == "flood" for task in tasks)

    async def go(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()
        await eventually(self.none_left, within_s=30.0, what="the slots of the stalled readers are free")

    async def none_left(self) -> bool:
        pools = (await self._running.get("/v2/pools"))["pools"]
        return all(pool["in_flight"] == 0 for pool in pools if pool["pool_id"] == "flood")


def gaps(told: Sequence[Told], phases: Sequence[tuple[float, float]]) -> list[float]:
    """The times between two tokens of a reader, of those that came wholly in one of `phases`."""
    found = []
    for one in told:
        for before, after in zip(one.times, one.times[1:], strict=False):
            if any(begin <= before and after <= end for begin, end in phases):
                found.append((after - before) * 1_000)
    return found


async def prove(folder: Path, size: Size) -> Verdict:
    verdict = Verdict("stalled")
    quiet: list[tuple[float, float]] = []
    stalled: list[tuple[float, float]] = []
    coming: list[tuple[float, float]] = []
    async with cluster(folder) as running:
        drop = f"{round(size.slow_reader_timeout_s * 1_000)}ms"
        control = await running.start_control("--slow-reader-timeout", drop)
        pool = simulated("p0", "sim", size.healthy, "--tokens", "1000000", "--delay-ms", str(DELAY_MS))
        await running.start_node("a", [pool], "--reconnect-grace", "0s")
        async with flood(running, size.stalled, size.pace_s) as engine:
            await running.bound("a", 2)
            body = {"model": "sim", "prompt": "go", "max_tokens": 1_000_000}
            clients = await Clients.start(running, [body] * size.healthy)

            async def all_stream() -> bool:
                tasks = (await running.get("/v2/tasks"))["tasks"]
                return sum(task["state"] == "streaming" for task in tasks) == size.healthy

            await eventually(all_stream)
            stall = Stall(running, size.stalled, engine, size.come_within_s)
            before, most, kept = rss_bytes(control.pid), 0, True
            try:
                for turn in range(size.turns):
                    quiet.append(await phase(size.phase_s))
                    began = time.monotonic()
                    await stall.come()
                    coming.append((began, time.monotonic()))
                    stalled.append(await phase(size.phase_s))
                    most = max(most, rss_bytes(control.pid))
                    kept = kept and await stall.streaming() == size.stalled
                    if turn < size.turns - 1:
                        await stall.go()
                quiet_again = time.monotonic()
                await eventually(stall.none_left, within_s=size.slow_reader_timeout_s + 10.0, what="all are dropped")
                dropped_s = time.monotonic() - quiet_again
            finally:
                for sock in stall.sockets:
                    sock.close()
                told = await clients.told(within_s=20.0, stop=True)
    each = (most - before - size.slack_bytes) / size.stalled
    said = f"{each / 1024:.0f} KiB of control memory for each of {size.stalled} stalled readers"
    verdict.check(each <= EACH_BYTES, f"{said}, at most {EACH_BYTES // 1024}")
    verdict.check(
        kept, f"all of them were there to the end of each phase; dropped {dropped_s:.0f} s after the last one"
    )
    verdict.check(not any(one.wrong or one.fault for one in told), f"{len(told)} healthy readers lost no token")
    without, beside, arriving = gaps(told, quiet), gaps(told, stalled), gaps(told, coming)
    verdict.figure(f"between two tokens, none stalled: {spread(without, 'ms', 1)}")
    verdict.figure(f"between two tokens, {size.stalled} stalled: {spread(beside, 'ms', 1)}")
    verdict.figure(f"between two tokens, while they come: {spread(arriving, 'ms', 1)}")
    ratio = percentile(beside, 0.99) / percentile(without, 0.99)
    if size.ratio is not None:
        verdict.check(ratio <= size.ratio, f"ratio of the p99 {ratio:.2f}, at most {size.ratio}")
    return verdict


async def phase(seconds: float) -> tuple[float, float]:
    """When it began and ended. What is measured is the time itself, so this one does sleep."""
    began = time.monotonic()
    await asyncio.sleep(seconds)
    return began, time.monotonic()
