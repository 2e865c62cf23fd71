"""The words of the pool state machine: states, the one transition table, what happens to pools, what they ask for.

Owns vocabulary only; `pools` decides and the supervisor acts. An event about a process carries the `run` it is about,
one about a probe the `probe`, so that news of an earlier one can be told from news of this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from llorch.config_pools import PoolSpec
from llorch.errors import Code
from llorch.node.handoff import Handoff


class ReplicaState(StrEnum):
    STARTING = "starting"  # asked for; its handoff has not been seen
    PROBING = "probing"  # its handoff was seen; it has not yet generated a token
    READY = "ready"
    DRAINING = "draining"  # takes no new task and is stopped when the last one ends
    STOPPING = "stopping"  # told to end; still running
    EXITED = "exited"  # not running, or no longer offered
    FAILED = "failed"  # ended too often to be started again unasked


class PoolState(StrEnum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Step(StrEnum):
    START = "start"
    SEEN = "seen"  # a handoff, new or changed
    ANSWERED = "answered"  # one generated token
    LOST = "lost"  # it stopped answering
    DRAIN = "drain"
    STOP = "stop"
    EXITED = "exited"
    WITHDRAWN = "withdrawn"  # the handoff of an engine that is not ours is gone
    GAVE_UP = "gave_up"
    FORGIVEN = "forgiven"  # it may be started again


_S, _T = ReplicaState, Step

# What is not in the table can't happen to a replica: `step` raises, and nothing has changed.
TRANSITIONS: Mapping[tuple[ReplicaState, Step], ReplicaState] = {
    (_S.EXITED, _T.START): _S.STARTING,
    (_S.EXITED, _T.SEEN): _S.PROBING,
    (_S.STARTING, _T.SEEN): _S.PROBING,
    (_S.PROBING, _T.SEEN): _S.PROBING,
    (_S.READY, _T.SEEN): _S.PROBING,
    (_S.PROBING, _T.ANSWERED): _S.READY,
    (_S.READY, _T.LOST): _S.PROBING,
    (_S.READY, _T.DRAIN): _S.DRAINING,
    (_S.STARTING, _T.STOP): _S.STOPPING,
    (_S.PROBING, _T.STOP): _S.STOPPING,
    (_S.READY, _T.STOP): _S.STOPPING,
    (_S.DRAINING, _T.STOP): _S.STOPPING,
    (_S.STARTING, _T.EXITED): _S.EXITED,
    (_S.PROBING, _T.EXITED): _S.EXITED,
    (_S.READY, _T.EXITED): _S.EXITED,
    (_S.DRAINING, _T.EXITED): _S.EXITED,
    (_S.STOPPING, _T.EXITED): _S.EXITED,
    (_S.STARTING, _T.WITHDRAWN): _S.EXITED,
    (_S.PROBING, _T.WITHDRAWN): _S.EXITED,
    (_S.READY, _T.WITHDRAWN): _S.EXITED,
    (_S.EXITED, _T.GAVE_UP): _S.FAILED,
    (_S.FAILED, _T.FORGIVEN): _S.EXITED,
}


class IllegalStep(Exception):
    """A bug of ours: a step that the table does not have."""


def step(state: ReplicaState, what: Step) -> ReplicaState:
    try:
        return TRANSITIONS[state, what]
    except KeyError:
        raise IllegalStep(f"a replica that is {state} can't be {what}") from None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A pool of the settings. `choices`: the ids of the models it may load → their references, the first one first.
    `refusal`: why it can't be started as things are; it is tried again when somebody asks for it.
    """

    spec: PoolSpec
    choices: Mapping[str, str]
    refusal: str | None = None


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Start:
    """The node is up: start what the settings ask for."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: start what waited, stop what has drained. Sent a few times a second."""


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process runs; `handoff` is what is to be written for it."""

    run: int
    handoff: Handoff


@dataclass(frozen=True, slots=True)
class Exited:
    """A process ended, or could not be started. `chance` is uniform in [0, 1), for the jitter of the restart.

    `reason` is in our words, `said` the last line that the engine itself wrote. `hopeless`: another start would end as
    this one has, until somebody changes something.
    """

    pool_id: str
    replica_id: str
    run: int
    reason: str
    chance: float
    said: str = ""
    hopeless: bool = False


@dataclass(frozen=True, slots=True)
class HandoffSeen:
    """A valid handoff, new or with new content."""

    handoff: Handoff


@dataclass(frozen=True, slots=True)
class HandoffBad:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class HandoffGone:
    name: str


@dataclass(frozen=True, slots=True)
class ProbeOk:
    """It generated a token. `slots` and `ctx` are what the engine says of itself, where it does."""

    pool_id: str
    replica_id: str
    probe: int
    slots: int | None = None
    ctx: int | None = None


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    """Not yet, and why. The probe goes on unless `gave_up`."""

    pool_id: str
    replica_id: str
    probe: int
    reason: str
    gave_up: bool = False


@dataclass(frozen=True, slots=True)
class EngineLost:
    """A ready engine does not answer any more (not: is busy)."""

    pool_id: str
    replica_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Adopted:
    """Before Start: an engine that an earlier agent left runs with `model`, and is ours to go on with."""

    model: str
    ref: str
    handoff: Handoff


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a start is that takes its time: a model that is fetched, memory that is waited for. Without a replica:
    how far a reload is that has not begun to change anything.
    """

    pool_id: str
    replica_id: str | None
    run: int
    text: str


