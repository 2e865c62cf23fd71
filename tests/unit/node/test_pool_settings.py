"""Other pools in the settings while a node runs: what is touched, what is not, and how pools come and go."""

from __future__ import annotations

import pytest

from llorch.config_pools import PoolSpec
from llorch.errors import Code
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from tests.pool_world import World, external, of, on_demand, refused, spec, started

R0 = ("p", "r0")


def hand_over(world: World, pool: str = "p", replica: str = "x", model: str = "m") -> str:
    """The name of its file."""
    made = Handoff(pool, "vllm", "http://127.0.0.1:6000", model, replica, slots=3)
    world.files[made.file_name] = made
    world.settle(5)
    return made.file_name


def test_only_pools_that_differ_are_touched() -> None:
    world = started(spec(), spec("q"), on_demand(), external())
    before = {key: process.run for key, process in world.processes.items()}
    generation = world.report("q")["generation"]
    world.configure(spec(slots=4), spec("q"), on_demand(), external())
    world.settle()
    assert world.processes["q", "r0"].run == before["q", "r0"] and world.processes[R0].run != before[R0]
    assert world.report("q")["generation"] == generation
    assert world.configure(spec(slots=4), spec("q"), on_demand(), external()) == []


def test_a_changed_pool_ends_its_tasks_first_and_is_then_started_as_the_settings_say() -> None:
    world = started(spec())
    tasks = [world.task("p") for _ in range(2)]
    world.configure(spec(slots=1, ctx=2048))
    assert world.operation("p") == {"kind": "restart", "state": "running"} and world.task("p") is None
    world.settle()
    assert world.report("p")["slots_total"] == 2, "its tasks still run"
    for task in tasks:
        assert task is not None and not world.tasks[task].told_to_end
        world.ends(task)
    world.settle()
    assert world.operation("p")["state"] == "done"
    assert (world.report("p")["slots_total"], world.report("p")["ctx"]) == (1, 2048)


def test_a_pool_may_get_more_and_fewer_engines() -> None:
    world = started(spec())
    for replicas in (3, 1, 2):
        world.configure(spec(replicas=replicas))
        world.settle()
        assert world.serves("p") == ["m"] * replicas
        assert len(world.report("p")["replicas"]) == replicas


def test_a_new_pool_is_started_and_held_if_the_node_is() -> None:
    world = started()
    world.do(ev.Drain(None, "updates"))
    world.configure(spec())
    assert world.report("p")["held"] == ["operator: updates"]
    world.settle()
    assert world.operation("p") == {"kind": "load", "state": "done", "model": "m"}
    assert world.report("p")["held"] == ["operator: updates"] and world.task("p") is None
    world.do(ev.Undrain())
    assert world.report("p")["held"] == [] and world.task("p") is not None


def test_a_removed_pool_whose_engine_ends_goes_once_the_task_that_it_had_is_over() -> None:
    world = started(spec())
    task = world.task("p")
    assert task is not None
    world.configure()
    world.exits(R0)
    world.time_passes(1.0)
    assert world.pools.ids() == ["p"]
    world.ends(task)
    world.time_passes(1.0)
    assert world.pools.ids() == []


def test_a_removed_pool_takes_no_tasks_and_goes_with_its_last_one() -> None:
    world = started(spec(replicas=2))
    task = world.task("p")
    assert task is not None
    world.configure()
    report = world.report("p")
    assert (report["draining"], report["state"], report["held"]) == (
        True,
        "draining",
        ["settings: it is no more there"],
    )
    assert world.task("p") is None
    world.settle()
    assert len(world.processes) == 1 and world.pools.ids() == ["p"]
    for event in (ev.Load("p"), ev.Unload("p"), ev.Restart("p"), ev.Purge("p"), ev.Reload("p", "m2", "m2")):
        assert refused(world, event).code is Code.CONFLICT
    world.do(ev.Drain("p", "", 0.0))
    world.time_passes(0.2)
    assert task in world.ended
    world.ends(task)
    world.settle()
    assert not world.processes and not world.pools.ids() and not world.files
    assert refused(world, ev.Load("p")).code is Code.POOL_NOT_FOUND


def test_tasks_that_wait_for_a_model_of_a_removed_pool_are_ended() -> None:
    world = started(on_demand())
    task = world.task("d", "a")
    assert task is not None
    world.configure()
    assert world.ended[task].code is Code.MODEL_NOT_AVAILABLE
    world.settle()
    assert not world.pools.ids()


@pytest.mark.parametrize("first", [None, "a"])
def test_tasks_that_wait_for_a_model_of_a_changed_pool_are_ended(first: str | None) -> None:
    world = World(on_demand(slots=4, model=first))
    world.start()
    tasks = [world.task("d", "a") for _ in range(4)]
    world.configure(on_demand(slots=1, model=first))
    assert all(task in world.ended for task in tasks)
    world.settle()
    assert world.task("d", "a") is not None and world.task("d", "a") is None


