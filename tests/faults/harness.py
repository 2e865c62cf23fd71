"""One run: clients that ask and faults that come, until all is healed and every task is over. What is left: a history.

Owns the order of a run, who asks, and which part is hit when. Judges nothing: that is the validator's, of the history.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import shutil
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp

from llorch.client import resume
from llorch.client.api import LlorchClient
from tests.faults import cluster as parts
from tests.faults import schedule, tasks
from tests.faults.client_llorch import run_llorch
from tests.faults.clients import RawClient, raw_session, trusting
from tests.faults.cluster import Broken, Pools
from tests.faults.history import Entry, Recorder
from tests.faults.schedule import Step
from tests.faults.tasks import USUAL, Mix
from tests.faults.validator import GIVEN_UP

SAMPLE_EVERY_S = 0.15
PHASE_WITHIN_S = 0.7  # for a task to come to the phase that a fault is for
FREE_WITHIN_S = 10.0  # for a part to be whole enough to be hit again
WHOLE_WITHIN_S = 30.0
AFTER_CALM_S = 1.0  # new tasks go on for so long when all is healed
SETTLE_S = 30.0
QUIET_WITHIN_S = 15.0
CLIENT_LOOKS_S = 12.0  # how long a LlorchClient looks for its task; by itself it does for a minute
LASTING_DEGREE = 0.85  # a half-open link this bad is left for its ends to find out, which takes pings 20 s
_STAMPED = re.compile(r"\d{4}-\d\d-\d\dT\S+ ([A-Z]+) ")  # how a line of a role's log begins
MOST_ENGINE_KILLS = 3  # of one pool, per life of its node: its node gives an engine up after five


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    faults: int
    clients: int = 24
    mix: Mix = USUAL
    weights: Mapping[str, float] | None = None
    in_turn: Sequence[schedule.Turn] = ()
    gap_s: tuple[float, float] = schedule.GAP_S
    pools: Pools = field(default_factory=parts.usual_pools)
    calm_first_s: float = 1.0
    min_rate: float = 3.0  # tasks that came to their end, a second: below it a run shows nothing

    def promises(self) -> dict[str, float]:
        return {
            "grace_s": parts.GRACE_S,
            "early_grace_s": parts.EARLY_GRACE_S,
            "recovery_s": parts.RECOVERY_S,
            "reconnect_s": parts.RECONNECT_S,
            "offline_s": parts.OFFLINE_S,
            "ttft_s": parts.TTFT_S,
            "log_limit": parts.LOG_LIMIT_BYTES,
            "settle_s": SETTLE_S,
            "min_rate": self.min_rate,
        }


class Run:
    """One run of a plan."""

    def __init__(self, plan: Plan, broken: Broken, recorder: Recorder) -> None:
        self.plan = plan
        self.broken = broken
        self.recorder = recorder
        self.live: dict[str, RawClient] = {}
        self.stopped = False
        self.last: dict[str, list[Any]] = {}
        self._numbers = itertools.count(1)
        self._faults = itertools.count(1)
        self._busy: set[str] = set()
        self._engine_kills: dict[str, int] = {}
        self._healing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        plan = self.plan
        self.recorder.note("run", seed=plan.seed, pools=self.broken.facts(), promises=plan.promises())
        watch = [asyncio.ensure_future(work) for work in (self.broken.watch_journals(), self._sample())]
        async with raw_session(self.broken.tls_ca) as session:
            clients = [asyncio.ensure_future(self._client(number, session)) for number in range(plan.clients)]
            try:
                await asyncio.sleep(plan.calm_first_s)
                steps = schedule.draw(plan.seed, plan.faults, plan.weights, plan.gap_s, in_turn=plan.in_turn)
                await _all_or_first_failure(self._break(steps), *watch, *clients)
                await self._until_whole()
                self.recorder.note("calm")
                await asyncio.sleep(AFTER_CALM_S)
                self.stopped = True
                self.recorder.note("stopped")
                await asyncio.wait(clients, timeout=SETTLE_S)
            finally:
                await _end(clients)
            await self._until_quiet()
        await _end([*watch, *self._healing])

    # ---- who asks

    async def _client(self, number: int, session: Any) -> None:
        plan, url, token = self.plan, self.broken.client_url, self.broken.cluster.token
        rng = random.Random(f"{plan.seed}/{number}")
        async with LlorchClient(url, token, tls_ca=self.broken.tls_ca) as llorch:
            while not self.stopped:
                ask = tasks.draw(rng, plan.mix, f"k{next(self._numbers)}", parts.GRACE_S)
                if ask.form == "llorch":
                    await run_llorch(ask, llorch, self.recorder)
                    continue
                client = self.live[ask.marker] = RawClient(ask, url, token, session, self.recorder, rng)
                try:
                    await client.run()
                finally:
                    del self.live[ask.marker]

    async def _sample(self) -> None:
        while True:
            seen = await self.broken.look()
            if seen is not None:
                self.last = seen
                self.recorder.note("sample", pools=seen)
            else:
                self.last = {}
            await asyncio.sleep(SAMPLE_EVERY_S)

    # ---- what breaks

    async def _break(self, steps: Sequence[Step]) -> None:
        for index, step in enumerate(steps):
            await asyncio.sleep(step.after_s)
            target = await self._target(step)
            if target is None:
                self.recorder.note("skipped", kind=step.kind)
                continue
            task = await self._in_phase(step, target)
            number = next(self._faults)
            lasting = step.degree > LASTING_DEGREE and step.kind == "link.half_open" and index < len(steps) - 15
            self.recorder.note(
                "fault", fault=number, kind=step.kind, target=target, for_s=round(step.for_s, 3), lasting=lasting,
                phase=step.phase if task else None, task=task, resent=self._resent(step.kind, target),
            )  # fmt: skip
            self._busy.add(_resource(step.kind, target))
            healing = asyncio.ensure_future(self._heal(number, step, target, lasting))
            self._healing.add(healing)
            await asyncio.sleep(0)

    async def _target(self, step: Step) -> str | None:
        until = time.monotonic() + FREE_WITHIN_S
        while True:
            choice = self._targets(step.kind)
            if choice:
                return choice[step.target % len(choice)]
            for healing in self._healing:
                if healing.done():
                    healing.result()
            if time.monotonic() > until:
                return None
            await asyncio.sleep(0.02)

    def _resent(self, kind: str, target: str) -> bool:
        return kind.startswith("link.") and self.broken.links[target].resends

    def _targets(self, kind: str) -> list[str]:
        """What can be hit now: one node at a time, so that there is always somewhere to go."""
        part, busy, nodes = kind.partition(".")[0], self._busy, list(self.broken.pools)
        if part == "control":
            return ["control"] if "control" not in busy else []
        if part == "client":
            return ["clients"] if "clients" not in busy else []
        if part == "link":
            return [node for node in self.broken.links if f"link:{node}" not in busy and node not in busy]
        if part == "node":
            return [] if any(node in busy for node in nodes) else nodes
        return [
            pool
            for pool, seen in self.last.items()
            if pool not in busy and pool.partition("/")[0] not in busy and seen[3]
            and (kind != "engine.kill" or self._engine_kills.get(pool, 0) < MOST_ENGINE_KILLS)
        ]  # fmt: skip

    async def _in_phase(self, step: Step, target: str) -> str | None:
        """A task that is in the step's phase, where the step hits. None after a while: then it hits all the same."""
        until = time.monotonic() + PHASE_WITHIN_S
        while time.monotonic() < until:
            for marker, client in self.live.items():
                pool = self.broken.running.get(marker) or client.pool or ""
                here = target in ("control", "clients", pool, pool.partition("/")[0])
                if self._phase(marker, client) == step.phase and (here or step.phase == "queued"):
                    return marker
            await asyncio.sleep(0.005)
        return None

    def _phase(self, marker: str, client: RawClient) -> str | None:
        if client.terminal:
            return None
        if not client.seen:
            return "placed" if marker in self.broken.running else None if client.began else "queued"
        return "streaming" if client.ask.tokens - client.seen > 3 else "ending"

    async def _heal(self, number: int, step: Step, target: str, lasting: bool) -> None:
        """Hit it, let it be for a while, and see it work again."""
        try:
            await self._hit(step, target, lasting)
        finally:
            self._busy.discard(_resource(step.kind, target))
        part = step.kind.partition(".")[0]
        if part in ("node", "engine"):
            back = await self._until(lambda: self._bound(target), WHOLE_WITHIN_S)
            if back and step.kind in ("node.kill", "node.term"):
                self.recorder.note("back", node=target, engines=self.broken.engines(target))
        elif lasting:
            await self._until(lambda: not self.broken.links[target].dead, WHOLE_WITHIN_S)
        self.recorder.note("healed", fault=number)

    async def _hit(self, step: Step, target: str, lasting: bool) -> None:
        broken, for_s = self.broken, step.for_s
        part, _, how = step.kind.partition(".")
        if part in ("link", "client"):
            await self._disturb(broken.links[target] if part == "link" else broken.clients, how, step, lasting)
        elif step.kind in ("control.kill", "control.term"):
            await broken.kill_control(for_s, signal.SIGKILL if how == "kill" else signal.SIGTERM)
        elif step.kind == "control.stop":
            await broken.stop([broken.control.pid], for_s)
        elif step.kind in ("node.kill", "node.term"):
            for pool in list(self._engine_kills):
                if pool.startswith(f"{target}/"):
                    del self._engine_kills[pool]
            await broken.kill_node(target, for_s, signal.SIGKILL if how == "kill" else signal.SIGTERM)
        elif step.kind == "node.stop":
            await broken.stop([broken.cluster.nodes[target].pid], for_s)
        elif step.kind == "engine.kill":
            self._engine_kills[target] = self._engine_kills.get(target, 0) + 1
            before = set(broken.engines(target.partition("/")[0])[target])
            await broken.kill_engine(target, by_shim=step.degree > 0.5)
            await self._until(
                lambda: bool(set(broken.engines(target.partition("/")[0])[target]) - before), WHOLE_WITHIN_S, 0.2
            )
        elif step.kind == "engine.stop":
            await broken.stop(broken.engines(target.partition("/")[0])[target], for_s)
        else:
            raise AssertionError(f"nobody knows how to do {step.kind}")

    async def _disturb(self, proxy: Any, how: str, step: Step, lasting: bool) -> None:
        if how in ("cut", "reset"):
            getattr(proxy, how)()
            return
        if how in ("half_open", "partition", "blackout"):
            proxy.half_open(new_too=how != "half_open")
        elif how == "cut_off":
            proxy.cut_off()
        elif how == "delay":
            proxy.slow(delay_s=0.02 + 0.3 * step.degree)
        elif how == "throttle":
            proxy.slow(bytes_per_s=2_000 + 30_000 * (1 - step.degree))
        await asyncio.sleep(step.for_s)
        proxy.heal(leave_dead=lasting)

    # ---- how it ends

    def _bound(self, target: str) -> bool:
        """Whether a pool, or every pool of a node, may be placed on; those that were given up don't count."""
        pools = [pool for pool in self.broken.journals if target in (pool, pool.partition("/")[0])]
        return all(pool in self.last and (self.last[pool][3] or self.last[pool][4] == "failed") for pool in pools)

    async def _until(self, fact: Any, within_s: float, every_s: float = 0.05) -> bool:
        until = time.monotonic() + within_s
        while not fact():
            if time.monotonic() > until:
                return False
            await asyncio.sleep(every_s)
        return True

    async def _until_whole(self) -> None:
        """Every fault healed, every pool bound."""
        if self._healing:
            await asyncio.wait(self._healing, timeout=WHOLE_WITHIN_S + 15.0)
        for healing in self._healing:
            if healing.done():
                healing.result()
        await self._until(lambda: all(map(self._bound, self.broken.pools)), WHOLE_WITHIN_S)

    async def _until_quiet(self) -> None:
        """Nothing runs any more, or it should have ended long ago; then what is left is written down."""
        until, admin = time.monotonic() + QUIET_WITHIN_S, self.broken.cluster.tokens["LLORCH_ADMIN_TOKEN"]
        while True:
            pools, queued, open_tasks = await self.broken.look(), await self.broken.queued(), ["unknown"]
            with contextlib.suppress(Exception):
                listed = (await self.broken.cluster.get("/v2/tasks", token=admin))["tasks"]
                open_tasks = [t["task_id"] for t in listed if t["state"] in ("queued", "placed", "streaming")]
            idle = pools is not None and all(total == free and not flight for total, free, flight, *_ in pools.values())
            # An engine may have died last by what a task told it, and be on its way back.
            back = pools is not None and all(bound or state == GIVEN_UP for *_, bound, state in pools.values())
            over = idle and back and not queued and not self.broken.running and not open_tasks
            if over or time.monotonic() > until:
                break
            await asyncio.sleep(0.1)
        self.broken.read_journals()
        engines: dict[str, int] = {}
        for node in self.broken.pools:
            engines |= {pool: len(pids) for pool, pids in self.broken.engines(node).items()}
        self.recorder.note(
            "final", pools=pools or {}, queued=queued, tasks=open_tasks, engines=engines,
            strangers=self.broken.strangers(),
        )  # fmt: skip


