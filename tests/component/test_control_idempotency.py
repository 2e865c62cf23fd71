"""The same request twice, by its Idempotency-Key: one task, one answer, and a new one only where the first came to
nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from typing import Any

import pytest

from llorch.control import answers, audience
from llorch.errors import Code
from llorch.records import Type
from tests.component.control_harness import (
    MODEL,
    Asking,
    ControlUnderTest,
    Stream,
    a_control,
    error_wire,
    eventually,
    look_often,
    pool,
)
from tests.component.test_control_reconnect import back

KEY = "key-1"
DIGEST = hashlib.sha256(b"alice\0" + KEY.encode()).hexdigest()


def keyed(control: ControlUnderTest, form: str, *, key: str = KEY, who: str = "alice", **more: Any) -> Asking:
    """A request of one form with a key; always the same body unless the test says otherwise."""
    headers = {"Idempotency-Key": key, "Accept": "application/json" if form == "json" else "text/event-stream"}
    body = {"model": MODEL, "prompt": "Hello"} | more
    if form.startswith("v1"):
        body["stream"] = form == "v1"
        return control.ask("POST", "/v1/completions", who=who, json=body, headers=headers)
    if form == "detached":
        body["detach"] = True
    return control.ask("POST", "/v2/tasks", who=who, json=body, headers=headers)


def shown(attempt: Stream, form: str) -> Stream:
    if form.startswith("v1"):
        kind = "text/event-stream" if form == "v1" else "application/json"
        return attempt.accept().head(kind).data(b'data: {"n": 1}\n\n')  # type: ignore[return-value]
    return attempt.begin().say("one ")  # type: ignore[return-value]


def finished(attempt: Stream, form: str) -> None:
    if form.startswith("v1"):
        attempt.tail(finish_reason="stop")
    else:
        attempt.end()


FORMS = ["native", "json", "v1", "v1 json"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("when", ["queued", "placed", "streaming"])
async def test_the_same_key_and_body_is_the_same_task(form: str, when: str) -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        if when == "queued":
            control.chat()
            holding = await node.asked()
        first = keyed(control, form)
        if when == "queued":
            await control.waiting(1)
        else:
            attempt = await node.asked()
        if when == "streaming":
            shown(attempt, form)
            await control.state(attempt.task_id, "streaming")
        second = keyed(control, form)
        await eventually(lambda: when == "streaming" or _followed(control))
        if when == "queued":
            holding.accept().tail(finish_reason="stop")
            attempt = await node.asked()
        assert attempt.header["key_digest"] == DIGEST
        if when != "streaming":
            shown(attempt, form)
        reader = await node.reader()
        assert reader.header["offset"] == 0
        kind = "application/json" if form == "v1 json" else "text/event-stream"
        reader.accept().head(kind).data(attempt.log)
        reader.tokens = list(attempt.tokens)
        for each in (attempt, reader):
            finished(each, form)
        answers = [await asking.answer() for asking in (first, second)]
        assert [answer.status for answer in answers] == [200, 200]
        assert "Idempotency-Replayed" not in answers[0].headers
        assert answers[1].headers["Idempotency-Replayed"] == "true"
        assert answers[0].headers["X-Llorch-Task"] == answers[1].headers["X-Llorch-Task"] == attempt.task_id
        if form == "json":
            assert [answer.json["text"] for answer in answers] == ["one ", "one "]
            assert answers[1].json["state"] == "done"
        else:
            logs = [answer.raw[answer.raw.find(attempt.log[:8]) :] for answer in answers]
            assert logs == [attempt.log, attempt.log]
        assert len(node.opened) == (2 if when == "queued" else 1)
        await control.idle()


def _followed(control: ControlUnderTest) -> bool:
    return any(each._followers for each in control.control.dispatcher._audiences.values())


async def test_another_body_under_the_key_is_refused_and_another_principals_key_is_another() -> None:
    async with a_control() as control:
        node = await control.join("a")
        first = keyed(control, "native")
        attempt = (await node.asked()).begin()
        for form, more in (("native", {"prompt": "other"}), ("v1", {})):
            answer = await keyed(control, form, **more).answer()
            assert (answer.status, answer.code) == (422, "IDEMPOTENCY_MISMATCH")
            assert answer.json["error"]["param"] == "Idempotency-Key"
            assert "prompt" not in answer.text
        other = keyed(control, "native", who="bob")
        theirs = (await node.asked()).begin()
        assert theirs.header["key_digest"] != attempt.header["key_digest"]
        for each, asking in ((attempt, first), (theirs, other)):
            each.end()
            assert "Idempotency-Replayed" not in (await asking.answer()).headers
        await control.idle()


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9"])
async def test_a_key_that_is_none_is_refused(key: str) -> None:
    async with a_control() as control:
        await control.join("a")
        answer = await keyed(control, "native", key=key).answer()
        assert (answer.status, answer.json["error"]["param"]) == (400, "Idempotency-Key")


async def test_ten_at_once_are_one_task() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = [keyed(control, "native") for _ in range(10)]
        attempt = (await node.asked()).begin().say("one ")
        attempt.end()
        for number in range(9):
            reader = await node.reader(number)
            reader.accept().head().data(attempt.log)
            reader.tail(finish_reason="stop")
        answers = [await each.answer() for each in asking]
        assert {answer.raw for answer in answers} == {attempt.log}
        assert sorted("Idempotency-Replayed" in answer.headers for answer in answers) == [False] + [True] * 9
        assert len(node.opened) == 1
        await control.idle()


async def test_a_detached_task_is_taken_once() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = [keyed(control, "detached") for _ in range(3)]
        attempt = (await node.asked()).begin()
        answers = [await each.answer() for each in asking]
        assert {answer.status for answer in answers} == {202}
        assert {answer.json["task_id"] for answer in answers} == {attempt.task_id}
        assert len(node.opened) == 1
        attempt.end()
        await control.idle()


@pytest.mark.parametrize("how", ["failed before a byte", "refused", "its reader left the queue"])
async def test_a_key_is_free_again_when_its_task_came_to_nothing(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audience, "RECONNECT_GRACE_S", 0.1)
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        holding: Stream | None = None
        if how == "its reader left the queue":
            control.chat()
            holding = await node.asked()
        first = keyed(control, "native")
        if holding is not None:
            await control.waiting(1)
            await first.leave()
            await control.waiting(0)
            holding.accept().tail(finish_reason="stop")
        elif how == "refused":
            (await node.asked()).refuse(Code.CONTEXT_LENGTH_EXCEEDED)
            assert (await first.answer()).code == "CONTEXT_LENGTH_EXCEEDED"
        else:
            (await node.asked()).accept().fail_early()
            assert (await first.answer()).code == "ENGINE_FAILED"
        second = keyed(control, "native")
        (await node.asked()).begin().say("anew ").end()
        answer = await second.answer()
        assert (answer.said, "Idempotency-Replayed" in answer.headers) == ("anew ", False)
        await control.idle()


async def test_a_failure_after_the_first_byte_is_told_again_and_not_run_again() -> None:
    async with a_control() as control:
        node = await control.join("a")
        first = keyed(control, "native")
        attempt = (await node.asked()).begin().say("one ")
        attempt.fail()
        await first.answer()
        second = keyed(control, "native")
        await _told(node, attempt, "sealed", code="ENGINE_FAILED")
        reader = await node.reader()
        reader.accept().head().data(attempt.log)
        reader.tail(error={"code": "ENGINE_FAILED", "message": "m"})
        answer = await second.answer()
        assert (answer.said, answer.terminals) == ("one ", ["error"]), answer
        assert len(node.opened) == 1


async def _told(node: Any, attempt: Stream, state: str, **more: Any) -> None:
    """The node answers the question how its task stands."""
    await eventually(lambda: node.calls, within_s=5, what="a call")
    call = node.calls.pop(0)
    assert call.header["path"] == f"/v2/tasks/{attempt.task_id}"
    report = {
        "task_id": attempt.task_id, "attempt": attempt.attempt, "owner": "alice", "state": state,
        "offset": len(attempt.log), **more,
    }  # fmt: skip
    call.accept().head("application/json")
    call.data(json.dumps(report).encode()).tail()


@pytest.mark.parametrize(
    ("state", "more", "anew"),
    [("running", {}, False), ("sealed", {}, False), ("sealed", {"finish_reason": "canceled"}, True)],
)
async def test_a_task_that_its_reader_left_is_what_its_node_says_it_is(
    state: str, more: dict[str, str], anew: bool
) -> None:
    async with a_control() as control:
        node = await control.join("a")
        first = keyed(control, "native", task_id=str(uuid.uuid4()))
        attempt = (await node.asked()).begin().say("one ")
        await first.has(b"one")
        await first.leave()
        await eventually(lambda: attempt.detached == "left")
        second = keyed(control, "native", task_id=attempt.task_id)
        await _told(node, attempt, state, **more)
        if anew:
            fresh = await node.asked()
            assert (fresh.task_id, fresh.attempt) == (attempt.task_id, 2)
            fresh.begin().say("anew ").end()
            assert (await second.answer()).said == "anew "
        else:
            reader = await node.reader()
            reader.accept().head().data(attempt.log)
            reader.tokens, reader.log = list(attempt.tokens), attempt.log
            reader.end()
            answer = await second.answer()
            assert (answer.said, answer.headers["Idempotency-Replayed"]) == ("one ", "true")
            assert len(node.opened) == 1


async def test_a_client_that_went_does_not_take_the_task_from_one_that_sent_the_same() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        first = keyed(control, "v1")
        attempt = (await node.asked()).accept()
        second = keyed(control, "v1")
        await eventually(lambda: _followed(control))
        await first.leave()
        await eventually(lambda: all(a._client is None for a in control.control.dispatcher._audiences.values()))
        attempt.head().data(b"data: 1\n\n")
        reader = await node.reader()
        reader.accept().head().data(attempt.log)
        for each in (attempt, reader):
            each.tail(finish_reason="stop")
        answer = await second.answer()
        assert (answer.raw, attempt.detached, attempt.canceled) == (b"data: 1\n\n", None, False)
        await control.idle()


async def test_of_two_that_ask_at_once_for_what_has_to_run_anew_one_runs_it() -> None:
    async with a_control() as control:
        node = await control.join("a")
        first = keyed(control, "v1")
        attempt = shown(await node.asked(), "v1")
        await first.has(b"data")
        await first.leave()
        await eventually(lambda: attempt.detached == "left")
        both = [keyed(control, "v1"), keyed(control, "v1")]
        await _told(node, attempt, "sealed", finish_reason="canceled")
        fresh = shown(await node.asked(), "v1")
        reader = await node.reader()
        reader.accept().head().data(fresh.log)
        for each in (fresh, reader):
            each.tail(finish_reason="stop")
        answers = [await each.answer() for each in both]
        assert [answer.raw for answer in answers] == [fresh.log, fresh.log]
        assert len({answer.headers["X-Llorch-Task"] for answer in answers}) == 1
        assert len(node.opened) == 2
        await control.idle()


async def test_a_refused_task_keeps_no_body_however_it_was_asked_for() -> None:
    async with a_control(queue_limit=0) as control:
        node = await control.join("a", pool(slots=1))
        chat = control.chat()
        await node.asked()
        for more in ({"detach": True}, {}):
            assert (await control.submit(prompt="x" * 1_000_000, **more).answer()).code == "QUEUE_FULL"
        refused = [task for task in control.control.dispatcher.tasks if task.error is not None]
        kept = [(task.body, task.error.__traceback__) for task in refused if task.error is not None]
        assert kept == [(b"", None)] * 2
        await chat.leave()


async def test_no_frame_keeps_a_body_while_its_answer_comes() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit(prompt="x" * 1_000_000)
        attempt = (await node.asked()).begin().say("one ")
        await asking.has(b"one")
        kept = []
        for task in asyncio.all_tasks():
            frame: Any = task.get_coro()
            while frame is not None and hasattr(frame, "cr_frame"):
                local = frame.cr_frame.f_locals.items() if frame.cr_frame is not None else ()
                kept += [name for name, value in local if isinstance(value, bytes) and len(value) > 900_000]
                frame = frame.cr_await
        attempt.end()
        await asking.answer()
        assert kept == []


@pytest.mark.parametrize("says", ["a fault", "another task"])
async def test_an_odd_answer_of_a_node_is_no_word_that_a_task_is_forgotten(says: str) -> None:
    async with a_control() as control:
        node = await control.join("a")
        first = keyed(control, "native")
        (await node.asked()).begin().say("one ").end()
        await first.answer()
        second = keyed(control, "native")
        await eventually(lambda: node.calls)
        call = node.calls[0].accept()
        if says == "a fault":
            call.emit_json(Type.HEAD, {"status": 500, "headers": {"content-type": "application/json"}})
            call.data(json.dumps({"error": error_wire("INTERNAL")}).encode()).tail()
        else:
            call.head("application/json").data(json.dumps({"task_id": str(uuid.uuid4())}).encode()).tail()
        answer = await second.answer()
        assert (answer.status, answer.code) == (503, "RECOVERING")
        assert len(node.opened) == 1


async def test_an_answer_too_large_for_one_client_is_not_the_end_of_it_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "MAX_COLLECTED_BYTES", 2_000)
    async with a_control() as control:
        node = await control.join("a")
        first = keyed(control, "json")
        attempt = (await node.asked()).begin().say("one ")
        await control.state(attempt.task_id, "streaming")
        second = keyed(control, "native")
        reader = await node.reader()
        reader.accept().head().data(attempt.log)
        await second.has(b"one")
        for each in (attempt, reader):
            each.say("x" * 3_000)
            each.tokens = ["one ", "x" * 3_000]
            each.end()
        assert (await first.answer()).code == "PAYLOAD_TOO_LARGE"
        assert (await second.answer()).terminals == ["end"]
        assert not attempt.canceled
        await control.idle()


async def test_a_named_task_that_was_refused_may_be_sent_again() -> None:
    async with a_control(queue_limit=0) as control:
        node = await control.join("a", pool(slots=1))
        chat, task_id = control.chat(), str(uuid.uuid4())
        holding = await node.asked()
        assert (await control.submit(task_id=task_id).answer()).code == "QUEUE_FULL"
        holding.accept().head().data(b"data: 1\n\n").tail(finish_reason="stop")
        await chat.answer()
        again = control.submit(task_id=task_id)
        (await node.asked()).begin().say("hi").end()
        assert (await again.answer()).said == "hi"


async def test_a_detached_task_that_no_node_took_is_refused_to_all_who_sent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    look_often(monkeypatch)
    async with a_control(queue_timeout=0.5) as control:
        node = await control.join("a", pool(slots=1))
        control.chat()
        await node.asked()
        first = keyed(control, "detached")
        await control.waiting(1)
        second = keyed(control, "detached")
        assert [(await each.answer()).code for each in (first, second)] == ["QUEUE_TIMEOUT"] * 2


@pytest.mark.parametrize("attempt", ["1", "9"])
async def test_a_reader_of_another_attempt_gets_one_end_in_its_own_stream(attempt: str) -> None:
    """It was told its place in the queue, so it can't be answered with a status any more."""
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        control.chat()
        holding = await node.asked()
        asking = control.submit()
        await asking.has(b"queued")
        task_id = asking.headers["X-Llorch-Task"]
        other = control.events(task_id, "1", **{"X-Llorch-Attempt": attempt})
        await other.has(b"queued")
        holding.accept().tail(finish_reason="stop")
        fresh = (await node.asked()).begin().say("x")
        if attempt == "1":
            reader = await node.reader()
            reader.accept().head().data(fresh.log[1:])
            reader.log = fresh.log
            reader.tail()
        answer = await other.answer()
        assert (answer.status, b"HTTP/1.1" in answer.raw, answer.cut) == (200, False, False)
        assert ("error" in answer.names) == (attempt == "9")
        fresh.end()
        await asking.answer()
        await control.idle()


async def test_whoever_reads_an_abandoned_v1_answer_is_not_left_when_the_link_is_new() -> None:
    async with a_control() as control:
        node = await control.join("a")
        first = keyed(control, "v1")
        attempt = (await node.asked()).accept().head().data(b"data: 1\n\n")
        await first.has(b"data: 1")
        await first.leave()
        await eventually(lambda: attempt.detached == "left")
        second = keyed(control, "v1")
        await _told(node, attempt, "running")  # type: ignore[arg-type]
        reader = await node.reader()
        reader.accept().head().data(attempt.log)
        await second.has(b"data: 1")
        await node.cut()
        running = {"task_id": attempt.task_id, "attempt": 1, "path": "/v1/completions", "state": "running"}
        await node.beat(tasks=[running | {"owner": "alice", "offset": 9}])
        await back(control, node)
        again = await node.reader(1)
        again.accept().head()
        again.log = attempt.log
        again.tail(finish_reason="stop")
        assert (await second.answer()).raw == attempt.log
        assert len(node.attached) == 2
