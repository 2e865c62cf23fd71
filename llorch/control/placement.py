"""Where a task may run: filter, score, pick, and say why.

Owns what a task may ask for (`Wish`), what is known of a pool when it is chosen (`PoolFacts`), the ordered table of
filters, the score, and the rule that decides between placing, waiting and refusing. `pick` is the fast path of every
arrival; `decide` gives the same answer with every pool's verdict, for people. Never takes a claim, reads no clock, and
gives the same answer whatever the order in which the pools come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from operator import attrgetter
from typing import Any, TypeAlias

from llorch.errors import Code, LlorchError

RETRY_AFTER_MS = 5_000  # half a heartbeat: sooner, the facts behind a refusal can hardly have changed
FAILED_STATES = frozenset({"failed"})


@dataclass(frozen=True, slots=True)
class Wish:
    """What a task asks of a pool. Entries of `pin`, `prefer`, `avoid` are "node" or "node/pool".

    With `allow_fallback` (the default) `prefer` and `avoid` only order the pools: a task never waits while any pool
    that its other wishes allow has a free slot, and an avoided pool is the last resort. Without it, only preferred
    pools are taken (where any are named) and an avoided one never is. `pin` and `zone` are always hard.
    `exclude` holds the (node, pool) that were tried before.
    """

    model: str
    pin: str | None = None
    prefer: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    allow_fallback: bool = True
    zone: str | None = None
    exclude: frozenset[tuple[str, str]] = frozenset()

    @property
    def constrained(self) -> bool:
        """Whether a pool with the model and a free slot may still be the wrong one."""
        strict = not self.allow_fallback and (self.prefer or self.avoid)
        return bool(self.pin or self.zone or self.exclude or strict)


def excluding(wish: Wish, tried: Iterable[tuple[str, str]]) -> Wish:
    """`wish`, and none of the (node, pool) in `tried`."""
    return replace(wish, exclude=wish.exclude | frozenset(tried))


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """A pool as control sees it at one moment. `reported_at` is monotonic seconds, None before any report."""

    node_id: str
    pool_id: str
    model: str | None = None
    models: frozenset[str] = frozenset()
    online: bool = True
    reachable: bool = True
    suspect: bool = False
    node_draining: bool = False
    pool_draining: bool = False
    ready: bool = True
    state: str | None = None
    slots_total: int = 1
    slots_free: int = 1
    vram_free_bytes: int = 0
    zone: str | None = None
    reported_at: float | None = None
    last_error: str | None = None
    ejected: str | None = None  # why no task may go there: too many failed, or one that tries it runs
    quarantined: str | None = None  # what its node did that it may not; it is offline meanwhile
    # What does not depend on the wish, worked out once for `pick`: whether it may be placed on, and its place in the
    # order of those that may. Facts are read far more often than they change.
    placeable: bool = field(init=False)
    key: tuple[str, str] = field(init=False)
    order: tuple[float, int, tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        up = self.online and self.reachable and not self.suspect
        staying = not self.node_draining and not self.pool_draining and self.state not in FAILED_STATES
        fit = up and staying and self.ready and self.ejected is None
        object.__setattr__(self, "placeable", fit and self.slots_free > 0)
        object.__setattr__(self, "key", (self.node_id, self.pool_id))
        object.__setattr__(self, "order", (self.load, -self.vram_free_bytes, self.key))

    @property
    def name(self) -> str:
        return f"{self.node_id}/{self.pool_id}"

    @property
    def load(self) -> float:
        """The part of its slots that is taken, 0 to 1; a pool without slots is full."""
        return (self.slots_total - self.slots_free) / self.slots_total if self.slots_total > 0 else 1.0

    def age_ms(self, now: float) -> int | None:
        return None if self.reported_at is None else max(0, round((now - self.reported_at) * 1000))


@dataclass(frozen=True, slots=True)
class Known:
    """What there is anywhere, so that a refusal can tell "not there" from "not now".

    Models that are resident in a pool, that a pool says it can load, or that a node's catalog holds; the ids of nodes,
    and pools as "node/pool".
    """

    resident: frozenset[str] = frozenset()
    loadable: frozenset[str] = frozenset()
    catalogued: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    pools: frozenset[str] = frozenset()

    def has_model(self, model: str) -> bool:
        return model in self.resident or model in self.loadable or model in self.catalogued


def named(pool: PoolFacts, entries: tuple[str, ...]) -> bool:
    """Whether one of `entries` ("node" or "node/pool") means this pool."""
    return bool(entries) and (pool.node_id in entries or pool.name in entries)


# ---------------------------------------------------------------- filters


class Fate(StrEnum):
    """What it means for a task that every pool fails here."""

    ABSENT = "absent"  # nobody has the model
    UNWANTED = "unwanted"  # the model is there, but not where the wish allows
    GONE = "gone"  # waiting does not help by itself: somebody must act, or a node must come back
    PASSING = "passing"  # it passes: wait


@dataclass(frozen=True, slots=True)
class Filter:
    name: str
    fate: Fate
    passes: Callable[[Wish, PoolFacts], bool]
    reason: Callable[[Wish, PoolFacts], str]


def _why_unreachable(_: Wish, pool: PoolFacts) -> str:
    return "its node does not answer" if not pool.reachable else "its node has missed two heartbeats"


def _why_draining(_: Wish, pool: PoolFacts) -> str:
    return "its node is draining" if pool.node_draining else "the pool is draining"


# Ordered: the first one that a pool fails is the reason given, so what can't change comes before what passes.
FILTERS: tuple[Filter, ...] = (
    Filter(
        "model",
        Fate.ABSENT,
        lambda w, p: p.model == w.model or w.model in p.models,
        lambda w, p: f"it serves {p.model}" if p.model else "it does not have the model",
    ),
    Filter(
        "pin",
        Fate.UNWANTED,
        lambda w, p: w.pin is None or named(p, (w.pin,)),
        lambda w, p: f"the task is pinned to {w.pin}",
    ),
    Filter(
        "prefer",
        Fate.UNWANTED,
        lambda w, p: w.allow_fallback or not w.prefer or named(p, w.prefer),
        lambda w, p: "it is not preferred, and the task allows no fallback",
    ),
    Filter(
        "avoid",
        Fate.UNWANTED,
        lambda w, p: w.allow_fallback or not named(p, w.avoid),
        lambda w, p: "the task avoids it, and allows no fallback",
    ),
    Filter(
        "zone",
        Fate.UNWANTED,
        lambda w, p: w.zone is None or p.zone == w.zone,
        lambda w, p: f"it is in zone {p.zone}, not {w.zone}" if p.zone else f"it is in no zone, not in {w.zone}",
    ),
    Filter(
        "quarantined",
        Fate.GONE,
        lambda w, p: p.quarantined is None,
        lambda w, p: f"its node is quarantined for {p.quarantined}",
    ),
    Filter("online", Fate.GONE, lambda w, p: p.online, lambda w, p: "its node is offline"),
    Filter("reachable", Fate.PASSING, lambda w, p: p.reachable and not p.suspect, _why_unreachable),
    Filter("draining", Fate.GONE, lambda w, p: not (p.node_draining or p.pool_draining), _why_draining),
    Filter(
        "failed",
        Fate.GONE,
        lambda w, p: p.state not in FAILED_STATES,
        lambda w, p: "its engine failed" + (f": {p.last_error}" if p.last_error else ""),
    ),
    Filter(
        "excluded",
        Fate.GONE,
        lambda w, p: p.key not in w.exclude,
        lambda w, p: "an earlier attempt of this task failed there",
    ),
    Filter(
        "loaded",
        Fate.PASSING,
        lambda w, p: p.model == w.model,
        lambda w, p: f"{p.model} is loaded now" if p.model else "no model is loaded yet",
    ),
    Filter(
        "ready",
        Fate.PASSING,
        lambda w, p: p.ready,
        lambda w, p: f"it is not ready ({p.state})" if p.state else "it is not ready",
    ),
    Filter(
        "ejected",
        Fate.PASSING,
        lambda w, p: p.ejected is None,
        lambda w, p: f"it is ejected for a while: {p.ejected}",
    ),
    Filter(
        "slot",
        Fate.PASSING,
        lambda w, p: p.slots_free > 0,
        lambda w, p: f"all its {p.slots_total} slots are taken",
    ),
)


# ---------------------------------------------------------------- score and pick

Order: TypeAlias = tuple[bool, bool, tuple[float, int, tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Score:
    """The terms that order the pools which passed every filter, the most important first."""

    avoided: bool
    preferred: bool
    load: float
    vram_free_bytes: int

    def order(self, key: tuple[str, str]) -> Order:
        """Least is best. The ids come last, so that two pools never tie."""
        return (self.avoided, not self.preferred, (self.load, -self.vram_free_bytes, key))


def score(wish: Wish, pool: PoolFacts) -> Score:
    return Score(named(pool, wish.avoid), named(pool, wish.prefer), pool.load, pool.vram_free_bytes)


def _wanted(wish: Wish, pool: PoolFacts) -> bool:
    """The filters of a constrained wish, in one function for `pick`."""
    if pool.key in wish.exclude or (wish.zone is not None and pool.zone != wish.zone):
        return False
    if wish.pin is not None and wish.pin != pool.node_id and wish.pin != pool.name:
        return False
    if wish.allow_fallback:
        return True
    return not named(pool, wish.avoid) and (not wish.prefer or named(pool, wish.prefer))


_own_order = attrgetter("order")


def pick(wish: Wish, pools: Iterable[PoolFacts]) -> tuple[str, str] | None:
    """The (node, pool) that `decide` would pick, without its explanations: the hot path."""
    model, constrained = wish.model, wish.constrained
    fit = [p for p in pools if p.placeable and p.model == model and (not constrained or _wanted(wish, p))]
    if not fit:
        return None
    if wish.prefer or wish.avoid:
        return min(fit, key=lambda p: (named(p, wish.avoid), not named(p, wish.prefer), p.order)).key
    return min(fit, key=_own_order).key


# ---------------------------------------------------------------- wait or refuse


def refusal(wish: Wish, pools: Iterable[PoolFacts], known: Known) -> LlorchError | None:
    """The error for a task that nothing can be picked for, or None: it is worth its wait.

    `pools` are those with the model, or all of them. Busy, loading, ejected and suspect pools are waited for; a pool
    that has another model loaded and can load this one counts as loading.
    """
    if wish.pin is not None and wish.pin not in known.nodes and wish.pin not in known.pools:
        return _unknown_pin(wish.pin, known)
    reasons: Counter[str] = Counter()
    serving = wanted = False
    for pool in pools:
        failed = [check for check in FILTERS if not check.passes(wish, pool)]
        fates = {check.fate for check in failed}
        if Fate.ABSENT in fates:
            continue
        serving = True
        if Fate.UNWANTED not in fates:
            wanted = True
            if Fate.GONE not in fates:
                return None
        reasons[failed[0].name] += 1
    if not serving:
        if wish.model in known.catalogued:
            return _unavailable(f"{wish.model} is in a catalog, but no pool can load it", {})
        return LlorchError(Code.MODEL_NOT_FOUND, f"no node has the model {wish.model}", param="model")
    if not wanted:
        return _unavailable(
            f"pools have {wish.model}, but none that this task's placement allows",
            dict(reasons),
            hint="drop the pin, zone or avoid list, or allow fallback; POST /v2/placement shows every pool's verdict",
        )
    counts = ", ".join(f"{count} {name}" for name, count in sorted(reasons.items()))
    return LlorchError(
        Code.NO_CAPACITY,
        f"no pool of {wish.model} can take the task ({counts})",
        retry_after_ms=RETRY_AFTER_MS,
        details={"pools": dict(reasons)},
    )


def _unknown_pin(pin: str, known: Known) -> LlorchError:
    node_id, slash, _ = pin.partition("/")
    if slash and node_id in known.nodes:
        return LlorchError(Code.POOL_NOT_FOUND, f"no pool {pin}, which the task is pinned to", param="placement.pin")
    return LlorchError(Code.NODE_NOT_FOUND, f"no node {node_id}, which the task is pinned to", param="placement.pin")


def _unavailable(message: str, reasons: dict[str, int], *, hint: str | None = None) -> LlorchError:
    return LlorchError(
        Code.MODEL_NOT_AVAILABLE,
        message,
        hint=hint,
        retry_after_ms=RETRY_AFTER_MS,
        details={"pools": reasons} if reasons else None,
    )


# ---------------------------------------------------------------- the explained decision


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
    results = {pool.key: _judge(wish, pool) for pool in facts}
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
        wish, Outcome.WAIT, None, "it waits for a pool that is busy, loading, ejected or suspect", None, verdicts
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a decision is made from. Kept instead of the decision, which is large and which few ask for."""

    wish: Wish
    pools: tuple[PoolFacts, ...]
    now: float
    known: Known

    def decision(self) -> Decision:
        return decide(self.wish, self.pools, self.now, self.known)


def _judge(wish: Wish, pool: PoolFacts) -> tuple[FilterVerdict, ...]:
    return tuple(
        FilterVerdict(check.name, True)
        if check.passes(wish, pool)
        else FilterVerdict(check.name, False, check.reason(wish, pool))
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


def _why_picked(terms: Score, candidates: int) -> str:
    if terms.avoided:
        return "only pools that the task avoids could take it"
    if candidates == 1:
        return "the only pool that could take it"
    return f"{'preferred, ' if terms.preferred else ''}the least loaded of {candidates} that could take it"
