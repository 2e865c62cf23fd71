"""Operations on nodes and pools over HTTP, and the logs of their engines: an admin asks, the node carries it out.

Owns which node is asked, what it means when it can't be asked, and that nothing is done which is not on record. What
the node answers is taken over at once, so that whoever looks after the 202 sees the operation. Never decides whether a
pool can do what it is asked to: its node knows.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from aiohttp import web
from pydantic import BaseModel

from llorch import sse
from llorch.auth import Scope
from llorch.control import on_record, views
from llorch.control.answers import SSE_HEADERS, Stream
from llorch.control.dispatch import PING_AFTER_S
from llorch.control.nodes import Node
from llorch.control.state import CONTROL, Control, wall_time
from llorch.errors import Code, LlorchError, invalid
from llorch.logs import Log
from llorch.messages import M, PoolReport, decode_object, parse
from llorch.outlet import Outlet
from llorch.web import (
    MAX_SMALL_BODY_BYTES,
    PRINCIPAL,
    REQUEST_ID,
    Handler,
    Route,
    json_response,
    read_body,
)
from llorch.wishes import DrainWish, PoolLogs, PoolWish

LOOK_FOR_LINES_EVERY_S = 0.5  # while a log is followed: soon enough for a person, two small calls a second for a node
DEFAULT_LINES, MAX_LINES = 200, 2_000  # of a log, in one answer
MAX_FOLLOWED = 64  # logs at a time: each costs its node a call every half second
MAX_CURSOR_CHARS = 4_096
_OFF = ("0", "false", "no", "off")

NODE_OPERATIONS: Mapping[str, str] = {
    "drain": "Take no new tasks; end those that run longer than deadline_s",
    "undrain": "Take tasks again",
}
POOL_OPERATIONS: Mapping[str, str] = {
    "drain": "Take no new tasks; end those that run longer than deadline_s",
    "undrain": "Take tasks again",
    "load": "Start the engine, with `model` if one is named",
    "unload": "Let running tasks end, and stop the engine",
    "reload": "Have `model` instead; the old one serves until the new one is proven, where memory allows",
    "restart": "Let running tasks end, and start the engine anew",
    "purge": "Of a stopped pool: forget failures, and remove its engines' logs",
}

log = Log("control.pools")


def _node(control: Control, node_id: str) -> Node:
    """The node, if there is one that can be asked. Raises LlorchError that says what is in the way."""
    now = time.monotonic()
    node = control.registry.nodes.get(node_id)
    if node is None:
        control.recovery.check(now, "this node may still come back")
        raise LlorchError(Code.NODE_NOT_FOUND, "no such node")
    if node.quarantine is not None:
        raise LlorchError(Code.NODE_QUARANTINED, f"node {node_id} is quarantined: {node.quarantine.reason}")
    if not node.online:
        silent_s = max(0, round(now - node.last_beat))
        raise _lost(node, f"it is offline: nothing was heard of it for {silent_s} s")
    return node


def _pooled(control: Control, node_id: str, pool_id: str) -> Node:
    node = _node(control, node_id)
    if pool_id not in node.pools:
        raise LlorchError(Code.POOL_NOT_FOUND, f"node {node_id} has no such pool")
    return node


def _lost(node: Node, why: str) -> LlorchError:
    return LlorchError(
        Code.NODE_LOST,
        f"node {node.node_id} can't be asked: {why}",
        hint=f"look at `llorch node` on that machine; `llorch node rm {node.node_id}` forgets one that stays away",
    )


def _unable(node: Node) -> LlorchError:
    if node.leaseless:
        hint = "it registered without a boot_id, as other programs than `llorch node` do: operate its engine over there"
    else:
        hint = "run the same version of llorch on both machines"
    what = f"node {node.node_id} has no such operation (version {node.version or 'unknown'})"
    return LlorchError(Code.CONFLICT, what, hint=hint)


async def _ask(control: Control, node: Node, method: str, path: str, wish: BaseModel | None = None) -> Any:
    """One of the node's own routes. Raises as the node did, or what it means that it has no such route."""
    body = b"" if wish is None else wish.model_dump_json(exclude_none=True).encode()
    try:
        return await control.nodes.call(node.node_id, method, path, body)
    except LlorchError as error:
        no_route = (Code.NOT_FOUND, Code.METHOD_NOT_ALLOWED, *((Code.POOL_NOT_FOUND,) if node.leaseless else ()))
        if error.code in no_route:  # it may not know the route: the pool it knows
            raise _unable(node) from None
        if error.code is Code.NODE_LOST:
            raise _lost(node, error.message) from None
        raise


