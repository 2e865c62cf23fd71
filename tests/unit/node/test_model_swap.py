"""Pools whose models come and go: which task turns a pool, who waits with a slot, what if a model does not load."""

from __future__ import annotations

import pytest

from llorch.config_pools import MODEL_KEPT_S
from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from tests.pool_world import World, of, on_demand, spec, started

R0 = ("d", "r0")


def resident(model: str = "a", **changes: object) -> World:
    """`model` is loaded, nothing runs, and it may be replaced."""
    world = started(on_demand(**changes))
    task = world.task("d", model)
    assert task is not None
    world.settle(20)
    world.ends(task)
    world.settle(MODEL_KEPT_S + 10)
    assert world.report("d")["model"] == model and world.report("d")["swappable"]
    return world


def refusal(world: World, model: str | None, pool: str = "d") -> LlorchError:
    with pytest.raises(LlorchError) as caught:
        world.pools.acquire(pool, "refused", model)
    return caught.value


# ---------------------------------------------------------------- nothing resident


def test_a_pool_without_a_first_model_waits_for_a_task_that_names_one() -> None:
    world = started(on_demand())
    report = world.report("d")
    assert (report["state"], report["model"], report["loading"]) == ("stopped", None, None)
    assert (report["models"], report["swappable"], report["slots_free"]) == (["a", "b"], True, 2)
    assert not world.processes


def test_a_task_has_its_model_loaded_and_holds_a_slot_of_it_meanwhile() -> None:
    world = started(on_demand())
    first = world.task("d", "b")
    report = world.report("d")
    assert (report["state"], report["loading"], report["swappable"], report["slots_free"]) == (
        "starting",
        "b",
        False,
        1,
    )
    second = world.task("d", "b")
    assert first is not None and second is not None
    assert world.task("d", "b") is None, "no more are held than there are slots"
    assert refusal(world, "b").code is Code.ALL_SLOTS_BUSY
    assert refusal(world, "a").details["serves"] == "b"
    world.settle()
    assert world.tasks[first].where == world.tasks[second].where == R0
    assert (world.report("d")["model"], world.report("d")["slots_free"]) == ("b", 0)


def test_the_first_model_is_loaded_at_the_start_where_the_settings_name_it() -> None:
    world = started(on_demand(model="b"))
    assert world.report("d")["model"] == "b" and world.task("d") is not None


def test_a_task_that_names_no_model_gets_the_resident_or_the_first_that_can_be_loaded() -> None:
    world = started(on_demand())
    world.broken.add("a")
    for _ in range(5):
        world.task("d", "a")
        world.settle(60)
    assert world.report("d")["models"] == ["b"]
    task = world.task("d")
    assert task is not None and world.tasks[task].model == "b"


def test_a_model_that_is_not_the_pools_is_refused() -> None:
    assert refusal(started(on_demand()), "other").code is Code.MODEL_NOT_AVAILABLE


# ---------------------------------------------------------------- swaps


def test_a_task_for_another_model_turns_an_idle_pool_to_it() -> None:
    world = resident("a")
    task = world.task("d", "b")
    assert task is not None
    report = world.report("d")
    assert (report["loading"], report["ready"], report["swappable"]) == ("b", False, False)
    world.time_passes(0.2)
    assert world.processes[R0].told_to_end
    world.settle()
    assert world.tasks[task].where == R0 and world.runs("d") == ["b"]


def test_a_pool_is_not_turned_while_a_task_runs() -> None:
    world = resident("a")
    task = world.task("d", "a")
    error = refusal(world, "b")
    assert (error.code, error.details) == (Code.ALL_SLOTS_BUSY, {"serves": "a", "swap_in_ms": 0})
    assert task is not None
    world.ends(task)
    assert world.task("d", "b") is not None


def test_a_model_is_kept_a_while_once_it_is_ready() -> None:
    world = started(on_demand())
    task = world.task("d", "a")
    assert task is not None
    world.time_passes(100.0)  # to load takes long, and does not count
    world.comes_up(R0)
    world.scan()
    world.answers(R0)
    world.ends(task)
    world.time_passes(10.0)
    error = refusal(world, "b")
    assert (error.code, error.details) == (Code.ALL_SLOTS_BUSY, {"serves": "a", "swap_in_ms": 20_000})
    world.time_passes(19.9)
    assert not world.report("d")["swappable"]
    world.time_passes(0.1)
    assert world.report("d")["swappable"] and world.task("d", "b") is not None


