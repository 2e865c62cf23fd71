"""What a control puts on record of what was done with it, what it never does, and what it refuses while it can't."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llorch import __version__, audit, audit_files
from llorch.audit import Unaudited
from llorch.audit_chain import CHECKPOINT, verify
from llorch.audit_files import Keys, chain_files, read_lines
from llorch.auth import fingerprint
from llorch.control.refusals import MAX_OF_A_PEER
from tests.component.control_harness import (
    MODEL,
    TOKENS,
    ControlUnderTest,
    a_control,
    bearer,
    eventually,
    pool,
)

Record = dict[str, Any]


def on_record(folder: Path) -> list[Record]:
    lines = (line for path in chain_files(folder / "audit") for line in read_lines(path))
    return [record for line in lines if (record := json.loads(line))["event"] != CHECKPOINT]


def of(folder: Path, event: str) -> list[Record]:
    return [record for record in on_record(folder) if record["event"] == event]


def check(folder: Path) -> None:
    keys = Keys.read(folder / "audit")
    lines = (line for path in chain_files(folder / "audit") for line in read_lines(path))
    assert verify(lines, keys.public, keys.mac).fault is None


def says(record: Record, **fields: Any) -> bool:
    return all(record.get(name) == value for name, value in fields.items())


ALICE = {"principal": "alice", "fingerprint": fingerprint(TOKENS["alice"]), "peer": "127.0.0.1"}
ROOT = {"principal": "root", "fingerprint": fingerprint(TOKENS["admin"]), "peer": "127.0.0.1"}
NODE = {"principal": "default", "fingerprint": fingerprint(TOKENS["node"]), "peer": "127.0.0.1", "scope": "node"}


async def test_the_start_and_the_end_of_a_control_are_on_record(tmp_path: Path) -> None:
    async with a_control(data_dir=str(tmp_path)) as control:
        port = control.port
    first, *_, last = on_record(tmp_path)
    assert says(first, event="control.start", version=__version__, bind=f"127.0.0.1:{port}", tls="off")
    assert says(last, event="control.stop", version=__version__)
    check(tmp_path)


async def test_accepted_tasks_are_on_record_with_who_and_what_and_so_is_who_ended_them(tmp_path: Path) -> None:
    async with a_control(data_dir=str(tmp_path)) as control:
        node = await control.join("a", pool(slots=8))
        mine = {"X-Request-Id": "asked-by-alice"}
        for asking in (
            control.ask("POST", "/v2/tasks", json={"model": MODEL, "prompt": "x"}, headers=mine),
            control.ask("POST", "/v1/chat/completions", json={"model": MODEL, "messages": []}, headers=mine),
            control.submit(detach=True),
        ):
            stream = (await node.asked()).accept()
            stream.head()
            stream.data(b"x\n\n")
            if stream.header["path"] != "native":
                stream.tail()
            await (asking.answer() if stream.header["detach"] else asking.has(b"x"))
        ids = [stream.task_id for stream in node.opened]
        for task_id, who in ((ids[0], "alice"), (ids[2], "admin")):
            await control.ask("POST", f"/v2/tasks/{task_id}/cancel", who=who).answer()
        answer = await control.ask("DELETE", f"/v2/tasks/{ids[2]}", who="bob").answer()
        assert answer.status == 404
    accepted = of(tmp_path, "task.accepted")
    assert [record["task_id"] for record in accepted] == ids
    assert [(record["path"], record["detach"]) for record in accepted] == [
        ("native", False), ("/v1/chat/completions", False), ("native", True),
    ]  # fmt: skip
    assert all(says(record, **ALICE, scope="submit", decision="allowed", model=MODEL) for record in accepted)
    assert accepted[0]["request_id"] == accepted[1]["request_id"] == "asked-by-alice"
    own, admins = of(tmp_path, "task.canceled")
    assert says(own, **ALICE, task_id=ids[0], owner="alice", scope="submit", decision="allowed")
    assert says(admins, **ROOT, task_id=ids[2], owner="alice", scope="admin", decision="allowed")
    (hidden,) = of(tmp_path, "task.hidden")
    assert says(hidden, principal="bob", task_id=ids[2], owner="alice", decision="refused", reason="TASK_NOT_FOUND")
    check(tmp_path)


async def test_a_task_that_was_not_taken_in_is_not_said_to_be_and_a_repeated_one_is_said_to_be_that(
    tmp_path: Path,
) -> None:
    async with a_control(data_dir=str(tmp_path)) as control:
        node = await control.join("a")
        key = {"Idempotency-Key": "k"}
        body = {"model": MODEL, "prompt": "x", "detach": True}
        first = control.ask("POST", "/v2/tasks", json=body, headers=key)
        attempt = (await node.asked()).begin()
        await first.answer()
        await control.ask("POST", "/v2/tasks", json=body, headers=key).answer()
        control.control.dispatcher.draining = True
        assert (await control.submit().answer()).code == "DRAINING"
    assert [record["task_id"] for record in of(tmp_path, "task.accepted")] == [attempt.task_id]
    assert [record["task_id"] for record in of(tmp_path, "task.repeated")] == [attempt.task_id]


async def test_refused_credentials_are_on_record_with_what_they_were_refused(tmp_path: Path) -> None:
    revoked = secrets.token_hex(20)
    async with a_control(data_dir=str(tmp_path)) as control:
        for method, path, headers in (
            ("GET", "/v2/nodes?secret=in-the-query", {}),
            ("GET", "/v2/tasks", {"Authorization": f"Bearer {revoked}"}),
            ("GET", "/v2/tasks", {"Authorization": "Bearer hunter2"}),
            ("DELETE", "/v2/nodes/a", bearer("alice") | {"X-Request-Id": "asked-by-alice"}),
        ):
            await control.ask(method, path, who=None, headers=headers).answer()
    nobody, no_longer, guessed, alice = of(tmp_path, "auth.failed")
    refused = {"decision": "refused", "peer": "127.0.0.1"}
    assert says(nobody, **refused, principal="anonymous", reason="UNAUTHENTICATED", path="/v2/nodes", scope="read")
    assert says(no_longer, **refused, fingerprint=fingerprint(revoked), reason="UNAUTHENTICATED", method="GET")
    assert "fingerprint" not in guessed  # a password, perhaps: it could be guessed from a digest
    assert says(alice, **refused | ALICE, scope="node or admin", reason="FORBIDDEN", method="DELETE")
    assert alice["request_id"] == "asked-by-alice"
    text = "".join(path.read_text() for path in chain_files(tmp_path / "audit"))
    for secret in (revoked, "hunter2", "in-the-query"):
        assert secret not in text


async def test_a_flood_of_refusals_is_summed_up(tmp_path: Path) -> None:
    async with a_control(data_dir=str(tmp_path)) as control:
        for _ in range(MAX_OF_A_PEER + 7):
            await control.ask("GET", "/v2/tasks", who=None).answer()
    *single, summed = of(tmp_path, "auth.failed")
    assert len(single) == MAX_OF_A_PEER
    assert says(summed, peer="127.0.0.1", count=7, decision="refused")


async def test_what_becomes_of_a_node_is_on_record(tmp_path: Path) -> None:
    async with a_control(data_dir=str(tmp_path), offline_after=0.15) as control:
        node = await control.join("a")
        status, _ = await control.node("a").register(pool(), address="http://169.254.169.254")
        assert status == 422
        await node.cut()
        await eventually(lambda: of(tmp_path, "node.expired"), within_s=5)
        await node.join()
        await control.ask("DELETE", "/v2/nodes/a", who="admin").answer()
        await node.link_ended()
        other = await control.join("b")
        await control.ask("DELETE", "/v2/nodes/b", who="node").answer()
        await other.link_ended()
    told = [
        (record["event"], record.get("node_id"))
        for record in on_record(tmp_path)
        if not record["event"].startswith("control.")
    ]
    assert told == [
        ("node.joined", "a"), ("node.registered", "a"), ("link.up", "a"), ("node.refused", "a"), ("link.lost", "a"),
        ("node.expired", "a"), ("node.registered", "a"), ("link.up", "a"), ("node.deregistered", "a"),
        ("link.lost", "a"), ("node.joined", "b"), ("node.registered", "b"), ("link.up", "b"),
        ("node.deregistered", "b"), ("link.lost", "b"),
    ]  # fmt: skip
    assert says(of(tmp_path, "node.joined")[0], **NODE, decision="allowed")
    assert says(of(tmp_path, "node.refused")[0], **NODE, decision="refused", reason="UNTRUSTED_ADDRESS")
    by_admin, by_itself = of(tmp_path, "node.deregistered")
    assert says(by_admin, **ROOT, scope="admin", decision="allowed")
    assert says(by_itself, **NODE, decision="allowed")
    check(tmp_path)


# ---------------------------------------------------------------- a disk that is full


@contextlib.asynccontextmanager
async def a_full_disk(monkeypatch: pytest.MonkeyPatch, control: ControlUnderTest) -> AsyncIterator[None]:
    """Nothing can be appended to the audit log while the block runs."""
    monkeypatch.setattr(audit, "RETRY_AFTER_S", 0.02)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(audit_files.ChainFiles, "append", full)
        yield


async def test_on_a_full_disk_nobody_joins_and_no_admin_acts_but_tasks_run_and_nodes_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_control(data_dir=str(tmp_path)) as control:
        node = await control.join("a")
        async with a_full_disk(monkeypatch, control):
            status, answer = await control.node("new").register(pool())
            assert (status, answer["error"]["code"]) == (507, "INSUFFICIENT_STORAGE")
            assert answer["error"]["hint"]
            assert "new" not in control.control.registry.nodes
            answer = await control.ask("DELETE", "/v2/nodes/a", who="admin").answer()
            assert (answer.status, answer.code) == (507, "INSUFFICIENT_STORAGE")
            assert "a" in control.control.registry.nodes
            asking = control.submit()
            attempt = (await node.asked()).begin()
            await asking.has(b"started")
            answer = await control.ask("POST", f"/v2/tasks/{attempt.task_id}/cancel", who="admin").answer()
            assert answer.status == 507
            await node.settled()
            assert not attempt.canceled
            attempt.say("t").end()
            assert (await asking.answer()).terminals == ["end"]
            await node.cut()
            await node.join()
            assert await control.metric("llorch_audit_unwritten_total") >= 4
        await control.join("new")
    assert "audit.unwritten" in caplog.text
    assert [record.get("decision") for record in of(tmp_path, "node.joined")] == ["allowed", "refused", "allowed"]
    assert says(of(tmp_path, "node.deregistered")[0], decision="refused", node_id="a")
    assert [record["task_id"] for record in of(tmp_path, "task.accepted")] == [attempt.task_id]
    check(tmp_path)


# ---------------------------------------------------------------- what is never there


async def test_no_token_prompt_or_output_is_on_record_whatever_is_done(tmp_path: Path) -> None:
    prompt, output, wrong = (f"{name}-{secrets.token_hex(20)}" for name in ("prompt", "output", "token"))
    async with a_control(data_dir=str(tmp_path)) as control:
        node = await control.join("a", pool(slots=4))
        asking = [
            control.submit(prompt=prompt, metadata={"x": prompt}, session_id="s"),
            control.chat(messages=[{"role": "user", "content": prompt}]),
            control.submit(prompt=prompt, detach=True),
        ]
        for _ in asking:
            stream = (await node.asked()).begin()
            stream.say(output).end()
        await asyncio.gather(*(each.answer() for each in asking))
        for path in ("/v2/tasks", "/v1/completions", "/v2/nodes/register"):
            for headers in ({"Authorization": f"Bearer {wrong}"}, {"api-key": wrong}, bearer("alice"), bearer("node")):
                body = {"prompt": prompt, "model": prompt + " ", "node_id": "x", "pools": prompt}
                await control.ask("POST", f"{path}?q={prompt}", who=None, json=body, headers=headers).answer()
        await control.ask("POST", f"/v2/tasks/{stream.task_id}/cancel", json={"prompt": prompt}).answer()
    found = {path: path.read_bytes() for path in (tmp_path / "audit").rglob("*") if path.is_file()}
    text = b"".join(found.values())
    assert b'"task.accepted"' in text
    assert b'"auth.failed"' in text
    for canary in (prompt, output, wrong, *TOKENS.values()):
        assert canary.encode() not in text
    check(tmp_path)


async def test_a_run_of_llorch_dev_leaves_no_log(tmp_path: Path) -> None:
    async with a_control(data_dir=str(tmp_path), dev=True) as control:
        assert isinstance(control.control.audit, Unaudited)
        await control.join("a")
        await control.ask("GET", "/v2/tasks", who=None).answer()
    assert not (tmp_path / "audit").exists()
