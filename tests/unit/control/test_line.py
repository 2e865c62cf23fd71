"""One line: whose turn it is, and what a waiter is told of its place and pace."""

from __future__ import annotations

import pytest

from llorch.control.line import (
    BATCH,
    BATCH_AGES_S,
    INTERACTIVE,
    ORDER_KEPT_S,
    PACE_KEPT_S,
    PACE_WINDOW_S,
    SURE_DEPARTURES,
    Line,
    Pace,
    Waiter,
)
from llorch.control.placement import Wish
from llorch.messages import Tail


def waiter(
    task_id: str, at: float = 0.0, owner: str = "ann", priority: str = INTERACTIVE, front: bool = False
) -> Waiter:
    return Waiter(task_id, Wish("m"), owner, at, priority, front=front)


def line(*waiters: Waiter) -> Line:
    made = Line()
    for each in waiters:
        made.add(each, each.enqueued_at)
    return made


def order(made: Line, now: float = 0.0) -> list[str]:
    return [each.task_id for each in made.order(now)]


# ---------------------------------------------------------------- whose turn it is


def test_those_that_came_back_are_first_then_interactive_ones_then_batch_each_in_order_of_arrival() -> None:
    made = line(
        waiter("batch", 0.0, priority=BATCH), waiter("2", 2.0), waiter("3", 3.0),
        waiter("back later", 1.0, front=True), waiter("back", 0.5, front=True),
    )  # fmt: skip
    assert order(made, 4.0) == ["back", "back later", "2", "3", "batch"]


def test_a_batch_task_has_aged_after_a_minute_as_if_it_had_come_then() -> None:
    made = line(waiter("batch", 1.0, priority=BATCH), waiter("before", 60.5), waiter("after", 61.5))
    assert order(made, 1.0 + BATCH_AGES_S - 0.01) == ["before", "after", "batch"]
    assert order(made, 1.0 + BATCH_AGES_S) == ["before", "batch", "after"]


def test_who_has_been_given_least_is_next_and_what_the_order_gives_counts_at_once() -> None:
    made = line(
        *(waiter(f"a{n}", owner="ann") for n in range(3)), *(waiter(f"b{n}", 1.0, owner="bob") for n in range(3))
    )
    assert order(made) == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert [each.task_id for each in made.in_turn(0.0, lambda _: False)] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    made.shares.settle("ann", made.shares.charge("ann", 0), Tail(length=0, tokens_out=10), ran=True)
    assert order(made)[0] == "b0"


def test_nobody_is_left_in_a_line_that_all_have_left() -> None:
    waiters = [waiter("1"), waiter("2", owner="bob", priority=BATCH), waiter("3", front=True)]
    made = line(*waiters)
    assert (len(made), made.counted, made.waiting_of("ann"), made.waiting_of("bob")) == (3, 2, 1, 1)
    assert made.another_waits("ann") and made.another_waits("bob")
    for each in waiters:
        made.remove(each, 1.0)
    assert (len(made), made.counted, made.mine, made.front) == (0, 0, {}, [])
    assert not made.another_waits("carl")


def test_one_that_came_back_counts_as_another_that_waits() -> None:
    made = line(waiter("back", front=True))
    assert made.another_waits("bob") and not made.another_waits("ann")


# ---------------------------------------------------------------- place and pace


def test_a_place_is_kept_for_a_moment_and_who_came_since_has_the_last_one() -> None:
    waiters = [waiter(str(number)) for number in range(1_000)]
    made = line(*waiters)
    assert made.place_of(waiters[999], 1.0) == 1_000
    made.remove(waiters[0], 1.0)
    late = waiter("late", 1.0)
    made.add(late, 1.0)
    assert made.place_of(waiters[1], 1.0 + ORDER_KEPT_S - 0.01) == 2
    assert made.place_of(late, 1.0 + ORDER_KEPT_S - 0.01) == 1_000
    assert made.place_of(waiters[1], 1.0 + ORDER_KEPT_S + 0.01) == 1


def test_the_wait_is_not_guessed_before_anybody_has_left() -> None:
    pace = Pace()
    pace.start(0.0)
    assert pace.eta_ms(1, 0.0) is None
    assert pace.eta_ms(1, 30.0) is None
    pace.departed(30.0)
    assert pace.eta_ms(2, 30.0) == 30_000


def test_time_in_which_nobody_waits_does_not_count_and_an_old_pace_is_forgotten() -> None:
    pace = Pace()
    pace.start(0.0)
    pace.departed(2.0)
    pace.stop(2.0)
    pace.start(2.0 + PACE_KEPT_S)
    assert (pace.departures, pace.gap_s(2.0 + PACE_KEPT_S)) == (1, 1.0)
    pace.stop(2.0 + PACE_KEPT_S)
    pace.start(2.1 + 2 * PACE_KEPT_S)
    assert (pace.departures, pace.eta_ms(1, 2_000.0)) == (0, None)


@pytest.mark.parametrize(("gap_s", "kept"), [(1.0, int(PACE_WINDOW_S)), (100.0, SURE_DEPARTURES)])
def test_the_departures_of_the_last_minute_count_and_a_few_of_a_slow_line(gap_s: float, kept: int) -> None:
    pace = Pace()
    pace.start(0.0)
    for number in range(1, 201):
        pace.departed(number * gap_s)
    assert pace.departures == kept
    assert pace.gap_s(200 * gap_s + gap_s) == pytest.approx(gap_s)
