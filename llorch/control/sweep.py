"""What time does to nodes: leases that run out, and nodes without a link that are asked whether they live."""

from __future__ import annotations

import asyncio
import time

from llorch.control import on_record
from llorch.control.report_limits import MOST_POOLS
from llorch.control.state import Control, wall_time
from llorch.errors import LlorchError
from llorch.logs import Log
from llorch.messages import PoolReport, parse

EXPIRE_EVERY_S = 0.5
ROSTER_EVERY_S = 1.0

log = Log("control.sweep")


async def expire_step(control: Control) -> float:
    now = time.monotonic()
    control.registry.look(now)
    for node in control.registry.expire(now):
        control.metrics.beat(node.node_id, "missed")
        log.warning("node.expired", node_id=node.node_id)
        on_record.node_expired(control, node.node_id)
    control.dispatcher.registry_changed()
    return EXPIRE_EVERY_S


async def roster_step(control: Control) -> float:
    """Remember who is here. Those of before that are not back yet stay remembered."""
    now, known = time.monotonic(), set(control.registry.nodes)
    if control.recovery.on(now):
        known |= control.recovery.missing
    if control.recovery.blind(now):
        return ROSTER_EVERY_S
    await asyncio.to_thread(control.roster.save, known)
    return ROSTER_EVERY_S


async def probe_step(control: Control, interval_s: float) -> float:
    """Ask every node that has an address and no link."""
    asked = [
        node.node_id
        for node in control.registry.nodes.values()
        if node.online and control.links.get(node.node_id) is None and control.registry.address_of(node.node_id)
    ]
    await asyncio.gather(*(probe(control, node_id) for node_id in asked))
    return interval_s


async def probe(control: Control, node_id: str) -> None:
    """Ask one node for its pools, and take over what it says."""
    try:
        answer = await control.nodes.call(node_id, "GET", "/v2/pools")
    except LlorchError as error:
        control.registry.probed(node_id, False, time.monotonic())
        log.info("node.unreachable", node_id=node_id, code=error.code)
        return
    control.registry.probed(node_id, True, time.monotonic())
    pools = answer.get("pools") if isinstance(answer, dict) else None
    for entry in pools[:MOST_POOLS] if isinstance(pools, list) else []:
        try:
            report = parse(PoolReport, entry)
            control.registry.merge_pool(node_id, report, now=time.monotonic(), wall=wall_time())
        except LlorchError:
            log.warning("pool.unread", node_id=node_id, code="INVALID_REQUEST")
            continue
        control.distrust.read(node_id, report)
    control.dispatcher.registry_changed()
