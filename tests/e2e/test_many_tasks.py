"""Many tasks over unequal nodes: all complete, exactly, spread by free slots."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tests.cluster import Cluster, eventually, expected_text, simulated
from tests.e2e.shared import start


async def test_200_concurrent_tasks_over_two_nodes_all_complete_and_spread_by_slots(llorch: Cluster) -> None:
    await llorch.start_control("--queue-limit", "200")
    args = ("--tokens", "1000", "--delay-ms", "4")
    await asyncio.gather(
        llorch.start_node("big", [simulated("p0", "sim", 8, *args)]),
        llorch.start_node("small", [simulated("p0", "sim", 4, *args)]),
    )
    # While there is room everywhere, each goes to the least loaded for its slots.
    few = await asyncio.gather(*(llorch.complete(tokens=250) for _ in range(6)))
    assert Counter(task["node_id"] for task in few) == {"big": 4, "small": 2}
    done = await asyncio.gather(*(llorch.complete(tokens=20) for _ in range(200)))
    assert [task["text"] for task in done] == [expected_text(20)] * 200
    assert {task["state"] for task in done} == {"done"}
    spread = Counter(task["node_id"] for task in done)
    # Twice the slots at the same speed: about twice the tasks.
    assert 1.5 <= spread["big"] / spread["small"] <= 2.7, spread
    nodes = await llorch.get("/v2/nodes")
    assert [node["in_flight"] for node in nodes["nodes"]] == [0, 0]
    assert {task["task_id"] for task in (await llorch.get("/v2/tasks"))["tasks"]} == {
        task["task_id"] for task in few + done
    }


async def test_streams_of_many_tasks_have_no_loss_and_no_repetition(llorch: Cluster) -> None:
    await llorch.start_control()
    await llorch.start_node("a", [simulated("p0", "sim", 16, "--tokens", "1000", "--delay-ms", "1")])

    async def stream() -> str:
        body = {"model": "sim", "messages": [{"role": "user", "content": "go"}], "max_tokens": 100}
        status, text = await llorch.post("/v2/tasks", body, accept="text/event-stream")
        assert status == 200
        return str(text)

    for text in await asyncio.gather(*(stream() for _ in range(32))):
        tokens = [line for line in text.splitlines() if line.startswith('data: {"t":')]
        assert tokens == [f'data: {{"t":"t{i} ","i":{i}}}' for i in range(100)]
        assert text.count("event: end") == 1
        assert text.rstrip().splitlines()[-2] == "event: end"


@pytest.mark.slow
async def test_a_full_queue_refuses_with_the_time_to_come_back(llorch: Cluster) -> None:
    await llorch.start_control("--queue-limit", "2")
    await llorch.start_node("a", [simulated("p0", "sim", 1, "--tokens", "1000", "--delay-ms", "20")])
    status, holder = await llorch.post("/v2/tasks", {"model": "sim", "prompt": "go", "detach": True})
    assert status == 202, holder
    waiting = [asyncio.ensure_future(llorch.complete(tokens=3)) for _ in range(2)]

    async def full() -> bool:
        tasks = (await llorch.get("/v2/tasks"))["tasks"]
        return sorted(task["queue"]["position"] for task in tasks if "queue" in task) == [1, 2]

    await eventually(full)
    body = {"model": "sim", "prompt": "x", "max_tokens": 1}
    async with llorch.session.post(llorch.url + "/v2/tasks", json=body, headers=llorch.headers()) as response:
        assert response.status == 429
        assert (await response.json())["error"]["code"] == "QUEUE_FULL"
        assert int(response.headers["Retry-After"]) >= 1
        assert int(response.headers["X-Backoff-Ms"]) >= 1
    async with llorch.session.delete(
        f"{llorch.url}/v2/tasks/{holder['task_id']}", headers=llorch.headers()
    ) as response:
        assert response.status == 202
    assert [task["text"] for task in await asyncio.gather(*waiting)] == [expected_text(3)] * 2


@pytest.mark.slow
async def test_a_waiting_task_times_out_and_says_so(llorch: Cluster) -> None:
    await llorch.start_control("--queue-timeout", "200ms")
    await llorch.start_node("a", [simulated("p0", "sim", 1, "--tokens", "1000", "--delay-ms", "20")])
    first = asyncio.ensure_future(llorch.complete(tokens=60))
    status, body = 0, {}
    while status != 504 and not first.done():
        status, body = await llorch.post("/v2/tasks", {"model": "sim", "prompt": "x", "max_tokens": 1})
    assert (body["error"]["code"], body["error"]["retriable"]) == ("QUEUE_TIMEOUT", True)
    assert (await first)["text"] == expected_text(60)


@pytest.mark.slow
@pytest.mark.usefixtures("whole_machine")
@pytest.mark.timeout(300, func_only=True)  # not while it waits for the machine
async def test_200_submits_at_once_over_two_nodes_all_print_their_whole_answer(llorch: Cluster) -> None:
    await llorch.start_control("--queue-limit", "200")
    args = ("--tokens", "1000", "--delay-ms", "10")
    await asyncio.gather(
        llorch.start_node("big", [simulated("p0", "sim", 8, *args)]),
        llorch.start_node("small", [simulated("p0", "sim", 4, *args)]),
    )

    async def submit() -> tuple[int | None, str]:
        process = await start(llorch, "submit", "-m", "sim", "--max-tokens", "150", "go", nice=True)
        out, _ = await process.communicate()
        return process.returncode, out.decode()

    ended = await asyncio.gather(*(submit() for _ in range(200)))
    assert ended == [(0, expected_text(150))] * 200
    spread = Counter(task["node_id"] for task in (await llorch.get("/v2/tasks"))["tasks"])
    assert spread.total() == 200
    assert 1.5 <= spread["big"] / spread["small"] <= 2.7, spread
