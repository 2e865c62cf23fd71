"""The pools of this node: which engines there are, which of them may be used, and who holds a slot of which.

Surface:
    Pools(specs, models)                 what the settings ask for; `models`: the model id of each spec's pool
    handle(event, now) -> list[Action]   everything that happens, in the words of `pool_events`; do the actions in order
    acquire(pool_id, task_id, model)     a slot: a Lease, or LlorchError; release(task_id) gives it back, however often
    told(task_id, failed, now)           before the release: how the task went at its engine, where that says something
    report(), pool_report(id), health(id)    CONTRACT's PoolReport and health, as dicts
    subscribe(callback)                  called with a pool id when its report has changed (its `generation` went up)

Owns the state of every pool and replica, restarts and their backoff; `slots` owns who holds what. A replica that was
handed over goes the same way as one that was spawned; they differ in `owned`, and only owned ones are ever terminated.
Pure: no clock, no process, no file. `now` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from llorch.backoff import Backoff
from llorch.breaker import Breaker
from llorch.config_pools import MAX_POOLS, PoolSpec
from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff, file_name
from llorch.node.pool_events import Action, Event, ReplicaState, Step, step
from llorch.node.replicas import ALIVE, DOWN, Lease, Pool, Replica, average
from llorch.node.slots import Slots

RESTART = Backoff(first_s=1.0, most_s=60.0)
STABLE_S = 300.0  # ready for this long: what went before is forgotten
FAILURES = 5  # this many ends within FAILURE_WINDOW_S, and a person has to look
FAILURE_WINDOW_S = 300.0
MAX_REPLICAS = 256
MAX_ERROR_CHARS = 1_000
EXTERNAL = "external"


class Pools:
    """Every pool of this node. One owner calls it, from one thread."""

    def __init__(self, specs: Iterable[PoolSpec], models: Mapping[str, str]) -> None:
        self.draining = False
        self._pools: dict[str, Pool] = {}
        self._slots = Slots(self._pools, self._changed)
        self._listeners: list[Callable[[str], None]] = []
        for spec in specs:
            pool = Pool(spec.id, spec.engine, models[spec.id], spec, ctx=spec.ctx)
            pool.device_mask = ",".join(map(str, spec.gpus or ())) or None
            for number in range(spec.replicas):
                replica = Replica(f"r{number}", owned=spec.engine != EXTERNAL, spawned=True, slots=spec.slots)
                pool.replicas[replica.id] = replica
            self._pools[spec.id] = pool

    def subscribe(self, callback: Callable[[str], None]) -> None:
        self._listeners.append(callback)

    def _changed(self, pool: Pool) -> None:
        pool.generation += 1
        for callback in self._listeners:
            callback(pool.id)

    # ------------------------------------------------------------ slots

    def acquire(self, pool_id: str, task_id: str, model: str | None = None) -> Lease:
        """A slot of the least busy ready replica, until `release(task_id)`. Raises LlorchError, with nothing taken."""
        pool = self._pools.get(pool_id)
        if pool is None:
            raise LlorchError(Code.POOL_NOT_FOUND, f"this node has no pool {pool_id}")
        if self.draining or pool.draining:
            raise LlorchError(Code.DRAINING, f"{'this node' if self.draining else f'pool {pool_id}'} is draining")
        if model is not None and model != pool.model:
            raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"pool {pool_id} serves {pool.model}")
        if not pool.ready:
            raise LlorchError(
                Code.MODEL_NOT_AVAILABLE,
                f"pool {pool_id} is {pool.state(self.draining)}",
                details={"state": pool.state(self.draining).value, "last_error": pool.last_error},
            )
        return self._slots.take(pool, task_id)

    def release(self, task_id: str) -> None:
        """Give the slot back. A task that holds none is no error: whoever ends a task may say so."""
        self._slots.give_back(task_id)

    def told(self, task_id: str, failed: bool, now: float) -> None:
        """How a task, which still holds its slot, went at its engine."""
        self._slots.told(task_id, failed, now)

    def accepted(self, pool_id: str | None = None) -> int:
        """Tasks that hold a slot, of one pool or of all."""
        return self._slots.accepted(pool_id)

    # ------------------------------------------------------------ what happens

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in what happened; what is to be done about it. Stale and repeated events do nothing."""
        match event:
            case ev.Start():
                return [action for pool in self._pools.values() for action in self._load(pool, now)]
            case ev.Tick():
                return self._tick(now)
            case ev.Spawned():
                return self._spawned(event)
            case ev.Exited():
                return self._exited(event, now)
            case ev.HandoffSeen():
                return self._seen(event.handoff, now)
            case ev.HandoffBad():
                return self._bad(event.name, event.reason, now)
            case ev.HandoffGone():
                return self._gone(event.name, "its handoff file was removed", now)
            case ev.ProbeOk():
                return self._answered(event, now)
            case ev.ProbeFailed():
                return self._probe_failed(event)
            case ev.EngineLost():
                return self._lost(event)
            case ev.Drain() | ev.Undrain():
                return self._drain(event.pool_id, isinstance(event, ev.Drain))
            case ev.Load():
                return self._load(self._pool(event.pool_id), now, failed_too=True)
            case ev.Unload() | ev.Restart():
                return self._retire(self._pool(event.pool_id), now, again=isinstance(event, ev.Restart))

    def _pool(self, pool_id: str) -> Pool:
        try:
            return self._pools[pool_id]
        except KeyError:
            raise LlorchError(Code.POOL_NOT_FOUND, f"this node has no pool {pool_id}") from None

    def _find(self, pool_id: str, replica_id: str) -> tuple[Pool, Replica] | None:
        pool = self._pools.get(pool_id)
        replica = pool.replicas.get(replica_id) if pool else None
        return (pool, replica) if pool and replica else None

    def _named(self, name: str) -> tuple[Pool, Replica] | None:
        """Whose file this is. Two may share a name (a-b/c and a/b-c); then it is of the one that stands by it."""
        found = [(pool, replica) for pool, replica in self._each() if file_name(pool.id, replica.id) == name]
        return max(found, key=lambda each: (each[1].spawned, each[1].handoff is not None), default=None)

    def _each(self) -> Iterator[tuple[Pool, Replica]]:
        for pool in self._pools.values():
            for replica in pool.replicas.values():
                yield pool, replica

    # ------------------------------------------------------------ starting and ending

    def _load(self, pool: Pool, now: float, *, failed_too: bool = False) -> list[Action]:
        actions: list[Action] = []
        for replica in pool.replicas.values():
            if not replica.spawned:
                continue
            replica.wanted = True
            if failed_too:
                replica.failures.clear()
                replica.in_a_row = 0
            if replica.state in DOWN:
                actions += self._start(pool, replica, now)
        return actions

    def _start(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        replica.state = step(replica.state, Step.START)
        replica.retry_at = None
        replica.started_at = now
        replica.run += 1
        replica.served = False
        self._changed(pool)
        if replica.owned:
            return [ev.Spawn(pool.id, replica.id, replica.run)]
        spec = pool.spec
        assert spec is not None and spec.url is not None  # the settings give every external pool its URL
        handoff = Handoff(
            pool_id=pool.id,
            replica_id=replica.id,
            engine=spec.engine,
            url=spec.url,
            model=pool.model,
            slots=spec.slots,
            ctx=spec.ctx,
            device_mask=pool.device_mask,
            api_key_file=spec.api_key_file,
        )
        return self._write(replica, handoff)

    def _write(self, replica: Replica, handoff: Handoff) -> list[Action]:
        replica.written = [*replica.written[-1:], handoff]
        return [ev.WriteHandoff(handoff)]

    def _spawned(self, event: ev.Spawned) -> list[Action]:
        found = self._find(event.handoff.pool_id, event.handoff.replica_id)
        if found is None or found[1].run != event.run or found[1].state is not ReplicaState.STARTING:
            return []
        pool, replica = found
        pool.version = event.handoff.engine_version
        self._changed(pool)
        return self._write(replica, event.handoff)

    def _exited(self, event: ev.Exited, now: float) -> list[Action]:
        found = self._find(event.pool_id, event.replica_id)
        if found is None or found[1].run != event.run or found[1].state in DOWN:
            return []
        pool, replica = found
        asked = replica.state is ReplicaState.STOPPING
        replica.state = step(replica.state, Step.EXITED)
        stable = replica.ready_at is not None and now - replica.ready_at >= STABLE_S
        replica.handoff, replica.ready_at = None, None
        actions: list[Action] = [ev.StopProbe(pool.id, replica.id)]
        # An engine's own words tell why it did not start. Once it has served, they may be somebody's prompt.
        reason = f"{event.reason}: {event.said}" if event.said and not replica.served else event.reason
        actions.append(ev.Note("engine.ended", pool.id, replica.id, "stopped" if asked else reason))
        if asked:
            if replica.wanted:
                actions += self._start(pool, replica, now)
        else:
            pool.last_error = (replica.verdict or reason)[:MAX_ERROR_CHARS]
            actions += self._count_failure(pool, replica, event, now, stable=stable)
        self._changed(pool)
        return actions

    def _count_failure(
        self, pool: Pool, replica: Replica, event: ev.Exited, now: float, *, stable: bool
    ) -> list[Action]:
        replica.verdict = None
        if stable:
            replica.in_a_row = 0
            replica.failures.clear()
        replica.in_a_row += 1
        replica.failures.append(now)
        while replica.failures and now - replica.failures[0] > FAILURE_WINDOW_S:
            replica.failures.popleft()
        if len(replica.failures) >= FAILURES:
            replica.state = step(replica.state, Step.GAVE_UP)
            return [ev.Note("pool.failed", pool.id, replica.id, pool.last_error or "")]
        if replica.wanted:
            replica.retry_at = now + RESTART.delay_s(replica.in_a_row, event.chance)
        return []

    def _tick(self, now: float) -> list[Action]:
        actions: list[Action] = list(self._slots.tick(now))
        for pool, replica in list(self._each()):
            if replica.state is ReplicaState.EXITED and replica.retry_at is not None and now >= replica.retry_at:
                actions += self._start(pool, replica, now)
            elif replica.state is ReplicaState.DRAINING and not replica.held:
                actions += self._stop(pool, replica)
        return actions

    def _retire(self, pool: Pool, now: float, *, again: bool) -> list[Action]:
        """Unload, or restart: ready replicas finish their tasks first."""
        actions: list[Action] = []
        for replica in pool.replicas.values():
            if not replica.owned:
                continue
            replica.wanted = again
            if replica.state is ReplicaState.READY:
                replica.state = step(replica.state, Step.DRAIN)
            elif replica.state in (ReplicaState.STARTING, ReplicaState.PROBING):
                actions += self._stop(pool, replica)
            elif replica.state in DOWN:
                replica.retry_at = None
                if again:
                    replica.failures.clear()
                    replica.in_a_row = 0
                    actions += self._start(pool, replica, now)
        self._changed(pool)
        return actions + self._tick(now)

    def _stop(self, pool: Pool, replica: Replica) -> list[Action]:
        replica.state = step(replica.state, Step.STOP)
        replica.ready_at = None
        self._changed(pool)
        return [ev.StopProbe(pool.id, replica.id), ev.Terminate(pool.id, replica.id)]

    def _drain(self, pool_id: str | None, draining: bool) -> list[Action]:
        if pool_id is None:
            self.draining = draining
            for pool in self._pools.values():
                self._changed(pool)
        else:
            pool = self._pool(pool_id)
            pool.draining = draining
            self._changed(pool)
        return []

    # ------------------------------------------------------------ handoffs

    def _seen(self, handoff: Handoff, now: float) -> list[Action]:
        held = self._named(handoff.file_name)
        if held is None or (held[0].id, held[1].id) == (handoff.pool_id, handoff.replica_id):
            return self._accept(handoff, now)
        if held[1].spawned:
            return self._bad(handoff.file_name, f"it is the file of {held[0].id}/{held[1].id}", now)
        gone = self._gone(handoff.file_name, f"its file is about {handoff.pool_id}/{handoff.replica_id} now", now)
        return gone + self._accept(handoff, now)

    def _accept(self, handoff: Handoff, now: float) -> list[Action]:
        pool = self._pools.get(handoff.pool_id)
        replica = pool.replicas.get(handoff.replica_id) if pool else None
        if pool and replica and replica.spawned:
            return self._seen_own(pool, replica, handoff)
        refusal = self._refusal(pool, replica, handoff)
        if refusal:
            return self._bad(handoff.file_name, refusal, now)
        if pool is None:
            pool = self._pools[handoff.pool_id] = Pool(handoff.pool_id, handoff.engine, handoff.model, None)
        if replica is None:
            replica = pool.replicas[handoff.replica_id] = Replica(handoff.replica_id, owned=False, spawned=False)
        elif replica.handoff == handoff and replica.state is not ReplicaState.EXITED:
            return []
        pool.model = handoff.model
        if pool.spec is None:
            pool.engine, pool.version = handoff.engine, handoff.engine_version
            pool.device_mask = handoff.device_mask
        replica.slots = handoff.slots or 1
        replica.started_at = now
        return self._probe(pool, replica, handoff, Step.SEEN)

    def _seen_own(self, pool: Pool, replica: Replica, handoff: Handoff) -> list[Action]:
        if not replica.written or handoff != replica.written[-1]:
            if handoff in replica.written:
                return []  # an earlier run's file, read just before it was replaced
            reason = "this replica's handoff is written by llorch"
            return [self._invalid(pool, replica, handoff.file_name, reason), *self._rewrite(replica)]
        if replica.state is ReplicaState.STARTING or (replica.state is ReplicaState.EXITED and not replica.owned):
            return self._probe(pool, replica, handoff, Step.SEEN)
        return []

    def _rewrite(self, replica: Replica) -> list[Action]:
        offered = replica.written and replica.state not in (*DOWN, ReplicaState.STOPPING)
        return [ev.WriteHandoff(replica.written[-1])] if offered else []

    def _refusal(self, pool: Pool | None, replica: Replica | None, handoff: Handoff) -> str | None:
        if pool is None:
            return f"this node has {MAX_POOLS} pools already" if not self._room() else None
        others = (other for other in pool.replicas.values() if other is not replica)
        settled = pool.spec is not None or any(other.state is not ReplicaState.EXITED for other in others)
        if settled and handoff.model != pool.model:
            return f"pool {pool.id} serves another model"
        if replica is None and len(pool.replicas) >= MAX_REPLICAS:
            return f"pool {pool.id} has {MAX_REPLICAS} replicas already"
        return None

    def _room(self) -> bool:
        """Whether one more pool fits, if need be in the place of one whose engines were all withdrawn."""
        if len(self._pools) < MAX_POOLS:
            return True
        for pool in self._pools.values():
            if pool.spec is None and not any(r.held or r.state in ALIVE for r in pool.replicas.values()):
                del self._pools[pool.id]
                return True
        return False

    def _invalid(self, pool: Pool | None, replica: Replica | None, name: str, reason: str) -> ev.Note:
        pool_id, replica_id = pool.id if pool else None, replica.id if replica else None
        return ev.Note("handoff.invalid", pool_id, replica_id, reason, name)

    def _bad(self, name: str, reason: str, now: float) -> list[Action]:
        pool, replica = self._named(name) or (None, None)
        note = self._invalid(pool, replica, name, reason)
        if pool is not None and replica is not None and replica.spawned:
            if replica.state is ReplicaState.STARTING:
                pool.last_error = f"its handoff is invalid: {reason}"  # an external engine's URL may be refused
                self._changed(pool)
            return [note, *self._rewrite(replica)]
        return [note, *self._gone(name, f"its handoff is invalid: {reason}", now)]

    def _gone(self, name: str, reason: str, now: float) -> list[Action]:
        found = self._named(name)
        if found is None:
            return []
        pool, replica = found
        if replica.owned:
            # In the other states the file is not there yet, or was removed by ourselves.
            if replica.state not in ALIVE:
                return []
            replica.wanted = False
            pool.last_error = reason
            return self._stop(pool, replica)
        if replica.state is ReplicaState.EXITED:
            return []
        replica.state = step(replica.state, Step.WITHDRAWN)
        replica.handoff, replica.ready_at = None, None
        pool.last_error = reason[:MAX_ERROR_CHARS]
        self._changed(pool)
        return [ev.StopProbe(pool.id, replica.id)]

    # ------------------------------------------------------------ probes

    def _probe(self, pool: Pool, replica: Replica, handoff: Handoff, why: Step) -> list[Action]:
        replica.state = step(replica.state, why)
        replica.handoff = handoff
        replica.ready_at = None
        replica.probe += 1
        self._changed(pool)
        return [ev.Probe(pool.id, replica.id, replica.probe, handoff)]

    def _answered(self, event: ev.ProbeOk, now: float) -> list[Action]:
        found = self._find(event.pool_id, event.replica_id)
        if found is None or found[1].probe != event.probe or found[1].state is not ReplicaState.PROBING:
            return []
        pool, replica = found
        replica.state = step(replica.state, Step.ANSWERED)
        replica.ready_at, replica.served, replica.breaker = now, True, Breaker()
        handoff = replica.handoff
        if handoff is not None and handoff.slots is None and event.slots:
            replica.slots = event.slots
        ctx = (handoff.ctx if handoff else None) or event.ctx
        if ctx is not None and (pool.spec is None or pool.spec.ctx is None):
            pool.ctx = ctx
        pool.load_s = round(now - replica.started_at, 3)
        if not any(other.state is ReplicaState.FAILED for other in pool.replicas.values()):
            pool.last_error = None
        self._changed(pool)
        return [ev.Note("pool.ready", pool.id, replica.id, "")]

    def _probe_failed(self, event: ev.ProbeFailed) -> list[Action]:
        found = self._find(event.pool_id, event.replica_id)
        if found is None or found[1].probe != event.probe or found[1].state is not ReplicaState.PROBING:
            return []
        pool, replica = found
        if pool.last_error != event.reason[:MAX_ERROR_CHARS]:
            pool.last_error = event.reason[:MAX_ERROR_CHARS]
            self._changed(pool)
        if not event.gave_up or not replica.owned:
            return []
        replica.verdict = event.reason  # its end is then one like any other: counted, and followed by a new start
        return [ev.Terminate(pool.id, replica.id)]

    def _lost(self, event: ev.EngineLost) -> list[Action]:
        found = self._find(event.pool_id, event.replica_id)
        if found is None or found[1].state is not ReplicaState.READY or found[1].handoff is None:
            return []
        pool, replica = found
        pool.last_error = event.reason[:MAX_ERROR_CHARS]
        return self._probe(pool, replica, found[1].handoff, Step.LOST)

    # ------------------------------------------------------------ what others may know

    def measured(self, pool_id: str, *, prompt_tps: float | None, decode_tps: float | None) -> None:
        """The speed of a task that has ended; reports carry a moving average of it."""
        pool = self._pools.get(pool_id)
        if pool is not None:
            pool.prompt_tps = average(pool.prompt_tps, prompt_tps)
            pool.decode_tps = average(pool.decode_tps, decode_tps)

    def ids(self) -> list[str]:
        return list(self._pools)

    def replicas(self) -> list[tuple[str, str, ReplicaState, Handoff | None]]:
        """(pool id, replica id, state, accepted handoff) of every replica, for whoever watches engines."""
        return [(pool.id, replica.id, replica.state, replica.handoff) for pool, replica in self._each()]

    def pool_report(self, pool_id: str) -> dict[str, Any]:
        """One PoolReport. The VRAM figures are added by whoever knows the GPUs. Raises POOL_NOT_FOUND."""
        return self._pool(pool_id).report(self.draining)

    def report(self) -> list[dict[str, Any]]:
        return [pool.report(self.draining) for pool in self._pools.values()]

    def health(self, pool_id: str) -> dict[str, Any]:
        """What `GET /v2/pools/{pool}/health` answers. Raises POOL_NOT_FOUND."""
        return self._pool(pool_id).health(self.draining)
