"""Who is being served at this moment, so that what a credential has opened ends when the credential does.

Owns the set of running requests by principal; a link is one of them. Knows nothing of why a credential is no longer
good: whoever does calls `end`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from llorch.auth import Principal

REVOKED = "its credential is no longer valid"


class Sessions:
    def __init__(self) -> None:
        self._running: dict[Principal, set[asyncio.Task[object]]] = {}

    @contextlib.contextmanager
    def serving(self, principal: Principal) -> Iterator[None]:
        """For as long as the block runs, this task serves `principal`."""
        task = asyncio.current_task()
        assert task is not None
        running = self._running.setdefault(principal, set())
        running.add(task)
        try:
            yield
        finally:
            running.discard(task)
            if not running and self._running.get(principal) is running:
                del self._running[principal]

    def end(self, still_good: Callable[[Principal], bool]) -> list[Principal]:
        """Cancel all that serves somebody whose credential is no longer good. Returns whose."""
        ended = [principal for principal in self._running if not still_good(principal)]
        for principal in ended:
            for task in self._running[principal]:
                task.cancel(REVOKED)
        return ended
