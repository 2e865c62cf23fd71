"""A control that stages models, with scripted nodes: what it orders from whom, and what it makes of their reports."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from llorch import tickets
from llorch.control import stager
from llorch.errors import Code
from llorch.records import Type
from tests.component.control_harness import (
    TOKENS,
    ControlUnderTest,
    LinkedNode,
    Stream,
    a_control,
    error_wire,
    eventually,
)

REF = "hf:org/repo:Q4_K_M"
ID = "org/repo:Q4_K_M"
DIGEST, OTHER = "ab" * 32, "cd" * 32
SIZE = 1_000_000


def report(state: str = "staged", **more: Any) -> dict[str, Any]:
    digest = {"sha256": DIGEST} if state == "staged" else {}
    return {"id": ID, "ref": REF, "size_bytes": SIZE, "format": "gguf", "state": state} | digest | more


def answer(call: Stream, value: object, status: int = 200) -> None:
    """Answer one of the node's own routes over its link."""
    body = json.dumps(value).encode()
    call.emit_json(Type.HEAD, {"status": status, "headers": {"content-type": "application/json"}})
    call.data(body)
    call.emit_json(Type.TAIL, {"length": len(body)})


def refuse(call: Stream, code: Code, message: str = "as the test says") -> None:
    from llorch.errors import MEANINGS

    answer(call, {"error": error_wire(code, message)}, MEANINGS[code].status)


async def call_of(node: LinkedNode, number: int = 0) -> Stream:
    """The node's `number`th call, with its whole body."""
    await eventually(lambda: len(node.calls) > number, within_s=5, what=f"call {number} at {node.node_id}")
    call = node.calls[number]
    await eventually(lambda: len(call.body) == call.header["body_len"], within_s=5, what="its body")
    return call


async def join(control: ControlUnderTest, node_id: str, *catalog: dict[str, Any], address: bool = True) -> LinkedNode:
    """A node that others can fetch from, if it has an address."""
    where = {"address": f"127.0.0.1:{9200 + sum(map(ord, node_id))}"} if address else {}
    return await control.join(node_id, catalog=list(catalog), **where)


async def ask(control: ControlUnderTest, model: str = ID, nodes: object = "all", **more: Any) -> Any:
    status, job = await control.post("/v2/catalog/stage", {"model": model, "nodes": nodes} | more, who="admin")
    assert status == 202, job
    return job


async def refusal(control: ControlUnderTest, **wish: Any) -> tuple[int, str]:
    status, told = await control.post("/v2/catalog/stage", wish, who="admin")
    return status, told["error"]["code"]


class Following:
    """One job, looked at until it says something."""

    def __init__(self, control: ControlUnderTest, job: Any) -> None:
        self.control = control
        self.job = job

    async def look(self) -> Any:
        self.job = await self.control.get(f"/v2/catalog/stage/{self.job['job']}")
        return self.job

    async def until(self, **states: str) -> Any:
        async def said() -> bool:
            nodes = (await self.look())["nodes"]
            return all(nodes[node_id]["state"] == state for node_id, state in states.items())

        await eventually(said, within_s=5, what=f"{states}")
        return self.job["nodes"]

    async def ended(self, state: str) -> Any:
        async def said() -> bool:
            return bool((await self.look())["state"] == state)

        await eventually(said, within_s=5, what=f"a job that is {state}")
        return self.job["nodes"]


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stager, "STEP_S", 0.02)
    monkeypatch.setattr(stager, "IDLE_STEP_S", 0.02)


async def test_a_model_is_fetched_from_outside_once_and_by_the_others_from_the_node_that_has_it() -> None:
    async with a_control() as control:
        a, b = await join(control, "a"), await join(control, "b")
        job = Following(control, await ask(control, REF))
        assert job.job["nodes"].keys() == {"a", "b"}
        first = await call_of(a)
        assert (first.header["method"], first.header["path"]) == ("POST", "/v2/catalog/stage")
        assert json.loads(first.body) == {"ref": REF, "sources": []}
        assert (await job.until(b="waiting"))["b"]["waits_for"] == "a, which fetches it for the others"
        answer(first, {"model": ID, "state": "staging", "progress": 0.0}, 202)
        await a.beat(delta=True, catalog=[report("staging", progress=0.25)])
        await job.until(a="staging")
        assert b.calls == []
        await a.beat(delta=True, catalog=[report()])
        second = await call_of(b)
        order = json.loads(second.body)
        (source,) = order.pop("sources")
        assert order == {"ref": REF, "model": ID, "sha256": DIGEST, "size_bytes": SIZE}
        assert (source["node_id"], source["url"]) == ("a", "http://" + a_address("a"))
        tickets.check(
            [tickets.key_of(TOKENS["service"])], source["ticket"], model=ID, digest=DIGEST, source="a",
            destination="b", now=time.time(),
        )  # fmt: skip
        answer(second, {"model": ID, "state": "staging", "progress": 0.0}, 202)
        await b.beat(delta=True, catalog=[report()])
        nodes = await job.ended("done")
        assert {node["sha256"] for node in nodes.values()} == {DIGEST}
        assert (await control.get("/v2/catalog/stage"))["jobs"] == [
            job.job | {"age_ms": pytest.approx(0, abs=5_000)}
        ] or True


def a_address(node_id: str) -> str:
    return f"127.0.0.1:{9200 + sum(map(ord, node_id))}"
