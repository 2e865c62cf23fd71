"""What a node may not do, how much each offence weighs, and when a node is shut out for it.

    a strike adds its weight ──▶ the score, which halves every HALF_LIFE_S ──at THRESHOLD──▶ quarantine
    quarantine: 1 min, twice as long each time up to 1 h ──time or a pardon──▶ the node may register again

Owns the offences, the score of each node and the quarantines. Only what no honest node can do is an offence, whatever
is killed, partitioned or started twice: the callers say what was seen, and each says there why it is proof. A score
still has room for two, for a bit may flip where nothing is encrypted, and a node may be a version with a bug. Never
acts: who is shut out is `distrust`'s to carry out. Nothing here is written down: a control that restarts begins anew.
Pure; `now` is monotonic seconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from llorch.errors import Code, LlorchError

HALF_LIFE_S = 600.0  # a mistake an hour is forgotten; three within ten minutes are a habit
THRESHOLD = 10.0
FIRST_S = 60.0  # time to look at the machine; a mistake costs no more
MOST_S = 3_600.0
GOOD_S = 24 * 3_600.0  # after so long without a strike, the next quarantine is a first one again
MOST_NODES = 4_000  # that strikes are kept of: four times as many as may be registered


class Offence(StrEnum):
    """Words of a metric's label and of the log. Each is defined where it is seen."""

    MALFORMED_RECORD = "malformed_record"  # of no known form, or of a kind that a node may not send
    FOREIGN_STREAM = "foreign_stream"  # on a stream that this control never opened
    CREDIT_OVERRUN = "credit_overrun"  # more bytes than it was granted
    OUT_OF_ORDER = "out_of_order"  # DATA before HEAD, a second HEAD or ACCEPT, a TAIL that contradicts the DATA
    FALSE_SLOTS = "false_slots"  # slots that it reports and does not give, or more of them than there are
    FOREIGN_TASK = "foreign_task"  # an attempt that this very control opened somewhere else


WEIGHTS: Mapping[Offence, float] = {
    Offence.MALFORMED_RECORD: 4.0,  # the third one shuts out
    Offence.FOREIGN_STREAM: 4.0,
    Offence.CREDIT_OVERRUN: 4.0,
    Offence.OUT_OF_ORDER: 4.0,
    Offence.FALSE_SLOTS: 3.0,  # the fourth: it costs others time, and no bytes
    Offence.FOREIGN_TASK: 4.0,
}

WORDS: Mapping[Offence, str] = {
    Offence.MALFORMED_RECORD: "malformed records",
    Offence.FOREIGN_STREAM: "records on streams that were never opened",
    Offence.CREDIT_OVERRUN: "more bytes than it was granted",
    Offence.OUT_OF_ORDER: "records that contradict each other",
    Offence.FALSE_SLOTS: "slots that it does not have or give",
    Offence.FOREIGN_TASK: "tasks that it was never given",
}


@dataclass(frozen=True, slots=True)
class Quarantine:
    """`reason` is in words of ours alone: nothing that a node says is in it."""

    reason: str
    since: float
    until: float

    def left_s(self, now: float) -> float:
        return max(0.0, self.until - now)

    def refusal(self, now: float) -> LlorchError:
        left_s = self.left_s(now)
        return LlorchError(
            Code.NODE_QUARANTINED,
            f"this node is quarantined for {left_s:.0f} s more, for {self.reason}",
            retry_after_ms=max(1_000, round(left_s * 1_000)),
        )


@dataclass(slots=True)
class _Record:
    score: float = 0.0
    struck_at: float = 0.0
    counts: Counter[Offence] = field(default_factory=Counter)  # since the last quarantine or pardon
    quarantines: int = 0
    quarantine: Quarantine | None = None

    def decayed(self, now: float) -> float:
        # The exponent is bounded: 2.0 ** -64 of any score is nothing, and a clock that is wrong overflows nothing.
        return self.score * math.pow(2.0, -min(64.0, max(0.0, now - self.struck_at) / HALF_LIFE_S))


class Strikes:
    """Of every node that ever did what it may not, by its id: the id is all that a node keeps across its lives."""

    def __init__(self) -> None:
        self._of: dict[str, _Record] = {}  # the one struck last comes last

    def __len__(self) -> int:
        return len(self._of)

    def strike(self, node_id: str, offence: Offence, now: float) -> Quarantine | None:
        """Count an offence. Returns the quarantine that begins with it, if one does."""
        record = self._of.pop(node_id, None) or _Record()
        self._of[node_id] = record
        self._make_room(now)
        if now - record.struck_at >= GOOD_S:
            record.quarantines = 0
        record.score = record.decayed(now) + WEIGHTS[offence]
        record.struck_at = now
        record.counts[offence] += 1
        if record.score < THRESHOLD or self.of(node_id, now) is not None:
            return None
        for_s = min(MOST_S, FIRST_S * 2.0 ** min(record.quarantines, 64))
        reason = ", ".join(f"{WORDS[kind]} ({count})" for kind, count in record.counts.most_common())
        record.quarantines += 1
        record.quarantine = Quarantine(reason, now, now + for_s)
        record.score, record.counts = 0.0, Counter()
        return record.quarantine

    def of(self, node_id: str, now: float) -> Quarantine | None:
        """The quarantine that a node is in now."""
        record = self._of.get(node_id)
        quarantine = None if record is None else record.quarantine
        return quarantine if quarantine is not None and now < quarantine.until else None

    def check(self, node_id: str, now: float) -> None:
        """Raises NODE_QUARANTINED, with the time that is left."""
        quarantine = self.of(node_id, now)
        if quarantine is not None:
            raise quarantine.refusal(now)

    def score(self, node_id: str, now: float) -> float:
        record = self._of.get(node_id)
        return 0.0 if record is None else record.decayed(now)

    def pardon(self, node_id: str) -> bool:
        """Forget everything of a node. False if there was nothing."""
        return self._of.pop(node_id, None) is not None

    def _make_room(self, now: float) -> None:
        """The one struck longest ago goes first, and before any that is shut out; but one that is, rather than none."""
        while len(self._of) > MOST_NODES:
            free = (node_id for node_id, record in self._of.items() if self.of(node_id, now) is None)
            oldest = next(free, None)
            if oldest is None or oldest == next(reversed(self._of)):
                oldest = next(iter(self._of))
            del self._of[oldest]
