"""The short way of a `/v1` request: a client can't tell it from the long one, and nothing is smuggled, lost or kept.

What is sent here is bytes, and each case is sent twice: to a control as it is, and to one whose lane takes nothing, so
that aiohttp and the handlers answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from llorch import http_connection, listen
from llorch.control import dispatch
from llorch.control.lane import MAX_BODY_BYTES, Lane
from llorch.errors import Code
from llorch.records import Type
from tests.component.control_harness import (
    MODEL,
    TOKENS,
    Attempt,
    ControlUnderTest,
    LinkedNode,
    a_control,
    bearer,
    error_wire,
    eventually,
    lost_soon,
    pool,
)
from tests.component.test_smuggling import CORPUS, PLAIN, Client, pieces_of

CHAT = "/v1/chat/completions"
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
LAST = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def body(**more: Any) -> bytes:
    return json.dumps(ASKED | more).encode()


def ask(
    raw: bytes = body(),
    *lines: str,
    method: str = "POST",
    path: str = CHAT,
    version: str = "1.1",
    who: str | None = "alice",
    length: bool = True,
) -> bytes:
    """A request in bytes; `lines` are more of its head."""
    head = [f"{method} {path} HTTP/{version}", "Host: x", *(f"{name}: {text}" for name, text in bearer(who).items())]
    head += [f"Content-Length: {len(raw)}"] if length else []
    return "\r\n".join([*head, *lines, "", ""]).encode("latin-1") + raw


# ---------------------------------------------------------------- the other end of a connection


@dataclass(frozen=True)
class Got:
    """One answer: its head, its body, and whether it came whole."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool = True
    names: tuple[str, ...] = ()
    version: bytes = b"1.1"

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def read_answer(came: bytes, ended: bool) -> tuple[Got | None, bytes]:
    """The first answer in `came`, and what is behind it; None while it is not there."""
    head, between, rest = came.partition(b"\r\n\r\n")
    if not between:
        return None, came
    first, *lines = head.split(b"\r\n")
    version, status = re.fullmatch(rb"HTTP/(1\.[01]) (\d{3}) .*", first).groups()  # type: ignore[union-attr]
    if status == b"100":
        return read_answer(rest, ended)
    pairs = [(name.decode().lower(), text.strip().decode()) for name, _, text in (line.partition(b":") for line in lines)]
    headers = dict(pairs)
    assert len(headers) == len(pairs), lines  # no field is there twice
    data, whole = b"", True
    if headers.get("transfer-encoding") == "chunked":
        assert "content-length" not in headers
        while True:
            line, between, behind = rest.partition(b"\r\n")
            size = int(line, 16) if between else 0
            if not between or len(behind) < size + 2:
                whole = False
                break
            assert behind[size : size + 2] == b"\r\n"
            data, rest = data + behind[:size], behind[size + 2 :]
            if size == 0:
                break
    elif "content-length" in headers:
        size = int(headers["content-length"])
        data, rest, whole = rest[:size], rest[size:], len(rest) >= size
    else:
        data, rest, whole = rest, b"", ended
    if not whole and not ended:
        return None, came
    return Got(int(status), headers, data, whole, tuple(sorted(headers)), version), rest if whole else b""


class Wire:
    """A client's connection, byte by byte."""

    def __init__(self, transport: asyncio.Transport, client: Client) -> None:
        self.transport = transport
        self._client = client
        self._read = 0

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    @property
    def came(self) -> bytes:
        return self._client.came

    @property
    def ended(self) -> bool:
        return self._client.ended.is_set()

    def answers(self) -> list[Got]:
        """All that have come so far."""
        rest, found = self.came, []
        while rest:
            got, behind = read_answer(rest, self.ended)
            if got is None:
                break
            found.append(got)
            rest = behind
        return found

    async def next(self) -> Got:
        self._read += 1
        await eventually(lambda: len(self.answers()) >= self._read, within_s=5, what=f"answer {self._read}: {self.came!r}")
        return self.answers()[self._read - 1]

    async def has(self, piece: bytes) -> None:
        await eventually(lambda: piece in self.came, within_s=5, what=f"{piece!r} at the client")

    async def end(self) -> None:
        await asyncio.wait_for(self._client.ended.wait(), 5)


