"""What is known of one pool and of one replica, and how that reads in a report.

Owns the records that `pools` and its parts alone change, and what follows from them: free slots, a pool's state, its
report. Decides nothing. A pool's `model` is the one that its replicas run or are to run; a replica's is that of its
last start. None of both: nothing is loaded, and on demand pools wait for a task that names one. Whatever makes a pool's
engines start anew (another model, other settings, a restart) raises its `revision`: a replica of an earlier one serves
no more, and is replaced.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llorch.breaker import Breaker, Phase
from llorch.config_pools import PoolSpec
from llorch.node.handoff import Handoff
from llorch.node.pool_events import PoolState, ReplicaState

ALIVE = frozenset({ReplicaState.PROBING, ReplicaState.READY, ReplicaState.DRAINING})
DOWN = frozenset({ReplicaState.EXITED, ReplicaState.FAILED})
COMING = frozenset({ReplicaState.STARTING, ReplicaState.PROBING})

FAILURES = 5  # this many ends within FAILURE_WINDOW_S, and a person has to look
FAILURE_WINDOW_S = 300.0
RELOAD = "reload"  # the one operation that has something to go back to
MAX_WHY_CHARS = 256  # of a line in a report
OPERATOR, OWNER, HOURS = "operator", "owner", "hours"  # who may hold a pool back


@dataclass(slots=True, unsafe_hash=True)  # a frozen one takes three times as long to make, and each task makes one
class Lease:
    """A slot, held by one task; never changed. Requests go to `url`, with the key in `api_key_file` if there is one.

    `served_as`: the model's name at the engine. `replica_id` None: the model is on its way, and the slot is that of
    whichever replica gets it; it has no `url` yet.
    """

    task_id: str
    pool_id: str
    replica_id: str | None
    engine: str
    url: str
    model: str
    api_key_file: str | None
    served_as: str
    trial: bool = False  # its replica was ejected, and is tried with it


@dataclass(slots=True)
class Failures:
    """How often a start has gone wrong lately. `too_many`: it is not tried again unasked."""

    at: deque[float] = field(default_factory=deque)
    in_a_row: int = 0
    too_many: bool = False

    def forget(self) -> None:
        self.steady()
        self.too_many = False

    def steady(self) -> None:
        """It ran for so long that what went before says nothing of what is to come."""
        self.at.clear()
        self.in_a_row = 0

    def count(self, now: float, *, hopeless: bool) -> bool:
        """One more. True if that is too many."""
        self.in_a_row += 1
        self.at.append(now)
        while self.at and now - self.at[0] > FAILURE_WINDOW_S:
            self.at.popleft()
        self.too_many = self.too_many or hopeless or len(self.at) >= FAILURES
        return self.too_many


@dataclass(slots=True)
class Replica:
    id: str
    owned: bool  # its process is ours to end
    spawned: bool  # it stands in the settings: its handoff is written by us
    slots: int = 1
    model: str | None = None
    ref: str | None = None  # of that model
    revision: int = 0  # the pool's, at its last start
    state: ReplicaState = ReplicaState.EXITED
    wanted: bool = True
    next: bool = False  # it is to take over from the others, once it is proven
    leaves: bool = False  # others have taken over: it goes once it is down and its tasks have ended
    handoff: Handoff | None = None  # what was last seen and accepted
    offered: Handoff | None = None  # what we wrote for this run
    offered_at: float = 0.0
    earlier: tuple[Handoff, ...] = ()  # what we wrote for the runs before it; their files may be read late
    seen: Handoff | None = None  # what its file was last seen to be: nobody tells of it again until it changes
    withdrawn_at: float | None = None  # when we last took its file away: who says so soon after tells no news
    run: int = 0
    probe: int = 0
    held: set[str] = field(default_factory=set)
    failures: Failures = field(default_factory=Failures)
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


@dataclass(frozen=True, slots=True)
class Before:
    """What a pool goes back to, should its reload fail."""

    model: str | None
    choices: Mapping[str, str]
    loaded: bool


@dataclass(slots=True)
class Operation:
    """What a pool was last asked to do; `began` is for people. `before`: of a reload that can't be done beside."""

    kind: str
    model: str | None = None
    state: str = "running"
    message: str | None = None
    began: str | None = None
    before: Before | None = None
    ref: str | None = None  # of a reload
    deadline_s: float | None = None  # of a reload: for the tasks of what gives way, once it does
    task_deadline: float | None = None  # when the tasks are ended that it waits for
    preparing: bool = False  # its model is not here yet, and nothing has changed for it

    @property
    def running(self) -> bool:
        return self.state == "running"

    def end(self, message: str | None = None, *, failed: bool = False) -> None:
        self.state, self.message = "failed" if failed else "done", message

    def report(self) -> dict[str, Any]:
        told = {"kind": self.kind, "state": self.state, "model": self.model, "message": self.message}
        return {name: value for name, value in {**told, "started_at": self.began}.items() if value is not None}


