"""Which tasks may be tried again, and when it is their turn."""

from __future__ import annotations

from llorch.control.retries import MOST_HELD, Retries
from llorch.control.tasks import Task


def a_task(task_id: str = "t") -> Task:
    return Task.read_again(task_id, owner="o", request_id="r", now=0.0)


def test_three_tries_and_three_lost_nodes_are_enough() -> None:
    retries, task = Retries(lambda: 1), a_task()
    assert [retries.failed(task) for _ in range(3)] == [None, None, "it has been tried often enough"]
    assert [retries.lost(task) for _ in range(3)] == [None, None, "it has lost its node often enough"]


def test_only_those_that_were_placed_count_and_the_next_has_its_turn_when_one_is_over() -> None:
    retries, tasks = Retries(lambda: 4), [a_task(f"t{number}") for number in range(5)]
    assert all(retries.failed(task) is None for task in tasks[:4])
    assert all(retries.may_go(task) for task in tasks)
    for task in tasks[:3]:
        retries.goes(task)
    assert [retries.may_go(task) for task in tasks] == [True, True, True, False, True]  # the last has not failed
    assert [retries.holds(task) for task in tasks] == [False, False, False, True, False]
    assert not retries.over(tasks[4])
    assert not retries.may_go(tasks[3])
    assert retries.over(tasks[0])
    assert retries.may_go(tasks[3])


def test_one_that_fails_again_has_its_next_turn_like_the_others() -> None:
    retries, tasks = Retries(lambda: 4), [a_task(f"t{number}") for number in range(4)]
    for task in tasks:
        retries.failed(task)
    for task in tasks[:3]:
        retries.goes(task)
    retries.failed(tasks[0])
    assert retries.may_go(tasks[3])
    retries.goes(tasks[3])
    assert not retries.may_go(tasks[0])


def test_no_more_wait_than_may() -> None:
    retries, tasks = Retries(lambda: 1), [a_task(f"t{number}") for number in range(MOST_HELD + 2)]
    assert all(retries.failed(task) is None for task in tasks[:MOST_HELD])
    assert retries.failed(tasks[-1]) == "too many wait to be tried again already"
    retries.goes(tasks[0])
    assert retries.failed(tasks[-2]) is None
