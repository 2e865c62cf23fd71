"""The life of one replica: started, taken over, probed, lost, ended, and when it is started again.

Owns those steps, and the counting of failures: a backoff that doubles, and an end to trying. Which replicas should run,
and with which model, is decided elsewhere; what a handoff means too. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
UNSEEN_S = 15.0  # a handoff that was written is seen within three rescans of its directory
KEPT_OFFERS = 3  # of earlier runs: how many of their files are known, should they be read late


@dataclass(frozen=True, slots=True)
class Ended:
    """A replica that is down. `asked`: we told it to, for no fault of its own. `why`: what is to be said of it."""

    pool: Pool
    replica: Replica
    asked: bool
    why: str


class Life:
    """`changed` is called with a pool whose report has changed."""

    def __init__(self, pools: Mapping[str, Pool], changed: Callable[[Pool], None]) -> None:
        self._pools = pools
        self._changed = changed
        self._runs = self._probes = 0  # no number is used twice, though names are

    def find(self, pool_id: str, replica_id: str) -> tuple[Pool, Replica] | None:
        pool = self._pools.get(pool_id)
        replica = pool.replicas.get(replica_id) if pool else None
        return (pool, replica) if pool and replica else None

    # ------------------------------------------------------------ up

    def start(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        """From being down to being on its way, with the pool's model or the one that it was given as the next."""
        if not replica.next:
            assert pool.model is not None  # nothing is started for no model
            replica.model, replica.ref = pool.model, pool.choices[pool.model]
        assert replica.model is not None and replica.ref is not None  # whoever makes a next one gives it both
        self._begin_run(pool, replica, now)
        if replica.owned:
            return [ev.Spawn(pool.id, replica.id, replica.run, replica.model, replica.ref)]
        return self.offer(pool, replica, _external(pool, replica, replica.model), now)

    def _begin_run(self, pool: Pool, replica: Replica, now: float) -> None:
        replica.state = step(replica.state, Step.START)
        if replica.offered is not None and replica.owned:
            replica.earlier = (*replica.earlier, replica.offered)[-KEPT_OFFERS:]
            replica.offered = None
        replica.revision, replica.retry_at, replica.started_at = pool.revision, None, now
        replica.slots = pool.spec.slots if pool.spec is not None else replica.slots
        self._runs += 1
        replica.run = self._runs
        replica.served = False
        self._changed(pool)

    def offer(self, pool: Pool, replica: Replica, handoff: Handoff, now: float) -> list[Action]:
        """Have its handoff written. If the file says just that already, nobody will tell of it again."""
        replica.offered, replica.offered_at = handoff, now
        actions: list[Action] = [ev.WriteHandoff(handoff)]
        if replica.seen == handoff and replica.state is ReplicaState.STARTING:
            actions += self.probe(pool, replica, handoff, Step.SEEN)
        return actions

    def offer_again(self, pool: Pool, replica: Replica, now: float) -> list[Action]:
        """Of a start whose file nobody sees: somebody may have removed it before it was seen."""
        unseen = replica.state is ReplicaState.STARTING and now - replica.offered_at >= UNSEEN_S
        return self.offer(pool, replica, replica.offered, now) if unseen and replica.offered is not None else []

    def spawned(self, event: ev.Spawned, now: float) -> list[Action]:
        found = self.find(event.handoff.pool_id, event.handoff.replica_id)
        if found is None or found[1].run != event.run or found[1].state is not ReplicaState.STARTING:
            return []
        pool, replica = found
        pool.version = event.handoff.engine_version
        self._changed(pool)
        return self.offer(pool, replica, event.handoff, now)

    def taken_over(self, pool: Pool, replica: Replica, event: ev.Adopted, now: float) -> list[Action]:
        """As if it had been started here. `now` may be long after its real start, which is nobody's load time."""
        replica.model, replica.ref = event.model, event.ref
        self._begin_run(pool, replica, now)
        replica.served = True  # its last words may be somebody's prompt
        pool.version = event.handoff.engine_version
        take_over = ev.TakeOver(pool.id, replica.id, replica.run, event.handoff)
        return [take_over, *self.offer(pool, replica, event.handoff, now)]

    # ------------------------------------------------------------ probes

    def probe(self, pool: Pool, replica: Replica, handoff: Handoff, why: Step) -> list[Action]:
        replica.state = step(replica.state, why)
        replica.handoff = handoff
        replica.ready_at = None
        self._probes += 1
        replica.probe = self._probes
        self._changed(pool)
        return [ev.Probe(pool.id, replica.id, replica.probe, handoff)]

    def answered(self, event: ev.ProbeOk, now: float) -> list[Action]:
        found = self.find(event.pool_id, event.replica_id)
        if found is None or found[1].probe != event.probe or found[1].state is not ReplicaState.PROBING:
            return []
        pool, replica = found
        replica.state = step(replica.state, Step.ANSWERED)
        if not replica.served:  # else it was lost for a while, or loaded by an earlier agent
            pool.load_s = round(now - replica.started_at, 3)
        replica.ready_at, replica.served, replica.breaker = now, True, Breaker()
        handoff = replica.handoff
        if handoff is not None and handoff.slots is None and event.slots and not replica.spawned:
            replica.slots = event.slots
        ctx = (handoff.ctx if handoff else None) or event.ctx
        if ctx is not None and (pool.spec is None or pool.spec.ctx is None):
            pool.ctx = ctx
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
        return self.stop(pool, replica)

    def lost(self, event: ev.EngineLost, now: float) -> list[Action]:
        found = self.find(event.pool_id, event.replica_id)
        if found is None or found[1].state is not ReplicaState.READY or found[1].handoff is None:
            return []
        pool, replica = found
        self._steady(pool, replica, now)
        pool.last_error = event.reason[:MAX_ERROR_CHARS]
        return self.probe(pool, replica, found[1].handoff, Step.LOST)

    def stalled(self, event: ev.Stalled, now: float) -> list[Action]:
        """No new tasks; those that it has will not end by themselves. An engine of ours is then started anew."""
        found = self.find(event.pool_id, event.replica_id)
        if found is None or found[1].state is not ReplicaState.READY:
            return []
        pool, replica = found
        pool.last_error = event.reason[:MAX_ERROR_CHARS]
        actions: list[Action] = [ev.Note("engine.stalled", pool.id, replica.id, event.reason)]
        if replica.held:
            actions.append(ev.EndTasks(tuple(sorted(replica.held)), Code.ENGINE_STALLED, event.reason))
        self._steady(pool, replica, now)
        if replica.owned:
            replica.verdict = event.reason
            return actions + self.drain(pool, replica)
        assert replica.handoff is not None  # a ready replica was probed at its handoff
        return actions + self.probe(pool, replica, replica.handoff, Step.LOST)

    # ------------------------------------------------------------ down

    def drain(self, pool: Pool, replica: Replica) -> list[Action]:
        """It takes no new task, and is stopped when the last one has ended."""
        replica.state = step(replica.state, Step.DRAIN)
        self._changed(pool)
        return []

    def stop(self, pool: Pool, replica: Replica) -> list[Action]:
        replica.state = step(replica.state, Step.STOP)
        self._changed(pool)
        return [ev.StopProbe(pool.id, replica.id), ev.Terminate(pool.id, replica.id)]

    def withdrawn(self, pool: Pool, replica: Replica) -> list[Action]:
        """It is not offered any more. The engine, which is not ours, goes on."""
        replica.state = step(replica.state, Step.WITHDRAWN)
        replica.handoff, replica.ready_at = None, None
        self._changed(pool)
        return [ev.StopProbe(pool.id, replica.id)]

    def exited(self, event: ev.Exited, now: float) -> tuple[Ended, list[Action]] | None:
        """What is to be known of it, and what follows at once; None for the end of an earlier run."""
        found = self.find(event.pool_id, event.replica_id)
        if found is None or found[1].run != event.run or found[1].state in DOWN or not found[1].owned:
            return None
        pool, replica = found
        asked = replica.state is ReplicaState.STOPPING and replica.verdict is None
        replica.state = step(replica.state, Step.EXITED)
        self._steady(pool, replica, now)
        # An engine's own words tell why it did not start. Once it has served, they may be somebody's prompt.
        reason = f"{event.reason}: {event.said}" if event.said and not replica.served else event.reason
        why = (replica.verdict or reason)[:MAX_ERROR_CHARS]
        note = ev.Note("engine.ended", pool.id, replica.id, "stopped" if asked else reason)
        if not asked and not replica.next:
            pool.last_error = why
        replica.handoff, replica.verdict = None, None
        self._changed(pool)
        return Ended(pool, replica, asked, why), [ev.StopProbe(pool.id, replica.id), note]

    def failed(self, ended: Ended, event: ev.Exited, now: float) -> list[Action]:
        """An end that nobody asked for is counted: it is tried again later, or not any more."""
        pool, replica = ended.pool, ended.replica
        failures = self.failures_of(pool, replica)
        if failures.count(now, hopeless=event.hopeless):
            replica.state = step(replica.state, Step.GAVE_UP)
            return [ev.Note("pool.failed", pool.id, replica.id, ended.why)]
        replica.retry_at = now + RESTART.delay_s(failures.in_a_row, event.chance)
        return []

    def _steady(self, pool: Pool, replica: Replica, now: float) -> None:
        """It is not ready any more. If it was for long, its failures before that count no longer."""
        if replica.ready_at is not None and now - replica.ready_at >= STABLE_S:
            self.failures_of(pool, replica).steady()
        replica.ready_at = None

    def failures_of(self, pool: Pool, replica: Replica) -> Failures:
        """Of a model, where models come and go; of the replica, where it has one for good."""
        if pool.on_demand and replica.model is not None:
            return pool.troubles.setdefault(replica.model, Failures())
        return replica.failures


def _external(pool: Pool, replica: Replica, model: str) -> Handoff:
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