@dataclass(slots=True)
class Pool:
    id: str
    engine: str
    model: str | None
    spec: PoolSpec | None
    choices: dict[str, str] = field(default_factory=dict)  # model ids that may be loaded here → their references
    on_demand: bool = False
    replicas: dict[str, Replica] = field(default_factory=dict)
    holds: dict[str, str] = field(default_factory=dict)  # who holds it back → why
    node_drained: str | None = None  # why an operator wants no tasks on the whole node
    loaded: bool = True  # the operator's wish: not unloaded
    leaves: bool = False  # it is no more in the settings: it goes once its engines have
    revision: int = 0
    waiting: dict[str, str | None] = field(
        default_factory=dict
    )  # tasks → the model that they wait for; None: told to end
    kept: bool = True  # the resident model has had its time, as of the last tick
    kept_until: float = 0.0
    idle_since: float = 0.0
    troubles: dict[str, Failures] = field(default_factory=dict)  # of models that are loaded on demand
    not_before: dict[str, float] = field(default_factory=dict)
    drain_deadline: float | None = None  # when tasks are ended that still run though it is drained
    operation: Operation | None = None
    generation: int = 0
    version: str | None = None
    ctx: int | None = None
    device_mask: str | None = None
    last_error: str | None = None
    load_s: float | None = None
    prompt_tps: float | None = None
    decode_tps: float | None = None

    @property
    def draining(self) -> bool:
        return bool(self.holds) or self.leaves

    @property
    def served_as(self) -> str:
        """What the pool's engine calls its model."""
        return (self.spec.engine_model if self.spec is not None else None) or self.model or ""

    @property
    def parked(self) -> bool:
        """Its memory is somebody else's for now: no engine of it may run."""
        return any(reason != OPERATOR for reason in self.holds)

    @property
    def may_run(self) -> bool:
        """Whether engines of it may run, and there is a model for them."""
        return self.loaded and self.model is not None and not self.parked and not self.leaves

    def should_run(self, replica: Replica) -> bool:
        return self.may_run and replica.wanted and not replica.leaves

    @property
    def reloading(self) -> Operation | None:
        operation = self.operation
        return operation if operation is not None and operation.running and operation.kind == RELOAD else None

    @property
    def own(self) -> list[Replica]:
        """Those of the settings that are there to stay."""
        return [each for each in self.replicas.values() if each.spawned and not each.next and not each.leaves]

    @property
    def coming(self) -> bool:
        """Whether some replica of the settings is up, or will be without anybody's asking."""
        return any(self.should_run(each) and each.state is not ReplicaState.FAILED for each in self.own)

    def current(self, replica: Replica) -> bool:
        """Whether it runs what the pool is to run now. Engines of others have the model that they have."""
        return replica.revision == self.revision if replica.spawned else replica.model == self.model

    @property
    def serving(self) -> list[Replica]:
        """The replicas that are ready with what the pool is to run."""
        return [each for each in self.replicas.values() if each.state is ReplicaState.READY and self.current(each)]

    @property
    def ready(self) -> bool:
        return bool(self.serving)

    @property
    def busy(self) -> int:
        """Tasks that hold a slot."""
        return len(self.waiting) + sum(len(replica.held) for replica in self.replicas.values())

    @property
    def capacity(self) -> int:
        """Slots that there are once its replicas are up."""
        slots = self.spec.slots if self.spec is not None else 0
        return slots * sum(each.wanted for each in self.own)

    @property
    def on_its_way(self) -> str | None:
        """The model for which tasks are held already."""
        if not self.on_demand or self.ready or self.draining or not self.coming:
            return None
        return self.model

    @property
    def loadable(self) -> list[str]:
        """Of the models that may be loaded here, those that have not failed too often."""
        return [model for model in self.choices if not self.troubles.get(model, _NONE).too_many]

    @property
    def swappable(self) -> bool:
        """Whether a task for any of its models may come now, whatever is resident."""
        if not self.on_demand or not self.loaded or self.draining or self.busy or not self.capacity:
            return False
        if not self.models or (self.reloading is not None and not self.reloading.preparing):
            return False
        return self.model is None or (self.kept and any(replica.free for replica in self.serving))

    @property
    def models(self) -> list[str]:
        """What a task may ask it for."""
        if not self.on_demand:
            return [self.model] if self.model is not None else []
        resident = [self.model] if self.model is not None and self.ready and self.model not in self.loadable else []
        return self.loadable + resident

    @property
    def slots_total(self) -> int:
        """Never fewer than are held: what is replaced may hold tasks still."""
        if self.on_demand and not self.ready:
            return max(self.capacity, self.busy)
        counted = (each for each in self.replicas.values() if each.state not in DOWN and not each.next)
        return max(self.busy, sum(each.slots for each in counted if each.spawned or self.current(each)))

    @property
    def slots_free(self) -> int:
        if self.on_demand and not self.ready:
            return max(0, self.capacity - self.busy) if self.swappable or self.on_its_way is not None else 0
        return max(0, sum(replica.free for replica in self.serving) - len(self.waiting))

    def state(self, node_draining: bool) -> PoolState:
        states = {replica.state for replica in self.replicas.values() if not replica.leaves}
        if node_draining or self.draining:
            return PoolState.DRAINING
        if self.ready:
            return PoolState.READY
        if ReplicaState.PROBING in states:
            return PoolState.LOADING
        if ReplicaState.STARTING in states or self.on_its_way is not None or any(map(self._returns, self.own)):
            return PoolState.STARTING
        if self.on_demand and self.choices and not self.loadable:
            return PoolState.FAILED
        return PoolState.FAILED if ReplicaState.FAILED in states else PoolState.STOPPED

    def _returns(self, replica: Replica) -> bool:
        """Whether it is on its way down, or down, and will be started again."""
        on_its_way_down = replica.state in (ReplicaState.DRAINING, ReplicaState.STOPPING)
        return self.should_run(replica) and (on_its_way_down or replica.retry_at is not None)

    def report(self, node_draining: bool) -> dict[str, Any]:
        replicas = self.replicas.values()
        state = self.state(node_draining)
        return {
            "pool_id": self.id,
            "engine": self.engine,
            "engine_version": self.version,
            "model": self.model if self.ready else None,
            "models": self.models,
            "loading": None if node_draining else self.on_its_way,
            "swappable": self.swappable and not node_draining,
            "state": state.value,
            "ready": self.ready,
            "draining": state is PoolState.DRAINING,
            "held": self.held_by(),
            "operation": self.operation.report() if self.operation is not None else None,
            "slots_total": self.slots_total,
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

    def held_by(self) -> list[str]:
        """Who holds it back, and why."""
        holds = [("settings", "it is no more there")] if self.leaves else []
        holds += [(OPERATOR, "unloaded")] if not self.loaded else []
        if self.node_drained is not None and OPERATOR not in self.holds:
            holds.append((OPERATOR, self.node_drained))
        return [(f"{who}: {why}" if why else who)[:MAX_WHY_CHARS] for who, why in (*holds, *self.holds.items())]

    def health(self, node_draining: bool) -> dict[str, Any]:
        return {
            "live": any(replica.state in ALIVE for replica in self.replicas.values()),
            "ready": self.ready,
            "draining": self.state(node_draining) is PoolState.DRAINING,
            "slots_free": self.slots_free,
            "last_error": self.last_error,
        }


_NONE = Failures()


def average(old: float | None, new: float | None) -> float | None:
    """Exponential, each new value counting for a fifth: some ten tasks are remembered."""
    if new is None or old is None:
        return old if new is None else round(new, 3)
    return round(0.8 * old + 0.2 * new, 3)
