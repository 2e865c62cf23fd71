"""A node, wired: settings in, a serving node out, and its end in order.

Wiring only. start: directories, plans, listener, engines, controls, ready line. stop: take no more, let tasks end, end
the rest with a word, stop the engines, leave the controls.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llorch import __version__, listen, logs, systemd, web
from llorch.config import NodeSettings
from llorch.config_pools import PoolSpec
from llorch.doors import Limits as DoorLimits
from llorch.errors import ConfigError
from llorch.node import pool_events as ev
from llorch.node.access import Access
from llorch.node.calls import LinkCalls
from llorch.node.catalog import Catalog
from llorch.node.engine_answer import engine_session
from llorch.node.engines.auto import EngineFacts
from llorch.node.engines.detect import detect
from llorch.node.gpu import GpuInventory
from llorch.node.heartbeat import Membership
from llorch.node.metrics import NodeMetrics
from llorch.node.plans import MODELLESS, Plan, plan_pool
from llorch.node.pools import Pools
from llorch.node.reports import Identity
from llorch.node.routes import routes
from llorch.node.runner import Runner
from llorch.node.state import NODE, Node
from llorch.node.supervisor import Supervisor
from llorch.node.tasklog import Limits, TaskLogs
from llorch.quotas import Quotas, Rates
from llorch.reload import Reloader, Source
from llorch.tasks import Guard

REFRESH_S = 5.0  # GPUs and catalog are read again this often, so that a beat never waits for a driver

LIVE = ("service_token", "node_token", "tls_cert", "tls_key", "tls_ca", "log_level")
T = TypeVar("T")

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


def make_plans(settings: NodeSettings, catalog: Catalog, gpu_count: int) -> list[Plan]:
    """What each pool of the settings will run. Blocking. Raises ConfigError."""
    specs: Sequence[PoolSpec] = settings.effective_pools()
    if any(spec.engine not in MODELLESS for spec in specs):
        facts = detect(settings.llama_server, env=os.environ, look_for_gpus=gpu_count > 0)
    else:
        facts = EngineFacts(python=sys.executable)
    return [
        plan_pool(spec, facts, catalog.find, gpu_count=gpu_count, allow_cpu=settings.allow_cpu or settings.dev)
        for spec in specs
    ]


def on_note(metrics: NodeMetrics, note: ev.Note) -> None:
    if note.event == "handoff.invalid":
        metrics.handed_off(note.pool_id or "", "invalid")
    elif note.event == "pool.ready":
        metrics.handed_off(note.pool_id or "", "ready")
    elif note.event == "engine.ended" and note.reason != "stopped":
        metrics.restarted(note.pool_id or "", "ended")


@dataclass(slots=True)
class Stop:
    """What signals ask for: the first to drain, the next not to wait."""

    wanted: asyncio.Event
    at_once: asyncio.Event

    def watch(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)

    async def unless(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` gives; None if a signal came first. Its exceptions are its own."""
        doing, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self.wanted.wait())
        try:
            await asyncio.wait([doing, stopped], return_when=asyncio.FIRST_COMPLETED)
            return await doing if doing.done() else None
        finally:
            for task in (doing, stopped):
                task.cancel()
            await asyncio.gather(doing, stopped, return_exceptions=True)

    def _signalled(self) -> None:
        if self.wanted.is_set():
            self.at_once.set()
        self.wanted.set()


