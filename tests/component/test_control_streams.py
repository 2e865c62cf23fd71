"""What a client is told: one end whatever fails and whenever, queue places, pings, and nothing before HEAD."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from llorch import web
from llorch.control import answers, dispatch, intake
from llorch.control.answers import MAX_HELD_BYTES
from llorch.control.answers import Stream as ClientStream
from llorch.control.routes_tasks import MOST_ON_LOOP_BYTES
from llorch.errors import Code
from llorch.records import Type
from tests.component.control_harness import (
    MODEL,
    TOKENS,
    Answered,
    Asking,
    Attempt,
    ControlUnderTest,
    LinkedNode,
    a_control,
    eventually,
    look_often,
    lost_soon,
    ping_soon,
    pool,
)

# ---------------------------------------------------------------- one end, for every form of answer and every phase


def native_stream(control: ControlUnderTest) -> Asking:
    return control.submit()


def native_json(control: ControlUnderTest) -> Asking:
    return control.whole()


def v1_stream(control: ControlUnderTest) -> Asking:
    return control.chat()


def v1_json(control: ControlUnderTest) -> Asking:
    return control.chat(stream=False)


def detached(control: ControlUnderTest) -> Asking:
    return control.submit(detach=True)


FORMS = [native_stream, native_json, v1_stream, v1_json, detached]


async def before_accept(node: LinkedNode, attempt: Attempt) -> str:
    attempt.refuse(Code.ENGINE_FAILED)
    return "ENGINE_FAILED"


async def after_accept(node: LinkedNode, attempt: Attempt) -> str:
    attempt.accept().fail_early(Code.CONTEXT_LENGTH_EXCEEDED)
    return "CONTEXT_LENGTH_EXCEEDED"


async def after_head(node: LinkedNode, attempt: Attempt) -> str:
    attempt.accept().head()
    await node.settled()
    await node.cut()
    return "NODE_LOST"


async def mid_event(node: LinkedNode, attempt: Attempt) -> str:
    begin(attempt)
    attempt.data(b'event: token\ndata: {"t": "tw')
    await node.settled()
    await node.cut()
    return "NODE_LOST"


async def after_events(node: LinkedNode, attempt: Attempt) -> str:
    begin(attempt)
    await node.settled()
    await node.cut()
    return "NODE_LOST"


async def sealed_with_an_error(node: LinkedNode, attempt: Attempt) -> str:
    begin(attempt)
    if attempt.header["path"] == "native":
        attempt.fail()
    else:
        frame = {"error": {"code": "ENGINE_FAILED", "message": "m"}}
        if attempt.header["stream"]:
            attempt.data(f"data: {json.dumps(frame)}\n\n".encode())
        attempt.tail(error={"code": "ENGINE_FAILED", "message": "m"})
    return "ENGINE_FAILED"


def begin(attempt: Attempt) -> None:
    if attempt.header["path"] == "native":
        attempt.begin().say("one")
    elif attempt.header["stream"]:
        attempt.accept().head().data(b'data: {"choices": []}\n\n')
    else:
        attempt.accept().head("application/json", content_length="1000").data(b'{"half": ')


async def asked(
    control: ControlUnderTest, form: Callable[[ControlUnderTest], Asking]
) -> tuple[LinkedNode, Asking, Attempt]:
    """A node, a request of this form, and what the node was asked for it."""
    node = await control.join("a")
    asking = form(control)
    return node, asking, await node.asked()


FAILURES = [before_accept, after_accept, after_head, mid_event, after_events, sealed_with_an_error]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failure_is_told_once_and_leaves_no_claim(
    form: Callable[[ControlUnderTest], Asking],
    failure: Callable[[LinkedNode, Attempt], Awaitable[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost_soon(monkeypatch)
    async with a_control() as control:
        node, asking, attempt = await asked(control, form)
        code = await failure(node, attempt)
        answer = await asking.answer()
        if form is native_stream:
            _one_error_event(answer, code)
        elif form is native_json:
            assert (answer.code, answer.cut) == (code, False)
        elif form is v1_stream:
            _one_error_frame(answer, code)
        elif form is v1_json:
            # Before a byte it is a status; after that only a cut body can say that it is not whole.
            assert answer.cut if answer.status == 200 else answer.code == code
        elif failure is before_accept:
            assert answer.code == code
        else:
            assert answer.status == 202
        await control.state(attempt.task_id, "failed")
        assert (await control.task(attempt.task_id))["error"]["code"] == code
        if failure in (after_head, mid_event, after_events):
            await node.join()
        await control.idle()


def _one_error_event(answer: Answered, code: str) -> None:
    if answer.status != 200:
        assert answer.code == code
        return
    assert answer.terminals == ["error"]
    assert answer.names[-1] == "error"
    assert answer.events[-1][1]["code"] == code
    assert not answer.cut


def _one_error_frame(answer: Answered, code: str) -> None:
    if answer.status != 200:
        assert answer.code == code
        return
    frames = [value for _, value in answer.events if isinstance(value, dict) and "error" in value]
    assert [frame["error"]["code"] for frame in frames] == [code]
    assert answer.events[-1][1] == frames[0]
    assert not answer.cut


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_node_that_is_lost_after_the_last_event_gets_no_second_one(
    pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin().say("one")
        before = len(attempt.log)
        kept, attempt.emit = attempt.emit, lambda *_: None  # type: ignore[method-assign]
        attempt.event("end", {"finish_reason": "stop"})
        last = attempt.log[before:]
        for start in range(0, len(last), -(-len(last) // pieces)):
            kept(Type.DATA, last[start : start + -(-len(last) // pieces)])
        await asking.has(last)
        await node.cut()
        answer = await asking.answer()
        assert answer.terminals == ["end"]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("last", [2, 1, 0])
async def test_a_v1_stream_comes_whole_however_its_log_is_cut_into_pieces(line_end: bytes, last: int) -> None:
    """Also one whose last event has no end."""
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        attempt = (await node.asked()).accept().head()
        said = b"data: 1\n\ndata: 2\n\n: ping\n\ndata: 3".replace(b"\n", line_end) + last * line_end
        for at in range(len(said)):
            attempt.data(said[at : at + 1])
            await node.settled()
        attempt.tail()
        assert (await asking.answer()).raw == said


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
async def test_what_a_lost_node_cut_off_is_no_event_whatever_its_lines_end_in(
    line_end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRLF is what sse-starlette (3.x) writes if it is told nothing."""
    lost_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        first = b'data: {"choices": []}' + 2 * line_end
        (await node.asked()).accept().head().data(first + b'data: {"cho')
        await asking.has(first)
        await node.cut()
        answer = await asking.answer()
        assert answer.raw.startswith(first + b'data: {"error"')
        assert not answer.cut