def test_a_second_engine_that_gets_ready_does_not_keep_the_model_for_longer() -> None:
    world = World(on_demand(replicas=2))
    world.start()
    world.task("d", "a")
    world.time_passes(0.2)
    for number, key in enumerate(sorted(world.processes)):
        world.comes_up(key)
        world.scan()
        world.answers(key)
        world.time_passes(20.0 * (1 - number))
    for task in sorted(world.tasks):
        world.ends(task)
    world.time_passes(MODEL_KEPT_S - 20.0)
    assert world.report("d")["swappable"]


def test_two_models_asked_for_by_turns_are_loaded_at_most_every_half_minute() -> None:
    world = started(on_demand())
    ended = 0
    for turn in range(600):
        world.task("d", "ab"[turn % 2])
        world.step(0.5)
        for each in [each for each, told in world.tasks.items() if told.where is not None]:
            world.ends(each)
            ended += 1
    loads = sum(note.event == "pool.ready" for note in world.notes)
    assert 3 <= loads <= 300 / MODEL_KEPT_S + 1, loads
    assert ended > 150


def test_a_task_that_holds_a_slot_elsewhere_turns_nothing() -> None:
    world = started(spec(), on_demand())
    task = world.task("p")
    assert task is not None
    before = world.pools.report()
    with pytest.raises(LlorchError) as caught:
        world.pools.acquire("d", task, "a")
    assert caught.value.code is Code.CONFLICT and world.pools.report() == before


def test_all_engines_of_a_pool_turn_and_its_tasks_wait_for_any_of_them() -> None:
    world = resident("a", replicas=2)
    tasks = [world.task("d", "b") for _ in range(4)]
    assert None not in tasks and world.task("d", "b") is None
    world.time_passes(0.2)
    for key in sorted(world.processes):
        world.exits(key)
    assert world.runs("d") == ["b", "b"]
    world.comes_up(R0)
    world.scan()
    world.answers(R0)
    seated = [task for task in tasks if task is not None and world.tasks[task].where == R0]
    assert len(seated) == 2 and world.report("d")["slots_free"] == 0
    world.ends(seated[0])
    assert world.report("d")["slots_free"] == 0, "it is for those that came first"
    assert world.task("d", "b") is None
    world.settle()
    assert all(each.where is not None for each in world.tasks.values())


def test_no_slot_is_promised_of_an_engine_whose_file_somebody_removed() -> None:
    world = resident("a", replicas=2)
    del world.files["d-r0.json"]
    world.settle()
    assert [world.task("d", "b") is not None for _ in range(3)] == [True, True, False]
    world.settle()
    assert len(world.processes) == 1 and all(task.where is not None for task in world.tasks.values())


def test_a_pool_whose_only_engine_is_passed_over_is_not_turned() -> None:
    world = resident("a", replicas=2)
    tasks = [world.task("d", "a") for _ in range(4)]
    for task in tasks:
        assert task is not None
        if world.tasks[task].where == R0:
            for _ in range(5):
                world.pools.told(task, True, world.now)
        world.ends(task)
    world.exits(("d", "r1"))
    assert (world.report("d")["swappable"], world.report("d")["slots_free"]) == (False, 0)
    world.settle(60)
    assert world.report("d")["swappable"]


def test_a_task_that_ends_while_it_waits_gives_its_slot_back() -> None:
    world = started(on_demand())
    task = world.task("d", "a")
    assert task is not None
    world.ends(task)
    assert world.report("d")["slots_free"] == 2
    world.settle()
    assert world.report("d")["model"] == "a", "it was on its way already"


# ---------------------------------------------------------------- models that don't load


def test_a_model_that_fails_to_load_ends_those_who_wait_and_leaves_nothing_resident() -> None:
    world = resident("a")
    world.broken.add("b")
    task = world.task("d", "b")
    assert task is not None
    world.settle(20)
    assert (world.ended[task].code, world.ended[task].reason) == (
        Code.MODEL_NOT_AVAILABLE, "b could not be loaded: it does not load",
    )  # fmt: skip
    report = world.report("d")
    assert (report["model"], report["loading"], report["swappable"]) == (None, None, True)
    assert not world.processes


def test_a_model_that_failed_is_left_alone_for_a_while_that_doubles_and_others_are_not() -> None:
    world = started(on_demand())
    waits = []
    for _ in range(3):
        task = world.task("d", "a")
        assert task is not None
        world.time_passes(0.2)
        world.exits(R0)
        world.ends(task)
        error = refusal(world, "a")
        assert (error.code, error.details["serves"]) == (Code.ALL_SLOTS_BUSY, None)
        waits.append(error.details["swap_in_ms"])
        world.time_passes(error.details["swap_in_ms"] / 1_000)
    assert waits == [750, 1_500, 3_000]  # of 1, 2 and 4 s, with the chance of one half
    task = world.task("d", "b")
    assert task is not None
    world.settle()
    assert world.tasks[task].where is not None


