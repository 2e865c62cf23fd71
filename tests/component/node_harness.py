"""A node without its supervisor, between two stand-ins: a scripted engine below, a scripted control above.

The node's parts are the real ones and talk over real sockets: pools, runner, links, memberships, routes through
`serve()`. What the stand-ins do, and when, is the test's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aiohttp
from aiohttp import web as aioweb

from llorch import listen, records, web
from llorch.auth import Scope, TokenRing
from llorch.link import Link
from llorch.node import pool_events as ev
from llorch.node.calls import LinkCalls
from llorch.node.credentials import TokenCredentials
from llorch.node.engine_connections import engines
from llorch.node.handoff import Handoff
from llorch.node.heartbeat import Membership
from llorch.node.metrics import NodeMetrics
from llorch.node.pools import Pools
from llorch.node.reports import Identity
from llorch.node.retention import Limits, TaskLogs
from llorch.node.routes import routes
from llorch.node.runner import Runner
from llorch.node.state import NODE, Node
from llorch.records import Record, RecordError, Type
from llorch.tasks import Guard
from tests.cluster import eventually

SERVICE_TOKEN = "service-token-of-the-test-0123456789"
NODE_TOKEN = "node-token-of-the-test-0123456789abc"
ENGINE_KEY = "key-of-the-scripted-engine"
MODEL = "m"
POOL = "p0"


# ---------------------------------------------------------------- the engine


class Call:
    """One request at the scripted engine. The test says what is answered, and when."""

    def __init__(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> None:
        self.path, self.headers, self.body = path, headers, body
        self.script: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.disconnected = asyncio.Event()
        self.status = 200
        self.answer: bytes | None = None  # instead of a stream
        self.go = asyncio.Event()  # the head is sent when this is set

    def say(self, *texts: str) -> None:
        """Stream tokens."""
        self.go.set()
        for text in texts:
            self.script.put_nowait(_chunk({"choices": [{"index": 0, "text": text, "finish_reason": None}]}))

    def end(self, tokens_in: int = 3, tokens_out: int = 2) -> None:
        """finish_reason, usage, [DONE]."""
        self.go.set()
        self.script.put_nowait(_chunk({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}))
        usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
        self.script.put_nowait(_chunk({"choices": [], "usage": usage}))
        self.script.put_nowait(b"data: [DONE]\n\n")
        self.script.put_nowait(None)

    def cut(self) -> None:
        """The connection breaks."""
        self.go.set()
        self.script.put_nowait(b"")

    def reply(self, body: bytes, status: int = 200) -> None:
        """One whole answer."""
        self.status, self.answer = status, body
        self.go.set()


def _chunk(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


class ScriptedEngine:
    """Stands in for an engine. `calls` are what it was asked."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[Call] = asyncio.Queue()
        self.url = ""
        self._runner: aioweb.AppRunner | None = None

    async def start(self) -> None:
        app = aioweb.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/{rest:.*}", self._answer)
        self._runner = aioweb.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = aioweb.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def asked(self) -> Call:
        return await asyncio.wait_for(self.calls.get(), 10)

    async def _answer(self, request: aioweb.Request) -> aioweb.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        call = Call(request.path, headers, await request.json())
        self.calls.put_nowait(call)
        try:
            await call.go.wait()
            if call.answer is not None:
                return aioweb.Response(body=call.answer, status=call.status, content_type="application/json")
            response = aioweb.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            while (data := await call.script.get()) is not None:
                if not data:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                await response.write(data)
            await response.write_eof()
            return response
        except (asyncio.CancelledError, ConnectionError):
            call.disconnected.set()
            raise


# ---------------------------------------------------------------- the control


@dataclass
class Stream:
    """What the node sent on one stream, by kind; `credit` is granted as the test says."""

    id: int
    events: deque[Record] = field(default_factory=deque)
    data: bytes = b""
    head: dict[str, Any] | None = None
    tail: dict[str, Any] | None = None
    refused: dict[str, Any] | None = None
    accepted: bool = False
    credit_received: int = 0
    order: list[int] = field(default_factory=list)

    @property
    def events_seen(self) -> list[tuple[str, dict[str, Any]]]:
        """The native events in the data."""
        found = []
        for block in self.data.decode().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
            if "event" in fields:
                found.append((fields["event"], json.loads(fields["data"])))
        return found

    @property
    def text(self) -> str:
        return "".join(value["t"] for event, value in self.events_seen if event == "token")