async def test_a_silent_v1_stream_with_crlf_is_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    ping_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        attempt = (await node.asked()).accept().head().data(b"data: 1\r\n\r\n")
        await asking.has(b"data: 1\r\n\r\n: ping")
        attempt.tail()
        await asking.answer()


async def test_a_streamed_v1_answer_that_is_no_stream_of_events_is_neither_held_nor_pinged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    soon = ping_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        attempt = (await node.asked()).accept().head("audio/wav").data(b"RIFF\n\n")
        await asking.has(b"RIFF")
        await asyncio.wait((asking._task,), timeout=2.5 * soon)
        attempt.tail()
        assert (await asking.answer()).raw == b"RIFF\n\n"


async def test_an_event_that_is_too_large_to_be_held_is_passed_on_in_parts() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        attempt = (await node.asked()).accept().head().data(b"data: " + b"x" * MAX_HELD_BYTES)
        await asking.has(b"x" * MAX_HELD_BYTES)
        attempt.data(b"\n\n").tail()
        assert (await asking.answer()).raw == attempt.log


@pytest.mark.parametrize("done", [b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n"], ids=["lf", "crlf"])
async def test_a_v1_stream_that_was_done_gets_no_error_frame(monkeypatch: pytest.MonkeyPatch, done: bytes) -> None:
    lost_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        (await node.asked()).accept().head().data(done)
        await asking.has(b"[DONE]")
        await node.cut()
        assert (await asking.answer()).raw == done


async def test_a_v1_stream_that_was_told_of_its_error_is_told_of_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_soon(monkeypatch)
    frame = b'data: {"error": {"code": "DEADLINE_EXCEEDED"}}\n\n'
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        (await node.asked()).accept().head().data(b"data: 1\n\n" + frame)
        await asking.has(b"DEADLINE_EXCEEDED")
        await node.cut()  # before its TAIL
        assert (await asking.answer()).raw == b"data: 1\n\n" + frame


async def test_an_unexpected_fault_ends_the_task_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(self: Any, data: bytes) -> None:
        raise KeyError("t")

    monkeypatch.setattr(answers.NativeJson, "write", breaks)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.whole()
        attempt = (await node.asked()).begin().say("x")
        answer = await asking.answer()
        assert (answer.status, answer.code) == (500, "INTERNAL")
        await eventually(lambda: attempt.canceled and attempt.detached == "left")
        assert (await control.task(attempt.task_id))["state"] == "failed"
        await control.idle()


async def test_an_answer_too_large_for_one_document_is_refused_and_its_task_canceled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "MAX_COLLECTED_BYTES", 1000)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.whole()
        attempt = (await node.asked()).begin().say("x" * 2000)
        answer = await asking.answer()
        assert (answer.status, answer.code) == (413, "PAYLOAD_TOO_LARGE")
        await eventually(lambda: attempt.canceled)
        await control.idle()


# ---------------------------------------------------------------- cancel


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("phase", ["queued", "accepted", "streaming"])
async def test_cancel_runs_to_the_tail_and_is_told_once(form: Callable[[ControlUnderTest], Asking], phase: str) -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        holder = None
        if phase == "queued":
            holder = control.whole(prompt="holder")
            holding = await node.asked()
        asking = form(control)
        if holder is not None:
            await control.waiting(1)
            (task_id,) = [t.task_id for t in control.control.dispatcher.tasks.running_tasks() if t.state == "queued"]
        else:
            attempt = await node.asked()
            task_id = attempt.task_id
            if phase == "accepted":
                attempt.accept()
            else:
                begin(attempt)
                await control.state(task_id, "streaming")
            await node.settled()
        for _ in range(2):  # it is idempotent
            assert (await control.ask("POST", f"/v2/tasks/{task_id}/cancel").answer()).status == 202
        if holder is None:
            await eventually(lambda: attempt.canceled)
            assert attempt.detached is None, "the stream runs to its TAIL"
            _end_canceled(attempt)
        answer = await asking.answer()
        if form is native_stream:
            assert answer.terminals == ["end"]
            assert answer.events[-1][1]["finish_reason"] == "canceled"
        elif form is native_json:
            assert answer.status == 499 if phase == "queued" else answer.json["finish_reason"] == "canceled"
        elif form is v1_stream:
            frames = [v for _, v in answer.events if "error" in v] if answer.status == 200 else [answer.json]
            assert [frame["error"]["code"] for frame in frames] == ["CANCELED"]
        elif form is v1_json:
            assert answer.cut if phase == "streaming" else answer.status == 499
        assert (await control.task(task_id))["state"] == "canceled"
        assert (await control.ask("DELETE", f"/v2/tasks/{task_id}").answer()).status == 202
        if holder is not None:
            holding.begin().end()
            await holder.answer()
        await control.idle()


def _end_canceled(attempt: Attempt) -> None:
    """As a node does: with what the form's log has for it."""
    if attempt.header["path"] == "native":
        if attempt.log:
            attempt.end("canceled")
        else:
            attempt.tail(finish_reason="canceled")
        return
    error = {"code": "CANCELED", "message": "the task was canceled"}
    if attempt.log and attempt.header["stream"]:
        attempt.data(f"data: {json.dumps({'error': error})}\n\n".encode())
    attempt.tail(finish_reason="canceled", error=error)


async def test_a_canceled_native_task_with_a_canceled_error_in_its_tail_ends_with_its_event() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).accept()
        await control.ask("POST", f"/v2/tasks/{attempt.task_id}/cancel").answer()
        attempt.tail(finish_reason="canceled", error={"code": "CANCELED", "message": "m"}, status=499)
        answer = await asking.answer()
        assert (answer.terminals, answer.events[-1][1]["finish_reason"]) == (["end"], "canceled")


