"""Hours of the week: what may be written, and when they mean that something serves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.config_hours import DAY, DAYS, HOURS, WEEK, next_change, parse, serves_at, show_moment
from llorch.config_kinds import BadValue

MON, TUE, WED, THU, FRI, SAT, SUN = range(7)


def at(clock: str) -> int:
    hour, _, minute = clock.partition(":")
    return int(hour) * 60 + int(minute)


def serves(text: str, day: int, clock: str) -> bool:
    return serves_at(parse(text), day, at(clock))


def test_a_span_without_days_is_of_every_day() -> None:
    for day in range(7):
        assert serves("09:00-17:30", day, "09:00")
        assert serves("09:00-17:30", day, "17:29")
        assert not serves("09:00-17:30", day, "17:30")
        assert not serves("09:00-17:30", day, "08:59")


def test_a_night_goes_on_over_midnight_and_over_the_end_of_the_week() -> None:
    for day in range(7):
        assert serves("18:00-08:00", day, "23:59")
        assert serves("18:00-08:00", day, "00:00")
        assert serves("18:00-08:00", day, "07:59")
        assert not serves("18:00-08:00", day, "12:00")
    assert serves("sun 22:00-06:00", MON, "05:59")
    assert not serves("sun 22:00-06:00", SUN, "05:59")


def test_a_span_belongs_to_the_days_before_it_and_begins_on_them() -> None:
    text = "mon-fri 18:00-08:00, sat,sun 00:00-24:00"
    assert not serves(text, MON, "07:00")  # Sunday's span ends at midnight
    assert serves(text, TUE, "07:00")
    assert serves(text, SAT, "07:00")
    assert serves(text, SAT, "12:00")
    assert serves(text, SUN, "23:59")
    assert not serves(text, FRI, "12:00")


def test_days_may_go_over_the_end_of_the_week() -> None:
    assert [serves("sat-mon 10:00-11:00", day, "10:30") for day in range(7)] == [True, *[False] * 4, True, True]


def test_blanks_and_capitals_do_not_matter() -> None:
    assert parse(" Mon - Fri   18:00 - 8:00 ,SAT 00:00-24:00") == parse("mon-fri 18:00-08:00,sat 00:00-24:00")
    assert str(parse(" Mon  9:00-10:00 ")) == "mon 9:00-10:00"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"), ("18:00", "neither days nor hours"), ("mon-fri", "days that have no hours"),
        ("mon 09:00-10:00, tue", "days that have no hours"), ("moon 09:00-10:00", "not a day"),
        ("mon-fry 09:00-10:00", "not a day"), ("09:00-09:00", "no span"), ("24:00-08:00", "no span"),
        ("09:60-10:00", "not a time of day"), ("24:01-25:00", "not a time of day"), ("09:00-10:00,", "neither"),
        ("09:00-10:00 mon", "neither"), ("9-17", "neither"), ("x" * 401, "more than 400"),
        ("mon,,tue 1:00-2:00", "neither"),
    ],
)  # fmt: skip
def test_what_is_not_hours_is_refused_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(BadValue) as caught:
        HOURS.parse(text)
    assert message in caught.value.message
    assert caught.value.hint


def test_the_next_change_is_told_as_the_wall_clock_will_show_it() -> None:
    weekdays = parse("mon-fri 18:00-08:00")
    assert next_change(weekdays, MON, at("12:00")) == (MON, at("18:00"))
    assert next_change(weekdays, MON, at("18:00")) == (TUE, at("08:00"))
    assert next_change(weekdays, SAT, at("08:00")) == (MON, at("18:00"))
    assert next_change(parse("sun 00:00-24:00"), SUN, at("12:00")) == (MON, 0)
    assert next_change(parse("00:00-24:00"), WED, 7) is None
    assert next_change(parse("00:00-12:00, 12:00-24:00"), WED, 7) is None
    assert show_moment(THU, at("07:05")) == "thu 07:05"


TIMES = st.integers(0, DAY).map(lambda minutes: f"{minutes // 60:02}:{minutes % 60:02}")
SPANS = st.builds(
    lambda days, start, end: f"{days} {start}-{end}",
    st.lists(st.sampled_from(DAYS), max_size=3).map(",".join),
    TIMES.filter(lambda time: time != "24:00"),
    TIMES,
).filter(lambda text: text.split()[-1][:5] != text.split()[-1][6:])


@given(st.lists(SPANS, min_size=1, max_size=4).map(", ".join), st.integers(0, WEEK - 1))
def test_nothing_changes_before_the_next_change(text: str, moment: int) -> None:
    hours = parse(text)
    assert HOURS.parse(HOURS.show(hours)) == hours
    now = serves_at(hours, *divmod(moment, DAY))
    change = next_change(hours, *divmod(moment, DAY))
    steps = range(1, WEEK + 1)
    first = next((step for step in steps if serves_at(hours, *divmod((moment + step) % WEEK, DAY)) != now), None)
    assert change == (None if first is None else divmod((moment + first) % WEEK, DAY))


@given(st.text("monfritue 0123456789:-,", max_size=40))
def test_any_text_is_hours_or_refused(text: str) -> None:
    try:
        assert parse(text).spans
    except BadValue:
        pass
