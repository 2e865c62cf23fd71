"""What pools are asked to do: load, unload, reload, restart, drain, hold, purge, other settings.

Owns which replicas should run, and the way from what is to what should be: a replica is stopped when its last task has
ended, and started when nothing speaks against it. Each wish is idempotent, is told as the pool's `operation`, and ends
as done or failed. Which model comes and goes by itself is `pool_models`', how a replica starts and ends
`replica_life`'s. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llorch.config_pools import MODEL_KEPT_S
from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.pool_events import Action, ReplicaState, Step, Wanted, step
from llorch.node.pool_models import Models, comes_and_goes, first_model
from llorch.node.pool_outfit import another, holds_that_stay, outfit, reloaded_to, same_engines
from llorch.node.pool_progress import RELOAD_AGAIN_MS, Progress, conflict, must_be_declared, must_be_free, must_be_ours
from llorch.node.replica_life import Ended, Life
from llorch.node.replicas import COMING, DOWN, OPERATOR, RELOAD, Before, Pool, Replica

WITHDRAWN_AGAIN_S = 5.0  # a file that was to be removed and is still there
ENDED_FOR_DRAIN = "{what} was {why}, and the time that tasks were given is over"


class Operations:
    """`changed` is called with a pool whose report has changed."""

    def __init__(self, life: Life, models: Models, changed: Callable[[Pool], None]) -> None:
        self._life = life
        self._models = models
        self._progress = Progress(changed)
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
        must_be_declared(pool)
        must_be_free(pool)
        model = wish.model or pool.model or next(iter(pool.choices), None)
        actions = self._progress.begin(pool, "load", wish.at, model)
        pool.loaded = True
        self._try_again(pool)
        if pool.model != model:
            self._models.turn_to(pool, model)
        return actions + self.settle(pool, now)

    def unload(self, pool: Pool, wish: ev.Unload, now: float) -> list[Action]:
        must_be_ours(pool)
        must_be_free(pool)
        actions = self._progress.begin(pool, "unload", wish.at, pool.model)
        pool.loaded = False
        self._progress.give_tasks(pool, wish.deadline_s, now)
        return actions + self.settle(pool, now)

    def restart(self, pool: Pool, wish: ev.Restart, now: float) -> list[Action]:
        must_be_ours(pool)
        must_be_free(pool)
        if pool.operation is not None and pool.operation.running and pool.operation.kind == "restart":
            self._progress.give_tasks(pool, wish.deadline_s, now)
            return []
        actions = self._progress.begin(pool, "restart", wish.at, pool.model)
        pool.loaded = True
        self._progress.give_tasks(pool, wish.deadline_s, now)
        self._try_again(pool)
        self._models.turn_to(pool, pool.model)
        return actions + self.settle(pool, now)

    def reload(self, pool: Pool, wish: ev.Reload, now: float) -> list[Action]:
        """Serve another model; the old one until the new one is proven, where there is memory for both."""
        must_be_ours(pool)
        if pool.reloading is not None and (pool.reloading.model, pool.reloading.ref) == (wish.model, wish.ref):
            return []
        must_be_free(pool)
        if pool.reloading is not None:
            raise conflict(pool)
        if pool.parked:
            raise LlorchError(
                Code.CONFLICT,
                f"engines of pool {pool.id} may not run now ({', '.join(pool.held_by())}), so no model can be proven",
                retry_after_ms=RELOAD_AGAIN_MS,
            )
        actions = self._progress.begin(pool, RELOAD, wish.at, wish.model)
        operation = pool.operation
        assert operation is not None  # it was begun
        if wish.model == pool.model and pool.choices.get(wish.model) == wish.ref and pool.ready:
            operation.end("it serves that model already")
            return actions + self._progress.told(pool)
        operation.ref, operation.preparing, operation.deadline_s = wish.ref, True, wish.deadline_s
        return [*actions, ev.Prepare(pool.id, wish.model, wish.ref)]

    def prepared(self, pool: Pool, event: ev.Prepared, now: float) -> list[Action]:
        """The other model is here, or can't be had; until now nothing has changed."""
        operation, spec = pool.reloading, pool.spec
        if operation is None or not operation.preparing or operation.model != event.model or spec is None:
            return []
        if event.ref not in (None, operation.ref):
            return []
        if event.refusal is not None:
            return self._give_up_reload(pool, event.refusal, now)
        ref, operation.preparing, operation.message = operation.ref, False, None
        assert ref is not None  # whoever asks for a reload says which
        pool.troubles.pop(event.model, None)
        pool.not_before.pop(event.model, None)
        actions: list[Action] = []
        if event.beside and pool.ready:
            for _ in range(spec.replicas):
                replica = another(pool)
                replica.model, replica.ref, replica.next = event.model, ref, True
                actions += self._life.start(pool, replica, now)
            return actions
        operation.before = Before(pool.model, dict(pool.choices), pool.loaded)
        pool.choices = {**(pool.choices if pool.on_demand else {}), event.model: ref}
        pool.loaded = True
        self._try_again(pool)
        self._models.turn_to(pool, event.model)
        self._progress.give_tasks(pool, operation.deadline_s, now)
        return actions + self.settle(pool, now)

    def drain(self, pool: Pool, wish: ev.Drain, now: float) -> list[Action]:
        """It takes effect during a reload too, which remains the operation that is told."""
        actions = self._progress.begin(pool, "drain", wish.at, None)
        pool.holds[OPERATOR] = wish.reason
        pool.drain_deadline = None if wish.deadline_s is None else now + wish.deadline_s
        self._changed(pool)
        return actions + self._progress.proceed(pool)

    def undrain(self, pool: Pool, wish: ev.Undrain, now: float) -> list[Action]:
        actions = self._progress.begin(pool, "undrain", wish.at, None)
        pool.holds.pop(OPERATOR, None)
        pool.drain_deadline = None
        self._changed(pool)
        return actions + self.settle(pool, now)

    def drain_with_node(self, pool: Pool, why: str | None, at: str | None) -> list[Action]:
        """An operator wants no tasks on the whole node, or does again (None)."""
        if pool.node_drained == why:
            return []
        actions = self._progress.begin(pool, "undrain" if why is None else "drain", at, None)
        pool.node_drained = why
        self._changed(pool)
        return actions + self._progress.proceed(pool)

    def begin_load(self, pool: Pool, now: float) -> list[Action]:
        """When the node starts: what its settings ask for is an operation like others."""
        wanted = pool.spec is not None and pool.may_run
        actions = self._progress.begin(pool, "load", None, pool.model) if wanted else []
        return actions + self.settle(pool, now)

    def hold(self, pool: Pool, wish: ev.Hold, now: float) -> list[Action]:
        if pool.holds.get(wish.who) == wish.why:
            return []
        if wish.why is None:
            del pool.holds[wish.who]
            self._changed(pool)
            return [ev.Note("pool.released", pool.id, None, wish.who), *self.settle(pool, now)]
        known = wish.who in pool.holds
        pool.holds[wish.who] = wish.why
        self._changed(pool)
        notes = [] if known else [ev.Note("pool.held", pool.id, None, f"{wish.who}: {wish.why}")]
        return [*notes, *self.settle(pool, now)]

    def purge(self, pool: Pool, wish: ev.Purge) -> list[Action]:
        """What went wrong is forgotten, so what failed is tried again. Raises CONFLICT for a pool of which something
        runs: its log and its key are in use."""
        must_be_free(pool)
        if any(replica.owned and replica.state not in DOWN for replica in pool.replicas.values()):
            raise LlorchError(
                Code.CONFLICT, f"engines of pool {pool.id} run", hint=f"llorch pool unload NODE/{pool.id} first"
            )
        actions = self._progress.begin(pool, "purge", wish.at, None)
        self._forgive(pool)
        pool.last_error = None
        assert pool.operation is not None
        pool.operation.end()
        return [*actions, ev.Forget(pool.id), *self._progress.told(pool)]

    # ------------------------------------------------------------ other settings

    def configure(self, pool: Pool, wanted: Wanted, now: float) -> list[Action]:
        """The settings say other things of this pool now: its engines are started anew, after their tasks."""
        why = "the settings have changed"
        pool.holds = holds_that_stay(pool, wanted.spec)
        if pool.spec is not None and pool.own and same_engines(pool.spec, wanted.spec) and not pool.leaves:
            return self._serve_otherwise(pool, wanted, now)
        actions = self._revert(pool, why, now) if pool.reloading is not None else []
        pool.leaves = False
        actions += self._progress.begin(pool, "restart", None, None)
        reloaded = reloaded_to(pool, wanted)
        outfit(pool, wanted)
        if reloaded is not None:
            pool.choices = reloaded
        actions += self._send_others_away(pool)
        self._try_again(pool)
        self._models.turn_to(pool, first_model(wanted) if reloaded is None else next(iter(reloaded)))
        actions += self._models.end_waiting(pool, why, all_of_them=True)
        return [ev.Note("pool.changed", pool.id, None, ""), *actions, *self.settle(pool, now)]

    def _serve_otherwise(self, pool: Pool, wanted: Wanted, now: float) -> list[Action]:
        """Its engines stay; when they run is another matter now."""
        pool.spec, pool.on_demand = wanted.spec, comes_and_goes(wanted.spec)
        self._changed(pool)
        if pool.model is None and not pool.on_demand:
            self._try_again(pool)
            self._models.turn_to(pool, first_model(wanted))
        note = ev.Note("pool.changed", pool.id, None, "its engines stay")
        return [note, *self._send_others_away(pool), *self.settle(pool, now)]

    def _send_others_away(self, pool: Pool) -> list[Action]:
        """Where models come and go, an engine of others, which has one for good, can't join."""
        others = [each for each in pool.replicas.values() if not each.spawned and each.state not in DOWN]
        return [action for each in others if pool.on_demand for action in self._life.withdrawn(pool, each)]

    def remove(self, pool: Pool, now: float) -> list[Action]:
        """It is no more in the settings, or is to be another there: it goes once its engines have."""
        why = "the pool is no more in the settings"
        actions = self._revert(pool, why, now) if pool.reloading is not None else []
        pool.leaves = True
        self._changed(pool)
        if pool.operation is not None and pool.operation.running:
            pool.operation.end(why, failed=True)
            actions += self._progress.told(pool)
        return actions + self.settle(pool, now)

    # ------------------------------------------------------------ what follows from an end

    def exited(self, ended: Ended, event: ev.Exited, now: float) -> list[Action]:
        """A replica is down. It is started again, or counted, or was to go."""
        pool, replica = ended.pool, ended.replica
        if replica.next and not replica.leaves:
            return self._give_up_reload(pool, ended.why, now)
        stays = pool.current(replica) and not replica.leaves
        if stays and pool.reloading is not None and pool.reloading.before is not None:
            return self._give_up_reload(pool, pool.last_error or ended.why, now)
        if ended.asked or not stays or not pool.should_run(replica):
            return self.settle(pool, now)
        actions = self._life.failed(ended, event, now)
        operation = pool.operation if pool.operation is not None and pool.operation.running else None
        if pool.on_demand and not pool.ready and not any(other.state in COMING for other in pool.own):
            if operation is not None and operation.kind in ("load", "restart"):
                operation.end(ended.why, failed=True)
                actions += self._progress.told(pool)
            actions += self._models.not_loaded(pool, replica, now)
        elif operation is not None and replica.retry_at is not None:
            operation.message = f"{ended.why}; it is tried again in {replica.retry_at - now:.0f} s"
        return actions + self.settle(pool, now)

    def _give_up_reload(self, pool: Pool, why: str, now: float) -> list[Action]:
        return [*self._revert(pool, why, now), *self.settle(pool, now)]

    def _revert(self, pool: Pool, why: str, now: float) -> list[Action]:
        """One that was to take over did not come up, or may not: all of those go, and what was is to be again."""
        operation = pool.reloading
        assert operation is not None
        before, actions = operation.before, list[Action]()
        if before is not None:  # there was no memory for both models
            pool.choices, pool.loaded = dict(before.choices), before.loaded
            self._try_again(pool)
            self._models.turn_to(pool, before.model)
        rest = f"back to {pool.model or 'no model'}" if before else f"{pool.model or 'nothing'} goes on"
        operation.end(f"{why}; {rest}", failed=True)
        for replica in pool.replicas.values():
            if replica.next and not replica.leaves:
                replica.leaves = True
                actions += self._retire(pool, replica, now)
        self._changed(pool)
        note = ev.Note("pool.not_reloaded", pool.id, None, operation.message or "")
        return [note, *actions, *self._progress.told(pool)]

    def proven(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        """`replica` has generated a token."""
        actions: list[Action] = []
        if replica.next:
            actions.append(self._take_over(pool, replica, now))
        if pool.serving == [replica]:  # the first that is ready with it
            pool.kept, pool.kept_until = not pool.on_demand, now + MODEL_KEPT_S
        self._changed(pool)
        return actions + self.settle(pool, now)

    def _take_over(self, pool: Pool, replica: Replica, now: float) -> Action:
        """The next ones are those that serve now."""
        previous, model, ref = pool.model, replica.model, replica.ref
        assert model is not None and ref is not None  # it was started with both
        pool.choices = {**(pool.choices if pool.on_demand else {}), model: ref}
        self._models.turn_to(pool, model)
        if pool.reloading is not None:
            self._progress.give_tasks(pool, pool.reloading.deadline_s, now)
        for other in pool.replicas.values():
            if other.next:
                other.next, other.revision = False, pool.revision
            elif other.spawned:
                other.leaves = True
        return ev.Note("model.swapped", pool.id, replica.id, f"{previous} to {model}")

    def pass_time(self, pool: Pool, now: float) -> list[Action]:
        actions: list[Action] = []
        operation = pool.operation if pool.operation is not None and pool.operation.running else None
        if pool.drain_deadline is not None and now >= pool.drain_deadline:
            pool.drain_deadline = None
            actions += self._end_tasks(pool, pool.replicas.values(), "drained")
        if operation is not None and operation.task_deadline is not None and now >= operation.task_deadline:
            operation.task_deadline = None
            ending = [each for each in pool.replicas.values() if each.state is ReplicaState.DRAINING]
            actions += self._end_tasks(pool, ending, f"to {operation.kind}")
        return [*actions, *self._models.pass_time(pool, now), *self.settle(pool, now)]

    def _end_tasks(self, pool: Pool, replicas: Iterable[Replica], why: str) -> list[Action]:
        """Those of `replicas`, and those that wait, if all of them give way."""
        drained = OPERATOR in pool.holds
        tasks = [*(pool.waiting if drained else ()), *(task_id for each in replicas for task_id in each.held)]
        if drained:
            pool.waiting.update(dict.fromkeys(pool.waiting))
        ended = ENDED_FOR_DRAIN.format(what=f"pool {pool.id}", why=why)
        return [ev.EndTasks(tuple(sorted(tasks)), Code.DRAINING, ended)] if tasks else []

    # ------------------------------------------------------------ from what is to what should be

    def settle(self, pool: Pool, now: float) -> list[Action]:
        """Start what should run and can, drain and stop what should not; then see how far the operation is."""
        if pool.reloading is not None and (pool.parked or pool.leaves):
            return self._give_up_reload(pool, f"not now: {', '.join(pool.held_by())}", now)
        actions = self._models.end_waiting(pool)
        for replica in list(pool.replicas.values()):
            if replica.spawned:
                actions += self._settle(pool, replica, now)
        return actions + self._progress.proceed(pool)

    def _settle(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        actions: list[Action] = []
        runs = replica.state not in DOWN
        if replica.next and not replica.leaves:
            return self._life.offer_again(pool, replica, now)
        if replica.leaves and not runs and not replica.held:
            del pool.replicas[replica.id]
            self._changed(pool)
            return []
        if not pool.should_run(replica) or (runs and not pool.current(replica)):
            actions += self._retire(pool, replica, now)
        if replica.state is ReplicaState.DRAINING and not replica.held:
            actions += self._life.stop(pool, replica)
        if replica.state is ReplicaState.EXITED and pool.should_run(replica):
            due = replica.retry_at is None or now >= replica.retry_at
            actions += self._life.start(pool, replica, now) if due else []
        return actions + self._life.offer_again(pool, replica, now)

    def _retire(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        """It is to stop: at once, or after its tasks."""
        if not replica.owned:
            return self._withdraw(pool, replica, now)
        if replica.state is ReplicaState.READY:
            return self._life.drain(pool, replica)
        if replica.state in COMING:  # one that was lost may have tasks still, which it does not answer
            return self._life.stop(pool, replica)
        if replica.state in DOWN and replica.retry_at is not None:
            replica.retry_at = None
            self._changed(pool)
        return []

    def _withdraw(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        """Of an engine that is not ours, only our offer ends, once its tasks have. That its file is gone is told later,
        as of others' files; not so of one that nobody has seen."""
        if replica.state in DOWN or replica.held or replica.offered is None:
            return []
        if replica.withdrawn_at is not None and now - replica.withdrawn_at < WITHDRAWN_AGAIN_S:
            return []
        replica.withdrawn_at = now
        unseen = replica.state is ReplicaState.STARTING
        return [ev.Withdraw(replica.offered), *(self._life.withdrawn(pool, replica) if unseen else [])]

    def _try_again(self, pool: Pool) -> None:
        """Whatever failed, or was taken away, is wanted anew."""
        self._forgive(pool)
        for replica in pool.own:
            replica.wanted = True

    def _forgive(self, pool: Pool) -> None:
        pool.troubles.clear()
        pool.not_before.clear()
        for replica in pool.own:
            replica.failures.forget()
            replica.retry_at = None
            if replica.state is ReplicaState.FAILED:
                replica.state = step(replica.state, Step.FORGIVEN)
        self._changed(pool)