async def test_a_task_that_was_canceled_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ping_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        asking = control.submit()
        attempt = await node.asked()
        await control.ask("POST", f"/v2/tasks/{attempt.task_id}/cancel").answer()
        attempt.accept().fail_early(Code.ENGINE_FAILED)
        answer = await asking.answer()
        assert (answer.terminals, answer.events[-1][1]["finish_reason"]) == (["end"], "canceled")
        assert len(node.opened) == 1


async def test_a_v1_stream_that_only_pinged_and_was_canceled_gets_its_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    ping_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        attempt = (await node.asked()).accept()
        await asking.has(b": ping")
        await control.ask("POST", f"/v2/tasks/{attempt.task_id}/cancel").answer()
        attempt.tail(finish_reason="canceled", error={"code": "CANCELED", "message": "m"}, status=499)
        answer = await asking.answer()
        assert [value["error"]["code"] for _, value in answer.events] == ["CANCELED"]


async def test_a_task_is_not_canceled_by_another_principal() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.whole()
        attempt = (await node.asked()).begin()
        for path, method in (("/cancel", "POST"), ("", "DELETE")):
            answer = await control.ask(method, f"/v2/tasks/{attempt.task_id}{path}", who="bob").answer()
            assert (answer.status, answer.code) == (404, "TASK_NOT_FOUND")
        await node.settled()
        assert not attempt.canceled
        assert (await control.ask("DELETE", f"/v2/tasks/{attempt.task_id}", who="admin").answer()).status == 202
        await eventually(lambda: attempt.canceled)
        attempt.end("canceled")
        await asking.answer()


