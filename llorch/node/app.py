"""A node, wired: settings in, a serving node out, and its end in order.

Wiring only. start: directories, plans, listener, engines, controls, ready line. stop: take no more, let tasks end, end
the rest with a word, stop the engines or leave them to the next agent, leave the controls.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import aiohttp

from llorch import __version__, listen, logs, systemd, web
from llorch.config import NodeSettings
from llorch.doors import Limits as DoorLimits
from llorch.errors import ConfigError, LlorchError
from llorch.node import log_pages, standing
from llorch.node import pool_events as ev
from llorch.node.access import Access
from llorch.node.calls import LinkCalls
from llorch.node.catalog import Catalog
from llorch.node.engine_connections import Engines, engines
from llorch.node.engine_start import Starts
from llorch.node.heartbeat import Membership
from llorch.node.machine import Machine
from llorch.node.metrics import NodeMetrics
from llorch.node.planner import Planner
from llorch.node.pools import Pools
from llorch.node.reports import Identity
from llorch.node.retention import Limits, TaskLogs
from llorch.node.routes import routes
from llorch.node.runner import Runner
from llorch.node.signals import Stop
from llorch.node.staging import Stager, StagingLimits
from llorch.node.standing import Standing
from llorch.node.state import NODE, Node
from llorch.node.supervisor import Supervisor, Told
from llorch.quotas import Quotas, Rates
from llorch.reload import Reloader, Source
from llorch.tasks import Guard, settle_memory

REFRESH_S = 5.0  # GPUs and catalog are read again this often, so that a beat never waits for a driver
WISHES = "wishes.json"

LIVE = (
    "service_token", "node_token", "tls_cert", "tls_key", "tls_ca", "log_level", "pools", "stage_rate",
    "stage_headroom",
)  # fmt: skip

log = logs.Log("node")


def default_node_id() -> str:
    """The hostname, with what an id may not have made `-`."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")
    return name[:63] or "node"


def directories(settings: NodeSettings) -> tuple[Path, Path]:
    """The data and runtime directories: private if they are new; one that is there stays as its owner made it."""
    data = Path(settings.data_dir).expanduser()
    runtime = Path(settings.runtime_dir).expanduser() if settings.runtime_dir else data / ".runtime"
    for path in (data, runtime):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the directory {path} can't be used: {error.strerror}", hint="give another --data-dir"
            ) from None
    return data, runtime


async def run(settings: NodeSettings, source: Source[NodeSettings]) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    stop = Stop()
    stop.watch()
    directories(settings)
    node_id = settings.node_id or default_node_id()
    async with contextlib.AsyncExitStack() as exits:
        controls = await exits.enter_async_context(web.client_session())
        access = await stop.unless(Access.open(settings, node_id, controls))
        if access is None:
            return 0
        asking = await exits.enter_async_context(engines())
        parts = await _Parts.of(settings, node_id, access, asking, stop, exits)
        server_url = await _listen(settings, access, parts, exits)
        guard = Guard("node")
        exits.push_async_callback(guard.close)
        _loops(guard, settings, source, access, parts)
        memberships = _memberships(settings, node_id, access, parts, controls, guard)
        parts.listeners += [membership.notify for membership in memberships]
        members = Guard("node.members")
        try:
            parts.hold()  # what may not run at this hour is not started only to be stopped
            await parts.supervisor.start()
            for membership in memberships:
                members.spawn(membership.run(), membership.url)
            settle_memory()
            print(f"ready url={server_url}", file=sys.stderr, flush=True)
            systemd.notify("READY=1")
            await stop.wanted.wait()
            systemd.notify("STOPPING=1")
            parts.supervisor.post(ev.Leave())
            await _drain(parts.runner, settings.shutdown_grace, stop)
        finally:
            await parts.runner.close()
            await parts.supervisor.close()
            await parts.standing.settle()
            await members.close()
            await asyncio.gather(*(membership.leave() for membership in memberships))
    return 0


