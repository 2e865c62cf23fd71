"""The owner comes first: which pools stand back now, and why.

    owner = Owner()
    owner.decide(specs, gpus, weekday=.., minutes=.., now=..) -> {pool_id: why it is held, or None}

Owns two reasons. `hours`: outside of them a pool does not serve. `yield_to_owner`: others' programs use one of its
GPUs, seen by the memory they hold. It answers late on purpose, IN_USE_FOR_S after they begin and FREE_FOR_S after they
end, so that a program that starts and ends does not unload a model each time, and an engine of ours that is seen before
its processes are known as ours does no harm. Never drains anything, and looks at no clock.

What counts as use. Some memory is always taken: a desktop's windows, a browser. That is a GPU's background: the least
that was there so far, or what has lain there for SETTLED_AFTER_S with the GPU idle; but never more than
BACKGROUND_BYTES, for who keeps more than that loaded means to come back to it. A GPU is in use when more than
MARGIN_BYTES beyond its background is held; and, as long as nothing of ours is on it, when it computes: with something
of ours there, nobody can tell for whom it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llorch.config_hours import Hours, next_change, serves_at, show_moment
from llorch.config_pools import PoolSpec
from llorch.messages import Gpu

IN_USE_FOR_S = 10.0  # two readings, and longer than it takes a node to know its engines after a restart
FREE_FOR_S = 60.0  # longer than between two runs of somebody who tries things out
MARGIN_BYTES = 512 << 20  # less than any program that computes holds, more than windows grow by
BACKGROUND_BYTES = 2 << 30  # a desktop on two large screens with a browser
SETTLED_AFTER_S = 600.0
IDLE_SHARE = 0.05  # of the time: windows are drawn
BUSY_SHARE = 0.5
OUR_TRACE_BYTES = 64 << 20  # less than the context of any process: nothing of ours is there
FORGOTTEN_AFTER_S = 300.0  # a driver that is being reloaded shows no GPU for a minute; one that is lost stays away


@dataclass(slots=True)
class _Watched:
    """One GPU. `since`: when what is seen began to differ from `held`, None while it does not."""

    index: int
    seen: float
    background: int
    held: str | None = None
    since: float | None = None
    settled: int = 0  # what has lain there
    settled_since: float | None = None


class Owner:
    """Remembers what the GPUs were like. One that is not told of stays as it was, for FORGOTTEN_AFTER_S."""

    def __init__(self) -> None:
        self._gpus: dict[str, _Watched] = {}

    def decide(
        self, specs: Sequence[PoolSpec], gpus: Sequence[Gpu], *, weekday: int, minutes: int, now: float
    ) -> dict[str, str | None]:
        """`weekday` (0: Monday) and `minutes` after midnight as the machine's wall clock shows them; `now` in seconds
        that only grow. A reason stays word for word the same while it holds.
        """
        for gpu in gpus:
            self._look(gpu, now)
        self._gpus = {uuid: each for uuid, each in self._gpus.items() if now - each.seen < FORGOTTEN_AFTER_S}
        return {spec.id: _outside(spec.hours, weekday, minutes) or self._in_use(spec) for spec in specs}

    def _in_use(self, spec: PoolSpec) -> str | None:
        if not spec.yield_to_owner:
            return None
        its = (each for each in self._gpus.values() if spec.gpus is None or each.index in spec.gpus)
        return next((each.held for each in its if each.held), None)

    def _look(self, gpu: Gpu, now: float) -> None:
        foreign = gpu.vram_foreign_bytes
        watched = self._gpus.setdefault(gpu.uuid, _Watched(gpu.index, now, min(foreign, BACKGROUND_BYTES)))
        watched.index, watched.seen = gpu.index, now
        watched.background = min(watched.background, foreign)
        why = _why_in_use(gpu, watched.background)
        if (why is None) == (watched.held is None):
            watched.since = None
        elif watched.since is None:
            watched.since = now
        elif now - watched.since >= (IN_USE_FOR_S if why else FREE_FOR_S):
            watched.held, watched.since = why, None
        _settle(watched, gpu, now)


def _why_in_use(gpu: Gpu, background: int) -> str | None:
    foreign = gpu.vram_foreign_bytes
    if foreign > background + MARGIN_BYTES:
        return f"owner: {foreign / (1 << 30):.1f} GiB of GPU {gpu.index} are used by other programs"
    ours = gpu.vram_used_bytes - foreign
    if ours < OUR_TRACE_BYTES and (gpu.utilization or 0.0) >= BUSY_SHARE:
        return f"owner: GPU {gpu.index} computes for other programs"
    return None


def _settle(watched: _Watched, gpu: Gpu, now: float) -> None:
    """Let the background rise to what has lain there, unused, for long; by how much it may vary meanwhile is what it
    may vary by without being use.
    """
    foreign, ours = gpu.vram_foreign_bytes, gpu.vram_used_bytes - gpu.vram_foreign_bytes
    idle = ours >= OUR_TRACE_BYTES or (gpu.utilization or 0.0) < IDLE_SHARE
    if not idle or not watched.background < foreign <= BACKGROUND_BYTES:
        watched.settled_since = None
    elif watched.settled_since is None or abs(foreign - watched.settled) > MARGIN_BYTES:
        watched.settled, watched.settled_since = foreign, now
    elif now - watched.settled_since >= SETTLED_AFTER_S:
        watched.background, watched.settled_since = foreign, None


def _outside(hours: Hours | None, weekday: int, minutes: int) -> str | None:
    if hours is None or serves_at(hours, weekday, minutes):
        return None
    change = next_change(hours, weekday, minutes)
    return f"hours: it serves again from {show_moment(*change)}" if change else "hours: it never serves"
