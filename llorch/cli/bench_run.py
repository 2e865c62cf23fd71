"""One `llorch bench run`: a first look, one step after the other, what is printed, also where it is interrupted.

The load is `bench_load.py`'s, the figures are `bench_figures.py`'s.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llorch import tls
from llorch.cli import bench_look, bench_picture, bench_words
from llorch.cli.bench_figures import Slo, Tally
from llorch.cli.bench_load import Endpoint, Step, measure
from llorch.cli.bench_plan import Ask, Load, base_url
from llorch.cli.bench_progress import Progress
from llorch.cli.exits import Exit
from llorch.cli.flags import Call
from llorch.cli.interrupts import Interrupted, Interrupts
from llorch.cli.output import Format, warn, write_err, write_out


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the flags ask for. `seconds` or `requests`: how long a step is. Without `warmup` the load says it."""

    loads: tuple[Load, ...]
    ask: Ask
    slo: Slo
    timeout_s: float
    seconds: float | None
    requests: int | None
    warmup: int | None
    most_at_a_time: int
    picture: Path | None


class Run:
    """One `llorch bench run`, from its first look to its table."""

    def __init__(self, call: Call, wanted: Wanted) -> None:
        self._call, self._wanted, self._ask = call, wanted, wanted.ask
        self._steps: list[dict[str, Any]] = []
        self._numbers = itertools.count()
        self._progress = Progress(quiet=call.output.format is Format.NAME)

    async def run(self) -> int:
        target = self._call.target
        base = base_url(target.url)
        context = tls.client_context(target.tls_ca, only=target.pinned) if base.startswith("https:") else None
        with Interrupts() as interrupts:
            try:
                async with (
                    Endpoint(base, target.token, context, self._wanted.timeout_s) as endpoint,
                    self._progress.waiting.shown(),
                ):
                    await self._measure(endpoint)
            except (asyncio.CancelledError, Interrupted) as ended:
                if not interrupts.ours(ended):
                    raise
        if interrupts.hit and not self._steps:
            write_err("interrupted before the first step had ended\n")
            return Exit.INTERRUPTED
        code = self._print(base, complete=not interrupts.hit)
        return Exit.INTERRUPTED if interrupts.hit else code

    async def _measure(self, endpoint: Endpoint) -> None:
        self._progress.say(f"a first look at {endpoint.base}")
        if not self._ask.model:
            self._ask = replace(self._ask, model=await bench_look.only_model(endpoint))
        self._ask = await bench_look.first_look(endpoint, self._ask, next(self._numbers))
        for load in self._wanted.loads:
            tally = Tally(load, self._wanted.slo)
            await measure(endpoint, self._step(load), self._numbers, tally)
            self._steps.append(tally.figures())
            self._progress.step_ended()

    def _step(self, load: Load) -> Step:
        warmup = (load.concurrency or 1) if self._wanted.warmup is None else self._wanted.warmup
        seconds, requests = self._wanted.seconds, self._wanted.requests
        of = f" of {seconds:g} s" if seconds is not None else f", of {requests} requests"
        self._progress.say(f"{load.words}: {warmup} short request{'s' * (warmup != 1)} to warm up")
        return Step(
            load, self._ask, seconds, requests, warmup, self._wanted.most_at_a_time,
            tell=lambda ended, failed, since_s: self._progress.tell(load.words, ended, failed, since_s, of),
        )  # fmt: skip

    def _print(self, base: str, *, complete: bool) -> int:
        slo = self._wanted.slo
        document = {
            "url": f"{base}/v1",
            "model": self._ask.model,
            "prompt_tokens": self._ask.prompt_tokens,
            "output_tokens": self._ask.output_tokens,
            "ignore_eos": self._ask.ignore_eos,
            "seed": self._ask.seed,
            "slo": {"ttft_ms": slo.ttft_ms, "itl_ms": slo.itl_ms, "e2e_ms": slo.e2e_ms} if slo.given else None,
            "complete": complete,
            "steps": self._steps,
        }
        if self._call.output.format is Format.NAME:
            write_out("".join(f"{bench_words.label(step)}\n" for step in self._steps))
        else:
            self._call.output.one(document, name="bench", text=lambda: bench_words.report(document))
        for caution in bench_words.cautions(document):
            warn(caution)
        if not complete:
            warn("interrupted: the steps that had ended are shown")
        if self._wanted.picture is not None:
            bench_picture.draw(document, self._wanted.picture)
            write_err(f"drawn: {self._wanted.picture}\n")
        return Exit.FAILED if any(step["requests"]["failed"] for step in self._steps) else Exit.OK
