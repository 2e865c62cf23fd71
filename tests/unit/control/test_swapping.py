"""Pools that load their models on demand: which is loaded where and when, and that everybody has a turn."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.control.decision import Outcome, decide
from llorch.control.line import BATCH, Waiter
from llorch.control.placement import Wish, pick
from llorch.control.registry import Registry
from llorch.control.swapping import Next, choose, explained
from llorch.messages import Heartbeat, Register
from tests.unit.control.swap_simulation import KEPT_S, Arrival, Simulation, SwapPool

AB = ("a", "b")
SLACK_S = 2.0  # for reports, and for the control to look up


def steady(model: str, every_s: float, until_s: float, first_s: float = 0.0, **more: float | str) -> list[Arrival]:
    return [Arrival(first_s + n * every_s, model, **more) for n in range(int((until_s - first_s) / every_s))]  # type: ignore[arg-type]


# ---------------------------------------------------------------- one pool


def test_a_model_is_loaded_for_its_first_task_and_the_next_ones_are_held_with_it() -> None:
    pool = SwapPool(AB, slots=2)
    run = Simulation(n=pool).run([Arrival(1.0, "a"), Arrival(2.0, "a"), Arrival(3.0, "a")])
    assert (pool.loads, pool.refusals) == (1, 0)
    assert run.waits() == pytest.approx([10.0, 9.0, 9.0], abs=0.5)


def test_a_model_that_was_just_loaded_is_kept_for_a_while_though_it_is_idle() -> None:
    pool = SwapPool(AB)
    run = Simulation(n=pool).run([Arrival(1.0, "a"), Arrival(15.0, "b")])
    assert run.waits("b") == pytest.approx([11.0 + KEPT_S - 15.0 + 10.0], abs=SLACK_S)
    assert (pool.loads, pool.refusals) == (2, 0)


def test_a_steady_stream_for_one_model_does_not_keep_another_out() -> None:
    pool = SwapPool(AB, slots=2)
    run = Simulation(n=pool).run([*steady("a", 0.4, 100.0), Arrival(15.0, "b")])
    (waited,) = run.waits("b")
    assert waited <= (10.0 + KEPT_S - 15.0) + 10.0 + 1.0 + SLACK_S
    assert pool.loads == 3


def test_before_it_has_had_its_time_a_model_goes_on_though_another_waits() -> None:
    pool = SwapPool(AB, slots=2)
    run = Simulation(n=pool).run([*steady("a", 0.6, 100.0), Arrival(15.0, "b")])
    first_b = next(when for when, model, _ in run.ran if model == "b")
    last_a = max(when for when, model, _ in run.ran if model == "a" and when < first_b)
    assert 10.0 + KEPT_S - 1.0 <= last_a <= 10.0 + KEPT_S + SLACK_S


def test_of_two_models_that_wait_the_one_goes_first_whose_task_has_waited_longest() -> None:
    pool = SwapPool(("a", "b", "c"), slots=2)
    run = Simulation(n=pool).run([Arrival(1.0, "a"), Arrival(15.0, "b"), Arrival(20.0, "c"), Arrival(25.0, "b")])
    assert [model for _, model, _ in run.ran] == ["a", "b", "b", "c"]
    assert (pool.loads, pool.refusals) == (3, 0)


@pytest.mark.parametrize("models", [("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("every_s", [0.8, 4.0, 17.0])
def test_under_a_steady_load_each_load_serves_its_time_and_nobody_starves(
    models: tuple[str, ...], every_s: float
) -> None:
    pool = SwapPool(models, slots=8)
    arrivals = [each for n, model in enumerate(models) for each in steady(model, every_s, 300.0, 0.1 * n)]
    run = Simulation(n=pool).run(arrivals)
    assert pool.loads <= 2 + run.now / KEPT_S
    turn_s = KEPT_S + 10.0 + 1.0 + SLACK_S
    backlog_s = 60.0 / every_s / 8 * len(models)  # what has come meanwhile takes as long to serve
    assert max(run.waits()) <= len(models) * turn_s + backlog_s


def test_what_came_before_goes_before_though_another_model_has_waited() -> None:
    """Their line was long already when the other's first came: it is not cut off for that."""
    pool = SwapPool(AB, slots=1)
    run = Simulation(n=pool).run([*[Arrival(1.0, "a")] * 45, Arrival(2.0, "b"), *[Arrival(3.0, "a")] * 5])
    assert [model for _, model, _ in run.ran] == ["a"] * 45 + ["b"] + ["a"] * 5


