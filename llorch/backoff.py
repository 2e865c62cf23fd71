"""How long to wait before trying again.

Pure: the random number comes in, the delay goes out. Full jitter on the upper half, so that a crowd that failed
together does not come back together: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
"""

from __future__ import annotations

from dataclasses import dataclass


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
