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
from collections.abc import AsyncIterator
from functools import partial

from llorch import listen, logs, systemd, tls, web
from llorch.auth import ADMIN_SCOPES, CLIENT_SCOPES, MIN_TOKEN_CHARS, Scope, TokenRing, parse_tokens
from llorch.config import ControlSettings
from llorch.control import routes_health, routes_nodes, routes_tasks
from llorch.control.admission import Admission
from llorch.control.dispatch import Dispatcher
from llorch.control.links import Links
from llorch.control.metrics import ControlMetrics, registry_metrics
from llorch.control.node_client import NodeClient
from llorch.control.recovery import Recovery
from llorch.control.registry import Registry
from llorch.control.replay import Replays
from llorch.control.roster import Roster
from llorch.control.state import CONTROL, Control
from llorch.control.sweep import expire_step, probe_step, roster_step
from llorch.doors import Limits
from llorch.errors import ConfigError
from llorch.quotas import Quotas, Rates
from llorch.tasks import Guard

LAST_BYTES_S = 2.0  # for answers that were ended, whose bytes only have to leave

log = logs.Log("control")


def token_ring(settings: ControlSettings) -> TokenRing:
    """Every token that is valid here, with what it may do. Raises ConfigError when nobody could use this control."""
    shortest = 1 if settings.dev else MIN_TOKEN_CHARS
    entries: list[tuple[str, str, frozenset[Scope]]] = []
    for text, scopes in (
        (settings.api_token, CLIENT_SCOPES),
        (settings.admin_token, ADMIN_SCOPES),
        (settings.node_token or settings.service_token, frozenset({Scope.NODE})),
    ):
        entries += [(name, token, scopes) for name, token in parse_tokens(text or "", min_chars=shortest)]
    ring = TokenRing(entries)
    if len(ring) == 0:
        raise ConfigError("no tokens: nobody could use this control")
    return ring


def rates(settings: ControlSettings) -> Rates:
    return Rates(
        settings.rate_requests or None,
        settings.rate_streams or None,
        settings.rate_tokens or None,
        settings.rate_failures or None,
    )


@contextlib.asynccontextmanager
async def serving(settings: ControlSettings) -> AsyncIterator[tuple[Control, listen.Server]]:
    """A control that serves for as long as the block runs. At its end nodes are told, then all is closed."""
    ring = token_ring(settings)
    service = parse_tokens(settings.service_token or "", min_chars=1)
    server_tls = (
        tls.Identities(tls.server_context(settings.tls_cert, settings.tls_key))
        if settings.tls_cert and settings.tls_key
        else None
    )
    registry = Registry(
        epoch=secrets.token_hex(8),
        heartbeat_interval_s=settings.heartbeat_interval,
        offline_after_s=settings.offline_after,
    )
    roster = Roster(settings.data_dir)
    recovery = Recovery(settings.recovery_window, roster.saved, time.monotonic())
    metrics, links, guard = ControlMetrics(), Links(), Guard("control")
    admission = Admission(settings.queue_limit, settings.queue_body_limit)
    quotas = Quotas(rates(settings), metrics.limits.limited)
    doors = listen.watched_doors(
        Limits(settings.max_connections, settings.max_connections_per_ip, trusted=settings.trusted_proxies),
        is_node=lambda address: any(node.peer == address for node in registry.nodes.values()),
        refused=metrics.limits.refused,
    )
    metrics.limits.watch(doors)
    async with NodeClient(
        links,
        registry.address_of,
        lambda: service[0][1] if service else "",
        tls.client_context(settings.tls_ca),
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
            replays=Replays(dispatcher.tasks, registry, nodes, recovery),
            max_body_bytes=settings.max_body,
            slow_reader_timeout_s=settings.slow_reader_timeout,
            heartbeat_interval_s=settings.heartbeat_interval,
            offline_after_s=settings.offline_after,
        )
        metrics.scrape_state(lambda: registry_metrics(registry, admission, time.monotonic()))
        gate = web.Gate(
            ring=lambda: ring,
            refused=lambda code: metrics.auth_failed(code.value),
            metrics_open=settings.bind.loopback,
            quotas=quotas,
        )
        app = web.make_app(routes(), gate, max_body_bytes=settings.max_body)
        app[CONTROL] = control
        server = await listen.serve(app, settings.bind.host, settings.bind.port, tls=server_tls, doors=doors)
        try:
            roster.prepare()
            guard.loop(partial(expire_step, control), "expire")
            guard.loop(partial(roster_step, control), "roster")
            guard.loop(partial(probe_step, control, settings.probe_interval), "probe")
            yield control, server
        finally:
            dispatcher.stop()
            for link in links:
                link.close("shutdown")
            await server.close()
            await dispatcher.close()
            await guard.close()


def routes() -> tuple[web.Route, ...]:
    """Every route of a control."""
    return routes_health.routes((*routes_tasks.ROUTES, *routes_nodes.ROUTES))


async def run(settings: ControlSettings) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    async with serving(settings) as (control, server):
        _watch_signals(control)
        print(f"ready url={server.url}", file=sys.stderr, flush=True)
        systemd.notify("READY=1")
        try:
            await control.stopping.wait()
            await _drain(control, settings.shutdown_grace)
        finally:
            systemd.notify("STOPPING=1")
    return 0


def _watch_signals(control: Control) -> None:
    """The first signal drains; the next one does not wait."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if control.stopping.is_set():
            control.dispatcher.stop()
        control.dispatcher.draining = True
        control.stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


async def _drain(control: Control, grace_s: float) -> None:
    """Let running tasks end, up to `grace_s`; then let go of the rest."""
    dispatcher = control.dispatcher
    log.info("control.draining", running=dispatcher.tasks.running, grace_s=grace_s)
    await dispatcher.quiet(grace_s)
    dispatcher.stop()
    await dispatcher.quiet(LAST_BYTES_S)


def main(settings: ControlSettings) -> int:
    """Run a control in this process, on the fastest loop there is."""
    logs.configure(settings.log_level)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run(settings))
    return int(uvloop.run(run(settings)))
