"""A control and nodes as they are, in virtual time: what runs in their processes, without the processes.

Real are the control's registry, queue, placement, dispatch, audiences, log readers, replays, links, and routes for
nodes, and the node's membership, reports, pools, runner, logs and link. Between them, HTTP is a call that may be lost,
late or made twice, and a link is a Wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import aiohttp

from llorch.audit import Unaudited
from llorch.auth import Principal, Scope
from llorch.control import follow, replay, routes_nodes, sweep
from llorch.control.admission import Admission
from llorch.control.dispatch import Dispatcher
from llorch.control.distrust import Distrust
from llorch.control.links import Links
from llorch.control.links import NodeLink as ControlEnd
from llorch.control.log_reader import LogReader
from llorch.control.node_client import NodeClient
from llorch.control.placement import pick
from llorch.control.recovery import Recovery
from llorch.control.registry import Registry
from llorch.control.replay import Replays
from llorch.control.resolver import NodeResolver
from llorch.control.state import CONTROL, Control
from llorch.doors import Doors
from llorch.errors import Code, LlorchError
from llorch.link import Link
from llorch.messages import parse
from llorch.node import heartbeat
from llorch.node import pool_events as ev
from llorch.node.calls import LinkCalls
from llorch.node.handoff import Handoff
from llorch.node.heartbeat import Membership
from llorch.node.pools import Pools
from llorch.node.reports import Identity
from llorch.node.retention import Limits, TaskLogs
from llorch.node.runner import Runner
from llorch.node.state import Node
from llorch.quotas import Quotas
from llorch.tasks import Guard
from llorch.web import PRINCIPAL
from tests.faults.virtual import Engine, Uncounted, VirtualLoop, Wire

LIMITS = Limits(kept_bytes=1 << 20, all_kept_bytes=1 << 22, sealed_native_s=600.0, reconnect_grace_s=10.0)
RECOVERY_WINDOW_S = 15.0
MODEL = "m"
NODES = Principal("default", frozenset({Scope.NODE}))
LOST, ANSWER_LOST, TWICE, LATE = range(4)  # what may happen to a request of a node


class Quiet:
    """Metrics of any kind, for nobody: whatever is asked of them takes everything."""

    def __getattr__(self, name: str) -> Quiet:
        return self

    def __call__(self, *_args: object, **_more: object) -> None: ...


def virtual_time(patch: Any) -> None:
    """Have the parts that look at a clock by themselves look at the loop's, and leave nothing to chance."""
    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time(), perf_counter=lambda: 0.0)
    for module in (follow, replay, routes_nodes, sweep, heartbeat):
        patch.setattr(module, "time", clock)
    assert LogReader.__init__.__kwdefaults__ is not None
    patch.setitem(LogReader.__init__.__kwdefaults__, "clock", clock.monotonic)
    patch.setattr(heartbeat, "random", SimpleNamespace(random=lambda: 0.5))
    patch.setattr(heartbeat, "dial", _dial)
    patch.setattr(routes_nodes, "read_model", _read_model)


async def _read_model(request: Any, model: Any) -> Any:
    return parse(model, request.value)


# ---------------------------------------------------------------- the control