async def run(settings: NodeSettings, source: Source[NodeSettings]) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    stop = Stop(asyncio.Event(), asyncio.Event())
    stop.watch()
    _, runtime_dir = directories(settings)
    node_id = settings.node_id or default_node_id()
    inventory, catalog = GpuInventory(), Catalog()
    async with contextlib.AsyncExitStack() as exits:
        exits.callback(inventory.close)
        exits.callback(catalog.close)
        controls = await exits.enter_async_context(web.client_session())
        access = await stop.unless(Access.open(settings, node_id, controls))
        if access is None:
            return 0
        gpus = await asyncio.to_thread(inventory.read)
        plans = await asyncio.to_thread(make_plans, settings, catalog, len(gpus))
        pools = Pools([plan.spec for plan in plans], {plan.spec.id: plan.model_id for plan in plans})
        metrics = NodeMetrics(node_id)
        supervisor = Supervisor(
            pools,
            plans,
            runtime_dir=runtime_dir,
            node_id=node_id,
            stop_grace_s=settings.stop_grace,
            load_timeout_s=settings.load_timeout,
            engine_cidrs=settings.engine_cidr,
            poll_handoffs=settings.poll_handoffs,
            on_note=lambda note: on_note(metrics, note),
        )
        engines = await exits.enter_async_context(engine_session())
        memberships: list[Membership] = []

        def changed(_pool_id: str = "") -> None:
            for membership in memberships:
                membership.notify()

        runner = Runner(
            node_id,
            pools,
            TaskLogs(
                Limits(
                    kept_bytes=settings.log_limit,
                    all_kept_bytes=settings.logs_limit,
                    sealed_native_s=settings.log_retention,
                    reconnect_grace_s=settings.reconnect_grace,
                )
            ),
            engines,
            metrics,
            max_body_bytes=settings.max_body,
            changed=changed,
        )
        pools.subscribe(changed)
        node = Node(
            node_id=node_id,
            pools=pools,
            runner=runner,
            metrics=metrics,
            max_body_bytes=settings.max_body,
            slow_reader_timeout_s=settings.slow_reader_timeout,
            read_gpus=inventory.read,
            engine_pids=lambda: _engine_pids(pools),
            read_models=catalog.report,
            gpus=gpus,
            stopping=stop.wanted,
        )
        metrics.scrape(node.pool_reports, node.gpu_reports, node.model_reports)
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
        quotas = Quotas(Rates(failures_per_min=settings.rate_failures or None), metrics.limits.limited)
        gate = access.gate(lambda code: metrics.auth_failed(code.value), quotas)
        app = web.make_app(routes(), gate, max_body_bytes=settings.max_body)
        app[NODE] = node
        await node.refresh()
        doors = listen.watched_doors(
            DoorLimits(
                settings.max_connections,
                settings.max_connections_per_ip,
                trusted=settings.trusted_proxies,
                for_nodes=False,
            ),
            refused=metrics.limits.refused,
        )
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
        guard = Guard("node")
        exits.push_async_callback(guard.close)
        guard.loop(runner.sweep, "sweep")
        guard.loop(lambda: _refresh(node, changed), "refresh")
        guard.spawn(_digest(catalog, node, changed), "digests")
        guard.loop(access.step, "access")
        reloader = Reloader(settings, source, LIVE, partial(_settle, access))
        guard.loop(reloader.step, "reload")
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.ask)
        calls = LinkCalls(node)
        memberships += [
            Membership(node, identity, url, access.credentials(url), controls, calls, early_beat_s=settings.early_beat)
            for url in settings.join
        ]
        if access.certificate is not None:
            from llorch.node.join import Renewal

            urls = [url for url in settings.join if url.startswith("https:")]

            def renewed() -> None:
                access.renewed()
                for membership in memberships:
                    membership.beat_now()

            guard.spawn(Renewal(access.certificate, controls, urls, renewed).run(), "renewal")
        members = Guard("node.members")
        try:
            await supervisor.start()
            for membership in memberships:
                members.spawn(membership.run(), membership.url)
            _freeze()
            print(f"ready url={server.url}", file=sys.stderr, flush=True)
            systemd.notify("READY=1")
            await stop.wanted.wait()
            systemd.notify("STOPPING=1")
            supervisor.post(ev.Drain())
            await _drain(runner, settings.shutdown_grace, stop)
        finally:
            await runner.close()
            await supervisor.close()
            await members.close()
            await asyncio.gather(*(membership.leave() for membership in memberships))
    return 0


def _engine_pids(pools: Pools) -> list[int]:
    return [handoff.pid for *_, handoff in pools.replicas() if handoff is not None and handoff.pid is not None]


async def _refresh(node: Node, changed: Callable[[], None]) -> float:
    await node.refresh()
    changed()
    return REFRESH_S


async def _digest(catalog: Catalog, node: Node, changed: Callable[[], None]) -> None:
    """Digests of the models, in the background: large files take minutes."""
    if await asyncio.to_thread(catalog.digest_all):
        await node.refresh()
        changed()


def _settle(access: Access, settings: NodeSettings) -> None:
    access.settled(settings)
    logs.configure(settings.log_level)


async def _drain(runner: Runner, grace_s: float, stop: Stop) -> None:
    """Let running tasks end, up to `grace_s` or the next signal."""
    log.info("node.draining", node_id=runner.node_id, running=len(runner), grace_s=grace_s)
    waits = [asyncio.ensure_future(runner.drained(grace_s)), asyncio.ensure_future(stop.at_once.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _freeze() -> None:
    """What was made while starting stays: the collector need not look at it again with every stream."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def main(settings: NodeSettings, source: Source[NodeSettings]) -> int:
    """Run a node in this process, on the fastest loop there is."""
    logs.configure(settings.log_level)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run(settings, source))
    return int(uvloop.run(run(settings, source)))
