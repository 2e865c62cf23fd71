"""Which refused credentials are put on record one by one, and which are only counted.

Anybody who reaches the listener can be refused as often as they like, and must not fill a disk with it. Owns the counts
of one window of time. Pure.
"""

from __future__ import annotations

WINDOW_S = 60.0
MAX_OF_A_PEER = 20  # one by one in a window: enough to see what somebody tries
MAX_IN_ALL = 500  # the same for all peers together; with the sums below half a megabyte a minute at the very most
MAX_PEERS = 1_000  # counted apart; those beyond are counted as one


class Refusals:
    def __init__(self) -> None:
        self._seen: dict[str | None, int] = {}
        self._untold: dict[str | None, int] = {}
        self._singly = 0

    def refused(self, peer: str | None) -> bool:
        """True if this one is to be put on record by itself; else it is in the next `sums`."""
        if peer not in self._seen and len(self._seen) >= MAX_PEERS:
            peer = None
        self._seen[peer] = self._seen.get(peer, 0) + 1
        if self._seen[peer] <= MAX_OF_A_PEER and self._singly < MAX_IN_ALL:
            self._singly += 1
            return True
        self._untold[peer] = self._untold.get(peer, 0) + 1
        return False

    def sums(self) -> dict[str | None, int]:
        """The window has ended: by peer, how many were not put on record one by one."""
        untold, self._untold = self._untold, {}
        self._seen.clear()
        self._singly = 0
        return untold
