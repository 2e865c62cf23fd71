"""Operations of pools as they are told: whether one may begin, how far it is, and when it has ended how.

Owns those words and those refusals. What an operation does is `pool_operations`'. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.pool_events import Action, ReplicaState
from llorch.node.replicas import DOWN, OPERATOR, RELOAD, Operation, Pool

RELOAD_AGAIN_MS = 5_000


class Progress:
    """`changed` is called with a pool whose report has changed."""

    def __init__(self, changed: Callable[[Pool], None]) -> None:
        self._changed = changed

    def begin(self, pool: Pool, kind: str, at: str | None, model: str | None) -> list[Action]:
        """The same again goes on as it is. A reload is not hidden by a drain; it ends for a wish that is granted before
        it has changed anything."""
        running = pool.operation if pool.operation is not None and pool.operation.running else None
        if running is not None and (running.kind, running.model) == (kind, model):
            return []
        if running is not None and running.kind == RELOAD and kind in ("drain", "undrain"):
            return []
        actions: list[Action] = []
        if running is not None:
            running.end(f"{kind} came in its place", failed=True)
            actions += self.told(pool)
        pool.operation = Operation(kind, model, began=at)
        self._changed(pool)
        return [*actions, ev.Note("pool.asked", pool.id, None, f"{kind} {model}" if model else kind)]

    def give_tasks(self, pool: Pool, deadline_s: float | None, now: float) -> None:
        """The operation's tasks have so long. Those that a drain ends sooner have less."""
        if pool.operation is not None and deadline_s is not None:
            pool.operation.task_deadline = now + deadline_s

    def told(self, pool: Pool) -> list[Action]:
        """The end of the operation, for the log."""
        operation = pool.operation
        assert operation is not None
        self._changed(pool)
        return [ev.Note("pool.answered", pool.id, None, f"{operation.kind}: {operation.message or operation.state}")]

    def proceed(self, pool: Pool) -> list[Action]:
        """What has become of the operation."""
        if pool.operation is None or not pool.operation.running:
            return []
        self._look(pool, pool.operation)
        return [] if pool.operation.running else self.told(pool)

    def _look(self, pool: Pool, operation: Operation) -> None:
        spawned = [replica for replica in pool.replicas.values() if replica.spawned]
        up = [replica for replica in spawned if replica.state not in DOWN]
        if operation.preparing:
            return
        if operation.kind == "drain":
            self._look_at_drain(pool, operation)
        elif operation.kind == "undrain":
            held = pool.held_by()
            operation.end(f"still held: {', '.join(held)}" if held else None)
        elif operation.kind == "unload":
            if not up:
                operation.end()
        elif not pool.loaded:
            operation.end("not now: it is unloaded", failed=operation.began is not None)
        elif pool.parked:
            operation.end(f"not now: {', '.join(pool.held_by())}", failed=operation.began is not None)
        elif any(replica.next for replica in spawned):
            pass  # the first of them says
        elif pool.ready and (operation.kind == "load" or not any(r.leaves or not pool.current(r) for r in up)):
            operation.end()
        elif any(replica.state is ReplicaState.FAILED for replica in pool.own):
            operation.end(pool.last_error, failed=True)
        elif not up and pool.model is None:
            operation.end("a task decides what is loaded")
        elif not up and not pool.coming:
            operation.end(pool.last_error, failed=True)

    def _look_at_drain(self, pool: Pool, operation: Operation) -> None:
        drained = OPERATOR in pool.holds or pool.node_drained is not None
        if not drained or not pool.busy:
            operation.end()
            return
        message = f"{pool.busy} task{'s' if pool.busy > 1 else ''} still run{'s' if pool.busy == 1 else ''}"
        if operation.message != message:
            operation.message = message
            self._changed(pool)


def must_be_free(pool: Pool) -> None:
    """Raises CONFLICT for a pool that is being reloaded, its model being here, or goes away."""
    if pool.leaves:
        raise LlorchError(Code.CONFLICT, f"pool {pool.id} is no more in this node's settings, and goes")
    if pool.reloading is not None and not pool.reloading.preparing:
        raise conflict(pool)


def conflict(pool: Pool) -> LlorchError:
    model = pool.reloading.model if pool.reloading is not None else None
    return LlorchError(Code.CONFLICT, f"pool {pool.id} is being reloaded to {model}", retry_after_ms=RELOAD_AGAIN_MS)


def must_be_declared(pool: Pool) -> None:
    if pool.spec is None:
        raise LlorchError(
            Code.INVALID_REQUEST,
            f"pool {pool.id} is not in this node's settings: its engines were handed over",
            hint="whoever handed them over takes them back by removing the handoff files",
        )


def must_be_ours(pool: Pool) -> None:
    if not any(replica.owned for replica in pool.replicas.values()):
        raise LlorchError(
            Code.INVALID_REQUEST,
            f"the engine of pool {pool.id} was not started by llorch",
            hint="whoever started it can stop it; llorch pool drain keeps tasks away",
        )
