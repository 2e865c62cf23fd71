"""A control plane, wired: settings in, a listening server out, and its end in order.

Wiring only. start: tokens, registry, dispatcher, loops, listener, ready line. stop: not ready, wait for tasks, let go
of the rest, close.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from llorch import listen, logs, systemd, tls, web
from llorch.config import ControlSettings
from llorch.control import (
    on_record,
    routes_catalog,
    routes_health,
    routes_nodes,
    routes_pools,
    routes_tasks,
    routes_trust,
)
from llorch.control.access import Access
from llorch.control.admission import Admission
from llorch.control.dispatch import Dispatcher
from llorch.control.distrust import Distrust
from llorch.control.lane import Lane
from llorch.control.links import Links
from llorch.control.metrics import ControlMetrics, registry_metrics, trust_metrics
from llorch.control.node_client import NodeClient
from llorch.control.place import url_for_others, write_place
from llorch.control.recovery import Recovery
from llorch.control.registry import Registry
from llorch.control.replay import Replays
from llorch.control.resolver import NodeResolver
from llorch.control.roster import Roster
from llorch.control.stager import Stager
from llorch.control.state import CONTROL, Control, wall_time
from llorch.control.sweep import expire_step, probe_step, roster_step
from llorch.doors import Limits
from llorch.quotas import Quotas, Rates
from llorch.reload import Reloader, Source
from llorch.tasks import Guard, settle_memory

LAST_BYTES_S = 2.0  # for answers that were ended, whose bytes only have to leave

LIVE = (
    "api_token", "admin_token", "node_token", "service_token", "tls_cert", "tls_key", "tls_names", "node_cert_life",
    "log_level", "queue_limit", "queue_body_limit", "rate_requests", "rate_streams", "rate_tokens",
    "rate_failures", "max_connections", "max_connections_per_ip", "trusted_proxies",
)  # fmt: skip

Also = Callable[[listen.Server], Awaitable[object]]  # what else a server is to do before its control is ready

log = logs.Log("control")


def rates(settings: ControlSettings) -> Rates:
    return Rates(
        settings.rate_requests or None,
        settings.rate_streams or None,
        settings.rate_tokens or None,
        settings.rate_failures or None,
    )


def door_limits(settings: ControlSettings) -> Limits:
    return Limits(settings.max_connections, settings.max_connections_per_ip, trusted=settings.trusted_proxies)


@contextlib.asynccontextmanager
async def serving(settings: ControlSettings) -> AsyncIterator[tuple[Control, listen.Server]]:
    """A control that serves for as long as the block runs. At its end nodes are told, then all is closed."""
    access = await asyncio.to_thread(Access.open, settings)
    registry = Registry(
        epoch=secrets.token_hex(8),
        heartbeat_interval_s=settings.heartbeat_interval,
        offline_after_s=settings.offline_after,
        node_cidr=settings.node_cidr,
    )
    roster = Roster(settings.data_dir)
    recovery = Recovery(settings.recovery_window, roster.saved, time.monotonic())
    metrics, links, guard = ControlMetrics(), Links(), Guard("control")
    admission = Admission(settings.queue_limit, settings.queue_body_limit)
    quotas = Quotas(rates(settings), metrics.limits.limited)
    doors = listen.watched_doors(
        door_limits(settings),
        is_node=lambda address: any(node.peer == address for node in registry.nodes.values()),
        refused=metrics.limits.refused,
    )
    metrics.limits.watch(doors)
    audit = on_record.audit_log(settings, metrics)
    async with NodeClient(
        links,
        registry.address_of,
        access.service_token,
        tls.client_context(settings.tls_ca),
        NodeResolver(settings.node_cidr, registry.peers_of),
        broke_protocol=lambda node_id, error: distrust.broke_protocol(node_id, error),
        cluster_tls=lambda node_id: access.to_node(registry.nodes.get(node_id)),
    ) as nodes:
        dispatcher = Dispatcher(
            registry,
            admission,
            nodes,
            metrics,
            quotas,
            queue_timeout_s=settings.queue_timeout,
            queue_timeout_batch_s=settings.queue_timeout_batch,
            ttft_timeout_s=settings.ttft_timeout,
            recovering=lambda: recovery.on(time.monotonic()),
            reread=lambda node_id, pool_id: routes_nodes.read_pool(control, node_id, pool_id),
        )
        distrust = Distrust(
            registry,
            links,
            dispatcher.tasks,
            metrics,
            cut=nodes.cut,
            changed=dispatcher.registry_changed,
        )
        control = Control(
            registry=registry,
            dispatcher=dispatcher,
            links=links,
            nodes=nodes,
            metrics=metrics,
            guard=guard,
            recovery=recovery,
            roster=roster,
            quotas=quotas,
            doors=doors,
            distrust=distrust,
            stager=Stager(registry, nodes, access, guard, wall_time),
            replays=Replays(dispatcher.tasks, registry, nodes, recovery),
            access=access,
            admission=admission,
            audit=audit,
            max_body_bytes=settings.max_body,
            slow_reader_timeout_s=settings.slow_reader_timeout,
            heartbeat_interval_s=settings.heartbeat_interval,
            offline_after_s=settings.offline_after,
        )
        metrics.scrape_state(lambda: registry_metrics(registry, admission, time.monotonic()))
        metrics.scrape_state(lambda: trust_metrics(access.expiries_s(), access.ages_s()))
        doorkeeper = on_record.Doorkeeper(audit)

        def refused_tls(peer: str, why: str) -> None:
            metrics.auth_failed("tls")
            doorkeeper.refused_tls(peer, why)

        gate = access.gate(lambda code: metrics.auth_failed(code.value), doorkeeper.denied, quotas)
        app = web.make_app(routes(), gate, max_body_bytes=settings.max_body)
        app[CONTROL] = control
        app[routes_pools.FOLLOWED] = routes_pools.Followed()
        server = await listen.serve(
            app,
            settings.bind.host,
            settings.bind.port,
            tls=access.identities,
            mesh=settings.tls == "off-mesh",
            refused=refused_tls,
            doors=doors,
            lane=Lane(control, gate),
        )
        if not access.admits_clients:
            log.warning("tokens.none", hint="nobody can send a task yet: `llorch token new` makes a token")
        try:
            await audit.start()
            access.noted = lambda event, fields: on_record.seen_on_disk(audit, event, **fields)
            on_record.started(
                audit,
                host=settings.bind.host,
                port=server.port,
                tls="on" if access.identities is not None else "off" if settings.tls != "off-mesh" else settings.tls,
            )
            roster.prepare()
            if not settings.dev:
                write_place(settings.data_dir, url_for_others(settings, server.url, server.port))
            guard.loop(access.step, "access")
            guard.loop(doorkeeper.step, "doorkeeper")
            guard.loop(partial(expire_step, control), "expire")
            guard.loop(partial(roster_step, control), "roster")
            guard.loop(control.stager.step, "stager")
            guard.loop(partial(probe_step, control, settings.probe_interval), "probe")
            yield control, server
        finally:
            dispatcher.stop()
            for link in links:
                link.close("shutdown")
            await server.close()
            await dispatcher.close()
            await guard.close()
            doorkeeper.sum_up()
            on_record.stopped(audit)
            await audit.close()


def routes() -> tuple[web.Route, ...]:
    """Every route of a control."""
    return routes_health.routes(
        (*routes_tasks.ROUTES, *routes_nodes.ROUTES, *routes_pools.ROUTES, *routes_catalog.ROUTES, *routes_trust.ROUTES)
    )


def settle(control: Control, settings: ControlSettings) -> None:
    """Take over settings that were read anew. Raises ConfigError, and changes nothing."""
    control.access.settled(settings)
    listen.bound(control.doors, door_limits(settings))
    control.quotas.adopt(rates(settings))
    control.admission.bound(settings.queue_limit, settings.queue_body_limit)
    logs.configure(settings.log_level)


async def run(settings: ControlSettings, source: Source[ControlSettings], also: Also | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    async with serving(settings) as (control, server):
        if also is not None:
            await also(server)
        reloader = Reloader(settings, source, LIVE, partial(settle, control))
        control.guard.loop(reloader.step, "reload")
        _watch_signals(control, reloader)
        settle_memory()
        print(f"ready url={server.url}", file=sys.stderr, flush=True)
        systemd.notify("READY=1")
        try:
            await control.stopping.wait()
            await _drain(control, settings.shutdown_grace)
        finally:
            systemd.notify("STOPPING=1")
    return 0


def _watch_signals(control: Control, reloader: Reloader[ControlSettings]) -> None:
    """The first signal drains; the next one does not wait."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if control.stopping.is_set():
            control.dispatcher.stop()
        control.dispatcher.draining = True
        control.stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reloader.ask)


async def _drain(control: Control, grace_s: float) -> None:
    """Let running tasks end, up to `grace_s`; then let go of the rest."""
    dispatcher = control.dispatcher
    log.info("control.draining", running=dispatcher.tasks.running, grace_s=grace_s)
    await dispatcher.quiet(grace_s)
    dispatcher.stop()
    await dispatcher.quiet(LAST_BYTES_S)


def main(settings: ControlSettings, source: Source[ControlSettings], also: Also | None = None) -> int:
    """Run a control in this process, on the fastest loop there is."""
    logs.configure(settings.log_level)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run(settings, source, also))
    return int(uvloop.run(run(settings, source, also)))