@contextlib.asynccontextmanager
async def wire(control: ControlUnderTest) -> AsyncIterator[Wire]:
    transport, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", control.port)
    try:
        yield Wire(transport, client)
    finally:
        transport.abort()
        await client.ended.wait()


class Switch:
    """The lane of every control of a test. `taken` are the requests that it did not leave to aiohttp."""

    def __init__(self) -> None:
        self.on = True
        self.taken: list[bytes] = []
        self.left: list[bytes] = []


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[Switch]:
    switch, call = Switch(), Lane.__call__

    def through(self: Lane, connection: http_connection.Connection, request: bytes) -> http_connection.Ride | None:
        ride = call(self, connection, request) if switch.on else None
        (switch.left if ride is None else switch.taken).append(request)
        return ride

    monkeypatch.setattr(Lane, "__call__", through)
    yield switch


# ---------------------------------------------------------------- the same, whichever way it goes

Play = Callable[[LinkedNode, Attempt], Awaitable[None]]


async def whole(_node: LinkedNode, attempt: Attempt) -> None:
    answer = b'{"choices": []}'
    attempt.accept().head("application/json", content_length=str(len(answer))).data(answer).tail()


async def streamed(_node: LinkedNode, attempt: Attempt) -> None:
    attempt.accept().head().data(b'data: {"a": 1}\n\n').data(b'data: {"a": 2}\n\ndata: [DO').data(b"NE]\n\n").tail()


async def of_no_length(_node: LinkedNode, attempt: Attempt) -> None:
    attempt.accept().head("text/plain", x_engine="kept to itself").data(b"one ").data(b"two").tail()


def fails(code: Code | str, status: int | None = None) -> Play:
    async def play(_node: LinkedNode, attempt: Attempt) -> None:
        attempt.accept().fail_early(code, status)

    return play


def status_of_engine(status: int, **headers: str) -> Play:
    async def play(_node: LinkedNode, attempt: Attempt) -> None:
        attempt.accept()
        attempt.emit_json(Type.HEAD, {"status": status, "headers": {"content-type": "application/json", **headers}})
        attempt.data(b'{"error": "its own words"}').tail()

    return play


async def refused(_node: LinkedNode, attempt: Attempt) -> None:
    attempt.refuse(Code.ENGINE_FAILED)


async def longer_than_announced(_node: LinkedNode, attempt: Attempt) -> None:
    attempt.accept().head("application/json", content_length="4").data(b"12").data(b"3456").tail()


async def shorter_than_announced(_node: LinkedNode, attempt: Attempt) -> None:
    attempt.accept().head("application/json", content_length="9").data(b"1234").tail()


async def lost_before_a_byte(node: LinkedNode, attempt: Attempt) -> None:
    attempt.accept()
    await node.settled()
    await node.cut()


async def lost_in_the_midst(node: LinkedNode, attempt: Attempt) -> None:
    attempt.accept().head("text/event-stream" if attempt.header["stream"] else "text/plain")
    attempt.data(b'data: {"a": 1}\n\ndata: {"ha')
    await node.settled()
    await node.cut()


async def wrong_in_the_midst(_node: LinkedNode, attempt: Attempt) -> None:
    attempt.accept().head("text/event-stream" if attempt.header["stream"] else "text/plain").data(b'data: {"a": 1}\n\n')
    attempt.tail(error=error_wire(Code.ENGINE_FAILED))


async def says_nothing(_node: LinkedNode, attempt: Attempt) -> None:
    attempt.accept()


async def is_drained(control: ControlUnderTest) -> None:
    control.control.dispatcher.draining = True


async def has_answers_enough(control: ControlUnderTest) -> None:
    control.control.quotas.begin_stream("alice")


async def has_asked_enough(control: ControlUnderTest) -> None:
    for _ in range(2):
        assert (await control.ask("GET", "/v1/models").answer()).status == 200


async def has_no_tokens(control: ControlUnderTest) -> None:
    control.control.quotas.charge("another", "alice", 0, 60, time.monotonic())


