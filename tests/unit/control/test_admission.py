from __future__ import annotations

from dataclasses import replace
from itertools import count as serial

import pytest

from llorch.control import admission as rules
from llorch.control.admission import (
    MAX_RETRY_AFTER_MS,
    MIN_RETRY_AFTER_MS,
    Admission,
    being_loaded,
    serving_slots,
)
from llorch.control.line import BATCH, BATCH_AGES_S, Waiter
from llorch.control.placement import PoolFacts, Wish
from llorch.errors import Code, LlorchError
from llorch.messages import Tail
from tests.unit.control.queue_simulation import Arrival, Simulation

SLOTS = 4
SERIAL = serial()


def waiter(
    task_id: str, model: str = "m", at: float = 0.0, owner: str = "ann", *, deadline: float | None = None,
    priority: str = "interactive", size: int = 0, front: bool = False, **wish: object,
) -> Waiter:  # fmt: skip
    return Waiter(task_id, Wish(model, **wish), owner, at, priority, size, deadline, front)  # type: ignore[arg-type]


def queue(*waiters: Waiter, limit: int | None = 100, body_limit: int = 1 << 30) -> Admission:
    admission = Admission(limit, body_limit)
    for each in waiters:
        admission.enqueue(each, each.enqueued_at, SLOTS)
    return admission


class Slots:
    """Places as many tasks of each model (or each pin) as it has slots, and records who was asked."""

    def __init__(self, **free: int) -> None:
        self.free = free
        self.asked: list[str] = []

    def __call__(self, waiter: Waiter) -> str | None:
        self.asked.append(waiter.task_id)
        name = waiter.wish.pin or waiter.wish.model
        if self.free.get(name, 0) > 0:
            self.free[name] -= 1
            return f"slot of {name}"
        return None


def placed(admission: Admission, slots: Slots, now: float = 0.0, model: str | None = None) -> list[str]:
    return [waiter.task_id for waiter, _ in admission.match(slots, now, model)]


def refused(admission: Admission, waiter: Waiter, now: float = 0.0, slots: int = SLOTS) -> LlorchError:
    with pytest.raises(LlorchError) as caught:
        admission.enqueue(waiter, now, slots)
    assert waiter.task_id not in admission
    return caught.value


def fill(admission: Admission, count: int, owner: str = "ann", now: float = 0.0, slots: int = SLOTS) -> int:
    """How many of `count` further tasks of `owner` are let in; the others are refused because the queue is full."""
    for number in range(count):
        try:
            admission.enqueue(waiter(f"{owner}-{now}-{next(SERIAL)}", at=now, owner=owner), now, slots)
        except LlorchError as error:
            assert error.code is Code.QUEUE_FULL
            return number
    return count


# ---------------------------------------------------------------- who is next


def test_free_slots_go_to_waiters_in_order_of_arrival_one_each() -> None:
    admission = queue(waiter("1"), waiter("2"), waiter("3"))
    assert placed(admission, Slots(m=2)) == ["1", "2"]
    assert placed(admission, Slots(m=2)) == ["3"]
    assert len(admission) == 0
    assert admission.depths() == {}


def test_a_model_without_a_slot_holds_up_none_of_another_model() -> None:
    admission = queue(waiter("1", "stuck"), waiter("2", "m"))
    assert placed(admission, Slots(m=1)) == ["2"]
    assert admission.depth("stuck") == 1


def test_slots_can_be_offered_to_the_waiters_of_one_model() -> None:
    admission = queue(waiter("1", "other"), waiter("2"))
    assert placed(admission, Slots(m=1, other=1), model="m") == ["2"]
    assert placed(admission, Slots(m=1, other=1), model="nobody's") == []
    assert admission.depths() == {("other", "interactive"): 1}


