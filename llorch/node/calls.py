"""The node's own routes that take JSON and answer JSON, the same over HTTP and over a link.

Owns what each of them answers and how a path finds its route. Tasks and logs, which stream, are `routes_tasks`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from aiohttp import web

from llorch import __version__
from llorch.auth import Scope
from llorch.errors import Code, LlorchError
from llorch.logs import Log
from llorch.messages import NodeCall
from llorch.node import calls_pools, routes_catalog
from llorch.node.link import Answer
from llorch.node.route_call import Ask, Call, Reply
from llorch.node.state import NODE, Node
from llorch.node.task_entry import State
from llorch.web import MAX_SMALL_BODY_BYTES, Route, json_response, read_body

log = Log("node.calls")


def _live(node: Node, _ask: Ask) -> Reply:
    return 200, _status(node, "ok")


def _ready(node: Node, _ask: Ask) -> Reply:
    """Warming: engines are on their way and none is there yet. A node without pools, or with failed ones, is up."""
    if node.draining:
        return 503, _status(node, "draining")
    states = [report["state"] for report in node.pools.report()]
    warming = "ready" not in states and any(state in ("starting", "loading") for state in states)
    return (503, _status(node, "warming")) if warming else (200, _status(node, "ok"))


def _status(node: Node, status: str) -> dict[str, Any]:
    return {"status": status, "version": __version__, "role": "node", "node_id": node.node_id}


def _pools(node: Node, _ask: Ask) -> Reply:
    return 200, {"pools": node.pool_reports()}


def _pool(node: Node, ask: Ask) -> Reply:
    wanted = ask.params["pool"]
    node.pools.health(wanted)  # raises POOL_NOT_FOUND
    return 200, next(report for report in node.pool_reports() if report["pool_id"] == wanted)


def _pool_health(node: Node, ask: Ask) -> Reply:
    return 200, node.pools.health(ask.params["pool"])


def _tasks(node: Node, _ask: Ask) -> Reply:
    return 200, {"tasks": [entry.report() for entry in node.runner.logs]}


def _task(node: Node, ask: Ask) -> Reply:
    return 200, node.runner.logs.get(ask.params["task"]).report()


def _cancel(node: Node, ask: Ask) -> Reply:
    entry = node.runner.logs.get(ask.params["task"])
    node.runner.cancel(entry)
    return 202, {"task_id": entry.task_id, "state": State.SEALED if entry.log.sealed else "canceling"}


CALLS = (
    Call("GET", "/livez", Scope.OPEN, "The process lives", _live),
    Call("GET", "/readyz", Scope.OPEN, "It takes tasks; 503 while it drains or its first engine loads", _ready),
    Call("GET", "/health", Scope.OPEN, "Status, version, role", _live),
    Call("GET", "/v2/pools", Scope.CONTROL, "Every pool of this node", _pools),
    Call("GET", "/v2/pools/{pool}", Scope.CONTROL, "One pool", _pool),
    Call("GET", "/v2/pools/{pool}/health", Scope.CONTROL, "Whether a pool lives, is ready, has room", _pool_health),
    Call("GET", "/v2/tasks", Scope.CONTROL, "The tasks that run here or are remembered", _tasks),
    Call("GET", "/v2/tasks/{task}", Scope.CONTROL, "One task", _task),
    Call("DELETE", "/v2/tasks/{task}", Scope.CONTROL, "Cancel a task; idempotent", _cancel, status=202),
    *calls_pools.CALLS,
    *routes_catalog.CALLS,
)


# ---------------------------------------------------------------- over HTTP


def http_route(call: Call) -> Route:
    async def handler(request: web.Request) -> web.StreamResponse:
        body = b"" if call.method == "GET" else await read_body(request, most_bytes=MAX_SMALL_BODY_BYTES)
        status, value = await call.answer(request.app[NODE], Ask(request.match_info, request.query, body))
        return json_response(value, status=status)

    return Route(call.method, call.path, call.scope, handler, call.summary, call.body, status=call.status)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


# ---------------------------------------------------------------- over a link


class LinkCalls:
    """Answers NodeCalls (a link.Calls). Nobody asks for health over a link, but may."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._table = [(call, re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", call.path))) for call in CALLS]

    async def __call__(self, wish: NodeCall, body: bytes) -> Answer:
        try:
            parts = urlsplit(wish.path)
            call, params = self._find(wish.method, parts.path)
            status, value = await call.answer(self._node, Ask(params, dict(parse_qsl(parts.query)), body))
        except LlorchError as error:
            status, value = error.status, error.envelope(request_id=wish.headers.get("x-request-id"))
        except Exception:
            log.fault("call.failed", node_id=self._node.node_id, path=wish.path)
            fault = LlorchError(Code.INTERNAL, "an unexpected fault on the node; it was logged")
            status, value = fault.status, fault.envelope()
        return Answer(status, _json(value))

    def _find(self, method: str, path: str) -> tuple[Call, Mapping[str, str]]:
        found = False
        for call, pattern in self._table:
            match = pattern.fullmatch(path)
            if match is None:
                continue
            if call.method == method:
                return call, {name: unquote(value) for name, value in match.groupdict().items()}
            found = True
        if found:
            raise LlorchError(Code.METHOD_NOT_ALLOWED, "this route does not have this method")
        raise LlorchError(Code.NOT_FOUND, "there is no such route")
