"""The facts of all pools, kept in one place and in order: only those that have changed are made anew.

Owns when facts are too old to be looked at, and which pool is the best one for a task that has no wishes of its own,
so that neither costs more where there are many pools. What the facts are is `nodes`' and the order `placement`'s. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush

from llorch.control.nodes import Node, Pool
from llorch.control.placement import OwnOrder, PoolFacts

SPARE_ENTRIES = 64  # of a model's heap, beside two for each pool, before it is made anew


class FactTable:
    """Made for a set of pools, and the models that they serve; another set needs another table."""

    def __init__(self, nodes: Mapping[str, Node], by_model: Mapping[str, Sequence[Pool]], now: float) -> None:
        self._nodes = nodes
        self._pools = [pool for node in nodes.values() for pool in node.pools.values()]
        self._row_of = {id(pool): row for row, pool in enumerate(self._pools)}
        self._of_model = {model: [self._row_of[id(pool)] for pool in pools] for model, pools in by_model.items()}
        self._stale: list[Pool] = []
        self._heaps: dict[str, list[tuple[OwnOrder, int]]] = {}
        self._swappable: set[int] = set()
        self._until = float("inf")
        self._rows: list[PoolFacts] = []
        for row, pool in enumerate(self._pools):
            pool.stale = self._stale
            self._rows.append(self._facts(pool, now))
            self._note(row)

    def refresh(self, now: float) -> None:
        """Make anew what has changed. Every look does it; whoever changes much spares the next one the work."""
        if now >= self._until:  # of one of them, perhaps of one that has been made anew since
            self._until = float("inf")
            for row, pool in enumerate(self._pools):
                self._put(row, self._facts(pool, now))
        while self._stale:
            pool = self._stale.pop()
            self._put(self._row_of[id(pool)], self._facts(pool, now))

    def rows(self, now: float, model: str | None = None) -> Sequence[PoolFacts]:
        """Of every pool, or of those that have a model loaded or can load it."""
        self.refresh(now)
        rows = self._rows
        return tuple(rows) if model is None else [rows[row] for row in self._of_model.get(model, ())]

    def best(self, model: str, now: float) -> tuple[str, str] | None:
        """What `placement.pick_serving` picks for a wish without constraints or preferences."""
        self.refresh(now)
        heap, rows = self._heaps.get(model), self._rows
        while heap:
            order, row = heap[0]
            facts = rows[row]
            if facts.order is order and facts.placeable and facts.takes == model:
                return facts.key
            heappop(heap)  # of facts that have changed since
        return None

    def swappable(self, now: float) -> bool:
        """Whether any pool may be sent a task for which something has to be loaded first."""
        self.refresh(now)
        return bool(self._swappable)

    # ---- inside

    def _facts(self, pool: Pool, now: float) -> PoolFacts:
        facts = pool.facts
        if facts is None or now >= pool.facts_until:
            facts = pool.make_facts(self._nodes[pool.node_id], now)
        self._until = min(self._until, pool.facts_until)
        return facts

    def _put(self, row: int, facts: PoolFacts) -> None:
        if facts is not self._rows[row]:
            self._rows[row] = facts
            self._note(row)

    def _note(self, row: int) -> None:
        facts = self._rows[row]
        if facts.swappable:
            self._swappable.add(row)
        else:
            self._swappable.discard(row)
        model = facts.takes
        if model is None or not facts.placeable:
            return
        heap = self._heaps.get(model)
        if heap is None:
            heap = self._heaps[model] = []
        heappush(heap, (facts.order, row))
        rows = self._of_model.get(model, ())
        if len(heap) > 2 * len(rows) + SPARE_ENTRIES:
            fit = ((self._rows[each].order, each) for each in rows if self._rows[each].takes == model)
            heap[:] = [entry for entry in fit if self._rows[entry[1]].placeable]
            heapify(heap)
