"""What a node counts, under the stable names of the contract.

Owns one Prometheus registry. What pools and GPUs are is read when /metrics is scraped, not kept twice. Nothing is
counted per token. No prompt, token or user id is a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from llorch.limit_metrics import LimitMetrics
from llorch.messages import Tail
from llorch.tally import Tallies, add_tokens

SLOW_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

Reports = Callable[[], Sequence[Mapping[str, Any]]]


class NodeMetrics:
    def __init__(self, node_id: str) -> None:
        self._node = node_id
        self.registry = CollectorRegistry()
        t = Tallies(self.registry)
        self._ttft = t.histogram("llorch_ttft_seconds", "accept to first token", SLOW_S, ["model"])
        self._tasks = t.counter("llorch_tasks", "ended tasks", ["model", "node", "outcome", "code"])
        self._tokens = t.counter("llorch_tokens", "tokens of ended tasks", ["model", "kind"])
        self._inflight = t.gauge("llorch_inflight", "accepted tasks that have not ended", ["model"])
        self._handoffs = t.counter("llorch_handoffs", "handoff files", ["pool", "outcome"])
        self._restarts = t.counter("llorch_engine_restarts", "engine restarts", ["pool", "reason"])
        self._rtt = t.gauge("llorch_heartbeat_rtt_seconds", "round trip of a heartbeat", ["node"])
        self._errors = t.counter("llorch_errors", "errors by node and code", ["node", "code"])
        self._auth_failures = t.counter("llorch_auth_failures", "refused credentials", ["layer"])
        self.limits = LimitMetrics(self.registry)

    # ---- tasks (runner.Counted)

    def began(self, model: str) -> None:
        self._inflight.add(1, model)

    def ended(self, model: str, outcome: str, code: str, tail: Tail) -> None:
        self._inflight.add(-1, model)
        self._tasks.add(1, model, self._node, outcome, code)
        if code:
            self.failed(code)
        if tail.timings.ttft_ms is not None:
            self._ttft.observe(tail.timings.ttft_ms / 1_000, model)
        add_tokens(self._tokens, model, tail)

    # ---- the rest

    def failed(self, code: str) -> None:
        self._errors.add(1, self._node, code)

    def handed_off(self, pool: str, outcome: str) -> None:
        self._handoffs.add(1, pool, outcome)

    def restarted(self, pool: str, reason: str) -> None:
        self._restarts.add(1, pool, reason)

    def beat(self, rtt_ms: float) -> None:
        self._rtt.set(rtt_ms / 1_000, self._node)

    def auth_failed(self, layer: str) -> None:
        self._auth_failures.add(1, layer)

    def scrape(self, pools: Reports, gpus: Reports, catalog: Reports) -> None:
        """Have these reports read on every scrape."""
        self.registry.register(_Scraped(lambda: _state(self._node, pools(), gpus(), catalog())))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Scraped(Collector):
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()

    def describe(self) -> list[Metric]:
        return []


def _state(
    node: str,
    pools: Sequence[Mapping[str, Any]],
    gpus: Sequence[Mapping[str, Any]],
    catalog: Sequence[Mapping[str, Any]],
) -> Iterator[Metric]:
    slots = GaugeMetricFamily("llorch_slots", "slots by state", labels=["node", "pool", "state"])
    ready = GaugeMetricFamily("llorch_model_ready", "a ready pool has the model", labels=["node", "model"])
    available = GaugeMetricFamily("llorch_model_available", "the catalog has it", labels=["node", "model"])
    utilization = GaugeMetricFamily("llorch_gpu_utilization", "0 to 1", labels=["node", "gpu"])
    memory = GaugeMetricFamily("llorch_gpu_memory_bytes", "by kind", labels=["node", "gpu", "kind"])
    models: dict[str, int] = {}
    for pool in pools:
        free, total = pool.get("slots_free") or 0, pool.get("slots_total") or 0
        slots.add_metric([node, pool["pool_id"], "free"], free)
        slots.add_metric([node, pool["pool_id"], "busy"], max(0, total - free))
        for model in pool.get("models") or ():
            serves = bool(pool.get("ready")) and pool.get("model") == model
            models[model] = max(models.get(model, 0), int(serves))
    for model, value in models.items():
        ready.add_metric([node, model], value)
    for entry in catalog:
        if entry.get("state") == "staged":
            available.add_metric([node, entry["id"]], 1)
    for gpu in gpus:
        name = str(gpu["index"])
        if gpu.get("utilization") is not None:
            utilization.add_metric([node, name], gpu["utilization"])
        for kind in ("total", "used", "foreign"):
            memory.add_metric([node, name, kind], gpu.get(f"vram_{kind}_bytes") or 0)
    yield from (slots, ready, available, utilization, memory)
