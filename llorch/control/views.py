"""How nodes, pools and models look from outside: the JSON of GET /v2/nodes, /v2/pools, /v2/catalog and /v1/models.

Owns field names and derived words (a node's `state`). Never changes anything, and shows nothing that a role with the
`read` scope may not see.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from llorch.breaker import Breaker, Phase
from llorch.control.digest_conflicts import by_digest, staged_digest
from llorch.control.nodes import Node, Pool
from llorch.control.registry import Registry
from llorch.control.stage_sources import shown
from llorch.messages import ModelReport


def node_state(node: Node) -> str:
    """One word for a node, the worst that is true of it: quarantined, offline, registered (nothing heard since),
    unreachable, draining, online."""
    if node.quarantine is not None:
        return "quarantined"
    if not node.online:
        return "offline"
    if not node.reachable:
        return "unreachable" if node.beats else "registered"
    return "draining" if node.draining else "online"


def nodes_view(registry: Registry, now: float) -> dict[str, Any]:
    nodes = [node_view(registry, node, now) for node in _sorted(registry)]
    return {"nodes": nodes, "storm": storm_view(registry, now, missing=True)}


def storm_view(registry: Registry, now: float, *, missing: bool = False) -> dict[str, Any] | None:
    """While this control blames itself for what it can't see: why, since when, and which nodes it waits for."""
    storm = registry.storm
    if storm is None:
        return None
    view: dict[str, Any] = {"reason": storm.reason, "age_ms": _age_ms(storm.began_at, now)}
    return view | {"missing": sorted(storm.missing)} if missing else view


def node_view(registry: Registry, node: Node, now: float) -> dict[str, Any]:
    pools = [pool_view(node, pool, now) for _, pool in sorted(node.pools.items())]
    return {
        "node_id": node.node_id,
        "state": node_state(node),
        "online": node.online,
        "reachable": node.reachable,
        "draining": node.draining,
        "suspect": node.suspect(now),
        "quarantine": _quarantine_view(node, now),
        "heartbeat_age_ms": _age_ms(node.last_beat, now),
        "last_heartbeat_at": node.last_beat_wall,
        "registered_at": node.registered_wall,
        "link": node.linked,
        "address": node.address,
        "version": node.version,
        "zone": node.zone,
        "cost_weight": node.cost_weight,
        "rtt_ms": node.rtt_ms,
        "cpu_cores": node.cpu_cores,
        "ram_bytes": node.ram_bytes,
        "slots_total": sum(pool["slots_total"] for pool in pools),
        "slots_free": sum(pool["slots_free"] for pool in pools),
        "in_flight": sum(pool["in_flight"] for pool in pools),
        "tasks": len(registry.tasks_of(node.node_id)),
        "models": sorted({pool["model"] for pool in pools if pool["model"]}),
        "gpus": [gpu.model_dump(exclude={"gone"}) for gpu in sorted(node.gpus.values(), key=lambda gpu: gpu.index)],
        "pools": pools,
    }


def _quarantine_view(node: Node, now: float) -> dict[str, Any] | None:
    """Why, since when, and for how much longer at least: 0 once it may register again, and has not."""
    quarantine = node.quarantine
    if quarantine is None:
        return None
    left_ms = round(quarantine.left_s(now) * 1_000)
    return {"reason": quarantine.reason, "age_ms": _age_ms(quarantine.since, now), "left_ms": left_ms}


def pools_view(registry: Registry, now: float) -> dict[str, Any]:
    return {
        "pools": [
            {"node_id": node.node_id, "node_state": node_state(node), **pool_view(node, pool, now)}
            for node in _sorted(registry)
            for _, pool in sorted(node.pools.items())
        ]
    }


def pool_view(node: Node, pool: Pool, now: float) -> dict[str, Any]:
    """The pool's last report, with the slots as this control counts them."""
    view = pool.report.model_dump(exclude={"gone"})
    view |= {
        "models": view["models"] or [],
        "ready": bool(pool.report.ready),
        "draining": bool(pool.report.draining),
        "swappable": bool(pool.report.swappable),
        "held": pool.report.held or [],
        "slots_total": pool.slots_total,
        "slots_free": pool.slots_free(now) if node.online else 0,
        "in_flight": pool.claimed,
        "bound": pool.bound,
        "bound_since": pool.bound_since,
        "facts_age_ms": _age_ms(pool.reported_at, now),
        "breaker": _breaker_view(pool.breaker, now),
        "quarantined": node.quarantine.reason if node.quarantine is not None else None,
    }
    return view


def _breaker_view(breaker: Breaker, now: float) -> dict[str, Any]:
    """`ejected_ms` is how much longer; `failures` in a row; `ejections` without a healthy while between them.

    A closed one has no `reason`: it may be that of an ejection which the others could not do without.
    """
    left_s = breaker.left_s(now)
    return {
        "state": breaker.phase.value,
        "failures": breaker.in_a_row,
        "ejections": breaker.ejections,
        "ejected_ms": None if left_s is None else round(left_s * 1_000),
        "reason": None if breaker.phase is Phase.CLOSED else breaker.why or None,
    }


def catalog_view(registry: Registry) -> dict[str, Any]:
    """Models by id and by node. `sha256` is null where nodes differ: `conflict` says so, `digests` which has which."""
    models: dict[str, dict[str, Any]] = {}
    digests: dict[str, list[tuple[str, str]]] = {}
    for node in _sorted(registry):
        for report in node.catalog.values():
            entry = models.setdefault(report.id, {"nodes": [], "ready_pools": 0, "size_bytes": 0, "sha256": None})
            entry["nodes"].append(node.node_id)
            entry["size_bytes"] = max(entry["size_bytes"], report.size_bytes)
            if (digest := staged_digest(report)) is not None:
                digests.setdefault(report.id, []).append((node.node_id, digest))
        for pool in node.pools.values():
            model = pool.report.model
            if model is not None:
                entry = models.setdefault(model, {"nodes": [], "ready_pools": 0, "size_bytes": 0, "sha256": None})
                entry["ready_pools"] += pool.bound
    for model, entry in models.items():
        found = by_digest(digests.get(model, ()))
        entry["sha256"] = next(iter(found)) if len(found) == 1 else None
        entry["conflict"] = len(found) > 1
        entry["digests"] = found
    nodes = {
        node.node_id: {
            "state": node_state(node),
            "models": [_model_view(report) for _, report in sorted(node.catalog.items())],
        }
        for node in _sorted(registry)
    }
    return {"models": dict(sorted(models.items())), "nodes": nodes}


def _model_view(report: ModelReport) -> dict[str, Any]:
    view = report.model_dump(exclude={"gone"})
    return view | {"ref": None if report.ref is None else shown(report.ref)}


def openai_models(registry: Registry) -> dict[str, Any]:
    """What a client may name as `model` now: loaded or loadable in a pool of an online node."""
    created: dict[str, int] = {}
    for node in registry.nodes.values():
        if node.online:
            since = _unix_s(node.registered_wall)
            for pool in node.pools.values():
                for model in pool.serves():
                    created[model] = min(since, created.get(model, since))
    return {
        "object": "list",
        "data": [
            {"id": model, "object": "model", "created": since, "owned_by": "llorch"}
            for model, since in sorted(created.items())
        ],
    }


def _sorted(registry: Registry) -> Iterable[Node]:
    return [node for _, node in sorted(registry.nodes.items())]


def _age_ms(then: float, now: float) -> int:
    return max(0, round((now - then) * 1000))


def _unix_s(wall: str) -> int:
    try:
        return int(datetime.fromisoformat(wall).timestamp())
    except ValueError:
        return 0
