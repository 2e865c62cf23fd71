"""A node on a link: tasks, credit, cancelling, attaching, and what a control must not do."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import time
import uuid
import weakref
from pathlib import Path
from typing import Any, TypeVar

import pytest

from llorch import records
from llorch.node.execution import Execution
from llorch.node.link import NodeLink
from llorch.node.retention import Limits
from llorch.records import INITIAL_CREDIT_BYTES, Type
from tests.component.node_harness import ENGINE_KEY, MODEL, POOL, Stream, eventually, node_between

CHAT = "/v1/chat/completions"
T = TypeVar("T")
EMBEDDINGS = "/v1/embeddings"


async def ended(stream: Stream) -> dict[str, Any]:
    await eventually(lambda: stream.tail is not None, what=f"TAIL on {stream.id}")
    assert stream.tail is not None
    return stream.tail


async def test_prompt_runs_end_to_end(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.prompt(headers={"x-request-id": "r1", "x-conversation-id": "c1", "traceparent": "00-aa-bb-01"})
        call = await setup.engine.asked()
        assert call.headers["authorization"] == f"Bearer {ENGINE_KEY}"
        assert call.headers["traceparent"] == "00-aa-bb-01"
        assert "x-conversation-id" not in call.headers
        assert (call.body["model"], call.body["prompt"], call.body["stream"]) == (MODEL, "Hello", True)
        await eventually(lambda: stream.accepted)
        assert stream.head is None
        call.say("t0 ", "t1 ")
        call.end()
        tail = await ended(stream)
        assert stream.head == {"status": 200, "headers": {"content-type": "text/event-stream"}}
        assert [event for event, _ in stream.events_seen] == ["started", "token", "token", "end"]
        assert stream.text == "t0 t1 "
        assert tail["length"] == len(stream.data)
        assert tail["sha256"] == hashlib.sha256(stream.data).hexdigest()
        assert (tail["finish_reason"], tail["tokens_in"], tail["tokens_out"]) == ("stop", 3, 2)
        assert tail["timings"]["ttft_ms"] >= 0
        assert "error" not in tail
        assert setup.node.slots_free == 2


async def test_ids_are_log_offsets(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.prompt()
        call = await setup.engine.asked()
        call.say("a", "b")
        call.end()
        await ended(stream)
        at = 0
        for block in stream.data.split(b"\n\n")[:-1]:
            at += len(block) + 2
            assert int(block.split(b"\n")[0].removeprefix(b"id: "), 16) == at


async def test_nothing_but_accept_before_the_first_token(tmp_path: Path) -> None:
    """The engine's head alone shows nothing: an engine that dies in prefill can still be retried."""
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.prompt()
        call = await setup.engine.asked()
        call.go.set()
        call.cut()
        tail = await ended(stream)
        assert stream.order == [Type.ACCEPT, Type.TAIL]
        assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, "ENGINE_FAILED", 502)
        assert setup.node.slots_free == 2


async def test_failure_after_the_first_token_is_a_terminal_event(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.prompt()
        call = await setup.engine.asked()
        call.say("t0 ")
        await eventually(lambda: stream.text == "t0 ")
        call.cut()
        tail = await ended(stream)
        assert [event for event, _ in stream.events_seen] == ["started", "token", "error"]
        assert stream.events_seen[-1][1]["code"] == tail["error"]["code"] == "ENGINE_FAILED"
        assert "status" not in tail
        assert tail["length"] == len(stream.data)


async def test_refusal_of_the_engine_comes_in_the_tail(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.prompt()
        call = await setup.engine.asked()
        call.reply(b'{"error": {"code": 400, "message": "no good", "type": "invalid_request_error"}}', status=400)
        tail = await ended(stream)
        assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, "INVALID_REQUEST", 400)
        assert stream.order == [Type.ACCEPT, Type.TAIL]


@pytest.mark.parametrize(
    "body", [b"{", b'{"model": "m"}', b'{"model": "m", "prompt": "x", "nonsense": 1}', b'{"a": 1, "a": 2}', b""]
)
async def test_bad_bodies_are_refused_without_asking_the_engine(tmp_path: Path, body: bytes) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        tail = await ended(link.open(body))
        assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, "INVALID_REQUEST", 400)
        assert setup.engine.calls.empty()
        assert setup.node.slots_free == 2


