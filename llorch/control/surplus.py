"""What a node still runs that nobody wants from it: the task has ended here, runs elsewhere, or is to be canceled.

Owns which running attempts of a node are cancelled, and whether its end may still be read. Nodes are told when they
beat and when their link is new, for they may have been away when it was said. Never ends a task at this control.
"""

from __future__ import annotations

from llorch.control.feed import Feed
from llorch.control.log_reader import LogReaders
from llorch.control.registry import Registry
from llorch.control.tasks import TaskStore
from llorch.logs import Log
from llorch.messages import TaskReport

MOST_CANCELED = 10_000  # tasks of before this control's time; the oldest go first

log = Log("control.surplus")


class Surplus:
    def __init__(self, tasks: TaskStore, registry: Registry, readers: LogReaders) -> None:
        self._tasks = tasks
        self._registry = registry
        self._readers = readers
        self._canceled: dict[str, tuple[str, str | None]] = {}  # by task, which one: of its owner, of its control

    def canceled(self, report: TaskReport) -> None:
        """A task that this control knows from a node alone is to be canceled, also where another brings it later."""
        self._canceled.pop(report.task_id, None)
        self._canceled[report.task_id] = (report.owner, report.epoch)
        while len(self._canceled) > MOST_CANCELED:
            del self._canceled[next(iter(self._canceled))]

    def cancel(self, node_id: str, *, link_is_new: bool = False) -> None:
        """Cancel what a node with a link runs too many: by ATTACH, CANCEL and DETACH, before the next OPEN goes out.

        Not the tasks whose reader left: what becomes of those is the node's to decide. If its link is new, it is told
        once more that they left.
        """
        for report in self._registry.tasks_of(node_id):
            if report.state == "sealed":
                continue
            task = self._tasks.get(report.task_id)
            if task is None or task.owner != report.owner:
                if self._canceled.get(report.task_id) == (report.owner, report.epoch):
                    self._end(node_id, report, canceled=True)
                continue
            left = task.abandoned and not task.cancel_wanted
            if left and (not link_is_new or self._readers.reads(report.task_id)):
                continue
            if task.ended or task.node_id != node_id:
                self._end(node_id, report, canceled=task.cancel_wanted, left=left)

    def _end(self, node_id: str, report: TaskReport, *, canceled: bool, left: bool = False) -> None:
        """`canceled`: its end may still be read. `left`: its node decides. Otherwise it is to be found no more."""
        upstream = self._readers.opener.attach(node_id, report.task_id, report.offset, report.attempt, Feed())
        if canceled:
            upstream.cancel()
        elif not left:
            upstream.discard()
        upstream.detach("left")
        log.info("task.surplus", task_id=report.task_id, node_id=node_id, attempt=report.attempt)
