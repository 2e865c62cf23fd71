"""What operators ask of pools: how each wish goes, how it ends, what is refused, and what it never does."""

from __future__ import annotations

import pytest

from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from tests.pool_world import World, external, of, on_demand, refused, spec, started

R0 = ("p", "r0")


def reload(world: World, ref: str = "m2", *, beside: bool, pool: str = "p") -> None:
    """The operator's wish, and the model is here at once."""
    world.do(ev.Reload(pool, ref.partition("#")[0], ref))
    world.room = beside
    if world.prepares:
        world.prepared()


def ends_with(world: World, state: str, pool: str = "p") -> str:
    """What the pool's operation says; it has ended as `state`, and that was told once."""
    operation = world.operation(pool)
    assert operation["state"] == state, operation
    told = [note.reason for note in world.notes if note.event == "pool.answered" and note.pool_id == pool]
    assert told and told[-1].startswith(operation["kind"])
    return operation.get("message") or ""


# ---------------------------------------------------------------- load and unload


def test_unload_waits_for_its_tasks_and_ends_when_nothing_runs() -> None:
    world = started(spec(replicas=2))
    task = world.task("p")
    assert task is not None
    world.do(ev.Unload("p", "then"))
    world.settle()
    assert world.operation("p") == {"kind": "unload", "state": "running", "model": "m", "started_at": "then"}
    assert len(world.processes) == 1
    assert world.task("p") is None
    world.ends(task)
    world.settle()
    ends_with(world, "done")
    assert not world.processes and world.report("p")["state"] == "stopped"
    world.do(ev.Unload("p"))
    ends_with(world, "done")


def test_load_ends_when_the_pool_is_ready_and_again_at_once() -> None:
    world = started(spec())
    world.do(ev.Unload("p"))
    world.settle()
    world.do(ev.Load("p"))
    assert world.operation("p")["state"] == "running" and world.report("p")["state"] == "starting"
    world.settle()
    ends_with(world, "done")
    run = world.processes[R0].run
    world.do(ev.Load("p"))
    ends_with(world, "done")
    world.settle()
    assert world.processes[R0].run == run


def test_a_load_that_comes_while_the_unload_waits_takes_its_place() -> None:
    world = started(spec())
    task = world.task("p")
    assert task is not None
    world.do(ev.Unload("p"))
    world.do(ev.Load("p"))
    assert any(note.reason == "unload: load came in its place" for note in world.notes)
    world.ends(task)
    world.settle()
    ends_with(world, "done")
    assert world.report("p")["ready"]


def test_a_load_tells_how_often_it_was_tried_and_fails_in_the_end() -> None:
    world = started(spec())
    world.broken.add("m")
    world.exits(R0)
    world.do(ev.Load("p"))
    world.settle(8)
    assert "it does not load; it is tried again in" in world.operation("p")["message"]
    world.settle(120)
    assert ends_with(world, "failed") == "it does not load"
    assert world.report("p")["state"] == "failed"
    world.settle(600)
    assert not world.processes
    world.broken.clear()
    world.do(ev.Load("p"))
    world.settle()
    ends_with(world, "done")


def test_a_hopeless_end_fails_at_once_and_is_not_tried_again() -> None:
    world = started(spec())
    world.do(ev.Restart("p"))
    world.exits(R0)
    world.exits(R0, "there is no such model", hopeless=True)
    assert ends_with(world, "failed") == "there is no such model"
    assert any(note.event == "pool.failed" for note in world.notes)
    world.settle(600)
    assert not world.processes and world.report("p")["state"] == "failed"


def test_a_load_of_a_model_that_is_not_the_pools_is_refused() -> None:
    assert refused(started(spec()), ev.Load("p", "other")).code is Code.INVALID_REQUEST


def test_progress_of_a_start_is_told_with_the_operation() -> None:
    world = started(spec())
    world.do(ev.Restart("p"))
    world.exits(R0)
    run = world.processes[R0].run
    world.do(ev.Progress("p", "r0", run, "x" * 9_999))
    assert world.operation("p")["message"] == "x" * 256
    world.do(ev.Progress("p", "r0", run - 1, "of an earlier run"))
    assert world.operation("p")["message"] == "x" * 256
    assert not world.do(ev.Progress("p", "r7", run, "of nobody"))


