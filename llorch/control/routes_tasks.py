"""Tasks over HTTP: submit, look, follow, cancel, explain. Each handler authenticates, parses, calls, replies."""

from __future__ import annotations

import asyncio
import time
import uuid

from aiohttp import web

from llorch.auth import Principal, Scope
from llorch.control import intake
from llorch.control.answers import (
    Answer,
    Detached,
    NativeJson,
    NativeStream,
    OpenAiAnswer,
    stopping,
    task_headers,
)
from llorch.control.dispatch import ShuttingDown
from llorch.control.follow import follow_log
from llorch.control.state import CONTROL, Control
from llorch.control.tasks import ENDED, State, Task, view_of_report
from llorch.control.views import openai_models
from llorch.errors import Code, LlorchError
from llorch.messages import TaskBody
from llorch.web import PRINCIPAL, REQUEST_ID, Route, json_response, read_body

MAX_LISTED_TASKS = 1_000


async def submit(request: web.Request) -> web.StreamResponse:
    control, request_id = request.app[CONTROL], request[REQUEST_ID]
    raw = await read_body(request, most_bytes=control.max_body_bytes)
    task = intake.native_task(
        raw,
        request.headers,
        owner=request[PRINCIPAL].name,
        request_id=request_id,
        task_id=str(uuid.uuid4()),
        now=time.monotonic(),
    )
    if _repeated(control, task):
        if task.detach:
            return _taken(task.task_id, _view(control, task.task_id, request[PRINCIPAL])["state"], {})
        return await follow_log(request, control, task.task_id, 0, {"Idempotency-Replayed": "true"})
    if task.detach:
        return await _detach(control, task)
    accept = request.headers.get("Accept", "")
    answer: Answer
    if "application/json" in accept and "text/event-stream" not in accept:
        answer = NativeJson(task)
    else:
        answer = NativeStream(request, task, control.slow_reader_timeout_s)
    return await _serve(control, task, answer)


