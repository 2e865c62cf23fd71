"""The machines find bugs: each of these is planted alone, and has to be found within a few thousand steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from llorch import records
from llorch.control.answers import NativeStream, empty_end
from llorch.control.audience import Audience
from llorch.control.dispatch import Dispatcher
from llorch.control.feed import Feed
from llorch.control.log_reader import LogReader
from llorch.control.node_client import NodeClient
from llorch.control.recovery import Recovery
from llorch.control.registry import Registry
from llorch.control.replay import Replays
from llorch.control.tasks import State, Task
from llorch.control.verdicts import GoElsewhere
from llorch.control.waiting import WaitingRoom
from llorch.errors import LlorchError
from llorch.node import link, retention
from llorch.node import replicas as nodes_replicas
from llorch.node.pools import Pools
from llorch.node.retention import TaskLogs
from llorch.node.runner import Runner
from llorch.node.task_entry import Gone
from llorch.node.tasklog import TaskLog
from tests.faults.cluster_parts import virtual_time
from tests.faults.cluster_world import ClusterWorld
from tests.faults.logs_world import LogsWorld
from tests.faults.moves import Broken, World, mileage
from tests.faults.small import small_limits

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]

SEED = 12
MOST_STEPS = 8_000
UNFIT = re.compile("AttributeError|TypeError|NameError|UnboundLocalError")


def planted(target: object, name: str, make: Callable[[Any], Any]) -> Plant:
    """Instead of `target.name`, what `make` makes of it."""
    return lambda patch: patch.setattr(target, name, make(getattr(target, name)))


def _read_skips_a_byte(old: Any) -> Any:
    def read(self: TaskLog, offset: int, limit: int) -> bytes:
        self.check(offset)
        at = offset - self.start
        return bytes(self._buffer[at + 1 if at else 0 :][:limit]) or old(self, offset, limit)

    return read


def _take_skips_the_gap(old: Any) -> Any:
    def take(self: TaskLog, reader: Any, limit: int, **more: Any) -> bytes:
        reader.offset = max(reader.offset, self.start)
        return old(self, reader, limit, **more)  # type: ignore[no-any-return]

    return take


def _last_reader_sleeps(old: Any) -> Any:
    def append(self: TaskLog, data: bytes) -> None:
        readers, self._readers = self._readers, self._readers[:1]
        try:
            old(self, data)
        finally:
            self._readers = readers

    return append


def _others_do_not_count(old: Any) -> Any:
    def leave(self: TaskLogs, entry: Any, reader: Any, why: Gone, now: float) -> bool:
        native = entry.native or entry.opening.detach
        return entry.log.detach(reader) and not native and why is Gone.LEFT and not entry.log.sealed

    return leave


def _comes_back_and_is_still_an_orphan(old: Any) -> Any:
    return lambda self, entry, reader: entry.log.attach(reader)


def _told_to_all(old: Any) -> Any:
    def tell(self: TaskLogs, entry: Any, epoch: str) -> None:
        for other in [epoch, *self._untold]:
            old(self, entry, other)

    return tell


def _newest_go_first(old: Any) -> Any:
    def forget(self: TaskLogs, queue: Any) -> None:
        queue.rotate(1)
        old(self, queue)

    return forget


def _loses_what_is_torn(old: Any) -> Any:
    def feed(self: records.Decoder, data: bytes) -> Any:
        found = old(self, data)
        if 0 < len(self._rest) < records.HEADER.size:
            self._rest = b""
        return found

    return feed


def _conflict_is_none(old: Any) -> Any:
    def known(self: TaskLogs, opening: Any) -> Any:
        return self._entries.get(opening.task_id) if opening.attempt == 1 else old(self, opening)

    return known


LOG_BUGS: dict[str, Plant] = {
    "a read that does not begin at the oldest byte is off by one": planted(TaskLog, "read", _read_skips_a_byte),
    "a reader that was overtaken goes on where the log begins": planted(TaskLog, "take", _take_skips_the_gap),
    "only the first reader is woken": planted(TaskLog, "append", _last_reader_sleeps),
    "a writer that waits is not told of room": planted(TaskLog, "_unblock", lambda old: lambda self: None),
    "no grace for a client that comes back": planted(
        retention, "orphan_until", lambda old: lambda **given: None if given["detach"] else given["left_at"]
    ),
    "a task that nobody reads runs to its end": planted(TaskLogs, "orphaned", lambda old: lambda self, now: []),
    "lost readers count as gone": planted(link, "_LEFT_WORDS", lambda old: old | {b"lost"}),
    "the last one to leave counts, whoever else reads": planted(TaskLogs, "leave", _others_do_not_count),
    "who comes back is still an orphan": planted(TaskLogs, "attach", _comes_back_and_is_still_an_orphan),
    "what one control was told, all were": planted(TaskLogs, "tell", _told_to_all),
    "nobody is told of what was": planted(TaskLogs, "tell", lambda old: lambda self, entry, epoch: None),
    "the newest logs are forgotten first": planted(TaskLogs, "_forget", _newest_go_first),
    "a record torn in its head is lost": planted(records.Decoder, "feed", _loses_what_is_torn),
    "credit is granted twice": planted(
        records.SendCredit, "grant", lambda old: lambda self, granted: old(self, 2 * granted)
    ),
    "credit is not granted": planted(records.ReceiveCredit, "passed_on", lambda old: lambda self, count: 0),
    "a later attempt lets the earlier one run": planted(Runner, "_fence", lambda old: lambda self, opening: None),
    "a stale attempt is shown the later one": planted(TaskLogs, "known", _conflict_is_none),
    "a slot is not given back": planted(Pools, "release", lambda old: lambda self, task_id: None),
}


# ---------------------------------------------------------------- in the whole


def _shows_more_elsewhere(patch: Patch) -> None:
    first, relay, bodies = Dispatcher._first, Dispatcher._relay, dict[str, bytes]()

    async def keeps_the_body(self: Dispatcher, task: Task, *given: Any) -> Any:
        bodies[task.task_id] = task.body
        return await first(self, task, *given)

    async def goes_on(self: Dispatcher, task: Task, *given: Any) -> Any:
        try:
            return await relay(self, task, *given)
        except LlorchError as error:
            task.state, task.body = State.PLACED, bodies[task.task_id]
            raise GoElsewhere(error, lost=True) from None

    patch.setattr(Dispatcher, "_first", keeps_the_body)
    patch.setattr(Dispatcher, "_relay", goes_on)


def _attaches_one_byte_late(old: Any) -> Any:
    return lambda self, node_id, task_id, offset, attempt, feed, **more: old(
        self, node_id, task_id, offset + (offset > 0), attempt, feed, **more
    )


def _reconnects_at_the_start(old: Any) -> Any:
    async def attached(self: LogReader) -> bool:
        at, self.offset = self.offset, 0
        try:
            return bool(await old(self))
        finally:
            self.offset = at

    return attached


def _ends_twice(old: Any) -> Any:
    def ended(self: NativeStream, tail: Any) -> Any:
        self._commit()
        self._stream.write_end(empty_end(tail, "r", "t"))
        return self._stream.finished()

    return ended


async def _nothing_came_before(self: Replays, task: Any) -> None:
    return None


CLUSTER_BUGS: dict[str, Plant] = {
    "a claim is not released": planted(WaitingRoom, "release", lambda old: lambda self, claim: None),
    "a slot is handed to nobody": planted(WaitingRoom, "pump", lambda old: lambda self, *more: None),
    "a node that is full is asked again at once": planted(
        Registry, "busy", lambda old: lambda self, claim, now, **more: None
    ),
    "a lost node is as good as before": planted(Registry, "link_lost", lambda old: lambda self, node_id, now: False),
    "what has shown bytes is tried elsewhere": _shows_more_elsewhere,
    "a reader comes back one byte late": planted(NodeClient, "attach", _attaches_one_byte_late),
    "a connection is made again at the start": planted(LogReader, "_attached", _reconnects_at_the_start),
    "an end comes twice": planted(NativeStream, "ended", _ends_twice),
    "what is repeated is run again": planted(Replays, "earlier", lambda old: _nothing_came_before),
    "a control that has just started knows all": planted(Recovery, "on", lambda old: lambda self, now: False),
    "who leaves is not missed": planted(Audience, "left", lambda old: lambda self: None),
    "nobody is woken for what a node sends": planted(
        Feed, "put", lambda old: lambda self, item: self._items.append(item)
    ),
    "what runs is not reported": planted(
        TaskLogs, "reports", lambda old: lambda self, epoch: [r for r in old(self, epoch) if r["state"] == "sealed"]
    ),
    "a node takes more than it has slots": planted(
        nodes_replicas.Replica, "free", lambda old: property(lambda self: 1)
    ),
}


TAKE_LONG = ("what has shown bytes is tried elsewhere", "a control that has just started knows all")


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=pytest.mark.slow) if bug in TAKE_LONG else bug for bug in CLUSTER_BUGS]
)
def test_a_bug_in_the_whole_is_found(bug: str) -> None:
    found(ClusterWorld, CLUSTER_BUGS[bug])


@pytest.mark.parametrize("bug", LOG_BUGS)
def test_a_bug_in_the_logs_is_found(bug: str) -> None:
    found(LogsWorld, LOG_BUGS[bug])


def found(world: type[World], plant: Plant) -> None:
    """By what it does: one that no longer fits the code, and fails on its own account, is no bug that was found."""
    with small_limits() as patch:
        virtual_time(patch)
        plant(patch)
        with pytest.raises(Broken) as broken:
            mileage(world, MOST_STEPS, SEED, shrink=False)
    print(broken.value.args[0].partition("\n")[0])
    unfit = UNFIT.search(f"{broken.value.args[0]} {broken.value.__cause__!r}")
    assert unfit is None, broken.value.args[0]
