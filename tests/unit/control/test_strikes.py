from __future__ import annotations

import pytest

from llorch.control import strikes as strikes_module
from llorch.control.strikes import (
    FIRST_S,
    GOOD_S,
    HALF_LIFE_S,
    MOST_S,
    THRESHOLD,
    WEIGHTS,
    WORDS,
    Offence,
    Strikes,
)
from llorch.errors import Code, LlorchError


def struck_out(strikes: Strikes, node_id: str, now: float) -> float:
    """Strike a node until it is shut out; for how many seconds."""
    for _ in range(10):
        quarantine = strikes.strike(node_id, Offence.CREDIT_OVERRUN, now)
        if quarantine is not None:
            return quarantine.until - now
    raise AssertionError("never shut out")


@pytest.mark.parametrize("offence", list(Offence))
def test_one_or_two_mistakes_shut_nobody_out_and_a_few_do(offence: Offence) -> None:
    strikes = Strikes()
    assert [strikes.strike("a", offence, 0.0) for _ in range(2)] == [None, None]
    strikes.check("a", 0.0)
    rest = [strikes.strike("a", offence, 0.0) for _ in range(2)]
    assert any(rest)
    assert WORDS[offence]
    assert 0 < WEIGHTS[offence] < THRESHOLD


def test_a_quarantined_node_is_refused_with_the_time_that_is_left_and_why() -> None:
    strikes = Strikes()
    struck_out(strikes, "a", 100.0)
    with pytest.raises(LlorchError) as caught:
        strikes.check("a", 101.0)
    error = caught.value
    assert (error.code, error.status, error.retriable) == (Code.NODE_QUARANTINED, 409, True)
    assert error.retry_after_ms == (FIRST_S - 1) * 1_000
    assert WORDS[Offence.CREDIT_OVERRUN] in error.message
    strikes.check("b", 101.0)
    strikes.check("a", 100.0 + FIRST_S)


def test_the_reason_counts_every_kind_of_offence() -> None:
    strikes = Strikes()
    for offence in (Offence.CREDIT_OVERRUN, Offence.CREDIT_OVERRUN):
        strikes.strike("a", offence, 0.0)
    quarantine = strikes.strike("a", Offence.FOREIGN_STREAM, 0.0)
    assert quarantine is not None
    assert quarantine.reason == ("more bytes than it was granted (2), records on streams that were never opened (1)")


def test_a_mistake_now_and_then_is_forgotten() -> None:
    strikes = Strikes()
    for hour in range(100):
        assert strikes.strike("a", Offence.MALFORMED_RECORD, hour * 3_600.0) is None
    assert strikes.score("a", 99 * 3_600.0 + HALF_LIFE_S) == pytest.approx(2.0, rel=0.1)


def test_each_quarantine_is_twice_as_long_up_to_an_hour_until_a_good_day_has_passed() -> None:
    strikes, now, lengths = Strikes(), 0.0, []
    for _ in range(9):
        lengths.append(struck_out(strikes, "a", now))
        now += lengths[-1]
    assert lengths == [FIRST_S * 2**n for n in range(6)] + [MOST_S] * 3
    assert struck_out(strikes, "a", now + GOOD_S) == FIRST_S


def test_whoever_comes_back_begins_with_a_clean_score() -> None:
    strikes = Strikes()
    struck_out(strikes, "a", 0.0)
    assert [strikes.strike("a", Offence.CREDIT_OVERRUN, FIRST_S) for _ in range(2)] == [None, None]
    quarantine = strikes.strike("a", Offence.CREDIT_OVERRUN, FIRST_S)
    assert quarantine is not None
    assert quarantine.reason.endswith("(3)")


def test_what_is_done_while_shut_out_begins_no_second_quarantine() -> None:
    strikes = Strikes()
    struck_out(strikes, "a", 0.0)
    assert [strikes.strike("a", Offence.CREDIT_OVERRUN, 1.0) for _ in range(9)] == [None] * 9


def test_a_pardon_forgets_everything() -> None:
    strikes = Strikes()
    struck_out(strikes, "a", 0.0)
    struck_out(strikes, "a", FIRST_S)
    assert strikes.pardon("a")
    strikes.check("a", FIRST_S)
    assert struck_out(strikes, "a", FIRST_S) == FIRST_S
    assert not strikes.pardon("b")


def test_names_without_end_are_not_remembered_and_who_is_shut_out_goes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strikes_module, "MOST_NODES", 10)
    strikes = Strikes()
    struck_out(strikes, "a", 0.0)
    for number in range(50):
        strikes.strike(f"n{number}", Offence.FOREIGN_TASK, 1.0)
    assert len(strikes) == 10
    assert strikes.of("a", 2.0) is not None
    for number in range(50):
        struck_out(strikes, f"n{number}", 1.0)
    assert len(strikes) == 10
    assert strikes.of("n49", 2.0) is not None


def test_a_clock_that_stands_or_jumps_breaks_nothing() -> None:
    strikes = Strikes()
    for now in (1e9, 0.0, -1e9, 1e18):
        strikes.strike("a", Offence.FALSE_SLOTS, now)
    assert strikes.score("a", 1e300) < 1e-9
