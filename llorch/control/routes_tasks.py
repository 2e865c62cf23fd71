"""Tasks over HTTP: submit, look, follow, cancel, explain. Each handler authenticates, parses, calls, replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from aiohttp import web

from llorch.auth import Principal, Scope
from llorch.control import intake, on_record
from llorch.control.answers import (
    Answer,
    Detached,
    NativeJson,
    NativeStream,
    OpenAiAnswer,
    stopping,
    task_headers,
)
from llorch.control.audience import Audience, ShuttingDown
from llorch.control.follow import follow
from llorch.control.state import CONTROL, Control
from llorch.control.task_reports import came_to_nothing
from llorch.control.tasks import ENDED, State, Task, view_of_report
from llorch.control.views import openai_models
from llorch.errors import Code, LlorchError
from llorch.ids import new_task_id
from llorch.messages import TaskBody
from llorch.openai_paths import served
from llorch.outlet import Outlet
from llorch.web import PRINCIPAL, REQUEST_ID, Route, arriving, json_response, read_body

MAX_LISTED_TASKS = 1_000
MOST_ON_LOOP_BYTES = 1024 * 1024  # of a body; a parser takes some 5 to 70 ms for each MiB, in which no stream goes on

_peeks = ThreadPoolExecutor(1, "llorch-peek")  # one at a time: more would only take the interpreter from the loop


async def submit(request: web.Request) -> web.StreamResponse:
    with request.app[CONTROL].quotas.stream(request[PRINCIPAL].name):
        return await _submit(request)


async def _submit(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    task = await _native_task(request)
    earlier = await control.replays.earlier(task)
    if task.detach:
        return await (_detach(request, task) if earlier is None else _taken_before(request, task, earlier))
    accept = request.headers.get("Accept", "")
    answer: Answer
    if "application/json" in accept and "text/event-stream" not in accept:
        answer = NativeJson(task)
    else:
        answer = NativeStream(Outlet.of(request), task, control.slow_reader_timeout_s, again=earlier is not None)
    return await _serve(request, task, answer, earlier)


async def _native_task(request: web.Request) -> Task:
    return await _peek(request, intake.native_task)


async def _peek(request: web.Request, read: Callable[..., Task]) -> Task:
    """The task that `read` makes of a request's body, on another thread where streams would wait for its parser.

    The body is the task's alone: no frame keeps it for as long as the answer takes.
    """
    raw = await read_body(request, most_bytes=request.app[CONTROL].max_body_bytes)
    read = partial(
        read,
        raw,
        request.headers,
        owner=request[PRINCIPAL].name,
        request_id=request[REQUEST_ID],
        task_id=new_task_id(),
        now=time.monotonic(),
    )
    if len(raw) <= MOST_ON_LOOP_BYTES:
        return _allowed(request, read())
    with arriving(request, len(raw)):  # still, until there is a task that counts it
        return _allowed(request, await asyncio.get_running_loop().run_in_executor(_peeks, read))


def _allowed(request: web.Request, task: Task) -> Task:
    """Raises FORBIDDEN for a model that this token is not for."""
    if not request[PRINCIPAL].may_use(task.wish.model):
        raise LlorchError(
            Code.FORBIDDEN,
            "this token is not for this model",
            param="model",
            hint="GET /v1/models lists those it is for",
        )
    return task


async def openai(request: web.Request) -> web.StreamResponse:
    with request.app[CONTROL].quotas.stream(request[PRINCIPAL].name):
        return await _openai(request)


async def _openai(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    where = served(request.path)  # before a byte of the body is read
    task = await _peek(request, partial(intake.openai_task, where.path))
    earlier = await control.replays.earlier(task)
    return await _serve(request, task, OpenAiAnswer(Outlet.of(request), task, control.slow_reader_timeout_s), earlier)


async def _serve(request: web.Request, task: Task, answer: Answer, earlier: str | None) -> web.StreamResponse:
    """Run the task, or read the `earlier` one that it repeats."""
    control = request.app[CONTROL]
    if earlier is not None:
        _repeats(request, task, earlier)
        return await follow(control, task, answer)
    try:
        tail = await control.dispatcher.serve(task, answer, started=lambda: _accepted(request, task))
        return answer.ended(tail)
    except ShuttingDown:
        return answer.stopped(task.request_id)
    except LlorchError as error:
        return answer.failed(error, task.request_id)


def _accepted(request: web.Request, task: Task) -> None:
    on_record.task_accepted(request.app[CONTROL].audit, request[PRINCIPAL], request.remote, task)


def _repeats(request: web.Request, task: Task, earlier: str) -> None:
    task.task_id, task.replayed, task.body = earlier, True, b""
    request.app[CONTROL].metrics.resumed("key")
    _accepted(request, task)


async def _detach(request: web.Request, task: Task) -> web.StreamResponse:
    audience = request.app[CONTROL].dispatcher.start(task, Detached())
    _accepted(request, task)
    try:
        await audience.taken.wait()
    except asyncio.CancelledError:
        audience.left()  # nobody was told that it was taken
        raise
    _check_taken(audience)
    return _taken(task.task_id, task.state.value, task_headers(task))


def _check_taken(audience: Audience) -> None:
    """Raises why a task was not taken by any node."""
    task = audience.task
    if task.error is not None and not audience.accepted_by_node:
        raise stopping() if task.stopped else task.error.copy()


async def _taken_before(request: web.Request, task: Task, earlier: str) -> web.StreamResponse:
    control = request.app[CONTROL]
    _repeats(request, task, earlier)
    audience = control.dispatcher.audience(earlier)
    if audience is not None:
        with audience.listening():
            await audience.taken.wait()
        _check_taken(audience)
    there, known = control.dispatcher.tasks.get(earlier), control.registry.task(earlier)
    state = there.state.value if there is not None else view_of_report(*known)["state"] if known is not None else None
    return _taken(earlier, state, task_headers(task))


def _taken(task_id: str, state: object, headers: dict[str, str]) -> web.Response:
    events_url = f"/v2/tasks/{task_id}/events"
    return json_response(
        {"task_id": task_id, "state": state, "events_url": events_url},
        status=202,
        headers={"X-Llorch-Task": task_id, **headers, "Location": events_url},
    )


# ---------------------------------------------------------------- looking


def _may_see(principal: Principal, owner: str) -> bool:
    return principal.may(Scope.ADMIN) or principal.name == owner


async def _sought(control: Control, request: web.Request) -> str:
    """The task id of a request, after it was looked for wherever it may be. Raises RECOVERING while it may turn up."""
    task_id = intake.check_task_id(request.match_info["task_id"])
    await control.replays.seek(task_id)
    known = control.registry.task(task_id)
    if control.dispatcher.tasks.get(task_id) is None and (known is None or came_to_nothing(known[1])):
        control.recovery.check(time.monotonic(), "its nodes may still bring this task")
    return task_id


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
    owner = _owner(control, task_id)
    if owner is not None:
        on_record.task_hidden(control, principal, task_id, owner)
    raise LlorchError(Code.TASK_NOT_FOUND, "no such task")


def _owner(control: Control, task_id: str) -> str | None:
    task, known = control.dispatcher.tasks.get(task_id), control.registry.task(task_id)
    return task.owner if task is not None else known[1].owner if known is not None else None


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
    control = request.app[CONTROL]
    return json_response(_view(control, await _sought(control, request), request[PRINCIPAL]))


async def cancel_task(request: web.Request) -> web.StreamResponse:
    control, principal = request.app[CONTROL], request[PRINCIPAL]
    task_id = await _sought(control, request)
    _view(control, task_id, principal)
    await on_record.task_canceled(request, task_id, _owner(control, task_id))
    view = _view(control, task_id, principal)
    task, known = _find(control, task_id, principal), control.registry.task(task_id)
    remembered = task is not None
    if task is None and known is not None and control.recovery.on(time.monotonic()):
        control.dispatcher.surplus.canceled(known[1])  # another attempt of it may be on a node that is not back
        remembered = True
    if task is not None and not task.ended:
        control.dispatcher.cancel(task)
    elif view["state"] in (State.PLACED, State.STREAMING) or (task is not None and task.abandoned):
        node_id = view["node_id"]
        if task is not None and (view["state"] not in ENDED or known is None):
            task.cancel_wanted = True  # so that a node that is away now is told when it comes back
        if isinstance(node_id, str):
            await _cancel_on_node(control, node_id, task_id, remembered=remembered)
    return json_response({"task_id": task_id, "state": view["state"]}, status=202)


async def _cancel_on_node(control: Control, node_id: str, task_id: str, *, remembered: bool) -> None:
    """`remembered` here: then a node that is away is told when it is back (`Surplus`)."""
    try:
        await control.nodes.call(node_id, "DELETE", f"/v2/tasks/{task_id}")
    except LlorchError as error:
        if error.code is not Code.TASK_NOT_FOUND and not (remembered and error.code is Code.NODE_LOST):
            raise  # TASK_NOT_FOUND: it has ended there, so what was asked for is so


async def task_placement(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    task = _find(control, await _sought(control, request), request[PRINCIPAL])
    if task is None:
        raise LlorchError(Code.TASK_NOT_FOUND, "no such task at this control")
    made = task.placement
    if made is None and task.ended and task.node_id is not None:
        raise LlorchError(Code.TASK_NOT_FOUND, "why it went where it went is kept of the newest tasks only")
    decision = made.decision() if made is not None else control.dispatcher.explain(task.wish)
    return json_response({"task_id": task.task_id, "state": task.state.value, **decision.to_wire()})


async def dry_run(request: web.Request) -> web.StreamResponse:
    task = await _native_task(request)
    return json_response(request.app[CONTROL].dispatcher.explain(task.wish).to_wire())


# ---------------------------------------------------------------- following


async def follow_events(request: web.Request) -> web.StreamResponse:
    control, principal = request.app[CONTROL], request[PRINCIPAL]
    task_id = await _sought(control, request)
    _view(control, task_id, principal)
    task, known = _find(control, task_id, principal), control.registry.task(task_id)
    native = task.native if task is not None else known is None or known[1].path == "native"
    if not native:
        raise LlorchError(
            Code.CONFLICT, "only native tasks can be followed", hint="a /v1 answer goes to its client alone"
        )
    offset = intake.event_offset(request.headers, request.query)
    attempt = intake.event_attempt(request.headers, request.query)
    owner = task.owner if task is not None else known[1].owner if known is not None else principal.name
    mine = Task.read_again(task_id, owner=owner, request_id=request[REQUEST_ID], now=time.monotonic())
    if offset:
        control.metrics.resumed("client")
    answer = NativeStream(Outlet.of(request), mine, control.slow_reader_timeout_s, again=True)
    with control.quotas.stream(principal.name):
        return await follow(control, mine, answer, offset, attempt=attempt)


async def models(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    listed = openai_models(control.registry)
    listed["data"] = [entry for entry in listed["data"] if request[PRINCIPAL].may_use(entry["id"])]
    if not listed["data"]:  # a client that takes the only one there is would be told that there is none
        control.recovery.check(time.monotonic(), "its nodes may still bring their models")
    return json_response(listed)


async def model(request: web.Request) -> web.StreamResponse:
    control = request.app[CONTROL]
    for entry in openai_models(control.registry)["data"]:
        if entry["id"] == request.match_info["model_id"] and request[PRINCIPAL].may_use(entry["id"]):
            return json_response(entry)
    control.recovery.check(time.monotonic(), "its nodes may still bring this model")
    raise LlorchError(Code.MODEL_NOT_FOUND, "no node has this model", param="model")


ROUTES = (
    Route("POST", "/v2/tasks", Scope.SUBMIT, submit, "Submit a task", TaskBody, returns="text/event-stream"),
    Route("GET", "/v2/tasks", Scope.SUBMIT, list_tasks, "Your tasks, newest first"),
    Route("GET", "/v2/tasks/{task_id}", Scope.SUBMIT, show_task, "One task"),
    Route("GET", "/v2/tasks/{task_id}/events", Scope.SUBMIT, follow_events, "Its events", returns="text/event-stream"),
    Route("GET", "/v2/tasks/{task_id}/placement", Scope.SUBMIT, task_placement, "Why it went where it went"),
    Route("POST", "/v2/tasks/{task_id}/cancel", Scope.SUBMIT, cancel_task, "Cancel it", status=202),
    Route("DELETE", "/v2/tasks/{task_id}", Scope.SUBMIT, cancel_task, "Cancel it", status=202),
    Route("POST", "/v2/placement", Scope.SUBMIT, dry_run, "Where a task would go now, and why", TaskBody),
    Route("GET", "/v1/models", Scope.SUBMIT, models, "The models there are, as OpenAI lists them"),
    Route("GET", "/v1/models/{model_id:.+}", Scope.SUBMIT, model, "One model"),
    Route("POST", "/v1/{path:.+}", Scope.SUBMIT, openai, "Any OpenAI-shaped call, routed by its model"),
)
