"""A second look at a pool whose node refused what its report had promised: its report is read anew, at once.

Owns how often that may be. Never judges the node for it: reports are late, and models go.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from llorch.tasks import Guard

REREAD_EVERY_S = 1.0  # of one pool: a node that says this and does that must not be asked without end

Read = Callable[[str, str], Coroutine[Any, Any, None]]  # (node, pool): ask for its report, and take it over


class Rereads:
    def __init__(self, guard: Guard, read: Read | None) -> None:
        """Without `read`, the next report is waited for."""
        self._guard = guard
        self._read = read
        self._read_at: dict[tuple[str, str], float] = {}  # within the last REREAD_EVERY_S

    def ask(self, node_id: str, pool_id: str, now: float) -> None:
        if self._read is None:
            return
        self._read_at = {key: at for key, at in self._read_at.items() if now - at < REREAD_EVERY_S}
        if (node_id, pool_id) not in self._read_at:
            self._read_at[node_id, pool_id] = now
            self._guard.spawn(self._read(node_id, pool_id), f"reread.{node_id}.{pool_id}")
