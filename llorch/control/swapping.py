"""Which model a pool that can load several is given to next, when, and which tasks go there meanwhile.

A pool serves one model at a time. Its node swaps it only while nothing runs there, so under a steady load somebody has
to stop sending: once a resident model has had its time and a task for another one has waited longer, the pool is set
aside for that one, and whoever came later for the resident one does not go there any more. What came before still does,
so neither can starve the other. A model that other pools serve has less of a claim, by as much time as a model is kept:
else two lines that are equally long would have their pools swapped back and forth.

Owns these rules, and what a claim on a swappable pool pledges. Never orders pools for a task (`placement` does), takes
no claim, keeps no queue. Pure: `now` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeAlias

from llorch.config_pools import MODEL_KEPT_S
from llorch.control.line import Waiter
from llorch.control.placement import PoolFacts, Wish, loading_cost, pick, pick_serving, wanted

LOAD_S = 10.0  # a guess, where a pool has not said how long its last load took
MAX_LOOKS = 32  # of a line's oldest waiters: those before may be pinned elsewhere. The rest have their turn after them

Key: TypeAlias = tuple[str, str]


@dataclass(slots=True)
class Pledge:
    """A claim for a model that has to be loaded first has been taken: its pool is on its way to that one, whatever
    reports say that left the node before. It lasts until a report shows anything else, or its last claim ends without
    the node having accepted it."""

    model: str
    claims: set[tuple[str, int]] = field(default_factory=set)
    accepted: bool = False

    def ended(self, claim: tuple[str, int]) -> bool:
        """One of its claims has ended. True if it is over with that."""
        self.claims.discard(claim)
        return not self.claims and not self.accepted

    def stands(self, *, swappable: bool, model: str | None) -> bool:
        """Whether it outlasts a report. Only of one that shows the pool as it was before could the task be news."""
        return swappable and model != self.model and bool(self.claims)


@dataclass(frozen=True, slots=True)
class Next:
    """What a pool is set aside for: a model, because of a task that has waited `since`."""

    model: str
    since: float


Plan: TypeAlias = Mapping[Key, Next]
NOTHING: Plan = {}


def plan(
    lines: Iterable[tuple[str, Iterable[Waiter]]], pools_of: Callable[[str], Sequence[PoolFacts]], now: float
) -> Plan:
    """Which pools are set aside for which model: at most one for each that waits, for the one first that waits longest.

    `lines`: of each model the tasks that wait and could go now, the oldest first. `pools_of`: all that have it or can
    load it. One pool at a time is enough: once that one loads it, what still waits is judged anew.
    """
    asks: list[tuple[float, str, list[PoolFacts]]] = []
    waiting = set()
    for model, waiters in lines:
        pools = pools_of(model)
        waiting.add(model)
        for waiter in islice(waiters, MAX_LOOKS):
            could = [pool for pool in pools if _could_swap(pool, model, now) and wanted(waiter.wish, pool)]
            if could:
                later_s = MODEL_KEPT_S if served(waiter.wish, pools) else 0.0
                asks.append((waiter.turn_at + later_s, model, could))
                break
    aside: dict[Key, Next] = {}
    for since, model, could in sorted(asks, key=lambda ask: ask[:2]):
        left = [pool for pool in could if pool.key not in aside]
        if left:
            aside[min(left, key=lambda pool: _trouble(pool, waiting)).key] = Next(model, since)
    return aside


def _could_swap(pool: PoolFacts, model: str, now: float) -> bool:
    """At once, or as soon as nothing runs there any more."""
    if not pool.available or pool.takes == model or model not in pool.models:
        return False
    return pool.swappable or (pool.loading is None and pool.takes is not None and now >= pool.kept_until)


def _trouble(pool: PoolFacts, waiting: set[str]) -> tuple[bool, int, bool, int, float, Key]:
    """Least is best: what can be swapped now, an empty one before others; what nobody waits for; what is least busy."""
    busy = not pool.swappable
    return busy, loading_cost(pool), pool.takes in waiting, 0 if busy else pool.used, pool.load, pool.key


def served(wish: Wish, pools: Iterable[PoolFacts]) -> bool:
    """Whether a pool that the wish allows serves its model or loads it, if perhaps without a free slot."""
    return any(pool.takes == wish.model and pool.available and wanted(wish, pool) for pool in pools)


def bar(waiter: Waiter, pool: PoolFacts, aside: Plan, now: float, *, others_serve: bool) -> str | None:
    """Why this task may not go to a pool that has a place for it; None if it may.

    `others_serve`: other pools have its model. Then it waits for them as long as a load would take, before it has one
    loaded more: of the two that wait costs at most twice what the better one would have.
    """
    model = waiter.wish.model
    following = aside.get(pool.key)
    if following is not None and following.model != model:
        if pool.takes != model:
            return f"{following.model} is to be loaded there next: a task for it has waited longer"
        if waiter.turn_at > following.since:
            return f"tasks for {following.model} have waited longer: it is loaded there once nothing runs any more"
    if others_serve and pool.takes != model and now - waiter.enqueued_at < (patience_s := _patience_s(pool)):
        return f"others serve {model}: it is loaded there, too, for a task that has waited {patience_s:.0f} s"
    return None


def _patience_s(pool: PoolFacts) -> float:
    return min(MODEL_KEPT_S, LOAD_S if pool.load_s is None else pool.load_s)


def choose(
    waiter: Waiter, pools: Sequence[PoolFacts], aside: Plan, now: float, all_of_model: Callable[[], Sequence[PoolFacts]]
) -> Key | None:
    """What `pick` would, among those of `pools` that this task may go to. `all_of_model`: called where it matters
    whether others serve it."""
    wish = waiter.wish
    if not aside:
        picked = pick_serving(wish, pools)
        if picked is not None:
            return picked
        pools = [pool for pool in pools if pool.may_load(wish.model)]
        if not pools:
            return None
    others_serve = any(pool.takes != wish.model for pool in pools) and served(wish, all_of_model())
    return pick(wish, [pool for pool in pools if bar(waiter, pool, aside, now, others_serve=others_serve) is None])


def explained(waiter: Waiter, pools: Sequence[PoolFacts], aside: Plan, now: float) -> tuple[PoolFacts, ...]:
    """Of all pools, the facts as they are for this one task: with why it may not go where it might."""
    model = waiter.wish.model
    if not aside and not any(pool.swappable for pool in pools):
        return tuple(pools)
    others_serve = served(waiter.wish, pools)
    told = []
    for pool in pools:
        concerned = pool.takes == model or pool.may_load(model)
        why = bar(waiter, pool, aside, now, others_serve=others_serve) if concerned else None
        told.append(pool if why is None else replace(pool, barred=why))
    return tuple(told)


def latest(pools: Iterable[PoolFacts], model: str, aside: Plan) -> float:
    """Nobody who came after that may have a place in any of `pools`, which have one for `model`."""
    return max(
        (
            aside[pool.key].since if pool.key in aside and aside[pool.key].model != model else float("inf")
            for pool in pools
        ),
        default=float("-inf"),
    )
