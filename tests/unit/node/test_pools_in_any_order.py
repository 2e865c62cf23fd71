"""The pools in a world where everything happens in any order, and where in the end everything behaves."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from llorch.config_pools import PoolSpec
from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from tests.pool_world import World, external, on_demand, spec

VARIANTS: Mapping[str, tuple[PoolSpec | None, ...]] = {
    "p": (
        spec(), spec(replicas=2), spec(replicas=2, slots=1), spec(model="m2"), spec(idle_unload_s=20.0), None,
        spec(yield_to_owner=True),
        spec(engine="external", url="http://127.0.0.1:7001"),
    ),
    "d": (
        on_demand(), on_demand(replicas=2), on_demand(models=("a",), idle_unload_s=20.0), on_demand(model="a"),
        on_demand(slots=1, replicas=2), None, spec("d", model="a"),
    ),
    "e": (external(), external(url="http://127.0.0.1:7002"), None),
}  # fmt: skip
MODELS = {"p": ("m",), "d": ("a", "b"), "e": ("x",)}
BAD = "b"  # may be broken for good
SETTLED_S = 700  # some five starts with their backoffs, twice, and the 15 s of a handoff that nobody saw


class AnyOrder(RuleBasedStateMachine):
    POOLS: tuple[str, ...] = ("p", "d", "e")

    @initialize(data=st.data())
    def begins(self, data: st.DataObject) -> None:
        self.data: st.DataObject
        specs = {pool_id: data.draw(st.sampled_from(VARIANTS[pool_id])) for pool_id in self.POOLS}
        self.world = World(*(each for each in specs.values() if each is not None))
        self.before: dict[str, tuple[object, ...]] = {}
        self.world.start()

    def wish(self, event: ev.Event) -> None:
        try:
            self.world.do(event)
        except LlorchError as error:
            assert error.code in (Code.CONFLICT, Code.INVALID_REQUEST, Code.POOL_NOT_FOUND)

    # ------------------------------------------------------------ the world

    @rule(seconds=st.sampled_from([0.1, 1, 5, 31, 400]))
    def time_passes(self, seconds: float) -> None:
        self.world.time_passes(seconds)

    @rule(count=st.integers(1, 6))
    def all_goes_on(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.world.processes)
    @rule(data=st.data(), how=st.sampled_from(["up", "up", "exits", "exits", "hopeless"]))
    def process(self, data: st.DataObject, how: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.world.processes)))
        if how == "up":
            self.world.comes_up(key)
        else:
            self.world.exits(key, hopeless=how == "hopeless")

    @rule()
    def watcher_looks(self) -> None:
        self.world.scan()

    @precondition(lambda self: self.world.probes)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def probe(self, data: st.DataObject, ok: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.world.probes)))
        (self.world.answers if ok else self.world.gives_up)(key)

    @rule(data=st.data(), what=st.sampled_from([ev.EngineLost, ev.Stalled]))
    def engine(self, data: st.DataObject, what: type[ev.EngineLost | ev.Stalled]) -> None:
        if ready := self.world.ready():
            self.world.do(what(*data.draw(st.sampled_from(sorted(ready))), "it does nothing"))

    @precondition(lambda self: self.world.files)
    @rule(data=st.data())
    def file_goes(self, data: st.DataObject) -> None:
        del self.world.files[data.draw(st.sampled_from(sorted(self.world.files)))]

    @rule(pool=st.sampled_from(["p", "d", "f"]), replica=st.sampled_from(["r0", "x"]), model=st.sampled_from("ma"))
    def others_hand_over(self, pool: str, replica: str, model: str) -> None:
        made = Handoff(pool, "vllm", "http://127.0.0.1:6000", model, replica, slots=2)
        self.world.files[made.file_name] = made

    # ------------------------------------------------------------ people and tasks

    @rule(data=st.data())
    def task_comes(self, data: st.DataObject) -> None:
        pool = data.draw(st.sampled_from(self.POOLS))
        self.world.task(pool, data.draw(st.sampled_from([*MODELS[pool], None])))

    @precondition(lambda self: self.world.tasks)
    @rule(data=st.data())
    def task_ends(self, data: st.DataObject) -> None:
        self.world.ends(data.draw(st.sampled_from(sorted(self.world.tasks))))

    @rule(data=st.data(), what=st.sampled_from([ev.Load, ev.Unload, ev.Restart, ev.Purge, ev.Undrain]))
    def operator(self, data: st.DataObject, what: type[ev.Load | ev.Unload | ev.Restart | ev.Purge]) -> None:
        self.wish(what(data.draw(st.sampled_from(self.POOLS))))

    @rule(data=st.data(), what=st.sampled_from([ev.Unload, ev.Restart]), deadline_s=st.sampled_from([0.0, 10.0]))
    def operator_is_in_a_hurry(
        self, data: st.DataObject, what: type[ev.Unload | ev.Restart], deadline_s: float
    ) -> None:
        self.wish(what(data.draw(st.sampled_from(self.POOLS)), None, deadline_s))

    @rule(model=st.sampled_from(["a", "b"]))
    def operator_loads(self, model: str) -> None:
        self.wish(ev.Load("d", model))

    @rule(
        data=st.data(), ref=st.sampled_from(["m", "m#2", "a", "a#2", "b"]), at_once=st.booleans(),
        deadline_s=st.sampled_from([None, 0.0, 10.0]),
    )  # fmt: skip
    def operator_reloads(self, data: st.DataObject, ref: str, at_once: bool, deadline_s: float | None) -> None:
        pool = data.draw(st.sampled_from(self.POOLS))
        self.wish(ev.Reload(pool, ref.partition("#")[0], ref, None, deadline_s))
        if at_once and self.world.prepares:
            self.world.prepared()

    @precondition(lambda self: self.world.prepares)
    @rule(refusal=st.sampled_from([None, None, "it can't be had"]))
    def model_is_fetched(self, refusal: str | None) -> None:
        self.world.prepared(refusal)

    @rule(room=st.booleans())
    def there_is_room_for_two(self, room: bool) -> None:
        self.world.room = room

    @rule(data=st.data(), deadline_s=st.sampled_from([None, 0.0, 10.0]))
    def drain(self, data: st.DataObject, deadline_s: float | None) -> None:
        self.wish(ev.Drain(data.draw(st.sampled_from([*self.POOLS, None])), "", deadline_s))

    @rule(data=st.data())
    def undrain(self, data: st.DataObject) -> None:
        self.wish(ev.Undrain(data.draw(st.sampled_from([*self.POOLS, None]))))

    @rule(data=st.data(), who=st.sampled_from(["owner", "hours"]), why=st.sampled_from(["busy", None]))
    def hold(self, data: st.DataObject, who: str, why: str | None) -> None:
        self.wish(ev.Hold(data.draw(st.sampled_from(self.POOLS)), who, why))

    @rule(data=st.data())
    def settings_change(self, data: st.DataObject) -> None:
        pool = data.draw(st.sampled_from(self.POOLS))
        chosen = data.draw(st.sampled_from(VARIANTS[pool]))
        others = [each for each in self.world.settings.values() if each.id != pool]
        self.world.configure(*others, *([chosen] if chosen is not None else []))

    @rule(data=st.data(), broken=st.booleans())
    def model_breaks_or_is_mended(self, data: st.DataObject, broken: bool) -> None:
        (self.world.broken.add if broken else self.world.broken.discard)(
            data.draw(st.sampled_from(["m", "m#2", "a", "b"]))
        )

    @rule(data=st.data())
    def agent_restarts(self, data: st.DataObject) -> None:
        keys = sorted(self.world.processes)
        keeping = data.draw(st.sets(st.sampled_from(keys))) if keys else ()
        self.world.agent_restarts(keeping=sorted(keeping))

    # ------------------------------------------------------------ in the end

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.broken.clear()
            self.world.settle(SETTLED_S, tasks_end=True)
            self.every_task_has_ended_and_every_operation_too()
            self.whoever_asks_gets_what_the_settings_say()

    def every_task_has_ended_and_every_operation_too(self) -> None:
        world = self.world
        assert not world.tasks
        for report in world.pools.report():
            assert (report["operation"] or {}).get("state") != "running", report
        others = {report["pool_id"] for report in world.pools.report() if not report["replicas"][0]["owned"]}
        assert set(world.pools.ids()) - others <= world.settings.keys() <= set(world.pools.ids())

    def whoever_asks_gets_what_the_settings_say(self) -> None:
        world = self.world
        self.wish(ev.Undrain())
        for pool_id in world.settings:
            for who in ("owner", "hours"):
                world.do(ev.Hold(pool_id, who, None))
            world.do(ev.Undrain(pool_id))
            world.do(ev.Load(pool_id))
        world.settle(40)
        for pool_id, each in world.settings.items():
            report = world.report(pool_id)
            assert (report["ready"] or each.idle_unload_s) and report["operation"]["state"] == "done", report
            own = [replica for replica in report["replicas"] if replica["owned"]]
            if each.engine == "external":
                assert not own
                continue
            assert len(own) == each.replicas
            running = [process for key, process in world.processes.items() if key[0] == pool_id]
            assert len(running) == (each.replicas if report["ready"] else 0)
            assert len({process.ref for process in running}) <= 1
        self.models_take_turns()

    def models_take_turns(self) -> None:
        world = self.world
        each = world.settings.get("d")
        if each is None or not (each.models or each.idle_unload_s):
            return
        for model in world.report("d")["models"]:
            world.settle(40)
            task = world.task("d", model)
            assert task is not None, world.report("d")
            world.settle(30)
            assert world.tasks[task].where is not None
            world.ends(task)


class OwnPool(AnyOrder):
    POOLS = ("p",)


class OnDemandPool(AnyOrder):
    POOLS = ("d",)


for machine, examples in ((AnyOrder, 12), (OwnPool, 12), (OnDemandPool, 12)):
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
TestOwnPool = OwnPool.TestCase
TestOnDemandPool = OnDemandPool.TestCase