def _answer_as(model: type[M], node: Node, answer: object) -> M:
    try:
        return parse(model, answer)
    except LlorchError:
        log.warning("node.answer_unread", node_id=node.node_id)
        raise _lost(node, "its answer can't be read") from None


async def _wish(request: web.Request, model: type[M]) -> M:
    """The body as `model`; none is an empty wish."""
    body = await read_body(request, most_bytes=MAX_SMALL_BODY_BYTES)
    return parse(model, decode_object(body) if body.strip() else {})


# ---------------------------------------------------------------- operations


def _on_node(kind: str) -> Handler:
    async def operate(request: web.Request) -> web.StreamResponse:
        control, node_id = request.app[CONTROL], request.match_info["node_id"]
        wish = await _wish(request, DrainWish)
        node = _node(control, node_id)
        await on_record.node_operation(request, node_id, kind, wish)
        try:
            answer = await _ask(control, node, "POST", f"/v2/{kind}", wish)
        except LlorchError as error:
            on_record.operation_refused(request, node_id, None, kind, error)
            raise
        log.info("node.operation", node_id=node_id, kind=kind, by=request[PRINCIPAL].name)
        draining = answer.get("draining") if isinstance(answer, dict) else None
        if not isinstance(draining, bool):
            draining = kind == "drain"  # it said 2xx
        return json_response({"node_id": node_id, "draining": draining}, status=202)

    return operate


def _on_pool(kind: str) -> Handler:
    async def operate(request: web.Request) -> web.StreamResponse:
        control, node_id = request.app[CONTROL], request.match_info["node_id"]
        pool_id = request.match_info["pool_id"]
        wish = await _wish(request, PoolWish)
        if kind == "reload" and not wish.model:
            raise invalid("model: a reload names the model to have", param="model", hint='send {"model": "..."}')
        node = _pooled(control, node_id, pool_id)
        await on_record.pool_operation(request, node_id, pool_id, kind, wish)
        try:
            answer = await _ask(control, node, "POST", f"/v2/pools/{quote(pool_id, safe='')}/{kind}", wish)
        except LlorchError as error:
            on_record.operation_refused(request, node_id, pool_id, kind, error)
            raise
        log.info("pool.operation", node_id=node_id, pool_id=pool_id, kind=kind, by=request[PRINCIPAL].name)
        report = _answer_as(PoolReport, node, answer.get("pool") if isinstance(answer, dict) else None)
        if report.pool_id != pool_id:
            raise _lost(node, "it answered for another pool")
        return json_response({"node_id": node_id, "pool": _taken(control, node_id, report)}, status=202)

    return operate


def _taken(control: Control, node_id: str, report: PoolReport) -> dict[str, Any]:
    """Take the report over, unless it is too much; and how the pool looks from now on."""
    try:
        control.registry.merge_pool(node_id, report, now=time.monotonic(), wall=wall_time())
    except LlorchError as error:
        log.warning("pool.untaken", node_id=node_id, pool_id=report.pool_id, code=error.code)
    else:
        control.distrust.read(node_id, report)
        control.dispatcher.registry_changed()
    node = control.registry.nodes.get(node_id)
    pool = None if node is None else node.pools.get(report.pool_id)
    if node is None or pool is None:  # it left while it answered
        return report.model_dump(exclude={"gone"})
    return views.pool_view(node, pool, time.monotonic())


# ---------------------------------------------------------------- logs


async def logs(request: web.Request) -> web.StreamResponse:
    """The newest lines of a pool's engines, or those after a cursor; with `follow`, and then as they are written."""
    control, query = request.app[CONTROL], request.query
    node_id, pool_id = request.match_info["node_id"], request.match_info["pool_id"]
    after = request.headers.get("Last-Event-ID") or query.get("after") or None
    if after is not None and len(after) > MAX_CURSOR_CHARS:
        raise invalid(f"after: at most {MAX_CURSOR_CHARS} characters", param="after")
    lines = _lines(query.get("lines"))
    node = _pooled(control, node_id, pool_id)
    follow = "follow" in query and query["follow"].lower() not in _OFF
    on_record.logs_read(request, node_id, pool_id, follow=follow)
    if not follow:
        found = await _read_log(control, node, pool_id, lines, after)
        return json_response(found.model_dump())
    with control.quotas.stream(request[PRINCIPAL].name):
        return await _follow(request, pool_id, lines, after)


