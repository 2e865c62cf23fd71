"""One task's log, read from its node over as many connections as it takes.

Owns the offset that has been reached, and what a lost connection means: the same node, the same log, at the offset, for
as long as RECONNECT_S; after that, or once it is certain that the log is gone, NODE_LOST. Never retries a task.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from llorch.control.feed import Accepted, Feed, Item, Lost, Refused, Said, Stopped, Upstream
from llorch.control.metrics import ControlMetrics
from llorch.control.registry import Registry
from llorch.errors import Code, LlorchError
from llorch.logs import Log
from llorch.messages import Head, Tail

RECONNECT_S = 5.0  # a link that broke is back within 2 s if its node lives; a client waits this long with no word
ANSWER_S = 1.0  # for a node to answer an ATTACH
LOOK_EVERY_S = 0.25  # how often a node without a link is tried again

# What a node says of a log. Any other refusal is of the way to it: a proxy's, or of a token that a link does not need.
_FINAL = frozenset({Code.TASK_NOT_FOUND, Code.GAP, Code.INVALID_REQUEST, Code.CONFLICT})
NOWHERE = Said(passed_on=lambda _count: None, detach=lambda _reason: None, cancel=lambda: None, discard=lambda: None)

log = Log("control.log_reader")


class Opener(Protocol):
    """How nodes are reached: over their link, or by HTTP for those that have none."""

    def open(self, node_id: str, header: dict[str, Any], body: bytes, feed: Feed) -> Upstream:
        """Raises LlorchError NODE_LOST when there is no way to the node."""

    def attach(
        self, node_id: str, task_id: str, offset: int, attempt: int, feed: Feed, *, native: bool = True
    ) -> Upstream:
        """As `open`. Of another attempt than this one the node knows no such task."""

    def silent(self, node_id: str, since: float) -> bool:
        """Whether its link is up, and has brought nothing since then (monotonic seconds)."""

    async def answers(self, node_id: str, within_s: float) -> bool:
        """Ask over its link; one that does not answer in time is ended, so that a new one comes."""


class News:
    """Wakes those who wait for something to change: a link that is up, a node that has gone, the end of it all."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    async def wait(self, timeout_s: float) -> None:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            await asyncio.wait((waiting,), timeout=timeout_s)
        finally:
            self._waiting.discard(waiting)


class LogReaders:
    """What the readers of this control share, and all of them, so that they can be stopped."""

    def __init__(self, registry: Registry, opener: Opener, metrics: ControlMetrics) -> None:
        self.registry = registry
        self.opener = opener
        self.metrics = metrics
        self.news = News()
        self.stopped = False
        self._readers: set[LogReader] = set()

    async def attach(
        self,
        node_id: str,
        task_id: str,
        offset: int,
        attempt: int,
        *,
        native: bool = True,
        patience_s: float | None = None,
    ) -> LogReader:
        """A reader of a task's log, for one who came back. Raises NODE_LOST, or what the node refuses."""
        reader = LogReader(
            self, node_id, task_id, attempt, Feed(), NOWHERE, offset, native=native, patience_s=patience_s
        )
        await reader.open()
        return self.add(reader)

    def reads(self, task_id: str) -> bool:
        return any(reader.task_id == task_id for reader in self._readers)

    def add(self, reader: LogReader) -> LogReader:
        self._readers.add(reader)
        return reader

    def forget(self, reader: LogReader) -> None:
        self._readers.discard(reader)

    def stop(self) -> None:
        """This control goes: every reader is told, and nodes keep what runs."""
        self.stopped = True
        for reader in list(self._readers):
            reader.stop()
        self.news.tell()


