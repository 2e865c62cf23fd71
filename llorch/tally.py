"""Counts of what happens with every task, kept as plain numbers and shown as Prometheus metrics when they are scraped.

prometheus_client's own counters lock, hash and check at each step, which costs a task more than its placement; what is
counted once a task, or oftener, is counted here, by one thread. All else about a metric is that library's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from llorch.messages import Tail


class Counts:
    """A counter or a gauge: a number for each set of label values. Without labels there is one from the beginning."""

    def __init__(self, name: str, doc: str, labels: Sequence[str] = (), *, gauge: bool = False) -> None:
        self.name = name
        self._doc, self._labels, self._gauge = doc, tuple(labels), gauge
        self.of: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, count: float, *labels: str) -> None:
        of = self.of
        of[labels] = of.get(labels, 0) + count

    def set(self, value: float, *labels: str) -> None:
        self.of[labels] = value

    def family(self) -> Metric:
        make = GaugeMetricFamily if self._gauge else CounterMetricFamily
        family = make(self.name, self._doc, labels=self._labels)
        for labels, value in self.of.items():
            family.add_metric(labels, value)
        return family


class Spread:
    """A histogram: for each set of label values how many were at most as large as each bound, and their sum."""

    def __init__(self, name: str, doc: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        self.name = name
        self._doc, self._labels = doc, tuple(labels)
        self._bounds = tuple(map(float, bounds))
        self._of: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        if not labels:
            self._row(())

    def _row(self, labels: tuple[str, ...]) -> tuple[list[int], list[float]]:
        row = self._of[labels] = ([0] * (len(self._bounds) + 1), [0.0])
        return row

    def observe(self, value: float, *labels: str) -> None:
        counts, total = self._of.get(labels) or self._row(labels)
        counts[bisect_left(self._bounds, value)] += 1
        total[0] += value

    def family(self) -> Metric:
        family = HistogramMetricFamily(self.name, self._doc, labels=self._labels)
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for labels, (counts, total) in self._of.items():
            family.add_metric(labels, list(zip(names, accumulate(counts), strict=True)), total[0])
        return family


class Tallies(Collector):
    """All of a role's, in its registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._kept: list[Counts | Spread] = []
        self._registry = registry
        registry.register(self)

    def counter(self, name: str, doc: str, labels: Sequence[str] = ()) -> Counts:
        return self._keep(Counts(name, doc, labels))

    def gauge(self, name: str, doc: str, labels: Sequence[str] = ()) -> Counts:
        return self._keep(Counts(name, doc, labels, gauge=True))

    def histogram(self, name: str, doc: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> Spread:
        spread = Spread(name, doc, bounds, labels)
        self._kept.append(spread)
        return spread

    def _keep(self, counts: Counts) -> Counts:
        self._kept.append(counts)
        return counts

    def collect(self) -> Iterator[Metric]:
        return (kept.family() for kept in self._kept)

    def describe(self) -> list[Metric]:
        return []


def add_tokens(counts: Counts, model: str, tail: Tail) -> None:
    """What an ended task read and said, to a counter of tokens by model and kind: both roles have the same one."""
    for kind, count in (("input", tail.tokens_in), ("output", tail.tokens_out), ("cached", tail.cached_tokens)):
        if count:
            counts.add(count, model, kind)
