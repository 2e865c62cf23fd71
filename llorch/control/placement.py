"""Where a task may run: filter, score, pick, and say why.

Owns what a task may ask for (`Wish`), what is known of a pool when it is chosen (`PoolFacts`), the ordered table of
filters, the score, and the rule that decides between placing, waiting and refusing. `pick` is the fast path of every
arrival; `decision.decide` gives the same answer with every pool's verdict, for people. Never takes a claim, reads no
clock, and gives the same answer whatever the order in which the pools come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from operator import attrgetter
from typing import TypeAlias

from llorch.errors import Code, LlorchError

RETRY_AFTER_MS = 5_000  # half a heartbeat: sooner, the facts behind a refusal can hardly have changed
FAILED_STATES = frozenset({"failed"})
LOADING_STATES = frozenset({"starting", "loading"})


class Warmth(IntEnum):
    """How soon a task could begin at a pool that may be sent it. Nothing that a task prefers outweighs it."""

    RESIDENT = 0  # at once
    LOADING = 1  # when its model has been loaded, which is under way
    EMPTY = 2  # its model is loaded for it
    EVICTING = 3  # the same, and another model goes for it


@dataclass(slots=True, unsafe_hash=True)  # see PoolFacts
class Wish:
    """What a task asks of a pool; never changed. Entries of `pin`, `prefer`, `avoid` are "node" or "node/pool".

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


OwnOrder: TypeAlias = tuple[Warmth, float, int, tuple[str, str]]


@dataclass(slots=True, unsafe_hash=True)  # a frozen one takes three times as long to make, and each task makes some
class PoolFacts:
    """A pool as control sees it at one moment; never changed. `reported_at`: monotonic seconds, None before any report.

    `model` is resident; with `loading`, that one is on its way and tasks for it may be sent already; with `swappable`,
    a task for any of `models` may be, and is held while the node loads it (`load_s`: how long that took last).
    `kept_until`: what is resident is not to go for another before that. `used`: when the pool was last given a task, as
    a count of all claims. `barred`: why the one task that these facts were made for may not go there just now.
    """

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
    loading: str | None = None
    swappable: bool = False
    kept_until: float = 0.0
    load_s: float | None = None
    used: int = 0
    barred: str | None = None
    # What does not depend on the wish, worked out once for `pick`: whether it may be placed on, and its place in the
    # order of those that may. Facts are read far more often than they change.
    takes: str | None = field(init=False)  # the model that tasks may be sent for without anything being swapped
    available: bool = field(init=False)  # it takes tasks, if perhaps none more just now
    placeable: bool = field(init=False)
    key: tuple[str, str] = field(init=False)
    order: OwnOrder = field(init=False)

    def __post_init__(self) -> None:
        up = self.online and self.reachable and not self.suspect
        staying = not self.node_draining and not self.pool_draining and self.state not in FAILED_STATES
        serves = self.ready or self.swappable or self.loading is not None
        available = up and staying and serves and self.ejected is None
        warmth = Warmth.RESIDENT if self.loading is None else Warmth.LOADING
        self.takes = self.loading or (self.model if self.ready else None)
        self.available = available
        self.placeable = available and self.slots_free > 0 and self.barred is None
        self.key = (self.node_id, self.pool_id)
        self.order = (warmth, self.load, -self.vram_free_bytes, self.key)

    @property
    def name(self) -> str:
        return f"{self.node_id}/{self.pool_id}"

    @property
    def load(self) -> float:
        """The part of its slots that is taken, 0 to 1; a pool without slots is full."""
        return (self.slots_total - self.slots_free) / self.slots_total if self.slots_total > 0 else 1.0

    def may_load(self, model: str) -> bool:
        """Whether a task for `model` may be sent for which something has to be loaded first."""
        return self.swappable and model in self.models and self.takes != model

    def age_ms(self, now: float) -> int | None:
        return None if self.reported_at is None else max(0, round((now - self.reported_at) * 1000))


@dataclass(frozen=True, slots=True)
class Known:
    """What there is anywhere, so that a refusal can tell "not there" from "not now".

    Models that are resident in a pool, that a pool says it can load, or that a node's catalog holds; those that were
    there a moment ago (`departed`); the ids of nodes, and pools as "node/pool".
    """

    resident: frozenset[str] = frozenset()
    loadable: frozenset[str] = frozenset()
    catalogued: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    pools: frozenset[str] = frozenset()
    departed: frozenset[str] = frozenset()

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
    reason: Callable[[Wish, PoolFacts, float], str]  # the last is now


