"""A node over plain HTTP: infer for curl and for controls without a link, logs, tasks, credentials."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llorch import records
from llorch.node.retention import Limits
from llorch.records import Type
from tests.component.node_harness import MODEL, POOL, SERVICE_TOKEN, NodeUnderTest, Setup, eventually, node_between

INFER = f"/v2/pools/{POOL}/infer"
HELLO = b'{"prompt":"Hello","model":"m"}'
RECORDS = {"Accept": records.CONTENT_TYPE}


async def text_of(response: aiohttp.ClientResponse) -> str:
    return (await response.read()).decode()


async def test_curl_gets_the_stream(tmp_path: Path) -> None:
    """`curl -d '{...}'`: a form's content type, no task headers."""
    async with node_between(tmp_path, controls=0) as setup:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        asking = asyncio.ensure_future(setup.node.request("POST", INFER, data=HELLO, headers=headers).__aenter__())
        call = await setup.engine.asked()
        assert not asking.done()  # the status waits for HEAD
        call.say("t0 ")
        async with await asking as response:
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/event-stream"
            assert response.headers["Cache-Control"] == "no-cache"
            call.end()
            text = await text_of(response)
            task_id = response.headers["X-Llorch-Task"]
        assert [line for line in text.splitlines() if line.startswith("event: ")] == [
            "event: started",
            "event: token",
            "event: end",
        ]
        assert json.loads(text.split("data: ")[1].split("\n")[0])["task_id"] == task_id
        (entry,) = setup.node.logs
        assert (entry.task_id, entry.opening.attempt, entry.opening.owner) == (task_id, 1, "service")


async def test_a_line_longer_than_any_read_buffer_passes_whole(tmp_path: Path) -> None:
    """A tool call, or an image in an answer, may be one line; aiohttp reads no line over 128 KiB."""
    text = "x" * 1_000_000
    async with node_between(tmp_path, controls=0) as setup:
        for body, headers in (
            (HELLO, {}),
            (b'{"prompt":"Hello","model":"m","stream":true}', {"X-Llorch-Path": "/v1/completions"}),
        ):
            asking = asyncio.ensure_future(setup.node.request("POST", INFER, data=body, headers=headers).__aenter__())
            call = await setup.engine.asked()
            call.say(text)
            call.end()
            async with await asking as response:
                answer = await text_of(response)
            assert text in answer
            assert "error" not in answer


