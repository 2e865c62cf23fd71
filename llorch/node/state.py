"""What the routes, the links and the heartbeats of a node share: one value, made by app.py, found under one key.

Owns no decision; puts together what pools, GPUs, catalog and tasks say of themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from llorch.messages import Gpu, ModelReport
from llorch.node import pool_events as ev
from llorch.node.gpu import pool_vram
from llorch.node.metrics import NodeMetrics
from llorch.node.runner import Runner

if TYPE_CHECKING:
    from llorch.node.staging import Stager


class PoolReports(Protocol):
    """The pools, as those who report on them see them."""

    @property
    def draining(self) -> bool: ...
    def report(self) -> list[dict[str, Any]]: ...
    def pool_report(self, pool_id: str) -> dict[str, Any]: ...
    def health(self, pool_id: str) -> dict[str, Any]: ...
    def ref_of(self, pool_id: str, model: str) -> str | None: ...


@dataclass(slots=True)
class Node:
    """`gpus` and `models` are as last read; `refresh` reads the machine again, off the loop."""

    node_id: str
    pools: PoolReports
    runner: Runner
    metrics: NodeMetrics
    max_body_bytes: int
    slow_reader_timeout_s: float
    read_gpus: Callable[[Sequence[int]], Sequence[Gpu]] = lambda _own_pids: ()
    engine_pids: Callable[[], Sequence[int]] = tuple
    read_models: Callable[[], Sequence[ModelReport]] = tuple
    gpus: Sequence[Gpu] = ()
    models: Sequence[ModelReport] = ()
    stager: Stager | None = None
    post: Callable[[ev.Event], None] = lambda _event: None  # what operators ask of the pools
    read_log: Callable[[str, Sequence[str], int, str | None], dict[str, Any]] = lambda *_asked: {}
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def draining(self) -> bool:
        return self.stopping.is_set() or self.pools.draining

    async def refresh(self) -> None:
        """Read GPUs and catalog again: drivers and disks may take their time, so not on the loop."""
        self.gpus = await asyncio.to_thread(self.read_gpus, self.engine_pids())
        self.models = await asyncio.to_thread(self.read_models)

    def pool_reports(self) -> list[dict[str, Any]]:
        return [_with_vram(report, self.gpus) for report in self.pools.report()]

    def gpu_reports(self) -> list[dict[str, Any]]:
        return [gpu.model_dump(exclude_none=True, exclude={"gone"}) for gpu in self.gpus]

    def model_reports(self) -> list[dict[str, Any]]:
        return [model.model_dump(exclude_none=True, exclude={"gone"}) for model in self.models]


def _with_vram(report: dict[str, Any], gpus: Sequence[Gpu]) -> dict[str, Any]:
    """A PoolReport with the memory of the GPUs in its device mask; of all of them if it has none."""
    if not gpus:
        return report
    mask = report["device_mask"] or ",".join(str(gpu.index) for gpu in gpus)
    total, free = pool_vram(mask, gpus)
    return report | {"vram_total_bytes": total, "vram_free_bytes": max(0, free)}


NODE = web.AppKey("node", Node)