class ScriptedLink:
    """The control's end of a link, in the hands of the test (a link.LinkOwner)."""

    def __init__(self) -> None:
        self.connection: Link | None = None
        self.streams: dict[int, Stream] = defaultdict(lambda: Stream(0))
        self.reason: str | None = None
        self._next = 1
        self._news = asyncio.Event()

    def link_record(self, record: Record) -> None:
        stream = self.streams.get(record.stream)
        if stream is None:
            raise RecordError("the node opened a stream")
        kind = Type(record.type)
        stream.order.append(kind)
        if kind is Type.DATA:
            stream.data += record.payload
        elif kind is Type.HEAD:
            stream.head = json.loads(record.payload)
        elif kind is Type.TAIL:
            stream.tail = json.loads(record.payload)
        elif kind is Type.REFUSE:
            stream.refused = json.loads(record.payload)
        elif kind is Type.ACCEPT:
            stream.accepted = True
        elif kind is Type.CREDIT:
            stream.credit_received += records.decode_credit(record.payload)

    def link_lost(self, reason: str) -> None:
        self.reason = reason

    def link_writable(self) -> None:
        pass

    def send(self, stream_id: int, kind: int, payload: bytes = b"") -> None:
        assert self.connection is not None
        self.connection.send(records.encode(stream_id, kind, payload))

    def stream(self) -> Stream:
        made = self.streams[self._next] = Stream(self._next)
        self._next += 2
        return made

    def open(self, body: object, *, send_body: bool = True, **header: Any) -> Stream:
        """OPEN a task, with its body (as far as the first window)."""
        made = self.stream()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        opening = {
            "task_id": str(uuid.uuid4()),
            "attempt": 1,
            "pool_id": POOL,
            "model": MODEL,
            "path": "native",
            "owner": "o",
            "epoch": "epoch-1",
            "headers": {},
            "body_len": len(raw),
            "prefix_len": 0,
        } | header
        made_id = made.id
        self.send(made_id, Type.OPEN, json.dumps(opening).encode())
        if send_body:
            for piece in records.encode_cut(made_id, Type.BODY, raw):
                assert self.connection is not None
                self.connection.send(piece)
        return made

    def prompt(self, **header: Any) -> Stream:
        return self.open({"model": MODEL, "prompt": "Hello"}, **header)

    def attach(self, task_id: str, offset: int = 0, **more: int) -> Stream:
        made = self.stream()
        self.send(made.id, Type.ATTACH, json.dumps({"task_id": task_id, "offset": offset, **more}).encode())
        return made

    def grant(self, stream: Stream, count: int) -> None:
        assert self.connection is not None
        self.connection.send(records.encode_credit(stream.id, count))


class ScriptedControl:
    """Stands in for a control: registration, heartbeats and the link, with answers that the test may change."""

    def __init__(self) -> None:
        self.epoch = "epoch-1"
        self.registered: list[dict[str, Any]] = []
        self.beats: list[dict[str, Any]] = []
        self.gone: list[str] = []
        self.links: list[ScriptedLink] = []
        self.refuse_beats: tuple[int, str] | None = None
        self.refuse_link: tuple[int, str] | None = None
        self.interval_ms = 10_000
        self.meanwhile: Callable[[], None] = lambda: None  # called between a registration and its answer
        self.url = ""
        self._server: listen.Server | None = None
        self._port = 0

    async def start(self) -> None:
        table = (
            web.Route("POST", "/v2/nodes/register", Scope.NODE, self._register, ""),
            web.Route("POST", "/v2/nodes/{node}/heartbeat", Scope.NODE, self._beat, ""),
            web.Route("DELETE", "/v2/nodes/{node}", Scope.NODE, self._leave, ""),
            web.Route("GET", "/v2/nodes/{node}/link", Scope.NODE, self._link, ""),
        )
        ring = TokenRing([("node", NODE_TOKEN, frozenset({Scope.NODE}))])
        app = web.make_app(table, web.Gate(ring=lambda: ring), max_body_bytes=1 << 24)
        self._server = await listen.serve(app, "127.0.0.1", self._port, shutdown_timeout_s=0.2)
        self._port = self._server.port
        self.url = self._server.url

    async def close(self) -> None:
        for link in self.links:
            if link.connection is not None:
                link.connection.abort("the control ends")
        if self._server is not None:
            await self._server.close()
            self._server = None

    @property
    def link(self) -> ScriptedLink:
        return self.links[-1]

    async def linked(self, count: int = 1) -> ScriptedLink:
        await eventually(lambda: len(self.links) >= count, what="the node's link")
        return self.link

    async def _register(self, request: aioweb.Request) -> aioweb.StreamResponse:
        self.registered.append(await request.json())
        self.meanwhile()
        return web.json_response(
            {
                "success": True,
                "lease_id": f"lease-{len(self.registered)}",
                "epoch": self.epoch,
                "heartbeat_interval_ms": self.interval_ms,
            }
        )

    async def _beat(self, request: aioweb.Request) -> aioweb.StreamResponse:
        self.beats.append(await request.json())
        if self.refuse_beats is not None:
            status, code = self.refuse_beats
            if not code:  # something else answers there
                return web.json_response(["nothing", "of", "ours"], status=status)
            return web.json_response({"error": {"code": code, "message": code}}, status=status)
        return web.json_response({"success": True, "next_heartbeat_ms": self.interval_ms})

    async def _leave(self, request: aioweb.Request) -> aioweb.StreamResponse:
        self.gone.append(request.match_info["node"])
        return web.json_response({"success": True})

    async def _link(self, request: aioweb.Request) -> aioweb.StreamResponse:
        if self.refuse_link is not None:
            status, code = self.refuse_link
            return web.json_response({"error": {"code": code, "message": code}}, status=status)
        assert request.headers["Upgrade"] == records.UPGRADE
        assert request.headers["X-Llorch-Lease"] == f"lease-{len(self.registered)}"
        transport = cast(asyncio.Transport, request.transport)
        link = ScriptedLink()
        connection = link.connection = Link(link, request.protocol)
        transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
            + f"Upgrade: {records.UPGRADE}\r\nX-Llorch-Epoch: {self.epoch}\r\n\r\n".encode()
        )
        connection.start(transport)
        self.links.append(link)
        await asyncio.shield(connection.lost)
        raise ConnectionResetError