async def test_records_begin_at_once(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        headers = RECORDS | {"X-Llorch-Task": str(uuid.uuid4()), "X-Llorch-Attempt": "3", "X-Llorch-Owner": "me"}
        async with setup.node.request("POST", INFER, data=HELLO, headers=headers) as response:
            assert response.status == 200
            call = await setup.engine.asked()
            decoder = records.Decoder()
            found = decoder.feed(await response.content.readany())
            assert [record.type for record in found] == [Type.ACCEPT]
            call.say("t0 ")
            call.end()
            found += decoder.feed(await response.content.read())
        data = b"".join(record.payload for record in found if record.type == Type.DATA)
        assert [record.type for record in found if record.type != Type.DATA] == [Type.ACCEPT, Type.HEAD, Type.TAIL]
        assert {record.stream for record in found} == {0}
        tail = json.loads(found[-1].payload)
        assert (tail["length"], tail["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        (entry,) = setup.node.logs
        assert (entry.opening.attempt, entry.opening.owner) == (3, "me")


async def test_refusals_have_their_status_and_shape(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0, slots=1) as setup:
        holding = asyncio.ensure_future(setup.node.request("POST", INFER, data=HELLO).__aenter__())
        await setup.engine.asked()
        wishes: list[tuple[str, dict[str, str], int, str]] = [
            (INFER, {}, 429, "ALL_SLOTS_BUSY"),
            (INFER, RECORDS, 429, "ALL_SLOTS_BUSY"),
            ("/v2/pools/nowhere/infer", {}, 404, "POOL_NOT_FOUND"),
            (INFER, {"X-Llorch-Attempt": "x"}, 400, "INVALID_REQUEST"),
            (INFER, {"X-Llorch-Task": "x"}, 400, "INVALID_REQUEST"),
            (INFER, {"X-Llorch-Path": "/v1/secrets"}, 404, "NOT_FOUND"),
        ]
        for path, headers, status, code in wishes:
            async with setup.node.request("POST", path, data=HELLO, headers=headers) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (status, code)
                assert error["request_id"] == response.headers["X-Request-Id"]
                assert ("Retry-After" in response.headers) == (status == 429)
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)


async def test_failure_before_the_first_byte_is_a_status(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        asking = asyncio.ensure_future(setup.node.request("POST", INFER, data=HELLO).__aenter__())
        (await setup.engine.asked()).reply(b"oops", status=500)
        async with await asking as response:
            assert response.status == 502
            assert (await response.json())["error"]["code"] == "ENGINE_FAILED"
        async with setup.node.request("POST", INFER, data=b'{"prompt": 1, "model": "m"}') as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"], error["param"]) == (400, "INVALID_REQUEST", "prompt")
        assert setup.node.slots_free == 2


async def test_whole_answer_keeps_its_length(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        headers = {"X-Llorch-Path": "/v1/chat/completions"}
        body = json.dumps({"model": MODEL, "messages": []}).encode()
        asking = asyncio.ensure_future(setup.node.request("POST", INFER, data=body, headers=headers).__aenter__())
        answer = b'{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}'
        (await setup.engine.asked()).reply(answer)
        async with await asking as response:
            assert response.content_length == len(answer)
            assert await response.read() == answer
        (entry,) = setup.node.logs
        assert entry.report()["tokens_in"] == 7


async def test_whole_answer_that_breaks_off_is_cut_not_ended(tmp_path: Path) -> None:
    """More than can be held back has been passed on when the engine dies: the client must not take it for whole."""
    async with node_between(tmp_path, controls=0) as setup:
        headers = {"X-Llorch-Path": "/v1/embeddings"}
        body = json.dumps({"model": MODEL, "input": "x"}).encode()
        asking = asyncio.ensure_future(setup.node.request("POST", INFER, data=body, headers=headers).__aenter__())
        call = await setup.engine.asked()
        for _ in range(90):
            call.script.put_nowait(b"x" * 60_000)
        call.cut()
        async with await asking as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()


async def test_client_that_leaves_frees_the_slot(tmp_path: Path) -> None:
    limits = Limits(reconnect_grace_s=0.1)
    async with node_between(tmp_path, controls=0, limits=limits) as setup:
        asking = asyncio.ensure_future(setup.node.request("POST", INFER, data=HELLO).__aenter__())
        call = await setup.engine.asked()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(call.disconnected.wait(), 5)
        await eventually(lambda: setup.node.slots_free == 2)


@pytest.mark.parametrize("path", ["native", "/v1/completions"])
async def test_body_that_breaks_off_frees_the_slot_and_leaves_no_task(tmp_path: Path, path: str) -> None:
    """The slot is taken before the body is read: a client that goes meanwhile must not keep it."""
    async with node_between(tmp_path, controls=0, slots=1) as setup:
        host, port = setup.node.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SERVICE_TOKEN}\r\nX-Llorch-Path: {path}\r\n"
        writer.write(head.encode() + b"Content-Length: 1000\r\n\r\n" + b"x" * 10)
        await eventually(lambda: setup.node.slots_free == 0)
        writer.close()
        await writer.wait_closed()
        await eventually(lambda: setup.node.slots_free == 1, within_s=2.0)
        assert len(setup.node.runner) == 0
        assert setup.engine.calls.empty()
        assert list(setup.node.logs.reports(None)) == []


async def test_body_over_the_limit_is_refused_stated_or_not_and_frees_the_slot(tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 1_000

    async with node_between(tmp_path, controls=0, slots=1) as setup:
        setup.node.node.max_body_bytes = setup.node.runner.max_body_bytes = 2_000
        for body in (b"x" * 2_001, pieces()):
            async with setup.node.request("POST", INFER, data=body) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
            await eventually(lambda: setup.node.slots_free == 1, within_s=2.0)


async def test_cancelled_before_its_engine_answered_a_native_task_is_a_whole_stream(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        asking = asyncio.ensure_future(setup.node.request("POST", INFER, data=HELLO).__aenter__())
        await setup.engine.asked()
        (entry,) = setup.node.logs
        setup.node.runner.cancel(entry)
        async with await asking as response:
            assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream")
            assert (await text_of(response)).count("event: ") == 2  # started, end


async def test_records_reader_that_ends_without_a_word_leaves_the_task_running(tmp_path: Path) -> None:
    """Its control may have died, and its client may come back through another."""
    limits = Limits(reconnect_grace_s=0.0)
    async with node_between(tmp_path, controls=0, limits=limits) as setup:
        task_id = str(uuid.uuid4())
        headers = RECORDS | {"X-Llorch-Task": task_id}
        response = await setup.node.request("POST", INFER, data=HELLO, headers=headers).__aenter__()
        call = await setup.engine.asked()
        call.say("t0 ")
        response.close()
        (entry,) = setup.node.logs
        await eventually(lambda: entry.log.readers == 0)
        await setup.node.runner.sweep()
        call.say("t1 ")
        call.end()
        await eventually(lambda: entry.log.sealed)
        async with setup.node.request("GET", f"/v2/tasks/{task_id}/log") as again:
            assert (await text_of(again)).count("event: token") == 2


async def finished(setup: Setup, *texts: str) -> tuple[str, bytes]:
    """A task that has run, and its log."""
    task_id = str(uuid.uuid4())
    headers = {"X-Llorch-Task": task_id}
    asking = asyncio.ensure_future(setup.node.request("POST", INFER, data=HELLO, headers=headers).__aenter__())
    call = await setup.engine.asked()
    call.say(*texts)
    call.end()
    async with await asking as response:
        return task_id, await response.read()


async def test_log_is_read_from_any_offset(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        task_id, whole = await finished(setup, "t0 ", "t1 ")
        for offset in (0, 1, 57, len(whole) - 1):
            async with setup.node.request("GET", f"/v2/tasks/{task_id}/log?offset={offset}") as response:
                assert (response.status, await response.read()) == (200, whole[offset:])
        async with setup.node.request("GET", f"/v2/tasks/{task_id}/log?offset={len(whole)}") as response:
            assert response.status == 204
        for offset_text in (str(len(whole) + 1), "-1", "x", "9" * 30):
            async with setup.node.request("GET", f"/v2/tasks/{task_id}/log?offset={offset_text}") as response:
                assert response.status == 400


async def test_bytes_that_are_gone_are_a_gap(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0, limits=Limits(kept_bytes=1_000)) as setup:
        task_id, _ = await finished(setup, "x" * 900, "y" * 900)
        async with setup.node.request("GET", f"/v2/tasks/{task_id}/log") as response:
            assert response.status == 410
            assert (await response.json())["error"]["code"] == "GAP"


async def test_repeated_infer_attaches(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0, slots=1) as setup:
        task_id, whole = await finished(setup, "t0 ")
        async with setup.node.request("POST", INFER, data=HELLO, headers={"X-Llorch-Task": task_id}) as response:
            assert await response.read() == whole
        headers = {"X-Llorch-Task": task_id, "X-Llorch-Owner": "someone-else"}
        async with setup.node.request("POST", INFER, data=HELLO, headers=headers) as response:
            assert response.status == 409


async def test_task_is_listed_and_cancelled(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        task_id = str(uuid.uuid4())
        headers = {"X-Llorch-Task": task_id}
        asking = asyncio.ensure_future(setup.node.request("POST", INFER, data=HELLO, headers=headers).__aenter__())
        call = await setup.engine.asked()
        async with setup.node.request("GET", f"/v2/tasks/{task_id}") as response:
            assert (await response.json())["state"] == "running"
        for _ in range(2):
            async with setup.node.request("DELETE", f"/v2/tasks/{task_id}") as response:
                assert response.status == 202
        await asyncio.wait_for(call.disconnected.wait(), 1.0)
        async with await asking as response:
            assert '"finish_reason":"canceled"' in await text_of(response)
        async with setup.node.request("GET", "/v2/tasks") as response:
            (task,) = (await response.json())["tasks"]
        assert (task["state"], task["finish_reason"]) == ("sealed", "canceled")
        async with setup.node.request("DELETE", f"/v2/tasks/{uuid.uuid4()}") as response:
            assert response.status == 404


async def get(node: NodeUnderTest, path: str, token: str | None) -> tuple[int, Any]:
    async with node.request("GET", path, token=token) as response:
        return response.status, await response.json(content_type=None)


async def test_only_health_is_open(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        for path in ("/health", "/livez", "/readyz", "/openapi.json"):
            assert (await get(setup.node, path, None))[0] == 200
        closed = ("/v2/pools", f"/v2/pools/{POOL}", f"/v2/pools/{POOL}/health", "/v2/tasks", "/v2/catalog", "/metrics")
        for path in closed:
            for token in (None, "x" * 40):
                status, body = await get(setup.node, path, token)
                assert (status, body["error"]["code"]) == (401, "UNAUTHENTICATED")
        async with setup.node.request("POST", INFER, data=HELLO, token=None) as response:
            assert response.status == 401
        assert setup.engine.calls.empty()


async def test_openapi_lists_every_route_of_the_contract(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        _, document = await get(setup.node, "/openapi.json", None)
        listed = {(path, method) for path, methods in document["paths"].items() for method in methods}
        assert listed >= {
            ("/v2/pools", "get"),
            ("/v2/pools/{pool}/health", "get"),
            ("/v2/pools/{pool}/infer", "post"),
            ("/v2/tasks/{task}/log", "get"),
            ("/v2/tasks/{task}", "delete"),
            ("/v2/catalog", "get"),
        }


async def test_readyz_says_when_it_drains(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        setup.node.node.stopping.set()
        status, body = await get(setup.node, "/readyz", None)
        assert (status, body["status"]) == (503, "draining")
        assert (await get(setup.node, "/livez", None))[0] == 200


async def test_metrics_have_their_stable_names(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        await finished(setup, "t0 ")
        async with setup.node.request("GET", "/metrics") as response:
            text = await text_of(response)
        assert f'llorch_tasks_total{{code="",model="{MODEL}",node="n1",outcome="done"}} 1.0' in text
        assert f'llorch_tokens_total{{kind="output",model="{MODEL}"}} 2.0' in text
        assert f'llorch_inflight{{model="{MODEL}"}} 0.0' in text
        assert f'llorch_slots{{node="n1",pool="{POOL}",state="free"}} 2.0' in text
        assert f'llorch_ttft_seconds_count{{model="{MODEL}"}} 1.0' in text
