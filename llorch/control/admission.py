"""The queue of tasks that wait for a slot.

Owns who waits, in which order, and how many may. Each model has its own line, so that a task nobody can serve yet holds
up none of another model; within a line it is first come, first served, and a task whose own wishes can't be met yet is
passed by those that can. Never chooses a pool or takes a claim: `match` asks its caller to.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from llorch.control.placement import Wish
from llorch.errors import Code, LlorchError

QUEUE_LIMIT = 1_000  # tasks; a body is held for each, so at a few hundred KB each this bounds memory too
MIN_RETRY_AFTER_MS = 1_000
MAX_RETRY_AFTER_MS = 30_000
MAX_ETA_MS = 3_600_000  # beyond an hour the guess says nothing

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Waiter:
    """A task that waits. Times are monotonic seconds; `front`: it was placed once, met a full pool or lost its node."""

    task_id: str
    wish: Wish
    enqueued_at: float
    expires_at: float
    front: bool = False


@dataclass(frozen=True, slots=True)
class _Entry:
    waiter: Waiter
    ahead: int  # how many stood before it when it came: with its wait so far, that tells how fast the line moves


class _Line:
    """The waiters of one model: those that came back first, by when they did, then the others in order of arrival."""

    __slots__ = ("back", "front")

    def __init__(self) -> None:
        self.front: list[Waiter] = []
        self.back: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self.front) + len(self.back)

    def __iter__(self) -> Iterator[Waiter]:
        yield from self.front
        for entry in self.back.values():
            yield entry.waiter

    def remove(self, waiter: Waiter) -> None:
        if waiter.front:
            self.front.remove(waiter)
        else:
            del self.back[waiter.task_id]

    def gap_s(self, now: float) -> float:
        """Seconds from one departure to the next, as the one that has stood in line longest has seen it."""
        head = next(iter(self.back.values()), None)
        return 0.0 if head is None else max(0.0, now - head.waiter.enqueued_at) / (head.ahead + 1)


class Admission:
    """Waiting tasks, at most `limit`; those that came back to the front don't count, for they were admitted once."""

    def __init__(self, limit: int = QUEUE_LIMIT) -> None:
        self._limit = limit
        self._lines: dict[str, _Line] = {}
        self._waiters: dict[str, Waiter] = {}
        self._counted = 0

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

    def depths(self) -> dict[str, int]:
        """Models with somebody waiting."""
        return {model: len(line) for model, line in self._lines.items()}

    def position(self, task_id: str) -> int | None:
        """Its place in its model's line, 1 is next; None if it doesn't wait."""
        waiter = self._waiters.get(task_id)
        if waiter is None:
            return None
        for place, other in enumerate(self._lines[waiter.wish.model], 1):
            if other is waiter:
                return place
        raise AssertionError("a waiter is in its line")

    def eta_ms(self, task_id: str, now: float) -> int | None:
        """A guess of its remaining wait, from how fast its line has moved; None if it doesn't wait."""
        place = self.position(task_id)
        if place is None:
            return None
        gap_s = self._lines[self._waiters[task_id].wish.model].gap_s(now)
        return min(MAX_ETA_MS, round(place * gap_s * 1000))

    # ---- in and out

    def enqueue(self, waiter: Waiter, now: float) -> None:
        """To the end of its line. Raises QUEUE_FULL, or CONFLICT if the task waits already."""
        self._check_new(waiter)
        if self._counted >= self._limit:
            raise LlorchError(
                Code.QUEUE_FULL,
                f"{self._counted} tasks wait already, the most that may",
                retry_after_ms=self._retry_after_ms(waiter.wish.model, now),
            )
        line = self._lines.setdefault(waiter.wish.model, _Line())
        kept = waiter if not waiter.front else _with_front(waiter, False)
        line.back[waiter.task_id] = _Entry(kept, len(line))
        self._waiters[waiter.task_id] = kept
        self._counted += 1

    def requeue_front(self, waiter: Waiter) -> None:
        """Before all that never left the queue; among those that came back, the earliest `enqueued_at` first."""
        self._check_new(waiter)
        kept = waiter if waiter.front else _with_front(waiter, True)
        line = self._lines.setdefault(waiter.wish.model, _Line())
        insort(line.front, kept, key=lambda other: other.enqueued_at)
        self._waiters[waiter.task_id] = kept

    def remove(self, task_id: str) -> Waiter | None:
        """Take a task out of the queue; None if it isn't there."""
        waiter = self._waiters.pop(task_id, None)
        if waiter is None:
            return None
        line = self._lines[waiter.wish.model]
        line.remove(waiter)
        if not waiter.front:
            self._counted -= 1
        if not len(line):
            del self._lines[waiter.wish.model]
        return waiter

    # ---- free slots

    def match(self, try_place: Callable[[Waiter], C | None]) -> list[tuple[Waiter, C]]:
        """Offer the free slots to the waiters in order; those that were placed have left the queue.

        `try_place` chooses a pool and takes its claim, or returns None; it must not raise, nor change the queue. When
        nothing is free this costs one call per model: a wish without constraints that found no slot means there is
        none for anybody behind it, and a constrained one is asked once per distinct wish.
        """
        placed: list[tuple[Waiter, C]] = []
        for line in list(self._lines.values()):
            hopeless: set[Wish] = set()
            for waiter in line:
                if hopeless and waiter.wish in hopeless:
                    continue
                claim = try_place(waiter)
                if claim is not None:
                    placed.append((waiter, claim))
                elif waiter.wish.constrained:
                    hopeless.add(waiter.wish)
                else:
                    break
        for waiter, _ in placed:
            self.remove(waiter.task_id)
        return placed

    # ---- inside

    def _check_new(self, waiter: Waiter) -> None:
        if waiter.task_id in self._waiters:
            raise LlorchError(Code.CONFLICT, f"task {waiter.task_id} waits already")

    def _retry_after_ms(self, model: str, now: float) -> int:
        """Until a tenth of the queue has moved on, as far as one can tell: sooner, most would be refused again."""
        line = self._lines.get(model)
        gap_s = 0.0 if line is None else line.gap_s(now)
        return min(MAX_RETRY_AFTER_MS, max(MIN_RETRY_AFTER_MS, round(gap_s * self._limit / 10 * 1000)))


def _with_front(waiter: Waiter, front: bool) -> Waiter:
    return Waiter(waiter.task_id, waiter.wish, waiter.enqueued_at, waiter.expires_at, front)