@dataclass(frozen=True, slots=True)
class Stalled:
    """A ready engine has tasks and makes no tokens, and answers its health check all the same."""

    pool_id: str
    replica_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Configure:
    """The settings have other pools now; only those that differ are touched."""

    wanted: tuple[Wanted, ...]


@dataclass(frozen=True, slots=True)
class Leave:
    """The node is about to end: no new tasks."""


@dataclass(frozen=True, slots=True)
class Drain:
    """No new tasks, on one pool or (None) on the node. What still runs after `deadline_s` is ended; None: it may."""

    pool_id: str | None = None
    reason: str = ""
    deadline_s: float | None = None
    at: str | None = None


@dataclass(frozen=True, slots=True)
class Undrain:
    pool_id: str | None = None
    at: str | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """Somebody else needs the pool's memory, or it is not its time: no tasks, no engine. `why` None: not any more."""

    pool_id: str
    who: str
    why: str | None


@dataclass(frozen=True, slots=True)
class Load:
    """Start the pool's replicas that don't run, failed ones too. `model`: that one of its models."""

    pool_id: str
    model: str | None = None
    at: str | None = None


@dataclass(frozen=True, slots=True)
class Unload:
    """Stop the pool's own replicas once their tasks have ended, and leave them stopped. `deadline_s`, here and below:
    for the tasks; None: they have all the time they need.
    """

    pool_id: str
    at: str | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reload:
    """Serve another model, once it is on this machine."""

    pool_id: str
    model: str
    ref: str
    at: str | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """The model of a Reload is here. `beside`: there is memory for both, so the old one serves until the new one is
    proven. `refusal`: it can't be had, and why. `ref`: which one was prepared, where one name may stand for two.
    """

    pool_id: str
    model: str
    beside: bool = False
    refusal: str | None = None
    ref: str | None = None


@dataclass(frozen=True, slots=True)
class Restart:
    """Stop the pool's own replicas once their tasks have ended, and start them again."""

    pool_id: str
    at: str | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Purge:
    """Forget what went wrong, and what stopped engines left."""

    pool_id: str
    at: str | None = None


Event = (
    Start
    | Tick
    | Spawned
    | Adopted
    | Progress
    | Exited
    | HandoffSeen
    | HandoffBad
    | HandoffGone
    | ProbeOk
    | ProbeFailed
    | EngineLost
    | Stalled
    | Configure
    | Leave
    | Drain
    | Undrain
    | Hold
    | Load
    | Unload
    | Reload
    | Prepared
    | Restart
    | Purge
)


# ---------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a process that serves `model`; answer with Spawned and later Exited, both of this `run`."""

    pool_id: str
    replica_id: str
    run: int
    model: str
    ref: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Have a model here before anything changes for it; answer with Prepared."""

    pool_id: str
    model: str
    ref: str


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Go on with the process that `handoff` is about, as if it had been started here: this is its `run`."""

    pool_id: str
    replica_id: str
    run: int
    handoff: Handoff


@dataclass(frozen=True, slots=True)
class WriteHandoff:
    handoff: Handoff


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take back a handoff that we wrote for an engine that is not ours."""

    handoff: Handoff


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask until it generates a token; an earlier probe of this replica ends."""

    pool_id: str
    replica_id: str
    probe: int
    handoff: Handoff


@dataclass(frozen=True, slots=True)
class StopProbe:
    pool_id: str
    replica_id: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """End the process of this replica, which is ours."""

    pool_id: str
    replica_id: str


@dataclass(frozen=True, slots=True)
class Seated:
    """This task's model is there, and this is its slot."""

    task_id: str
    replica_id: str
    url: str
    api_key_file: str | None
    trial: bool


@dataclass(frozen=True, slots=True)
class EndTasks:
    """End these tasks, which hold slots, for this reason."""

    task_ids: tuple[str, ...]
    code: Code
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove what stopped engines of the pool have left: their logs."""

    pool_id: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the log and the counters: `handoff.invalid`, `engine.ended`, `pool.failed`, `pool.ready`,
    `pool.asked`, `pool.answered`, `engine.stalled`, `model.swapped`, `replica.ejected`, `replica.readmitted`."""

    event: str
    pool_id: str | None
    replica_id: str | None
    reason: str
    name: str | None = None


Action = (
    Spawn
    | Prepare
    | TakeOver
    | WriteHandoff
    | Withdraw
    | Probe
    | StopProbe
    | Terminate
    | Seated
    | EndTasks
    | Forget
    | Note
)