# ---------------------------------------------------------------- what comes before HEAD


async def test_nothing_is_sent_before_head_unless_the_task_has_to_queue() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        first = control.submit()
        attempt = (await node.asked()).accept()
        await node.settled()
        assert first.status is None
        queued = control.submit()
        await queued.has(b"event: queued")
        assert queued.status == 200
        for name, value in (
            ("Content-Type", "text/event-stream"),
            ("Cache-Control", "no-cache"),
            ("X-Accel-Buffering", "no"),
        ):
            assert queued.headers[name].startswith(value)
        v1 = control.chat()
        await control.waiting(2)
        assert v1.status is None
        attempt.head().say("x").end()
        await first.answer()
        (await node.asked()).begin().say("second").end()
        answer = await queued.answer()
        assert answer.names[0] == "queued"
        assert answer.events[0][1]["position"] == 1
        assert set(answer.events[0][1]) == {"position", "eta_ms"}
        assert (answer.said, answer.terminals) == ("second", ["end"])
        (await node.asked()).accept().head().data(b"data: [DONE]\n\n").tail()
        assert (await v1.answer()).raw == b"data: [DONE]\n\n"


async def test_a_queue_place_is_told_at_most_once_a_second() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        started = time.monotonic()
        asking = control.submit()
        for _ in range(6):  # each time it is back in the queue, and each time there is nothing new to say
            (await node.asked()).refuse(Code.ALL_SLOTS_BUSY)
            await control.waiting(1)
            await node.beat(pools=[pool(slots=1)])
        (await node.asked()).begin().end()
        names = (await asking.answer()).names
        assert names.count("queued") <= 1 + (time.monotonic() - started) // 1.0


async def test_a_place_in_the_queue_is_told_again_every_second() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        holder = control.whole()
        holding = (await node.asked()).accept()
        asking = control.submit()
        await eventually(lambda: asking.so_far.count(b"event: queued") == 2, within_s=3)
        holding.begin().end()
        await holder.answer()
        (await node.asked()).begin().end()
        assert (await asking.answer()).terminals == ["end"]


async def test_a_v1_stream_that_waits_long_commits_and_pings_wherever_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    ping_soon(monkeypatch)
    look_often(monkeypatch)
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        asking = control.chat()
        attempt = (await node.asked()).accept()
        await asking.has(b": ping\n\n: ping\n\n")
        assert (asking.status, asking.headers["Content-Type"]) == (200, "text/event-stream")
        queued = control.chat()
        await queued.has(b": ping")
        attempt.head().data(b"data: [DONE]\n\n").tail()
        await asking.answer()
        (await node.asked()).refuse(Code.INVALID_REQUEST)
        answer = await queued.answer()
        assert [value["error"]["code"] for _, value in answer.events] == ["INVALID_REQUEST"]


async def test_a_native_stream_that_was_placed_and_waits_long_commits_and_pings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ping_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).accept()
        await asking.has(b": ping\n\n: ping\n\n")
        assert (asking.status, asking.headers["Content-Type"]) == (200, "text/event-stream")
        assert (asking.headers["X-Llorch-Task"], asking.headers["X-Llorch-Node"]) == (attempt.task_id, "a")
        attempt.head().say("one").end()
        answer = await asking.answer()
        assert (answer.said, answer.terminals, answer.cut) == ("one", ["end"], False)


