"""What the control counts, under the stable names of the contract.

Owns one Prometheus registry. State that the registry of nodes already holds is read when /metrics is scraped, not
kept twice. No prompt, token or user id is a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from llorch.breaker import Phase
from llorch.control.admission import Admission
from llorch.control.registry import Registry
from llorch.control.strikes import Offence
from llorch.control.tasks import Task
from llorch.limit_metrics import LimitMetrics
from llorch.tally import Tallies, add_tokens

FAST_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)
MOST_NODE_LABELS = 4_000  # counters never go; who registers under ever new names gets no more of them

SLOW_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ControlMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        t = Tallies(self.registry)
        self.placing = t.histogram("llorch_placement_seconds", "choosing a pool", FAST_S)
        self._placements = t.counter("llorch_placements", "placement decisions", ["outcome", "reason"])
        self.routing = t.histogram("llorch_routing_seconds", "accept to OPEN sent", SLOW_S)
        self.ttft = t.histogram("llorch_ttft_seconds", "accept to first byte", SLOW_S, ["model"])
        self.task_seconds = t.histogram("llorch_task_seconds", "accept to end", SLOW_S, ["model"])
        self._tasks = t.counter("llorch_tasks", "ended tasks", ["model", "node", "outcome", "code"])
        self._tokens = t.counter("llorch_tokens", "tokens of ended tasks", ["model", "kind"])
        self.inflight = t.gauge("llorch_inflight", "admitted tasks that have not ended", ["model"])
        self._queue_wait = t.histogram("llorch_queue_wait_seconds", "waiting for a slot", SLOW_S)
        self._retries = t.counter("llorch_retries", "attempts that went elsewhere", ["reason"])
        self._resumes = t.counter("llorch_resumes", "streams that went on where they were", ["reason"])
        self._beats = t.counter("llorch_heartbeats", "heartbeats", ["node", "outcome"])
        self._rtt = t.gauge("llorch_heartbeat_rtt_seconds", "round trip that the node measured", ["node"])
        self._beat_handling = t.histogram("llorch_heartbeat_handling_seconds", "handling one heartbeat", FAST_S)
        self._registrations = t.counter("llorch_registrations", "registrations", ["outcome"])
        self._auth_failures = t.counter("llorch_auth_failures", "refused credentials", ["layer"])
        self._strikes = t.counter("llorch_node_strikes", "offences of nodes", ["kind"])
        for offence in Offence:
            self._strikes.add(0, offence.value)
        self._named: set[str] = set()  # nodes that are labels of counters
        self._errors = t.counter("llorch_errors", "errors by node and code", ["node", "code"])
        self.limits = LimitMetrics(self.registry)
        self._unaudited = Counter(
            "llorch_audit_unwritten_total",
            "audit records that could not be written when they were made",
            registry=self.registry,
        )

    def placed(self, outcome: str, reason: str) -> None:
        self._placements.add(1, outcome, reason)

    def waited(self, seconds: float) -> None:
        self._queue_wait.observe(seconds)

    def retried(self, reason: str) -> None:
        self._retries.add(1, reason)

    def resumed(self, reason: str) -> None:
        """`reconnect`: this control lost a node's connection; `client`: a client came back; `key`: it sent its key."""
        self._resumes.add(1, reason)

    def ended(self, task: Task) -> None:
        model, node = task.label, task.node_id or ""
        code = task.error.code.value if task.error is not None else ""
        self._tasks.add(1, model, node, task.state.value, code)
        if task.error is not None and node:
            self._errors.add(1, node, code)
        tail = task.tail
        if tail is not None:
            add_tokens(self._tokens, model, tail)

    def beat(self, node_id: str, outcome: str, *, seconds: float | None = None, rtt_ms: float | None = None) -> None:
        if node_id not in self._named:
            if len(self._named) >= MOST_NODE_LABELS:
                return
            self._named.add(node_id)
        self._beats.add(1, node_id, outcome)
        if seconds is not None:
            self._beat_handling.observe(seconds)
        if rtt_ms is not None:
            self._rtt.set(rtt_ms / 1_000, node_id)

    def registered(self, outcome: str) -> None:
        self._registrations.add(1, outcome)

    def struck(self, offence: Offence) -> None:
        self._strikes.add(1, offence.value)

    def auth_failed(self, layer: str) -> None:
        self._auth_failures.add(1, layer)

    def unaudited(self, count: int) -> None:
        """From any thread."""
        self._unaudited.inc(count)

    def scrape_state(self, collect: Callable[[], Iterator[Metric]]) -> None:
        """Have `collect` called on every scrape."""
        self.registry.register(_Scraped(collect))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Scraped(Collector):
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()

    def describe(self) -> list[Metric]:
        return []


