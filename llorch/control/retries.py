"""Which tasks may be tried again, and when it is their turn.

Owns how often a task is tried, and how many are being tried again at a time: one over that waits in the queue, where it
is no load, and others pass it by. An attempt that was refused by a full pool, or lost with its node, was none. Never
chooses a pool, nor says what an error means.
"""

from __future__ import annotations

from collections.abc import Callable

from llorch.backoff import RetryBudget
from llorch.control.tasks import Task

MAX_RETRIES = 2
MAX_LOSSES = 3  # the third node lost under a task ends it
MOST_HELD = 64  # tasks that wait to be tried again; where more fail than that, trying again is no help


class Retries:
    """`running`: how many tasks run; a share of them may be in a retry, from its placement to its first byte."""

    def __init__(self, running: Callable[[], int]) -> None:
        self._running = running
        self._budget = RetryBudget()
        self._held: set[str] = set()

    def has_room(self, task: Task) -> bool:
        return self._budget.has_room(task.task_id, self._running())

    def may_go(self, task: Task) -> bool:
        """Whether a task that waits may be placed: for the first time, or because one more may be tried again."""
        return not task.retries or self.has_room(task)

    def goes(self, task: Task) -> None:
        """It was placed, right after `may_go`."""
        if task.retries:
            self._held.discard(task.task_id)
            self._budget.take(task.task_id, self._running())

    def holds(self, task: Task) -> bool:
        """Whether it waits for its turn rather than for a slot."""
        return task.task_id in self._held and not self.has_room(task)

    def lost(self, task: Task) -> str | None:
        """Its node was lost with it. Returns why it is not tried again, if so."""
        task.losses += 1
        return "it has lost its node often enough" if task.losses >= MAX_LOSSES else None

    def failed(self, task: Task) -> str | None:
        """An attempt of it failed. Returns why it is not tried again, if so."""
        task.retries += 1
        self._budget.give_back(task.task_id)
        if task.retries > MAX_RETRIES:
            return "it has been tried often enough"
        if len(self._held) >= MOST_HELD:
            return "too many wait to be tried again already"
        self._held.add(task.task_id)
        return None

    def over(self, task: Task) -> bool:
        """It has shown its first byte, or ended. True if it was being tried again, so that another may be."""
        self._held.discard(task.task_id)
        return self._budget.give_back(task.task_id)
