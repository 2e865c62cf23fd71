from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llorch.backoff import Backoff


@given(st.integers(0, 10_000), st.floats(0, 0.999))
def test_a_delay_stays_between_half_the_first_and_the_most(failures: int, chance: float) -> None:
    assert 0.1 <= Backoff(0.2, 2.0).delay_s(failures, chance) <= 2.0


def test_delays_double_up_to_the_most() -> None:
    assert [Backoff(1, 60).delay_s(n, 1.0) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