def test_batch_tasks_wait_a_minute_longer_before_another_model_goes_for_them() -> None:
    pool = SwapPool(AB, slots=2)
    run = Simulation(n=pool).run([*steady("a", 0.6, 200.0), Arrival(15.0, "b", priority=BATCH)])
    (waited,) = run.waits("b")
    assert 60.0 <= waited <= 60.0 + 10.0 + 1.0 + SLACK_S


def test_no_pool_is_drained_for_a_task_that_may_not_go_there() -> None:
    shared, own = SwapPool(AB, slots=2), SwapPool(("b",), slots=1)
    late = [Arrival(1.0, "b", service_s=90.0), Arrival(2.0, "b", pin="own"), *steady("a", 0.6, 80.0)]
    run = Simulation(shared=shared, own=own).run(late)
    assert shared.loads == 1
    assert max(run.waits("a")) <= 10.0 + SLACK_S


def test_what_is_idle_is_unloaded_by_its_node_and_loaded_again_when_it_is_asked_for() -> None:
    pool = SwapPool(("a",), idle_unload_s=5.0)
    run = Simulation(n=pool).run([Arrival(1.0, "a"), Arrival(60.0, "a")])
    assert pool.loads == 2
    assert run.waits() == pytest.approx([10.0, 10.0], abs=0.5)


def test_a_model_that_can_not_be_loaded_fails_its_tasks_and_not_those_of_the_others() -> None:
    pool = SwapPool(AB, broken=frozenset({"b"}))
    run = Simulation(n=pool).run([Arrival(1.0, "a"), Arrival(2.0, "b"), *steady("a", 2.0, 90.0, 3.0)])
    assert run.failed == ["b"]
    assert len(run.waits("a")) == 44


# ---------------------------------------------------------------- what a claim pledges


def a_registry(**report: object) -> Registry:
    registry = Registry("epoch")
    message = Register.model_validate({"node_id": "n", "boot_id": "b", "pools": [a_report(**report)]})
    registry.register(message, now=0.0, wall="x", peer=None, lease_id="l")
    registry.link_up("n", "l", 0.0)
    return registry


def a_report(**more: object) -> dict[str, object]:
    return {
        "pool_id": "p", "model": "a", "models": ["a", "b", "c"], "state": "ready", "ready": True,
        "slots_total": 2, "slots_free": 2, "swappable": True, "loading": None,
    } | more  # fmt: skip


def report(registry: Registry, now: float = 1.0, **more: object) -> None:
    message = {"lease_id": "l", "delta": True, "pools": [a_report(**more)]}
    registry.heartbeat("n", Heartbeat.model_validate(message), now=now, wall="x")


def where(registry: Registry, model: str, now: float = 1.0) -> bool:
    """Whether a task for `model` would be placed."""
    return pick(Wish(model), registry.pool_facts(now, model)) is not None


def takes(registry: Registry, now: float = 1.0) -> set[str]:
    return {model for model in ("a", "b", "c") if where(registry, model, now)}


def test_a_claim_on_a_swappable_pool_pledges_it_to_its_model_up_to_its_slots() -> None:
    registry = a_registry()
    assert takes(registry) == {"a", "b", "c"}
    registry.claim("n", "p", "t1", 1, "b")
    assert takes(registry) == {"b"}
    registry.claim("n", "p", "t2", 1, "b")
    assert takes(registry) == set()


def test_a_claim_for_what_is_resident_keeps_others_out_and_pledges_nothing() -> None:
    registry = a_registry()
    claim = registry.claim("n", "p", "t1", 1, "a")
    assert takes(registry) == {"a"}
    registry.release(claim)
    assert takes(registry) == {"a", "b", "c"}


