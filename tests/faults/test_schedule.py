"""Schedules and tasks come from their seed alone, and leave out nothing."""

from __future__ import annotations

from collections import Counter
from random import Random

from tests.faults import schedule, tasks
from tests.faults.tasks import FORMS, USUAL


def test_a_seed_has_one_schedule_and_another_seed_another() -> None:
    assert schedule.draw(7, 50) == schedule.draw(7, 50)
    assert schedule.draw(7, 50) != schedule.draw(8, 50)


def test_every_kind_of_fault_and_every_phase_is_drawn() -> None:
    drawn = schedule.draw(1, 3_000)
    assert {step.kind for step in drawn} == {kind for kind, (weight, _) in schedule.KINDS.items() if weight}
    assert {step.phase for step in drawn} == set(schedule.PHASES)
    for step in drawn:
        shortest, longest = schedule.KINDS[step.kind][1]
        assert shortest <= step.for_s <= longest


def test_faults_may_come_in_turn() -> None:
    cut, kill = ("link.cut_off", 2.0, "placed"), ("control.kill", 0.5, "streaming")
    drawn = schedule.draw(1, 3, in_turn=(cut, kill))
    assert [(step.kind, step.after_s, step.phase) for step in drawn] == [cut, kill, cut]


def test_every_form_of_task_and_every_way_of_its_client_is_drawn() -> None:
    rng = Random(1)
    asks = [tasks.draw(rng, USUAL, f"k{i}", 3.0) for i in range(3_000)]
    forms = Counter(ask.form for ask in asks)
    assert set(forms) == set(FORMS)
    for name in ("cancel_after", "vanish_after", "leave_after", "stall_after", "mismatch_after", "key", "deadline_s"):
        assert sum(getattr(ask, name) is not None for ask in asks) >= 30, name
    assert {ask.script.partition("@")[0] for ask in asks if ask.script} == {"truncate", "garbage", "hang", "die"}


def test_a_body_says_what_was_drawn() -> None:
    ask = tasks.draw(Random(3), tasks.Mix({"native": 1}, script=1.0, stall=0), "k1", 3.0)
    body = ask.body()
    assert body["model"] == "odd"
    assert body["prompt"] == f"#k1!{ask.script} go"
    assert tasks.draw(Random(3), tasks.Mix({"v1": 1}, script=0, stall=0), "k1", 3.0).body()["stream"] is True
