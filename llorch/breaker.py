"""Passive ejection: whoever fails again and again gets no work for a while, and is then tried with one task.

    closed ──fails──▶ ejected ──time──▶ half-open ──its trial ends well──▶ closed
                        ▲                   └──its trial fails──▶ ejected, for twice as long

Owns when failures are too many, how long an ejection lasts, and that a half-open one has one trial at a time. What
counts as a failure is the caller's to say: never a fault of the client's, a cancel, or the loss of a whole node. So is
whether the others can do without it (`may_eject`, `surplus`). Pure: `now` is monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

MOST_IN_A_ROW = 5
WINDOW_S = 30.0
FEWEST_OUTCOMES = 10  # in the window; a share of fewer says nothing
SHARE = 0.5
MOST_OUTCOMES = 200  # the newest are judged; a busy pool has thousands within the window
EJECTED_FIRST_S = 15.0
EJECTED_MOST_S = 120.0
HEALTHY_S = 300.0  # closed for this long: what went before is forgotten
TRIAL_TIMEOUT_S = 30.0  # a trial that has not ended by then holds up the next one no longer
NEVER = float("inf")


class Phase(StrEnum):
    CLOSED = "closed"
    EJECTED = "ejected"
    HALF_OPEN = "half_open"


@dataclass(slots=True, eq=False)
class Breaker:
    """The outcomes of one pool (at a control) or replica (at a node), and what follows from them."""

    phase: Phase = Phase.CLOSED
    in_a_row: int = 0  # failures since the last success
    ejections: int = 0  # in a row, without a healthy while between them
    until: float = NEVER  # the end of the ejection, or of a trial's time: when time alone changes `takes`
    why: str = ""
    trial: object | None = None  # who holds the half-open one's only place
    _closed_at: float = 0.0
    _outcomes: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=MOST_OUTCOMES))

    @property
    def takes(self) -> bool:
        """Whether a task may go there, as of the last `advance`."""
        return self.phase is Phase.CLOSED or (self.phase is Phase.HALF_OPEN and self.trial is None)

    def advance(self, now: float) -> bool:
        """What time does: an ejection ends, a trial has had its time. True if that changes `takes`."""
        if self.trial is not None and self.until == NEVER:
            self.until = now + TRIAL_TIMEOUT_S
        if now < self.until:
            return False
        self.phase, self.trial, self.until = Phase.HALF_OPEN, None, NEVER
        return True

    def begin(self, who: object) -> bool:
        """`who` goes there; only while `takes`. True if it is the trial, whose time runs from the next `advance`."""
        if self.phase is Phase.CLOSED:
            return False
        self.trial = who
        return True

    def end(self, who: object) -> None:
        """`who` has ended. A trial that told nothing leaves its place to the next one."""
        if self.trial is not None and self.trial == who:
            self.trial, self.until = None, NEVER

    def succeeded(self, now: float, *, trial: bool) -> bool:
        """A task ended well. True if that closes the breaker: only a trial does, others began before the ejection."""
        if self.phase is Phase.CLOSED:
            self.in_a_row = 0
            self._outcomes.append((now, True))
            return False
        if self.phase is Phase.EJECTED or not trial:
            return False
        self.close(now)
        return True

    def failed(self, now: float, *, trial: bool) -> bool:
        """A task failed there. True if an ejection is due: `eject`, or `close` if the others can't do without it."""
        if self.phase is not Phase.CLOSED:
            if self.phase is Phase.EJECTED or not trial:
                return False
            self.why = "its trial failed"
            return True
        self.in_a_row += 1
        self._outcomes.append((now, False))
        while self._outcomes and now - self._outcomes[0][0] > WINDOW_S:
            self._outcomes.popleft()
        seen, failures = len(self._outcomes), sum(not well for _, well in self._outcomes)
        if self.in_a_row >= MOST_IN_A_ROW:
            self.why = f"{self.in_a_row} tasks in a row failed"
        elif seen >= FEWEST_OUTCOMES and failures >= SHARE * seen:
            self.why = f"{failures} of {seen} tasks failed within {WINDOW_S:.0f} s"
        else:
            return False
        return True

    def eject(self, now: float) -> float:
        """Out, from now on. Returns for how many seconds."""
        if self.phase is Phase.CLOSED and now - self._closed_at >= HEALTHY_S:
            self.ejections = 0
        self.ejections += 1
        # The exponent is bounded: 2.0 ** 64 is past any cap, and does not overflow.
        lasts_s = min(EJECTED_MOST_S, EJECTED_FIRST_S * 2.0 ** min(self.ejections - 1, 64))
        self.phase, self.until, self.trial = Phase.EJECTED, now + lasts_s, None
        return lasts_s

    def close(self, now: float) -> None:
        """It takes tasks again, as if nothing had been; but another ejection soon lasts longer."""
        if self.phase is not Phase.CLOSED:
            self._closed_at = now
        self.phase, self.in_a_row, self.trial, self.why, self.until = Phase.CLOSED, 0, None, "", NEVER
        self._outcomes.clear()

    def left_s(self, now: float) -> float | None:
        """How much longer it is ejected; None if it is not."""
        return max(0.0, self.until - now) if self.phase is Phase.EJECTED else None


def may_eject(breaker: Breaker, peers: Sequence[Breaker]) -> bool:
    """Whether at most half of `peers` are out with it. They are those that could serve now, `breaker` among them."""
    out = sum(peer.phase is not Phase.CLOSED for peer in peers if peer is not breaker)
    return 2 * (out + 1) <= len(peers)


def surplus(peers: Sequence[Breaker]) -> list[Breaker]:
    """Those to be closed because more than half of `peers` are out: the ones that would be tried first."""
    out = sorted((peer for peer in peers if peer.phase is not Phase.CLOSED), key=_next)
    return out[: max(0, len(out) - len(peers) // 2)]


def _next(breaker: Breaker) -> tuple[bool, float]:
    return breaker.phase is Phase.EJECTED, breaker.until