def _lines(given: str | None) -> int:
    if given is None or given == "":
        return DEFAULT_LINES
    if not (given.isascii() and given.isdigit() and len(given) < 9 and 0 < int(given) <= MAX_LINES):
        raise invalid(f"lines: 1 to {MAX_LINES}", param="lines")
    return int(given)


async def _read_log(control: Control, node: Node, pool_id: str, lines: int, after: str | None) -> PoolLogs:
    wanted = {"lines": str(lines)} | ({} if after is None else {"after": after})
    path = f"/v2/pools/{quote(pool_id, safe='')}/logs?{urlencode(wanted)}"
    return _answer_as(PoolLogs, node, await _ask(control, node, "GET", path))


async def _follow(request: web.Request, pool_id: str, lines: int, after: str | None) -> web.StreamResponse:
    """One `log` event for each answer that has lines; its id is where to go on. An `error` event is the last."""
    control, node_id = request.app[CONTROL], request.match_info["node_id"]
    followed = request.app[FOLLOWED]
    followed.enter()
    try:
        found = await _read_log(control, _pooled(control, node_id, pool_id), pool_id, lines, after)
        stream = Stream(Outlet.of(request), control.slow_reader_timeout_s)
        stream.commit(200, SSE_HEADERS)
        said_at, first = time.monotonic(), True
        while True:
            if found.lines or first:  # the first one also empty: it tells that the log is followed, and from where
                await stream.write(_log_event(found))
                said_at, first = time.monotonic(), False
            elif time.monotonic() - said_at >= PING_AFTER_S:
                await stream.ping()
                said_at = time.monotonic()
            if await _stops(control, LOOK_FOR_LINES_EVERY_S):
                return stream.finished()
            try:
                node = _pooled(control, node_id, pool_id)
                found = await _read_log(control, node, pool_id, MAX_LINES, found.cursor)
            except LlorchError as error:
                wire = error.to_wire(request_id=request[REQUEST_ID])
                await stream.write(sse.encode("error", json.dumps(wire)))
                return stream.finished()
    finally:
        followed.leave()


def _log_event(found: PoolLogs) -> bytes:
    """Its data is what the same answer is without `follow`."""
    wire = json.dumps(found.model_dump(), ensure_ascii=False, separators=(",", ":"))
    return sse.encode("log", wire, id=_event_id(found.cursor))


def _event_id(cursor: str) -> str | None:
    """A node writes it: what would end the line is no id."""
    return cursor if cursor.isprintable() else None


async def _stops(control: Control, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await control.stopping.wait()
    except TimeoutError:
        return False
    return True


class Followed:
    """How many logs are followed."""

    def __init__(self, most: int = MAX_FOLLOWED) -> None:
        self._most = most
        self.now = 0

    def enter(self) -> None:
        """Raises RATE_LIMITED if there are too many."""
        if self.now >= self._most:
            words = f"{self.now} logs are followed at this moment, as many as may be"
            raise LlorchError(Code.RATE_LIMITED, words, hint="end one, or ask again without follow")
        self.now += 1

    def leave(self) -> None:
        self.now -= 1


FOLLOWED = web.AppKey("followed", Followed)

_OF_A_POOL = "/v2/nodes/{node_id}/pools/{pool_id}"
ROUTES = (
    *(
        Route("POST", f"/v2/nodes/{{node_id}}/{kind}", Scope.ADMIN, _on_node(kind), summary, DrainWish, status=202)
        for kind, summary in NODE_OPERATIONS.items()
    ),
    *(
        Route("POST", f"{_OF_A_POOL}/{kind}", Scope.ADMIN, _on_pool(kind), summary, PoolWish, status=202)
        for kind, summary in POOL_OPERATIONS.items()
    ),
    Route("GET", f"{_OF_A_POOL}/logs", Scope.ADMIN, logs, "What a pool's engines write; `?follow=1`: as events"),
)
