"""Nodes over HTTP: register, beat, link, leave; and what is known of them. Each handler parses, calls, replies."""

from __future__ import annotations

import asyncio
import secrets
import time

from aiohttp import web

from llorch import records
from llorch.auth import Scope
from llorch.control import on_record, views
from llorch.control.links import NodeLink
from llorch.control.state import CONTROL, Control, wall_time
from llorch.control.sweep import probe
from llorch.errors import Code, LlorchError
from llorch.link import Link
from llorch.logs import Log
from llorch.messages import Heartbeat, PoolReady, PoolReport, Register, parse
from llorch.web import PRINCIPAL, Route, json_response, read_model

OLD_LINK_ANSWERS_WITHIN_S = 1.0
_OUTCOMES = {Code.LEASE_STALE: "stale", Code.NODE_ID_CONFLICT: "stale", Code.NODE_QUARANTINED: "unauthorized"}

log = Log("control.nodes")


def _must_be(request: web.Request, node_id: str) -> None:
    """Path, body and certificate agree on the node. A shared node token is for any."""
    own = request[PRINCIPAL].node_id
    if own is not None and own != node_id:
        raise LlorchError(Code.FORBIDDEN, f"this certificate is that of {own}", param="node_id")


async def register(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    message = await read_model(request, Register)
    _must_be(request, message.node_id)
    lease_id = secrets.token_hex(8)
    try:
        control.distrust.check(message.node_id)
        if message.address is not None:
            await control.nodes.resolver.check(message.address, request.remote)
            if request[PRINCIPAL].joined is not None and not message.address.startswith("https://"):
                raise LlorchError(
                    Code.UNTRUSTED_ADDRESS,
                    "a node with a certificate is called by https:// alone: no token goes to it",
                    param="address",
                    hint="--address https://HOST:PORT, or none: its own link is enough",
                )
        await on_record.node_joins(request, message.node_id)
        link = control.links.get(message.node_id)
        taken = control.registry.register(
            message,
            now=time.monotonic(),
            wall=wall_time(),
            peer=request.remote,
            lease_id=lease_id,
            old_link_dead=link is not None and not await link.answers(OLD_LINK_ANSWERS_WITHIN_S),
        )
    except LlorchError as error:
        control.metrics.registered("refused")
        log.warning("node.refused", node_id=message.node_id, code=error.code, peer=request.remote)
        on_record.node_registered(request, message.node_id, refusal=error)
        raise
    control.registry.nodes[message.node_id].certified = request[PRINCIPAL].joined is not None
    control.metrics.registered("ok")
    control.recovery.returned(message.node_id)
    link = control.links.get(message.node_id)
    if taken.replaced and link is not None:
        link.abort("another process has its node id now")
    log.info("node.registered", node_id=message.node_id, peer=request.remote, pools=len(message.pools))
    on_record.node_registered(request, message.node_id)
    control.dispatcher.registry_changed()
    if message.boot_id is None:
        control.guard.spawn(probe(control, message.node_id), f"probe.{message.node_id}")
    return json_response(
        {
            "success": True,
            "node_id": message.node_id,
            "lease_id": lease_id,
            "epoch": control.registry.epoch,
            "heartbeat_interval_ms": round(control.heartbeat_interval_s * 1_000),
            "offline_after_ms": round(control.offline_after_s * 1_000),
            **control.access.told_to_node(request[PRINCIPAL]),
        }
    )


async def heartbeat(request: web.Request) -> web.StreamResponse:
    control, node_id = request.app[CONTROL], request.match_info["node_id"]
    _must_be(request, node_id)
    started = time.monotonic()
    try:
        control.distrust.check(node_id)
        message = await read_model(request, Heartbeat)
        applied = control.registry.heartbeat(node_id, message, now=time.monotonic(), wall=wall_time()).applied
    except LlorchError as error:
        outcome = _OUTCOMES.get(error.code, "invalid")
        if node_id in control.registry.nodes:  # a stranger's ids would be labels without end
            control.metrics.beat(node_id, outcome)
        log.warning("heartbeat.failed", node_id=node_id, code=error.code)
        raise
    if applied:
        control.distrust.beat(node_id, message)
    control.metrics.beat(node_id, "ok", seconds=time.monotonic() - started, rtt_ms=message.rtt_ms)
    if not message.delta and control.links.get(node_id) is not None:
        control.dispatcher.surplus.cancel(node_id)
    control.dispatcher.registry_changed()
    next_ms = round(control.heartbeat_interval_s * 1_000)
    return json_response(
        {"success": True, "next_heartbeat_ms": next_ms, **control.access.told_to_node(request[PRINCIPAL])}
    )


async def deregister(request: web.Request) -> web.StreamResponse:
    """By the node itself or an admin: the node's token and the admin's both pass."""
    control, node_id = request.app[CONTROL], request.match_info["node_id"]
    _must_be(request, node_id)
    if not request[PRINCIPAL].may(Scope.ADMIN):
        control.distrust.check(node_id)  # it stays listed, with why it is shut out
    if node_id not in control.registry.nodes:
        return json_response({"success": True})  # it has left before: idempotent, and nothing to put on record
    await on_record.node_deregisters(request, node_id)
    control.registry.deregister(node_id, time.monotonic())
    link = control.links.get(node_id)
    if link is not None:
        link.close("deregistered")
    log.info("node.deregistered", node_id=node_id, by=request[PRINCIPAL].name)
    control.dispatcher.registry_changed()
    return json_response({"success": True})


async def open_link(request: web.Request) -> web.StreamResponse:
    """Switch this connection to records, and keep it until it ends."""
    control, node_id = request.app[CONTROL], request.match_info["node_id"]
    _must_be(request, node_id)
    words = {word.strip().lower() for word in request.headers.get("Connection", "").split(",")}
    if "upgrade" not in words or request.headers.get("Upgrade", "").lower() != records.UPGRADE:
        raise LlorchError(Code.UPGRADE_REQUIRED, "this route only switches to records")
    lease_id = request.headers.get("X-Llorch-Lease", "")
    if request.transport is None:
        raise ConnectionResetError("the connection ended before it became a link")
    control.distrust.check(node_id)
    control.registry.link_up(node_id, lease_id, time.monotonic())
    transport = request.transport
    link = NodeLink(node_id, lease_id, lambda ended, reason: _link_lost(control, ended, reason))
    connection = link.connection = Link(link, request.protocol)
    transport.write(
        f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {records.UPGRADE}\r\n"
        f"X-Llorch-Epoch: {control.registry.epoch}\r\n\r\n".encode()
    )
    connection.start(transport)
    control.links.put(link)
    log.info("link.up", node_id=node_id)
    on_record.link_up(request, node_id)
    control.dispatcher.surplus.cancel(node_id, link_is_new=True)
    control.dispatcher.registry_changed()
    try:
        await asyncio.shield(connection.lost)
    except asyncio.CancelledError as ended:
        link.abort(str(ended) or "the control ends it")
        raise
    raise ConnectionResetError("the link has ended")


def _link_lost(control: Control, link: NodeLink, reason: str) -> None:
    if control.links.drop(link):
        log.info("link.lost", node_id=link.node_id, reason=reason)
        on_record.link_lost(control, link.node_id, reason)
        if reason == "shutdown":
            return  # we end it; nothing is placed any more, and the node is not missing
        control.registry.link_lost(link.node_id, time.monotonic())
        if link.connection is not None and link.connection.fault is not None:
            control.distrust.broke_protocol(link.node_id, link.connection.fault)
        control.dispatcher.registry_changed()


async def pool_ready(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    message = await read_model(request, PoolReady)
    _must_be(request, message.node_id)
    if message.node_id not in control.registry.nodes:
        raise LlorchError(Code.NODE_UNKNOWN, "this node is not registered")
    control.guard.spawn(read_pool(control, message.node_id, message.pool_id), f"pool_ready.{message.node_id}")
    return json_response({"success": True}, status=202)


async def read_pool(control: Control, node_id: str, pool_id: str) -> None:
    """Ask a node for one pool's report and take it over."""
    try:
        report = parse(PoolReport, await control.nodes.call(node_id, "GET", f"/v2/pools/{pool_id}"))
        if report.pool_id != pool_id:
            return
        control.registry.merge_pool(node_id, report, now=time.monotonic(), wall=wall_time())
    except LlorchError as error:
        log.info("pool.unread", node_id=node_id, pool_id=pool_id, code=error.code)
        return
    control.distrust.read(node_id, report)
    control.dispatcher.registry_changed()


async def pardon(request: web.Request) -> web.StreamResponse:
    control, node_id = request.app[CONTROL], request.match_info["node_id"]
    was = control.distrust.pardon(node_id, request[PRINCIPAL].name)
    return json_response({"success": True, "node_id": node_id, "was_quarantined": was})


async def list_nodes(request: web.Request) -> web.StreamResponse:
    return json_response(views.nodes_view(request.app[CONTROL].registry, time.monotonic()))


async def show_node(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    node = control.registry.nodes.get(request.match_info["node_id"])
    if node is None:
        control.recovery.check(time.monotonic(), "this node may still come back")
        raise LlorchError(Code.NODE_NOT_FOUND, "no such node")
    return json_response(views.node_view(control.registry, node, time.monotonic()))


async def list_pools(request: web.Request) -> web.StreamResponse:
    return json_response(views.pools_view(request.app[CONTROL].registry, time.monotonic()))


ROUTES = (
    Route("POST", "/v2/nodes/register", Scope.NODE, register, "A node registers its pools and GPUs", Register),
    Route("POST", "/v2/nodes/{node_id}/heartbeat", Scope.NODE, heartbeat, "A full snapshot, or a delta", Heartbeat),
    Route("DELETE", "/v2/nodes/{node_id}", Scope.NODE, deregister, "A node leaves", also=(Scope.ADMIN,)),
    Route("GET", "/v2/nodes/{node_id}/link", Scope.NODE, open_link, "Switch to records", status=101),
    Route("POST", "/v2/nodes/{node_id}/pardon", Scope.ADMIN, pardon, "Forget what a node did, and let it back"),
    Route("POST", "/callbacks/pool-ready", Scope.NODE, pool_ready, "A pool became ready", PoolReady, status=202),
    Route("GET", "/v2/nodes", Scope.READ, list_nodes, "Every node: state, GPUs, pools, slots"),
    Route("GET", "/v2/nodes/{node_id}", Scope.READ, show_node, "One node"),
    Route("GET", "/v2/pools", Scope.READ, list_pools, "Every pool, and whether it is bound"),
)
