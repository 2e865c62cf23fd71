"""Who may come in: the bounds in all and by address, the nodes' reserve, and who makes room."""

from __future__ import annotations

import ipaddress
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llorch.doors import ARRIVE_S, FILES_KEPT, Doors, Limits, Place

NOW = 1_000.0
HERE, THERE, NODE = "192.0.2.1", "192.0.2.2", "192.0.2.99"


class World:
    """Doors, and what becomes of those at them."""

    def __init__(self, limits: Limits) -> None:
        self.refused: Counter[str] = Counter()
        self.closed: list[Place] = []
        self.doors = Doors(
            limits, is_node=lambda address: address == NODE, refused=lambda reason: self.refused.update([reason])
        )

    def arrive(self, address: str = HERE, now: float = NOW) -> Place:
        place = self.try_to_arrive(address, now)
        assert place is not None
        return place

    def try_to_arrive(self, address: str = HERE, now: float = NOW) -> Place | None:
        place = self.doors.arrive(address, now, lambda: self.closed.append(place))  # type: ignore[arg-type]
        return place

    def come_in(self, address: str = HERE, now: float = NOW, *, name: bool = False) -> Place | None:
        """All the way to a first request."""
        place = self.try_to_arrive(address, now)
        if place is None or not self.doors.admit(place, named=name) or not self.doors.enter(place, now):
            return None
        self.doors.busy(place)
        return place

    def fill(self, count: int, address: str = HERE) -> list[Place]:
        places = [self.come_in(address) for _ in range(count)]
        assert None not in places
        return [place for place in places if place is not None]


def test_clients_leave_the_reserve_to_nodes() -> None:
    world = World(Limits(most=40, per_address=1_000))
    world.fill(30)
    assert world.come_in(THERE) is None
    assert world.refused == {"total": 1}
    assert all(world.come_in(NODE) for _ in range(5))  # by their address
    assert all(world.come_in(THERE, name=True) for _ in range(5))  # by the name they asked for
    assert world.come_in(NODE) is None
    assert (world.doors.clients, world.doors.nodes) == (30, 10)


def test_who_leaves_makes_room() -> None:
    world = World(Limits(most=40, per_address=30))
    first, *_ = world.fill(30)
    assert world.come_in() is None
    for _ in range(3):
        world.doors.leave(first)
    assert world.come_in() is not None
    assert world.come_in() is None


def test_one_address_has_a_bound_and_an_ipv6_prefix_is_one() -> None:
    world = World(Limits(most=1_000, per_address=3))
    assert [bool(world.come_in(f"2001:db8::{last}")) for last in range(4)] == [True, True, True, False]
    assert world.refused == {"address": 1}
    assert world.come_in("2001:db8:0:1::1")
    assert world.come_in(HERE)


def test_loopback_trusted_proxies_and_nodes_have_no_bound_of_their_own() -> None:
    trusted = (ipaddress.ip_network("198.51.100.0/24"), ipaddress.ip_network("fd00::/8"))
    world = World(Limits(most=1_000, per_address=3, trusted=trusted))
    for address in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "198.51.100.7", "fd00::7", NODE):
        world.fill(10, address)
    world.fill(3, "198.51.101.7")
    assert world.come_in("198.51.101.7") is None


def test_half_open_connections_take_no_place_inside() -> None:
    world = World(Limits(most=40, per_address=10_000, arriving=500))
    for number in range(500):
        assert world.doors.admit(world.arrive(f"192.0.2.{number % 2 + 10}"))
    assert world.doors.arriving == 500
    world.fill(30, THERE)
    assert world.come_in(NODE) is not None


def test_where_all_that_arrive_have_just_come_the_next_waits_and_then_the_oldest_goes() -> None:
    world = World(Limits(arriving=3))
    places = [world.arrive(f"192.0.2.{number}", NOW + number / 10) for number in range(3)]
    assert world.doors.pause_s(NOW + 0.3) > 0
    assert world.closed == []
    assert world.doors.pause_s(NOW + ARRIVE_S) == 0.0
    assert world.closed == places[:1]
    assert world.refused == {"arriving": 1}
    assert not world.doors.enter(places[0], NOW)  # whose handshake ends in this moment
    world.arrive("192.0.2.3", NOW + ARRIVE_S)
    assert world.doors.pause_s(NOW + ARRIVE_S) > 0
    world.doors.enter(places[1], NOW)
    world.doors.busy(places[1])  # a request has come: it arrives no more
    assert world.doors.pause_s(NOW + ARRIVE_S) == 0.0


def test_one_address_takes_half_of_the_places_for_those_that_arrive() -> None:
    for address in (HERE, NODE):  # strangers may come from where a node is, too
        world = World(Limits(arriving=8))
        places = [world.arrive(address) for _ in range(4)]
        assert world.try_to_arrive(address) is None
        assert (world.refused, world.closed) == ({"address": 1}, [])
        assert world.doors.pause_s(NOW) == 0.0 and world.arrive(THERE)
        later = world.arrive(address, NOW + ARRIVE_S)  # who has shown nothing for so long makes room
        assert (world.refused, world.closed) == ({"address": 1, "arriving": 1}, places[:1])
        world.doors.busy(places[1])
        world.doors.leave(later)
        assert world.arrive(address, NOW + ARRIVE_S) and world.arrive(address, NOW + ARRIVE_S)
        assert world.closed == places[:1]


