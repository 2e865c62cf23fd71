"""`llorch bench overhead`: the same load on an engine alone and on the same engine behind llorch, by turns.

Owns what is started for it (the simulated engine, a control, a node whose one pool is that engine) and the order of the
measurement. Processes and their folder are in the care of a keeper, as those of `llorch dev` are: they end with this
one, whatever ends it. Engine, client and llorch share the machine, so what is measured includes that they do.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llorch import __version__
from llorch.cli.bench_figures import Slo, Tally, added
from llorch.cli.bench_load import Endpoint, Step, measure
from llorch.cli.bench_plan import Ask, Load
from llorch.cli.dev_cluster import Cluster, Tokens
from llorch.cli.exits import Exit
from llorch.cli.output import Failure
from llorch.config_kinds import duration

LONGEST = duration("2s", "30m")
START_WITHIN_S = 30.0  # of which a fresh installation, that has nothing compiled yet, takes a third
LOOK_EVERY_S = 0.05
REQUEST_WITHIN_S = 5.0  # the longest takes a third of a second here
ROUNDS = 3
MODEL = "simulated"
TOKEN_EVERY_MS = 10  # a quick engine's pace: beside it, what is added to a token shows
SLOTS = 64
PROMPT_TOKENS = 64
RATE_PER_S = 1_000_000  # of requests of one principal; the default would be what is measured
_SPARE_TOKENS = 4096  # the engine's own bound, out of reach


@dataclass(slots=True)
class _Pair:
    """One load, and what came of it on either side."""

    load: Load
    ask: Ask
    alone: Tally
    behind: Tally

    @classmethod
    def of(cls, concurrency: int, output_tokens: int) -> _Pair:
        load, ask = Load(concurrency=concurrency), Ask(MODEL, PROMPT_TOKENS, output_tokens, seed=1)
        return cls(load, ask, Tally(load, Slo()), Tally(load, Slo()))

    def document(self) -> dict[str, Any]:
        alone, behind = self.alone.figures(), self.behind.figures()
        return {
            "concurrency": self.load.concurrency,
            "output_tokens": self.ask.output_tokens,
            "alone": alone,
            "behind": behind,
            "added": added(alone, behind),
        }


class Overhead:
    """`seconds`: of measuring, in all. `say` is told what is being done."""

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self._seconds, self._say = seconds, say
        # Short answers one at a time, for many first tokens; then a crowd, for what it is like beside others.
        self._pairs = (_Pair.of(1, 5), _Pair.of(32, 32))
        self._numbers: Iterator[int] = itertools.count()

    async def run(self) -> dict[str, Any]:
        """The document that --json prints. Raises Failure if something does not start, or does not answer."""
        load_before = os.getloadavg()[0]
        self._say("starting an engine, a control and a node")
        tokens = Tokens.make()
        async with Cluster.starting(tokens) as cluster:
            try:
                async with asyncio.timeout(START_WITHIN_S):
                    engine_url, control_url = await self._start(cluster)
            except TimeoutError:
                raise _late(cluster) from None
            async with (
                Endpoint(engine_url, None, None, REQUEST_WITHIN_S) as alone,
                Endpoint(control_url, tokens.api, None, REQUEST_WITHIN_S) as behind,
            ):
                await self._until_ready(cluster, behind)
                await self._measure(alone, behind)
        loads = [pair.document() for pair in self._pairs]
        return {
            "version": __version__,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "load_before": round(load_before, 2),
            "duration_s": self._seconds,
            "rounds": ROUNDS,
            "engine": {"kind": "simulated", "token_every_ms": TOKEN_EVERY_MS, "slots": SLOTS},
            "loads": loads,
            "failed": sum(load[side]["requests"]["failed"] for load in loads for side in ("alone", "behind")),
        }

    async def _start(self, cluster: Cluster) -> tuple[str, str]:
        """Everything at once: each waits for what it needs of the others."""
        engine = ["--port", "0", "--alias", MODEL, "--parallel", str(SLOTS), "--tokens", str(_SPARE_TOKENS)]
        engine += ["--delay-ms", str(TOKEN_EVERY_MS)]
        await cluster.start_program("engine", "llorch.node.engines.simulated_server", engine)
        common = ["--dev", "--bind", "127.0.0.1:0", "--shutdown-grace", "0s", "--data-dir"]
        control = [*common, str(cluster.state / "control.d"), "--recovery-window", "0s"]
        await cluster.start_role("control", ["control", *control, "--rate-requests", str(RATE_PER_S)])
        engine_url = await cluster.said("engine", "simulated_server: listening on ")
        settings = cluster.state / "node.yaml"
        settings.write_text(
            f"pools:\n  - {{id: bench, engine: external, url: {engine_url}, model: {MODEL}, slots: {SLOTS}}}\n"
        )
        control_url = await cluster.ready_url("control")
        node = [*common, str(cluster.state / "node.d"), "--node-id", "bench", "--join", control_url]
        await cluster.start_role("node", ["node", *node, "--config", str(settings)])
        await cluster.ready_url("node")
        return engine_url, control_url

    async def _until_ready(self, cluster: Cluster, behind: Endpoint) -> None:
        """Until a task comes through."""
        until = asyncio.get_running_loop().time() + START_WITHIN_S
        ask = self._pairs[0].ask
        while not (await behind.exchange(behind.chat(ask, next(self._numbers), 1))).answered:
            if cluster.ended:
                raise cluster.failure(next(iter(cluster.ended)))
            if asyncio.get_running_loop().time() > until:
                raise _late(cluster)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _measure(self, alone: Endpoint, behind: Endpoint) -> None:
        slice_s = self._seconds / (ROUNDS * len(self._pairs) * 2)
        for number in range(1, ROUNDS + 1):
            for pair in self._pairs:
                for words, endpoint, tally in (
                    ("the engine alone", alone, pair.alone),
                    ("behind llorch", behind, pair.behind),
                ):
                    self._say(f"round {number} of {ROUNDS}, {pair.load.words}: {words}")
                    warmup = pair.load.concurrency or 1
                    step = Step(pair.load, pair.ask, seconds=slice_s, warmup=warmup)
                    await measure(endpoint, step, self._numbers, tally)


def _late(cluster: Cluster) -> Failure:
    """Something that did not start in time: what is known of it is in its log."""
    name = next(iter(cluster.ended), next(reversed(cluster.roles), "keeper"))
    known = cluster.failure(name)
    return Failure(known.message, code=Exit.TIMEOUT, why=known.why, hint="is the machine very busy? try again")