class SimControl:
    """One control process. `alive` until it is killed: then nothing it does is seen by anybody."""

    def __init__(self, loop: VirtualLoop, number: int, known_nodes: list[str] | None) -> None:
        self.loop = loop
        self.alive = True
        self.finished: dict[str, int] = {}  # how often each run of a task has ended
        registry = Registry(f"epoch-{number}", heartbeat_interval_s=10.0, offline_after_s=30.0)
        links = Links()
        nodes = NodeClient(links, registry.address_of, lambda: "", None, NodeResolver((), registry.peers_of))
        metrics: Any = Quiet()
        self.admission = Admission()
        recovery = Recovery(RECOVERY_WINDOW_S if number > 1 else 0.0, known_nodes, loop.time())
        dispatcher = Dispatcher(
            registry, self.admission, nodes, metrics,
            queue_timeout_s=120.0, queue_timeout_batch_s=300.0, ttft_timeout_s=120.0,
            recovering=lambda: recovery.on(loop.time()), clock=loop.time,
        )  # fmt: skip
        self.distrust = Distrust(
            registry, links, dispatcher.tasks, metrics,
            cut=nodes.cut, changed=dispatcher.registry_changed, clock=loop.time,
        )  # fmt: skip
        self.state = Control(
            registry=registry, dispatcher=dispatcher, links=links, nodes=nodes, metrics=metrics,
            guard=Guard("control"), recovery=recovery, roster=SimpleNamespace(saved=None),  # type: ignore[arg-type]
            replays=Replays(dispatcher.tasks, registry, nodes, recovery), distrust=self.distrust,
            max_body_bytes=1 << 20, slow_reader_timeout_s=30.0, heartbeat_interval_s=10.0, offline_after_s=30.0,
            doors=Doors(), quotas=Quotas(), admission=self.admission, audit=Unaudited(),
            stager=SimpleNamespace(),  # type: ignore[arg-type]
            access=SimpleNamespace(told=dict, told_to_node=lambda _who: {}),  # type: ignore[arg-type]
        )  # fmt: skip
        self.state.guard.loop(lambda: sweep.expire_step(self.state), "expire")
        self.wires: list[Wire] = []
        self.could_go: dict[str, float] = {}  # tasks that wait though a pool has room, and since when
        self._watch_claims()
        self._watch_ends()

    def _watch_claims(self) -> None:
        """No claim on what may not be placed on, and never more than there are slots."""
        registry = self.state.registry
        take = registry.claim

        def claim(node_id: str, pool_id: str, task_id: str, attempt: int, model: str) -> Any:
            node = registry.nodes[node_id]
            pool = node.pools[pool_id]
            assert self.state.links.get(node_id) is not None
            assert node.online and node.reachable and not node.suspect(self.loop.time()) and not node.draining
            assert pool.bound and pool.report.ready and not pool.report.draining
            assert pool.report.model == model == MODEL
            taken = take(node_id, pool_id, task_id, attempt, model)
            assert pool.claimed <= pool.slots_total
            self.could_go.clear()  # should the node refuse it, the slot was none
            return taken

        registry.claim = claim  # type: ignore[method-assign]

    def _watch_ends(self) -> None:
        dispatcher = self.state.dispatcher
        finish = dispatcher._finish

        def finished(task: Any, tail: Any, error: Any) -> None:
            key = f"{task.task_id} {id(task)}"
            self.finished[key] = self.finished.get(key, 0) + 1
            assert self.finished[key] == 1, "a task has ended twice"
            finish(task, tail, error)

        dispatcher._finish = finished  # type: ignore[method-assign]

    def kill(self) -> None:
        self.alive = False
        for wire in self.wires:
            wire.die()  # nothing that its ends still say is heard
        for wire in self.wires:
            wire.cut()
        for guard in (self.state.guard, self.state.dispatcher._guard, self.state.nodes._guard):
            for task in guard._tasks:
                task.cancel()

    def check(self) -> None:
        state = self.state
        assert len(self.distrust.strikes) == 0, "an honest node was struck"
        dispatcher, registry, admission = state.dispatcher, state.registry, self.admission
        claims = list(registry._claims.values())
        held: dict[tuple[str, str], int] = {}
        for claim in claims:
            key = (claim.node_id, claim.pool_id)
            held[key] = held.get(key, 0) + 1
            assert claim.task_id in dispatcher._audiences, "a claim of a task that does not run"
            assert claim.task_id not in admission, "both queued and running"
        for node in registry.nodes.values():
            for pool in node.pools.values():
                assert pool.claimed == held.get((pool.node_id, pool.pool_id), 0) <= pool.slots_total
        assert len({claim.task_id for claim in claims}) == len(claims), "a task with two slots"
        assert set(dispatcher._audiences) == {task.task_id for task in dispatcher.tasks.running_tasks()}
        assert set(dispatcher._room._waiting) >= set(admission._waiters)
        assert set(dispatcher._reading) <= {claim.task_id for claim in claims}
        self._check_queue()

    def _check_queue(self) -> None:
        """Nobody who is heard waits beside a free slot. What time alone frees is seen by the sweep."""
        now, registry = self.loop.now, self.state.registry
        could = [
            waiter.task_id
            for waiter in self.admission._waiters.values()
            if self.state.dispatcher._may_go(waiter.task_id)
            and pick(waiter.wish, registry.pool_facts(now, waiter.wish.model)) is not None
        ]
        self.could_go = {task_id: self.could_go.get(task_id, now) for task_id in could}
        assert all(now < since + 2 * sweep.EXPIRE_EVERY_S for since in self.could_go.values()), (
            "waits beside a free slot"
        )


# ---------------------------------------------------------------- nodes


class SimNode:
    """One node process, with its engine beside it."""

    def __init__(self, network: Network, node_id: str, boot: int, slots: int, engine: Engine) -> None:
        loop = network.loop
        self.network = network
        self.node_id = node_id
        self.slots = slots
        self.alive = True
        self.engine = engine
        self.pools = Pools()
        handoff = Handoff(pool_id="p", replica_id="r0", engine="e", url="http://127.0.0.1:1", model=MODEL, slots=slots)
        (probe,) = [act for act in self.pools.handle(ev.HandoffSeen(handoff), 0) if isinstance(act, ev.Probe)]
        self.pools.handle(ev.ProbeOk("p", "r0", probe.probe), 0)
        self.runner = Runner(
            node_id, self.pools, TaskLogs(LIMITS), engine, Uncounted(),  # type: ignore[arg-type]
            max_body_bytes=1 << 20, changed=lambda: self.membership.notify(), clock=loop.ticking, wall=loop.time,
        )  # fmt: skip
        metrics: Any = Quiet()
        self.node = Node(node_id, self.pools, self.runner, metrics, 1 << 20, 30.0)
        identity = Identity(node_id, f"{node_id}-boot-{boot}", "0", 1, 1)
        self.membership = Membership(
            self.node, identity, "http://control", Shown(self), Session(self),  # type: ignore[arg-type]
            LinkCalls(self.node), early_beat_s=0.25,
        )  # fmt: skip
        self.pools.subscribe(lambda _: self.membership.notify())
        self.guard = Guard("node")
        self.guard.loop(self.runner.sweep, "sweep")
        self.guard.spawn(self.membership.run(), "membership")
        self.wire: Wire | None = None

    def kill(self) -> None:
        self.alive = False
        if self.wire is not None:
            self.wire.die()
            self.wire.cut()
        for guard in (self.guard, self.runner._guard):
            for task in guard._tasks:
                task.cancel()

    def check(self) -> None:
        assert self.pools.accepted("p") <= self.slots, "more accepted than there are slots"
        assert len(self.engine.answers) <= self.slots, "the engine runs more than it has slots"


