"""The simulated engine, a program: `python -m llorch.node.engines.simulated_server` speaks llama-server's HTTP surface.

Token i is the text `t<i> ` on every path, so that any loss or repetition shows; a prompt that ends in `t<k> ` is gone
on from. Faults are flags. It holds no model; requests beyond its slots wait inside, as they do in llama-server. Answers
are shaped as llama.cpp shapes them. For tests `GET /simulated/requests` shows the last bodies that reached it and `GET
/simulated/state` its counts; `--journal FILE` writes a line for each step of each request, which outlives the process.
It never listens beyond loopback and never logs a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from aiohttp import web

from llorch.node.engines import simulated_answers as answers
from llorch.node.engines.simulated_script import Ask, Fault, FaultDueError, Script, ask_of, parse, text_of

KEPT_REQUESTS = 1_000
FLUSH_S = 5.0  # for a reader to take what was written before a connection is cut
GARBAGE = b'\x00\xff{]not an event\n\ndata: {"choices": [\n\n'
MAX_BODY_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class Counts:
    active: int = 0
    waiting: int = 0
    started: int = 0
    finished: int = 0
    aborted: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    hung: int = 0  # requests that hang now: while there are any, /metrics shows what was when the first began to


class Journal:
    """What becomes of each request, a line each, in a file that several processes may share; nothing without a file.

    Times are of the monotonic clock, which all processes of a machine read alike.
    """

    def __init__(self, path: str | None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, step: str, ask: Ask | None = None, told: answers.Told | None = None) -> None:
        if self._file is None:
            return
        line = {"at": time.monotonic(), "step": step, "pid": os.getpid()}
        if ask is not None and told is not None:
            line |= {"marker": ask.marker, "tokens": told.tokens_out}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


@dataclass(slots=True)
class Engine:
    script: Script
    keys: frozenset[str]
    free: asyncio.Semaphore
    journal: Journal
    began: float = field(default_factory=time.monotonic)
    counts: Counts = field(default_factory=Counts)
    requests: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_REQUESTS))
    deaf: bool = False
    frozen: tuple[int, int] = (0, 0)  # tokens in and out, as /metrics shows them while a request hangs

    async def listen(self) -> None:
        """Goes on at once, or never: a deaf engine leaves whoever asks without an answer."""
        if self.deaf:
            await asyncio.Event().wait()

    @property
    def loading(self) -> bool:
        return time.monotonic() - self.began < self.script.load_s


ENGINE = web.AppKey("engine", Engine)


async def generate(engine: Engine, ask: Ask, told: answers.Told) -> AsyncIterator[str]:
    """The texts of a request's tokens, at the script's pace. Raises FaultDueError."""
    script = engine.script
    began = time.monotonic()
    if script.ttft_ms:
        await asyncio.sleep(script.ttft_ms / 1_000)
    told.prompt_s = time.monotonic() - began
    engine.counts.tokens_in += ask.prompt_tokens
    for sent in range(ask.count):
        if sent:  # also with no delay: it is the others' turn, and a chance to be cancelled
            await asyncio.sleep(script.delay_ms / 1_000)
        await engine.listen()
        script.check(sent, ask)
        engine.counts.tokens_out += 1
        told.tokens_out = sent + 1
        told.predicted_s = time.monotonic() - began - told.prompt_s
        yield f"t{ask.first + sent} "


@dataclass(slots=True)
class Stay:
    """A request's time in a slot."""

    finished: bool = False


@contextlib.asynccontextmanager
async def slot(engine: Engine, ask: Ask | None = None, told: answers.Told | None = None) -> AsyncIterator[Stay]:
    counts = engine.counts
    counts.waiting += 1
    stay = Stay()
    engine.journal.note("arrived", ask, told)
    try:
        await engine.free.acquire()
    except BaseException:
        engine.journal.note("aborted", ask, told)
        raise
    finally:
        counts.waiting -= 1
    counts.active += 1
    counts.started += 1
    try:
        yield stay
    finally:
        counts.active -= 1
        counts.finished += stay.finished
        counts.aborted += not stay.finished
        engine.journal.note("finished" if stay.finished else "aborted", ask, told)
        engine.free.release()


async def serve_generation(request: web.Request, shape: answers.Shape) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    script = engine.script
    if script.status is not None:
        return failure(script.status, "the script says so")
    ask = ask_of(body, script)
    options = body.get("stream_options")
    wanted = isinstance(options, dict) and options.get("include_usage") is True
    told = answers.Told(script.alias, ask.prompt_tokens, ask.finish, wanted)
    async with slot(engine, ask, told) as stay:
        tokens = generate(engine, ask, told)
        if body.get("stream"):
            return await stream(request, tokens, shape, told, stay)
        return await whole(request, tokens, shape, told, stay)


