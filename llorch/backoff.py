"""How long to wait before trying again, and how many may.

Pure: the random number comes in, the delay goes out. Full jitter on the upper half, so that a crowd that failed
together does not come back together: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential delays between `first_s` and `most_s`; each is jittered down to half of itself."""

    first_s: float
    most_s: float
    factor: float = 2.0

    def delay_s(self, failures: int, chance: float) -> float:
        """The delay after `failures` failures in a row (1 or more); `chance` is uniform in [0, 1)."""
        exponent = min(max(failures - 1, 0), 64)  # 2.0 ** 64 is past any cap, and does not overflow
        full = min(self.most_s, self.first_s * self.factor**exponent)
        return full * (0.5 + 0.5 * chance)


@dataclass(slots=True)
class RetryBudget:
    """Of all that is active, `share` may be in a retry at the same time, and `floor` always: where most fails, trying
    again only adds to the load of what is left. (https://sre.google/sre-book/handling-overload/)"""

    share: float = 0.2
    floor: int = 3
    _taken: set[str] = field(default_factory=set)

    def take(self, who: str, active: int) -> bool:
        """Whether `who` may try again; it counts until it gives that back."""
        if not self.has_room(who, active):
            return False
        self._taken.add(who)
        return True

    def has_room(self, who: str, active: int) -> bool:
        return who in self._taken or len(self._taken) < max(self.floor, int(self.share * active))

    def give_back(self, who: str) -> bool:
        """True if it had any to give."""
        if who not in self._taken:
            return False
        self._taken.remove(who)
        return True
