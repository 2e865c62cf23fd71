"""The control is SIGKILLed and started again, three times, under hundreds of streams: nobody loses or repeats a token.

The streams are LlorchClient coroutines in a few processes, and some real `llorch submit`. Their lengths differ, so that
some end while there is no control. Each token's time is noted by who received it; how long a stream takes to go on is
from the new control's ready line to the stream's first new token.
"""

from __future__ import annotations

import asyncio
import random
import time
from asyncio.subprocess import Process
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster import Cluster, cluster, eventually, expected_text, lasting_port, simulated
from tests.e2e.shared import start
from tests.faults.proof_clients import Clients, Told
from tests.faults.proof_parts import Verdict, percentile, spread

RESUMED_P99_S = 5.0
SEED = 20_240


@dataclass(frozen=True, slots=True)
class Size:
    streams: int
    processes: int
    submits: int
    nodes: int
    delay_ms: int  # between the tokens of a stream
    tokens: tuple[int, int]  # of a stream: at least, at most
    kills: int
    between_s: float  # from a ready line to the next kill


FULL = Size(500, 3, 5, nodes=4, delay_ms=250, tokens=(100, 180), kills=3, between_s=8.0)
SMALL = Size(24, 1, 1, nodes=2, delay_ms=50, tokens=(50, 75), kills=1, between_s=0.0)


@dataclass
class Submit:
    """A `llorch submit` and what it printed, with the time of each piece."""

    process: Process
    wanted: int
    out: bytes = b""
    times: list[float] = field(default_factory=list)  # of each token that was whole by then
    err: bytes = b""

    async def read(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        err = asyncio.ensure_future(self.process.stderr.read())
        while data := await self.process.stdout.read(65_536):
            self.out += data
            self.times += [time.monotonic()] * (self.out.count(b" ") - len(self.times))
        self.err = await err
        await self.process.wait()

    def complaint(self) -> str:
        """What is wrong with it; "" if nothing is."""
        good = self.process.returncode == 0 and self.out.decode().rstrip("\n") in (
            expected_text(self.wanted),
            expected_text(self.wanted).rstrip(),
        )
        return "" if good else f"llorch submit: exit {self.process.returncode}, {self.out[-60:]!r} {self.err[-300:]!r}"


async def prove(folder: Path, size: Size) -> Verdict:
    verdict, chance = Verdict("control_killed"), random.Random(SEED)
    backs: list[tuple[float, float]] = []  # when a control was killed, and when the next one was ready
    async with cluster(folder) as running:
        port = lasting_port()
        control = await running.start_control(port=port)
        slots = -(-(size.streams + size.submits) // size.nodes) + 4
        pool = simulated("p0", "sim", slots, "--tokens", "100000", "--delay-ms", str(size.delay_ms))
        await asyncio.gather(*(running.start_node(f"n{i}", [pool]) for i in range(size.nodes)))
        shares = [[_body(chance, size) for _ in range(i, size.streams, size.processes)] for i in range(size.processes)]
        clients = [await Clients.start(running, bodies, apart_s=0.002) for bodies in shares]
        submits = [await _submit(running, chance.randint(*size.tokens)) for _ in range(size.submits)]
        reading = [asyncio.ensure_future(submit.read()) for submit in submits]
        await eventually(lambda: _all_stream(running, size), within_s=30.0, what="all stream at once")
        for kill in range(size.kills):
            killed = time.monotonic()
            control.kill()
            control = await running.start_control(port=port)
            backs.append((killed, time.monotonic()))
            if kill < size.kills - 1:  # streams go on for a while: time is what is meant
                await asyncio.sleep(size.between_s)
        most_s = size.tokens[1] * size.delay_ms / 1_000 + 60.0
        told = [one for process in clients for one in await process.told(within_s=most_s)]
        await asyncio.wait_for(asyncio.gather(*reading), 60.0)
    _judge(verdict, size, told, submits, backs)
    return verdict


def _judge(
    verdict: Verdict,
    size: Size,
    told: Sequence[Told],
    submits: Sequence[Submit],
    backs: Sequence[tuple[float, float]],
) -> None:
    down = ", ".join(f"{back - killed:.1f}" for killed, back in backs)
    verdict.figure(
        f"{len(told)} streams at once, {len(submits)} llorch submit, {len(backs)} controls killed, away {down} s"
    )
    wrong = [one.complaint() for one in told if not one.exact]
    for complaint in wrong[:5]:
        verdict.figure(complaint)
    verdict.check(
        len(told) == size.streams and not wrong,
        f"{len(told) - len(wrong)} of {size.streams} clients ended with exactly their text, "
        f"{sum(one.wanted for one in told)} tokens in all",
    )
    unlike = [complaint for submit in submits if (complaint := submit.complaint())]
    verdict.check(not unlike, f"{len(submits) - len(unlike)} llorch submit printed exactly theirs {unlike or ''}")
    receivers: list[Told | Submit] = [*told, *submits]
    resumed = [
        after - back
        for killed, back in backs
        for one in receivers
        if one.times and one.times[0] < killed and (after := next((t for t in one.times if t > back), None)) is not None
    ]
    open_then = sum(
        bool(one.times) and one.times[0] < killed and sum(t <= back for t in one.times) < one.wanted
        for killed, back in backs
        for one in receivers
    )
    verdict.check(
        len(resumed) == open_then and percentile(resumed, 0.99) <= RESUMED_P99_S,
        f"{len(resumed)} of {open_then} broken streams went on, after the control was back: {spread(resumed)}, "
        f"p99 <= {RESUMED_P99_S:g} s",
    )


def _body(chance: random.Random, size: Size) -> dict[str, Any]:
    return {"model": "sim", "prompt": "go", "max_tokens": chance.randint(*size.tokens)}


async def _submit(running: Cluster, tokens: int) -> Submit:
    argv = ("submit", "--model", "sim", "--max-tokens", str(tokens), "go")
    return Submit(await start(running, *argv), tokens)


async def _all_stream(running: Cluster, size: Size) -> bool:
    tasks = (await running.get("/v2/tasks"))["tasks"]
    return sum(task["state"] == "streaming" for task in tasks) == size.streams + size.submits
