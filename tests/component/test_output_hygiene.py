"""What hostile nodes, models and controls can do to who reads a terminal or a log: nothing but be read.

Each command is shown a value that would set a title, clear the screen, forge a line and turn text around.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llorch import logs
from llorch.cli import output
from llorch.errors import Code
from tests.component.command_line import CommandLine, Ran
from tests.component.scripted_control import TASK, ScriptedControl, answer, end, error, refusal, scripted, stream, token

HOSTILE = (
    "a\x1b]0;pwned\x07\x1b[2J\r\nerror: forged\nhint: forged\x00\x08\x7f\x9b31m\x85\x9d0;x\x9c"
    "\u2028hint: forged\u2029ready url=http://forged\u202egnp.exe\u2066b\u2069\u200b\ufeff\U000e0041z"
)
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u206f]")
BREAKS = re.compile(r"[\t\n\u2028\u2029\u200b\ufeff\U000e0041]")
FORGED = re.compile(r"^(error: forged|hint: forged|ready url=)", re.MULTILINE)

POOL: dict[str, Any] = {
    "node_id": HOSTILE,
    "pool_id": HOSTILE,
    "model": HOSTILE,
    "engine": HOSTILE,
    "engine_version": HOSTILE,
    "state": HOSTILE,
    "ready": True,
    "bound": True,
    "slots_free": 3,
    "slots_total": 4,
    "node_state": HOSTILE,
    "facts_age_ms": 350,
    "last_error": HOSTILE,
    "breaker": {"state": "ejected", "ejected_ms": 1, "reason": HOSTILE},
    "loading": HOSTILE,
    "held": [HOSTILE],
    "draining": True,
    "in_flight": 1,
    "operation": {"kind": HOSTILE, "state": "failed", "model": HOSTILE, "message": HOSTILE, "started_at": HOSTILE},
    "replicas": [{"id": HOSTILE, "state": HOSTILE, "breaker": HOSTILE}],
}
FAILED: dict[str, Any] = POOL | {"pool_id": "p0", "operation": POOL["operation"] | {"kind": "drain"}}  # fmt: skip
NODE: dict[str, Any] = {
    "node_id": HOSTILE, "state": HOSTILE, "online": True, "suspect": True, "heartbeat_age_ms": 4200, "zone": HOSTILE,
    "slots_free": 3, "slots_total": 4, "draining": True, "models": [HOSTILE], "pools": [FAILED, POOL],
    HOSTILE: {HOSTILE: HOSTILE},
    "gpus": [{"index": 0, "uuid": HOSTILE, "name": HOSTILE, "driver": HOSTILE}],
}  # fmt: skip
VIEW: dict[str, Any] = {
    "task_id": HOSTILE, "state": HOSTILE, "model": HOSTILE, "node_id": HOSTILE, "pool_id": HOSTILE,
    "finish_reason": HOSTILE, "error": {"code": HOSTILE, "message": HOSTILE},
}  # fmt: skip
DECISION: dict[str, Any] = {
    "task_id": HOSTILE, "state": HOSTILE, "outcome": HOSTILE, "model": HOSTILE, "reason": HOSTILE, "node_id": HOSTILE,
    "pool_id": HOSTILE, "error": {"code": HOSTILE, "hint": HOSTILE},
    "pools": [
        {"node_id": HOSTILE, "pool_id": HOSTILE, "filters": [{"name": HOSTILE, "passed": False, "reason": HOSTILE}]},
        {"node_id": HOSTILE, "pool_id": HOSTILE, "filters": [{"name": HOSTILE}], "score": {HOSTILE: HOSTILE}},
    ],
}  # fmt: skip
COMMANDS = (
    ("status",), ("node", "ls"), ("node", "show", "n1"), ("pool", "ls"), ("task", "ls"), ("task", "show", TASK),
    ("explain", TASK), ("explain", "--dry-run", "-m", "m"), ("task", "cancel", TASK),
    ("pool", "show", "n1/p0"), ("pool", "drain", "n1/p0"), ("node", "drain", "n1"), ("node", "rm", "n1"),
)  # fmt: skip
IDS = [" ".join(part for part in command if part != TASK) for command in COMMANDS]


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted() as running:
        running.on("GET /readyz", answer({"status": HOSTILE, "version": HOSTILE, "storm": {"reason": HOSTILE}}))
        running.on("GET /v2/nodes", answer({"nodes": [NODE]}))
        running.on("GET /v2/nodes/n1", answer(NODE))
        running.on("GET /v2/pools", answer({"pools": [POOL | {"state": "failed"}, POOL]}))
        running.on("GET /v1/models", answer({"data": [{"id": HOSTILE}]}))
        running.on("GET /v2/tasks", answer({"tasks": [VIEW]}))
        running.on(f"GET /v2/tasks/{TASK}", answer(VIEW))
        running.on(f"GET /v2/tasks/{TASK}/placement", answer(DECISION))
        running.on("POST /v2/placement", answer(DECISION))
        running.on(f"POST /v2/tasks/{TASK}/cancel", answer({"task_id": HOSTILE, "state": HOSTILE}, 202))
        running.on("POST /v2/nodes/n1/pools/p0/drain", answer({"node_id": HOSTILE, "pool": FAILED}, 202))
        running.on("POST /v2/nodes/n1/drain", answer({"node_id": HOSTILE, "draining": True}, 202))
        running.on("DELETE /v2/nodes/n1", answer({"success": True, "x": HOSTILE}))
        yield running


@pytest.fixture
def llorch(control: ScriptedControl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    line = CommandLine(monkeypatch, tmp_path)
    line.env(LLORCH_URL=control.url, LLORCH_TOKEN="the-token-of-these-tests")
    return line


def assert_clean(ran: Ran) -> None:
    for text in (ran.out, ran.err):
        assert CONTROLS.search(text) is None, CONTROLS.findall(text)
        assert FORGED.search(text) is None, text


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
async def test_no_command_prints_what_a_peer_wrote_as_more_than_words(
    llorch: CommandLine, command: tuple[str, ...]
) -> None:
    """Neither into a pipe: tables are for people, who look at them later."""
    for flags in ((), ("-q",)):
        ran = await llorch(*command, *flags)
        assert_clean(ran)
        assert re.search("[\u2028\u2029\u200b\ufeff]", ran.out + ran.err) is None


@pytest.mark.parametrize("form", ["json", "jsonl", "yaml"])
@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
async def test_on_a_terminal_no_form_of_output_reaches_the_terminal_itself(
    llorch: CommandLine, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], form: str
) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda _stream: True)
    assert_clean(await llorch(*command, "-o", form))


async def test_a_refusal_of_a_control_is_one_line_each(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("GET /v2/nodes", refusal(Code.FORBIDDEN, HOSTILE, hint=HOSTILE))
    control.on("POST /v2/tasks", stream(token(0, "t0 "), error(HOSTILE, HOSTILE, hint=HOSTILE, request_id=HOSTILE)))
    for command in (("node", "ls"), ("submit", "-m", "m", "Hello")):
        ran = await llorch(*command)
        assert_clean(ran)
        assert [line.partition(":")[0] for line in ran.err.splitlines()] == ["error", "why", "hint", "request-id"]
        assert BREAKS.search(ran.err.replace("\n", "")) is None


async def test_a_traceback_that_was_asked_for_is_text_too(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("GET /v2/nodes", refusal(Code.FORBIDDEN, HOSTILE))
    ran = await llorch("node", "ls", "--debug")
    assert "Traceback" in ran.err and CONTROLS.search(ran.err) is None


async def test_what_a_model_says_is_raw_in_a_pipe_and_text_on_a_terminal(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = "👨\u200d👩\u200d👧 بە\u200cڵێ"
    control.on("POST /v2/tasks", stream(token(0, HOSTILE), token(1, family), end()))
    assert (await llorch("submit", "-m", "m", "Hello")).out == HOSTILE + family
    for module in ("llorch.cli.answer", "llorch.cli.output"):
        monkeypatch.setattr(f"{module}.is_terminal", lambda _stream: True)
    shown = (await llorch("submit", "-m", "m", "Hello")).out
    assert CONTROLS.search(shown) is None and family in shown, "joiners are part of what is written"
    assert HOSTILE in (await llorch("submit", "-m", "m", "--raw", "Hello")).out


@pytest.mark.parametrize("name", ["node_id", "model", "reason"])
def test_a_log_line_stays_one_line_of_printable_ascii(capsys: pytest.CaptureFixture[str], name: str) -> None:
    kept = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        logs.configure("debug")
        logs.Log("test").warning("pool.failed", **{name: HOSTILE})
        logging.getLogger("aiohttp.server").error("bad %s", HOSTILE)
    finally:
        logging.getLogger().handlers[:], level = kept
        logging.getLogger().setLevel(level)
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 3 and lines[2] == ""
    assert all(re.fullmatch("[\x20-\x7e]+", line) for line in lines[:2])