def test_a_load_whose_handoff_somebody_removes_ends_too() -> None:
    world = started(spec())
    world.do(ev.Unload("p"))
    world.settle()
    world.do(ev.Load("p"))
    world.comes_up(R0)
    world.scan()
    del world.files["p-r0.json"]
    world.settle()
    assert "was removed" in ends_with(world, "failed")
    assert not world.processes


# ---------------------------------------------------------------- restart


def test_a_restart_replaces_every_engine_and_ends_when_all_are_new() -> None:
    world = started(spec(replicas=2))
    runs = {key: process.run for key, process in world.processes.items()}
    task = world.task("p")
    world.do(ev.Restart("p"))
    world.settle()
    assert world.operation("p")["state"] == "running", "one of them still has a task"
    assert world.report("p")["ready"]
    assert task is not None
    world.do(ev.Restart("p"))
    world.ends(task)
    world.settle()
    ends_with(world, "done")
    assert all(process.run > runs[key] for key, process in world.processes.items())


def test_a_pool_that_restarts_is_starting_and_not_stopped() -> None:
    world = started(spec())
    world.do(ev.Restart("p"))
    assert world.report("p")["state"] == "starting"
    world.exits(R0)
    assert world.report("p")["state"] == "starting"
    world.exits(R0)
    assert world.report("p")["state"] == "starting", "it waits for its next try"


def test_a_restart_during_a_drain_waits_for_the_same_tasks() -> None:
    world = started(spec())
    task = world.task("p")
    world.do(ev.Drain("p", "", 10.0))
    world.do(ev.Restart("p"))
    world.settle(5)
    assert task in world.tasks
    world.settle(10)
    assert task is not None and world.ended[task].code is Code.DRAINING, "the drain's deadline holds all the same"
    world.settle()
    ends_with(world, "done")
    assert world.report("p")["draining"] and world.processes


def test_a_restart_of_failed_and_of_unloaded_pools_starts_them() -> None:
    world = started(spec())
    world.do(ev.Unload("p"))
    world.settle()
    world.do(ev.Restart("p"))
    world.settle()
    ends_with(world, "done")
    world.exits(R0, hopeless=True)
    world.do(ev.Restart("p"))
    world.settle()
    ends_with(world, "done")


# ---------------------------------------------------------------- reload, while its model is fetched


def test_nothing_changes_while_the_model_of_a_reload_is_fetched() -> None:
    world = started(spec())
    old, wishes = dict(world.processes), world.pools.wishes()
    [prepare] = of(world.do(ev.Reload("p", "m2", "m2", "then")), ev.Prepare)
    assert prepare == ev.Prepare("p", "m2", "m2")
    world.do(ev.Progress("p", None, 0, "3 of 9 GiB"))
    assert world.operation("p") == {
        "kind": "reload", "state": "running", "model": "m2", "message": "3 of 9 GiB", "started_at": "then",
    }  # fmt: skip
    world.time_passes(1_000.0)
    assert (world.processes, world.pools.wishes()) == (old, wishes) and world.task("p") is not None
    assert world.do(ev.Reload("p", "m2", "m2")) == []
    assert refused(world, ev.Reload("p", "m2", "m#2")).code is Code.CONFLICT
    world.prepared("no such model")
    assert ends_with(world, "failed") == "no such model; m goes on"
    assert world.processes == old


@pytest.mark.parametrize("wish", [ev.Unload, ev.Load, ev.Restart])
def test_another_wish_ends_a_reload_that_has_changed_nothing_yet(wish: type[ev.Unload | ev.Load | ev.Restart]) -> None:
    world = started(spec())
    world.do(ev.Reload("p", "m2", "m2"))
    world.do(wish("p"))
    assert any("came in its place" in note.reason for note in world.notes)
    world.prepared()
    world.settle()
    ends_with(world, "done")
    assert world.serves("p") == ([] if wish is ev.Unload else ["m"])


def test_what_was_fetched_for_an_earlier_reload_is_not_taken_for_that_of_a_later_one() -> None:
    world = started(spec())
    world.do(ev.Reload("p", "m", "m#2"))
    world.do(ev.Restart("p"))
    for _ in range(2):
        world.exits(R0) if world.processes[R0].told_to_end else world.comes_up(R0)
    world.scan()
    world.answers(R0)
    world.do(ev.Reload("p", "m", "m#3"))
    world.prepared()
    assert world.runs("p") == ["m"]
    world.prepared()
    world.settle()
    ends_with(world, "done")
    assert world.serves("p") == ["m#3"]
    assert world.do(ev.Prepared("p", "m", True)) == [] and world.do(ev.Prepared("nowhere", "m", True)) == []


