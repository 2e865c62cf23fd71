"""The mailbox of one reader: order, what is gathered, and how much is taken at once."""

from __future__ import annotations

import asyncio

from llorch.control.feed import MAX_TAKEN_BYTES, Accepted, Feed, Lost
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
