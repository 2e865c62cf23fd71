"""What follows when a node does what it may not: it is struck, and shut out if it is struck too often.

Owns the steps of a quarantine: the node's lease is over, its link is cut and nothing more is read from it, so its tasks
end as with a lost node; registrations, beats and links are refused until its time is over or an admin pardons it. Which
acts are offences is for `links` and `lies`, how much they weigh for `strikes`. Nothing that a node says is in a log
line or a label that is made here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from llorch.control import lies
from llorch.control.links import Links, offence_of
from llorch.control.metrics import ControlMetrics
from llorch.control.registry import Registry
from llorch.control.strikes import Offence, Strikes
from llorch.control.tasks import TaskStore
from llorch.errors import Code, LlorchError
from llorch.logs import Log
from llorch.messages import Heartbeat, PoolReport
from llorch.records import RecordError

log = Log("control.distrust")


class Distrust:
    def __init__(
        self,
        registry: Registry,
        links: Links,
        tasks: TaskStore,
        metrics: ControlMetrics,
        *,
        cut: Callable[[str], None],
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cut` ends what is read from a node without a link; `changed` is called when pools came or went."""
        self.strikes = Strikes()
        self._registry = registry
        self._links = links
        self._tasks = tasks
        self._metrics = metrics
        self._cut = cut
        self._changed = changed
        self._clock = clock

    def check(self, node_id: str) -> None:
        """Raises NODE_QUARANTINED for a node that is shut out: before anything that it wants is done."""
        self.strikes.check(node_id, self._clock())

    # ---- what was seen

    def broke_protocol(self, node_id: str, error: RecordError) -> None:
        """On its link, or in an answer that was read from its address."""
        self._strike(node_id, offence_of(error))

    def beat(self, node_id: str, message: Heartbeat) -> None:
        """A beat that was taken over. Without a lease anybody with the token may have sent it: it proves nothing."""
        node = self._registry.nodes.get(node_id)
        if node is None or node.leaseless:
            return
        now, tasks = self._clock(), self._registry.tasks_of(node_id)
        running = Counter(report.pool_id for report in tasks if report.state != "sealed")
        found = [
            *lies.impossible_slots(message.pools),
            *lies.foreign_tasks(node_id, message.tasks, self._registry.epoch, self._tasks.get),
        ]
        for pool in node.pools.values():
            free = pool.report.slots_free or 0
            if pool.slot_word.reported(free, pool.slots_total, running[pool.pool_id], now, whole=not message.delta):
                found.append(Offence.FALSE_SLOTS)
        self._strike_each(node_id, found)

    def read(self, node_id: str, report: PoolReport) -> None:
        """A report of one pool, read from the node's own route."""
        self._strike_each(node_id, lies.impossible_slots([report]))

    # ---- what follows

    def pardon(self, node_id: str, by: str) -> bool:
        """Forget what a node did; it may come back at once. True if it was shut out. Raises NODE_NOT_FOUND."""
        was = self.strikes.of(node_id, self._clock())
        if not self.strikes.pardon(node_id) and node_id not in self._registry.nodes:
            raise LlorchError(Code.NODE_NOT_FOUND, "no such node")
        self._registry.quarantine(node_id, None, self._clock())
        log.info("node.pardoned", node_id=node_id, by=by)
        self._changed()
        return was is not None

    def _strike_each(self, node_id: str, offences: Iterable[Offence]) -> None:
        """One strike for each kind: a report says the same of many pools, but is one act."""
        for offence in dict.fromkeys(offences):
            self._strike(node_id, offence)

    def _strike(self, node_id: str, offence: Offence) -> None:
        now = self._clock()
        quarantine = self.strikes.strike(node_id, offence, now)
        self._metrics.struck(offence)
        score = round(self.strikes.score(node_id, now), 1) if quarantine is None else None
        log.warning("node.struck", node_id=node_id, kind=offence.value, score=score)
        if quarantine is None:
            return
        log.error("node.quarantined", node_id=node_id, reason=quarantine.reason, for_s=quarantine.left_s(now))
        # Before its link ends: a node that is shut out is not one that vanished, which would be the control's fault.
        self._registry.quarantine(node_id, quarantine, now)
        link = self._links.get(node_id)
        if link is not None:
            link.abort("quarantined")
        self._cut(node_id)
        self._changed()