@pytest.mark.parametrize("now", [spec(), spec(slots=7), spec(engine="external", url="http://127.0.0.1:7001")])
def test_a_pool_that_is_added_again_while_it_drains_comes_back_once_it_has_gone(now: PoolSpec) -> None:
    world = started(spec())
    task = world.task("p")
    assert task is not None
    world.configure()
    generation = world.report("p")["generation"]
    world.configure(now)
    world.settle()
    assert world.processes and world.task("p") is None, "it still drains"
    world.ends(task)
    world.settle()
    report = world.report("p")
    assert report["ready"] and report["slots_total"] == now.slots and report["generation"] > generation
    assert bool(world.processes) is (now.engine != "external")


def test_a_pool_that_is_added_again_and_removed_again_stays_away() -> None:
    world = started(spec())
    task = world.task("p")
    assert task is not None
    for specs in ([], [spec()], []):
        world.configure(*specs)
    world.ends(task)
    world.settle()
    assert not world.pools.ids() and not world.processes


def test_a_pool_that_comes_back_later_goes_on_where_its_reports_ended() -> None:
    world = started(spec())
    generation = world.report("p")["generation"]
    world.configure()
    world.settle()
    world.configure(spec())
    assert world.report("p")["generation"] > generation
    world.settle()
    assert world.report("p")["ready"]


def test_a_pool_may_turn_from_ours_to_an_external_engine_and_back() -> None:
    world = started(spec())
    task = world.task("p")
    assert task is not None
    world.configure(spec(engine="external", url="http://127.0.0.1:7001"))
    world.settle()
    assert list(world.processes) == [R0] and world.task("p") is None
    world.ends(task)
    world.settle()
    assert not world.processes and world.report("p")["ready"]
    assert world.files["p-r0.json"].url == "http://127.0.0.1:7001"
    world.configure(spec())
    world.settle()
    assert world.serves("p") == ["m"] and [each.pid for each in world.files.values()] != [None]


def test_an_external_engine_may_move() -> None:
    world = started(external())
    task = world.task("e")
    assert task is not None
    world.configure(external(url="http://127.0.0.1:7002"))
    world.settle()
    assert world.files["e-r0.json"].url == "http://127.0.0.1:7000", "its task goes on"
    world.ends(task)
    world.settle()
    assert world.files["e-r0.json"].url == "http://127.0.0.1:7002" and world.report("e")["ready"]


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("when", ["fetched", "started", "proven"])
@pytest.mark.parametrize("specs", [[spec(ctx=2048)], []])
def test_other_settings_end_a_reload_and_keep_one_that_was_proven(
    beside: bool, when: str, specs: list[PoolSpec]
) -> None:
    world = started(spec())
    task = world.task("p")
    assert task is not None
    world.room = beside
    world.do(ev.Reload("p", "m", "m#2"))
    if when != "fetched":
        world.prepared()
    if when == "proven":
        world.settle()
    world.configure(*specs)
    if world.prepares:
        world.prepared()
    world.ends(task)
    world.settle()
    # Without room for both, the task that runs keeps the old one: nothing is proven before it has ended.
    assert world.serves("p") == (["m#2"] if when == "proven" and beside else ["m"]) * len(specs)
    assert not specs or world.operation("p") == {"kind": "restart", "state": "done"}


def test_what_operators_asked_for_outlives_other_settings_until_those_name_another_model() -> None:
    world = started(spec())
    world.do(ev.Reload("p", "m2", "m2"))
    world.settle()
    world.do(ev.Drain("p", "why"))
    world.configure(spec(slots=1))
    world.settle()
    assert world.serves("p") == ["m2"] and world.report("p")["held"] == ["operator: why"]
    world.configure(spec(model="m3"))
    world.settle()
    assert world.serves("p") == ["m3"]
    world.configure(spec(slots=1))
    world.settle()
    world.do(ev.Unload("p"))
    world.settle()
    world.configure(spec(slots=2))
    assert world.operation("p") == {"kind": "restart", "state": "done", "message": "not now: it is unloaded"}
    world.settle()
    assert not world.processes
    world.do(ev.Load("p"))
    world.settle()
    assert world.report("p")["slots_total"] == 2


def test_settings_of_when_a_pool_serves_leave_its_engines_alone() -> None:
    world = started(spec())
    run = world.processes[R0].run
    for changes in ({"idle_unload_s": 900.0}, {"yield_to_owner": True}, {}):
        world.configure(spec(**changes))
        world.settle()
        assert world.processes[R0].run == run and world.report("p")["ready"]


def test_a_pool_that_is_idle_no_more_by_its_settings_comes_up() -> None:
    world = started(spec(idle_unload_s=60.0))
    world.settle(100)
    assert not world.processes
    world.configure(spec())
    world.settle()
    assert world.report("p")["ready"]


