"""The two ends of a link, played by someone who means harm: a node towards a control, a control towards a node.

Each does what it takes to get a link (registers, or answers a registration), then says on it what its role may say with
parts of it changed, in any order, or plain noise. What it is told back is thrown away: the other process is to live.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable

import aiohttp

from llorch import records
from llorch.records import Type
from tests.fuzz.mutate import changed_json
from tests.fuzz.values import anything, write

MODEL = "hostile"  # whoever asks for it gets what this node makes up
EVENT = b'id: 000000000001\nevent: token\ndata: {"t": "a", "i": 0}\n\n'
READ_FOR_S = 0.3
EPOCH = "hostile-epoch"


def _json(rng: random.Random, value: object) -> bytes:
    raw = json.dumps(value).encode()
    return raw if rng.random() < 0.6 else changed_json(rng, raw) if rng.random() < 0.8 else write(anything(rng))


def _record(rng: random.Random, stream: int, kind: int, payload: bytes) -> bytes:
    """Mostly that record; sometimes on another stream, of another type, or with a length that lies."""
    pick = rng.random()
    if pick < 0.03:
        stream = rng.choice((0, 2, stream + 2, 2**32 - 1))
    elif pick < 0.06:
        kind = rng.randrange(256)
    elif pick < 0.07:
        return records.HEADER.pack(stream, kind, rng.choice((0, len(payload) + 1, 65_527, 65_528, 2**32 - 1))) + payload
    return records.encode(stream, kind, payload[: records.MAX_PAYLOAD_BYTES])


def node_words(rng: random.Random, stream: int) -> bytes:
    """What a node may say on a stream, most of the time in an order that makes sense."""
    head = {"status": rng.choice((200, 200, 404, 500)), "headers": {"content-type": "text/event-stream"}}
    error = rng.choice((None, {"code": "ENGINE_FAILED", "message": "x", "retriable": True}))
    tail = {
        "length": len(EVENT),
        "finish_reason": "stop",
        "timings": {"ttft_ms": 1},
        "sha256": "0" * 64,
        "error": error,
    }
    said = [
        (Type.ACCEPT, b""),
        (Type.HEAD, _json(rng, head)),
        (Type.DATA, rng.choice((EVENT, EVENT, b"", b"x" * 50_000, b"\xff"))),
        (Type.TAIL, _json(rng, tail)),
        (Type.REFUSE, _json(rng, error or {"code": "ALL_SLOTS_BUSY", "message": "x"})),
        (Type.CREDIT, rng.choice((b"\0\0\0\1", b"\xff\xff\xff\xff", b"\0"))),
        (Type.DETACH, b"lost"),
    ]
    if rng.random() < 0.5:
        rng.shuffle(said)
    return b"".join(_record(rng, stream, *one) for one in said[: rng.randrange(1, len(said) + 1)])


def control_words(rng: random.Random, stream: int) -> bytes:
    """What a control may say on a stream of its own."""
    body = json.dumps({"model": "sim", "prompt": "x", "max_tokens": 2}).encode()
    task_id = f"00000000-0000-0000-0000-{rng.randrange(16):012x}"
    opening = {
        "task_id": task_id,
        "pool_id": "p0",
        "path": "native",
        "attempt": rng.randrange(1, 4),
        "body_len": len(body),
    }
    call = {"method": "GET", "path": rng.choice(("/v2/pools", "/v2/tasks", "/livez", "/%00", "//", "")), "headers": {}}
    said = [
        (Type.OPEN, _json(rng, rng.choice((opening, opening, call)))),
        (Type.BODY, rng.choice((body, body, changed_json(rng, body), body[:5], b"x" * 60_000))),
        (Type.CREDIT, rng.choice((b"\0\0\0\1", b"\0\2\0\0", b"\xff\xff\xff\xff", b"\0"))),
        (Type.ATTACH, _json(rng, {"task_id": task_id, "offset": rng.randrange(-1, 300)})),
        (Type.CANCEL, rng.choice((b"", records.SURPLUS))),
        (Type.DETACH, rng.choice((b"left", b"lost", b"\xff"))),
    ]
    if rng.random() < 0.3:
        rng.shuffle(said)
    return b"".join(_record(rng, stream, *one) for one in said[: rng.randrange(1, len(said) + 1)])


class Counted:
    """How much was said, and whether anybody listened."""

    def __init__(self) -> None:
        self.links = self.records_heard = self.bytes_said = 0

    def __str__(self) -> str:
        return f"{self.links} links, {self.bytes_said >> 10} KiB said, {self.records_heard} records heard"


async def _talk(
    rng: random.Random,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    counted: Counted,
    react: Callable[[records.Record], bytes],
) -> None:
    """Answer each record with `react` until the other end has had enough, or for a while."""
    decoder = records.Decoder()
    counted.links += 1
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(rng.choice((READ_FOR_S, 4 * READ_FOR_S))):
            while data := await reader.read(65_536):
                for record in decoder.feed(data):
                    counted.records_heard += 1
                    said = react(record)
                    counted.bytes_said += len(said)
                    writer.write(said)
                await writer.drain()
                if rng.random() < 0.02:
                    writer.write(rng.randbytes(rng.randrange(1, 200)))


async def node(url: str, token: str, seed: int, counted: Counted) -> None:
    """Register as `fz-hostile`, link, and answer what is asked; again and again, until cancelled."""
    rng = random.Random(f"node/{seed}")
    pools = [{"pool_id": "p0", "model": MODEL, "state": "ready", "ready": True, "slots_total": 64, "slots_free": 64}]
    wish = {"node_id": "fz-hostile", "boot_id": "b", "pools": pools, "capabilities": {"gpus": []}}
    host, _, port = url.removeprefix("http://").partition(":")
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
        while True:
            async with session.post(f"{url}/v2/nodes/register", json=wish) as answer:
                lease = (await answer.json()).get("lease_id", "")
            await _as_node(rng, host, int(port), token, lease, counted)
            await asyncio.sleep(0.02)


async def _as_node(rng: random.Random, host: str, port: int, token: str, lease: str, counted: Counted) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(
            f"GET /v2/nodes/fz-hostile/link HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            f"Connection: Upgrade\r\nUpgrade: {records.UPGRADE}\r\nX-Llorch-Lease: {lease}\r\n\r\n".encode()
        )
        if b" 101 " in await reader.readuntil(b"\r\n\r\n"):
            await _talk(rng, reader, writer, counted, lambda record: node_words(rng, record.stream))
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def control(seed: int, counted: Counted):  # type: ignore[no-untyped-def]
    """A control that nodes can join. Gives its URL."""
    rng = random.Random(f"control/{seed}")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"/link " in head:
                    await _link(reader, writer)
                    return
                lengths = [line[15:] for line in head.split(b"\r\n") if line[:15].lower() == b"content-length:"]
                await reader.readexactly(int(lengths[0]) if lengths else 0)
                body = _answer(rng)
                length = f"Content-Length: {len(body)}\r\n\r\n".encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + length + body)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the node has had enough
        finally:
            writer.transport.abort()

    async def _link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {records.UPGRADE}\r\n"
            f"X-Llorch-Epoch: {EPOCH}\r\n\r\n".encode()
        )
        streams = iter(range(1, 2**31, 2))
        writer.write(b"".join(control_words(rng, next(streams)) for _ in range(30)))
        await _talk(rng, reader, writer, counted, lambda _: control_words(rng, next(streams)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def _answer(rng: random.Random) -> bytes:
    """To a registration or a beat: mostly one that can be used."""
    good = {
        "success": True, "node_id": "n1", "lease_id": "lease", "epoch": EPOCH, "heartbeat_interval_ms": 500,
        "offline_after_ms": 30_000, "next_heartbeat_ms": 500,
    }  # fmt: skip
    raw = json.dumps(good).encode()
    return changed_json(rng, raw) if rng.random() < 0.1 else raw
