"""Which pools are out because tasks failed there, and what counts as a failure of a pool.

Owns the breakers of a control's pools, and that of a model's pools which could be placed on at most half are out at
once: where all fail, the fault lies elsewhere, and ejecting them would turn some failures into none served. Never
takes or gives back a claim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llorch.breaker import Breaker, Phase, may_eject, surplus
from llorch.control.nodes import Claim, Event, Node, Pool
from llorch.errors import Code, LlorchError

# Not the pool's fault: a node that goes takes all its pools with it, and a deadline was too short.
_NOBODYS = frozenset({Code.NODE_LOST, Code.DEADLINE_EXCEEDED, Code.CANCELED, Code.INSUFFICIENT_STORAGE})
# A refusal with one of these says how things are; the next report says so too.
_STATE = frozenset({Code.DRAINING, Code.MODEL_NOT_AVAILABLE, Code.POOL_NOT_FOUND, Code.ALL_SLOTS_BUSY})

Tell = Callable[[Event], None]


def blames(error: LlorchError, *, refused: bool = False) -> bool:
    """Whether an attempt that ends with `error` counts against its pool. `refused`: it was not begun there."""
    if error.status < 500 or error.code in _NOBODYS:
        return False
    return not (refused and error.code in _STATE)


class Ejections:
    """The breakers of `nodes`' pools. `tell` hears what changes."""

    def __init__(self, nodes: Mapping[str, Node], tell: Tell) -> None:
        self._nodes = nodes
        self._tell = tell
        self._out: list[Pool] = []  # not closed; few, and most of the time none

    def succeeded(self, claim: Claim, now: float) -> None:
        pool = self._pool(claim)
        if pool is not None and pool.breaker.succeeded(now, trial=claim.trial):
            self._readmit(pool, "its trial succeeded")

    def failed(self, claim: Claim, now: float) -> None:
        pool = self._pool(claim)
        if pool is None or not pool.breaker.failed(now, trial=claim.trial):
            return
        if may_eject(pool.breaker, self._peers(pool.report.model, now, pool)):
            lasts_s = pool.breaker.eject(now)
            pool.forget_facts()
            if pool not in self._out:
                self._out.append(pool)
            self._told(pool, "pool.ejected", pool.breaker.why, for_s=lasts_s, ejections=pool.breaker.ejections)
        elif pool.breaker.phase is Phase.HALF_OPEN:
            pool.breaker.close(now)
            self._readmit(pool, "too few others are left")

    def settle(self, now: float) -> None:
        """After time or nodes have changed: none stays out whom the others can't do without."""
        if not self._out:
            return
        self._out = [pool for pool in self._out if self._is_there(pool)]
        for pool in self._out:
            pool.breaker.advance(now)
        for model in {pool.report.model for pool in self._out}:
            for breaker in surplus(self._peers(model, now)):
                breaker.close(now)
                self._readmit(next(pool for pool in self._out if pool.breaker is breaker), "too few others are left")

    # ---- inside

    def _pool(self, claim: Claim) -> Pool | None:
        """The claim's pool, if it is still the one that the claim was taken on, and not another process's."""
        node = self._nodes.get(claim.node_id)
        pool = None if node is None else node.pools.get(claim.pool_id)
        return pool if pool is not None and pool.breaker is claim.breaker else None

    def _is_there(self, pool: Pool) -> bool:
        node = self._nodes.get(pool.node_id)
        return node is not None and node.pools.get(pool.pool_id) is pool and pool.breaker.phase is not Phase.CLOSED

    def _peers(self, model: str | None, now: float, pool: Pool | None = None) -> list[Breaker]:
        """Of the pools that have `model` and could be placed on now, slots aside; and of `pool`."""
        return [
            other.breaker
            for node in self._nodes.values()
            for other in node.pools.values()
            if other is pool or (other.bound and other.report.model == model and not node.suspect(now))
        ]

    def _readmit(self, pool: Pool, reason: str) -> None:
        pool.forget_facts()
        if pool in self._out:
            self._out.remove(pool)
        self._told(pool, "pool.readmitted", reason)

    def _told(self, pool: Pool, word: str, reason: str, **more: Any) -> None:
        self._tell(pool.event(word, model=pool.report.model, reason=reason, **more))
