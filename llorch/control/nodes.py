"""One node and one of its pools, as this control knows them.

Owns the rule for free slots, when a pool is bound, and what makes a node reachable or suspect. Never holds more than
one node's state: who may change it, and when, is the registry's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llorch.breaker import Breaker, Phase
from llorch.config_pools import MODEL_KEPT_S
from llorch.control.addresses import host_of
from llorch.control.lies import SlotWord
from llorch.control.placement import FAILED_STATES, LOADING_STATES, Known, PoolFacts
from llorch.control.strikes import Quarantine
from llorch.control.swapping import Pledge
from llorch.messages import Gpu, Heartbeat, ModelReport, PoolReport, Register, TaskReport

SUSPECT_AFTER_BEATS = 2.5  # two were due and did not come, and the second had half an interval to be late in
REFUSAL_HOLDS_S = 1.0  # a full pool is tried again then, should the report of a freed slot have been lost
DEFAULT_SLOTS = 1  # for a pool that says nothing of slots: every engine serves one sequence

# ---------------------------------------------------------------- what changes tell


@dataclass(frozen=True, slots=True)
class Registration:
    """`replaced`: another process (or machine) had the id before; what belonged to it is void."""

    node: Node
    replaced: bool


@dataclass(frozen=True, slots=True)
class BeatResult:
    """What a beat changed. `applied` is False for one that was overtaken; `ended` are tasks newly known as sealed."""

    applied: bool
    changed: frozenset[str] = frozenset()
    ended: tuple[TaskReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """Something for the log: pool.bound, pool.unbound, pool.ejected, pool.readmitted, storm.began, storm.ended."""

    word: str
    fields: Mapping[str, Any]


# ---------------------------------------------------------------- pools and their slots


@dataclass(slots=True, eq=False)  # see placement.PoolFacts
class Claim:
    """A slot taken at this control, for one attempt of a task; never changed. `trial`: it tries its pool, alone.

    `breaker` is its pool's, so that what becomes of it is never laid at the door of another process. `model`: what the
    task is for; None where nobody asked, and then it pledges its pool to nothing.
    """

    node_id: str
    pool_id: str
    task_id: str
    attempt: int
    trial: bool
    breaker: Breaker
    model: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.task_id, self.attempt


@dataclass(slots=True, eq=False)
class Pool:
    """A pool: its last report, and who holds its slots.

    The rule for free slots. A report says how many slots are taken, but not by whom, and it is older than our newest
    claims. So at a report the slots of others (another control, callers of `infer`) are counted:

        others = taken - (our claims now + our claims that ended since the report before)

    and until the next one  free = total - claimed - others.  Our claims count at once when taken and when ended. Those
    that ended lately are subtracted because the report may have left the node before they did; without that, a pool
    that is busy with short tasks loses a slot for 250 ms whenever a report and an end cross. The error of the rule is
    to the hopeful side; the node enforces its slots, and its ALL_SLOTS_BUSY is a report too, the freshest one: all that
    is not ours is taken. It holds until the next report, or for REFUSAL_HOLDS_S.
    """

    node_id: str
    pool_id: str
    report: PoolReport
    reported_at: float
    claimed: int = 0
    ended_since_report: int = 0
    others: int = 0
    others_refused: int = 0
    refused_until: float = 0.0
    bound_model: str | None = None
    bound_since: str | None = None  # wall time
    loads: bool = False  # it would load a model for a task, or is loading one, as far as it and its node's wishes go
    resident: str | None = None  # ready, as of the last report
    resident_since: float = 0.0  # when this control first heard so
    pledge: Pledge | None = None
    no_swap_until: float = 0.0
    used: int = 0  # the number of the claim that was taken here last
    breaker: Breaker = field(default_factory=Breaker)
    slot_word: SlotWord = field(default_factory=SlotWord)
    facts: PoolFacts | None = None
    facts_until: float = 0.0
    stale: list[Pool] = field(default_factory=list)  # where it says that its facts are to be made anew

    def forget_facts(self) -> None:
        if self.facts is not None:
            self.facts = None
            self.stale.append(self)

    @property
    def bound(self) -> bool:
        """Whether the control may place on it, as far as the pool and its node's own wishes go."""
        return self.bound_model is not None or self.loads

    @property
    def slots_total(self) -> int:
        return DEFAULT_SLOTS if self.report.slots_total is None else self.report.slots_total

    def slots_free(self, now: float) -> int:
        others = max(self.others, self.others_refused) if now < self.refused_until else self.others
        return max(0, self.slots_total - self.claimed - others)

    def take(self, report: PoolReport, now: float, *, merge: bool = False) -> None:
        """The next report. `merge`: fields that it does not have stay as they are, and slots are counted only if it
        counts them: an old count beside newer claims would take our own ended tasks for somebody else's."""
        counted = not merge or "slots_free" in report.model_fields_set
        if merge:
            report = self.report.model_copy(update={name: getattr(report, name) for name in report.model_fields_set})
        self.report, self.reported_at = report, now
        self.forget_facts()
        resident = report.model if report.ready else None
        if resident != self.resident:
            self.resident, self.resident_since = resident, now
        if self.pledge is not None and not self.pledge.stands(swappable=bool(report.swappable), model=resident):
            self.pledge = None
        if counted:
            taken = 0 if report.slots_free is None else max(0, self.slots_total - report.slots_free)
            self.others = max(0, taken - self.claimed - max(0, self.ended_since_report))
            self.ended_since_report = 0
            self.refused_until = self.no_swap_until = 0.0

    def begin(self, claim: Claim, number: int) -> None:
        """A claim is taken here. For a model that has to be loaded first, it pledges the pool to that."""
        if claim.model != self.resident and claim.model is not None:
            if self.facts_of_load()[1]:
                self.pledge = Pledge(claim.model)
            if self.pledge is not None and self.pledge.model == claim.model:
                self.pledge.claims.add(claim.key)
        self.claimed += 1
        self.used = number
        self.forget_facts()

    def end(self, claim: Claim, *, used: bool) -> None:
        self.claimed -= 1
        self.ended_since_report += used
        if self.pledge is not None and self.pledge.ended(claim.key):
            self.pledge = None
        self.forget_facts()

    def facts_of_load(self) -> tuple[str | None, bool]:
        """(the model that is on its way, whether a task for another one than is resident may be sent)."""
        loading = self.report.loading if self.pledge is None else self.pledge.model
        return loading, bool(self.report.swappable) and loading is None and self.claimed == 0

    def loading(self, model: str | None) -> bool:
        """Whether what is to serve a task for `model` is on its way, as far as reports tell."""
        loading, _ = self.facts_of_load()
        if loading is not None:
            return loading == model
        return self.resident is None and self.report.state in LOADING_STATES

    def refuse(self, now: float) -> None:
        """The node said ALL_SLOTS_BUSY to one of our claims, which is still held: all that isn't ours is taken."""
        self.others_refused = self.slots_total - max(0, self.claimed - 1)
        self.refused_until = now + REFUSAL_HOLDS_S
        self.ended_since_report -= 1  # that claim never took a slot of the node: its end must not count as one
        self.forget_facts()

    def refuse_swap(self, now: float) -> None:
        """The node said to one of our claims, still held, that it serves another model: it is not swappable now."""
        self.no_swap_until = now + REFUSAL_HOLDS_S
        self.ended_since_report -= 1  # as in `refuse`
        self.forget_facts()

    def event(self, word: str, **more: Any) -> Event:
        return Event(word, {"node_id": self.node_id, "pool_id": self.pool_id, **more})

    def serves(self) -> set[str]:
        """The models that it has loaded or can load."""
        models = set(self.report.models or ())
        if self.report.model is not None:
            models.add(self.report.model)
        return models

    def bindable(self, node: Node) -> str | None:
        """The model that a task could be placed here for, slots aside; None if none could."""
        return self.resident if self._stays(node) else None

    def _stays(self, node: Node) -> bool:
        return not (self.report.draining or node.draining or self.report.state in FAILED_STATES) and node.online

    def settle(self, node: Node, wall: str) -> list[Event]:
        """After any change of its node: whether it is bound, and to what."""
        self.loads = self._stays(node) and (bool(self.report.swappable) or self.report.loading is not None)
        model = self.bindable(node)
        if model == self.bound_model:
            return []
        events = self.unbind()
        if model is not None:
            self.bound_model, self.bound_since = model, wall
            events.append(self.event("pool.bound", model=model))
        return events

    def unbind(self) -> list[Event]:
        if self.bound_model is None:
            return []
        event = self.event("pool.unbound", model=self.bound_model)
        self.bound_model = self.bound_since = None
        return [event]

    def make_facts(self, node: Node, now: float) -> PoolFacts:
        """What placement looks at. Kept in `facts`, and good until something changes or `facts_until` comes."""
        report, suspect = self.report, node.suspect(now)
        self.breaker.advance(now)
        self.facts_until = self.breaker.until
        if not suspect and not node.held:
            self.facts_until = min(self.facts_until, node.last_beat + node.suspect_after_s)
        if now < self.refused_until:
            self.facts_until = min(self.facts_until, self.refused_until)
        loading, swappable = self.facts_of_load()
        if now < self.no_swap_until:
            self.facts_until, swappable = min(self.facts_until, self.no_swap_until), False
        self.facts = PoolFacts(
            node.node_id,
            self.pool_id,
            report.model if loading is None or loading == report.model else None,
            frozenset(report.models or ()),
            node.online,
            node.reachable,
            suspect,
            node.draining,
            bool(report.draining),
            bool(report.ready),
            report.state,
            self.slots_total,
            self.slots_free(now),
            report.vram_free_bytes or 0,
            node.zone,
            self.reported_at,
            report.last_error,
            self._why_out(),
            node.quarantine.reason if node.quarantine is not None else None,
            loading,
            swappable,
            self.resident_since + MODEL_KEPT_S,
            report.load_s,
            self.used,
        )
        return self.facts

    def _why_out(self) -> str | None:
        if self.breaker.takes:
            return None
        return self.breaker.why if self.breaker.phase is Phase.EJECTED else f"{self.breaker.why}; one task tries it now"


