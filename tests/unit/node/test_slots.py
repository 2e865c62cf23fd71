"""Replicas that get no task because tasks fail there: for how long, how they come back, and that some always stay."""

from __future__ import annotations

from typing import Any

import pytest

from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from llorch.node.pools import Pools


def offer(pools: Pools, replica_id: str, *, slots: int = 8, port: int = 7000, now: float = 0.0) -> None:
    """An engine that was handed over and has answered its probe."""
    handoff = Handoff(
        pool_id="p", replica_id=replica_id, engine="vllm", url=f"http://127.0.0.1:{port}", model="m", slots=slots
    )
    (probe,) = (each for each in pools.handle(ev.HandoffSeen(handoff), now) if isinstance(each, ev.Probe))
    pools.handle(ev.ProbeOk("p", replica_id, probe.probe), now)


class Tasks:
    def __init__(self, *replicas: str) -> None:
        self.pools = Pools()
        for replica in replicas:
            offer(self.pools, replica)
        self.count = 0

    def begin(self) -> tuple[str, str, bool]:
        """(task, its replica, whether it is a trial)"""
        self.count += 1
        lease = self.pools.acquire("p", f"t{self.count}")
        return f"t{self.count}", lease.replica_id, lease.trial

    def on(self, replica: str) -> list[str]:
        """Tasks on every free slot; those that are not on `replica` end, and say nothing."""
        begun = []
        while self.pools.pool_report("p")["slots_free"]:
            begun.append(self.begin())
        for task, where, _ in begun:
            if where != replica:
                self.pools.release(task)
        return [task for task, where, _ in begun if where == replica]

    def end(self, task: str, failed: bool | None = None, now: float = 0.0) -> None:
        if failed is not None:
            self.pools.told(task, failed, now)
        self.pools.release(task)

    def fail(self, replica: str, now: float = 0.0) -> None:
        for task in self.on(replica):
            self.end(task, True, now)

    def tick(self, now: float) -> list[tuple[str, str | None]]:
        return [(a.event, a.replica_id) for a in self.pools.handle(ev.Tick(), now) if isinstance(a, ev.Note)]

    def shown(self, replica: str) -> tuple[str, int]:
        report: dict[str, Any] = self.pools.pool_report("p")
        found = next(each for each in report["replicas"] if each["id"] == replica)
        return found["breaker"], found["slots_free"]


def test_a_replica_where_tasks_fail_is_passed_over_and_its_slots_are_not_told_as_free() -> None:
    tasks = Tasks("a", "b")
    tasks.fail("a")
    assert tasks.shown("a") == ("ejected", 0)
    assert tasks.pools.pool_report("p")["slots_free"] == 8
    assert tasks.pools.pool_report("p")["ready"]
    assert tasks.tick(0.1) == [("replica.ejected", "a")]
    assert {tasks.begin()[1] for _ in range(8)} == {"b"}
    with pytest.raises(LlorchError) as refused:
        tasks.begin()
    assert refused.value.code is Code.ALL_SLOTS_BUSY


def test_it_comes_back_by_one_task_that_succeeds() -> None:
    tasks = Tasks("a", "b")
    tasks.fail("a")
    tasks.tick(14.9)
    assert tasks.shown("a") == ("ejected", 0)
    told: list[str] = []
    tasks.pools.subscribe(told.append)
    tasks.tick(15.0)
    assert (tasks.shown("a"), told) == (("half_open", 1), ["p"])
    trial = tasks.begin()
    assert trial[1:] == ("a", True)
    assert tasks.shown("a") == ("half_open", 0)
    assert tasks.begin()[1:] == ("b", False)
    tasks.end(trial[0], failed=False, now=16.0)
    assert tasks.shown("a") == ("closed", 8)
    assert tasks.tick(16.0) == [("replica.readmitted", "a")]


def test_a_trial_that_fails_ejects_for_longer_and_one_that_tells_nothing_leaves_its_place() -> None:
    tasks = Tasks("a", "b")
    tasks.fail("a")
    tasks.tick(15.0)
    tasks.end(tasks.begin()[0])
    assert tasks.shown("a") == ("half_open", 1)
    trial = tasks.begin()
    assert trial[1:] == ("a", True)
    tasks.end(trial[0], failed=True, now=20.0)
    tasks.tick(49.9)
    assert tasks.shown("a") == ("ejected", 0)
    tasks.tick(50.0)
    assert tasks.shown("a") == ("half_open", 1)


def test_a_trial_that_hangs_holds_up_the_next_one_for_thirty_seconds() -> None:
    tasks = Tasks("a", "b")
    tasks.fail("a")
    tasks.tick(15.0)
    assert tasks.begin()[1:] == ("a", True)
    tasks.tick(15.2)
    tasks.tick(45.1)
    assert tasks.shown("a") == ("half_open", 0)
    tasks.tick(45.2)
    assert tasks.shown("a") == ("half_open", 1)


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_at_most_half_of_the_ready_replicas_are_out_at_once(count: int, most: int) -> None:
    names = [f"r{number}" for number in range(count)]
    tasks = Tasks(*names)
    for name in names:
        tasks.fail(name)
        tasks.fail(name)
    assert sum(tasks.shown(name)[0] == "ejected" for name in names) == most


def test_the_last_replica_that_is_left_takes_tasks_again_at_once() -> None:
    tasks = Tasks("a", "b")
    tasks.fail("a")
    tasks.tick(1.0)
    tasks.pools.handle(ev.HandoffGone("p-b.json"), 2.0)
    assert tasks.tick(2.1) == [("replica.readmitted", "a")]
    assert tasks.shown("a") == ("closed", 8)


def test_an_engine_that_takes_the_place_of_another_begins_anew() -> None:
    tasks = Tasks("a", "b")
    tasks.fail("a")
    offer(tasks.pools, "a", port=7001)
    assert tasks.shown("a") == ("closed", 8)


def test_an_engine_is_not_blamed_for_the_tasks_of_the_one_before_it() -> None:
    tasks = Tasks("a", "b")
    old = tasks.on("a")
    offer(tasks.pools, "a", port=7001)
    for task in old:
        tasks.end(task, failed=True)
    assert (tasks.shown("a"), tasks.tick(0.1)) == (("closed", 8), [])


def test_an_engine_that_is_being_probed_again_is_not_judged() -> None:
    tasks = Tasks("a", "b", "c")
    begun = tasks.on("a")
    tasks.pools.handle(ev.EngineLost("p", "a", "nothing listens"), 0.0)
    for task in begun:
        tasks.end(task, failed=True)
    assert tasks.shown("a") == ("closed", 0)
    assert tasks.tick(0.1) == []