class _Parts:
    """What a node is made of, put together once. `listeners` are told of every change that controls are to hear of."""

    node: Node
    pools: Pools
    runner: Runner
    supervisor: Supervisor
    machine: Machine
    planner: Planner
    catalog: Catalog
    stager: Stager
    standing: Standing
    metrics: NodeMetrics

    def __init__(self) -> None:
        self.listeners: list[Callable[[], None]] = []

    @classmethod
    async def of(
        cls,
        settings: NodeSettings,
        node_id: str,
        access: Access,
        engines: Engines,
        stop: Stop,
        exits: contextlib.AsyncExitStack,
    ) -> _Parts:
        self = cls()
        data_dir, runtime_dir = directories(settings)
        self.metrics = metrics = NodeMetrics(node_id)
        self.catalog = await asyncio.to_thread(Catalog, data_dir, in_use=lambda: self.pools.models())
        exits.callback(self.catalog.close)
        self.machine = Machine(data_dir)
        exits.callback(self.machine.close)
        gpus = await asyncio.to_thread(self.machine.read)
        self.planner = Planner(settings, self.catalog, frozenset(gpu.index for gpu in gpus))
        wishes = await asyncio.to_thread(standing.read, data_dir / WISHES)
        plans = await asyncio.to_thread(self.planner.plans, settings, standing.pools(wishes))
        self.pools = pools = Pools(plan.wanted for plan in plans)
        pools.restore(wishes)
        self.standing = Standing(data_dir / WISHES)
        pools.subscribe(lambda _pool_id: self.changed())
        self.runner = Runner(
            node_id,
            pools,
            TaskLogs(_log_limits(settings)),
            engines,
            metrics,
            max_body_bytes=settings.max_body,
            changed=self.changed,
        )
        self.stager = await exits.enter_async_context(
            Stager(self.catalog, node_id, _staging_limits(settings), access.peers(), self.staged)
        )
        self.supervisor = Supervisor(
            pools,
            plans,
            runtime_dir=runtime_dir,
            starts=Starts(
                model=self.catalog.ensure,
                room=self.machine.room,
                beside=self.machine.beside,
                plan=self.planner.again,
                here=self.catalog.look,
                mask=self.machine.mask,
            ),
            node_id=node_id,
            stop_grace_s=settings.stop_grace,
            load_timeout_s=settings.load_timeout,
            stall_timeout_s=settings.stall_timeout,
            orphan_grace_s=settings.orphan_grace,
            keep_engines=settings.keep_engines,
            engine_cidrs=settings.engine_cidr,
            poll_handoffs=settings.poll_handoffs,
            told=_told(metrics, self.runner, self.standing),
        )
        self.node = Node(
            node_id=node_id,
            pools=pools,
            runner=self.runner,
            metrics=metrics,
            max_body_bytes=settings.max_body,
            slow_reader_timeout_s=settings.slow_reader_timeout,
            read_gpus=self.machine.read,
            engine_pids=self.engine_pids,
            read_models=self.catalog.report,
            gpus=gpus,
            stager=self.stager,
            post=self.supervisor.ask,
            read_log=partial(log_pages.read, self.supervisor.files.logs),
            stopping=stop.wanted,
        )
        metrics.scrape(self.node.pool_reports, self.node.gpu_reports, self.node.model_reports)
        await self.node.refresh()
        return self

    def engine_pids(self) -> list[int]:
        """Of all engines that are offered here, and of those of ours that still load."""
        loading = [start.pid for start in self.supervisor.running() if start.pid is not None]
        return [*self.pools.pids(), *loading]

    def changed(self) -> None:
        for listener in self.listeners:
            listener()

    async def refresh(self) -> float:
        """What the machine says now, and what follows from it for pools that yield or have hours."""
        await self.node.refresh()
        starts = self.supervisor.running()
        await asyncio.to_thread(self.machine.learn, starts)
        self.machine.loading(self.supervisor.loading())
        self.hold()
        self.changed()
        return REFRESH_S

    def hold(self) -> None:
        for hold in self.machine.holds([spec for _, spec in self.pools.specs()]):
            self.supervisor.post(hold)

    def staged(self) -> None:
        self.node.models = self.catalog.report()
        self.changed()

    async def digest(self) -> None:
        """Digests of the models, in the background: large files take minutes."""
        if await asyncio.to_thread(self.catalog.digest_all):
            await self.node.refresh()
            self.changed()

    async def settle(self, access: Access, settings: NodeSettings) -> None:
        """Settings that were read anew. Raises ConfigError with nothing changed."""
        plans = await asyncio.to_thread(self.planner.other, settings)  # asking engines what they can takes seconds
        access.settled(settings)
        logs.configure(settings.log_level)
        self.stager.settle(_staging_limits(settings))
        if plans is not None:
            self.planner.settled(settings)
            self.supervisor.configure(plans)


def _told(metrics: NodeMetrics, runner: Runner, kept: Standing) -> Told:
    def seated(seat: ev.Seated) -> None:
        runner.seated(seat.task_id, seat.replica_id, seat.url, seat.api_key_file, trial=seat.trial)

    return Told(
        note=partial(_note, metrics, set()),
        seated=seated,
        end_tasks=lambda ended: runner.end(ended.task_ids, LlorchError(ended.code, ended.reason)),
        wishes=kept.changed,
        heard_at=runner.heard_at,
    )


