"""A real control in this process, between real clients and scripted nodes.

The control is wired by its own app.py and serves on loopback. Its nodes are stand-ins, one with a link and one that is
dialled: they register, beat and answer as the test says, record by record.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import aiohttp
import pytest
from aiohttp import web as aioweb

from llorch import records, sse, tls
from llorch.config_kinds import HostPort
from llorch.control import answers, app, dispatch, follow, log_reader, replay, sweep, waiting
from llorch.errors import MEANINGS, Code
from llorch.records import Record, Type
from llorch.settings import ControlSettings
from tests.cluster import eventually

MODEL = "m"
TOKENS = {name: secrets.token_hex(16) for name in ("alice", "bob", "admin", "node", "service")}
WINDOW = records.INITIAL_CREDIT_BYTES
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where nothing is waited for to be on disk
_CLIENT_TLS = tls.client_context(None)  # one for all tests: reading the system's authorities takes 40 ms


def settings(**more: Any) -> ControlSettings:
    return ControlSettings(
        bind=HostPort("127.0.0.1", 0),
        api_token=f"alice={TOKENS['alice']},bob={TOKENS['bob']}",
        admin_token=f"root={TOKENS['admin']}",
        node_token=TOKENS["node"],
        service_token=TOKENS["service"],
        **{"shutdown_grace": 0.0, "recovery_window": 0.0, "rate_failures": 0, **more},
    )


def bearer(name: str | None) -> dict[str, str]:
    return {} if name is None else {"Authorization": f"Bearer {TOKENS[name]}"}


def pool(pool_id: str = "p0", **more: Any) -> dict[str, Any]:
    slots = more.pop("slots", 2)
    return {
        "pool_id": pool_id, "engine": "scripted", "model": MODEL, "state": "ready", "ready": True,
        "slots_total": slots, "slots_free": slots,
    } | more  # fmt: skip


def error_wire(code: Code | str, message: str = "as the test says") -> dict[str, Any]:
    return {"code": str(code), "message": message, "type": "server_error", "param": None, "retriable": True}


def ping_soon(monkeypatch: pytest.MonkeyPatch) -> float:
    """Pings after 0.15 s of silence instead of 15 s."""
    for module in (dispatch, answers, follow):
        monkeypatch.setattr(module, "PING_AFTER_S", 0.15)
    return 0.15


def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the control looks at by the clock, nodes and queue and roster, it looks at every 50 ms instead of 1 s."""
    for module, name in (
        (sweep, "EXPIRE_EVERY_S"), (sweep, "ROSTER_EVERY_S"), (waiting, "WAIT_TICK_S"), (follow, "LOOK_AGAIN_S"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 0.05)


def no_answer_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is asked for a task, and in these tests says nothing, is waited for 0.1 s instead of 1 s."""
    monkeypatch.setattr(replay, "ASK_S", 0.1)


def lost_soon(monkeypatch: pytest.MonkeyPatch, after_s: float = 0.1) -> None:
    """A node whose connection broke under an answer is waited for as long as this, instead of 5 s."""
    monkeypatch.setattr(log_reader, "RECONNECT_S", after_s)


# ---------------------------------------------------------------- what a node was asked, and what it answers


class Attempt:
    """One attempt of a task at a scripted node. The log it has written is `log`; what the control said, the rest."""

    def __init__(self, node_id: str, header: dict[str, Any]) -> None:
        self.node_id = node_id
        self.header = header
        self.accepted = False
        self.body = b""
        self.log = b""
        self.tokens: list[str] = []
        self.canceled = self.surplus = False
        self.detached: str | None = None
        self.granted = 0
        self.cut = False

    @property
    def task_id(self) -> str:
        return str(self.header["task_id"])

    @property
    def attempt(self) -> int:
        return int(self.header["attempt"])

    @property
    def pool_id(self) -> str:
        return str(self.header["pool_id"])

    def emit(self, kind: int, payload: bytes = b"") -> None:
        raise NotImplementedError

    def emit_json(self, kind: int, value: object) -> None:
        self.emit(kind, json.dumps(value).encode())

    # ---- what the node says

    def accept(self) -> Attempt:
        """ACCEPT, once."""
        if not self.accepted:
            self.accepted = True
            self.emit(Type.ACCEPT)
        return self

    def refuse(self, code: Code) -> None:
        self.emit_json(Type.REFUSE, error_wire(code))

    def head(self, content_type: str = "text/event-stream", **headers: str) -> Attempt:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.emit_json(Type.HEAD, {"status": 200, "headers": {"content-type": content_type, **headers}})
        return self

    def data(self, data: bytes) -> Attempt:
        self.log += data
        for start in range(0, len(data), records.MAX_PAYLOAD_BYTES):
            self.emit(Type.DATA, data[start : start + records.MAX_PAYLOAD_BYTES])
        return self

    def event(self, event: str, value: object) -> Attempt:
        data = json.dumps(value, separators=(",", ":"))
        size = len(sse.encode(event, data, id="0" * 12))
        return self.data(sse.encode(event, data, id=f"{len(self.log) + size:012x}"))

    def begin(self) -> Attempt:
        """ACCEPT, HEAD, `started`."""
        self.accept().head()
        started = {"task_id": self.task_id, "node_id": self.node_id, "pool_id": self.pool_id, "model": MODEL}
        return self.event("started", started | {"attempt": self.attempt})

    def say(self, *texts: str) -> Attempt:
        for text in texts:
            self.event("token", {"t": text, "i": len(self.tokens)})
            self.tokens.append(text)
        return self

    def tail(self, **fields: Any) -> None:
        sealed = {"length": len(self.log), "sha256": hashlib.sha256(self.log).hexdigest()}
        self.emit_json(Type.TAIL, sealed | fields)

    def end(self, reason: str = "stop") -> None:
        """`end` and TAIL."""
        counts = {"tokens_in": 1, "tokens_out": len(self.tokens), "cached_tokens": 0}
        self.event("end", {"finish_reason": reason, **counts, "ttft_ms": 1.0, "decode_ms": 1.0, "sha256": ""})
        self.tail(finish_reason=reason, **counts)

    def fail(self, code: Code = Code.ENGINE_FAILED) -> None:
        """`error` in the log, and a TAIL with it."""
        self.event("error", error_wire(code))
        self.tail(error=error_wire(code))

    def fail_early(self, code: Code | str = Code.ENGINE_FAILED, status: int | None = None) -> None:
        """A TAIL before any byte."""
        meaning = MEANINGS.get(code)  # type: ignore[call-overload]
        self.tail(error=error_wire(code), status=status or meaning.status)


# ---------------------------------------------------------------- a node with a link


class Stream(Attempt):
    """An attempt (or a reader of a log) on a link."""

    def __init__(self, node: LinkedNode, stream_id: int, kind: int, header: dict[str, Any]) -> None:
        super().__init__(node.node_id, header)
        self._node = node
        self.id = stream_id
        self.kind = kind

    def emit(self, kind: int, payload: bytes = b"") -> None:
        self._node.send(records.encode(self.id, kind, payload))


class LinkedNode:
    """A node in the hands of the test. `opened` are the attempts it was asked for, in order."""

    def __init__(self, cluster: ControlUnderTest, node_id: str) -> None:
        self.node_id = node_id
        self.boot_id = uuid.uuid4().hex
        self.lease_id = ""
        self.epoch = ""
        self.seq = 0
        self.opened: list[Stream] = []
        self.attached: list[Stream] = []
        self.calls: list[Stream] = []
        self.late: list[Record] = []
        self.pongs = 0
        self.answer_pings = True
        self.lives_when_asked = False  # something comes over the link at once; an answer to the OPEN it is not
        self.up = False
        self._cluster = cluster
        self._streams: dict[int, Stream] = {}
        self._taken = 0
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def register(self, *pools: dict[str, Any], **more: Any) -> tuple[int, dict[str, Any]]:
        body = {"node_id": self.node_id, "boot_id": self.boot_id, "pools": list(pools)} | more
        status, answer = await self._cluster.post("/v2/nodes/register", body, who="node")
        if status == 200:
            self.lease_id, self.epoch, self.seq = answer["lease_id"], answer["epoch"], 0
        return status, answer

    async def beat(self, **fields: Any) -> tuple[int, dict[str, Any]]:
        self.seq += 1
        body = {"lease_id": self.lease_id, "boot_id": self.boot_id, "seq": self.seq, "timestamp": "x"} | fields
        return await self._cluster.post(f"/v2/nodes/{self.node_id}/heartbeat", body, who="node")

    async def open_link(self, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Ask for the switch to records: (status, headers, body of a refusal)."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._cluster.port)
        fields = {
            "Host": "x", **bearer("node"), "Connection": "Upgrade", "Upgrade": records.UPGRADE,
            "X-Llorch-Lease": self.lease_id,
        } | headers  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
        writer.write(f"GET /v2/nodes/{self.node_id}/link HTTP/1.1\r\n{head}\r\n".encode())
        answer = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().split("\r\n")
        status = int(answer[0].split()[1])
        got = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in answer[1:])}
        if status != 101:
            body = await reader.readexactly(int(got["content-length"]))
            writer.close()
            return status, got, body
        self._writer, self.up = writer, True
        self._reading = asyncio.create_task(self._read(reader, writer))
        return status, got, b""

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = records.Decoder()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                for record in decoder.feed(data):
                    self._take(record)
        if self._writer is writer:
            self.up = False
        writer.close()

    def _take(self, record: Record) -> None:
        kind, payload = record.type, record.payload
        if kind in (Type.OPEN, Type.ATTACH):
            stream = self._streams[record.stream] = Stream(self, record.stream, kind, json.loads(payload))
            kept = self.attached if kind == Type.ATTACH else self.calls if "method" in stream.header else self.opened
            kept.append(stream)
            if self.lives_when_asked:
                self.lives()
        elif kind == Type.PING:
            if self.answer_pings:
                self.send(records.encode(0, Type.PONG))
        elif kind == Type.PONG:
            self.pongs += 1
        else:
            stream = self._streams[record.stream]
            if kind == Type.BODY:
                stream.body += payload
            elif kind == Type.CREDIT:
                stream.granted += records.decode_credit(payload)
            elif kind == Type.CANCEL:
                stream.canceled, stream.surplus = True, payload == records.SURPLUS
            elif kind == Type.DETACH:
                stream.detached = payload.decode()

    def lives(self) -> None:
        """Something comes over the link, that answers nothing."""
        self.send(records.encode(0, Type.PONG))

    def send(self, encoded: bytes) -> None:
        assert self._writer is not None
        self._writer.write(encoded)

    async def asked(self) -> Stream:
        """The next attempt."""
        self._taken += 1
        await eventually(lambda: len(self.opened) >= self._taken, within_s=5, what=f"an OPEN at {self.node_id}")
        return self.opened[self._taken - 1]

    async def reader(self, number: int = 0) -> Stream:
        await eventually(lambda: len(self.attached) > number, within_s=5, what=f"an ATTACH at {self.node_id}")
        return self.attached[number]

    async def settled(self) -> None:
        """Everything that was sent before has been dealt with by the control."""
        before = self.pongs
        self.send(records.encode(0, Type.PING))
        await eventually(lambda: self.pongs > before or not self.up, within_s=5, what="a PONG")

    async def link_ended(self) -> None:
        await eventually(lambda: not self.up, within_s=5, what="the end of the link")

    async def cut(self) -> None:
        """The link breaks with no word, as when the machine dies."""
        writer, reading = self._writer, self._reading
        if writer is not None and reading is not None:
            writer.transport.abort()
            await asyncio.wait((reading,))
        self.up = False

    async def join(self, *pools: dict[str, Any], **more: Any) -> LinkedNode:
        """Register and open the link."""
        status, answer = await self.register(*(pools or (pool(),)), **more)
        assert status == 200, answer
        assert (await self.open_link())[0] == 101
        await self._cluster.linked(self.node_id)
        return self


# ---------------------------------------------------------------- a node that is dialled


class HttpAttempt(Attempt):
    def __init__(self, node_id: str, header: dict[str, Any], body: bytes) -> None:
        super().__init__(node_id, header)
        self.body = body
        self.script: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.status: int | None = None
        self.gone = asyncio.Event()
        self.stays_open = False  # the connection, after the TAIL
        self.content_type = records.CONTENT_TYPE

    def emit(self, kind: int, payload: bytes = b"") -> None:
        self.script.put_nowait(records.encode(0, kind, payload))
        if kind == Type.TAIL and not self.stays_open:
            self.script.put_nowait(None)

    def refuse(self, code: Code, status: int | None = None) -> None:
        self.status = status or MEANINGS[code].status
        self.script.put_nowait(json.dumps({"error": error_wire(code)}).encode())

    def break_off(self) -> None:
        self.script.put_nowait(b"")


class DialledNode:
    """A node without a link: an address, `infer`, and what was deleted."""

    def __init__(self, cluster: ControlUnderTest, node_id: str) -> None:
        self.node_id = node_id
        self.pools: list[dict[str, Any]] = [pool()]
        self.opened: list[HttpAttempt] = []
        self.deleted: list[str] = []
        self.tokens: set[str] = set()
        self.address = ""
        self.pause_reports = 0  # bytes after which the answer to GET /v2/pools pauses, to arrive in two reads
        self._cluster = cluster
        self._taken = 0
        self._runner: aioweb.AppRunner | None = None

    async def start(self) -> DialledNode:
        server = aioweb.Application(client_max_size=1 << 28)
        server.router.add_get("/v2/pools", self._report)
        server.router.add_get("/v2/pools/{pool}", self._report_one)
        server.router.add_post("/v2/pools/{pool}/infer", self._infer)
        server.router.add_delete("/v2/tasks/{task}", self._delete)
        self.routes(server)
        self._runner = aioweb.AppRunner(server, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await aioweb.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    def routes(self, server: aioweb.Application) -> None:
        """Further ones, of a node that can do more."""

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def join(self, *pools: dict[str, Any]) -> DialledNode:
        """The minimal registration; the control reads the rest from GET /v2/pools."""
        if pools:
            self.pools = list(pools)
        body = {"node_id": self.node_id, "address": self.address, "pools": [p["pool_id"] for p in self.pools]}
        status, answer = await self._cluster.post("/v2/nodes/register", body | {"capabilities": {}}, who="node")
        assert status == 200, answer
        await self._cluster.bound(self.node_id)
        return self

    async def asked(self) -> HttpAttempt:
        self._taken += 1
        await eventually(lambda: len(self.opened) >= self._taken, within_s=5, what=f"an infer at {self.node_id}")
        return self.opened[self._taken - 1]

    async def _report(self, request: aioweb.Request) -> aioweb.StreamResponse:
        self.tokens.add(request.headers.get("Authorization", ""))
        raw = json.dumps({"pools": self.pools}).encode()
        response = aioweb.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if self.pause_reports:
            await response.write(raw[: self.pause_reports])
            await asyncio.sleep(0.05)  # so that the rest is another read
            raw = raw[self.pause_reports :]
        await response.write(raw)
        return response

    async def _report_one(self, request: aioweb.Request) -> aioweb.StreamResponse:
        return aioweb.json_response(next(p for p in self.pools if p["pool_id"] == request.match_info["pool"]))

    async def _infer(self, request: aioweb.Request) -> aioweb.StreamResponse:
        given = {name.lower(): value for name, value in request.headers.items()}
        header = {
            "task_id": given["x-llorch-task"],
            "attempt": given["x-llorch-attempt"],
            "pool_id": request.match_info["pool"],
            "headers": given,
        }
        attempt = HttpAttempt(self.node_id, header, await request.read())
        self.opened.append(attempt)
        try:
            first = await attempt.script.get()
            if attempt.status is not None:
                return aioweb.Response(status=attempt.status, body=first, content_type="application/json")
            response = aioweb.StreamResponse(headers={"Content-Type": attempt.content_type})
            if first:
                await response.prepare(request)
            data = first
            while data is not None:
                if not data:
                    assert request.transport is not None
                    request.transport.abort()
                    break
                await response.write(data)
                data = await attempt.script.get()
            return response
        except (asyncio.CancelledError, ConnectionError):
            attempt.gone.set()
            raise

    async def _delete(self, request: aioweb.Request) -> aioweb.StreamResponse:
        self.deleted.append(request.match_info["task"])
        return aioweb.json_response({}, status=202)


# ---------------------------------------------------------------- the control


@dataclass
class Answered:
    """A whole answer. `cut`: the connection broke before its end."""

    status: int
    headers: Mapping[str, str]
    raw: bytes
    cut: bool = False

    @property
    def text(self) -> str:
        return self.raw.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])

    @property
    def events(self) -> list[tuple[str, Any]]:
        return [
            (event.event, json.loads(event.data) if event.data != "[DONE]" else event.data)
            for event in sse.Decoder().feed(self.raw)
        ]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    @property
    def terminals(self) -> list[str]:
        return [name for name in self.names if name in ("end", "error")]

    @property
    def said(self) -> str:
        return "".join(value["t"] for name, value in self.events if name == "token")


class Asking:
    """A request under way. `so_far` is what has come; `answer()` waits for all of it."""

    def __init__(self, session: aiohttp.ClientSession, method: str, url: str, **more: Any) -> None:
        self.so_far = b""
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}
        self.go_on = asyncio.Event()
        self.go_on.set()
        self._task = asyncio.create_task(self._ask(session, method, url, more))

    async def _ask(self, session: aiohttp.ClientSession, method: str, url: str, more: dict[str, Any]) -> Answered:
        cut = False
        async with session.request(method, url, **more) as response:
            self.status, self.headers = response.status, response.headers
            try:
                async for chunk in response.content.iter_any():
                    self.so_far += chunk
            except aiohttp.ClientPayloadError:
                cut = True
        return Answered(response.status, self.headers, self.so_far, cut)

    async def answer(self) -> Answered:
        return await asyncio.wait_for(asyncio.shield(self._task), 10)

    async def has(self, piece: bytes) -> None:
        await eventually(lambda: piece in self.so_far, within_s=5, what=f"{piece!r} at the client")

    async def began(self) -> None:
        await eventually(lambda: self.status is not None, within_s=5, what="a status at the client")

    @property
    def done(self) -> bool:
        return self._task.done()

    async def leave(self) -> None:
        """The client goes: its connection is closed."""
        self._task.cancel()
        await asyncio.wait((self._task,))


class ControlUnderTest:
    def __init__(self, session: aiohttp.ClientSession, control: Any, server: Any) -> None:
        self.session = session
        self.control = control
        self.server = server
        self.url: str = server.url
        self.port: int = server.port
        self._nodes: list[LinkedNode | DialledNode] = []

    # ---- nodes

    def node(self, node_id: str) -> LinkedNode:
        made = LinkedNode(self, node_id)
        self._nodes.append(made)
        return made

    async def join(self, node_id: str, *pools: dict[str, Any], **more: Any) -> LinkedNode:
        return await self.node(node_id).join(*pools, **more)

    async def dialled(self, node_id: str, *pools: dict[str, Any]) -> DialledNode:
        made = DialledNode(self, node_id)
        self._nodes.append(made)
        return await (await made.start()).join(*pools)

    async def linked(self, node_id: str) -> None:
        await eventually(lambda: self.control.links.get(node_id) is not None, within_s=5, what=f"{node_id}'s link")

    async def bound(self, node_id: str) -> None:
        async def look() -> bool:
            return all(p["bound"] for p in (await self.get(f"/v2/nodes/{node_id}"))["pools"])

        await eventually(look, within_s=5, what=f"{node_id} bound")

    async def idle(self) -> None:
        """No claim is held any more, and every node has its slots back."""

        async def look() -> bool:
            return all(p["in_flight"] == 0 for p in (await self.get("/v2/pools"))["pools"])

        await eventually(look, within_s=5, what="every claim released")
        assert self.control.dispatcher.tasks.running == 0

    # ---- clients

    def ask(self, method: str, path: str, *, who: str | None = "alice", **more: Any) -> Asking:
        headers = bearer(who) | more.pop("headers", {})
        return Asking(self.session, method, self.url + path, headers=headers, **more)

    async def get(self, path: str, *, who: str = "alice") -> Any:
        answer = await self.ask("GET", path, who=who).answer()
        assert answer.status == 200, answer.text
        return answer.json

    async def post(self, path: str, body: Any, *, who: str | None = "alice") -> tuple[int, Any]:
        answer = await self.ask("POST", path, who=who, json=body).answer()
        return answer.status, answer.json

    def submit(self, *, who: str = "alice", accept: str = "text/event-stream", **body: Any) -> Asking:
        """A native task."""
        body = {"model": MODEL, "prompt": "Hello"} | body
        return self.ask("POST", "/v2/tasks", who=who, json=body, headers={"Accept": accept})

    def whole(self, **body: Any) -> Asking:
        """A native task, waited for as JSON."""
        return self.submit(accept="application/json", **body)

    def chat(self, stream: bool = True, headers: dict[str, str] | None = None, **body: Any) -> Asking:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": stream} | body
        return self.ask("POST", "/v1/chat/completions", json=body, headers=headers or {})

    def events(self, task_id: str, after: str = "", *, who: str = "alice", **headers: str) -> Asking:
        query = f"?after={after}" if after else ""
        return self.ask("GET", f"/v2/tasks/{task_id}/events{query}", who=who, headers=headers)

    async def task(self, task_id: str, *, who: str = "alice") -> Any:
        return await self.get(f"/v2/tasks/{task_id}", who=who)

    async def state(self, task_id: str, state: str) -> None:
        async def look() -> bool:
            return bool((await self.task(task_id))["state"] == state)

        await eventually(look, within_s=5, what=f"the task {state}")

    async def waiting(self, count: int) -> None:
        def look() -> bool:
            return len([t for t in self.control.dispatcher.tasks.running_tasks() if t.state == "queued"]) == count

        await eventually(look, within_s=5, what=f"{count} tasks in the queue")

    async def metric(self, name: str, **labels: str) -> float:
        """The value of one sample; 0 if there is none."""
        text = (await self.ask("GET", "/metrics").answer()).text
        for line in text.splitlines():
            if line.startswith(name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rpartition(" ")[2])
        return 0.0

    async def close(self) -> None:
        for node in self._nodes:
            await (node.cut() if isinstance(node, LinkedNode) else node.close())


@contextlib.asynccontextmanager
async def a_control(**more: Any) -> AsyncIterator[ControlUnderTest]:
    """A control with these settings, and everything closed at the end."""
    with (
        mock.patch.object(app.tls, "client_context", lambda _ca: _CLIENT_TLS),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True, dir=_MEMORY) as folder,
    ):
        async with _a_control(**{"data_dir": folder, **more}) as running:
            yield running


@contextlib.asynccontextmanager
async def _a_control(**more: Any) -> AsyncIterator[ControlUnderTest]:
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        app.serving(settings(**more)) as (control, server),
    ):
        running = ControlUnderTest(session, control, server)
        try:
            yield running
        finally:
            await running.close()


__all__ = [
    "MODEL", "TOKENS", "WINDOW", "Answered", "Asking", "Attempt", "ControlUnderTest", "DialledNode", "LinkedNode",
    "Stream", "a_control", "bearer", "error_wire", "eventually", "look_often", "lost_soon", "no_answer_soon",
    "ping_soon", "pool", "settings",
]  # fmt: skip