@pytest.mark.parametrize("mend", [ev.Load("d", "a"), ev.Purge("d"), ev.Reload("d", "a", "a")])
def test_a_model_that_failed_five_times_is_offered_no_more_until_somebody_asks_for_it(mend: ev.Event) -> None:
    world = started(on_demand())
    world.broken.add("a")
    for _ in range(5):
        assert world.task("d", "a") is not None
        world.settle(50)
    report = world.report("d")
    assert (report["models"], report["swappable"], report["last_error"]) == (["b"], True, "it does not load")
    error = refusal(world, "a")
    assert error.code is Code.MODEL_NOT_AVAILABLE and "it does not load" in error.message and error.hint
    world.settle(1_000)
    assert refusal(world, "a").code is Code.MODEL_NOT_AVAILABLE
    world.broken.clear()
    world.do(mend)
    world.settle()
    assert world.report("d")["models"] == ["a", "b"]
    assert world.task("d", "a") is not None


def test_a_model_whose_end_is_hopeless_is_offered_no_more_at_once() -> None:
    world = started(on_demand())
    task = world.task("d", "a")
    assert task is not None
    world.time_passes(0.2)
    world.exits(R0, "there is no such file", hopeless=True)
    assert "there is no such file" in world.ended[task].reason
    assert world.report("d")["models"] == ["b"]


def test_a_pool_none_of_whose_models_loads_has_failed() -> None:
    world = started(on_demand(models=("a",)))
    world.task("d", "a")
    world.time_passes(0.2)
    world.exits(R0, hopeless=True)
    world.settle()
    report = world.report("d")
    assert (report["state"], report["models"], report["swappable"]) == ("failed", [], False)
    assert refusal(world, None).code is Code.MODEL_NOT_AVAILABLE


def test_one_of_two_engines_that_does_not_come_up_ends_no_task_while_the_other_may() -> None:
    world = World(on_demand(replicas=2))
    world.start()
    task = world.task("d", "a")
    assert task is not None
    world.time_passes(0.2)
    world.exits(R0)
    assert task not in world.ended
    world.settle()
    assert world.tasks[task].where is not None


def test_a_resident_engine_that_ends_is_started_again_by_the_next_task_after_its_backoff() -> None:
    world = resident("a")
    world.exits(R0, "killed by SIGSEGV")
    world.settle(10)
    assert not world.processes
    assert world.task("d", "a") is not None
    world.settle()
    assert world.report("d")["model"] == "a"


def test_a_stalled_engine_on_demand_ends_its_tasks_and_counts_against_its_model() -> None:
    world = resident("a")
    task = world.task("d", "a")
    world.do(ev.Stalled("d", "r0", "no token for 120 s"))
    assert task is not None and world.ended[task].code is Code.ENGINE_STALLED
    world.settle(5)
    assert world.report("d")["model"] is None
    world.settle()
    assert world.task("d", "a") is not None


# ---------------------------------------------------------------- idle


def test_a_model_without_tasks_is_unloaded_after_its_time_and_comes_back_with_the_next_task() -> None:
    world = resident("a", idle_unload_s=60.0)
    for _ in range(10):
        task = world.task("d", "a")
        assert task is not None
        world.time_passes(50.0)
        world.ends(task)
        world.time_passes(0.2)
        world.time_passes(50.0)
        assert world.report("d")["ready"]
    world.settle(30)
    assert not world.processes and world.report("d")["swappable"]
    assert [note.reason for note in world.notes if note.event == "model.idle"] == ["a: no task for 60 s"]
    assert world.task("d", "a") is not None
    world.settle()
    assert world.report("d")["model"] == "a"


def test_a_pool_of_one_model_may_be_idle_too() -> None:
    world = started(spec("d", model="a", idle_unload_s=60.0))
    assert world.report("d")["ready"]
    world.settle(100)
    assert not world.processes and world.report("d")["models"] == ["a"]
    assert world.task("d") is not None
    world.settle()
    assert world.report("d")["ready"]


# ---------------------------------------------------------------- wishes of operators


