"""The simulated engine, a program: `python -m llorch.node.engines.simulated_server` speaks llama-server's HTTP surface.

Token i is the text `t<i> ` on every path, so that any loss or repetition shows; a prompt that ends in `t<k> ` is gone
on from. Faults are flags. It holds no model and knows nothing of llorch; requests beyond its slots wait inside, as they do
in llama-server. Answers are shaped as llama.cpp shapes them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from llorch.node.engines import simulated_answers as answers

KEPT_REQUESTS = 1_000
MAX_BODY_BYTES = 64 * 1024 * 1024
_LAST_TOKEN = re.compile(r"(?:^|\s)t(\d+) $")


@dataclass(slots=True)
class Script:
    """What the flags ask for. Times in ms, counts in tokens; a fault comes after that many tokens of a request."""

    alias: str
    slots: int
    ctx: int
    key: str | None
    ttft_ms: float
    delay_ms: float
    tokens: int
    load_s: float
    die_after: int | None
    hang_after: int | None
    truncate_after: int | None
    garbage_after: int | None
    status: int | None


@dataclass(slots=True)
class Counts:
    active: int = 0
    waiting: int = 0
    started: int = 0
    finished: int = 0
    aborted: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Engine:
    script: Script
    free: asyncio.Semaphore
    began: float = field(default_factory=time.monotonic)
    counts: Counts = field(default_factory=Counts)
    requests: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_REQUESTS))

    @property
    def loading(self) -> bool:
        return time.monotonic() - self.began < self.script.load_s


@dataclass(frozen=True, slots=True)
class Ask:
    """One generation: where to begin, how far to go, how it ends."""

    first: int
    count: int
    finish: str  # "stop" or "length"
    prompt_tokens: int


ENGINE = web.AppKey("engine", Engine)


def text_of(content: object) -> str:
    """A message's text: a string, or the text parts of a list."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def ask_of(body: dict[str, Any], script: Script) -> Ask:
    prompt = body.get("prompt", body.get("input"))
    last = prompt[0] if isinstance(prompt, list) and prompt else prompt
    words = text_of(last)
    messages = body.get("messages")
    if isinstance(messages, list):
        said = [message for message in messages if isinstance(message, dict)]
        words = text_of(said[-1].get("content")) if said and said[-1].get("role") == "assistant" else ""
        last = " ".join(text_of(message.get("content")) for message in said)
    match = _LAST_TOKEN.search(words)
    bound = next(
        (
            body[name]
            for name in ("max_tokens", "max_completion_tokens", "n_predict", "max_output_tokens")
            if isinstance(body.get(name), int) and body[name] >= 0
        ),
        None,
    )
    count = script.tokens if bound is None else min(bound, script.tokens)
    finish = "length" if bound is not None and bound <= script.tokens else "stop"
    return Ask(int(match.group(1)) + 1 if match else 0, count, finish, max(1, len(text_of(last).split())))


async def generate(engine: Engine, ask: Ask) -> AsyncIterator[str]:
    """The texts of a request's tokens, at the script's pace, with its faults."""
    script = engine.script
    if script.ttft_ms:
        await asyncio.sleep(script.ttft_ms / 1_000)
    for sent in range(ask.count):
        if sent and script.delay_ms:
            await asyncio.sleep(script.delay_ms / 1_000)
        if script.die_after is not None and sent >= script.die_after:
            os._exit(1)
        if script.hang_after is not None and sent >= script.hang_after:
            await asyncio.Event().wait()
        engine.counts.tokens += 1
        yield f"t{ask.first + sent} "


@contextlib.asynccontextmanager
async def slot(engine: Engine) -> AsyncIterator[None]:
    counts = engine.counts
    counts.waiting += 1
    try:
        await engine.free.acquire()
    finally:
        counts.waiting -= 1
    counts.active += 1
    counts.started += 1
    finished = False
    try:
        yield
        finished = True
    finally:
        counts.active -= 1
        counts.finished += finished
        counts.aborted += not finished
        engine.free.release()


async def serve_generation(request: web.Request, shape: answers.Shape) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    script = engine.script
    if script.status is not None:
        return failure(script.status, "the script says so")
    ask = ask_of(body, script)
    started = time.monotonic()
    async with slot(engine):
        told = answers.Told(
            script.alias,
            ask.prompt_tokens,
            ask.finish,
            bool(isinstance(body.get("stream_options"), dict) and body["stream_options"].get("include_usage")),
        )
        if not body.get("stream"):
            texts = [text async for text in generate(engine, ask)]
            told.took(len(texts), time.monotonic() - started)
            return web.json_response(shape.whole(told, "".join(texts)))
        return await stream(request, engine, ask, shape, told, started)