# ---------------------------------------------------------------- the node


class NodeUnderTest:
    """The real parts of a node, put together as app.py does, with one pool at the scripted engine."""

    def __init__(self, folder: Path, engine_url: str, slots: int, limits: Limits) -> None:
        key_file = folder / "engine.key"
        key_file.write_text(ENGINE_KEY)
        self.pools = Pools()
        handoff = Handoff(
            pool_id=POOL,
            replica_id="r0",
            engine="external",
            url=engine_url,
            model=MODEL,
            slots=slots,
            api_key_file=str(key_file),
        )
        (probe,) = self.pools.handle(ev.HandoffSeen(handoff), 0.0)
        assert isinstance(probe, ev.Probe)
        self.pools.handle(ev.ProbeOk(POOL, "r0", probe.probe), 0.0)
        self.logs = TaskLogs(limits)
        self.metrics = NodeMetrics("n1")
        self.memberships: list[Membership] = []
        self.guard = Guard("test")
        self._exits = contextlib.AsyncExitStack()
        self.url = ""

    async def start(self, controls: list[ScriptedControl], *, early_beat_s: float = 0.25) -> None:
        asking = await self._exits.enter_async_context(engines())
        self.session = await self._exits.enter_async_context(web.client_session())
        self.runner = Runner(
            "n1", self.pools, self.logs, asking, self.metrics, max_body_bytes=64 << 20, changed=self._changed
        )
        self.pools.subscribe(lambda _pool: self._changed())
        self.node = Node(
            node_id="n1",
            pools=self.pools,
            runner=self.runner,
            metrics=self.metrics,
            max_body_bytes=64 << 20,
            slow_reader_timeout_s=30.0,
        )
        self.metrics.scrape(self.node.pool_reports, self.node.gpu_reports, self.node.model_reports)
        ring = TokenRing([("default", SERVICE_TOKEN, frozenset({Scope.CONTROL, Scope.METRICS}))])
        app = web.make_app(routes(), web.Gate(ring=lambda: ring), max_body_bytes=64 << 20)
        app[NODE] = self.node
        server = await listen.serve(app, "127.0.0.1", 0, shutdown_timeout_s=0.2)
        self._exits.push_async_callback(server.close)
        self.url = server.url
        self.guard.loop(self.runner.sweep, "sweep")
        calls = LinkCalls(self.node)
        identity = Identity("n1", "boot-1", "0", 1, 1)
        self.memberships = [
            Membership(
                self.node,
                identity,
                control.url,
                TokenCredentials(lambda: NODE_TOKEN, None),
                self.session,
                calls,
                early_beat_s=early_beat_s,
            )
            for control in controls
        ]
        self.members = Guard("test.members")
        for membership in self.memberships:
            self.members.spawn(membership.run(), membership.url)

    def _changed(self) -> None:
        for membership in self.memberships:
            membership.notify()

    async def close(self) -> None:
        await self.runner.close()
        await self.members.close()
        for membership in self.memberships:
            await membership.leave()
        await self.guard.close()
        await self._exits.aclose()

    @property
    def slots_free(self) -> int:
        return int(self.pools.pool_report(POOL)["slots_free"])

    def request(self, method: str, path: str, *, token: str | None = SERVICE_TOKEN, **more: Any) -> Any:
        headers = more.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
        return self.session.request(method, self.url + path, headers=headers, **more)


@dataclass
class Setup:
    engine: ScriptedEngine
    control: ScriptedControl
    node: NodeUnderTest

    async def link(self) -> ScriptedLink:
        return await self.control.linked()


@contextlib.asynccontextmanager
async def node_between(
    folder: Path,
    *,
    slots: int = 2,
    limits: Limits | None = None,
    controls: int = 1,
    early_beat_s: float = 0.25,
    engine_url: str | None = None,
) -> AsyncIterator[Setup]:
    """A node with one pool, joined to a scripted control. `engine_url`: an engine of the test's own."""
    engine, control = ScriptedEngine(), ScriptedControl()
    await engine.start()
    await control.start()
    node = NodeUnderTest(folder, engine_url or engine.url, slots, limits or Limits())
    await node.start([control] if controls else [], early_beat_s=early_beat_s)
    try:
        yield Setup(engine, control, node)
    finally:
        await node.close()
        await control.close()
        await engine.close()


__all__ = ["MODEL", "POOL", "SERVICE_TOKEN", "Setup", "aiohttp", "eventually", "node_between"]