@pytest.mark.parametrize(
    "wish", [ev.Load("d", "b"), ev.Unload("d"), ev.Hold("d", "owner", "a game"), ev.Reload("d", "b", "b#2")]
)
@pytest.mark.parametrize("room", [True, False])
def test_those_who_wait_for_a_model_that_will_not_come_any_more_are_ended(wish: ev.Event, room: bool) -> None:
    world = started(on_demand())
    world.room = room
    task = world.task("d", "a")
    assert task is not None
    world.time_passes(0.2)
    world.do(wish)
    if world.prepares:
        world.prepared()
    assert world.ended[task].code is Code.MODEL_NOT_AVAILABLE
    for _ in range(10):
        world.time_passes(1.0)
        for key in sorted(world.processes):
            world.exits(key) if world.processes[key].told_to_end else world.comes_up(key)
        world.scan()
        for key in sorted(world.probes):
            world.answers(key)
    assert world.tasks[task].where is None, "it is not seated with another model"
    world.settle()
    assert not world.tasks


def test_those_who_wait_are_seated_by_a_restart_and_by_a_drained_pool_too() -> None:
    world = started(on_demand())
    task = world.task("d", "a")
    assert task is not None
    world.time_passes(0.2)
    world.do(ev.Restart("d"))
    world.do(ev.Drain("d"))
    world.settle()
    assert world.tasks[task].where == R0
    assert world.operation("d")["state"] == "running", "the drain waits for it"


def test_a_task_that_the_end_of_a_drain_has_ended_is_not_seated_and_not_ended_twice() -> None:
    world = started(on_demand())
    task = world.task("d", "a")
    assert task is not None
    world.do(ev.Drain("d", "", 0.0))
    world.time_passes(0.2)
    assert world.ended[task].code is Code.DRAINING
    world.do(ev.Hold("d", "owner", "a game"))
    world.do(ev.Hold("d", "owner", None))
    world.comes_up(R0)
    assert world.ended[task].code is Code.DRAINING and world.tasks[task].where is None


def test_a_load_of_another_model_waits_for_the_tasks_of_the_resident() -> None:
    world = resident("a")
    task = world.task("d", "a")
    assert task is not None
    world.do(ev.Load("d", "b"))
    assert refusal(world, "a").code is Code.ALL_SLOTS_BUSY
    ahead = world.task("d", "b")
    assert ahead is not None and world.task("d", "b") is None, "two are accepted by two slots"
    world.settle()
    assert world.runs("d") == ["a"]
    world.ends(task)
    world.settle()
    assert world.operation("d")["state"] == "done" and world.tasks[ahead].where == R0


def test_a_load_that_fails_says_so_and_leaves_nothing_resident() -> None:
    world = resident("a")
    world.broken.add("b")
    world.do(ev.Load("d", "b"))
    world.settle()
    operation = world.operation("d")
    assert (operation["state"], operation["message"]) == ("failed", "it does not load")
    assert [note.reason for note in world.notes if note.event == "pool.answered"][-1] == "load: it does not load"
    assert world.report("d")["model"] is None


def test_a_restart_of_a_pool_with_nothing_resident_ends_at_once() -> None:
    world = started(on_demand())
    world.do(ev.Restart("d"))
    assert world.operation("d")["state"] == "done"


@pytest.mark.parametrize("room", [True, False])
def test_a_reload_gives_a_pool_a_model_more_and_takes_it_back_if_it_does_not_load(room: bool) -> None:
    world = resident("a")
    world.room = room
    world.broken.add("c")
    world.do(ev.Reload("d", "c", "c"))
    world.settle()
    assert world.operation("d")["state"] == "failed"
    assert (world.report("d")["models"], world.report("d")["model"]) == (["a", "b"], "a")
    world.broken.clear()
    world.do(ev.Reload("d", "c", "c"))
    world.settle()
    assert world.operation("d")["state"] == "done"
    assert (world.report("d")["models"], world.report("d")["model"]) == (["a", "b", "c"], "c")
    world.settle(40)
    assert world.task("d", "b") is not None


def test_while_a_model_is_fetched_for_a_reload_the_pool_turns_as_ever_and_afterwards_not() -> None:
    world = resident("a")
    world.do(ev.Reload("d", "c", "c"))
    task = world.task("d", "b")
    assert task is not None
    world.time_passes(0.2)
    world.prepared()
    assert not world.report("d")["swappable"]
    assert world.ended[task].code is Code.MODEL_NOT_AVAILABLE
    world.settle()
    assert world.report("d")["model"] == "c"


def test_engines_handed_over_do_not_join_a_pool_whose_models_come_and_go() -> None:
    world = started(spec("d", model="a"))
    other = Handoff("d", "vllm", "http://127.0.0.1:6000", "a", "x", slots=3)
    world.files[other.file_name] = other
    world.settle(5)
    assert world.report("d")["slots_total"] == 5
    world.configure(on_demand())
    world.settle()
    assert ("d", "x") not in world.ready()
    assert of(world.do(ev.HandoffSeen(other)), ev.Note)[0].event == "handoff.invalid"