def _why_unreachable(_: Wish, pool: PoolFacts, __: float) -> str:
    return "its node does not answer" if not pool.reachable else "its node has missed two heartbeats"


def _why_draining(_: Wish, pool: PoolFacts, __: float) -> str:
    return "its node is draining" if pool.node_draining else "the pool is draining"


def _loaded(wish: Wish, pool: PoolFacts) -> bool:
    """Its model is there, or on its way, or will be for this very task."""
    resident = pool.model == wish.model and pool.loading is None
    return resident or pool.loading == wish.model or pool.may_load(wish.model)


def _why_not_loaded(wish: Wish, pool: PoolFacts, now: float) -> str:
    if pool.loading is not None:
        return f"{pool.loading} is being loaded now, and kept for a while then; swapped when idle"
    if pool.model is None:
        return "no model is loaded yet"
    if len(pool.models) < 2:
        return f"{pool.model} is loaded now"
    left_s = pool.kept_until - now
    when = f"in about {left_s:.0f} s at the earliest" if left_s >= 0.5 else "as it has had its time"
    return f"{pool.model} is loaded now; swapped when idle, {when}"


# Ordered: the first one that a pool fails is the reason given, so what can't change comes before what passes.
FILTERS: tuple[Filter, ...] = (
    Filter(
        "model",
        Fate.ABSENT,
        lambda w, p: p.model == w.model or w.model in p.models or p.loading == w.model,
        lambda w, p, now: f"it serves {p.model}" if p.model else "it does not have the model",
    ),
    Filter(
        "pin",
        Fate.UNWANTED,
        lambda w, p: w.pin is None or named(p, (w.pin,)),
        lambda w, p, now: f"the task is pinned to {w.pin}",
    ),
    Filter(
        "prefer",
        Fate.UNWANTED,
        lambda w, p: w.allow_fallback or not w.prefer or named(p, w.prefer),
        lambda w, p, now: "it is not preferred, and the task allows no fallback",
    ),
    Filter(
        "avoid",
        Fate.UNWANTED,
        lambda w, p: w.allow_fallback or not named(p, w.avoid),
        lambda w, p, now: "the task avoids it, and allows no fallback",
    ),
    Filter(
        "zone",
        Fate.UNWANTED,
        lambda w, p: w.zone is None or p.zone == w.zone,
        lambda w, p, now: f"it is in zone {p.zone}, not {w.zone}" if p.zone else f"it is in no zone, not in {w.zone}",
    ),
    Filter(
        "quarantined",
        Fate.GONE,
        lambda w, p: p.quarantined is None,
        lambda w, p, now: f"its node is quarantined for {p.quarantined}",
    ),
    Filter("online", Fate.GONE, lambda w, p: p.online, lambda w, p, now: "its node is offline"),
    Filter("reachable", Fate.PASSING, lambda w, p: p.reachable and not p.suspect, _why_unreachable),
    Filter("draining", Fate.GONE, lambda w, p: not (p.node_draining or p.pool_draining), _why_draining),
    Filter(
        "failed",
        Fate.GONE,
        lambda w, p: p.state not in FAILED_STATES,
        lambda w, p, now: "its engine failed" + (f": {p.last_error}" if p.last_error else ""),
    ),
    Filter(
        "excluded",
        Fate.GONE,
        lambda w, p: p.key not in w.exclude,
        lambda w, p, now: "an earlier attempt of this task failed there",
    ),
    Filter(
        "loaded",
        Fate.PASSING,
        _loaded,
        _why_not_loaded,
    ),
    Filter(
        "ready",
        Fate.PASSING,
        lambda w, p: p.ready or p.loading is not None or p.may_load(w.model),
        lambda w, p, now: f"it is not ready ({p.state})" if p.state else "it is not ready",
    ),
    Filter(
        "ejected",
        Fate.PASSING,
        lambda w, p: p.ejected is None,
        lambda w, p, now: f"it is ejected for a while: {p.ejected}",
    ),
    Filter(
        "slot",
        Fate.PASSING,
        lambda w, p: p.slots_free > 0,
        lambda w, p, now: f"all its {p.slots_total} slots are taken",
    ),
    Filter("turn", Fate.PASSING, lambda w, p: p.barred is None, lambda w, p, now: p.barred or ""),
)


