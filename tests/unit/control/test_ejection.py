"""Pools that are out because tasks failed there, at the registry: claims, facts, the half that stays, what is told."""

from __future__ import annotations

from typing import Any

import pytest

from llorch.control.decision import Outcome, decide
from llorch.control.ejection import blames
from llorch.control.placement import Known, Wish, pick, refusal
from llorch.control.registry import Claim, Registry
from llorch.control.views import pools_view
from llorch.errors import MEANINGS, Code, LlorchError
from llorch.messages import Heartbeat, Register

WALL = "2025-01-02T03:04:05Z"
FAILURES = 5


def report(pool_id: str = "p0", **fields: Any) -> dict[str, Any]:
    return {"pool_id": pool_id, "model": "m", "ready": True, "slots_total": 40, "slots_free": 40, **fields}


def join(registry: Registry, node_id: str, *pools: str, boot_id: str = "boot", now: float = 0.0) -> None:
    message = {"node_id": node_id, "boot_id": boot_id, "pools": [report(pool) for pool in pools or ("p0",)]}
    lease_id = f"lease-{node_id}-{boot_id}"
    registry.register(Register.model_validate(message), now=now, wall=WALL, peer="10.0.0.1", lease_id=lease_id)
    registry.link_up(node_id, lease_id, now)


def cluster(*node_ids: str, **more: float) -> Registry:
    registry = Registry("epoch", **{"heartbeat_interval_s": 1_000.0, "offline_after_s": 3_000.0, **more})
    for node_id in node_ids:
        join(registry, node_id)
    registry.events()
    return registry