def test_a_waiter_whose_own_wish_cannot_be_met_is_passed_by_those_behind_it() -> None:
    admission = queue(waiter("1", pin="a"), waiter("2"), waiter("3"))
    assert placed(admission, Slots(m=2)) == ["2", "3"]
    assert placed(admission, Slots(a=1)) == ["1"]


def test_when_nothing_is_free_one_waiter_per_model_is_asked() -> None:
    admission = queue(*(waiter(str(n)) for n in range(50)), *(waiter(f"o{n}", "other") for n in range(50)))
    slots = Slots()
    assert placed(admission, slots) == []
    assert slots.asked == ["0", "o0"]


def test_nobody_is_asked_where_no_slot_is_free_at_all() -> None:
    admission = queue(waiter("1"), waiter("2", "other"))
    slots = Slots(m=1, other=1)
    assert [w.task_id for w, _ in admission.match(slots, 0.0, any_free=lambda model: model == "other")] == ["2"]
    assert slots.asked == ["2"]


def test_the_same_unmet_wish_is_asked_once() -> None:
    admission = queue(*(waiter(f"a{n}", pin="a") for n in range(50)), waiter("b", pin="b"), waiter("free"))
    slots = Slots(b=1)
    assert placed(admission, slots) == ["b"]
    assert slots.asked == ["a0", "b", "free"]


def test_wishes_that_differ_only_in_what_orders_the_pools_are_asked_once() -> None:
    soft = [waiter(f"a{n}", pin="a", prefer=(f"p{n}",), avoid=(f"q{n}",)) for n in range(50)]
    strict = [waiter(f"s{n}", avoid=(f"q{n}",), allow_fallback=False) for n in range(3)]
    strict += [waiter(f"t{n}", prefer=(f"q{n}",), allow_fallback=False) for n in range(3)]
    others = [waiter("z", zone="z"), waiter("x", pin="a", exclude=frozenset({("a", "p0")}))]
    slots = Slots()
    assert placed(queue(*soft, *strict, *others), slots) == []
    assert slots.asked == ["a0", "s0", "s1", "s2", "t0", "t1", "t2", "z", "x"]


def test_of_very_many_different_wishes_some_are_asked_at_a_time_and_each_in_its_turn() -> None:
    admission = queue(*(waiter(f"{n}", pin=f"p{n}") for n in range(3 * rules.MAX_HOPELESS)), limit=1_000)
    for turn in (0, 1, 2, 0):
        slots = Slots()
        assert placed(admission, slots) == []
        assert slots.asked == [str(turn * rules.MAX_HOPELESS + n) for n in range(rules.MAX_HOPELESS)]
    slots = Slots(p95=1, p0=1)
    assert placed(admission, slots) == []
    assert placed(admission, slots) == ["95"]
    assert placed(admission, slots) == ["0"]


def test_one_that_takes_any_slot_waits_for_no_turn_behind_very_many_different_wishes() -> None:
    admission = queue(*(waiter(f"{n}", pin=f"p{n}") for n in range(100)), waiter("free"), limit=1_000)
    slots = Slots(m=1)
    assert placed(admission, slots) == ["free"]
    assert len(slots.asked) == rules.MAX_HOPELESS + 1


def test_each_has_its_turn_again_though_new_wishes_never_stop_coming() -> None:
    admission = queue(*(waiter(f"z{n}", owner="zed", pin=f"z{n}") for n in range(100)), limit=1_000)
    for turn in range(10):
        for n in range(31):  # one fewer than are asked at a time, all before zed's; those of the turn before have gone
            admission.remove(f"{turn - 1}-{n}", 0.0)
            admission.enqueue(waiter(f"{turn}-{n}", owner=f"{turn}-{n}", pin=f"{turn}-{n}"), 0.0, SLOTS)
        slots = Slots(z0=1 if turn else 0)
        got = placed(admission, slots)
        assert turn or "z0" in slots.asked  # in vain
        if got:
            break
    assert got == ["z0"]


