"""A task's log and everybody who reads it, end to end, under any order of what may happen."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.logs_world import LogsWorld
from tests.faults.moves import Move, machine, mileage, play
from tests.faults.small import small_limits


@pytest.fixture(autouse=True)
def limits() -> Iterator[pytest.MonkeyPatch]:
    with small_limits() as patch:
        yield patch


def test_logs_and_their_readers_hold_in_any_order() -> None:
    run_state_machine_as_test(
        machine(LogsWorld, LogsWorld.moves()),
        settings=settings(max_examples=30, stateful_step_count=50, deadline=None, print_blob=True),
    )


def test_logs_and_their_readers_hold_over_a_distance() -> None:
    assert mileage(LogsWorld, 4_000, random.randrange(1 << 32)) >= 4_000


# What was found, as the fewest moves that show it.

DISCARDED: list[Move] = [
    ("a_task_comes", {"which": 1, "path": 1, "detach": 0, "keyed": 0, "long": 0}),
    ("a_task_comes", {"which": 1, "path": 0, "detach": 1, "keyed": 1, "long": 0}),
    ("time_passes", {"seconds": 2}),
    ("an_engine_says", {"which": 2, "count": 1, "size": 1}),
    ("a_task_comes", {"which": 0, "path": 0, "detach": 3, "keyed": 1, "long": 0}),
    ("a_wire_flows", {"which": 0}),
    ("a_client_leaves", {"reading": 1, "word": 1}),
    ("an_engine_ends", {"which": 0, "how": 0}),
    ("an_engine_says", {"which": 0, "count": 4, "size": 2}),
    ("a_control_dies_and_starts", {"which": 0}),
    ("a_task_comes", {"which": 1, "path": 1, "detach": 0, "keyed": 0, "long": 1}),
    ("time_passes", {"seconds": 4}),
    ("all_is_calm", {}),
    ("a_task_is_cancelled", {"reading": 9}),
    ("a_task_comes", {"which": 1, "path": 0, "detach": 3, "keyed": 0, "long": 3}),
    ("an_engine_says", {"which": 0, "count": 5, "size": 1}),
    ("a_client_leaves", {"reading": 3, "word": 2}),
]


def test_a_discarded_attempt_takes_memory_until_it_ends() -> None:
    play(LogsWorld, DISCARDED)
