"""What handoff files mean for the pools: whose a file is, what it offers, what becomes of one that is wrong or gone.

Owns those rules. An engine of ours is offered by a file like anybody's; foreign content under its name is refused and
written anew. Everything that then happens to a replica is `replica_life`'s. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llorch.config_pools import MAX_POOLS
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff, file_name
from llorch.node.pool_events import Action, ReplicaState, Step
from llorch.node.replica_life import MAX_ERROR_CHARS, UNSEEN_S, Life
from llorch.node.replicas import ALIVE, DOWN, Pool, Replica

MAX_REPLICAS = 256


class Handoffs:
    """`pools` gets a pool more for an engine that was handed over to none that there is."""

    def __init__(self, pools: dict[str, Pool], life: Life, changed: Callable[[Pool], None]) -> None:
        self._pools = pools
        self._life = life
        self._changed = changed

    def seen(self, handoff: Handoff, now: float) -> list[Action]:
        held = self._named(handoff.file_name)
        if held is None or (held[0].id, held[1].id) == (handoff.pool_id, handoff.replica_id):
            return self._accept(handoff, now)
        if held[1].spawned:
            return self.bad(handoff.file_name, f"it is the file of {held[0].id}/{held[1].id}", now)
        gone = self.gone(handoff.file_name, f"its file is about {handoff.pool_id}/{handoff.replica_id} now", now)
        return gone + self._accept(handoff, now)

    def bad(self, name: str, reason: str, now: float) -> list[Action]:
        pool, replica = self._named(name) or (None, None)
        note = self._invalid(pool, replica, name, reason)
        if pool is not None and replica is not None and replica.spawned:
            replica.seen = None
            if replica.state is ReplicaState.STARTING:
                pool.last_error = f"its handoff is invalid: {reason}"  # an external engine's URL may be refused
                self._changed(pool)
            return [note, *self._rewrite(replica)]
        return [note, *self.gone(name, f"its handoff is invalid: {reason}", now)]

    def gone(self, name: str, reason: str, now: float) -> list[Action]:
        found = self._named(name)
        if found is None:
            return []
        pool, replica = found
        replica.seen = None
        if replica.owned:
            # In the other states the file is not there yet, or was removed by ourselves.
            if replica.state not in ALIVE:
                return []
            replica.wanted = False
            if replica.next:
                replica.verdict = reason
            else:
                pool.last_error = reason[:MAX_ERROR_CHARS]
            return self._life.stop(pool, replica)
        if replica.state in DOWN:
            return []
        if replica.spawned and (replica.withdrawn_at is None or now - replica.withdrawn_at > UNSEEN_S):
            replica.wanted = False  # somebody took it away, and not we ourselves
        pool.last_error = reason[:MAX_ERROR_CHARS]
        return self._life.withdrawn(pool, replica)

    # ------------------------------------------------------------ inside

    def _named(self, name: str) -> tuple[Pool, Replica] | None:
        """Whose file this is. Two may share a name (a-b/c and a/b-c); then it is of the one that stands by it."""
        found = [(pool, replica) for pool, replica in self._each() if file_name(pool.id, replica.id) == name]
        return max(found, key=lambda each: (each[1].spawned, each[1].handoff is not None), default=None)

    def _each(self) -> Iterator[tuple[Pool, Replica]]:
        for pool in self._pools.values():
            for replica in pool.replicas.values():
                yield pool, replica

    def _accept(self, handoff: Handoff, now: float) -> list[Action]:
        pool = self._pools.get(handoff.pool_id)
        replica = pool.replicas.get(handoff.replica_id) if pool else None
        if pool and replica and replica.spawned:
            return self._seen_own(pool, replica, handoff)
        refusal = self._refusal(pool, replica, handoff)
        if refusal:
            return self.bad(handoff.file_name, refusal, now)
        if pool is None:
            pool = self._pools[handoff.pool_id] = Pool(handoff.pool_id, handoff.engine, handoff.model, None)
        if replica is None:
            self._make_room(pool)
            replica = pool.replicas[handoff.replica_id] = Replica(handoff.replica_id, owned=False, spawned=False)
        elif replica.handoff == handoff and replica.state is not ReplicaState.EXITED:
            return []
        pool.model = replica.model = handoff.model
        if pool.spec is None:
            pool.engine, pool.version = handoff.engine, handoff.engine_version
            pool.device_mask = handoff.device_mask
        replica.slots = handoff.slots or 1
        replica.started_at, replica.served = now, False
        return self._life.probe(pool, replica, handoff, Step.SEEN)

    def _seen_own(self, pool: Pool, replica: Replica, handoff: Handoff) -> list[Action]:
        replica.seen = handoff
        if handoff != replica.offered:
            if handoff in replica.earlier:
                return []  # an earlier run's file, read just before it was replaced
            reason = "this replica's handoff is written by llorch"
            return [self._invalid(pool, replica, handoff.file_name, reason), *self._rewrite(replica)]
        if replica.state is ReplicaState.STARTING:
            return self._life.probe(pool, replica, handoff, Step.SEEN)
        if replica.state is ReplicaState.EXITED and not replica.owned and not replica.wanted:
            replica.wanted = True  # whoever took it away has put it back: the next tick begins with it
        return []

    def _rewrite(self, replica: Replica) -> list[Action]:
        offered = replica.offered is not None and replica.state not in (*DOWN, ReplicaState.STOPPING)
        return [ev.WriteHandoff(replica.offered)] if offered and replica.offered is not None else []

    def _refusal(self, pool: Pool | None, replica: Replica | None, handoff: Handoff) -> str | None:
        if pool is None:
            return f"this node has {MAX_POOLS} pools already" if not self._room() else None
        if pool.on_demand:
            return f"the models of pool {pool.id} come and go, and a handed over engine has one"
        others = (other for other in pool.replicas.values() if other is not replica)
        settled = pool.spec is not None or any(other.state is not ReplicaState.EXITED for other in others)
        if settled and handoff.model != pool.model:
            return f"pool {pool.id} serves another model"
        if replica is None and len(pool.replicas) >= MAX_REPLICAS and not any(map(_unused, pool.replicas.values())):
            return f"pool {pool.id} has {MAX_REPLICAS} replicas already"
        return None

    def _room(self) -> bool:
        """Whether one more pool fits, if need be in the place of one whose engines were all withdrawn."""
        if len(self._pools) < MAX_POOLS:
            return True
        for pool in self._pools.values():
            if pool.spec is None and all(map(_unused, pool.replicas.values())):
                del self._pools[pool.id]
                self._changed(pool)
                return True
        return False

    def _make_room(self, pool: Pool) -> None:
        if len(pool.replicas) >= MAX_REPLICAS:
            del pool.replicas[next(replica.id for replica in pool.replicas.values() if _unused(replica))]

    def _invalid(self, pool: Pool | None, replica: Replica | None, name: str, reason: str) -> ev.Note:
        pool_id, replica_id = pool.id if pool else None, replica.id if replica else None
        return ev.Note("handoff.invalid", pool_id, replica_id, reason, name)


def _unused(replica: Replica) -> bool:
    """Whether it is one of others that was withdrawn, and nothing of it is left."""
    return not replica.spawned and replica.state is ReplicaState.EXITED and not replica.held