def test_progress_is_of_a_reload_that_is_prepared_and_of_no_other_operation() -> None:
    world = started(spec())
    world.do(ev.Progress("p", None, 0, "of nothing"))
    world.do(ev.Restart("p"))
    world.do(ev.Progress("p", None, 0, "of nothing"))
    world.do(ev.Progress("nowhere", None, 0, "of nothing"))
    assert "message" not in world.operation("p")


def test_an_unloaded_pool_can_be_reloaded() -> None:
    world = started(spec())
    world.do(ev.Unload("p"))
    world.settle()
    world.do(ev.Reload("p", "m2", "m2"))
    world.time_passes(10.0)
    assert world.operation("p")["state"] == "running"
    world.settle()
    ends_with(world, "done")
    assert world.serves("p") == ["m2"]


def test_a_hold_ends_a_reload_whose_model_is_fetched() -> None:
    world = started(spec())
    world.do(ev.Reload("p", "m2", "m2"))
    world.do(ev.Hold("p", "owner", "a game"))
    ends_with(world, "failed")
    world.prepared()
    world.do(ev.Hold("p", "owner", None))
    world.settle()
    assert world.serves("p") == ["m"]


# ---------------------------------------------------------------- reload, beside


@pytest.mark.parametrize("ref", ["m2", "m#2"])
def test_a_reload_beside_serves_the_old_model_until_the_new_one_is_proven(ref: str) -> None:
    world = started(spec(replicas=2))
    old = dict(world.processes)
    task = world.task("p")
    assert task is not None
    reload(world, ref, beside=True)
    assert len(world.processes) == 4 and world.report("p")["model"] == "m"
    assert (world.report("p")["slots_total"], world.report("p")["slots_free"]) == (4, 3)
    for key in sorted(world.processes.keys() - old.keys()):
        world.comes_up(key)
    world.scan()
    other = world.task("p")
    assert other is not None and world.tasks[other].where in old, "nothing is given to what is not proven"
    world.answers(next(key for key in sorted(world.probes) if key not in old))
    report = world.report("p")
    assert report["model"] == ref.partition("#")[0] and report["ready"]
    third = world.task("p")
    assert third is not None and world.tasks[third].where not in old
    world.settle()
    assert {task, other} <= world.tasks.keys() and not world.tasks[task].told_to_end
    assert world.operation("p")["state"] == "running"
    for each in (task, other, third):
        world.ends(each)
    world.settle()
    ends_with(world, "done")
    assert world.runs("p") == [ref, ref] and not world.processes.keys() & old.keys()
    assert world.report("p")["models"] == [ref.partition("#")[0]]


@pytest.mark.parametrize("ref", ["m2", "m#2"])
def test_a_reload_beside_that_fails_leaves_the_old_engines_as_they_were(ref: str) -> None:
    world = started(spec(replicas=2))
    old = dict(world.processes)
    world.broken.add(ref)
    task = world.task("p")
    wishes = world.pools.wishes()
    reload(world, ref, beside=True)
    world.settle()
    assert "it does not load; m" in ends_with(world, "failed")
    report = world.report("p")
    assert world.processes == old and report["ready"] and report["last_error"] is None
    assert (report["models"], world.pools.ref_of("p", "m")) == (["m"], "m")
    assert task is not None and not world.tasks[task].told_to_end and world.pools.wishes() == wishes
    assert any(note.event == "pool.not_reloaded" for note in world.notes)
    world.exits(R0)
    world.settle()
    assert world.serves("p") == ["m", "m"]


@pytest.mark.parametrize("ref", ["m2", "m#2"])
def test_an_old_engine_that_ends_during_a_reload_beside_is_started_with_the_old_model(ref: str) -> None:
    world = started(spec())
    reload(world, ref, beside=True)
    world.exits(R0)
    assert world.operation("p")["state"] == "running", "that is no word on the new one"
    world.time_passes(2.0)
    assert world.runs("p") == sorted(["m", ref])
    world.settle()
    ends_with(world, "done")
    assert world.runs("p") == [ref]


