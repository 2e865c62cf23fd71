"""A control that was stopped, with its nodes alive: real processes, and the real end of their links meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.cluster import Cluster, eventually, expected_text, simulated


@pytest.mark.slow
async def test_a_control_that_was_stopped_loses_no_node_and_blames_no_pool(llorch: Cluster) -> None:
    control = await llorch.start_control("--heartbeat-interval", "300ms", "--offline-after", "1500ms")
    pool = simulated("p0", "sim", 4, "--tokens", "100", "--delay-ms", "35")
    await asyncio.gather(*(llorch.start_node(name, [pool]) for name in ("a", "b", "c")))
    running = [asyncio.create_task(llorch.complete(tokens=100)) for _ in range(6)]
    await eventually(lambda: control.text().count("placement.decided") == 6)
    os.kill(control.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(3.0)  # twice as long as a node may be silent
    finally:
        os.kill(control.pid, signal.SIGCONT)
    await eventually(lambda: "storm.began" in control.text() and "storm.ended" in control.text())
    assert 'reason="the control stood still"' in control.text()
    for task in running:  # their links held, or they were made again
        assert (await task)["text"] == expected_text(100)
    assert (await llorch.complete(tokens=8))["text"] == expected_text(8)
    assert "node.expired" not in control.text()
    assert "pool.ejected" not in control.text()
    assert {node["state"] for node in (await llorch.get("/v2/nodes"))["nodes"]} == {"online"}
