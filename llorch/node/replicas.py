"""What is known of one pool and of one replica, and how that reads in a report.

Owns the records that `pools` alone changes, and what follows from them: free slots, a pool's state, its report. Decides
nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from llorch.breaker import Breaker, Phase
from llorch.config_pools import PoolSpec
from llorch.node.handoff import Handoff
from llorch.node.pool_events import PoolState, ReplicaState

ALIVE = frozenset({ReplicaState.PROBING, ReplicaState.READY, ReplicaState.DRAINING})
DOWN = frozenset({ReplicaState.EXITED, ReplicaState.FAILED})


@dataclass(frozen=True, slots=True)
class Lease:
    """A slot of one replica, held by one task. Requests go to `url`, with the key in `api_key_file` if there is one,
    for the model that the engine knows as `served_as`.
    """

    task_id: str
    pool_id: str
    replica_id: str
    engine: str
    url: str
    model: str
    api_key_file: str | None
    served_as: str
    trial: bool = False  # its replica was ejected, and is tried with it


@dataclass(slots=True)
class Replica:
    id: str
    owned: bool  # its process is ours to end
    spawned: bool  # it stands in the settings: its handoff is written by us
    slots: int = 1
    state: ReplicaState = ReplicaState.EXITED
    wanted: bool = True
    handoff: Handoff | None = None  # what was last seen and accepted
    written: list[Handoff] = field(default_factory=list)  # what we wrote: this run's, after the one before
    run: int = 0
    probe: int = 0
    held: set[str] = field(default_factory=set)
    failures: deque[float] = field(default_factory=deque)
    in_a_row: int = 0
    retry_at: float | None = None
    verdict: str | None = None  # why we ended it, which says more than how it then ended
    started_at: float = 0.0
    ready_at: float | None = None
    served: bool = False  # tasks may have run in this run of it
    breaker: Breaker = field(default_factory=Breaker)  # of the engine that was last found ready

    @property
    def free(self) -> int:
        """Slots that a task may have now: none of one that is ejected, one of one that is to be tried."""
        if self.state is not ReplicaState.READY or not self.breaker.takes:
            return 0
        free = max(0, self.slots - len(self.held))
        return free if self.breaker.phase is Phase.CLOSED else min(1, free)


@dataclass(slots=True)
class Pool:
    id: str
    engine: str
    model: str
    spec: PoolSpec | None
    replicas: dict[str, Replica] = field(default_factory=dict)
    draining: bool = False
    generation: int = 0
    version: str | None = None
    ctx: int | None = None
    device_mask: str | None = None
    last_error: str | None = None
    load_s: float | None = None
    prompt_tps: float | None = None
    decode_tps: float | None = None

    @property
    def ready(self) -> bool:
        return any(replica.state is ReplicaState.READY for replica in self.replicas.values())

    @property
    def slots_free(self) -> int:
        return sum(replica.free for replica in self.replicas.values())

    def state(self, node_draining: bool) -> PoolState:
        states = {replica.state for replica in self.replicas.values()}
        if node_draining or self.draining:
            return PoolState.DRAINING
        if ReplicaState.READY in states:
            return PoolState.READY
        if ReplicaState.PROBING in states:
            return PoolState.LOADING
        if ReplicaState.STARTING in states or any(replica.retry_at is not None for replica in self.replicas.values()):
            return PoolState.STARTING
        return PoolState.FAILED if ReplicaState.FAILED in states else PoolState.STOPPED

    def report(self, node_draining: bool) -> dict[str, Any]:
        replicas = self.replicas.values()
        state = self.state(node_draining)
        return {
            "pool_id": self.id,
            "engine": self.engine,
            "engine_version": self.version,
            "model": self.model if self.ready else None,
            "models": [self.model],
            "state": state.value,
            "ready": self.ready,
            "draining": state is PoolState.DRAINING,
            "slots_total": sum(replica.slots for replica in replicas if replica.state not in DOWN),
            "slots_free": self.slots_free,
            "ctx": self.ctx,
            "modalities": ["text"],
            "device_mask": self.device_mask,
            "prompt_tps": self.prompt_tps,
            "decode_tps": self.decode_tps,
            "load_s": self.load_s,
            "generation": self.generation,
            "last_error": self.last_error,
            "replicas": [
                {
                    "id": replica.id,
                    "state": replica.state.value,
                    "owned": replica.owned,
                    "slots_free": replica.free,
                    "breaker": replica.breaker.phase.value,
                }
                for replica in replicas
            ],
        }

    def health(self, node_draining: bool) -> dict[str, Any]:
        return {
            "live": any(replica.state in ALIVE for replica in self.replicas.values()),
            "ready": self.ready,
            "draining": self.state(node_draining) is PoolState.DRAINING,
            "slots_free": self.slots_free,
            "last_error": self.last_error,
        }


def average(old: float | None, new: float | None) -> float | None:
    """Exponential, each new value counting for a fifth: some ten tasks are remembered."""
    if new is None or old is None:
        return old if new is None else round(new, 3)
    return round(0.8 * old + 0.2 * new, 3)
