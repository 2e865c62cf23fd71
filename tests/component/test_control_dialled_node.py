"""A node without a link: it is dialled, probed, and told by HTTP what a link would tell it by records."""

from __future__ import annotations

import asyncio

import pytest

from llorch import records
from llorch.control import node_client
from llorch.errors import Code
from llorch.records import Type
from tests.component.control_harness import TOKENS, a_control, eventually, lost_soon, pool


async def test_a_minimal_node_is_bound_from_its_own_routes_and_serves() -> None:
    async with a_control() as control:
        node = await control.dialled("h")
        assert node.tokens == {f"Bearer {TOKENS['service']}"}
        for asking in (control.submit(), control.whole()):
            attempt = await node.asked()
            given = attempt.header["headers"]
            assert (given["accept"], given["x-llorch-path"]) == (records.CONTENT_TYPE, "native")
            assert (given["x-llorch-owner"], given["x-llorch-attempt"]) == ("alice", "1")
            assert given["authorization"] == f"Bearer {TOKENS['service']}"
            assert attempt.body == b'{"model": "m", "prompt": "Hello"}'
            attempt.begin().say("hi").end()
            answer = await asking.answer()
            assert (answer.status, b"hi" in answer.raw) == (200, True)
            assert answer.headers["X-Llorch-Node"] == "h"
        await control.idle()


async def test_a_report_that_comes_in_pieces_is_read_whole() -> None:
    async with a_control() as control:
        node = await control.dialled("h")
        node.pause_reports, node.pools = 20, [pool("p0"), pool("p1", model="other")]
        status, _ = await control.post("/v2/nodes/g/heartbeat", {}, who="node")
        assert status == 404
        body = {"node_id": "g", "address": node.address, "pools": ["p0", "p1"]}
        assert (await control.post("/v2/nodes/register", body, who="node"))[0] == 200
        await control.bound("g")


async def test_a_node_that_swallows_its_probe_holds_up_no_other() -> None:
    async with a_control() as control:
        swallows = await asyncio.start_server(lambda _reader, writer: held.append(writer), "127.0.0.1", 0)
        held: list[asyncio.StreamWriter] = []
        address = f"127.0.0.1:{swallows.sockets[0].getsockname()[1]}"
        body = {"node_id": "s", "address": address, "pools": ["p0"]}
        assert (await control.post("/v2/nodes/register", body, who="node"))[0] == 200
        await eventually(lambda: held, within_s=2)
        started = asyncio.get_running_loop().time()
        await control.dialled("h")
        assert asyncio.get_running_loop().time() - started < 2.0
        for writer in held:
            writer.close()
        swallows.close()


async def test_a_callback_makes_the_control_read_the_pool_at_once() -> None:
    async with a_control(probe_interval=600.0) as control:
        node = await control.dialled("h")
        node.pools[0]["model"] = "new"
        status, _ = await control.post("/callbacks/pool-ready", {"node_id": "h", "pool_id": "p0"}, who="node")
        assert status == 202

        async def known() -> bool:
            return bool((await control.get("/v2/pools"))["pools"][0]["model"] == "new")

        await eventually(known, within_s=2)
        status, answer = await control.post("/callbacks/pool-ready", {"node_id": "x", "pool_id": "p0"}, who="node")
        assert (status, answer["error"]["code"]) == (404, "NODE_UNKNOWN")


async def test_a_node_that_can_not_be_reached_is_a_failure_and_gets_nothing_more_until_it_answers() -> None:
    async with a_control(probe_interval=600.0) as control:
        dead = await control.dialled("a-dead")
        await dead.close()
        live = await control.join("b", pool(slots=1))
        asking = control.whole()
        attempt = await live.asked()
        assert attempt.attempt == 2
        second = control.whole()
        await control.waiting(1)  # not at the dead node, though all its slots are free
        attempt.begin().end()
        assert (await asking.answer()).status == 200
        again = await live.asked()
        assert again.attempt == 1
        again.begin().end()
        await second.answer()
        assert (await control.get("/v2/nodes/a-dead"))["reachable"] is False
        await control.idle()


async def test_a_node_that_can_not_be_reached_and_is_the_only_one_is_the_answer_at_once() -> None:
    async with a_control(probe_interval=600.0) as control:
        await (await control.dialled("h")).close()
        answer = await control.submit().answer()
        assert (answer.status, answer.code) == (502, "NODE_LOST")
        await control.idle()


async def test_a_broken_connection_is_a_lost_node_and_one_that_is_back_serves_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost_soon(monkeypatch)
    async with a_control(probe_interval=0.1) as control:
        node = await control.dialled("h", pool(slots=1))
        asking = control.whole()
        first = (await node.asked()).accept()
        await asyncio.sleep(0)
        first.break_off()
        second = await node.asked()
        assert second.attempt == 2
        second.begin().say("one")
        await control.state(second.task_id, "streaming")
        second.break_off()
        assert (await asking.answer()).code == "NODE_LOST"
        await control.idle()


