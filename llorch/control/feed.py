"""What a node sends for one reader of one task, waiting to be taken.

Owns the mailbox between the connection a node's records arrive on (which must never wait) and the coroutine that serves
a client (which does). Its size is bounded by credit: the node may have sent at most the window that was not passed on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llorch.errors import LlorchError
from llorch.messages import Head, Tail


@dataclass(frozen=True, slots=True)
class Accepted:
    """The node has taken the task: it holds a slot there."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The node will not serve this reader. Nothing follows."""

    error: LlorchError


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection ended with no TAIL: what the node did since is unknown. Nothing follows."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """This control is shutting down. Nothing follows."""


Item = Accepted | Refused | Head | bytes | Tail | Lost | Stopped


_LAST = frozenset({Refused, Tail, Lost, Stopped})
MAX_TAKEN_BYTES = 16 * 1024  # at once: what is being written to a slow client is held twice


class Feed:
    """One reader's mailbox. `put` never waits; `next` waits; neighbouring log bytes are taken as one.

    What waits behind other bytes is gathered in one buffer: as objects of their own, the tokens of a stalled reader
    would take a third more.
    """

    __slots__ = ("_items", "_waiter", "accepted", "direct", "ended")

    def __init__(self) -> None:
        self._items: deque[Item | bytearray] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.direct: Callable[[bytes], bool] | None = None  # takes bytes at once that nothing is before, if it can
        self.accepted: Callable[[], bool] | None = None  # is told of an ACCEPT at once: True if nobody has to wake
        self.ended = False

    def take(self, data: bytes) -> bool:
        """Whether bytes that have come could be passed on at once. If not, `put` them."""
        return self.direct is not None and not self._items and not self.ended and self.direct(data)

    def put(self, item: Item) -> None:
        if self.ended:
            return
        if self.accepted is not None and type(item) is Accepted and self.accepted():
            return
        self.ended = type(item) in _LAST
        if isinstance(item, bytes) and self._items and isinstance(self._items[-1], bytes | bytearray):
            last = self._items[-1]
            if isinstance(last, bytes):
                last = self._items[-1] = bytearray(last)
            last += item
        else:
            self._items.append(item)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def next(self, timeout_s: float | None) -> Item | None:
        """The next item, or None after `timeout_s` without one."""
        if not self._items:
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, _wake, waiter) if timeout_s is not None else None
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
            if not self._items:
                return None
        item = self._items.popleft()
        if not isinstance(item, bytearray):
            return item
        if len(item) > MAX_TAKEN_BYTES:
            taken = bytes(memoryview(item)[:MAX_TAKEN_BYTES])
            del item[:MAX_TAKEN_BYTES]
            self._items.appendleft(item)
            return taken
        return bytes(item)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Upstream(Protocol):
    """A control's handle on one stream of a node: what a reader may say."""

    def passed_on(self, count: int) -> None:
        """`count` log bytes have left for the client."""

    def detach(self, reason: str) -> None:
        """This reader goes; the node decides what becomes of the task."""

    def cancel(self) -> None:
        """End the task; its TAIL still comes."""

    def discard(self) -> None:
        """The same of an attempt that the task has left behind, and that nobody is to find."""


@dataclass(slots=True)
class Said:
    """An Upstream made of what its four words do."""

    passed_on: Callable[[int], None]
    detach: Callable[[str], None]
    cancel: Callable[[], None]
    discard: Callable[[], None]
