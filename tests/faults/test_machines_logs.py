"""A task's log and everybody who reads it, end to end, under any order of what may happen."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.logs_world import LogsWorld
from tests.faults.moves import machine, mileage
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
