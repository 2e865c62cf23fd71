"""Two models on one pool: loaded when asked for, collated by the control, kept for a while, unloaded when idle."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llorch import demo
from tests.cluster import Cluster, Running, alive, descendants, eventually, expected_text, simulated

TASKS, AT_ONCE = 200, 40
KEPT_S = 30  # what a model is kept for once it is loaded
needs_llama = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="the xllamacpp wheel is not installed")


def loads(node: Running) -> int:
    return node.text().count(" engine.started ")


async def pool_of(llorch: Cluster, pool_id: str = "p") -> dict[str, Any]:
    node = await llorch.get("/v2/nodes/a")
    return next(pool for pool in node["pools"] if pool["pool_id"] == pool_id)


def left_of(pids: set[int]) -> str:
    return ", ".join(Path(f"/proc/{pid}/cmdline").read_text().replace(chr(0), " ") for pid in pids if alive(pid))


@pytest.mark.slow
@pytest.mark.llama
@needs_llama
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("whole_machine")
async def test_two_models_of_one_pool_serve_200_interleaved_tasks(llorch: Cluster, tmp_path: Path) -> None:
    paths = [tmp_path / "first.gguf", tmp_path / "second.gguf"]
    for path in paths:
        shutil.copy(demo.model_path(), path)
    await llorch.start_control()
    pool = {
        "id": "p", "engine": "llamacpp", "models": [f"file:{path}" for path in paths], "slots": 4, "ctx": 512,
        "idle_unload_s": 5,
    }  # fmt: skip
    node = await llorch.start_node("a", [pool], wait=False)
    await eventually(lambda: pool_of(llorch), within_s=20.0)
    assert loads(node) == 0
    began = time.monotonic()
    room = asyncio.Semaphore(AT_ONCE)

    async def one(model: str) -> dict[str, Any]:
        async with room:
            return await llorch.complete(model, 6)

    models = list(itertools.islice(itertools.cycle(["first", "second"]), TASKS))
    done = await asyncio.gather(*(one(model) for model in models))
    run_s = time.monotonic() - began
    print(f"{TASKS} tasks in {run_s:.1f} s, {loads(node)} loads")
    assert all(task["state"] == "done" and task["text"] for task in done)
    assert [task["model"] for task in done] == models
    assert loads(node) <= 2 + run_s / KEPT_S, node.text()
    engine = descendants(node.pid)

    async def resident() -> bool:
        return (await pool_of(llorch))["model"] in models

    async def unloaded() -> bool:
        pool = await pool_of(llorch)
        return pool["model"] is None and not pool["ready"]

    await eventually(resident)  # what was loaded last may have done its tasks before the node's next report
    await eventually(unloaded, within_s=KEPT_S + 15.0)
    try:
        await eventually(lambda: not any(alive(pid) for pid in engine), within_s=15.0)
    except AssertionError:
        raise AssertionError(f"still there: {left_of(engine)}") from None
    before = loads(node)
    assert (await llorch.complete("second", 4))["text"]
    assert loads(node) == before + 1


async def test_a_model_is_loaded_when_a_task_asks_for_it_and_the_task_waits(llorch: Cluster) -> None:
    await llorch.start_control()
    pool = simulated("p", "", 2, "--load-s", "1.5") | {"models": ["a", "b"]}
    del pool["model"]
    node = await llorch.start_node("a", [pool], wait=False)
    await eventually(lambda: pool_of(llorch), within_s=20.0)
    models = {model["id"] for model in (await llorch.get("/v1/models"))["data"]}
    assert models == {"a", "b"}
    done = await asyncio.gather(*(llorch.complete("b", 4) for _ in range(3)))
    assert [task["text"] for task in done] == [expected_text(4)] * 3
    assert loads(node) == 1

    async def resident() -> bool:
        return bool((await pool_of(llorch))["model"] == "b")

    await eventually(resident)


async def test_a_model_that_cannot_be_loaded_fails_its_tasks_and_no_others(llorch: Cluster) -> None:
    """Both are given to the same program; only one of them is a flag's value that it refuses."""
    await llorch.start_control()
    pool = {"id": "p", "engine": "llamacpp", "models": ["demo", f"file:{llorch.folder}/none.gguf"], "ctx": 512}
    (llorch.folder / "none.gguf").write_bytes(Path(demo.model_path()).read_bytes()[:4096])
    with pytest.raises(RuntimeError, match="not a usable GGUF"):
        await llorch.start_node("a", [pool], wait=False)
