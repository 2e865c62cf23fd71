"""Who is being served at this moment, so that what a credential has opened ends when the credential does.

Owns the set of running requests by principal; a link is one of them. Knows nothing of why a credential is no longer
good: whoever does calls `end`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from llorch.auth import Principal

REVOKED = "its credential is no longer valid"


class Serving(Protocol):
    """What serves somebody: an asyncio task, or whatever else can be ended."""

    def cancel(self, msg: str) -> object: ...


class Sessions:
    def __init__(self) -> None:
        self._running: dict[Principal, set[Serving]] = {}

    def begin(self, principal: Principal, serving: Serving) -> None:
        """From now on, until `end_of`, it serves `principal`."""
        running = self._running.get(principal)
        if running is None:
            running = self._running[principal] = set()
        running.add(serving)

    def end_of(self, principal: Principal, serving: Serving) -> None:
        running = self._running.get(principal)
        if running is not None:
            running.discard(serving)
            if not running:
                del self._running[principal]

    @contextlib.contextmanager
    def serving(self, principal: Principal) -> Iterator[None]:
        """For as long as the block runs, this task serves `principal`."""
        task = asyncio.current_task()
        assert task is not None
        self.begin(principal, task)
        try:
            yield
        finally:
            self.end_of(principal, task)

    def end(self, still_good: Callable[[Principal], bool]) -> list[Principal]:
        """Cancel all that serves somebody whose credential is no longer good. Returns whose."""
        ended = [principal for principal in self._running if not still_good(principal)]
        for principal in ended:
            for serving in list(self._running[principal]):
                serving.cancel(REVOKED)
        return ended
