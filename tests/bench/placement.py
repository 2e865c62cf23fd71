"""What it costs to decide where a task goes, at a control that knows many pools.

    python -m tests.bench.placement [--pools 10,100,1000] [--decisions 20000] [--parts] [--cpu] [--json]

In one process, without a network: a real `Registry`, filled by `Register` and `Heartbeat` messages with N pools on N/10
nodes, N/10 models (100 at most) spread over them, and 4 slots a pool, half of which are taken while it is measured. A
decision is what an arrival costs at a control that has a free slot for it: `WaitingRoom.claim` up to its claim, with
the choice, the facts kept for an explanation, metrics, admission and the log line. Lines are made and leave together
(to /dev/null), here every 20 decisions as there every 20 ms, and each decision is charged its part. Then the task
ends: `release` and `settle`, timed by themselves.

Time is virtual. Decisions come 1 ms apart, and every node sends a delta of its changed pools 250 ms after a change,
as nodes do, so that what a control has worked out goes stale as often as in life: with 100 nodes that is 400 beats for
1,000 decisions. Each size is measured again with all pools serving one model, the worst case, and `decide()`, which
tells every pool's verdict to a person, by itself.

`--parts`: the same decisions once more, with the parts of one timed from inside. The timers cost about 0.3 us each.

`--cpu`: CPU time of the thread instead of the time that passed, for machines whose cores others use, too. Slower caches
and a shared core are still in it, being put aside is not.

Limits: the messages are parsed beforehand; nobody waits (with a queue, each release also looks at who is next); wishes
have no constraints; pools are not swapped. The collector works as it does in a control: what was imported is frozen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from llorch import logs
from llorch.cli.loading import loading
from llorch.tasks import settle_memory

with loading():
    from llorch.control import swapping, waiting
    from llorch.control.admission import Admission
    from llorch.control.decision import Decision
    from llorch.control.metrics import ControlMetrics
    from llorch.control.placement import Wish
    from llorch.control.registry import Claim, Registry
    from llorch.control.tasks import Task, TaskStore
    from llorch.control.waiting import WaitingRoom
    from llorch.messages import Heartbeat, Register, Tail
    from tests.bench.figures import Required, report, spread, table

POOLS_PER_NODE = 10
SLOTS = 4
MOST_MODELS = 100
TAKEN = 0.5  # of all slots, while it is measured
STEP_S = 0.001  # between two decisions
EARLY_BEAT_S = 0.25
FULL_BEAT_S = 10.0
MOST_US = 200.0  # p99 of a decision with 1,000 pools and 100 models
LINES_TOGETHER = 20
DECIDES = 50  # of `decide()`, which costs a thousand times as much
WALL = "2025-01-02T03:04:05Z"
PRINCIPALS = tuple(f"client-{number}" for number in range(8))


@dataclass
class Costs:
    """Seconds of each."""

    decision: list[float] = field(default_factory=list)
    release: list[float] = field(default_factory=list)
    beat: list[float] = field(default_factory=list)
    decide: list[float] = field(default_factory=list)


class World:
    """A control's registry and waiting room, with nodes that register and beat in virtual time."""

    def __init__(self, pools: int, models: int, seed: int = 0) -> None:
        self.now = 1_000.0
        self.models = [f"model-{number}" for number in range(models)]
        self.registry = Registry("epoch")
        self.store = TaskStore()
        self.admission = Admission()
        self.room = WaitingRoom(
            self.registry,
            self.admission,
            ControlMetrics(),
            self.store,
            queue_timeout_s=120.0,
            queue_timeout_batch_s=300.0,
            clock=lambda: self.now,
        )
        self.running: list[tuple[Task, Claim]] = []
        self._random = random.Random(seed)
        self._taken: Counter[str] = Counter()  # slots, by model
        self._slots: Counter[str] = Counter()
        for pool in range(pools):
            self._slots[self.models[pool % models]] += SLOTS
        self._serial = 0
        self._seq = 0
        self._changed: dict[str, set[str]] = {}
        self._pools = pools
        self._nodes = [f"node-{number:03}" for number in range(max(1, pools // POOLS_PER_NODE))]
        self._delta_at = {node: self.now + EARLY_BEAT_S * self._random.random() for node in self._nodes}
        self._full_at = {node: self.now + FULL_BEAT_S * self._random.random() for node in self._nodes}
        for number, node in enumerate(self._nodes):
            reports = [self._report(node, pool) for pool in self._pools_of(number)]
            message = {"node_id": node, "boot_id": f"boot-{number}", "pools": reports}
            self.registry.register(
                Register.model_validate(message), now=self.now, wall=WALL, peer=f"10.0.0.{number}", lease_id=node
            )
            self.registry.link_up(node, node, self.now)
        self.registry.events()

    def _pools_of(self, number: int) -> list[str]:
        first = number * POOLS_PER_NODE
        last = self._pools if number == len(self._nodes) - 1 else first + POOLS_PER_NODE
        return [f"pool-{place:04}" for place in range(first, last)]

    def _report(self, node: str, pool: str) -> dict[str, Any]:
        """As a node of ours reports a pool. Its slots are as its control sees them, for nobody else uses them."""
        return {
            "pool_id": pool, "engine": "llama-server", "engine_version": "b1", "ctx": 4096, "modalities": ["text"],
            "model": self.models[int(pool[-4:]) % len(self.models)], "state": "ready", "ready": True,
            "slots_total": SLOTS, "slots_free": SLOTS - self.registry.claimed(node, pool),
            "vram_total_bytes": 24 << 30, "vram_free_bytes": self._random.randrange(1 << 30, 8 << 30),
            "replicas": [{"id": "r0", "state": "ready", "owned": True, "slots_free": SLOTS}],
        }  # fmt: skip

    # ---- what happens at a control

    def arrive(self) -> Task:
        """A task that has been taken in, for a model that has a free slot; it is to be given that."""
        self._serial += 1
        model = self._random.choice(self.models)
        while self._taken[model] >= self._slots[model]:
            model = self._random.choice(self.models)
        task = Task(
            task_id=f"00000000-0000-4000-8000-{self._serial:012x}",
            owner=self._random.choice(PRINCIPALS),
            wish=Wish(model),
            path="/v1/chat/completions",
            stream=True,
            detach=False,
            body=b"x" * 400,
            body_digest="",
            headers={},
            request_id="",
            received_at=self.now,
        )
        self.store.add(task)
        return task

    def claim(self, task: Task) -> Claim:
        """A slot, as a dispatcher asks for one. Where one is free this never waits, and needs no loop."""
        try:
            self.room.claim(task, _said, front=False).send(None)
        except StopIteration as done:
            claim: Claim = done.value
            return claim
        raise AssertionError("it waits, though a slot was free")

    def placed(self, task: Task, claim: Claim) -> None:
        task.attempt, task.node_id, task.pool_id = claim.attempt, claim.node_id, claim.pool_id
        self.running.append((task, claim))
        self._taken[task.wish.model] += 1
        self._changed.setdefault(claim.node_id, set()).add(claim.pool_id)

    def end_one(self) -> Callable[[], None]:
        """Which task ends next is drawn; what its end costs is to be called."""
        at = self._random.randrange(len(self.running))
        self.running[at], self.running[-1] = self.running[-1], self.running[at]
        task, claim = self.running.pop()
        self._taken[task.wish.model] -= 1
        self._changed.setdefault(claim.node_id, set()).add(claim.pool_id)
        task.tail = Tail(length=1_000, tokens_in=100, tokens_out=self._random.randrange(20, 500))

        def end() -> None:
            self.room.release(claim)
            self.room.settle(task)
            self.store.ended(task)

        return end

    def beats(self) -> Iterator[Callable[[], None]]:
        """What nodes have to say by now: each to be called."""
        for number, node in enumerate(self._nodes):
            if self.now >= self._full_at[node]:
                self._full_at[node] += FULL_BEAT_S
                yield self._beat(node, self._pools_of(number), delta=False)
            elif self.now >= self._delta_at[node] and self._changed.get(node):
                yield self._beat(node, sorted(self._changed[node]), delta=True)

    def _beat(self, node: str, pools: list[str], *, delta: bool) -> Callable[[], None]:
        self._changed.pop(node, None)
        self._delta_at[node] = self.now + EARLY_BEAT_S
        self._seq += 1
        fields = {"lease_id": node, "seq": self._seq, "delta": delta, "rtt_ms": 1.0, "timestamp": WALL}
        message = Heartbeat.model_validate(fields | {"pools": [self._report(node, pool) for pool in pools]})

        def beat() -> None:
            self.registry.heartbeat(node, message, now=self.now, wall=WALL)
            self.room.pump()

        return beat

    def step(self) -> None:
        self.now += STEP_S

    def decide(self, wish: Wish) -> Decision:
        return self.room.snapshot(wish).decision()


async def _said(_position: int, _eta_ms: int | None) -> None:
    """Nobody is told."""


def filled(pools: int, models: int, seed: int = 0) -> World:
    """A world in which half of all slots are taken."""
    world = World(pools, models, seed)
    while len(world.running) < TAKEN * SLOTS * pools:
        task = world.arrive()
        world.placed(task, world.claim(task))
    for beat in world.beats():
        beat()
    return world


def leave() -> None:
    """The lines that were held."""
    for handler in logging.getLogger().handlers:
        handler.flush()


async def measure(world: World, decisions: int, clock: Callable[[], float] = time.perf_counter) -> Costs:
    """In a loop that never has its turn, so that lines are held until they are to leave."""
    costs = Costs()
    while len(costs.decision) < decisions:
        world.step()
        for beat in world.beats():
            began = clock()
            beat()
            costs.beat.append(clock() - began)
        task = world.arrive()
        began = clock()
        claim = world.claim(task)
        costs.decision.append(clock() - began)
        world.placed(task, claim)
        end = world.end_one()
        began = clock()
        end()
        costs.release.append(clock() - began)
        if len(costs.decision) % LINES_TOGETHER == 0:
            began = clock()
            leave()
            share = (clock() - began) / LINES_TOGETHER
            costs.decision[-LINES_TOGETHER:] = [spent + share for spent in costs.decision[-LINES_TOGETHER:]]
    for _ in range(DECIDES):
        wish = Wish(world.models[len(costs.decide) % len(world.models)])
        began = clock()
        world.decide(wish)
        costs.decide.append(clock() - began)
    return costs


# ---------------------------------------------------------------- the parts of a decision


class _Told:
    """A log whose `info` is timed."""

    def __init__(self, info: Callable[..., Any]) -> None:
        self.info = info


async def parts(world: World, decisions: int) -> dict[str, float]:
    """Mean microseconds of each part of a decision; the rest is what none of them covers."""
    spent: dict[str, float] = {}
    deciding = False

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                if deciding:
                    spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

        return run

    room, registry, total = world.room, world.registry, 0.0
    with contextlib.ExitStack() as patched:
        for owner, attribute, name in (
            (room, "pump", "pump"),
            (room, "_free_pools", "free pools of the model"),
            (registry, "best", "the best pool"),
            (swapping, "choose", "choose"),
            (room, "snapshot", "facts of all pools, to explain it"),
            (registry, "claim", "claim"),
            (world.admission, "given", "admission"),
        ):
            call = timed(name, getattr(owner, attribute))
            patched.enter_context(mock.patch.object(owner, attribute, call))
        patched.enter_context(mock.patch.object(waiting, "log", _Told(timed("log line", waiting.log.info))))
        for number in range(1, decisions + 1):
            world.step()
            for beat in world.beats():
                beat()
            task, deciding = world.arrive(), True
            began = time.perf_counter()
            claim = world.claim(task)
            took_s, deciding = time.perf_counter() - began, False
            total += took_s
            world.placed(task, claim)
            world.end_one()()
            if number % LINES_TOGETHER == 0:
                began = time.perf_counter()
                leave()
                took_s = time.perf_counter() - began
                spent["log line"] += took_s
                total += took_s
    each = {name: round(seconds / decisions * 1e6, 1) for name, seconds in spent.items()}
    each["the rest"] = round(total / decisions * 1e6 - sum(each.values()), 1)
    return dict(sorted(each.items(), key=lambda item: -item[1]))


# ---------------------------------------------------------------- the program


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pools", default="10,100,1000", help="sizes, with commas between them")
    parser.add_argument("--decisions", type=int, default=20_000, help="of each size")
    parser.add_argument("--parts", action="store_true", help="where the time of a decision goes")
    parser.add_argument("--cpu", action="store_true", help="CPU time, not the time that passed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    sizes = [int(size) for size in asked.pools.split(",")]
    with open(os.devnull, "w") as nowhere:
        logs.configure("info")
        logging.getLogger().handlers[0].setStream(nowhere)  # type: ignore[attr-defined]
        figures = {"sizes": [_size(pools, models, asked) for pools, models in _worlds(sizes)]}
    rows, text = [], []
    for size in figures["sizes"]:
        name = f"{size['pools']:,} pools, {size['models']} models"
        for what in ("decision_us", "release_us", "beat_us", "decide_us"):
            each = size[what]
            rows.append((name, what.removesuffix("_us"), size["counts"][what], each["p50"], each["p99"], each["max"]))
            name = ""
    text.append(table(("microseconds", "of", "measured", "p50", "p99", "max"), rows))
    growth = _growth(figures["sizes"])
    figures["growth"] = growth
    text += [f"a decision costs {value} times as much ({name})" for name, value in growth.items()]
    if asked.parts:
        for size in figures["sizes"]:
            told = ", ".join(f"{name} {us:g}" for name, us in size["parts_us"].items())
            text.append(f"{size['pools']:,} pools, {size['models']} models: us of a decision: {told}")
    required = [
        Required(f"decision p99 with {size['pools']:,} pools, {size['models']} models", size["decision_us"]["p99"],
                 MOST_US, "us")
        for size in figures["sizes"]
        if size["pools"] == 1_000 and size["models"] == MOST_MODELS
    ]  # fmt: skip
    return report("placement", vars(asked), figures, required, "\n".join(text), as_json=asked.json)


def _worlds(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """(pools, models): each size with its models, and with one."""
    for pools in sizes:
        models = min(MOST_MODELS, max(1, pools // POOLS_PER_NODE))
        yield pools, models
        if models > 1:
            yield pools, 1


def _size(pools: int, models: int, asked: argparse.Namespace) -> dict[str, Any]:
    gc.unfreeze()
    world = filled(pools, models, asked.seed)
    settle_memory()  # as a control does once it has started
    asyncio.run(measure(world, min(1_000, asked.decisions)))  # the first ones find cold code
    costs = asyncio.run(measure(world, asked.decisions, time.thread_time if asked.cpu else time.perf_counter))
    kinds = {
        "decision_us": costs.decision, "release_us": costs.release, "beat_us": costs.beat, "decide_us": costs.decide,
    }  # fmt: skip
    figures: dict[str, Any] = {"pools": pools, "models": models}
    figures |= {name: spread(values, scale=1e6) for name, values in kinds.items()}
    figures["counts"] = {name: len(values) for name, values in kinds.items()}
    if asked.parts:
        figures["parts_us"] = asyncio.run(parts(world, min(5_000, asked.decisions)))
    return figures


def _growth(sizes: list[dict[str, Any]]) -> dict[str, float]:
    """p50 of a decision at the largest size over the smallest, with as many models as there are, and with one."""
    out = {}
    for name, several in (("many models", True), ("one model", False)):
        chosen = [size for size in sizes if (size["models"] > 1) == several or size is sizes[0]]
        first, last = chosen[0], chosen[-1]
        if last["pools"] > first["pools"]:
            ratio = last["decision_us"]["p50"] / first["decision_us"]["p50"]
            out[f"{first['pools']:,} to {last['pools']:,} pools, {name}"] = round(ratio, 1)
    return out


if __name__ == "__main__":
    sys.exit(main())
