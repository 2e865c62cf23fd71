"""Pools that are ejected because tasks fail there, retries that are too many, storms: over the wire, and as shown."""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from typing import Any

import pytest

from llorch import breaker
from llorch.control import dispatch, routes_health, routes_nodes, sweep
from llorch.errors import Code
from tests.component.control_harness import (
    MODEL,
    Asking,
    Attempt,
    ControlUnderTest,
    LinkedNode,
    Stream,
    a_control,
    eventually,
    look_often,
    pool,
)


async def shown(control: ControlUnderTest, name: str) -> dict[str, Any]:
    """The breaker of pool a/`name`."""
    pools = (await control.get("/v2/pools"))["pools"]
    return dict(next(each["breaker"] for each in pools if (each["node_id"], each["pool_id"]) == ("a", name)))


def pinned(control: ControlUnderTest, where: str = "a/p0", **body: Any) -> Asking:
    return control.submit(placement={"pin": where}, **body)


async def fail_five(control: ControlUnderTest, node: LinkedNode, how: Callable[[Attempt], None]) -> None:
    """Tasks that may only run on p0, and fail there."""
    for _ in range(5):
        asking = pinned(control)
        how(await node.asked())
        await asking.answer()


def engine_fails(attempt: Attempt) -> None:
    attempt.accept().fail_early(Code.ENGINE_FAILED, 502)


def fails_after_its_first_token(attempt: Attempt) -> None:
    attempt.begin().say("one").fail(Code.ENGINE_STALLED)


def ends_with_nothing(attempt: Attempt) -> None:
    attempt.accept().tail(finish_reason="stop")


def has_a_fault(attempt: Attempt) -> None:
    attempt.refuse(Code.INTERNAL)


def engine_is_overloaded(attempt: Attempt) -> None:
    attempt.accept().fail_early(Code.MODEL_NOT_AVAILABLE, 503)


def says_nothing(attempt: Attempt) -> None:
    assert isinstance(attempt, Stream)
    attempt._node.lives()  # it is the task that gets no answer, not the link that is silent


def sends_no_first_byte(attempt: Attempt) -> None:
    attempt.accept()


def quick(monkeypatch: pytest.MonkeyPatch, *, ejected_s: float = 0.3, trial_s: float = 30.0) -> None:
    monkeypatch.setattr(breaker, "EJECTED_FIRST_S", ejected_s)
    monkeypatch.setattr(breaker, "TRIAL_TIMEOUT_S", trial_s)
    monkeypatch.setattr(dispatch, "TRIAL_TIMEOUT_S", trial_s)


# ---------------------------------------------------------------- what ejects a pool, and what does not


