"""The whole of it, a control, nodes, engines and clients, under any order of what may befall them, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.cluster_parts import virtual_time
from tests.faults.cluster_world import ClusterWorld
from tests.faults.logs_world import LogsWorld
from tests.faults.moves import Move, machine, mileage, play
from tests.faults.small import small_limits

STEPS = 1_000_000
STEPS_OF_THE_WHOLE = 200_000  # each costs as much as five of the logs


@pytest.fixture(autouse=True)
def limits() -> Iterator[pytest.MonkeyPatch]:
    with small_limits() as patch:
        virtual_time(patch)
        yield patch


def test_every_promise_holds_in_any_order() -> None:
    run_state_machine_as_test(
        machine(ClusterWorld, ClusterWorld.moves()),
        settings=settings(max_examples=15, stateful_step_count=50, deadline=None, print_blob=True),
    )


def test_every_promise_holds_over_a_distance() -> None:
    assert mileage(ClusterWorld, 1_500, random.randrange(1 << 32)) >= 1_500


@pytest.mark.steps
@pytest.mark.timeout(3_600)
def test_every_promise_holds_for_a_million_steps() -> None:
    seed = random.randrange(1 << 32)
    done = mileage(ClusterWorld, STEPS_OF_THE_WHOLE, seed) + mileage(LogsWorld, STEPS - STEPS_OF_THE_WHOLE, seed)
    print(f"seed {seed}: {done} steps")
    assert done >= STEPS


# What was found, as the fewest moves that show it.

ANOTHER_ATTEMPT: list[Move] = [
    ("a_client_comes", {"want": 3, "kind": 3, "by_key": 0}),
    ("a_client_comes", {"want": 4, "kind": 2, "by_key": 0}),
    ("a_link_is_cut", {"which": 1, "silent": 2}),
    ("an_engine_says", {"which": 1, "count": 1}),
    ("the_control_dies", {}),
    ("a_node_dies", {"which": 0}),
    ("an_engine_says", {"which": 2, "count": 1}),
]


def test_a_client_is_never_shown_the_rest_of_another_attempt() -> None:
    """Its task ran twice because a link was lost; the control that knew has died; the wrong one is found first."""
    play(ClusterWorld, ANOTHER_ATTEMPT)


UNKNOWN_MODEL: list[Move] = [
    ("the_control_dies", {}),
    ("a_client_comes", {"want": 4, "kind": 0, "by_key": 1}),
    ("time_passes", {"seconds": 3}),
]


def test_a_model_is_not_unknown_because_a_control_has_just_started() -> None:
    play(ClusterWorld, UNKNOWN_MODEL)
