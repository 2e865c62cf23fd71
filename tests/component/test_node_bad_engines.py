"""Engines that answer garbage, break off, hang or lie, in each phase of an answer: what the log says, and the slot."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llorch.errors import LlorchError
from llorch.messages import decode_json
from llorch.node import execution
from llorch.node import pool_events as ev
from llorch.node import runner as runner_module
from llorch.node.engine_keys import read_key
from llorch.node.handoff import Handoff
from llorch.records import Type
from llorch.sse import MAX_EVENT_BYTES
from tests.component.node_harness import MODEL, POOL, Setup, Stream, eventually, node_between

CHAT = "/v1/chat/completions"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
STREAM = OK + b"\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
JSON_200 = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def token(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


FIRST = event(token("t0 "))
DONE = b"data: [DONE]\n\n"


@dataclass
class RawEngine:
    """Answers every request with the same bytes, then hangs or closes. It knows no HTTP, so that it can break it."""

    answer: bytes = b""
    hangs: bool = False
    then: bytes | None = None  # sent once `go` is set
    go: asyncio.Event = field(default_factory=asyncio.Event)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            await reader.readexactly(int(length[1]) if length else 0)
            self.asked.set()
            writer.write(self.answer)
            if self.then is not None:
                await self.go.wait()
                writer.write(self.then)
            await writer.drain()
            if self.hangs:
                await reader.read()  # b"" once the other side has closed
                self.left.set()
        writer.close()


@contextlib.asynccontextmanager
async def node_with(folder: Path, engine: RawEngine) -> AsyncIterator[Setup]:
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0, limit=1 << 24)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with node_between(folder, engine_url=url) as setup:
            yield setup
    finally:
        server.close()
        await server.wait_closed()


async def ended(stream: Stream) -> dict[str, Any]:
    await eventually(lambda: stream.tail is not None, what=f"TAIL on {stream.id}")
    assert stream.tail is not None
    return stream.tail


async def idle(setup: Setup) -> None:
    """Every slot is free, and nothing holds the task any more."""
    await eventually(lambda: setup.node.slots_free == 2 and not len(setup.node.runner), within_s=2.0)


# What an engine may send in place of an answer, before anything or after a first token in good order.
BROKEN_HEADS = {
    "nothing": b"",
    "no http": b"\x00\xff{]\r\n\r\n",
    "a head that breaks off": b"HTTP/1.1 200 OK\r\nConte",
    "a head without end": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "an error of its own": b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops",
    "a key that it does not take": b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n",
    "a whole answer that was not asked for": JSON_200 + json.dumps(token("t0 ", "stop")).encode(),
    "packed bytes": OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(FIRST * 10_000),
}
BROKEN_BODIES = {
    "an end with no word": (STREAM, b""),
    "an end in an event": (STREAM, b'data: {"choices": [{"te'),
    "an end without [DONE]": (CHUNKED, b"0\r\n\r\n"),
    "a chunk that breaks off": (CHUNKED, b"100\r\ndata: "),
    "a chunk of no size": (CHUNKED, b"zz\r\n"),
    "no event": (STREAM, b"\x00\xff{]not an event\n\ndata: {[\n\n"),
    "no object": (STREAM, b"data: [1]\n\n"),
    "deep nesting": (STREAM, b"data: " + b"[" * 100_000 + b"\n\n"),
    "a number without end": (STREAM, b"data: " + b"1" * 100_000 + b"\n\n"),
    "an error object": (STREAM, event({"error": {"code": 500, "message": "CUDA error"}})),
    "an error that is a text": (STREAM, event({"error": "oops"})),
    "an event without end": (STREAM, b"data: " + b"x" * (MAX_EVENT_BYTES + 1)),
}


@pytest.mark.parametrize("what", [*BROKEN_HEADS, *BROKEN_BODIES])
async def test_an_engine_that_fails_before_its_first_content_leaves_an_empty_log_that_may_run_elsewhere(
    tmp_path: Path, what: str
) -> None:
    head, body = BROKEN_BODIES[what] if what in BROKEN_BODIES else (BROKEN_HEADS[what], b"")
    async with node_with(tmp_path, RawEngine(head + body)) as setup:
        link = await setup.link()
        for stream in (
            link.prompt(),
            link.open({"model": MODEL, "prompt": "x", "stream": True}, path="/v1/completions"),
        ):
            tail = await ended(stream)
            assert stream.order == [Type.ACCEPT, Type.TAIL]
            assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, "ENGINE_FAILED", 502)
            assert tail["error"]["retriable"] is True
            assert tail["sha256"] == hashlib.sha256().hexdigest()
        await idle(setup)


@pytest.mark.parametrize("what", BROKEN_BODIES)
async def test_an_engine_that_fails_after_its_first_content_ends_the_log_with_one_error(
    tmp_path: Path, what: str
) -> None:
    head, body = BROKEN_BODIES[what]
    first = chunk(FIRST) if head is CHUNKED else FIRST
    engine = RawEngine(head + first, then=body)
    async with node_with(tmp_path, engine) as setup:
        link = await setup.link()
        native = link.prompt()
        plain = link.open({"model": MODEL, "prompt": "x", "stream": True}, path="/v1/completions")
        await eventually(lambda: native.text == "t0 " and plain.data == FIRST)
        engine.go.set()
        for stream in (native, plain):
            tail = await ended(stream)
            assert stream.order[:2] == [Type.ACCEPT, Type.HEAD]
            assert (tail["length"], tail["error"]["code"]) == (len(stream.data), "ENGINE_FAILED")
            assert "status" not in tail
            assert tail["sha256"] == hashlib.sha256(stream.data).hexdigest()
        assert [name for name, _ in native.events_seen] == ["started", "token", "error"]
        assert native.events_seen[-1][1]["code"] == "ENGINE_FAILED"
        shown, _, frame = plain.data.rpartition(b"data: ")
        assert shown == FIRST
        assert json.loads(frame)["error"]["code"] == "ENGINE_FAILED"
        await idle(setup)


# Each of these has aiohttp raise an exception that holds what it could not read.
SAID_IN_PLACE_OF_HTTP = {
    "a first line": b"WORDS\r\n\r\n",
    "a header that is none": b"HTTP/1.1 200 OK\r\nWORDS\r\n\r\n",
    "a header too long": b"HTTP/1.1 200 OK\r\nX: " + b"WORDS" * 20_000 + b"\r\n\r\n",
    "a length": b"HTTP/1.1 200 OK\r\nContent-Length: WORDS\r\n\r\n",
    "the size of a chunk": CHUNKED + b"WORDS\r\n",
    "an error": JSON_200.replace(b"200", b"500") + b'{"error": {"message": "WORDS"}}',
    "an event": STREAM + b"data: WORDS\n\n",
    "an answer": JSON_200 + b"WORDS",
}


@pytest.mark.parametrize("where", SAID_IN_PLACE_OF_HTTP)
async def test_what_an_engine_says_in_place_of_an_answer_is_quoted_nowhere(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    words = secrets.token_hex(8)
    engine = RawEngine(SAID_IN_PLACE_OF_HTTP[where].replace(b"WORDS", words.encode()))
    async with node_with(tmp_path, engine) as setup:
        link = await setup.link()
        stream = link.prompt()
        tail = await ended(stream)
        assert tail["error"]["code"] == "ENGINE_FAILED"
        assert words not in json.dumps(tail) + caplog.text
        assert "task.ended" in caplog.text
        await idle(setup)


@pytest.mark.parametrize(
    "answer",
    [
        JSON_200 + b'{"choices": [{"mess',
        JSON_200 + b"not json",
        JSON_200.replace(b"Connection", b"Content-Length: 99\r\nConnection") + b'{"choices": []}',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}",
        JSON_200 + b'{"error": {"code": 500, "message": "oops"}}',
    ],
)
async def test_a_whole_answer_that_is_not_whole_shows_nothing(tmp_path: Path, answer: bytes) -> None:
    async with node_with(tmp_path, RawEngine(answer)) as setup:
        link = await setup.link()
        stream = link.open({"model": MODEL, "messages": []}, path=CHAT, stream=False)
        tail = await ended(stream)
        assert stream.order == [Type.ACCEPT, Type.TAIL]
        assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, "ENGINE_FAILED", 502)
        await idle(setup)


async def test_an_engine_that_closes_a_connection_when_it_is_used_again_costs_no_task(tmp_path: Path) -> None:
    class Keeping(RawEngine):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())
                await reader.readexactly(int(length[1]) if length else 0)
                writer.write(self.answer)
                await reader.read(1)
            writer.close()

    body = json.dumps(token("t0 ", "stop")).encode()
    kept = JSON_200.replace(b"Connection: close", b"Content-Length: %d" % len(body))
    async with node_with(tmp_path, Keeping(kept + body)) as setup:
        link = await setup.link()
        for _ in range(3):
            tail = await ended(link.open({"model": MODEL, "messages": []}, path=CHAT, stream=False))
            assert "error" not in tail, tail
        await idle(setup)


@pytest.mark.parametrize("kind", [b"x" * 5_000, b"a\xff\x80b", b"\x7f", b""])
async def test_a_content_type_that_is_none_is_json(tmp_path: Path, kind: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: " + kind + b"\r\nContent-Length: 15\r\n\r\n"
    async with node_with(tmp_path, RawEngine(head + b'{"choices": []}')) as setup:
        link = await setup.link()
        stream = link.open({"model": MODEL, "messages": []}, path=CHAT, stream=False)
        tail = await ended(stream)
        assert "error" not in tail
        assert stream.data == b'{"choices": []}'
        assert stream.head == {
            "status": 200,
            "headers": {"content-type": "application/json", "content-length": "15"},
        }
        await idle(setup)


async def test_an_engine_that_is_not_there_is_a_failure_that_may_run_elsewhere(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        await setup.engine.close()
        tail = await ended(link.prompt())
        assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, "ENGINE_FAILED", 502)
        await idle(setup)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [(400, "INVALID_REQUEST", 400), (429, "MODEL_NOT_AVAILABLE", 503), (503, "MODEL_NOT_AVAILABLE", 503)],
)
async def test_an_error_answer_that_never_ends_is_read_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, told: int
) -> None:
    monkeypatch.setattr(execution, "ERROR_BODY_TIMEOUT_S", 0.05)
    engine = RawEngine(b"HTTP/1.1 %d X\r\nContent-Length: 99\r\n\r\n{" % status, hangs=True)
    async with node_with(tmp_path, engine) as setup:
        link = await setup.link()
        tail = await ended(link.prompt())
        assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, code, told)
        await asyncio.wait_for(engine.left.wait(), 1.0)
        await idle(setup)


@pytest.mark.parametrize(
    ("phase", "answer"),
    [
        ("before its head", b""),
        ("in its head", b"HTTP/1.1 200 OK\r\nCont"),
        ("before its first content", CHUNKED + chunk(b": ping\n\n")),
        ("in an event", CHUNKED + chunk(FIRST) + b"50\r\ndata: {"),
        ("in its answer", CHUNKED + chunk(FIRST)),
        ("after its answer", CHUNKED + chunk(FIRST + event(token("", "stop")))),
    ],
)
@pytest.mark.parametrize("how", ["cancel", "left"])
async def test_an_engine_that_hangs_lets_go_of_its_slot_within_a_second_of_the_cancel(
    tmp_path: Path, phase: str, answer: bytes, how: str
) -> None:
    engine = RawEngine(answer, hangs=True)
    async with node_with(tmp_path, engine) as setup:
        link = await setup.link()
        stream = link.open({"model": MODEL, "prompt": "x", "stream": True}, path="/v1/completions")
        await asyncio.wait_for(engine.asked.wait(), 5.0)
        if FIRST in answer:
            await eventually(lambda: bool(stream.data), what=f"the first token: {phase}")
        began = time.monotonic()
        link.send(stream.id, *((Type.CANCEL,) if how == "cancel" else (Type.DETACH, b"left")))
        await asyncio.wait_for(engine.left.wait(), 5.0)
        await idle(setup)
        assert time.monotonic() - began < 2.0  # a second, and one more for a busy machine
        (entry,) = setup.node.logs
        assert entry.log.tail is not None
        assert entry.log.tail.finish_reason == "canceled"
        if how == "cancel":
            assert (await ended(stream))["error"]["code"] == "CANCELED"


async def test_what_an_engine_says_of_itself_is_believed_within_reason(tmp_path: Path) -> None:
    """Counts, rates and words that no report, record or JSON can carry: the task ends well all the same."""
    lies = {
        "usage": {"prompt_tokens": 10**30, "completion_tokens": -1, "prompt_tokens_details": {"cached_tokens": True}},
        "timings": {"prompt_per_second": float("inf"), "predicted_per_second": 10**400, "cache_n": 2**70},
    }
    strange = event(token("", "\ud800\n" + "x" * 100_000) | lies)
    async with node_with(tmp_path, RawEngine(STREAM + FIRST + strange + DONE)) as setup:
        link = await setup.link()
        for stream in (
            link.prompt(),
            link.open({"model": MODEL, "prompt": "x", "stream": True}, path="/v1/completions"),
        ):
            tail = await ended(stream)
            assert "error" not in tail
            assert (tail["tokens_in"], tail["tokens_out"], tail["cached_tokens"]) == (0, 1, 0)
            assert len(tail["finish_reason"]) <= 64
            assert tail["finish_reason"].isprintable()
        await idle(setup)
        said = json.dumps([setup.node.node.pool_reports(), setup.node.logs.reports(None)]).encode()
        decode_json(said)  # as strictly as a control reads a beat


async def test_a_field_whose_name_is_a_book_is_refused_in_a_record_that_fits(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        for body, path in (
            ({"model": MODEL, "prompt": "x", "n" * 50_000: 1}, "native"),
            ({"model": MODEL, "prompt": "x", **{f"{i:05}" * 50: 1 for i in range(200)}}, "native"),
            ({"model": MODEL, "prompt": "x", "speculative." + "n" * 50_000: 1}, "/v1/completions"),
        ):
            tail = await ended(link.open(body, path=path))
            assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, "INVALID_REQUEST", 400)
        await idle(setup)
        assert setup.engine.calls.empty()


async def test_a_fault_of_our_own_at_the_very_end_frees_the_slot_and_ends_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        shown, hidden = link.prompt(), link.prompt()
        calls = [await setup.engine.asked(), await setup.engine.asked()]
        calls[0].say("t0 ")
        await eventually(lambda: shown.text or hidden.text)

        def fault(_self: object, _failure: LlorchError | None) -> None:
            raise RuntimeError("planted")

        monkeypatch.setattr(runner_module.Execution, "_seal", fault)
        for call in calls:
            call.cut()
        for stream in (shown, hidden):
            tail = await ended(stream)
            assert (tail["length"], tail["error"]["code"]) == (len(stream.data), "INTERNAL")
            assert ("status" in tail) is (not stream.data)
        await idle(setup)
        assert "task.unsealed" in caplog.text


async def test_the_first_key_in_a_key_file_is_the_one_that_is_sent(tmp_path: Path) -> None:
    """The probe and the tasks read such a file alike: comments, several keys, and a change of it."""
    key_file = tmp_path / "hand.key"
    key_file.write_text("# made by hand\n\nfirst-key\nsecond-key\n")
    async with node_between(tmp_path) as setup:
        handoff = Handoff("hand", "vllm", setup.engine.url, MODEL, slots=1, api_key_file=str(key_file))
        (probe,) = setup.node.pools.handle(ev.HandoffSeen(handoff), 0.0)
        assert isinstance(probe, ev.Probe)
        setup.node.pools.handle(ev.ProbeOk("hand", "r0", probe.probe), 0.0)
        link = await setup.link()
        for text, sent in ((None, "first-key"), ("third-key-after-a-change\n", "third-key-after-a-change")):
            if text is not None:
                key_file.write_text(text)
            stream = link.prompt(pool_id="hand")
            call = await setup.engine.asked()
            assert call.headers["authorization"] == f"Bearer {sent}"
            call.end()
            await ended(stream)
        for spoil in ("# nothing but words\n", "k\u00e9y\n", None):
            key_file.unlink()
            if spoil is not None:
                key_file.write_text(spoil, encoding="utf-8")
            tail = await ended(link.prompt(pool_id="hand"))
            assert (tail["error"]["code"], tail["status"]) == ("ENGINE_FAILED", 502)
            if spoil is None:
                key_file.write_text("x")
        await idle(setup)


def test_a_key_file_that_would_block_the_node_does_not(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    for path in (tmp_path / "key", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="regular file"):
            read_key(str(path))


async def test_a_body_that_names_another_model_than_the_pool_s_is_refused_where_nobody_else_looked(
    tmp_path: Path,
) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        for path, body in (("native", {"model": "other", "prompt": "x"}), (CHAT, {"model": "other", "messages": []})):
            async with setup.node.request(
                "POST", f"/v2/pools/{POOL}/infer", data=json.dumps(body), headers={"X-Llorch-Path": path}
            ) as response:
                assert response.status == 503
                assert (await response.json())["error"]["code"] == "MODEL_NOT_AVAILABLE"
        assert setup.engine.calls.empty()
        await idle(setup)
