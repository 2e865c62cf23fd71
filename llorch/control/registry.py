"""The nodes and their pools, as this control knows them.

Owns registrations and leases, what heartbeats report, the claims on slots, the facts that placement looks at, and where
tasks are by the reports. Everything here can be rebuilt from the nodes' registrations. Never reads a clock, opens a
connection or decides where a task goes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from llorch.control.addresses import Network, check_address
from llorch.control.departed import Departed
from llorch.control.ejection import Ejections
from llorch.control.fact_table import FactTable
from llorch.control.nodes import SUSPECT_AFTER_BEATS, BeatResult, Claim, Event, Index, Node, Pool, Registration, index
from llorch.control.placement import Known, PoolFacts
from llorch.control.report_limits import ReportLimits, one_too_many, reports_of
from llorch.control.storms import Storm, Storms
from llorch.control.strikes import Quarantine
from llorch.control.task_reports import TaskReports
from llorch.errors import Code, LlorchError, invalid
from llorch.messages import Gpu, Heartbeat, ModelReport, PoolReport, Register, TaskReport

__all__ = ["BeatResult", "Claim", "Event", "Node", "Pool", "Registration", "Registry"]

LISTED_OFFLINE_S = 24 * 3600.0
MAX_EVENTS = 1_000  # if nobody takes them; the oldest go


class Registry:
    """The one owner of node, pool and claim state at a control. Every method leaves it consistent."""

    def __init__(
        self,
        epoch: str,
        heartbeat_interval_s: float = 10.0,
        offline_after_s: float = 30.0,
        listed_offline_s: float = LISTED_OFFLINE_S,
        node_cidr: Sequence[Network] = (),
    ) -> None:
        self.epoch = epoch
        self.heartbeat_interval_s = heartbeat_interval_s
        self.offline_after_s = offline_after_s
        self._listed_offline_s = listed_offline_s
        self._node_cidr = node_cidr
        self._nodes: dict[str, Node] = {}
        self._claims: dict[tuple[str, int], Claim] = {}
        self._tasks = TaskReports()
        self._limits = ReportLimits()
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._ejections = Ejections(self._nodes, self._events.append)
        self._storms = Storms(offline_after_s)
        self._departed = Departed()
        self._index: Index | None = None  # None: to be rebuilt
        self._table: FactTable | None = None  # of the pools in that index
        self._taken = 0  # claims, ever

    @property
    def nodes(self) -> Mapping[str, Node]:
        return self._nodes

    @property
    def storm(self) -> Storm | None:
        """While so many nodes are gone that the fault is more likely this control's."""
        return self._storms.storm

    # ---- registration and leases

    def register(
        self,
        message: Register,
        *,
        now: float,
        wall: str,
        peer: str | None,
        lease_id: str,
        old_link_dead: bool = False,
    ) -> Registration:
        """Take a node in, or take it in again; everything known of it is replaced by what it says.

        `old_link_dead`: the caller has seen that the process which holds the id now no longer answers. Raises
        UNTRUSTED_ADDRESS, NODE_ID_CONFLICT, NO_CAPACITY, or INVALID_REQUEST for a node that could be reached in no way
        or reports too much.
        """
        if message.address is not None:
            check_address(message.address, peer, self._node_cidr)
        elif message.boot_id is None:
            raise invalid("a node without boot_id is dialled, so it needs an address", param="address")
        old = self._nodes.get(message.node_id)
        same_process = old is not None and old.boot_id is not None and old.boot_id == message.boot_id
        if old is not None and not same_process and not (old_link_dead or old.gives_way(message, peer)):
            raise LlorchError(
                Code.NODE_ID_CONFLICT, f"another process is registered as {message.node_id}, and is online"
            )
        if old is None or old.peer != peer:
            leaves = one_too_many([node for node in self._nodes.values() if node is not old], peer)
            if leaves is not None:
                self.deregister(leaves, now)
        self._limits.admit(message.node_id, peer, reports_of(message), whole=True)
        suspect_after_s = SUSPECT_AFTER_BEATS * self.heartbeat_interval_s
        node = Node.of(message, lease_id=lease_id, peer=peer, suspect_after_s=suspect_after_s, now=now, wall=wall)
        if old is not None:
            if same_process:
                node.inherit(old)
            else:
                self._leave(old.pools.values(), now)
            self._tasks.forget(old.node_id)
            self._index = None
        self._nodes[node.node_id] = node
        self._take_pools(node, message.pools, now, whole=True, merge=False)
        self._take_rest(node, message.capabilities.gpus, message.catalog, message.tasks, whole=True)
        self._settle(node, wall)
        self._ejections.settle(now)
        return Registration(node, replaced=old is not None and not same_process)

    def heartbeat(self, node_id: str, message: Heartbeat, *, now: float, wall: str) -> BeatResult:
        """Apply a beat, or change nothing: raises NODE_UNKNOWN (register again), LEASE_STALE, NODE_ID_CONFLICT, or
        INVALID_REQUEST for a report that is too much."""
        node = self._nodes.get(node_id)
        # A lease that ran out is over. A leaseless node has nothing to renew: its beat is all there is, so it is back.
        if node is None or not (node.online or node.leaseless):
            raise LlorchError(Code.NODE_UNKNOWN, f"{node_id} is not registered here")
        if not node.leaseless:
            if message.boot_id is not None and message.boot_id != node.boot_id:
                raise LlorchError(Code.NODE_ID_CONFLICT, f"another process is registered as {node_id}")
            if message.lease_id != node.lease_id:
                raise LlorchError(Code.LEASE_STALE, "the beat carries no lease, or an older one")
            if message.seq is not None and node.seq is not None and message.seq <= node.seq:
                return BeatResult(applied=False)
        whole = not message.delta and not node.leaseless
        self._limits.admit(node_id, node.peer, reports_of(message), whole=whole, merge=node.leaseless)
        node.beat(message, now, wall)
        changed = frozenset[str]()
        if message.pools is not None:
            changed = self._take_pools(node, message.pools, now, whole=whole, merge=node.leaseless)
        ended = self._take_rest(node, message.gpus, message.catalog, message.tasks, whole=whole)
        self._settle(node, wall)
        self._ejections.settle(now)
        if self._table is not None and self._index is not None:
            self._table.refresh(now)  # not in the next task's way
        return BeatResult(True, changed, ended)

    def look(self, now: float) -> None:
        """Whether it storms, and what time does to ejections. Called twice a second, before `expire`."""
        stalled_s = self._storms.stalled_s(now)
        for node in self._nodes.values():
            if stalled_s and node.online:  # beats can't have arrived in that time
                node.last_beat = min(now, node.last_beat + stalled_s)
                self._forget_facts(node)
        self._watch(now, beat=True)
        self._ejections.settle(now)

    def expire(self, now: float) -> list[Node]:
        """Nodes that are offline from now on. Those that have been for a day are dropped."""
        if self._departed.forget(now):
            self._index = None
        lost: list[Node] = []
        for node in list(self._nodes.values()):
            if node.offline_since is not None:
                if now - node.offline_since >= self._listed_offline_s:
                    self.deregister(node.node_id, now)
            elif node.overdue(now, self.offline_after_s):
                node.online, node.offline_since, node.probe_ok = False, now, None
                self._settle(node, node.last_beat_wall)
                lost.append(node)
        self._ejections.settle(now)
        return lost

    def deregister(self, node_id: str, now: float) -> Node | None:
        """Forget a node at once; None if there was none. Claims on its pools are still released one by one."""
        node = self._nodes.pop(node_id, None)
        if node is not None:
            self._leave(node.pools.values(), now, lately=node.online)
            node.online, node.offline_since = False, now
            self._tasks.forget(node_id)
            self._limits.forget(node_id)
            self._index = None
            self._ejections.settle(now)
        return node

    def quarantine(self, node_id: str, quarantine: Quarantine | None, now: float) -> None:
        """Its lease is over for what it did; None: it is forgiven, and may register again."""
        node = self._nodes.get(node_id)
        if node is None:
            return
        node.quarantine = quarantine
        if quarantine is not None and node.online:
            node.online, node.offline_since, node.probe_ok = False, now, None
        self._settle(node, node.last_beat_wall)
        self._ejections.settle(now)

    # ---- reachability

    def check_lease(self, node_id: str, lease_id: str) -> Node:
        """Whether a link may open: NODE_UNKNOWN, or LEASE_STALE for a registration that is not in force."""
        node = self._nodes.get(node_id)
        if node is None or not node.online:
            raise LlorchError(Code.NODE_UNKNOWN, f"{node_id} is not registered here")
        if node.leaseless or lease_id != node.lease_id:
            raise LlorchError(Code.LEASE_STALE, "the link carries no lease, or an older one")
        return node

    def link_up(self, node_id: str, lease_id: str, now: float) -> Node:
        """Its link is open. Raises as `check_lease`."""
        node = self.check_lease(node_id, lease_id)
        node.linked, node.doubted = True, False
        self._reached(node, now)
        return node

    def link_lost(self, node_id: str, now: float) -> bool:
        """Its current link has ended (said of no replaced one). Until a new one or a probe, it is not reachable."""
        node = self._nodes.get(node_id)
        if node is None or not node.linked:
            return False
        node.linked, node.probe_ok = False, None
        self._reached(node, now)
        return True

    def doubt(self, node_id: str, doubted: bool) -> bool:
        """Its link brings nothing: not reachable until it is believed again. True if that is new."""
        node = self._nodes.get(node_id)
        if node is None or node.doubted == doubted:
            return False
        node.doubted = doubted
        self._forget_facts(node)
        return True

    def probed(self, node_id: str, ok: bool, now: float) -> bool:
        """A probe was answered, or not. True if that changes whether the node is reachable."""
        node = self._nodes.get(node_id)
        if node is None:
            return False
        before = node.reachable
        node.probe_ok = ok
        self._reached(node, now)
        return node.reachable != before

    def address_of(self, node_id: str) -> str | None:
        """The base URL to dial a node at; None for one that advertises none, is not there, or shut out."""
        node = self._nodes.get(node_id)
        return None if node is None or node.quarantine is not None else node.url

    def peers_of(self, host: str) -> set[str | None]:
        """Where those nodes registered from whose address has this host."""
        return {node.peer for node in self._nodes.values() if node.host == host}

    # ---- pools

    def merge_pool(self, node_id: str, report: PoolReport, now: float, wall: str | None = None) -> bool:
        """Take over the fields that `report` has, null ones too: what was read from the node's pool route.

        False if the node is gone meanwhile, or nothing changed; raises INVALID_REQUEST if it is too much. Without
        `wall`, a pool that becomes bound is bound since the node's last beat.
        """
        node = self._nodes.get(node_id)
        if node is None or not node.online:
            return False
        self._limits.admit(node_id, node.peer, {"pools": [report]}, whole=False, merge=True)
        changed = self._take_pools(node, [report], now, whole=False, merge=True)
        self._settle(node, wall or node.last_beat_wall)
        return bool(changed)

    def pool_facts(self, now: float, model: str | None = None) -> Sequence[PoolFacts]:
        """What placement looks at: all pools, or those that have `model` loaded or can load it."""
        return self._facts(now).rows(now, model)

    def best(self, model: str, now: float) -> tuple[str, str] | None:
        """The (node, pool) for a task that asks for nothing but its model; None if no pool that serves it has room."""
        return self._facts(now).best(model, now)

    def swappable(self, now: float) -> bool:
        """Whether any pool would load a model for a task just now."""
        return self._facts(now).swappable(now)

    def models(self) -> Known:
        """Which models and which pools there are anywhere, on offline nodes too."""
        return self._indexed().known

    def swapped(self) -> frozenset[str]:
        """The models that share a pool with others, of which it can serve one at a time."""
        return self._indexed().swapped

    def events(self) -> list[Event]:
        """What was bound, ejected and the like since the last call."""
        events = list(self._events)
        self._events.clear()
        return events

    def task(self, task_id: str) -> tuple[str, TaskReport] | None:
        """Where a task is, by the reports: its highest attempt, on a node that is online if there is a choice."""
        return self._tasks.find(task_id, lambda node_id: self._nodes[node_id].online)

    def task_of_key(self, key_digest: str) -> tuple[str, TaskReport] | None:
        """As `task`, by the digest of its owner and Idempotency-Key."""
        return self._tasks.find_key(key_digest, lambda node_id: self._nodes[node_id].online)

    def take_task(self, node_id: str, report: TaskReport) -> None:
        """One report that a node was asked for."""
        if node_id in self._nodes:
            self._tasks.take(node_id, [report], whole=False)

    def tasks(self) -> Iterator[tuple[str, TaskReport]]:
        """Every reported task once, with its node; those first heard of last come first."""
        return iter(self._tasks)

    def tasks_of(self, node_id: str) -> tuple[TaskReport, ...]:
        return self._tasks.of(node_id)

    def ended(self) -> list[TaskReport]:
        return self._tasks.news()

    # ---- claims

    def claim(self, node_id: str, pool_id: str, task_id: str, attempt: int, model: str | None = None) -> Claim:
        """Take a slot. Placement has seen that one is free, and that the pool serves `model` or would load it; the hard
        bounds are kept here: the pool's slots, and one trial at a time.

        Raises ALL_SLOTS_BUSY beyond them, CONFLICT if this attempt holds a slot, NODE_ or POOL_NOT_FOUND.
        """
        node = self._nodes.get(node_id)
        if node is None:
            raise LlorchError(Code.NODE_NOT_FOUND, f"no node {node_id}")
        pool = node.pools.get(pool_id)
        if pool is None:
            raise LlorchError(Code.POOL_NOT_FOUND, f"no pool {node_id}/{pool_id}")
        if (task_id, attempt) in self._claims:
            raise LlorchError(Code.CONFLICT, f"attempt {attempt} of task {task_id} holds a slot already")
        if not pool.breaker.takes:
            raise LlorchError(Code.ALL_SLOTS_BUSY, f"{node_id}/{pool_id} is ejected")
        if pool.claimed >= pool.slots_total:
            raise LlorchError(Code.ALL_SLOTS_BUSY, f"all slots of {node_id}/{pool_id} are claimed")
        key = (task_id, attempt)
        trial = pool.breaker.begin(key)
        claim = self._claims[key] = Claim(node_id, pool_id, task_id, attempt, trial, pool.breaker, model)
        self._taken += 1
        pool.begin(claim, self._taken)
        return claim

    def release(self, claim: Claim, *, used: bool = True) -> None:
        """Give a slot back. Idempotent, and right even if the pool or its node is gone or came back meanwhile.

        `used`: its node may have seen it, so a report that is under way may still count it as taken.
        """
        key = (claim.task_id, claim.attempt)
        if self._claims.get(key) is not claim:
            return
        del self._claims[key]
        claim.breaker.end(key)
        pool = self._pool(claim.node_id, claim.pool_id)
        if pool is not None:
            pool.end(claim, used=used)

    def accepted(self, claim: Claim) -> None:
        """The node has taken its task."""
        pool = self._pool(claim.node_id, claim.pool_id)
        if pool is not None:
            pool.slot_word.accepted()
            if pool.pledge is not None and claim.key in pool.pledge.claims:
                pool.pledge.accepted = True

    def loading(self, claim: Claim) -> bool:
        """Whether its node, as far as one knows here, still loads the model that its task is for."""
        pool = self._pool(claim.node_id, claim.pool_id)
        return pool is not None and pool.loading(claim.model)

    def busy(self, claim: Claim, now: float, *, full: bool = True, another: bool = False) -> None:
        """The node has no room for a claim of ours, which is not released yet; `full`: it said that no slot is free;
        `another`: that it serves another model, and does not swap it just now.

        That holds until a report says otherwise, one of our other claims ends, or REFUSAL_HOLDS_S is over.
        """
        pool = self._pool(claim.node_id, claim.pool_id)
        if pool is None:
            return
        if another and pool.pledge is not None and pool.pledge.model == claim.model:
            pool.refuse_swap(now)
            return
        pool.refuse(now)
        if full and not another:
            pool.slot_word.refused(now)

    def succeeded(self, claim: Claim, now: float) -> None:
        """Its attempt ended well: said before the release, of every attempt that was answered to its end."""
        self._ejections.succeeded(claim, now)

    def failed(self, claim: Claim, now: float) -> None:
        """Its attempt failed by a fault of its pool (`ejection.blames`): said before the release.

        While this control blames itself, nothing counts: what fails then may have failed for want of the control.
        """
        if self.storm is None and not self._storms.stalled_s(now):
            self._ejections.failed(claim, now)

    def claimed(self, node_id: str, pool_id: str) -> int:
        pool = self._pool(node_id, pool_id)
        return 0 if pool is None else pool.claimed

    # ---- inside

    def _pool(self, node_id: str, pool_id: str) -> Pool | None:
        node = self._nodes.get(node_id)
        return None if node is None else node.pools.get(pool_id)

    def _take_pools(
        self, node: Node, reports: list[PoolReport], now: float, *, whole: bool, merge: bool
    ) -> frozenset[str]:
        """`whole`: pools without a report are gone. `merge`: fields without a value stay. Returns what changed."""
        changed: set[str] = set()
        gone = set(node.pools) if whole else set()
        for report in reports:
            if report.gone:
                gone.add(report.pool_id)
                continue
            gone.discard(report.pool_id)
            pool = node.pools.get(report.pool_id)
            if pool is None:
                pool = node.pools[report.pool_id] = Pool(node.node_id, report.pool_id, report, now)
                # A pool that went and came back, or whose node did, still has the claims that were not released.
                key = (node.node_id, report.pool_id)
                pool.claimed = sum(1 for claim in self._claims.values() if (claim.node_id, claim.pool_id) == key)
                pool.take(report, now)
                changed.add(report.pool_id)
                self._index = None
                continue
            before, served = pool.report, pool.serves()
            pool.take(report, now, merge=merge)
            if pool.report != before:
                changed.add(report.pool_id)
                if pool.serves() != served or pool.report.model != before.model:
                    self._index = None
        for pool_id in gone & set(node.pools):
            self._leave([node.pools.pop(pool_id)], now, lately=False)  # its node is here, and says so
            changed.add(pool_id)
            self._index = None
        return frozenset(changed)

    def _take_rest(
        self,
        node: Node,
        gpus: list[Gpu] | None,
        catalog: list[ModelReport] | None,
        tasks: list[TaskReport] | None,
        *,
        whole: bool,
    ) -> tuple[TaskReport, ...]:
        """What a report says beside pools; None is unchanged. Returns the tasks that are newly known as sealed."""
        node.take(gpus, catalog, whole=whole)
        if catalog is not None:
            self._index = None
        return () if tasks is None else self._tasks.take(node.node_id, tasks, whole=whole)

    def _settle(self, node: Node, wall: str) -> None:
        """After any change of a node: bind and unbind its pools, and let go of facts made before."""
        for pool in node.pools.values():
            self._events += pool.settle(node, wall)
        self._forget_facts(node)

    def _leave(self, pools: Iterable[Pool], now: float, *, lately: bool = True) -> None:
        """They are gone, and what they had with them; `lately`: until now it could be had."""
        for pool in pools:
            self._events += pool.unbind()
            if lately:
                self._departed.left(pool.serves(), now)

    def _reached(self, node: Node, now: float) -> None:
        """After a change of what reaches `node`."""
        self._forget_facts(node)
        self._watch(now)
        self._ejections.settle(now)

    def _watch(self, now: float, *, beat: bool = False) -> None:
        """Does it storm? Then nodes are held: no beat that they miss makes them suspect or offline."""
        answers = {
            node.node_id: node.reachable and now - node.last_beat <= self.offline_after_s
            for node in self._nodes.values()
            if node.online
        }
        change = self._storms.look(answers, now, beat=beat)
        if change is None:
            return
        for node in self._nodes.values():
            node.held = isinstance(change, Storm)
            self._forget_facts(node)
        self._events.append(Event(*change.told(nodes=len(answers))))

    def _forget_facts(self, node: Node) -> None:
        for pool in node.pools.values():
            pool.forget_facts()

    def _facts(self, now: float) -> FactTable:
        if self._index is None or self._table is None:
            self._table = FactTable(self._nodes, self._indexed().by_model, now)
        return self._table

    def _indexed(self) -> Index:
        if self._index is None:
            self._index, self._table = index(self._nodes.values(), self._departed.models), None
        return self._index
