"""The `pools:` of a node that serves are read anew: whole or not at all, and only what has changed is touched."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster import Cluster, alive, eventually, expected_text, simulated
from tests.component.test_supervisor import left, pid_of
from tests.e2e.test_pool_operations import Load, pool_of
from tests.gguf_files import small


class Settings:
    """The file of node `a`, and what its node says of it."""

    def __init__(self, llorch: Cluster) -> None:
        self.llorch = llorch
        self.file = llorch.folder / "a.yaml"
        self.runtime = llorch.folder / "a" / ".runtime"

    def write(self, *pools: dict[str, Any], **more: Any) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"pools": list(pools), **more}))
        new.replace(self.file)

    def said(self, event: str) -> list[str]:
        return [line for line in self.llorch.nodes["a"].text().splitlines() if f" {event} " in line]

    async def answered(self, change: Callable[[], object], event: str) -> str:
        """The line about a change."""
        before = len(self.said(event))
        change()
        await eventually(lambda: len(self.said(event)) > before, within_s=15.0, what=event)
        return self.said(event)[-1]

    async def pools(self) -> dict[str, dict[str, Any]]:
        node = await self.llorch.get("/v2/nodes/a")
        return {pool["pool_id"]: pool for pool in node["pools"]}

    async def until(self, fact: Callable[[dict[str, dict[str, Any]]], Any]) -> None:
        async def look() -> bool:
            return bool(fact(await self.pools()))

        await eventually(look, within_s=20.0)


@pytest.mark.slow
async def test_a_changed_pool_restarts_a_removed_one_ends_after_its_tasks_and_no_other_notices(llorch: Cluster) -> None:
    await llorch.start_control()
    keeps, changes = simulated("keeps", "k", 2), simulated("changes", "c", 2)
    goes = simulated("goes", "g", 2, "--delay-ms", "60", "--tokens", "100")
    await llorch.start_node("a", [keeps, changes, goes])
    settings = Settings(llorch)
    kept, changed, gone = (pid_of(settings.runtime, f"{name}-r0") for name in ("keeps", "changes", "goes"))
    load = Load(llorch, 2, "k")
    long = asyncio.create_task(llorch.complete("g", 60))
    await settings.until(lambda pools: pools["goes"]["slots_free"] == 1)
    new = simulated("comes", "new", 1)
    line = await settings.answered(lambda: settings.write(keeps, changes | {"slots": 3}, new), "settings.reloaded")
    assert "changed=pools" in line
    assert await _refused(llorch, "g"), "a pool that goes takes no more"
    assert not long.done() and alive(gone)
    await settings.until(lambda pools: pools["changes"]["slots_free"] == 3 and pools["comes"]["ready"])
    assert (await llorch.complete("new", 2))["text"] == expected_text(2)
    assert (await llorch.complete("c", 2))["text"] == expected_text(2)
    assert pid_of(settings.runtime, "changes-r0") != changed and not alive(changed)
    task = await long
    assert (task["state"], task["text"]) == ("done", expected_text(60))
    await settings.until(lambda pools: "goes" not in pools)
    await eventually(lambda: not alive(gone))
    assert not any("goes-" in name for name in left(settings.runtime))
    await load.more()
    await load.end()
    assert pid_of(settings.runtime, "keeps-r0") == kept


async def _refused(llorch: Cluster, model: str) -> bool:
    status, _ = await llorch.post(
        "/v2/tasks", {"model": model, "prompt": "go", "max_tokens": 1, "queue_timeout_s": 0.1}
    )
    return status != 200


@pytest.mark.slow
async def test_a_change_that_can_not_be_made_whole_is_not_made_at_all(llorch: Cluster) -> None:
    """Broken YAML, an unknown engine, a model that is not there, a certificate that can't be used: each beside a change
    that is good."""
    await llorch.start_control()
    serves, better = simulated("p", "m", 2), simulated("p", "m", 5)
    await llorch.start_node("a", [serves])
    settings = Settings(llorch)
    first = pid_of(settings.runtime, "p-r0")
    later = llorch.folder / "later.gguf"
    absent = {"id": "q", "engine": "llamacpp", "model": f"file:{later}", "slots": 1, "ctx": 256}
    broken = llorch.folder / "ca.pem"
    broken.write_text("no certificate")
    changes: dict[str, Callable[[], object]] = {
        "fault in the settings": lambda: settings.file.write_text("pools: [{id: p, engine"),
        "nonsense": lambda: settings.write(better, {"id": "q", "engine": "nonsense"}),
        "later.gguf": lambda: settings.write(better, absent),
        "ca.pem": lambda: settings.write(better, simulated("r", "r", 1), **{"tls-ca": str(broken)}),
    }
    for words, change in changes.items():
        line = await settings.answered(change, "settings.refused")
        assert "stays in force" in line and words in llorch.nodes["a"].text()
        assert (await pool_of(llorch, pool_id="p"))["slots_total"] == 2
        assert (await llorch.complete("m", 2))["text"] == expected_text(2)
    assert pid_of(settings.runtime, "p-r0") == first and set(await settings.pools()) == {"p"}
    # What was refused for another reason is not taken for settled.
    line = await settings.answered(lambda: settings.write(better, simulated("r", "r", 1)), "settings.reloaded")
    await settings.until(lambda pools: pools["p"]["slots_free"] == 5 and pools.get("r", {}).get("ready"))
    assert not alive(first)


@pytest.mark.slow
async def test_sighup_has_the_settings_read_again_though_no_file_of_theirs_changed(llorch: Cluster) -> None:
    await llorch.start_control()
    serves = simulated("p", "m", 2)
    node = await llorch.start_node("a", [serves])
    settings = Settings(llorch)
    waits = {"id": "q", "engine": "llamacpp", "model": f"file:{llorch.folder}/later.gguf", "slots": 1, "ctx": 256}
    await settings.answered(lambda: settings.write(serves, waits), "settings.refused")
    (llorch.folder / "later.gguf").write_bytes(small())
    line = await settings.answered(lambda: node.process.send_signal(signal.SIGHUP), "settings.reloaded")
    assert "changed=pools" in line
    await settings.until(lambda pools: "q" in pools)
    line = await settings.answered(lambda: node.process.send_signal(signal.SIGHUP), "settings.reloaded")
    assert "changed=nothing" in line
