"""Ids made at random, many at a time: one call for entropy serves a hundred requests.

Never for secrets: a token is made by `secrets`, alone.
"""

from __future__ import annotations

import os

_POOL_BYTES = 4_096


class _Entropy:
    def __init__(self) -> None:
        self._hex = ""
        self._at = 0

    def take(self, digits: int) -> str:
        if self._at + digits > len(self._hex):
            self._hex, self._at = os.urandom(_POOL_BYTES).hex(), 0
        taken = self._hex[self._at : self._at + digits]
        self._at += digits
        return taken


_entropy = _Entropy()
os.register_at_fork(after_in_child=lambda: _entropy.__init__())  # type: ignore[misc]  # a child makes ids of its own


def new_request_id() -> str:
    """64 bits in hex."""
    return _entropy.take(16)


def new_task_id() -> str:
    """A random UUID: https://www.rfc-editor.org/rfc/rfc9562.html#name-uuid-version-4."""
    text = _entropy.take(31)
    variant = "89ab"[int(text[15], 16) & 3]
    return f"{text[:8]}-{text[8:12]}-4{text[12:15]}-{variant}{text[16:19]}-{text[19:31]}"
