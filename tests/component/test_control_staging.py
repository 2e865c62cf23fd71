"""A control that stages models, with scripted nodes: what it orders from whom, and what it makes of their reports."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web as aioweb

from llorch import tickets
from llorch.control import stager
from llorch.errors import MEANINGS, Code, LlorchError
from llorch.records import Type
from tests.component.control_harness import (
    TOKENS,
    ControlUnderTest,
    DialledNode,
    LinkedNode,
    Stream,
    a_control,
    error_wire,
    eventually,
)
from tests.component.test_control_audit import of, says

REF = "hf:org/repo:Q4_K_M"
ID = "org/repo:Q4_K_M"
DIGEST, OTHER = "ab" * 32, "cd" * 32
SIZE = 1_000_000
ADDRESSES = {"a": "127.0.0.1:9201", "b": "127.0.0.1:9202"}  # nobody calls there: both have links


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
    answer(call, {"error": error_wire(code, message)}, MEANINGS[code].status)


async def call_of(node: LinkedNode, number: int = 0) -> Stream:
    """The node's `number`th call, with its whole body."""
    await eventually(lambda: len(node.calls) > number, within_s=5, what=f"call {number} at {node.node_id}")
    call = node.calls[number]
    await eventually(lambda: len(call.body) == call.header["body_len"], within_s=5, what="its body")
    return call


async def join(control: ControlUnderTest, node_id: str, *catalog: dict[str, Any], address: bool = True) -> LinkedNode:
    """A node that others can fetch from, if it has an address."""
    where = {"address": ADDRESSES[node_id]} if address else {}
    return await control.join(node_id, catalog=list(catalog), **where)


async def ask(control: ControlUnderTest, model: str = ID, nodes: object = "all", **more: Any) -> Any:
    status, job = await control.post("/v2/catalog/stage", {"model": model, "nodes": nodes} | more, who="admin")
    assert status == 202, job
    return job


async def refusal(control: ControlUnderTest, **wish: Any) -> tuple[int, str]:
    status, told = await control.post("/v2/catalog/stage", wish, who="admin")
    return status, told["error"]["code"]