def test_loopback_and_proxies_may_take_all_the_places_for_those_that_arrive() -> None:
    world = World(Limits(arriving=8, trusted=(ipaddress.ip_network("198.51.100.0/24"),)))
    assert all(world.try_to_arrive(address) for address in ("127.0.0.1", "198.51.100.7") for _ in range(4))


def test_where_it_is_full_the_client_that_is_idle_for_longest_goes_and_no_node() -> None:
    world = World(Limits(most=40, per_address=1_000))
    node, others = world.come_in(name=True), world.fill(29)
    assert node is not None
    for place in (node, others[3], others[1]):
        world.doors.idle(place)
    assert world.come_in() is not None
    assert world.closed == [others[3]]
    world.doors.idle(others[5])
    world.doors.busy(others[1])
    assert world.come_in() is not None
    assert world.closed == [others[3], others[5]]
    assert world.come_in() is None
    assert world.refused == {"idle": 2, "total": 1}


def test_where_it_is_full_who_asked_for_nothing_goes_before_who_was_idle_longer() -> None:
    world = World(Limits(most=40, per_address=1_000))
    used = world.fill(28)
    world.doors.idle(used[0])
    silent = [world.arrive(now=NOW + after) for after in (0.0, 1.0)]
    for place in silent:
        assert world.doors.admit(place)
        assert world.doors.enter(place, place.since)
    assert world.come_in(now=NOW + 1.2) is not None
    assert world.closed == [silent[0]]
    assert world.come_in(now=NOW + 1.2) is not None
    assert world.closed == [silent[0], used[0]]  # the other one has just come
    assert world.come_in(now=NOW + 1.2) is not None
    assert world.closed == [silent[0], used[0], silent[1]]
    assert world.come_in(now=NOW + 1.2) is None


def test_an_address_of_a_node_gives_its_clients_no_hold_on_what_they_do_not_use() -> None:
    """A node behind the same proxy as everybody: all seem to be nodes, and still nobody is locked out."""
    world = World(Limits(most=40, per_address=1_000))
    for place in world.fill(40, NODE):
        world.doors.idle(place)
    assert world.come_in(NODE) is not None
    assert len(world.closed) == 1
    assert world.come_in(HERE) is not None
    assert (world.doors.clients, world.doors.nodes) == (1, 29)
    world.fill(10, NODE)
    assert world.come_in(NODE) is not None


def test_a_listener_without_nodes_keeps_nothing_for_them() -> None:
    world = World(Limits(most=40, per_address=1_000, for_nodes=False))
    world.fill(40)
    assert world.come_in() is None


def test_a_process_that_may_have_few_files_has_fewer_connections() -> None:
    assert Limits(most=4_096, arriving=1_024).within(1 << 20) == Limits(most=4_096, arriving=1_024)
    few = Limits(most=4_096, arriving=1_024).within(1_024)
    assert few.most + few.arriving + FILES_KEPT == 1_024
    assert few.reserve == few.most // 4


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "admit", "name", "enter", "busy", "idle", "leave", "leave", "pause"]),
        st.integers(0, 30),
        st.sampled_from([HERE, THERE, NODE, "127.0.0.1", "2001:db8::1"]),
    ),
    max_size=200,
)


@given(STEPS)
def test_whatever_comes_and_goes_the_counts_are_right_and_nothing_is_kept_of_who_left(
    steps: list[tuple[str, int, str]],
) -> None:
    world, places, now = World(Limits(most=12, per_address=4, arriving=6)), list[Place](), NOW
    doors = world.doors
    for step, number, address in steps:
        now += 0.1
        if step == "arrive":
            if doors.pause_s(now) == 0.0:
                place = world.try_to_arrive(address, now)
                places += [place] if place is not None else []
        elif step == "pause":
            doors.pause_s(now)
        elif places:
            place = places[number % len(places)]
            if place.gone and step != "leave":
                continue
            if step in ("admit", "name", "enter"):
                if place.inside:
                    continue
                if step == "enter":
                    doors.enter(place, now)
                else:
                    doors.admit(place, named=step == "name")
            else:
                getattr(doors, step)(place)
        inside = [place for place in places if place.inside]
        assert doors.nodes == sum(place.node for place in inside)
        assert doors.clients == len(inside) - doors.nodes
        assert doors.clients <= 12 - doors.limits.reserve
        assert len(inside) <= 12
        assert doors.arriving <= 6
        of_addresses = [place for each in doors._arriving_of.values() for place in each]
        assert set(of_addresses) == {place for place in doors._arriving if place.key is not None}
        assert all(0 < len(each) <= 3 for each in doors._arriving_of.values())
        here = [place for place in places if not place.gone]
        assert sum(doors._per_key.values()) == len([place for place in here if place.key is not None])
    for place in places:
        doors.leave(place)
    assert (doors._arriving | doors._silent, doors._idle, doors._arriving_of) == ({}, {}, {})
    assert (doors._per_key, doors.nodes, doors.clients) == ({}, 0, 0)