def test_nobody_is_asked_after_an_unconstrained_waiter_found_no_slot() -> None:
    admission = queue(waiter("1"), waiter("2", pin="a"), waiter("3"))
    slots = Slots(a=1)
    assert placed(admission, slots) == []
    assert slots.asked == ["1"]


def test_a_soft_preference_constrains_nothing_and_a_strict_one_does() -> None:
    assert not Wish("m", prefer=("a",), avoid=("b",)).constrained
    for strict in (Wish("m", prefer=("a",), allow_fallback=False), Wish("m", avoid=("a",), allow_fallback=False)):
        assert strict.constrained
    assert not Wish("m", allow_fallback=False).constrained


def test_a_task_that_comes_back_goes_before_all_that_never_left_by_when_it_was_first_admitted() -> None:
    admission = queue(
        waiter("1"),
        waiter("2"),
        waiter("late", at=9.0, front=True),
        waiter("early", at=3.0, front=True, priority=BATCH),
    )
    assert [admission.position(name, 10.0) for name in ("early", "late", "1", "2")] == [1, 2, 3, 4]
    assert placed(admission, Slots(m=4)) == ["early", "late", "1", "2"]


def test_interactive_tasks_go_before_batch_tasks() -> None:
    admission = queue(
        waiter("b1", priority=BATCH), waiter("b2", priority=BATCH), waiter("i1", at=5.0), waiter("i2", at=6.0)
    )
    assert admission.order("m", 7.0) == ["i1", "i2", "b1", "b2"]
    assert admission.depths() == {("m", "batch"): 2, ("m", "interactive"): 2}
    assert placed(admission, Slots(m=3), 7.0) == ["i1", "i2", "b1"]


def test_a_batch_task_that_has_waited_long_counts_as_interactive_from_then_on() -> None:
    admission = queue(
        waiter("b1", priority=BATCH, at=0.0), waiter("b2", priority=BATCH, at=30.0),
        waiter("before", at=BATCH_AGES_S - 1), waiter("after", at=BATCH_AGES_S + 1),
    )  # fmt: skip
    assert admission.order("m", BATCH_AGES_S - 0.1) == ["before", "after", "b1", "b2"]
    assert admission.order("m", BATCH_AGES_S + 1) == ["before", "b1", "after", "b2"]


def test_batch_is_served_even_while_interactive_tasks_never_stop_coming() -> None:
    interactive = [Arrival(at=0.5 * number, owner="ann") for number in range(600)]  # twice what one slot can do
    batch = [Arrival(at=1.0, owner="ann", priority=BATCH), Arrival(at=2.0, owner="bob", priority=BATCH)]
    waits = Simulation(slots=1, limit=2_000).run([*interactive, *batch]).waits
    assert BATCH_AGES_S <= waits["bob"][0] <= BATCH_AGES_S + 2.0  # its principal has been given nothing yet
    assert max(waits["ann"][:3]) <= 2 * BATCH_AGES_S  # the first three, of which one is the batch task


# ---------------------------------------------------------------- bounds


def test_four_may_wait_for_each_slot_and_sixty_four_at_least() -> None:
    assert fill(Admission(), 1_000, slots=1) == 64
    assert fill(Admission(), 1_000, slots=0) == 64
    assert fill(Admission(), 1_000, slots=50) == 200
    assert fill(Admission(limit=10), 1_000, slots=50) == 10
    assert fill(Admission(limit=0), 1) == 0


def test_the_bound_is_one_for_each_model() -> None:
    admission = queue(waiter("1"), limit=1)
    admission.enqueue(waiter("2", "other"), 0.0, SLOTS)
    assert refused(admission, waiter("3")).code is Code.QUEUE_FULL


