"""Storms: when a control that misses many nodes at once blames itself, what it keeps, and when that is over."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.control.placement import Wish, pick
from llorch.control.registry import Registry
from llorch.control.storms import STALLED, VANISHED, Ended, Storm, Storms
from llorch.control.views import nodes_view, storm_view
from llorch.messages import Heartbeat, Register

WALL = "2025-01-02T03:04:05Z"
NAMES = "abcdefghi"


class Sky:
    """Nodes that come and go, and what is said of it."""

    def __init__(self, count: int) -> None:
        self.nodes = dict.fromkeys(NAMES[:count], True)
        self.storms = Storms(offline_after_s=30.0)
        self.now = 0.0
        self.said: list[Storm | Ended] = []
        self.look()

    def look(self, *, beat: bool = True) -> None:
        change = self.storms.look(dict(self.nodes), self.now, beat=beat)
        if change is not None:
            self.said.append(change)

    def set(self, names: str, *, answers: bool) -> None:
        for name in names:
            self.nodes[name] = answers
            self.look(beat=False)

    def leave(self, names: str) -> None:
        for name in names:
            del self.nodes[name]
            self.look(beat=False)

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds * 2)):
            self.now += 0.5
            self.look()

    @property
    def missing(self) -> str:
        storm = self.storms.storm
        return "" if storm is None else "".join(sorted(storm.missing))


# ---------------------------------------------------------------- when it begins


@pytest.mark.parametrize(
    ("count", "gone", "storm"), [(3, 2, False), (3, 3, True), (5, 3, True), (8, 3, True), (9, 3, False), (9, 4, True)]
)
def test_three_nodes_and_more_than_a_third_of_all_make_a_storm(count: int, gone: int, storm: bool) -> None:
    sky = Sky(count)
    sky.set(NAMES[:gone], answers=False)
    assert [type(each) for each in sky.said] == [Storm] * storm
    if storm:
        assert (sky.said[0].reason, sky.missing) == (VANISHED, NAMES[:gone])


def test_it_counts_who_went_within_five_seconds_and_is_not_back() -> None:
    sky = Sky(6)
    for name in "abc":
        sky.set(name, answers=False)
        sky.wait(3)
    assert not sky.said
    sky.set("d", answers=False)  # b has been gone for 6 s, c for 3
    sky.set("e", answers=False)
    assert sky.missing == "cde"
    sky = Sky(6)
    for name in "abcdef":
        sky.set(name, answers=False)
        sky.set(name, answers=True)
    assert not sky.said


def test_nodes_that_sign_off_are_no_storm() -> None:
    sky = Sky(6)
    sky.leave("abcde")
    sky.wait(10)
    assert not sky.said
    sky = Sky(6)
    for name in "abcde":  # between two looks
        del sky.nodes[name]
    sky.wait(10)
    assert not sky.said


def test_nodes_that_never_answered_are_no_storm() -> None:
    sky = Sky(1)
    sky.nodes |= dict.fromkeys("bcdefg", False)
    sky.wait(10)
    assert not sky.said


def test_a_loop_that_stood_still_makes_a_storm_however_few_the_nodes_are() -> None:
    sky = Sky(1)
    sky.wait(5)
    sky.now += 2.0  # busy
    sky.look()
    assert not sky.said
    sky.now += 2.1
    assert sky.storms.stalled_s(sky.now) == pytest.approx(2.1)
    sky.look(beat=False)  # an event is dealt with before the beat
    assert not sky.said
    sky.look()
    assert [each.reason for each in sky.said] == [STALLED]


def test_a_control_without_nodes_has_nothing_to_keep() -> None:
    sky = Sky(0)
    sky.now += 60
    sky.look()
    assert not sky.said


# ---------------------------------------------------------------- when it is over


def test_it_is_over_when_those_that_went_are_back() -> None:
    sky = Sky(6)
    sky.set("abc", answers=False)
    sky.wait(4)
    sky.set("ab", answers=True)
    sky.wait(4)
    assert sky.missing == "c"
    sky.set("c", answers=True)
    sky.wait(0.5)
    assert sky.said[1:] == [Ended(VANISHED, 8.5, frozenset())]


def test_it_waits_for_those_too_that_went_while_it_lasted() -> None:
    sky = Sky(9)
    sky.set("abcd", answers=False)
    sky.wait(10)
    sky.set("e", answers=False)
    sky.set("abcd", answers=True)
    sky.wait(1)
    assert sky.missing == "e"
    sky.set("e", answers=True)
    sky.wait(0.5)
    assert isinstance(sky.said[-1], Ended)


def test_it_is_over_when_a_silent_node_would_go_offline_and_does_not_begin_again_for_the_same_nodes() -> None:
    sky = Sky(6)
    sky.set("abc", answers=False)
    sky.wait(29.5)
    assert sky.missing == "abc"
    sky.wait(0.5)
    assert sky.said[1:] == [Ended(VANISHED, 30.0, frozenset("abc"))]
    sky.wait(60)
    assert len(sky.said) == 2


def test_a_node_that_signs_off_in_a_storm_is_not_waited_for() -> None:
    sky = Sky(6)
    sky.set("abc", answers=False)
    sky.set("ab", answers=True)
    sky.leave("c")
    sky.wait(0.5)
    assert isinstance(sky.said[-1], Ended)


def test_a_storm_of_a_stall_waits_for_the_ends_of_links_that_are_only_seen_after_it() -> None:
    sky = Sky(2)
    sky.wait(1)
    sky.now += 60
    sky.look()  # both still seem to answer
    assert sky.missing == "ab"
    sky.set("ab", answers=False)
    sky.wait(3)
    assert sky.missing == "ab"
    sky.set("ab", answers=True)
    sky.wait(0.5)
    assert sky.said[1:] == [Ended(STALLED, 3.5, frozenset())]


def test_a_stall_whose_broken_links_were_seen_first_is_one_storm() -> None:
    sky = Sky(5)
    sky.wait(1)
    sky.now += 60
    sky.set("abcd", answers=False)
    sky.look()
    assert [each.reason for each in sky.said] == [VANISHED]
    assert sky.missing == "abcde"
    sky.wait(0.5)
    assert sky.missing == "abcd"


def test_a_stall_in_a_storm_gives_it_its_time_anew() -> None:
    sky = Sky(5)
    sky.set("abc", answers=False)
    sky.wait(10)
    sky.now += 40
    sky.look()
    sky.wait(29)
    assert sky.missing == "abc"
    sky.wait(1)
    assert isinstance(sky.said[-1], Ended)


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.booleans(), st.sampled_from([0.5, 1.0, 4.0])), max_size=60))
def test_storms_begin_and_end_in_turn_and_none_lasts_longer_than_a_silent_node_stays_online(
    changes: list[tuple[str, bool, float]],
) -> None:
    sky = Sky(len(NAMES))
    for name, answers, seconds in changes:
        sky.set(name, answers=answers)
        sky.wait(seconds)
        storm = sky.storms.storm
        assert storm is None or (sky.now - storm.began_at < 30.0 and len(storm.missing) > 0)
    sky.set(NAMES, answers=True)
    sky.wait(0.5)
    assert sky.storms.storm is None
    kinds = [type(each) for each in sky.said]
    assert kinds == [Storm, Ended] * (len(kinds) // 2)
    for each in sky.said:
        assert not isinstance(each, Ended) or 0 <= each.lasted_s <= 30.0


# ---------------------------------------------------------------- what is kept meanwhile


def cluster(*node_ids: str) -> Registry:
    registry = Registry("epoch")
    for node_id in node_ids:
        pools = [{"pool_id": "p0", "model": "m", "ready": True, "slots_total": 20, "slots_free": 20}]
        message = Register.model_validate({"node_id": node_id, "boot_id": "boot", "pools": pools})
        registry.register(message, now=0.0, wall=WALL, peer=None, lease_id=f"lease-{node_id}")
        registry.link_up(node_id, f"lease-{node_id}", 0.0)
    registry.look(0.0)
    registry.events()
    return registry


def sweep(registry: Registry, since: float, until: float) -> list[str]:
    """As the control does; the nodes that went offline."""
    lost: list[str] = []
    for step in range(1, round((until - since) * 2) + 1):
        registry.look(since + step / 2)
        lost += [node.node_id for node in registry.expire(since + step / 2)]
    return lost


def beat(registry: Registry, node_id: str, now: float) -> None:
    registry.heartbeat(node_id, Heartbeat(lease_id=f"lease-{node_id}"), now=now, wall=WALL)


def placeable(registry: Registry, now: float) -> set[str]:
    return {facts.node_id for facts in registry.pool_facts(now, "m") if facts.placeable}


def words(registry: Registry) -> list[tuple[str, dict[str, Any]]]:
    return [(event.word, dict(event.fields)) for event in registry.events() if event.word.startswith("storm")]


def test_in_a_storm_no_lease_runs_out_and_tasks_go_to_the_nodes_that_answer() -> None:
    registry = cluster(*"abcde")
    sweep(registry, 0.0, 20.0)
    for node_id in "abc":
        registry.link_lost(node_id, 20.0)
    assert words(registry) == [("storm.began", {"reason": VANISHED, "missing": 3, "nodes": 5})]
    assert sweep(registry, 20.0, 45.0) == []  # all leases have run out at 30
    assert placeable(registry, 45.0) == {"d", "e"}
    assert all(node.online for node in registry.nodes.values())
    for node_id in "abc":
        beat(registry, node_id, 45.0)
        registry.link_up(node_id, f"lease-{node_id}", 45.0)
    assert placeable(registry, 45.0) == set("abcde")
    beat(registry, "d", 45.0)
    beat(registry, "e", 45.0)
    assert sweep(registry, 45.0, 45.5) == []
    assert words(registry) == [("storm.ended", {"reason": VANISHED, "missing": 0, "nodes": 5, "lasted_s": 25.5})]
    assert registry.storm is None
    for node_id in "bcde":
        beat(registry, node_id, 60.0)
    assert sweep(registry, 45.5, 80.0) == ["a"]  # and then leases are leases again


def test_nodes_that_do_not_come_back_are_offline_when_the_storm_is_over() -> None:
    registry = cluster(*"abcde")
    sweep(registry, 0.0, 9.0)
    for node_id in "abc":
        registry.link_lost(node_id, 9.0)
    for now in range(10, 39, 5):
        beat(registry, "d", now)
        beat(registry, "e", now)
        assert sweep(registry, now, now + 4.5) == ([] if now < 35 else ["a", "b", "c"])
    assert words(registry)[-1][1] == {"reason": VANISHED, "missing": 3, "nodes": 5, "lasted_s": 30.0}
    assert placeable(registry, 39.0) == {"d", "e"}


def test_a_probe_that_is_answered_makes_a_node_one_that_answers() -> None:
    registry = cluster(*"abc")
    for node_id in "abc":
        registry.link_lost(node_id, 1.0)
    assert placeable(registry, 1.0) == set()
    registry.probed("b", True, 2.0)
    assert placeable(registry, 2.0) == {"b"}
    assert pick(Wish("m"), registry.pool_facts(29.0, "m")) == ("b", "p0")


def test_missed_leases_make_a_storm_too() -> None:
    registry = cluster(*"abcd")  # their links seem to be up, and no beat comes
    assert sweep(registry, 0.0, 40.0) == []
    assert registry.storm is not None
    assert words(registry)[0][1]["missing"] == 4


def test_after_a_stall_leases_have_the_time_back() -> None:
    registry = cluster("a")
    sweep(registry, 0.0, 8.0)
    registry.look(100.0)
    assert words(registry) == [("storm.began", {"reason": STALLED, "missing": 1, "nodes": 1})]
    assert registry.expire(100.0) == []
    assert registry.nodes["a"].last_beat == 92.0
    assert placeable(registry, 100.0) == {"a"}
    assert sweep(registry, 100.0, 100.5) == []
    assert registry.storm is None
    assert not registry.nodes["a"].suspect(100.5)
    assert sweep(registry, 100.5, 122.0) == []
    assert sweep(registry, 122.0, 123.0) == ["a"]


def test_a_beat_that_was_heard_before_the_look_is_not_moved_into_the_future() -> None:
    registry = cluster("a")
    beat(registry, "a", 60.0)
    registry.look(60.0)
    assert registry.nodes["a"].last_beat == 60.0


def test_nobody_is_blamed_for_an_answer_that_this_control_was_too_slow_to_hear() -> None:
    registry = cluster("a", "b")
    sweep(registry, 0.0, 1.0)
    claims = [registry.claim("a", "p0", f"t{number}", 1) for number in range(15)]
    for claim in claims[:5]:
        registry.failed(claim, 20.0)  # before the look that notices the stall
    registry.look(20.0)
    for claim in claims[5:10]:
        registry.failed(claim, 20.0)  # and after it
    sweep(registry, 20.0, 20.5)
    assert placeable(registry, 20.5) == {"a", "b"}
    for claim in claims[10:]:
        registry.failed(claim, 20.5)
    assert placeable(registry, 20.5) == {"b"}


def test_a_storm_is_shown_with_why_since_when_and_who_is_missing() -> None:
    registry = cluster(*"abcd")
    assert (storm_view(registry, 0.0), nodes_view(registry, 0.0)["storm"]) == (None, None)
    for node_id in "cab":
        registry.link_lost(node_id, 1.0)
    assert storm_view(registry, 3.0) == {"reason": VANISHED, "age_ms": 2_000}
    assert nodes_view(registry, 3.0)["storm"]["missing"] == ["a", "b", "c"]