async def test_slots_are_enforced_before_the_body_is_read(tmp_path: Path) -> None:
    async with node_between(tmp_path, slots=1) as setup:
        link = await setup.link()
        first = link.prompt()
        await setup.engine.asked()
        second = link.open(b"x" * 1_000, send_body=False)
        await eventually(lambda: second.refused is not None)
        assert second.refused is not None
        assert second.refused["code"] == "ALL_SLOTS_BUSY"
        assert not second.accepted
        link.send(second.id, Type.BODY, b"x" * 1_000)  # late: dropped, the link lives
        link.send(first.id, Type.CANCEL)
        await ended(first)
        assert link.reason is None


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({"pool_id": "nowhere"}, "POOL_NOT_FOUND"),
        ({"model": "another"}, "MODEL_NOT_AVAILABLE"),
        ({"path": "/v1/secrets"}, "NOT_FOUND"),
        ({"attempt": 0}, "INVALID_REQUEST"),
        ({"path": "/" * 300}, "INVALID_REQUEST"),
        ({"body_len": 1 << 40}, "PAYLOAD_TOO_LARGE"),
    ],
)
async def test_wishes_that_can_not_be_met_are_refused(tmp_path: Path, header: dict[str, Any], code: str) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.open(b"{}", send_body=False, **header)
        await eventually(lambda: stream.refused is not None)
        assert stream.refused is not None
        assert stream.refused["code"] == code
        assert setup.node.slots_free == 2


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp, of any over a mebibyte
async def test_large_body_flows_as_credit_is_granted(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        body = json.dumps({"model": MODEL, "prompt": "x" * (9 * INITIAL_CREDIT_BYTES)}).encode()  # over a mebibyte
        stream = link.open(body, send_body=False)
        sent, window = 0, INITIAL_CREDIT_BYTES
        while sent < len(body):
            await eventually(lambda sent=sent: window + stream.credit_received > sent, what="credit for the body")
            piece = body[sent : min(sent + 60_000, window + stream.credit_received)]
            link.send(stream.id, Type.BODY, piece)
            sent += len(piece)
        call = await setup.engine.asked()
        assert len(call.body["prompt"]) == 9 * INITIAL_CREDIT_BYTES
        call.say("t0 ")
        call.end()
        assert (await ended(stream))["finish_reason"] == "stop"


@pytest.mark.parametrize("kind", ["too_much", "even_id", "reused_id", "never_opened", "from_node", "json"])
async def test_control_that_breaks_the_protocol_loses_its_link(tmp_path: Path, kind: str) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        if kind == "too_much":
            stream = link.open(b"{}", send_body=False)
            link.send(stream.id, Type.BODY, b"{} and more")
        elif kind == "even_id":
            link.send(2, Type.OPEN, b"{}")
        elif kind == "reused_id":
            stream = link.open(b"{}")
            await ended(stream)
            link.send(stream.id, Type.ATTACH, b"{}")
        elif kind == "never_opened":
            link.send(99, Type.CANCEL)
        elif kind == "from_node":
            stream = link.open(b"{}")
            await ended(stream)
            link.send(stream.id, Type.DATA, b"x")
        else:
            link.send(link.stream().id, Type.OPEN, b"not json")
        await eventually(lambda: link.reason is not None, what="the link ends")
        await setup.control.linked(2)  # and a new one comes
        await eventually(lambda: setup.node.slots_free == 2, what="slots are free again")


def kept(kind: type[T]) -> list[T]:
    return [each for each in gc.get_objects() if isinstance(each, kind)]


def up() -> list[NodeLink]:
    return [each for each in kept(NodeLink) if each.connection and not each.connection.lost.done()]


@pytest.mark.parametrize("kind", ["even_id", "length", "json", "late_body"])
async def test_a_link_that_broke_the_protocol_leaves_nothing_in_memory(
    tmp_path: Path, kind: str, without_collection: None
) -> None:
    """A control that does it a hundred times a second cost a node 200 MB, until a collection came."""
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        # The control's end is up a moment before the node's: whoever looks at once may find none there.
        await eventually(lambda: len(up()) == 1, what="the node's end of the link")
        (first,) = up()
        gone = [weakref.ref(first), weakref.ref(first.connection)]
        del first
        if kind == "even_id":
            link.send(2, Type.OPEN, b"{}")
        elif kind == "length":
            link.connection.send(records.HEADER.pack(1, Type.OPEN, records.MAX_PAYLOAD_BYTES + 1))
        elif kind == "json":
            link.send(link.stream().id, Type.OPEN, b"not json")
        else:
            stream = link.open(b"{}", send_body=False)
            link.send(stream.id, Type.BODY, b"{} and more")
        await setup.control.linked(2)
        await eventually(lambda: setup.node.slots_free == 2, what="slots are free again")
        assert [each() for each in gone] == [None, None]
        assert kept(Execution) == []


@pytest.mark.parametrize("body", [b"{", b'{"model": "m", "prompt": "x", "nonsense": 1}'])
async def test_a_body_that_was_refused_is_not_kept(tmp_path: Path, body: bytes, without_collection: None) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        await ended(link.open(body))
        await eventually(lambda: setup.node.slots_free == 2, what="slots are free again")
        assert kept(Execution) == []


async def test_unknown_record_types_are_skipped(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        link.send(77, 99, b"from the future")
        stream = link.prompt()
        (await setup.engine.asked()).end()
        await ended(stream)
        assert link.reason is None


async def test_stalled_stream_does_not_stall_another(tmp_path: Path) -> None:
    """One reader grants no credit; the other one's tokens pass at once."""
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stalled = link.prompt()
        slow_call = await setup.engine.asked()
        flowing = link.prompt()
        fast_call = await setup.engine.asked()
        for _ in range(40):
            slow_call.say("y" * 10_000)
        few = INITIAL_CREDIT_BYTES - 11_000  # less than one more event: none is torn to use the window up
        await eventually(lambda: len(stalled.data) > few, what="the stalled stream's window is used")
        for number in range(20):
            fast_call.say(f"t{number} ")
            await eventually(lambda number=number: flowing.text.endswith(f"t{number} "))
        fast_call.end()
        await ended(flowing)
        assert few < len(stalled.data) <= INITIAL_CREDIT_BYTES
        assert stalled.data.endswith(b"\n\n")
        slow_call.end()
        while stalled.tail is None:
            before = len(stalled.data)
            link.grant(stalled, 50_000)
            await eventually(lambda before=before: len(stalled.data) > before or stalled.tail is not None)
        assert stalled.text == "y" * 400_000
        assert hashlib.sha256(stalled.data).hexdigest() == stalled.tail["sha256"]


async def test_large_answer_passes_whole_through_a_small_log(tmp_path: Path) -> None:
    """10 MB of embeddings, a log that keeps 1 MiB: the engine is read no faster than the reader takes."""
    async with node_between(tmp_path, limits=Limits(kept_bytes=1 << 20)) as setup:
        link = await setup.link()
        stream = link.open({"model": MODEL, "input": "x"}, path=EMBEDDINGS, stream=False)
        call = await setup.engine.asked()
        answer = b'{"data": "' + b"0123456789" * 1_000_000 + b'"}'
        call.reply(answer)
        granted = INITIAL_CREDIT_BYTES
        while stream.tail is None:
            await eventually(
                lambda granted=granted: len(stream.data) >= granted or stream.tail is not None, what="a used window"
            )
            link.grant(stream, 1 << 20)
            granted += 1 << 20
        assert stream.head is not None
        assert stream.head["headers"] == {
            "content-type": "application/json",
            "content-length": str(len(answer)),
        }
        assert hashlib.sha256(stream.data).hexdigest() == hashlib.sha256(answer).hexdigest() == stream.tail["sha256"]
        assert "error" not in stream.tail


async def test_v1_answer_is_the_engines_own_bytes(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.open({"model": MODEL, "messages": [], "stream": True}, path=CHAT)
        call = await setup.engine.asked()
        assert call.path == CHAT
        assert call.body["stream_options"] == {"include_usage": True}
        chunk = b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
        last = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
        call.script.put_nowait(chunk + last)
        call.end()
        tail = await ended(stream)
        assert stream.data.startswith(chunk + last)
        assert stream.data.endswith(b"data: [DONE]\n\n")
        assert b"usage" not in stream.data
        assert (tail["tokens_in"], tail["tokens_out"]) == (3, 2)


@pytest.mark.parametrize("when", ["before_body", "before_head", "streaming"])
async def test_cancel_frees_the_slot_and_closes_the_engine_connection(tmp_path: Path, when: str) -> None:
    async with node_between(tmp_path, slots=1) as setup:
        link = await setup.link()
        call = None
        if when == "before_body":
            stream = link.open(b"{}" * 100, send_body=False)
            await eventually(lambda: stream.accepted)
        else:
            stream = link.prompt()
            call = await setup.engine.asked()
        if when == "streaming":
            assert call is not None
            call.say("t0 ")
            await eventually(lambda: stream.text == "t0 ")
        started = time.monotonic()
        link.send(stream.id, Type.CANCEL)
        link.send(stream.id, Type.CANCEL)  # idempotent
        tail = await ended(stream)
        await eventually(lambda: setup.node.slots_free == 1)
        if call is not None:
            await asyncio.wait_for(call.disconnected.wait(), 5.0)
        assert time.monotonic() - started < 2.0  # a second, and one more for a busy machine
        assert tail["finish_reason"] == "canceled"
        assert "error" not in tail
        assert stream.head == {"status": 200, "headers": {"content-type": "text/event-stream"}}
        assert [name for name, _ in stream.events_seen if name != "token"] == ["started", "end"]
        assert stream.events_seen[-1][1]["finish_reason"] == "canceled"
        assert tail["length"] == len(stream.data)


async def test_cancelled_v1_task_ends_with_an_error_frame(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.open({"model": MODEL, "messages": [], "stream": True}, path=CHAT)
        call = await setup.engine.asked()
        call.go.set()
        call.script.put_nowait(b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n')
        await eventually(lambda: stream.data)
        link.send(stream.id, Type.CANCEL)
        tail = await ended(stream)
        assert tail["finish_reason"] == "canceled"
        assert tail["error"]["code"] == "CANCELED"
        assert json.loads(stream.data.rpartition(b"data: ")[2])["error"]["code"] == "CANCELED"


@pytest.mark.parametrize("where", ["in the OPEN", "in the body"])
async def test_deadline_ends_the_task(tmp_path: Path, where: str) -> None:
    """With output shown it is an event; before that an empty log, whose status tells that no retry helps."""
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        header, body = ({"deadline_ms": 150}, {}) if where == "in the OPEN" else ({}, {"deadline_ms": 150})
        shown = link.open({"model": MODEL, "prompt": "Hello", **body}, **header)
        call = await setup.engine.asked()
        hidden = link.open({"model": MODEL, "prompt": "Hello", **body}, **header)
        silent = await setup.engine.asked()
        call.say("t0 ")
        tail = await ended(shown)
        assert tail["error"]["code"] == "DEADLINE_EXCEEDED"
        assert shown.events_seen[-1][0] == "error"
        tail = await ended(hidden)
        assert hidden.order == [Type.ACCEPT, Type.TAIL]
        assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, "DEADLINE_EXCEEDED", 504)
        for asked in (call, silent):
            await asyncio.wait_for(asked.disconnected.wait(), 1.0)
        await eventually(lambda: setup.node.slots_free == 2)


async def test_a_cancel_after_its_deadline_is_no_cancel(tmp_path: Path) -> None:
    """A control that has waited beyond the deadline for a node that stood still cancels; others read that log, too."""
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.open({"model": MODEL, "prompt": "Hello"}, deadline_ms=300)
        call = await setup.engine.asked()
        call.say("t0 ")
        await eventually(lambda: stream.data)
        link.send(stream.id, Type.CANCEL, b"")
        time.sleep(0.4)
        tail = await ended(stream)
        assert tail["error"]["code"] == "DEADLINE_EXCEEDED"
        assert b"canceled" not in stream.data


async def test_body_that_does_not_come_frees_the_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.node.execution.BODY_TIMEOUT_S", 0.05)
    async with node_between(tmp_path, slots=1) as setup:
        link = await setup.link()
        tail = await ended(link.open(b"x" * 1_000, send_body=False))
        assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, "REQUEST_TIMEOUT", 408)
        await eventually(lambda: setup.node.slots_free == 1)


async def test_node_that_ends_says_so_to_what_still_runs(tmp_path: Path) -> None:
    """What had shown nothing may run elsewhere; what had, ends with an error event. No slot and no task is left."""
    async with node_between(tmp_path, slots=3) as setup:
        link = await setup.link()
        bodiless = link.open(b"x" * 1_000, send_body=False)
        hidden = link.prompt()
        await setup.engine.asked()
        shown = link.prompt()
        (await setup.engine.asked()).say("t0 ")
        await eventually(lambda: shown.text == "t0 ")
        await setup.node.runner.close()
        for stream in (bodiless, hidden):
            tail = await ended(stream)
            assert stream.order == [Type.ACCEPT, Type.TAIL]
            assert (tail["length"], tail["error"]["code"], tail["status"]) == (0, "NODE_LOST", 502)
        assert (await ended(shown))["error"]["code"] == "NODE_LOST"
        assert [name for name, _ in shown.events_seen] == ["started", "token", "error"]
        assert setup.node.slots_free == 3
        assert len(setup.node.runner) == 0


async def test_node_that_drains_waits_until_what_has_ended_was_read(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.prompt()
        call = await setup.engine.asked()
        call.say("x" * 2 * INITIAL_CREDIT_BYTES)
        call.end()
        (entry,) = setup.node.logs
        await eventually(lambda: entry.log.sealed)
        assert len(setup.node.runner) == 0
        assert not await setup.node.runner.drained(0.1)
        draining = asyncio.ensure_future(setup.node.runner.drained(10.0))
        link.grant(stream, 2 * INITIAL_CREDIT_BYTES)
        await ended(stream)
        assert await draining


async def test_engine_that_falls_silent_ends_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.node.execution.STALL_AFTER_S", 0.3)
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        slow = link.prompt()
        waiting = await setup.engine.asked()
        stalled = link.prompt()
        call = await setup.engine.asked()
        call.say("t0 ")
        tail = await ended(stalled)
        assert tail["error"]["code"] == "ENGINE_STALLED"
        assert stalled.text == "t0 "
        await asyncio.wait_for(call.disconnected.wait(), 1.0)
        assert slow.tail is None  # a long prefill is not a stall
        waiting.end()
        await ended(slow)


async def test_headers_that_are_not_an_engine_s_business_stay_here(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        broken = link.prompt(headers={"traceparent": "x\r\nX-Evil: 1"})
        await eventually(lambda: broken.refused is not None)
        assert broken.refused is not None
        assert broken.refused["code"] == "INVALID_REQUEST"
        hidden = {"cookie": "c", "connection": "x-keep", "x-keep": "1", "x-conversation-id": "c", "te": "trailers"}
        hidden |= {
            "authorization": "Bearer client-token",
            "x-llorch-task": "t",
            "host": "evil",
            "transfer-encoding": "x",
        }
        stream = link.prompt(headers={"anthropic-version": "2023-06-01", "traceparent": "caf\u00e9", **hidden})
        call = await setup.engine.asked()
        assert call.headers["anthropic-version"] == "2023-06-01"
        assert not {"traceparent", "cookie", "x-keep", "x-conversation-id", "te", "x-llorch-task"} & call.headers.keys()
        for name in ("authorization", "host", "connection", "transfer-encoding"):
            assert call.headers.get(name) != hidden[name]
        assert setup.node.slots_free == 1
        call.end()
        await ended(stream)


async def test_attach_at_offsets(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        task_id = str(uuid.uuid4())
        first = link.prompt(task_id=task_id)
        call = await setup.engine.asked()
        call.say("t0 ", "t1 ")
        await eventually(lambda: first.text == "t0 t1 ")
        middle = len(first.data) - 10
        second = link.attach(task_id, middle)
        call.say("t2 ")
        call.end()
        await ended(first)
        tail = await ended(second)
        assert second.order[:2] == [Type.ACCEPT, Type.HEAD]
        assert second.data == first.data[middle:]
        assert tail == first.tail
        again = link.attach(task_id, len(first.data))  # at the sealed end
        await ended(again)
        assert again.data == b""


@pytest.mark.parametrize("surplus", [True, False])
async def test_an_attempt_that_its_task_has_left_behind_is_not_to_be_found(surplus: bool, tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        task_id = str(uuid.uuid4())
        stream = link.prompt(task_id=task_id)
        call = await setup.engine.asked()
        call.say("t0 ")
        await eventually(lambda: stream.data)
        link.send(stream.id, Type.CANCEL, records.SURPLUS if surplus else b"")
        await ended(stream)
        await asyncio.wait_for(call.disconnected.wait(), 5)
        again = link.attach(task_id)
        await eventually(lambda: again.refused is not None or again.tail is not None)
        assert (again.refused is not None) == surplus
        assert setup.node.slots_free == 2
        known = [report["task_id"] for report in setup.node.logs.reports(None)]
        assert known == ([] if surplus else [task_id])


async def test_attach_is_refused_where_it_must_be(tmp_path: Path) -> None:
    async with node_between(tmp_path, limits=Limits(kept_bytes=1_000)) as setup:
        link = await setup.link()
        task_id = str(uuid.uuid4())
        stream = link.prompt(task_id=task_id)
        call = await setup.engine.asked()
        call.say("x" * 600, "y" * 600)
        call.end()
        await ended(stream)
        for wish, code in (
            (link.attach(task_id, 0), "GAP"),
            (link.attach(task_id, 10_000), "INVALID_REQUEST"),
            (link.attach(str(uuid.uuid4()), 0), "TASK_NOT_FOUND"),
            (link.attach(task_id, 1_000, attempt=2), "TASK_NOT_FOUND"),
        ):
            await eventually(lambda wish=wish: wish.refused is not None)
            assert wish.refused is not None
            assert wish.refused["code"] == code
            assert wish.order == [Type.REFUSE]


async def test_repeated_open_attaches_at_the_start(tmp_path: Path) -> None:
    async with node_between(tmp_path, slots=1) as setup:
        link = await setup.link()
        task_id = str(uuid.uuid4())
        first = link.prompt(task_id=task_id)
        call = await setup.engine.asked()
        call.say("t0 ")
        await eventually(lambda: first.text == "t0 ")
        second = link.prompt(task_id=task_id)
        await eventually(lambda: second.text == "t0 ")
        call.end()
        await ended(first)
        await ended(second)
        assert first.data == second.data
        assert setup.engine.calls.empty()


async def test_higher_attempt_overtakes_and_a_lower_one_is_refused(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        task_id = str(uuid.uuid4())
        first = link.prompt(task_id=task_id, attempt=1)
        first_call = await setup.engine.asked()
        second = link.prompt(task_id=task_id, attempt=2)
        second_call = await setup.engine.asked()
        assert (await ended(first))["finish_reason"] == "canceled"
        await asyncio.wait_for(first_call.disconnected.wait(), 1.0)
        stale = link.prompt(task_id=task_id, attempt=1)
        await eventually(lambda: stale.refused is not None)
        assert stale.refused is not None
        assert stale.refused["code"] == "CONFLICT"
        second_call.say("t0 ")
        second_call.end()
        await ended(second)
        assert second.events_seen[0][1]["attempt"] == 2


async def test_higher_attempt_ends_the_lower_also_where_there_is_no_slot_for_it(tmp_path: Path) -> None:
    """The lower one holds the only slot: the higher is refused once, and finds it free when it comes again."""
    async with node_between(tmp_path, slots=1) as setup:
        link = await setup.link()
        task_id = str(uuid.uuid4())
        first = link.prompt(task_id=task_id, attempt=1)
        first_call = await setup.engine.asked()
        busy = link.prompt(task_id=task_id, attempt=2)
        await eventually(lambda: busy.refused is not None)
        assert busy.refused is not None
        assert busy.refused["code"] == "ALL_SLOTS_BUSY"
        assert (await ended(first))["finish_reason"] == "canceled"
        await asyncio.wait_for(first_call.disconnected.wait(), 1.0)
        second = link.prompt(task_id=task_id, attempt=2)
        (await setup.engine.asked()).end()
        assert (await ended(second))["finish_reason"] == "stop"


async def test_attempt_of_somebody_else_s_task_is_refused_and_ends_nothing(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        task_id = str(uuid.uuid4())
        mine = link.prompt(task_id=task_id, owner="me")
        call = await setup.engine.asked()
        theirs = link.prompt(task_id=task_id, owner="somebody", attempt=2)
        await eventually(lambda: theirs.refused is not None)
        assert theirs.refused is not None
        assert theirs.refused["code"] == "CONFLICT"
        call.say("t0 ")
        call.end()
        assert (await ended(mine))["finish_reason"] == "stop"
        assert mine.text == "t0 "


async def test_v1_task_is_cancelled_when_its_client_left(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        stream = link.open({"model": MODEL, "messages": [], "stream": True}, path=CHAT)
        call = await setup.engine.asked()
        link.send(stream.id, Type.DETACH, b"left")
        await asyncio.wait_for(call.disconnected.wait(), 1.0)
        await eventually(lambda: setup.node.slots_free == 2)


async def test_native_task_is_cancelled_after_its_grace(tmp_path: Path) -> None:
    async with node_between(tmp_path, limits=Limits(reconnect_grace_s=0.2)) as setup:
        link = await setup.link()
        stream = link.prompt()
        call = await setup.engine.asked()
        link.send(stream.id, Type.DETACH, b"left")
        await asyncio.wait_for(call.disconnected.wait(), 5.0)
        await eventually(lambda: setup.node.slots_free == 2)


@pytest.mark.parametrize("header", [{"detach": True}, {}])
async def test_native_task_runs_on_detached_or_when_its_control_is_lost(tmp_path: Path, header: dict[str, Any]) -> None:
    """The control dies with its link; the task goes on, and is read to its end over the next link."""
    async with node_between(tmp_path, limits=Limits(reconnect_grace_s=0.0)) as setup:
        link = await setup.link()
        task_id = str(uuid.uuid4())
        stream = link.prompt(task_id=task_id, **header)
        call = await setup.engine.asked()
        call.say("t0 ")
        await eventually(lambda: stream.text == "t0 ")
        if header:
            link.send(stream.id, Type.DETACH, b"left")
        else:
            assert link.connection is not None
            link.connection.abort("the control dies")
            link = await setup.control.linked(2)
        await setup.node.runner.sweep()
        again = link.attach(task_id, len(stream.data))
        call.say("t1 ")
        call.end()
        await ended(again)
        assert (stream.data + again.data).count(b"event: end") == 1
        assert again.text == "t1 "


@pytest.mark.parametrize("how", ["lost", "left", "broken"])
async def test_body_that_can_not_come_any_more_frees_the_slot(how: str, tmp_path: Path) -> None:
    """And where nobody wanted that end, nobody is told of one: whoever sends the task again has it run."""
    async with node_between(tmp_path, slots=1) as setup:
        link = await setup.link()
        stream = link.open(b"x" * 1_000, send_body=False, detach=True)
        await eventually(lambda: stream.accepted)
        if how == "broken":
            assert link.connection is not None
            link.connection.abort("the control dies")
        else:
            link.send(stream.id, Type.DETACH, how.encode())
        await eventually(lambda: setup.node.slots_free == 1)
        assert len(list(setup.node.logs.reports(None))) == (1 if how == "left" else 0)


async def test_overtaken_reader_is_told_of_the_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.node.execution.ROOM_TIMEOUT_S", 0.05)
    async with node_between(tmp_path, limits=Limits(kept_bytes=150_000)) as setup:
        link = await setup.link()
        stream = link.prompt()
        call = await setup.engine.asked()
        for _ in range(10):
            call.say("z" * 60_000)
        await eventually(lambda: setup.node.logs.running[0].log.start > INITIAL_CREDIT_BYTES)
        log = setup.node.logs.running[0].log
        assert log.end - log.start <= 150_000  # what a reader that does not read costs the node
        link.grant(stream, 100_000)
        await eventually(lambda: stream.refused is not None)
        assert stream.refused is not None
        assert stream.refused["code"] == "GAP"
        call.end()


async def test_nodes_own_routes_over_the_link(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        running = link.prompt()
        call = await setup.engine.asked()

        async def ask(method: str, path: str) -> tuple[int, Any]:
            stream = link.stream()
            link.send(stream.id, Type.OPEN, json.dumps({"method": method, "path": path, "headers": {}}).encode())
            await ended(stream)
            assert stream.order[0] == Type.HEAD
            assert stream.head is not None
            return stream.head["status"], json.loads(stream.data)

        assert (await ask("GET", f"/v2/pools/{POOL}"))[1]["slots_free"] == 1
        assert (await ask("GET", f"/v2/pools/{POOL}/health"))[1]["ready"] is True
        assert (await ask("GET", "/v2/pools/nowhere"))[0] == 404
        assert (await ask("POST", "/v2/tasks"))[0] == 405
        assert (await ask("GET", "/v2/secrets"))[0] == 404
        (task,) = (await ask("GET", "/v2/tasks"))[1]["tasks"]
        assert task["state"] == "running"
        assert (await ask("DELETE", f"/v2/tasks/{task['task_id']}"))[0] == 202
        assert (await ended(running))["finish_reason"] == "canceled"
        await asyncio.wait_for(call.disconnected.wait(), 1.0)