def test_a_full_queue_refuses_with_a_time_to_retry_but_takes_back_those_it_had_admitted() -> None:
    admission = queue(waiter("1"), waiter("2"), limit=2)
    error = refused(admission, waiter("3"), 5.0)
    assert error.code is Code.QUEUE_FULL
    assert error.retry_after_ms is not None
    assert MIN_RETRY_AFTER_MS <= error.retry_after_ms <= MAX_RETRY_AFTER_MS
    admission.enqueue(waiter("back", front=True), 5.0, SLOTS)
    assert len(admission) == 3


def test_tasks_that_came_back_do_not_count_against_the_bounds() -> None:
    admission = queue(waiter("back", front=True, size=100), limit=1, body_limit=100)
    admission.enqueue(waiter("1", size=100), 0.0, SLOTS)
    refused(admission, waiter("2"))
    admission.remove("back", 0.0)
    refused(admission, waiter("2"))
    admission.remove("1", 0.0)
    admission.enqueue(waiter("2"), 0.0, SLOTS)


def test_one_that_waits_beside_another_may_fill_a_quarter() -> None:
    admission = queue(waiter("b", owner="bob"))
    assert fill(admission, 100, "ann") == 25
    assert "25 of your tasks" in refused(admission, waiter("x")).message
    assert fill(admission, 100, "bob") == 24
    assert fill(admission, 100, "eve") == 25
    assert fill(admission, 100, "joe") == 25
    assert fill(admission, 100, "sue") == 0
    assert len(admission) == 100
    for task_id in admission.order("m", 0.0):
        if not task_id.startswith("ann"):
            admission.remove(task_id, 0.0)
    assert fill(admission, 100, "ann") == 50  # alone again, while others may come back


def test_a_quarter_is_one_task_at_least() -> None:
    admission = queue(waiter("b", owner="bob"), limit=2)
    assert fill(admission, 9, "ann") == 1


def test_one_alone_leaves_room_once_another_was_seen_in_the_last_ten_minutes() -> None:
    assert fill(queue(), 200, "ann", now=1_000.0) == 100
    for since, room in ((100.0, 75), (599.0, 75), (601.0, 100)):
        admission = queue()
        admission.given(waiter("b", owner="bob"), 0.0)  # it had a slot without waiting
        assert fill(admission, 200, "ann", now=since) == room
        assert fill(admission, 200, "bob", now=since) == min(25, 100 - room)


def test_a_newcomer_that_found_no_room_has_room_kept_for_it_from_then_on() -> None:
    admission = queue()
    assert fill(admission, 200, "ann") == 100
    refused(admission, waiter("b", owner="bob"))
    placed(admission, Slots(m=40))
    assert fill(admission, 200, "ann") == 15
    assert fill(admission, 200, "bob") == 25


def test_nobody_who_was_admitted_is_put_out_by_a_bound_that_shrinks() -> None:
    admission = queue(limit=None)
    assert fill(admission, 200, slots=50) == 200
    refused(admission, waiter("b", owner="bob"), slots=1)
    assert len(admission) == 200


def test_the_bodies_of_all_that_wait_are_bounded_together() -> None:
    admission = queue(waiter("1", size=60), waiter("2", "other", size=30), body_limit=100)
    error = refused(admission, waiter("3", size=11))
    assert (error.code, error.retry_after_ms is not None) == (Code.QUEUE_FULL, True)
    admission.enqueue(waiter("4", size=10), 0.0, SLOTS)
    admission.remove("1", 0.0)
    admission.enqueue(waiter("5", size=60), 0.0, SLOTS)
    placed(admission, Slots(m=9, other=9))
    admission.enqueue(waiter("6", size=100), 0.0, SLOTS)


