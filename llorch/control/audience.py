"""Who listens to one task: the client that sent it, those that came back for it, or nobody for a while.

Owns when a task has lost its last listener at this control, and what that means before its first byte: a native task is
kept for a grace, for its client may be on its way back; any other has nobody left who could read it. After the first
byte it is for the task's node to decide. Never reads a task's log.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from llorch.control.tasks import State, Task
from llorch.errors import LlorchError
from llorch.messages import Head, Tail

RECONNECT_GRACE_S = 10.0  # what a node gives a native task whose reader has left; here, one that no node has shown yet


class Client(Protocol):
    """The one who asked, as dispatch sees it: an HTTP response in one of its forms, or a detached task's record."""

    async def waiting(self, position: int, eta_ms: int | None) -> None:
        """The task waits for a slot; said about once a second."""

    async def idle(self) -> None:
        """`PING_AFTER_S` without a byte."""

    def begin(self, head: Head) -> None:
        """The first byte is here. From now on the task can't be retried."""

    def direct(self, data: bytes) -> bool:
        """Log bytes for a client that keeps up, taken at once. False: nothing was done, and they have to wait."""

    async def write(self, data: bytes) -> None:
        """Log bytes. Returns when the client's side has taken them."""


class SlowReader(ConnectionError):
    """The client took no byte for too long; it is treated as gone, and may come back for the rest."""


class ShuttingDown(Exception):
    """The control goes; the task stays on its node."""


class Unheard(ConnectionError):
    """The first byte is here, and nobody to show it to."""


def farewell_of(error: BaseException) -> str:
    """The DETACH reason for a reader that ends this way."""
    if isinstance(error, ShuttingDown):
        return "shutdown"
    return "slow" if isinstance(error, SlowReader) else "left"


def _to_nobody(_data: bytes) -> bool:
    """Those that came back read for themselves."""
    return True


class Fact:
    """An asyncio.Event that costs nothing until somebody waits for it: nearly always nobody does."""

    __slots__ = ("_event", "_set")

    def __init__(self) -> None:
        self._set = False
        self._event: asyncio.Event | None = None

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        if not self._set:
            if self._event is None:
                self._event = asyncio.Event()
            await self._event.wait()


class Audience:
    """All who listen to one task, as one Client: what it is told reaches the client that sent the task.

    Those that came back read the log by themselves; for them the task only has to go on. `running` is the asyncio task
    that serves it, cancelled when nobody is left; `back` is called when somebody is here again.
    """

    def __init__(self, task: Task, client: Client, *, back: Callable[[], None]) -> None:
        self.task = task
        self._back = back
        self.taken = Fact()  # a node has accepted it, or it has ended
        self.begun = Fact()  # it has shown its first byte, or has ended
        self.gone = Fact()  # it has ended
        self.accepted_by_node = False
        self.trouble: LlorchError | None = None  # of the client that sent it alone; the others have been served
        self.running: asyncio.Task[Tail | Exception] | None = None
        self._alive = False
        self._client: Client | None = client
        self.direct: Callable[[bytes], bool] = client.direct  # as `write`, where nothing has to be waited for
        self._followers = 0
        self._grace: asyncio.TimerHandle | None = None

    # ---- who comes and goes

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """One that came back is here for as long as the block runs."""
        was_silent = self.silent
        self._followers += 1
        self._stay()
        if was_silent:
            self._back()
        try:
            yield
        finally:
            self._followers -= 1
            self._look_around()

    def opened(self) -> None:
        """`running` has made its first step: cancelled before that, it would never know that it was."""
        self._alive = True
        self._look_around()

    def left(self) -> None:
        """The client that sent the task has gone."""
        self._gone()
        self._look_around()

    def ended(self) -> None:
        self._alive = False
        self._stay()
        self.taken.set()
        self.begun.set()
        self.gone.set()

    def _gone(self) -> None:
        self._client, self.direct = None, _to_nobody

    @property
    def silent(self) -> bool:
        """Nobody is here. Of a task that its client has left with the cluster nobody has to be."""
        return self._client is None and not self._followers and not (self.task.detach and self.accepted_by_node)

    @property
    def _may_come_back(self) -> bool:
        return self.task.native and self.task.state in (State.QUEUED, State.PLACED)

    def _look_around(self) -> None:
        if not self._alive or not self.silent or self.running is None:
            return
        if not self._may_come_back:
            self.running.cancel()
        elif self._grace is None:
            self._grace = asyncio.get_running_loop().call_later(RECONNECT_GRACE_S, self._give_up)

    def _give_up(self) -> None:
        self._grace = None
        if self._alive and self.silent and self.running is not None:
            self.running.cancel()

    def _stay(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    # ---- what they are told

    async def waiting(self, position: int, eta_ms: int | None) -> None:
        if self._client is not None:
            try:
                await self._client.waiting(position, eta_ms)
            except (LlorchError, ConnectionError) as error:
                self._broke_off(error)

    def accepted(self) -> None:
        self.accepted_by_node = True
        self.taken.set()
        if self.task.detach:
            self._stay()

    async def idle(self) -> None:
        if self._client is not None:
            try:
                await self._client.idle()
            except (LlorchError, ConnectionError) as error:
                self._broke_off(error)

    def begin(self, head: Head) -> None:
        """Raises Unheard if there is nobody to begin for."""
        self.begun.set()
        if self._client is not None:
            try:
                self._client.begin(head)
                self.direct = self._client.direct
            except (LlorchError, ConnectionError) as error:
                self._broke_off(error)
        if self.silent:
            raise Unheard("nobody is here to read it")

    async def write(self, data: bytes) -> None:
        if self._client is not None:
            try:
                await self._client.write(data)
            except (LlorchError, ConnectionError) as error:
                self._broke_off(error)

    def _broke_off(self, error: LlorchError | ConnectionError) -> None:
        """The client has: that ends the task only if it was the last to listen. Raises `error` then."""
        if isinstance(error, LlorchError):
            if not self._followers:
                raise error
            self._gone()
            self.trouble = error
            return
        self._gone()
        if self.silent and not self._may_come_back:
            raise error
        self._look_around()
