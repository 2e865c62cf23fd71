"""A control that has just started: nothing is said not to exist, and nothing is run twice, until its nodes are back."""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.component.control_harness import (
    Asking,
    ControlUnderTest,
    LinkedNode,
    a_control,
    eventually,
    look_often,
    no_answer_soon,
    pool,
)
from tests.component.test_control_idempotency import DIGEST, KEY, keyed

TASK = str(uuid.uuid4())


def remembering(folder: Path, *nodes: str) -> dict[str, Any]:
    """Settings of a control that knew these nodes before."""
    (folder / "nodes.json").write_text(json.dumps({"nodes": list(nodes)}))
    return {"data_dir": str(folder), "recovery_window": 60.0}


def report(**more: Any) -> dict[str, Any]:
    return {
        "task_id": TASK, "attempt": 1, "owner": "alice", "path": "native", "state": "running", "pool_id": "p0",
        "model": "m", "offset": 10,
    } | more  # fmt: skip


async def _answers(control: ControlUnderTest) -> dict[str, tuple[int, str]]:
    asked = {
        "task": control.ask("GET", f"/v2/tasks/{TASK}"),
        "events": control.events(TASK),
        "cancel": control.ask("DELETE", f"/v2/tasks/{TASK}"),
        "key": keyed(control, "native"),
        "v1 key": keyed(control, "v1"),
        "task_id": control.submit(task_id=TASK),
    }
    found = {}
    for name, asking in asked.items():
        answer = await asking.answer()
        found[name] = (answer.status, answer.code)
        if answer.status == 503:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json["error"]["retriable"] is True
    return found


async def test_unknown_tasks_and_replayed_keys_are_told_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_answer_soon(monkeypatch)
    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        await control.join("b")
        assert set((await _answers(control)).values()) == {(503, "RECOVERING")}
        await control.join("a")  # and with it, all are back
        answer = await control.ask("GET", f"/v2/tasks/{TASK}").answer()
        assert (answer.status, answer.code) == (404, "TASK_NOT_FOUND")


async def test_a_first_try_is_no_replay_and_runs_at_once(tmp_path: Path) -> None:
    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        node = await control.join("b")
        headers = {"Idempotency-Key": "new", "X-Llorch-Try": "1"}
        asking = control.ask("POST", "/v2/tasks", json={"model": "m", "prompt": "x"}, headers=headers)
        (await node.asked()).begin().say("hi").end()
        assert (await asking.answer()).said == "hi"


async def test_the_window_ends_by_itself(tmp_path: Path) -> None:
    settings = remembering(tmp_path, "gone") | {"recovery_window": 1.0}
    async with a_control(**settings) as control:
        assert (await control.ask("GET", f"/v2/tasks/{TASK}").answer()).code == "RECOVERING"

        async def over() -> bool:
            return bool((await control.ask("GET", f"/v2/tasks/{TASK}").answer()).code == "TASK_NOT_FOUND")

        await eventually(over, within_s=5)


@pytest.mark.parametrize(("nodes", "code"), [((), "TASK_NOT_FOUND"), (None, "RECOVERING"), ("torn", "RECOVERING")])
async def test_with_no_node_remembered_there_is_nobody_to_wait_for(
    nodes: tuple[()] | str | None, code: str, tmp_path: Path
) -> None:
    settings = remembering(tmp_path)
    if nodes is None:
        (tmp_path / "nodes.json").unlink()  # a disk that is new each time, for all it knows
    elif nodes == "torn":
        (tmp_path / "nodes.json").write_text('{"nodes": ["a"')
    async with a_control(**settings) as control:
        assert (await control.ask("GET", f"/v2/tasks/{TASK}").answer()).code == code


async def it_says_that_it_is_done(node: LinkedNode, calls: int) -> None:
    """The node's answer to so many calls that ask it for the task."""
    await eventually(lambda: len(node.calls) == calls)
    call = node.calls[-1].accept().head("application/json")
    call.data(json.dumps(report(state="sealed", finish_reason="stop")).encode()).tail()


