"""Rate limits: never more than the burst and the rate allow, and a refusal that knows when it ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llorch.ratelimit import Gcra, OncePer, Rate, address_key

RATES = st.builds(Rate, per_s=st.floats(0.01, 5_000), burst=st.floats(1, 20))
PAUSES_S = st.just(0.0) | st.floats(0, 0.01) | st.floats(0, 30)
STEPS = st.lists(st.tuples(PAUSES_S, st.floats(0.1, 5)), min_size=10, max_size=60)
START = 1_000_000.0  # a monotonic clock of a machine that has been up for a while


@given(RATES, STEPS)
def test_in_no_window_is_more_given_than_the_burst_and_the_rate_allow(
    rate: Rate, steps: list[tuple[float, float]]
) -> None:
    gcra, now, given_at = Gcra(rate), START, list[tuple[float, float]]()
    for pause_s, units in steps:
        now += pause_s
        if gcra.take("key", now, units) == 0.0:
            given_at.append((now, min(units, rate.burst)))
    for first in range(len(given_at)):
        total = 0.0
        for at, units in given_at[first:]:
            total += units
            most = rate.burst + rate.per_s * (at - given_at[first][0] + 1e-5)
            assert total <= most * (1 + 1e-9)


@given(RATES, STEPS)
def test_who_is_refused_passes_after_the_time_it_was_told_and_not_before(
    rate: Rate, steps: list[tuple[float, float]]
) -> None:
    gcra, now = Gcra(rate), START
    for pause_s, units in steps:
        now += pause_s
        wait_s = gcra.take("key", now, units)
        if wait_s:
            assert gcra.take("key", now + wait_s * 0.99 - 2e-6, units) > 0 or wait_s < 1e-5
            assert gcra.wait_s("key", now + wait_s, units) <= 1e-6
            assert gcra.take("key", now + wait_s, units) == 0.0
            now += wait_s


@given(RATES)
def test_a_burst_passes_at_once_and_one_unit_more_does_not(rate: Rate) -> None:
    gcra, whole = Gcra(rate), math.floor(rate.burst)
    assert all(gcra.take("key", START) == 0.0 for _ in range(whole))
    assume(rate.burst - whole < 1 - 1e-3)
    assume(1 / rate.per_s > 1e-4)  # faster ones have earned another by the time that rounding is worth
    assert gcra.take("key", START) == pytest.approx((whole + 1 - rate.burst) / rate.per_s, rel=1e-3, abs=1e-5)


def test_a_refusal_costs_nothing() -> None:
    gcra = Gcra(Rate(1, 2))
    assert [gcra.take("key", START) for _ in range(2)] == [0.0, 0.0]
    assert {gcra.take("key", START) for _ in range(100)} == {1.0}
    assert gcra.take("key", START + 1) == 0.0


def test_keys_do_not_share() -> None:
    gcra = Gcra(Rate(1, 1))
    assert gcra.take("a", START) == 0.0
    assert gcra.take("a", START) == 1.0
    assert gcra.take("b", START) == 0.0


def test_more_than_a_burst_passes_once_all_of_it_is_there() -> None:
    gcra = Gcra(Rate(10, 100))
    assert gcra.take("key", START, 1_000_000) == 0.0
    assert gcra.take("key", START, 1_000_000) == pytest.approx(10.0)
    assert gcra.take("key", START, 1) == pytest.approx(0.1)


@given(RATES, STEPS)
def test_what_is_settled_counts_as_if_it_had_been_taken(rate: Rate, steps: list[tuple[float, float]]) -> None:
    """An estimate and its correction leave the key as the true amount would have."""
    guessed, exact, now = Gcra(rate), Gcra(rate), START
    for pause_s, units in steps:
        now += pause_s
        true = units / 3
        assume(units <= rate.burst)
        if guessed.wait_s("key", now, units) or exact.wait_s("key", now, true):
            continue
        guessed.take("key", now, units)
        guessed.settle("key", now, true - units)
        exact.take("key", now, true)
        assert guessed.wait_s("key", now, rate.burst) == pytest.approx(exact.wait_s("key", now, rate.burst), abs=1e-5)


def test_what_was_used_beyond_the_estimate_is_waited_for_by_the_next() -> None:
    gcra = Gcra(Rate(10, 100))
    gcra.take("key", START, 10)
    gcra.settle("key", START, 190)  # 200 in all, of 100 that there were
    assert gcra.take("key", START, 10) == pytest.approx(11.0)


def test_giving_back_never_makes_more_than_a_burst() -> None:
    gcra = Gcra(Rate(1, 3))
    gcra.settle("key", START, -1_000)
    assert [gcra.take("key", START) for _ in range(4)] == [0.0, 0.0, 0.0, 1.0]


@given(st.integers(1, 50), st.lists(st.integers(0, 200), max_size=300))
def test_keys_are_bounded_and_those_in_use_are_kept(most: int, keys: list[int]) -> None:
    gcra = Gcra(Rate(0.001, 1), max_keys=most)
    for step, key in enumerate(keys):
        gcra.take(key, START + step)
        gcra.take(key, START + step)  # refused, whoever else was there
        assert len(gcra) <= most
        assert gcra.take(key, START + step) > 0


@pytest.mark.parametrize("bad", [(0, 1), (-1, 1), (1, 0.5)])
def test_a_rate_that_lets_nothing_through_is_none(bad: Any) -> None:
    with pytest.raises(ValueError, match="lets something through"):
        Rate(*bad)


def test_what_happens_often_is_told_once_a_second_with_how_many_were_left_out() -> None:
    pace = OncePer(1.0)
    assert [pace.told("full", START + tenth / 10) for tenth in range(10)] == [0] + [None] * 9
    assert pace.told("other", START) == 0
    assert pace.told("full", START + 1.05) == 9
    assert pace.told("full", START + 2.1) == 0


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", "unknown"),
        (None, "unknown"),
        ("a name", "unknown"),
    ],
)
def test_an_address_counts_as_itself_or_as_its_64(address: str | None, key: str) -> None:
    assert address_key(address) == key
