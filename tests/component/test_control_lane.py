"""The short way of a `/v1` request: a client can't tell it from the long one, and nothing is smuggled, lost or kept.

What is sent here is bytes, and each case is sent twice: to a control as it is, and to one whose lane takes nothing, so
that aiohttp and the handlers answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llorch import http_connection, listen
from llorch.auth import TokenRing
from llorch.control import answers, dispatch
from llorch.control.lane import MAX_BODY_BYTES, Lane
from llorch.errors import Code
from llorch.framing import MAX_WAITING_BYTES
from llorch.records import Type
from llorch.web import Gate, make_app
from tests.component.control_harness import (
    MODEL,
    TOKENS,
    WINDOW,
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
from tests.component.test_control_audit import of
from tests.component.test_control_stop import a_running_control, terminate
from tests.component.test_smuggling import CORPUS, PLAIN, SMUGGLED, Client, Line, pieces_of

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
    pairs = [
        (name.decode().lower(), text.strip().decode()) for name, _, text in (line.partition(b":") for line in lines)
    ]
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
        await eventually(
            lambda: len(self.answers()) >= self._read, within_s=5, what=f"answer {self._read}: {self.came!r}"
        )
        return self.answers()[self._read - 1]

    async def has(self, piece: bytes) -> None:
        await eventually(lambda: piece in self.came, within_s=5, what=f"{piece!r} at the client")

    async def end(self) -> None:
        await asyncio.wait_for(self._client.ended.wait(), 5)


@contextlib.asynccontextmanager
async def wire(control: Any, *, room: int | None = None) -> AsyncIterator[Wire]:
    """`room`: what the kernel keeps for a client that does not read, in bytes."""
    loop, sock = asyncio.get_running_loop(), socket.socket()
    sock.setblocking(False)
    if room is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    await loop.sock_connect(sock, ("127.0.0.1", control.port))
    transport, client = await loop.create_connection(Client, sock=sock)
    try:
        yield Wire(transport, client)
    finally:
        transport.abort()
        await client.ended.wait()


class Switch:
    """The lane of every control of a test. `taken` are the requests that it did not leave to aiohttp."""

    def __init__(self) -> None:
        self.on = True
        self.connections: list[http_connection.Connection] = []  # of those that were taken
        self.taken: list[bytes] = []
        self.left: list[bytes] = []


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[Switch]:
    switch, call = Switch(), Lane.__call__

    def through(self: Lane, connection: http_connection.Connection, request: bytes) -> http_connection.Ride | None:
        ride = call(self, connection, request) if switch.on else None
        if ride is not None:
            switch.connections.append(connection)
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
    Case("small letters", ask(body(), f"authorization: bearer {TOKENS['alice']}", who=None), 200, True, whole),
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
    Case("no length", ask(length=False), 400),  # what was its body is no request, and is told so
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
    Case(
        "close in a second line", ask(body(), "Connection: keep-alive", "Connection: close"), 200, False, whole,
        kept=False,
    ),
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


async def test_a_token_for_some_models_is_for_no_other_either_way(lane: Switch) -> None:
    async with a_control() as control:
        status, made = await control.post("/v2/tokens", {"models": ["other"]}, who="admin")
        assert status == 201
        sent, answers = ask(body(), f"api-key: {made['token']}", who=None), []
        for lane.on in (True, False):
            async with wire(control) as client:
                client.write(sent)
                answers.append(told(await client.next()))
        assert answers[0] == answers[1]
        assert answers[0][1] == 403
        assert lane.taken == []


RECORDED = (
    "event", "principal", "fingerprint", "peer", "request_id", "scope", "task_id", "decision", "path", "model",
    "detach",
)  # fmt: skip


async def test_log_audit_and_metrics_say_the_same_of_it(
    lane: Switch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[tuple[object, ...]] = []
    for lane.on in (True, False):
        caplog.clear()
        folder = tmp_path / str(lane.on)
        with caplog.at_level(logging.INFO):
            async with a_control(data_dir=str(folder)) as control, wire(control) as client:
                node = await control.join("a")
                client.write(ask(body(), "X-Request-Id: mine") + ask(STREAM))
                for play in (whole, streamed):
                    await play(node, await node.asked())
                    await client.next()
                await control.idle()
                assert await control.metric("llorch_tasks_total", outcome="done") == 2
                assert await control.metric("llorch_inflight", model=MODEL) == 0
                text = (await control.ask("GET", "/metrics").answer()).text
                counts = [
                    line for line in text.splitlines() if re.match(r"llorch_(tasks|placements|tokens|errors)", line)
                ]
                counts += [line for line in text.splitlines() if re.match(r"llorch_(ttft|task|routing)\w*_count", line)]
        lines = [alike(record.getMessage()) for record in caplog.records if "task." in record.getMessage()]
        records = of(folder, "task.accepted")
        told_of = [{name: alike(str(record.get(name))) for name in RECORDED} for record in records]
        said.append((lines, told_of, counts))
        assert records[0]["request_id"] == "mine"
        assert records[0]["principal"] == "alice"
        assert records[0]["peer"] == "127.0.0.1"
        assert len(records) == 2
    assert said[0] == said[1]
    assert len(said[0][0]) == 2  # task.ended, twice


# ---------------------------------------------------------------- nothing is smuggled, and all in order


async def answers_all(node: LinkedNode) -> None:
    """A node that answers each task with its request id."""
    while True:
        attempt = await node.asked()
        answer = json.dumps({"of": attempt.header["headers"]["x-request-id"]}).encode()
        attempt.accept().head("application/json", content_length=str(len(answer))).data(answer).tail()


async def streaming(control: ControlUnderTest, client: Wire) -> tuple[LinkedNode, Attempt]:
    """An answer that has begun at `client`."""
    node = await control.join("a")
    client.write(ask(STREAM))
    attempt = (await node.asked()).accept().head().data(b"data: 1\n\n")
    await client.has(b"data: 1")
    return node, attempt


@contextlib.asynccontextmanager
async def answering(**more: Any) -> AsyncIterator[tuple[ControlUnderTest, LinkedNode]]:
    async with a_control(**more) as control:
        node = await control.join("a", pool(slots=16))
        playing = asyncio.create_task(answers_all(node))
        try:
            yield control, node
        finally:
            playing.cancel()
            await asyncio.wait((playing,))


async def exchange(control: ControlUnderTest, sent: bytes, step: int = 1 << 20) -> list[Got]:
    """All answers to what is sent, in pieces; the connection ends by itself."""
    async with wire(control) as client:
        for at in range(0, len(sent), step):
            client.write(sent[at : at + step])
            await asyncio.sleep(0)
        await client.end()
        answers = client.answers()
        assert len(re.findall(rb"HTTP/1\.[01] \d{3} ", client.came)) == len(answers)
        return answers


def raw_of(line: Line) -> bytes:
    """A line of the corpus, with tasks in place of what reads a body and of what is smuggled."""
    raw = b"".join(pieces_of(line.sent, 1 << 20)).replace(SMUGGLED.encode(), ask())
    to_a_task = rb"\1" + CHAT.encode() + rb"\2Authorization: Bearer " + TOKENS["alice"].encode() + rb"\r\n"
    return re.sub(rb"(POST )/read( HTTP/1\.[01]\r\nHost: x\r\n)", to_a_task, raw)


async def test_what_can_be_read_in_two_ways_starts_no_task_whatever_is_hidden_in_it(lane: Switch) -> None:
    async with answering() as (control, node):
        for line in CORPUS:
            for sent in (raw_of(line), raw_of(line) + ask()):
                answers = await exchange(control, sent)
                assert [got.status for got in answers] == list(line.statuses), line.name
        assert node.opened == []
        assert lane.taken == []


async def test_what_can_be_read_in_two_ways_behind_a_task_is_refused_after_its_answer(lane: Switch) -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=16))
        for number, line in enumerate(CORPUS):
            async with wire(control) as client:
                client.write(ask(body(), f"X-Request-Id: r{number}"))
                attempt = await node.asked()
                client.write(raw_of(line) + ask())
                await node.settled()
                assert client.came == b""
                await whole(node, attempt)
                await client.end()
                answers = client.answers()
                assert [got.status for got in answers] == [200, *line.statuses], line.name
                assert answers[0].headers["x-request-id"] == f"r{number}"
                assert answers[0].whole
        assert len(node.opened) == len(CORPUS) == len(lane.taken)


async def test_what_can_be_read_in_two_ways_in_one_piece_with_tasks_ends_them_where_it_begins(lane: Switch) -> None:
    async with answering() as (control, node):
        for line in CORPUS:
            answers = await exchange(control, ask() + ask() + raw_of(line) + ask())
            assert [got.status for got in answers] == [200, 200, *line.statuses], line.name
        assert len(node.opened) == 2 * len(CORPUS)


@pytest.mark.parametrize("step", [1 << 20, 50])
async def test_what_has_one_reading_is_as_many_tasks_as_it_asks_for(lane: Switch, step: int) -> None:
    async with answering() as (control, node):
        for line in PLAIN:
            sent = raw_of(line).replace(b"/open", b"/livez")
            sent = sent.replace(b"Content-Length: 35", b"Content-Length: %d" % len(ask()))
            before, ends = len(node.opened), line.name in ("HTTP/1.0", "close")
            answers = await exchange(control, sent + LAST, step)
            first = 400 if "POST /read" in line.sent else line.statuses[0]
            expected = [first, *line.statuses[1:], *([] if ends else [200])]
            assert [got.status for got in answers] == expected, line.name
            tasks = [got for got in answers if "x-llorch-task" in got.headers]
            assert len(node.opened) - before == len(tasks), line.name
            assert all(got.whole for got in answers)


TASKS, OTHER = ("task",), ("other",)
TURNS = [
    TASKS * 2, TASKS + OTHER, OTHER + TASKS, TASKS * 4, OTHER + TASKS + OTHER + TASKS, TASKS * 2 + OTHER * 2 + TASKS,
]  # fmt: skip


@pytest.mark.parametrize("turns", TURNS, ids="-".join)
async def test_answers_come_in_the_order_of_their_requests_however_those_arrive(
    turns: tuple[str, ...], lane: Switch
) -> None:
    requests = []
    for number, turn in enumerate(turns):
        name = f"X-Request-Id: r{number}"
        requests.append(
            ask(body(), name) if turn == "task" else f"GET /livez HTTP/1.1\r\nHost: x\r\n{name}\r\n\r\n".encode()
        )
    sent = b"".join(requests)
    async with answering() as (control, node):
        for step in (1 << 20, len(requests[0]), len(requests[0]) - 1, len(requests[0]) + 1, len(sent) // 2, 97, 1):
            answers = await exchange(control, sent + LAST, step)
            assert [got.status for got in answers] == [200] * (len(turns) + 1)
            for number, (turn, got) in enumerate(zip(turns, answers, strict=False)):
                assert got.headers["x-request-id"] == f"r{number}"
                assert got.json == {"of": f"r{number}"} if turn == "task" else got.json["role"] == "control"
        assert len(node.opened) == 7 * turns.count("task")


async def test_many_large_requests_behind_a_task_wait_and_are_all_answered(lane: Switch) -> None:
    async with a_control() as control, wire(control) as client:
        node = await control.join("a")
        client.write(ask(body(), "X-Request-Id: r0"))
        attempt = await node.asked()
        for number in range(1, 9):
            client.write(ask(body(x="x" * 60_000), f"X-Request-Id: r{number}"))
        (connection,) = lane.connections
        await eventually(lambda: connection._buffer_paused, what="the reader paused")
        assert connection._framer.held_bytes < 400_000
        await whole(node, attempt)
        for number in range(9):
            got = await client.next()
            assert (got.status, got.headers["x-request-id"]) == (200, f"r{number}")
            if number < 8:
                await whole(node, await node.asked())


async def test_after_one_large_request_behind_a_task_the_next_one_is_read(lane: Switch) -> None:
    async with a_control() as control, wire(control) as client:
        node = await control.join("a")
        client.write(ask())
        attempt = await node.asked()
        large = ask(body().ljust(MAX_WAITING_BYTES))  # a little more, with its head: no more is read before its turn
        client.write(large)
        (connection,) = lane.connections
        await eventually(lambda: connection._framer.held_bytes == len(large), what="all of it held")
        assert connection._buffer_paused
        for number in range(3):
            await whole(node, attempt)
            assert (await client.next()).whole
            if number == 1:
                client.write(ask())
            if number < 2:
                attempt = await node.asked()
        assert len(lane.taken) == 3


async def test_a_piece_of_an_event_waits_for_its_end_before_anything_else_passes(lane: Switch) -> None:
    async with a_control() as control, wire(control) as client:
        node, attempt = await streaming(control, client)
        for piece in (b"data: 2", b"\n", b"\ndata: 3\n\n", b"data: 4\n\n"):
            attempt.data(piece)
            await node.settled()
            if piece == b"data: 2":
                assert b"data: 2" not in client.came
        attempt.tail()
        assert (await client.next()).body == b"data: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4\n\n"


async def test_nothing_behind_a_last_request_is_begun(lane: Switch) -> None:
    async with answering() as (control, node):
        for last in (LAST, b"GET /livez HTTP/1.0\r\n\r\n", ask(body(), "Connection: close")):
            before = len(node.opened)
            answers = await exchange(control, last + ask())
            assert [got.status for got in answers] == [200]
            assert len(node.opened) - before == last.count(b"POST")
        await control.idle()


# ---------------------------------------------------------------- how it ends


def nothing_is_left(control: ControlUnderTest) -> None:
    inside = control.control
    assert inside.quotas._streams == {}
    assert {principal.name for principal in inside.access.sessions._running} <= {"default"}  # the node's link
    assert inside.dispatcher._audiences == {}
    assert inside.dispatcher.tasks.running == 0


@pytest.mark.parametrize("begun", [False, True], ids=["before the first byte", "in the midst"])
async def test_a_client_that_leaves_ends_its_task(lane: Switch, begun: bool) -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        async with wire(control) as client:
            client.write(ask(STREAM))
            attempt = (await node.asked()).accept()
            if begun:
                attempt.head().data(b"data: 1\n\n")
                await client.has(b"data: 1")
            client.transport.abort()
        await eventually(lambda: attempt.detached == "left", what="the node told")
        await control.idle()
        nothing_is_left(control)
        assert await control.metric("llorch_inflight", model=MODEL) == 0
        assert await control.metric("llorch_tasks_total", outcome="canceled") == 1
        assert lane.taken
        again = control.chat(stream=False)  # the slot is free
        await whole(node, await node.asked())
        assert (await again.answer()).status == 200


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue(lane: Switch) -> None:
    async with a_control() as control:
        await control.join("a", pool(slots=1))
        control.chat()
        await eventually(lambda: control.control.dispatcher.tasks.running == 1)
        async with wire(control) as client:
            client.write(ask())
            await control.waiting(1)
        await control.waiting(0)


@pytest.mark.parametrize("stalled", [False, True], ids=["that is read", "that is not read"])
async def test_a_credential_that_is_revoked_ends_an_answer(lane: Switch, stalled: bool) -> None:
    async with a_control() as control:
        node = await control.join("a")
        _, made = await control.post("/v2/tokens", {"name": "ci"}, who="admin")
        async with wire(control, room=4_096) as client:
            client.write(ask(STREAM, f"api-key: {made['token']}", who=None))
            attempt = (await node.asked()).accept().head().data(b"data: 1\n\n")
            await client.has(b"data: 1")
            if stalled:
                client.transport.pause_reading()
                (connection,) = lane.connections
                await fill(attempt, is_stalled(attempt, connection))
            other = control.chat()
            another = (await node.asked()).accept().head().data(b"data: 1\n\n")
            await other.has(b"data: 1")
            assert (await control.ask("DELETE", f"/v2/tokens/{made['id']}", who="admin").answer()).status == 200
            await eventually(lambda: attempt.detached is not None, within_s=5, what="the node told")
            client.transport.resume_reading()
            await client.end()
            (got,) = client.answers()
            assert (got.status, got.whole) == (200, False)
            another.data(b"data: [DONE]\n\n").tail()
            assert not (await other.answer()).cut
        assert lane.taken
        await control.idle()
        nothing_is_left(control)


def is_stalled(attempt: Attempt, connection: http_connection.Connection) -> Callable[[], bool]:
    """Whether nothing moves: all credit is used up, and one wait for the client outlasts many turns of the loop."""
    waited: list[object] = []

    def look() -> bool:
        waiter, used = connection._drain_waiter, len(attempt.log) - attempt.granted
        waited[:] = [*(each for each in waited if each is waiter), waiter] if used > WINDOW - 2_000 else []
        return waiter is not None and len(waited) > 50

    return look


async def fill(attempt: Attempt, full: Callable[[], bool]) -> None:
    """Send what there is credit for, until nothing is taken any more."""
    until = time.monotonic() + 10
    while not full():
        assert time.monotonic() < until, (len(attempt.log), attempt.granted)
        room = WINDOW - (len(attempt.log) - attempt.granted)
        for _ in range(room // 2_000):
            attempt.data(b"data: " + b"x" * 1_992 + b"\n\n")
        await asyncio.sleep(0.001)


async def test_a_client_that_stalls_is_dropped_and_costs_little_until_then(lane: Switch) -> None:
    most = 0
    async with a_control(slow_reader_timeout=0.3) as control:
        node = await control.join("a")
        async with wire(control, room=4_096) as client:
            client.write(ask(STREAM))
            attempt = (await node.asked()).accept().head().data(b"data: 1\n\n")
            await client.has(b"data: 1")
            client.transport.pause_reading()
            (connection,) = lane.connections

            def dropped() -> bool:
                nonlocal most
                if connection.transport is not None:
                    most = max(most, connection.transport.get_write_buffer_size())
                return attempt.detached is not None

            await fill(attempt, dropped)
            assert attempt.detached == "slow"
        assert 0 < most <= 16 * 1024 + 20_000
        await control.idle()
        nothing_is_left(control)


async def test_what_goes_wrong_in_the_lane_itself_ends_the_connection_and_is_logged(
    lane: Switch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("what a library quotes")

    async with a_control() as control, wire(control) as client:
        node = await control.join("a")
        monkeypatch.setattr(answers.OpenAiAnswer, "ended", broken)
        client.write(ask())
        await whole(node, await node.asked())
        await client.end()
        (got,) = client.answers()
        assert not got.whole or "content-length" in got.headers
        assert "request.failed" in caplog.text
        await control.idle()
        nothing_is_left(control)


async def test_a_stopping_control_lets_an_answer_end_and_waits_for_it(
    lane: Switch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with a_running_control(monkeypatch, tmp_path, shutdown_grace=10.0) as control, wire(control) as client:
        _, attempt = await streaming(control, client)
        terminate()
        await eventually(lambda: control.control.stopping.is_set())
        async with wire(control) as late:
            late.write(ask())
            assert (await late.next()).status == 503
        attempt.data(b"data: 2\n\n").data(b"data: [DONE]\n\n").tail()
        await client.end()
        (got,) = client.answers()
        assert (got.whole, got.body) == (True, b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n")


async def test_after_the_grace_an_answer_gets_its_end(
    lane: Switch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with a_running_control(monkeypatch, tmp_path, shutdown_grace=0.1) as control, wire(control) as client:
        _, attempt = await streaming(control, client)
        terminate()
        await client.end()
        (got,) = client.answers()
        assert (got.whole, got.body.count(b'"DRAINING"')) == (True, 1)
        assert attempt.detached == "shutdown"


# ---------------------------------------------------------------- the connection itself


class Held:
    """A lane that takes all, and answers when the test says so."""

    def __init__(self) -> None:
        self.connections: list[http_connection.Connection] = []
        self.left = 0
        self.at_once = False

    def __call__(self, connection: http_connection.Connection, request: bytes) -> http_connection.Ride:
        self.connections.append(connection)
        if self.at_once:
            self.answer()
        return self

    def lost(self) -> None:
        self.left += 1

    def answer(self, *, keep: bool = True) -> None:
        connection = self.connections.pop(0)
        assert connection.transport is not None
        connection.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        connection.answered(keep=keep)


@contextlib.asynccontextmanager
async def a_listener(held: Held, **more: Any) -> AsyncIterator[Any]:
    server = await listen.serve(
        make_app([], Gate(TokenRing), max_body_bytes=1_000),
        "127.0.0.1",
        0,
        lane=held,
        **{"shutdown_timeout_s": 5.0, **more},
    )
    try:
        yield server
    finally:
        await server.close()


async def test_an_idle_connection_is_closed_in_time_and_one_that_serves_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0
    look = http_connection.Connection._process_keepalive

    def looking(self: http_connection.Connection) -> None:
        nonlocal looked
        looked += 1
        look(self)

    monkeypatch.setattr(http_connection, "KEEPALIVE_S", 0.03)
    monkeypatch.setitem(http_connection.CONNECTION, "keepalive_timeout", 0.03)
    monkeypatch.setattr(http_connection.Connection, "_process_keepalive", looking)
    held = Held()
    async with a_listener(held) as server, wire(server) as client:
        client.write(LAST)
        await eventually(lambda: held.connections)
        held.answer()
        client.write(LAST)
        await eventually(lambda: held.connections)
        before = looked
        await eventually(lambda: looked >= before + 2, what="two looks at a connection that serves")
        assert not client.ended
        held.answer()
        assert (await client.next()).whole
        assert (await client.next()).whole
        await client.end()
    assert held.left == 0


async def test_a_connection_counts_as_busy_while_it_is_served_and_as_idle_after() -> None:
    held = Held()
    async with a_listener(held) as server:
        doors = server.doors
        async with wire(server) as client:
            await eventually(lambda: doors.clients == 1)
            assert (len(doors._silent), len(doors._idle)) == (1, 0)
            client.write(LAST)
            await eventually(lambda: held.connections)
            assert (len(doors._silent), len(doors._idle)) == (0, 0)
            held.answer()
            assert (len(doors._idle), doors.clients) == (1, 1)
            client.write(LAST)
            await eventually(lambda: held.connections)
            assert len(doors._idle) == 0
        await eventually(lambda: doors.clients == 0)
        assert (len(doors._silent), len(doors._idle)) == (0, 0)


async def test_one_that_leaves_is_told_of_once_and_one_that_was_answered_never() -> None:
    held = Held()
    async with a_listener(held) as server:
        async with wire(server) as client:
            client.write(LAST)
            await eventually(lambda: held.connections)
        await eventually(lambda: server.doors.clients == 0)
        assert held.left == 1
        async with wire(server) as client:
            client.write(LAST)
            await eventually(lambda: len(held.connections) == 2)
            del held.connections[0]
            held.answer()
        await eventually(lambda: server.doors.clients == 0)
        assert held.left == 1


async def test_one_that_is_answered_at_once_is_served_no_longer() -> None:
    held = Held()
    held.at_once = True
    async with a_listener(held) as server:
        async with wire(server) as client:
            client.write(LAST)
            assert (await client.next()).whole
            assert len(server.doors._idle) == 1
            client.write(LAST)
            assert (await client.next()).whole
            await asyncio.wait_for(server.close(), 2)  # there is nothing to wait for
            await client.end()
        assert held.left == 0


async def test_an_answer_after_which_nothing_is_kept_ends_the_connection() -> None:
    held = Held()
    async with a_listener(held) as server, wire(server) as client:
        client.write(LAST)
        await eventually(lambda: held.connections)
        client.write(LAST)
        held.answer(keep=False)
        await client.end()
        assert len(client.answers()) == 1
        assert held.connections == []


async def test_a_listener_that_closes_waits_for_what_is_served_beside_aiohttp() -> None:
    held = Held()
    async with a_listener(held) as server, wire(server) as client:
        client.write(LAST)
        await eventually(lambda: held.connections)
        closing = asyncio.create_task(server.close())
        (connection,) = held.connections
        await eventually(lambda: connection._free is not None, what="the listener waits")
        assert not closing.done()
        held.answer()
        await client.end()
        await asyncio.wait_for(closing, 2)
        assert client.answers()[0].whole
        assert held.left == 0


async def test_a_listener_that_closes_waits_no_longer_than_it_may() -> None:
    held = Held()
    async with a_listener(held, shutdown_timeout_s=0.05) as server, wire(server) as client:
        client.write(LAST)
        await eventually(lambda: held.connections)
        await asyncio.wait_for(server.close(), 2)
        await client.end()
        assert (client.came, held.left) == (b"", 1)