async def test_a_native_stream_that_only_pinged_gets_its_failure_as_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    ping_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).accept()
        await asking.has(b": ping")
        attempt.fail_early(Code.CONTEXT_LENGTH_EXCEEDED)
        answer = await asking.answer()
        assert (answer.status, answer.names) == (200, ["error"])
        assert answer.events[0][1]["code"] == "CONTEXT_LENGTH_EXCEEDED"


async def test_a_silence_is_filled_with_pings_only_between_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ping_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin().say("one")
        await asking.has(b": ping")
        attempt.data(b"event: token\n")  # nobody sees it before it is whole
        await node.settled()
        pings = asking.so_far.count(b": ping")
        await eventually(lambda: asking.so_far.count(b": ping") > pings)
        attempt.data(b'data: {"t":"two","i":1}\n\n').end()
        answer = await asking.answer()
        assert answer.said == "onetwo"
        assert b'event: token\ndata: {"t":"two","i":1}\n\n' in answer.raw


async def test_an_event_that_is_passed_on_in_parts_is_not_broken_by_a_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    soon = ping_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        attempt = (await node.asked()).accept()
        await asking.has(b": ping")
        attempt.head().data(b"data: " + b"x" * MAX_HELD_BYTES)
        await asking.has(b"x" * MAX_HELD_BYTES)
        pings = asking.so_far.count(b": ping")
        await asyncio.wait((asking._task,), timeout=2.5 * soon)
        assert asking.so_far.count(b": ping") == pings
        attempt.data(b"\n\n").tail()
        assert (await asking.answer()).raw.endswith(b"x\n\n")


async def test_an_answer_in_one_piece_is_never_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    soon = ping_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat(stream=False)
        attempt = (await node.asked()).accept()
        await asyncio.wait((asking._task,), timeout=2.5 * soon)
        assert asking.status is None
        attempt.head("application/json").data(b"{}").tail()
        assert (await asking.answer()).raw == b"{}"


# ---------------------------------------------------------------- whole answers


async def test_a_whole_task_is_answered_with_its_text_and_what_is_known_of_it() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.whole()
        attempt = (await node.asked()).begin().say("Hé", "llo")
        attempt.end()
        answer = await asking.answer()
        task = answer.json
        assert {"task_id", "state", "model", "node_id", "pool_id", "attempt", "offset", "tokens_in", "tokens_out",
                "cached_tokens", "queue_ms", "ttft_ms", "decode_ms", "finish_reason", "text"} <= set(task)  # fmt: skip
        assert (task["text"], task["state"], task["finish_reason"]) == ("Héllo", "done", "stop")
        assert (task["offset"], task["tokens_out"]) == (len(attempt.log), 2)
        for name, value in (("Node", "a"), ("Pool", "p0"), ("Attempts", "1"), ("Task", attempt.task_id)):
            assert answer.headers[f"X-Llorch-{name}"] == value
        assert int(answer.headers["X-Llorch-Queue-Ms"]) >= 0


async def test_a_streams_bytes_are_the_logs_own() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin().say(*(f"t{i} " for i in range(50)))
        attempt.end()
        answer = await asking.answer()
        assert answer.raw == attempt.log
        assert answer.headers["X-Llorch-Task"] == attempt.task_id


async def test_a_v1_answer_keeps_the_engines_status_type_and_length_and_no_other_header() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat(stream=False)
        (await node.asked()).accept().head("application/json", content_length="2", x_engine="secret").data(b"{}").tail()
        answer = await asking.answer()
        assert (answer.raw, answer.headers["Content-Length"]) == (b"{}", "2")
        assert "X-Engine" not in answer.headers
        assert (answer.headers["X-Llorch-Node"], answer.headers["X-Llorch-Attempts"]) == ("a", "1")


@pytest.mark.parametrize("length", ["5", "1"])
async def test_a_v1_answer_of_another_length_than_was_announced_is_cut(length: str) -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat(stream=False)
        attempt = (await node.asked()).accept().head("application/json", content_length=length)
        attempt.data(b"{}").tail()
        assert (await asking.answer()).cut
        await control.idle()


@pytest.mark.parametrize("length", ["abc", "-5", "١"])
async def test_what_is_no_length_is_not_passed_on(length: str) -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat(stream=False)
        (await node.asked()).accept().head("application/json", content_length=length).data(b"{}").tail()
        answer = await asking.answer()
        assert (answer.status, answer.raw, answer.headers["Transfer-Encoding"]) == (200, b"{}", "chunked")


