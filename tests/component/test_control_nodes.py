"""Nodes at a control: registration, leases, beats and deltas, and what is shown of them. The rules themselves are the
registry's, and are tested there; here they cross the wire."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llorch import records
from llorch.records import Type
from tests.component.control_harness import LinkedNode, a_control, eventually, look_often, pool

GPU = {"index": 0, "uuid": "gpu-0", "name": "n", "vram_total_bytes": 8, "vram_used_bytes": 1}


async def test_a_registration_is_answered_with_all_that_a_node_needs() -> None:
    async with a_control(heartbeat_interval=7.0, offline_after=21.0) as control:
        node = control.node("a")
        status, answer = await node.register(pool())
        assert status == 200
        assert (answer["success"], answer["node_id"]) == (True, "a")
        assert (answer["heartbeat_interval_ms"], answer["offline_after_ms"]) == (7_000, 21_000)
        assert answer["lease_id"]
        assert answer["epoch"] == control.control.registry.epoch
        again = await node.register(pool())
        assert (again[0], again[1]["lease_id"] != answer["lease_id"]) == (200, True)
        assert await control.metric("llorch_registrations_total", outcome="ok") == 2


async def test_a_beat_is_answered_with_the_next_one_and_a_refused_one_with_what_to_do() -> None:
    async with a_control() as control:
        node = await control.join("a")
        status, answer = await node.beat(pools=[pool()], rtt_ms=2.5)
        assert (status, answer) == (200, {"success": True, "next_heartbeat_ms": 10_000})
        stranger = control.node("b")
        status, answer = await stranger.beat()
        assert (status, answer["error"]["code"]) == (404, "NODE_UNKNOWN")
        assert "register" in answer["error"]["hint"]
        status, answer = await node.beat(lease_id="an-older-one")
        assert (status, answer["error"]["code"]) == (409, "LEASE_STALE")
        status, answer = await node.beat(boot_id="another")
        assert (status, answer["error"]["code"]) == (409, "NODE_ID_CONFLICT")
        assert await control.metric("llorch_heartbeats_total", node="a", outcome="ok") == 1
        assert await control.metric("llorch_heartbeats_total", node="a", outcome="stale") == 2
        assert await control.metric("llorch_heartbeats_total", node="b") == 0
        assert await control.metric("llorch_heartbeat_rtt_seconds", node="a") == 0.0025


async def test_a_beat_that_is_replayed_or_overtaken_changes_nothing() -> None:
    async with a_control() as control:
        node = await control.join("a")
        await node.beat(pools=[pool(slots=5)])
        for seq in (node.seq, node.seq - 1):
            assert (await node.beat(seq=seq, pools=[pool(slots=9)]))[0] == 200
        assert (await control.get("/v2/pools"))["pools"][0]["slots_total"] == 5


async def test_deltas_change_what_they_name_and_gone_removes_it() -> None:
    async with a_control() as control:
        model = {"id": "m", "size_bytes": 3, "sha256": "d"}
        node = await control.join("a", pool("p0"), pool("p1"), capabilities={"gpus": [GPU]}, catalog=[model])

        async def shown() -> dict[str, Any]:
            seen: dict[str, Any] = await control.get("/v2/nodes/a")
            return seen

        await node.beat(delta=True, pools=[pool("p1", slots=7)], gpus=[GPU | {"vram_used_bytes": 5}])
        seen = await shown()
        assert [(p["pool_id"], p["slots_total"]) for p in seen["pools"]] == [("p0", 2), ("p1", 7)]
        assert [gpu["vram_used_bytes"] for gpu in seen["gpus"]] == [5]
        await node.beat(
            delta=True,
            pools=[{"pool_id": "p0", "gone": True}],
            gpus=[GPU | {"gone": True}],
            catalog=[{"id": "m", "gone": True}],
        )
        seen = await shown()
        assert ([p["pool_id"] for p in seen["pools"]], seen["gpus"]) == (["p1"], [])
        assert (await control.get("/v2/catalog"))["nodes"]["a"]["models"] == []
        await node.beat(delta=False, pools=[pool("p2")], catalog=[model])
        assert [p["pool_id"] for p in (await shown())["pools"]] == ["p2"]
        listed = (await control.get("/v2/catalog"))["models"]["m"]
        assert (listed["nodes"], listed["size_bytes"], listed["sha256"]) == (["a"], 3, "d")


async def test_a_freed_slot_in_a_delta_is_used_at_once() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=1, slots_free=0))
        asking = control.whole()
        await control.waiting(1)
        await node.beat(delta=True, pools=[pool(slots=1)])
        (await node.asked()).begin().end()
        assert (await asking.answer()).status == 200


async def test_another_process_is_refused_while_the_first_answers_and_taken_in_when_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llorch.control.routes_nodes.OLD_LINK_ANSWERS_WITHIN_S", 0.2)
    async with a_control() as control:
        first = await control.join("a")
        control.control.registry.nodes["a"].peer = "192.0.2.7"  # as if it were on another machine
        second = control.node("a")
        status, answer = await second.register(pool())
        assert (status, answer["error"]["code"]) == (409, "NODE_ID_CONFLICT")
        assert first.up
        assert (await first.beat(pools=[pool()]))[0] == 200
        first.answer_pings = False
        assert (await second.register(pool()))[0] == 200
        await first.link_ended()
        assert (await second.open_link())[0] == 101
        assert await control.metric("llorch_registrations_total", outcome="refused") == 1


async def test_the_end_of_a_link_is_seen_at_once_and_silence_makes_a_node_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look_often(monkeypatch)
    async with a_control(heartbeat_interval=0.2, offline_after=1.2) as control:
        node = await control.join("a")

        async def state() -> str:
            return str((await control.get("/v2/nodes/a"))["state"])

        await node.beat(pools=[pool()])
        await node.cut()

        async def not_reachable() -> Any:
            seen = await control.get("/v2/nodes/a")
            return None if seen["reachable"] else seen["state"]

        assert await eventually(not_reachable, within_s=1.0) == "unreachable"

        async def offline() -> bool:
            return await state() == "offline"

        await eventually(offline, within_s=5)
        assert (await node.beat(pools=[pool()]))[1]["error"]["code"] == "NODE_UNKNOWN"
        assert await control.metric("llorch_heartbeats_total", node="a", outcome="missed") == 1
        assert (await control.get("/v1/models"))["data"] == []
        await node.join()
        assert await state() == "online"


async def test_a_node_that_signs_off_is_gone_with_its_link() -> None:
    async with a_control() as control:
        for who in ("node", "admin"):
            node = await control.join("a")
            assert (await control.ask("DELETE", "/v2/nodes/a", who=who).answer()).status == 200
            await node.link_ended()
            answer = await control.ask("GET", "/v2/nodes/a").answer()
            assert (answer.status, answer.code) == (404, "NODE_NOT_FOUND")
        assert (await control.ask("DELETE", "/v2/nodes/a", who="node").answer()).status == 200  # idempotent


async def test_a_call_on_a_link_that_is_let_go_fails_at_once() -> None:
    async with a_control() as control:
        node = control.node("a")
        task_id = "0" * 8 + "-0000-0000-0000-" + "3" * 12
        await node.join(pool(), tasks=[{"task_id": task_id, "owner": "alice", "state": "running"}])
        canceling = control.ask("DELETE", f"/v2/tasks/{task_id}")
        await eventually(lambda: node.calls, within_s=2)
        await control.ask("DELETE", "/v2/nodes/a", who="node").answer()
        await asyncio.wait((canceling._task,), timeout=2)
        assert canceling.done, "it waits for an answer that can't come"
        assert (await canceling.answer()).code == "NODE_LOST"
        assert node.calls[0].detached == "lost"


async def test_links_are_pinged_both_ways() -> None:
    async with a_control() as control:
        node = await control.join("a")
        await node.settled()
        assert node.pongs == 1
        link = control.control.links.get("a")
        assert await link.answers(1.0)
        node.answer_pings = False
        assert not await link.answers(0.05)


async def test_a_callback_over_a_link_reads_the_pool_by_a_call() -> None:
    async with a_control() as control:
        node = await control.join("a")

        async def callback() -> None:
            body = {"node_id": "a", "pool_id": "p0"}
            assert (await control.post("/callbacks/pool-ready", body, who="node"))[0] == 202

        async def is_new() -> bool:
            return [each["model"] for each in (await control.get("/v2/pools"))["pools"]] == ["new"]

        for number, answer in enumerate(
            (b'{"pool_id": "p0", "model": "new"}', b"nonsense", b'{"pool_id": "p9", "model": "other"}')
        ):
            await callback()
            await eventually(lambda n=number: len(node.calls) > n, within_s=2)
            call = node.calls[number]
            assert (call.header["method"], call.header["path"]) == ("GET", "/v2/pools/p0")
            _answer(node, call.id, answer)
            await node.settled()
            await eventually(is_new, within_s=2)  # and what can't be read changes nothing


def _answer(node: LinkedNode, stream: int, body: bytes) -> None:
    node.send(records.encode_json(stream, Type.HEAD, {"status": 200, "headers": {}}))
    node.send(records.encode(stream, Type.DATA, body))
    node.send(records.encode_json(stream, Type.TAIL, {"length": len(body)}))


async def test_nodes_pools_and_claims_are_shown_as_they_are() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(slots=3), version="1", zone="z", capabilities={"cpu_cores": 4})
        asking = control.submit()
        attempt = (await node.asked()).begin()
        await asking.has(b"started")
        (shown,) = (await control.get("/v2/nodes"))["nodes"]
        assert (shown["node_id"], shown["state"], shown["zone"], shown["cpu_cores"]) == ("a", "online", "z", 4)
        assert (shown["slots_total"], shown["slots_free"], shown["in_flight"]) == (3, 2, 1)
        (listed,) = (await control.get("/v2/pools"))["pools"]
        assert (listed["bound"], listed["in_flight"], listed["model"]) == (True, 1, "m")
        assert listed["bound_since"]
        attempt.end()
        await asking.answer()
        await control.idle()
        assert (await control.get("/v2/nodes/a"))["slots_free"] == 3


@pytest.mark.parametrize(
    "body",
    [{}, {"node_id": "a b"}, {"node_id": "a", "pools": [{"pool_id": "../x"}], "boot_id": "b"}, {"node_id": "a"},
     {"node_id": "a", "boot_id": "b", "pools": [pool(slots=-1)]}],
)  # fmt: skip
async def test_a_registration_that_makes_no_sense_registers_nothing(body: dict[str, Any]) -> None:
    async with a_control() as control:
        status, answer = await control.post("/v2/nodes/register", body, who="node")
        assert (status, answer["error"]["code"]) == (400, "INVALID_REQUEST")
        assert (await control.get("/v2/nodes"))["nodes"] == []


async def test_many_arrivals_at_once_never_hold_more_than_the_slots_there_are() -> None:
    async with a_control() as control:
        nodes = [await control.join(name, pool(slots=2)) for name in ("a", "b", "c")]
        running: set[asyncio.Task[None]] = set()
        most = 0

        async def serve(node: LinkedNode) -> None:
            nonlocal most
            while True:
                attempt = await node.asked()
                claimed = [control.control.registry.claimed(n.node_id, "p0") for n in nodes]
                most = max(most, *claimed)
                attempt.begin().say("hi").end()

        for node in nodes:
            running.add(asyncio.create_task(serve(node)))
        try:
            done = await asyncio.gather(*(control.whole().answer() for _ in range(60)))
        finally:
            for each in running:
                each.cancel()
        assert [answer.json["text"] for answer in done] == ["hi"] * 60
        assert most == 2
        assert {answer.json["node_id"] for answer in done} == {"a", "b", "c"}
        assert len({attempt.task_id for node in nodes for attempt in node.opened}) == 60
        await control.idle()
