"""The pools of this node: which engines there are, which of them may be used, and who holds a slot of which.

Surface:
    Pools(wanted)                        what the settings ask for
    restore(wishes), wishes()            what operators asked for, which outlives the agent
    handle(event, now) -> list[Action]   everything that happens, in the words of `pool_events`; do the actions in order
    acquire(pool_id, task_id, model)     a slot: a Lease, or LlorchError; release(task_id) gives it back, however often
    told(task_id, failed, now)           before the release: how the task went at its engine, where that says something
    report(), pool_report(id), health(id)    CONTRACT's PoolReport and health, as dicts
    subscribe(callback)                  called with a pool id when its report has changed (its `generation` went up)

Owns the set of pools, and hands every event to whom it concerns: `replica_life` (how an engine comes and goes),
`pool_handoffs` (what files mean), `pool_operations` (which engines should run), `pool_models` (with which model),
`slots` (who holds what). A replica that was handed over goes the same way as one that was spawned; they differ in
`owned`, and only owned ones are ever terminated. Pure: no clock, no process, no file. `now` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from llorch.config_pools import PoolSpec
from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from llorch.node.modelref import model_id
from llorch.node.pool_events import Action, Event, ReplicaState, Step, Wanted, step
from llorch.node.pool_handoffs import Handoffs
from llorch.node.pool_models import EXTERNAL, Models, first_model
from llorch.node.pool_operations import ENDED_FOR_DRAIN, Operations
from llorch.node.pool_outfit import outfit
from llorch.node.pool_wishes import restore, wish_of
from llorch.node.replica_life import Life
from llorch.node.replicas import DOWN, MAX_WHY_CHARS, Lease, Pool, Replica, average
from llorch.node.slots import Slots


class Pools:
    """Every pool of this node. One owner calls it, from one thread."""

    def __init__(self, wanted: Iterable[Wanted] = ()) -> None:
        self.drained: str | None = None  # why, if an operator wants no tasks here
        self.leaving = False
        self._pools: dict[str, Pool] = {}
        self._slots = Slots(self._pools, self._changed)
        self._life = Life(self._pools, self._changed)
        self._handoffs = Handoffs(self._pools, self._life, self._changed)
        self._models = Models(self._changed)
        self._operations = Operations(self._life, self._models, self._changed)
        self._listeners: list[Callable[[str], None]] = []
        self._untold: dict[str, Pool] = {}
        self._generation = 0  # the highest that any report had: one that comes back under its name goes on from there
        self._after: dict[str, Wanted] = {}  # pools that come once one of the same name has gone
        self._task_deadline: float | None = None
        self._now = 0.0
        for each in wanted:
            self._pools[each.spec.id] = _made(each)

    @property
    def draining(self) -> bool:
        return self.leaving or self.drained is not None

    def subscribe(self, callback: Callable[[str], None]) -> None:
        self._listeners.append(callback)

    def _changed(self, pool: Pool) -> None:
        """Its report is another. That is told once whatever happens has happened."""
        self._untold[pool.id] = pool

    def _tell(self) -> None:
        told, self._untold = self._untold, {}
        for pool in told.values():
            pool.generation = (pool.generation or self._generation) + 1
            self._generation = max(self._generation, pool.generation)
        for pool_id in told:
            for callback in self._listeners:
                callback(pool_id)

    # ------------------------------------------------------------ what outlives the agent

    def wishes(self) -> dict[str, Any]:
        """What operators asked for, as JSON: drains, unloaded pools, models other than the settings'."""
        pools = {pool.id: wish for pool in self._pools.values() if (wish := wish_of(pool))}
        return {"drained": self.drained, "pools": pools}

    def restore(self, wishes: Any) -> None:
        """Before Start: what `wishes` said once, as it was read. Pools that are gone or were changed since are left
        out, and so is whatever `wishes` does not say."""
        wishes = wishes if isinstance(wishes, Mapping) else {}
        drained, pools = wishes.get("drained"), wishes.get("pools")
        self.drained = drained[:MAX_WHY_CHARS] if isinstance(drained, str) else None
        for each in self._pools.values():
            each.node_drained = self.drained
        for pool_id, wish in pools.items() if isinstance(pools, Mapping) else ():
            pool = self._pools.get(pool_id)
            if pool is not None and isinstance(wish, Mapping):
                restore(pool, wish)

    # ------------------------------------------------------------ slots

    def acquire(self, pool_id: str, task_id: str, model: str | None = None) -> Lease:
        """A slot of the least busy ready replica, until `release(task_id)`. Raises LlorchError, with nothing taken.

        Of a pool that loads on demand it may be a slot ahead: one of `model`, which is then on its way.
        """
        try:
            return self._acquire(self._pool(pool_id), task_id, model)
        finally:
            self._tell()

    def _acquire(self, pool: Pool, task_id: str, model: str | None) -> Lease:
        if self.draining or pool.draining:
            raise LlorchError(Code.DRAINING, f"{'this node' if self.draining else f'pool {pool.id}'} is draining")
        self._slots.check_new(task_id)
        model = model or pool.model or next(iter([*pool.loadable, *pool.choices]), None)
        if model != pool.model:
            if not pool.on_demand or not pool.loaded or model is None or model not in pool.choices:
                raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"pool {pool.id} serves {pool.model}")
            self._models.demand(pool, model, self._now)
        if pool.ready:
            return self._slots.take(pool, task_id)
        if pool.on_its_way is not None:
            return self._slots.take_ahead(pool, task_id)
        state = pool.state(self.draining)
        raise LlorchError(
            Code.MODEL_NOT_AVAILABLE,
            f"pool {pool.id} is {state}",
            details={"state": state.value, "last_error": pool.last_error},
        )

    def release(self, task_id: str) -> None:
        """Give the slot back. A task that holds none is no error: whoever ends a task may say so."""
        self._slots.give_back(task_id)
        self._tell()

    def told(self, task_id: str, failed: bool, now: float) -> None:
        """How a task, which still holds its slot, went at its engine."""
        self._slots.told(task_id, failed, now)
        self._tell()

    def accepted(self, pool_id: str | None = None) -> int:
        """Tasks that hold a slot, of one pool or of all."""
        return self._slots.accepted(pool_id)

    # ------------------------------------------------------------ what happens

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in what happened; what is to be done about it. Stale and repeated events do nothing.

        Raises LlorchError for a wish that can't be granted, with nothing changed.
        """
        self._now = now
        try:
            return self._handle(event, now)
        finally:
            self._tell()

    def _handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case ev.Start():
                pools = list(self._pools.values())
                return [action for pool in pools for action in self._operations.begin_load(pool, now)]
            case ev.Tick():
                return self._tick(now)
            case ev.Configure():
                return self._configure(event.wanted, now)
            case ev.Leave():
                self.leaving = True
                return self._told_all()
            case ev.Drain(None) | ev.Undrain(None):
                return self._drain_node(event, now)
            case ev.HandoffSeen():
                actions = self._handoffs.seen(event.handoff, now)
                if (pool := self._pools.get(event.handoff.pool_id)) is not None:
                    pool.node_drained = self.drained  # it may be new
                return actions
            case ev.HandoffBad():
                return self._handoffs.bad(event.name, event.reason, now)
            case ev.HandoffGone():
                return self._handoffs.gone(event.name, "its handoff file was removed", now)
            case (
                ev.Drain()
                | ev.Undrain()
                | ev.Hold()
                | ev.Load()
                | ev.Unload()
                | ev.Reload()
                | ev.Prepared()
                | ev.Restart()
                | ev.Purge()
            ):
                return self._asked(event, now)
            case _:
                return self._engine(event, now)

    def _engine(self, event: Event, now: float) -> list[Action]:
        """What becomes of an engine."""
        match event:
            case ev.Spawned():
                return self._life.spawned(event, now)
            case ev.Adopted():
                return self._adopted(event, now)
            case ev.Progress():
                return self._progress(event)
            case ev.Exited():
                ended = self._life.exited(event, now)
                return [] if ended is None else ended[1] + self._operations.exited(ended[0], event, now)
            case ev.ProbeOk():
                actions = self._life.answered(event, now)
                if actions:
                    pool, replica = self._pools[event.pool_id], self._pools[event.pool_id].replicas[event.replica_id]
                    actions += [*self._operations.proven(pool, replica, now), *self._seats(pool)]
                return actions
            case ev.ProbeFailed():
                return self._life.probe_failed(event)
            case ev.EngineLost():
                return self._life.lost(event, now)
            case ev.Stalled():
                return self._life.stalled(event, now)
            case _:
                raise AssertionError(f"nobody takes {type(event).__name__}")

    def _asked(self, event: Event, now: float) -> list[Action]:
        """What somebody wants of one pool."""
        wishes = self._operations
        match event:
            case ev.Drain(str(pool_id)):
                return wishes.drain(self._pool(pool_id), event, now)
            case ev.Undrain(str(pool_id)):
                return wishes.undrain(self._pool(pool_id), event, now)
            case ev.Hold():
                return wishes.hold(self._pool(event.pool_id), event, now)
            case ev.Load():
                return wishes.load(self._pool(event.pool_id), event, now)
            case ev.Unload():
                return wishes.unload(self._pool(event.pool_id), event, now)
            case ev.Reload():
                return wishes.reload(self._pool(event.pool_id), event, now)
            case ev.Restart():
                return wishes.restart(self._pool(event.pool_id), event, now)
            case ev.Purge():
                return wishes.purge(self._pool(event.pool_id), event)
            case ev.Prepared():
                pool = self._pools.get(event.pool_id)
                return [] if pool is None else wishes.prepared(pool, event, now)
            case _:
                raise AssertionError(f"nobody takes {type(event).__name__}")

    def _tick(self, now: float) -> list[Action]:
        actions: list[Action] = list(self._slots.tick(now))
        for pool in list(self._pools.values()):
            actions += [*self._operations.pass_time(pool, now), *self._seats(pool)]
            if pool.leaves and not pool.waiting and all(map(_over, pool.replicas.values())):
                actions += self._gone(pool, now)
        if self._task_deadline is not None and now >= self._task_deadline:
            self._task_deadline = None
            if tasks := tuple(self._slots.holders()):
                for pool in self._pools.values():
                    pool.waiting.update(dict.fromkeys(pool.waiting))
                actions.append(
                    ev.EndTasks(tasks, Code.DRAINING, ENDED_FOR_DRAIN.format(what="the node", why="drained"))
                )
        return actions

    def _gone(self, pool: Pool, now: float) -> list[Action]:
        """Of a pool that was to go, nothing of ours is left. What others handed over stays, as if it always had been
        all there is."""
        self._changed(pool)
        pool.replicas = {replica.id: replica for replica in pool.replicas.values() if not replica.spawned}
        if again := self._after.pop(pool.id, None):
            pool.leaves, pool.operation, pool.last_error = False, None, None
            return self._operations.configure(pool, again, now)
        offered = [replica.handoff for replica in pool.replicas.values() if replica.handoff is not None]
        if offered:
            pool.leaves, pool.operation, pool.last_error, pool.spec = False, None, None, None
            pool.on_demand, pool.loaded, pool.choices, pool.ctx = False, True, {}, offered[-1].ctx
            pool.model, pool.engine, pool.version = offered[-1].model, offered[-1].engine, offered[-1].engine_version
            pool.device_mask = offered[-1].device_mask
        else:
            del self._pools[pool.id]
        return []

    def _seats(self, pool: Pool) -> list[Action]:
        """Slots for the tasks that waited for their model."""
        return [
            ev.Seated(lease.task_id, lease.replica_id or "", lease.url, lease.api_key_file, lease.trial)
            for lease in self._slots.seat(pool)
        ]

    def _drain_node(self, wish: ev.Drain | ev.Undrain, now: float) -> list[Action]:
        draining = isinstance(wish, ev.Drain)
        self.drained = wish.reason if isinstance(wish, ev.Drain) else None
        until_s = wish.deadline_s if isinstance(wish, ev.Drain) else None
        self._task_deadline = None if until_s is None else now + until_s
        actions: list[Action] = [
            ev.Note("node.drained" if draining else "node.undrained", None, None, self.drained or "")
        ]
        for pool in self._pools.values():
            actions += self._operations.drain_with_node(pool, self.drained, wish.at)
        return actions + self._told_all()

    def _told_all(self) -> list[Action]:
        for pool in self._pools.values():
            self._changed(pool)
        return []

    def _adopted(self, event: ev.Adopted, now: float) -> list[Action]:
        """Nothing, if no pool of the settings wants it: whoever offered it ends it then."""
        handoff, pool = event.handoff, self._pools.get(event.handoff.pool_id)
        if pool is None or pool.spec is None or pool.leaves or not pool.loaded or handoff.model != event.model:
            return []
        said, spec = (handoff.engine, handoff.slots, handoff.ctx), pool.spec
        if pool.choices.get(event.model) != event.ref or said != (spec.engine, spec.slots, spec.ctx):
            return []  # the settings are others now
        if any(replica.owned and replica.run and replica.model != event.model for replica in pool.replicas.values()):
            return []
        replica = pool.replicas.get(handoff.replica_id)
        if replica is None:
            replica = next((each for each in pool.replicas.values() if each.owned and not each.run), None)
            if replica is None:
                return []
            del pool.replicas[replica.id]
            replica.id = handoff.replica_id
            pool.replicas[replica.id] = replica
        if replica.run or not replica.owned:
            return []
        pool.model = event.model
        return self._life.taken_over(pool, replica, event, now)

    def _progress(self, event: ev.Progress) -> list[Action]:
        pool = self._pools.get(event.pool_id)
        if pool is None:
            return []
        if event.replica_id is not None:
            found = self._life.find(event.pool_id, event.replica_id)
            if found is None or found[1].run != event.run:
                return []
        elif pool.reloading is None or not pool.reloading.preparing:
            return []
        operation = pool.operation
        text = event.text[:MAX_WHY_CHARS]
        if operation is not None and operation.running and operation.message != text:
            operation.message = text
            self._changed(pool)
        return []

    # ------------------------------------------------------------ other settings

    def _configure(self, wanted: Iterable[Wanted], now: float) -> list[Action]:
        actions: list[Action] = []
        there = {each.spec.id: each for each in wanted}
        self._after.clear()
        for pool in list(self._pools.values()):
            if pool.spec is not None and pool.id not in there and not pool.leaves:
                actions += [ev.Note("pool.removed", pool.id, None, ""), *self._operations.remove(pool, now)]
        for pool_id, each in there.items():
            old = self._pools.get(pool_id)
            if old is None:
                pool = self._pools[pool_id] = _made(each)
                pool.node_drained = self.drained
                self._changed(pool)
                actions += [ev.Note("pool.added", pool_id, None, ""), *self._operations.begin_load(pool, now)]
            elif old.spec is None:  # others have handed over engines of that name
                actions += self._operations.configure(old, each, now)
            elif old.leaves or (old.spec.engine == EXTERNAL) != (each.spec.engine == EXTERNAL):
                self._after[pool_id] = each  # it comes back as another, once its engines have gone
                actions += self._operations.remove(old, now)
            elif old.spec != each.spec:
                actions += self._operations.configure(old, each, now)
        return actions

    # ------------------------------------------------------------ what others may know

    def _pool(self, pool_id: str) -> Pool:
        try:
            return self._pools[pool_id]
        except KeyError:
            raise LlorchError(Code.POOL_NOT_FOUND, f"this node has no pool {pool_id}") from None

    def _each(self) -> Iterator[tuple[Pool, Replica]]:
        for pool in self._pools.values():
            for replica in pool.replicas.values():
                yield pool, replica

    def measured(self, pool_id: str, *, prompt_tps: float | None, decode_tps: float | None) -> None:
        """The speed of a task that has ended; reports carry a moving average of it."""
        pool = self._pools.get(pool_id)
        if pool is not None:
            pool.prompt_tps = average(pool.prompt_tps, prompt_tps)
            pool.decode_tps = average(pool.decode_tps, decode_tps)

    def ids(self) -> list[str]:
        return list(self._pools)

    def specs(self) -> list[tuple[Pool, PoolSpec]]:
        """The pools of the settings, for whoever judges their GPUs and hours."""
        return [(pool, pool.spec) for pool in self._pools.values() if pool.spec is not None]

    def ref_of(self, pool_id: str, model: str) -> str | None:
        """The reference of one of a pool's models, or of the one in its settings; None if it is none of those. Raises
        POOL_NOT_FOUND."""
        pool = self._pool(pool_id)
        declared = pool.spec.model if pool.spec is not None else None
        if declared is not None and model not in pool.choices and model_id(declared) == model:
            return declared
        return pool.choices.get(model)

    def models(self) -> set[str]:
        """The ids of all models that some pool runs, may load, is reloaded to, or goes back to if that fails."""
        found = {model for pool in self._pools.values() for model in pool.choices}
        found.update(replica.model for _, replica in self._each() if replica.model is not None)
        for pool in self._pools.values():
            if pool.reloading is not None:
                found.add(pool.reloading.model or "")
                found.update(pool.reloading.before.choices if pool.reloading.before is not None else ())
        return found

    def pids(self) -> list[int]:
        """Of the engines that said theirs."""
        return [replica.handoff.pid for _, replica in self._each() if replica.handoff and replica.handoff.pid]

    def replicas(self) -> list[tuple[str, str, ReplicaState, Handoff | None]]:
        """(pool id, replica id, state, accepted handoff) of every replica, for whoever watches engines."""
        return [(pool.id, replica.id, replica.state, replica.handoff) for pool, replica in self._each()]

    def busy(self, pool_id: str, replica_id: str) -> bool:
        """Whether a task holds a slot of this replica."""
        found = self._life.find(pool_id, replica_id)
        return found is not None and bool(found[1].held)

    def pool_report(self, pool_id: str) -> dict[str, Any]:
        """One PoolReport. The VRAM figures are added by whoever knows the GPUs. Raises POOL_NOT_FOUND."""
        return self._pool(pool_id).report(self.draining)

    def report(self) -> list[dict[str, Any]]:
        return [pool.report(self.draining) for pool in self._pools.values()]

    def health(self, pool_id: str) -> dict[str, Any]:
        """What `GET /v2/pools/{pool}/health` answers. Raises POOL_NOT_FOUND."""
        return self._pool(pool_id).health(self.draining)


# ---------------------------------------------------------------- from settings and wishes to pools


def _made(wanted: Wanted) -> Pool:
    pool = Pool(wanted.spec.id, wanted.spec.engine, first_model(wanted), wanted.spec)
    outfit(pool, wanted)
    if wanted.refusal is not None:
        pool.last_error = wanted.refusal
        if pool.on_demand:
            pool.model = None  # a task that asks for it has it tried again, as has an operator's load
        else:
            for replica in pool.own:
                replica.state = step(replica.state, Step.GAVE_UP)
    return pool


def _over(replica: Replica) -> bool:
    """Whether nothing of it is left that would be in the way of the pool's end."""
    if replica.state not in DOWN:
        return not replica.spawned
    return not replica.held
