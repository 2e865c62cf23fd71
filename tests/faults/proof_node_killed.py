"""A node is SIGKILLed under load: what had shown nothing runs elsewhere, at once; the rest ends in one NODE_LOST.

Three models are on both nodes. On node "a" the tasks of `held` and `tight` wait for a first token that takes longer
than the proof lets the node live; those of `sim` stream. On node "b" `held` has a slot for everyone, `tight` has few.
What is measured is the added time of those that move: from the SIGKILL, or from the moment that a slot was free if that
came later, to when node b took them (its reports, to the millisecond).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llorch import sse
from tests.cluster import Cluster, cluster, eventually, expected_text, simulated
from tests.faults.proof_parts import Verdict, node_tasks, percentile, spread, wall_of

ADDED_P99_S = 0.25
MODELS = ("held", "tight", "sim")
TOKENS = 4  # of a task that may move
DELAY_MS = 50


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    each: int  # tasks of each model
    tight_slots: int  # at node b
    prefill_ms: int
    stream_tokens: int  # of a task of `sim`: it lasts longer than node a does


FULL = Size(rounds=8, each=48, tight_slots=6, prefill_ms=5_000, stream_tokens=120)
SMALL = Size(rounds=1, each=12, tight_slots=2, prefill_ms=1_500, stream_tokens=40)


@dataclass
class Asked:
    """A client of any kind, and all that it was told."""

    model: str
    path: str
    stream: bool
    body: dict[str, Any]
    status: int = 0
    node: str = ""
    raw: bytes = b""
    broken: str = ""
    expected: str = ""
    shown: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, running: Cluster) -> None:
        accept = "text/event-stream" if self.stream else "application/json"
        headers = running.headers() | {"Accept": accept}
        try:
            async with running.session.post(running.url + self.path, json=self.body, headers=headers) as response:
                self.status = response.status
                self.node = response.headers.get("X-Llorch-Node", "")
                async for chunk in response.content.iter_any():
                    self.raw += chunk
                    if expected_text(1) in self.raw.decode(errors="replace"):
                        self.shown.set()
        except Exception as error:
            self.broken = repr(error)

    @property
    def native(self) -> bool:
        return self.path == "/v2/tasks"

    def events(self) -> list[sse.Event]:
        decoder = sse.Decoder()
        found = list(decoder.feed(self.raw))
        last = decoder.finish()
        return found if last is None else [*found, last]

    def text(self) -> str:
        if not self.stream:
            answer = json.loads(self.raw)
            return str(answer["text"] if self.native else answer["choices"][0]["text"])
        said = []
        for event in self.events():
            if self.native and event.event == "token":
                said.append(json.loads(event.data)["t"])
            elif not self.native and event.data.startswith('{"choices"'):
                said += [choice["text"] for choice in json.loads(event.data)["choices"]]
        return "".join(said)

    def ends(self) -> list[str]:
        """Every terminal event of a stream: "end", "[DONE]", or the code of an error."""
        found = []
        for event in self.events():
            if event.event == "end" or event.data == "[DONE]":
                found.append("end")
            elif event.event == "error":
                found.append(json.loads(event.data)["code"])
            elif event.data.startswith('{"error"'):
                found.append(json.loads(event.data)["error"]["code"])
        return found

    def served_well(self) -> str:
        """What is wrong with it as a task that ran to its end; "" if nothing is."""
        if self.broken or self.status != 200:
            return f"{self.path}: {self.status} {self.broken} {self.raw[-300:]!r}"
        if self.text() != self.expected or (self.stream and self.ends() != ["end"]):
            return f"{self.path}: {self.text()!r} {self.ends() if self.stream else ''}"
        return ""

    def lost_well(self) -> str:
        """What is wrong with it as a stream whose node was lost."""
        text = self.text()
        if self.broken or self.status != 200 or self.ends() != ["NODE_LOST"]:
            return f"{self.path}: {self.status} {self.broken} {self.ends()} {self.raw[-300:]!r}"
        return "" if text and self.expected.startswith(text) else f"{self.path}: {text[-40:]!r} is no prefix"


def ask(model: str, kind: int, tokens: int) -> Asked:
    """Native tasks go to a by preference; /v1 tasks go where there is more room. Each form of answer takes its turn."""
    native, stream = kind % 2 == 0, model == "sim" or kind % 4 < 2
    body: dict[str, Any] = {"model": model, "prompt": "go", "max_tokens": tokens}
    body |= {"placement": {"prefer": ["a"]}} if native else {"stream": stream}
    path = "/v2/tasks" if native else "/v1/completions"
    return Asked(model, path, stream, body, expected=expected_text(tokens))


def added(reports: Sequence[dict[str, Any]], slots: int, killed: float) -> list[float]:
    """By how much each task that came to a pool after the kill came later than it could have.

    The n-th task to start takes the n-th slot to be free: those free at the kill, then those of tasks that end.
    """
    spans = [(wall_of(report["started_at"]), wall_of(report.get("ended_at"))) for report in reports]
    starts = sorted(start for start, _ in spans if start >= killed)
    held = sum(start < killed <= end for start, end in spans)
    free = [killed] * (slots - held) + sorted(end for _, end in spans if end >= killed)
    return [start - since for start, since in zip(starts, free, strict=False)]


@dataclass
class Tally:
    held: list[float] = field(default_factory=list)  # added seconds
    tight: list[float] = field(default_factory=list)
    silent: int = 0  # tasks at node a that had shown nothing when it was killed
    moved: int = 0
    lost: int = 0
    wrong: list[str] = field(default_factory=list)


async def one_round(running: Cluster, size: Size, tally: Tally) -> None:
    a, b = running.nodes["a"], running.nodes["b"]
    tokens = {"held": TOKENS, "tight": TOKENS, "sim": size.stream_tokens}
    asked = [ask(model, kind, tokens[model]) for kind in range(size.each) for model in MODELS]
    clients = [asyncio.ensure_future(one.run(running)) for one in asked]
    streams = [one for one in asked if one.model == "sim"]
    await asyncio.wait_for(asyncio.gather(*(one.shown.wait() for one in streams)), 20)

    async def all_taken() -> list[dict[str, Any]]:
        """What runs at a, once no task is on its way."""
        tasks = (await running.get("/v2/tasks"))["tasks"]
        there = [report for report in await node_tasks(running, a) if report["state"] == "running"]
        at_a = [task for task in tasks if task["node_id"] == "a" and task["state"] in ("placed", "streaming")]
        return there if len(there) == len(at_a) and not any(task["state"] == "queued" for task in tasks) else []

    there = await eventually(all_taken, what="every task is on a node")
    killed = time.time()
    a.kill()
    await asyncio.wait_for(asyncio.gather(*clients), 60)
    at_b = [report for report in await node_tasks(running, b) if wall_of(report["started_at"]) >= killed]
    lost = [one for one in streams if one.node == "a"]
    tally.wrong += filter(None, (one.lost_well() if one in lost else one.served_well() for one in asked))
    tally.lost += len(lost)
    tally.silent += sum(report["offset"] == 0 for report in there)
    tally.moved += sum(report["attempt"] == 2 for report in at_b)
    whole = await node_tasks(running, b)
    tally.held += added([report for report in whole if report["pool_id"] == "held"], 2 * size.each, killed)
    tally.tight += added([report for report in whole if report["pool_id"] == "tight"], size.tight_slots, killed)


def pools(size: Size, *, victim: bool) -> list[dict[str, Any]]:
    pace = ("--tokens", "1000", "--delay-ms", str(DELAY_MS))
    late = ("--ttft-ms", str(size.prefill_ms)) if victim else ()
    return [
        simulated("sim", "sim", size.each, *pace),
        simulated("held", "held", size.each if victim else 2 * size.each, *pace, *late),
        simulated("tight", "tight", size.each if victim else size.tight_slots, *pace, *late),
    ]


async def prove(folder: Path, size: Size) -> Verdict:
    verdict, tally = Verdict("node_killed"), Tally()
    async with cluster(folder) as running:
        await running.start_control()
        starting = [running.start_node("b", pools(size, victim=False))]
        for _ in range(size.rounds):
            await asyncio.gather(running.start_node("a", pools(size, victim=True), wait=False), *starting)
            starting.clear()
            await eventually(lambda: _back(running), what="node a is back")  # before, its old self is what is known
            await running.bound("a", len(MODELS))
            await one_round(running, size, tally)
    asked = size.rounds * size.each
    verdict.figure(f"{size.rounds} kills of a node, {3 * asked} tasks, {size.each} streams at a time beside them")
    for fate in tally.wrong[:5]:
        verdict.figure(fate)
    verdict.check(not tally.wrong, f"{len(tally.wrong)} tasks ended otherwise than they should")
    verdict.check(
        tally.moved == tally.silent >= asked,
        f"{tally.silent} tasks at the node had shown nothing, {tally.moved} ran elsewhere, to their exact end",
    )
    verdict.check(tally.lost >= asked / 2, f"{tally.lost} streams ended in one NODE_LOST after a part of their text")
    for name, times in (("a slot for each", tally.held), ("slots as they come free", tally.tight)):
        late = percentile(times, 0.99) if times else float("inf")
        verdict.check(late <= ADDED_P99_S, f"added time, {name}: {spread(times)}, p99 <= {ADDED_P99_S} s")
    return verdict


async def _back(running: Cluster) -> bool:
    return bool((await running.get("/v2/nodes/a"))["reachable"])
