"""A node's connection that breaks under an answer: the same node, the same log, at the offset, or one NODE_LOST."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web as aioweb

from llorch import records
from llorch.control import audience
from llorch.errors import Code
from llorch.records import Type
from tests.component.control_harness import (
    ControlUnderTest,
    LinkedNode,
    a_control,
    error_wire,
    eventually,
    lost_soon,
    pool,
)


async def back(control: ControlUnderTest, node: LinkedNode) -> None:
    """The same process, with its lease, opens its link again."""
    assert (await node.open_link())[0] == 101
    await control.linked(node.node_id)


async def test_an_answer_goes_on_at_its_offset_when_the_link_is_back() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin().say("one ", "two ")
        await asking.has(b"two")
        before = len(attempt.log)
        await node.cut()
        attempt.emit = lambda *_: None  # type: ignore[method-assign] # what the node says meanwhile goes to its log
        attempt.say("three ")
        attempt.end()
        await back(control, node)
        reader = await node.reader()
        assert reader.header == {"task_id": attempt.task_id, "offset": before, "attempt": 1}
        reader.accept().head().data(attempt.log[before:])
        reader.log = attempt.log
        reader.tail(finish_reason="stop")
        answer = await asking.answer()
        assert answer.raw == attempt.log
        assert (answer.said, answer.terminals) == ("one two three ", ["end"])
        assert (await control.task(attempt.task_id))["state"] == "done"
        assert await control.metric("llorch_resumes_total", reason="reconnect") == 1
        await control.idle()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_v1_answer_goes_on_too(stream: bool) -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat(stream=stream)
        whole = b'data: {"a": 1}\n\ndata: [DONE]\n\n' if stream else b'{"a": 1, "b": 2}'
        attempt = await node.asked()
        attempt.accept().head("text/event-stream" if stream else "application/json").data(whole[:7])
        await (node.settled() if stream else asking.has(whole[:7]))  # a part of an event is shown to nobody
        await node.cut()
        await back(control, node)
        reader = await node.reader()
        assert reader.header["offset"] == 7
        reader.accept().head().data(whole[7:])
        reader.log = whole
        reader.tail(finish_reason="stop")
        answer = await asking.answer()
        assert (answer.status, answer.raw, answer.cut) == (200, whole, False)
        await control.idle()


async def test_a_cut_may_come_as_often_as_it_likes() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin()
        log = attempt.log
        for number in range(5):
            attempt.say(f"{number} ")
            await asking.has(f'"{number} "'.encode())
            log = attempt.log
            await node.cut()
            await back(control, node)
            again = await node.reader(number)
            again.log, again.tokens = log, attempt.tokens
            attempt = again
            attempt.emit_json(4, {})
            attempt.head()
        attempt.end()
        answer = await asking.answer()
        assert (answer.raw, answer.said) == (attempt.log, "0 1 2 3 4 ")
        await control.idle()


async def test_a_node_that_does_not_come_back_in_time_is_one_node_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_soon(monkeypatch, 0.3)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin().say("one ", "two ")
        await asking.has(b"two")
        await node.cut()
        answer = await asking.answer()
        assert (answer.said, answer.terminals) == ("one two ", ["error"])
        assert answer.events[-1][1]["code"] == "NODE_LOST"
        # Back too late: what it still runs is canceled there.
        await node.join(tasks=[{"task_id": attempt.task_id, "attempt": 1, "state": "running", "owner": "alice"}])
        await eventually(lambda: any(reader.canceled for reader in node.attached))
        await control.idle()


@pytest.mark.parametrize("how", ["another process", "it has left", "it knows no such task"])
async def test_nobody_waits_for_a_log_that_can_not_come_back(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lost_soon(monkeypatch, 60.0)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        (await node.asked()).begin().say("one ")
        await asking.has(b"one")
        await node.cut()
        if how == "another process":
            await control.join("a")
        elif how == "it has left":
            await control.ask("DELETE", "/v2/nodes/a", who="node").answer()
        else:
            await back(control, node)
            (await node.reader()).refuse(Code.TASK_NOT_FOUND)
        answer = await asking.answer()
        assert (answer.said, answer.terminals, answer.events[-1][1]["code"]) == ("one ", ["error"], "NODE_LOST")
        await control.idle()


async def test_a_reader_that_was_overtaken_while_it_was_away_is_told_of_the_gap() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        (await node.asked()).begin().say("one ")
        await asking.has(b"one")
        await node.cut()
        await back(control, node)
        (await node.reader()).refuse(Code.GAP)
        answer = await asking.answer()
        assert (answer.terminals, answer.events[-1][1]["code"]) == (["error"], "GAP")
        await control.idle()


async def test_a_cancel_while_the_node_is_away_reaches_it_when_it_is_back() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin().say("one ")
        await asking.has(b"one")
        await node.cut()
        assert (await control.ask("DELETE", f"/v2/tasks/{attempt.task_id}").answer()).status == 202
        await back(control, node)
        reader = await node.reader()
        reader.accept()
        await eventually(lambda: reader.canceled)
        reader.log, reader.tokens = attempt.log, attempt.tokens
        reader.head()
        reader.end("canceled")
        assert (await asking.answer()).events[-1][1]["finish_reason"] == "canceled"
        await control.idle()


async def test_a_lost_link_before_the_first_byte_is_another_attempt_not_a_reconnect() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        (await node.asked()).accept()
        await node.cut()
        await control.waiting(1)
        await back(control, node)
        attempt = await node.asked()
        assert attempt.attempt == 2
        attempt.begin().say("hi").end()
        assert (await asking.answer()).said == "hi"
        await control.idle()


async def test_what_still_runs_of_a_task_that_was_taken_elsewhere_is_not_to_be_found() -> None:
    async with a_control() as control:
        a = await control.join("a")
        asking = control.submit()
        first = (await a.asked()).accept()
        await a.cut()
        b = await control.join("b")
        (await b.asked()).begin().say("hi")
        await asking.has(b"hi")
        running = {"task_id": first.task_id, "attempt": 1, "state": "running", "owner": "alice", "offset": 9}
        await a.beat(tasks=[running])
        await back(control, a)
        surplus = await a.reader()
        await eventually(lambda: surplus.detached == "left")
        assert (surplus.canceled, surplus.surplus, surplus.header["attempt"]) == (True, True, 1)
        await asking.leave()


async def test_what_another_runs_under_the_same_id_is_left_alone() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = await node.asked()
        attempt.begin().end()
        await asking.answer()
        running = {"task_id": attempt.task_id, "attempt": 1, "state": "running", "offset": 9}
        await node.beat(tasks=[running | {"owner": "bob"}])
        await node.settled()
        assert node.attached == []
        await node.beat(tasks=[running | {"owner": "alice"}])
        assert (await node.reader()).header["task_id"] == attempt.task_id


# ---------------------------------------------------------------- clients that go before the first byte


async def test_a_native_client_that_comes_back_before_the_first_byte_finds_its_task() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        asking = control.submit()
        attempt = (await node.asked()).accept()
        await asking.leave()
        again = control.events(attempt.task_id)
        await eventually(lambda: _listeners(control, attempt.task_id) == 1)
        attempt.head().event("started", {"task_id": attempt.task_id})
        reader = await node.reader()
        reader.accept().head().data(attempt.log).say("hi").end()
        attempt.say("hi").end()
        answer = await again.answer()
        assert (answer.status, answer.said, answer.terminals) == (200, "hi", ["end"])
        assert len(node.opened) == 1
        await control.idle()


def _listeners(control: ControlUnderTest, task_id: str) -> int:
    found = control.control.dispatcher.audience(task_id)
    return 0 if found is None else found._followers


async def test_one_that_stays_away_is_given_up_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audience, "RECONNECT_GRACE_S", 0.3)
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        asking = control.submit()
        attempt = (await node.asked()).accept()
        await asking.leave()
        await eventually(lambda: attempt.detached == "left", within_s=2)
        await control.idle()
        assert (await control.task(attempt.task_id))["state"] == "canceled"


async def test_a_first_byte_that_nobody_waits_for_leaves_the_task_to_its_node() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        asking = control.submit()
        attempt = (await node.asked()).accept()
        await asking.leave()
        attempt.head().event("started", {"task_id": attempt.task_id})
        await eventually(lambda: attempt.detached == "left", within_s=2)
        assert not attempt.canceled
        await control.idle()


async def test_a_v1_client_that_goes_before_the_first_byte_takes_its_task_along() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        asking = control.chat()
        attempt = (await node.asked()).accept()
        await asking.leave()
        await eventually(lambda: attempt.detached == "left", within_s=1)
        await control.idle()


@pytest.mark.parametrize("form", ["native", "v1"])
async def test_a_client_that_goes_while_the_node_is_away_is_told_of_when_the_node_is_back(form: str) -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit() if form == "native" else control.chat()
        attempt = await node.asked()
        attempt.accept().head().data(b"data: 1\n\n")
        await asking.has(b"data: 1")
        await node.cut()
        await asking.leave()
        await control.idle()
        running = {"task_id": attempt.task_id, "attempt": 1, "state": "running", "owner": "alice", "offset": 9}
        await node.beat(tasks=[running])
        await back(control, node)
        reader = await node.reader()
        await eventually(lambda: reader.detached == "left")
        assert (reader.canceled, reader.header["offset"]) == (False, 9)
        await node.beat(tasks=[running])  # once is enough: a beat must not start the node's grace anew
        await node.settled()
        assert len(node.attached) == 1


# ---------------------------------------------------------------- nodes that have a link and an address


class Addressed:
    """What answers at the address that a node with a link advertises: a proxy that refuses, or the node itself."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.gone = asyncio.Event()
        self.asked = asyncio.Event()
        self.deleted: list[str] = []

    async def __aenter__(self) -> Addressed:
        server = aioweb.Application()
        server.router.add_get("/v2/tasks/{task}/log", self._log)
        server.router.add_delete("/v2/tasks/{task}", self._delete)
        self._runner = aioweb.AppRunner(server, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await aioweb.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _delete(self, request: aioweb.Request) -> aioweb.Response:
        self.deleted.append(request.match_info["task"])
        return aioweb.json_response({}, status=202)

    async def _log(self, request: aioweb.Request) -> aioweb.StreamResponse:
        self.asked.set()
        if self.status != 200:
            return aioweb.json_response({"error": error_wire("UNAUTHENTICATED")}, status=self.status)
        response = aioweb.StreamResponse(headers={"Content-Type": records.CONTENT_TYPE})
        await response.prepare(request)
        await response.write(records.encode(0, Type.ACCEPT))
        try:
            await asyncio.Event().wait()
        finally:
            self.gone.set()
        raise AssertionError("unreachable")


@pytest.mark.parametrize("status", [401, 404, 503])
async def test_an_address_that_refuses_is_no_word_about_the_log(status: int) -> None:
    async with a_control() as control, Addressed(status) as http:
        node = control.node("a")
        await node.join(address=http.address)
        asking = control.submit()
        attempt = (await node.asked()).begin().say("one ")
        await asking.has(b"one")
        await node.cut()
        await asyncio.wait_for(http.asked.wait(), 5)
        await back(control, node)
        reader = await node.reader()
        reader.accept().head()
        reader.log, reader.tokens = attempt.log, list(attempt.tokens)
        reader.end()
        assert (await asking.answer()).terminals == ["end"]
        await control.idle()


@pytest.mark.parametrize("form", ["native", "v1"])
@pytest.mark.parametrize("link", ["is back", "stays away"])
async def test_a_client_that_leaves_after_its_answer_went_on_by_http_is_told_of(form: str, link: str) -> None:
    async with a_control() as control, Addressed(200) as http:
        node = control.node("a")
        await node.join(address=http.address)
        asking = control.submit() if form == "native" else control.chat()
        attempt = await node.asked()
        attempt.accept().head().data(b"data: 1\n\n")
        await asking.has(b"data: 1")
        await node.cut()
        await asyncio.wait_for(http.asked.wait(), 5)
        await eventually(lambda: any(r._begun and r._feed._waiter for r in control.control.dispatcher.readers._readers))
        if link == "is back":
            await back(control, node)
        await asking.leave()
        await asyncio.wait_for(http.gone.wait(), 5)
        if link == "is back":
            assert (await node.reader()).header["task_id"] == attempt.task_id
            await eventually(lambda: node.attached[0].detached == "left")
        elif form == "v1":
            await eventually(lambda: http.deleted == [attempt.task_id])
        await control.idle()


async def test_a_client_that_leaves_while_its_place_is_asked_for_has_left() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        (await node.asked()).begin().say("one ")
        await asking.has(b"one")
        await node.cut()
        await back(control, node)
        reader = await node.reader()
        await asking.leave()
        await eventually(lambda: reader.detached is not None)
        assert reader.detached == "left"
        await control.idle()
