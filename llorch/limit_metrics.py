"""What a role counts of its limits: connections there are and that were refused, requests that a rate refused.

Both roles have the same ones, in their own registries. No address and no principal is a label.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from llorch.doors import Doors


class LimitMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._refused = Counter(
            "llorch_connections_refused_total", "connections that were not let in, or had to go", ["reason"],
            registry=registry,
        )  # fmt: skip
        self._limited = Counter(
            "llorch_rate_limited_total", "requests refused because of a rate", ["limit"], registry=registry
        )
        self._connections = Gauge(
            "llorch_connections",
            "connections by whose they are; arriving: those that have asked for nothing yet",
            ["kind"],
            registry=registry,
        )

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def limited(self, limit: str) -> None:
        self._limited.labels(limit).inc()

    def watch(self, doors: Doors) -> None:
        """Have the connections of `doors` read on every scrape."""
        self._connections.labels("client").set_function(lambda: doors.clients)
        self._connections.labels("node").set_function(lambda: doors.nodes)
        self._connections.labels("arriving").set_function(lambda: doors.arriving)
