"""What an operator asks of pools, on real processes: nothing fails that need not."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from llorch import demo, sse
from tests.cluster import Cluster, eventually, expected_text, simulated
from tests.e2e.shared import end_of, start

Ask = Callable[[Cluster, str, int], Awaitable[None]]


async def pool_of(llorch: Cluster, node: str = "a", pool_id: str = "p0") -> dict[str, Any]:
    found = await llorch.get(f"/v2/nodes/{node}")
    return next(pool for pool in found["pools"] if pool["pool_id"] == pool_id)


async def admin(llorch: Cluster, *argv: str) -> tuple[int, str, str]:
    return await end_of(await start(llorch, *argv, LLORCH_TOKEN=llorch.tokens["LLORCH_ADMIN_TOKEN"]))


class Load:
    """Tasks without a pause, until it is ended; each must be done, in one piece or token by token."""

    def __init__(self, llorch: Cluster, clients: int, model: str = "sim", tokens: int = 8) -> None:
        self.done = 0
        self._ending = False
        ask = (self._whole, self._stream)
        self._clients = [asyncio.create_task(self._go_on(ask[i % 2], llorch, model, tokens)) for i in range(clients)]

    async def _go_on(self, ask: Ask, llorch: Cluster, model: str, tokens: int) -> None:
        while not self._ending:
            await ask(llorch, model, tokens)
            self.done += 1

    @staticmethod
    async def _whole(llorch: Cluster, model: str, tokens: int) -> None:
        task = await llorch.complete(model, tokens)
        assert task["state"] == "done" and task["text"] == expected_text(tokens), task

    @staticmethod
    async def _stream(llorch: Cluster, model: str, tokens: int) -> None:
        """What this one has seen can't be taken back and tried elsewhere."""
        body = {"model": model, "prompt": "go", "max_tokens": tokens}
        async with llorch.session.post(llorch.url + "/v2/tasks", json=body, headers=llorch.headers()) as response:
            events = sse.Decoder().feed(await response.read())
        told = [(event.event, json.loads(event.data)) for event in events if event.event != "queued"]
        assert "".join(data["t"] for name, data in told if name == "token") == expected_text(tokens), told
        assert (told[-1][0], told[-1][1].get("finish_reason")) == ("end", "length"), told

    async def more(self, count: int = 20) -> None:
        """Until so many more have ended well."""
        wanted = self.done + count
        failed = [client for client in self._clients if client.done()]
        assert not failed, failed[0].exception()
        await eventually(lambda: self.done >= wanted or any(c.done() for c in self._clients), within_s=30.0)

    async def end(self) -> None:
        self._ending = True
        await asyncio.gather(*self._clients)


@pytest.mark.slow
async def test_a_drain_under_load_fails_no_task_and_outlives_the_agent(llorch: Cluster) -> None:
    await llorch.start_control()
    pool = simulated("p0", "sim", 4, "--delay-ms", "10")
    a, _ = await asyncio.gather(llorch.start_node("a", [pool]), llorch.start_node("b", [pool]))
    load = Load(llorch, 6)
    await load.more()
    code, _, err = await admin(llorch, "node", "drain", "a", "--reason", "new kernel")
    assert code == 0, err
    await load.more()
    pool_now = await pool_of(llorch)
    assert pool_now["draining"] and pool_now["slots_free"] == 4
    assert await a.stop() == 0
    await load.more()
    await llorch.start_node("a", [pool], wait=False)

    async def back() -> bool:
        node = await llorch.get("/v2/nodes/a")
        return bool(node["state"] == "draining" or node["draining"])

    await eventually(back, within_s=10.0)
    tasks = [await llorch.complete() for _ in range(6)]
    assert {task["node_id"] for task in tasks} == {"b"}
    code, _, err = await admin(llorch, "node", "undrain", "a")
    assert code == 0, err
    await llorch.bound("a", 1, within_s=10.0)
    await load.end()


@pytest.mark.slow
async def test_a_pool_is_drained_restarted_unloaded_and_loaded_under_load_and_no_task_fails(llorch: Cluster) -> None:
    await llorch.start_control()
    pool = simulated("p0", "sim", 4, "--tokens", "100", "--delay-ms", "15")
    await asyncio.gather(llorch.start_node("a", [pool]), llorch.start_node("b", [pool]))
    load = Load(llorch, 4, tokens=40)  # longer than a node needs to end those that it should not
    for words in (["drain"], ["undrain"], ["restart"], ["unload"], ["load"], ["load"]):
        code, out, err = await admin(llorch, "pool", *words, "a/p0")
        assert code == 0, (words, out, err)
        await load.more(8)
    await load.end()
    assert (await pool_of(llorch))["ready"]


# Serves any model but one whose name says that it is broken: that one it gives up after a while, as engines do.
GIVES_UP = """
import os, sys, time
port, key_file, model = sys.argv[1:]
if model.endswith("broken.gguf"):
    print("tensor blk.0 is missing", flush=True)
    time.sleep(1.0)
    sys.exit(7)
server = "llorch.node.engines.simulated_server --host 127.0.0.1 --alias good --parallel 4 --delay-ms 5"
os.execv(sys.executable, [sys.executable, "-m", *server.split(), "--port", port, "--api-key-file", key_file])
"""


