"""A client that leaves frees its engine slot: within 1 s for /v1, after its grace for native tasks. Seen at the engine.

Waves of clients ask, are at one of three points of their answer (nothing yet, in the middle of a stream, waiting for an
answer in one piece), and leave together, with a FIN or an RST. The engine is asked how many slots it works on.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import Cluster, cluster, eventually, simulated
from tests.faults.proof_parts import Engine, RawClient, Verdict

FREE_WITHIN_S = 1.0
GIVE_UP_S = 10.0  # a slot that is not free by then stays taken
NEVER = float("inf")
ENDLESS = 'root ::= "a" root'  # a grammar whose texts do not end


@dataclass(frozen=True, slots=True)
class Size:
    clients: int
    rounds: int
    grace_s: float
    prefill_ms: int  # a wave of those that leave before their first token comes and goes in a part of it
    llama: bool


FULL = Size(clients=32, rounds=4, grace_s=2.0, prefill_ms=6_000, llama=True)
SMALL = Size(clients=4, rounds=1, grace_s=0.3, prefill_ms=1_500, llama=False)


@dataclass(frozen=True, slots=True)
class Wave:
    name: str
    path: str
    model: str
    seen: bytes | None  # what a client has read before it leaves; None: its task works at the engine, that is all
    stream: bool = True
    grammar: str | None = None

    @property
    def native(self) -> bool:
        return self.path == "/v2/tasks"

    def body(self) -> dict[str, object]:
        body: dict[str, object] = {"model": self.model, "prompt": "go", "max_tokens": 100_000}
        if self.grammar is not None:
            body["grammar"] = self.grammar
        return body if self.native else body | {"stream": self.stream}


V1 = "/v1/completions"
WAVES = (
    Wave("/v1 stream, before its first token", V1, "early", None),
    Wave("/v1 stream, in the middle", V1, "sim", b"t3 "),
    Wave("/v1 answer in one piece", V1, "sim", None, stream=False),
)
NATIVE = Wave("native stream, in the middle", "/v2/tasks", "sim", b"t3 ")


async def leave(running: Cluster, engine: Engine, wave: Wave, clients: int, *, reset: bool) -> tuple[float, float]:
    """One wave. Returns when the first and when the last slot went free, in seconds after the clients left."""
    asked = [RawClient.post(running.url, wave.path, running.token, wave.body()) for _ in range(clients)]
    there = await asyncio.gather(*asked)
    if wave.seen is not None:
        await asyncio.gather(*(client.until(wave.seen) for client in there))

    async def all_work() -> bool:
        return await engine.active() == clients

    await eventually(all_work, within_s=20.0, what=f"{wave.name}: {clients} slots at work")
    left_at = time.monotonic()
    for client in there:
        client.leave(reset=reset)
    first = None
    while True:
        asked_at = time.monotonic()
        active = await engine.active()
        if active < clients and first is None:
            first = asked_at - left_at
        if active == 0:
            return first or 0.0, time.monotonic() - left_at
        if asked_at - left_at > GIVE_UP_S:
            return first or NEVER, NEVER
        await asyncio.sleep(0.005)


async def prove(folder: Path, size: Size) -> Verdict:
    verdict = Verdict("leaving")
    pace = ("--tokens", "100000", "--delay-ms", "50")
    async with cluster(folder) as running:
        await running.start_control()
        pools = [
            simulated("p0", "sim", size.clients, *pace),
            simulated("p1", "early", size.clients, *pace, "--ttft-ms", str(size.prefill_ms)),
        ]
        grace = ("--reconnect-grace", f"{round(size.grace_s * 1_000)}ms")
        await running.start_node("a", pools, *grace)
        engines = {"sim": Engine(running, "a", "p0"), "early": Engine(running, "a", "p1")}
        for wave in WAVES:
            took = []
            for turn in range(2 * size.rounds):
                reset = bool(turn % 2)
                took.append((await leave(running, engines[wave.model], wave, size.clients, reset=reset))[1])
                if took[-1] is NEVER:
                    break
            verdict.check(max(took) <= FREE_WITHIN_S, f"{wave.name}: {size.clients} slots free after {_said(took)}")
            if NEVER in took:
                return verdict  # no slot is left for those that follow
        firsts, lasts = [], []
        for turn in range(size.rounds):
            first, last = await leave(running, engines["sim"], NATIVE, size.clients, reset=bool(turn % 2))
            firsts.append(first)
            lasts.append(last)
        good = min(firsts) >= size.grace_s and max(lasts) <= size.grace_s + FREE_WITHIN_S
        said = f"first slot free after {_said(firsts)}, the last after {_said(lasts)}"
        verdict.check(good, f"{NATIVE.name}, grace {size.grace_s:g} s: {said}")
        free = sum(pool["in_flight"] for pool in (await running.get("/v2/pools"))["pools"])
        verdict.check(free == 0, f"the control holds {free} claims at the end")
        if size.llama:
            await _llama(running, verdict, size)
    return verdict


async def _llama(running: Cluster, verdict: Verdict, size: Size) -> None:
    """The same of real llama.cpp, two clients at a time, of tasks that do not end by themselves.

    With one thread: several spin while they wait for each other, and on a busy machine a token then takes seconds.
    llama.cpp looks at its connections between two tokens.
    """
    pool = {
        "id": "p0",
        "engine": "llamacpp",
        "model": "demo",
        "slots": 2,
        "ctx": 65_536,
        "args": ["--slots", "--threads", "1"],
    }
    await running.start_node("b", [pool], "--reconnect-grace", f"{round(size.grace_s * 1_000)}ms")
    engine = Engine(running, "b")
    took, firsts, lasts = [], [], []
    for turn in range(2 * size.rounds):
        wave = Wave("llama.cpp, /v1 stream", V1, "demo", b"\n\n", grammar=ENDLESS)
        took.append((await leave(running, engine, wave, 2, reset=bool(turn % 2)))[1])
    for turn in range(size.rounds):
        wave = Wave("llama.cpp, native", "/v2/tasks", "demo", b"event: token", grammar=ENDLESS)
        first, last = await leave(running, engine, wave, 2, reset=bool(turn % 2))
        firsts.append(first)
        lasts.append(last)
    verdict.check(max(took) <= FREE_WITHIN_S, f"llama.cpp, /v1 stream: slots free after {_said(took)}")
    good = min(firsts) >= size.grace_s and max(lasts) <= size.grace_s + FREE_WITHIN_S
    said = f"first slot free after {_said(firsts)}, the last after {_said(lasts)}"
    verdict.check(good, f"llama.cpp, native, grace {size.grace_s:g} s: {said}")


def _said(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f} s" if len(values) > 1 else f"{values[0]:.3f} s"