def test_a_hold_outlives_other_settings_as_long_as_they_give_its_reason() -> None:
    world = started(spec(yield_to_owner=True))
    world.do(ev.Hold("p", "owner", "a game"))
    world.settle()
    world.configure(spec(yield_to_owner=True, slots=1))
    world.settle()
    assert not world.processes and world.report("p")["held"] == ["owner: a game"]
    world.configure(spec(slots=1))
    world.settle()
    assert world.report("p")["held"] == [] and world.report("p")["ready"]


def test_other_settings_are_another_chance_for_a_pool_that_has_failed() -> None:
    world = started(spec())
    world.exits(R0, hopeless=True)
    world.configure(spec(ctx=2048))
    world.settle()
    assert world.report("p")["ready"]
    del world.files["p-r0.json"]
    world.settle()
    assert not world.processes
    world.configure(spec())
    world.settle()
    assert world.report("p")["ready"]


def test_a_pool_that_can_not_be_started_as_things_are_says_why_and_is_tried_when_asked_for() -> None:
    world = World()
    why = "this machine has no GPU 7"
    world.settings = {"p": spec(), "d": on_demand(model="a")}
    world.do(ev.Configure((ev.Wanted(spec(), {"m": "m"}, why), ev.Wanted(on_demand(model="a"), {"a": "a"}, why))))
    world.settle()
    report = world.report("p")
    assert (report["state"], report["last_error"], report["operation"]["state"]) == ("failed", why, "failed")
    assert not world.processes and world.report("d")["swappable"]
    assert world.task("d", "a") is not None
    world.do(ev.Load("p"))
    world.settle()
    assert world.report("p")["ready"] and world.report("d")["ready"]


# ---------------------------------------------------------------- engines of others


def test_settings_may_name_a_pool_of_which_others_handed_over_engines() -> None:
    world = World()
    hand_over(world, replica="r0")
    task = world.task("p")
    world.configure(spec())
    world.settle()
    assert world.serves("p") == ["m"] and ("p", "r1") in world.processes
    assert R0 in world.ready() and world.report("p")["slots_total"] == 5
    assert task is not None and not world.tasks[task].told_to_end


def test_an_engine_with_another_model_than_the_settings_name_stands_by() -> None:
    world = World()
    hand_over(world, model="other")
    world.configure(spec())
    world.settle()
    assert world.report("p")["slots_total"] == 2 and world.report("p")["models"] == ["m"]
    world.configure(spec(model="other"))
    world.settle()
    assert world.report("p")["slots_total"] == 5


def test_what_others_handed_over_stays_when_the_settings_drop_their_pool() -> None:
    world = started(spec())
    name = hand_over(world)
    tasks = [world.task("p") for _ in range(5)]
    assert None not in tasks
    world.configure()
    world.settle(60, tasks_end=True)
    report = world.report("p")
    assert (report["ready"], report["model"], report["slots_total"], report["held"]) == (True, "m", 3, [])
    assert not world.processes and world.task("p") is not None
    assert refused(world, ev.Load("p")).code is Code.INVALID_REQUEST
    del world.files[name]
    world.settle(5)
    assert not world.report("p")["ready"]


def test_a_node_has_room_for_new_names_of_engines_that_others_hand_over() -> None:
    world = started(spec())
    for number in range(300):
        made = Handoff("p", "vllm", "http://127.0.0.1:6000", "m", f"x{number}", slots=1)
        world.pools.handle(ev.HandoffSeen(made), world.now)
        world.pools.handle(ev.HandoffGone(made.file_name), world.now)
    assert len(world.report("p")["replicas"]) == 256
    for number in range(255):
        world.pools.handle(ev.HandoffSeen(Handoff("p", "vllm", "http://127.0.0.1:6000", "m", f"y{number}")), world.now)
    [note] = of(world.do(ev.HandoffSeen(Handoff("p", "vllm", "http://127.0.0.1:6000", "m", "z"))), ev.Note)
    assert "256 replicas already" in note.reason
    world.pools.handle(ev.HandoffGone("p-y7.json"), world.now)
    hand_over(world, replica="last")
    assert ("p", "last") in world.ready()


def test_an_engine_whose_file_goes_while_it_gives_way_to_other_settings_takes_no_task() -> None:
    world = started(on_demand(model="a"))
    task = world.task("d", "a")
    assert task is not None
    world.configure(on_demand())
    del world.files["d-r0.json"]
    world.settle()
    assert (world.report("d")["swappable"], world.report("d")["slots_free"]) == (False, 0)
    world.do(ev.Load("d"))
    world.settle()
    assert world.report("d")["ready"]


def test_a_reload_that_other_settings_end_starts_nothing_for_what_goes() -> None:
    world = started(on_demand())
    assert world.task("d", "a") is not None
    world.do(ev.Reload("d", "c", "c"))
    assert of(world.configure(), ev.Spawn) == []
    world = started(on_demand())
    assert world.task("d", "a") is not None
    world.do(ev.Reload("d", "c", "c"))
    assert of(world.configure(on_demand(slots=1)), ev.Spawn) == []