# ---------------------------------------------------------------- nodes


@dataclass(slots=True, eq=False)
class Node:
    """A registered node. Monotonic times are seconds; `_wall` ones are RFC 3339, for people."""

    node_id: str
    boot_id: str | None
    lease_id: str
    address: str | None
    version: str | None
    zone: str | None
    cost_weight: float
    draining: bool
    peer: str | None
    suspect_after_s: float
    last_beat: float
    last_beat_wall: str
    registered_wall: str
    cpu_cores: int | None = None
    ram_bytes: int | None = None
    online: bool = True
    offline_since: float | None = None
    linked: bool = False
    doubted: bool = False  # its link is up and silent, and was asked whether it lives
    probe_ok: bool | None = None
    quarantine: Quarantine | None = None  # it is offline for what it did, and stays so until it registers again
    held: bool = False  # a storm: beats that it misses are the control's own fault
    certified: bool = False  # it showed a certificate of the cluster, so it can be asked for it
    beats: int = 0
    seq: int | None = None
    rtt_ms: float | None = None
    pools: dict[str, Pool] = field(default_factory=dict)
    gpus: dict[str, Gpu] = field(default_factory=dict)
    catalog: dict[str, ModelReport] = field(default_factory=dict)

    @classmethod
    def of(
        cls, message: Register, *, lease_id: str, peer: str | None, suspect_after_s: float, now: float, wall: str
    ) -> Node:
        """A node that registers now; its pools and the rest are taken over after that."""
        return cls(
            message.node_id,
            message.boot_id,
            lease_id,
            message.address,
            message.version,
            message.zone,
            message.cost_weight,
            message.draining,
            peer,
            suspect_after_s,
            now,
            wall,
            wall,
            cpu_cores=message.capabilities.cpu_cores,
            ram_bytes=message.capabilities.ram_bytes,
        )

    @property
    def leaseless(self) -> bool:
        """Registered without a boot id: it beats without a lease, has no link, and is dialled."""
        return self.boot_id is None

    @property
    def url(self) -> str | None:
        """Where to dial it: its address with a scheme, without a slash at the end."""
        if self.address is None:
            return None
        return (self.address if "://" in self.address else f"http://{self.address}").rstrip("/")

    @property
    def host(self) -> str | None:
        """The host of its address, as a dial names it."""
        return None if self.address is None else host_of(self.address)

    def take(self, gpus: list[Gpu] | None, catalog: list[ModelReport] | None, *, whole: bool) -> None:
        """What a report says of the machine; None is unchanged. `whole`: what it does not list is gone."""
        if gpus is not None:
            kept = {} if whole else self.gpus
            self.gpus = {**kept, **{gpu.uuid: gpu for gpu in gpus}}
            for gpu in gpus:
                if gpu.gone:
                    self.gpus.pop(gpu.uuid, None)
        if catalog is not None:
            listed = {} if whole else self.catalog
            self.catalog = {**listed, **{model.id: model for model in catalog}}
            for model in catalog:
                if model.gone:
                    self.catalog.pop(model.id, None)

    def beat(self, message: Heartbeat, now: float, wall: str) -> None:
        """It lives, and this is how."""
        self.seq = self.seq if message.seq is None else message.seq
        self.online, self.offline_since = True, None
        self.last_beat, self.last_beat_wall = now, wall
        self.beats += 1
        self.rtt_ms = self.rtt_ms if message.rtt_ms is None else message.rtt_ms
        self.draining = self.draining if message.draining is None else message.draining

    def inherit(self, old: Node) -> None:
        """It is the process that it was: what was taken on its pools stays there, and so does its standing."""
        self.linked, self.probe_ok, self.beats, self.held = old.linked, old.probe_ok, old.beats, old.held
        self.registered_wall = old.registered_wall
        self.pools = old.pools

    def gives_way(self, message: Register, peer: str | None) -> bool:
        """Whether another process may take its id over."""
        if not self.online or (peer is not None and peer == self.peer):
            return True
        # Nodes without a boot id have only their address to be told apart by.
        return self.leaseless and message.boot_id is None and message.address == self.address

    @property
    def reachable(self) -> bool:
        """Its link is up; for want of one, the last probe was answered."""
        return (self.linked and not self.doubted) or self.probe_ok is True

    def overdue(self, now: float, after_s: float) -> bool:
        """No beat for `after_s`: its lease has run out."""
        return not self.held and now - self.last_beat > after_s

    def suspect(self, now: float) -> bool:
        """No new placements: two beats missed, or not reachable."""
        return not self.reachable or self.overdue(now, self.suspect_after_s)


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True, slots=True)
class Index:
    """The pools that have a model loaded or can load it, by model; the models for which a pool may have to let another
    one go; and what there is anywhere."""

    by_model: Mapping[str, list[Pool]]
    swapped: frozenset[str]
    known: Known


def index(nodes: Iterable[Node], departed: frozenset[str]) -> Index:
    by_model: dict[str, list[Pool]] = {}
    resident: set[str] = set()
    loadable: set[str] = set()
    catalogued: set[str] = set()
    names: set[str] = set()
    pools: set[str] = set()
    swapped: set[str] = set()
    for node in nodes:
        names.add(node.node_id)
        catalogued.update(model.id for model in node.catalog.values() if model.state != "retired")
        for pool in node.pools.values():
            pools.add(f"{node.node_id}/{pool.pool_id}")
            loadable.update(pool.report.models or ())
            if pool.report.model is not None:
                resident.add(pool.report.model)
            models = pool.serves()
            for model in models:
                by_model.setdefault(model, []).append(pool)
            if len(models) > 1:
                swapped |= models
    held = (frozenset(each) for each in (resident, loadable, catalogued, names, pools, departed))
    return Index(by_model, frozenset(swapped), Known(*held))
