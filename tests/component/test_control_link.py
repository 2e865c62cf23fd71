"""The control's end of a link: who may open it, what a node may send on it, and what its credit buys."""

from __future__ import annotations

import asyncio
import json
import struct

import pytest

from llorch import records
from llorch.control import links
from llorch.records import MAX_PAYLOAD_BYTES, Type
from tests.component.control_harness import TOKENS, WINDOW, LinkedNode, a_control, eventually, lost_soon, pool


async def test_a_link_says_whose_it_is_and_makes_the_node_reachable() -> None:
    async with a_control() as control:
        node = control.node("a")
        await node.register(pool())
        assert (await control.get("/v2/nodes/a"))["reachable"] is False
        status, headers, _ = await node.open_link()
        assert (status, headers["x-llorch-epoch"], headers["upgrade"]) == (101, node.epoch, records.UPGRADE)
        await control.linked("a")
        shown = await control.get("/v2/nodes/a")
        assert (shown["reachable"], shown["link"], shown["state"]) == (True, True, "online")


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Authorization": ""}, 401, "UNAUTHENTICATED"),
        ({"Connection": ""}, 426, "UPGRADE_REQUIRED"),
        ({"Upgrade": "websocket"}, 426, "UPGRADE_REQUIRED"),
        ({"X-Llorch-Lease": ""}, 409, "LEASE_STALE"),
        ({"X-Llorch-Lease": "an-older-one"}, 409, "LEASE_STALE"),
    ],
)
async def test_a_link_is_refused_without_its_credentials(headers: dict[str, str], status: int, code: str) -> None:
    async with a_control() as control:
        node = control.node("a")
        await node.register(pool())
        got, _, body = await node.open_link(**headers)
        assert (got, json.loads(body)["error"]["code"]) == (status, code)
        assert (await control.get("/v2/nodes/a"))["link"] is False


async def test_a_link_of_a_node_that_is_not_registered_is_refused() -> None:
    async with a_control() as control:
        got, _, body = await control.node("a").open_link(**{"X-Llorch-Lease": "x"})
        assert (got, json.loads(body)["error"]["code"]) == (404, "NODE_UNKNOWN")


async def test_a_newer_link_replaces_the_older_one() -> None:
    async with a_control() as control:
        node = await control.join("a")
        older, reading = control.control.links.get("a"), node._reading
        assert (await node.open_link())[0] == 101
        await eventually(lambda: control.control.links.get("a") is not older)
        assert reading is not None
        await asyncio.wait_for(reading, 5)
        asking = control.whole()
        (await node.asked()).begin().say("hi").end()
        assert (await asking.answer()).json["text"] == "hi"
        assert (await control.get("/v2/nodes/a"))["reachable"] is True


async def test_another_process_that_takes_the_id_over_ends_the_link_of_the_first() -> None:
    async with a_control() as control:
        first = await control.join("a")
        asking = control.submit()
        (await first.asked()).begin().say("one")
        await asking.has(b"one")
        second = control.node("a")
        assert (await second.register(pool()))[0] == 200
        await first.link_ended()
        assert (await asking.answer()).terminals == ["error"]
        assert (await first.beat(pools=[pool()]))[1]["error"]["code"] == "NODE_ID_CONFLICT"
        assert (await second.open_link())[0] == 101


# ---------------------------------------------------------------- what a node may not send


def unopened(_: LinkedNode) -> bytes:
    return records.encode(99, Type.DATA, b"x")


def even(_: LinkedNode) -> bytes:
    return records.encode(2, Type.ACCEPT)


def too_long(_: LinkedNode) -> bytes:
    return struct.pack(">IBI", 1, Type.DATA, MAX_PAYLOAD_BYTES + 1)


def no_json(_: LinkedNode) -> bytes:
    return records.encode(1, Type.HEAD, b"{")


def wrong_json(_: LinkedNode) -> bytes:
    return records.encode_json(1, Type.TAIL, {"length": -1})


def data_before_head(_: LinkedNode) -> bytes:
    return records.encode(1, Type.DATA, b"x")


def an_open(_: LinkedNode) -> bytes:
    return records.encode_json(1, Type.OPEN, {})


def bad_credit(_: LinkedNode) -> bytes:
    return records.encode(1, Type.CREDIT, b"xyz")


@pytest.mark.parametrize(
    "sends", [unopened, even, too_long, no_json, wrong_json, data_before_head, an_open, bad_credit]
)
async def test_a_node_that_breaks_the_protocol_loses_its_link(sends) -> None:  # type: ignore[no-untyped-def]
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        (await node.asked()).accept()
        node.send(sends(node))
        await node.link_ended()
        await control.waiting(1)  # the task goes back to the queue, for it has shown nothing
        assert (await control.get("/v2/nodes/a"))["reachable"] is False
        await asking.leave()
        await control.idle()


