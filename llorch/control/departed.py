"""The models that were here a moment ago: a node that is restarted leaves first, and is back soon.

Owns for how long a model that nobody has any more is "not available" and not yet "not found". Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

DEPARTED_S = 60.0  # a restart takes seconds, loading a large model again a minute; then its absence is meant
MAX_DEPARTED = 1_000  # the oldest go: a model more than that is not found at once, which is no more than untimely


class Departed:
    def __init__(self) -> None:
        self._left_at: dict[str, float] = {}  # those that left last come last

    @property
    def models(self) -> frozenset[str]:
        return frozenset(self._left_at)

    def left(self, models: Iterable[str], now: float) -> None:
        for model in models:
            self._left_at.pop(model, None)
            self._left_at[model] = now
        while len(self._left_at) > MAX_DEPARTED:
            del self._left_at[next(iter(self._left_at))]

    def forget(self, now: float) -> bool:
        """Those whose time is up. True if there were any."""
        before = len(self._left_at)
        while self._left_at and now - self._left_at[first := next(iter(self._left_at))] >= DEPARTED_S:
            del self._left_at[first]
        return len(self._left_at) != before