class Network:
    """Between the nodes and the control that is there now. Per node: what happens to its next requests."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.control: SimControl | None = None
        self.fates: dict[str, deque[int]] = {}
        self.cut: set[str] = set()  # nodes that nothing reaches, and nothing comes from
        self.leases = 0

    async def http(self, node: SimNode, method: str, path: str, value: Any) -> tuple[int, bytes]:
        fates = self.fates.setdefault(node.node_id, deque())
        fate = fates.popleft() if fates else None
        if node.node_id in self.cut:
            await asyncio.sleep(3_600)
        if fate == LATE:
            await asyncio.sleep(1.5)
        if self.control is None or fate == LOST:
            raise aiohttp.ClientConnectionError("lost")
        answer = await self.handle(self.control, node, method, path, value)
        if fate == TWICE:
            answer = await self.handle(self.control, node, method, path, value)
        if fate == ANSWER_LOST or node.node_id in self.cut:
            raise aiohttp.ClientConnectionError("lost")
        return answer

    async def handle(self, control: SimControl, node: SimNode, method: str, path: str, value: Any) -> tuple[int, bytes]:
        request: Any = Asked(
            app={CONTROL: control.state}, value=value, remote=node.node_id, match_info={"node_id": node.node_id}
        )
        handler = routes_nodes.heartbeat if path.endswith("/heartbeat") else routes_nodes.register
        assert method == "POST"
        try:
            response: Any = await handler(request)
            return response.status, response.body
        except LlorchError as error:
            return error.status, json.dumps(error.envelope()).encode()

    def link(self, node: SimNode, lease_id: str, epoch: str, take: Any) -> Any:
        control = self.control
        if control is None or node.node_id in self.cut:
            raise LlorchError(Code.NODE_LOST, "the control can't be reached")
        if control.state.registry.epoch != epoch:
            raise LlorchError(Code.LEASE_STALE, "another control process answered than gave out the lease")
        state = control.state
        state.registry.link_up(node.node_id, lease_id, self.loop.time())
        wire = Wire(self.loop)
        wire.flows = True
        control_end = ControlEnd(node.node_id, lease_id, lambda ended, why: routes_nodes._link_lost(state, ended, why))
        node_end = take()
        control_end.connection = Link(control_end)
        node_end.connection = Link(node_end)
        wire.start(node_end.connection, control_end.connection)
        node.wire = wire
        control.wires = [other for other in control.wires if not other.ended] + [wire]
        state.links.put(control_end)
        state.dispatcher.surplus.cancel(node.node_id, link_is_new=True)
        state.dispatcher.registry_changed()
        return node_end


class Asked(SimpleNamespace):
    """A request of somebody who showed the nodes' shared token."""

    def __getitem__(self, key: object) -> Principal | str:
        return NODES if key is PRINCIPAL else "request"


async def _dial(url: str, node_id: str, lease_id: str, shown: Shown, epoch: str, take: Any) -> Any:
    """In the place of node.dial.dial; what is shown carries the node."""
    return shown.node.network.link(shown.node, lease_id, epoch, take)


class Shown:
    """Credentials that nobody looks at."""

    headers: ClassVar[Mapping[str, str]] = {}
    context = server_name = None

    def __init__(self, node: SimNode) -> None:
        self.node = node

    def heard(self, authorities: object) -> None:
        """There are none."""


class Session:
    """The aiohttp.ClientSession of a node's membership."""

    def __init__(self, node: SimNode) -> None:
        self.node = node

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        *,
        data: bytes | None,
        headers: Any,
        ssl: Any,
        server_hostname: Any,
        allow_redirects: bool,
    ) -> AsyncIterator[Any]:
        value = json.loads(data) if data else None
        status, body = await self.node.network.http(self.node, method, url.removeprefix("http://control"), value)

        async def pieces() -> AsyncIterator[bytes]:
            yield body

        yield SimpleNamespace(status=status, content=SimpleNamespace(iter_any=pieces))
