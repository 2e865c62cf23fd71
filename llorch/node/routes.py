"""Every route of a node, with its scope: one table, and the document that lists it."""

from __future__ import annotations

import asyncio

from aiohttp import web

from llorch import __version__
from llorch.auth import Scope
from llorch.node import calls, routes_catalog, routes_tasks
from llorch.node.state import NODE
from llorch.openapi import Description
from llorch.web import Route, json_response

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def metrics(request: web.Request) -> web.StreamResponse:
    return web.Response(body=request.app[NODE].metrics.render(), headers={"Content-Type": METRICS_TYPE})


def routes() -> tuple[Route, ...]:
    description = Description(title="llorch node", version=__version__)

    async def describe(_request: web.Request) -> web.StreamResponse:
        return json_response(await asyncio.to_thread(description.document))

    table = (
        *map(calls.http_route, calls.CALLS),
        Route(
            "POST",
            "/v2/pools/{pool}/infer",
            Scope.CONTROL,
            routes_tasks.infer,
            "Run a task on this pool: records, or the engine's own stream",
            returns="text/event-stream",
        ),
        Route(
            "GET",
            "/v2/tasks/{task}/log",
            Scope.CONTROL,
            routes_tasks.follow,
            "A task's log from ?offset=, as infer answers",
            returns="text/event-stream",
        ),
        routes_catalog.BLOB,
        Route("GET", "/metrics", Scope.METRICS, metrics, "Prometheus text", returns="text/plain"),
        Route("GET", "/openapi.json", Scope.OPEN, describe, "This document"),
    )
    description.routes = table
    return table