def test_of_the_bytes_too_one_that_waits_beside_another_has_a_quarter_over_all_models() -> None:
    admission = queue(
        waiter("1", size=15), waiter("2", "other", size=10), waiter("b", owner="bob", size=1), body_limit=100
    )
    error = refused(admission, waiter("3", "third", size=1))
    assert error.code is Code.QUEUE_FULL and error.retry_after_ms is not None
    assert "more than 25 bytes, the most that may be while others wait too" in error.message
    admission.enqueue(waiter("none", size=0), 0.0, SLOTS)
    admission.enqueue(waiter("large", owner="eve", size=70), 0.0, SLOTS)  # one body is let in, whatever its share is
    refused(admission, waiter("larger", owner="eve", size=1))
    admission.remove("1", 0.0)
    admission.enqueue(waiter("3", size=15), 0.0, SLOTS)


def test_one_alone_leaves_a_quarter_of_the_bytes_once_another_was_seen_for_any_model() -> None:
    for since, room in ((599.0, 75), (601.0, 100)):
        admission = queue(body_limit=100)
        admission.given(waiter("b", "other", owner="bob"), 0.0)
        admission.enqueue(waiter("1", at=since, size=70), since, SLOTS)
        admission.enqueue(waiter("2", at=since, size=room - 70), since, SLOTS)
        assert "bytes" in refused(admission, waiter("3", at=since, size=1), since).message
        if room == 75:
            admission.enqueue(waiter("b", owner="bob", at=since, size=25), since, SLOTS)


def test_a_model_that_a_node_has_is_waited_for_beside_any_number_of_made_up_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rules, "MAX_LINES", 3)
    admission = queue(*(waiter(name, name) for name in "abc"))
    assert refused(admission, waiter("d", "d")).code is Code.QUEUE_FULL
    admission.enqueue(waiter("d", "d"), 0.0, SLOTS, known=True)
    assert admission.depth("d") == 1


def test_lines_for_models_that_nobody_has_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_LINES", 3)
    admission = queue(*(waiter(name, name) for name in "abc"))
    assert refused(admission, waiter("d", "d")).code is Code.QUEUE_FULL
    admission.enqueue(waiter("a2", "a"), 0.0, SLOTS)
    admission.remove("b", 0.0)
    admission.enqueue(waiter("d", "d"), 0.0, SLOTS)
    assert {model for model, _ in admission.depths()} == {"a", "c", "d"}
    assert len(admission._lines) == 3


def test_a_task_waits_at_most_once() -> None:
    admission = queue(waiter("1"))
    for again in (waiter("1", "other"), waiter("1", front=True)):
        with pytest.raises(LlorchError) as caught:
            admission.enqueue(again, 0.0, SLOTS)
        assert caught.value.code is Code.CONFLICT
    assert len(admission) == admission.depth("m") == 1


def test_a_removed_task_is_never_placed_and_those_behind_it_move_up() -> None:
    admission = queue(waiter("1"), waiter("2"), waiter("0", front=True))
    assert admission.remove("1", 0.0) is not None
    assert admission.remove("1", 0.0) is None
    assert admission.remove("0", 0.0) is not None
    assert admission.position("1", 1.0) is None
    assert admission.position("2", 1.0) == 1
    assert placed(admission, Slots(m=3)) == ["2"]


# ---------------------------------------------------------------- how long it will take


def moving(gap_s: float, departures: int, waiting: int) -> tuple[Admission, float]:
    """A line from which one has gone every `gap_s`; (it, now)."""
    admission = queue(*(waiter(str(n)) for n in range(departures + waiting)), limit=1_000)
    for number in range(1, departures + 1):
        assert placed(admission, Slots(m=1), gap_s * number)
    return admission, gap_s * departures


def test_the_guess_of_the_remaining_wait_follows_how_fast_the_line_moved() -> None:
    admission, now = moving(2.0, departures=2, waiting=2)
    assert admission.eta_ms("2", now + 2.0) == 2_000
    assert admission.eta_ms("3", now + 2.0) == 4_000
    assert admission.eta_ms("gone", now) is None


def test_a_line_that_stands_is_guessed_to_be_slower_and_slower() -> None:
    admission, now = moving(1.0, departures=9, waiting=1)
    guesses = [admission.eta_ms("9", now + later) or 0 for later in (1, 10, 100, 1_000_000)]
    assert guesses == sorted(set(guesses))
    assert guesses[0] == 1_000
    assert guesses[-1] == 3_600_000


