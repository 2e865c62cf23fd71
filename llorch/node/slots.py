"""The slots of this node's replicas: who holds which, and which replicas get no task because tasks fail there.

Owns that what is accepted never exceeds the slots there are, the choice among a pool's ready replicas, who waits with a
slot for a model on its way, and the replicas' breakers: at most half of the ready ones are out at once, so with one
replica never. Knows nothing of how a replica came up. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llorch.breaker import Breaker, Phase, may_eject, surplus
from llorch.errors import Code, LlorchError
from llorch.node.pool_events import Note, ReplicaState
from llorch.node.replicas import Lease, Pool, Replica


class Slots:
    """`changed` is called with a pool whose report has changed."""

    def __init__(self, pools: Mapping[str, Pool], changed: Callable[[Pool], None]) -> None:
        self._pools = pools
        self._changed = changed
        self._held: dict[str, tuple[Pool, Replica, Lease, Breaker]] = {}
        self._waiting: dict[str, Pool] = {}
        self._notes: list[Note] = []  # for the next tick

    def take(self, pool: Pool, task_id: str) -> Lease:
        """A slot of the least busy ready replica, until `give_back(task_id)`. Raises LlorchError with nothing taken."""
        self.check_new(task_id)
        serving = pool.serving
        # Those that are free may be those of tasks that came before.
        if not serving or sum([replica.free for replica in serving]) <= len(pool.waiting):
            raise LlorchError(Code.ALL_SLOTS_BUSY, f"all slots of pool {pool.id} are busy")
        return self._seat(pool, task_id, serving)

    def take_ahead(self, pool: Pool, task_id: str) -> Lease:
        """A slot of the model that is on its way, until `give_back(task_id)`; `seat` says of which replica it then is.
        Raises LlorchError with nothing taken."""
        self.check_new(task_id)
        assert pool.model is not None  # something is on its way
        if pool.busy >= pool.capacity:
            raise LlorchError(
                Code.ALL_SLOTS_BUSY, f"all slots of pool {pool.id} are taken, and {pool.model} still loads"
            )
        pool.waiting[task_id] = pool.model
        self._waiting[task_id] = pool
        self._changed(pool)
        return Lease(task_id, pool.id, None, pool.engine, "", pool.model, None, pool.served_as)

    def seat(self, pool: Pool) -> list[Lease]:
        """Slots of the ready replicas for those that waited for their model, as far as there are any."""
        leases: list[Lease] = []
        for task_id in [task_id for task_id, model in pool.waiting.items() if model == pool.model]:
            if not any(replica.free for replica in pool.serving):
                break
            self._leave(task_id)
            leases.append(self._seat(pool, task_id, pool.serving))
        return leases

    def check_new(self, task_id: str) -> None:
        """Raises CONFLICT for a task that holds a slot, here or of another pool."""
        if task_id in self._held or task_id in self._waiting:
            raise LlorchError(Code.CONFLICT, "this task already holds a slot")

    def _leave(self, task_id: str) -> Pool | None:
        pool = self._waiting.pop(task_id, None)
        if pool is not None:
            del pool.waiting[task_id]
        return pool

    def _seat(self, pool: Pool, task_id: str, serving: list[Replica]) -> Lease:
        replica = serving[0]
        if len(serving) > 1:
            # One that has to be tried comes before the others: an early failure of its task is made good elsewhere.
            replica = max(serving, key=lambda r: (r.free > 0 and r.breaker.phase is Phase.HALF_OPEN, r.free))
        assert replica.handoff is not None  # a ready replica was probed at its handoff
        replica.held.add(task_id)
        lease = Lease(
            task_id,
            pool.id,
            replica.id,
            replica.handoff.engine,
            replica.handoff.url,
            replica.handoff.model,
            replica.handoff.api_key_file,
            replica.handoff.served_as,
            trial=replica.breaker.begin(task_id),
        )
        self._held[task_id] = (pool, replica, lease, replica.breaker)
        self._changed(pool)
        return lease

    def give_back(self, task_id: str) -> None:
        """A task that holds none is no error: whoever ends a task may say so."""
        waited_at = self._leave(task_id)
        if waited_at is not None:
            self._changed(waited_at)
        held = self._held.pop(task_id, None)
        if held is not None:
            pool, replica, _, breaker = held
            replica.held.discard(task_id)
            breaker.end(task_id)
            self._changed(pool)

    def accepted(self, pool_id: str | None) -> int:
        """Tasks that hold a slot, of one pool or of all."""
        if pool_id is None:
            return len(self._held) + len(self._waiting)
        pool = self._pools.get(pool_id)
        return 0 if pool is None else pool.busy

    def holders(self) -> list[str]:
        """Every task that holds a slot."""
        return [*self._held, *self._waiting]

    # ------------------------------------------------------------ what becomes of tasks

    def told(self, task_id: str, failed: bool, now: float) -> None:
        """How a task that still holds its slot has ended at its engine. Nothing of one that never came to one."""
        if task_id not in self._held:
            return
        pool, replica, lease, breaker = self._held[task_id]
        if replica.breaker is not breaker or replica.state is not ReplicaState.READY or not pool.current(replica):
            return  # its engine is gone, has been replaced, or stands by with another model
        if not failed:
            if breaker.succeeded(now, trial=lease.trial):
                self._back(pool, replica, "its trial succeeded")
        elif breaker.failed(now, trial=lease.trial):
            if may_eject(breaker, _ready(pool)):
                lasts_s = breaker.eject(now)
                self._note("replica.ejected", pool, replica, f"{breaker.why}; for {lasts_s:.0f} s")
            elif breaker.phase is Phase.HALF_OPEN:
                breaker.close(now)
                self._back(pool, replica, "too few others are left")

    def tick(self, now: float) -> list[Note]:
        """What time does, and what became of other replicas. Returns what is to be noted since the last time."""
        for pool in self._pools.values():
            for replica in pool.replicas.values():
                if replica.breaker.advance(now):
                    self._changed(pool)
            for breaker in surplus(_ready(pool)):
                breaker.close(now)
                replica = next(each for each in pool.replicas.values() if each.breaker is breaker)
                self._back(pool, replica, "too few others are left")
        notes, self._notes = self._notes, []
        return notes

    def _back(self, pool: Pool, replica: Replica, why: str) -> None:
        self._note("replica.readmitted", pool, replica, why)

    def _note(self, event: str, pool: Pool, replica: Replica, why: str) -> None:
        self._notes.append(Note(event, pool.id, replica.id, why))
        self._changed(pool)


def _ready(pool: Pool) -> list[Breaker]:
    return [replica.breaker for replica in pool.serving]