def test_the_file_of_a_next_one_removed_by_somebody_ends_the_reload() -> None:
    world = started(spec())
    reload(world, beside=True)
    world.comes_up(("p", "r1"))
    world.scan()
    del world.files["p-r1.json"]
    world.settle()
    assert "removed" in ends_with(world, "failed")
    assert world.runs("p") == ["m"] and world.report("p")["ready"]


def test_models_may_be_reloaded_again_and_again() -> None:
    world = started(spec())
    for ref in ("m2", "m#2", "m", "m3"):
        reload(world, ref, beside=True)
        world.settle()
        ends_with(world, "done")
        assert world.serves("p") == [ref]
    assert len(world.report("p")["replicas"]) == 1


def test_a_reload_to_what_is_served_already_is_done_at_once() -> None:
    world = started(spec())
    old = dict(world.processes)
    reload(world, "m", beside=True)
    assert "already" in ends_with(world, "done")
    world.settle()
    assert world.processes == old


# ---------------------------------------------------------------- reload, one after the other


@pytest.mark.parametrize("ref", ["m2", "m#2"])
def test_a_reload_without_room_for_both_waits_for_the_tasks_and_then_starts_the_new_one(ref: str) -> None:
    world = started(spec())
    task = world.task("p")
    assert task is not None
    reload(world, ref, beside=False)
    world.settle()
    assert world.runs("p") == ["m"] and world.task("p") is None
    world.ends(task)
    world.settle()
    ends_with(world, "done")
    assert world.serves("p") == [ref] and world.report("p")["models"] == [ref.partition("#")[0]]
    if ref == "m2":
        assert refused(world, ev.Load("p", "m")).code is Code.INVALID_REQUEST