def test_time_in_which_nobody_waits_says_nothing_of_the_pace() -> None:
    admission, now = moving(1.0, departures=9, waiting=0)
    admission.enqueue(waiter("next"), now + 500, SLOTS)
    assert admission.eta_ms("next", now + 501) == 1_000
    admission.remove("next", now + 501)
    admission.enqueue(waiter("later"), now + 2_000, SLOTS)  # so late that the old pace is forgotten
    assert admission.eta_ms("later", now + 2_007) is None


def test_the_guess_follows_a_line_that_has_become_faster() -> None:
    admission, now = moving(60.0, departures=20, waiting=200)
    slow = admission.eta_ms("20", now)
    assert slow is not None and slow > 40_000
    for number in range(1, 101):
        placed(admission, Slots(m=1), now + number)
    fast = admission.eta_ms("120", now + 100)
    assert fast is not None and fast < 2_000


def test_the_time_to_retry_grows_with_how_slowly_the_queue_moves() -> None:
    def after(now: float) -> int | None:
        return refused(queue(*(waiter(str(n)) for n in range(20)), limit=20), waiter("more"), now).retry_after_ms

    assert after(0.1) == MIN_RETRY_AFTER_MS
    assert after(5.0) == 10_000
    assert after(600.0) == MAX_RETRY_AFTER_MS


def test_a_deadline_that_can_not_be_met_is_refused_with_both_times() -> None:
    admission, now = moving(2.0, departures=9, waiting=10)
    error = refused(admission, waiter("late", at=now, deadline=now + 15.0), now)
    assert error.code is Code.DEADLINE_EXCEEDED
    assert error.details == {"eta_ms": 19_800, "deadline_ms": 15_000}
    assert "in 19.8 s (place 11 in line)" in error.message and "in 15.0 s" in error.message
    admission.enqueue(waiter("in time", at=now, deadline=now + 20.0), now, SLOTS)
    admission.enqueue(waiter("back", at=now, deadline=now + 0.1, front=True), now, SLOTS)
    assert admission.depth("m") == 12


def test_a_deadline_is_measured_at_the_place_that_its_task_would_have() -> None:
    admission, now = moving(2.0, departures=9, waiting=10)
    admission.enqueue(waiter("first of its principal", at=now, owner="bob", deadline=now + 5.0), now, SLOTS)
    error = refused(admission, waiter("batch", at=now, owner="bob", deadline=now + 5.0, priority=BATCH), now)
    assert error.code is Code.DEADLINE_EXCEEDED


def test_a_few_departures_say_too_little_to_refuse_a_deadline_for() -> None:
    admission, now = moving(2.0, departures=4, waiting=10)
    admission.enqueue(waiter("perhaps", at=now, deadline=now + 1.0), now, SLOTS)
    assert "perhaps" in admission


def test_the_first_in_line_is_not_refused_for_a_pace_that_nobody_can_see_change() -> None:
    admission, now = moving(60.0, departures=9, waiting=0)
    admission.enqueue(waiter("first", at=now, deadline=now + 1.0), now, SLOTS)
    refused(admission, waiter("second", at=now, deadline=now + 1.0), now)


def test_places_of_a_long_line_are_counted_at_most_twice_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    admission = queue(*(waiter(str(n)) for n in range(500)), limit=1_000)
    line = admission._lines["m"]
    order = line.order

    def counting(now: float) -> list[Waiter]:
        nonlocal counted
        counted += 1
        return order(now)

    monkeypatch.setattr(type(line), "order", lambda _, now: counting(now))
    for tick in range(10):  # 0.1 s each
        now = 100.0 + tick / 10
        for number in range(500):
            assert admission.position(str(number), now) == number + 1
        admission.enqueue(waiter(f"new{tick}"), now, SLOTS)
        assert (admission.position(f"new{tick}", now) or 0) >= 500
    assert counted <= 2


