"""The queue of tasks that wait for a slot.

Owns who waits, in which order, and how many may. Each model has its own line, so that a task nobody can serve yet holds
up none of another model. Within a line come first the tasks that were placed before and came back; then interactive
ones before batch ones, where a batch task that has waited a minute counts as interactive; then the principal that has
been given least (`fairness`); then who came first. A task whose own wishes can't be met yet is passed by those that
can. Never chooses a pool or takes a claim: `match` asks its caller to.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, merge
from itertools import dropwhile, takewhile
from typing import TypeVar

from llorch.control.fairness import Shares
from llorch.control.placement import PoolFacts, Wish
from llorch.errors import Code, LlorchError
from llorch.messages import Tail

MIN_WAITING = 64  # tasks per model that may wait, however few slots it has
WAITING_PER_SLOT = 4  # beyond that: a wait of about four tasks' time; who waits longer does better elsewhere
SHARE = 0.25  # of a line, for one principal while another waits too
SHARE_ALONE = 0.75  # while it waits alone, and another was seen lately: that one shall find room
SEEN_LATELY_S = 600.0
BODY_LIMIT = 256 << 20  # bytes of all waiting tasks' bodies
MAX_LINES = 1_000  # models with somebody waiting, and models whose counters are kept
BATCH_AGES_S = 60.0  # half of an interactive task's timeout: batch is served late, and before interactive gives up
MIN_RETRY_AFTER_MS = 1_000
MAX_RETRY_AFTER_MS = 30_000
MAX_ETA_MS = 3_600_000  # beyond an hour the guess says nothing
PACE_WINDOW_S = 60.0  # departures in it tell how fast a line moves
PACE_DEPARTURES = 1_000  # of them at most
PACE_KEPT_S = 600.0  # a line that was empty for longer may move quite differently
SURE_DEPARTURES = 5  # fewer say too little to refuse a task for; as many are kept of a line that moves slowly
ORDER_KEPT_S = 0.5  # of a long line; of a short one, 1 ms for each that waits: an order costs some microseconds a head

INTERACTIVE, BATCH = "interactive", "batch"
LOADING_STATES = frozenset({"starting", "loading"})

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Waiter:
    """A task that waits. Times are monotonic seconds.

    `enqueued_at`: when it came, or was first admitted if it comes back. `front`: it was placed once, met a full pool or
    lost its node; it has its place before all others, and outside the bounds. `size`: bytes of its body.
    """

    task_id: str
    wish: Wish
    owner: str
    enqueued_at: float
    priority: str = INTERACTIVE
    size: int = 0
    deadline_at: float | None = None
    front: bool = False

    @property
    def turn_at(self) -> float:
        """When it became interactive: what it is ordered by among those."""
        return self.enqueued_at + BATCH_AGES_S if self.priority == BATCH else self.enqueued_at


def serving_slots(model: str, pools: Iterable[PoolFacts]) -> int:
    """How many slots the pools have that serve `model` now."""
    return sum(pool.slots_total for pool in pools if pool.model == model and pool.ready and pool.online)


def being_loaded(model: str, pools: Iterable[PoolFacts]) -> bool:
    """Whether no pool is ready with `model`, and one that has or can load it is on its way. `pools`: those that can."""
    loading = False
    for pool in pools:
        if pool.online and pool.ready and pool.model == model:
            return False
        loading = loading or (pool.online and pool.state in LOADING_STATES)
    return loading


# ---------------------------------------------------------------- one line


class _Pace:
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


class _Line:
    """The waiters of one model, and what outlives their absence: the shares of the principals, the pace."""

    __slots__ = ("counted", "front", "mine", "pace", "placed_at", "places", "shares")

    def __init__(self) -> None:
        self.front: list[Waiter] = []
        self.mine: dict[str, _Mine] = {}  # of principals with somebody waiting, who did not come back
        self.counted = 0  # all of those
        self.shares = Shares()
        self.pace = _Pace()
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

    def order(self, now: float) -> list[Waiter]:
        return list(self.in_turn(now, lambda _: True))

    def place_of(self, waiter: Waiter, now: float) -> int:
        """From an order that is kept for a moment; who came since then is told the last place."""
        if now - self.placed_at > min(ORDER_KEPT_S, len(self) / 1_000):
            self.places = {other.task_id: place for place, other in enumerate(self.order(now), 1)}
            self.placed_at = now
        return min(self.places.get(waiter.task_id, len(self)), len(self))


# ---------------------------------------------------------------- all lines


@dataclass(frozen=True, slots=True)
class _Charge:
    shares: Shares
    owner: str
    charged: float


class Admission:
    """Waiting tasks. Those that came back don't count against the bounds, for they were admitted once.

    `limit`: how many may wait for one model; None: 4 for each of its slots, and 64 at least.
    """

    def __init__(self, limit: int | None = None, body_limit: int = BODY_LIMIT) -> None:
        self._limit = limit
        self._body_limit = body_limit
        self._lines: dict[str, _Line] = {}
        self._waiters: dict[str, Waiter] = {}
        self._charges: dict[str, _Charge] = {}  # of tasks that were given a slot and have not ended
        self._bodies = 0  # bytes

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._waiters

    def depth(self, model: str | None = None) -> int:
        """How many wait, for one model or in all."""
        if model is None:
            return len(self._waiters)
        line = self._lines.get(model)
        return 0 if line is None else len(line)

    def depths(self) -> dict[tuple[str, str], int]:
        """How many wait by (model, priority), where anybody does."""
        counts: dict[tuple[str, str], int] = {}
        for waiter in self._waiters.values():
            key = (waiter.wish.model, waiter.priority)
            counts[key] = counts.get(key, 0) + 1
        return counts

    def order(self, model: str, now: float) -> list[str]:
        """The tasks that wait for a model, in the order in which slots would go to them now."""
        line = self._lines.get(model)
        return [] if line is None else [waiter.task_id for waiter in line.order(now)]

    def position(self, task_id: str, now: float) -> int | None:
        """Its place in its model's line, 1 is next; None if it doesn't wait. At most half a second old."""
        waiter = self._waiters.get(task_id)
        return None if waiter is None else self._lines[waiter.wish.model].place_of(waiter, now)

    def eta_ms(self, task_id: str, now: float) -> int | None:
        """A guess of its remaining wait, from how fast its line has moved; None if it doesn't wait."""
        place = self.position(task_id, now)
        if place is None:
            return None
        return _eta_ms(place * self._lines[self._waiters[task_id].wish.model].pace.gap_s(now))

    # ---- in and out

    def enqueue(self, waiter: Waiter, now: float, slots: int) -> None:
        """Into the line of its model, which has `slots` slots now.

        Raises QUEUE_FULL, DEADLINE_EXCEEDED if it would wait beyond its deadline, by all that is known; CONFLICT if the
        task waits already. One that came back is refused only for that last reason.
        """
        if waiter.task_id in self._waiters:
            raise LlorchError(Code.CONFLICT, f"task {waiter.task_id} waits already")
        if not waiter.front:
            self._check_lines(waiter)
        line = self._line(waiter.wish.model)
        line.shares.slots = slots
        line.shares.seen(waiter.owner, now)
        if not waiter.front:
            self._check_bounds(line, waiter, now)
            self._bodies += waiter.size
        line.add(waiter, now)
        self._waiters[waiter.task_id] = waiter
        if not waiter.front and waiter.deadline_at is not None:
            try:
                _check_deadline(line, waiter, waiter.deadline_at - now, now)
            except LlorchError:
                self.remove(waiter.task_id, now)
                raise

    def remove(self, task_id: str, now: float) -> Waiter | None:
        """Take a task out of the queue; None if it isn't there."""
        waiter = self._waiters.pop(task_id, None)
        if waiter is None:
            return None
        self._lines[waiter.wish.model].remove(waiter, now)
        if not waiter.front:
            self._bodies -= waiter.size
        return waiter

    # ---- slots

    def match(
        self, try_place: Callable[[Waiter], C | None], now: float, model: str | None = None
    ) -> list[tuple[Waiter, C]]:
        """Offer the free slots to the waiters in order, or to those of one model; who was placed has left the queue.

        `try_place` chooses a pool and takes its claim, or returns None; it must not raise, nor change the queue. When
        nothing is free this costs one call per model: a wish without constraints that found no slot means there is
        none for anybody behind it, and a constrained one is asked once per distinct wish.
        """
        placed: list[tuple[Waiter, C]] = []
        for name in list(self._lines) if model is None else [model]:
            line = self._lines.get(name)
            if line is None or not len(line):
                continue
            claims: dict[str, C] = {}
            hopeless: set[Wish] = set()
            for waiter in line.in_turn(now, lambda waiter, claims=claims: waiter.task_id in claims):  # type: ignore[misc]
                if hopeless and waiter.wish in hopeless:
                    continue
                claim = try_place(waiter)
                if claim is not None:
                    claims[waiter.task_id] = claim
                elif waiter.wish.constrained:
                    hopeless.add(waiter.wish)
                else:
                    break
            for task_id, claim in claims.items():
                waiter = self._waiters[task_id]
                line.pace.departed(now)
                self.given(waiter, now)
                self.remove(task_id, now)
                placed.append((waiter, claim))
        return placed

    def given(self, waiter: Waiter, now: float) -> None:
        """A slot was given to this task, which may have waited for it or not: its principal is charged, once a task."""
        line = self._line(waiter.wish.model)
        line.shares.seen(waiter.owner, now)
        if waiter.task_id not in self._charges:
            charged = line.shares.charge(waiter.owner, waiter.size)
            self._charges[waiter.task_id] = _Charge(line.shares, waiter.owner, charged)

    def settle(self, task_id: str, tail: Tail | None, *, ran: bool) -> None:
        """A task has ended: what was charged for it gives way to what it cost. Nothing for one that had no slot."""
        charge = self._charges.pop(task_id, None)
        if charge is not None:
            charge.shares.settle(charge.owner, charge.charged, tail, ran=ran)

    # ---- inside

    def _line(self, model: str) -> _Line:
        line = self._lines.get(model)
        if line is None:
            if len(self._lines) >= MAX_LINES:
                empty = next((name for name, other in self._lines.items() if not len(other)), None)
                if empty is not None:
                    del self._lines[empty]
            line = self._lines[model] = _Line()
        return line

    def _check_lines(self, waiter: Waiter) -> None:
        """Clients may name models that nobody has while a control waits for its nodes; not any number of them."""
        if waiter.wish.model in self._lines or len(self._lines) < MAX_LINES:
            return
        if all(len(line) for line in self._lines.values()):
            raise LlorchError(
                Code.QUEUE_FULL,
                f"tasks wait for {MAX_LINES} models already, the most that may be",
                retry_after_ms=MAX_RETRY_AFTER_MS,
            )

    def _check_bounds(self, line: _Line, waiter: Waiter, now: float) -> None:
        bound = max(MIN_WAITING, WAITING_PER_SLOT * line.shares.slots) if self._limit is None else self._limit
        own, owners = line.waiting_of(waiter.owner), len(line.mine)
        share, why = bound, ""
        if line.another_waits(waiter.owner):
            share, why = max(1, int(bound * SHARE)), "while others wait too"
        elif line.shares.another_seen(waiter.owner, now - SEEN_LATELY_S):
            share, why = max(1, int(bound * SHARE_ALONE)), "to leave room for others"
        if line.counted >= bound:
            raise _full(f"{line.counted} tasks wait for {waiter.wish.model}, the most that may", line, bound, now)
        if own >= share:
            message = f"{own} of your tasks wait for {waiter.wish.model}, the most that may {why}"
            raise _full(message, line, share * owners, now)
        if self._bodies + waiter.size > self._body_limit:
            message = f"the bodies of waiting tasks would be more than {self._body_limit} bytes"
            raise _full(message, line, line.counted, now)