async def test_a_task_of_before_is_found_by_its_id_and_by_its_key_once_its_node_is_back(tmp_path: Path) -> None:
    async with a_control(**remembering(tmp_path, "a")) as control:
        body = json.dumps({"model": "m", "prompt": "Hello"})
        digest = hashlib.sha256(body.encode()).hexdigest()
        node = await control.join("a", tasks=[report(key_digest=DIGEST, body_digest=digest)])
        assert (await control.task(TASK))["state"] == "streaming"
        headers = {"Idempotency-Key": KEY}
        asking = control.ask("POST", "/v2/tasks", data=body, headers=headers)
        reader = await node.reader()
        assert reader.header == {"task_id": TASK, "offset": 0, "attempt": 1}
        reader.accept().head().say("from before").end()
        answer = await asking.answer()
        assert (answer.said, answer.headers["Idempotency-Replayed"]) == ("from before", "true")
        # Its node sent the TAIL, so it will not report the task again: this control has to know of it by itself.
        await node.beat(tasks=[])
        again = control.ask("POST", "/v2/tasks", data=body, headers=headers)
        await it_says_that_it_is_done(node, 1)
        second = await node.reader(1)
        second.accept().head().data(reader.log)
        second.tail(finish_reason="stop")
        assert (await again.answer()).said == "from before"
        asking = control.ask("POST", "/v2/tasks", data=body + " ", headers=headers)
        await it_says_that_it_is_done(node, 2)
        other = await asking.answer()
        assert (other.status, other.code) == (422, "IDEMPOTENCY_MISMATCH")
        assert node.opened == []


async def test_a_task_whose_end_its_reader_left_unread_is_known_though_its_node_reports_it_no_more(
    tmp_path: Path,
) -> None:
    async with a_control(**remembering(tmp_path, "a")) as control:
        body = json.dumps({"model": "m", "prompt": "Hello"})
        digest = hashlib.sha256(body.encode()).hexdigest()
        node = await control.join("a", tasks=[report(key_digest=DIGEST, body_digest=digest)])
        headers = {"Idempotency-Key": KEY}
        asking = control.ask("POST", "/v2/tasks", data=body, headers=headers)
        reader = (await node.reader()).accept().head().say("from before")
        await asking.has(b"from before")
        await asking.leave()  # as the node sends its TAIL, which it takes for having told of the end
        await eventually(lambda: reader.detached == "left")
        await node.beat(tasks=[])
        again = control.ask("POST", "/v2/tasks", data=body, headers=headers)
        await it_says_that_it_is_done(node, 1)
        second = await node.reader(1)
        assert second.header == {"task_id": TASK, "offset": 0, "attempt": 1}
        second.accept().head().data(reader.log)
        second.end()
        assert (await again.answer()).said == "from before"
        await node.beat(tasks=[])
        assert (await control.task(TASK))["state"] == "done"  # and not as its first reader left it
        assert node.opened == []


async def test_a_task_that_no_report_carried_is_asked_for_at_every_node() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.ask("GET", f"/v2/tasks/{TASK}")
        await eventually(lambda: node.calls)
        assert node.calls[0].header["path"] == f"/v2/tasks/{TASK}"
        call = node.calls[0].accept().head("application/json")
        call.data(json.dumps(report(state="sealed", finish_reason="stop")).encode()).tail()
        answer = await asking.answer()
        assert (answer.status, answer.json["state"], answer.json["node_id"]) == (200, "done", "a")


async def test_who_was_here_is_remembered_and_who_signed_off_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_often(monkeypatch)

    def saved() -> set[str]:
        return set(json.loads((tmp_path / "nodes.json").read_text())["nodes"])

    async with a_control(**remembering(tmp_path, "old")) as control:
        await control.join("a", pool())
        await eventually(lambda: saved() == {"a", "old"})
        await control.join("old")
        await control.ask("DELETE", "/v2/nodes/a", who="node").answer()
        await eventually(lambda: saved() == {"old"})