async def test_a_detached_task_is_taken_once_a_node_has_accepted_it() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit(detach=True, accept="application/json")
        attempt = await node.asked()
        await node.settled()
        assert asking.status is None
        attempt.accept()
        answer = await asking.answer()
        assert answer.status == 202
        assert answer.json["events_url"] == f"/v2/tasks/{attempt.task_id}/events"
        attempt.head().say("x").end()
        await control.state(attempt.task_id, "done")
        await control.idle()


async def test_a_detached_task_whose_submitter_left_before_it_was_taken_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llorch.control.audience.RECONNECT_GRACE_S", 0.2)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit(detach=True)
        attempt = await node.asked()
        await asking.leave()
        await eventually(lambda: attempt.detached == "left")
        await control.idle()


# ---------------------------------------------------------------- leaving


@pytest.mark.parametrize("form", [native_stream, native_json, v1_stream, v1_json])
async def test_a_client_that_vanishes_is_told_to_the_node_as_left(
    form: Callable[[ControlUnderTest], Asking],
) -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = form(control)
        attempt = await node.asked()
        begin(attempt)
        await control.state(attempt.task_id, "streaming")
        await asking.leave()
        await eventually(lambda: attempt.detached == "left", within_s=5)
        assert not attempt.canceled, "what becomes of the task is the node's to decide"
        await control.idle()
        attempt.data(b"late")
        attempt.tail()
        await node.settled()
        assert node.up


