"""Which model a pool is to run, where models come and go: asked for by tasks, kept a while, let go when idle.

Owns when a task may turn a pool to its model, what becomes of tasks that wait for one, and what follows from a
model that can't be loaded. How engines start and end with it is others' business. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

from llorch.config_pools import PoolSpec
from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.pool_events import Action, ReplicaState, Step, Wanted, step
from llorch.node.replicas import Pool, Replica

EXTERNAL = "external"  # engines that someone else runs


def comes_and_goes(spec: PoolSpec) -> bool:
    """Whether the models of a pool are loaded when a task asks for them."""
    return spec.engine != EXTERNAL and (bool(spec.models) or spec.idle_unload_s is not None)


def first_model(wanted: Wanted) -> str | None:
    """What a pool begins with."""
    if wanted.spec.model is None and comes_and_goes(wanted.spec):
        return None
    return next(iter(wanted.choices), None)


class Models:
    """`changed` is called with a pool whose report has changed."""

    def __init__(self, changed: Callable[[Pool], None]) -> None:
        self._changed = changed

    def turn_to(self, pool: Pool, model: str | None) -> None:
        """From now on it is to run `model`, on engines started for that. What runs now is replaced at the next step."""
        pool.model = model
        pool.revision += 1
        for replica in pool.own:
            replica.retry_at = None
            if replica.state is ReplicaState.FAILED:  # with another model
                replica.state = step(replica.state, Step.FORGIVEN)
        self._changed(pool)

    def demand(self, pool: Pool, model: str, now: float) -> None:
        """A task has come for `model`: have it loaded. The next tick does. Raises LlorchError where that can't be."""
        if model not in pool.loadable or not pool.capacity:
            raise LlorchError(
                Code.MODEL_NOT_AVAILABLE,
                f"pool {pool.id} can't load {model}: {pool.last_error}",
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
        self.turn_to(pool, model)

    def not_loaded(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        """A model could not be loaded, or did not stay: the next task decides what is loaded."""
        model = replica.model
        assert model is not None  # it was started with one
        if replica.retry_at is not None:
            pool.not_before[model] = replica.retry_at
        self.turn_to(pool, None)
        return self.end_waiting(pool, f"{model} could not be loaded: {pool.last_error}")

    def end_waiting(self, pool: Pool, why: str | None = None, *, all_of_them: bool = False) -> list[Action]:
        """End the tasks whose model is not on its way any more. They hold their slots until they are given back."""
        comes = pool.model if (pool.ready or pool.coming) and not all_of_them else None
        lost = [task_id for task_id, model in pool.waiting.items() if model is not None and model != comes]
        if not lost:
            return []
        pool.waiting.update(dict.fromkeys(lost))
        why = (
            why or f"pool {pool.id} does not load their model any more: {', '.join(pool.held_by()) or pool.last_error}"
        )
        return [ev.EndTasks(tuple(lost), Code.MODEL_NOT_AVAILABLE, why)]

    def pass_time(self, pool: Pool, now: float) -> list[Action]:
        """What time alone does: the resident model has had its time, or has had no task for too long."""
        if pool.busy:
            pool.idle_since = now
        if not pool.on_demand or not pool.ready:
            return []
        if not pool.kept and now >= pool.kept_until:
            pool.kept = True
            self._changed(pool)
        idle_s = pool.spec.idle_unload_s if pool.spec is not None else None
        ready_at = max(replica.ready_at or 0.0 for replica in pool.serving)
        operating = pool.operation is not None and pool.operation.running
        if idle_s is None or not pool.kept or pool.busy or operating or now - max(pool.idle_since, ready_at) < idle_s:
            return []
        note = ev.Note("model.idle", pool.id, None, f"{pool.model}: no task for {idle_s:g} s")
        self.turn_to(pool, None)
        return [note]
