"""Why a pool takes no tasks, and how far an operation is, by views that may be anything."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.cli.pool_words import (
    SAME_LINE_EVERY_S,
    Asked,
    Lines,
    Outcome,
    Patience,
    Seen,
    asked_of_pool,
    drain_words,
    node_seen,
    note_of,
    operation_words,
)


def operated(kind: str, state: str, **more: Any) -> dict[str, Any]:
    message = more.pop("message", None)
    return {"operation": {"kind": kind, "state": state, "started_at": "t1", "message": message}, **more}


@pytest.mark.parametrize(
    ("pool", "note"),
    [
        ({}, None),
        ({"held": [], "loading": None, "operation": None, "draining": False}, None),
        ({"draining": True}, "draining"),
        ({"draining": True, "held": ["operator: kernel update"]}, "draining (operator: kernel update)"),
        ({"held": ["owner: 6.2 GiB", "hours: 18:00-08:00"]}, "held: owner: 6.2 GiB; hours: 18:00-08:00"),
        ({"loading": "b"}, "loading b"),
        ({"loading": "b", "operation": {"kind": "load", "state": "running", "model": "b"}}, "loading b"),
        (operated("reload", "running", loading="b"), "loading b; reloading"),
        (operated("reload", "failed", message="no such file"), "reloading failed: no such file"),
        (operated("reload", "done", message="all well"), None),
        (operated("knit", "running"), "knit"),
        ({"draining": True, "operation": {"kind": "drain", "state": "running"}}, "draining"),
    ],
)  # fmt: skip
def test_a_note_says_each_thing_that_keeps_tasks_away_once(pool: dict[str, Any], note: str | None) -> None:
    assert note_of(pool) == note


def test_a_nodes_reason_is_what_all_its_pools_say() -> None:
    operator, hours = "operator: new disk", "hours: 18:00-08:00"
    assert drain_words({"draining": False, "pools": [{"held": [operator]}]}) is None
    assert drain_words({"draining": True}) == "draining"
    assert drain_words({"draining": True, "pools": []}) == "draining"
    both = [{"held": [hours, operator]}, {"held": [operator]}]
    assert drain_words({"draining": True, "pools": both}) == f"draining ({operator})"
    assert drain_words({"draining": True, "pools": [*both, {"held": None}]}) == "draining"


def test_an_operation_is_known_by_its_kind_and_when_it_began() -> None:
    asked, seen = asked_of_pool("drain", None, operated("drain", "running", in_flight=2))
    assert (seen.outcome, seen.text) == (Outcome.RUNNING, "draining, 2 tasks run")
    assert asked.seen(operated("drain", "done")).outcome is Outcome.DONE
    assert asked.seen({"operation": {"kind": "drain", "state": "done", "started_at": "t2"}}).outcome is Outcome.UNSEEN
    assert asked.seen(operated("reload", "done")).outcome is Outcome.UNSEEN
    assert asked.seen({}).outcome is Outcome.UNSEEN
    assert asked.seen(None).outcome is Outcome.UNSEEN


@pytest.mark.parametrize("answered", [{}, {"operation": None}, operated("reload", "failed"), operated("x", "running")])
def test_an_answer_without_the_operation_means_that_there_was_nothing_to_do(answered: dict[str, Any]) -> None:
    assert asked_of_pool("undrain", None, answered)[1] == Seen(Outcome.DONE, "takes tasks again")


def test_the_reason_of_a_failure_is_the_operations_own_or_the_pools_last_error() -> None:
    asked = Asked("reload", "b", "t1")
    assert asked.seen(operated("reload", "failed", message="why", last_error="other")).why == "why"
    assert asked.seen(operated("reload", "failed", last_error="other")).why == "other"
    assert asked.seen(operated("reload", "failed")) == Seen(Outcome.FAILED, "reloading b failed")


def node(*pools: dict[str, Any], draining: bool = True) -> dict[str, Any]:
    return {"draining": draining, "pools": list(pools)}


def test_a_node_has_drained_when_no_pool_of_it_drains_and_no_task_runs() -> None:
    done, running = operated("drain", "done"), operated("drain", "running", in_flight=1)
    for view, outcome in (
        (node(done, draining=False), Outcome.UNSEEN),
        (node(), Outcome.DONE),
        (node(done, done), Outcome.DONE),
        (node({}, operated("reload", "failed")), Outcome.DONE),  # what was before is not this one's failure
        (node({"in_flight": 1}), Outcome.RUNNING),
        (node(done, running), Outcome.RUNNING),
        (node(running, operated("drain", "failed", pool_id="p1", message="m")), Outcome.FAILED),
    ):
        assert node_seen("drain", view).outcome is outcome, view
    assert node_seen("drain", node(done, running)).text == "draining, 1 of 2 pools, 1 task runs"
    assert node_seen("undrain", node({"in_flight": 9}, draining=False)).outcome is Outcome.DONE


def test_a_new_phase_is_said_at_once_and_other_figures_now_and_then() -> None:
    lines = Lines()
    said = [
        lines.line(Seen(Outcome.RUNNING, phase, progress), now)
        for now, phase, progress in (
            (0.0, "a", "1"),
            (0.1, "a", "2"),
            (0.2, "b", "2"),
            (0.2 + SAME_LINE_EVERY_S - 0.01, "b", "3"),
            (0.2 + SAME_LINE_EVERY_S, "b", "3"),
            (99.0, "b", "3"),
        )
    ]
    assert said == ["a, 1", None, "b, 2", None, "b, 3", None]


def test_patience_counts_from_when_it_went_missing_and_anew_once_it_was_back() -> None:
    patience = Patience()
    looks = ((True, 1.0), (True, 3.0), (False, 4.0), (True, 5.0), (True, 6.0))
    assert [patience.missing_s(*look) for look in looks] == [0.0, 2.0, 0.0, 0.0, 1.0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    "draining", "held", "loading", "operation", "in_flight", "pools", "kind", "state", "model", "message", "last_error",
    "started_at", "pool_id",
)  # fmt: skip
VIEWS = st.dictionaries(st.sampled_from(NAMES), JSON | st.dictionaries(st.sampled_from(NAMES), JSON))


@given(VIEWS, st.lists(JSON | VIEWS, max_size=3))
def test_a_view_may_be_anything(view: dict[str, Any], pools: list[Any]) -> None:
    note_of(view)
    operation_words(view)
    asked_of_pool("drain", None, view)
    for each in (view, view | {"pools": pools}):
        drain_words(each)
        node_seen("drain", each)
        node_seen("undrain", each)
