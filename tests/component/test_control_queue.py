"""The queue: fair and in order, bounded in length and time, with a way out for those that can't be served."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

import pytest

from llorch.control import admission, intake, placement, swapping, waiting
from llorch.control.registry import Claim
from llorch.errors import Code
from tests.component.control_harness import MODEL, Attempt, ControlUnderTest, LinkedNode, a_control, eventually, pool


async def full(control: ControlUnderTest, **more: object) -> tuple[LinkedNode, Attempt]:
    """A node whose one slot is taken."""
    node = await control.join("a", pool(slots=1))
    control.submit(prompt="holder")
    return node, (await node.asked()).begin()


async def test_first_come_first_served_one_task_for_each_freed_slot() -> None:
    async with a_control() as control:
        node, holding = await full(control)
        asking = []
        for number in range(5):
            asking.append(control.whole(prompt=f"number {number}"))
            await control.waiting(number + 1)
        for number in range(5):
            holding.end()
            holding = await node.asked()
            await node.settled()
            assert json.loads(holding.body)["prompt"] == f"number {number}"
            assert len(node.opened) == number + 2
            holding.begin()
            task = await control.task(holding.task_id)
            assert (task["state"], task["attempt"]) == ("streaming", 1)
        holding.end()
        for each in asking:
            assert (await each.answer()).json["state"] == "done"
        await control.idle()


async def test_one_that_just_came_does_not_pass_those_that_wait() -> None:
    async with a_control() as control:
        node, holding = await full(control)
        first = control.whole(prompt="first")
        await control.waiting(1)
        second = control.whole(prompt="second")
        await control.waiting(2)
        task = (await control.get("/v2/tasks"))["tasks"][0]
        assert (task["state"], task["queue"]["position"]) == ("queued", 2)
        assert task["queue"]["eta_ms"] is None  # nobody has left the line yet
        holding.end()
        for word in ("first", "second"):
            attempt = await node.asked()
            assert json.loads(attempt.body)["prompt"] == word
            attempt.begin().end()
        await first.answer()
        await second.answer()


async def test_place_and_expected_wait_are_told_in_events_views_and_metrics() -> None:
    async with a_control() as control:
        node, holding = await full(control)
        streams = [control.submit(prompt=str(number)) for number in range(4)]
        await control.waiting(4)
        await asyncio.sleep(0.2)  # so that the line has a pace that can be told
        for _ in range(2):
            holding.end()
            holding = (await node.asked()).begin()
        await control.waiting(2)
        waiting = [task["queue"] for task in (await control.get("/v2/tasks"))["tasks"] if "queue" in task]
        places, etas = sorted(each["position"] for each in waiting), sorted(each["eta_ms"] for each in waiting)
        assert places == [1, 2]
        assert 0 < etas[0] < etas[1]
        assert await control.metric("llorch_queue_eta_seconds", model="m") > etas[1] / 1_000
        late = control.submit(prompt="late")
        await control.waiting(3)
        for _ in range(3):
            holding.end()
            holding = (await node.asked()).begin()
        holding.end()
        answer = await late.answer()
        assert answer.names[0] == "queued"
        told = answer.events[0][1]
        assert (told["position"], told["eta_ms"] > etas[1]) == (3, True)
        for stream in streams:
            await stream.answer()
        assert await control.metric("llorch_queue_eta_seconds", model="m") == 0


async def test_a_slot_that_time_has_freed_is_not_taken_by_one_that_just_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.control.nodes.REFUSAL_HOLDS_S", 0.2)
    monkeypatch.setattr("llorch.control.sweep.EXPIRE_EVERY_S", 60.0)  # nothing else looks at the queue meanwhile
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        first = control.whole(prompt="first")
        (await node.asked()).refuse(Code.ALL_SLOTS_BUSY)
        await control.waiting(1)
        await asyncio.wait((first._task,), timeout=0.3)
        second = control.whole(prompt="second")
        for word in ("first", "second"):
            attempt = await node.asked()
            assert json.loads(attempt.body)["prompt"] == word
            attempt.begin().end()
        for asking in (first, second):
            assert (await asking.answer()).status == 200


async def test_a_slot_that_appears_elsewhere_goes_to_the_one_that_waits() -> None:
    async with a_control() as control:
        await full(control)
        asking = control.whole()
        await control.waiting(1)
        other = await control.join("b")
        (await other.asked()).begin().say("hi").end()
        assert (await asking.answer()).json["node_id"] == "b"


@pytest.mark.parametrize("form", ["native", "json", "v1", "v1 json", "detached"])
async def test_a_full_queue_refuses_with_a_time_to_come_back(form: str) -> None:
    async with a_control(queue_limit=1) as control:
        node, holding = await full(control)
        waiter = control.whole()
        await control.waiting(1)
        asking = {
            "native": control.submit,
            "json": control.whole,
            "v1": control.chat,
            "v1 json": lambda: control.chat(stream=False),
            "detached": lambda: control.submit(detach=True),
        }[form]()
        answer = await asking.answer()
        assert (answer.status, answer.code) == (429, "QUEUE_FULL")
        error = answer.json["error"]
        assert (error["retriable"], error["type"], bool(error["hint"])) == (True, "rate_limit_error", True)
        assert int(answer.headers["X-Backoff-Ms"]) == error["retry_after_ms"] > 0
        assert int(answer.headers["Retry-After"]) == -(-error["retry_after_ms"] // 1000)
        holding.end()
        (await node.asked()).begin().end()
        await waiter.answer()
        await control.idle()


@pytest.mark.parametrize(
    ("more", "settings", "code"),
    [({}, {"queue_timeout": 0.2}, "QUEUE_TIMEOUT"), ({"deadline_ms": 200}, {}, "DEADLINE_EXCEEDED")],
)
async def test_a_wait_ends_in_time(more: dict[str, int], settings: dict[str, float], code: str) -> None:
    async with a_control(**settings) as control:
        node, holding = await full(control)
        native, whole = control.submit(**more), control.whole(**more)
        v1 = control.chat(headers={"X-Llorch-Deadline-Ms": "200"} if more else {})
        answer = await native.answer()
        assert (answer.status, answer.names[0]) == (200, "queued")
        assert (answer.terminals, answer.events[-1][1]["code"]) == (["error"], code)
        for asking in (whole, v1):
            answer = await asking.answer()
            assert (answer.status, answer.code) == (504, code)
        assert len(node.opened) == 1
        holding.end()
        await control.idle()


async def test_a_deadline_goes_along_to_the_node_and_ends_the_task_if_the_node_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llorch.control.dispatch.DEADLINE_SLACK_S", 0.1)
    async with a_control() as control:
        node = await control.join("a", pool(slots=4))
        for chatty in (False, True):
            asking = control.submit(deadline_ms=300)
            attempt = await node.asked()
            assert 0 < attempt.header["deadline_ms"] <= 300
            attempt.begin().say("one")
            while chatty and not attempt.canceled:
                attempt.say("x")
                await asyncio.sleep(0.02)
            answer = await asking.answer()
            assert (answer.terminals, answer.events[-1][1]["code"]) == (["error"], "DEADLINE_EXCEEDED")
            await eventually(lambda a=attempt: a.canceled and a.detached == "left")
        await control.idle()


async def test_a_deadline_before_the_first_byte_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.control.dispatch.DEADLINE_SLACK_S", 0.1)
    async with a_control() as control:
        node = await control.join("a", pool("p0"), pool("p1"))
        asking = control.whole(deadline_ms=200)
        (await node.asked()).accept()
        assert (await asking.answer()).code == "DEADLINE_EXCEEDED"
        assert len(node.opened) == 1
        await control.idle()


async def test_what_can_not_be_served_is_refused_at_once_and_what_may_soon_waits() -> None:
    async with a_control() as control:
        assert (await control.whole().answer()).code == "MODEL_NOT_FOUND"
        node = await control.join("a")
        for placement, status, code in (
            ({"pin": "nowhere"}, 404, "NODE_NOT_FOUND"),
            ({"pin": "a/p7"}, 404, "POOL_NOT_FOUND"),
            ({"zone": "mars"}, 503, "MODEL_NOT_AVAILABLE"),
        ):
            answer = await control.whole(placement=placement).answer()
            assert (answer.status, answer.code) == (status, code)
        await node.beat(pools=[pool(ready=False, state="loading")])
        asking = control.whole()
        await control.waiting(1)
        await node.beat(pools=[pool()])
        (await node.asked()).begin().end()
        await asking.answer()
        await node.beat(draining=True, pools=[pool()])
        answer = await control.whole().answer()
        assert (answer.status, answer.code) == (503, "NO_CAPACITY")
        assert "Retry-After" in answer.headers
        assert await control.metric("llorch_placements_total", outcome="refused", reason="NO_CAPACITY") == 1


async def test_a_wait_that_has_become_hopeless_ends_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WAIT_TICK_S", 0.05)
    monkeypatch.setattr(waiting, "REFUSE_AFTER_S", 0.4)
    async with a_control() as control:
        node, holding = await full(control)
        asking, other = control.whole(), control.whole()
        await control.waiting(2)
        await node.beat(draining=True, pools=[pool(slots=1, slots_free=0)])
        await asyncio.wait((asking._task,), timeout=0.2)
        assert not asking.done
        await node.beat(draining=False, pools=[pool(slots=1, slots_free=0)])
        await asyncio.wait((asking._task,), timeout=0.6)
        assert not asking.done
        await node.beat(draining=True, pools=[pool(slots=1, slots_free=0)])
        for each in (asking, other):
            assert (await each.answer()).code == "NO_CAPACITY"
        holding.end()
        await control.idle()


async def test_a_task_that_came_back_from_a_lost_node_is_not_refused_while_that_restarts() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        asking = control.whole()
        (await node.asked()).accept()
        await control.ask("DELETE", "/v2/nodes/a", who="node").answer()  # gone, and its model with it
        await control.waiting(1)
        back = await control.join("a", pool(slots=1))
        (await back.asked()).begin().say("hi").end()
        assert (await asking.answer()).json["text"] == "hi"


async def test_why_a_task_went_where_it_went_is_told_later_as_it_was_then() -> None:
    async with a_control() as control:
        node = await control.join("a", pool("p0", slots=1), pool("p1", model="other"))
        asking = control.whole()
        attempt = await node.asked()
        attempt.begin().end()
        await asking.answer()
        await node.beat(pools=[])
        why = await control.get(f"/v2/tasks/{attempt.task_id}/placement")
        assert (why["outcome"], why["node_id"], why["pool_id"], why["state"]) == ("placed", "a", "p0", "done")
        verdicts = {p["pool_id"]: p for p in why["pools"]}
        assert (verdicts["p0"]["passed"], verdicts["p1"]["code"]) == (True, "model")
        assert all(check["name"] for p in why["pools"] for check in p["filters"])
        status, dry = await control.post("/v2/placement", {"model": "m", "prompt": "x"})
        assert (status, dry["outcome"], dry["error"]["code"]) == (200, "refuse", "MODEL_NOT_FOUND")


async def prompts(node: LinkedNode, holding: Attempt, count: int) -> list[str]:
    """The prompts of the next tasks, each of which gets the slot of the one before."""
    found = []
    for _ in range(count):
        holding.end()
        holding = await node.asked()
        found.append(str(json.loads(holding.body)["prompt"]))
        holding.begin()
    holding.end()
    return found


async def test_interactive_tasks_are_served_before_batch_tasks_and_both_are_counted() -> None:
    async with a_control() as control:
        node, holding = await full(control)
        asking = []
        for number, priority in enumerate(("batch", "batch", "interactive")):
            asking.append(control.whole(prompt=f"{priority} {number}", priority=priority))
            await control.waiting(number + 1)
        assert await control.metric("llorch_queue_depth", model="m", priority="batch") == 2
        assert await control.metric("llorch_queue_depth", model="m", priority="interactive") == 1
        assert await prompts(node, holding, 3) == ["interactive 2", "batch 0", "batch 1"]
        for each in asking:
            assert (await each.answer()).status == 200
        assert await control.metric("llorch_queue_depth", model="m") == 0
        assert await control.metric("llorch_queue_wait_seconds_count") == 3


async def test_one_that_sends_much_does_not_keep_one_that_sends_little_waiting() -> None:
    async with a_control() as control:
        node, holding = await full(control)
        asking = [control.whole(prompt=f"much {number}") for number in range(6)]
        await control.waiting(6)
        asking += [control.whole(who="bob", prompt=f"little {number}") for number in range(2)]
        await control.waiting(8)
        served = await prompts(node, holding, 8)
        assert [prompt.split()[0] for prompt in served[:3]] == ["little", "much", "little"]
        for each in asking:
            assert (await each.answer()).status == 200
        await control.idle()


async def test_who_has_had_fewer_tokens_is_next() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        for who, tokens in (("alice", 1_000), ("bob", 1)):
            before = control.whole(who=who)
            attempt = (await node.asked()).begin()
            attempt.event("end", {"finish_reason": "stop"})
            attempt.tail(finish_reason="stop", tokens_in=1, tokens_out=tokens)
            await before.answer()
        control.submit(who="admin", prompt="holder")
        holding = (await node.asked()).begin()
        asking = []
        for number, who in enumerate(("alice", "bob")):
            asking.append(control.whole(who=who, prompt=who))
            await control.waiting(number + 1)
        assert await prompts(node, holding, 2) == ["bob", "alice"]
        for each in asking:
            await each.answer()


@pytest.mark.parametrize("told", ["by a report", "before it left", "to one who read on", "for another attempt"])
async def test_who_leaves_a_task_is_charged_what_it_cost_once_that_is_known(told: str) -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1))
        shares = control.control.dispatcher._room._admission._lines
        asking = control.submit()
        attempt = (await node.asked()).begin().say("hi")
        await asking.has(b'"hi"')
        report = {
            "task_id": attempt.task_id, "attempt": 2 if told == "for another attempt" else 1, "owner": "alice",
            "state": "sealed", "offset": len(attempt.log), "finish_reason": "stop", "tokens_in": 100,
            "cached_tokens": 50, "tokens_out": 10_000,
        }  # fmt: skip
        estimate = shares[MODEL].shares.counter("alice")
        if told == "before it left":
            await node.beat(delta=True, tasks=[report])
        await asking.leave()
        await eventually(lambda: attempt.detached == "left")
        await eventually(lambda: control.control.dispatcher.tasks.running == 0)
        if told == "to one who read on":
            again = control.events(attempt.task_id)
            reader = await node.reader()
            reader.accept().head().data(attempt.log)
            reader.tail(finish_reason="stop", tokens_in=100, cached_tokens=50, tokens_out=10_000)
            await again.answer()
        else:  # a node that has sent the TAIL reports nothing more
            for _ in range(2):
                await node.beat(delta=True, tasks=[report])
        charged = shares[MODEL].shares.counter("alice")
        assert charged == pytest.approx(estimate if told == "for another attempt" else 20_055)


async def test_one_that_waits_beside_another_has_a_quarter_of_the_queue() -> None:
    async with a_control(queue_limit=8) as control:
        node, holding = await full(control)
        asking = [control.whole(who="bob")]
        await control.waiting(1)
        asking += [control.whole() for _ in range(2)]
        await control.waiting(3)
        answer = await control.whole().answer()
        assert (answer.status, answer.code) == (429, "QUEUE_FULL")
        assert "while others wait too" in answer.json["error"]["message"]
        assert int(answer.headers["X-Backoff-Ms"]) > 0
        asking.append(control.whole(who="bob"))
        await control.waiting(4)
        await prompts(node, holding, 4)
        for each in asking:
            assert (await each.answer()).status == 200


async def test_the_bodies_that_wait_are_bounded_in_bytes() -> None:
    async with a_control(queue_body_limit=1_000) as control:
        node, holding = await full(control)
        asking = control.whole(prompt="x" * 600)
        await control.waiting(1)
        answer = await control.whole(prompt="x" * 600).answer()
        assert (answer.status, answer.code) == (429, "QUEUE_FULL")
        await prompts(node, holding, 1)
        assert (await asking.answer()).status == 200


async def test_a_batch_task_has_a_timeout_of_its_own() -> None:
    async with a_control(queue_timeout=0.2, queue_timeout_batch=30.0) as control:
        node, holding = await full(control)
        batch = control.whole(prompt="batch", priority="batch")
        await control.waiting(1)
        assert (await control.whole().answer()).code == "QUEUE_TIMEOUT"
        assert not batch.done
        assert await prompts(node, holding, 1) == ["batch"]
        assert (await batch.answer()).status == 200
    async with a_control(queue_timeout=30.0, queue_timeout_batch=0.2) as control:
        await full(control)
        answer = await control.whole(priority="batch").answer()
        assert (answer.code, "0.2 s" in answer.json["error"]["message"]) == ("QUEUE_TIMEOUT", True)


async def test_time_in_which_the_model_is_loaded_does_not_count_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WAIT_TICK_S", 0.05)
    async with a_control(queue_timeout=0.3) as control:
        node = await control.join("a", pool(ready=False, state="loading"))
        asking = control.whole()
        await control.waiting(1)
        await asyncio.wait((asking._task,), timeout=0.6)  # twice the time that it may wait
        assert not asking.done
        await node.beat(pools=[pool(slots=1, slots_free=0)])  # ready, and busy: from here on it counts
        answer = await asking.answer()
        assert (answer.status, answer.code) == (504, "QUEUE_TIMEOUT")


async def test_a_model_that_is_never_loaded_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WAIT_TICK_S", 0.05)
    monkeypatch.setattr(waiting, "LOADING_SPARED_S", 0.2)
    async with a_control(queue_timeout=0.2) as control:
        await control.join("a", pool(ready=False, state="loading"))
        assert (await control.whole().answer()).code == "QUEUE_TIMEOUT"


async def test_a_deadline_that_can_not_be_met_is_refused_at_once() -> None:
    async with a_control() as control:
        node, holding = await full(control)
        asking = [control.whole() for _ in range(9)]
        await control.waiting(9)
        for _ in range(6):
            await asyncio.wait((asking[-1]._task,), timeout=0.1)  # the pace of this line
            holding.end()
            holding = (await node.asked()).begin()
        answer = await control.whole(deadline_ms=200).answer()
        assert (answer.status, answer.code) == (504, "DEADLINE_EXCEEDED")
        error = answer.json["error"]
        assert error["details"]["eta_ms"] > 200 >= error["details"]["deadline_ms"]
        assert "place 4 in line" in error["message"]
        patient = control.whole(deadline_ms=60_000)
        await control.waiting(4)
        await prompts(node, holding, 4)
        assert (await patient.answer()).status == 200


@pytest.mark.parametrize("leaves", ["before the slot is free", "as the slot is freed"])
async def test_the_slot_of_a_waiter_that_left_passes_on_to_the_next(leaves: str) -> None:
    async with a_control() as control:
        node, holding = await full(control)
        gone = control.chat()
        await control.waiting(1)
        asking = control.whole(prompt="next")
        await control.waiting(2)
        if leaves == "before the slot is free":
            await gone.leave()
            await control.waiting(1)
            holding.end()
        else:
            holding.end()
            await gone.leave()
        await eventually(lambda: any(b"next" in attempt.body for attempt in node.opened), within_s=5)
        attempt = next(attempt for attempt in node.opened if b"next" in attempt.body)
        attempt.begin().end()
        assert (await asking.answer()).status == 200
        await eventually(lambda: all(a.canceled or a.detached for a in node.opened if b"messages" in a.body))
        for left in node.opened:
            if b"messages" in left.body:
                left.tail(finish_reason="canceled")
        await control.idle()


async def test_a_slot_given_to_one_that_leaves_at_that_moment_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.control.sweep.EXPIRE_EVERY_S", 60.0)  # nothing else looks at the queue meanwhile
    async with a_control() as control:
        await control.join("a", pool(slots=1))
        room = control.control.dispatcher._room

        async def said(position: int, eta_ms: int | None) -> None:
            pass

        def claiming(number: int) -> asyncio.Task[Claim]:
            raw = json.dumps({"model": MODEL, "prompt": "x"}).encode()
            task_id, now = str(uuid.UUID(int=number)), time.monotonic()
            task = intake.native_task(raw, {}, owner="alice", request_id="r", task_id=task_id, now=now)
            return asyncio.create_task(room.claim(task, said, front=False))

        holding = await claiming(0)
        first, second = claiming(1), claiming(2)
        await eventually(lambda: room._admission.depth() == 2)
        room.release(holding)
        assert room._admission.depth() == 1  # the first one has it, and has not heard of it
        first.cancel()
        room.release(await asyncio.wait_for(second, 5))
        assert first.cancelled()
        assert control.control.registry.nodes["a"].pools["p0"].ended_since_report == 2  # the first one's was never used
        await control.idle()


async def test_six_hundred_that_come_at_once_never_hold_more_than_the_six_slots_there_are() -> None:
    async with a_control(queue_limit=1_000) as control:
        await control.join("a", pool(slots=6))
        room, registry = control.control.dispatcher._room, control.control.registry
        raw = json.dumps({"model": MODEL, "prompt": "x"}).encode()
        held: list[int] = []

        async def said(position: int, eta_ms: int | None) -> None:
            pass

        async def one(number: int) -> None:
            task_id, now = str(uuid.UUID(int=number)), time.monotonic()
            task = intake.native_task(raw, {}, owner=f"o{number % 4}", request_id="r", task_id=task_id, now=now)
            claim = await room.claim(task, said, front=False)
            held.append(registry.claimed("a", "p0"))
            await asyncio.sleep(0)  # the others go on while it is held
            room.release(claim)

        await asyncio.gather(*(one(number) for number in range(600)))
        assert (len(held), max(held)) == (600, 6)


async def test_the_pools_are_looked_up_once_however_many_wishes_they_do_not_meet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_control() as control:
        await full(control)
        for number in range(5):
            control.whole(placement={"pin": "a", "avoid": [f"x{number}"], "allow_fallback": False})
            await control.waiting(number + 1)
        await control.join("b")  # it has a free slot, and none of them wants it
        looked, picked = 0, 0
        room, pool_facts, choose = (
            control.control.dispatcher._room,
            control.control.registry.pool_facts,
            swapping.choose,
        )

        def looking(now: float, model: str | None = None) -> list[placement.PoolFacts]:
            nonlocal looked
            looked += 1
            return pool_facts(now, model)

        def choosing(*asked: Any) -> tuple[str, str] | None:
            nonlocal picked
            picked += 1
            return choose(*asked)

        with monkeypatch.context() as patch:
            patch.setattr(control.control.registry, "pool_facts", looking)
            patch.setattr(swapping, "choose", choosing)
            room.pump()
        assert (looked, picked) == (1, 5)


async def test_made_up_models_keep_no_task_of_a_real_one_from_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_LINES", 2)
    async with a_control() as control:
        node, holding = await full(control)
        monkeypatch.setattr(control.control.dispatcher._room, "_hold_refusals", lambda: True)
        for number in range(2):
            control.whole(model=f"made-up-{number}")
            await control.waiting(number + 1)
        assert (await control.whole(model="made-up-2").answer()).code == "QUEUE_FULL"
        asking = control.whole()
        await control.waiting(3)
        await prompts(node, holding, 1)
        assert (await asking.answer()).status == 200


async def test_a_slot_is_not_lost_with_a_waiter_that_was_canceled_a_moment_ago() -> None:
    async with a_control() as control:
        _, holding = await full(control)
        asking = control.whole()
        await control.waiting(1)
        dispatcher, registry = control.control.dispatcher, control.control.registry
        dispatcher.cancel(next(task for task in dispatcher.tasks if task.state == "queued"))
        dispatcher._room.release(next(iter(registry._claims.values())))  # the canceled one has not heard of it yet
        assert registry.claimed("a", "p0") == 0
        assert registry.nodes["a"].pools["p0"].ended_since_report == 1
        assert (await asking.answer()).code == "CANCELED"
        holding.end()
        await control.idle()


async def test_while_refusals_are_held_back_what_nobody_has_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WAIT_TICK_S", 0.05)
    monkeypatch.setattr(waiting, "REFUSE_AFTER_S", 0.2)
    async with a_control() as control:
        held = True
        monkeypatch.setattr(control.control.dispatcher._room, "_hold_refusals", lambda: held)
        served, never = control.whole(), control.whole(model="a-name-of-the-clients")
        await control.waiting(2)
        await asyncio.wait((served._task, never._task), timeout=0.5)
        assert not served.done and not never.done
        assert await control.metric("llorch_queue_depth", model="", priority="interactive") == 2
        node = await control.join("a")
        (await node.asked()).begin().end()
        assert (await served.answer()).status == 200
        assert not never.done
        held = False
        assert (await never.answer()).code == "MODEL_NOT_FOUND"
        assert (await control.whole(model="another").answer()).code == "MODEL_NOT_FOUND"
        await control.idle()


async def test_a_free_slot_that_no_waiter_can_use_is_not_kept_from_one_that_just_came() -> None:
    async with a_control(queue_limit=1) as control:
        await full(control)
        pinned = control.whole(placement={"pin": "a"})
        await control.waiting(1)
        other = await control.join("b")
        asking = control.whole()  # the queue is full, and there is a slot for it
        (await other.asked()).begin().end()
        assert (await asking.answer()).json["node_id"] == "b"
        assert not pinned.done
