"""A control that says what a test tells it to, on a real socket, and remembers what it was asked.

Owns the answers' shapes: JSON, refusals, streams that end well, are cut, or go silent. Decides nothing by itself: what
no test has told it is 404. It can go away and come back on its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from llorch import sse
from llorch.backoff import Backoff
from llorch.client import resume
from llorch.errors import Code, LlorchError
from llorch.listen import Server, serve
from llorch.tls import Identities
from tests.cluster import lasting_port

TASK = "00000000-0000-4000-8000-000000000001"
SSE = {"Content-Type": "text/event-stream"}

Answer = Callable[["Asked", web.Request], Awaitable[web.StreamResponse]]


class Then(Enum):
    """What comes after the last byte of a stream."""

    END = "the answer ends"
    CUT = "the connection is cut"
    SILENCE = "nothing, until the client leaves"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `left` is set when its client has gone before the answer had ended."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    left: asyncio.Event

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)  # type: ignore[no-any-return]


def answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """JSON, or bytes as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()

    async def say(_asked: Asked, _request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers={"Content-Type": "application/json", **(headers or {})})

    return say


def refusal(code: Code, message: str = "no", *, request_id: str = "req-1", **more: Any) -> Answer:
    error = LlorchError(code, message, **more)
    return answer(error.envelope(request_id=request_id), error.status, {"X-Request-Id": request_id})


def stream(*parts: bytes, then: Then = Then.END, headers: Mapping[str, str] = SSE, status: int = 200) -> Answer:
    async def say(asked: Asked, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        if then is Then.CUT:
            assert request.transport is not None
            request.transport.close()
        if then is Then.SILENCE:
            await asyncio.Event().wait()
        return response

    return say


async def no_answer(_asked: Asked, _request: web.Request) -> web.StreamResponse:
    """Takes the request and never says a word."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def hang_up(_asked: Asked, request: web.Request) -> web.StreamResponse:
    """Takes the request and closes the connection."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


# ---------------------------------------------------------------- events


def event(kind: str, wire: object, place: int | None = None) -> bytes:
    return sse.encode(kind, json.dumps(wire), id=None if place is None else f"{place:012x}")


def started(place: int = 0x10) -> bytes:
    wire = {"task_id": TASK, "node_id": "n1", "pool_id": "p0", "model": "m", "attempt": 1}
    return event("started", wire, place)


def token(index: int, text: str | None = None) -> bytes:
    return event("token", {"t": f"t{index} " if text is None else text, "i": index}, 0x20 + index)


def end(reason: str = "stop", place: int | None = 0x1000, *, of: str | None = None) -> bytes:
    """`of`: the text that its sha256 says it is the end of."""
    digest = {} if of is None else {"sha256": hashlib.sha256(of.encode()).hexdigest()}
    return event("end", {"finish_reason": reason, "tokens_in": 1, "tokens_out": 2, **digest}, place)


def error(code: str, message: str = "it broke", **more: Any) -> bytes:
    wire = {"code": code, "message": message, "retriable": True, "request_id": "req-1", "task_id": TASK, **more}
    return event("error", wire)


def log_of(*texts: str) -> bytes:
    """A whole log as a node writes it: the id of an event is the offset after it."""
    log = b""
    tokens = [("token", {"t": text, "i": index}) for index, text in enumerate(texts)]
    wire = {"task_id": TASK, "node_id": "n1", "pool_id": "p0", "model": "m", "attempt": 1}
    last = {"finish_reason": "stop", "sha256": hashlib.sha256("".join(texts).encode()).hexdigest()}
    for kind, value in (("started", wire), *tokens, ("end", last)):
        log += event(kind, value, len(log) + len(event(kind, value, 0)))
    return log


def reading(log: bytes, *cuts: int) -> Answer:
    """The log from where the client wants it, cut off at one place after the other, and then to its end."""
    left = list(cuts)

    async def say(asked: Asked, request: web.Request) -> web.StreamResponse:
        offset = int(asked.headers.get("Last-Event-ID", "0"), 16)
        cut = left.pop(0) if left else None
        return await stream(log[offset:cut], then=Then.END if cut is None else Then.CUT)(asked, request)

    return say


QUEUED = event("queued", {"position": 2, "eta_ms": 1500})
WHOLE = (started(), token(0), token(1), end())


# ---------------------------------------------------------------- the server


class ScriptedControl:
    """`on` says what comes to "METHOD /path": one answer after the other, the last one again and again."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Asked] = []
        self._answers: dict[str, list[Answer]] = {}
        self._server: Server | None = None

    def on(self, what: str, *answers: Answer) -> None:
        self._answers[what] = list(answers)

    def asked(self, what: str) -> list[Asked]:
        method, path = what.split()
        return [asked for asked in self.requests if (asked.method, asked.path) == (method, path)]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        asked = Asked(request.method, request.raw_path, request.headers.copy(), await request.read(), asyncio.Event())
        self.requests.append(asked)
        answers = self._answers.get(f"{asked.method} {asked.path.partition('?')[0]}")
        if answers is None and asked.method == "GET" and asked.path.endswith("/events"):
            answers = self._answers.get("GET events")
        if answers is None:
            answers = [refusal(Code.TASK_NOT_FOUND if "/tasks/" in asked.path else Code.NOT_FOUND, "there is none")]
        say = answers.pop(0) if len(answers) > 1 else answers[0]
        try:
            return await say(asked, request)
        except (asyncio.CancelledError, ConnectionError):
            asked.left.set()
            raise

    async def come(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        """Serve: on the port that it had, if it was there before."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{tail:.*}", self.handle)
        self._server = await serve(
            app,
            "127.0.0.1",
            urlsplit(self.url).port or port,
            tls=Identities(tls) if tls else None,
            shutdown_timeout_s=0.1,
        )
        self.url = self._server.url

    async def go(self) -> None:
        """Close what is open and refuse what comes."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.close()


@contextlib.asynccontextmanager
async def scripted(tls: ssl.SSLContext | None = None, *, lasting: bool = False) -> AsyncIterator[ScriptedControl]:
    """`lasting`: on a port that stays free while it is away."""
    control = ScriptedControl()
    await control.come(tls, lasting_port() if lasting else 0)
    try:
        yield control
    finally:
        await control.go()


def resume_quickly(monkeypatch: pytest.MonkeyPatch, *, for_s: float = 0.2) -> None:
    """What takes seconds between machines need not take them here. `for_s`: until a task is given up."""
    monkeypatch.setattr(resume, "RESUME_FOR_S", for_s)
    monkeypatch.setattr(resume, "FIND_FOR_S", for_s)
    monkeypatch.setattr(resume, "RESUME_BACKOFF", Backoff(first_s=0.001, most_s=0.02))
