"""Breakers: when failures are too many, for how long it is out, and the one trial that brings it back."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llorch.breaker import Breaker, Phase, may_eject, surplus


def failed(breaker: Breaker, times: int, now: float = 0.0) -> bool:
    """Whether the last of so many failures makes an ejection due."""
    return [breaker.failed(now, trial=False) for _ in range(times)][-1]


def out(now: float = 0.0, times: int = 1) -> Breaker:
    """Ejected, for the `times`th time in a row."""
    breaker = Breaker()
    for _ in range(times):
        breaker.eject(now)
    return breaker


def half_open() -> Breaker:
    breaker = out()
    breaker.advance(15.0)
    return breaker


# ---------------------------------------------------------------- too many failures


def test_five_failures_in_a_row_are_too_many_and_four_are_not() -> None:
    breaker = Breaker()
    assert not failed(breaker, 4)
    assert failed(breaker, 1)
    assert breaker.why == "5 tasks in a row failed"


def test_a_success_between_them_begins_the_row_anew() -> None:
    breaker = Breaker()
    assert not failed(breaker, 4)
    breaker.succeeded(0.0, trial=False)
    assert not failed(breaker, 4)
    assert failed(breaker, 1)


def test_half_of_ten_outcomes_within_thirty_seconds_are_too_many() -> None:
    breaker = Breaker()
    for number in range(4):
        breaker.succeeded(number, trial=False)
        assert not failed(breaker, 1, number)
    breaker.succeeded(4, trial=False)
    assert failed(breaker, 1, 4)  # the tenth
    assert breaker.why == "5 of 10 tasks failed within 30 s"


def test_nine_outcomes_are_too_few_and_less_than_half_is_well_enough() -> None:
    breaker = Breaker()
    for _ in range(4):
        breaker.succeeded(0, trial=False)
        assert not failed(breaker, 1)
    assert not failed(breaker, 1)  # the ninth, and five failed
    for _ in range(4):
        breaker.succeeded(0, trial=False)
    assert not failed(breaker, 1)  # six of fourteen


def test_what_is_thirty_seconds_old_is_no_longer_looked_at() -> None:
    breaker = Breaker()
    for _ in range(4):
        breaker.succeeded(0.0, trial=False)
        failed(breaker, 1, 0.0)
    breaker.succeeded(31.0, trial=False)
    assert not failed(breaker, 1, 31.0)


def test_of_a_busy_pools_outcomes_the_newest_are_looked_at() -> None:
    breaker = Breaker()
    for _ in range(10_000):
        breaker.succeeded(0.0, trial=False)
    due = False
    for _ in range(200):
        failed(breaker, 1)
        due = due or failed(breaker, 1)
        breaker.succeeded(0.0, trial=False)
    assert due, "two of three fail, and ten thousand earlier ones hide it"
    assert len(breaker._outcomes) <= 200


# ---------------------------------------------------------------- out, and back


def test_an_ejection_lasts_fifteen_seconds_and_each_one_in_a_row_twice_as_long_up_to_two_minutes() -> None:
    breaker, now, lasted = Breaker(), 0.0, []
    for _ in range(6):
        lasts_s = breaker.eject(now)
        lasted.append(lasts_s)
        assert not breaker.advance(now + lasts_s - 0.1)
        assert breaker.left_s(now + lasts_s - 0.1) == pytest.approx(0.1)
        now += lasts_s
        assert breaker.advance(now)
        assert breaker.phase is Phase.HALF_OPEN
        assert breaker.begin("t")
        assert breaker.failed(now, trial=True)
    assert lasted == [15, 30, 60, 120, 120, 120]


def test_nothing_goes_there_while_it_is_out_and_then_one_task_at_a_time() -> None:
    breaker = out()
    assert not breaker.takes
    breaker.advance(15.0)
    assert breaker.takes
    assert breaker.begin("t1")
    assert not breaker.takes
    breaker.end("another")
    assert not breaker.takes
    breaker.end("t1")  # with no outcome
    assert breaker.takes
    assert breaker.phase is Phase.HALF_OPEN


def test_a_trial_that_succeeds_closes_it_and_the_row_begins_anew() -> None:
    breaker = half_open()
    breaker.begin("t")
    assert breaker.succeeded(16.0, trial=True)
    assert (breaker.phase, breaker.takes, breaker.until) == (Phase.CLOSED, True, float("inf"))
    assert not breaker.begin("u"), "no trial any more"
    assert not failed(breaker, 4, 16.0)
    assert failed(breaker, 1, 16.0)
    assert breaker.eject(16.0) == 30


def test_tasks_that_began_before_the_ejection_decide_nothing() -> None:
    breaker = out()
    for _ in range(2):
        assert not breaker.succeeded(1.0, trial=False)
        assert not failed(breaker, 20, 1.0)
        breaker.advance(15.0)
    assert breaker.phase is Phase.HALF_OPEN


def test_a_trial_that_does_not_end_holds_up_the_next_one_for_thirty_seconds() -> None:
    breaker = half_open()
    breaker.begin("hangs")
    breaker.advance(20.0)
    assert breaker.until == 50.0
    assert not breaker.advance(49.9)
    assert breaker.advance(50.0)
    assert breaker.begin("next")
    breaker.end("hangs")
    assert not breaker.takes, "the end of an earlier trial is not that of this one"


def test_the_next_trial_has_its_own_time() -> None:
    breaker = half_open()
    breaker.begin("a")
    breaker.advance(20.0)
    breaker.end("a")
    breaker.begin("b")
    breaker.advance(40.0)
    assert breaker.until == 70.0


def test_what_went_before_is_forgotten_after_five_healthy_minutes() -> None:
    breaker = out(times=3)
    breaker.close(100.0)
    assert breaker.eject(399.0) == 120
    breaker.close(1000.0)
    assert breaker.eject(1300.0) == 15


# ---------------------------------------------------------------- at most half


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (8, 4)])
def test_at_most_half_are_out_at_once(count: int, most: int) -> None:
    peers = [Breaker() for _ in range(count)]
    for breaker in peers:
        if may_eject(breaker, peers):
            breaker.eject(0.0)
    assert sum(not breaker.takes for breaker in peers) == most
    assert surplus(peers) == []


def test_one_that_is_half_open_is_still_out() -> None:
    tried, other = half_open(), Breaker()
    assert not may_eject(other, [tried, other])
    assert may_eject(tried, [tried, other])


def test_of_too_many_those_come_back_that_would_be_tried_first() -> None:
    late, soon, tried, well = out(5.0), out(0.0), half_open(), Breaker()
    assert surplus([late, soon, tried, well]) == [tried]
    assert surplus([late, soon, well]) == [soon]
    assert surplus([late, soon, tried]) == [tried, soon]
    assert surplus([late]) == [late]


# ---------------------------------------------------------------- any order, beside a model


class AnyOrder(RuleBasedStateMachine):
    """Every outcome is kept here and judged by hand, with no more than the words of the rule."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker()
        self.now = 1_000.0
        self.outcomes: list[tuple[float, bool]] = []  # since it was closed
        self.state = "closed"
        self.row = 0
        self.back_at = 0.0
        self.closed_at = 0.0
        self.trial: int | None = None
        self.trial_until = 0.0
        self.tried: list[int] = []
        self.serial = 0

    def due(self) -> bool:
        lately = [well for at, well in self.outcomes[-200:] if self.now - at <= 30.0]  # of very many, the newest
        in_a_row = len(self.outcomes) >= 5 and not any(well for _, well in self.outcomes[-5:])
        return in_a_row or (len(lately) >= 10 and 2 * lately.count(False) >= len(lately))

    def closes(self) -> None:
        self.state, self.outcomes, self.trial, self.closed_at = "closed", [], None, self.now

    def goes_out(self) -> None:
        if self.state == "closed" and self.now - self.closed_at >= 300.0:
            self.row = 0
        self.row += 1
        lasts_s = min(120.0, 15.0 * 2 ** (self.row - 1))
        assert self.breaker.eject(self.now) == lasts_s
        self.state, self.back_at, self.trial = "ejected", self.now + lasts_s, None

    @rule(seconds=st.sampled_from([0.5, 3.0, 14.0, 29.0, 31.0, 120.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        was = self.breaker.takes
        changed = self.breaker.advance(self.now)
        if self.state == "ejected" and self.now >= self.back_at:
            self.state = "half_open"
        elif self.trial is not None and self.now >= self.trial_until:
            self.trial = None
        assert changed == (was != self.breaker.takes)

    @precondition(lambda self: self.state == "closed")
    @rule(wells=st.lists(st.booleans(), min_size=1, max_size=8), allowed=st.booleans())
    def tasks_end(self, wells: list[bool], allowed: bool) -> None:
        for well in wells:
            self.outcomes.append((self.now, well))
            if well:
                assert not self.breaker.succeeded(self.now, trial=False)
                continue
            due = self.breaker.failed(self.now, trial=False)
            assert due == self.due()
            if due and allowed:
                self.goes_out()
                return

    @precondition(lambda self: self.state != "closed")
    @rule(well=st.booleans())
    def an_older_task_ends(self, well: bool) -> None:
        assert not (self.breaker.succeeded if well else self.breaker.failed)(self.now, trial=False)

    @precondition(lambda self: self.state == "half_open" and self.trial is None)
    @rule()
    def a_trial_begins(self) -> None:
        self.serial += 1
        assert self.breaker.begin(self.serial)
        assert not self.breaker.advance(self.now)
        self.trial, self.trial_until = self.serial, self.now + 30.0
        self.tried.append(self.serial)

    @precondition(lambda self: self.tried)
    @rule(data=st.data(), outcome=st.sampled_from([True, False, None]), allowed=st.booleans())
    def a_trial_ends(self, data: st.DataObject, outcome: bool | None, allowed: bool) -> None:
        """This one, or an earlier one that took too long."""
        who = data.draw(st.sampled_from(self.tried))
        self.tried.remove(who)
        if outcome is not None and self.state != "closed":
            told = (self.breaker.succeeded if outcome else self.breaker.failed)(self.now, trial=True)
            assert told == (self.state == "half_open")
            if told and outcome:
                self.closes()
            elif told and allowed:
                self.goes_out()
            elif told:
                self.breaker.close(self.now)
                self.closes()
        self.breaker.end(who)
        if self.trial == who:
            self.trial = None

    @precondition(lambda self: self.state != "closed")
    @rule()
    def the_others_can_not_do_without_it(self) -> None:
        self.breaker.close(self.now)
        self.closes()

    @invariant()
    def it_is_where_the_model_is(self) -> None:
        assert self.breaker.phase.value == self.state
        assert self.breaker.takes == (self.state == "closed" or (self.state == "half_open" and self.trial is None))
        assert (self.breaker.left_s(self.now) is not None) == (self.state == "ejected")
        waits = self.state == "ejected" or self.trial is not None
        assert (self.breaker.until < float("inf")) == waits


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
