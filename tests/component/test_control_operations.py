"""What an operator asks of nodes and pools through a control: what reaches the node, what comes back, what is refused,
what is on record; and engines' logs, read and followed."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from llorch import sse
from llorch.cli import operations
from llorch.control import routes_pools, sweep, waiting
from llorch.errors import Code, LlorchError
from tests.component.command_line import CommandLine
from tests.component.control_harness import TOKENS, Asking, a_control, eventually, pool
from tests.component.scripted_operations import operated
from tests.component.test_control_audit import ROOT, of, says

POOL_OPERATIONS = ("drain", "undrain", "load", "unload", "reload", "restart", "purge")
STARTED = "2025-01-02T03:04:05.000Z"
LOGS = "GET /v2/pools/p0/logs"


def running(kind: str, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "state": "running", "started_at": STARTED} | more


def lines(*texts: str, cursor: str = "c1", replica: str = "r0") -> dict[str, Any]:
    return {"lines": [{"replica": replica, "text": text} for text in texts], "cursor": cursor}


def events_of(asking: Asking) -> list[sse.Event]:
    return sse.Decoder().feed(asking.so_far)


async def test_an_operation_on_a_pool_reaches_its_node_and_is_seen_at_once() -> None:
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            for kind in POOL_OPERATIONS:
                at.on(f"POST /v2/pools/p0/{kind}", {"pool": pool(operation=running(kind), loading="b", held=["x: y"])})
                wish = {"deadline_s": 2.5, "reason": "kernel update", "model": "b"}
                status, answer = await control.post(f"/v2/nodes/a/pools/p0/{kind}", wish, who="admin")
                assert (status, answer["node_id"]) == (202, "a")
                assert answer["pool"]["operation"] == running(kind) | {"model": None, "message": None}
                assert at.asked[-1] == (f"POST /v2/pools/p0/{kind}", wish)
                (seen,) = (await control.get("/v2/pools"))["pools"]
                assert (seen["operation"], seen["loading"]) == (answer["pool"]["operation"], "b")
                assert (seen["held"], seen["swappable"]) == (["x: y"], False)


async def test_a_wish_without_a_body_is_an_empty_one() -> None:
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            at.on("POST /v2/pools/p0/drain", {"pool": pool(draining=True)})
            answer = await control.ask("POST", "/v2/nodes/a/pools/p0/drain", who="admin").answer()
            assert (answer.status, answer.json["pool"]["draining"]) == (202, True)
            assert at.asked == [("POST /v2/pools/p0/drain", {})]


async def test_a_node_is_drained_and_takes_tasks_again() -> None:
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            at.on("POST /v2/drain", {"draining": True})
            at.on("POST /v2/undrain", {"draining": False})
            wish = {"deadline_s": 600, "reason": "kernel update"}
            assert await control.post("/v2/nodes/a/drain", wish, who="admin") == (
                202, {"node_id": "a", "draining": True},
            )  # fmt: skip
            assert await control.post("/v2/nodes/a/undrain", {}, who="admin") == (
                202, {"node_id": "a", "draining": False},
            )  # fmt: skip
            assert at.asked == [("POST /v2/drain", wish), ("POST /v2/undrain", {})]


async def test_operations_are_for_admins() -> None:
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            for path in ("/v2/nodes/a/drain", "/v2/nodes/a/pools/p0/reload"):
                assert (await control.post(path, {"model": "b"}, who="alice"))[0] == 403
            assert (await control.ask("GET", "/v2/nodes/a/pools/p0/logs").answer()).status == 403
            assert at.asked == []


async def test_a_wish_that_is_wrong_is_refused_before_the_node_is_asked() -> None:
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            for kind, wish, param in (
                ("reload", {}, "model"),
                ("drain", {"deadline_s": -1}, "deadline_s"),
                ("drain", {"reason": "x" * 257}, "reason"),
                ("load", {"model": 7}, "model"),
            ):
                status, answer = await control.post(f"/v2/nodes/a/pools/p0/{kind}", wish, who="admin")
                assert (status, answer["error"]["param"]) == (400, param)
            for query in ("lines=0", "lines=2001", "lines=x", "after=" + "x" * 4_097):
                answer = await control.ask("GET", f"/v2/nodes/a/pools/p0/logs?{query}", who="admin").answer()
                assert (answer.status, answer.json["error"]["param"]) == (400, query.partition("=")[0])
            assert at.asked == []


async def test_who_is_not_there_is_said_to_be_missing_and_who_is_gone_to_be_lost() -> None:
    async with a_control() as control:
        node = await control.join("a")
        for path, code in (
            ("/v2/nodes/b/drain", "NODE_NOT_FOUND"),
            ("/v2/nodes/b/pools/p0/drain", "NODE_NOT_FOUND"),
            ("/v2/nodes/a/pools/p9/drain", "POOL_NOT_FOUND"),
        ):
            status, answer = await control.post(path, {}, who="admin")
            assert (status, answer["error"]["code"]) == (404, code)
        await node.cut()
        await eventually(lambda: control.control.links.get("a") is None, what="the end of the link")
        status, answer = await control.post("/v2/nodes/a/pools/p0/drain", {}, who="admin")
        assert (status, answer["error"]["code"]) == (502, "NODE_LOST")
        assert "neither a link nor an address" in answer["error"]["message"]
        assert "llorch node rm a" in answer["error"]["hint"]
        control.control.registry.expire(time.monotonic() + 60)
        status, answer = await control.post("/v2/nodes/a/pools/p0/drain", {}, who="admin")
        assert (status, answer["error"]["code"]) == (502, "NODE_LOST")
        assert "node a can't be asked: it is offline" in answer["error"]["message"]


async def test_while_nodes_may_come_back_none_is_said_not_to_exist(tmp_path: Path) -> None:
    async with a_control(recovery_window=60.0, data_dir=str(tmp_path)) as control:
        status, answer = await control.post("/v2/nodes/a/drain", {}, who="admin")
        assert (status, answer["error"]["code"]) == (503, "RECOVERING")


async def test_a_quarantined_node_is_named_so_with_the_way_out() -> None:
    async with a_control() as control:
        node = await control.join("a")
        for _ in range(4):
            node.send(b"\xff" * 64)
            await node.link_ended()
            if control.control.registry.nodes["a"].quarantine is not None:
                break
            await node.join()
        await eventually(lambda: control.control.registry.nodes["a"].quarantine is not None, what="a quarantine")
        status, answer = await control.post("/v2/nodes/a/drain", {}, who="admin")
        assert (status, answer["error"]["code"]) == (409, "NODE_QUARANTINED")
        assert "pardon" in answer["error"]["hint"]


async def test_what_the_node_refuses_is_refused_in_its_words() -> None:
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            at.on("POST /v2/pools/p0/reload", Code.CONFLICT)
            status, answer = await control.post("/v2/nodes/a/pools/p0/reload", {"model": "b"}, who="admin")
            assert (status, answer["error"]["code"], answer["error"]["message"]) == (
                409,
                "CONFLICT",
                "the node says so",
            )


async def test_a_node_without_the_route_is_told_apart_from_one_without_the_pool() -> None:
    async with a_control() as control:
        node = await control.join("a", version="0.0.1")
        await control.dialled("d")
        async with operated(node):
            for where, mend in (("a", "same version"), ("d", "registered without a boot_id")):
                for path in (f"/v2/nodes/{where}/drain", f"/v2/nodes/{where}/pools/p0/drain"):
                    status, answer = await control.post(path, {}, who="admin")
                    assert (status, answer["error"]["code"]) == (409, "CONFLICT")
                    assert "has no such operation" in answer["error"]["message"]
                    assert mend in answer["error"]["hint"]
                answer = (await control.ask("GET", f"/v2/nodes/{where}/pools/p0/logs", who="admin").answer()).json
                assert answer["error"]["code"] == "CONFLICT"


@pytest.mark.parametrize(
    "answered", [b"", b"[]", {"pool": 7}, {"pool": {"slots_total": 1}}, {"pool": pool("p1")}, b"<html>"], ids=repr
)
async def test_an_answer_that_is_none_is_the_nodes_fault_and_changes_nothing(answered: Any) -> None:
    async with a_control() as control:
        node = await control.join("a")
        before = (await control.get("/v2/pools"))["pools"][0]
        async with operated(node) as at:
            at.on("POST /v2/pools/p0/drain", answered)
            status, answer = await control.post("/v2/nodes/a/pools/p0/drain", {}, who="admin")
        assert (status, answer["error"]["code"]) == (502, "NODE_LOST")
        after = (await control.get("/v2/pools"))["pools"]
        assert [{**each, "facts_age_ms": 0} for each in after] == [{**before, "facts_age_ms": 0}]


async def test_a_node_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_control() as control:
        node = await control.join("a")
        real = control.control.nodes.call

        async def call(*given: Any) -> Any:
            return await real(*given, timeout_s=0.1)

        monkeypatch.setattr(control.control.nodes, "call", call)
        async with operated(node) as at:
            at.on("POST /v2/drain", None)
            status, answer = await control.post("/v2/nodes/a/drain", {}, who="admin")
        assert (status, answer["error"]["code"]) == (502, "NODE_LOST")
        assert "did not answer within" in answer["error"]["message"]


async def test_what_a_drained_pool_says_keeps_tasks_away_from_then_on() -> None:
    async with a_control() as control:
        node = await control.join("a", pool(), pool("p1"))
        async with operated(node) as at:
            at.on("POST /v2/pools/p0/drain", {"pool": pool(draining=True, state="draining")})
            await control.post("/v2/nodes/a/pools/p0/drain", {}, who="admin")
            asking = control.submit()
            attempt = await node.asked()
            assert attempt.pool_id == "p1"
            attempt.begin().end()
            await asking.answer()


async def test_slots_that_an_operation_frees_go_to_who_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((waiting, "WAIT_TICK_S"), (sweep, "EXPIRE_EVERY_S")):
        monkeypatch.setattr(module, name, 60.0)  # or they would be found by the clock
    async with a_control() as control:
        node = await control.join("a", pool(slots_free=0))
        asking = control.submit()
        await control.waiting(1)
        async with operated(node) as at:
            at.on("POST /v2/pools/p0/restart", {"pool": pool()})
            await control.post("/v2/nodes/a/pools/p0/restart", {}, who="admin")
            (await node.asked()).begin().end()
            await asking.answer()


# ---------------------------------------------------------------- on record


async def test_who_asked_what_of_which_node_and_pool_is_on_record_and_so_is_a_refusal(tmp_path: Path) -> None:
    async with a_control(data_dir=str(tmp_path)) as control:
        node = await control.join("a")
        async with operated(node) as at:
            at.on("POST /v2/drain", {"draining": True})
            at.on("POST /v2/pools/p0/reload", Code.CONFLICT)
            at.on(LOGS, lines("x"))
            await control.post("/v2/nodes/a/drain", {"deadline_s": 1.5, "reason": "kernel update"}, who="admin")
            ref = "https://user:secret@host/m.gguf?key=secret"
            await control.post("/v2/nodes/a/pools/p0/reload", {"model": ref}, who="admin")
            await control.ask("GET", "/v2/nodes/a/pools/p0/logs", who="admin").answer()
            await control.post("/v2/nodes/a/pools/p9/reload", {"model": ref}, who="admin")  # nobody was asked
    (drained,) = of(tmp_path, "node.operation")
    assert says(drained, **ROOT, scope="admin", decision="allowed", node_id="a", kind="drain")
    assert says(drained, deadline_ms=1_500, why="kernel update")
    (asked,), (refused,) = of(tmp_path, "pool.operation"), of(tmp_path, "pool.operation_refused")
    assert says(asked, **ROOT, node_id="a", pool_id="p0", kind="reload", model="https://host/m.gguf")
    assert says(refused, **ROOT, node_id="a", pool_id="p0", kind="reload", decision="refused", reason="CONFLICT")
    (read,) = of(tmp_path, "pool.logs")
    assert says(read, **ROOT, node_id="a", pool_id="p0", kind="read")


async def test_nothing_is_done_that_can_not_be_put_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_control() as control:
        node = await control.join("a")

        async def full(*_: Any, **__: Any) -> None:
            raise LlorchError(Code.INSUFFICIENT_STORAGE, "the disk is full")

        monkeypatch.setattr(control.control.audit, "require", full)
        async with operated(node) as at:
            at.on("POST /v2/drain", {"draining": True})
            for path in ("/v2/nodes/a/drain", "/v2/nodes/a/pools/p0/unload"):
                assert (await control.post(path, {}, who="admin"))[0] == 507
            assert at.asked == []


# ---------------------------------------------------------------- logs


async def test_the_newest_lines_are_read_or_those_after_a_cursor() -> None:
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            at.on(LOGS, lines("ünï", "two"))
            answer = await control.ask("GET", "/v2/nodes/a/pools/p0/logs", who="admin").answer()
            assert (answer.status, answer.json) == (200, lines("ünï", "two"))
            await control.ask("GET", "/v2/nodes/a/pools/p0/logs?lines=7&after=c%201&follow=0", who="admin").answer()
            assert [what for what, _ in at.asked] == [f"{LOGS}?lines=200", f"{LOGS}?lines=7&after=c+1"]


async def test_a_followed_log_comes_as_events_that_can_be_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_pools, "LOOK_FOR_LINES_EVERY_S", 0.01)
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            at.on(f"{LOGS}?lines=5", lines("one", cursor="c1"))
            for most in (200, 2000):
                at.on(f"{LOGS}?lines={most}&after=c1", lines("two", "three", cursor="c2"))
            at.on(f"{LOGS}?lines=2000&after=c2", lines(cursor="c2"))
            asking = control.ask("GET", "/v2/nodes/a/pools/p0/logs?lines=5&follow=1", who="admin")
            await asking.has(b"three")
            assert [(event.event, event.id, json.loads(event.data)) for event in events_of(asking)] == [
                ("log", "c1", lines("one", cursor="c1")),
                ("log", "c2", lines("two", "three", cursor="c2")),
            ]
            await asking.leave()
            asked = len(at.asked)
            again = control.ask("GET", "/v2/nodes/a/pools/p0/logs?follow", who="admin", headers={"Last-Event-ID": "c1"})
            await again.has(b"three")
            assert at.asked[asked][0] == f"{LOGS}?lines=200&after=c1"
            await again.leave()


async def test_a_quiet_log_is_pinged_and_its_reader_leaving_ends_the_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_pools, "LOOK_FOR_LINES_EVERY_S", 0.01)
    monkeypatch.setattr(routes_pools, "PING_AFTER_S", 0.05)
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            at.on(LOGS, lines())
            asking = control.ask("GET", "/v2/nodes/a/pools/p0/logs?follow=1", who="admin")
            await asking.has(b": ping")
            assert [event.event for event in events_of(asking)] == ["log"]
            await asking.leave()
            followed = control.server._runner.app[routes_pools.FOLLOWED]
            await eventually(lambda: followed.now == 0, within_s=5, what="nobody following")
            await asyncio.sleep(0.05)  # one that was on its way is answered
            asked = len(at.asked)
            await asyncio.sleep(0.05)  # five looks' time
            assert len(at.asked) == asked


async def test_a_node_that_is_lost_ends_a_followed_log_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_pools, "LOOK_FOR_LINES_EVERY_S", 0.01)
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            at.on(LOGS, lines("x"))
            asking = control.ask("GET", "/v2/nodes/a/pools/p0/logs?follow=1", who="admin")
            await asking.has(b'"x"')
            await node.cut()
        answer = await asking.answer()
        last = sse.Decoder().feed(answer.text.encode())[-1]
        assert (last.event, json.loads(last.data)["code"]) == ("error", "NODE_LOST")
        assert not answer.cut


async def test_a_control_that_stops_ends_followed_logs_at_once() -> None:
    async with a_control() as control:
        node = await control.join("a")
        async with operated(node) as at:
            at.on(LOGS, lines("x"))
            asking = control.ask("GET", "/v2/nodes/a/pools/p0/logs?follow=1", who="admin")
            await asking.has(b'"x"')
            control.control.stopping.set()
            answer = await asking.answer()
            assert (answer.status, answer.cut) == (200, False)


async def test_as_many_logs_are_followed_as_may_be() -> None:
    async with a_control() as control:
        node = await control.join("a")
        followed = control.server._runner.app[routes_pools.FOLLOWED]
        followed.now = routes_pools.MAX_FOLLOWED
        async with operated(node) as at:
            at.on(LOGS, lines("x"))
            answer = await control.ask("GET", "/v2/nodes/a/pools/p0/logs?follow=1", who="admin").answer()
            assert (answer.status, answer.code) == (429, "RATE_LIMITED")
            assert (await control.ask("GET", "/v2/nodes/a/pools/p0/logs", who="admin").answer()).status == 200


async def test_while_nodes_may_come_back_one_that_is_looked_at_is_not_said_not_to_exist() -> None:
    async with a_control(recovery_window=60.0) as control:
        answer = await control.ask("GET", "/v2/nodes/a").answer()
        assert (answer.status, answer.code) == (503, "RECOVERING")


# ---------------------------------------------------------------- a command, a control, a node


async def test_a_command_follows_what_the_node_does_to_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(operations, "LOOK_EVERY_S", 0.01)
    line = CommandLine(monkeypatch, tmp_path)
    async with a_control() as control:
        line.env(LLORCH_URL=control.url, LLORCH_TOKEN=TOKENS["admin"])
        node = await control.join("a")
        drain: dict[str, Any] = {"draining": True, "held": ["operator: new disk"]}
        async with operated(node) as at:
            at.on("POST /v2/pools/p0/drain", {"pool": pool(**drain, operation=running("drain"))})
            at.on(LOGS, lines("one", "two"))
            asking = asyncio.create_task(line("pool", "drain", "a/p0", "--reason", "new disk"))
            await eventually(lambda: at.asked, within_s=10, what="the wish at the node")
            assert not asking.done()
            done = pool(slots=0, **drain, operation=running("drain") | {"state": "done"})
            await node.beat(delta=True, pools=[done])
            ran = await asyncio.wait_for(asking, 10)
            assert (ran.code, ran.out, ran.err.splitlines()[-1]) == (0, "", "a/p0: drained")
            assert at.bodies("POST /v2/pools/p0/drain") == [{"reason": "new disk"}]
            assert "draining (operator: new disk)" in (await line("pool", "ls")).out
            assert (await line("logs", "a/p0")).out == "one\ntwo\n"