@pytest.mark.parametrize(
    "how", [engine_fails, fails_after_its_first_token, ends_with_nothing, has_a_fault, engine_is_overloaded,
            says_nothing, sends_no_first_byte],
)  # fmt: skip
async def test_a_pool_where_five_tasks_in_a_row_fail_is_ejected_and_shown_as_such(
    how: Callable[[Attempt], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how is says_nothing:
        monkeypatch.setattr(dispatch, "ACCEPT_TIMEOUT_S", 0.1)
        monkeypatch.setattr(dispatch, "ACCEPT_AT_LAST_S", 0.1)
    async with a_control(**{"ttft_timeout": 0.1} if how is sends_no_first_byte else {}) as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        await fail_five(control, node, how)
        seen = await shown(control, "p0")
        assert (seen["state"], seen["failures"], seen["reason"]) == ("ejected", 5, "5 tasks in a row failed")
        assert 13_000 < seen["ejected_ms"] <= 15_000
        assert (await shown(control, "p1"))["state"] == "closed"
        assert await control.metric("llorch_pool_ejected", node="a", pool="p0") == 1
        assert await control.metric("llorch_pool_ejected", node="a", pool="p1") == 0
        status, told = await control.post("/v2/placement", {"model": "m", "prompt": "x", "placement": {"pin": "a/p0"}})
        assert (status, told["outcome"]) == (200, "wait")
        assert next(each["code"] for each in told["pools"] if each["pool_id"] == "p0") == "ejected"
        for _ in range(3):
            asking = control.whole()
            attempt = await node.asked()
            assert attempt.pool_id == "p1"
            attempt.begin().end()
            await asking.answer()
        await control.idle()


def is_a_fault_of_the_client(attempt: Attempt) -> None:
    attempt.accept().fail_early(Code.INVALID_REQUEST, 400)


def is_full(attempt: Attempt) -> None:
    attempt.refuse(Code.ALL_SLOTS_BUSY)


def is_late(attempt: Attempt) -> None:
    attempt.accept().fail_early(Code.DEADLINE_EXCEEDED)


def is_canceled(attempt: Attempt) -> None:
    attempt.begin().end("canceled")


def node_stops(attempt: Attempt) -> None:
    attempt.begin().say("one").fail(Code.NODE_LOST)


@pytest.mark.parametrize("how", [is_a_fault_of_the_client, is_late, is_canceled, node_stops])
async def test_what_is_no_fault_of_the_pool_does_not_count(how: Callable[[Attempt], None]) -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        await fail_five(control, node, how)
        assert await shown(control, "p0") == {
            "state": "closed", "failures": 0, "ejections": 0, "ejected_ms": None, "reason": None,
        }  # fmt: skip
        await control.idle()


async def test_full_pools_lost_links_and_clients_that_leave_do_not_count() -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        for number in range(6):
            asking = pinned(control)
            (await node.asked()).refuse(Code.MODEL_NOT_AVAILABLE if number % 3 else Code.ALL_SLOTS_BUSY)
            await control.waiting(1)
            await node.beat(pools=[pool("p0"), pool("p1")])
            attempt = (await node.asked()).accept()
            if number % 2:
                await node.cut()
                await node.join(pool("p0"), pool("p1"))
                attempt = await node.asked()
            attempt.begin()
            await asking.has(b"started")
            if number % 2:
                await node.cut()
                await node.join(pool("p0"), pool("p1"))
            await asking.leave()
            await control.post(f"/v2/tasks/{attempt.task_id}/cancel", {})
            await control.idle()  # a claim that ends later would be a slot for the next one, whatever its refusal said
        assert (await shown(control, "p0"))["failures"] == 0


async def test_with_one_pool_a_failure_is_the_answer_however_many_there_are() -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0"))
        for _ in range(3):
            await fail_five(control, node, engine_fails)
        assert ((await shown(control, "p0"))["state"], len(node.opened)) == ("closed", 15)


# ---------------------------------------------------------------- the way back


async def test_an_ejected_pool_is_tried_with_one_task_and_taken_back_once_that_has_succeeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick(monkeypatch)
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        await fail_five(control, node, engine_fails)
        waiting = [pinned(control) for _ in range(3)]
        await control.waiting(3)
        trial = await node.asked()  # once its time is over: nothing else happens here
        trial.begin().say("one")
        await control.waiting(2)
        assert (await shown(control, "p0"))["state"] == "half_open"
        assert len(node.opened) == 6
        trial.end()
        for _ in range(2):
            (await node.asked()).begin().end()
        for asking in waiting:
            assert (await asking.answer()).terminals == ["end"]
        assert (await shown(control, "p0"))["state"] == "closed"
        await control.idle()


async def test_a_trial_that_fails_ejects_for_longer_and_one_that_tells_nothing_is_followed_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick(monkeypatch)
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        await fail_five(control, node, engine_fails)
        asking = pinned(control)
        is_a_fault_of_the_client(await node.asked())
        await asking.answer()
        assert (await shown(control, "p0"))["state"] == "half_open"
        asking = pinned(control)
        engine_fails(await node.asked())
        assert (await asking.answer()).code == "ENGINE_FAILED"
        seen = await shown(control, "p0")
        assert (seen["state"], seen["ejections"], seen["reason"]) == ("ejected", 2, "its trial failed")
        assert 300 < seen["ejected_ms"] <= 600
        asking = pinned(control)
        (await node.asked()).begin().end()
        assert (await asking.answer()).terminals == ["end"]
        await control.idle()


async def test_a_trial_has_less_time_for_its_first_byte_and_its_task_then_runs_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick(monkeypatch, trial_s=0.2)
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1", slots=1))
        await fail_five(control, node, engine_fails)
        other = pinned(control, "a/p1")
        holds = (await node.asked()).begin()
        asking = control.submit()
        trial = (await node.asked()).accept()
        assert trial.pool_id == "p0"
        await eventually(lambda: trial.canceled, within_s=5)
        assert (await shown(control, "p0"))["state"] == "ejected"
        holds.end()
        await other.answer()
        again = await node.asked()
        assert (again.pool_id, again.attempt) == ("p1", 2)
        again.begin().end()
        assert (await asking.answer()).terminals == ["end"]
        await control.idle()


async def test_another_process_of_the_node_begins_with_clean_breakers() -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        await fail_five(control, node, engine_fails)
        await node.join(pool("p0"), pool("p1"))
        assert (await shown(control, "p0"))["state"] == "ejected"
        node.boot_id = "another"
        await node.join(pool("p0"), pool("p1"))
        assert (await shown(control, "p0"))["state"] == "closed"


# ---------------------------------------------------------------- the retry budget


async def test_no_more_than_three_of_a_few_tasks_are_in_a_retry_at_once_and_the_next_waits_for_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "EXPIRE_EVERY_S", 60.0)  # which looks at the queue as well
    async with a_control() as control:
        node = await control.join("a", pool("p0", slots=4), pool("p1", slots=6))
        others = [pinned(control, "a/p1") for _ in range(6)]
        holding = [(await node.asked()).begin() for _ in others]
        tasks = [control.submit() for _ in range(4)]
        for attempt in [await node.asked() for _ in tasks]:
            engine_fails(attempt)
        await control.waiting(4)
        for attempt in holding:
            attempt.end()
        again = [await node.asked() for _ in range(3)]
        assert [(attempt.attempt, attempt.pool_id) for attempt in again] == [(2, "p1")] * 3
        await control.waiting(1)  # beside free slots
        passing = control.whole(placement={"pin": "a/p1"})
        (await node.asked()).begin().end()  # whoever comes for the first time passes it by
        assert (await passing.answer()).status == 200
        await control.waiting(1)
        again[0].begin()  # a first byte makes room for another, though that one still runs
        again.append(await node.asked())
        assert again[3].attempt == 2
        assert len({attempt.task_id for attempt in again}) == 4
        for attempt in again[1:]:
            attempt.begin()
        for attempt in again:
            attempt.end()
        for asking in (*tasks, *others):
            assert (await asking.answer()).terminals == ["end"]
        assert await control.metric("llorch_retries_total") == 4
        await control.idle()


async def test_a_task_that_fails_again_waits_for_its_turn_again_and_one_that_ends_makes_room() -> None:
    async with a_control() as control:
        node = await control.join("a", *(pool(f"p{number}", slots=4) for number in range(3)))
        tasks = [control.submit() for _ in range(4)]
        for attempt in [await node.asked() for _ in tasks]:
            engine_fails(attempt)
        again = [(await node.asked()).accept() for _ in range(3)]
        await control.waiting(1)
        again[0].fail_early(Code.ENGINE_FAILED, 502)  # two may go now: the one that waits, or this one once more
        moved = (await node.asked()).accept()
        await control.waiting(1)
        assert (await control.ask("POST", f"/v2/tasks/{again[1].task_id}/cancel").answer()).status == 202
        again[1].tail(finish_reason="canceled")
        ended = (await node.asked()).accept()
        assert {moved.attempt, ended.attempt} == {2, 3}
        for attempt in (again[2], moved, ended):
            attempt.begin().end()
        answers = [await asking.answer() for asking in tasks]
        assert [answer.terminals for answer in answers] == [["end"]] * 4
        assert sum(b'"canceled"' in answer.raw for answer in answers) == 1
        await control.idle()


async def all_have_failed(control: ControlUnderTest, node: LinkedNode, tasks: int) -> list[Attempt]:
    """So many tasks have failed on one pool, and as many of them as may are being tried again on another."""
    for attempt in [await node.asked() for _ in range(tasks)]:
        engine_fails(attempt)
    again = [await node.asked() for _ in range(3)]
    assert [attempt.attempt for attempt in again] == [2, 2, 2]
    return again


async def test_a_task_whose_turn_does_not_come_ends_as_it_failed() -> None:
    async with a_control(queue_timeout=0.5) as control:
        node = await control.join("a", pool("p0", slots=8), pool("p1", slots=8))
        tasks = [control.submit() for _ in range(4)]
        again = await all_have_failed(control, node, 4)
        await eventually(lambda: any(asking.done for asking in tasks), within_s=5)
        [last] = [asking for asking in tasks if asking.done]
        assert b"ENGINE_FAILED" in (await last.answer()).raw
        for attempt in again:
            attempt.begin().end()
        for asking in tasks:
            await asking.answer()
        await control.idle()


async def test_an_answer_in_one_piece_holds_up_no_other_retry_once_a_node_has_taken_it() -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0", slots=8), pool("p1", slots=8))
        body = {"model": MODEL, "prompt": "x"}
        tasks = [control.ask("POST", "/v1/completions", json=body) for _ in range(4)]
        again = await all_have_failed(control, node, 4)
        await control.waiting(1)
        again[0].accept()
        again.append(await node.asked())
        for attempt in again:
            attempt.accept().head("application/json").data(b"{}").tail()
        for asking in tasks:
            assert (await asking.answer()).raw == b"{}"
        await control.idle()


async def test_full_pools_and_lost_nodes_are_outside_the_budget() -> None:
    async with a_control() as control:
        a = await control.join("a", pool(slots=8))
        tasks = [control.whole() for _ in range(8)]
        for attempt in [await a.asked() for _ in tasks]:
            attempt.refuse(Code.ALL_SLOTS_BUSY)
        await control.waiting(8)
        await a.beat(pools=[pool(slots=8)])
        for attempt in [await a.asked() for _ in tasks]:
            attempt.accept()
        await a.cut()
        await control.waiting(8)
        b = await control.join("b", pool(slots=8))
        for attempt in [await b.asked() for _ in tasks]:
            attempt.begin().end()
        assert [(await asking.answer()).status for asking in tasks] == [200] * 8
        await control.idle()


# ---------------------------------------------------------------- storms


async def storm(control: ControlUnderTest) -> Any:
    return (await control.get("/readyz")).get("storm")


async def looked_twice(control: ControlUnderTest) -> None:
    """The sweep has come by twice."""
    seen: set[Any] = set()

    def look() -> bool:
        seen.add(control.control.registry._storms._beat_at)
        return len(seen) > 2

    await eventually(look, within_s=5, what="two sweeps")


async def test_many_nodes_that_vanish_at_once_stay_online_and_tasks_wait_or_go_to_those_that_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look_often(monkeypatch)
    async with a_control() as control:
        nodes = [await control.join(name) for name in "abcde"]
        assert await storm(control) is None
        gone = [node for node in nodes if node.node_id != "e"]
        for node in gone:
            await node.cut()
        await eventually(lambda: control.control.registry.storm is not None, within_s=5)
        told = await storm(control)
        assert (told["reason"], "missing" in told) == ("nodes vanished", False)
        assert (await control.get("/v2/nodes"))["storm"]["missing"] == ["a", "b", "c", "d"]
        assert await control.metric("llorch_storm") == 1
        for node in nodes:
            control.control.registry.nodes[node.node_id].last_beat -= 60  # e's too: beats are lost as links are
        await looked_twice(control)
        assert all(each["online"] for each in (await control.get("/v2/nodes"))["nodes"])
        asking = control.whole()
        (await nodes[4].asked()).begin().end()
        assert (await asking.answer()).json["node_id"] == "e"
        waits = control.whole(placement={"pin": "a"})
        await control.waiting(1)
        for node in gone:  # by the leases that they had
            assert (await node.beat(pools=[pool()]))[0] == 200
            assert (await node.open_link())[0] == 101
        await nodes[4].beat(pools=[pool()])
        (await nodes[0].asked()).begin().end()
        assert (await waits.answer()).json["node_id"] == "a"
        await eventually(lambda: control.control.registry.storm is None, within_s=5)
        assert await storm(control) is None
        assert await control.metric("llorch_storm") == 0


async def test_nodes_that_sign_off_one_after_another_are_no_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    look_often(monkeypatch)
    async with a_control() as control:
        for node in [await control.join(name) for name in "abcde"]:
            if node.node_id != "e":
                await control.ask("DELETE", f"/v2/nodes/{node.node_id}", who="node").answer()
                await node.link_ended()
        await looked_twice(control)
        assert await storm(control) is None


async def test_a_control_that_stood_still_gives_leases_the_time_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ahead_s = 0.0
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s)
    for module in (sweep, routes_nodes, routes_health):
        monkeypatch.setattr(module, "time", clock)
    look_often(monkeypatch)
    caplog.set_level("INFO")
    async with a_control() as control:
        node = await control.join("a")
        await looked_twice(control)
        ahead_s = 120.0  # four times what makes a silent node offline
        await eventually(lambda: "storm.ended" in caplog.text, within_s=5)
        assert 'storm.began reason="the control stood still" missing=1 nodes=1' in caplog.text
        assert "node.expired" not in caplog.text
        shown = await control.get("/v2/nodes/a")
        assert (shown["online"], shown["suspect"]) == (True, False)
        asking = control.whole()
        (await node.asked()).begin().end()
        assert (await asking.answer()).status == 200


async def test_a_control_that_is_stopped_does_not_take_the_end_of_its_links_for_a_storm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with a_control() as control:
        nodes = [await control.join(name) for name in "abcde"]
        control._nodes.clear()  # it is the control that ends them
    for node in nodes:
        await node.link_ended()
    assert caplog.text.count("link.lost") == 5
    assert "storm" not in caplog.text
