"""What the stand-ins for engines that can't run here have in common: an OpenAI surface over nothing.

A stand-in has the real program's flags, paths, words, errors, metrics and holes, as its documentation and source have
them, and no model: token i is the text `t<i> `. The last word of a prompt may ask for more: `#abort` ends the stream as
an engine does that gives a request up, `#hang` stops the whole engine, counters and all, after the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from aiohttp import web

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
DEFAULT_TOKENS = 16
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Counts:
    running: int = 0
    waiting: int = 0
    steps: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass
class Ask:
    """One request, read."""

    chat: bool
    tokens_in: int
    count: int
    finish: str
    stream: bool
    usage: bool
    trick: str | None


@dataclass
class Standin(ABC):
    """One engine. `seen` are the bodies that reached it."""

    model: str  # the name that it is served by
    key: str | None
    slots: int
    ctx: int
    counts: Counts = field(default_factory=Counts)
    seen: list[dict[str, Any]] = field(default_factory=list)
    hung: bool = False

    # ---- what each does in its own words

    @abstractmethod
    def guarded(self, path: str) -> bool: ...
    @abstractmethod
    def error(self, status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]: ...
    @abstractmethod
    def too_long(self, tokens: int) -> str: ...
    @abstractmethod
    def choice(self, ask: Ask, text: str, finish: str | None) -> dict[str, Any]:
        """What stands beside `index` and the text in a choice of a stream."""

    @abstractmethod
    def metrics(self) -> str: ...
    @abstractmethod
    def routes(self) -> dict[tuple[str, str], Handler]:
        """Its paths beside the three that all have."""

    # ---- what all do

    def app(self) -> web.Application:
        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._guard(request, handler)

        app = web.Application(middlewares=[guard], client_max_size=1 << 26)
        app.router.add_post(COMPLETIONS, self.generate)
        app.router.add_post(CHAT, self.generate)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        for (method, path), handler in self.routes().items():
            app.router.add_route(method, path, handler)
        return app

    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        known = request.headers.get("Authorization") == f"Bearer {self.key}"
        if self.key is not None and self.guarded(request.path) and not known:
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as error:
            return web.json_response({"detail": error.reason}, status=error.status)  # as FastAPI says it

    async def _models(self, _request: web.Request) -> web.StreamResponse:
        card = {"id": self.model, "object": "model", "created": 1, "owned_by": "standin", "max_model_len": self.ctx}
        return web.json_response({"object": "list", "data": [card]})

    async def _metrics(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(text=self.metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def refuse(
        self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None
    ) -> web.Response:
        return web.json_response(self.error(status, message, kind, param), status=status)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        if body.get("model") != self.model:
            message = f"The model `{body.get('model')}` does not exist."
            return self.refuse(404, message, "NotFoundError", "model")
        ask = _read(body, chat="messages" in body)
        if ask.tokens_in + ask.count > self.ctx:
            return self.refuse(400, self.too_long(ask.tokens_in))
        self.counts.running += 1
        try:
            return await (self._stream(request, ask) if ask.stream else self._whole(ask))
        finally:
            self.counts.running -= 1

    async def _step(self, ask: Ask, sent: int) -> None:
        """One step of the engine, in which this request gets a token."""
        if ask.trick == "hang" and sent == 1:
            self.hung = True
        if self.hung:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        self.counts.steps += 1
        self.counts.tokens_out += 1
        if sent == 0:
            self.counts.tokens_in += ask.tokens_in

    def _usage(self, ask: Ask) -> dict[str, Any]:
        total = ask.tokens_in + ask.count
        details = {"cached_tokens": ask.tokens_in - 1}
        return {"prompt_tokens": ask.tokens_in, "total_tokens": total, "completion_tokens": ask.count,
                "prompt_tokens_details": details}  # fmt: skip

    def _chunk(self, ask: Ask, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if ask.chat else "text_completion"
        return {"id": "cmpl-1", "object": kind, "created": 1, "model": self.model, "choices": choices}

    async def _stream(self, request: web.Request, ask: Ask) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)

        async def say(value: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")

        if ask.chat:
            lead = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            await say(self._chunk(ask, [lead]))
        for sent in range(ask.count):
            await self._step(ask, sent)
            last = sent == ask.count - 1 or ask.trick == "abort"
            finish = None if not last else "abort" if ask.trick == "abort" else ask.finish
            text = f"t{sent} "
            shown: dict[str, Any] = {"delta": {"content": text}} if ask.chat else {"text": text}
            shown |= {"index": 0, "logprobs": None, "finish_reason": finish}
            await say(self._chunk(ask, [shown | self.choice(ask, text, finish)]))
            if last:
                break
        if ask.usage:
            await say(self._chunk(ask, []) | {"usage": self._usage(ask)})
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _whole(self, ask: Ask) -> web.StreamResponse:
        for sent in range(ask.count):
            await self._step(ask, sent)
        text = "".join(f"t{sent} " for sent in range(ask.count))
        shown: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if ask.chat else {"text": text}
        shown |= {"index": 0, "finish_reason": ask.finish}
        kind = {"object": "chat.completion"} if ask.chat else {}
        return web.json_response(self._chunk(ask, [shown]) | kind | {"usage": self._usage(ask)})


def _read(body: dict[str, Any], *, chat: bool) -> Ask:
    said = body["messages"][-1]["content"] if chat else body["prompt"]
    words = said.split()
    bound = body.get("max_tokens") or body.get("max_completion_tokens")
    count = min(bound or DEFAULT_TOKENS, DEFAULT_TOKENS) if bound is None else bound
    trick = words[-1][1:] if words and words[-1].startswith("#") else None
    options = body.get("stream_options") or {}
    return Ask(
        chat, max(1, len(words)), count, "stop" if bound is None else "length", bool(body.get("stream")),
        options.get("include_usage") is True, trick,
    )  # fmt: skip


def parser(name: str) -> argparse.ArgumentParser:
    """As both of them have it: a flag's beginning stands for the flag, an unknown one ends the program with 2."""
    made = argparse.ArgumentParser(prog=name)
    made.add_argument("--host", default="127.0.0.1")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument("--served-model-name")
    made.add_argument("--tensor-parallel-size", type=int, default=1)
    return made


STORE_ENV = "STANDIN_TCPSTORE"  # set: it opens a port on every address, as PyTorch does in each of these engines


def serve(standin: Standin, host: str, port: int) -> NoReturn:
    store = socket.create_server(("0.0.0.0", 0)) if STORE_ENV in os.environ else None

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        runner = web.AppRunner(standin.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
        await stop.wait()
        await runner.cleanup()

    asyncio.run(run())
    if store is not None:
        store.close()
    raise SystemExit(0)
