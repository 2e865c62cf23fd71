"""Engines that others start: a file appears, and the pool serves; it goes, and the pool is gone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, alive, eventually, expected_text, lasting_port, simulated
from tests.e2e.shared import kept, visiting


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[int, int]]:
    """An engine that a person started by hand: (port, pid)."""
    port = lasting_port()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "llorch.node.engines.simulated_server",
            "--port", str(port), "--alias", "mine", "--parallel", "2", "--tokens", "8",
        ],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    yield port, process.pid
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="module")
def one_control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    async def start(cluster: Cluster) -> None:
        await cluster.start_control()

    with kept(tmp_path_factory.mktemp("handoffs"), start) as cluster:
        yield cluster


@pytest.fixture
async def llorch(one_control: Cluster) -> AsyncIterator[Cluster]:
    """With a node "a" for this test alone: it begins without its folder, and signs off at the end."""
    async with visiting(one_control) as cluster:
        await cluster.start_node("a", [simulated()])
        yield cluster
        await cluster.nodes["a"].stop()
        shutil.rmtree(cluster.folder / "a")


def hand_over(folder: Path, name: str, content: bytes) -> None:
    """Write and rename, as every provisioner must."""
    temporary = folder / f".{name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(folder / name)


def engines_dir(running: Cluster, node: str = "a") -> Path:
    return running.folder / node / ".runtime" / "engines"


def handoff(port: int, **more: Any) -> bytes:
    return json.dumps(
        {"pool_id": "mine", "engine": "vllm", "url": f"http://127.0.0.1:{port}", "model": "mine", "slots": 2, **more}
    ).encode()


async def test_a_handoff_by_hand_is_routable_within_2_s_and_its_removal_too(
    llorch: Cluster, engine: tuple[int, int]
) -> None:
    port, pid = engine

    async def listening() -> bool:
        async with llorch.session.get(f"http://127.0.0.1:{port}/health") as response:
            return response.status == 200

    await eventually(listening)
    hand_over(engines_dir(llorch), "mine-r0.json", handoff(port))

    async def serves() -> bool:
        status, task = await llorch.post("/v2/tasks", {"model": "mine", "prompt": "x", "max_tokens": 4})
        return status == 200 and task["text"] == expected_text(4)

    await eventually(serves, within_s=2.0)
    pools = {pool["pool_id"]: pool for pool in (await llorch.get("/v2/nodes/a"))["pools"]}
    assert (pools["mine"]["engine"], pools["mine"]["slots_total"]) == ("vllm", 2)
    assert [replica["owned"] for replica in pools["mine"]["replicas"]] == [False]

    (engines_dir(llorch) / "mine-r0.json").unlink()

    async def gone() -> bool:
        _, decision = await llorch.post("/v2/placement", {"model": "mine", "prompt": "x"})
        return bool(decision["outcome"] != "placed")

    await eventually(gone, within_s=2.0)
    assert alive(pid)  # llorch ends only what it started
    await llorch.nodes["a"].stop()
    assert alive(pid)


async def test_bad_handoffs_are_reported_once_each_and_disturb_nothing(
    llorch: Cluster, engine: tuple[int, int]
) -> None:
    port, _ = engine
    node = llorch.nodes["a"]
    folder = engines_dir(llorch)
    good = handoff(port)
    hand_over(folder, "lies-r0.json", good)  # its name and its content differ
    hand_over(folder, "mine-huge.json", handoff(port, replica_id="huge")[:-1] + b" " * 70_000 + b"}")
    hand_over(folder, "mine-garbage.json", b"\x00\xff{")
    hand_over(folder, "mine-list.json", b"[]")
    hand_over(folder, "mine-far.json", handoff(port, replica_id="far", url="http://10.0.0.1:80"))
    hand_over(folder, "mine-typo.json", handoff(port, replica_id="typo", slotz=1))
    hand_over(folder, "mine-dup.json", b'{"pool_id":"mine","pool_id":"mine"}')
    os.mkfifo(folder / "mine-fifo.json")
    (folder / "mine-link.json").symlink_to(folder / "p0-r0.json")
    (folder / "mine-dir.json").mkdir()
    bad = (
        "lies-r0",
        "mine-huge",
        "mine-garbage",
        "mine-list",
        "mine-far",
        "mine-typo",
        "mine-dup",
        "mine-fifo",
        "mine-link",
        "mine-dir",
    )

    def reported() -> dict[str, int]:
        lines = [line for line in node.text().splitlines() if "handoff.invalid" in line]
        return {name: sum(f"{name}.json" in line for line in lines) for name in bad}

    await eventually(lambda: all(reported().values()), within_s=10.0, what="every bad handoff reported")
    hand_over(folder, "mine-r0.json", good)

    async def serves() -> bool:
        status, task = await llorch.post("/v2/tasks", {"model": "mine", "prompt": "x", "max_tokens": 4})
        return status == 200 and task["text"] == expected_text(4)

    await eventually(serves, within_s=2.0)
    assert (await llorch.complete())["state"] == "done"
    (folder / "mine-r0.json").unlink()

    async def gone() -> bool:
        _, decision = await llorch.post("/v2/placement", {"model": "mine", "prompt": "x"})
        return bool(decision["outcome"] != "placed")

    await eventually(gone, within_s=2.0)  # the directory was looked through twice since, and nothing said again
    assert reported() == dict.fromkeys(bad, 1)


async def test_a_handoff_truncated_at_every_byte_is_reported_and_never_serves(
    llorch: Cluster, engine: tuple[int, int]
) -> None:
    port, _ = engine
    node = llorch.nodes["a"]
    whole = handoff(port)
    for cut in range(len(whole)):
        replica = f"cut{cut}"
        hand_over(engines_dir(llorch), f"mine-{replica}.json", handoff(port, replica_id=replica)[:cut])

    def reports() -> int:
        return sum("handoff.invalid" in line for line in node.text().splitlines())

    await eventually(lambda: reports() >= len(whole), within_s=20.0, what=f"{len(whole)} reports")
    assert reports() == len(whole)
    assert [pool["pool_id"] for pool in (await llorch.get("/v2/nodes/a"))["pools"]] == ["p0"]
    assert (await llorch.complete())["state"] == "done"
