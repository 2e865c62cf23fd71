"""^C while a task runs: the first one cancels the task, the second one leaves at once.

Owns the signal handlers of that time. A first signal that finds the program blocked in a write (a pager that does not
read) breaks out of the write; otherwise it cancels the asyncio task that runs the command.
"""

from __future__ import annotations

import asyncio
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from llorch.cli.exits import Exit
from llorch.cli.output import abandon_output

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """Raised in a write that was blocked when the signal came."""


class Handled(ABC):
    """The handlers of signals while the block lasts, and writes that one of them breaks out of."""

    numbers: tuple[signal.Signals, ...] = SIGNALS

    def __init__(self) -> None:
        self._writing = False
        self._before: dict[int, Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        for number in self.numbers:
            try:
                ignored = signal.getsignal(number) is signal.SIG_IGN  # nohup: it is not to be ended by this
                if not ignored:
                    self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread, so signals are somebody else's
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @abstractmethod
    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """A signal has come; `_writing` tells whether into a write."""

    def guarded(self, write: Callable[[str], None]) -> Callable[[str], None]:
        """`write`, such that a signal breaks out of it."""

        def writing(text: str) -> None:
            self._writing = True
            try:
                write(text)
            finally:
                self._writing = False

        return writing


class Interrupts(Handled):
    """Use around the work that a signal is to end; `hit` tells whether one came."""

    def __init__(self) -> None:
        super().__init__()
        self.hit = False
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        return super().__enter__()

    def ours(self, ended: BaseException) -> bool:
        """Whether a signal brought `ended` about. If so it is dealt with here: no cancellation of the task is left."""
        if self.hit and self._task is not None and isinstance(ended, asyncio.CancelledError):
            self._task.uncancel()
        return self.hit

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.hit:
            os._exit(Exit.INTERRUPTED)
        self.hit = True
        if self._writing:
            abandon_output()
            raise Interrupted
        assert self._loop is not None and self._task is not None
        self._loop.call_soon_threadsafe(self._task.cancel)
