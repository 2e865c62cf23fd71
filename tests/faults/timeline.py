"""What happened around the tasks: which part was hit when, what engines ran, what the control saw. Pure.

Owns reading a history into spans of time. Times are the history's; a hit lasts from its fault to what healed it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

FOREVER = float("inf")
REBIND_S = 2.5  # a node's way back after its link was cut: it beats at once, then every 0.2 to 2 s
SLOW_S = 0.75  # between two looks at the pools; they come every 0.15 s, and as soon as the last is answered
LATE_S = 1.0  # what two observers of one machine under load may differ by
TROUBLE = ("kill", "term", "stop", "half_open", "partition", "blackout", "cut_off", "cut", "reset", "delay", "throttle")
HOLDING = ("engine", "node", "link")  # what is on its way when one is held up comes later; also what got through a cut
HOLDS = ("stop", "delay", "throttle", "cut", "reset")
AWAY = ("kill", "term", "stop", "half_open", "partition", "blackout", "cut_off")


@dataclass(frozen=True, slots=True)
class Hit:
    part: str  # control, node, engine, link, client
    how: str
    target: str
    start: float
    end: float
    resent: bool = False  # what was sent meanwhile arrives once it is over

    @property
    def arrives(self) -> float:
        """When what was sent meanwhile is there at the latest: TCP waits twice as long before each next try."""
        return self.end + (self.end - self.start if self.resent else 0.0) + LATE_S

    @property
    def told(self) -> float:
        """When a node whose link was hit knows again what its control wants."""
        return self.arrives if self.resent else self.end + REBIND_S

    @property
    def node(self) -> str:
        return self.target.partition("/")[0]

    def meets(self, since: float, until: float) -> bool:
        return self.start <= until and self.end >= since


@dataclass(slots=True)
class Execution:
    """One request as an engine saw it. `end` is when it stopped, also by its engine's death.

    `asked`: since when it may have been on its way, where something held it up. Of what was shown nothing was.
    """

    pool: str
    pid: int
    start: float
    end: float = FOREVER
    step: str = "running"
    tokens: int = 0
    asked: float = 0.0

    @property
    def node(self) -> str:
        return self.pool.partition("/")[0]


class Facts:
    def __init__(self, entries: Sequence[dict[str, Any]]) -> None:
        first = next((entry for entry in entries if entry["what"] == "run"), {})
        self.promises: dict[str, float] = first.get("promises", {})
        self.pools: dict[str, dict[str, Any]] = first.get("pools", {})
        self.began = first.get("at", 0.0)  # the control has started just before
        self.hits = _hits(entries)
        self.samples = [(entry["at"], entry["pools"]) for entry in entries if entry["what"] == "sample"]
        self.executions: dict[str, list[Execution]] = defaultdict(list)
        self._read_journals(entries)
        for runs in self.executions.values():
            for run in runs:
                run.asked = self._asked(run)

    def _read_journals(self, entries: Iterable[dict[str, Any]]) -> None:
        open_: dict[tuple[str, int], list[tuple[str, Execution]]] = defaultdict(list)
        for entry in entries:
            if entry["what"] != "engine":
                continue
            pool, pid, step, at, marker = entry["pool"], entry["pid"], entry["step"], entry["at"], entry.get("marker")
            if step == "serving":
                for other in [key for key in open_ if key[0] == pool and key[1] != pid]:
                    for _, execution in open_.pop(other):
                        execution.end, execution.step = self._death(execution, at), "killed"
            elif step == "dead":  # as it was told to, and long before the next one serves
                for _, execution in open_.pop((pool, pid), []):
                    execution.end, execution.step = at, "killed"
            elif marker is not None and step == "arrived":
                execution = Execution(pool, pid, at)
                open_[pool, pid].append((marker, execution))
                self.executions[marker].append(execution)
            elif marker is not None:
                for pair in open_[pool, pid]:
                    if pair[0] == marker:
                        pair[1].end, pair[1].step, pair[1].tokens = at, step, entry.get("tokens", 0)
                        open_[pool, pid].remove(pair)
                        break

    def _death(self, execution: Execution, found: float) -> float:
        """When an engine that was replaced by `found` had died: at the hit that killed it, if one did."""
        killed = [
            hit.start
            for hit in self.hits
            if hit.how in ("kill", "term")
            and (hit.target == execution.pool or (hit.part == "node" and hit.target == execution.node))
            and execution.start <= hit.start <= found
        ]
        return min(killed, default=found)

    def _asked(self, run: Execution) -> float:
        """A request that found its engine or its node stopped, was slow on its link or the last on it before a cut, or
        was sent while its node was cut off by a network that takes everything up again, is seen later than one that was
        sent after it. When it is seen it ends, unless its node could not yet be told that it was overtaken."""
        holds = self.hit(run.start, run.start, parts=HOLDING, hows=HOLDS, node=run.node, pool=run.pool)
        holds += [hit for hit in self.hits if hit.resent and hit.node == run.node and run.start <= hit.arrives]
        if run.step not in ("aborted", "killed"):
            holds = [hit for hit in holds if hit.part == "link" and run.end <= hit.told]
        return min([run.start, *(hit.start for hit in holds if hit.start <= run.start)])

    # ---- hits

    def hit(
        self,
        since: float,
        until: float,
        *,
        parts: Sequence[str],
        hows: Sequence[str] = TROUBLE,
        node: str | None = None,
        pool: str | None = None,
        late_s: float = LATE_S,
    ) -> list[Hit]:
        """Hits of some kind that meet a span. `node` and `pool` narrow those of nodes, links and engines."""
        return [
            hit
            for hit in self.hits
            if hit.part in parts
            and hit.how in hows
            and hit.meets(since - late_s, until + late_s)
            and (node is None or hit.part in ("control", "client") or hit.node == node)
            and (pool is None or hit.part != "engine" or hit.target == pool)
        ]

    def touched(self, since: float, until: float, *, pool: str | None = None) -> list[Hit]:
        """Anything between a control and an engine that was hit: what makes promises about time void meanwhile."""
        node = pool.partition("/")[0] if pool else None
        return self.hit(since, until, parts=("control", "node", "link", "engine"), node=node, pool=pool)

    def away(self, node: str, since: float, until: float) -> float:
        """The longest time, within a span, that a node could not be read for without a break in between."""
        spans = sorted(
            (max(hit.start, since), min(max(hit.end, hit.start) + REBIND_S, until))
            for hit in self.hits
            if hit.part in ("node", "link") and hit.node == node and hit.meets(since, until)
            if hit.how in (*AWAY, "cut", "reset")
        )
        return _longest(spans)

    def unheard(self, node: str, since: float, until: float) -> float:
        """As `away`, of a control that has just started, and stood still itself now and then. A node's way back counts
        only where both were there for it."""
        spans = sorted(
            (max(hit.start, since), min(hit.end, until))
            for hit in self.hits
            if hit.meets(since, until)
            and (hit.how in AWAY if hit.part in ("node", "link") and hit.node == node else hit.how == "stop")
            and (hit.part == "control" or hit.node == node)
        )
        return _longest(spans)

    def bad(self, pool: str, since: float, until: float) -> bool:
        """Whether a pool could fail tasks then: it, its node or its link was hit, or the control did not see it."""
        node = pool.partition("/")[0]
        if self.hit(since, until, parts=("node", "link", "engine"), node=node, pool=pool, late_s=REBIND_S):
            return True
        seen = [pools for at, pools in self.samples if since - LATE_S <= at <= until + LATE_S]
        return any(not (pool in pools and pools[pool][3]) for pools in seen)

    def pools_of(self, model: str) -> list[str]:
        return [pool for pool, facts in self.pools.items() if facts["model"] == model]

    def slow(self, since: float, until: float) -> bool:
        """Whether the control, which nothing had hit by then, took so long to answer that there was more to do than
        the machine could: an OPEN may then be answered too late."""
        return any(
            low <= until and high >= since
            for (low, _), (high, _) in pairwise(self.samples)
            if high - low >= SLOW_S and not self.hit(low, low + SLOW_S, parts=("control",), late_s=0.0)
        )

    def restarted(self, since: float, until: float) -> list[Hit]:
        return self.hit(since, until, parts=("control",), hows=("kill", "term"))


def _longest(spans: Sequence[tuple[float, float]]) -> float:
    """The longest time without a break in what sorted spans cover."""
    longest, start, end = 0.0, FOREVER, -FOREVER
    for low, high in spans:
        if low > end:
            start = low
        end = max(end, high)
        longest = max(longest, end - start)
    return longest


def _hits(entries: Iterable[dict[str, Any]]) -> list[Hit]:
    healed = {entry["fault"]: entry["at"] for entry in entries if entry["what"] == "healed"}
    return [
        Hit(
            *entry["kind"].split("."),
            entry["target"],
            entry["at"],
            healed.get(entry["fault"], FOREVER),
            entry.get("resent", False),
        )
        for entry in entries
        if entry["what"] == "fault"
    ]
