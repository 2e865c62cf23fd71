"""The parts of the benchmarks that speak to a control: without them a benchmark would measure its own mistakes."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from llorch import records
from llorch.records import Record, Type
from tests.bench import scripted_node
from tests.bench.clients import Answer, Connection, connect, post
from tests.bench.scripted_node import Plan, ScriptedNode, event
from tests.component.control_harness import TOKENS, ControlUnderTest, a_control, eventually


async def asked(control: ControlUnderTest, *requests: bytes) -> list[Answer]:
    """The answers to requests that one connection sends one after the other."""
    answers: asyncio.Queue[Answer] = asyncio.Queue()
    connection = await connect(control.port, None, lambda _connection, answer: answers.put_nowait(answer))
    try:
        got = []
        for request in requests:
            connection.ask(request, time.monotonic())
            got.append(await asyncio.wait_for(answers.get(), 10))
        return got
    finally:
        connection.close()


def chat(model: str, token: str = TOKENS["alice"]) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": "go"}], "stream": True}
    return post("/v1/chat/completions", body, token)


async def test_a_scripted_node_serves_whole_streams_through_a_real_control_and_beats() -> None:
    plan = Plan(("a", "b"), slots=2, tokens=5, interval_s=0.001)
    async with a_control() as control:
        node = ScriptedNode("n1", control.port, TOKENS["node"], plan)
        try:
            await node.join()
            await control.bound("n1")
            before = time.monotonic_ns()
            answers = await asked(control, chat("a"), chat("b"))
            for answer in answers:
                assert (answer.status, answer.kind) == (200, None)
                assert answer.due <= answer.began_at <= answer.ended_at
                stamps = [int(part.partition(b'"')[0]) for part in bytes(answer.body).split(b'"content":"')[1:]]
                assert len(stamps) == 5
                assert before < stamps[0] < stamps[-1] < time.monotonic_ns()
                assert answer.body == b"".join(map(event, stamps)) + scripted_node.DONE
            await node.beat()
            await control.idle()
            assert (await control.get("/v2/nodes/n1"))["state"] == "online"
            assert (len(node.beats_s), node.refused, node.lost, node.running) == (1, [], None, {})
        finally:
            await node.close()


class Recorded:
    """A link that keeps what is written to it."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._decoder = records.Decoder()

    def write(self, data: bytes) -> None:
        self.records += self._decoder.feed(data)

    def close(self) -> None: ...


async def test_a_scripted_node_sends_no_byte_without_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    big = b'data: {"choices":[{"delta":{"content":"%d"}}],"fill":"%s"}\n\n'
    monkeypatch.setattr(scripted_node, "event", lambda stamp: big % (stamp, b"x" * 40_000))
    node, link = ScriptedNode("n1", 0, "", Plan(("a",), slots=1, tokens=5, interval_s=0.0)), Recorded()
    monkeypatch.setattr(node, "_link", link)

    def sent() -> list[bytes]:
        return [record.payload for record in link.records if record.type == Type.DATA]

    node.take(Record(1, Type.OPEN, json.dumps({"pool_id": "p0"}).encode()))
    await eventually(lambda: node.running[1].held, within_s=5)
    assert len(sent()) == 3, "as many as 128 KiB have room for"
    node.take(Record(1, Type.CREDIT, records.encode_credit(1, 130_000)[-4:]))
    await eventually(lambda: not node.running, within_s=5)
    assert len(sent()) == 6
    tail = json.loads(link.records[-1].payload)
    assert (link.records[-1].type, tail["length"], tail["tokens_out"]) == (Type.TAIL, sum(map(len, sent())), 5)


async def test_a_load_tells_refusals_and_lost_connections_apart() -> None:
    async with a_control() as control:
        refused, unknown = await asked(control, chat("a", "wrong"), chat("a"))
        assert (refused.kind, unknown.kind) == ("401 UNAUTHENTICATED", "404 MODEL_NOT_FOUND")

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfive.")
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    ended: list[Answer] = []
    connection: Connection = await connect(
        server.sockets[0].getsockname()[1], None, lambda _connection, answer: ended.append(answer)
    )
    connection.ask(b"GET / HTTP/1.1\r\n\r\n", time.monotonic())
    await eventually(lambda: ended, within_s=5)
    assert (ended[0].kind, bytes(ended[0].body), connection.open) == ("connection lost", b"five.", False)
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1_000])
def test_chunks_are_read_however_they_arrive(cut: int) -> None:
    ended: list[Answer] = []
    pieces: list[bytes] = []
    connection = Connection(lambda _connection, answer: ended.append(answer), pieces.append)
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab\r\nc\r\n1\r\n!\r\n0\r\n\r\n"

    class Nowhere:
        def write(self, _data: bytes) -> None: ...

    connection.connection_made(Nowhere())  # type: ignore[arg-type]
    for _ in range(2):  # the connection is kept
        connection.ask(b"", 0.0)
        for at in range(0, len(raw), cut):
            connection.data_received(raw[at : at + cut])
    assert [bytes(answer.body) for answer in ended] == [b"ab\r\nc!"] * 2
    assert pieces == [b"ab\r\nc", b"!"] * 2
