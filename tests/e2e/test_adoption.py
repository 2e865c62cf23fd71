"""An agent that is killed, and the next one: engines go on with what they have loaded, streams end exactly once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, Running, alive, eventually, expected_text, simulated

BACK_WITHIN_S = 3.0
STREAMS = 50


def engines(llorch: Cluster, node: str) -> dict[str, dict[str, Any]]:
    """The pid files of a node's engines, by replica."""
    folder = llorch.folder / node / ".runtime" / "pids"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def another_than(before: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The one engine there is, once it is not that one any more."""
    return next((each for each in found.values() if each["pid"] != before["pid"]), None)


def gone(pids: list[int]) -> bool:
    return not any(alive(pid) for pid in pids)


def pids_of(engine: dict[str, Any]) -> list[int]:
    return [engine["pid"], engine["shim"]["pid"]]


@dataclass
class Stream:
    """What one client saw of a native task."""

    task_id: str = ""
    text: str = ""
    ends: list[dict[str, Any]] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)


async def read(llorch: Cluster, body: dict[str, Any], stream: Stream) -> Stream:
    """To the stream's end, coming back where it was if the connection breaks."""
    async with llorch.session.post(llorch.url + "/v2/tasks", json=body, headers=llorch.headers()) as response:
        assert response.status == 200, await response.text()
        stream.task_id = response.headers["X-Llorch-Task"]
        rest = b""
        async for chunk in response.content.iter_any():
            *blocks, rest = (rest + chunk).split(b"\n\n")
            for block in blocks:
                take(block, stream)
    return stream


def take(block: bytes, stream: Stream) -> None:
    fields = dict(line.split(": ", 1) for line in block.decode().splitlines() if ": " in line and line[0] != ":")
    told = json.loads(fields.get("data", "{}"))
    if fields.get("event") == "token":
        stream.text += told["t"]
    elif fields.get("event") == "started":
        stream.nodes.append(told["node_id"])
    elif fields.get("event") in ("end", "error"):
        stream.ends.append(told | {"event": fields["event"]})


async def start_again(llorch: Cluster, name: str) -> tuple[Running, float]:
    """The same node again; and the seconds from its start until it has done a task, which only it can do."""
    began = time.monotonic()
    node = await llorch.start_node(name, POOLS, wait=False, LLORCH_ORPHAN_GRACE="60s")
    done = await llorch.complete("slow", 1)
    assert done["text"] == expected_text(1)
    return node, time.monotonic() - began


POOLS = [
    simulated("slow", "slow", 64, "--delay-ms", "20", "--load-s", "5"),
    simulated("late", "late", 8, "--ttft-ms", "4000"),
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("whole_machine")
async def test_a_killed_agent_costs_its_streams_one_end_each_and_its_engines_nothing(llorch: Cluster) -> None:
    """The engine takes 5 s to load: an agent that is back within 3 s has loaded nothing again."""
    await llorch.start_control()
    node = await llorch.start_node("a", POOLS, LLORCH_ORPHAN_GRACE="60s")
    before = engines(llorch, "a")
    shown = [Stream() for _ in range(STREAMS)]
    silent = [Stream() for _ in range(8)]
    readers = [
        asyncio.create_task(read(llorch, {"model": "slow", "prompt": "go", "max_tokens": 2000}, stream))
        for stream in shown
    ] + [
        asyncio.create_task(read(llorch, {"model": "late", "prompt": "go", "max_tokens": 4}, stream))
        for stream in silent
    ]
    await eventually(lambda: all(stream.text for stream in shown), within_s=30.0)
    assert not any(stream.text for stream in silent)
    node.kill()
    again, took_s = await start_again(llorch, "a")
    print(f"a task done {took_s:.2f} s after its start")
    assert took_s <= BACK_WITHIN_S
    after = engines(llorch, "a")
    assert {name: (each["pid"], each["start_time"]) for name, each in after.items()} == {
        name: (each["pid"], each["start_time"]) for name, each in before.items()
    }
    await asyncio.wait_for(asyncio.gather(*readers), 60)
    for stream in shown:
        assert [end["event"] for end in stream.ends] == ["error"], stream
        assert stream.ends[0]["code"] == "NODE_LOST"
        assert stream.text and expected_text(2000).startswith(stream.text)
    for stream in silent:
        assert [end["event"] for end in stream.ends] == ["end"], stream
        assert stream.text == expected_text(4)
    done = await llorch.complete("slow", 4)
    assert done["text"] == expected_text(4)
    pids = [pid for each in after.values() for pid in pids_of(each)]
    assert await again.stop() == 0
    await eventually(lambda: gone(pids))


async def test_engines_are_kept_over_an_upgrade_and_end_with_the_last_agent(llorch: Cluster) -> None:
    await llorch.start_control()
    pools = [simulated()]
    node = await llorch.start_node("a", pools, "--keep-engines", LLORCH_ORPHAN_GRACE="60s")
    [before] = engines(llorch, "a").values()
    assert await node.stop() == 0
    assert all(alive(pid) for pid in pids_of(before))
    node = await llorch.start_node("a", pools, LLORCH_ORPHAN_GRACE="60s")
    [after] = engines(llorch, "a").values()
    assert (after["pid"], after["port"]) == (before["pid"], before["port"])
    assert (await llorch.complete())["text"] == expected_text(8)
    assert await node.stop() == 0
    await eventually(lambda: gone(pids_of(before)))


@pytest.mark.slow
async def test_an_engine_that_the_settings_want_otherwise_is_not_taken_over(llorch: Cluster) -> None:
    await llorch.start_control()
    node = await llorch.start_node("a", [simulated()], LLORCH_ORPHAN_GRACE="60s")
    [before] = engines(llorch, "a").values()
    node.kill()
    await llorch.start_node("a", [simulated("p0", "sim", 2)], LLORCH_ORPHAN_GRACE="60s")
    after = await eventually(lambda: another_than(before, engines(llorch, "a")))
    await eventually(lambda: gone(pids_of(before)))

    async def slots() -> bool:
        return bool((await llorch.get("/v2/nodes/a"))["pools"][0]["slots_total"] == 2)

    await eventually(slots)
    assert alive(after["pid"])


@pytest.mark.slow
async def test_an_engine_that_nobody_adopts_ends_after_its_grace(llorch: Cluster) -> None:
    await llorch.start_control()
    node = await llorch.start_node("a", LLORCH_ORPHAN_GRACE="1s")
    [engine] = engines(llorch, "a").values()
    node.kill()
    assert all(alive(pid) for pid in pids_of(engine))
    await eventually(lambda: gone(pids_of(engine)), within_s=8.0)
    assert not engines(llorch, "a")


@pytest.mark.slow
async def test_a_stranger_with_the_pid_of_an_engine_is_neither_adopted_nor_killed(
    llorch: Cluster, tmp_path: Path
) -> None:
    await llorch.start_control()
    node = await llorch.start_node("a", LLORCH_ORPHAN_GRACE="60s")
    [engine] = engines(llorch, "a").values()
    node.kill()
    for pid in pids_of(engine):
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: gone(pids_of(engine)))
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        folder = llorch.folder / "a" / ".runtime" / "pids"
        folder.mkdir(exist_ok=True)
        path = folder / "p0-r0.json"
        path.write_text(json.dumps(engine | {"pid": stranger.pid}))
        path.chmod(0o600)
        await llorch.start_node("a", LLORCH_ORPHAN_GRACE="60s")
        await eventually(lambda: another_than(engine | {"pid": stranger.pid}, engines(llorch, "a")))
        assert stranger.returncode is None and alive(stranger.pid)
    finally:
        stranger.kill()
        await stranger.wait()
