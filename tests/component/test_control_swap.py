"""Pools that load their models on demand, at a control: what clients see meanwhile, and what nodes are asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llorch.control import nodes, swapping
from llorch.errors import Code
from llorch.records import Type
from tests.component.control_harness import (
    Attempt,
    ControlUnderTest,
    LinkedNode,
    a_control,
    error_wire,
    eventually,
    look_often,
    ping_soon,
    pool,
)


def shared(resident: str | None = None, loading: str | None = None, **more: Any) -> dict[str, Any]:
    """The report of a pool for the models `m` and `n`, idle unless it says otherwise."""
    state = "loading" if loading else "ready" if resident else "stopped"
    return pool(
        model=resident, models=["m", "n"], state=state, ready=resident is not None, loading=loading,
        **{"swappable": loading is None, **more},
    )  # fmt: skip


def keeps_shortly(monkeypatch: pytest.MonkeyPatch, kept_s: float = 0.0) -> None:
    monkeypatch.setattr(swapping, "MODEL_KEPT_S", kept_s)
    monkeypatch.setattr(nodes, "MODEL_KEPT_S", kept_s)


async def holding(control: ControlUnderTest, node: LinkedNode, model: str = "m") -> Attempt:
    """The next task at `node`, which it holds while it loads the model."""
    attempt = (await node.asked()).accept()
    await node.beat(delta=True, pools=[shared(loading=model, slots_free=1)])
    return attempt


# ---------------------------------------------------------------- what is stopped, and is loaded when it is asked for


async def test_models_that_can_be_loaded_are_listed_and_tasks_for_them_are_sent_to_where_they_can() -> None:
    async with a_control() as control:
        node = await control.join("a", shared())
        assert [each["id"] for each in (await control.get("/v1/models"))["data"]] == ["m", "n"]
        native, openai = control.submit(), control.chat(model="n", stream=False)
        first = await node.asked()
        assert first.header["model"] == "m"
        first.begin().say("x").end()
        assert (await native.answer()).said == "x"
        await node.beat(delta=True, pools=[shared()])
        second = await node.asked()
        assert second.header["model"] == "n"
        second.accept().head("application/json").data(b"{}").tail(finish_reason="stop")
        assert (await openai.answer()).status == 200


async def test_a_pool_on_its_way_to_a_model_gets_tasks_for_that_one_alone() -> None:
    async with a_control() as control:
        node = await control.join("a", shared())
        control.submit()
        await node.asked()
        control.submit(model="n")
        control.submit()
        assert (await node.asked()).header["model"] == "m"
        control.submit()
        await control.waiting(2)
        await node.settled()
        assert len(node.opened) == 2


async def test_a_dry_run_says_what_is_loaded_and_when_another_may_be() -> None:
    async with a_control() as control:
        node = await control.join("a", shared("m", swappable=False, slots_free=1))
        status, dry = await control.post("/v2/placement", {"model": "n", "prompt": "x"})
        assert (status, dry["outcome"]) == (200, "wait")
        assert "m is loaded now; swapped when idle, in about" in dry["pools"][0]["reason"]
        await node.beat(delta=True, pools=[shared("m")])
        _, dry = await control.post("/v2/placement", {"model": "n", "prompt": "x"})
        assert (dry["outcome"], dry["pools"][0]["score"]["warmth"]) == ("placed", "evicting")
        assert "loaded there for it" in dry["reason"]


# ---------------------------------------------------------------- while it loads


async def test_a_first_byte_is_not_missed_while_the_model_loads_and_clients_see_that_their_tasks_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ping_soon(monkeypatch)
    async with a_control(ttft_timeout=0.2) as control:
        node = await control.join("a", shared())
        native = control.submit()
        first = await holding(control, node)
        openai = control.chat()
        second = await holding(control, node)
        for asking in (native, openai):
            await eventually(lambda asking=asking: asking.so_far.count(b": ping") >= 4, within_s=5, what="pings")  # type: ignore[misc]
            assert not asking.done
        await node.beat(delta=True, pools=[shared("m", swappable=False, slots_free=0)])
        first.begin().say("x").end()
        second.head().data(b"data: [DONE]\n\n").tail(finish_reason="stop")
        assert (await native.answer()).terminals == ["end"]
        assert b"[DONE]" in (await openai.answer()).raw


async def test_once_the_model_is_loaded_a_first_byte_is_missed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ping_soon(monkeypatch)
    async with a_control(ttft_timeout=0.2) as control:
        node = await control.join("a", shared())
        asking = control.submit()
        await holding(control, node)
        await eventually(lambda: asking.so_far.count(b": ping") >= 4, within_s=5, what="pings")
        await node.beat(delta=True, pools=[shared("m", swappable=False, slots_free=1)])
        assert (await asking.answer()).events[-1][1]["code"] == Code.ENGINE_STALLED


async def test_a_deadline_holds_while_the_model_loads() -> None:
    async with a_control(ttft_timeout=0.1) as control:
        node = await control.join("a", shared())
        asking = control.submit(deadline_ms=100)
        await holding(control, node)
        assert (await asking.answer()).code == Code.DEADLINE_EXCEEDED


async def test_who_waits_in_line_for_a_model_that_loads_is_told_so_and_does_not_wait_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look_often(monkeypatch)
    async with a_control(queue_timeout=0.2) as control:
        node = await control.join("a", shared(slots=1))
        control.submit()
        (await node.asked()).accept()
        await node.beat(delta=True, pools=[shared(loading="m", slots=1, slots_free=0)])
        waiting = control.submit()
        await eventually(lambda: waiting.so_far.count(b"event: queued") >= 2, within_s=5, what="queued events")
        assert not waiting.done
        await node.beat(delta=True, pools=[shared("m", slots=1, slots_free=0, swappable=False)])
        assert (await waiting.answer()).events[-1][1]["code"] == Code.QUEUE_TIMEOUT


async def test_a_load_that_fails_sends_its_tasks_elsewhere() -> None:
    async with a_control() as control:
        node = await control.join("a", shared())
        asking = control.submit()
        first = await holding(control, node)
        other = await control.join("b", pool())
        first.fail_early(Code.MODEL_NOT_AVAILABLE)
        (await other.asked()).begin().say("x").end()
        assert (await asking.answer()).said == "x"


# ---------------------------------------------------------------- two models, one pool


async def test_once_a_model_has_had_its_time_who_came_later_waits_for_the_other_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeps_shortly(monkeypatch)
    look_often(monkeypatch)
    async with a_control() as control:
        node = await control.join("a", shared("m", swappable=False))
        running = control.submit()
        first = (await node.asked()).begin()
        other = control.submit(model="n")
        await control.waiting(1)
        late = control.submit()
        await control.waiting(2)  # though a slot is free
        _, dry = await control.post("/v2/placement", {"model": "m", "prompt": "x"})
        assert dry["pools"][0]["code"] == "turn"
        assert "tasks for n have waited longer" in dry["pools"][0]["reason"]
        first.say("x").end()
        assert (await running.answer()).said == "x"
        await node.settled()
        assert len(node.opened) == 1
        await node.beat(delta=True, pools=[shared("m")])
        second = await holding(control, node, "n")
        assert second.header["model"] == "n"
        await node.beat(delta=True, pools=[shared("n", swappable=False, slots_free=1)])
        second.begin().say("y").end()
        assert (await other.answer()).said == "y"
        await node.beat(delta=True, pools=[shared("n")])
        third = await node.asked()
        assert third.header["model"] == "m"
        third.begin().say("z").end()
        assert (await late.answer()).said == "z"


async def test_before_that_it_goes_on() -> None:
    async with a_control() as control:
        node = await control.join("a", shared("m", swappable=False))
        control.submit()
        (await node.asked()).begin()
        control.submit(model="n")
        await control.waiting(1)
        control.submit()
        assert (await node.asked()).header["model"] == "m"


# ---------------------------------------------------------------- a node that refuses what its report promised


async def test_a_node_that_refuses_a_model_is_asked_what_it_has_and_its_task_goes_where_that_says() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(models=["m"]))
        asking = control.submit()
        (await node.asked()).refuse(Code.MODEL_NOT_AVAILABLE)
        await eventually(lambda: node.calls, what="the control to read the pool anew")
        call = node.calls[0]
        assert (call.header["method"], call.header["path"]) == ("GET", "/v2/pools/p0")
        await control.waiting(1)
        call.emit_json(Type.HEAD, {"status": 200, "headers": {"content-type": "application/json"}})
        call.data(json.dumps(pool(model=None, models=["m"], state="starting", ready=False)).encode()).tail()

        async def repaired() -> bool:
            return (await control.get("/v2/pools"))["pools"][0]["state"] == "starting"

        await eventually(repaired, what="the view of the pool repaired")
        assert len(node.opened) == 1
        await node.beat(delta=True, pools=[pool(models=["m"])])
        (await node.asked()).begin().say("x").end()
        assert (await asking.answer()).said == "x"


async def test_a_node_that_goes_on_refusing_is_not_asked_without_end() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(models=["m"]))
        control.submit()
        for _ in range(3):
            (await node.asked()).refuse(Code.MODEL_NOT_AVAILABLE)
            await control.waiting(1)
            await node.beat(delta=True, pools=[pool(models=["m"])])
        await node.settled()
        assert len(node.calls) == 1


async def test_a_swap_that_another_controls_task_has_forestalled_is_tried_again_when_it_may_be() -> None:
    async with a_control() as control:
        node = await control.join("a", shared("m"))
        asking = control.submit(model="n")
        refused = error_wire(Code.ALL_SLOTS_BUSY) | {"details": {"serves": "m", "swap_in_ms": 30_000}}
        (await node.asked()).emit_json(Type.REFUSE, refused)
        await control.waiting(1)
        running = control.submit()  # for what is resident there is a slot
        (await node.asked()).begin().say("x").end()
        assert (await running.answer()).said == "x"
        await node.beat(delta=True, pools=[shared("m")])
        again = await node.asked()
        assert again.header["model"] == "n"
        again.begin().say("y").end()
        assert (await asking.answer()).said == "y"


# ---------------------------------------------------------------- a model whose only node is restarted


async def test_a_model_whose_only_node_has_just_left_is_not_available_and_not_unknown() -> None:
    async with a_control() as control:
        node = await control.join("a")
        path = f"/v2/nodes/{node.node_id}"
        assert (await control.ask("DELETE", path, who="node").answer()).status == 200
        for asking in (control.whole(), control.chat(stream=False)):
            answer = await asking.answer()
            assert (answer.status, answer.code) == (503, "MODEL_NOT_AVAILABLE")
            assert int(answer.headers["Retry-After"]) >= 1
        answer = await control.whole(model="never-there").answer()
        assert (answer.status, answer.code) == (404, "MODEL_NOT_FOUND")
        back = await control.join("a")
        asking = control.whole()
        (await back.asked()).begin().say("x").end()
        assert (await asking.answer()).status == 200
