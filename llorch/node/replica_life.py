"""The life of one replica: started, taken over, probed, lost, ended, and when it is started again.

Owns those steps, and the counting of failures: a backoff that doubles, and an end to trying. Which replicas should run,
and with which model, is decided elsewhere; what a handoff means too. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llorch.backoff import Backoff
from llorch.breaker import Breaker
from llorch.errors import Code
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from llorch.node.pool_events import Action, ReplicaState, Step, step
from llorch.node.replicas import DOWN, Failures, Pool, Replica

RESTART = Backoff(first_s=1.0, most_s=60.0)
STABLE_S = 300.0  # ready for this long: what went before is forgotten
MAX_ERROR_CHARS = 1_000


class Life:
    """`changed` is called with a pool whose report has changed."""

    def __init__(self, pools: Mapping[str, Pool], changed: Callable[[Pool], None]) -> None:
        self._pools = pools
        self._changed = changed

    def find(self, pool_id: str, replica_id: str) -> tuple[Pool, Replica] | None:
        pool = self._pools.get(pool_id)
        replica = pool.replicas.get(replica_id) if pool else None
        return (pool, replica) if pool and replica else None

    # ------------------------------------------------------------ up

    def start(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        """From being down to being on its way, with the pool's model or the one that it was given as the next."""
        model = replica.model if replica.next else pool.model
        assert model is not None  # nothing is started for no model
        replica.state = step(replica.state, Step.START)
        replica.model = model
        replica.retry_at = None
        replica.started_at = now
        replica.run += 1
        replica.served = False
        self._changed(pool)
        if replica.owned:
            return [ev.Spawn(pool.id, replica.id, replica.run, model, pool.choices[model])]
        spec = pool.spec
        assert spec is not None and spec.url is not None  # the settings give every external pool its URL
        return self.write(replica, _offer(pool, replica, model))

    def write(self, replica: Replica, handoff: Handoff) -> list[Action]:
        replica.written = [*replica.written[-1:], handoff]
        return [ev.WriteHandoff(handoff)]

    def spawned(self, event: ev.Spawned) -> list[Action]:
        found = self.find(event.handoff.pool_id, event.handoff.replica_id)
        if found is None or found[1].run != event.run or found[1].state is not ReplicaState.STARTING:
            return []
        pool, replica = found
        pool.version = event.handoff.engine_version
        self._changed(pool)
        return self.write(replica, event.handoff)

    def taken_over(self, pool: Pool, replica: Replica, handoff: Handoff, now: float) -> list[Action]:
        """As if it had been started here. `now` may be long after its real start, which is nobody's load time."""
        replica.state = step(replica.state, Step.START)
        replica.model = handoff.model
        replica.started_at = now
        replica.run += 1
        replica.served = True  # its last words may be somebody's prompt
        pool.version = handoff.engine_version
        self._changed(pool)
        return [ev.TakeOver(pool.id, replica.id, replica.run, handoff), *self.write(replica, handoff)]

    # ------------------------------------------------------------ probes

    def probe(self, pool: Pool, replica: Replica, handoff: Handoff, why: Step) -> list[Action]:
        replica.state = step(replica.state, why)
        replica.handoff = handoff
        replica.ready_at = None
        replica.probe += 1
        self._changed(pool)
        return [ev.Probe(pool.id, replica.id, replica.probe, handoff)]

    def answered(self, event: ev.ProbeOk, now: float) -> list[Action]:
        found = self.find(event.pool_id, event.replica_id)
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

    def probe_failed(self, event: ev.ProbeFailed) -> list[Action]:
        found = self.find(event.pool_id, event.replica_id)
        if found is None or found[1].probe != event.probe or found[1].state is not ReplicaState.PROBING:
            return []
        pool, replica = found
        if pool.last_error != event.reason[:MAX_ERROR_CHARS] and not replica.next:
            pool.last_error = event.reason[:MAX_ERROR_CHARS]
            self._changed(pool)
        if not event.gave_up or not replica.owned:
            return []
        replica.verdict = event.reason  # its end is then one like any other: counted, and followed by a new start
        return [ev.Terminate(pool.id, replica.id)]

    def lost(self, event: ev.EngineLost) -> list[Action]:
        found = self.find(event.pool_id, event.replica_id)
        if found is None or found[1].state is not ReplicaState.READY or found[1].handoff is None:
            return []
        pool, replica = found
        pool.last_error = event.reason[:MAX_ERROR_CHARS]
        return self.probe(pool, replica, found[1].handoff, Step.LOST)

    def stalled(self, event: ev.Stalled) -> list[Action]:
        """No new tasks; those that it has will not end by themselves. An engine of ours is then started anew."""
        found = self.find(event.pool_id, event.replica_id)
        if found is None or found[1].state is not ReplicaState.READY:
            return []
        pool, replica = found
        pool.last_error = event.reason[:MAX_ERROR_CHARS]
        tasks = ev.EndTasks(tuple(sorted(replica.held)), Code.ENGINE_STALLED, event.reason)
        note = ev.Note("engine.stalled", pool.id, replica.id, event.reason)
        if replica.owned:
            replica.verdict = event.reason
            return [note, tasks, *self.drain(pool, replica)]
        assert replica.handoff is not None  # a ready replica was probed at its handoff
        return [note, tasks, *self.probe(pool, replica, replica.handoff, Step.LOST)]

    # ------------------------------------------------------------ down

    def drain(self, pool: Pool, replica: Replica) -> list[Action]:
        """It takes no new task, and is stopped when the last one has ended."""
        replica.state = step(replica.state, Step.DRAIN)
        self._changed(pool)
        return []

    def stop(self, pool: Pool, replica: Replica) -> list[Action]:
        replica.state = step(replica.state, Step.STOP)
        replica.ready_at = None
        self._changed(pool)
        return [ev.StopProbe(pool.id, replica.id), ev.Terminate(pool.id, replica.id)]

    def exited(self, event: ev.Exited, now: float) -> tuple[Pool, Replica, bool, list[Action]] | None:
        """(its pool, the replica, whether it had been asked to, what follows); None for the end of an earlier run."""
        found = self.find(event.pool_id, event.replica_id)
        if found is None or found[1].run != event.run or found[1].state in DOWN:
            return None
        pool, replica = found
        asked = replica.state is ReplicaState.STOPPING and replica.verdict is None
        replica.state = step(replica.state, Step.EXITED)
        stable = replica.ready_at is not None and now - replica.ready_at >= STABLE_S
        replica.handoff, replica.ready_at = None, None
        # An engine's own words tell why it did not start. Once it has served, they may be somebody's prompt.
        reason = f"{event.reason}: {event.said}" if event.said and not replica.served else event.reason
        actions: list[Action] = [ev.StopProbe(pool.id, replica.id)]
        actions.append(ev.Note("engine.ended", pool.id, replica.id, "stopped" if asked else reason))
        if not asked:
            pool.last_error = (replica.verdict or reason)[:MAX_ERROR_CHARS]
            if stable:
                self.failures_of(pool, replica).forget()
        replica.verdict = None
        self._changed(pool)
        return pool, replica, asked, actions

    def failed(self, pool: Pool, replica: Replica, event: ev.Exited, now: float) -> list[Action]:
        """An end that nobody asked for is counted: it is tried again later, or not any more."""
        failures = self.failures_of(pool, replica)
        if failures.count(now) or event.hopeless:
            replica.state = step(replica.state, Step.GAVE_UP)
            return [ev.Note("pool.failed", pool.id, replica.id, pool.last_error or "")]
        replica.retry_at = now + RESTART.delay_s(failures.in_a_row, event.chance)
        return []

    def failures_of(self, pool: Pool, replica: Replica) -> Failures:
        """Of a model, where models come and go; of the replica, where it has one for good."""
        if pool.on_demand and replica.model is not None:
            return pool.troubles.setdefault(replica.model, Failures())
        return replica.failures


def _offer(pool: Pool, replica: Replica, model: str) -> Handoff:
    """The handoff of an engine that the settings say is there."""
    spec = pool.spec
    assert spec is not None and spec.url is not None
    return Handoff(
        pool_id=pool.id,
        replica_id=replica.id,
        engine=spec.engine,
        url=spec.url,
        model=model,
        slots=spec.slots,
        ctx=spec.ctx,
        device_mask=pool.device_mask,
        api_key_file=spec.api_key_file,
        engine_model=spec.engine_model,
    )
