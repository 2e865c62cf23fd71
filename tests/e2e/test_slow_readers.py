"""A client that stops reading costs a window, and nobody else's time."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest

from tests.cluster import Cluster, eventually, expected_text, simulated


def rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * 4096


def stalled_reader(url: str, token: str, body: object) -> socket.socket:
    """A client that asks for a stream and never reads it."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, int(port)))
    raw = json.dumps(body).encode()
    head = f"POST /v2/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(raw)}\r\n\r\n"
    sock.sendall(head.encode() + raw)
    return sock


@pytest.mark.slow
async def test_stalled_readers_hold_up_nobody_on_the_same_link_and_cost_their_window(llorch: Cluster) -> None:
    control = await llorch.start_control()
    # 150,000 tokens are 9 MB of events: far more than every buffer between the engine and the client.
    node = await llorch.start_node(
        "a", [simulated("p0", "sim", 12, "--tokens", "150000")], "--reconnect-grace", "0s", "--log-limit", "1MiB"
    )
    await llorch.complete(tokens=8)
    before, node_before = rss_bytes(control.pid), rss_bytes(node.pid)
    stalled = [
        stalled_reader(llorch.url, llorch.token, {"model": "sim", "prompt": "x", "max_tokens": 150_000})
        for _ in range(8)
    ]
    try:

        async def offsets() -> tuple[list[int], list[int]]:
            """How far each stream has come at the control, and each log at the node."""
            at_control = (await llorch.get("/v2/tasks"))["tasks"]
            service = llorch.headers(llorch.tokens["LLORCH_SERVICE_TOKEN"])
            async with llorch.session.get(node.url + "/v2/tasks", headers=service) as response:
                at_node = (await response.json())["tasks"]
            streams = [task["offset"] for task in at_control if task["state"] == "streaming"]
            return streams, [task["offset"] for task in at_node if task["state"] == "running"]

        async def all_run_dry() -> bool:
            first = await offsets()
            await asyncio.sleep(0.3)
            streams, logs = first
            full = len(streams) == len(logs) == 8 and min(logs) >= 1024 * 1024  # not only standing still: each log is
            return full and first == await offsets()

        await eventually(all_run_dry, within_s=20.0)
        started = time.monotonic()
        done = await asyncio.gather(*(llorch.complete(tokens=200) for _ in range(4)))
        took_s = time.monotonic() - started
        assert [task["text"] for task in done] == [expected_text(200)] * 4
        assert took_s < 5.0
        assert rss_bytes(control.pid) - before <= 8 * 256 * 1024 + 4 * 1024 * 1024, "more than the windows"
        # At the node the engine is read no further than a log goes: the rest waits in its connection. Beside its log,
        # in which half as much again may lie idle, a stalled task holds one read of its engine, raw and translated.
        per_task = 1024 * 1024 * 3 // 2 + 2 * 1024 * 1024
        assert rss_bytes(node.pid) - node_before <= 8 * per_task + 4 * 1024 * 1024, "more than logs"
    finally:
        for sock in stalled:
            sock.close()

    async def free() -> bool:
        return bool((await llorch.get("/v2/nodes/a"))["in_flight"] == 0)

    await eventually(free)


async def test_a_stalled_reader_is_dropped_and_may_come_back_for_the_rest(llorch: Cluster) -> None:
    await llorch.start_control("--slow-reader-timeout", "1s")
    await llorch.start_node("a", [simulated("p0", "sim", 2, "--tokens", "20000")])
    sock = stalled_reader(llorch.url, llorch.token, {"model": "sim", "prompt": "x", "max_tokens": 20_000})
    try:

        async def let_go() -> str:
            tasks = (await llorch.get("/v2/tasks"))["tasks"]
            free = (await llorch.get("/v2/nodes/a"))["in_flight"] == 0
            return tasks[0]["task_id"] if tasks and tasks[0]["offset"] and free else ""

        task_id = await eventually(let_go, within_s=15.0)
    finally:
        sock.close()
    async with llorch.session.get(f"{llorch.url}/v2/tasks/{task_id}/events", headers=llorch.headers()) as response:
        text = await response.text()
    tokens = [line for line in text.splitlines() if line.startswith('data: {"t":')]
    assert tokens == [f'data: {{"t":"t{i} ","i":{i}}}' for i in range(20_000)]