class DiallingNode(DialledNode):
    """One without a link that can stage."""

    def __init__(self, cluster: ControlUnderTest, node_id: str) -> None:
        super().__init__(cluster, node_id)
        self.staged: list[Any] = []

    def routes(self, server: aioweb.Application) -> None:
        server.router.add_post("/v2/catalog/stage", self._stage)

    async def _stage(self, request: aioweb.Request) -> aioweb.StreamResponse:
        self.staged.append(await request.json())
        return aioweb.json_response({"model": "demo", "state": "staged", "progress": 1.0}, status=202)


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
        await job.until(a="staging")
        await a.beat(delta=True, catalog=[report("staging", progress=0.25)])

        async def moved() -> bool:
            return bool((await job.look())["nodes"]["a"]["bytes_done"] == SIZE // 4)

        await eventually(moved, within_s=5, what="a quarter of it")
        assert b.calls == []
        await a.beat(delta=True, catalog=[report()])
        second = await call_of(b)
        order = json.loads(second.body)
        (source,) = order.pop("sources")
        assert order == {"ref": REF, "model": ID, "sha256": DIGEST, "size_bytes": SIZE}
        assert (source["node_id"], source["url"]) == ("a", f"http://{ADDRESSES['a']}")
        tickets.check(
            [tickets.key_of(TOKENS["service"])], source["ticket"], model=ID, digest=DIGEST, source="a",
            destination="b", now=time.time(),
        )  # fmt: skip
        answer(second, {"model": ID, "state": "staging", "progress": 0.0}, 202)
        await b.beat(delta=True, catalog=[report()])
        nodes = await job.ended("done")
        assert {node["sha256"] for node in nodes.values()} == {DIGEST}
        (listed,) = (await control.get("/v2/catalog/stage"))["jobs"]
        assert (listed["job"], listed["state"], listed["model"]) == (job.job["job"], "done", ID)


async def test_a_node_without_a_link_is_asked_by_http() -> None:
    async with a_control() as control:
        node = await DiallingNode(control, "d").start()
        try:
            await node.join()
            job = Following(control, await ask(control, "demo", ["d"]))
            await job.ended("done")
            assert node.staged == [{"ref": "demo", "sources": []}]
        finally:
            await node.close()


async def test_what_a_node_refuses_or_fails_with_is_told_with_what_mends_it() -> None:
    async with a_control() as control:
        a, b = await join(control, "a", address=False), await join(control, "b", address=False)
        job = Following(control, await ask(control, REF))
        refuse(await call_of(a), Code.INSUFFICIENT_STORAGE, "it needs 5 GiB, and 2 are free")
        answer(await call_of(b), {"model": ID, "state": "staging"}, 202)
        await b.beat(delta=True, catalog=[report("failed", error="MODEL_NOT_AVAILABLE: the origin answered 404")])
        nodes = await job.ended("failed")
        assert (nodes["a"]["error"]["code"], nodes["a"]["error"]["retriable"]) == ("INSUFFICIENT_STORAGE", True)
        assert nodes["a"]["error"]["message"] == "it needs 5 GiB, and 2 are free"
        assert nodes["b"]["error"]["message"] == "the origin answered 404"
        assert nodes["b"]["error"]["hint"]


async def test_a_node_that_is_lost_and_comes_back_is_asked_again_and_goes_on() -> None:
    async with a_control() as control:
        a = await join(control, "a")
        job = Following(control, await ask(control, REF))
        answer(await call_of(a), {"model": ID, "state": "staging"}, 202)
        await a.beat(delta=True, catalog=[report("staging", progress=0.5)])
        await job.until(a="staging")
        await a.cut()
        again = await join(control, "a", report("staging", progress=0.5))
        answer(await call_of(again), {"model": ID, "state": "staging", "progress": 0.5}, 202)
        await again.beat(delta=True, catalog=[report()])
        await job.ended("done")


async def test_offline_nodes_are_passed_over_by_all_and_the_job_says_so() -> None:
    async with a_control() as control:
        await join(control, "a", report())
        b = await join(control, "b")
        control.control.registry.nodes["b"].online = False
        await b.cut()
        job = await ask(control, ID)
        assert (job["state"], job["offline"], job["nodes"]["b"]["state"]) == ("done", ["b"], "offline")


async def test_wishes_that_can_not_be_granted_are_refused_with_their_code_and_nobody_is_asked() -> None:
    async with a_control() as control:
        a = await join(control, "a", report(id="m", ref="file:/x.gguf"))
        await join(control, "b", report(id="m", ref="file:/x.gguf", sha256=OTHER))
        for wish, told in (
            ({"model": "nothing"}, (404, "MODEL_NOT_FOUND")),
            ({"model": REF, "nodes": ["a", "nobody"]}, (404, "NODE_NOT_FOUND")),
            ({"model": "m"}, (409, "CONFLICT")),
            ({"model": REF, "from": "nobody"}, (404, "NODE_NOT_FOUND")),
            ({"model": "a/../b"}, (400, "INVALID_REQUEST")),
            ({"model": "file:/x\u0000"}, (400, "INVALID_REQUEST")),
            ({"model": "-x"}, (400, "INVALID_REQUEST")),
            ({}, (400, "INVALID_REQUEST")),
        ):
            assert await refusal(control, **wish) == told, wish
        assert a.calls == []
        status, told = await control.post("/v2/catalog/stage", {"model": REF})
        assert (status, told["error"]["code"]) == (403, "FORBIDDEN")
        gone = await control.ask("GET", "/v2/catalog/stage/stage-0", who="admin").answer()
        assert (gone.status, gone.code) == (404, "NOT_FOUND")
        assert "llorch model ls" in gone.json["error"]["hint"]


async def test_a_control_that_has_just_started_says_so_of_what_may_still_turn_up(tmp_path: Path) -> None:
    (tmp_path / "nodes.json").write_text(json.dumps({"nodes": ["a", "b"]}))
    async with a_control(data_dir=str(tmp_path), recovery_window=60.0) as control:
        await join(control, "a")
        for wish in ({"model": REF}, {"model": "m", "nodes": ["a"]}, {"model": REF, "nodes": ["b"]}):
            assert (await refusal(control, **wish))[1] == "RECOVERING", wish
        await join(control, "b")
        assert (await refusal(control, model="m"))[1] == "MODEL_NOT_FOUND"


async def test_two_contents_under_one_id_are_an_event_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    def told(word: str) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.getMessage().startswith(word)]

    async with a_control() as control:
        await join(control, "a", report())
        b = await join(control, "b", report(sha256=OTHER))
        await eventually(lambda: bool(told("model.conflict ")), within_s=5, what="the event")
        (line,) = told("model.conflict ")
        assert f"model={ID}" in line and DIGEST[:12] in line and OTHER[:12] in line and "on b" in line
        entry = (await control.get("/v2/catalog"))["models"][ID]
        assert (entry["conflict"], entry["sha256"]) == (True, None)
        assert entry["digests"] == {DIGEST: ["a"], OTHER: ["b"]}
        await b.beat(delta=True, catalog=[{"id": ID, "gone": True}])
        await eventually(lambda: bool(told("model.conflict_ended")), within_s=5, what="its end")
        assert not (await control.get("/v2/catalog"))["models"][ID]["conflict"]


@pytest.mark.parametrize("path", [quote(ID, safe=""), ID])
async def test_a_model_is_removed_from_a_node_whether_or_not_its_id_is_one_segment_of_the_path(path: str) -> None:
    async with a_control() as control:
        a = await join(control, "a", report())
        asking = control.ask("DELETE", f"/v2/catalog/a/{path}?retire=true", who="admin")
        call = await call_of(a)
        assert (call.header["method"], call.header["path"]) == (
            "DELETE", "/v2/catalog/org%2Frepo%3AQ4_K_M?retire=true",
        )  # fmt: skip
        answer(call, {"model": ID, "state": "retired"})
        answered = await asking.answer()
        assert (answered.status, answered.json) == (202, {"model": ID, "state": "retired"})