async def has_a_queue(control: ControlUnderTest) -> None:
    """All slots are taken, and as many wait as may."""
    for number in range(2):
        control.chat()
        await eventually(lambda number=number: control.control.dispatcher.tasks.running == number + 1)


@dataclass(frozen=True)
class Case:
    """`takes`: whether the lane answers it. `play`: what the node does; None: it is asked for nothing."""

    name: str
    sent: bytes
    status: int
    takes: bool = False
    play: Play | None = None
    more: dict[str, Any] = field(default_factory=dict)
    before: Callable[[ControlUnderTest], Awaitable[None]] | None = None
    kept: bool = True  # the connection serves another request
    cut: bool = False


STREAM = body(stream=True)
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body()), body())
UNSERVED = "/v1/files"

CASES = [
    # ---- answers
    Case("a whole answer", ask(), 200, True, whole),
    Case("a stream", ask(STREAM), 200, True, streamed),
    Case("an answer of no announced length", ask(), 200, True, of_no_length),
    Case("a stream that is no event stream", ask(STREAM), 200, True, of_no_length),
    Case("other paths", ask(path="/v1/messages/count_tokens"), 200, True, whole),
    Case("a model in a header", ask(b"RIFF", "Content-Type: audio/wav", f"X-Llorch-Model: {MODEL}"), 200, True, whole),
    # ---- who asks
    Case("nobody", ask(who=None), 401),
    Case("a wrong token", ask(body(), f"Authorization: Bearer {secrets.token_hex(16)}", who=None), 401),
    Case("no token's form", ask(body(), f"Authorization: Basic {TOKENS['alice']}", who=None), 401),
    Case("api-key", ask(body(), f"api-key: {TOKENS['alice']}", who=None), 200, True, whole),
    Case("x-api-key", ask(body(), f"X-Api-Key: {TOKENS['alice']}", who=None), 200, True, whole),
    Case("a wrong one beside a good one", ask(body(), "api-key: 0123456789012345678901234567890123"), 200, True, whole),
    Case("bearer in small letters", ask(body(), f"authorization: bearer {TOKENS['alice']}", who=None), 200, True, whole),
    Case("a token without the scope", ask(who="node"), 403),
    Case("an administrator's", ask(who="admin"), 200, True, whole),
    # ---- what is asked
    Case("an unknown model", ask(body(model="other")), 404, True),
    Case("a model that is none", ask(body(model="a b")), 400),
    Case("no model", ask(b'{"messages": []}'), 400),
    Case("no JSON", ask(b'{"model": "m"'), 400),
    Case("no object", ask(b'["m"]'), 400),
    Case("no UTF-8", ask(b'{"model": "m\xff"}'), 400),
    Case("a key twice", ask(b'{"model": "m", "model": "n"}'), 400),
    Case("a stream that is no boolean", ask(body(stream="yes")), 400),
    Case("no body", ask(b""), 400),
    Case("no length", ask(length=False), 400, kept=False),  # what was its body is no request
    Case("too large a body", ask(body(x="x" * 5_000)), 413, more={"max_body": 4_096}),
    Case("as large a body as may be", ask(body().ljust(4_096)), 200, True, whole, more={"max_body": 4_096}),
    Case("a byte more", ask(body().ljust(4_097)), 413, more={"max_body": 4_096}),
    Case("a body that is larger than the lane's", ask(body().ljust(MAX_BODY_BYTES + 1)), 200, False, whole),
    Case("a type that names no model", ask(body(), "Content-Type: text/plain"), 415),
    Case("a compressed body", ask(body(), "Content-Encoding: gzip"), 200, False, whole),
    # ---- where
    Case("a query", ask(path=f"{CHAT}?a=b"), 200, False, whole),
    Case("a slash at the end", ask(path=f"{CHAT}/"), 404),
    Case("percent signs", ask(path="/v1/chat/%63ompletions"), 200, False, whole),
    Case("a double slash", ask(path="/v1//chat/completions"), 404),
    Case("dots", ask(path="/v1/../v1/chat/completions"), 404),
    Case("a path that is not served", ask(path=UNSERVED), 404),
    Case("another method", ask(method="PUT"), 405),
    Case("GET", ask(b"", method="GET"), 405),
    # ---- headers that mean something here
    Case("a request id", ask(body(), "X-Request-Id: mine.1"), 200, True, whole),
    Case("an id for its correlation", ask(body(), "X-Correlation-Id: mine:2"), 200, True, whole),
    Case("both ids", ask(body(), "X-Correlation-Id: b", "X-Request-Id: a"), 200, True, whole),
    Case("two request ids", ask(body(), "X-Request-Id: a", "X-Request-Id: b"), 200, True, whole),
    Case("an id that is not sane", ask(body(), "X-Request-Id: a b"), 200, True, whole),
    Case("an empty id", ask(body(), "X-Request-Id:", "X-Correlation-Id: c"), 200, True, whole),
    Case("a deadline", ask(body(), "X-Llorch-Deadline-Ms: 60000"), 200, True, whole),
    Case("a deadline that is none", ask(body(), "X-Llorch-Deadline-Ms: soon"), 400),
    Case("two deadlines", ask(body(), "X-Llorch-Deadline-Ms: 60000", "X-Llorch-Deadline-Ms: x"), 200, True, whole),
    Case("a priority", ask(body(), "X-Llorch-Priority: batch"), 200, True, whole),
    Case("a priority that is none", ask(body(), "X-Llorch-Priority: now"), 400),
    Case("a pin", ask(body(), "X-Llorch-Pin: a/p0"), 200, True, whole),
    Case("a pin to nowhere", ask(body(), "X-Llorch-Pin: z/p0"), 404, True),
    Case("going on elsewhere", ask(body(), "X-Llorch-On-Node-Loss: continue"), 400),
    Case("a key", ask(body(), "Idempotency-Key: k1", "X-Llorch-Try: 1"), 200, False, whole),
    Case("a key that is none", ask(body(), "Idempotency-Key: \xe4"), 400),
    Case("an Expect", ask(body(), "Expect: 100-continue"), 200, False, whole),
    Case("text beyond ASCII", ask(body(), "X-Other: \xe9"), 200, False, whole),
    Case("blanks behind a value", ask(body(), "X-Request-Id: mine \t"), 200, False, whole),
    Case("blanks behind the token", ask(body(), f"api-key: {TOKENS['alice']} ", who=None), 200, False, whole),
    Case("blanks before a value", ask(body(), f"api-key: \t  {TOKENS['alice']}", who=None), 200, True, whole),
    Case("no blank before a value", ask(body(), f"api-key:{TOKENS['alice']}", who=None), 200, True, whole),
    Case("an empty line before", b"\r\n" + ask(), 200, False, whole),
    # ---- how long the connection lasts
    Case("close", ask(body(), "Connection: close"), 200, False, whole, kept=False),
    Case("Close", ask(body(), "CONNECTION:\tClose"), 200, False, whole, kept=False),
    Case("keep-alive", ask(body(), "Connection: keep-alive"), 200, True, whole),
    Case("Keep-Alive", ask(body(), "connection:Keep-Alive"), 200, True, whole),
    Case("a list with close", ask(body(), "Connection: keep-alive, close"), 200, False, whole, kept=False),
    Case("close in a second line", ask(body(), "Connection: keep-alive", "Connection: close"), 200, False, whole, kept=False),
    Case("an upgrade", ask(body(), "Connection: Upgrade", "Upgrade: h2c"), 200, False, whole),
    Case("a stream, and close", ask(STREAM, "Connection: close"), 200, False, streamed, kept=False),
    Case("HTTP/1.0", ask(version="1.0"), 200, False, whole, kept=False),
    Case("HTTP/1.0 that stays", ask(body(), "Connection: keep-alive", version="1.0"), 200, False, whole),
    Case("HTTP/1.0, a stream", ask(STREAM, version="1.0"), 200, False, streamed, kept=False),
    Case(
        "chunks", ask(b"", "Transfer-Encoding: chunked", length=False) + CHUNKED, 200, False, whole
    ),
    # ---- refusals of a control that has enough
    Case("too often", ask(), 429, True, more={"rate_requests": 1}, before=has_asked_enough),
    Case("too many at a time", ask(), 429, True, more={"rate_streams": 1}, before=has_answers_enough),
    Case("too many tokens", ask(), 429, True, more={"rate_tokens": 60}, before=has_no_tokens),
    Case("a control that goes", ask(), 503, True, before=is_drained),
    Case("a full queue", ask(), 429, True, more={"queue_limit": 1}, before=has_a_queue),
    # ---- failures
    Case("a node that refuses", ask(), 502, True, refused),
    Case("an engine that fails", ask(), 502, True, fails(Code.ENGINE_FAILED)),
    Case("a prompt that is too long", ask(), 400, True, fails(Code.CONTEXT_LENGTH_EXCEEDED)),
    Case("an error that has no name here", ask(), 400, True, fails("TEAPOT", 418)),
    Case("the engine's own 400", ask(), 400, True, status_of_engine(400)),
    Case("the engine's own 429", ask(STREAM), 429, True, status_of_engine(429, **{"retry-after": "3"})),
    Case("the engine's own 599", ask(), 599, True, status_of_engine(599)),
    Case("longer than announced", ask(), 200, True, longer_than_announced, kept=False, cut=True),
    Case("shorter than announced", ask(), 200, True, shorter_than_announced, kept=False, cut=True),
    Case("a node lost before a byte", ask(body(), "X-Llorch-Deadline-Ms: 300"), 504, True, lost_before_a_byte),
    Case("a node lost in a stream", ask(STREAM), 200, True, lost_in_the_midst),
    Case("a node lost in an answer", ask(), 200, True, lost_in_the_midst, kept=False, cut=True),
    Case("an engine that fails in a stream", ask(STREAM), 200, True, wrong_in_the_midst),
    Case("an engine that fails in an answer", ask(), 200, True, wrong_in_the_midst, kept=False, cut=True),
    Case("a deadline that passes", ask(body(), "X-Llorch-Deadline-Ms: 50"), 504, True, says_nothing),
]  # fmt: skip