def _note(metrics: NodeMetrics, stalled: set[tuple[str | None, str | None]], note: ev.Note) -> None:
    """`stalled`: engines that did, and whose end is to come: it is counted once, for that."""
    key = (note.pool_id, note.replica_id)
    if note.event == "handoff.invalid":
        metrics.handed_off(note.pool_id or "", "invalid")
    elif note.event == "pool.ready":
        metrics.handed_off(note.pool_id or "", "ready")
    elif note.event == "engine.stalled":
        stalled.add(key)
        metrics.restarted(note.pool_id or "", "stalled")
    elif note.event == "engine.ended" and key in stalled:
        stalled.discard(key)
    elif note.event == "engine.ended" and note.reason != "stopped":
        metrics.restarted(note.pool_id or "", "ended")


def _log_limits(settings: NodeSettings) -> Limits:
    return Limits(
        kept_bytes=settings.log_limit,
        all_kept_bytes=settings.logs_limit,
        sealed_native_s=settings.log_retention,
        reconnect_grace_s=settings.reconnect_grace,
    )


def _staging_limits(settings: NodeSettings) -> StagingLimits:
    return StagingLimits(settings.stage_rate, settings.stage_headroom)


async def _listen(settings: NodeSettings, access: Access, parts: _Parts, exits: contextlib.AsyncExitStack) -> str:
    metrics = parts.metrics
    quotas = Quotas(Rates(failures_per_min=settings.rate_failures or None), metrics.limits.limited)
    gate = access.gate(lambda code: metrics.auth_failed(code.value), quotas)
    app = web.make_app(routes(), gate, max_body_bytes=settings.max_body)
    app[NODE] = parts.node
    limits = DoorLimits(
        settings.max_connections,
        settings.max_connections_per_ip,
        trusted=settings.trusted_proxies,
        for_nodes=False,
    )
    doors = listen.watched_doors(limits, refused=metrics.limits.refused)
    metrics.limits.watch(doors)
    server = await listen.serve(
        app,
        settings.bind.host,
        settings.bind.port,
        tls=access.identities,
        refused=lambda _peer, _why: metrics.auth_failed("tls"),
        doors=doors,
    )
    exits.push_async_callback(server.close)
    return server.url


def _loops(guard: Guard, settings: NodeSettings, source: Source[NodeSettings], access: Access, parts: _Parts) -> None:
    guard.loop(parts.runner.sweep, "sweep")
    guard.loop(parts.refresh, "refresh")
    guard.loop(parts.standing.step, "wishes")
    guard.spawn(parts.digest(), "digests")
    guard.loop(access.step, "access")
    reloader = Reloader(settings, source, LIVE, partial(parts.settle, access))
    guard.loop(reloader.step, "reload")
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.ask)


def _memberships(
    settings: NodeSettings,
    node_id: str,
    access: Access,
    parts: _Parts,
    controls: aiohttp.ClientSession,
    guard: Guard,
) -> list[Membership]:
    identity = Identity(
        node_id=node_id,
        boot_id=secrets.token_hex(8),
        version=__version__,
        cpu_cores=os.cpu_count() or 1,
        ram_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        address=settings.address,
        zone=settings.zone,
        cost_weight=settings.cost_weight,
    )
    calls = LinkCalls(parts.node)
    memberships = [
        Membership(
            parts.node, identity, url, access.credentials(url), controls, calls, early_beat_s=settings.early_beat
        )
        for url in settings.join
    ]
    if access.certificate is not None:
        from llorch.node.join import Renewal

        def renewed() -> None:
            access.renewed()
            for membership in memberships:
                membership.beat_now()

        urls = [url for url in settings.join if url.startswith("https:")]
        guard.spawn(Renewal(access.certificate, controls, urls, renewed).run(), "renewal")
    return memberships


async def _drain(runner: Runner, grace_s: float, stop: Stop) -> None:
    """Let running tasks end, up to `grace_s` or the next signal."""
    log.info("node.draining", node_id=runner.node_id, running=len(runner), grace_s=grace_s)
    waits = [asyncio.ensure_future(runner.drained(grace_s)), asyncio.ensure_future(stop.at_once.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def main(settings: NodeSettings, source: Source[NodeSettings]) -> int:
    """Run a node in this process, on the fastest loop there is."""
    logs.configure(settings.log_level)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run(settings, source))
    return int(uvloop.run(run(settings, source)))
