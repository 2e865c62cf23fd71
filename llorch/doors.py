"""Who may come in: how many connections a listener has, in all and from one address, and what is kept for nodes.

Owns the count of connections, those that have shown nothing yet, those that wait idle, and which of them goes when
there is no room: a flood of clients, half-open connections or idle ones takes no node its place. Knows addresses and
times, no sockets: who is to go is closed by whom it was handed in with. Pure.

A connection *arrives* when it is accepted, *enters* when its TLS handshake is done (at once without TLS), is *busy*
while a request of it is served, *idle* between two, and *leaves*. Until its first request has come it counts as
arriving, however far it is.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llorch.ratelimit import address_key, number_of

MOST = 4_096
MOST_PER_ADDRESS = 512  # an office behind one NAT
NODE_RESERVE = 256  # of all: the links, beats and new links of a hundred nodes; a quarter at most
MOST_ARRIVING = 1_024  # each may be a TLS handshake, of some 50 KB
ARRIVE_S = 0.5  # so long one that arrives is left alone though others wait to: a handshake takes two round trips
FILES_KEPT = 128  # for everything else that a process opens
FULL_PAUSE_S = 0.02  # before the next look, where all that arrive have just come

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one listener. `trusted`: proxies, behind whose addresses are many clients; loopback is among them."""

    most: int = MOST
    per_address: int = MOST_PER_ADDRESS
    arriving: int = MOST_ARRIVING
    trusted: Sequence[Network] = ()
    for_nodes: bool = True

    @property
    def arriving_per_address(self) -> int:
        """Half: an office that comes all at once has room, and no address keeps the others out."""
        return max(1, self.arriving // 2)

    @property
    def reserve(self) -> int:
        return min(NODE_RESERVE, self.most // 4) if self.for_nodes else 0

    def within(self, files: int) -> Limits:
        """The same, or less if this process may not have so many files: each connection is one."""
        arriving = min(self.arriving, files // 4)
        return replace(self, arriving=arriving, most=max(1, min(self.most, files - arriving - FILES_KEPT)))


class Place:
    """One connection, as the doors know it. `close` ends it, from outside."""

    __slots__ = ("close", "gone", "inside", "key", "named", "node", "since")

    def __init__(self, key: str | None, now: float, close: Callable[[], object]) -> None:
        self.key = key  # what it counts under; None: its address has no bound
        self.since = now
        self.close = close
        self.node = False  # by its address, from which others may come, too; or by its name
        self.named = False  # under which nobody comes in without a node's certificate
        self.inside = False
        self.gone = False


class Doors:
    """One listener's connections. `is_node`: whether a node is registered from an address; `refused`: why one went."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        is_node: Callable[[str], bool] = lambda _address: False,
        refused: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self.limits = limits or Limits()
        self.nodes = 0  # inside
        self.clients = 0  # inside
        self._is_node = is_node
        self._refused = refused
        self._arriving: dict[Place, None] = {}  # oldest first, as the next
        self._arriving_of: dict[str, dict[Place, None]] = {}  # by what they count under
        self._silent: dict[Place, None] = {}  # inside, and has asked for nothing yet; longest first, as the next
        self._idle: dict[Place, None] = {}
        self._per_key: dict[str, int] = {}

    @property
    def arriving(self) -> int:
        return len(self._arriving)

    # ---- in

    def pause_s(self, now: float) -> float:
        """0.0 if one more may arrive. Who has arrived long ago and shown nothing makes room; else, how long to wait."""
        if len(self._arriving) < self.limits.arriving:
            return 0.0
        oldest = next(iter(self._arriving))
        if now - oldest.since < ARRIVE_S:
            return FULL_PAUSE_S
        self._evict(oldest, "arriving")
        return 0.0

    def arrive(self, address: str, now: float, close: Callable[[], object]) -> Place | None:
        """Its place; None if too many arrive from its address, a node's or not, and have only just come."""
        place = Place(self._key(address), now, close)
        place.node = self._is_node(address)
        if place.key is not None:
            others = self._arriving_of.get(place.key, {})
            if len(others) >= self.limits.arriving_per_address:
                oldest = next(iter(others))
                if now - oldest.since < ARRIVE_S:
                    self._refused("address")
                    return None
                self._evict(oldest, "arriving")
            self._arriving_of.setdefault(place.key, {})[place] = None
            self._per_key[place.key] = self._per_key.get(place.key, 0) + 1
        self._arriving[place] = None
        return place

    def admit(self, place: Place, *, named: bool = False) -> bool:
        """Whether it may go on, to its handshake or inside. False: it was refused, and has left.

        `named`: it asks for the name under which only nodes come in.
        """
        place.named = place.named or named
        place.node = place.node or named
        if not place.node and place.key is not None and self._per_key[place.key] > self.limits.per_address:
            return self._refuse(place, "address")
        most = self.limits.most - (0 if place.node else self.limits.reserve)
        while self.nodes + self.clients >= most:
            if not self._make_room(place):
                return self._refuse(place, "total")
        return True

    def enter(self, place: Place, now: float) -> bool:
        """Its handshake is done. False as in `admit`: others may have come in meanwhile, or it had to make room."""
        if place.gone or not self.admit(place):
            return False
        place.inside, place.since = True, now
        if place.node:
            self.nodes += 1
        else:
            self.clients += 1
        if not place.named:
            self._silent[place] = None
        return True

    # ---- inside

    def busy(self, place: Place) -> None:
        """A request has come."""
        self._idle.pop(place, None)
        self._silent.pop(place, None)
        self._arrived(place)

    def idle(self, place: Place) -> None:
        """Its request is answered, and no other is here."""
        if place.inside and not place.named:
            self._idle.pop(place, None)
            self._idle[place] = None

    def leave(self, place: Place) -> None:
        """It is gone; saying so again does nothing."""
        place.gone = True
        self._arrived(place)
        self._silent.pop(place, None)
        self._idle.pop(place, None)
        if place.inside:
            place.inside = False
            if place.node:
                self.nodes -= 1
            else:
                self.clients -= 1
        key, place.key = place.key, None
        if key is not None:
            if self._per_key[key] > 1:
                self._per_key[key] -= 1
            else:
                del self._per_key[key]

    def _arrived(self, place: Place) -> None:
        """It arrives no more."""
        if place not in self._arriving:
            return
        del self._arriving[place]
        if place.key is not None:
            of_its_address = self._arriving_of[place.key]
            del of_its_address[place]
            if not of_its_address:
                del self._arriving_of[place.key]

    # ---- who makes room

    def _make_room(self, place: Place) -> bool:
        """By one that had its time and asked for nothing; else by the one that has been idle for longest, and can come
        again; else by the one that has been silent for longest. Who is served stays, and who is a node by name."""
        silent, idle = next(iter(self._silent), None), next(iter(self._idle), None)
        if silent is not None and (idle is None or place.since - silent.since > ARRIVE_S):
            self._evict(silent, "silent")
        elif idle is not None:
            self._evict(idle, "idle")
        return silent is not None or idle is not None

    def _refuse(self, place: Place, reason: str) -> bool:
        self._refused(reason)
        self.leave(place)
        return False

    def _evict(self, place: Place, reason: str) -> None:
        self._refused(reason)
        self.leave(place)
        place.close()

    def _key(self, address: str) -> str | None:
        number = number_of(address)
        if number is not None and (number.is_loopback or any(number in each for each in self.limits.trusted)):
            return None
        return address_key(address)
