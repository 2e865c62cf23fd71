"""What counts as a proven lie, and all the honest things that look like one and are none."""

from __future__ import annotations

import pytest

from llorch.control import lies
from llorch.control.lies import OVERFULL_S, REFUSALS, REFUSING_REPORTS, REFUSING_S, SlotWord
from llorch.control.placement import Wish
from llorch.control.strikes import Offence
from llorch.control.tasks import Task
from llorch.messages import PoolReport, TaskReport

TASK = "00000000-0000-4000-8000-000000000001"


def beats(word: SlotWord, count: int, *, free: int = 2, running: int = 0, step_s: float = 15.0) -> bool:
    """Full beats of a pool with two slots, each after five more refusals. True if any proved a lie."""
    proved = False
    for number in range(count):
        now = number * step_s
        for _ in range(5):
            word.refused(now)
        proved |= word.reported(free, 2, running, now, whole=True)
    return proved


# ---------------------------------------------------------------- refusing free slots


def test_a_node_that_refuses_again_and_again_what_all_its_reports_show_free_lies() -> None:
    assert beats(SlotWord(), 6)


def test_it_takes_many_refusals_a_long_time_and_several_reports() -> None:
    for refusals, lasting_s, reports, lies_proved in (
        (REFUSALS, REFUSING_S, REFUSING_REPORTS, True),
        (REFUSALS - 1, REFUSING_S, REFUSING_REPORTS, False),
        (REFUSALS, REFUSING_S - 1, REFUSING_REPORTS, False),
        (REFUSALS, REFUSING_S, REFUSING_REPORTS - 1, False),
    ):
        word = SlotWord()
        for _ in range(refusals):
            word.refused(0.0)
        said = [word.reported(1, 2, 0, lasting_s, whole=True) for _ in range(reports)]
        assert any(said) is lies_proved, (refusals, lasting_s, reports)


def test_another_control_that_is_always_faster_makes_nobody_a_liar() -> None:
    """Its tasks are in the reports, though a slot was free each time before."""
    assert not beats(SlotWord(), 100, free=1, running=1)


def test_one_report_that_shows_what_runs_or_no_slot_begins_the_count_anew() -> None:
    for free, running in ((0, 0), (1, 1)):
        word = SlotWord()
        assert not beats(word, 4)
        assert not word.reported(free, 2, running, 60.0, whole=False)
        assert not word.reported(2, 2, 0, 61.0, whole=True)


def test_a_node_that_takes_a_task_now_and_then_is_no_liar() -> None:
    word = SlotWord()
    for number in range(50):
        assert not beats(word, 3), number
        word.accepted()


def test_stale_reports_prove_nothing_however_often_it_refuses() -> None:
    word = SlotWord()
    for now in range(600):
        word.refused(float(now))
        assert not word.reported(2, 2, 0, float(now), whole=False)  # of changes, and none of this pool is among them


def test_a_lie_is_counted_once_for_each_time_that_it_is_proved() -> None:
    word = SlotWord()
    assert beats(word, 6)
    assert not word.reported(2, 2, 0, 1e6, whole=True)


# ---------------------------------------------------------------- more tasks than slots, more free ones than there are


def test_tasks_beyond_twice_the_slots_for_long_are_a_lie() -> None:
    word = SlotWord()
    assert not word.reported(0, 2, 5, 0.0, whole=True)
    assert not word.reported(0, 2, 5, OVERFULL_S - 1, whole=True)
    assert word.reported(0, 2, 5, OVERFULL_S, whole=True)


@pytest.mark.parametrize(
    "reports",
    [
        [(2, 2)] + [(0, 2)] * 9,  # its engine died, and its tasks have not ended yet
        [(2, 2)] + [(2, 4)] * 9,  # loaded anew, while what ran before still ends
        [(2, 5), (2, 2)] * 9,  # for a moment
        [(4, 8), (2, 8), (0, 8)] * 3,  # a replica of several went down
    ],
)
def test_a_pool_whose_engines_come_and_go_is_no_liar(reports: list[tuple[int, int]]) -> None:
    word = SlotWord()
    for number, (total, running) in enumerate(reports):
        assert not word.reported(0, total, running, number * 300.0, whole=True)


def test_more_free_slots_than_there_are_is_a_lie_in_one_report_and_not_in_a_part_of_one() -> None:
    def found(**fields: int) -> list[Offence]:
        return list(lies.impossible_slots([PoolReport(pool_id="p", **fields)]))  # type: ignore[arg-type]

    assert found(slots_total=2, slots_free=3) == [Offence.FALSE_SLOTS]
    for honest in ({"slots_total": 2, "slots_free": 2}, {"slots_free": 9}, {"slots_total": 0}, {}):
        assert found(**honest) == []
    assert list(lies.impossible_slots(None)) == []


# ---------------------------------------------------------------- tasks that it was never given


def task(*opened: tuple[int, str], named: bool = False) -> Task:
    made = Task(TASK, "alice", Wish("m"), "native", True, False, b"", "", {}, "r", 0.0)
    made.opened, made.named = opened, named
    return made


def found(known: Task | None, **fields: object) -> list[Offence]:
    report = TaskReport.model_validate({"task_id": TASK, "epoch": "mine", **fields})
    return list(lies.foreign_tasks("a", [report], "mine", lambda _: known))


def test_an_attempt_that_was_opened_elsewhere_is_a_lie_and_one_that_was_opened_nowhere() -> None:
    assert found(task((1, "b")), attempt=1) == [Offence.FOREIGN_TASK]
    assert found(task((1, "a"), (2, "b")), attempt=2) == [Offence.FOREIGN_TASK]
    assert found(task((1, "a")), attempt=7) == [Offence.FOREIGN_TASK]


def test_an_attempt_that_was_left_behind_in_a_partition_is_none() -> None:
    assert found(task((1, "a"), (2, "b"), (3, "a")), attempt=1) == []
    assert found(task((1, "a"), (2, "b"), (3, "a")), attempt=3) == []


def test_what_this_control_does_not_know_for_certain_proves_nothing() -> None:
    assert found(None, attempt=1) == []  # long forgotten
    assert found(task(), attempt=1) == []  # read from a node, not run from here
    assert found(task((1, "b"), named=True), attempt=1) == []  # its id may have come before
    assert found(task((1, "b")), attempt=1, epoch="another") == []  # another control's, or of before a restart
    assert found(task((1, "b")), attempt=1, epoch=None) == []  # over plain HTTP, where no epoch is sent
    assert found(task((1, "b")), attempt=1, gone=True) == []
    assert list(lies.foreign_tasks("a", None, "mine", lambda _: None)) == []
