"""Pools that load their models on demand, in virtual time, under a real registry, queue and waiting room.

The nodes are a model of what a node promises of such a pool: who is accepted, what is held while it loads, when it may
be swapped, what it reports. Reports and tasks take their time, so each side acts on what was true a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from llorch.control.admission import Admission
from llorch.control.line import INTERACTIVE, Waiter
from llorch.control.placement import Wish, refusal
from llorch.control.registry import Claim, Registry
from llorch.control.tasks import TaskStore
from llorch.control.waiting import WaitingRoom
from llorch.messages import Heartbeat, Register
from llorch.tally import Spread

KEPT_S = 30.0
REPORT_S, OPEN_S, LOOK_S = 0.25, 0.02, 0.5  # until a change is reported, a task is there, the control looks up
MOST_S = 3_600.0


@dataclass(frozen=True)
class Arrival:
    at: float
    model: str
    service_s: float = 1.0
    owner: str = "ann"
    priority: str = INTERACTIVE
    pin: str | None = None


class Quiet:
    """Metrics that nobody reads."""

    placing = Spread("placing", "", ())

    def placed(self, outcome: str, code: str) -> None: ...


class Slot:
    """In the place of a future: what a waiting task is given."""

    def __init__(self, given: Callable[[Claim], None]) -> None:
        self.given = given

    def done(self) -> bool:
        return False

    def set_result(self, claim: Claim) -> None:
        self.given(claim)


@dataclass
class SwapPool:
    """What is true on a node, whatever the control believes."""

    models: tuple[str, ...]
    slots: int = 2
    load_s: float = 10.0
    idle_unload_s: float = float("inf")
    broken: frozenset[str] = frozenset()  # what can't be loaded
    resident: str | None = None
    ready_at: float = float("-inf")
    idle_since: float = 0.0
    loading: str | None = None
    run: int = 0
    tasks: dict[str, str] = field(default_factory=dict)  # accepted: held or running; to their models
    loads: int = 0
    refusals: int = 0

    def swappable(self, now: float) -> bool:
        kept = self.resident is None or now - self.ready_at >= KEPT_S
        return not self.tasks and self.loading is None and kept

    def report(self, now: float) -> dict[str, Any]:
        state = "ready" if self.resident else "loading" if self.loading else "stopped"
        return {
            "pool_id": "p", "model": self.resident, "models": list(self.models), "state": state,
            "ready": self.resident is not None, "loading": self.loading, "swappable": self.swappable(now),
            "slots_total": self.slots, "slots_free": self.slots - len(self.tasks), "load_s": self.load_s,
        }  # fmt: skip


class Simulation:
    """`ran`: (when, model, node) of each task, as they began to run. `failed`: models of those whose load failed."""

    def __init__(self, **pools: SwapPool) -> None:
        self.now = 0.0
        self.pools = pools
        self.registry = Registry("epoch")
        self.admission = Admission(100_000)
        self.tasks = TaskStore()
        quiet: Any = Quiet()
        self.room = WaitingRoom(
            self.registry, self.admission, quiet, self.tasks,
            queue_timeout_s=1e9, queue_timeout_batch_s=1e9, clock=lambda: self.now,
        )  # fmt: skip
        self._waits: list[tuple[str, float | None]] = []
        self.ran: list[tuple[float, str, str]] = []
        self.failed: list[str] = []
        self._serial = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._asked: dict[str, tuple[Arrival, int]] = {}
        self._claims: dict[str, Claim] = {}
        self._attempts: dict[str, int] = {}
        for node_id, pool in pools.items():
            message = Register.model_validate({"node_id": node_id, "boot_id": "b", "pools": [pool.report(0.0)]})
            self.registry.register(message, now=0.0, wall="x", peer=None, lease_id="l")
            self.registry.link_up(node_id, "l", 0.0)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heappush(self._events, (when, next(self._serial), what))

    def run(self, arrivals: Iterable[Arrival]) -> Simulation:
        for arrival in arrivals:
            self.at(arrival.at, lambda arrival=arrival: self._arrive(arrival))  # type: ignore[misc]
        self.at(LOOK_S, self._look)
        while self._events:
            self.now, _, what = heappop(self._events)
            assert self.now < MOST_S, f"{len(self.admission)} wait for ever"
            what()
            self._check()
        return self

    def waits(self, model: str | None = None) -> list[float]:
        """How long each task waited until it ran, in order of arrival: all have, in the end."""
        mine = [wait for name, wait in self._waits if model in (None, name)]
        assert None not in mine, f"{mine.count(None)} have never run"
        return [wait for wait in mine if wait is not None]

    # ---- the control

    def _look(self) -> None:
        """What the control does by the clock; beats come, too."""
        for node_id in self.pools:
            self._told(node_id, {"pools": []} if self.now % 10 else None)
        self.registry.expire(self.now)
        self.room.pump()
        if self._claims or len(self.admission) or len(self._events):
            self.at(self.now + LOOK_S, self._look)

    def _arrive(self, arrival: Arrival) -> None:
        task_id = f"t{next(self._serial)}"
        self._asked[task_id] = arrival, len(self._waits)
        self._waits.append((arrival.model, None))
        self._wait(task_id, front=False)

    def _wait(self, task_id: str, *, front: bool) -> None:
        """As `WaitingRoom.claim` does."""
        arrival, _ = self._asked[task_id]
        wish = Wish(arrival.model, pin=arrival.pin)
        assert refusal(wish, self.registry.pool_facts(self.now), self.registry.models()) is None
        since = arrival.at if front else self.now
        waiter = Waiter(task_id, wish, arrival.owner, since, arrival.priority, front=front)
        if not front:
            self.room.pump(arrival.model)
            claim = self.room._take(waiter, self.room._free_pools(arrival.model))
            if claim is not None:
                self.admission.given(waiter, self.now)
                self._open(claim)
                return
        self.admission.enqueue(waiter, self.now, 2)
        slot: Any = Slot(self._open)
        self.room._waiting[task_id] = slot
        self.room.pump(arrival.model)

    def _open(self, claim: Claim) -> None:
        self.room._waiting.pop(claim.task_id, None)
        assert claim.model == self._asked[claim.task_id][0].model
        self._claims[claim.task_id] = claim
        self.at(self.now + OPEN_S, lambda: self._reaches(claim))

    def _release(self, claim: Claim) -> None:
        del self._claims[claim.task_id]
        self.registry.release(claim)
        self.room.pump()

    # ---- the nodes

    def _reaches(self, claim: Claim) -> None:
        pool, model = self.pools[claim.node_id], claim.model
        assert model is not None
        serves = pool.loading or pool.resident
        if serves != model and pool.swappable(self.now):
            self._load(claim.node_id, pool, model)
        elif serves != model or len(pool.tasks) >= pool.slots:
            pool.refusals += 1
            self.registry.busy(claim, self.now, another=serves != model)
            self._release(claim)
            self._wait(claim.task_id, front=True)
            return
        pool.tasks[claim.task_id] = model
        self.registry.accepted(claim)
        if pool.resident == model:
            self._runs(claim)
        self._changed(claim.node_id)

    def _load(self, node_id: str, pool: SwapPool, model: str) -> None:
        pool.resident, pool.loading = None, model
        pool.loads += 1
        pool.run += 1
        self.at(self.now + pool.load_s, lambda: self._loaded(node_id, pool, model))

    def _loaded(self, node_id: str, pool: SwapPool, model: str) -> None:
        pool.loading = None
        held = [self._claims[task_id] for task_id in pool.tasks]
        if model in pool.broken:
            pool.idle_since = self.now
            pool.tasks.clear()
            for claim in held:
                self.failed.append(model)
                self._release(claim)
        else:
            pool.resident, pool.ready_at, pool.idle_since = model, self.now, self.now
            for claim in held:
                self._runs(claim)
        self._changed(node_id)
        self.at(pool.ready_at + KEPT_S + 0.001, lambda: self._changed(node_id))
        self._unload_when_idle(node_id, pool)

    def _runs(self, claim: Claim) -> None:
        arrival, number = self._asked[claim.task_id]
        self._waits[number] = arrival.model, self.now - arrival.at
        self.ran.append((self.now, arrival.model, claim.node_id))
        self.at(self.now + arrival.service_s, lambda: self._ends(claim))

    def _ends(self, claim: Claim) -> None:
        pool = self.pools[claim.node_id]
        assert pool.tasks.pop(claim.task_id) == pool.resident
        pool.idle_since = self.now
        self.at(self.now + OPEN_S, lambda: self._release(claim))
        self._changed(claim.node_id)
        self._unload_when_idle(claim.node_id, pool)

    def _unload_when_idle(self, node_id: str, pool: SwapPool) -> None:
        run = pool.run

        def look() -> None:
            idle = not pool.tasks and self.now - pool.idle_since >= pool.idle_unload_s
            if idle and pool.run == run and pool.loading is None and pool.resident is not None:
                pool.resident = None
                self._changed(node_id)

        if pool.idle_unload_s < float("inf"):
            self.at(self.now + pool.idle_unload_s + 0.001, look)

    def _changed(self, node_id: str) -> None:
        """A report of what is true now; it takes a while, and is not overtaken by a later one."""
        report = self.pools[node_id].report(self.now)
        self.at(self.now + REPORT_S, lambda: self._told(node_id, report))

    def _told(self, node_id: str, report: dict[str, Any] | None) -> None:
        pools = [] if report is None or "pools" in report else [report]
        message = Heartbeat.model_validate({"lease_id": "l", "delta": True, "pools": pools})
        self.registry.heartbeat(node_id, message, now=self.now, wall="x")
        self.room.pump()

    # ---- what is always true

    def _check(self) -> None:
        held: dict[str, set[str | None]] = {}
        for claim in self._claims.values():
            held.setdefault(claim.node_id, set()).add(claim.model)
        for node_id, pool in self.pools.items():
            claims = sum(claim.node_id == node_id for claim in self._claims.values())
            assert self.registry.claimed(node_id, "p") == claims <= pool.slots
            assert len(pool.tasks) <= pool.slots
            assert len(held.get(node_id, ())) <= 1, f"tasks for {held[node_id]} at {node_id} at once"
            assert set(pool.tasks.values()) <= {pool.loading or pool.resident}
