"""What outlives an agent: the engines that another takes over, and what operators asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.config_pools import PoolSpec
from llorch.messages import PoolReport
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from llorch.node.pools import Pools
from tests.pool_world import World, external, of, on_demand, spec, started, wanted

R0, R1 = ("p", "r0"), ("p", "r1")


def left(pool: str = "p", replica: str = "r0", model: str = "m", **changes: object) -> Handoff:
    """What an engine that was left says of itself."""
    made = Handoff(pool, "simulated", "http://127.0.0.1:9000", model, replica, slots=2, ctx=4096, pid=100)
    return replace(made, **changes)  # type: ignore[arg-type]


def adopted(pools: Pools, handoff: Handoff, ref: str | None = None) -> list[ev.Action]:
    """What follows; if nothing does, nothing has changed."""
    before = pools.report()
    actions = pools.handle(ev.Adopted(handoff.model, ref or handoff.model, handoff), 1.0)
    assert actions or before == pools.report()
    return actions


def pools_of(*specs: PoolSpec, wishes: Any = None) -> Pools:
    pools = Pools(map(wanted, specs))
    pools.restore(wishes)
    return pools


# ---------------------------------------------------------------- engines


def test_an_engine_that_was_left_is_gone_on_with_and_serves_after_one_token() -> None:
    pools = pools_of(spec())
    handoff = left()
    assert adopted(pools, handoff) == [ev.TakeOver("p", "r0", 1, handoff), ev.WriteHandoff(handoff)]
    assert of(pools.handle(ev.Start(), 1.0), ev.Spawn) == []
    [probe] = pools.handle(ev.HandoffSeen(handoff), 1.0)
    assert probe == ev.Probe("p", "r0", 1, handoff)
    pools.handle(ev.ProbeOk("p", "r0", 1), 2.0)
    report = pools.pool_report("p")
    assert report["ready"] and report["load_s"] is None, "it was loaded long ago"
    assert pools.acquire("p", "t").url == handoff.url


def test_a_file_that_was_seen_before_the_engine_was_taken_over_needs_not_be_seen_again() -> None:
    pools = pools_of(spec())
    handoff = left()
    pools.handle(ev.HandoffSeen(handoff), 1.0)
    assert of(adopted(pools, handoff), ev.Probe)


def test_what_an_engine_that_was_taken_over_says_at_its_end_is_told_to_nobody() -> None:
    pools = pools_of(spec())
    adopted(pools, left())
    pools.handle(ev.Exited("p", "r0", 1, "killed", 0.5, said="somebody's prompt"), 2.0)
    assert pools.pool_report("p")["last_error"] == "killed"
    assert of(pools.handle(ev.Tick(), 10.0), ev.Spawn), "it is one like any other"


def test_an_engine_is_taken_over_under_whatever_name_a_reload_gave_it() -> None:
    world = started(spec(replicas=2))
    world.do(ev.Reload("p", "m2", "m2"))
    world.settle()
    assert sorted(world.processes) == [("p", "r2"), ("p", "r3")]
    runs = {key: process.handoff for key, process in world.processes.items()}
    assert world.agent_restarts(keeping=sorted(world.processes)) == [("p", "r2"), ("p", "r3")]
    world.settle()
    assert {key: process.handoff for key, process in world.processes.items()} == runs
    assert world.serves("p") == ["m2", "m2"] and len(world.report("p")["replicas"]) == 2


def test_engines_are_taken_over_in_any_order_whatever_their_names() -> None:
    for names in (("r5", "r0"), ("r0", "r5"), ("r1", "r0"), ("r5", "r6"), ("x", "r1")):
        pools = pools_of(spec(replicas=2))
        assert all(adopted(pools, left(replica=name)) for name in names), names
        assert not of(pools.handle(ev.Start(), 1.0), ev.Spawn)
        assert sorted(replica for _, replica, _, _ in pools.replicas()) == sorted(names)
        assert not adopted(pools, left(replica="r7")), "there are enough"


def test_the_replicas_that_are_missing_are_started_beside_the_one_that_was_left() -> None:
    pools = pools_of(spec(replicas=2))
    adopted(pools, left(replica="r1"))
    assert of(pools.handle(ev.Start(), 1.0), ev.Spawn) == [ev.Spawn("p", "r0", 2, "m", "m")]


@pytest.mark.parametrize(
    ("handoff", "ref"),
    [
        (left(pool="q"), None), (left(model="other"), None), (left(), "m#2"), (left(slots=3), None),
        (left(ctx=2048), None), (left(engine="vllm"), None),
    ],
)  # fmt: skip
def test_an_engine_that_the_settings_do_not_ask_for_is_not_taken_over(handoff: Handoff, ref: str | None) -> None:
    assert adopted(pools_of(spec()), handoff, ref) == []


def test_no_engine_is_taken_over_by_a_pool_that_is_unloaded_or_of_others() -> None:
    assert adopted(pools_of(spec(), wishes={"pools": {"p": {"unloaded": True}}}), left()) == []
    assert adopted(pools_of(spec(engine="external", url="http://127.0.0.1:7000")), left(engine="external")) == []
    assert adopted(pools_of(), left()) == []


def test_no_engine_is_taken_over_twice_or_once_others_were_started() -> None:
    pools = pools_of(spec())
    assert adopted(pools, left())
    assert not adopted(pools, left()) and not adopted(pools, left(replica="r1"))
    pools = pools_of(spec())
    pools.handle(ev.Start(), 0.0)
    assert not adopted(pools, left())
    pools.handle(ev.Exited("p", "r0", 1, "gone", 0.5, hopeless=True), 0.0)
    assert not adopted(pools, left())


def test_an_engine_does_not_take_the_place_of_one_that_others_handed_over() -> None:
    pools = pools_of(spec())
    pools.handle(ev.HandoffSeen(Handoff("p", "vllm", "http://127.0.0.1:6000", "m", "x")), 0.0)
    assert not adopted(pools, left(replica="x"))
    assert adopted(pools, left())


def test_a_pool_on_demand_goes_on_with_the_model_that_it_had() -> None:
    pools = pools_of(on_demand(replicas=2, model="a"))
    assert adopted(pools, left("d", model="b"))
    assert not adopted(pools, left("d", "r1", model="a")), "one model at a time"
    assert adopted(pools, left("d", "r1", model="b"))
    assert pools.pool_report("d")["loading"] == "b"
    assert not of(pools.handle(ev.Start(), 0.0), ev.Spawn)


@pytest.mark.parametrize("room", [True, False])
def test_an_agent_that_ends_during_a_reload_leaves_the_proven_model(room: bool) -> None:
    world = started(spec())
    world.room = room
    world.task("p")
    world.do(ev.Reload("p", "m", "m#2"))
    world.prepared()
    for key in sorted(world.processes):
        world.comes_up(key)
    assert world.agent_restarts(keeping=sorted(world.processes)) == [R0]
    world.settle()
    assert world.runs("p") == ["m"] and world.report("p")["ready"]


def test_an_agent_that_ends_once_the_new_model_is_proven_goes_on_with_it() -> None:
    world = started(spec())
    world.task("p")
    world.do(ev.Reload("p", "m", "m#2"))
    world.settle()
    assert world.runs("p") == ["m", "m#2"], "the old one has a task"
    assert world.agent_restarts(keeping=sorted(world.processes)) == [R1]
    world.settle()
    assert world.serves("p") == ["m#2"]


# ---------------------------------------------------------------- wishes


def again(world: World) -> World:
    world.agent_restarts()
    world.settle()
    return world


def test_drains_outlive_the_agent_with_their_reasons() -> None:
    world = started(spec(), on_demand())
    world.do(ev.Drain("p", "updates"))
    world.do(ev.Drain(None, "the whole of it"))
    assert again(world).report("p")["held"] == ["operator: updates"]
    assert world.pools.draining and world.report("d")["draining"] and world.task("d") is None
    world.do(ev.Undrain())
    world.do(ev.Undrain("p"))
    assert not again(world).pools.draining
    assert world.task("p") is not None


def test_an_unloaded_pool_stays_unloaded() -> None:
    world = started(spec())
    world.do(ev.Unload("p"))
    world.settle()
    assert not again(world).processes
    world.do(ev.Load("p"))
    assert again(world).report("p")["ready"]


@pytest.mark.parametrize("ref", ["m2", "m#2"])
def test_another_model_stays_until_the_settings_name_another(ref: str) -> None:
    world = started(spec())
    world.do(ev.Reload("p", ref.partition("#")[0], ref))
    world.settle()
    assert again(world).serves("p") == [ref]
    world.settings["p"] = spec(slots=1)
    assert again(world).serves("p") == [ref]
    world.settings["p"] = spec(model="m3")
    assert again(world).serves("p") == ["m3"]
    assert world.pools.wishes()["pools"] == {}


def test_another_model_is_tried_though_that_of_the_settings_can_not_be_used() -> None:
    wishes = {"pools": {"p": {"model": {"id": "m2", "ref": "m2", "instead_of": "m"}}}}
    pools = Pools([ev.Wanted(spec(), {"m": "m"}, "there is no such file")])
    pools.restore(wishes)
    assert pools.pool_report("p")["last_error"] is None
    assert of(pools.handle(ev.Start(), 0.0), ev.Spawn) == [ev.Spawn("p", "r0", 1, "m2", "m2")]


def test_holds_of_a_gpus_owner_or_of_hours_are_judged_anew() -> None:
    world = started(spec())
    world.do(ev.Hold("p", "owner", "a game"))
    assert again(world).report("p")["ready"]


def test_a_wish_for_a_pool_that_is_gone_is_forgotten() -> None:
    world = started(spec())
    world.do(ev.Drain("p"))
    world.settings = {}
    assert again(world).pools.wishes() == {"drained": None, "pools": {}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELD = st.sampled_from(
    ["drained", "unloaded", "model", "id", "ref", "instead_of", "m", "m2", "a", "", "../x", "x" * 5000]
)
WISH = JSON | st.dictionaries(FIELD, FIELD | JSON | st.dictionaries(FIELD, FIELD | JSON, max_size=4), max_size=4)
WISHES = JSON | st.fixed_dictionaries({"drained": JSON, "pools": st.dictionaries(st.sampled_from("pde"), WISH) | JSON})


@given(WISHES)
def test_wishes_that_somebody_wrote_by_hand_hurt_nobody(wishes: Any) -> None:
    wishes = json.loads(json.dumps(wishes))
    pools = pools_of(spec(), on_demand(model="a"), external(), wishes=wishes)
    for report in pools.report():
        PoolReport.model_validate(report)
    for action in of(pools.handle(ev.Start(), 0.0), ev.Spawn):
        assert isinstance(action, ev.Spawn) and len(action.ref) <= 4_096 and ".." not in action.model
    once = pools.wishes()
    assert json.loads(json.dumps(once)) == once
    twice = pools_of(spec(), on_demand(model="a"), external(), wishes=once)
    assert twice.wishes() == once


@given(st.sampled_from(["m", "m2", "", "a/../b", "-x", "x" * 999]), st.sampled_from(["m", "m2", "", "x" * 5000]))
def test_a_model_of_ones_own_is_restored_only_if_it_may_be_called_so(name: str, ref: str) -> None:
    model = {"id": name, "ref": ref, "instead_of": "m"}
    pools = pools_of(spec(), wishes={"drained": None, "pools": {"p": {"model": model}}})
    good = name in ("m", "m2") and ref in ("m", "m2")
    assert pools.pool_report("p")["models"] == [name if good else "m"]
    assert pools.ref_of("p", name if good else "m") == (ref if good else "m")
