"""The waiting line of one model: who stands in it, whose turn it is, and how fast it moves. Pure.

Owns the order: first the tasks that were placed before and came back; then interactive ones before batch ones, where a
batch task that has waited a minute counts as interactive; then the principal that has been given least (`fairness`);
then who came first. Owns the place and the pace that a waiter is told. Never refuses anybody (`admission` does).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, merge
from itertools import dropwhile, takewhile

from llorch.control.fairness import Shares
from llorch.control.placement import Wish

BATCH_AGES_S = 60.0  # half of an interactive task's timeout: batch is served late, and before interactive gives up
PACE_WINDOW_S = 60.0  # departures in it tell how fast a line moves
PACE_DEPARTURES = 1_000  # of them at most
PACE_KEPT_S = 600.0  # a line that was empty for longer may move quite differently
SURE_DEPARTURES = 5  # fewer say too little to refuse a task for; as many are kept of a line that moves slowly
MAX_ETA_MS = 3_600_000  # beyond an hour the guess says nothing
ORDER_KEPT_S = 0.5  # of a long line; of a short one, 1 ms for each that waits: an order costs some microseconds a head

INTERACTIVE, BATCH = "interactive", "batch"


Limits = tuple[str | None, str | None, frozenset[tuple[str, str]], tuple[str, ...], tuple[str, ...]]


def limits(wish: Wish) -> Limits | None:
    """What may keep a task from a free slot of its model; None if nothing does. Where a wish with the same limits
    finds no slot, this one finds none: what only orders the pools is no part of them."""
    if not wish.constrained:
        return None
    strict = not wish.allow_fallback
    return wish.pin, wish.zone, wish.exclude, wish.prefer if strict else (), wish.avoid if strict else ()


@dataclass(slots=True, unsafe_hash=True)  # see placement.PoolFacts
class Waiter:
    """A task that waits; never changed. Times are monotonic seconds.

    `enqueued_at`: when it came, or was first admitted if it comes back. `front`: it was placed once, and
    showed nothing; it has its place before all others, and outside the bounds. `size`: bytes of its body. `limits`:
    those of its wish.
    """

    task_id: str
    wish: Wish
    owner: str
    enqueued_at: float
    priority: str = INTERACTIVE
    size: int = 0
    deadline_at: float | None = None
    front: bool = False
    limits: Limits | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self.limits = limits(self.wish)

    @property
    def turn_at(self) -> float:
        """When it became interactive: what it is ordered by among those."""
        return self.enqueued_at + BATCH_AGES_S if self.priority == BATCH else self.enqueued_at


class Pace:
    """How fast a line moves: its last departures, on a clock that stands still while nobody waits."""

    __slots__ = ("_clock_s", "_since", "_stamps", "_stopped_at")

    def __init__(self) -> None:
        self._clock_s = 0.0
        self._since: float | None = None
        self._stopped_at = float("-inf")
        self._stamps: deque[float] = deque([0.0], maxlen=PACE_DEPARTURES + 1)  # the first is where counting began

    @property
    def departures(self) -> int:
        return len(self._stamps) - 1

    def start(self, now: float) -> None:
        """Somebody waits from now on."""
        if self._since is None:
            self._since = now
            if now - self._stopped_at > PACE_KEPT_S:
                self._stamps.clear()
                self._stamps.append(self._clock_s)

    def stop(self, now: float) -> None:
        self._clock_s, self._since, self._stopped_at = self._clock(now), None, now

    def departed(self, now: float) -> None:
        clock_s = self._clock(now)
        self._stamps.append(clock_s)
        while self._stamps[0] < clock_s - PACE_WINDOW_S and self.departures > SURE_DEPARTURES:
            self._stamps.popleft()

    def gap_s(self, now: float) -> float:
        """Seconds from one departure to the next. The one under way counts, so that a line that stands gets slower."""
        return (self._clock(now) - self._stamps[0]) / len(self._stamps)

    def eta_ms(self, place: int, now: float) -> int | None:
        """When the one at `place` may leave, 1 being next: a guess. None before anybody has left."""
        if not self.departures:
            return None
        return min(MAX_ETA_MS, round(place * self.gap_s(now) * 1_000))

    def _clock(self, now: float) -> float:
        return self._clock_s if self._since is None else self._clock_s + max(0.0, now - self._since)


@dataclass(slots=True)
class _Mine:
    """The waiting tasks of one principal in one line, those of each priority in order of arrival."""

    interactive: dict[str, Waiter] = field(default_factory=dict)
    batch: dict[str, Waiter] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.interactive) + len(self.batch)

    def of(self, priority: str) -> dict[str, Waiter]:
        return self.batch if priority == BATCH else self.interactive

    def urgent(self, now: float) -> Iterator[Waiter]:
        """The interactive ones, and the batch ones that have become so."""
        if not self.batch:
            return iter(self.interactive.values())
        aged = takewhile(lambda waiter: waiter.turn_at <= now, self.batch.values())
        return merge(self.interactive.values(), aged, key=lambda waiter: waiter.turn_at)

    def patient(self, now: float) -> Iterator[Waiter]:
        return dropwhile(lambda waiter: waiter.turn_at <= now, self.batch.values())


class Line:
    """The waiters of one model, and what outlives their absence: the shares of the principals, the pace."""

    __slots__ = ("asked", "counted", "front", "mine", "pace", "placed_at", "places", "shares")

    def __init__(self) -> None:
        self.front: list[Waiter] = []
        self.mine: dict[str, _Mine] = {}  # of principals with somebody waiting, who did not come back
        self.counted = 0  # all of those
        self.shares = Shares()
        self.pace = Pace()
        self.asked: frozenset[Limits] = frozenset()  # in vain, by an offer of slots that has not come to the line's end
        self.places: dict[str, int] = {}  # as of `placed_at`
        self.placed_at = float("-inf")

    def __len__(self) -> int:
        return len(self.front) + self.counted

    def add(self, waiter: Waiter, now: float) -> None:
        self.pace.start(now)
        if waiter.front:
            insort(self.front, waiter, key=lambda other: other.enqueued_at)
        else:
            self.mine.setdefault(waiter.owner, _Mine()).of(waiter.priority)[waiter.task_id] = waiter
            self.counted += 1

    def remove(self, waiter: Waiter, now: float) -> None:
        if waiter.front:
            self.front.remove(waiter)
        else:
            mine = self.mine[waiter.owner]
            del mine.of(waiter.priority)[waiter.task_id]
            if not len(mine):
                del self.mine[waiter.owner]
            self.counted -= 1
        if not len(self):
            self.pace.stop(now)

    def waiting_of(self, owner: str) -> int:
        mine = self.mine.get(owner)
        return 0 if mine is None else len(mine)

    def another_waits(self, owner: str) -> bool:
        return any(name != owner for name in self.mine) or any(waiter.owner != owner for waiter in self.front)

    def in_turn(self, now: float, got_slot: Callable[[Waiter], bool]) -> Iterator[Waiter]:
        """Everybody, in the order in which slots go to them. `got_slot` is asked when the next one is wanted.

        The line must not change meanwhile.
        """
        yield from self.front
        counters = {owner: self.shares.counter(owner) for owner in self.mine}
        for urgent in (True, False):
            heap: list[tuple[float, float, str, Waiter, Iterator[Waiter]]] = []  # no two have the same owner
            for owner, mine in self.mine.items():
                waiters = mine.urgent(now) if urgent else mine.patient(now)
                first = next(waiters, None)
                if first is not None:
                    heap.append((counters[owner], first.turn_at, owner, first, waiters))
            heapify(heap)
            while heap:
                _, _, owner, waiter, waiters = heappop(heap)
                yield waiter
                if got_slot(waiter):
                    counters[owner] += self.shares.estimate(owner, waiter.size)
                following = next(waiters, None)
                if following is not None:
                    heappush(heap, (counters[owner], following.turn_at, owner, following, waiters))

    def by_age(self) -> Iterator[Waiter]:
        """Everybody, those first who have waited longest; what is batch has waited that much less."""
        queues = [queue.values() for mine in self.mine.values() for queue in (mine.interactive, mine.batch) if queue]
        return merge(self.front, *queues, key=lambda waiter: waiter.turn_at)

    def order(self, now: float) -> list[Waiter]:
        return list(self.in_turn(now, lambda _: True))

    def place_of(self, waiter: Waiter, now: float) -> int:
        """From an order that is kept for a moment; who came since then is told the last place."""
        if now - self.placed_at > min(ORDER_KEPT_S, len(self) / 1_000):
            self.places = {other.task_id: place for place, other in enumerate(self.order(now), 1)}
            self.placed_at = now
        return min(self.places.get(waiter.task_id, len(self)), len(self))
