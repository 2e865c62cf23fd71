"""Models over HTTP: where they are; staged, verified and removed on demand. Each handler parses, calls, replies."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from llorch.auth import Scope
from llorch.control import on_record, views
from llorch.control.stage_sources import shown
from llorch.control.state import CONTROL, Control
from llorch.errors import Code, LlorchError, invalid
from llorch.messages import model_id_ok
from llorch.web import Route, json_response, read_model
from llorch.wishes import StageWish, VerifyWish

_ABSENT = frozenset({Code.MODEL_NOT_FOUND, Code.NODE_NOT_FOUND})
_FORGOTTEN = "this control knows no such job; one that was started anew has forgotten its jobs, and nodes have gone on"
_LOOK = "`llorch model ls` shows how far each node is"


async def catalog(request: web.Request) -> web.StreamResponse:
    return json_response(views.catalog_view(request.app[CONTROL].registry))


async def stage(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    wish = await read_model(request, StageWish)
    _all_are_back(control, wish.nodes)
    try:
        control.stager.check(wish)
    except LlorchError as error:
        _may_turn_up(control, error)
        raise
    await on_record.models_changed(
        request, "model.stage", model=shown(wish.model), nodes=_nodes(wish.nodes), source=wish.source
    )
    return json_response(control.stager.view(control.stager.stage(wish)), status=202)


async def list_jobs(request: web.Request) -> web.StreamResponse:
    stager = request.app[CONTROL].stager
    return json_response({"jobs": [stager.view(job) for job in stager.jobs.all]})


async def show_job(request: web.Request) -> web.StreamResponse:
    stager = request.app[CONTROL].stager
    job = stager.jobs.get(request.match_info["job"])
    if job is None:
        raise LlorchError(Code.NOT_FOUND, _FORGOTTEN, hint=_LOOK)
    return json_response(stager.view(job))


async def verify(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    wish = await read_model(request, VerifyWish)
    _all_are_back(control, wish.nodes)
    try:
        control.stager.checks(wish)
    except LlorchError as error:
        _may_turn_up(control, error)
        raise
    await on_record.models_changed(request, "model.verify", model=wish.model, nodes=_nodes(wish.nodes))
    return json_response(control.stager.verify(wish).view(), status=202)


async def show_verification(request: web.Request) -> web.StreamResponse:
    job = request.app[CONTROL].stager.verifications.get(request.match_info["job"])
    if job is None:
        raise LlorchError(Code.NOT_FOUND, _FORGOTTEN, hint="verify again")
    return json_response(job.view())


async def remove(request: web.Request) -> web.StreamResponse:
    """Of one node. Idempotent as far as the node is: what it answers is passed on."""
    control = request.app[CONTROL]
    node_id, model = request.match_info["node_id"], request.match_info["model"]
    retire = _flag(request, "retire")
    if not model_id_ok(model):
        raise invalid("this is no model's id", param="model", hint="`llorch model ls` lists them")
    node = control.registry.nodes.get(node_id)
    if node is None:
        error = LlorchError(Code.NODE_NOT_FOUND, f"no node {node_id}")
        _may_turn_up(control, error)
        raise error
    if not node.online:
        raise LlorchError(Code.NODE_LOST, f"{node_id} is offline", hint="remove it when the node is back")
    event = "model.retire" if retire else "model.remove"
    await on_record.models_changed(request, event, model=model, nodes=node_id)
    answer: Any = await control.stager.remove(node_id, model, retire=retire)
    return json_response(answer if isinstance(answer, dict) else {"node_id": node_id, "model": model}, status=202)


def _nodes(nodes: str | list[str]) -> str:
    return nodes if isinstance(nodes, str) else ",".join(nodes)


def _flag(request: web.Request, name: str) -> bool:
    given = request.query.get(name, "false")
    if given not in ("true", "false"):
        raise invalid(f"{name} is true or false", param=name)
    return given == "true"


def _all_are_back(control: Control, nodes: str | list[str]) -> None:
    """Raises RECOVERING where every node is meant, and some of them may not be back yet."""
    if nodes == "all":
        control.recovery.check(time.monotonic(), "not all of its nodes are back yet")


def _may_turn_up(control: Control, error: LlorchError) -> None:
    """Raises RECOVERING instead of `error` while what is absent may still come."""
    if error.code in _ABSENT:
        control.recovery.check(time.monotonic(), "what was named may not be back yet")


ROUTES = (
    Route("GET", "/v2/catalog", Scope.READ, catalog, "Models per node, and ids that stand for two contents"),
    Route("POST", "/v2/catalog/stage", Scope.ADMIN, stage, "Have a model on nodes", StageWish, status=202),
    Route("GET", "/v2/catalog/stage", Scope.READ, list_jobs, "The staging jobs that are remembered"),
    Route("GET", "/v2/catalog/stage/{job}", Scope.READ, show_job, "One staging job: how far each node is"),
    Route("POST", "/v2/catalog/verify", Scope.ADMIN, verify, "Read models, compare digests", VerifyWish, status=202),
    Route("GET", "/v2/catalog/verify/{job}", Scope.READ, show_verification, "What a verification found"),
    Route(
        "DELETE", "/v2/catalog/{node_id}/{model:.+}", Scope.ADMIN, remove,
        "Remove a model from a node; ?retire=true only stops offering it", status=202,
    ),
)  # fmt: skip
