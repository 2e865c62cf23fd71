"""Whose turn it is on a link, and what waits while the connection is full. The connection is a list."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any, cast

import pytest

from llorch import records
from llorch.link import Link
from llorch.messages import Head, Open, Tail
from llorch.node.link import ACCEPT_WITHIN_S, TURN_BYTES, Answer, NodeLink
from llorch.node.retention import Limits, TaskLogs
from llorch.node.runner import Runner
from llorch.node.task_entry import Gone, TaskEntry
from llorch.node.tasklog import Reader
from llorch.records import INITIAL_CREDIT_BYTES, Record, Type


class Wire:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.full = False
        self.sent: list[Record] = []
        self.writes: list[list[tuple[int, int]]] = []  # of each: the stream and the type of its records
        self._decoder = records.Decoder()

    def send(self, encoded: bytes) -> None:
        sent = self._decoder.feed(encoded)
        self.sent += sent
        self.writes.append([(record.stream, record.type) for record in sent])

    def taken(self) -> list[Record]:
        sent, self.sent = self.sent, []
        return sent


class Tasks:
    """The runner, as a link sees it."""

    def __init__(self) -> None:
        self.logs = TaskLogs(Limits())
        self.left: list[Gone] = []

    def attach(self, entry: TaskEntry, reader: Reader) -> None:
        self.logs.attach(entry, reader)

    def leave(self, entry: TaskEntry, reader: Reader, why: Gone) -> None:
        self.left.append(why)
        self.logs.leave(entry, reader, why, 0.0)

    def accept(self, opening: Open) -> tuple[TaskEntry, bool]:
        return self.logs.add(opening, 0.0, 0.0), True

    def running(self) -> TaskEntry:
        opening = Open.model_validate({"task_id": str(uuid.uuid4()), "pool_id": "p"})
        return self.logs.add(opening, 0.0, 0.0)


async def _no_calls(_call: object, _body: bytes) -> Answer:
    raise AssertionError("nobody calls")


def made() -> tuple[NodeLink, Wire, Tasks]:
    tasks, wire = Tasks(), Wire()
    link = NodeLink(cast(Runner, tasks), _no_calls, "epoch", lambda _link, _reason: None)
    link.connection = cast(Link, wire)
    return link, wire, tasks


def attach(link: NodeLink, stream: int, entry: TaskEntry) -> None:
    wish: dict[str, Any] = {"task_id": entry.task_id, "offset": 0}
    link.link_record(Record(stream, Type.ATTACH, json.dumps(wish).encode()))


def opened(link: NodeLink, tasks: Tasks, stream: int) -> TaskEntry:
    wish = {"task_id": str(uuid.uuid4()), "pool_id": "p", "body_len": 1}
    link.link_record(Record(stream, Type.OPEN, json.dumps(wish).encode()))
    return tasks.logs.get(wish["task_id"])


def seal(entry: TaskEntry) -> None:
    entry.log.seal(Tail(length=entry.log.end, sha256=entry.log.sha256))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def order(sent: list[Record], kind: Type) -> list[int]:
    return [record.stream for record in sent if record.type == kind]


async def test_streams_take_turns() -> None:
    link, wire, tasks = made()
    one, two = tasks.running(), tasks.running()
    for entry in (one, two):
        entry.log.begin(Head(), b"x" * INITIAL_CREDIT_BYTES)
    attach(link, 1, one)
    attach(link, 3, two)
    await turns()
    sent = [(record.stream, len(record.payload)) for record in wire.taken() if record.type == Type.DATA]
    shares: list[list[int]] = []
    for stream, count in sent:
        if shares and shares[-1][0] == stream:
            shares[-1][1] += count
        else:
            shares.append([stream, count])
    assert shares == [[1, TURN_BYTES], [3, TURN_BYTES], [1, TURN_BYTES], [3, TURN_BYTES]]


async def test_nothing_is_sent_while_the_connection_is_full() -> None:
    link, wire, tasks = made()
    entries = [tasks.running() for _ in range(3)]
    for number, entry in enumerate(entries):
        attach(link, 2 * number + 1, entry)
    wire.taken()
    wire.full = True
    for entry in entries:
        entry.log.begin(Head(), b"one")
        entry.log.append(b"two")
    await turns()
    assert wire.taken() == []
    wire.full = False
    link.link_writable()
    sent = wire.taken()
    assert order(sent, Type.HEAD) == order(sent, Type.DATA) == [1, 3, 5]
    assert {record.payload for record in sent if record.type == Type.DATA} == {b"onetwo"}


async def test_stream_that_waits_is_not_queued_twice() -> None:
    link, wire, tasks = made()
    entry = tasks.running()
    attach(link, 1, entry)
    wire.full = True
    entry.log.begin(Head(), b"a")
    for _ in range(1_000):
        entry.log.append(b"b")
    assert len(link._waiting) == 1


async def test_head_and_first_bytes_go_in_one_write_and_tail_ends_the_stream() -> None:
    link, wire, tasks = made()
    entry = tasks.running()
    attach(link, 1, entry)
    entry.log.begin(Head(), b"abc")
    seal(entry)
    assert [record.type for record in wire.taken()] == [Type.ACCEPT, Type.HEAD, Type.DATA, Type.TAIL]
    assert len(link) == 0
    assert entry.log.readers == 0
    assert entry.told == {"epoch"}
    link.link_record(Record(1, Type.CREDIT, (1).to_bytes(4, "big")))  # late
    assert wire.taken() == []


async def test_an_accept_leaves_with_what_is_said_first() -> None:
    link, wire, tasks = made()
    entry = opened(link, tasks, 1)
    assert wire.writes == []
    entry.log.begin(Head(), b"abc")
    assert wire.writes == [[(1, Type.ACCEPT), (1, Type.HEAD), (1, Type.DATA)]]
    await asyncio.sleep(2 * ACCEPT_WITHIN_S)
    assert [kind for write in wire.writes for _, kind in write].count(Type.ACCEPT) == 1


async def test_accepts_with_nothing_to_say_leave_together_and_soon() -> None:
    link, wire, tasks = made()
    entry = opened(link, tasks, 1)
    opened(link, tasks, 3)
    opened(link, tasks, 5)
    link.link_record(Record(5, Type.DETACH, b"left"))  # nobody is there to be told
    await asyncio.sleep(4 * ACCEPT_WITHIN_S)
    assert [write for write in wire.writes if write] == [[(1, Type.ACCEPT), (3, Type.ACCEPT)]]
    entry.log.begin(Head(), b"abc")
    assert wire.writes[-1] == [(1, Type.HEAD), (1, Type.DATA)]
    opened(link, tasks, 7)
    await asyncio.sleep(4 * ACCEPT_WITHIN_S)
    assert wire.writes[-1] == [(7, Type.ACCEPT)]


async def test_who_comes_back_is_accepted_at_once() -> None:
    link, wire, tasks = made()
    attach(link, 1, tasks.running())
    assert wire.writes == [[(1, Type.ACCEPT)]]


async def test_an_event_is_torn_only_if_no_record_has_room_for_it() -> None:
    link, wire, tasks = made()
    events = [b"data: " + b"x" * size + b"\n\n" for size in (60_000, 60_000, 20_000, 100_000)]
    entry = tasks.running()
    attach(link, 1, entry)
    entry.log.begin(Head(headers={"content-type": "text/event-stream"}), b"".join(events))
    seal(entry)
    await turns()
    sent = b"".join(record.payload for record in wire.taken() if record.type == Type.DATA)
    assert sent == b"".join(events[:2])  # 11 KB of credit are left, and the next event has 20
    for _ in range(4):
        link.link_record(Record(1, Type.CREDIT, (INITIAL_CREDIT_BYTES // 2).to_bytes(4, "big")))
        await turns()
    *rest, last = wire.taken()
    assert sent + b"".join(record.payload for record in rest) == b"".join(events)
    assert last.type == Type.TAIL


async def test_tail_waits_for_credit() -> None:
    link, wire, tasks = made()
    entry = tasks.running()
    attach(link, 1, entry)
    entry.log.begin(Head(), b"x" * (INITIAL_CREDIT_BYTES + 10))
    seal(entry)
    await turns()
    assert Type.TAIL not in [record.type for record in wire.taken()]
    link.link_record(Record(1, Type.CREDIT, (9).to_bytes(4, "big")))
    assert [len(record.payload) for record in wire.taken()] == [9]
    link.link_record(Record(1, Type.CREDIT, (1).to_bytes(4, "big")))
    assert [record.type for record in wire.taken()] == [Type.DATA, Type.TAIL]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        (b"left", Gone.LEFT),
        (b"slow", Gone.LEFT),
        (b"lost", Gone.LOST),
        (b"shutdown", Gone.LOST),
        (b"", Gone.LOST),
        (b"a word from the future", Gone.LOST),
    ],
)
async def test_reader_leaves_for_the_reason_that_it_gives(word: bytes, meant: Gone) -> None:
    """What is not known to be a client's own wish may be the end of a control: the task must not suffer for it."""
    link, _, tasks = made()
    entry = tasks.running()
    link.link_record(Record(1, Type.ATTACH, json.dumps({"task_id": entry.task_id}).encode()))
    assert entry.log.readers == 1
    link.link_record(Record(1, Type.DETACH, word))
    link.link_record(Record(1, Type.DETACH, b"left"))  # late: the stream has ended
    assert tasks.left == [meant]
    assert entry.log.readers == 0


async def test_end_of_the_link_loses_every_reader() -> None:
    link, _, tasks = made()
    entries = [tasks.running(), tasks.running()]
    for number, entry in enumerate(entries):
        attach(link, 2 * number + 1, entry)
    link.link_lost("cut")
    assert tasks.left == [Gone.LOST, Gone.LOST]
    assert all(entry.log.readers == 0 for entry in entries)
