from __future__ import annotations

import pytest

from llorch.control.admission import MAX_RETRY_AFTER_MS, MIN_RETRY_AFTER_MS, Admission, Waiter
from llorch.control.placement import Wish
from llorch.errors import Code, LlorchError


def waiter(task_id: str, model: str = "m", at: float = 0.0, expires: float = 100.0, **wish: object) -> Waiter:
    return Waiter(task_id, Wish(model, **wish), at, expires)  # type: ignore[arg-type]


def queue(*waiters: Waiter, limit: int = 100) -> Admission:
    admission = Admission(limit)
    for each in waiters:
        admission.enqueue(each, each.enqueued_at)
    return admission


class Slots:
    """Places as many tasks of each model (or each pin) as it has slots, and records who was asked."""

    def __init__(self, **free: int) -> None:
        self.free = free
        self.asked: list[str] = []

    def __call__(self, waiter: Waiter) -> str | None:
        self.asked.append(waiter.task_id)
        for name in (waiter.wish.pin,) if waiter.wish.pin else (waiter.wish.model,):
            if self.free.get(name, 0) > 0:
                self.free[name] -= 1
                return f"slot of {name}"
        return None


def placed(admission: Admission, slots: Slots) -> list[str]:
    return [waiter.task_id for waiter, _ in admission.match(slots)]


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


def test_a_waiter_whose_own_wish_cannot_be_met_is_passed_by_those_behind_it() -> None:
    admission = queue(waiter("1", pin="a"), waiter("2"), waiter("3"))
    assert placed(admission, Slots(m=2)) == ["2", "3"]
    assert placed(admission, Slots(a=1)) == ["1"]


def test_when_nothing_is_free_one_waiter_per_model_is_asked() -> None:
    admission = queue(*(waiter(str(n)) for n in range(50)), *(waiter(f"o{n}", "other") for n in range(50)))
    slots = Slots()
    assert placed(admission, slots) == []
    assert slots.asked == ["0", "o0"]


def test_the_same_unmet_wish_is_asked_once() -> None:
    admission = queue(*(waiter(f"a{n}", pin="a") for n in range(50)), waiter("b", pin="b"), waiter("free"))
    slots = Slots(b=1)
    assert placed(admission, slots) == ["b"]
    assert slots.asked == ["a0", "b", "free"]


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


def test_a_task_that_comes_back_goes_before_all_that_never_left() -> None:
    admission = queue(waiter("1"), waiter("2"))
    admission.requeue_front(waiter("late", at=9.0))
    admission.requeue_front(waiter("early", at=3.0))
    assert [admission.position(name) for name in ("early", "late", "1", "2")] == [1, 2, 3, 4]
    assert placed(admission, Slots(m=4)) == ["early", "late", "1", "2"]


def test_a_full_queue_refuses_with_a_time_to_retry_but_takes_back_those_it_had_admitted() -> None:
    admission = queue(waiter("1"), waiter("2"), limit=2)
    with pytest.raises(LlorchError) as caught:
        admission.enqueue(waiter("3"), 5.0)
    assert caught.value.code is Code.QUEUE_FULL
    assert caught.value.retry_after_ms is not None
    assert MIN_RETRY_AFTER_MS <= caught.value.retry_after_ms <= MAX_RETRY_AFTER_MS
    admission.requeue_front(waiter("back"))
    assert len(admission) == 3
    assert "3" not in admission


def test_tasks_that_came_back_do_not_count_against_the_bound() -> None:
    admission = Admission(1)
    admission.requeue_front(waiter("back"))
    admission.enqueue(waiter("1"), 0.0)
    with pytest.raises(LlorchError):
        admission.enqueue(waiter("2"), 0.0)
    admission.remove("back")
    with pytest.raises(LlorchError):
        admission.enqueue(waiter("2"), 0.0)
    admission.remove("1")
    admission.enqueue(waiter("2"), 0.0)


def test_a_task_waits_at_most_once() -> None:
    admission = queue(waiter("1"))
    for again in (lambda: admission.enqueue(waiter("1", "other"), 0.0), lambda: admission.requeue_front(waiter("1"))):
        with pytest.raises(LlorchError) as caught:
            again()
        assert caught.value.code is Code.CONFLICT
    assert len(admission) == admission.depth("m") == 1


def test_a_removed_task_is_never_placed_and_those_behind_it_move_up() -> None:
    admission = queue(waiter("1"), waiter("2"))
    admission.requeue_front(waiter("0"))
    assert admission.remove("1") is not None
    assert admission.remove("1") is None
    assert admission.remove("0") is not None
    assert admission.position("1") is None
    assert admission.position("2") == 1
    assert placed(admission, Slots(m=3)) == ["2"]


def test_the_guess_of_the_remaining_wait_follows_how_fast_the_line_moved() -> None:
    admission = queue(*(waiter(str(n), at=0.0) for n in range(4)))
    assert placed(admission, Slots(m=2)) == ["0", "1"]
    # "2" came as the third; in 6 s two have left: one each 2 s.
    assert admission.eta_ms("2", 6.0) == 2000
    assert admission.eta_ms("3", 6.0) == 4000
    assert admission.eta_ms("gone", 6.0) is None


def test_the_time_to_retry_grows_with_how_slowly_the_queue_moves() -> None:
    def after(now: float) -> int | None:
        admission = queue(*(waiter(str(n)) for n in range(20)), limit=20)
        with pytest.raises(LlorchError) as caught:
            admission.enqueue(waiter("more"), now)
        return caught.value.retry_after_ms

    assert after(0.1) == MIN_RETRY_AFTER_MS
    assert after(5.0) == 10_000
    assert after(600.0) == MAX_RETRY_AFTER_MS
