"""Has an engine stalled? It is busy for us, and nothing of it moves: no counter, no byte of any answer.

Surface:
    Watchdog(stall_s).look(key, busy=..., counters=..., answered=..., heard_at=..., now=...) -> bool
    forget(key)

Owns how long each engine has stood still, as far as somebody looked: a time in which nobody did, an agent that was
stopped or a machine that slept, says nothing of an engine. One look tells of a stall, once, until something moves
again. Never judges an idle engine, nor one that has no counters: a slow one would look the same. Pure.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

MOST_BETWEEN_LOOKS_S = 15.0  # three looks, at the pace of a supervisor; what is beyond is nobody's evidence


@dataclass(slots=True)
class _Watched:
    looked_at: float
    counters: tuple[float, ...] | None = None  # as last seen
    busy: bool = False  # as of the last look: of a time that began idle nobody knows how much was work
    still_s: float = 0.0
    told: bool = False


class Watchdog:
    """Times are monotonic seconds. One owner calls it."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._watched: dict[Hashable, _Watched] = {}

    def look(
        self,
        key: Hashable,
        *,
        busy: bool,
        counters: tuple[float, ...] | None,
        answered: bool,
        heard_at: float | None,
        now: float,
    ) -> bool:
        """Whether this is the moment in which the engine has stood still for `stall_s`.

        `busy`: tasks of ours hold slots of it. `answered`: its `/metrics` did; `counters` are what it said, None if it
        has none. `heard_at`: when a byte of any of its answers last came.
        """
        engine = self._watched.get(key)
        if engine is None:
            self._watched[key] = _Watched(now, counters if answered else None, busy)
            return False
        before, engine.looked_at = engine.looked_at, now
        worked, engine.busy = engine.busy, busy
        moved = answered and counters is not None and counters != engine.counters
        if answered and counters is not None:
            engine.counters = counters
        if moved or not (busy and worked):
            engine.still_s, engine.told = 0.0, False
            return False
        passed_s = min(max(0.0, now - before), MOST_BETWEEN_LOOKS_S)
        if heard_at is not None and heard_at >= before:
            engine.still_s, engine.told = min(max(0.0, now - heard_at), passed_s), False
        else:
            engine.still_s += passed_s
        if engine.told or engine.counters is None or engine.still_s < self._stall_s:
            return False
        engine.told = True
        return True

    def forget(self, key: Hashable) -> None:
        """The engine has ended, or another one has its name. One that was never looked at is no error."""
        self._watched.pop(key, None)
