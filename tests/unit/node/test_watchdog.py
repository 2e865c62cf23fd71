"""When an engine is said to have stalled, and when never."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from llorch.node.watchdog import MOST_BETWEEN_LOOKS_S, Watchdog

STALL_S = 60.0
EVERY_S = 5.0


@dataclass
class Looks:
    """Looks at one engine, EVERY_S apart."""

    dog: Watchdog
    now: float = 1_000.0

    def look(
        self,
        times: int = 1,
        *,
        busy: bool = True,
        counters: tuple[float, ...] | None = (1.0,),
        answered: bool = True,
        heard_at: float | None = None,
        every_s: float = EVERY_S,
    ) -> list[float]:
        """When, since the first of these looks, a stall was told."""
        told, began = [], self.now
        for _ in range(times):
            stalled = self.dog.look(
                "p/r0", busy=busy, counters=counters, answered=answered, heard_at=heard_at, now=self.now
            )
            if stalled:
                told.append(self.now - began)
            self.now += every_s
        return told


def watched() -> Looks:
    looks = Looks(Watchdog(STALL_S))
    looks.look(busy=False)
    return looks


def test_a_busy_engine_whose_counters_stand_still_has_stalled_and_is_told_once() -> None:
    assert watched().look(1_000) == [STALL_S]


def test_one_that_no_longer_answers_has_stalled_too() -> None:
    looks = watched()
    looks.look()
    assert looks.look(100, counters=None, answered=False) == [STALL_S - EVERY_S]


def test_one_whose_counters_move_never_has() -> None:
    looks = watched()
    for step in range(1_000):
        assert looks.look(counters=(float(step),)) == []


def test_counters_that_begin_anew_have_moved() -> None:
    looks = watched()
    looks.look(11)
    assert looks.look(counters=(0.0,)) == []
    assert looks.look(12, counters=(0.0,)) == [STALL_S - EVERY_S]


def test_one_that_is_heard_has_not_and_its_silence_counts_from_there() -> None:
    looks = watched()
    looks.look(11)
    heard_at = looks.now - 1.0
    assert looks.look(100, heard_at=heard_at) == [60.0], "61 s after it, at the next look"


def test_an_idle_engine_never_has_however_long_it_stood_still() -> None:
    looks = watched()
    assert looks.look(1_000, busy=False) == []
    assert looks.look(12) == [], "what it did before it was given work counts for nothing"
    assert looks.look(1, busy=False) == [] and looks.look(12) == []


def test_one_without_counters_is_never_judged_by_them() -> None:
    looks = Looks(Watchdog(STALL_S))
    assert looks.look(1_000, counters=None) == []
    assert looks.look(1_000, counters=None, answered=False) == []


def test_a_time_in_which_nobody_looked_is_no_evidence() -> None:
    """The machine slept, or the agent was stopped."""
    looks = watched()
    looks.look(2)
    looks.now += 10_000.0
    assert looks.look() == []
    told = looks.look(100)
    assert told == [STALL_S - EVERY_S - MOST_BETWEEN_LOOKS_S - EVERY_S]


def test_after_something_moved_another_stall_is_told() -> None:
    looks = watched()
    assert len(looks.look(50)) == 1
    assert looks.look(counters=(2.0,)) == []
    assert len(looks.look(50, counters=(2.0,))) == 1


def test_one_that_was_forgotten_begins_anew() -> None:
    looks = watched()
    looks.look(12)
    looks.dog.forget("p/r0")
    looks.dog.forget("another")
    assert looks.look(12) == [] and len(looks.look(50)) == 1


@dataclass(frozen=True)
class Moment:
    after_s: float
    busy: bool
    answered: bool
    moves: bool
    heard: bool


MOMENTS = st.lists(
    st.builds(
        Moment, st.floats(0.0, 40.0), st.sampled_from([True, True, False]), st.booleans(),
        st.sampled_from([False, False, False, True]), st.sampled_from([False, False, False, True]),
    ),
    max_size=40,
)  # fmt: skip


@given(MOMENTS, st.floats(1.0, 120.0))
def test_a_stall_is_never_told_of_one_that_was_idle_or_moved_within_that_time(
    moments: list[Moment], stall_s: float
) -> None:
    dog, now, count = Watchdog(stall_s), 0.0, 0.0
    alive_at, told_since = 0.0, False
    dog.look("e", busy=False, counters=(count,), answered=True, heard_at=None, now=now)
    heard_at: float | None = None
    for moment in moments:
        now += moment.after_s
        count += moment.moves and moment.answered
        heard_at = now if moment.heard else heard_at
        counters = (count,) if moment.answered else None
        stalled = dog.look(
            "e", busy=moment.busy, counters=counters, answered=moment.answered, heard_at=heard_at, now=now
        )
        if moment.heard or not moment.busy or (moment.moves and moment.answered):
            assert not stalled
            alive_at, told_since = now, False
        elif stalled:
            assert now - alive_at >= stall_s * (1 - 1e-9), "too early"
            assert not told_since, "told twice"
            told_since = True


@given(st.floats(1.0, 300.0), st.floats(0.1, MOST_BETWEEN_LOOKS_S), st.booleans())
def test_a_stall_is_told_within_two_looks_of_its_time(stall_s: float, every_s: float, answered: bool) -> None:
    looks = Looks(Watchdog(stall_s))
    looks.look(every_s=every_s)
    counters = (1.0,) if answered else None
    (told,) = looks.look(int(stall_s / every_s) + 4, counters=counters, answered=answered, every_s=every_s)
    assert stall_s - every_s * 1.001 <= told <= stall_s + 2 * every_s
