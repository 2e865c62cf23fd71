"""Where tasks are, by what the nodes report.

Owns the index from a task to the nodes that know it: how a control that has just started finds tasks it never placed.
Never decides anything about a task, and keeps no more per node than one beat may carry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from llorch.messages import TaskReport

MAX_TASKS_PER_NODE = 8_192
MAX_NEWS = 8_192  # reports of ends that nobody has taken yet; the oldest go


def came_to_nothing(report: TaskReport) -> bool:
    """Whether an attempt ended without anything that anybody may still have: it failed or was overtaken before its
    first byte, or was canceled, mostly because its reader had left. Another attempt may have gone on elsewhere."""
    return report.state == "sealed" and (report.offset == 0 or report.finish_reason == "canceled")


class TaskReports:
    """The last report of each (task, attempt) on each node."""

    def __init__(self) -> None:
        self._by_node: dict[str, dict[tuple[str, int], TaskReport]] = {}
        self._by_task: dict[str, dict[tuple[str, int], TaskReport]] = {}  # task_id → (node_id, attempt) → report
        self._news: deque[TaskReport] = deque(maxlen=MAX_NEWS)
        self._by_key: dict[str, dict[str, None]] = {}  # key_digest → the tasks that came with it

    def __len__(self) -> int:
        return sum(map(len, self._by_node.values()))

    def __iter__(self) -> Iterator[tuple[str, TaskReport]]:
        """Each task once, with its highest attempt; those first heard of last come first."""
        for task_id in reversed(list(self._by_task)):
            found = self.find(task_id, lambda _: True)
            if found is not None:
                yield found

    def of(self, node_id: str) -> tuple[TaskReport, ...]:
        return tuple(self._by_node.get(node_id, {}).values())

    def find(self, task_id: str, online: Callable[[str], bool]) -> tuple[str, TaskReport] | None:
        """The node and report of a task's highest attempt, from an online node if there is a choice."""
        reports = self._by_task.get(task_id)
        if not reports:
            return None
        node_id, attempt = max(reports, key=lambda key: (key[1], online(key[0]), key[0]))
        return node_id, reports[node_id, attempt]

    def find_key(self, key_digest: str, online: Callable[[str], bool]) -> tuple[str, TaskReport] | None:
        """As `find`, for the task that came with this key: of several, the newest one that came to something."""
        found = [at for task_id in self._by_key.get(key_digest, ()) if (at := self.find(task_id, online)) is not None]
        return max(found, key=lambda at: (not came_to_nothing(at[1]), at[1].started_at or ""), default=None)

    def take(self, node_id: str, reports: list[TaskReport], *, whole: bool) -> tuple[TaskReport, ...]:
        """A node's report; `whole`: what it does not list is gone. Returns the tasks newly known as sealed."""
        known = self._by_node.setdefault(node_id, {})
        ended: list[TaskReport] = []
        gone = set(known) if whole else set()
        for report in reports:
            key = (report.task_id, report.attempt)
            if report.gone:
                gone.add(key)
                continue
            gone.discard(key)
            before = known.get(key)
            if report.state == "sealed" and (before is None or before.state != "sealed"):
                ended.append(report)
                self._news.append(report)
            known[key] = report
            self._by_task.setdefault(report.task_id, {})[node_id, report.attempt] = report
            if report.key_digest is not None:
                self._by_key.setdefault(report.key_digest, {})[report.task_id] = None
        for key in gone & set(known):
            self._drop(node_id, key)
        surplus = len(known) - MAX_TASKS_PER_NODE
        if surplus > 0:  # sealed ones go first, the oldest of them before the others
            for key in sorted(known, key=lambda key: known[key].state != "sealed")[:surplus]:
                self._drop(node_id, key)
        return tuple(ended)

    def news(self) -> list[TaskReport]:
        """The tasks newly known as sealed since the last call, whatever brought their reports."""
        news = list(self._news)
        self._news.clear()
        return news

    def forget(self, node_id: str) -> None:
        for key in list(self._by_node.get(node_id, ())):
            self._drop(node_id, key)
        self._by_node.pop(node_id, None)

    def _drop(self, node_id: str, key: tuple[str, int]) -> None:
        report = self._by_node[node_id].pop(key)
        task_id, attempt = key
        reports = self._by_task[task_id]
        del reports[node_id, attempt]
        if not reports:
            del self._by_task[task_id]
            same_key = self._by_key.get(report.key_digest or "", {})
            same_key.pop(task_id, None)
            if report.key_digest is not None and not same_key:
                self._by_key.pop(report.key_digest, None)
