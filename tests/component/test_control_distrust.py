"""A malicious node against a real control: each thing that it may not do is counted, too many shut it out, and nobody
else notices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from llorch import records
from llorch.control import lies
from llorch.control.strikes import Offence
from llorch.errors import Code
from llorch.records import MAX_PAYLOAD_BYTES, Type
from tests.component.control_harness import (
    WINDOW,
    ControlUnderTest,
    LinkedNode,
    a_control,
    eventually,
    lost_soon,
    pool,
)

Offend = Callable[[LinkedNode, int], None]  # with the id of a stream on which a task has begun


def _raw(kind: int, payload: bytes = b"") -> Offend:
    return lambda node, stream: node.send(records.encode(stream, kind, payload))


def _json(kind: int, value: object) -> Offend:
    return lambda node, stream: node.send(records.encode_json(stream, kind, value))


OFFENCES: list[tuple[Offence, Offend]] = [
    (Offence.MALFORMED_RECORD, lambda node, _: node.send(records.HEADER.pack(1, Type.DATA, MAX_PAYLOAD_BYTES + 1))),
    (Offence.MALFORMED_RECORD, _raw(Type.TAIL, b"{")),
    (Offence.MALFORMED_RECORD, _raw(Type.REFUSE, b"\xff")),
    (Offence.MALFORMED_RECORD, _raw(Type.CREDIT, b"xyz")),
    (Offence.MALFORMED_RECORD, _json(Type.TAIL, {"length": -1})),
    (Offence.MALFORMED_RECORD, _json(Type.TAIL, {"length": 0, "timings": {"ttft_ms": 1e300}})),
    (
        Offence.MALFORMED_RECORD,
        _raw(Type.TAIL, b'{"length": 9, "error": {"code": "ENGINE_FAILED", "message": "x", "details": {"n": NaN}}}'),
    ),
    (Offence.MALFORMED_RECORD, _json(Type.OPEN, {})),
    (Offence.MALFORMED_RECORD, _raw(Type.CANCEL)),
    (Offence.FOREIGN_STREAM, lambda node, stream: node.send(records.encode(stream + 2, Type.DATA, b"x"))),
    (Offence.FOREIGN_STREAM, lambda node, _: node.send(records.encode(2, Type.ACCEPT))),
    (Offence.FOREIGN_STREAM, lambda node, _: node.send(records.encode(0, Type.TAIL, b"{}"))),
    (Offence.CREDIT_OVERRUN, lambda node, stream: node.send(records.encode(stream, Type.DATA, b"x" * 60_000) * 5)),
    (Offence.OUT_OF_ORDER, _json(Type.HEAD, {"status": 200, "headers": {}})),
    (Offence.OUT_OF_ORDER, _raw(Type.ACCEPT)),
    (Offence.OUT_OF_ORDER, _json(Type.TAIL, {"length": 1_000_000})),
    (Offence.OUT_OF_ORDER, _json(Type.TAIL, {"length": 0})),
]


async def shown(control: ControlUnderTest, node_id: str = "bad") -> dict[str, object]:
    seen: dict[str, object] = await control.get(f"/v2/nodes/{node_id}")
    return seen


async def strikes(control: ControlUnderTest, offence: Offence) -> float:
    return await control.metric("llorch_node_strikes_total", kind=offence.value)


async def offend(control: ControlUnderTest, node: LinkedNode, act: Offend) -> None:
    """The node begins an answer, and then does what it may not."""
    asking = control.chat(headers={"X-Llorch-Pin": node.node_id})
    attempt = (await node.asked()).accept().head().data(b"data: 1\n\n")
    await asking.has(b"data: 1")
    act(node, attempt.id)
    await node.link_ended()
    await asking.leave()


async def shut_out(control: ControlUnderTest, node: LinkedNode, times: int = 3) -> None:
    for number in range(times):
        if number:
            await node.join()
        node.send(records.encode(2, Type.ACCEPT))
        await node.link_ended()
    await eventually(lambda: control.control.registry.nodes[node.node_id].quarantine is not None, within_s=2)


@pytest.mark.parametrize(
    ("offence", "act"), OFFENCES, ids=[f"{offence}-{number}" for number, (offence, _) in enumerate(OFFENCES)]
)
async def test_each_breach_of_the_protocol_ends_the_link_and_is_counted(offence: Offence, act: Offend) -> None:
    async with a_control() as control:
        bad, good = await control.join("bad"), await control.join("good")
        other = control.whole(placement={"pin": "good"})
        working = (await good.asked()).begin().say("all ")
        await offend(control, bad, act)
        assert await strikes(control, offence) == 1
        assert sum([await strikes(control, each) for each in Offence]) == 1
        seen = await shown(control)
        assert (seen["online"], seen["reachable"], seen["quarantine"]) == (True, False, None)
        assert (await bad.beat(pools=[pool()]))[0] == 200
        working.say("well").end()
        assert (await other.answer()).json["text"] == "all well"
        assert good.up


async def test_whoever_offends_again_and_again_is_shut_out_and_its_tasks_run_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost_soon(monkeypatch, after_s=5.0)
    async with a_control() as control:
        bad = await control.join("bad", pool(slots=8))
        begun, waiting = control.submit(), control.whole()
        (await bad.asked()).begin().say("half")
        (await bad.asked()).accept()
        await begun.has(b"half")
        good = await control.join("good")
        for _ in range(2):
            bad.send(records.encode(2, Type.ACCEPT))
            await bad.link_ended()
            await bad.join()
        bad.send(records.encode(2, Type.ACCEPT))
        started = asyncio.get_running_loop().time()
        answer = await begun.answer()
        assert (answer.terminals, answer.events[-1][1]["code"]) == (["error"], "NODE_LOST")
        assert asyncio.get_running_loop().time() - started < 2.0, "it was waited for"
        (await good.asked()).begin().say("whole").end()
        assert (await waiting.answer()).json["text"] == "whole"
        await control.idle()
        assert "node.quarantined node_id=bad" in caplog.text
        assert caplog.text.count("storm.began") == 0


async def test_a_quarantine_is_shown_with_its_reason_wherever_one_looks() -> None:
    async with a_control() as control:
        bad = await control.join("bad")
        await shut_out(control, bad)
        seen = await shown(control)
        reason = "records on streams that were never opened (3)"
        assert (seen["state"], seen["online"], seen["reachable"]) == ("quarantined", False, False)
        assert (seen["quarantine"]["reason"], seen["pools"][0]["quarantined"]) == (reason, reason)  # type: ignore[index]
        assert 50_000 < seen["quarantine"]["left_ms"] <= 60_000  # type: ignore[index]
        (listed,) = (await control.get("/v2/pools"))["pools"]
        assert (listed["node_state"], listed["quarantined"], listed["bound"]) == ("quarantined", reason, False)
        _, placement = await control.post("/v2/placement", {"model": "m", "prompt": "x"})
        (verdict,) = placement["pools"]
        assert (verdict["code"], verdict["reason"]) == ("quarantined", f"its node is quarantined for {reason}")
        assert await control.metric("llorch_nodes", state="quarantined") == 1
        assert (await control.ask("GET", "/v1/models").answer()).json["data"] == []


async def test_a_quarantined_node_is_refused_in_every_way_until_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with a_control() as control:
        bad = await control.join("bad")
        await shut_out(control, bad)
        answer = await control.ask(
            "POST", "/v2/nodes/register", who="node", json={"node_id": "bad", "boot_id": "new"}
        ).answer()
        assert (answer.status, answer.code) == (409, "NODE_QUARANTINED")
        assert 50 < int(answer.headers["Retry-After"]) <= 60
        assert (await bad.beat(pools=[pool()]))[1]["error"]["code"] == "NODE_QUARANTINED"
        assert (await bad.open_link())[0] == 409
        assert (await control.ask("DELETE", "/v2/nodes/bad", who="node").answer()).code == "NODE_QUARANTINED"
        assert (await shown(control))["state"] == "quarantined"
        # Half a day later, by the control's clock.
        clock = control.control.distrust._clock
        monkeypatch.setattr(control.control.distrust, "_clock", lambda: clock() + 43_200.0)
        assert (await bad.beat(pools=[pool()]))[1]["error"]["code"] == "NODE_UNKNOWN"
        await bad.join()
        seen = await shown(control)
        assert (seen["quarantine"], seen["reachable"]) == (None, True)
        task = control.whole()
        (await bad.asked()).begin().say("better").end()
        assert (await task.answer()).json["text"] == "better"


async def test_an_admin_may_pardon_a_node_and_nobody_else() -> None:
    async with a_control() as control:
        bad = await control.join("bad")
        await shut_out(control, bad)
        for who in ("alice", "node"):
            assert (await control.ask("POST", "/v2/nodes/bad/pardon", who=who).answer()).code == "FORBIDDEN"
        status, answer = await control.post("/v2/nodes/bad/pardon", {}, who="admin")
        assert (status, answer["was_quarantined"]) == (200, True)
        assert (await shown(control))["state"] == "offline"
        await bad.join()
        assert (await control.post("/v2/nodes/bad/pardon", {}, who="admin"))[1]["was_quarantined"] is False
        assert (await control.post("/v2/nodes/x/pardon", {}, who="admin"))[1]["error"]["code"] == "NODE_NOT_FOUND"


async def test_a_dialled_node_is_struck_and_what_is_read_from_it_ends() -> None:
    async with a_control(probe_interval=0.05) as control:
        bad = await control.dialled("bad")
        begun = control.chat()
        running = (await bad.asked()).accept().head().data(b"data: 1\n\n")
        await begun.has(b"data: 1")
        asking = control.chat()
        for number in range(3):  # its task comes back each time, once the node has answered a probe
            assert await strikes(control, Offence.OUT_OF_ORDER) == number
            (await bad.asked()).accept().emit(Type.DATA, b"before its HEAD")
        await eventually(lambda: control.control.registry.nodes["bad"].quarantine is not None, within_s=5)
        await asking.leave()
        assert await strikes(control, Offence.OUT_OF_ORDER) == 3
        assert b"NODE_LOST" in (await begun.answer()).raw
        await asyncio.wait_for(running.gone.wait(), 5)
        assert control.control.registry.address_of("bad") is None


async def test_a_gateway_that_answers_in_a_nodes_place_is_not_the_nodes_fault() -> None:
    async with a_control(probe_interval=600.0) as control:
        node = await control.dialled("h")
        asking = control.chat()
        attempt = await node.asked()
        attempt.content_type = "text/html"
        attempt.script.put_nowait(b"<html>this is no record at all</html>")
        await control.waiting(1)
        assert len(control.control.distrust.strikes) == 0
        await asking.leave()


# ---------------------------------------------------------------- lies


async def test_a_node_that_reports_more_free_slots_than_it_has_is_struck_once_for_each_report() -> None:
    async with a_control() as control:
        bad = await control.join("bad")
        impossible = [pool(name, slots=2, slots_free=3) for name in ("p0", "p1", "p2")]
        for number in range(4):
            assert await strikes(control, Offence.FALSE_SLOTS) == number
            await bad.beat(pools=impossible)
        await bad.link_ended()
        assert (await shown(control))["state"] == "quarantined"


async def test_a_beat_without_a_lease_may_be_anybodys_and_proves_nothing() -> None:
    async with a_control(probe_interval=600.0) as control:
        await control.dialled("h")
        for _ in range(5):
            body = {"pools": [pool(slots=1, slots_free=9)]}
            assert (await control.post("/v2/nodes/h/heartbeat", body, who="node"))[0] == 200
        assert len(control.control.distrust.strikes) == 0


async def test_a_node_that_says_busy_while_it_reports_free_slots_is_struck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lies, "REFUSALS", 4)
    monkeypatch.setattr(lies, "REFUSING_S", 0.0)
    async with a_control() as control:
        bad = await control.join("bad", pool(slots=1))
        asking = control.whole()
        for _ in range(lies.REFUSING_REPORTS):
            (await bad.asked()).refuse(Code.ALL_SLOTS_BUSY)
            await control.waiting(1)
            assert await strikes(control, Offence.FALSE_SLOTS) == 0
            await bad.beat(pools=[pool(slots=1)])
        assert await strikes(control, Offence.FALSE_SLOTS) == 1
        for _ in range(lies.REFUSING_REPORTS):  # another control's tasks are in its reports: no lie
            (await bad.asked()).refuse(Code.ALL_SLOTS_BUSY)
            await control.waiting(1)
            other = {"task_id": "0" * 8 + "-0000-0000-0000-" + "5" * 12, "pool_id": "p0", "epoch": "another"}
            await bad.beat(pools=[pool(slots=1)], tasks=[other])
        assert await strikes(control, Offence.FALSE_SLOTS) == 1
        (await bad.asked()).begin().say("at last").end()
        assert (await asking.answer()).json["text"] == "at last"


async def test_a_node_that_names_tasks_which_were_given_to_another_is_struck_and_the_task_goes_on() -> None:
    async with a_control() as control:
        good = await control.join("good")
        asking = control.submit()
        attempt = (await good.asked()).begin().say("mine")
        await asking.has(b"mine")
        bad = await control.join("bad", pool(model="other"))
        stolen = {"task_id": attempt.task_id, "owner": "alice", "pool_id": "p0", "epoch": bad.epoch, "state": "sealed"}
        await bad.beat(tasks=[stolen | {"attempt": 1}, stolen | {"attempt": 2}])
        assert await strikes(control, Offence.FOREIGN_TASK) == 1
        await good.beat(tasks=[stolen | {"attempt": 1, "state": "running"}], pools=[pool()])
        assert await strikes(control, Offence.FOREIGN_TASK) == 1
        for _ in range(2):
            await bad.beat(tasks=[stolen | {"attempt": 7}])
        assert (await shown(control))["state"] == "quarantined"
        attempt.end()
        answer = await asking.answer()
        assert (answer.said, answer.terminals) == ("mine", ["end"])


# ---------------------------------------------------------------- floods


async def test_a_node_can_not_pile_up_records_for_a_client_that_does_not_read() -> None:
    """What is not bounded by credit comes once on each stream: a second one ends the link."""
    async with a_control() as control:
        bad = await control.join("bad")
        asking = control.chat()
        attempt = (await bad.asked()).accept().head()
        attempt.data(b"x" * WINDOW)
        big = {"status": 200, "headers": {f"h{number}": "v" * 900 for number in range(60)}}
        for _ in range(50):
            attempt.emit_json(Type.HEAD, big)
        await bad.link_ended()
        assert await strikes(control, Offence.OUT_OF_ORDER) == 1
        await asking.leave()


async def test_names_without_end_are_no_labels_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.control.metrics.MOST_NODE_LABELS", 3)
    async with a_control() as control:
        for number in range(6):
            node = control.node(f"n{number}")
            await node.register(pool())
            await node.beat(pools=[pool()])
            await control.ask("DELETE", f"/v2/nodes/n{number}", who="node").answer()
        text = (await control.ask("GET", "/metrics").answer()).text
        named = {line for line in text.splitlines() if line.startswith("llorch_heartbeats_total{")}
        assert len(named) == 3