def test_a_pledge_outlasts_a_report_that_left_before_it_and_no_other() -> None:
    registry = a_registry()
    claim = registry.claim("n", "p", "t1", 1, "b")
    registry.accepted(claim)
    report(registry)
    assert takes(registry) == {"b"}
    report(registry, model=None, ready=False, state="loading", loading="b", swappable=False, slots_free=1)
    assert takes(registry) == {"b"}
    report(registry, model="b", swappable=False, slots_free=1)
    assert takes(registry) == {"b"}
    other = a_registry()
    other.claim("n", "p", "t1", 1, "b")
    report(other, model=None, ready=False, state="loading", loading="c", swappable=False, slots_free=1)
    assert takes(other) == {"c"}  # another control's task was there first
    third = a_registry()
    third.claim("n", "p", "t1", 1, "b")
    report(third, swappable=False, slots_free=1)
    assert takes(third) == {"a"}  # it serves one for what is resident


def test_a_pledge_is_over_with_its_last_claim_unless_the_node_has_begun_to_load() -> None:
    registry = a_registry()
    claims = [registry.claim("n", "p", f"t{n}", 1, "b") for n in range(2)]
    registry.release(claims[0])
    assert takes(registry) == {"b"}
    registry.release(claims[1], used=False)
    assert takes(registry) == {"a", "b", "c"}
    claim = registry.claim("n", "p", "t3", 1, "b")
    registry.accepted(claim)
    registry.release(claim)  # its client has left; the node goes on loading
    assert takes(registry) == {"b"}
    report(registry)
    assert takes(registry) == {"a", "b", "c"}


def test_a_refused_swap_is_not_tried_again_before_the_next_report_or_for_a_second() -> None:
    registry = a_registry()
    for again in (lambda: takes(registry, 2.5), lambda: report(registry, 1.2) or takes(registry, 1.2)):
        claim = registry.claim("n", "p", "t1", 1, "b")
        registry.busy(claim, 1.0, another=True)
        registry.release(claim)
        assert takes(registry) == {"a"}
        assert again() == {"a", "b", "c"}


def test_a_pool_that_loads_counts_as_loading_until_its_model_is_there() -> None:
    registry = a_registry(model=None, ready=False, state="stopped")
    claim = registry.claim("n", "p", "t1", 1, "b")
    assert registry.loading(claim)
    report(registry, model=None, ready=False, state="loading", loading="b", swappable=False, slots_free=1)
    assert registry.loading(claim)
    report(registry, model="b", swappable=False, slots_free=1)
    assert not registry.loading(claim)


def test_a_pool_that_was_stopped_and_would_load_is_bound_and_no_pool_without_that_is() -> None:
    bound = lambda **more: a_registry(model=None, ready=False, state="stopped", **more).nodes["n"].pools["p"].bound  # noqa: E731
    assert bound(swappable=True) and not bound(swappable=False) and not bound(swappable=True, draining=True)


def test_what_was_set_aside_for_one_model_is_not_loaded_with_another_meanwhile() -> None:
    pools = a_registry().pool_facts(1.0)
    aside = {("n", "p"): Next("b", 0.5)}
    late, early = Waiter("t", Wish("c"), "o", 1.0), Waiter("t", Wish("c"), "o", 0.0)
    assert choose(late, pools, aside, 1.0, lambda: pools) is None
    assert choose(early, pools, aside, 1.0, lambda: pools) is None
    assert choose(Waiter("t", Wish("b"), "o", 1.0), pools, aside, 1.0, lambda: pools) == ("n", "p")
    (told,) = explained(late, pools, aside, 1.0)
    assert told.barred == "b is to be loaded there next: a task for it has waited longer"


def test_an_explanation_says_what_is_loaded_and_when_it_may_be_swapped() -> None:
    registry = a_registry(swappable=False, slots_free=1)
    decision = decide(Wish("b"), registry.pool_facts(12.0), 12.0, registry.models())
    assert decision.outcome is Outcome.WAIT
    assert decision.verdicts[0].reason == "a is loaded now; swapped when idle, in about 18 s at the earliest"
    registry = a_registry()
    decision = decide(Wish("b"), registry.pool_facts(1.0), 1.0, registry.models())
    assert decision.outcome is Outcome.PLACED and decision.picked == ("n", "p")
    assert "in the place of an idle one" in decision.reason


