"""One staging as it goes: how far it is and how fast, and how that reads; and the rate that all of them keep together.

Owns those figures. What is done is `staging`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from llorch.config_kinds import MODEL_REF
from llorch.errors import LlorchError
from llorch.ratelimit import Gcra, Rate
from llorch.wishes import StageOrder

SPEED_WINDOW_S = 5.0
MARK_EVERY_S = 0.1
BURST_BYTES = 256 * 1024  # what may come at once under a rate, or an eighth of a second's; a socket's read is as much


@dataclass(slots=True)
class Job:
    """One model that is being staged. `done_bytes` of `total_bytes` (0: not known yet) are here."""

    id: str
    order: StageOrder
    task: asyncio.Task[None] | None = None
    step: str = "waits for its turn"
    done_bytes: int = 0
    total_bytes: int = 0
    error: LlorchError | None = None
    removed: bool = False
    written: asyncio.Event = field(default_factory=asyncio.Event)  # it would survive a restart
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=64))

    def at(self, done_bytes: int) -> None:
        self.done_bytes, now = done_bytes, time.monotonic()
        if not self._marks or now - self._marks[-1][0] >= MARK_EVERY_S or done_bytes < self._marks[-1][1]:
            if self._marks and done_bytes < self._marks[-1][1]:
                self._marks.clear()
            self._marks.append((now, done_bytes))

    @property
    def progress(self) -> float:
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 0.0

    @property
    def missing_bytes(self) -> int:
        return max(0, self.total_bytes - self.done_bytes)

    def bytes_s(self, now: float) -> float:
        recent = [mark for mark in self._marks if now - mark[0] <= SPEED_WINDOW_S]
        if len(recent) < 2 or now <= recent[0][0]:
            return 0.0
        return max(0.0, (self.done_bytes - recent[0][1]) / (now - recent[0][0]))

    def words(self) -> str:
        ref = MODEL_REF.show(self.order.ref)
        if not self.total_bytes or self.step != "fetches":
            return f"staging {ref}: {self.step}"
        speed = self.bytes_s(time.monotonic())
        return f"staging {ref}: {100 * self.progress:.0f} % of {in_bytes(self.total_bytes)}, {in_bytes(speed)}/s"


class Pace:
    """So many bytes a second, of all together."""

    def __init__(self, rate_bytes_s: int | None) -> None:
        self.settle(rate_bytes_s)

    def settle(self, rate_bytes_s: int | None) -> None:
        """Another rate from now on."""
        rate = None if rate_bytes_s is None else Rate(rate_bytes_s, max(rate_bytes_s / 8, BURST_BYTES))
        self._limit = Gcra(rate) if rate is not None else None

    async def __call__(self, count: int) -> None:
        while count > 0 and self._limit is not None:
            wait_s = self._limit.take("all", time.monotonic(), min(count, BURST_BYTES))
            if wait_s:
                await asyncio.sleep(wait_s)
            else:
                count -= BURST_BYTES


def in_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit in ("B", "KiB") or count >= 100 else f"{count:.1f} {unit}"