async def whole(
    request: web.Request, tokens: AsyncIterator[str], shape: answers.Shape, told: answers.Told, stay: Stay
) -> web.StreamResponse:
    text, fault = "", None
    try:
        async for token in tokens:
            text += token
    except FaultDueError as due:
        fault = due.fault
    if fault in (Fault.DIE, Fault.HANG, Fault.DEAF):
        await break_off(request, fault)
    body = json.dumps(shape.whole(told, text)).encode()
    response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
    response.content_length = len(body)
    await response.prepare(request)
    if fault is None:
        await response.write(body)
        await response.write_eof()
        stay.finished = True
    elif fault is Fault.GARBAGE:
        await response.write((GARBAGE * (len(body) // len(GARBAGE) + 1))[: len(body)])
    else:
        await response.write(body[: len(body) // 2])
        await break_off(request, fault)
    return response


async def stream(
    request: web.Request, tokens: AsyncIterator[str], shape: answers.Shape, told: answers.Told, stay: Stay
) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
    response = web.StreamResponse(headers=headers)
    said: list[str] = []
    try:
        async for text in tokens:
            if not said:  # llama.cpp sends no head before its first token
                await response.prepare(request)
                await response.write(b"".join(shape.lead(told)) + shape.token(told, text))
            else:
                await response.write(shape.token(told, text))
            said.append(text)
    except FaultDueError as due:
        if not response.prepared and due.fault in (Fault.TRUNCATE, Fault.GARBAGE):
            await response.prepare(request)
        if due.fault is Fault.GARBAGE:
            await response.write(GARBAGE)
        else:
            await break_off(request, due.fault)
        return response
    if not response.prepared:
        await response.prepare(request)
        await response.write(b"".join(shape.lead(told)))
    await response.write(b"".join(shape.end(told, "".join(said))))
    await response.write_eof()
    stay.finished = True
    return response


async def hang(engine: Engine) -> None:
    counts = engine.counts
    if counts.hung == 0:
        engine.frozen = (counts.tokens_in, counts.tokens_out)
    counts.hung += 1
    try:
        await asyncio.Event().wait()
    finally:
        counts.hung -= 1


async def break_off(request: web.Request, fault: Fault) -> None:
    """End an answer in the middle, after all that was written has left this process."""
    engine = request.app[ENGINE]
    engine.deaf = engine.deaf or fault is Fault.DEAF
    await engine.listen()
    if fault is Fault.HANG:
        await hang(engine)
    transport = request.transport
    until = time.monotonic() + FLUSH_S
    while transport is not None and transport.get_write_buffer_size() and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.001)  # uvloop writes at the end of a turn
    if fault is Fault.DIE:
        engine.journal.note("dead")
        os._exit(1)
    if transport is not None:
        transport.close()


# ---------------------------------------------------------------- the surface


async def read_json(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except ValueError:
        raise refusal(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise refusal(400, "the body is not an object")
    headers = {name: value for key, value in request.headers.items() if (name := key.lower()) not in SECRET_HEADERS}
    request.app[ENGINE].requests.append({"path": request.path, "headers": headers, "body": body})
    return body


_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 503: "unavailable_error"}
OPEN_PATHS = frozenset({"/health", "/v1/health"})
SECRET_HEADERS = frozenset({"authorization", "x-api-key"})


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"code": status, "message": message, "type": _TYPES.get(status, "server_error")}}


def failure(status: int, message: str) -> web.Response:
    return web.json_response(_error(status, message), status=status)


def refusal(status: int, message: str) -> web.HTTPException:
    text = json.dumps(_error(status, message))
    return {400: web.HTTPBadRequest, 404: web.HTTPNotFound}[status](text=text, content_type="application/json")


@web.middleware
async def guard(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    engine = request.app[ENGINE]
    await engine.listen()
    if engine.loading:  # llama.cpp says so on every path and before it asks for a key
        return failure(503, "Loading model")
    if request.path not in OPEN_PATHS and engine.keys:
        presented = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get("X-Api-Key")
        if presented not in engine.keys:
            return failure(401, "Invalid API Key")
    try:
        answer: web.StreamResponse = await handler(request)
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
        return failure(404, "File Not Found")
    except web.HTTPRequestEntityTooLarge:
        return failure(413, "the body is too large")
    return answer


async def health(request: web.Request) -> web.StreamResponse:
    return web.json_response({"status": "ok"})


async def embeddings(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    if engine.script.status is not None:
        return failure(engine.script.status, "the script says so")
    inputs = body.get("input")
    texts = inputs if isinstance(inputs, list) else [inputs]
    async with slot(engine) as stay:
        stay.finished = True
        return web.json_response(answers.embeddings(engine.script.alias, [text_of(text) for text in texts]))


async def props(request: web.Request) -> web.StreamResponse:
    script = request.app[ENGINE].script
    return web.json_response(
        {
            "total_slots": script.slots,
            "model_alias": script.alias,
            "default_generation_settings": {"n_ctx": script.ctx // script.slots},
            "build_info": "simulated",
        }
    )


async def models(request: web.Request) -> web.StreamResponse:
    alias = request.app[ENGINE].script.alias
    return web.json_response({"object": "list", "data": [{"id": alias, "object": "model", "owned_by": "simulated"}]})


async def slots(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    active, ctx = engine.counts.active, engine.script.ctx // engine.script.slots
    rows = [
        {"id": i, "n_ctx": ctx, "speculative": False, "is_processing": i < active} for i in range(engine.script.slots)
    ]
    return web.json_response(rows)


async def metrics(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    counts = engine.counts
    told = engine.frozen if counts.hung else (counts.tokens_in, counts.tokens_out)
    text = answers.metrics(counts.active, counts.waiting, *told)
    return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4"})


async def state(request: web.Request) -> web.StreamResponse:
    return web.json_response(asdict(request.app[ENGINE].counts))


async def seen(request: web.Request) -> web.StreamResponse:
    return web.json_response(list(request.app[ENGINE].requests))


async def close_journal(app: web.Application) -> None:
    app[ENGINE].journal.close()


def make_app(script: Script, keys: frozenset[str], journal: Journal) -> web.Application:
    app = web.Application(middlewares=[guard], client_max_size=MAX_BODY_BYTES)
    app.on_cleanup.append(close_journal)
    app[ENGINE] = Engine(script, keys, asyncio.Semaphore(script.slots), journal)
    for path, shape in answers.SHAPES.items():

        async def handler(request: web.Request, shape: answers.Shape = shape) -> web.StreamResponse:
            return await serve_generation(request, shape)

        app.router.add_post(path, handler)
    app.router.add_post("/v1/embeddings", embeddings)
    for path, look in {
        "/health": health,
        "/v1/health": health,
        "/props": props,
        "/v1/models": models,
        "/models": models,
        "/slots": slots,
        "/metrics": metrics,
        "/simulated/state": state,
        "/simulated/requests": seen,
    }.items():
        app.router.add_get(path, look)
    return app


def read_keys(path: str | None) -> frozenset[str]:
    """The keys in a file, a line each. Without a file no key is asked for."""
    if path is None:
        return frozenset()
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        end(2, f"can't read {path}: {getattr(error, 'strerror', None) or 'it is not text'}")
    keys = frozenset(line.strip() for line in lines if line.strip())
    if not keys:
        end(2, f"there is no key in {path}")
    return keys


def end(code: int, message: str) -> NoReturn:
    print(f"simulated_server: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


async def serve(
    script: Script, keys: frozenset[str], host: str, port: int, journal: str | None = None
) -> web.AppRunner:
    """Listen; `cleanup()` of what is returned ends it. Raises OSError if the port is taken."""
    # handler_cancellation: a client that leaves frees its slot, as in llama-server.
    app = make_app(script, keys, Journal(journal))
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=1024).start()
    except OSError:
        await runner.cleanup()
        raise
    app[ENGINE].journal.note("serving")
    return runner


def url_of(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://{host}:{port}"


async def run(argv: list[str]) -> None:
    script, given = parse(argv)
    keys = read_keys(given.api_key_file)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        ignored = given.ignore_sigterm and number == signal.SIGTERM
        loop.add_signal_handler(number, (lambda: None) if ignored else stopping.set)
    try:
        runner = await serve(script, keys, given.host, given.port, given.journal)
    except OSError as error:
        end(1, f"can't listen on port {given.port}: {error.strerror}")
    print(f"simulated_server: listening on {url_of(runner)}", file=sys.stderr, flush=True)
    await stopping.wait()
    await runner.cleanup()


def main() -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(run(sys.argv[1:]))
    else:
        uvloop.run(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
