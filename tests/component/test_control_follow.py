"""A client that comes back: at the offset it names, with the bytes the log has, or the end that no log has."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from llorch.control import follow
from llorch.errors import Code
from llorch.records import Type
from tests.component.control_harness import (
    ControlUnderTest,
    LinkedNode,
    Stream,
    a_control,
    error_wire,
    eventually,
    look_often,
    lost_soon,
    ping_soon,
    pool,
)


async def a_streaming_task(control: ControlUnderTest) -> Stream:
    """A task that has said one word, and whose client is gone."""
    node = await control.join("a")
    asking = control.submit()
    attempt = (await node.asked()).begin().say("one")
    await asking.has(b"one")
    await asking.leave()
    await eventually(lambda: attempt.detached == "left")
    return attempt


@pytest.mark.parametrize("how", ["header", "query", "upper case"])
async def test_a_reader_goes_on_at_the_offset_it_names(how: str) -> None:
    async with a_control() as control:
        attempt = await a_streaming_task(control)
        at = f"{len(attempt.log):012x}"
        if how == "header":
            asking = control.events(attempt.task_id, **{"Last-Event-ID": at})
        elif how == "query":
            asking = control.events(attempt.task_id, after=at, **{"Last-Event-ID": "0" * 12})
        else:
            asking = control.events(attempt.task_id, after=at.upper())
        reader = await control._nodes[0].reader()  # type: ignore[union-attr]
        assert reader.header == {"task_id": attempt.task_id, "offset": len(attempt.log), "attempt": 1}
        reader.accept().head()
        reader.log = attempt.log
        reader.event("token", {"t": "two", "i": 1})
        reader.end()
        answer = await asking.answer()
        assert (answer.status, answer.said, answer.terminals) == (200, "two", ["end"])
        assert answer.headers["Content-Type"].startswith("text/event-stream")


async def test_from_the_start_without_an_offset() -> None:
    async with a_control() as control:
        attempt = await a_streaming_task(control)
        asking = control.events(attempt.task_id)
        reader = await control._nodes[0].reader()  # type: ignore[union-attr]
        assert reader.header["offset"] == 0
        reader.accept().head().data(attempt.log)
        reader.end()
        assert (await asking.answer()).said == "one"


async def test_a_sealed_end_is_204() -> None:
    async with a_control() as control:
        attempt = await a_streaming_task(control)
        asking = control.events(attempt.task_id, after=f"{len(attempt.log):x}")
        reader = await control._nodes[0].reader()  # type: ignore[union-attr]
        reader.log = attempt.log
        reader.accept().head().tail(finish_reason="stop")
        answer = await asking.answer()
        assert (answer.status, answer.raw) == (204, b"")


async def test_bytes_that_are_gone_are_a_410() -> None:
    async with a_control() as control:
        attempt = await a_streaming_task(control)
        asking = control.events(attempt.task_id)
        (await control._nodes[0].reader()).refuse(Code.GAP)  # type: ignore[union-attr]
        answer = await asking.answer()
        assert (answer.status, answer.code) == (410, "GAP")


async def test_a_log_that_failed_with_nothing_in_it_tells_its_error() -> None:
    async with a_control() as control:
        attempt = await a_streaming_task(control)
        asking = control.events(attempt.task_id)
        (await control._nodes[0].reader()).accept().fail_early(Code.ENGINE_FAILED)  # type: ignore[union-attr]
        answer = await asking.answer()
        assert (answer.status, answer.terminals) == (200, ["error"])


async def test_a_reader_that_loses_its_node_gets_no_terminal_event_and_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_soon(monkeypatch)
    async with a_control() as control:
        attempt = await a_streaming_task(control)
        node = control._nodes[0]
        asking = control.events(attempt.task_id)
        reader = await node.reader()  # type: ignore[union-attr]
        reader.accept().head().data(attempt.log)
        await asking.has(b"one")
        await node.cut()  # type: ignore[union-attr]
        answer = await asking.answer()
        assert (answer.terminals, answer.cut) == ([], True)


@pytest.mark.parametrize("who", ["bob", "node"])
async def test_another_principals_task_does_not_exist(who: str) -> None:
    async with a_control() as control:
        attempt = await a_streaming_task(control)
        for path in ("", "/events", "/placement"):
            answer = await control.ask("GET", f"/v2/tasks/{attempt.task_id}{path}", who=who).answer()
            assert answer.code == ("TASK_NOT_FOUND" if who == "bob" else "FORBIDDEN")
        listed = await control.get("/v2/tasks", who="bob")
        assert listed["tasks"] == []
        assert [task["task_id"] for task in (await control.get("/v2/tasks", who="admin"))["tasks"]] == [attempt.task_id]


@pytest.mark.parametrize("offset", ["xyz", "-1", "0" * 13, "1.5"])
async def test_what_is_no_event_id_is_a_400(offset: str) -> None:
    async with a_control() as control:
        attempt = await a_streaming_task(control)
        answer = await control.events(attempt.task_id, after=offset).answer()
        assert (answer.status, answer.json["error"]["param"]) == (400, "Last-Event-ID")


@pytest.mark.parametrize("task_id", ["0" * 8 + "-0000-0000-0000-" + "0" * 12, "nonsense"])
async def test_a_task_that_nobody_knows_is_a_404(task_id: str) -> None:
    async with a_control() as control:
        for method, path in (
            ("GET", ""),
            ("GET", "/events"),
            ("GET", "/placement"),
            ("DELETE", ""),
            ("POST", "/cancel"),
        ):
            answer = await control.ask(method, f"/v2/tasks/{task_id}{path}").answer()
            assert (answer.status, answer.code) == (404, "TASK_NOT_FOUND")


async def test_a_v1_task_can_not_be_followed() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        attempt = (await node.asked()).accept()
        assert (await control.events(attempt.task_id).answer()).status == 409
        attempt.head().data(b"data: [DONE]\n\n").tail()
        await asking.answer()
        # Nor one that this control knows only from its node.
        other = attempt.task_id.replace(attempt.task_id[:8], "0" * 8)
        report = {"task_id": other, "owner": "alice", "path": "/v1/chat/completions", "state": "running"}
        await node.beat(pools=[pool()], tasks=[report])
        assert (await control.events(other).answer()).status == 409


async def test_a_task_that_only_its_node_knows_is_shown_followed_and_canceled() -> None:
    async with a_control() as control:
        node = control.node("a")
        task_id = "0" * 8 + "-0000-0000-0000-" + "1" * 12
        report = {"task_id": task_id, "owner": "alice", "model": "m", "pool_id": "p0", "state": "running", "offset": 9}
        await node.join(pool(), tasks=[report])
        shown = await control.task(task_id)
        assert (shown["state"], shown["node_id"], shown["offset"]) == ("streaming", "a", 9)
        assert (await control.ask("GET", f"/v2/tasks/{task_id}", who="bob").answer()).status == 404
        asking = control.events(task_id, after="9")
        reader = await node.reader()
        assert reader.header == {"task_id": task_id, "offset": 9, "attempt": 1}
        canceling = control.ask("DELETE", f"/v2/tasks/{task_id}")
        await eventually(lambda: node.calls)
        assert (node.calls[0].header["method"], node.calls[0].header["path"]) == ("DELETE", f"/v2/tasks/{task_id}")
        node.calls[0].emit_json(Type.HEAD, {"status": 202, "headers": {}})
        node.calls[0].data(b"{}").tail()
        assert (await canceling.answer()).status == 202
        reader.log = b"x" * 9  # what was read before
        reader.accept().head().end("canceled")
        assert (await asking.answer()).events[-1][1]["finish_reason"] == "canceled"


# ---------------------------------------------------------------- before the first byte, and ends that no log has


async def test_a_reader_of_a_task_that_moves_on_reads_it_where_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    look_often(monkeypatch)
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        asking = control.submit()
        first = (await node.asked()).accept()
        following = control.events(first.task_id)
        await asyncio.wait((following._task,), timeout=4 * follow.LOOK_AGAIN_S)
        assert node.attached == [], "it has no log to read yet"
        first.fail_early()
        second = (await node.asked()).begin().say("hi")
        reader = await node.reader()
        reader.accept().head().data(second.log)
        for stream in (second, reader):
            stream.end()
        for each in (asking, following):
            answer = await each.answer()
            assert (answer.said, answer.terminals) == ("hi", ["end"])


async def test_a_reader_of_a_waiting_task_is_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    ping_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        holder = control.whole()
        holding = (await node.asked()).accept()
        asking = control.submit(detach=True)
        await control.waiting(1)
        (task,) = [t for t in control.control.dispatcher.tasks.running_tasks() if t.state == "queued"]
        following = control.events(task.task_id)
        await following.has(b": ping")
        holding.begin().end()
        await holder.answer()
        attempt = (await node.asked()).begin()
        (await node.reader()).accept().head().data(attempt.log).end()
        attempt.end()
        await asking.answer()
        assert (await following.answer()).terminals == ["end"]


@pytest.mark.parametrize("end", ["refused", "canceled", "lost", "queue timeout"])
async def test_the_end_of_a_task_without_a_log_is_told_to_whoever_comes_back(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost_soon(monkeypatch)
    async with a_control(queue_timeout=0.2) as control:
        node = await control.join("a", pool(slots=1))
        if end in ("canceled", "queue timeout"):
            holder = control.submit()
            holding = (await node.asked()).begin()
        asking = control.submit()
        if end == "refused":
            attempt = await node.asked()
            attempt.refuse(Code.ENGINE_FAILED)
        elif end == "lost":
            attempt = (await node.asked()).begin().say("one")
            await asking.has(b"one")
            await node.cut()
        else:
            await control.waiting(1)
        task_id = next(iter(control.control.dispatcher.tasks)).task_id
        if end == "canceled":
            await control.ask("DELETE", f"/v2/tasks/{task_id}").answer()
        await asking.answer()
        after = f"{len(attempt.log):x}" if end == "lost" else ""
        answer = await control.events(task_id, after=after).answer()
        assert answer.status == 200
        assert answer.names == (["end"] if end == "canceled" else ["error"])
        if end in ("canceled", "queue timeout"):
            holding.end()
            await holder.answer()
        assert node.attached == []


# ---------------------------------------------------------------- a repeated task id


async def test_the_same_task_again_is_the_same_task() -> None:
    task_id = "0" * 8 + "-0000-0000-0000-" + "2" * 12
    async with a_control() as control:
        node = await control.join("a")
        first = control.submit(task_id=task_id)
        attempt = (await node.asked()).begin().say("one")
        again = control.submit(task_id=task_id)
        reader = await node.reader()
        reader.accept().head().data(attempt.log).end()
        answer = await again.answer()
        assert (answer.said, answer.headers["Idempotency-Replayed"]) == ("one", "true")
        for who, more in (("bob", {}), ("alice", {"prompt": "something else"})):
            answer = await control.submit(task_id=task_id, who=who, **more).answer()
            assert (answer.status, answer.json["error"]["param"]) == (409, "task_id")
        attempt.end()
        await first.answer()
        assert len(node.opened) == 1


async def test_a_task_that_was_sent_again_detached_is_taken_once_and_told_so_each_time() -> None:
    async with a_control() as control:
        node = await control.join("a")
        body = {"detach": True, "accept": "application/json", "task_id": str(uuid.uuid4())}
        asking = [control.submit(**body) for _ in range(4)]
        attempt = await node.asked()
        attempt.begin()
        answers = [await each.answer() for each in asking]
        assert [answer.status for answer in answers] == [202] * 4
        assert {answer.json["task_id"] for answer in answers} == {attempt.task_id}
        assert len(node.opened) == 1
        attempt.end()
        await control.idle()
        assert (await control.submit(**body).answer()).json["state"] == "done"


async def test_a_canceled_task_whose_node_is_away_is_ended_when_the_node_is_back() -> None:
    async with a_control() as control:
        attempt = await a_streaming_task(control)
        node = control._nodes[0]
        assert isinstance(node, LinkedNode)
        await node.cut()
        answer = await control.ask("POST", f"/v2/tasks/{attempt.task_id}/cancel").answer()
        assert (answer.status, answer.json["task_id"]) == (202, attempt.task_id)
        report = {"task_id": attempt.task_id, "attempt": 1, "owner": "alice", "state": "running", "offset": 0}
        await node.join(pool(slots_free=3), tasks=[report | {"pool_id": "p0", "model": "m"}])
        reader = await node.reader()
        await eventually(lambda: reader.canceled, within_s=5)


async def test_a_reader_of_a_task_that_went_with_its_node_is_told_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin().say("one")
        await asking.has(b"one")
        await node.cut()
        assert (await asking.answer()).names[-1] == "error"
        again = await control.ask("GET", f"/v2/tasks/{attempt.task_id}/events").answer()
        assert (again.status, again.names) == (200, ["error"])
        assert again.events[0][1]["code"] == "NODE_LOST"


async def test_a_failed_task_whose_link_is_away_for_a_moment_is_shown_as_its_log_has_it() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin().say("one")
        attempt.fail()
        assert (await asking.answer()).names[-1] == "error"
        await node.cut()
        again = control.events(attempt.task_id)
        await control.get("/v2/nodes")  # it has asked by now, and the node can't be read
        assert (await node.open_link())[0] == 101
        reader = await node.reader()
        reader.accept().head().data(attempt.log).tail(error=error_wire(Code.ENGINE_FAILED))
        answer = await again.answer()
        assert (answer.status, answer.said, answer.terminals) == (200, "one", ["error"])
        assert answer.raw == attempt.log


async def test_one_who_has_seen_the_end_of_a_failed_task_is_told_so_also_without_its_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin().say("one")
        attempt.fail()
        await asking.answer()
        await node.cut()
        answer = await control.events(attempt.task_id, after=f"{len(attempt.log):x}").answer()
        assert (answer.status, answer.raw) == (204, b"")


async def test_a_node_that_sends_no_proper_events_is_a_failed_engine_not_a_fault_of_the_control() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit(accept="application/json")
        (await node.asked()).begin().event("token", {"no": "text"})
        answer = await asking.answer()
        assert (answer.status, answer.code) == (502, "ENGINE_FAILED")


async def test_a_canceled_task_whose_reader_had_left_is_read_as_its_log_has_it() -> None:
    async with a_control() as control:
        attempt = await a_streaming_task(control)
        node = control._nodes[0]
        asking = control.ask("DELETE", f"/v2/tasks/{attempt.task_id}")
        await eventually(lambda: node.calls)  # type: ignore[union-attr]
        node.calls[0].accept().head("application/json").data(b"{}").tail()  # type: ignore[union-attr]
        assert (await asking.answer()).status == 202
        later = control.events(attempt.task_id)
        reader = await node.reader()  # type: ignore[union-attr]
        reader.accept().head().data(attempt.log)
        reader.tokens = list(attempt.tokens)
        reader.end("canceled")
        answer = await later.answer()
        assert (answer.said, answer.terminals) == ("one", ["end"])
        assert answer.events[-1][1]["tokens_out"] == 1