# ---------------------------------------------------------------- several pools


def test_two_models_find_a_pool_each_and_keep_it() -> None:
    pools = {name: SwapPool(AB, slots=4) for name in ("n", "o")}
    run = Simulation(**pools).run([*steady("a", 1.0, 300.0), *steady("b", 1.0, 300.0, 0.5)])
    assert [pool.loads for pool in pools.values()] == [1, 1]
    assert max(run.waits()) <= 10.0 + SLACK_S


def test_where_others_serve_a_model_a_task_waits_for_them_as_long_as_a_load_takes() -> None:
    """A burst of a second is over sooner than a second pool is loaded."""
    pools = {name: SwapPool(AB, slots=1) for name in ("n", "o")}
    run = Simulation(**pools).run([Arrival(0.0, "a"), *[Arrival(20.0, "a")] * 5])
    assert sum(pool.loads for pool in pools.values()) == 1
    assert max(run.waits()) <= 10.0 + SLACK_S
    more = {name: SwapPool(AB, slots=1) for name in ("n", "o")}
    Simulation(**more).run([Arrival(0.0, "a"), *[Arrival(20.0, "a", service_s=8.0)] * 8])
    assert sum(pool.loads for pool in more.values()) == 2


def test_lines_that_are_equally_long_leave_their_pools_as_they_are() -> None:
    pools = {name: SwapPool(AB, slots=2) for name in ("n", "o")}
    load = [*steady("a", 0.45, 200.0), *steady("b", 0.45, 200.0, 0.2)]  # more than there are slots for
    Simulation(**pools).run(load)
    assert sum(pool.loads for pool in pools.values()) == 2


def test_a_line_that_waits_much_longer_gets_a_pool_of_the_others_for_a_while() -> None:
    pools = {name: SwapPool(AB, slots=2) for name in ("n", "o")}
    surge = [Arrival(30.0 + 0.25 * n, "a") for n in range(240)]
    run = Simulation(**pools).run([Arrival(0.0, "a"), *steady("b", 0.7, 150.0)])
    assert max(run.waits("b")) <= 10.0 + SLACK_S
    assert {node for _, model, node in run.ran if model == "a"} == {"n"}
    pools = {name: SwapPool(AB, slots=2) for name in ("n", "o")}
    run = Simulation(**pools).run([Arrival(0.0, "a"), *steady("b", 0.7, 150.0), *surge])
    assert {node for _, model, node in run.ran if model == "a"} == {"n", "o"}
    assert max(run.waits("b")) <= KEPT_S + 2 * 10.0 + SLACK_S


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        st.floats(0.0, 150.0),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from([0.2, 1.0, 7.0]),
        st.sampled_from(["ann", "bob"]),
    ),
    min_size=1,
    max_size=40,
)
POOLS = st.lists(
    st.builds(
        SwapPool,
        st.sampled_from([("a", "b", "c")]),
        slots=st.integers(1, 3),
        load_s=st.sampled_from([0.5, 5.0, 20.0]),
        idle_unload_s=st.sampled_from([float("inf"), 3.0, 40.0]),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(ARRIVALS, POOLS)
def test_whatever_comes_everybody_is_served_in_time_and_no_pool_is_swapped_too_often(
    arrivals: list[Arrival], pools: list[SwapPool]
) -> None:
    """In the order of a few turns of each model, and the time that all work takes one after another."""
    run = Simulation(**{f"n{number}": pool for number, pool in enumerate(pools)}).run(arrivals)
    work_s = sum(arrival.service_s for arrival in arrivals)
    turn_s = KEPT_S + 20.0 + 7.0 + SLACK_S
    assert max(run.waits()) <= 3 * turn_s + work_s
    for pool in pools:
        if pool.idle_unload_s == float("inf"):
            assert pool.loads <= 2 + run.now / KEPT_S