async def stream(
    request: web.Request, engine: Engine, ask: Ask, shape: answers.Shape, told: answers.Told, started: float
) -> web.StreamResponse:
    script = engine.script
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    sent = 0
    lead = b"".join(shape.lead(told))
    async for text in generate(engine, ask):
        if script.truncate_after is not None and sent >= script.truncate_after:
            assert request.transport is not None
            request.transport.abort()
            return response
        if script.garbage_after is not None and sent >= script.garbage_after:
            await response.write(b'\x00\xff{]not an event\n\ndata: {"choices": [\n\n')
            return response
        await response.write(lead + shape.token(told, text))
        lead = b""
        sent += 1
    told.took(sent, time.monotonic() - started)
    await response.write(lead + b"".join(shape.end(told)))
    return response


# ---------------------------------------------------------------- the surface


async def read_json(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except ValueError:
        raise refusal(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise refusal(400, "the body is not an object")
    headers = {name.lower(): value for name, value in request.headers.items() if name.lower() != "authorization"}
    request.app[ENGINE].requests.append({"path": request.path, "headers": headers, "body": body})
    return body


_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 503: "unavailable_error"}


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
    if request.path == "/health":
        if engine.loading:
            return failure(503, "Loading model")
        return web.json_response({"status": "ok"})
    if engine.script.key is not None:
        presented = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get("X-Api-Key")
        if presented != engine.script.key:
            return failure(401, "Invalid API Key")
    if engine.loading:
        return failure(503, "Loading model")
    answer: web.StreamResponse = await handler(request)
    return answer


async def embeddings(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    body = await read_json(request)
    if engine.script.status is not None:
        return failure(engine.script.status, "the script says so")
    inputs = body.get("input")
    texts = inputs if isinstance(inputs, list) else [inputs]
    async with slot(engine):
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
    active = engine.counts.active
    return web.json_response([{"id": i, "is_processing": i < active} for i in range(engine.script.slots)])


async def metrics(request: web.Request) -> web.StreamResponse:
    counts = request.app[ENGINE].counts
    lines = [
        f"llamacpp:requests_processing {counts.active}",
        f"llamacpp:requests_deferred {counts.waiting}",
        f"llamacpp:n_decode_total {counts.tokens}",
        f"llamacpp:tokens_predicted_total {counts.tokens}",
    ]
    return web.Response(text="\n".join(lines) + "\n")


async def state(request: web.Request) -> web.StreamResponse:
    counts = request.app[ENGINE].counts
    return web.json_response({name: getattr(counts, name) for name in Counts.__slots__})


async def seen(request: web.Request) -> web.StreamResponse:
    return web.json_response(list(request.app[ENGINE].requests))


def make_app(script: Script) -> web.Application:
    app = web.Application(middlewares=[guard], client_max_size=MAX_BODY_BYTES)
    app[ENGINE] = Engine(script, asyncio.Semaphore(script.slots))
    for path, shape in answers.SHAPES.items():

        async def handler(request: web.Request, shape: answers.Shape = shape) -> web.StreamResponse:
            return await serve_generation(request, shape)

        app.router.add_post(path, handler)
    app.router.add_post("/v1/embeddings", embeddings)
    for path, look in {
        "/health": state,
        "/props": props,
        "/v1/models": models,
        "/slots": slots,
        "/metrics": metrics,
        "/simulated/state": state,
        "/simulated/requests": seen,
    }.items():
        app.router.add_get(path, look)
    return app


def parse(argv: list[str]) -> tuple[Script, str, int, bool]:
    parser = argparse.ArgumentParser(prog="llorch-simulated", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--alias", default="simulated")
    parser.add_argument("--model", help="accepted, not used")
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--ctx-size", type=int, default=16_384)
    parser.add_argument("--api-key-file")
    parser.add_argument("--ttft-ms", type=float, default=0)
    parser.add_argument("--delay-ms", type=float, default=0)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--load-s", type=float, default=0)
    for name in ("--die-after", "--hang-after", "--truncate-after", "--garbage-after", "--status"):
        parser.add_argument(name, type=int)
    parser.add_argument("--ignore-sigterm", action="store_true")
    given = parser.parse_args(argv)
    key = None
    if given.api_key_file is not None:
        key = Path(given.api_key_file).read_text(encoding="ascii").split("\n", 1)[0].strip()
    script = Script(
        alias=given.alias,
        slots=given.parallel,
        ctx=given.ctx_size,
        key=key,
        ttft_ms=given.ttft_ms,
        delay_ms=given.delay_ms,
        tokens=given.tokens,
        load_s=given.load_s,
        die_after=given.die_after,
        hang_after=given.hang_after,
        truncate_after=given.truncate_after,
        garbage_after=given.garbage_after,
        status=given.status,
    )
    return script, given.host, given.port, given.ignore_sigterm


async def run(argv: list[str]) -> None:
    script, host, port, ignore_sigterm = parse(argv)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, (lambda: None) if ignore_sigterm else stopping.set)
    # handler_cancellation: a client that leaves frees its slot, as in llama-server.
    runner = web.AppRunner(make_app(script), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=1024).start()
    print(f"simulated engine on {host}:{port}", file=sys.stderr, flush=True)
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
