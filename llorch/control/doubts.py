"""Nodes whose link is up and brings nothing: they are asked whether they live, and get no new tasks until they answer.

Owns who is being asked. What an answer, or none, means for the link is the `Opener`'s.
"""

from __future__ import annotations

from collections.abc import Callable

from llorch.control.log_reader import Opener
from llorch.control.registry import Registry
from llorch.logs import Log
from llorch.tasks import Guard

DOUBT_S = 5.0  # for a silent link to answer a PING: as long as TCP is given to notice a black hole

log = Log("control.dispatch")


class Doubts:
    """`changed` is called when a node is believed again."""

    def __init__(self, registry: Registry, opener: Opener, guard: Guard, changed: Callable[[], None]) -> None:
        self._registry = registry
        self._opener = opener
        self._guard = guard
        self._changed = changed

    def begin(self, node_id: str) -> None:
        """Nothing has come over its link since an OPEN went out: until it answers, nothing more goes there."""
        if self._registry.doubt(node_id, True):
            self._guard.spawn(self._ask(node_id), f"doubt.{node_id}")

    async def _ask(self, node_id: str) -> None:
        answered = await self._opener.answers(node_id, DOUBT_S)
        log.info("link.doubted", node_id=node_id, answered=answered)
        self._registry.doubt(node_id, False)
        self._changed()