def trust_metrics(expiries_s: Mapping[str, float], ages_s: Mapping[str, float]) -> Iterator[Metric]:
    """How long certificates are still good, and how old tokens are."""
    expiry = GaugeMetricFamily("llorch_cert_expiry_seconds", "until a certificate expires", labels=["name"])
    age = GaugeMetricFamily("llorch_token_age_seconds", "of the newest token of a name", labels=["name"])
    for name, seconds in expiries_s.items():
        expiry.add_metric([name], seconds)
    for name, seconds in ages_s.items():
        age.add_metric([name], seconds)
    yield from (expiry, age)


def registry_metrics(registry: Registry, admission: Admission, now: float) -> Iterator[Metric]:
    """The state of the nodes and of the queue, as of now."""
    states = GaugeMetricFamily("llorch_nodes", "nodes by state", labels=["state"])
    ages = GaugeMetricFamily("llorch_node_heartbeat_age_seconds", "since the last heartbeat", labels=["node"])
    slots = GaugeMetricFamily("llorch_slots", "slots by state", labels=["node", "pool", "state"])
    ready = GaugeMetricFamily("llorch_model_ready", "a ready pool has the model", labels=["node", "model"])
    available = GaugeMetricFamily("llorch_model_available", "the node's catalog has it", labels=["node", "model"])
    utilization = GaugeMetricFamily("llorch_gpu_utilization", "0 to 1", labels=["node", "gpu"])
    memory = GaugeMetricFamily("llorch_gpu_memory_bytes", "by kind", labels=["node", "gpu", "kind"])
    counts = dict.fromkeys(("registered", "online", "offline", "draining", "unreachable", "quarantined"), 0)
    for node in registry.nodes.values():
        counts["registered"] += 1
        counts["online" if node.online else "offline"] += 1
        counts["draining"] += node.draining
        counts["quarantined"] += node.quarantine is not None
        counts["unreachable"] += node.online and not node.reachable
        ages.add_metric([node.node_id], max(0.0, now - node.last_beat))
        for gpu in node.gpus.values():
            name = str(gpu.index)
            if gpu.utilization is not None:
                utilization.add_metric([node.node_id, name], gpu.utilization)
            memory.add_metric([node.node_id, name, "total"], gpu.vram_total_bytes)
            memory.add_metric([node.node_id, name, "used"], gpu.vram_used_bytes)
            memory.add_metric([node.node_id, name, "foreign"], gpu.vram_foreign_bytes)
        for model_id in node.catalog:
            available.add_metric([node.node_id, model_id], 1)
    ready_models: dict[tuple[str, str], int] = {}
    ejected = GaugeMetricFamily(
        "llorch_pool_ejected",
        "1 while a pool takes no tasks, or one to try it, because tasks failed there",
        labels=["node", "pool"],
    )
    for facts in registry.pool_facts(now):
        breaker = registry.nodes[facts.node_id].pools[facts.pool_id].breaker
        ejected.add_metric([facts.node_id, facts.pool_id], int(breaker.phase is not Phase.CLOSED))
        free = facts.slots_free if facts.online else 0
        slots.add_metric([facts.node_id, facts.pool_id, "free"], free)
        slots.add_metric([facts.node_id, facts.pool_id, "busy"], facts.slots_total - free)
        if facts.model:
            key = (facts.node_id, facts.model)
            ready_models[key] = max(ready_models.get(key, 0), int(facts.ready and facts.online))
    for (node_id, model), value in ready_models.items():
        ready.add_metric([node_id, model], value)
    for state, count in counts.items():
        states.add_metric([state], count)
    depth = GaugeMetricFamily("llorch_queue_depth", "waiting tasks", labels=["model", "priority"])
    for labels, waiting in _known_models_only(registry, admission.depths()).items():
        depth.add_metric(labels, waiting)
    eta = GaugeMetricFamily("llorch_queue_eta_seconds", "expected wait at the end of a line", labels=["model"])
    models = registry.models()
    for model, eta_ms in admission.etas_ms(now).items():
        if models.has_model(model):
            eta.add_metric([model], eta_ms / 1_000)
    storm = GaugeMetricFamily("llorch_storm", "1 while the control blames itself for the nodes that it misses")
    storm.add_metric([], int(registry.storm is not None))
    yield from (states, ages, slots, ejected, ready, available, utilization, memory, depth, eta, storm)


def _known_models_only(registry: Registry, depths: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """A client names what it likes, and may wait for it while nodes come back: only models that exist become labels."""
    summed: dict[tuple[str, str], int] = {}
    for (model, priority), waiting in depths.items():
        labels = (model if registry.models().has_model(model) else "", priority)
        summed[labels] = summed.get(labels, 0) + waiting
    return summed
