"""Parts that die: what the others notice, how fast, and that nobody has to do anything."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.cluster import Cluster, alive, descendants, eventually, expected_text, lasting_port, simulated
from tests.e2e.shared import end_of, start

SLOW = simulated("slow", "slow", 2, "--delay-ms", "20", "--tokens", "5000")


async def test_a_killed_node_gets_nothing_more_within_a_second_and_is_offline_when_its_lease_ends(
    llorch: Cluster,
) -> None:
    """And whoever read from it keeps what came, and is told: exit code 7."""
    await llorch.start_control("--heartbeat-interval", "500ms", "--offline-after", "2s")
    pool = simulated("p0", "sim", 4, "--tokens", "64")
    a, _ = await asyncio.gather(llorch.start_node("a", [pool, SLOW]), llorch.start_node("b", [pool]))
    reader = await start(llorch, "submit", "-m", "slow", "Hello")
    assert reader.stdout is not None
    seen = await reader.stdout.readexactly(6)
    a.kill()

    async def a_is_passed_over() -> bool:
        _, decision = await llorch.post(
            "/v2/placement", {"model": "sim", "prompt": "x", "placement": {"prefer": ["a"]}}
        )
        return bool(decision["node_id"] == "b")

    await eventually(a_is_passed_over, within_s=1.0)

    async def offline() -> int:
        """The age of its last beat, once it is offline."""
        seen = await llorch.get("/v2/nodes/a")
        return int(seen["heartbeat_age_ms"]) if seen["state"] == "offline" else 0

    assert not await offline()  # its lease runs on: not reachable is another fact than offline
    age_ms, *done = await asyncio.gather(
        eventually(offline), *(llorch.complete(placement={"prefer": ["a"]}) for _ in range(8))
    )
    assert {task["node_id"] for task in done} == {"b"}
    assert 2_000 <= age_ms <= 4_000
    code, rest, err = await end_of(reader)
    assert code == 7
    assert expected_text(5000).startswith(seen.decode() + rest)
    assert "why: NODE_LOST\n" in err


@pytest.mark.slow
@pytest.mark.timeout(90)
async def test_a_killed_node_is_offline_at_30_s_as_it_comes(llorch: Cluster) -> None:
    """With no setting changed: its last beat came at most 10 s before it died; 30 s after that beat it is offline."""
    await llorch.start_control()
    node = await llorch.start_node("a")
    node.kill()
    killed = time.monotonic()
    await eventually(lambda: _unreachable(llorch), within_s=1.0)

    async def offline() -> int:
        seen = await llorch.get("/v2/nodes/a")
        return int(seen["heartbeat_age_ms"]) if seen["state"] == "offline" else 0

    age_ms = await eventually(offline, within_s=35.0)
    assert 30_000 <= age_ms <= 32_000
    assert 19.0 <= time.monotonic() - killed <= 32.0


async def _unreachable(llorch: Cluster) -> bool:
    return not (await llorch.get("/v2/nodes/a"))["reachable"]


async def test_offline_after_is_30_s_by_default(llorch: Cluster) -> None:
    await llorch.start_control()
    status, answer = 0, {}
    async with llorch.session.post(
        llorch.url + "/v2/nodes/register",
        json={"node_id": "n", "address": "127.0.0.1:1", "pools": []},
        headers=llorch.headers(llorch.tokens["LLORCH_NODE_TOKEN"]),
    ) as response:
        status, answer = response.status, await response.json()
    assert status == 200
    assert (answer["offline_after_ms"], answer["heartbeat_interval_ms"]) == (30_000, 10_000)


@pytest.mark.slow
async def test_a_killed_control_has_its_nodes_back_within_3_s_and_costs_no_reader_anything(llorch: Cluster) -> None:
    """One reads with `llorch submit`, the other over HTTP, and comes back where it was by what it last saw."""
    port = lasting_port()
    control = await llorch.start_control(port=port)
    pool = simulated("p0", "sim", 2, "--tokens", "64")
    await asyncio.gather(llorch.start_node("a", [pool, SLOW]), llorch.start_node("b", [pool]))
    reader = await start(llorch, "submit", "-m", "slow", "--max-tokens", "150", "Hello")
    assert reader.stdout is not None
    seen = await reader.stdout.readexactly(6)
    got = b""
    headers = llorch.headers()
    body = {"model": "slow", "prompt": "x", "max_tokens": 100}
    async with llorch.session.post(llorch.url + "/v2/tasks", json=body, headers=headers) as response:
        task_id = response.headers["X-Llorch-Task"]
        while got.count(b"event: token") < 5:
            got += await response.content.readany()
        control.kill()
    whole = got[: got.rindex(b"\n\n") + 2]
    last_id = whole.rsplit(b"id: ", 1)[1].split(b"\n", 1)[0].decode()
    await llorch.start_control(port=port)

    async def both_bound() -> bool:
        pools = (await llorch.get("/v2/pools"))["pools"]
        return sum(pool["bound"] for pool in pools if pool["pool_id"] == "p0") == 2

    await eventually(both_bound, within_s=3.0)
    done = await asyncio.gather(*(llorch.complete() for _ in range(8)))
    assert {task["node_id"] for task in done} == {"a", "b"}

    async def rest() -> bytes:
        async with llorch.session.get(
            f"{llorch.url}/v2/tasks/{task_id}/events",
            headers=headers | {"Last-Event-ID": last_id, "X-Llorch-Attempt": "1"},
        ) as response:
            assert response.status == 200, await response.text()
            return await response.read()

    text = (whole + await eventually(rest, within_s=5.0)).decode()
    tokens = [line for line in text.splitlines() if line.startswith('data: {"t":')]
    assert tokens == [f'data: {{"t":"t{i} ","i":{i}}}' for i in range(100)]
    assert text.count("event: end") == 1
    code, more, err = await end_of(reader)
    assert (code, seen.decode() + more, err) == (0, expected_text(150), "")


@pytest.mark.slow
async def test_sigterm_lets_a_node_finish_end_its_engines_and_sign_off_last(llorch: Cluster) -> None:
    await llorch.start_control()
    node = await llorch.start_node("a", [simulated("p0", "sim", 2, "--tokens", "1000", "--delay-ms", "20")])
    engines = descendants(node.pid)
    assert engines
    running = asyncio.ensure_future(llorch.complete(tokens=60))

    async def placed() -> bool:
        return bool((await llorch.get("/v2/nodes/a"))["in_flight"])

    await eventually(placed)
    ending = asyncio.ensure_future(node.stop())

    async def draining() -> bool:
        return bool((await llorch.get("/v2/nodes/a"))["draining"])

    await eventually(draining)
    _, decision = await llorch.post("/v2/placement", {"model": "sim", "prompt": "x"})
    assert decision["outcome"] == "refuse"
    assert (await running)["text"] == expected_text(60)
    assert await ending == 0
    assert [pid for pid in engines if alive(pid)] == []

    async def gone() -> bool:
        async with llorch.session.get(llorch.url + "/v2/nodes/a", headers=llorch.headers()) as response:
            return response.status == 404 or (await response.json())["state"] == "offline"

    await eventually(gone, within_s=2.0)
    lines = node.text().splitlines()
    last_engine = max(i for i, line in enumerate(lines) if "engine.exited" in line)
    signed_off = max(i for i, line in enumerate(lines) if "node.deregistered" in line)
    assert last_engine < signed_off


async def test_a_killed_agent_leaves_no_engine(llorch: Cluster) -> None:
    await llorch.start_control()
    node = await llorch.start_node("a", [simulated("p0", "sim", 1, "--ignore-sigterm")])
    engines = descendants(node.pid)
    node.kill()
    await eventually(lambda: not [pid for pid in engines if alive(pid)], within_s=3.0)


async def test_sigterm_to_a_control_refuses_new_tasks_and_lets_running_ones_end(llorch: Cluster) -> None:
    control = await llorch.start_control()
    await llorch.start_node("a", [simulated("p0", "sim", 2, "--tokens", "1000", "--delay-ms", "20")])
    running = asyncio.ensure_future(llorch.complete(tokens=60))

    async def placed() -> bool:
        return bool((await llorch.get("/v2/nodes/a"))["in_flight"])

    await eventually(placed)
    ending = asyncio.ensure_future(control.stop())

    async def not_ready() -> bool:
        async with llorch.session.get(llorch.url + "/readyz") as response:
            return response.status == 503

    await eventually(not_ready)
    status, body = await llorch.post("/v2/tasks", {"model": "sim", "prompt": "x"})
    assert (status, body["error"]["code"]) == (503, "DRAINING")
    assert (await running)["text"] == expected_text(60)
    assert await ending == 0
