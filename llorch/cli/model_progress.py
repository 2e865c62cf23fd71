"""How far the nodes of a staging job are, on standard error: bars on a terminal, else a line now and then.

Owns those two forms. What a control says of a node is text: it is neither markup nor a line of llorch's own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from llorch.cli.output import is_terminal, write_err
from llorch.cli.units import size
from llorch.client.text import one_line

if TYPE_CHECKING:
    import rich.progress

LINE_EVERY_S = 5.0  # of one node, where nobody sees it move

Job = Mapping[str, Any]


class Progress(Protocol):
    def show(self, job: Job) -> None:
        """The job as it is now."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def progress(*, quiet: bool) -> Progress:
    """What is fit for this standard error."""
    if quiet:
        return Nothing()
    return Bars() if is_terminal(sys.stderr) else Lines(write_err, time.monotonic)


class Nothing:
    def show(self, job: Job) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """A line for each node: when its state changes, and every 5 s while bytes come."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._write = write
        self._clock = clock
        self._last: dict[str, tuple[str, float]] = {}  # node id -> the state and the time of its line

    def show(self, job: Job) -> None:
        now = self._clock()
        for node_id, share in shares(job):
            if share.get("state") == "waiting" and not share.get("waits_for"):
                continue  # it is being asked
            state, said_at = self._last.get(node_id, ("", 0.0))
            due = share.get("state") == "staging" and now - said_at >= LINE_EVERY_S
            if share.get("state") != state or due:
                self._last[node_id] = (str(share.get("state")), now)
                self._write(f"{node_id}: {words(share)}\n")

    def close(self) -> None:
        pass


class Bars:
    """A bar for each node."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Rich

        self._rich = Rich(
            TextColumn("{task.fields[node]}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True, highlight=False),
            auto_refresh=False,  # a job is looked at often enough, and no thread is to write beside it
        )
        self._bars: dict[str, rich.progress.TaskID] = {}
        self._rich.start()

    def show(self, job: Job) -> None:
        for node_id, share in shares(job):
            if node_id not in self._bars:
                self._bars[node_id] = self._rich.add_task("", total=1.0, node=node_id)
            done = 1.0 if share.get("state") == "staged" else _number(share.get("progress"))
            self._rich.update(self._bars[node_id], completed=done, description=words(share, percent=False))
        self._rich.refresh()

    def close(self) -> None:
        self._rich.refresh()
        self._rich.stop()


def shares(job: Job) -> list[tuple[str, Mapping[str, Any]]]:
    """The nodes of a job and what is known of them, without what can't be read."""
    nodes = job.get("nodes")
    found = nodes.items() if isinstance(nodes, Mapping) else ()
    return [(one_line(str(node_id)), share) for node_id, share in found if isinstance(share, Mapping)]


def words(share: Mapping[str, Any], *, percent: bool = True) -> str:
    """One node in one line: `staging 45% 1.2G/2.6G 110M/s from n1`."""
    state, error = str(share.get("state") or "unknown"), share.get("error")
    if state == "staging":
        parts = [state, f"{_number(share.get('progress')) * 100:.0f}%" if percent else ""]
        if share.get("bytes_total"):
            parts.append(f"{size(share.get('bytes_done'))}/{size(share.get('bytes_total'))}")
        if share.get("bytes_per_s") is not None:
            parts.append(f"{size(share.get('bytes_per_s'))}/s")
        sources = share.get("sources")
        if isinstance(sources, list) and sources:
            parts.append(f"from {sources[0]}")
        return one_line(" ".join(parts))
    if state == "staged":
        digest = share.get("sha256")
        return one_line(f"{state} {size(share.get('bytes_total'))}" + (f" sha256 {short(digest)}" if digest else ""))
    if state == "failed" and isinstance(error, Mapping):
        return one_line(f"{state}: {error.get('message')}")
    waits = share.get("waits_for")
    return one_line(f"{state}, waits for {waits}" if waits else state)


def short(digest: object) -> str:
    return str(digest)[:12] if digest else "-"


def _number(value: object) -> float:
    return min(1.0, max(0.0, float(value))) if isinstance(value, (int, float)) else 0.0