def test_places_of_a_short_line_are_always_those_of_now() -> None:
    admission = queue(waiter("1"), waiter("2"), waiter("3"))
    assert admission.position("3", 1.0) == 3
    admission.remove("1", 1.0)
    assert admission.position("3", 1.01) == 2
    admission.enqueue(waiter("0", front=True), 1.02, SLOTS)
    assert [admission.position(name, 1.03) for name in ("0", "2", "3")] == [1, 2, 3]


# ---------------------------------------------------------------- charges


def test_a_task_is_charged_once_however_often_it_comes_back() -> None:
    admission = queue(waiter("1"), limit=10)
    assert placed(admission, Slots(m=1)) == ["1"]
    before = admission._lines["m"].shares.counter("ann")
    admission.enqueue(replace(waiter("1"), front=True), 1.0, SLOTS)
    assert placed(admission, Slots(m=1)) == ["1"]
    assert admission._lines["m"].shares.counter("ann") == before > 0
    admission.settle("1", None, ran=False)
    admission.settle("1", None, ran=False)
    assert admission._lines["m"].shares.counter("ann") == 0
    assert not admission._charges


def test_a_task_that_goes_on_without_its_client_is_charged_what_it_cost_when_that_is_told() -> None:
    admission = queue()
    shares = admission._line("m").shares
    for task_id in "12":
        admission.given(waiter(task_id), 0.0)
    estimate = shares.counter("ann") / 2
    admission.leave("1", 2)
    admission.settle("1", None, ran=False)  # that was all there is to say here
    admission.ended_elsewhere("1", 1, Tail(length=0, tokens_out=10_000))
    admission.ended_elsewhere("2", 1, Tail(length=0, tokens_out=10_000))
    assert shares.counter("ann") == 2 * estimate
    for _ in range(2):
        admission.ended_elsewhere("1", 2, Tail(length=0, tokens_out=10_000))
    assert shares.counter("ann") == estimate + 20_000


def test_so_many_that_were_left_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_LEFT", 2)
    admission = queue()
    for task_id in "123":
        admission.given(waiter(task_id), 0.0)
        admission.leave(task_id, 1)
    assert [task_id for task_id, _ in admission._left] == ["2", "3"]


# ---------------------------------------------------------------- what pools mean for a line


def test_slots_are_those_of_the_pools_that_serve_the_model_now() -> None:
    pools = [
        PoolFacts("a", "p0", "m", slots_total=4),
        PoolFacts("a", "p1", "m", slots_total=2, slots_free=0),
        PoolFacts("b", "p0", "n", frozenset({"m"}), slots_total=8),
        PoolFacts("c", "p0", "m", ready=False, slots_total=16),
        PoolFacts("d", "p0", "m", online=False, slots_total=32),
    ]
    assert serving_slots("m", pools) == 6


@pytest.mark.parametrize(
    ("pools", "loading"),
    [
        ([PoolFacts("a", "p0", "m", ready=False, state="loading")], True),
        ([PoolFacts("a", "p0", None, frozenset({"m"}), ready=False, state="starting")], True),
        ([PoolFacts("a", "p0", "m"), PoolFacts("b", "p0", "m", ready=False, state="loading")], False),
        ([PoolFacts("a", "p0", "n", frozenset({"m"}), ready=True, state="ready")], False),
        ([PoolFacts("a", "p0", "m", ready=False, state="loading", online=False)], False),
        ([PoolFacts("a", "p0", "m", ready=False, state="failed")], False),
        ([], False),
    ],
)
def test_a_model_is_being_loaded_while_no_pool_is_ready_and_one_is_on_its_way(
    pools: list[PoolFacts], loading: bool
) -> None:
    assert being_loaded("m", pools) is loading
