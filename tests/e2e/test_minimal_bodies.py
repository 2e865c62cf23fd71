"""The smallest bodies that are promised to work, sent with curl as they are written in the docs."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import Any

import pytest

from tests.cluster import Cluster, eventually, simulated

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


async def curl(token: str, *argv: str) -> str:
    ran = await asyncio.to_thread(
        subprocess.run,
        ["curl", "-sS", "-N", "--max-time", "20", "-H", f"Authorization: Bearer {token}", *argv],
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    out = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        out.append((fields["event"], json.loads(fields["data"])))
    return out


async def test_a_prompt_and_a_model_are_a_whole_task_at_control_and_at_a_node(llorch: Cluster) -> None:
    await llorch.start_control()
    node = await llorch.start_node("a", [simulated("p0", "llama-3-8b", 2, "--tokens", "3")])
    body = '{"prompt": "Hello", "model": "llama-3-8b"}'
    at_control = events(await curl(llorch.token, "-d", body, f"{llorch.url}/v2/tasks"))
    service = llorch.tokens["LLORCH_SERVICE_TOKEN"]
    at_node = events(await curl(service, "-d", body, f"{node.url}/v2/pools/p0/infer"))
    for said in (at_control, at_node):
        assert [name for name, _ in said if name != "queued"] == ["started", "token", "token", "token", "end"]
        assert [data["t"] for name, data in said if name == "token"] == ["t0 ", "t1 ", "t2 "]


async def test_the_minimal_registration_and_heartbeat_make_a_node_that_is_dialled(llorch: Cluster) -> None:
    """The node's own process is joined elsewhere; this control only knows what curl told it."""
    first = await llorch.start_control()
    node = await llorch.start_node("real", [simulated("p0", "sim", 2, "--tokens", "3")])
    await llorch.start_control("--probe-interval", "500ms")
    assert llorch.url != first.url
    node_token = llorch.tokens["LLORCH_NODE_TOKEN"]
    address = node.url.removeprefix("http://")
    register = {"node_id": "plain", "address": address, "pools": ["p0"], "capabilities": {"gpus": []}}
    answer = json.loads(await curl(node_token, "-d", json.dumps(register), f"{llorch.url}/v2/nodes/register"))
    assert (answer["success"], answer["node_id"]) == (True, "plain")
    assert answer["lease_id"]
    beat = '{"pools":[{"pool_id":"p0","ready":true}]}'
    answer = json.loads(await curl(node_token, "-d", beat, f"{llorch.url}/v2/nodes/plain/heartbeat"))
    assert answer == {"success": True, "next_heartbeat_ms": 10_000}
    await llorch.bound("plain", 1, within_s=5.0)
    said = events(await curl(llorch.token, "-d", '{"prompt": "Hello", "model": "sim"}', f"{llorch.url}/v2/tasks"))
    assert [data["t"] for name, data in said if name == "token"] == ["t0 ", "t1 ", "t2 "]
    node.kill()

    async def passed_over() -> bool:
        return bool(not (await llorch.get("/v2/nodes/plain"))["reachable"])

    await eventually(passed_over, within_s=3.0)


async def test_a_callback_makes_the_control_look_at_once(llorch: Cluster) -> None:
    await llorch.start_control()
    await llorch.start_node("a", [simulated("p0", "sim", 2)])
    node_token = llorch.tokens["LLORCH_NODE_TOKEN"]
    body = '{"node_id": "a", "pool_id": "p0"}'
    answer = await curl(node_token, "-w", "%{http_code}", "-d", body, f"{llorch.url}/callbacks/pool-ready")
    assert answer.endswith("202")
    stranger = await curl(
        node_token, "-w", "%{http_code}", "-d", '{"node_id": "x", "pool_id": "p"}', f"{llorch.url}/callbacks/pool-ready"
    )
    assert stranger.endswith("404")
    assert "NODE_UNKNOWN" in stranger


async def test_an_address_that_must_not_be_dialled_is_refused(llorch: Cluster) -> None:
    await llorch.start_control()
    for address in ("169.254.169.254:80", "0.0.0.0:1", "[ff02::1]:80", "ftp://127.0.0.1", "127.0.0.1@x:1"):
        async with llorch.session.post(
            f"{llorch.url}/v2/nodes/register",
            json={"node_id": "n", "address": address},
            headers=llorch.headers(llorch.tokens["LLORCH_NODE_TOKEN"]),
        ) as response:
            assert response.status in (400, 422), (address, await response.text())
    assert (await llorch.get("/v2/nodes"))["nodes"] == []
