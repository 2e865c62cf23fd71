"""The time after a control's start in which its nodes come back, and it does not yet know what they run.

Owns when that time is over: after the window, or once every node that is remembered from before has registered.
Meanwhile nothing may be said not to exist, nothing that may be running is run again, and of nothing another attempt is
shown than the one that was. Pure; the file is `roster`'s.
"""

from __future__ import annotations

from collections.abc import Iterable

from llorch.errors import Code, LlorchError

RETRY_AFTER_MS = 500  # nodes are back within 2 s or so; who asks again late waits for nothing


class Recovery:
    """`expected`: the nodes known before; None if nobody knows, as on a disk that is new each time."""

    def __init__(self, window_s: float, expected: Iterable[str] | None, now: float) -> None:
        self._until = now + window_s
        self._missing = None if expected is None else set(expected)

    @property
    def missing(self) -> frozenset[str]:
        """The remembered nodes that are not back."""
        return frozenset(self._missing or ())

    def blind(self, now: float) -> bool:
        """Nobody knows yet who was here before: whoever is here now is not all of them."""
        return self._missing is None and self.on(now)

    def returned(self, node_id: str) -> None:
        """A node has registered, with all that it runs."""
        if self._missing is not None:
            self._missing.discard(node_id)

    def on(self, now: float) -> bool:
        return now < self._until and (self._missing is None or bool(self._missing))

    def check(self, now: float, what: str) -> None:
        """Raises RECOVERING while `what` may still turn up."""
        if self.on(now):
            raise LlorchError(
                Code.RECOVERING, f"this control has just started, and {what}", retry_after_ms=RETRY_AFTER_MS
            )
