"""The smallest bodies that are promised to work, sent with curl as they are written in the docs."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.cluster import Cluster, eventually, simulated
from tests.e2e.shared import kept, visiting

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def one_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    async def start(cluster: Cluster) -> None:
        await cluster.start_control()
        await cluster.start_node("a", [simulated("p0", "llama-3-8b", 2, "--tokens", "3")])

    with kept(tmp_path_factory.mktemp("minimal"), start) as cluster:
        yield cluster


@pytest.fixture
async def whole(one_for_all: Cluster) -> AsyncIterator[Cluster]:
    """A cluster that several tests send to."""
    async with visiting(one_for_all) as cluster:
        yield cluster


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


async def test_a_prompt_and_a_model_are_a_whole_task_at_control_and_at_a_node(whole: Cluster) -> None:
    node = whole.nodes["a"]
    body = '{"prompt": "Hello", "model": "llama-3-8b"}'
    at_control = events(await curl(whole.token, "-d", body, f"{whole.url}/v2/tasks"))
    service = whole.tokens["LLORCH_SERVICE_TOKEN"]
    at_node = events(await curl(service, "-d", body, f"{node.url}/v2/pools/p0/infer"))
    for said in (at_control, at_node):
        assert [name for name, _ in said if name != "queued"] == ["started", "token", "token", "token", "end"]
        assert [data["t"] for name, data in said if name == "token"] == ["t0 ", "t1 ", "t2 "]


async def test_the_minimal_registration_and_heartbeat_make_a_node_that_is_dialled(llorch: Cluster) -> None:
    """The node's own process looks for a control that is not there; this one only knows what curl told it."""
    pools = [simulated("p0", "sim", 2, "--tokens", "3")]
    node, _ = await asyncio.gather(
        llorch.start_node("real", pools, join="http://127.0.0.1:1", wait=False),
        llorch.start_control("--probe-interval", "500ms"),
    )
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


async def test_a_callback_makes_the_control_look_at_once(whole: Cluster) -> None:
    node_token = whole.tokens["LLORCH_NODE_TOKEN"]
    body = '{"node_id": "a", "pool_id": "p0"}'
    answer = await curl(node_token, "-w", "%{http_code}", "-d", body, f"{whole.url}/callbacks/pool-ready")
    assert answer.endswith("202")
    stranger = await curl(
        node_token, "-w", "%{http_code}", "-d", '{"node_id": "x", "pool_id": "p"}', f"{whole.url}/callbacks/pool-ready"
    )
    assert stranger.endswith("404")
    assert "NODE_UNKNOWN" in stranger


async def test_an_address_that_must_not_be_dialled_is_refused(whole: Cluster) -> None:
    for address in ("169.254.169.254:80", "0.0.0.0:1", "[ff02::1]:80", "ftp://127.0.0.1", "127.0.0.1@x:1"):
        async with whole.session.post(
            f"{whole.url}/v2/nodes/register",
            json={"node_id": "n", "address": address},
            headers=whole.headers(whole.tokens["LLORCH_NODE_TOKEN"]),
        ) as response:
            assert response.status in (400, 422), (address, await response.text())
    assert [node["node_id"] for node in (await whole.get("/v2/nodes"))["nodes"]] == ["a"]
