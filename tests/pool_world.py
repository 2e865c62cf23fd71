"""A simulated machine for the pools: processes, handoff files and who watches them, probes, tasks, operators, a clock.

It does what pools ask for, as late as it is told to, and checks with everything that happens what must hold always:
nothing runs twice, nothing of others is ended, nothing is accepted beyond the slots, what a report promises is kept,
and no report changes untold.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from llorch.config_pools import PoolSpec
from llorch.errors import Code, LlorchError
from llorch.messages import PoolReport
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff, file_name
from llorch.node.pool_models import comes_and_goes
from llorch.node.pools import Pools

Key = tuple[str, str]  # pool id, replica id
REFUSALS = (Code.ALL_SLOTS_BUSY, Code.MODEL_NOT_AVAILABLE, Code.DRAINING, Code.POOL_NOT_FOUND)


def wanted(spec: PoolSpec) -> ev.Wanted:
    refs = dict.fromkeys([*([spec.model] if spec.model else []), *spec.models])
    return ev.Wanted(spec, {ref.partition("#")[0]: ref for ref in refs})


@dataclass
class Process:
    run: int
    model: str
    ref: str
    slots: int = 2
    ctx: int | None = None
    handoff: Handoff | None = None  # once it is up
    told_to_end: bool = False


@dataclass
class Task:
    pool_id: str
    model: str
    where: Key | None  # the replica whose slot it has; None while it waits for its model
    told_to_end: bool = False


class World:
    def __init__(self, *specs: PoolSpec) -> None:
        self.now = 1_000.0
        self.settings = {spec.id: spec for spec in specs}
        self.broken: set[str] = set()  # references of models that don't load
        self.processes: dict[Key, Process] = {}
        self.files: dict[str, Handoff] = {}
        self.known: dict[str, Handoff] = {}  # to the watcher
        self.probes: dict[Key, tuple[int, Handoff]] = {}
        self.prepares: list[ev.Prepare] = []  # models that are fetched for a reload
        self.room = True  # for two models
        self.tasks: dict[str, Task] = {}
        self.notes: list[ev.Note] = []
        self.ended: dict[str, ev.EndTasks] = {}
        self.last_run: dict[str, int] = {}
        self.reloads: dict[
            str, tuple[str, list[str], dict[str, str], int]
        ] = {}  # ref; models, choices and notes before
        self.ports = 10_000
        self.numbers = 0
        self.adopting: Key | None = None
        self.trying = False  # with a copy of the pools, whose reports are nobody's
        self.promised: dict[str, tuple[Any, ...]] = {}
        self.pools = Pools()
        self.boot()

    def boot(self, wishes: Any = None) -> None:
        """An agent starts, and finds the engines that another left."""
        self.pools = pools = Pools(wanted(spec) for spec in self.settings.values())
        self.known, self.probes, self.prepares, self.tasks, self.last_run, self.reloads = {}, {}, [], {}, {}, {}
        self.reports: dict[str, dict[str, Any]] = {}
        pools.subscribe(lambda pool_id: self._told(pools, pool_id))
        pools.restore(wishes)
        self.reports = {each["pool_id"]: each for each in pools.report()}

    def start(self) -> None:
        self.do(ev.Start())

    def _told(self, pools: Pools, pool_id: str) -> None:
        if self.trying:
            return
        before = self.reports.pop(pool_id, None)
        if pool_id in pools.ids():
            report = self.reports[pool_id] = pools.pool_report(pool_id)
            assert before is None or report["generation"] > before["generation"]

    # ------------------------------------------------------------ what pools ask for

    def do(self, event: ev.Event) -> list[ev.Action]:
        """Tell the pools, and do what they ask for. A wish that is refused changes nothing."""
        before, wishes, choices = self.pools.report(), self.pools.wishes(), self._choices()
        try:
            actions = self.pools.handle(event, self.now)
        except LlorchError:
            assert (before, wishes) == (self.pools.report(), self.pools.wishes()), "refused, and yet changed"
            raise
        for action in actions:
            self._act(action)
        if isinstance(event, ev.Reload) and of(actions, ev.Prepare):
            self.reloads[event.pool_id] = (
                event.ref,
                next(each["models"] for each in before if each["pool_id"] == event.pool_id),
                choices[event.pool_id],
                len(self.notes),
            )
        self.check()
        return actions

    def _act(self, action: ev.Action) -> None:
        match action:
            case ev.Spawn(pool_id, replica_id, run, model, ref):
                assert (pool_id, replica_id) not in self.processes, "it runs already"
                assert run > self.last_run.get(pool_id, 0)
                self.last_run[pool_id] = run
                asked = self.settings[pool_id]
                self.processes[pool_id, replica_id] = Process(run, model, ref, asked.slots, asked.ctx)
            case ev.Prepare():
                self.prepares.append(action)
            case ev.TakeOver(pool_id, replica_id, run, handoff):
                assert self.adopting == (pool_id, replica_id)
                assert self.processes[self.adopting].handoff == handoff
                self.processes[self.adopting].run = self.last_run[pool_id] = run
            case ev.WriteHandoff(handoff):
                key = (handoff.pool_id, handoff.replica_id)
                process = self.processes.get(key)
                assert process is None or process.handoff == handoff, "a file of something else than what runs"
                self.files[handoff.file_name] = handoff
            case ev.Withdraw(handoff):
                assert handoff.pid is None, "only of engines of others"
                self.files.pop(handoff.file_name, None)
            case ev.Probe(pool_id, replica_id, probe, handoff):
                self.probes[pool_id, replica_id] = (probe, handoff)
            case ev.StopProbe(pool_id, replica_id):
                self.probes.pop((pool_id, replica_id), None)
            case ev.Terminate(pool_id, replica_id):
                assert (pool_id, replica_id) in self.processes, "not ours, or not running"
                self.processes[pool_id, replica_id].told_to_end = True
            case ev.Seated(task_id, replica_id, url):
                task = self.tasks[task_id]
                assert task.where is None and not task.told_to_end
                task.where = (task.pool_id, replica_id)
                process = self.processes[task.where]
                assert process.model == task.model and process.handoff is not None and process.handoff.url == url
            case ev.EndTasks(task_ids, code):
                assert task_ids and set(task_ids) <= self.tasks.keys()
                for task_id in task_ids:
                    waited = self.tasks[task_id].where is None
                    assert not (waited and self.tasks[task_id].told_to_end and code is Code.MODEL_NOT_AVAILABLE)
                    self.tasks[task_id].told_to_end = True
                    self.ended[task_id] = action
            case ev.Forget(pool_id):
                assert not any(key[0] == pool_id for key in self.processes), "its files are in use"
            case ev.Note():
                self.notes.append(action)

    # ------------------------------------------------------------ what must hold always

    def check(self) -> None:
        reports = {each["pool_id"]: each for each in self.pools.report()}
        for pool_id, report in reports.items():
            assert self.reports.get(pool_id) == report, "another report, and nobody was told"
            assert self.pools.accepted(pool_id) <= report["slots_total"]
            assert 0 <= report["slots_free"] <= report["slots_total"]
            assert (report["model"] is not None) == report["ready"]
            held = sum(task.pool_id == pool_id for task in self.tasks.values())
            assert self.pools.accepted(pool_id) == held, "a task's slot is nobody's"
        assert self.reports.keys() == reports.keys() >= {task.pool_id for task in self.tasks.values()}
        assert self.pools.accepted() == len(self.tasks)
        for key in self.processes:
            held = sum(task.where == key for task in self.tasks.values())
            assert held <= self.processes[key].slots, "more than the engine has slots"
        for pool_id, report in reports.items():
            self._check_promise(pool_id, report)
            self._check_reload(pool_id, report)

    def _choices(self) -> dict[str, dict[str, str]]:
        return {pool.id: dict(pool.choices) for pool, _ in self.pools.specs()}

    def _check_reload(self, pool_id: str, report: dict[str, Any]) -> None:
        """One that ended otherwise than well has changed nothing."""
        operation = report["operation"]
        if pool_id not in self.reloads or (operation["kind"], operation["state"]) == ("reload", "running"):
            return
        ref, models, before, since = self.reloads.pop(pool_id)
        after = self._choices().get(pool_id, before)
        if (operation["kind"], operation["state"]) == ("reload", "done"):
            assert after[operation["model"]] == ref
        elif not any(note.event == "model.swapped" and note.pool_id == pool_id for note in self.notes[since:]):
            assert after == before
            asked = self.settings.get(pool_id)
            assert asked is None or comes_and_goes(asked) or models == report["models"]

    def _check_promise(self, pool_id: str, report: dict[str, Any]) -> None:
        """What may be sent, is taken."""
        if not report["swappable"] and report["loading"] is None:
            self.promised.pop(pool_id, None)
            return
        promise = (report["swappable"], report["loading"], report["models"], report["model"], report["slots_free"])
        if self.promised.get(pool_id) == promise:
            return
        self.promised[pool_id] = promise
        if report["swappable"]:
            assert report["slots_free"] and report["models"] is not None
        for model in report["models"] if report["swappable"] else ():
            self._try(pool_id, model, backoff=True)
        if report["loading"] is not None and report["slots_free"]:
            self._try(pool_id, report["loading"], backoff=False)

    def _try(self, pool_id: str, model: str, *, backoff: bool) -> None:
        trial, self.trying = copy.deepcopy(self.pools), True
        try:
            lease = trial.acquire(pool_id, "trial", model)
        except LlorchError as error:
            assert backoff and error.code is Code.ALL_SLOTS_BUSY and error.details["swap_in_ms"] > 0, error
            assert error.details["serves"] is None or error.details["serves"] != model
        else:
            assert lease.model == model
        finally:
            self.trying = False

    # ------------------------------------------------------------ what happens

    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do(ev.Tick())

    def comes_up(self, key: Key) -> None:
        process = self.processes[key]
        if process.handoff is not None or process.told_to_end:
            return
        self.ports += 1
        process.handoff = Handoff(
            key[0], "simulated", f"http://127.0.0.1:{self.ports}", process.model, key[1], pid=self.ports,
            slots=process.slots, ctx=process.ctx, api_key_file=f"/run/{key[0]}-{key[1]}.key",
        )  # fmt: skip
        self.do(ev.Spawned(process.run, process.handoff))

    def exits(self, key: Key, reason: str = "exited with code 1", *, hopeless: bool = False) -> None:
        process = self.processes.pop(key)
        name = file_name(*key)
        if process.handoff is not None and self.files.get(name) == process.handoff:
            del self.files[name]
        for task in self.tasks.values():
            task.told_to_end = task.told_to_end or task.where == key  # its connection has ended
        self.do(ev.Exited(*key, process.run, reason, 0.5, hopeless=hopeless))

    def scan(self) -> None:
        """The watcher looks."""
        for name in sorted(self.known.keys() - self.files.keys()):
            del self.known[name]
            self.do(ev.HandoffGone(name))
        for name, handoff in sorted(self.files.items()):
            if self.known.get(name) != handoff:
                self.known[name] = handoff
                self.do(ev.HandoffSeen(handoff))

    def answers(self, key: Key) -> None:
        """A probe is answered: one of an engine of ours by a token, or by its end."""
        number, handoff = self.probes.pop(key)
        process = self.processes.get(key)
        if process is None and handoff.pid is not None:
            return
        if process is not None and process.ref in self.broken:
            self.exits(key, "it does not load")
        else:
            assert process is None or process.handoff == handoff, "another engine is asked than the one that runs"
            self.do(ev.ProbeOk(*key, number))

    def prepared(self, refusal: str | None = None) -> None:
        """The model that is fetched for the longest time is here, or can't be had."""
        asked = self.prepares.pop(0)
        self.do(ev.Prepared(asked.pool_id, asked.model, self.room, refusal, asked.ref))

    def gives_up(self, key: Key) -> None:
        """Of one of others nobody does: it is asked again as long as it is offered."""
        ours = key in self.processes
        number, _ = self.probes.pop(key) if ours else self.probes[key]
        self.do(ev.ProbeFailed(*key, number, "it was not ready in time", gave_up=ours))

    def ready(self) -> list[Key]:
        return [(pool, replica) for pool, replica, state, _ in self.pools.replicas() if state is ev.ReplicaState.READY]

    # ------------------------------------------------------------ tasks

    def task(self, pool_id: str, model: str | None = None) -> str | None:
        """Its id; None if it was refused."""
        self.numbers += 1
        task_id = f"t{self.numbers}"
        before = self.pools.report()
        try:
            lease = self.pools.acquire(pool_id, task_id, model)
        except LlorchError as error:
            assert error.code in REFUSALS
            assert before == self.pools.report(), "refused, and yet changed"
            return None
        assert model in (None, lease.model)
        key = None if lease.replica_id is None else (pool_id, lease.replica_id)
        self.tasks[task_id] = Task(pool_id, lease.model, key)
        if key in self.processes:
            assert self.processes[key].model == lease.model
        self.check()
        return task_id

    def ends(self, task_id: str) -> None:
        del self.tasks[task_id]
        self.pools.release(task_id)
        generation = [each["generation"] for each in self.pools.report()]
        self.pools.release(task_id)
        assert generation == [each["generation"] for each in self.pools.report()]
        self.check()

    # ------------------------------------------------------------ the agent ends, and another comes

    def agent_restarts(self, *, keeping: Iterable[Key] = ()) -> list[Key]:
        """SIGKILL of the agent. Which of the engines were taken over; those that are not to be kept are gone."""
        wishes = json.loads(json.dumps(self.pools.wishes()))
        kept = [key for key in keeping if self.processes[key].handoff is not None]
        self.processes = {key: self.processes[key] for key in kept}
        self.files = {name: each for name, each in self.files.items() if each.pid is None and each.engine == "vllm"}
        self.boot(wishes)
        adopted = []
        for key in kept:
            process = self.processes[key]
            process.told_to_end = False
            assert process.handoff is not None
            self.adopting = key
            before = self.pools.report()
            if self.do(ev.Adopted(process.model, process.ref, process.handoff)):
                adopted.append(key)
            else:
                assert before == self.pools.report(), "not taken over, and yet changed"
                del self.processes[key]
        self.adopting = None
        self.start()
        return adopted

    def configure(self, *specs: PoolSpec) -> list[ev.Action]:
        changed = self.settings.items() ^ {spec.id: spec for spec in specs}.items()
        for pool_id, _ in changed:
            self.reloads.pop(pool_id, None)
        self.settings = {spec.id: spec for spec in specs}
        return self.do(ev.Configure(tuple(map(wanted, specs))))

    # ------------------------------------------------------------ a world that behaves

    def step(self, seconds: float = 1.0) -> None:
        """Everything that is due happens: starts, ends, looks at files, answers, ends of tasks that were told to."""
        for key in list(self.processes):
            if key in self.processes and self.processes[key].told_to_end:
                self.exits(key, "exited with code 0")
        for key in list(self.processes):
            if key in self.processes:
                self.comes_up(key)
        while self.prepares:
            self.prepared()
        self.scan()
        for key in list(self.probes):
            if key in self.probes:
                self.answers(key)
        for task_id in [task_id for task_id, task in self.tasks.items() if task.told_to_end]:
            self.ends(task_id)
        self.time_passes(seconds)

    def _at_rest(self) -> bool:
        coming = any(each.handoff is None or each.told_to_end for each in self.processes.values())
        return not coming and not self.probes and self.files == self.known

    def settle(self, seconds: float = 30.0, *, tasks_end: bool = False) -> None:
        """Time passes, and everything that is due happens. Far apart only where nothing is about to happen."""
        until = self.now + seconds
        while self.now < until:
            self.step(10.0 if self._at_rest() else 1.0)
            if tasks_end:
                for task_id in [task_id for task_id, task in self.tasks.items() if task.where is not None]:
                    self.ends(task_id)

    def report(self, pool_id: str) -> dict[str, Any]:
        report = self.pools.pool_report(pool_id)
        PoolReport.model_validate(report)
        return report

    def operation(self, pool_id: str) -> dict[str, Any]:
        operation: dict[str, Any] = self.report(pool_id)["operation"]
        return operation

    def serves(self, pool_id: str) -> list[str]:
        """The references that its ready engines were started with."""
        return sorted(self.processes[key].ref for key in self.ready() if key[0] == pool_id and key in self.processes)

    def runs(self, pool_id: str) -> list[str]:
        return sorted(process.ref for key, process in self.processes.items() if key[0] == pool_id)


def spec(pool_id: str = "p", **changes: Any) -> PoolSpec:
    return replace(PoolSpec(id=pool_id, engine="simulated", model="m", slots=2), **changes)


def on_demand(pool_id: str = "d", **changes: Any) -> PoolSpec:
    return replace(PoolSpec(id=pool_id, engine="simulated", models=("a", "b"), slots=2), **changes)


def external(pool_id: str = "e", **changes: Any) -> PoolSpec:
    made = PoolSpec(id=pool_id, engine="external", model="x", url="http://127.0.0.1:7000", slots=2)
    return replace(made, **changes)


def started(*specs: PoolSpec) -> World:
    """A world in which whatever the settings ask for is ready."""
    world = World(*specs)
    world.start()
    world.settle(20)
    return world


def refused(world: World, event: ev.Event) -> LlorchError:
    """The refusal of a wish; that it changed nothing was checked."""
    try:
        world.do(event)
    except LlorchError as error:
        return error
    raise AssertionError(f"{event} was granted")


def of(actions: Iterable[ev.Action], kind: type[ev.Action]) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]
