from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llorch.backoff import Backoff, RetryBudget


@given(st.integers(0, 10_000), st.floats(0, 0.999))
def test_a_delay_stays_between_half_the_first_and_the_most(failures: int, chance: float) -> None:
    assert 0.1 <= Backoff(0.2, 2.0).delay_s(failures, chance) <= 2.0


def test_delays_double_up_to_the_most() -> None:
    assert [Backoff(1, 60).delay_s(n, 1.0) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_fifth_of_the_active_and_always_three_may_be_in_a_retry_at_once() -> None:
    for active, most in ((1, 3), (15, 3), (19, 3), (20, 4), (100, 20)):
        budget = RetryBudget()
        assert [budget.take(f"t{number}", active) for number in range(active)].count(True) == min(active, most)


def test_one_that_tries_twice_counts_once_and_one_that_is_done_makes_room() -> None:
    budget = RetryBudget()
    assert all(budget.take(who, 1) for who in "aaabbbccc")
    assert not budget.take("d", 1)
    assert [budget.give_back(who) for who in ("b", "b", "never took")] == [True, False, False]
    assert [budget.take(who, 1) for who in "de"] == [True, False]


@given(st.lists(st.tuples(st.sampled_from("abcdefghij"), st.booleans(), st.integers(0, 60))))
def test_no_order_of_retries_and_ends_lets_more_through(steps: list[tuple[str, bool, int]]) -> None:
    budget, trying = RetryBudget(), set[str]()
    for who, begins, active in steps:
        if not begins:
            budget.give_back(who)
            trying.discard(who)
        elif budget.take(who, active):
            assert who in trying or len(trying) < max(3, active // 5)
            trying.add(who)
        else:
            assert who not in trying
            assert len(trying) >= max(3, active // 5)
