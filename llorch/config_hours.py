"""At which hours of the week something serves, by the clock on the wall: how that is written, and what it means.

    18:00-08:00                                   every day, over midnight
    mon-fri 18:00-08:00, sat,sun 00:00-24:00      a span belongs to the days before it, and to the day it begins on

Owns the text and the decision. The time comes in as it stands on a wall clock, weekday and minutes after midnight: when
clocks are put forward or back, the hours go with them, and nobody computes with seconds since 1970.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from llorch.config_kinds import BadValue, Kind, quote

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")  # 0 is Monday, as in Python's weekday()
DAY = 24 * 60  # minutes
WEEK = 7 * DAY
MAX_CHARS = 400  # seven days with some spans each
EXAMPLE = "18:00-08:00"
HINT = "for example 18:00-08:00, or mon-fri 18:00-08:00, sat,sun 00:00-24:00"

_SPAN = re.compile(r"([0-9]{1,2}):([0-9]{2})\s*-\s*([0-9]{1,2}):([0-9]{2})")
_PART = re.compile(rf"(?:([a-z]+)(?:\s*-\s*([a-z]+))?)?\s*({_SPAN.pattern})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Hours:
    """`spans` are minutes of the week [from, to), sorted, apart from each other; one over its end is two of them."""

    text: str = field(compare=False)
    spans: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return self.text


def serves_at(hours: Hours, weekday: int, minutes: int) -> bool:
    """`weekday` 0 (Monday) to 6, `minutes` after midnight, both as the wall clock shows them."""
    now = weekday * DAY + minutes
    return any(start <= now < end for start, end in hours.spans)


def next_change(hours: Hours, weekday: int, minutes: int) -> tuple[int, int] | None:
    """(weekday, minutes) of the next moment at which `serves_at` changes; None if it never does."""
    now = weekday * DAY + minutes
    serves = serves_at(hours, weekday, minutes)
    edges = sorted({edge % WEEK for span in hours.spans for edge in span})
    for edge in [edge for edge in edges if edge > now] + edges:
        if serves_at(hours, *divmod(edge, DAY)) != serves:
            return divmod(edge, DAY)
    return None


def show_moment(weekday: int, minutes: int) -> str:
    return f"{DAYS[weekday]} {minutes // 60:02}:{minutes % 60:02}"


def parse(value: str) -> Hours:
    """Raises BadValue."""
    text = " ".join(value.lower().split())
    if not text:
        raise BadValue("is empty", HINT)
    if len(text) > MAX_CHARS:
        raise BadValue(f"has more than {MAX_CHARS} characters", HINT)
    spans: list[tuple[int, int]] = []
    days: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None or not match[0]:
            raise BadValue(f"{quote(part.strip())} is neither days nor hours", HINT)
        first, last, span = match[1], match[2], match[3]
        days += _days(first, last) if first else []
        if span:
            start, end = _minutes(match[4], match[5]), _minutes(match[6], match[7])
            if start in (end, DAY):
                raise BadValue(f"{quote(span)} is no span of time", "00:00-24:00 is the whole day")
            length = end - start if end > start else end - start + DAY
            begins = days or range(7)
            spans += [(day * DAY + start, day * DAY + start + length) for day in begins]
            days = []
    if days:
        raise BadValue(f"{quote(value)} ends with days that have no hours", HINT)
    return Hours(text, _merged(spans))


def _days(first: str, last: str | None) -> list[int]:
    for word in (first, last or first):
        if word not in DAYS:
            raise BadValue(f"{quote(word)} is not a day", f"one of {', '.join(DAYS)}")
    start, end = DAYS.index(first), DAYS.index(last or first)
    return [day % 7 for day in range(start, end + 1 if end >= start else end + 8)]


def _minutes(hour: str, minute: str) -> int:
    at = int(hour) * 60 + int(minute)
    if int(minute) > 59 or at > DAY:
        raise BadValue(f"{hour}:{minute} is not a time of day", "from 00:00 to 24:00")
    return at


def _merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(_within_week(spans)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _within_week(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in spans:
        yield start, min(end, WEEK)
        if end > WEEK:
            yield 0, end - WEEK


HOURS: Kind[Hours] = Kind("hours", parse, EXAMPLE, {"type": "string", "minLength": 1})
