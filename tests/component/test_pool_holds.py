"""Pools that stand back, on a whole node: for the hour, and for who owns the GPU. They drain, their engines end, and
they come back by themselves; the others never notice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llorch.config_hours import parse
from tests.cluster import alive, eventually, expected_text
from tests.component.node_harness import POOL
from tests.component.test_engine_failures import pool_now
from tests.component.test_node_process import MAIN, Process, node_process
from tests.component.test_supervisor import left, pid_of
from tests.standins.nvml import GB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")

# Hours are a value of their own, which JSON does not have.
WITH_A_MACHINE = "import tests.standins.machine\n" + MAIN.replace(
    '"args": tuple(pool["args"])}',
    '"args": tuple(pool["args"]), **({"hours": parse(pool["hours"])} if "hours" in pool else {}), '
    '**({"gpus": tuple(pool["gpus"])} if "gpus" in pool else {})}',
).replace("import json, sys", "import json, sys\nfrom llorch.config_hours import parse")
SLOW = ["--delay-ms", "40", "--tokens", "100"]


class Machine:
    """The file that a node's machine is read from."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "machine.json"
        self._said = {"wall": "2026-01-05T07:59", "foreign": 0}  # a Monday
        self.set()

    def set(self, **news: Any) -> None:
        self._said |= news
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self._said))
        new.replace(self.file)


@asynccontextmanager
async def node_with(folder: Path, machine: Machine, **pool: Any) -> AsyncIterator[Process]:
    held = {"id": POOL, "engine": "simulated", "model": "m", "slots": 2, "args": SLOW, **pool}
    other = {"id": "other", "engine": "simulated", "model": "o", "slots": 2, "args": []}
    env = {"LLORCH_TEST_MACHINE": str(machine.file)}
    async with node_process(folder, pools=[held, other], env=env, main=WITH_A_MACHINE) as node:
        await eventually(lambda: pool_now(node.control, "other").get("ready"), within_s=20.0)
        yield node


def now(node: Process) -> dict[str, Any]:
    return pool_now(node.control, POOL)


def engines(node: Process) -> list[str]:
    """Those of the pool that were started, as its node logged them."""
    return [line for line in node.said if "engine.started" in line and f"pool_id={POOL}" in line]


@pytest.mark.slow
async def test_outside_its_hours_a_pool_drains_and_ends_its_engine_and_comes_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert parse("mon-fri 08:00-18:00")
    runtime = tmp_path / "data" / ".runtime"
    async with node_with(tmp_path, machine, hours="mon-fri 08:00-18:00") as node:
        await eventually(lambda: now(node).get("held") == ["hours: it serves again from mon 08:00"])
        assert now(node)["state"] == "draining" and engines(node) == [], "it is not even started"
        machine.set(wall="2026-01-05T08:00")
        await eventually(lambda: now(node).get("ready"), within_s=20.0)
        first = pid_of(runtime, f"{POOL}-r0")
        link = await node.control.linked()
        late = link.open({"model": "m", "prompt": "go", "max_tokens": 50})
        await eventually(lambda: late.text)
        machine.set(wall="2026-01-09T18:00")
        await eventually(lambda: now(node)["held"] == ["hours: it serves again from mon 08:00"])
        assert now(node)["state"] == "draining" and alive(first)
        refused = link.open({"model": "m", "prompt": "go", "max_tokens": 1})
        await eventually(lambda: refused.refused is not None)
        assert refused.refused is not None and refused.refused["code"] == "DRAINING"
        await eventually(lambda: late.tail is not None)
        assert late.text == expected_text(50) and late.tail is not None and not late.tail.get("error")
        await eventually(lambda: not alive(first))
        await eventually(lambda: not [name for name in left(runtime) if f"{POOL}-" in name])
        assert pool_now(node.control, "other")["ready"]
        machine.set(wall="2026-01-12T08:00")
        await eventually(lambda: now(node).get("ready"), within_s=20.0)
        assert len(engines(node)) == 2 and now(node)["held"] == [] and now(node)["last_error"] is None


@pytest.mark.slow
async def test_a_pool_that_yields_stands_back_for_who_owns_the_gpu_and_comes_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    runtime = tmp_path / "data" / ".runtime"
    async with node_with(tmp_path, machine, gpus=[0], yield_to_owner=True) as node:
        await eventually(lambda: now(node).get("ready"), within_s=20.0)
        first = pid_of(runtime, f"{POOL}-r0")
        machine.set(foreign=20 * GB)
        await eventually(lambda: now(node)["held"] == ["owner: 20.0 GiB of GPU 0 are used by other programs"])
        await eventually(lambda: not alive(first))
        assert pool_now(node.control, "other")["ready"], "one that does not yield stays"
        machine.set(foreign=0)
        await eventually(lambda: now(node).get("ready"), within_s=20.0)
        assert now(node)["held"] == [] and len(engines(node)) == 2
