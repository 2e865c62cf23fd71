"""Two principals, one sending 50 times the other's load: the small one waits at most twice as long as when it is alone.

The small one sends bursts of four tasks for every slot, and in all asks for less than half of the slots' time. Phases
with and without the greedy one take turns in the same run. The greedy one is ahead in each of its phases, so that the
small one comes to a full line and to slots that are all taken; by two bursts' worth: one that it has in hand itself, as
has everybody who comes, and one more. A wait is what the control says of it (X-Llorch-Queue-Ms) and, if it refused the
task at first, the time until it didn't. A task is long against what a loaded machine adds to it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster import Cluster, cluster, eventually, expected_text, simulated
from tests.faults.proof_greedy import Did, Greedy
from tests.faults.proof_parts import Verdict, cpu_s, percentile, spread

TIMES_THE_LOAD = 50
RATIO = 2.0
SLOTS = 4  # 16 may wait for one principal while another waits too: a burst
BURST = 4 * SLOTS
AHEAD_BURSTS = 2.5
SMALL_SHARE = 0.4  # of the slots' time, for the small one


@dataclass(frozen=True, slots=True)
class Size:
    turns: int
    bursts: int  # in each phase
    tokens: int
    delay_ms: int

    @property
    def task_s(self) -> float:
        return self.tokens * self.delay_ms / 1_000

    @property
    def every_s(self) -> float:
        """From one burst to the next."""
        return BURST * self.task_s / (SLOTS * SMALL_SHARE)


FULL = Size(turns=3, bursts=2, tokens=24, delay_ms=100)
SMALL = Size(turns=1, bursts=1, tokens=6, delay_ms=50)


@dataclass
class Waits:
    """Of the small one's tasks, in one kind of phase."""

    times: list[float] = field(default_factory=list)  # seconds
    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.times) / len(self.times)

    async def ask(self, running: Cluster, body: dict[str, Any]) -> None:
        began = time.monotonic()
        headers = running.headers() | {"Accept": "application/json"}
        for _ in range(100):
            sent = time.monotonic()
            async with running.session.post(running.url + "/v2/tasks", json=body, headers=headers) as response:
                answer = await response.json()
            if response.status != 429:
                break
            self.refused += 1
            await asyncio.sleep(float(response.headers["Retry-After"]))
        if response.status != 200 or answer["text"] != expected_text(body["max_tokens"]):
            self.wrong.append(f"{response.status} {answer}")
            return
        self.times.append(sent - began + float(response.headers["X-Llorch-Queue-Ms"]) / 1_000)

    async def phase(self, running: Cluster, size: Size, body: dict[str, Any]) -> None:
        """Bursts at their times, however long the one before takes."""
        began, asked = time.monotonic(), []
        for burst in range(size.bursts):
            await asyncio.sleep(max(0.0, began + burst * size.every_s - time.monotonic()))
            asked += [asyncio.ensure_future(self.ask(running, body)) for _ in range(BURST)]
        await asyncio.wait_for(asyncio.gather(*asked), 120.0)


async def prove(folder: Path, size: Size) -> Verdict:
    verdict, alone, beside = Verdict("fair"), Waits(), Waits()
    did: list[Did] = []
    worked_s = spent_s = 0.0  # the control, beside the greedy one
    body = {"model": "sim", "prompt": "go", "max_tokens": size.tokens}
    async with cluster(folder) as running:
        small, large = secrets.token_hex(16), secrets.token_hex(16)
        running.tokens["LLORCH_API_TOKEN"] = f"small={small},large={large}"
        control = await running.start_control()
        running.tokens["LLORCH_API_TOKEN"] = small
        pace = ("--tokens", "100000", "--delay-ms", str(size.delay_ms))
        await running.start_node("a", [simulated("p0", "sim", SLOTS, *pace)], "--reconnect-grace", "0s")
        for _ in range(size.turns):
            await alone.phase(running, size, body)
            greedy = await Greedy.start(running, large, body, size.every_s / (TIMES_THE_LOAD * BURST))
            try:
                await eventually(lambda: _waiting(running, large, BURST), what="the greedy one waits")
                began, worked_before_s = time.monotonic(), cpu_s(control.pid)
                await asyncio.sleep(AHEAD_BURSTS * BURST / SLOTS * size.task_s)
                await beside.phase(running, size, body)
                spent_s += time.monotonic() - began
                worked_s += cpu_s(control.pid) - worked_before_s
            finally:
                did.append(await greedy.stop())
            await eventually(lambda: _idle(running, large), within_s=20.0, what="the greedy one has gone")
    rate, small_rate = sum(one.offered for one in did) / sum(one.seconds for one in did), BURST / size.every_s
    verdict.figure(
        f"the small one: {len(alone.times)} tasks alone, {len(beside.times)} beside the greedy one, {small_rate:.1f}/s"
    )
    verdict.figure(
        f"the greedy one: {rate:.0f} tasks/s, {', '.join(_sums(did))}; control at {worked_s / spent_s:.0%} of a core"
    )
    verdict.check(rate >= 0.95 * TIMES_THE_LOAD * small_rate, f"it offered {rate / small_rate:.0f} times the load")
    wrong = alone.wrong + beside.wrong
    verdict.check(not wrong, f"{len(wrong)} tasks of the small one ended otherwise than they should {wrong[:3] or ''}")
    verdict.check(not any(one.wrong for one in did), "nothing of the greedy one's was answered in any other way")
    verdict.figure(f"wait alone: mean {alone.mean:.3f} s, {spread(alone.times)}, {alone.refused} refused at first")
    verdict.figure(f"wait beside: mean {beside.mean:.3f} s, {spread(beside.times)}, {beside.refused} refused at first")
    mean, p95 = beside.mean / alone.mean, percentile(beside.times, 0.95) / percentile(alone.times, 0.95)
    verdict.check(
        mean <= RATIO and p95 <= RATIO, f"ratio of the mean {mean:.2f}, of the p95 {p95:.2f}, at most {RATIO}"
    )
    return verdict


def _sums(did: list[Did]) -> list[str]:
    return [f"{sum(getattr(one, name) for one in did)} {name}" for name in ("offered", "sent", "refused", "served")]


async def _waiting(running: Cluster, token: str, count: int) -> bool:
    tasks = (await running.get("/v2/tasks", token=token))["tasks"]
    return sum(task["state"] == "queued" for task in tasks) >= count


async def _idle(running: Cluster, token: str) -> bool:
    tasks = (await running.get("/v2/tasks", token=token))["tasks"]
    return not any(task["state"] in ("queued", "placed", "streaming") for task in tasks)
