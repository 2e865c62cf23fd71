"""A staging job and its shares: a model that is wanted, and how far each node is with it.

Owns those values, which phase follows which, how fast bytes come, and what a job looks like from outside. Never decides
whom to ask. Pure.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llorch.control.stage_sources import Wanted, shown
from llorch.errors import LlorchError
from llorch.messages import ModelReport

PACE_S = 10.0  # over which a speed is told
STALLS_S = 120.0  # without a byte: whoever fetches has stalled
QUIET_S = 15.0  # no news for longer than a full beat: nothing moves


class Phase(StrEnum):
    WAITING = "waiting"  # to be asked, or for others: `waits_for` says
    STAGING = "staging"
    STAGED = "staged"
    FAILED = "failed"
    OFFLINE = "offline"


OVER = frozenset({Phase.STAGED, Phase.FAILED})


class Pace:
    """How fast bytes come, by the times at which this control heard of them."""

    def __init__(self) -> None:
        self._heard: deque[tuple[float, float]] = deque(maxlen=64)

    def heard(self, done: float, now: float) -> None:
        if self._heard and done < self._heard[-1][1]:
            self._heard.clear()
        self._heard.append((now, done))
        while len(self._heard) > 2 and now - self._heard[0][0] > PACE_S:
            self._heard.popleft()

    def bytes_per_s(self, now: float) -> float | None:
        if len(self._heard) < 2:
            return None
        (began, first), (ended, last) = self._heard[0], self._heard[-1]
        if now - ended > QUIET_S:
            return 0.0
        return (last - first) / (ended - began) if ended > began else None


@dataclass(slots=True)
class Share:
    """One node of a job. `counts`: the job does not end without it, as one that was offline already and that nobody
    named. `lease_id`: the registration that took the order; another one has to be asked again."""

    node_id: str
    counts: bool
    since: float  # of the phase
    phase: Phase = Phase.WAITING
    waits_for: str | None = None
    model: str | None = None
    progress: float = 0.0
    bytes_done: float = 0.0
    bytes_total: int | None = None
    moved_at: float = 0.0  # the last byte that was heard of
    pace: Pace = field(default_factory=Pace)
    sha256: str | None = None
    error: LlorchError | None = None
    asking: bool = False
    lease_id: str | None = None
    sources: tuple[str, ...] = ()
    tries: int = 0  # in a row after which nothing was heard of it
    next_at: float = 0.0
    resumes: bool = False  # it has taken an order before: it has a part of it
    before: ModelReport | None = None  # what it reported when it was asked: no answer to that
    heard_at: float = 0.0  # the order was taken, or a report that followed
    answered_at: float = 0.0
    source_gone_at: float | None = None

    @property
    def over(self) -> bool:
        return self.phase in OVER

    def fetches(self, now: float) -> bool:
        """Bytes come, as far as is known; one that has stalled keeps nobody from anything."""
        return (self.asking or self.phase is Phase.STAGING) and now - self.moved_at < STALLS_S

    def turn(self, phase: Phase, now: float) -> None:
        if phase is not self.phase:
            self.phase, self.since = phase, now
            self.waits_for = self.source_gone_at = None

    def fail(self, error: LlorchError, now: float) -> None:
        self.turn(Phase.FAILED, now)
        self.error = error.copy()

    def to_be_asked(self, now: float) -> None:
        self.turn(Phase.WAITING, now)
        self.lease_id, self.next_at = None, now

    def move(self, progress: float | None, total: int | None, now: float) -> None:
        """Take over how far it is."""
        progress = min(1.0, max(0.0, progress or 0.0))
        self.bytes_total = total or self.bytes_total
        done = progress * (self.bytes_total or 0)
        if progress != self.progress or self.phase is not Phase.STAGING:
            self.moved_at = now
            self.pace.heard(done, now)
        self.progress, self.bytes_done = progress, done
        self.turn(Phase.STAGING, now)


@dataclass(slots=True)
class Job:
    job_id: str
    wanted: Wanted
    created_at: float
    created_wall: str
    shares: dict[str, Share]
    ended_at: float | None = None

    @property
    def state(self) -> str:
        if self.ended_at is None:
            return "running"
        return "failed" if any(share.phase is Phase.FAILED for share in self.shares.values()) else "done"

    def model_at(self, share: Share) -> str | None:
        return share.model or self.wanted.model


@dataclass(frozen=True, slots=True)
class Order:
    """A node is to be asked. `sources` are nodes that have it; each needs a ticket."""

    job_id: str
    node_id: str
    lease_id: str
    wanted: Wanted
    sources: tuple[str, ...]


# ---------------------------------------------------------------- from outside


def job_view(job: Job, now: float) -> dict[str, Any]:
    """`offline`: nodes that nobody waits for, as they were not there from the start."""
    wanted = job.wanted
    return {
        "job": job.job_id,
        "state": job.state,
        "model": wanted.model or shown(wanted.text),
        "ref": shown(wanted.ref),
        "sha256": wanted.sha256,
        "size_bytes": wanted.size_bytes,
        "from": wanted.source,
        "created_at": job.created_wall,
        "age_ms": round((now - job.created_at) * 1_000),
        "nodes": {node_id: _share_view(share, now) for node_id, share in job.shares.items()},
        "offline": [share.node_id for share in job.shares.values() if not share.counts],
    }


def _share_view(share: Share, now: float) -> dict[str, Any]:
    staging = share.phase is Phase.STAGING
    speed = share.pace.bytes_per_s(now) if staging else None
    return {
        "state": share.phase.value,
        "progress": round(share.progress, 4),
        "bytes_done": round(share.bytes_done),
        "bytes_total": share.bytes_total,
        "bytes_per_s": None if speed is None else round(speed),
        "sha256": share.sha256,
        "sources": list(share.sources) if staging else [],
        "waits_for": share.waits_for,
        "age_ms": round((now - share.since) * 1_000),
        "error": None if share.error is None else _error_view(share.error),
    }


def _error_view(error: LlorchError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "hint": error.hint, "retriable": error.retriable}