async def openai(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    raw = await read_body(request, most_bytes=control.max_body_bytes)
    task = intake.openai_task(
        request.path,
        raw,
        request.headers,
        owner=request[PRINCIPAL].name,
        request_id=request[REQUEST_ID],
        task_id=str(uuid.uuid4()),
        now=time.monotonic(),
    )
    return await _serve(control, task, OpenAiAnswer(request, task, control.slow_reader_timeout_s))


async def _serve(control: Control, task: Task, answer: Answer) -> web.StreamResponse:
    try:
        tail = await control.dispatcher.run(task, answer)
        return await answer.ended(tail)
    except ShuttingDown:
        return await answer.stopped(task.request_id)
    except LlorchError as error:
        return await answer.failed(error, task.request_id)


async def _detach(control: Control, task: Task) -> web.StreamResponse:
    client = Detached()
    control.dispatcher.admit(task)  # at once: the same task sent again finds it
    running = control.guard.spawn(_run_detached(control, task, client), f"detached.{task.task_id}")
    try:
        await asyncio.wait((running, client.taken), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        running.cancel()  # nobody was told that it was taken
        raise
    if running.done():
        error = running.result()
        if error is not None and not client.taken.done():
            raise error
    return _taken(task.task_id, task.state.value, task_headers(task))


def _taken(task_id: str, state: object, headers: dict[str, str]) -> web.Response:
    events_url = f"/v2/tasks/{task_id}/events"
    return json_response(
        {"task_id": task_id, "state": state, "events_url": events_url},
        status=202,
        headers={"X-Llorch-Task": task_id, **headers, "Location": events_url},
    )


async def _run_detached(control: Control, task: Task, client: Detached) -> LlorchError | None:
    """Returns why it failed: for its submitter, if that one still waits. The task itself tells whoever asks for it."""
    try:
        await control.dispatcher.run(task, client)
    except LlorchError as error:
        return error
    except ShuttingDown:
        return stopping()
    return None


# ---------------------------------------------------------------- looking


def _may_see(principal: Principal, owner: str) -> bool:
    return principal.may(Scope.ADMIN) or principal.name == owner


def _find(control: Control, task_id: str, principal: Principal) -> Task | None:
    """A task of this control that `principal` may see. Another's task does not exist for them."""
    task = control.dispatcher.tasks.get(intake.check_task_id(task_id))
    return task if task is not None and _may_see(principal, task.owner) else None


def _view(control: Control, task_id: str, principal: Principal) -> dict[str, object]:
    task = _find(control, task_id, principal)
    known = control.registry.task(task_id)
    if task is not None and not (task.abandoned and known is not None):
        position, eta_ms = control.dispatcher.place_in_line(task)
        return task.view(position=position, eta_ms=eta_ms)
    if known is not None and _may_see(principal, known[1].owner):
        return view_of_report(*known)
    raise LlorchError(Code.TASK_NOT_FOUND, "no such task")


async def list_tasks(request: web.Request) -> web.StreamResponse:
    control, principal = request.app[CONTROL], request[PRINCIPAL]
    seen: dict[str, dict[str, object]] = {}
    for task in control.dispatcher.tasks:
        if len(seen) >= MAX_LISTED_TASKS:
            break
        if _may_see(principal, task.owner):
            seen[task.task_id] = _view(control, task.task_id, principal)
    for node_id, report in control.registry.tasks():
        if len(seen) >= MAX_LISTED_TASKS:
            break
        if _may_see(principal, report.owner) and report.task_id not in seen:
            seen[report.task_id] = view_of_report(node_id, report)
    return json_response({"tasks": list(seen.values())})


async def show_task(request: web.Request) -> web.StreamResponse:
    return json_response(_view(request.app[CONTROL], request.match_info["task_id"], request[PRINCIPAL]))


async def cancel_task(request: web.Request) -> web.StreamResponse:
    control, principal = request.app[CONTROL], request[PRINCIPAL]
    task_id = request.match_info["task_id"]
    view = _view(control, task_id, principal)
    task = _find(control, task_id, principal)
    if task is not None and not task.ended:
        control.dispatcher.cancel(task)
    elif view["state"] in (State.PLACED, State.STREAMING) or (task is not None and task.abandoned):
        node_id = view["node_id"]
        if task is not None and (view["state"] not in ENDED or control.registry.task(task_id) is None):
            task.abandoned = False  # so that a node that is away now is told when it comes back
        if isinstance(node_id, str):
            await _cancel_on_node(control, node_id, task_id, known=task is not None)
    return json_response({"task_id": task_id, "state": view["state"]}, status=202)


async def _cancel_on_node(control: Control, node_id: str, task_id: str, *, known: bool) -> None:
    """`known` here: then a node that is away is told when it is back (`cancel_surplus`)."""
    try:
        await control.nodes.call(node_id, "DELETE", f"/v2/tasks/{task_id}")
    except LlorchError as error:
        if error.code is not Code.TASK_NOT_FOUND and not (known and error.code is Code.NODE_LOST):
            raise  # TASK_NOT_FOUND: it has ended there, so what was asked for is so


async def task_placement(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    task = _find(control, request.match_info["task_id"], request[PRINCIPAL])
    if task is None:
        raise LlorchError(Code.TASK_NOT_FOUND, "no such task at this control")
    made = task.placement
    if made is None and task.ended and task.node_id is not None:
        raise LlorchError(Code.TASK_NOT_FOUND, "why it went where it went is kept of the newest tasks only")
    decision = made.decision() if made is not None else control.dispatcher.explain(task.wish)
    return json_response({"task_id": task.task_id, "state": task.state.value, **decision.to_wire()})


async def dry_run(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    raw = await read_body(request, most_bytes=control.max_body_bytes)
    task = intake.native_task(
        raw, request.headers, owner=request[PRINCIPAL].name, request_id="", task_id="", now=time.monotonic()
    )
    return json_response(control.dispatcher.explain(task.wish).to_wire())


# ---------------------------------------------------------------- following


def _repeated(control: Control, task: Task) -> bool:
    """True if this very task is here already. Another's, or another body under the same id, is a conflict."""
    earlier = control.dispatcher.tasks.get(task.task_id)
    if earlier is not None:
        same = earlier.owner == task.owner and earlier.body_digest == task.body_digest
    else:
        known = control.registry.task(task.task_id)
        if known is None:
            return False
        same = known[1].owner == task.owner and known[1].body_digest in (None, task.body_digest)
    if not same:
        raise LlorchError(
            Code.CONFLICT, "this task_id is taken", param="task_id", hint="leave task_id out, or make a new one"
        )
    return True


async def follow(request: web.Request) -> web.StreamResponse:
    control, principal = request.app[CONTROL], request[PRINCIPAL]
    task_id = request.match_info["task_id"]
    _view(control, task_id, principal)
    task, known = _find(control, task_id, principal), control.registry.task(task_id)
    native = task.native if task is not None else known is None or known[1].path == "native"
    if not native:
        raise LlorchError(
            Code.CONFLICT, "only native tasks can be followed", hint="a /v1 answer goes to its client alone"
        )
    offset = intake.event_offset(request.headers, request.query)
    return await follow_log(request, control, task_id, offset, {})


async def models(request: web.Request) -> web.StreamResponse:
    return json_response(openai_models(request.app[CONTROL].registry))


async def model(request: web.Request) -> web.StreamResponse:
    listed = openai_models(request.app[CONTROL].registry)["data"]
    for entry in listed:
        if entry["id"] == request.match_info["model_id"]:
            return json_response(entry)
    raise LlorchError(Code.MODEL_NOT_FOUND, "no node has this model", param="model")


ROUTES = (
    Route("POST", "/v2/tasks", Scope.SUBMIT, submit, "Submit a task", TaskBody, returns="text/event-stream"),
    Route("GET", "/v2/tasks", Scope.SUBMIT, list_tasks, "Your tasks, newest first"),
    Route("GET", "/v2/tasks/{task_id}", Scope.SUBMIT, show_task, "One task"),
    Route("GET", "/v2/tasks/{task_id}/events", Scope.SUBMIT, follow, "Its events", returns="text/event-stream"),
    Route("GET", "/v2/tasks/{task_id}/placement", Scope.SUBMIT, task_placement, "Why it went where it went"),
    Route("POST", "/v2/tasks/{task_id}/cancel", Scope.SUBMIT, cancel_task, "Cancel it", status=202),
    Route("DELETE", "/v2/tasks/{task_id}", Scope.SUBMIT, cancel_task, "Cancel it", status=202),
    Route("POST", "/v2/placement", Scope.SUBMIT, dry_run, "Where a task would go now, and why", TaskBody),
    Route("GET", "/v1/models", Scope.SUBMIT, models, "The models there are, as OpenAI lists them"),
    Route("GET", "/v1/models/{model_id:.+}", Scope.SUBMIT, model, "One model"),
    Route("POST", "/v1/{path:.+}", Scope.SUBMIT, openai, "Any OpenAI-shaped call, routed by its model"),
)