@pytest.mark.parametrize("ref", ["m2", "m#2"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_reload_whose_first_start_fails_rolls_back_to_the_old_model(ref: str, replicas: int) -> None:
    world = started(spec(replicas=replicas))
    world.broken.add(ref)
    wishes = world.pools.wishes()
    reload(world, ref, beside=False)
    assert world.pools.wishes() == wishes, "an agent that comes now begins with what was proven"
    world.settle(60)
    assert "it does not load; back to m" in ends_with(world, "failed")
    assert world.serves("p") == ["m"] * replicas
    assert (world.report("p")["models"], world.pools.ref_of("p", "m")) == (["m"], "m")


@pytest.mark.parametrize("ref", ["m2", "m#2"])
def test_an_old_engine_that_ends_while_it_drains_for_a_reload_is_no_failure_of_the_new_model(ref: str) -> None:
    world = started(spec())
    world.task("p")
    reload(world, ref, beside=False)
    world.exits(R0, "killed by SIGKILL")
    assert world.runs("p") == [ref]
    world.settle()
    ends_with(world, "done")
    assert world.serves("p") == [ref]


def test_a_reload_whose_handoff_somebody_removes_rolls_back_too() -> None:
    world = started(spec())
    reload(world, beside=False)
    world.exits(R0)
    world.comes_up(R0)
    world.scan()
    del world.files["p-r0.json"]
    world.settle()
    assert "removed; back to m" in ends_with(world, "failed")
    assert world.serves("p") == ["m"]


def test_an_engine_that_fails_once_it_was_proven_is_a_failure_of_the_pool_and_not_of_the_reload() -> None:
    world = started(spec())
    task = world.task("p")
    reload(world, beside=True)
    world.settle()
    world.exits(("p", "r1"), "out of memory", hopeless=True)
    assert ends_with(world, "failed") == "out of memory"
    assert world.report("p")["models"] == ["m2"] and task in world.tasks
    world.exits(R0)
    assert task is not None and world.pools.accepted("p") == 1
    world.ends(task)
    world.do(ev.Load("p"))
    world.settle()
    assert world.serves("p") == ["m2"]


def test_a_failed_reload_of_an_unloaded_pool_leaves_it_unloaded() -> None:
    world = started(spec())
    world.do(ev.Unload("p"))
    world.settle()
    world.broken.add("m2")
    reload(world, beside=True)
    world.settle()
    ends_with(world, "failed")
    assert not world.processes and world.report("p")["state"] == "stopped"


def test_a_reload_mends_a_pool_that_has_failed() -> None:
    world = started(spec())
    world.exits(R0, hopeless=True)
    reload(world, beside=True)
    world.settle()
    ends_with(world, "done")
    assert world.serves("p") == ["m2"]


@pytest.mark.parametrize("beside", [True, False])
def test_while_a_pool_is_reloaded_other_wishes_conflict_and_the_same_is_no_other(beside: bool) -> None:
    world = started(spec())
    reload(world, beside=beside)
    for event in (ev.Load("p"), ev.Unload("p"), ev.Restart("p"), ev.Purge("p"), ev.Reload("p", "m3", "m3")):
        assert refused(world, event).code is Code.CONFLICT
    assert world.do(ev.Reload("p", "m2", "m2")) == []
    world.settle()
    ends_with(world, "done")


@pytest.mark.parametrize("beside", [True, False])
def test_a_drain_during_a_reload_keeps_tasks_away_and_the_reload_goes_on(beside: bool) -> None:
    world = started(spec())
    task = world.task("p")
    reload(world, beside=beside)
    world.do(ev.Drain("p", "why", 10.0))
    assert world.operation("p")["kind"] == "reload" and world.report("p")["held"] == ["operator: why"]
    world.settle(60)
    assert task not in world.tasks, "the deadline holds during a reload"
    ends_with(world, "done")
    assert world.task("p") is None
    world.do(ev.Undrain("p"))
    assert world.task("p") is not None


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("ref", ["m2", "m#2"])
def test_a_hold_ends_a_reload_and_what_was_comes_back(beside: bool, ref: str) -> None:
    world = started(spec())
    reload(world, ref, beside=beside)
    world.do(ev.Hold("p", "owner", "a game"))
    assert "not now: owner: a game" in ends_with(world, "failed")
    world.settle()
    assert not world.processes
    assert refused(world, ev.Reload("p", "m3", "m3")).code is Code.CONFLICT
    world.do(ev.Hold("p", "owner", None))
    world.settle()
    assert world.serves("p") == ["m"]


# ---------------------------------------------------------------- drain


def test_a_drain_ends_with_the_last_task_and_its_deadline_ends_those_that_go_on() -> None:
    world = started(spec())
    first, second = world.task("p"), world.task("p")
    assert first is not None and second is not None
    world.do(ev.Drain("p", "updates", 10.0, "then"))
    assert world.task("p") is None and world.report("p")["held"] == ["operator: updates"]
    world.ends(first)
    world.time_passes(9.9)
    assert second not in world.ended
    world.time_passes(0.2)
    assert world.ended[second].code is Code.DRAINING and "pool p" in world.ended[second].reason
    assert world.operation("p")["state"] == "running"
    world.ends(second)
    world.time_passes(0.1)
    ends_with(world, "done")
    assert world.processes, "it keeps its model"
    world.do(ev.Undrain("p"))
    assert ends_with(world, "done") == "" and world.task("p") is not None


def test_a_later_drain_says_anew_how_long_tasks_may_run() -> None:
    world = started(spec())
    task = world.task("p")
    world.do(ev.Drain("p", "", 10.0))
    world.do(ev.Drain("p", "", None))
    world.settle(100)
    assert task in world.tasks
    world.do(ev.Drain("p", "", 5.0))
    world.do(ev.Undrain("p"))
    world.settle(100)
    assert task in world.tasks


def test_a_reason_of_any_length_fits_into_a_report() -> None:
    world = started(spec())
    world.do(ev.Drain("p", "x" * 256))
    assert len(world.report("p")["held"][0]) == 256


def test_a_node_that_drains_ends_its_tasks_at_the_deadline_and_keeps_its_engines() -> None:
    world = started(spec(), on_demand())
    task, waits = world.task("p"), world.task("d", "a")
    assert task is not None and waits is not None
    world.do(ev.Drain(None, "updates", 10.0))
    assert world.task("p") is None and world.task("d", "a") is None
    assert [each["loading"] for each in world.pools.report()] == [None, None]
    assert not any(each["swappable"] for each in world.pools.report())
    world.time_passes(10.0)
    assert {world.ended[task].code, world.ended[waits].code} == {Code.DRAINING}
    assert "the node" in world.ended[task].reason
    world.settle()
    world.do(ev.Undrain())
    assert world.task("p") is not None
    assert world.report("p")["ready"]


def test_a_node_drain_without_a_deadline_lets_tasks_run() -> None:
    world = started(spec())
    task = world.task("p")
    world.do(ev.Drain(None, "", 10.0))
    world.do(ev.Drain(None, "", None))
    world.settle(200)
    assert task in world.tasks


def test_undrain_says_who_else_holds_the_pool() -> None:
    world = started(spec())
    world.do(ev.Drain("p"))
    world.do(ev.Hold("p", "hours", "18:00-08:00"))
    world.do(ev.Undrain("p"))
    assert ends_with(world, "done") == "still held: hours: 18:00-08:00"


@pytest.mark.parametrize("wish", [ev.Unload, ev.Restart])
def test_a_wish_with_a_deadline_ends_the_tasks_that_it_waits_for(wish: type[ev.Unload | ev.Restart]) -> None:
    world = started(spec())
    task = world.task("p")
    assert task is not None
    world.do(wish("p", None, 10.0))
    world.time_passes(9.9)
    assert task not in world.ended
    world.time_passes(0.2)
    assert world.ended[task].code is Code.DRAINING and wish.__name__.lower() in world.ended[task].reason
    world.settle()
    ends_with(world, "done")


def test_the_deadline_of_a_wish_that_is_granted_ends_nobodys_task() -> None:
    world = started(spec(replicas=2))
    world.do(ev.Restart("p", None, 10.0))
    world.settle(8)
    ends_with(world, "done")
    tasks = [world.task("p") for _ in range(4)]
    world.do(ev.Restart("p"))
    world.settle(100)
    assert None not in tasks and not world.ended
    world.do(ev.Restart("p", None, 5.0))
    world.settle()
    assert set(tasks) == set(world.ended), "asked for again, in a hurry"


@pytest.mark.parametrize("beside", [True, False])
def test_a_reload_with_a_deadline_ends_tasks_once_they_are_in_its_way(beside: bool) -> None:
    world = started(spec())
    task = world.task("p")
    assert task is not None
    world.do(ev.Reload("p", "m2", "m2", None, 10.0))
    world.time_passes(100.0)
    assert task not in world.ended, "the model is fetched"
    world.room = beside
    world.prepared()
    for _ in range(4):
        world.step(0.5)
    other = world.task("p")
    assert (other is not None) is beside and task not in world.ended
    world.settle()
    assert world.ended[task].code is Code.DRAINING
    ends_with(world, "done")
    other = other if beside else world.task("p")
    world.settle()
    assert other in world.tasks and other not in world.ended, "it is on the new one"


# ---------------------------------------------------------------- hold


def test_a_hold_lets_tasks_end_then_stops_the_engines_and_lets_them_come_back() -> None:
    world = started(spec(replicas=2))
    task = world.task("p")
    assert task is not None
    world.do(ev.Hold("p", "owner", "a game"))
    assert world.do(ev.Hold("p", "owner", "a game")) == []
    assert of(world.do(ev.Hold("p", "owner", "another game")), ev.Note) == []
    assert world.task("p") is None and world.report("p")["draining"]
    world.settle()
    assert len(world.processes) == 1
    world.ends(task)
    world.settle()
    assert not world.processes
    world.do(ev.Load("p"))
    assert ends_with(world, "done") == "not now: owner: another game"
    world.do(ev.Hold("p", "hours", "at night"))
    world.do(ev.Hold("p", "owner", None))
    world.settle()
    assert not world.processes, "it is not its time either"
    world.do(ev.Hold("p", "hours", None))
    assert world.do(ev.Hold("p", "hours", None)) == []
    world.settle()
    assert len(world.serves("p")) == 2


def test_an_unloaded_pool_does_not_come_back_when_a_hold_ends() -> None:
    world = started(spec())
    world.do(ev.Unload("p"))
    world.do(ev.Hold("p", "owner", "a game"))
    world.do(ev.Hold("p", "owner", None))
    world.settle()
    assert not world.processes


# ---------------------------------------------------------------- purge


def test_purge_forgets_what_failed_and_has_the_leftovers_removed() -> None:
    world = started(spec())
    assert refused(world, ev.Purge("p")).code is Code.CONFLICT
    world.exits(R0, hopeless=True)
    assert of(world.do(ev.Purge("p")), ev.Forget) == [ev.Forget("p")]
    ends_with(world, "done")
    assert world.report("p")["last_error"] is None
    world.settle()
    assert world.report("p")["ready"], "what was forgotten speaks against nothing"


def test_purge_of_an_unloaded_pool_starts_nothing() -> None:
    world = started(spec())
    world.do(ev.Unload("p"))
    world.settle()
    world.do(ev.Purge("p"))
    world.settle()
    assert not world.processes


# ---------------------------------------------------------------- engines of others


def hand_over(world: World, pool: str = "p", replica: str = "x", model: str = "m") -> Handoff:
    made = Handoff(pool, "vllm", "http://127.0.0.1:6000", model, replica, slots=3)
    world.files[made.file_name] = made
    world.settle(5)
    return made


def test_no_operation_touches_an_engine_that_was_handed_over() -> None:
    world = started(spec())
    hand_over(world)
    for event in (ev.Restart("p"), ev.Unload("p"), ev.Load("p"), ev.Stalled("p", "x", "no tokens")):
        world.do(event)
        world.settle()
        assert ("p", "x") in world.ready(), event
    assert world.files["p-x.json"].engine == "vllm"


def test_a_handed_over_engine_is_not_used_for_a_model_that_it_does_not_have() -> None:
    world = started(spec())
    hand_over(world)
    reload(world, beside=True)
    world.settle()
    assert (world.report("p")["model"], world.report("p")["slots_total"], world.report("p")["slots_free"]) == (
        "m2",
        2,
        2,
    )
    for _ in range(2):
        world.task("p")
    assert world.task("p") is None
    reload(world, "m", beside=True)
    world.settle()
    assert world.report("p")["slots_total"] == 7, "5 of its own, 2 that are held on engines that go"


def test_an_engine_that_stands_by_with_another_model_is_none_that_tasks_could_go_to() -> None:
    world = started(spec())
    hand_over(world)
    old = [world.task("p") for _ in range(3)]
    reload(world, beside=True)
    world.settle()
    task = world.task("p")
    for task_id in [*old, task]:
        assert task_id is not None
        for _ in range(10):
            world.pools.told(task_id, True, world.now)
    world.time_passes(1.0)
    assert [each["breaker"] for each in world.report("p")["replicas"] if each["state"] == "ready"] == ["closed"] * 2
    assert world.task("p") is not None


def test_a_pool_of_engines_of_others_can_only_be_drained() -> None:
    world = World()
    hand_over(world, "q")
    for event in (ev.Load("q"), ev.Unload("q"), ev.Restart("q"), ev.Reload("q", "m2", "m2")):
        assert refused(world, event).code is Code.INVALID_REQUEST
    assert refused(world, ev.Load("nowhere")).code is Code.POOL_NOT_FOUND
    world.do(ev.Drain("q"))
    assert world.task("q") is None


def test_the_offer_of_an_external_engine_is_withdrawn_while_its_pool_is_held_and_made_again() -> None:
    world = started(external())
    task = world.task("e")
    assert task is not None
    world.do(ev.Hold("e", "hours", "at night"))
    world.settle()
    assert "e-r0.json" in world.files, "it has a task"
    world.ends(task)
    world.settle()
    assert not world.files and not world.report("e")["ready"]
    world.do(ev.Hold("e", "hours", None))
    world.settle()
    assert world.report("e")["ready"]


@pytest.mark.parametrize("looks", [0, 1, 2])
def test_a_hold_that_ends_before_anybody_sees_that_the_offer_is_gone_is_no_removal(looks: int) -> None:
    world = started(external())
    world.do(ev.Hold("e", "hours", "at night"))
    world.time_passes(0.2)
    for _ in range(looks):
        world.scan()
    world.do(ev.Hold("e", "hours", None))
    world.settle()
    assert world.report("e")["ready"]


def test_an_offer_that_was_withdrawn_before_anybody_saw_it_is_made_again() -> None:
    world = World(external())
    world.start()
    world.do(ev.Hold("e", "hours", "at night"))
    world.time_passes(0.2)
    assert world.report("e")["replicas"][0]["state"] == "exited" and not world.files
    world.do(ev.Hold("e", "hours", None))
    world.settle()
    assert world.report("e")["ready"]


def test_an_external_engine_whose_file_somebody_removes_stays_away_until_it_is_put_back_or_loaded() -> None:
    world = started(external())
    kept = world.files.pop("e-r0.json")
    world.settle(100)
    assert not world.report("e")["ready"] and not world.files
    world.files["e-r0.json"] = kept
    world.settle()
    assert world.report("e")["ready"]
    del world.files["e-r0.json"]
    world.settle()
    world.do(ev.Load("e"))
    world.settle()
    assert world.report("e")["ready"]


# ---------------------------------------------------------------- engines that stall or are lost


def test_a_stalled_engine_loses_its_tasks_and_is_started_again_as_after_a_failure() -> None:
    world = started(spec())
    task = world.task("p")
    assert task is not None
    world.do(ev.Stalled("p", "r0", "no token for 120 s"))
    assert world.ended[task].code is Code.ENGINE_STALLED and world.task("p") is None
    assert world.processes[R0].told_to_end is False
    world.ends(task)
    world.time_passes(0.2)
    assert world.processes[R0].told_to_end
    world.exits(R0, "killed by SIGKILL")
    assert world.report("p")["last_error"] == "no token for 120 s"
    assert world.report("p")["replicas"][0]["state"] == "exited", "it is not started at once"
    world.settle()
    assert world.report("p")["ready"]


def test_five_stalls_in_five_minutes_are_too_many() -> None:
    world = started(spec())
    for _ in range(5):
        world.do(ev.Stalled("p", "r0", "no token"))
        world.settle(40)
    assert world.report("p")["state"] == "failed"


def test_a_load_takes_as_long_as_its_first_answer_and_a_second_one_says_nothing() -> None:
    world = World(spec())
    world.start()
    world.time_passes(5.0)
    world.comes_up(R0)
    world.scan()
    world.answers(R0)
    assert world.report("p")["load_s"] == 5.0
    world.time_passes(500.0)
    world.do(ev.EngineLost("p", "r0", "nothing listens"))
    world.answers(R0)
    assert world.report("p")["load_s"] == 5.0


def test_an_engine_that_gave_no_token_in_time_is_not_ready_when_it_does_after_all() -> None:
    world = World(spec())
    world.start()
    world.comes_up(R0)
    world.scan()
    number, _ = world.probes[R0]
    world.gives_up(R0)
    world.do(ev.ProbeOk(*R0, number))
    assert not world.report("p")["ready"]
    world.exits(R0)
    assert world.report("p")["last_error"] == "it was not ready in time"
    assert not world.processes, "it is a failure like any other"
    for _ in range(4):
        world.time_passes(16.0)
        world.comes_up(R0)
        world.scan()
        world.gives_up(R0)
        world.exits(R0)
    assert world.report("p")["state"] == "failed"


# ---------------------------------------------------------------- files that are seen late


def test_an_earlier_runs_file_read_before_the_next_one_is_up_is_not_asked() -> None:
    world = started(spec())
    earlier = world.files["p-r0.json"]
    world.exits(R0)
    world.time_passes(2.0)
    assert R0 in world.processes
    assert world.do(ev.HandoffSeen(earlier)) == []
    assert of(world.do(ev.HandoffBad("p-r0.json", "torn")), ev.WriteHandoff) == [], "nothing is offered yet"
    world.settle()
    assert world.report("p")["ready"]


def test_a_file_that_somebody_removes_before_it_is_seen_is_written_again() -> None:
    world = World(spec())
    world.start()
    world.comes_up(R0)
    del world.files["p-r0.json"]
    world.settle(60)
    assert world.report("p")["ready"]


def test_an_engine_on_demand_whose_file_somebody_removes_takes_no_tasks_until_it_is_loaded() -> None:
    world = started(on_demand())
    world.task("d", "a")
    world.settle()
    del world.files["d-r0.json"]
    world.settle()
    report = world.report("d")
    assert (report["swappable"], report["loading"], report["slots_free"]) == (False, None, 0)
    for model in ("a", "b"):
        with pytest.raises(LlorchError) as caught:
            world.pools.acquire("d", "refused", model)
        assert caught.value.code is Code.MODEL_NOT_AVAILABLE
    world.do(ev.Load("d", "b"))
    world.settle()
    assert world.task("d", "b") is not None


def test_the_start_of_the_node_hides_no_operation_that_runs() -> None:
    world = started(spec())
    reload(world, beside=True)
    world.do(ev.Start())
    assert world.operation("p")["kind"] == "reload"
    world.settle()
    ends_with(world, "done")
    assert world.serves("p") == ["m2"]