def _full(message: str, line: _Line, length: int, now: float) -> LlorchError:
    """Worth a retry once a tenth of `length` has moved on, as far as one can tell: sooner, most are refused again."""
    after_ms = round(line.pace.gap_s(now) * length / 10 * 1_000)
    return LlorchError(
        Code.QUEUE_FULL, message, retry_after_ms=min(MAX_RETRY_AFTER_MS, max(MIN_RETRY_AFTER_MS, after_ms))
    )


def _check_deadline(line: _Line, waiter: Waiter, left_s: float, now: float) -> None:
    """Raises DEADLINE_EXCEEDED for one that just came and can't be served in time, if the line's pace is well known.

    Not for the first in line: if nobody could wait because of a pace that once was, nobody would see it change.
    """
    gap_s = line.pace.gap_s(now)
    if line.pace.departures < SURE_DEPARTURES or len(line) * gap_s <= left_s:
        return
    place = next(place for place, other in enumerate(line.in_turn(now, lambda _: True), 1) if other is waiter)
    eta_ms = _eta_ms(place * gap_s)
    if place > 1 and eta_ms > left_s * 1_000:
        raise LlorchError(
            Code.DEADLINE_EXCEEDED,
            f"a slot is expected in {eta_ms / 1_000:.1f} s (place {place} in line), the deadline is in {left_s:.1f} s",
            details={"eta_ms": eta_ms, "deadline_ms": round(left_s * 1_000)},
        )


def _eta_ms(seconds: float) -> int:
    return min(MAX_ETA_MS, round(seconds * 1_000))
