"""When many nodes seem to be gone at once, the fault is more likely here: a control that blames itself.

Owns when a storm begins (at least three nodes and more than a third of all stopped answering within five seconds, or
the control's own loop stood still) and when it is over: once those that went are back, or after the time in which a
silent node goes offline, for then they are gone. Never touches a node: the registry keeps its view meanwhile.
Nodes that sign off are no longer among those looked at, so they make no storm. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

WINDOW_S = 5.0
FEWEST_NODES = 3
SHARE = 1 / 3
# The control looks twice a second. A loop that is busy comes late by tenths; one that comes later than this was
# stopped, or its machine was, and what it missed meanwhile (answers, beats, pings) says nothing of the nodes.
STALLED_AFTER_S = 2.0

VANISHED = "nodes vanished"
STALLED = "the control stood still"


@dataclass(frozen=True, slots=True)
class Storm:
    """`missing`: the nodes that it waits for."""

    reason: str
    began_at: float
    until: float
    missing: frozenset[str]

    def told(self, *, nodes: int) -> tuple[str, dict[str, Any]]:
        """The event for the log."""
        return "storm.began", {"reason": self.reason, "missing": len(self.missing), "nodes": nodes}


@dataclass(frozen=True, slots=True)
class Ended:
    """`missing`: the nodes that did not come back."""

    reason: str
    lasted_s: float
    missing: frozenset[str]

    def told(self, *, nodes: int) -> tuple[str, dict[str, Any]]:
        fields = {"reason": self.reason, "missing": len(self.missing), "nodes": nodes}
        return "storm.ended", fields | {"lasted_s": round(self.lasted_s, 1)}


class Storms:
    """Looked at after every change of who answers, and at a fixed beat."""

    def __init__(self, offline_after_s: float) -> None:
        self.storm: Storm | None = None
        self._lasts_s = offline_after_s
        self._answered: frozenset[str] = frozenset()  # at the last look
        self._answered_at_beat: frozenset[str] = frozenset()
        self._vanished: dict[str, float] = {}  # node → when it stopped answering; not back since
        self._beat_at: float | None = None

    def stalled_s(self, now: float) -> float:
        """For how long the loop has stood still, as of now; 0 if it has not."""
        late_s = 0.0 if self._beat_at is None else now - self._beat_at
        return late_s if late_s > STALLED_AFTER_S else 0.0

    def look(self, nodes: Mapping[str, bool], now: float, *, beat: bool = False) -> Storm | Ended | None:
        """`nodes`: which are online, and whether each answers. `beat`: this is the look that comes twice a second.

        Returns the storm that begins, or that has ended, with this look.
        """
        stalled = beat and self.stalled_s(now) > 0
        answering = frozenset(node_id for node_id, answers in nodes.items() if answers)
        went = (self._answered - answering) & nodes.keys()
        self._vanished = {
            node_id: at for node_id, at in self._vanished.items() if node_id in nodes and node_id not in answering
        } | dict.fromkeys(went, now)
        before, self._answered = self._answered_at_beat, answering
        if beat:
            self._beat_at, self._answered_at_beat = now, answering
        if stalled and nodes:
            return self._begin(STALLED, now, before & nodes.keys())
        if self.storm is None:
            lately = frozenset(node_id for node_id, at in self._vanished.items() if now - at <= WINDOW_S)
            if len(lately) >= FEWEST_NODES and len(lately) > SHARE * len(nodes):
                return self._begin(VANISHED, now, lately)
            return None
        return self._go_on(self.storm, nodes.keys() - answering, went, now, beat=beat)

    def _begin(self, reason: str, now: float, missing: frozenset[str]) -> Storm | None:
        """A storm, or more of the one there is: that is no news, but it may last longer."""
        old, until = self.storm, now + self._lasts_s
        if old is None:
            self.storm = Storm(reason, now, until, missing)
            return self.storm
        self.storm = replace(old, until=until, missing=old.missing | missing)
        return None

    def _go_on(
        self, storm: Storm, silent: AbstractSet[str], went: AbstractSet[str], now: float, *, beat: bool
    ) -> Ended | None:
        missing = storm.missing | went
        if beat:  # and not between: just after a stall, connections that ended meanwhile still pass for open ones
            missing &= silent
            if not missing or now >= storm.until:
                self.storm = None
                return Ended(storm.reason, now - storm.began_at, missing)
        self.storm = replace(storm, missing=missing)
        return None