def engine_of(llorch: Cluster, name: str = "p0-r0") -> int:
    return int(json.loads((llorch.folder / "a" / ".runtime" / "pids" / f"{name}.json").read_text())["pid"])


async def always_ready(llorch: Cluster, meanwhile: asyncio.Task[Any]) -> None:
    while not meanwhile.done():
        assert (await pool_of(llorch))["ready"]
        await asyncio.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["no GGUF at all", "its engine gives it up"])
async def test_a_reload_to_a_broken_model_leaves_the_old_one_serving(llorch: Cluster, broken: str) -> None:
    """The same process, ready all the time: its tasks never notice."""
    files = {name: llorch.folder / f"{name}.gguf" for name in ("good", "broken")}
    for path in files.values():
        shutil.copy(demo.model_path(), path)
    if broken == "no GGUF at all":
        files["broken"].write_bytes(b"GGUF" + bytes(100))
    words = [sys.executable, "-c", GIVES_UP, "{port}", "{key_file}", "{model}"]
    await llorch.start_control()
    pool = {"id": "p0", "engine": "command", "command": words, "slots": 4}
    await llorch.start_node("a", [pool | {"model": f"file:{files['good']}"}])
    before, load = engine_of(llorch), Load(llorch, 4, "good")
    await load.more()
    asked = asyncio.create_task(admin(llorch, "pool", "reload", "a/p0", f"file:{files['broken']}"))
    watching = asyncio.create_task(always_ready(llorch, asked))
    while not asked.done():
        assert engine_of(llorch) == before
        await load.more(4)
    await watching
    code, _, err = await asked
    said = "not a usable GGUF" if broken == "no GGUF at all" else "exited with code 7"
    assert code == 1 and said in err, err
    now = await pool_of(llorch)
    assert (now["model"], now["ready"], now["operation"]["state"]) == ("good", True, "failed")
    await load.more()
    await load.end()
    assert engine_of(llorch) == before


@pytest.mark.slow
@pytest.mark.llama
async def test_a_reload_to_another_model_serves_the_old_one_until_the_new_one_is_proven(llorch: Cluster) -> None:
    other = llorch.folder / "other.gguf"
    shutil.copy(demo.model_path(), other)
    await llorch.start_control()
    await llorch.start_node("a", [{"id": "p0", "engine": "llamacpp", "model": "demo", "ctx": 512, "slots": 2}])
    asked = asyncio.create_task(admin(llorch, "pool", "reload", "a/p0", f"file:{other}"))
    watching = asyncio.create_task(always_ready(llorch, asked))
    served = {"demo": 0, "other": 0}
    while not asked.done():
        before = await pool_of(llorch)
        status, _ = await llorch.post("/v2/tasks", {"model": before["model"], "prompt": "go", "max_tokens": 2})
        if before["model"] == (await pool_of(llorch))["model"]:
            assert status == 200
            served[before["model"]] += 1
    code, _, err = await asked
    assert code == 0, err
    assert served["demo"]
    await watching
    assert (await llorch.complete("other", 4))["text"]


@pytest.mark.slow
async def test_pools_are_changed_in_the_file_and_only_those_are_touched(llorch: Cluster) -> None:
    await llorch.start_control()
    keeps, goes = simulated("keeps", "k"), simulated("goes", "g")
    await llorch.start_node("a", [keeps, goes])
    pids = llorch.folder / "a" / ".runtime" / "pids"
    before = json.loads((pids / "keeps-r0.json").read_text())["pid"]
    config = llorch.folder / "a.yaml"
    config.write_text(json.dumps({"pools": [keeps, simulated("comes", "c"), {"id": "bad", "engine": "nonsense"}]}))
    await eventually(lambda: "settings.refused" in llorch.nodes["a"].text())
    assert (await llorch.complete("g", 2))["text"] == expected_text(2)
    config.write_text(json.dumps({"pools": [keeps, simulated("comes", "c")]}))

    async def changed() -> bool:
        pools = {pool["pool_id"] for pool in (await llorch.get("/v2/nodes/a"))["pools"] if pool["bound"]}
        return pools == {"keeps", "comes"}

    await eventually(changed, within_s=15.0)
    assert json.loads((pids / "keeps-r0.json").read_text())["pid"] == before
    assert (await llorch.complete("c", 2))["text"] == expected_text(2)


async def test_an_engines_log_is_read_from_afar(llorch: Cluster) -> None:
    await llorch.start_control()
    await llorch.start_node("a", [simulated("p0", "sim", 4, "--no-such-flag")], wait=False)

    async def failed() -> bool:
        return (await pool_of(llorch))["last_error"] is not None

    await eventually(failed, within_s=15.0)
    code, out, err = await admin(llorch, "pool", "logs", "a/p0")
    assert code == 0 and "no-such-flag" in out, err
