"""Whether this control lives and is ready, what it counts, and the list of its routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from llorch import __version__
from llorch.auth import Scope
from llorch.control.state import CONTROL
from llorch.control.views import storm_view
from llorch.openapi import Description
from llorch.web import Route, json_response

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def live(_request: web.Request) -> web.StreamResponse:
    return json_response({"status": "ok", "version": __version__, "role": "control"})


async def ready(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    draining = control.dispatcher.draining
    document: dict[str, Any] = {"status": "draining" if draining else "ok", "version": __version__, "role": "control"}
    storm = storm_view(control.registry, time.monotonic())
    if storm is not None:
        document["storm"] = storm
    return json_response(document, status=503 if draining else 200)


async def metrics(request: web.Request) -> web.StreamResponse:
    body = request.app[CONTROL].metrics.render()
    return web.Response(body=body, headers={"Content-Type": METRICS_TYPE})


def routes(others: Sequence[Route]) -> tuple[Route, ...]:
    """All routes of the control: `others`, and those of this module, with the document that lists them."""
    description = Description(title="llorch control", version=__version__)

    async def describe(_request: web.Request) -> web.StreamResponse:
        return json_response(await asyncio.to_thread(description.document))

    table = (
        *others,
        Route("GET", "/livez", Scope.OPEN, live, "The process lives"),
        Route("GET", "/readyz", Scope.OPEN, ready, "It takes tasks; 503 while it drains"),
        Route("GET", "/health", Scope.OPEN, live, "Status, version, role"),
        Route("GET", "/metrics", Scope.METRICS, metrics, "Prometheus text", returns="text/plain"),
        Route("GET", "/openapi.json", Scope.OPEN, describe, "This document"),
    )
    description.routes = table
    return table
