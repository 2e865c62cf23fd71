"""What operators ask of this node and its pools, as routes: drain, load, reload and the like, and the engines' logs.

Owns what of a wish is checked before the pools hear of it, and what is answered: 202, and the pool as it is now, whose
`operation` tells how far the wish is. Nothing here waits for one to be granted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

from llorch.auth import Scope
from llorch.config_kinds import MODEL_REF, BadValue
from llorch.errors import Code, LlorchError, invalid
from llorch.node import pool_events as ev
from llorch.node.modelref import model_id
from llorch.node.route_call import Ask, Call, Reply
from llorch.node.state import Node
from llorch.wishes import DrainWish, PoolWish

MAX_LOG_LINES = 2_000


def _at() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _drain(node: Node, ask: Ask) -> Reply:
    wish = ask.read(DrainWish)
    node.post(ev.Drain(None, wish.reason or "", wish.deadline_s, _at()))
    return 202, {"draining": node.draining}


def _undrain(node: Node, _ask: Ask) -> Reply:
    node.post(ev.Undrain(None, _at()))
    return 202, {"draining": node.draining}


def _told(node: Node, event: ev.Event, pool_id: str) -> Reply:
    node.post(event)
    return 202, {"pool": next((each for each in node.pool_reports() if each["pool_id"] == pool_id), None)}


def _pool_drain(node: Node, ask: Ask) -> Reply:
    wish, pool_id = ask.read(DrainWish), ask.params["pool"]
    return _told(node, ev.Drain(pool_id, wish.reason or "", wish.deadline_s, _at()), pool_id)


def _pool_load(node: Node, ask: Ask) -> Reply:
    wish, pool_id = ask.read(PoolWish), ask.params["pool"]
    return _told(node, ev.Load(pool_id, wish.model, _at()), pool_id)


def _pool_reload(node: Node, ask: Ask) -> Reply:
    wish, pool_id = ask.read(PoolWish), ask.params["pool"]
    if wish.model is None:
        raise invalid("it is not said which model", param="model", hint='for example {"model": "file:/models/b.gguf"}')
    report = node.pools.pool_report(pool_id)  # raises POOL_NOT_FOUND
    try:
        ref = node.pools.ref_of(pool_id, wish.model) or MODEL_REF.parse(wish.model)
    except BadValue as fault:
        raise invalid(f"the model {fault}", param="model", hint=fault.hint) from None
    name = wish.model if wish.model in (report["models"] or ()) else model_id(ref)
    return _told(node, ev.Reload(pool_id, name, ref, _at(), wish.deadline_s), pool_id)


def _pool_unload(node: Node, ask: Ask) -> Reply:
    wish, pool_id = ask.read(PoolWish), ask.params["pool"]
    return _told(node, ev.Unload(pool_id, _at(), wish.deadline_s), pool_id)


def _pool_restart(node: Node, ask: Ask) -> Reply:
    wish, pool_id = ask.read(PoolWish), ask.params["pool"]
    return _told(node, ev.Restart(pool_id, _at(), wish.deadline_s), pool_id)


def _simple(event: Callable[[str, str], ev.Event]) -> Callable[[Node, Ask], Reply]:
    def serve(node: Node, ask: Ask) -> Reply:
        return _told(node, event(ask.params["pool"], _at()), ask.params["pool"])

    return serve


async def _logs(node: Node, ask: Ask) -> Reply:
    try:
        lines = int(ask.query.get("lines", "200"))
    except ValueError:
        lines = 0
    if not 1 <= lines <= MAX_LOG_LINES:
        raise invalid(f"lines is a number from 1 to {MAX_LOG_LINES}", param="lines")
    pool_id = ask.params["pool"]
    replicas = [each["id"] for each in node.pools.pool_report(pool_id)["replicas"] if each["owned"]]
    if not replicas:
        raise LlorchError(Code.INVALID_REQUEST, f"pool {pool_id} has no engines of ours, and so no logs of them")
    return 200, await asyncio.to_thread(node.read_log, pool_id, replicas, lines, ask.query.get("after"))


_POOL = "/v2/pools/{pool}/"
CALLS = (
    Call("POST", "/v2/drain", Scope.CONTROL, "No new tasks on this node; idempotent", _drain, 202, DrainWish),
    Call("POST", "/v2/undrain", Scope.CONTROL, "Tasks again on this node", _undrain, 202),
    Call("POST", _POOL + "drain", Scope.CONTROL, "No new tasks on a pool; idempotent", _pool_drain, 202, DrainWish),
    Call("POST", _POOL + "undrain", Scope.CONTROL, "Tasks again on a pool", _simple(ev.Undrain), 202),
    Call("POST", _POOL + "load", Scope.CONTROL, "Start what does not run, failed ones too", _pool_load, 202, PoolWish),
    Call(
        "POST", _POOL + "unload", Scope.CONTROL, "Stop a pool's engines after their tasks", _pool_unload, 202, PoolWish
    ),
    Call("POST", _POOL + "reload", Scope.CONTROL, "Serve another model", _pool_reload, 202, PoolWish),
    Call("POST", _POOL + "restart", Scope.CONTROL, "Stop and start a pool's engines", _pool_restart, 202, PoolWish),
    Call("POST", _POOL + "purge", Scope.CONTROL, "Forget failures and old logs", _simple(ev.Purge), 202),
    Call("GET", _POOL + "logs", Scope.CONTROL, "The newest lines of the engines' logs, or those after a cursor", _logs),
)