async def test_what_can_not_be_removed_is_refused_as_the_node_refuses_it() -> None:
    async with a_control() as control:
        a = await join(control, "a", report())
        asking = control.ask("DELETE", f"/v2/catalog/a/{quote(ID, safe='')}", who="admin")
        refuse(await call_of(a), Code.CONFLICT, "a pool uses it")
        assert ((await asking.answer()).status, (await asking.answer()).code) == (409, "CONFLICT")
        for path, code in (
            (f"nobody/{ID}", "NODE_NOT_FOUND"), ("a/x%20y", "INVALID_REQUEST"), (f"a/{ID}?retire=1", "INVALID_REQUEST"),
        ):  # fmt: skip
            assert (await control.ask("DELETE", f"/v2/catalog/{path}", who="admin").answer()).code == code


async def test_a_model_that_is_removed_while_it_is_staged_is_not_asked_for_again() -> None:
    async with a_control() as control:
        a = await join(control, "a")
        job = Following(control, await ask(control, REF))
        answer(await call_of(a), {"model": ID, "state": "staging"}, 202)
        await job.until(a="staging")
        asking = control.ask("DELETE", f"/v2/catalog/a/{quote(ID, safe='')}", who="admin")
        answer(await call_of(a, 1), {"model": ID, "state": "removed"})
        assert (await asking.answer()).status == 202
        assert (await job.ended("failed"))["a"]["error"]["code"] == "CANCELED"


async def test_models_are_read_again_one_after_the_other_on_each_node_and_told_one_by_one() -> None:
    async with a_control() as control:
        a = await join(control, "a", report(id="m"), report(id="x"))
        b = await join(control, "b", report(id="m"))
        status, job = await control.post("/v2/catalog/verify", {}, who="admin")
        assert (status, job["state"], len(job["checks"])) == (202, "running", 3)
        first = await call_of(a)
        assert (first.header["method"], first.header["path"]) == ("POST", "/v2/catalog/m/verify")
        refuse(await call_of(b), Code.CONFLICT, "it is being staged")
        answer(first, {"model": "m", "ok": True, "sha256": DIGEST})
        answer(await call_of(a, 1), {"model": "x", "ok": False, "sha256": OTHER})
        said: dict[str, Any] = {}

        async def ended() -> bool:
            said.update(await control.get(f"/v2/catalog/verify/{job['job']}"))
            return bool(said["state"] != "running")

        await eventually(ended, within_s=5, what="the end of the verification")
        assert said["state"] == "failed"
        states = {(check["node_id"], check["model"]): check["state"] for check in said["checks"]}
        assert states == {("a", "m"): "ok", ("a", "x"): "failed", ("b", "m"): "failed"}


async def test_what_admins_do_with_models_is_on_record_without_what_a_url_is_signed_with(tmp_path: Path) -> None:
    async with a_control(data_dir=str(tmp_path)) as control:
        a = await join(control, "a", report(id="m"))
        await ask(control, "https://host/x.gguf?sig=secret", ["a"])
        await control.post("/v2/catalog/verify", {"model": "m"}, who="admin")
        answer(await call_of(a, 1), {"model": "m", "ok": True})
        asking = control.ask("DELETE", "/v2/catalog/a/m", who="admin")
        answer(await call_of(a, 2), {})
        await asking.answer()
    (staged,) = of(tmp_path, "model.stage")
    assert says(staged, principal="root", scope="admin", model="https://host/x.gguf", nodes="a", decision="allowed")
    assert says(of(tmp_path, "model.verify")[0], principal="root", model="m", nodes="all")
    assert says(of(tmp_path, "model.remove")[0], principal="root", model="m", nodes="a")


async def test_a_source_with_a_certificate_checks_tickets_with_the_key_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_control() as control:
        _, b = await join(control, "a", report()), await join(control, "b")
        for node in control.control.registry.nodes.values():
            node.certified = True
        trust = SimpleNamespace(ticket_key="the cluster's")
        monkeypatch.setattr(control.control.access, "authority", SimpleNamespace(trust=trust))
        await ask(control, ID, ["b"])
        (source,) = json.loads((await call_of(b)).body)["sources"]
        wanted: Any = {"model": ID, "digest": DIGEST, "source": "a", "destination": "b", "now": time.time()}
        tickets.check(["the cluster's"], source["ticket"], **wanted)
        with pytest.raises(LlorchError):
            tickets.check([tickets.key_of(TOKENS["service"])], source["ticket"], **wanted)
        monkeypatch.setattr(control.control.access, "authority", None)
