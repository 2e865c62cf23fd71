"""What pools are asked to do, and what makes them do it: load, unload, reload, restart, drain, hold, swap, idle.

Owns which replicas should run with which model, and the way from what is to what should be: a replica is stopped when
its last task has ended, and started when nothing speaks against it. Each wish is idempotent, is told as the pool's
`operation`, and ends as done or failed. How a replica starts and ends is `replica_life`'s. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llorch.config_pools import PoolSpec
from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.pool_events import Action, ReplicaState, Step, Wanted, step
from llorch.node.replica_life import Life
from llorch.node.replicas import COMING, DOWN, OPERATOR, Operation, Pool, Replica

MODEL_KEPT_S = 30.0  # once loaded, so that two controls can't have models loaded by turns for nothing
RELOAD = "reload"
EXTERNAL = "external"  # engines that someone else runs
ENDED_FOR_DRAIN = "the node was drained, and the time that tasks were given is over"


def comes_and_goes(spec: PoolSpec) -> bool:
    """Whether the models of a pool are loaded when a task asks for them."""
    return spec.engine != EXTERNAL and (bool(spec.models) or spec.idle_unload_s is not None)


def first_model(wanted: Wanted) -> str | None:
    """What a pool begins with."""
    if wanted.spec.model is None and comes_and_goes(wanted.spec):
        return None
    return next(iter(wanted.choices), None)


class Operations:
    """`changed` is called with a pool whose report has changed."""

    def __init__(self, pools: Mapping[str, Pool], life: Life, changed: Callable[[Pool], None]) -> None:
        self._pools = pools
        self._life = life
        self._changed = changed

    # ------------------------------------------------------------ wishes

    def load(self, pool: Pool, wish: ev.Load, now: float) -> list[Action]:
        """Failed replicas too, and at once. Raises INVALID_REQUEST for a model that is not the pool's."""
        if wish.model is not None and wish.model not in pool.choices:
            raise LlorchError(
                Code.INVALID_REQUEST,
                f"pool {pool.id} has no model {wish.model}",
                param="model",
                hint=f"it has {', '.join(pool.choices)}; or llorch pool reload",
            )
        self._must_be_declared(pool)
        self._check_reload(pool)
        model = wish.model or pool.model or next(iter(pool.choices), None)
        actions = self._begin(pool, "load", wish.at, model)
        pool.loaded = True
        self.forget_failures(pool)
        if pool.model != model:
            self._turn_to(pool, model, now)
        for replica in pool.replicas.values():
            self._try_again(replica)
        return actions + self.settle(pool, now)

    def unload(self, pool: Pool, wish: ev.Unload, now: float) -> list[Action]:
        self._must_be_ours(pool)
        self._check_reload(pool)
        actions = self._begin(pool, "unload", wish.at, pool.model)
        pool.loaded = False
        return actions + self.settle(pool, now)

    def restart(self, pool: Pool, wish: ev.Restart, now: float) -> list[Action]:
        self._must_be_ours(pool)
        self._check_reload(pool)
        if pool.operation is not None and pool.operation.running and pool.operation.kind == "restart":
            return []
        actions = self._begin(pool, "restart", wish.at, pool.model)
        pool.loaded = True
        self.forget_failures(pool)
        for replica in list(pool.replicas.values()):
            self._try_again(replica)
            actions += self._retire(pool, replica)
        return actions + self.settle(pool, now)

    def reload(self, pool: Pool, wish: ev.Reload, now: float) -> list[Action]:
        """Serve another model; the old one until the new one is proven, where there is memory for both."""
        self._must_be_ours(pool)
        running = pool.operation
        if running is not None and running.running and running.kind == RELOAD:
            if running.model == wish.model:
                return []
            raise LlorchError(
                Code.CONFLICT, f"pool {pool.id} is being reloaded to {running.model}", retry_after_ms=5_000
            )
        actions = self._begin(pool, RELOAD, wish.at, wish.model)
        assert pool.operation is not None and pool.spec is not None  # it has replicas of ours
        if wish.model == pool.model and pool.choices.get(wish.model) == wish.ref and pool.ready:
            pool.operation.end("it serves that model already")
            return actions
        pool.operation.back_to, pool.operation.choices = pool.model, dict(pool.choices)
        pool.choices[wish.model] = wish.ref
        pool.loaded = True
        pool.troubles.pop(wish.model, None)
        if not (wish.beside and pool.ready):
            self._turn_to(pool, wish.model, now)
            for replica in _own(pool):
                actions += self._retire(pool, replica)
            return actions + self.settle(pool, now)
        for _ in range(pool.spec.replicas):
            replica = _another(pool)
            replica.model, replica.next = wish.model, True
            actions += self._life.start(pool, replica, now)
        return actions

    def drain(self, pool: Pool, wish: ev.Drain, now: float) -> list[Action]:
        pool.holds[OPERATOR] = wish.reason
        until = None if wish.deadline_s is None else now + wish.deadline_s
        actions = self._begin(pool, "drain", wish.at, None)
        if pool.operation is not None and pool.operation.kind == "drain":
            pool.operation.task_deadline = until
        self._changed(pool)
        return actions + self._proceed(pool, now)

    def undrain(self, pool: Pool, wish: ev.Undrain, now: float) -> list[Action]:
        pool.holds.pop(OPERATOR, None)
        actions = self._begin(pool, "undrain", wish.at, None)
        self._changed(pool)
        return actions + self._proceed(pool, now)

    def hold(self, pool: Pool, wish: ev.Hold, now: float) -> list[Action]:
        if wish.why is None:
            if pool.holds.pop(wish.who, None) is None:
                return []
            self._changed(pool)
            return [ev.Note("pool.released", pool.id, None, wish.who), *self.settle(pool, now)]
        if pool.holds.get(wish.who) == wish.why:
            return []
        known = wish.who in pool.holds
        pool.holds[wish.who] = wish.why
        self._changed(pool)
        return [] if known else [ev.Note("pool.held", pool.id, None, f"{wish.who}: {wish.why}")]

    def purge(self, pool: Pool, wish: ev.Purge) -> list[Action]:
        """Raises CONFLICT for a pool of which something runs: its log and its key are in use."""
        if any(replica.owned and replica.state not in DOWN for replica in pool.replicas.values()):
            raise LlorchError(
                Code.CONFLICT, f"engines of pool {pool.id} run", hint=f"llorch pool unload NODE/{pool.id} first"
            )
        actions = self._begin(pool, "purge", wish.at, None)
        self.forget_failures(pool)
        pool.last_error = None
        if pool.operation is not None and pool.operation.kind == "purge":
            pool.operation.end()
        return [*actions, ev.Forget(pool.id)]

    def configure(self, pool: Pool, wanted: Wanted, now: float) -> list[Action]:
        """The settings say other things of this pool now: its engines are started anew, after their tasks."""
        spec = wanted.spec
        pool.spec, pool.choices, pool.engine, pool.leaves = spec, dict(wanted.choices), spec.engine, False
        pool.on_demand = comes_and_goes(spec)
        pool.ctx, pool.device_mask = spec.ctx, ",".join(map(str, spec.gpus or ())) or None
        pool.operation = None
        actions = self._begin(pool, "restart", None, None)
        for replica in list(pool.replicas.values()):
            if replica.spawned:
                replica.next, replica.wanted, replica.slots = False, True, spec.slots
                actions += self._retire(pool, replica)
        numbers = {f"r{number}" for number in range(spec.replicas)}
        for replica in _own(pool):
            if replica.id not in numbers:
                replica.leaves = True
        for name in sorted(numbers - pool.replicas.keys()):
            pool.replicas[name] = Replica(name, owned=spec.engine != EXTERNAL, spawned=True, slots=spec.slots)
        self.forget_failures(pool)
        self._turn_to(pool, first_model(wanted), now)
        return [ev.Note("pool.changed", pool.id, None, ""), *actions, *self.settle(pool, now)]

    def forget_failures(self, pool: Pool) -> None:
        pool.troubles.clear()
        pool.not_before.clear()
        for replica in pool.replicas.values():
            replica.failures.forget()
            if replica.state is ReplicaState.EXITED:
                replica.retry_at = None

    # ------------------------------------------------------------ models that come and go

    def demand(self, pool: Pool, model: str, now: float) -> None:
        """A task has come for `model`: have it loaded. The next tick does. Raises LlorchError where that can't be."""
        if model not in pool.loadable:
            raise LlorchError(
                Code.MODEL_NOT_AVAILABLE,
                f"pool {pool.id} could not load {model}: {pool.last_error}",
                hint=f"llorch pool logs NODE/{pool.id}; llorch pool load NODE/{pool.id} tries again",
            )
        wait_s = pool.not_before.get(model, now) - now
        if not pool.swappable or wait_s > 0:
            if pool.model is not None and not pool.kept:
                wait_s = max(wait_s, pool.kept_until - now)
            raise LlorchError(
                Code.ALL_SLOTS_BUSY,
                f"pool {pool.id} serves {pool.model or 'nothing'} for now",
                details={"serves": pool.model, "swap_in_ms": max(0, round(wait_s * 1_000))},
            )
        self._turn_to(pool, model, now)

    def _turn_to(self, pool: Pool, model: str | None, now: float) -> None:
        pool.model = model
        pool.kept, pool.kept_until = False, now + MODEL_KEPT_S
        for replica in pool.replicas.values():
            replica.retry_at = None
            if replica.state is ReplicaState.FAILED:  # with another model
                replica.state = step(replica.state, Step.FORGIVEN)
        self._changed(pool)

    def _try_again(self, replica: Replica) -> None:
        replica.wanted = True
        if replica.state is ReplicaState.FAILED:
            replica.state = step(replica.state, Step.FORGIVEN)

    # ------------------------------------------------------------ what follows from an end

    def exited(self, pool: Pool, replica: Replica, event: ev.Exited, now: float, *, asked: bool) -> list[Action]:
        """`replica` is down. It is started again, or counted, or was to go."""
        if replica.leaves:
            del pool.replicas[replica.id]
            self._changed(pool)
            return self.settle(pool, now)
        if replica.next:
            return self._not_proven(pool, replica)
        if asked or not self._should_run(pool, replica) or replica.model != pool.model:
            return self.settle(pool, now)
        operation = pool.operation
        reloading = operation is not None and operation.running and operation.kind == RELOAD
        if operation is not None and reloading and operation.back_to is not None:
            return self._roll_back(pool, operation, now)
        actions = self._life.failed(pool, replica, event, now)
        if pool.on_demand and not pool.ready and not any(other.state in COMING for other in _own(pool)):
            actions += self._not_loaded(pool, replica, now)
        elif operation is not None and operation.running and replica.retry_at is not None:
            operation.message = f"{pool.last_error}; it is tried again in {replica.retry_at - now:.0f} s"
        return actions + self._proceed(pool, now)

    def _not_loaded(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        """A model that tasks wait for could not be loaded: they are told, and the next task decides what is loaded."""
        model = pool.model
        assert model is not None  # a replica was started for it
        if replica.retry_at is not None:
            pool.not_before[model] = replica.retry_at
        why = f"{model} could not be loaded: {pool.last_error}"
        tasks = ev.EndTasks(tuple(pool.waiting), Code.MODEL_NOT_AVAILABLE, why)
        if pool.operation is not None and pool.operation.running and pool.operation.kind in ("load", "restart", RELOAD):
            pool.operation.end(pool.last_error, failed=True)
        self._turn_to(pool, None, now)
        return [tasks] if tasks.task_ids else []

    def _roll_back(self, pool: Pool, operation: Operation, now: float) -> list[Action]:
        """There was no memory for both models, and the new one does not work."""
        operation.end(f"{pool.last_error}; back to {operation.back_to}", failed=True)
        pool.choices = dict(operation.choices)
        self._turn_to(pool, operation.back_to, now)
        return [ev.Note("pool.not_reloaded", pool.id, None, operation.message or ""), *self.settle(pool, now)]

    def _not_proven(self, pool: Pool, replica: Replica) -> list[Action]:
        """One that was to take over did not come up: all of those go, and nothing else has changed."""
        del pool.replicas[replica.id]
        why, pool.last_error = pool.last_error, None
        operation = pool.operation
        if operation is not None and operation.running and operation.kind == RELOAD:
            operation.end(f"{why}; {pool.model} goes on", failed=True)
            pool.choices = dict(operation.choices)
        actions: list[Action] = [ev.Note("pool.not_reloaded", pool.id, None, why or "")]
        for other in list(pool.replicas.values()):
            if other.next and not other.leaves:
                other.leaves = True
                actions += self._retire(pool, other)
        self._changed(pool)
        return actions

    def proven(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        """`replica` has generated a token."""
        actions: list[Action] = []
        if replica.next:
            previous, pool.model = pool.model, replica.model
            for other in pool.replicas.values():
                other.leaves = other.owned and not other.next
                other.next = False
            if not pool.on_demand and previous is not None and previous != pool.model:
                pool.choices.pop(previous, None)  # a pool of one model has the new one instead
            actions.append(ev.Note("model.swapped", pool.id, replica.id, f"{previous} to {pool.model}"))
        pool.kept, pool.kept_until = not pool.on_demand, now + MODEL_KEPT_S
        self._changed(pool)
        return actions + self.settle(pool, now)

    def pass_time(self, pool: Pool, now: float) -> list[Action]:
        """What time alone does: the resident model has had its time, or has had no task for too long."""
        if pool.busy:
            pool.idle_since = now
        if pool.on_demand and pool.ready:
            if not pool.kept and now >= pool.kept_until:
                pool.kept = True
                self._changed(pool)
            idle_s = pool.spec.idle_unload_s if pool.spec is not None else None
            ready_at = max(replica.ready_at or 0.0 for replica in pool.serving)
            if idle_s is not None and not pool.busy and now - max(pool.idle_since, ready_at) >= idle_s:
                note = ev.Note("model.idle", pool.id, None, f"{pool.model}: no task for {idle_s:g} s")
                self._turn_to(pool, None, now)
                return [note, *self.settle(pool, now)]
        return self.settle(pool, now)

    # ------------------------------------------------------------ from what is to what should be

    def settle(self, pool: Pool, now: float) -> list[Action]:
        """Start what should run and can, drain and stop what should not; then see how far the operation is."""
        actions: list[Action] = []
        for replica in list(pool.replicas.values()):
            if not replica.spawned or replica.next:
                continue
            if not self._should_run(pool, replica) or replica.model not in (None, pool.model):
                actions += self._retire(pool, replica)
            if replica.state is ReplicaState.DRAINING and not replica.held:
                actions += self._life.stop(pool, replica)
            if replica.state is ReplicaState.EXITED and self._should_run(pool, replica):
                due = replica.retry_at is None or now >= replica.retry_at
                actions += self._life.start(pool, replica, now) if due else []
        return actions + self._proceed(pool, now)

    def _should_run(self, pool: Pool, replica: Replica) -> bool:
        wanted = replica.wanted and pool.loaded and pool.model is not None
        return wanted and not pool.parked and not pool.leaves and not replica.leaves

    def _retire(self, pool: Pool, replica: Replica) -> list[Action]:
        """It is to stop: at once, or after its tasks."""
        if not replica.owned:
            return self._withdraw(pool, replica)
        if replica.state is ReplicaState.READY:
            return self._life.drain(pool, replica)
        if replica.state in COMING:
            return self._life.stop(pool, replica)
        if replica.state in DOWN and replica.retry_at is not None:
            replica.retry_at = None
            self._changed(pool)
        return []

    def _withdraw(self, pool: Pool, replica: Replica) -> list[Action]:
        """Of an engine that is not ours, only our offer ends, once its tasks have."""
        if replica.state in DOWN or replica.held or not replica.written:
            return []
        return [ev.Withdraw(replica.written[-1])]

    # ------------------------------------------------------------ operations and their ends

    def _begin(self, pool: Pool, kind: str, at: str | None, model: str | None) -> list[Action]:
        """The same again goes on as it is. A reload is not hidden by a drain."""
        running = pool.operation
        if (
            running is not None
            and running.running
            and (running.kind == RELOAD or (running.kind, running.model) == (kind, model))
        ):
            return []
        since = {replica.id: replica.run for replica in pool.replicas.values()}
        pool.operation = Operation(kind, model, began=at, since=since)
        self._changed(pool)
        return [ev.Note("pool.asked", pool.id, None, f"{kind} {model}" if model else kind)]

    def _proceed(self, pool: Pool, now: float) -> list[Action]:
        """What has become of the operation."""
        operation = pool.operation
        if operation is None or not operation.running:
            return []
        actions: list[Action] = []
        if operation.task_deadline is not None and now >= operation.task_deadline and pool.busy:
            actions.append(ev.EndTasks(tuple(_tasks(pool)), Code.DRAINING, ENDED_FOR_DRAIN))
            operation.task_deadline = None
        self._look(pool, operation)
        if not operation.running:
            self._changed(pool)
            how = f"{operation.kind}: {operation.message or operation.state}"
            actions.append(ev.Note("pool.answered", pool.id, None, how))
        return actions

    def _look(self, pool: Pool, operation: Operation) -> None:
        own = _own(pool)
        if operation.kind == "drain":
            if OPERATOR not in pool.holds:
                operation.end("it was undrained")
            elif not pool.busy:
                operation.end()
        elif operation.kind == "undrain":
            operation.end(f"still held: {_held(pool)}" if pool.holds else None)
        elif operation.kind == "unload":
            if all(replica.state in DOWN for replica in own):
                operation.end()
        elif any(replica.state is ReplicaState.FAILED for replica in own):
            operation.end(pool.last_error, failed=True)
        elif pool.parked:
            operation.end(f"not now: {_held(pool)}")
        elif operation.kind == "load":
            if pool.ready:
                operation.end()
        else:  # restart, reload
            old = [r for r in pool.replicas.values() if r.leaves or (r.owned and r.run == operation.since.get(r.id))]
            if pool.ready and not old and operation.model in (None, pool.model):
                operation.end()

    def _check_reload(self, pool: Pool) -> None:
        running = pool.operation
        if running is not None and running.running and running.kind == RELOAD:
            raise LlorchError(
                Code.CONFLICT, f"pool {pool.id} is being reloaded to {running.model}", retry_after_ms=5_000
            )

    def _must_be_declared(self, pool: Pool) -> None:
        if pool.spec is None:
            raise LlorchError(
                Code.INVALID_REQUEST,
                f"pool {pool.id} is not in this node's settings: its engines were handed over",
                hint="whoever handed them over takes them back by removing the handoff files",
            )

    def _must_be_ours(self, pool: Pool) -> None:
        if not any(replica.owned for replica in pool.replicas.values()):
            raise LlorchError(
                Code.INVALID_REQUEST,
                f"the engine of pool {pool.id} was not started by llorch",
                hint="whoever started it can stop it; llorch pool drain keeps tasks away",
            )


def _own(pool: Pool) -> list[Replica]:
    """Those of the settings that are there to stay."""
    return [
        replica for replica in pool.replicas.values() if replica.spawned and not replica.next and not replica.leaves
    ]


def _another(pool: Pool) -> Replica:
    """A replica more, under the lowest number that is free."""
    number = next(number for number in range(len(pool.replicas) + 1) if f"r{number}" not in pool.replicas)
    slots = pool.spec.slots if pool.spec is not None else 1
    replica = pool.replicas[f"r{number}"] = Replica(f"r{number}", owned=True, spawned=True, slots=slots)
    return replica


def _tasks(pool: Pool) -> list[str]:
    held = (task_id for replica in pool.replicas.values() for task_id in replica.held)
    return sorted([*pool.waiting, *held])


def _held(pool: Pool) -> str:
    return ", ".join(f"{who}: {why}" if why else who for who, why in pool.holds.items())
