"""What is tried again and what is not: another pool, at most twice, and only while the client has seen nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from llorch.control import dispatch, doubts, retries, waiting
from llorch.errors import Code
from tests.component.control_harness import Attempt, a_control, eventually, lost_soon, pool


def refuses(attempt: Attempt) -> None:
    attempt.refuse(Code.MODEL_NOT_AVAILABLE)


def has_lost_its_pool(attempt: Attempt) -> None:
    attempt.refuse(Code.POOL_NOT_FOUND)


def engine_fails(attempt: Attempt) -> None:
    attempt.accept().fail_early(Code.ENGINE_FAILED, 502)


def ends_with_nothing(attempt: Attempt) -> None:
    attempt.accept().tail(finish_reason="stop")


@pytest.mark.parametrize("fails", [refuses, has_lost_its_pool, engine_fails, ends_with_nothing])
async def test_a_failure_before_the_first_byte_goes_to_another_pool(fails: Callable[[Attempt], None]) -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        asking = control.whole()
        first = await node.asked()
        fails(first)
        second = await node.asked()
        assert (first.attempt, second.attempt) == (1, 2)
        assert first.pool_id != second.pool_id
        assert first.task_id == second.task_id
        second.begin().say("hi").end()
        answer = await asking.answer()
        assert (answer.status, answer.json["text"], answer.json["attempt"]) == (200, "hi", 2)
        assert answer.headers["X-Llorch-Attempts"] == "2"
        assert await control.metric("llorch_retries_total") == 1
        await control.idle()


async def test_the_only_node_that_could_take_it_is_given_longer_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "ACCEPT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(dispatch, "ACCEPT_AT_LAST_S", 0.5)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.whole()
        late = await node.asked()
        await asyncio.wait((asking._task,), timeout=0.3)
        late.begin().say("hi").end()
        assert (await asking.answer()).json["text"] == "hi"
        asking = control.whole()
        never = await node.asked()
        assert (await asking.answer()).code == "NODE_LOST"
        assert never.canceled
        assert len(node.opened) == 2
        await control.idle()


async def test_more_tasks_than_may_try_again_wait_for_a_slow_node_instead_of_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "ACCEPT_TIMEOUT_S", 0.3)
    async with a_control() as control:
        node = await control.join("a", pool("p0", slots=8), pool("p1", slots=8))
        node.lives_when_asked = True
        asking = [control.whole(placement={"prefer": ["a/p0"]}) for _ in range(8)]
        opened = [await node.asked() for _ in asking]
        again = [await node.asked() for _ in range(3)]
        await asyncio.wait((asking[0]._task,), timeout=0.3)  # the others have been given up by now, if they are
        await node.settled()
        assert ({attempt.pool_id for attempt in opened}, {attempt.pool_id for attempt in again}) == ({"p0"}, {"p1"})
        assert (sum(attempt.canceled for attempt in opened), len(node.opened)) == (3, 11)
        kept = [attempt for attempt in opened if not attempt.canceled]
        for attempt in (*kept, *again):  # each of `again` that has begun lets one of `kept` try elsewhere
            attempt.begin().end()
        assert {(await each.answer()).status for each in asking} == {200}
        await control.idle()


async def test_a_node_that_drains_before_it_was_known_is_no_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WAIT_TICK_S", 0.05)
    monkeypatch.setattr(waiting, "REFUSE_AFTER_S", 0.2)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = await node.asked()
        attempt.refuse(Code.DRAINING)
        await control.waiting(1)
        await node.beat(draining=True, pools=[pool()])
        answer = await asking.answer()
        assert (answer.terminals, answer.events[-1][1]["code"]) == (["error"], "NO_CAPACITY")
        later = await control.events(attempt.task_id).answer()
        assert (later.status, later.events[0][1]["code"]) == (200, "NO_CAPACITY")


async def test_a_link_that_has_gone_silent_is_doubted_and_its_tasks_go_elsewhere_outside_the_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "ACCEPT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(doubts, "DOUBT_S", 0.5)
    async with a_control() as control:
        a, b = await control.join("a", pool(slots=8)), await control.join("b", pool(slots=8, slots_free=0))
        a.answer_pings = False
        asking = [control.whole() for _ in range(8)]  # more than may try again at a time
        opened = [await a.asked() for _ in asking]
        await b.beat(pools=[pool(slots=8)])
        for _ in asking:
            attempt = await b.asked()
            assert attempt.attempt == 2
            attempt.begin().say("hi").end()
        assert not (await control.get("/v2/nodes/a"))["reachable"]
        await control.whole(placement={"prefer": ["a"]}).leave()
        for each in asking:
            assert (await each.answer()).json["text"] == "hi"
        assert {attempt.detached for attempt in opened} == {"left"}
        await a.link_ended()  # nobody answered
        pools = {(p["node_id"], p["breaker"]["failures"]) for p in (await control.get("/v2/pools"))["pools"]}
        assert pools == {("a", 0), ("b", 0)}
        await a.join(pool(slots=8))
        last = control.whole(placement={"pin": "a"})
        (await a.asked()).begin().end()
        await last.answer()
        await control.idle()


async def test_a_silent_link_whose_node_answers_is_believed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "ACCEPT_TIMEOUT_S", 0.2)
    async with a_control() as control:
        a, b = await control.join("a"), await control.join("b", pool(slots_free=0))
        asking = control.whole()
        await a.asked()
        await b.beat(pools=[pool()])
        (await b.asked()).begin().end()
        await asking.answer()

        async def believed() -> bool:
            return bool((await control.get("/v2/nodes/a"))["reachable"])

        await eventually(believed, within_s=2)
        assert a.up
        await control.idle()


async def test_a_node_that_does_not_answer_an_open_within_a_second_loses_it() -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        asking = control.whole()
        first = await node.asked()
        started = time.monotonic()
        node.lives()
        second = await node.asked()
        assert time.monotonic() - started < 2.0
        await eventually(lambda: first.detached is not None)
        assert first.canceled
        assert first.surplus
        assert second.pool_id != first.pool_id
        second.begin().say("hi").end()
        assert (await asking.answer()).json["text"] == "hi"
        first.accept()  # late, on a stream that has ended: dropped
        await node.settled()
        assert node.up
        await control.idle()


async def test_a_stream_without_a_first_byte_in_time_goes_to_another_pool() -> None:
    async with a_control(ttft_timeout=0.2) as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        asking = control.submit()
        first = await node.asked()
        first.accept()
        second = await node.asked()
        await eventually(lambda: first.detached is not None)
        assert first.canceled
        second.begin().say("hi").end()
        answer = await asking.answer()
        assert (answer.said, answer.terminals) == ("hi", ["end"])
        await control.idle()


async def test_an_answer_in_one_piece_is_not_held_to_the_time_of_a_first_byte() -> None:
    async with a_control(ttft_timeout=0.1) as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        asking = control.chat(stream=False)
        (await node.asked()).accept()
        await asyncio.wait((asking._task,), timeout=0.3)
        assert len(node.opened) == 1
        node.opened[0].head("application/json").data(b"{}").tail()
        assert (await asking.answer()).raw == b"{}"


async def test_at_most_two_retries_each_on_another_pool(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with a_control() as control:
        node = await control.join("a", *(pool(f"p{i}") for i in range(5)))
        asking = control.submit()
        seen = []
        for _ in range(3):
            attempt = await node.asked()
            seen.append((attempt.attempt, attempt.pool_id))
            engine_fails(attempt)
        answer = await asking.answer()
        assert (answer.status, answer.code) == (502, "ENGINE_FAILED")
        assert [number for number, _ in seen] == [1, 2, 3]
        assert len({pool_id for _, pool_id in seen}) == 3
        assert len(node.opened) == 3
        assert answer.headers["X-Llorch-Task"] == node.opened[0].task_id
        assert 'code=ENGINE_FAILED attempts=3 why="it has been tried often enough"' in caplog.text
        await control.idle()


async def test_with_no_other_pool_a_failure_is_the_answer_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        engine_fails(await node.asked())
        assert (await asking.answer()).code == "ENGINE_FAILED"
        assert len(node.opened) == 1
        assert 'why="no other pool could take it"' in caplog.text
        await control.idle()


async def test_a_retry_waits_for_another_pool_that_is_busy() -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0", slots=1), pool("p1", slots=1))
        other = control.submit(placement={"pin": "a/p1"})
        holds = (await node.asked()).begin()
        asking = control.whole()
        engine_fails(await node.asked())
        await control.waiting(1)
        holds.end()
        await other.answer()
        again = await node.asked()
        assert (again.pool_id, again.attempt) == ("p1", 2)
        again.begin().say("hi").end()
        assert (await asking.answer()).json["text"] == "hi"
        await control.idle()


@pytest.mark.parametrize("code", [Code.INVALID_REQUEST, Code.CONTEXT_LENGTH_EXCEEDED, Code.RATE_LIMITED])
@pytest.mark.parametrize("how", ["refused", "early tail"])
async def test_a_4xx_is_the_clients_own_and_never_tried_again(code: Code, how: str) -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        for ask in (control.submit, control.whole, control.chat, lambda: control.chat(stream=False)):
            asking = ask()
            attempt = await node.asked()
            if how == "refused":
                attempt.refuse(code)
            else:
                attempt.accept().fail_early(code)
            answer = await asking.answer()
            assert answer.code == code
            assert answer.status in (400, 429)
            assert answer.json["error"]["request_id"] == answer.headers["X-Request-Id"]
        assert len(node.opened) == 4
        await control.idle()


async def test_an_unknown_code_is_read_by_its_status() -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        asking = control.submit()
        (await node.asked()).accept().fail_early("SOMETHING_NEW", 422)
        assert (await asking.answer()).status == 400
        assert len(node.opened) == 1
        asking = control.submit()
        (await node.asked()).accept().fail_early("SOMETHING_NEW", 503)
        (await node.asked()).begin().end()
        assert (await asking.answer()).terminals == ["end"]


async def test_nothing_is_tried_again_after_data() -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        asking = control.submit()
        attempt = (await node.asked()).begin().say("one")
        await asking.has(b"one")
        attempt.fail()
        answer = await asking.answer()
        assert answer.terminals == ["error"]
        assert answer.events[-1][1]["code"] == "ENGINE_FAILED"
        assert len(node.opened) == 1
        await control.idle()


# ---------------------------------------------------------------- full pools and lost nodes are no failures


@pytest.mark.parametrize("code", [Code.ALL_SLOTS_BUSY, Code.MODEL_NOT_AVAILABLE])
async def test_a_full_pool_sends_the_task_to_the_front_of_the_queue_outside_the_count(code: Code) -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        asking = control.whole()
        for number in range(1, 5):  # more often than there are retries
            attempt = await node.asked()
            assert attempt.attempt == number
            attempt.refuse(code)
            await control.waiting(1)
            if number == 1:
                later = control.whole(prompt="later")
                await control.waiting(2)
            await node.beat(pools=[pool(slots=1)])  # the pool has room again
        attempt = await node.asked()
        assert b"later" not in attempt.body
        attempt.begin().say("first").end()
        assert (await asking.answer()).json["text"] == "first"
        (await node.asked()).begin().say("second").end()
        assert (await later.answer()).json["text"] == "second"
        await control.idle()


async def test_the_wait_of_a_task_that_meets_full_pools_adds_up() -> None:
    async with a_control(queue_timeout=1.0) as control:
        node = await control.join("a", pool(slots=1))
        asking = control.whole()
        for number in range(20):  # in all, twice the time that it may wait
            await eventually(lambda n=number: asking.done or len(node.opened) > n, within_s=5)
            if asking.done:
                break
            (await node.asked()).refuse(Code.ALL_SLOTS_BUSY)
            tasks = control.control.dispatcher.tasks
            await eventually(lambda t=tasks: asking.done or [x.state for x in t.running_tasks()] == ["queued"])
            await asyncio.wait((asking._task,), timeout=0.1)  # a tenth of it, each time
            await node.beat(pools=[pool(slots=1)])
        assert asking.done, "each wait is counted for itself"
        answer = await asking.answer()
        assert (answer.status, answer.code) == (504, "QUEUE_TIMEOUT")
        assert len(node.opened) > 2
        await control.idle()


async def test_a_task_on_a_lost_link_goes_elsewhere_outside_the_count_and_before_all_others() -> None:
    async with a_control() as control:
        a = await control.join("a", pool(slots=1))
        asking = control.whole(prompt="first")
        (await a.asked()).accept()
        later = control.whole(prompt="later")
        await control.waiting(1)
        await a.cut()
        await control.waiting(2)
        b = await control.join("b", pool(slots=1))
        attempt = await b.asked()
        assert (attempt.attempt, b"first" in attempt.body) == (2, True)
        attempt.begin().say("hi").end()
        assert (await asking.answer()).json["text"] == "hi"
        (await b.asked()).begin().end()
        await later.answer()
        await control.idle()


async def test_a_lost_node_that_is_back_may_have_its_task_again_and_both_retries_are_still_there() -> None:
    async with a_control() as control:
        a = await control.join("a", pool("p0"))
        asking = control.whole()
        (await a.asked()).accept()
        await a.cut()
        await control.waiting(1)
        await a.join(pool("p0"), pool("p1"), pool("p2"))
        for number in (2, 3):
            attempt = await a.asked()
            assert attempt.attempt == number
            engine_fails(attempt)
        attempt = await a.asked()
        attempt.begin().say("hi").end()
        assert {each.pool_id for each in a.opened[1:]} == {"p0", "p1", "p2"}
        assert (await asking.answer()).json["text"] == "hi"
        await control.idle()


async def test_the_third_lost_node_ends_a_task() -> None:
    async with a_control() as control:
        nodes = [await control.join(name) for name in ("a", "b", "c", "d")]
        asking = control.submit()
        lost = []
        for number in range(1, 4):
            await eventually(lambda n=number: sum(len(node.opened) for node in nodes) == n, within_s=5)
            node = next(node for node in nodes if node not in lost and node.opened)
            assert node.opened[0].attempt == number
            lost.append(node)
            await node.cut()
        answer = await asking.answer()
        error = answer.events[-1][1] if answer.status == 200 else answer.json["error"]
        assert error["code"] == "NODE_LOST"
        assert sum(len(node.opened) for node in nodes) == 3
        await control.idle()


async def test_an_attempt_that_was_given_up_is_canceled_when_its_node_is_back() -> None:
    async with a_control() as control:
        a = await control.join("a", pool(slots=1))
        asking = control.whole()
        first = (await a.asked()).accept()
        await a.cut()
        report = {"task_id": first.task_id, "attempt": 1, "owner": "alice", "state": "running", "offset": 0}
        b = await control.join("b", pool(slots=1))
        second = await b.asked()
        await a.join(pool(slots=1, slots_free=0), tasks=[report | {"pool_id": "p0", "model": "m"}])
        reader = await a.reader()
        assert reader.header["task_id"] == first.task_id
        await eventually(lambda: reader.canceled, within_s=5)
        assert not second.canceled
        second.begin().say("hi").end()
        assert (await asking.answer()).json["text"] == "hi"


async def test_a_task_that_was_ended_as_lost_is_canceled_when_its_node_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_soon(monkeypatch)
    async with a_control() as control:
        a = await control.join("a")
        asking = control.submit()
        first = (await a.asked()).begin().say("one")
        await asking.has(b"one")
        await a.cut()
        assert (await asking.answer()).terminals == ["error"]
        tasks = [
            {"task_id": first.task_id, "attempt": 1, "owner": "alice", "state": "running", "offset": len(first.log)}
        ]
        await a.join(pool(), tasks=tasks)
        reader = await a.reader()
        assert reader.header == {"task_id": first.task_id, "offset": len(first.log), "attempt": 1}
        await eventually(lambda: reader.canceled, within_s=5)
        assert not a.opened[1:]


async def test_a_task_whose_reader_left_is_left_alone_when_its_node_is_back() -> None:
    async with a_control() as control:
        a = await control.join("a")
        asking = control.submit()
        first = (await a.asked()).begin().say("one")
        await asking.has(b"one")
        await asking.leave()
        await eventually(lambda: first.detached, within_s=5)
        tasks = [{"task_id": first.task_id, "attempt": 1, "owner": "alice", "state": "running", "offset": 5}]
        assert (await a.beat(pools=[pool()], tasks=tasks))[0] == 200
        await a.settled()
        assert a.attached == []


def test_the_limits_are_those_that_were_promised() -> None:
    assert (dispatch.ACCEPT_TIMEOUT_S, retries.MAX_RETRIES, retries.MAX_LOSSES) == (1.0, 2, 3)
    assert dispatch.PING_AFTER_S == 15.0
