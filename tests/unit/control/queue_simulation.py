"""A queue in virtual time: tasks arrive, wait in a real `Admission`, hold a slot for as long as was said, and end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from llorch.control.admission import Admission
from llorch.control.line import INTERACTIVE, Waiter
from llorch.control.placement import Wish
from llorch.errors import Code, LlorchError
from llorch.messages import Tail

MODEL = "m"


@dataclass(frozen=True)
class Arrival:
    at: float
    owner: str
    service_s: float = 1.0
    tokens: int = 100  # of output, which the queue learns at its end
    size: int = 400
    priority: str = INTERACTIVE


class Simulation:
    """`waits`: by principal, how long each of its tasks waited, in order of arrival. `refused`: how many were not."""

    def __init__(self, slots: int, limit: int | None = None) -> None:
        self.admission = Admission(limit)
        self.slots = self.free = slots
        self.now = 0.0
        self.waits: dict[str, list[float]] = {}
        self.refused: dict[str, int] = {}
        self._serial = count()
        self._events: list[tuple[float, int, object]] = []  # an Arrival, or the id of a task that ends
        self._tasks: dict[str, tuple[Arrival, int]] = {}

    def run(self, arrivals: Iterable[Arrival]) -> Simulation:
        for arrival in arrivals:
            heappush(self._events, (arrival.at, next(self._serial), arrival))
        while self._events:
            self.now, serial, event = heappop(self._events)
            if isinstance(event, Arrival):
                self._arrive(event, f"t{serial}")
            else:
                self._end(str(event))
            self._pump()
        assert len(self.admission) == 0
        return self

    def _arrive(self, arrival: Arrival, task_id: str) -> None:
        waits = self.waits.setdefault(arrival.owner, [])
        waiter = Waiter(task_id, Wish(MODEL), arrival.owner, self.now, arrival.priority, arrival.size)
        self._tasks[task_id] = arrival, len(waits)
        waits.append(0.0)
        self._pump()
        if self.free:
            self.free -= 1
            self.admission.given(waiter, self.now)
            self._begin(task_id)
            return
        try:
            self.admission.enqueue(waiter, self.now, self.slots)
        except LlorchError as error:
            assert error.code is Code.QUEUE_FULL
            waits.pop()
            self.refused[arrival.owner] = self.refused.get(arrival.owner, 0) + 1

    def _pump(self) -> None:
        for waiter, _ in self.admission.match(self._place, self.now):
            self._begin(waiter.task_id)

    def _place(self, waiter: Waiter) -> str | None:
        if not self.free:
            return None
        self.free -= 1
        return waiter.task_id

    def _begin(self, task_id: str) -> None:
        arrival, number = self._tasks[task_id]
        self.waits[arrival.owner][number] = self.now - arrival.at
        heappush(self._events, (self.now + arrival.service_s, next(self._serial), task_id))

    def _end(self, task_id: str) -> None:
        arrival, _ = self._tasks[task_id]
        self.free += 1
        tail = Tail(length=0, tokens_in=arrival.size // 4, tokens_out=arrival.tokens)
        self.admission.settle(task_id, tail, ran=True)
