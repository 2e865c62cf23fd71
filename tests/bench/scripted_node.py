"""A node that is a script: to a control it is one, and behind it is nothing.

It registers, opens its link, beats with whole reports, and answers every OPEN with ACCEPT, HEAD, paced DATA and a TAIL
that counts it, within the credit it was given. A token's text is the monotonic nanosecond at which it was sent, so that
who reads it on the same machine knows how long it was under way. Many of them fit into one process: a token costs a
timer and a write. Real ones also send a delta 250 ms after a change; these beat at their interval alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

from llorch import records
from llorch.records import Record, SendCredit, Type
from tests.bench.clients import Answer, Connection, connect, post

STREAM_HEAD = {"status": 200, "headers": {"content-type": "text/event-stream"}}
DONE = b"data: [DONE]\n\n"
LINKED_WITHIN_S = 10.0


def event(stamp_ns: int) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % stamp_ns


@dataclass(frozen=True, slots=True)
class Plan:
    """What every node of a load is like. `models`: one for each of its pools."""

    models: tuple[str, ...]
    slots: int
    tokens: int
    interval_s: float


@dataclass(slots=True, eq=False)
class Stream:
    """One attempt that is being answered."""

    id: int
    opening: dict[str, Any]
    credit: SendCredit = field(default_factory=SendCredit)
    sent: int = 0  # tokens
    offset: int = 0  # bytes
    held: bool = False  # for want of credit
    timer: asyncio.TimerHandle | None = None


class ScriptedNode:
    """`running`: its streams by id. `lost`: why its link ended, if it did before it was closed."""

    def __init__(self, node_id: str, port: int, token: str, plan: Plan) -> None:
        self.node_id = node_id
        self.running: dict[int, Stream] = {}
        self.beats_s: list[float] = []  # the round trip of each beat
        self.refused: list[str] = []
        self.lost: str | None = None
        self._port = port
        self._token = token
        self._plan = plan
        self._lease_id = ""
        self._interval_s = 0.0
        self._seq = 0
        self._http: Connection | None = None
        self._answered: asyncio.Future[Answer] | None = None
        self._link: Link | None = None
        self._beating: asyncio.Task[None] | None = None

    async def join(self, first_beat_s: float | None = None) -> None:
        """Register, open the link, and beat from then on: for the first time after `first_beat_s`, if given."""
        self._http = await connect(self._port, None, self._done)
        body = {"node_id": self.node_id, "boot_id": f"boot-{self.node_id}", "pools": self._pools()}
        told = await self._call("/v2/nodes/register", body)
        self._lease_id, self._interval_s = told["lease_id"], told["heartbeat_interval_ms"] / 1_000
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(LINKED_WITHIN_S):
            _, self._link = await loop.create_connection(lambda: Link(self), "127.0.0.1", self._port)
            self._link.open(self.node_id, self._lease_id, self._token)
            await self._link.up
        wait_s = self._interval_s if first_beat_s is None else first_beat_s
        self._beating = asyncio.create_task(self._beat_on(wait_s), name=f"beat.{self.node_id}")

    async def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait((self._beating,))
        for stream in self.running.values():
            if stream.timer is not None:
                stream.timer.cancel()
        if self._link is not None:
            self._link.close()
        if self._http is not None:
            self._http.close()

    # ---- what it tells

    def _pools(self) -> list[dict[str, Any]]:
        return [self._pool(f"p{number}", model) for number, model in enumerate(self._plan.models)]

    def _pool(self, pool_id: str, model: str) -> dict[str, Any]:
        taken = sum(stream.opening["pool_id"] == pool_id for stream in self.running.values())
        return {
            "pool_id": pool_id, "engine": "scripted", "model": model, "state": "ready", "ready": True,
            "slots_total": self._plan.slots, "slots_free": max(0, self._plan.slots - taken),
            "ctx": 4096, "vram_total_bytes": 24 << 30, "vram_free_bytes": 4 << 30,
        }  # fmt: skip

    def _tasks(self) -> list[dict[str, Any]]:
        known = ("task_id", "attempt", "epoch", "owner", "path", "body_digest", "model", "pool_id")
        return [
            {name: stream.opening.get(name) for name in known}
            | {"state": "running", "offset": stream.offset, "tokens_out": stream.sent}
            for stream in self.running.values()
        ]

    async def _beat_on(self, wait_s: float) -> None:
        with contextlib.suppress(RuntimeError):  # what was refused is in `refused`
            while True:
                await asyncio.sleep(wait_s)
                wait_s = self._interval_s
                await self.beat()

    async def beat(self) -> None:
        """One whole report."""
        self._seq += 1
        gpu = {"index": 0, "uuid": f"GPU-{self.node_id}", "name": "scripted", "vram_total_bytes": 24 << 30}
        body = {
            "lease_id": self._lease_id, "boot_id": f"boot-{self.node_id}", "seq": self._seq, "delta": False,
            "pools": self._pools(), "gpus": [gpu], "catalog": [], "tasks": self._tasks(),
        }  # fmt: skip
        began = time.monotonic()
        await self._call(f"/v2/nodes/{self.node_id}/heartbeat", body)
        self.beats_s.append(time.monotonic() - began)

    async def _call(self, path: str, body: object) -> dict[str, Any]:
        """One request on the node's own connection. Raises RuntimeError with the kind of a refusal."""
        assert self._http is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._http.ask(post(path, body, self._token), time.monotonic())
        answer = await self._answered
        if answer.kind is not None:
            self.refused.append(answer.kind)
            raise RuntimeError(f"{self.node_id}: {path}: {answer.kind}")
        return json.loads(answer.body)  # type: ignore[no-any-return]

    def _done(self, _connection: Connection, answer: Answer) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(answer)

    # ---- what its link asks of it

    def take(self, record: Record) -> None:
        kind = record.type
        if kind == Type.OPEN:
            stream = self.running[record.stream] = Stream(record.stream, json.loads(record.payload))
            self._write(records.encode(stream.id, Type.ACCEPT) + records.encode_json(stream.id, Type.HEAD, STREAM_HEAD))
            self._say(stream)
            return
        found = self.running.get(record.stream)
        if kind == Type.PING:
            self._write(records.encode(0, Type.PONG))
        elif kind == Type.CREDIT and found is not None:
            found.credit.grant(records.decode_credit(record.payload))
            if found.held:
                found.held = False
                self._say(found)
        elif kind in (Type.CANCEL, Type.DETACH) and found is not None:
            self._drop(found)

    def _say(self, stream: Stream) -> None:
        """The next token, and a timer for the one after it; after the last of them the end."""
        last = stream.sent == self._plan.tokens
        data = DONE if last else event(time.monotonic_ns())
        if stream.credit.available < len(data):
            stream.held = True
            return
        stream.credit.take(len(data))
        stream.offset += len(data)
        sent = records.encode(stream.id, Type.DATA, data)
        if last:
            tail = {"length": stream.offset, "finish_reason": "length", "tokens_in": 1, "tokens_out": stream.sent}
            self._write(sent + records.encode_json(stream.id, Type.TAIL, tail))
            self._drop(stream)
            return
        self._write(sent)
        stream.sent += 1
        stream.timer = asyncio.get_running_loop().call_later(self._plan.interval_s, self._say, stream)

    def _write(self, encoded: bytes) -> None:
        if self._link is not None:
            self._link.write(encoded)

    def _drop(self, stream: Stream) -> None:
        del self.running[stream.id]
        if stream.timer is not None:
            stream.timer.cancel()


class Link(asyncio.Protocol):
    """The node's end of its link: a request to switch, then records."""

    def __init__(self, node: ScriptedNode) -> None:
        self._node = node
        self._transport: asyncio.Transport | None = None
        self._decoder = records.Decoder()
        self._head: bytes | None = b""
        self.up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def open(self, node_id: str, lease_id: str, token: str) -> None:
        self.write(
            f"GET /v2/nodes/{node_id}/link HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
            f"Connection: Upgrade\r\nUpgrade: {records.UPGRADE}\r\nX-Llorch-Lease: {lease_id}\r\n\r\n".encode()
        )

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._transport, self._node.lost = None, "the control closed it"
        if not self.up.done():
            self.up.set_exception(ConnectionError("the control opened no link"))

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            if not head.startswith(b"HTTP/1.1 101 "):
                self.up.set_exception(ConnectionError("the control refused the link"))
                return
            self._head = None
            self.up.set_result(None)
        for record in self._decoder.feed(data):
            self._node.take(record)