@pytest.mark.parametrize("named", [True, False])
async def test_an_offset_is_never_read_in_the_log_of_another_attempt(named: bool, tmp_path: Path) -> None:
    """The first attempt lost its link and ran on, the second one was shown; only the first one's node is back."""
    headers = {"Last-Event-ID": "00000000000a"} | ({"X-Llorch-Attempt": "2"} if named else {})
    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        first = await control.join("a", tasks=[report()])
        answer = await control.events(TASK, **headers).answer()
        assert (answer.status, answer.code) == (503, "RECOVERING")
        if not named:
            return
        second = await control.join("b", tasks=[report(attempt=2)])
        asking = control.events(TASK, **headers)
        reader = await second.reader()
        assert reader.header == {"task_id": TASK, "offset": 10, "attempt": 2}
        assert first.attached == []
        reader.log = b"x" * 10  # what was read before
        reader.accept().head().say("on").end()
        assert (await asking.answer()).said == "on"


@pytest.mark.parametrize("how", ["key", "v1 key", "task_id", "events"])
async def test_one_attempt_is_shown_also_to_those_who_read_from_the_start(how: str, tmp_path: Path) -> None:
    """The first attempt lost its link and ran on, the second one was shown; the first one's node is back before."""
    path = "/v1/completions" if how == "v1 key" else "native"
    of_key = {"key_digest": DIGEST} if how.endswith("key") else {}

    def ask() -> Asking:
        if how == "events":
            return control.events(TASK)
        if how == "task_id":
            return control.submit(task_id=TASK)
        return keyed(control, "v1" if how == "v1 key" else "native")

    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        first = await control.join("a", tasks=[report(path=path, **of_key)])
        answer = await ask().answer()
        assert (answer.status, answer.code) == (503, "RECOVERING")
        second = await control.join("b", tasks=[report(path=path, attempt=2, **of_key)])
        asking = ask()
        reader = await second.reader()
        assert reader.header == {"task_id": TASK, "offset": 0, "attempt": 2}
        assert first.attached == first.opened == []
        reader.accept().head().say("shown").end()
        assert b"shown" in (await asking.answer()).raw


async def test_a_cancel_reaches_also_the_attempt_that_comes_back_later(tmp_path: Path) -> None:
    async with a_control(**remembering(tmp_path, "a", "b", "c")) as control:
        first = await control.join("a", tasks=[report(epoch="old")])
        asking = control.ask("POST", f"/v2/tasks/{TASK}/cancel")
        await eventually(lambda: len(first.calls) == 1)
        assert first.calls[0].header["method"] == "DELETE"
        first.calls[0].accept().head("application/json").data(b"{}").tail()
        assert (await asking.answer()).status == 202
        others = [
            await control.join("c", tasks=[report(attempt=2, epoch="old", owner="bob")]),
            await control.join("d", tasks=[report(attempt=2, epoch="another control's")]),
        ]
        second = await control.join("b", tasks=[report(attempt=2, epoch="old")])
        reader = await second.reader()
        await eventually(lambda: reader.detached == "left")
        assert (reader.header["attempt"], reader.canceled, reader.surplus) == (2, True, False)
        for other in others:
            await other.settled()
            assert other.attached == []


async def test_nobody_cancels_anothers_task_of_before(tmp_path: Path) -> None:
    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        first = await control.join("a", tasks=[report(epoch="old")])
        answer = await control.ask("POST", f"/v2/tasks/{TASK}/cancel", who="bob").answer()
        assert (answer.status, answer.code) == (404, "TASK_NOT_FOUND")
        second = await control.join("b", tasks=[report(attempt=2, epoch="old")])
        for node in (first, second):
            await node.settled()
            assert node.calls == node.attached == []