@pytest.mark.parametrize(
    ("code", "status", "expected", "attempts"),
    [
        (Code.INVALID_REQUEST, 400, "INVALID_REQUEST", 1),
        (Code.UNAUTHENTICATED, 401, "INTERNAL", 1),
        (Code.FORBIDDEN, 403, "INTERNAL", 1),
    ],
)
async def test_a_refusal_over_http_is_the_one_of_a_link_and_our_own_token_is_not_the_clients_fault(
    code: Code, status: int, expected: str, attempts: int
) -> None:
    async with a_control() as control:
        node = await control.dialled("h")
        asking = control.whole()
        (await node.asked()).refuse(code, status)
        assert (await asking.answer()).code == expected
        assert len(node.opened) == attempts
        await control.idle()


async def test_a_full_pool_over_http_is_asked_again_when_it_has_room() -> None:
    async with a_control(probe_interval=0.1) as control:
        node = await control.dialled("h", pool(slots=1))
        asking = control.whole()
        (await node.asked()).refuse(Code.ALL_SLOTS_BUSY)
        again = await node.asked()
        assert again.attempt == 2
        again.begin().end()
        assert (await asking.answer()).status == 200


@pytest.mark.parametrize("sends", ["garbage", "data before head", "an end without a tail"])
async def test_an_answer_that_breaks_the_protocol_is_a_lost_node(sends: str) -> None:
    async with a_control(probe_interval=600.0) as control:
        node = await control.dialled("h")
        asking = control.chat(stream=False)
        attempt = (await node.asked()).accept()
        if sends == "garbage":
            attempt.script.put_nowait(b"\xff" * 32)
        elif sends == "data before head":
            attempt.emit(Type.DATA, b"x")
        else:
            attempt.script.put_nowait(None)
        await control.waiting(1)
        await asking.leave()
        await control.idle()


async def test_cancel_is_a_delete_that_never_overtakes_its_post() -> None:
    async with a_control() as control:
        node = await control.dialled("h")
        asking = control.whole()
        attempt = await node.asked()
        assert (await control.ask("DELETE", f"/v2/tasks/{attempt.task_id}").answer()).status == 202
        await asyncio.wait((asking._task,), timeout=0.1)
        assert node.deleted == []
        attempt.accept()
        await eventually(lambda: node.deleted == [attempt.task_id], within_s=2)
        attempt.tail(finish_reason="canceled")
        assert (await asking.answer()).json["state"] == "canceled"
        await control.idle()


async def test_a_client_that_leaves_closes_the_connection_and_a_v1_task_is_deleted() -> None:
    async with a_control() as control:
        node = await control.dialled("h", pool(slots=4))
        for v1 in (False, True):
            asking = control.chat() if v1 else control.submit()
            attempt = (await node.asked()).accept().head().data(b"data: {}\n\n")
            await asking.has(b"data:")
            await asking.leave()
            await eventually(attempt.gone.is_set, within_s=2)
            if v1:
                await eventually(lambda a=attempt: node.deleted == [a.task_id], within_s=2)
            else:
                assert node.deleted == []
        await control.idle()


async def test_after_its_tail_a_connection_is_not_waited_for() -> None:
    async with a_control() as control:
        node = await control.dialled("h")
        asking = control.whole()
        attempt = (await node.asked()).begin()
        attempt.stays_open = True
        attempt.end()
        assert (await asking.answer()).status == 200
        await eventually(attempt.gone.is_set, within_s=2)


async def test_a_client_that_is_behind_stops_the_reading_of_its_node() -> None:
    room = node_client._Room()
    room.arrived(node_client.DATA_TURN_BYTES)
    waiting = asyncio.ensure_future(room.free())
    await asyncio.sleep(0)
    assert not waiting.done()
    room.passed_on(1)
    await asyncio.wait_for(waiting, 1)


async def test_an_address_that_does_not_resolve_or_must_not_be_dialled_is_refused_and_counted() -> None:
    async with a_control() as control:
        for address in ("http://169.254.169.254", "http://no-such-host.invalid:9200"):
            body = {"node_id": "h", "address": address, "pools": []}
            status, answer = await control.post("/v2/nodes/register", body, who="node")
            assert (status, answer["error"]["code"]) == (422, "UNTRUSTED_ADDRESS")
        assert await control.metric("llorch_registrations_total", outcome="refused") == 2
        assert (await control.get("/v2/nodes"))["nodes"] == []