class Tasks:
    """Claims, one after another."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.count = 0

    def claim(self, node_id: str, pool_id: str = "p0") -> Claim:
        self.count += 1
        return self.registry.claim(node_id, pool_id, f"t{self.count}", 1)

    def fail(self, node_id: str, now: float = 1.0, times: int = FAILURES, pool_id: str = "p0") -> None:
        for claim in [self.claim(node_id, pool_id) for _ in range(times)]:
            self.registry.failed(claim, now)
            self.registry.release(claim)


def places(registry: Registry, now: float) -> set[str]:
    """The nodes that a task could go to."""
    return {facts.node_id for facts in registry.pool_facts(now, "m") if facts.placeable}


def words(registry: Registry) -> list[tuple[str, Any]]:
    return [(event.word, event.fields.get("node_id")) for event in registry.events()]


def test_a_pool_where_tasks_fail_gets_none_for_fifteen_seconds_and_then_one_that_tries_it() -> None:
    registry = cluster("a", "b")
    tasks = Tasks(registry)
    tasks.fail("a")
    assert words(registry) == [("pool.ejected", "a")]
    assert places(registry, 1.0) == places(registry, 15.9) == {"b"}
    assert places(registry, 16.0) == {"a", "b"}
    trial = tasks.claim("a")
    assert trial.trial
    assert places(registry, 16.0) == {"b"}
    registry.succeeded(trial, 17.0)
    assert places(registry, 17.0) == {"a", "b"}
    assert words(registry) == [("pool.readmitted", "a")]
    assert not tasks.claim("a").trial


def test_a_trial_that_fails_is_followed_by_thirty_seconds() -> None:
    registry = cluster("a", "b")
    tasks = Tasks(registry)
    tasks.fail("a")
    assert "a" in places(registry, 16.0)
    tasks.fail("a", 20.0, times=1)
    assert words(registry) == [("pool.ejected", "a")] * 2
    assert places(registry, 49.9) == {"b"}
    assert places(registry, 50.0) == {"a", "b"}


def test_a_trial_that_tells_nothing_leaves_the_place_to_the_next_one() -> None:
    registry = cluster("a", "b")
    tasks = Tasks(registry)
    tasks.fail("a")
    assert "a" in places(registry, 16.0)
    trial = tasks.claim("a")
    with pytest.raises(LlorchError) as refused:
        tasks.claim("a")
    assert refused.value.code is Code.ALL_SLOTS_BUSY
    registry.release(trial)
    assert "a" in places(registry, 17.0)
    assert tasks.claim("a").trial


def test_a_trial_that_hangs_holds_up_the_next_one_for_thirty_seconds() -> None:
    registry = cluster("a", "b")
    tasks = Tasks(registry)
    tasks.fail("a")
    assert "a" in places(registry, 16.0)
    tasks.claim("a")
    assert places(registry, 16.0) == {"b"}
    assert places(registry, 45.9) == {"b"}
    assert places(registry, 46.0) == {"a", "b"}


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_at_most_half_of_a_models_pools_are_out_at_once(count: int, most: int) -> None:
    names = [f"n{number}" for number in range(count)]
    registry = cluster(*names)
    tasks = Tasks(registry)
    for name in names:
        tasks.fail(name, times=20)
    assert len(places(registry, 1.0)) == count - most


def test_pools_of_other_models_and_those_that_could_not_be_placed_on_do_not_count() -> None:
    registry = cluster("a", "b", "c")
    tasks = Tasks(registry)
    change = {"lease_id": "lease-b-boot", "pools": [report(model="other")]}
    registry.heartbeat("b", Heartbeat.model_validate(change), now=0.5, wall=WALL)
    registry.link_lost("c", 0.5)
    tasks.fail("a", times=20)
    assert places(registry, 1.0) == {"a"}
    registry.link_up("c", "lease-c-boot", 1.0)
    tasks.fail("a", times=1)
    assert places(registry, 1.0) == {"c"}


@pytest.mark.parametrize("how", ["link", "leaves", "drains", "expires", "gone"])
def test_a_pool_that_the_others_can_no_longer_do_without_is_back_at_once(how: str) -> None:
    registry = cluster("a", "b")
    Tasks(registry).fail("a")
    assert places(registry, 1.0) == {"b"}
    registry.events()
    beat = {"lease_id": "lease-b-boot", "pools": [] if how == "gone" else [report(draining=True)]}
    if how == "link":
        registry.link_lost("b", 2.0)
    elif how == "leaves":
        registry.deregister("b", 2.0)
    elif how == "expires":
        registry.nodes["b"].last_beat = -4_000.0
        registry.expire(2.0)
    else:
        registry.heartbeat("b", Heartbeat.model_validate(beat), now=2.0, wall=WALL)
    assert places(registry, 2.0) == {"a"}
    assert ("pool.readmitted", "a") in words(registry)


def test_silence_of_the_others_brings_a_pool_back_at_the_next_look() -> None:
    registry = cluster("a", "b", heartbeat_interval_s=10.0)
    registry.nodes["a"].last_beat = 5.0
    Tasks(registry).fail("a", 20.0)
    registry.look(24.0)
    assert places(registry, 24.0) == {"b"}
    for now in (24.5, 25.0, 25.5):  # by then b has missed two beats
        registry.look(now)
    assert places(registry, 25.5) == {"a"}


def test_another_process_begins_with_clean_breakers_and_is_not_blamed_for_what_went_before() -> None:
    registry = cluster("a", "b")
    tasks = Tasks(registry)
    old = [tasks.claim("a") for _ in range(4)]
    tasks.fail("a", times=4)
    registry.failed(old.pop(), 1.0)
    assert places(registry, 1.0) == {"b"}
    join(registry, "a", boot_id="boot-2", now=2.0)
    assert places(registry, 2.0) == {"a", "b"}
    for claim in old * 2:
        registry.failed(claim, 2.0)
    assert places(registry, 2.0) == {"a", "b"}
    tasks.fail("a", 2.0)
    assert places(registry, 2.0) == {"b"}


def test_the_same_process_that_registers_again_stays_out() -> None:
    registry = cluster("a", "b")
    Tasks(registry).fail("a")
    join(registry, "a", now=2.0)
    assert places(registry, 2.0) == {"b"}


def test_tasks_wait_for_an_ejected_pool_and_are_told_why() -> None:
    registry = cluster("a", "b")
    Tasks(registry).fail("a")
    wish = Wish("m", pin="a")
    assert pick(wish, registry.pool_facts(1.0, "m")) is None
    assert refusal(wish, registry.pool_facts(1.0), registry.models()) is None
    decision = decide(wish, registry.pool_facts(1.0), 1.0, Known(nodes=frozenset("ab")))
    verdict = next(each for each in decision.verdicts if each.node_id == "a")
    assert (decision.outcome, verdict.code) == (Outcome.WAIT, "ejected")
    assert verdict.reason == "it is ejected for a while: 5 tasks in a row failed"
    assert registry.pool_facts(16.0)
    registry.claim("a", "p0", "t", 9)
    reason = decide(wish, registry.pool_facts(16.0), 16.0).verdicts[0].reason
    assert reason == "it is ejected for a while: 5 tasks in a row failed; one task tries it now"


def test_the_views_show_how_long_a_pool_is_out_and_why() -> None:
    registry = cluster("a", "b")
    Tasks(registry).fail("a")
    shown = {each["node_id"]: each["breaker"] for each in pools_view(registry, 5.0)["pools"]}
    assert shown["a"] == {
        "state": "ejected", "failures": 5, "ejections": 1, "ejected_ms": 11_000, "reason": "5 tasks in a row failed",
    }  # fmt: skip
    assert shown["b"] == {"state": "closed", "failures": 0, "ejections": 0, "ejected_ms": None, "reason": None}


BLAMED = {Code.INTERNAL, Code.ENGINE_FAILED, Code.ENGINE_STALLED}
BUT_NOT_IN_A_REFUSAL = {Code.MODEL_NOT_AVAILABLE, Code.DRAINING}


@pytest.mark.parametrize("code", MEANINGS)
def test_what_counts_against_a_pool_is_its_own_fault(code: Code) -> None:
    error = LlorchError(code, "")
    others = {Code.NO_CAPACITY, Code.RECOVERING, Code.QUEUE_TIMEOUT, Code.INSUFFICIENT_STORAGE}  # no node says these
    if code not in others:
        assert blames(error) == (code in BLAMED | BUT_NOT_IN_A_REFUSAL)
        assert blames(error, refused=True) == (code in BLAMED)
