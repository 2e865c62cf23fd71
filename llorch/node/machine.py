"""This machine's memory, as pools see it: what a model needs of it, what is free, who else wants it.

Owns the questions that need the facts of GPUs and RAM: whether there is room for a start, or for a second model beside
the first; which pools stand back for a GPU's owner or for the hour; and what engines were measured to take. What the
answers are is decided by `fit` and `owner`. Never starts or stops anything.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from llorch.config_pools import PoolSpec
from llorch.messages import Gpu
from llorch.node import fit, ram
from llorch.node import pool_events as ev
from llorch.node.catalog import LocalModel
from llorch.node.engine_start import EngineStart, NoRoom
from llorch.node.gpu import GpuInventory, device_mask
from llorch.node.owner import Owner
from llorch.node.peaks import PeakKey, Peaks
from llorch.node.plans import Plan
from llorch.node.process_tree import descendants
from llorch.node.replicas import HOURS, OWNER


class Machine:
    """`inventory` and `peaks` of this machine if not given."""

    def __init__(
        self,
        data_dir: Path,
        *,
        inventory: GpuInventory | None = None,
        read_ram: Callable[[], ram.Ram] = ram.ram,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._inventory = inventory or GpuInventory()
        self._peaks = Peaks(data_dir / "peaks.json")
        self._owner = Owner()
        self._read_ram = read_ram
        self._clock, self._wall = clock, wall
        self._own: frozenset[int] = frozenset()  # engines and what they started, when the GPUs were last read
        self._gpus: Sequence[Gpu] = ()
        self._lock = threading.Lock()
        self._reserved: dict[
            object, tuple[frozenset[int], int]
        ] = {}  # by start: its GPUs, and what it will take of them

    def close(self) -> None:
        self._peaks.save(self._clock(), at_once=True)
        self._inventory.close()

    def read(self, pids: Sequence[int] = ()) -> Sequence[Gpu]:
        """The GPUs now. `pids`: of our engines. Blocking."""
        own = frozenset(descendants(pids))
        gpus = self._inventory.read(own)
        with self._lock:
            self._own, self._gpus = own, gpus
        self._peaks.save(self._clock())
        return gpus

    # ------------------------------------------------------------ room

    async def room(self, start: object, plan: Plan, model: LocalModel) -> NoRoom | None:
        """Why one more engine with `model` does not fit now; None if it does, or if nobody can tell. What it will take
        is then reserved for `start`, until `loading` does not name it any more."""
        if self._left_to_the_engine(plan):
            return None
        verdict = await asyncio.to_thread(self._judge, start, plan, model)
        if verdict.fits:
            return None
        hint = f" ({verdict.hint})" if verdict.hint else ""
        return NoRoom(f"{verdict.text}{hint}", verdict.permanent)

    async def beside(self, plan: Plan, model: LocalModel | None) -> bool:
        """Whether `model` fits into what is free beside all that runs; with no file to judge by, it does not."""
        if model is None:
            return not plan.takes_files
        return await asyncio.to_thread(self._fits_beside, plan, model)

    def _fits_beside(self, plan: Plan, model: LocalModel) -> bool:
        engines = plan.spec.replicas
        if self._left_to_the_engine(plan):
            return False
        if self._uses_gpus(plan):
            there = fit.room(plan.spec.gpus, self.read(sorted(self._own)))
            size = self._peaks.peak(self._key(plan, model)) or self._need(plan, model, there.count).total
            with self._lock:
                free_bytes = there.free_bytes - self._kept_for_others(None, frozenset(plan.spec.gpus or ()))
            return bool(there.total_bytes) and engines * size <= free_bytes
        needed = self._need(plan, model, 0)
        return engines * needed.total <= self._read_ram().available_bytes

    def loading(self, starts: Iterable[object]) -> None:
        """The starts that are under way: of all others, what they hold shows, or they hold nothing."""
        under_way = set(starts)
        with self._lock:
            self._reserved = {start: what for start, what in self._reserved.items() if start in under_way}

    def _judge(self, start: object, plan: Plan, model: LocalModel) -> fit.Verdict:
        asked = fit.asked(plan.spec.args)
        if not self._uses_gpus(plan):
            there = self._read_ram()
            return fit.judge_ram(self._need(plan, model, 0), there.available_bytes, there.total_bytes)
        room = fit.room(plan.spec.gpus, self.read(sorted(self._own)))
        needed = self._need(plan, model, room.count) if asked.estimable else None
        peak = self._peaks.peak(self._key(plan, model))
        gpus = frozenset(plan.spec.gpus or ())
        with self._lock:
            free_bytes = max(0, room.free_bytes - self._kept_for_others(start, gpus))
            verdict = fit.judge(needed, peak, free_bytes, room.total_bytes, where=room.where)
            if verdict.fits:
                self._reserved[start] = (gpus, peak or (needed.total if needed is not None else 0))
        return verdict

    def _kept_for_others(self, start: object, gpus: frozenset[int]) -> int:
        return sum(size for other, (theirs, size) in self._reserved.items() if other is not start and theirs & gpus)

    def _need(self, plan: Plan, model: LocalModel, gpus: int) -> fit.Need:
        spec = plan.spec
        args = fit.asked(spec.args)
        return fit.need(model.header, model.size_bytes, ctx=spec.ctx, slots=spec.slots, gpus=gpus, args=args)

    def _uses_gpus(self, plan: Plan) -> bool:
        return bool(self._gpus) and bool(plan.spec.gpus) and plan.on_gpu

    def _left_to_the_engine(self, plan: Plan) -> bool:
        """It is given no number of layers then, and newer ones take as many as fit."""
        return bool(self._gpus) and plan.spec.gpus is None and plan.on_gpu

    def _key(self, plan: Plan, model: LocalModel) -> PeakKey:
        spec = plan.spec
        wanted = None if spec.gpus is None else frozenset(spec.gpus)
        uuids = tuple(gpu.uuid for gpu in self._gpus if wanted is None or gpu.index in wanted)
        name = model.sha256 or f"{model.size_bytes}/{model.id}"
        version = plan.engine.version if plan.engine is not None else None
        return PeakKey(name, spec.engine, version, spec.ctx, spec.slots, uuids, spec.args)

    def mask(self, gpus: Sequence[int]) -> str:
        """What shows an engine these GPUs, as CUDA names them."""
        return device_mask(gpus, self._gpus)

    def learn(self, running: Iterable[EngineStart]) -> None:
        """What each engine holds of the GPUs, as of the last reading. Blocking."""
        for start in running:
            if start.pid is not None and start.model is not None and self._uses_gpus(start.plan):
                held = self._inventory.held_bytes(descendants([start.pid]))
                if held is not None:
                    self._peaks.learn(self._key(start.plan, start.model), held)

    # ------------------------------------------------------------ who else wants it

    def holds(self, specs: Sequence[PoolSpec]) -> list[ev.Hold]:
        """What each pool that yields, or has hours, is to be told now; the same again is no news to it."""
        wall = self._wall()
        concerned = [spec for spec in specs if spec.yield_to_owner or spec.hours is not None]
        if not concerned:
            return []
        reasons = self._owner.decide(
            concerned, self._gpus, weekday=wall.weekday(), minutes=wall.hour * 60 + wall.minute, now=self._clock()
        )
        found: list[ev.Hold] = []
        for pool_id, reason in reasons.items():
            for who in (OWNER, HOURS):
                mine = reason is not None and reason.startswith(f"{who}: ")
                found.append(ev.Hold(pool_id, who, reason.removeprefix(f"{who}: ") if reason and mine else None))
        return found
