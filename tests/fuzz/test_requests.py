"""Slices of the long run: a few requests to both roles in this process, and some thousands to real ones."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.component.control_harness import TOKENS, LinkedNode, a_control, pool
from tests.component.node_harness import SERVICE_TOKEN, node_between
from tests.component.scripted_operations import operated
from tests.fuzz import requests
from tests.fuzz.cases import CANARY, Case, Cases, Credential
from tests.fuzz.oracles import judge, judge_log, secrets_in
from tests.fuzz.requests import Findings, fire
from tests.fuzz.wire import Answer, Ending

SEED = 1
SLICE = 1_000


async def answer_all(node: LinkedNode) -> None:
    while True:
        (await node.asked()).begin().say("a", "b").end()


async def test_a_thousand_requests_break_neither_role(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "PATIENCE_S", 0.3)
    caplog.set_level("INFO")
    findings = Findings()
    async with a_control() as control, node_between(tmp_path, controls=0, engine_url="http://127.0.0.1:1") as setup:
        node = await control.join("n0", pool("p0", model="sim", slots=32))
        answering = asyncio.create_task(answer_all(node))
        tokens = {
            Credential.CLIENT: TOKENS["alice"],
            Credential.ADMIN: TOKENS["admin"],
            Credential.NODE: TOKENS["node"],
            Credential.SERVICE: SERVICE_TOKEN,
            Credential.WRONG: secrets.token_hex(16),
        }
        urls = {"control": control.url, "node": setup.node.url}
        async with operated(node):
            await fire(urls, tokens, range(SLICE), SEED, findings)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
    findings.wrong.pop("GET /metrics: 401 for who may ask this", None)  # the harness's node does not open its metrics
    wrong = judge_log(caplog.text, (*tokens.values(), CANARY))
    assert (findings.wrong, wrong) == ({}, [])
    assert findings.count == SLICE


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_thousands_of_requests_break_no_process(tmp_path: Path) -> None:
    findings = await requests.run(range(6_000), SEED, tmp_path)
    assert findings.wrong == {}
    assert findings.count == 6_000


# ---------------------------------------------------------------- that the oracles can fail


def document() -> dict[str, object]:
    responses = {"200": {"content": {"application/json": {}}}, "default": {}}
    return {"paths": {"/v2/x": {"get": {"responses": responses, "security": [{"bearer": ["submit"]}]}}}}


@pytest.fixture
def find() -> Callable[..., Case]:
    tokens = {one: secrets.token_hex(16) for one in Credential if one is not Credential.NONE}
    cases = Cases({"control": document()}, tokens, SEED)

    def one(*, allowed: bool) -> Case:
        wanted = (cases.case(number) for number in range(1_000))
        return next(case for case in wanted if case.plain and case.allowed is allowed and case.request_id is None)

    return one


ID = {"x-request-id": "r", "x-correlation-id": "r"}
JSON = {**ID, "content-type": "application/json"}


def error(code: str = "INVALID_REQUEST", **more: object) -> bytes:
    wire = {"code": code, "message": "m", "type": "invalid_request_error", "retriable": False, "request_id": "r"}
    return json.dumps({"error": wire | more}).encode()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(200, JSON, b"{}"), ""),
        (Answer(400, JSON, error()), ""),
        (Answer(200, JSON, b'{"a": NaN}'), "JSON that is none"),
        (Answer(200, {**ID, "content-type": "text/html"}, b""), "text/html where"),
        (Answer(200, {"content-type": "application/json"}, b"{}"), "no request id"),
        (Answer(201, JSON, b"{}"), "201 where 200"),
        (Answer(401, JSON, error("UNAUTHENTICATED")), "401 for who may ask this"),
        (Answer(500, JSON, error("INTERNAL")), "500 INTERNAL"),
        (Answer(503, JSON, error("NO_CAPACITY")), "503 without Retry-After"),
        (Answer(404, JSON, error("INTERNAL")), "INTERNAL with status 404"),
        (Answer(400, JSON, error("NEW_CODE")), "without a known code"),
        (Answer(400, JSON, error(request_id="s")), "another request id"),
        (Answer(400, {**ID, "content-type": "text/plain"}, b"no"), "an error as text/plain"),
        (Answer(0, {}, b"", Ending.NONE), "no answer"),
        (Answer(0, {}, b"", Ending.GARBLED), "no HTTP"),
        (Answer(200, {**ID, "content-type": "text/event-stream"}, b"event: token\ndata: {}\n\n"), "with 0 ends"),
        (Answer(200, {**ID, "content-type": "text/event-stream"}, b"event: end\ndata: {}\n\n" * 2), "with 2 ends"),
    ],
)
def test_an_answer_that_breaks_a_rule_is_told(find: Callable[..., Case], answer: Answer, told: str) -> None:
    wrong = judge(find(allowed=True), answer)
    assert (wrong == []) if not told else any(told in text for text in wrong), wrong


def test_an_answer_to_who_may_not_ask_is_told(find: Callable[..., Case]) -> None:
    assert judge(find(allowed=False), Answer(200, JSON, b"{}")) == ["200 for who may not ask this"]


@pytest.mark.parametrize(
    "line",
    [
        "2026-01-01T00:00:00.000Z ERROR request.failed path=/x",
        "Traceback (most recent call last):",
        "2026-01-01T00:00:00.000Z WARNING loop.ended name=x",
        'x WARNING library.logged logger=asyncio message="Task exception was never retrieved"',
    ],
)
def test_a_line_that_nobody_may_log_is_told(line: str) -> None:
    assert judge_log(f"x INFO node.registered node_id=a\n{line}\n", [])


def test_a_secret_is_told_without_being_shown() -> None:
    (told,) = judge_log("x INFO a b=s3cret-token", ["other", "s3cret-token"])
    assert "number 1" in told and "s3cret" not in told
    assert secrets_in(b"\xffs3cret-token", ["s3cret-token"]) and not secrets_in("nothing", ["s3cret-token"])


def test_the_same_seed_gives_the_same_cases() -> None:
    tokens = {one: one * 8 for one in Credential}
    made = [
        [Cases({"control": document()}, tokens, seed).case(number).raw for number in range(50)] for seed in (1, 1, 2)
    ]
    assert made[0] == made[1] != made[2]
