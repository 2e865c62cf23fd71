"""The queue of tasks that wait for a slot.

Owns who waits and who may not: the bounds per model, per principal and in bytes, and the deadlines that can't be met.
Each model has its own line (`line`), so that a task nobody can serve yet holds up none of another model; one whose own
wishes can't be met yet is passed by those that can. Never chooses a pool or takes a claim: `match` asks its caller to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from llorch.control.fairness import Shares
from llorch.control.line import SURE_DEPARTURES, Limits, Line, Waiter
from llorch.control.placement import LOADING_STATES, PoolFacts
from llorch.errors import Code, LlorchError
from llorch.messages import Tail

MIN_WAITING = 64  # tasks per model that may wait, however few slots it has
WAITING_PER_SLOT = 4  # beyond that: a wait of about four tasks' time; who waits longer does better elsewhere
SHARE = 0.25  # of a line, or of the bytes of all bodies, for one principal while another waits too
SHARE_ALONE = 0.75  # while it waits alone, and another was seen lately: that one shall find room
SEEN_LATELY_S = 600.0
BODY_LIMIT = 256 << 20  # bytes of all waiting tasks' bodies
MAX_LINES = 1_000  # models with somebody waiting, and models whose counters are kept; beside those that nodes have
MAX_LEFT = 10_000  # tasks whose clients left, and that are still to be charged what they cost; the oldest go
MAX_HOPELESS = 32  # different limits that are tried in vain at once: each costs a look at every pool
MIN_RETRY_AFTER_MS = 1_000
MAX_RETRY_AFTER_MS = 30_000

C = TypeVar("C")


def serving_slots(model: str, pools: Iterable[PoolFacts]) -> int:
    """How many slots the pools have that serve `model` now, are loading it, or would at once."""
    return sum(pool.slots_total for pool in pools if pool.online and (pool.takes == model or pool.may_load(model)))


def being_loaded(model: str, pools: Iterable[PoolFacts]) -> bool:
    """Whether no pool is ready with `model`, and one that has or can load it is on its way. `pools`: those that can."""
    loading = False
    for pool in pools:
        if pool.online and pool.ready and pool.model == model and pool.loading is None:
            return False
        loading = loading or (pool.online and (pool.loading is not None or pool.state in LOADING_STATES))
    return loading


# ---------------------------------------------------------------- all lines


@dataclass(slots=True, unsafe_hash=True)  # see placement.PoolFacts
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
        self._lines: dict[str, Line] = {}
        self._waiters: dict[str, Waiter] = {}
        self._charges: dict[str, _Charge] = {}  # of tasks that were given a slot and have not ended
        self._left: dict[tuple[str, int], _Charge] = {}  # by task and attempt: their clients left, their nodes go on
        self._bodies: dict[str, int] = {}  # bytes, by principal; of those that have any

    def bound(self, limit: int | None, body_limit: int) -> None:
        """Other bounds, for who comes from now on."""
        self._limit, self._body_limit = limit, body_limit

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

    def etas_ms(self, now: float) -> dict[str, int]:
        """The wait at the end of each model's line: a guess, where anybody waits and one has left before."""
        found = {model: line.pace.eta_ms(len(line) + 1, now) for model, line in self._lines.items() if len(line)}
        return {model: eta_ms for model, eta_ms in found.items() if eta_ms is not None}

    def by_age(self) -> list[tuple[str, Iterator[Waiter]]]:
        """The models that anybody waits for, each with who does, those first who have waited longest."""
        return [(model, line.by_age()) for model, line in self._lines.items() if len(line)]

    def oldest(self, model: str) -> Waiter | None:
        """Who has waited longest for a model."""
        line = self._lines.get(model)
        return None if line is None else next(line.by_age(), None)

    def order(self, model: str, now: float) -> list[str]:
        """The tasks that wait for a model, in the order in which slots would go to them now."""
        line = self._lines.get(model)
        return [] if line is None else [waiter.task_id for waiter in line.order(now)]

    def position(self, task_id: str, now: float) -> int | None:
        """Its place in its model's line, 1 is next; None if it doesn't wait. At most half a second old."""
        waiter = self._waiters.get(task_id)
        return None if waiter is None else self._lines[waiter.wish.model].place_of(waiter, now)

    def eta_ms(self, task_id: str, now: float) -> int | None:
        """A guess of its remaining wait, from how fast its line moved; None if it doesn't wait, or none left yet."""
        place = self.position(task_id, now)
        return None if place is None else self._lines[self._waiters[task_id].wish.model].pace.eta_ms(place, now)

    # ---- in and out

    def enqueue(self, waiter: Waiter, now: float, slots: int, *, known: bool = False) -> None:
        """Into the line of its model, which has `slots` slots now. `known`: some node has the model.

        Raises QUEUE_FULL, DEADLINE_EXCEEDED if it would wait beyond its deadline, by all that is known; CONFLICT if the
        task waits already. One that came back is refused only for that last reason.
        """
        if waiter.task_id in self._waiters:
            raise LlorchError(Code.CONFLICT, f"task {waiter.task_id} waits already")
        if not waiter.front and not known:
            self._check_lines(waiter)
        line = self._line(waiter.wish.model)
        line.shares.slots = slots
        line.shares.seen(waiter.owner, now)
        if not waiter.front:
            self._check_bounds(line, waiter, now)
            if waiter.size:
                self._bodies[waiter.owner] = self._bodies.get(waiter.owner, 0) + waiter.size
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
        if not waiter.front and waiter.size:
            self._bodies[waiter.owner] -= waiter.size
            if not self._bodies[waiter.owner]:
                del self._bodies[waiter.owner]
        return waiter

    # ---- slots

    def match(
        self,
        try_place: Callable[[Waiter], C | None],
        now: float,
        model: str | None = None,
        *,
        any_free: Callable[[str], bool] = lambda _: True,
        may_go: Callable[[Waiter], bool] = lambda _: True,
    ) -> list[tuple[Waiter, C]]:
        """Offer the free slots to the waiters in order, or to those of one model; who was placed has left the queue.

        `try_place` chooses a pool and takes its claim, or returns None; it must not raise, nor change the queue. When
        nothing is free this costs one call per model: a wish without constraints that found no slot means there is
        none for anybody behind it, and of those with the same limits one is asked. Of more than 32 different limits
        the rest have their turn at the next call: clients choose them. `any_free` may say that a model has no free slot
        at all, which spares working out whose turn it would be. A task that may not go just now (`may_go`, asked right
        before `try_place`) keeps its place and is passed by.
        """
        placed: list[tuple[Waiter, C]] = []
        for name in list(self._lines) if model is None else [model]:
            line = self._lines.get(name)
            if line is not None and len(line) and any_free(name):
                placed += self._match_line(line, try_place, now, may_go)
        return placed

    def _match_line(
        self, line: Line, try_place: Callable[[Waiter], C | None], now: float, may_go: Callable[[Waiter], bool]
    ) -> list[tuple[Waiter, C]]:
        claims: dict[str, C] = {}
        hopeless: set[Limits] = set()
        unasked = False
        for waiter in line.in_turn(now, lambda waiter: waiter.task_id in claims):
            limits = waiter.limits
            if limits is not None and (limits in hopeless or limits in line.asked):
                continue
            if not may_go(waiter):
                continue
            if limits is not None and len(hopeless) >= MAX_HOPELESS:
                unasked = True
                continue
            claim = try_place(waiter)
            if claim is not None:
                claims[waiter.task_id] = claim
            elif limits is not None:
                hopeless.add(limits)
            else:
                break
        # No more are kept than wait, so that those who were asked first are asked again, whoever comes meanwhile.
        line.asked = line.asked | hopeless if unasked and len(line.asked) < len(line) else frozenset()
        placed = [(self._waiters[task_id], claim) for task_id, claim in claims.items()]
        for waiter, _ in placed:
            line.pace.departed(now)
            self.given(waiter, now)
            self.remove(waiter.task_id, now)
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

    def leave(self, task_id: str, attempt: int) -> None:
        """A task has ended here, for its client left; its node decides what becomes of it. The estimate stands until
        somebody says what it cost (`ended_elsewhere`), and for good where nobody does."""
        charge = self._charges.pop(task_id, None)
        if charge is not None:
            self._left[task_id, attempt] = charge
            while len(self._left) > MAX_LEFT:
                del self._left[next(iter(self._left))]

    def ended_elsewhere(self, task_id: str, attempt: int, tail: Tail) -> None:
        """What such an attempt has cost. Nothing for any other."""
        charge = self._left.pop((task_id, attempt), None)
        if charge is not None:
            charge.shares.settle(charge.owner, charge.charged, tail, ran=True)

    # ---- inside

    def _line(self, model: str) -> Line:
        """The line of a model. The one that was used last comes last; of too many, the first empty one goes."""
        line = self._lines.pop(model, None)
        if line is None and len(self._lines) >= MAX_LINES:
            empty = next((name for name, other in self._lines.items() if not len(other)), None)
            if empty is not None:
                del self._lines[empty]
        self._lines[model] = Line() if line is None else line
        return self._lines[model]

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

    def _check_bounds(self, line: Line, waiter: Waiter, now: float) -> None:
        bound = max(MIN_WAITING, WAITING_PER_SLOT * line.shares.slots) if self._limit is None else self._limit
        own, owners = line.waiting_of(waiter.owner), len(line.mine)
        share, why = bound, ""
        if line.another_waits(waiter.owner):
            share, why = max(1, int(bound * SHARE)), " while others wait too"
        elif line.shares.another_seen(waiter.owner, now - SEEN_LATELY_S):
            share, why = max(1, int(bound * SHARE_ALONE)), "; the rest is kept for others"
        if line.counted >= bound:
            raise _full(f"{line.counted} tasks wait for {waiter.wish.model}, the most that may", line, bound, now)
        if own >= share:
            message = f"{own} of your tasks wait for {waiter.wish.model}, the most that may{why}"
            raise _full(message, line, share * owners, now)
        too_many = self._too_many_bytes(waiter, now)
        if too_many is not None:
            raise _full(too_many, line, line.counted, now)

    def _too_many_bytes(self, waiter: Waiter, now: float) -> str | None:
        """Why its body would be too much, over all lines. One body of a principal's is never more than its share."""
        if sum(self._bodies.values()) + waiter.size > self._body_limit:
            return f"the bodies of waiting tasks would be more than {self._body_limit} bytes"
        own = self._bodies.get(waiter.owner, 0)
        if not own:
            return None
        share, why = self._body_limit, ""
        if len(self._bodies) > 1:
            share, why = int(self._body_limit * SHARE), " while others wait too"
        elif own + waiter.size > self._body_limit * SHARE_ALONE and any(
            line.shares.another_seen(waiter.owner, now - SEEN_LATELY_S) for line in self._lines.values()
        ):
            share, why = int(self._body_limit * SHARE_ALONE), "; the rest is kept for others"
        if own + waiter.size <= share:
            return None
        return f"the bodies of your waiting tasks would be more than {share} bytes, the most that may be{why}"


