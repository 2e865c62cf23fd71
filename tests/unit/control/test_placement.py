from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.control.decision import Decision, Outcome, decide
from llorch.control.placement import FILTERS, Known, PoolFacts, Wish, excluding, pick, refusal
from llorch.errors import Code

NOW = 100.0


def pool(name: str = "a/p0", **facts: object) -> PoolFacts:
    node_id, _, pool_id = name.partition("/")
    return replace(PoolFacts(node_id, pool_id, model="m"), **facts)  # type: ignore[arg-type]


def verdict(decision: Decision, name: str):  # type: ignore[no-untyped-def]
    return next(v for v in decision.verdicts if f"{v.node_id}/{v.pool_id}" == name)


def code_of(wish: Wish, *pools: PoolFacts, **known: frozenset[str]) -> Code | None:
    """The code of the refusal, None if the task would wait."""
    names = Known(
        nodes=frozenset(p.node_id for p in pools) | known.pop("nodes", frozenset()),
        pools=frozenset(p.name for p in pools),
        **known,
    )
    assert pick(wish, pools) is None
    error = refusal(wish, pools, names)
    return None if error is None else error.code


# ---------------------------------------------------------------- filters


UNFIT: dict[str, dict[str, object]] = {
    "model": {"model": "other"},
    "online": {"online": False},
    "reachable": {"reachable": False, "suspect": True},
    "draining": {"node_draining": True},
    "failed": {"state": "failed"},
    "loaded": {"model": None, "models": frozenset({"m"})},
    "ready": {"ready": False},
    "slot": {"slots_free": 0},
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_pool_that_fails_one_filter_gets_nothing_and_says_which(name: str) -> None:
    unfit = pool(**UNFIT[name])
    decision = decide(Wish("m"), [unfit], NOW)
    assert decision.picked is None
    assert verdict(decision, "a/p0").code == name
    assert verdict(decision, "a/p0").reason


@pytest.mark.parametrize(
    ("name", "wish"),
    [
        ("pin", Wish("m", pin="b")),
        ("pin", Wish("m", pin="a/p1")),
        ("prefer", Wish("m", prefer=("b",), allow_fallback=False)),
        ("avoid", Wish("m", avoid=("a",), allow_fallback=False)),
        ("zone", Wish("m", zone="east")),
        ("excluded", Wish("m", exclude=frozenset({("a", "p0")}))),
    ],
)
def test_a_wish_that_a_pool_does_not_meet_keeps_the_task_off_it(name: str, wish: Wish) -> None:
    decision = decide(wish, [pool()], NOW)
    assert decision.picked is None
    assert verdict(decision, "a/p0").code == name


def test_a_suspect_node_that_still_answers_gets_no_new_task() -> None:
    assert pick(Wish("m"), [pool(suspect=True)]) is None
    assert pick(Wish("m"), [pool(pool_draining=True)]) is None


def test_every_filter_is_evaluated_though_an_earlier_one_failed() -> None:
    decision = decide(Wish("m"), [pool(model="other", ready=False, slots_free=0)], NOW)
    results = verdict(decision, "a/p0").filters
    assert [result.name for result in results] == [check.name for check in FILTERS]
    assert [result.name for result in results if not result.passed] == ["model", "loaded", "ready", "slot"]
    assert all(result.reason for result in results if not result.passed)


# ---------------------------------------------------------------- order


def test_the_least_loaded_relative_to_its_slots_wins() -> None:
    small = pool("a/p0", slots_total=2, slots_free=1)
    large = pool("b/p0", slots_total=8, slots_free=5)
    assert pick(Wish("m"), [small, large]) == ("b", "p0")


def test_a_preferred_pool_wins_over_a_less_loaded_one() -> None:
    busy, idle = pool("a/p0", slots_total=4, slots_free=1), pool("b/p0", slots_total=4, slots_free=4)
    assert pick(Wish("m", prefer=("a",)), [busy, idle]) == ("a", "p0")
    assert pick(Wish("m", prefer=("a/p0",)), [busy, idle]) == ("a", "p0")
    assert pick(Wish("m", prefer=("a/p9",)), [busy, idle]) == ("b", "p0")


def test_a_preferred_pool_that_is_full_does_not_make_the_task_wait_unless_it_allows_no_fallback() -> None:
    full, idle = pool("a/p0", slots_free=0), pool("b/p0")
    assert pick(Wish("m", prefer=("a",)), [full, idle]) == ("b", "p0")
    assert code_of(Wish("m", prefer=("a",), allow_fallback=False), full, idle) is None


def test_an_avoided_pool_is_the_last_resort_and_never_taken_without_fallback() -> None:
    avoided, other = pool("a/p0", slots_total=8, slots_free=8), pool("b/p0", slots_total=8, slots_free=1)
    assert pick(Wish("m", avoid=("a",)), [avoided, other]) == ("b", "p0")
    assert pick(Wish("m", avoid=("a",)), [avoided, replace(other, slots_free=0)]) == ("a", "p0")
    assert pick(Wish("m", avoid=("a",), allow_fallback=False), [avoided, replace(other, slots_free=0)]) is None


def test_of_equally_loaded_pools_the_one_with_more_free_vram_wins_then_the_first_by_name() -> None:
    assert pick(Wish("m"), [pool("a/p0", vram_free_bytes=1), pool("b/p0", vram_free_bytes=2)]) == ("b", "p0")
    assert pick(Wish("m"), [pool("b/p0"), pool("a/p1"), pool("a/p0")]) == ("a", "p0")


def test_a_pinned_task_goes_to_its_node_or_pool_however_loaded() -> None:
    pools = [pool("a/p0", slots_total=9, slots_free=1), pool("a/p1", slots_total=9, slots_free=2), pool("b/p0")]
    assert pick(Wish("m", pin="a"), pools) == ("a", "p1")
    assert pick(Wish("m", pin="a/p0"), pools) == ("a", "p0")


# ---------------------------------------------------------------- wait or refuse


@pytest.mark.parametrize("passing", ["reachable", "loaded", "ready", "slot"])
def test_busy_loading_and_suspect_pools_are_waited_for(passing: str) -> None:
    assert code_of(Wish("m"), pool(**UNFIT[passing]), pool("b/p0", online=False)) is None
    assert decide(Wish("m"), [pool(**UNFIT[passing])], NOW).outcome is Outcome.WAIT


@pytest.mark.parametrize("gone", ["online", "draining", "failed"])
def test_when_all_are_draining_failed_or_offline_there_is_no_capacity(gone: str) -> None:
    assert code_of(Wish("m"), pool(**UNFIT[gone], slots_free=0)) is Code.NO_CAPACITY


def test_no_capacity_says_how_many_pools_failed_where_and_when_to_retry() -> None:
    pools = [pool("a/p0", node_draining=True), pool("b/p0", online=False), pool("c/p0", online=False)]
    decision = decide(Wish("m"), pools, NOW)
    assert decision.outcome is Outcome.REFUSE
    assert decision.error is not None
    assert decision.error.details == {"pools": {"draining": 1, "online": 2}}
    assert decision.error.retry_after_ms
    assert decision.error.retriable


def test_a_model_that_nobody_has_is_not_found_and_one_that_no_pool_can_load_is_not_available() -> None:
    assert code_of(Wish("x"), pool()) is Code.MODEL_NOT_FOUND
    assert code_of(Wish("x")) is Code.MODEL_NOT_FOUND
    assert code_of(Wish("x"), pool(), catalogued=frozenset({"x"})) is Code.MODEL_NOT_AVAILABLE


def test_a_model_that_is_only_where_the_wish_forbids_is_not_available() -> None:
    assert code_of(Wish("m", zone="east"), pool()) is Code.MODEL_NOT_AVAILABLE
    assert code_of(Wish("m", pin="b"), pool(), pool("b/p0", model="other")) is Code.MODEL_NOT_AVAILABLE
    assert code_of(Wish("m", avoid=("a",), allow_fallback=False), pool()) is Code.MODEL_NOT_AVAILABLE


def test_an_unknown_pin_is_not_found_by_what_is_missing() -> None:
    assert code_of(Wish("m", pin="zz"), pool()) is Code.NODE_NOT_FOUND
    assert code_of(Wish("m", pin="zz/p0"), pool()) is Code.NODE_NOT_FOUND
    assert code_of(Wish("m", pin="a/p9"), pool()) is Code.POOL_NOT_FOUND
    assert code_of(Wish("m", pin="bare"), pool(), nodes=frozenset({"bare"})) is Code.MODEL_NOT_AVAILABLE


def test_a_retry_that_has_tried_every_pool_is_refused_and_one_with_a_busy_pool_left_waits() -> None:
    tried = excluding(Wish("m"), [("a", "p0")])
    assert code_of(tried, pool()) is Code.NO_CAPACITY
    assert code_of(tried, pool(), pool("b/p0", slots_free=0)) is None
    assert excluding(tried, [("b", "p0")]).exclude == {("a", "p0"), ("b", "p0")}


# ---------------------------------------------------------------- the two paths agree

NAMES = [f"{node}/{pool_id}" for node, pool_id in itertools.product("abc", ("p0", "p1"))]
ENTRIES = st.sampled_from([*"abc", *NAMES])
# Mostly fit, so that examples get past the first filters.
MOSTLY = st.sampled_from([True, True, True, True, False])


@st.composite
def facts(draw: st.DrawFn, name: str) -> PoolFacts:
    node_id, _, pool_id = name.partition("/")
    total = draw(st.integers(0, 4))
    return PoolFacts(
        node_id,
        pool_id,
        model=draw(st.sampled_from(["m", "m", "m", "n", None])),
        models=draw(st.frozensets(st.sampled_from(["m", "n"]))),
        online=draw(MOSTLY),
        reachable=draw(MOSTLY),
        suspect=not draw(MOSTLY),
        node_draining=not draw(MOSTLY),
        pool_draining=not draw(MOSTLY),
        ready=draw(MOSTLY),
        state=draw(st.sampled_from(["ready", "ready", None, "failed"])),
        slots_total=total,
        slots_free=draw(st.integers(0, total)),
        vram_free_bytes=draw(st.integers(0, 2)),
        zone=draw(st.sampled_from(["east", "east", None])),
    )


WISHES = st.builds(
    Wish,
    st.sampled_from(["m", "m", "n", "x"]),
    pin=st.none() | ENTRIES,
    prefer=st.lists(ENTRIES, max_size=2).map(tuple),
    avoid=st.lists(ENTRIES, max_size=2).map(tuple),
    allow_fallback=st.booleans(),
    zone=st.sampled_from([None, None, "east"]),
    exclude=st.frozensets(st.sampled_from([tuple(name.split("/")) for name in NAMES]), max_size=2),
)
POOLS = st.lists(st.sampled_from(NAMES), unique=True).flatmap(lambda names: st.tuples(*map(facts, names)))


@settings(max_examples=80, deadline=None)
@given(WISHES, POOLS, st.randoms(use_true_random=False))
def test_the_fast_path_and_the_explained_decision_agree_whatever_the_order_of_the_pools(
    wish: Wish, pools: tuple[PoolFacts, ...], random: object
) -> None:
    decision = decide(wish, pools, NOW)
    shuffled = list(pools)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert pick(wish, pools) == pick(wish, shuffled) == decision.picked
    assert decide(wish, shuffled, NOW).to_wire() == decision.to_wire()
    assert (decision.outcome is Outcome.PLACED) == (decision.picked is not None)
    assert (decision.outcome is Outcome.REFUSE) == (decision.error is not None)
    assert (decision.picked is not None) == any(v.passed for v in decision.verdicts)


@settings(max_examples=60, deadline=None)
@given(WISHES, POOLS)
def test_a_pool_is_placeable_only_if_it_passes_every_filter_that_does_not_depend_on_the_wish(
    wish: Wish, pools: tuple[PoolFacts, ...]
) -> None:
    own = {"online", "reachable", "draining", "failed", "ready", "slot"}
    for each in pools:
        assert each.placeable == all(check.passes(wish, each) for check in FILTERS if check.name in own)


@settings(max_examples=60, deadline=None)
@given(WISHES, POOLS)
def test_a_wish_without_constraints_is_met_by_any_placeable_pool_of_its_model(
    wish: Wish, pools: tuple[PoolFacts, ...]
) -> None:
    if not wish.constrained:
        free = any(p.placeable and p.model == wish.model for p in pools)
        assert (pick(wish, pools) is not None) == free


@settings(max_examples=60, deadline=None)
@given(WISHES, POOLS)
def test_narrowing_the_pools_to_the_model_changes_neither_the_pick_nor_the_refusal(
    wish: Wish, pools: tuple[PoolFacts, ...]
) -> None:
    known = Known(nodes=frozenset("abc"), pools=frozenset(NAMES))
    narrowed = [p for p in pools if p.model == wish.model or wish.model in p.models]
    assert pick(wish, narrowed) == pick(wish, pools)
    whole, part = refusal(wish, pools, known), refusal(wish, narrowed, known)
    assert (whole and whole.to_wire()) == (part and part.to_wire())


# ---------------------------------------------------------------- what people see


def test_a_decision_on_the_wire_has_every_pool_with_its_verdicts_terms_and_age() -> None:
    pools = [pool("b/p0", reported_at=NOW - 1.5), pool("a/p0", slots_free=0), pool("c/p0", vram_free_bytes=5)]
    wire = json.loads(json.dumps(decide(Wish("m"), pools, NOW).to_wire()))
    assert (wire["outcome"], wire["node_id"], wire["pool_id"]) == ("placed", "c", "p0")
    full, second, first = wire["pools"]
    assert (full["code"], full["rank"], full["passed"]) == ("slot", None, False)
    assert (first["rank"], second["rank"]) == (1, 2)
    assert second["facts_age_ms"] == 1500
    assert first["facts_age_ms"] is None
    terms = {"warmth": "resident", "avoided": False, "preferred": False, "load": 0.0, "vram_free_bytes": 5}
    assert first["score"] == terms
    assert [check["name"] for check in full["filters"]] == [check.name for check in FILTERS]


def test_a_refusal_on_the_wire_carries_the_error_a_client_would_get() -> None:
    wire = decide(Wish("x"), [pool()], NOW).to_wire()
    assert wire["outcome"] == "refuse"
    assert wire["error"]["code"] == "MODEL_NOT_FOUND"