_TASK = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MADE_ID = re.compile(r"\b[0-9a-f]{16}\b")
_VARIES = re.compile(r"(\"(?:retry_after_ms|queued_ms)\": ?)\d+")


def alike(text: str) -> str:
    """Without what is another one each time."""
    return _VARIES.sub(r"\1N", _MADE_ID.sub("ID", _TASK.sub("TASK", text)))


def told(got: Got) -> tuple[object, ...]:
    headers = {name: alike(text) for name, text in got.headers.items() if name not in ("date", "server")}
    for name in ("x-llorch-queue-ms", "x-backoff-ms", "content-length"):
        if name in headers and (name != "content-length" or got.status >= 400):
            headers[name] = "N"
    return got.version, got.status, headers, alike(got.body.decode()), got.whole


async def once(case: Case) -> tuple[tuple[object, ...], dict[str, Any]]:
    """What the client was told, and what the node was."""
    async with a_control(**case.more) as control, wire(control) as client:
        node = await control.join("a", pool(slots=1))
        if case.before is not None:
            await case.before(control)
        before = len(node.opened)
        client.write(case.sent)
        asked: dict[str, Any] = {}
        if case.play is not None:
            attempt = await node.asked()
            await case.play(node, attempt)
            asked = {**attempt.header, "body": attempt.body, "task_id": "", "headers": dict(attempt.header["headers"])}
            asked = json.loads(alike(json.dumps({**asked, "body": attempt.body.decode("latin-1")})))
            asked.pop("deadline_ms", None)
        got = await client.next()
        if not case.cut:
            client.write(LAST)
        await client.end()
        assert (len(node.opened) > before) is (case.play is not None)
        return (*told(got), len(client.answers())), asked


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_a_client_is_told_the_same_with_the_lane_and_without_it(
    case: Case, lane: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost_soon(monkeypatch)
    monkeypatch.setattr(dispatch, "DEADLINE_SLACK_S", 0.0)
    short, asked = await once(case)
    took = case.sent in lane.taken
    lane.on = False
    long, asked_without = await once(case)
    assert (short, asked) == (long, asked_without)
    assert short[1] == case.status
    assert short[4] is not case.cut
    assert short[5] == 1 + case.kept
    assert took is case.takes
