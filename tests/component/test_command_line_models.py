"""`llorch model` against a scripted control: what is printed where, every exit code, what goes on when it leaves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llorch.cli import model
from llorch.errors import Code
from tests.cluster import eventually
from tests.component.command_line import CommandLine, Ran
from tests.component.scripted_control import ScriptedControl, answer, hang_up, refusal, scripted

DIGEST = "ab" * 32
REF = "hf:org/repo:Q4_K_M"
STAGED = {"state": "staged", "bytes_total": 2048, "sha256": DIGEST, "error": None}
STAGING = {"state": "staging", "progress": 0.5, "bytes_done": 1024, "bytes_total": 2048, "bytes_per_s": 100}
FAILED = {
    "state": "failed",
    "error": {"code": "INSUFFICIENT_STORAGE", "message": "2 GiB are free", "hint": "make room", "retriable": True},
}
JOB = "stage-1"


def job(state: str = "running", offline: tuple[str, ...] = (), **nodes: dict[str, Any]) -> dict[str, Any]:
    return {"job": JOB, "state": state, "model": "org/repo", "nodes": nodes, "offline": list(offline)}


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted() as running:
        yield running


@pytest.fixture
def llorch(control: ScriptedControl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.setattr(model, "POLL_S", 0.01)
    line = CommandLine(monkeypatch, tmp_path)
    line.env(LLORCH_URL=control.url, LLORCH_TOKEN="the-token-of-these-tests")
    return line


def errors_of(ran: Ran) -> list[str]:
    return [line for line in ran.err.splitlines() if line.startswith(("error:", "why:", "hint:"))]


def stage_answers(control: ScriptedControl, *later: dict[str, Any]) -> None:
    control.on("POST /v2/catalog/stage", answer(job(n1=STAGING, n2={"state": "waiting", "waits_for": "n1"}), 202))
    control.on(f"GET /v2/catalog/stage/{JOB}", *(answer(each) for each in later))


# ---------------------------------------------------------------- stage


async def test_staging_is_followed_with_lines_on_standard_error_and_ends_in_a_table(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    stage_answers(control, job(n1=STAGED, n2=STAGING), job("done", n1=STAGED, n2=STAGED))
    ran = await llorch("model", "stage", REF)
    assert ran.code == 0
    assert ran.err.splitlines() == [
        "n1: staging 50% 1.0K/2.0K 100B/s", "n2: waiting, waits for n1", "n1: staged 2.0K sha256 abababababab",
        "n2: staging 50% 1.0K/2.0K 100B/s", "n2: staged 2.0K sha256 abababababab",
    ]  # fmt: skip
    assert [line.split() for line in ran.out.splitlines()] == [
        ["NODE", "STATE", "SIZE", "SHA256"],
        ["n1", "staged", "2.0K", "abababababab"],
        ["n2", "staged", "2.0K", "abababababab"],
    ]
    (asked,) = control.asked("POST /v2/catalog/stage")
    assert asked.json() == {"model": REF, "nodes": "all"}


async def test_nodes_and_the_source_are_what_the_flags_say(control: ScriptedControl, llorch: CommandLine) -> None:
    stage_answers(control, job("done", n1=STAGED))
    assert (await llorch("model", "stage", "m", "--nodes", "n1,n2", "--from", "n3")).code == 0
    assert control.asked("POST /v2/catalog/stage")[0].json() == {"model": "m", "nodes": ["n1", "n2"], "from": "n3"}


async def test_each_node_that_failed_has_its_own_error_with_why_and_hint_and_the_exit_code_is_1(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    stage_answers(control, job("failed", n1=STAGED, n2=FAILED))
    ran = await llorch("model", "stage", REF)
    assert ran.code == 1
    assert errors_of(ran) == ["error: n2: 2 GiB are free", "why: INSUFFICIENT_STORAGE", "hint: make room"]
    assert "n2    failed" in ran.out


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (Code.MODEL_NOT_FOUND, 4), (Code.NODE_NOT_FOUND, 4), (Code.INVALID_REQUEST, 2), (Code.FORBIDDEN, 3),
        (Code.CONFLICT, 1), (Code.NO_CAPACITY, 6),
    ],
)  # fmt: skip
async def test_a_wish_that_is_refused_ends_with_the_code_of_its_refusal(
    control: ScriptedControl, llorch: CommandLine, code: Code, exit_code: int
) -> None:
    control.on("POST /v2/catalog/stage", refusal(code))
    ran = await llorch("model", "stage", REF)
    assert (ran.code, ran.out) == (exit_code, "")
    assert errors_of(ran)[:2] == ["error: no", f"why: {code}"]


async def test_offline_nodes_are_told_and_are_no_failure(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/catalog/stage", answer(job("done", ("n2",), n1=STAGED, n2={"state": "offline"}), 202))
    ran = await llorch("model", "stage", REF)
    assert ran.code == 0
    assert "warning: n2 is offline and is passed over" in ran.err


async def test_no_wait_prints_the_job_and_leaves(control: ScriptedControl, llorch: CommandLine) -> None:
    stage_answers(control)
    for flags in ((), ("-q",)):
        assert await llorch("model", "stage", REF, "--no-wait", *flags) == (0, f"{JOB}\n", "")
    assert json.loads((await llorch("model", "stage", REF, "--no-wait", "--json")).out)["job"] == JOB


async def test_json_is_the_whole_job_and_quiet_is_quiet(control: ScriptedControl, llorch: CommandLine) -> None:
    stage_answers(control, job("done", n1=STAGED))
    ran = await llorch("model", "stage", REF, "-o", "json")
    assert (ran.code, json.loads(ran.out)) == (0, job("done", n1=STAGED))
    assert await llorch("model", "stage", REF, "-q") == (0, "org/repo\n", "")


async def test_a_timeout_leaves_with_8_and_says_that_nodes_go_on(control: ScriptedControl, llorch: CommandLine) -> None:
    stage_answers(control, job(n1=STAGING))
    ran = await llorch("model", "stage", REF, "--timeout", "200ms")
    assert ran.code == 8
    assert "hint: the nodes go on" in ran.err and "llorch model ls" in ran.err
    assert "error: it took longer than --timeout" in ran.err


async def test_a_control_that_was_started_anew_and_has_forgotten_the_job_is_asked_again(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    running = job(n1=STAGING)
    control.on(
        "POST /v2/catalog/stage",
        answer(running, 202),
        refusal(Code.RECOVERING, retry_after_ms=10),
        answer(running, 202),
    )
    control.on(
        f"GET /v2/catalog/stage/{JOB}",
        hang_up,
        refusal(Code.NOT_FOUND),
        answer(running),
        answer(job("done", n1=STAGED)),
    )
    assert (await llorch("model", "stage", REF)).code == 0
    assert len(control.asked("POST /v2/catalog/stage")) == 3


async def test_a_control_that_stays_away_is_waited_for_a_while(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "LOST_FOR_S", 0.1)
    stage_answers(control)
    control.on(f"GET /v2/catalog/stage/{JOB}", hang_up)
    assert (await llorch("model", "stage", REF)).code == 5
    assert len(control.asked(f"GET /v2/catalog/stage/{JOB}")) > 1


async def test_wrong_nodes_are_told_before_anything_is_asked(control: ScriptedControl, llorch: CommandLine) -> None:
    for words in (("stage", REF, "--nodes", "a,,b"), ("rm", "m"), ("rm", "m", "--nodes", ""), ("stage",)):
        assert (await llorch("model", *words)).code == 2
    assert control.requests == []


async def test_an_interrupt_leaves_and_says_that_nodes_go_on(
    control: ScriptedControl, llorch: CommandLine, tmp_path: Path
) -> None:
    stage_answers(control, job(n1=STAGING))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llorch", "model", "stage", REF,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        await eventually(
            lambda: bool(control.asked(f"GET /v2/catalog/stage/{JOB}")), within_s=20, what="a look at the job"
        )
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 20)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, out) == (130, b"")
    assert b"hint: the nodes go on" in err and b"llorch model ls" in err and b"Traceback" not in err
    assert not any(asked.method == "DELETE" for asked in control.requests)


# ---------------------------------------------------------------- ls


async def test_models_are_listed_with_where_they_are_how_far_and_what_is_wrong(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    catalog = {
        "models": {
            "m": {"nodes": ["n1", "n2"], "ready_pools": 1, "size_bytes": 2048, "sha256": None, "conflict": True,
                  "digests": {"a" * 64: ["n1"], "b" * 64: ["n2"]}},
            "x": {"nodes": ["n1"], "ready_pools": 0, "size_bytes": 0, "sha256": DIGEST, "conflict": False},
        },
        "nodes": {
            "n1": {"models": [{"id": "m", "state": "staged"}, {"id": "x", "state": "failed", "error": "CODE: why"}]},
            "n2": {"models": [{"id": "m", "state": "staging", "progress": 0.25}]},
        },
    }  # fmt: skip
    control.on("GET /v2/catalog", answer(catalog))
    ran = await llorch("model", "ls")
    assert ran.code == 0
    titles, first, second = (line for line in ran.out.splitlines())
    assert titles.split() == ["MODEL", "NODES", "READY", "POOLS", "SIZE", "SHA256", "STATE", "CONFLICT", "ERROR"]
    assert "n1,n2" in first and "staged 1, staging 25% on n2" in first
    assert "aaaaaaaaaaaa on n1; bbbbbbbbbbbb on n2" in first
    assert "abababababab" in second and "failed" in second and second.endswith("n1: CODE: why")
    assert (await llorch("model", "ls", "-q")).out == "m\nx\n"
    assert json.loads((await llorch("model", "ls", "--json")).out)[0]["reports"]["n2"]["progress"] == 0.25


# ---------------------------------------------------------------- verify


async def test_a_verification_is_waited_for_and_tells_each_model_that_is_not_what_it_was(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    def checked(state: str, *states: str) -> dict[str, Any]:
        wrong = {"code": "CONFLICT", "message": "it is not", "hint": "stage it again"}
        checks = [
            {"node_id": f"n{n}", "model": "m", "state": each, "sha256": DIGEST, "error": {"failed": wrong}.get(each)}
            for n, each in enumerate(states)
        ]
        return {"job": "verify-1", "state": state, "checks": checks, "offline": ["n9"]}

    control.on("POST /v2/catalog/verify", answer(checked("running", "reading", "waiting"), 202))
    control.on(
        "GET /v2/catalog/verify/verify-1",
        answer(checked("running", "ok", "reading")),
        answer(checked("failed", "ok", "failed")),
    )
    ran = await llorch("model", "verify", "m", "--nodes", "n0,n1")
    assert ran.code == 1
    assert "read 1 of 2" in ran.err and "warning: n9 is offline" in ran.err
    assert errors_of(ran) == ["error: n1/m: it is not", "why: CONFLICT", "hint: stage it again"]
    assert control.asked("POST /v2/catalog/verify")[0].json() == {"model": "m", "nodes": ["n0", "n1"]}
    control.on("GET /v2/catalog/verify/verify-1", answer(checked("done", "ok", "ok")))
    ran = await llorch("model", "verify", "-q")
    assert (ran.code, ran.out) == (0, "n0/m\nn1/m\n")


# ---------------------------------------------------------------- rm


async def test_a_model_is_removed_from_each_of_the_nodes_and_what_fails_is_told(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    path = "/v2/catalog/{}/org%2Frepo:Q4"
    control.on(f"DELETE {path.format('n1')}", answer({"model": "org/repo:Q4", "state": "removed"}, 202))
    control.on(f"DELETE {path.format('n2')}", refusal(Code.CONFLICT, "a pool uses it"))
    ran = await llorch("model", "rm", "org/repo:Q4", "--nodes", "n1,n2")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[:3] == [
        "removed org/repo:Q4 on n1", "error: n2: a pool uses it", "why: CONFLICT",
    ]  # fmt: skip
    control.on(f"DELETE {path.format('n1')}", refusal(Code.MODEL_NOT_FOUND))
    assert (await llorch("model", "rm", "org/repo:Q4", "--nodes", "n1")).code == 4


async def test_a_model_is_retired_on_all_nodes_that_have_it(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("GET /v2/catalog", answer({"models": {"m": {"nodes": ["n1", "n2"]}}, "nodes": {}}))
    for node_id in ("n1", "n2"):
        control.on(f"DELETE /v2/catalog/{node_id}/m", answer({"model": "m", "state": "retired"}, 202))
    ran = await llorch("model", "rm", "m", "--nodes", "all", "--retire", "-q")
    assert ran == (0, "n1\nn2\n", "")
    assert [asked.path for asked in control.requests[1:]] == [
        "/v2/catalog/n1/m?retire=true", "/v2/catalog/n2/m?retire=true",
    ]  # fmt: skip
    ran = await llorch("model", "rm", "nothing", "--nodes", "all")
    assert ran.code == 4 and "llorch model ls" in ran.err


# ---------------------------------------------------------------- status


async def test_status_notes_an_id_that_stands_for_two_contents_and_is_no_worse_for_it(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    pool = {"node_id": "n1", "pool_id": "p0", "state": "ready", "ready": True, "bound": True}
    control.on("GET /readyz", answer({"status": "ok", "version": "9", "role": "control"}))
    control.on("GET /v2/nodes", answer({"nodes": [{"node_id": "n1", "state": "online", "pools": [pool]}]}))
    control.on("GET /v2/pools", answer({"pools": [pool]}))
    entry = {"nodes": ["n1", "n2"], "conflict": True, "digests": {"a" * 64: ["n1"], "b" * 64: ["n2"]}}
    control.on("GET /v2/catalog", answer({"models": {"m": entry}, "nodes": {}}))
    ran = await llorch("status")
    assert ran.code == 0
    assert "note     model m has several contents: aaaaaaaaaaaa on n1; bbbbbbbbbbbb on n2" in ran.out