async def test_records_that_are_late_or_unknown_are_dropped() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.whole()
        attempt = (await node.asked()).begin().say("hi")
        attempt.emit(77, b"a type of a later version")
        node.send(records.encode(4_000_000, 200, b"on a stream nobody knows"))
        node.send(records.encode(0, 99, b""))
        attempt.end()
        for kind in (Type.ACCEPT, Type.DATA, Type.TAIL, Type.CREDIT):
            attempt.emit(kind, b"late, and not even read")
        assert (await asking.answer()).json["text"] == "hi"
        await node.settled()
        assert node.up
        await control.idle()


async def test_a_link_that_has_used_its_stream_ids_ends_so_that_a_new_one_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_control() as control:
        node = await control.join("a")
        monkeypatch.setattr(links, "MAX_STREAM_ID", 3)
        asking = control.whole()
        (await node.asked()).begin().end()
        await asking.answer()
        asking = control.whole()
        await node.link_ended()
        await control.waiting(1)
        await node.join()
        again = await node.asked()
        assert again.id == 1
        again.begin().say("hi").end()
        assert (await asking.answer()).json["text"] == "hi"


# ---------------------------------------------------------------- credit


async def test_credit_is_granted_for_what_has_left_for_the_client() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        attempt = (await node.asked()).accept().head()
        sent = 0
        while sent < 4 * WINDOW:
            attempt.data(b"x" * 32_768)
            sent += 32_768
            await eventually(lambda n=sent: attempt.granted >= n - WINDOW // 2, within_s=5, what="credit")
            assert attempt.granted <= sent
        attempt.tail()
        assert len((await asking.answer()).raw) == sent


async def test_a_node_that_overruns_the_window_loses_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat()
        attempt = (await node.asked()).accept().head()
        attempt.data(b"x" * (2 * WINDOW))  # at once: nothing of it can have been passed on
        await node.link_ended()
        assert b"NODE_LOST" in (await asking.answer()).raw
        await control.idle()


async def test_a_client_that_does_not_read_stops_the_credit_of_its_stream_and_of_no_other() -> None:
    async with a_control() as control:
        node = await control.join("a")
        body = json.dumps({"model": "m", "prompt": "x"}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", control.port, limit=1024)
        writer.write(_request("/v2/tasks", body))
        stalled = (await node.asked()).begin()
        await reader.readuntil(b"started")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        sent = len(stalled.log)
        quiet = 0
        while quiet < 5 and sent < 64 * WINDOW:
            before = stalled.granted
            room = WINDOW - (sent - stalled.granted)
            if room:
                stalled.data(b"x" * room)
                sent += room
            await node.settled()
            quiet = quiet + 1 if stalled.granted == before else 0
        assert sent < 64 * WINDOW, "it was granted credit for ever"
        asking = control.whole()
        (await node.asked()).begin().say("hi").end()
        assert (await asking.answer()).json["text"] == "hi"
        writer.transport.abort()
        await eventually(lambda: stalled.detached == "left", within_s=5)
        await control.idle()


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp, of any over a mebibyte
async def test_a_large_body_is_sent_as_the_node_grants_credit() -> None:
    async with a_control() as control:
        node = await control.join("a")
        prompt = "x" * (9 * WINDOW)  # more than a mebibyte, which is all that aiohttp would take
        asking = control.whole(prompt=prompt)
        attempt = await node.asked()
        size = attempt.header["body_len"]
        await eventually(lambda: len(attempt.body) == WINDOW)
        await node.settled()
        assert len(attempt.body) == WINDOW
        attempt.emit(Type.CREDIT, struct.pack(">I", size))
        await eventually(lambda: len(attempt.body) == size)
        assert json.loads(attempt.body)["prompt"] == prompt
        attempt.begin()
        await control.state(attempt.task_id, "streaming")
        (task,) = control.control.dispatcher.tasks.running_tasks()
        (stream,) = control.control.links.get("a")._streams.values()
        assert (len(task.body), len(stream.unsent.obj)) == (0, 0), "a body that was sent is held no longer"
        attempt.end()
        assert (await asking.answer()).status == 200


async def test_a_detached_task_is_read_to_its_end() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit(detach=True)
        attempt = (await node.asked()).begin()
        assert (await asking.answer()).status == 202
        for _ in range(8):
            attempt.data(b"x" * (WINDOW // 2))
            await eventually(lambda: attempt.granted >= len(attempt.log) - WINDOW // 2 - 1, within_s=5)
        attempt.tail(finish_reason="stop")
        await control.state(attempt.task_id, "done")
        await control.idle()


def _request(path: str, body: bytes) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKENS['alice']}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