async def test_a_cancel_is_taken_for_a_node_whose_link_is_not_up_yet(tmp_path: Path) -> None:
    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        node = await control.join("a", tasks=[report()])
        await node.cut()
        assert (await control.ask("POST", f"/v2/tasks/{TASK}/cancel").answer()).status == 202
        assert (await node.open_link())[0] == 101
        reader = await node.reader()
        await eventually(lambda: reader.detached == "left")
        assert reader.canceled


async def test_a_task_that_is_sent_again_is_not_the_one_that_was_canceled(tmp_path: Path) -> None:
    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        body = json.dumps({"model": "m", "prompt": "Hello", "task_id": TASK})
        same = {"key_digest": DIGEST, "body_digest": hashlib.sha256(body.encode()).hexdigest()}
        node = await control.join("a", tasks=[report(**same)])
        asking = control.ask("DELETE", f"/v2/tasks/{TASK}")
        await eventually(lambda: len(node.calls) == 1)
        node.calls[0].accept().head("application/json").data(b"{}").tail()
        assert (await asking.answer()).status == 202
        await control.join("b")
        canceled = report(**same, state="sealed", finish_reason="canceled")
        await node.beat(tasks=[canceled])
        again = control.ask("POST", "/v2/tasks", data=body, headers={"Idempotency-Key": KEY})
        attempt = (await node.asked()).begin()
        assert attempt.attempt == 2
        await node.beat(tasks=[canceled, report(**same, attempt=2, epoch=attempt.header["epoch"])])
        await node.settled()
        assert node.attached == []
        attempt.say("anew").end()
        assert (await again.answer()).said == "anew"


async def test_a_reader_that_names_the_attempt_waits_for_no_other_node(tmp_path: Path) -> None:
    async with a_control(**remembering(tmp_path, "a", "gone")) as control:
        node = await control.join("a", tasks=[report()])
        asking = control.events(TASK, "a", **{"X-Llorch-Attempt": "1"})
        reader = await node.reader()
        reader.log = b"x" * 10  # what was read before
        reader.accept().head().say("on").end()
        assert (await asking.answer()).said == "on"


async def test_the_attempt_that_was_read_is_lost_with_its_node_not_another_one_read_on(tmp_path: Path) -> None:
    async with a_control(**remembering(tmp_path, "a")) as control:
        node = await control.join("a", tasks=[report()])
        answer = await control.events(TASK, "a", **{"X-Llorch-Attempt": "2"}).answer()
        assert (answer.status, answer.code, node.attached) == (502, "NODE_LOST", [])
        bad = await control.events(TASK, "a", **{"X-Llorch-Attempt": "second"}).answer()
        assert (bad.status, bad.json["error"]["param"]) == (400, "X-Llorch-Attempt")


async def test_a_task_for_a_model_that_no_node_has_brought_yet_waits(tmp_path: Path) -> None:
    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        await control.join("b", pool(model="other"))
        asking = [control.submit(), control.chat()]
        await control.waiting(2)
        node = await control.join("a")
        for each in asking:
            (await node.asked()).begin().end()
            assert (await each.answer()).status == 200
        answer = await control.submit(model="nobodys").answer()
        assert (answer.status, answer.code) == (404, "MODEL_NOT_FOUND")


async def test_models_are_not_said_to_be_missing_while_nodes_may_still_bring_them(tmp_path: Path) -> None:
    async def asked(*names: str) -> list[tuple[int, str]]:
        answers = [await control.ask("GET", f"/v1/models{name}").answer() for name in names]
        return [(answer.status, answer.code if answer.status != 200 else "") for answer in answers]

    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        assert await asked("", "/m") == [(503, "RECOVERING")] * 2
        await control.join("b", pool(model="other"))
        assert await asked("", "/other", "/m") == [(200, ""), (200, ""), (503, "RECOVERING")]
        await control.join("a", pool(model="third"))
        assert await asked("", "/m") == [(200, ""), (404, "MODEL_NOT_FOUND")]


