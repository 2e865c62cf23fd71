"""What in a node's reports can't be true: the lies that a control can prove from what it knows itself.

Much looks like a lie and is none. Reports are late, overtake each other and are lost; another control takes the slot
that a report showed free; a pool that is started again reports fewer slots while the old engine's tasks still end; a
node that was away goes on with attempts that have long been taken elsewhere. So this looks only for what none of that
explains, and for what lasts. What it says of a report presumes that the node itself sent it: under its lease, or in
answer to a call at its own address. Owns that judgement. Never strikes: it names the offences. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llorch.control.strikes import Offence
from llorch.control.tasks import Task
from llorch.messages import PoolReport, TaskReport

# Refusing free slots: so many refusals in a row, over so long, with so many reports in between that all show a slot
# free and nothing running. An honest node says ALL_SLOTS_BUSY only while no slot is free, so somebody's task runs in
# each of them: at one moment another control may have been faster, but reports catch its tasks sooner or later.
REFUSALS = 20
REFUSING_S = 60.0
REFUSING_REPORTS = 5
# Tasks beyond the slots: twice as many as the most slots that the pool ever said it has, for it may have been loaded
# anew while what ran before still ends; and for longer than any engine may hang before its tasks are given up.
OVERFULL_S = 600.0


@dataclass(slots=True)
class SlotWord:
    """What one pool says of its slots, against what it does."""

    refusals: int = 0  # in a row
    refusing_since: float = 0.0
    idle_reports: int = 0  # since then, that show a slot free and nothing running
    most_slots: int = 0
    overfull_since: float | None = None

    def refused(self, now: float) -> None:
        """It said ALL_SLOTS_BUSY to a task that its reports have a slot for."""
        if self.refusals == 0:
            self.refusing_since, self.idle_reports = now, 0
        self.refusals += 1

    def accepted(self) -> None:
        self.refusals = 0

    def reported(self, free: int, total: int, running: int, now: float, *, whole: bool) -> bool:
        """A report has come, `whole` or of changes. True if it proves a lie; what was counted begins anew then."""
        if not free or running:
            self.refusals = 0
        self.idle_reports += whole
        self.most_slots = max(self.most_slots, total)
        if running <= 2 * self.most_slots:
            self.overfull_since = None
        elif self.overfull_since is None:
            self.overfull_since = now
        refuses = self.refusals >= REFUSALS and now - self.refusing_since >= REFUSING_S
        if refuses and self.idle_reports >= REFUSING_REPORTS:
            self.refusals = 0
            return True
        if self.overfull_since is not None and now - self.overfull_since >= OVERFULL_S:
            self.overfull_since = now
            return True
        return False


def impossible_slots(reports: Iterable[PoolReport] | None) -> Iterable[Offence]:
    """More free slots than there are: an offence of each pool that says both in one report."""
    for report in reports or ():
        if report.slots_free is not None and report.slots_total is not None and report.slots_free > report.slots_total:
            yield Offence.FALSE_SLOTS


def foreign_tasks(
    node_id: str, tasks: Iterable[TaskReport] | None, epoch: str, task_of: Callable[[str], Task | None]
) -> Iterable[Offence]:
    """Attempts that a node says it was given by this very control process, which gave them to others.

    The epoch is proof: an attempt is opened once, by one process, and a node repeats the epoch of its OPEN. Only tasks
    of which this control knows every OPEN count, so none whose client chose the id, which may have come before.
    """
    for report in tasks or ():
        if report.epoch != epoch or report.gone:
            continue
        task = task_of(report.task_id)
        if task is None or task.named or not task.opened:
            continue
        if (report.attempt, node_id) not in task.opened:
            yield Offence.FOREIGN_TASK
            return  # one for a report, however long its list is
