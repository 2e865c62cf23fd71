"""Rate limits: the generic cell rate algorithm, for a bounded number of keys.

Owns how much each key has used of its rate, how long one that is refused has to wait, and what an address is as a key.
Never looks at a clock (`now` comes in, in seconds on a monotonic clock) and never grows beyond `max_keys`. Pure.

GCRA is the algorithm of ITU-T I.371, annex A ("virtual scheduling"): a key has one number, the theoretical arrival time
of its next unit. No buckets are filled and no windows counted, so that a refusal knows the moment at which it ends.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

MAX_KEYS = 10_000  # about 100 bytes each; beyond it the least recently used are forgotten, and start anew
KNOWN_ADDRESSES = 1_024  # read once and kept: most connections come from few
IPV6_PREFIX_BITS = 64  # what one customer has at least: its addresses are one key, or a key each would cost nothing
Number = ipaddress.IPv4Address | ipaddress.IPv6Address
ROUNDING_S = 1e-6  # who waits as long as it was told passes, whatever floats make of the sum


@dataclass(frozen=True, slots=True)
class Rate:
    """`per_s` units a second in the long run, `burst` units at once after a pause."""

    per_s: float
    burst: float

    def __post_init__(self) -> None:
        if self.per_s <= 0 or self.burst < 1:
            raise ValueError("a rate lets something through")


class Gcra:
    """One rate, for each key. In any window of t seconds a key is given at most `burst + per_s * t` units."""

    __slots__ = ("_interval_s", "_max_keys", "_next", "_tolerance_s", "rate")

    def __init__(self, rate: Rate, *, max_keys: int = MAX_KEYS) -> None:
        self.rate = rate
        self._interval_s = 1 / rate.per_s
        self._tolerance_s = rate.burst / rate.per_s
        self._max_keys = max_keys
        self._next: dict[Hashable, float] = {}  # theoretical arrival times; the least recently used first

    def __len__(self) -> int:
        return len(self._next)

    def take(self, key: Hashable, now: float, units: float = 1.0) -> float:
        """Give `key` these units: 0.0. Or refuse, and give nothing: the seconds after which they will be there.

        More than a burst is given as if it were one: it would never pass.
        """
        units = min(units, self.rate.burst)
        after = max(self._next.get(key, now), now) + units * self._interval_s
        wait_s = after - now - self._tolerance_s
        if wait_s > ROUNDING_S:
            return wait_s
        self._put(key, after)
        return 0.0

    def wait_s(self, key: Hashable, now: float, units: float = 1.0) -> float:
        """What `take` would say, without taking."""
        after = max(self._next.get(key, now), now) + min(units, self.rate.burst) * self._interval_s
        return max(0.0, after - now - self._tolerance_s)

    def settle(self, key: Hashable, now: float, units: float) -> None:
        """Charge what was used beyond what was taken; give back, if negative, what was not. It is never refused."""
        after = max(self._next.get(key, now), now) + units * self._interval_s
        if after > now:
            self._put(key, after)
        else:
            self._next.pop(key, None)

    def _put(self, key: Hashable, after: float) -> None:
        self._next.pop(key, None)
        self._next[key] = after
        if len(self._next) > self._max_keys:
            del self._next[next(iter(self._next))]


class OncePer:
    """What may happen often and is told seldom: each kind of it once in `pause_s`, with how many were left out."""

    __slots__ = ("_held", "_pause_s", "_told_at")

    def __init__(self, pause_s: float = 1.0) -> None:
        self._pause_s = pause_s
        self._told_at: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def told(self, kind: str, now: float) -> int | None:
        """How many were left out since it was told last, if it is to be told now; else None. Kinds are few words."""
        at = self._told_at.get(kind)
        if at is not None and now - at < self._pause_s:
            self._held[kind] = self._held.get(kind, 0) + 1
            return None
        self._told_at[kind] = now
        return self._held.pop(kind, 0)


@lru_cache(maxsize=KNOWN_ADDRESSES)
def number_of(address: str | None) -> Number | None:
    """An address as a number; one of IPv4 in IPv6 clothes without them. None if it is none."""
    try:
        number = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return None
    return getattr(number, "ipv4_mapped", None) or number


@lru_cache(maxsize=KNOWN_ADDRESSES)
def address_key(address: str | None) -> str:
    """Whom an address counts as: itself, or with IPv6 its /64."""
    number = number_of(address)
    if number is None:
        return "unknown"
    if number.version == 4:
        return str(number)
    return str(ipaddress.ip_network((int(number) >> 64 << 64, IPV6_PREFIX_BITS)))