async def test_an_attempt_that_came_to_nothing_is_not_the_task_while_others_may_turn_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt failed before its first byte; the second one was shown, and its node is not back yet."""
    no_answer_soon(monkeypatch)
    nothing = report(state="sealed", offset=0, code="ENGINE_FAILED", key_digest=DIGEST)
    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        first = await control.join("a", tasks=[nothing])
        assert set((await _answers(control)).values()) == {(503, "RECOVERING")}
        second = await control.join("b", tasks=[report(attempt=2, key_digest=DIGEST)])
        for asking in (control.events(TASK), keyed(control, "native")):
            reader = await second.reader(len(second.attached))
            reader.accept().head().say("shown").end()
            assert (await asking.answer()).said == "shown"
        assert first.attached == first.opened == []


async def test_an_offset_beyond_a_sealed_log_is_of_another_log(tmp_path: Path) -> None:
    sealed = report(state="sealed", finish_reason="stop")
    async with a_control(**remembering(tmp_path, "a", "b")) as control:
        await control.join("a", tasks=[sealed])
        assert (await control.events(TASK, "b").answer()).code == "RECOVERING"
        await control.join("b")
        answer = await control.events(TASK, "b").answer()
        assert (answer.status, answer.code) == (502, "NODE_LOST")


async def test_of_several_tasks_with_one_key_the_one_that_came_to_something_is_meant(tmp_path: Path) -> None:
    body = json.dumps({"model": "m", "prompt": "Hello"})
    same = {"key_digest": DIGEST, "body_digest": hashlib.sha256(body.encode()).hexdigest()}
    nothing = report(**same, task_id=str(uuid.uuid4()), state="sealed", offset=0, code="ENGINE_FAILED")
    for tasks in ([report(**same), nothing], [nothing, report(**same)]):
        async with a_control(**remembering(tmp_path, "a")) as control:
            node = await control.join("a", tasks=tasks)
            asking = control.ask("POST", "/v2/tasks", data=body, headers={"Idempotency-Key": KEY})
            reader = await node.reader()
            assert (reader.task_id, node.opened) == (TASK, [])
            await asking.leave()


async def test_a_task_that_is_read_again_does_not_take_the_key_of_one_that_runs(tmp_path: Path) -> None:
    body = json.dumps({"model": "m", "prompt": "Hello"})
    same = {"key_digest": DIGEST, "body_digest": hashlib.sha256(body.encode()).hexdigest()}
    async with a_control(**remembering(tmp_path, "a")) as control:
        node = await control.join("a", tasks=[report(**same, state="sealed", finish_reason="canceled")])
        one = control.ask("POST", "/v2/tasks", data=body, headers={"Idempotency-Key": KEY})
        attempt = (await node.asked()).begin().say("new ")
        await one.has(b"new")
        look = control.events(TASK)
        (await node.reader()).accept().head().say("old").end("canceled")
        await look.answer()
        two = control.ask("POST", "/v2/tasks", data=body, headers={"Idempotency-Key": KEY})
        assert (await node.reader(1)).task_id == attempt.task_id
        for each in (one, two):
            await each.leave()


async def test_who_is_not_all_of_those_of_before_is_not_remembered_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_often(monkeypatch)
    no_answer_soon(monkeypatch)  # time enough for two looks at the roster
    settings = remembering(tmp_path)
    (tmp_path / "nodes.json").write_text('{"nodes": ["a"')
    for _ in range(2):  # killed again before its nodes were back
        async with a_control(**settings) as control:
            await control.join("b")
            assert (await control.ask("GET", f"/v2/tasks/{TASK}").answer()).code == "RECOVERING"
            await control.waiting(0)
    assert (tmp_path / "nodes.json").read_text() == '{"nodes": ["a"'