def _full(message: str, line: Line, length: int, now: float) -> LlorchError:
    """Worth a retry once a tenth of `length` has moved on, as far as one can tell: sooner, most are refused again."""
    after_ms = round(line.pace.gap_s(now) * length / 10 * 1_000)
    return LlorchError(
        Code.QUEUE_FULL, message, retry_after_ms=min(MAX_RETRY_AFTER_MS, max(MIN_RETRY_AFTER_MS, after_ms))
    )


def _check_deadline(line: Line, waiter: Waiter, left_s: float, now: float) -> None:
    """Raises DEADLINE_EXCEEDED for one that just came and can't be served in time, if the line's pace is well known.

    Not for the first in line: if nobody could wait because of a pace that once was, nobody would see it change.
    """
    at_most_ms = line.pace.eta_ms(len(line), now)
    if at_most_ms is None or line.pace.departures < SURE_DEPARTURES or at_most_ms <= left_s * 1_000:
        return
    place = next(place for place, other in enumerate(line.in_turn(now, lambda _: True), 1) if other is waiter)
    eta_ms = line.pace.eta_ms(place, now)
    if eta_ms is not None and place > 1 and eta_ms > left_s * 1_000:
        raise LlorchError(
            Code.DEADLINE_EXCEEDED,
            f"a slot is expected in {eta_ms / 1_000:.1f} s (place {place} in line), the deadline is in {left_s:.1f} s",
            details={"eta_ms": eta_ms, "deadline_ms": round(left_s * 1_000)},
        )