class LogReader:
    """Close it when it is not read any more: `close(why)`."""

    def __init__(
        self,
        readers: LogReaders,
        node_id: str,
        task_id: str,
        attempt: int,
        feed: Feed,
        upstream: Upstream,
        offset: int = 0,
        *,
        native: bool = True,
        patience_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.node_id = node_id
        self.task_id = task_id
        self.attempt = attempt
        self.native = native
        self.offset = offset  # of the next byte; what came before was given to `next`'s caller
        self._readers = readers
        self._feed = feed
        self._upstream = upstream
        self._patience_s = RECONNECT_S if patience_s is None else patience_s
        self._clock = clock
        self._boot_id = self._boot()
        self._direct: Callable[[bytes], bool] | None = None  # as feed.Feed's
        self._begun = False  # there is such a log, and this reader has its place in it
        self._headed = False
        self._canceled = False

    def _boot(self) -> str | None:
        """Which process of the node this is; None if it is away for good."""
        node = self._readers.registry.nodes.get(self.node_id)
        return None if node is None or not node.online else node.boot_id or ""

    # ---- reading

    async def open(self) -> None:
        """Take one's place in a log that was begun before. Raises as `next`."""
        await self._connect("it can't be reached")
        self._begun = True

    async def next(self, timeout_s: float | None) -> Item | None:
        """The next item, or None after `timeout_s` without one. A Lost only before HEAD, of a task just opened.

        Later a connection that was lost is made again, and the bytes go on where they were: raises NODE_LOST if that
        can't be, and what the node refuses.
        """
        while True:
            item = await self._feed.next(timeout_s)
            if isinstance(item, bytes):
                self.offset += len(item)
            elif isinstance(item, Head):
                if self._headed:
                    continue  # of a connection that was made again
                self._headed = self._begun = True
            elif isinstance(item, Lost) and self._begun:
                await self._again(item.reason)
                continue
            return item

    async def last_word(self, timeout_s: float) -> Tail | None:
        """The TAIL, if it is the next thing to come."""
        item = await self._feed.next(timeout_s)
        return item if isinstance(item, Tail) else None

    def when_accepted(self, accepted: Callable[[], bool]) -> None:
        """As feed.Feed's, of a task that was just opened."""
        self._feed.accepted = accepted

    def pass_directly(self, take: Callable[[bytes], bool]) -> None:
        """From now on bytes that come while none wait are given to `take`, which moves `offset` on; what it does not
        take, `next` returns."""
        self._feed.direct = self._direct = take

    def passed_on(self, count: int) -> None:
        """`count` bytes have left for the client."""
        self._upstream.passed_on(count)

    def cancel(self) -> None:
        """End the task; its TAIL still comes. Said again on a connection that is made later."""
        self._canceled = True
        if not self._feed.ended:
            self._upstream.cancel()

    def discard(self) -> None:
        """End this attempt, which the task leaves behind."""
        if not self._feed.ended:
            self._upstream.discard()

    def stop(self) -> None:
        self._feed.put(Stopped())
        self._upstream.detach("shutdown")

    def close(self, why: str) -> None:
        """This reader goes, and the node is told why, if the log has not ended."""
        self._readers.forget(self)
        self._direct = self._feed.direct = self._feed.accepted = None  # they hold it, and what they reach, in a circle
        if not self._feed.ended:
            self._upstream.detach(why)

    # ---- a connection that was lost

    async def _again(self, reason: str) -> None:
        log.info("reader.lost", task_id=self.task_id, node_id=self.node_id, offset=self.offset, reason=reason)
        try:
            await self._connect(reason)
        except LlorchError as error:
            if error.code in (Code.NODE_LOST, Code.GAP):
                raise
            raise self._lost("it no longer has the log") from None
        self._readers.metrics.resumed("reconnect")
        log.info("reader.resumed", task_id=self.task_id, node_id=self.node_id, offset=self.offset)

    def _lost(self, reason: str) -> LlorchError:
        return LlorchError(Code.NODE_LOST, f"the node was lost while it answered: {reason}")

    async def _connect(self, reason: str) -> None:
        """Until the node has this reader, for as long as that may take."""
        until = self._clock() + self._patience_s
        while not self._readers.stopped:
            boot_id = self._boot()
            if boot_id is None or boot_id != self._boot_id:
                raise self._lost(reason)
            if await self._attached():
                return
            left_s = until - self._clock()
            if left_s <= 0:
                raise self._lost(reason)
            await self._readers.news.wait(min(left_s, LOOK_EVERY_S))
        self._feed = Feed()
        self._feed.put(Stopped())

    async def _attached(self) -> bool:
        """Try once. Raises what the node refuses."""
        feed = Feed()
        try:
            upstream = self._readers.opener.attach(
                self.node_id, self.task_id, self.offset, self.attempt, feed, native=self.native
            )
        except LlorchError:
            return False  # there is no way to it now
        try:
            item = await feed.next(ANSWER_S)
            if isinstance(item, Refused) and item.error.code in _FINAL:
                raise item.error
            if not isinstance(item, Accepted):
                return False  # lost again, stopped, or no answer in time
            self._feed, self._upstream = feed, upstream
            feed.direct = self._direct
            if self._canceled:
                upstream.cancel()
            return True
        except asyncio.CancelledError:
            self._upstream = upstream
            upstream.detach("left")
            raise
        finally:
            if self._upstream is not upstream and not feed.ended:
                upstream.detach("lost")