@pytest.mark.parametrize("form", [native_stream, v1_stream])
async def test_a_client_that_goes_once_it_has_read_the_end_was_served(
    form: Callable[[ControlUnderTest], Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "LAST_WORD_S", 5.0)
    async with a_control() as control:
        node = await control.join("a")
        asking = form(control)
        attempt = (await node.asked()).accept().head()
        attempt.data(b"event: end\ndata: {}\n\n" if form is native_stream else b"data: [DONE]\n\n")
        await asking.has(b"\n\n")
        await asking.leave()
        await asyncio.sleep(0.05)  # the control learns of it first
        attempt.tail(finish_reason="stop", tokens_in=1, tokens_out=1)
        await control.state(attempt.task_id, "done")
        assert attempt.detached is None
        await control.idle()


@pytest.mark.parametrize("comes_back", [False, True])
async def test_a_client_that_vanishes_from_the_queue_keeps_its_place_for_a_while_and_no_slot(
    comes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llorch.control.audience.RECONNECT_GRACE_S", 5.0 if comes_back else 0.5)
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        holder = control.whole()
        holding = await node.asked()
        leaver = control.submit(prompt="leaver")
        await control.waiting(1)
        task_id = next(iter(control.control.dispatcher.tasks)).task_id
        stayer = control.whole(prompt="stayer")
        await control.waiting(2)
        await leaver.leave()
        holding.begin().end()
        await holder.answer()
        attempt = await node.asked()
        assert b"stayer" in attempt.body
        if comes_back:
            again = control.events(task_id)
            await again.has(b"position")
            assert (await control.task(task_id))["queue"]["position"] == 1
        attempt.begin().end()
        await stayer.answer()
        if comes_back:
            attempt = await node.asked()
            assert b"leaver" in attempt.body
            attempt.begin().end()
            reader = await node.reader()
            reader.accept().head().data(attempt.log)
            reader.tail(finish_reason="stop")
            assert (await again.answer()).terminals == ["end"]
        await control.state(task_id, "done" if comes_back else "canceled")
        await control.idle()
        assert len(node.opened) == (3 if comes_back else 2)


async def test_a_slot_that_is_free_goes_to_one_that_came_back_at_once() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        control.chat()
        holding = await node.asked()
        leaver = control.submit()
        await control.waiting(1)
        task_id = next(iter(control.control.dispatcher.tasks)).task_id
        await leaver.leave()
        holding.accept().tail(finish_reason="stop")
        await eventually(lambda: control.control.dispatcher.tasks.running == 1)
        await node.settled()
        assert len(node.opened) == 1
        control.events(task_id)
        attempt = await node.asked()
        assert attempt.task_id == task_id
        attempt.begin().end()
        (await node.reader()).accept().head().tail()
        await control.idle()


async def test_a_client_that_stalls_is_dropped_and_told_to_the_node_as_slow() -> None:
    async with a_control(slow_reader_timeout=0.3) as control:
        node = await control.join("a")
        reader, writer = await asyncio.open_connection("127.0.0.1", control.port, limit=1024)
        body = b'{"model": "m", "prompt": "x"}'
        writer.write(
            f"POST /v2/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKENS['alice']}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        attempt = (await node.asked()).begin()
        await reader.readuntil(b"started")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        until = time.monotonic() + 10
        while attempt.detached is None and time.monotonic() < until:
            room = 100_000 - (len(attempt.log) - attempt.granted)
            if room > 0:
                attempt.data(b"x" * room)
            await asyncio.sleep(0.01)
        assert attempt.detached == "slow"
        writer.transport.abort()
        await control.idle()


def test_only_a_whole_event_can_have_been_the_last_one() -> None:
    stream = ClientStream.__new__(ClientStream)
    for pieces, last in (
        ((b"", b"a\n\nb\n\n"), b"b"),
        ((b"event: e", b"nd\n\n"), b"event: end"),
        ((b"a\r\n\r\n", b"data: [DONE]\r\n\r\n"), b"data: [DONE]"),
        ((b"x\n\n", b"event: end\n"), b""),
        ((b"", b""), b""),
    ):
        stream._last, stream.whole = pieces, not pieces[1].endswith(b"end\n")
        assert stream.last_block() == last


# ---------------------------------------------------------------- large bodies


@pytest.mark.parametrize(("form", "path"), [(native_json, "/v2/tasks"), (v1_json, "/v1/chat/completions")])
async def test_nobody_waits_while_a_large_body_is_looked_at(
    form: Callable[[ControlUnderTest], Asking], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at, go_on = threading.Event(), threading.Event()
    decode = intake.decode_object

    def slow(raw: bytes) -> dict[str, Any]:
        if len(raw) > MOST_ON_LOOP_BYTES:
            looked_at.set()
            assert go_on.wait(5)  # on the loop's own thread, nobody would say so
        return decode(raw)

    monkeypatch.setattr(intake, "decode_object", slow)
    text = "x" * MOST_ON_LOOP_BYTES
    async with a_control() as control:
        node = await control.join("a", pool(slots=2))
        said = {"prompt": text} if form is native_json else {"messages": [{"role": "user", "content": text}]}
        raw = io.BytesIO(json.dumps({"model": MODEL, **said}).encode())
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        large = control.ask("POST", path, data=raw, headers=headers)
        await eventually(looked_at.is_set, within_s=5, what="a look at the body")
        small = form(control)
        (await node.asked()).begin().end()
        assert (await small.answer()).status == 200
        assert not large.done
        go_on.set()
        attempt = (await node.asked()).begin()
        attempt.end()
        assert (await large.answer()).status == 200
        await control.idle()


async def test_bodies_that_wait_to_be_looked_at_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, go_on = threading.Event(), threading.Event()
    decode = intake.decode_object

    def slow(raw: bytes) -> dict[str, Any]:
        looked_at.set()
        assert go_on.wait(5)
        return decode(raw)

    counts: list[web.Arriving] = []

    class Counted(web.Arriving):
        def __init__(self, most_bytes: int) -> None:
            super().__init__(most_bytes)
            counts.append(self)

    monkeypatch.setattr(web, "Arriving", Counted)
    monkeypatch.setattr(web, "MIN_ARRIVING_BYTES", 1)
    monkeypatch.setattr(intake, "decode_object", slow)
    raw = json.dumps({"model": MODEL, "prompt": "x" * MOST_ON_LOOP_BYTES, "max_tokens": None}).encode()
    async with a_control(max_body=len(raw)) as control:  # two of them at once
        node = await control.join("a", pool(slots=4))

        def ask() -> Asking:
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            return control.ask("POST", "/v2/tasks", data=io.BytesIO(raw), headers=headers)

        taken = [ask()]
        await eventually(looked_at.is_set, within_s=5, what="a look at the body")
        taken.append(ask())
        await eventually(lambda: counts[0]._now == 2 * len(raw), within_s=5, what="two bodies")
        refused = await ask().answer()
        assert (refused.status, refused.code) == (429, "RATE_LIMITED")
        assert refused.json["error"]["details"]["limit"] == "bodies"
        go_on.set()
        for _ in taken:
            (await node.asked()).begin().end()
        for each in taken:
            assert (await each.answer()).status == 200
        await control.idle()
        assert counts[0]._now == 0