# ---------------------------------------------------------------- score and pick

Order: TypeAlias = tuple[Warmth, bool, bool, int, float, int, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Score:
    """The terms that order the pools which passed every filter, the most important first."""

    warmth: Warmth
    avoided: bool
    preferred: bool
    used: int  # of those that have to load it first, the one goes first that was not used for longest
    load: float
    vram_free_bytes: int

    def order(self, key: tuple[str, str]) -> Order:
        """Least is best. The ids come last, so that two pools never tie."""
        return (self.warmth, self.avoided, not self.preferred, self.used, self.load, -self.vram_free_bytes, key)


def score(wish: Wish, pool: PoolFacts) -> Score:
    warmth, used = (loading_cost(pool), pool.used) if pool.may_load(wish.model) else (pool.order[0], 0)
    return Score(warmth, named(pool, wish.avoid), named(pool, wish.prefer), used, pool.load, pool.vram_free_bytes)


def loading_cost(pool: PoolFacts) -> Warmth:
    """What it takes to load another model there."""
    return Warmth.EMPTY if pool.takes is None else Warmth.EVICTING


def wanted(wish: Wish, pool: PoolFacts) -> bool:
    """The filters of a constrained wish, in one function."""
    if pool.key in wish.exclude or (wish.zone is not None and pool.zone != wish.zone):
        return False
    if wish.pin is not None and wish.pin != pool.node_id and wish.pin != pool.name:
        return False
    if wish.allow_fallback:
        return True
    return not named(pool, wish.avoid) and (not wish.prefer or named(pool, wish.prefer))


_own_order = attrgetter("order")


def pick(wish: Wish, pools: Sequence[PoolFacts]) -> tuple[str, str] | None:
    """The (node, pool) that `decide` would pick, without its explanations: the hot path."""
    return pick_serving(wish, pools) or pick_to_load(wish, pools)


def pick_serving(wish: Wish, pools: Sequence[PoolFacts]) -> tuple[str, str] | None:
    """Of those that have the model, or are loading it."""
    model, constrained = wish.model, wish.constrained
    fit = [p for p in pools if p.placeable and p.takes == model and (not constrained or wanted(wish, p))]
    if not fit:
        return None
    if wish.prefer or wish.avoid:
        return min(fit, key=lambda p: (p.order[0], named(p, wish.avoid), not named(p, wish.prefer), p.order)).key
    return min(fit, key=_own_order).key


def pick_to_load(wish: Wish, pools: Sequence[PoolFacts]) -> tuple[str, str] | None:
    """Of those that would load it first: an empty one, else the one that was not used for longest."""
    fit = [p for p in pools if p.swappable and p.placeable and p.may_load(wish.model) and wanted(wish, p)]
    if not fit:
        return None
    return min(fit, key=lambda p: score(wish, p).order(p.key)).key


# ---------------------------------------------------------------- wait or refuse


def refusal(wish: Wish, pools: Iterable[PoolFacts], known: Known) -> LlorchError | None:
    """The error for a task that nothing can be picked for, or None: it is worth its wait.

    `pools` are those with the model, or all of them. Busy, loading, ejected and suspect pools are waited for; a pool
    that has another model loaded and can load this one counts as loading.
    """
    if wish.pin is not None and wish.pin not in known.nodes and wish.pin not in known.pools:
        return _unknown_pin(wish.pin, known)
    reasons: Counter[str] = Counter()
    serving = allowed = False
    for pool in pools:
        failed = [check for check in FILTERS if not check.passes(wish, pool)]
        fates = {check.fate for check in failed}
        if Fate.ABSENT in fates:
            continue
        serving = True
        if Fate.UNWANTED not in fates:
            allowed = True
            if Fate.GONE not in fates:
                return None
        reasons[failed[0].name] += 1
    if not serving:
        if wish.model in known.departed:
            return _unavailable(f"the last node that had {wish.model} has just left; it may be restarting", {})
        if wish.model in known.catalogued:
            return _unavailable(f"{wish.model} is in a catalog, but no pool can load it", {})
        return LlorchError(Code.MODEL_NOT_FOUND, f"no node has the model {wish.model}", param="model")
    if not allowed:
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
