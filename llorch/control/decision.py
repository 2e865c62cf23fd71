"""The explained decision: what happens to a task, and what every pool had to do with it.

Owns how a decision is told, and the snapshot that one can be made from later. Its answer is that of `placement.pick`
and `placement.refusal`, which are asked on the way of every task; this is for people. Never takes a claim. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llorch.control.placement import FILTERS, Known, PoolFacts, Score, Warmth, Wish, refusal, score
from llorch.errors import LlorchError


class Outcome(StrEnum):
    PLACED = "placed"
    WAIT = "wait"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class FilterVerdict:
    name: str
    passed: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class PoolVerdict:
    """What every filter says of one pool. `code` is the first filter it failed; `rank` 1 is the one to take."""

    node_id: str
    pool_id: str
    filters: tuple[FilterVerdict, ...]
    score: Score
    facts_age_ms: int | None
    code: str | None
    reason: str | None
    rank: int | None

    @property
    def passed(self) -> bool:
        return self.code is None

    def to_wire(self) -> dict[str, Any]:
        return {
            "node_id": self.node_id,
            "pool_id": self.pool_id,
            "passed": self.passed,
            "rank": self.rank,
            "code": self.code,
            "reason": self.reason,
            "filters": [
                {"name": f.name, "passed": f.passed} | ({"reason": f.reason} if f.reason else {}) for f in self.filters
            ],
            "score": {
                "warmth": self.score.warmth.name.lower(),
                "avoided": self.score.avoided,
                "preferred": self.score.preferred,
                "load": round(self.score.load, 4),
                "vram_free_bytes": self.score.vram_free_bytes,
            },
            "facts_age_ms": self.facts_age_ms,
        }


@dataclass(frozen=True, slots=True)
class Decision:
    """The whole answer: what happens to the task, and what each pool had to do with it."""

    wish: Wish
    outcome: Outcome
    picked: tuple[str, str] | None
    reason: str
    error: LlorchError | None
    verdicts: tuple[PoolVerdict, ...]

    def to_wire(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome.value,
            "model": self.wish.model,
            "node_id": self.picked[0] if self.picked else None,
            "pool_id": self.picked[1] if self.picked else None,
            "reason": self.reason,
            "error": self.error.to_wire() if self.error else None,
            "pools": [verdict.to_wire() for verdict in self.verdicts],
        }


def decide(wish: Wish, pools: Iterable[PoolFacts], now: float, known: Known | None = None) -> Decision:
    """As `pick` and `refusal`, with every filter's verdict on every pool, failed or not.

    Without `known`, the nodes and pools named in `pools` are all there are, and no catalog holds anything.
    """
    facts = sorted(pools, key=lambda pool: pool.key)
    results = {pool.key: _judge(wish, pool, now) for pool in facts}
    scores = {pool.key: score(wish, pool) for pool in facts}
    passed = [key for key, result in results.items() if all(verdict.passed for verdict in result)]
    ranks = {key: rank for rank, key in enumerate(sorted(passed, key=lambda key: scores[key].order(key)), 1)}
    verdicts = tuple(_verdict(pool, results[pool.key], scores[pool.key], ranks, now) for pool in facts)
    if ranks:
        best = next(iter(ranks))
        return Decision(wish, Outcome.PLACED, best, _why_picked(scores[best], len(ranks)), None, verdicts)
    if known is None:
        known = Known(nodes=frozenset(p.node_id for p in facts), pools=frozenset(p.name for p in facts))
    error = refusal(wish, facts, known)
    if error is not None:
        return Decision(wish, Outcome.REFUSE, None, error.message, error, verdicts)
    return Decision(
        wish,
        Outcome.WAIT,
        None,
        "it waits for a pool that is busy, loading, has another model loaded, is ejected or suspect",
        None,
        verdicts,
    )


@dataclass(slots=True, unsafe_hash=True)  # see placement.PoolFacts
class Snapshot:
    """What a decision is made from; kept, and never changed, in place of the decision, which is large."""

    wish: Wish
    pools: tuple[PoolFacts, ...]
    now: float
    known: Known

    def decision(self) -> Decision:
        return decide(self.wish, self.pools, self.now, self.known)


def _judge(wish: Wish, pool: PoolFacts, now: float) -> tuple[FilterVerdict, ...]:
    return tuple(
        FilterVerdict(check.name, True)
        if check.passes(wish, pool)
        else FilterVerdict(check.name, False, check.reason(wish, pool, now))
        for check in FILTERS
    )


def _verdict(
    pool: PoolFacts,
    results: tuple[FilterVerdict, ...],
    terms: Score,
    ranks: dict[tuple[str, str], int],
    now: float,
) -> PoolVerdict:
    first = next((result for result in results if not result.passed), None)
    return PoolVerdict(
        pool.node_id,
        pool.pool_id,
        results,
        terms,
        pool.age_ms(now),
        first.name if first else None,
        first.reason if first else None,
        ranks.get(pool.key),
    )


_TO_LOAD = {
    Warmth.RESIDENT: "",
    Warmth.LOADING: "; its model is being loaded there",
    Warmth.EMPTY: "; its model is loaded there for it",
    Warmth.EVICTING: "; its model is loaded there for it, in the place of an idle one",
}


def _why_picked(terms: Score, candidates: int) -> str:
    if terms.avoided:
        why = "only pools that the task avoids could take it"
    elif candidates == 1:
        why = "the only pool that could take it"
    else:
        why = f"{'preferred, ' if terms.preferred else ''}the least loaded of {candidates} that could take it"
    return why + _TO_LOAD[terms.warmth]
