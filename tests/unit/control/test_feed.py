"""The mailbox of one reader: order, what is gathered, and how much is taken at once."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.control.audience import Audience
from llorch.control.dispatch import Dispatcher
from llorch.control.feed import MAX_TAKEN_BYTES, Accepted, Feed, Lost, Said, Upstream
from llorch.control.log_reader import LogReader, LogReaders
from llorch.control.metrics import ControlMetrics
from llorch.control.registry import Registry
from llorch.control.tasks import Task
from llorch.messages import Head, Tail


async def taken(feed: Feed) -> list[object]:
    found: list[object] = []
    while not (feed.ended and not feed._items):
        item = await feed.next(0.0)
        if item is None:
            break
        found.append(item)
    return found


def test_log_bytes_that_wait_are_one_and_in_order_beside_other_items() -> None:
    feed = Feed()
    for item in (Accepted(), Head(), b"one ", b"two ", b"three ", Tail(length=13), b"late"):
        feed.put(item)
    assert asyncio.run(taken(feed)) == [Accepted(), Head(), b"one two three ", Tail(length=13)]


def test_what_is_taken_at_once_is_bounded_and_nothing_is_lost() -> None:
    feed, sent = Feed(), b""
    for number in range(10_000):
        feed.put(f"{number} ".encode())
        sent += f"{number} ".encode()
    feed.put(Lost("it broke"))
    *parts, last = asyncio.run(taken(feed))
    assert b"".join(parts) == sent  # type: ignore[arg-type]
    assert max(len(part) for part in parts) == MAX_TAKEN_BYTES  # type: ignore[arg-type]
    assert last == Lost("it broke")


def test_one_large_piece_that_nothing_waits_behind_passes_as_it_is() -> None:
    feed = Feed()
    feed.put(b"x" * 60_000)
    assert [len(part) for part in asyncio.run(taken(feed))] == [60_000]  # type: ignore[arg-type]


# ---------------------------------------------------------------- past the mailbox


def test_bytes_pass_directly_only_where_nothing_waits_before_them() -> None:
    feed, passed = Feed(), []

    def direct(data: bytes) -> bool:
        passed.append(data)
        return True

    assert not feed.take(b"before anybody takes them")
    feed.direct = direct
    assert feed.take(b"one")
    feed.put(Head())
    assert not feed.take(b"two")  # behind HEAD
    feed.put(b"two")
    assert asyncio.run(taken(feed)) == [Head(), b"two"]
    assert feed.take(b"three")
    feed.direct = lambda _data: False
    assert not feed.take(b"four")
    feed.direct = direct
    feed.put(Tail(length=0))
    assert not feed.take(b"late")
    asyncio.run(taken(feed))
    assert not feed.take(b"later")
    assert passed == [b"one", b"three"]


@pytest.mark.parametrize("enough", [True, False])
def test_an_accept_wakes_who_waits_only_where_it_has_to(enough: bool) -> None:
    async def main() -> None:
        feed, told = Feed(), []

        def accepted() -> bool:
            told.append(True)
            return enough

        feed.accepted = accepted
        waiting = asyncio.ensure_future(feed.next(None))
        await asyncio.sleep(0)
        feed.put(Accepted())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert told == [True]
        assert waiting.done() is not enough
        feed.put(Head())
        assert await waiting == (Head() if enough else Accepted())

    asyncio.run(main())


class Behind:
    """A client that is behind when the test says so (an audience.Client)."""

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self.direct_bytes = 0
        self.up_to_date = asyncio.Event()
        self.up_to_date.set()

    async def waiting(self, position: int, eta_ms: int | None) -> None: ...

    async def idle(self) -> None: ...

    def begin(self, head: Head) -> None: ...

    def direct(self, data: bytes) -> bool:
        if not self.up_to_date.is_set():
            return False
        self.came.append(data)
        self.direct_bytes += len(data)
        return True

    async def write(self, data: bytes) -> None:
        self.came.append(data)
        await self.up_to_date.wait()


class Node:
    """A node with a log, and the way to it (a log_reader.Opener)."""

    online, boot_id = True, "b"

    def __init__(self) -> None:
        self.log = b""
        self.feed = Feed()
        self.granted = 0
        self.nodes = {"a": self}  # the registry, as a reader sees it

    def said(self) -> Said:
        def passed_on(count: int) -> None:
            self.granted += count

        return Said(passed_on, lambda _reason: None, lambda: None, lambda: None)

    def attach(
        self, node_id: str, task_id: str, offset: int, attempt: int, feed: Feed, *, native: bool = True
    ) -> Upstream:
        assert 0 <= offset <= len(self.log)
        self.feed = feed
        feed.put(Accepted())
        feed.put(Head())
        for at in range(offset, len(self.log), 3):
            self.send(self.log[at : at + 3])
        return self.said()

    def open(self, node_id: str, header: dict[str, Any], body: bytes, feed: Feed) -> Upstream:
        raise NotImplementedError

    def silent(self, node_id: str, since: float) -> bool:
        return False

    async def answers(self, node_id: str, within_s: float) -> bool:
        return True

    def writes(self, data: bytes) -> None:
        self.log += data
        self.send(data)

    def send(self, data: bytes) -> None:
        """As links do."""
        if self.feed.take(data):
            self.granted += len(data)
        else:
            self.feed.put(data)


STEPS = st.lists(
    st.one_of(
        st.integers(1, 5).map(lambda size: ("writes", size)),
        st.sampled_from([("turn", 1), ("turn", 3), ("stalls", 0), ("stalls", 0), ("catches up", 0), ("breaks", 0)]),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(STEPS, st.booleans())
def test_the_order_of_bytes_is_that_of_the_log_whatever_passes_directly_and_whatever_waits(
    steps: list[tuple[str, int]], begins_behind: bool
) -> None:
    async def main() -> None:
        node, client = Node(), Behind()
        if begins_behind:
            client.up_to_date.clear()
        readers = LogReaders(cast(Registry, node), node, ControlMetrics())
        task = Task.read_again("t", owner="o", request_id="r", now=0.0)
        audience = Audience(task, client, back=lambda: None)
        node.feed.put(Head())
        reader = LogReader(readers, "a", "t", 1, node.feed, node.said())
        assert await reader.next(None) == Head()
        relay = SimpleNamespace(_clock=time.monotonic)
        relaying = asyncio.ensure_future(Dispatcher._relay(cast(Dispatcher, relay), task, reader, audience))
        await asyncio.sleep(0)
        written = 0
        for what, count in steps:
            if what == "writes":
                node.writes(bytes((written + at) % 251 for at in range(count)))
                written += count
            elif what == "breaks":
                node.feed.put(Lost("it broke"))
                node.feed = Feed()  # what is written meanwhile comes with the next one
            elif what == "turn":
                for _ in range(count):
                    await asyncio.sleep(0)
            elif what == "stalls":
                client.up_to_date.clear()
            else:
                client.up_to_date.set()
        client.up_to_date.set()
        for _ in range(200):  # as many turns as it takes a reader to be attached again
            await asyncio.sleep(0)
        node.feed.put(Tail(length=len(node.log)))
        assert await asyncio.wait_for(relaying, 5) == Tail(length=len(node.log))
        assert b"".join(client.came) == node.log
        assert task.offset == reader.offset == len(node.log)
        if not any(what == "breaks" for what, _ in steps):
            assert node.granted == len(node.log)  # each byte once, whichever way it went

    asyncio.run(main())


def test_a_client_that_keeps_up_gets_each_piece_directly_and_no_task_is_woken() -> None:
    async def main() -> None:
        node, client = Node(), Behind()
        readers = LogReaders(cast(Registry, node), node, ControlMetrics())
        task = Task.read_again("t", owner="o", request_id="r", now=0.0)
        reader = LogReader(readers, "a", "t", 1, node.feed, node.said())
        relay, audience = SimpleNamespace(_clock=time.monotonic), Audience(task, client, back=lambda: None)
        relaying = asyncio.ensure_future(Dispatcher._relay(cast(Dispatcher, relay), task, reader, audience))
        await asyncio.sleep(0)
        waiter = node.feed._waiter
        for number in range(10):
            node.writes(b"%d " % number)
        assert client.came == [b"%d " % number for number in range(10)]  # before any turn of the loop
        assert node.feed._waiter is waiter
        assert waiter is not None
        assert not waiter.done()
        assert client.direct_bytes == task.offset == reader.offset == 20
        audience.left()
        node.writes(b"to nobody")
        assert client.direct_bytes == 20
        node.feed.put(Tail(length=29))
        await relaying

    asyncio.run(main())


def test_bytes_pass_directly_again_once_a_lost_connection_is_made_again() -> None:
    async def main() -> None:
        node, client = Node(), Behind()
        readers = LogReaders(cast(Registry, node), node, ControlMetrics())
        task = Task.read_again("t", owner="o", request_id="r", now=0.0)
        node.feed.put(Head())
        reader = LogReader(readers, "a", "t", 1, node.feed, node.said())
        await reader.next(None)
        relay, audience = SimpleNamespace(_clock=time.monotonic), Audience(task, client, back=lambda: None)
        relaying = asyncio.ensure_future(Dispatcher._relay(cast(Dispatcher, relay), task, reader, audience))
        await asyncio.sleep(0)
        node.writes(b"one")
        node.feed.put(Lost("it broke"))
        before = node.feed
        for _ in range(50):
            await asyncio.sleep(0)
        assert node.feed is not before
        node.writes(b"two")
        assert client.came == [b"one", b"two"]  # before any turn of the loop
        assert client.direct_bytes == 6
        node.feed.put(Tail(length=6))
        await relaying

    asyncio.run(main())