def _resource(kind: str, target: str) -> str:
    return f"link:{target}" if kind.startswith("link.") else target


async def _end(tasks_: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks_:
        task.cancel()
    await asyncio.gather(*tasks_, return_exceptions=True)


async def _all_or_first_failure(main: Coroutine[Any, Any, None], *others: asyncio.Task[Any]) -> None:
    """Await `main`; a failure of the others, which go on, is a failure of the harness and ends it."""
    running = asyncio.ensure_future(main)
    try:
        await asyncio.wait((running, *others), return_when=asyncio.FIRST_COMPLETED)
        for task in (running, *others):
            if task.done():
                task.result()
        await running
    finally:
        await _end([running])


def _struck(folder: Path) -> list[str]:
    """Where a control says that a node did what no honest one can: all nodes of a run are honest."""
    logs = [path.read_text(errors="replace") for path in sorted(folder.glob("control*.log"))]
    return [line for text in logs for line in text.splitlines() if "node.struck" in line]


def bugs_logged(folder: Path) -> list[str]:
    """Every line with which a role logged a bug of its own, and which exception it was."""
    found: list[str] = []
    for path in sorted(folder.glob("*.log")):
        told = ""
        for line in path.read_text(errors="replace").splitlines():
            stamped = _STAMPED.match(line)
            if stamped is None and told:  # its traceback, whose last line names the exception
                if not line.startswith(" "):
                    found.append(f"{path.name}: {told}: {line}")
            else:
                told = line if stamped and stamped[1] == "ERROR" else ""
    return found


async def run(plan: Plan, folder: Path, make: type[Broken] = Broken, tls_ca: str | None = None) -> list[Entry]:
    """A run in `folder`, where its logs and its `history.jsonl` stay. Returns the history.

    `tls_ca`: the authority of a control that listens with TLS.
    """
    shutil.rmtree(folder, ignore_errors=True)  # an older run's journals are none of this one's
    folder.mkdir(parents=True)
    recorder = Recorder(folder / "history.jsonl")
    try:
        connector = aiohttp.TCPConnector(limit=0, ssl=trusting(tls_ca))
        async with aiohttp.ClientSession(connector=connector) as session:
            broken = make(folder, session, recorder, plan.pools)
            broken.tls_ca, broken.seed = tls_ca, plan.seed
            try:
                await broken.start()
                with mock.patch.multiple(resume, RESUME_FOR_S=CLIENT_LOOKS_S, FIND_FOR_S=CLIENT_LOOKS_S):
                    await Run(plan, broken, recorder).run()
            finally:
                await broken.close()
        for line in _struck(folder):
            recorder.note("struck", line=line)
        for line in bugs_logged(folder):
            recorder.note("bug", line=line)
    finally:
        recorder.close()
    return sorted(recorder.entries, key=lambda entry: entry["at"])
