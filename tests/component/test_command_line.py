"""The commands that talk to a control, against a scripted one: every exit code, every form of output, every refusal."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from llorch.cli import submit
from llorch.cli.output import OutputClosed
from llorch.client import api
from llorch.errors import Code
from llorch.tls import server_context
from llorch.tokens import ID_BYTES, SECRET_BYTES, write_token
from tests.certificates import certificate
from tests.component.command_line import CommandLine, Ran
from tests.component.scripted_control import (
    QUEUED,
    SSE,
    TASK,
    WHOLE,
    Answer,
    ScriptedControl,
    Then,
    answer,
    end,
    error,
    hang_up,
    no_answer,
    refusal,
    resume_quickly,
    scripted,
    started,
    stream,
    token,
)

SECRET = "the-token-of-these-tests"
POOL = {
    "node_id": "n1", "pool_id": "p0", "model": "m", "engine": "simulated", "state": "ready", "ready": True,
    "bound": True, "slots_free": 3, "slots_total": 4, "node_state": "online", "facts_age_ms": 350, "last_error": None,
}  # fmt: skip
GPU = {
    "index": 0, "uuid": "GPU-1", "name": "Big", "vram_total_bytes": 24 * 2**30, "vram_used_bytes": 2**30,
    "vram_foreign_bytes": 0, "utilization": 7.0, "temperature_c": 41.0, "driver": "1.2",
}  # fmt: skip
NODE = {
    "node_id": "n1", "state": "online", "online": True, "suspect": False, "heartbeat_age_ms": 4200, "gpus": [GPU],
    "slots_free": 3, "slots_total": 4, "models": ["m"], "pools": [POOL],
}  # fmt: skip
VIEW = {"task_id": TASK, "state": "done", "model": "m", "node_id": "n1", "pool_id": "p0", "finish_reason": "stop"}


@pytest.fixture(autouse=True)
def quick_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    resume_quickly(monkeypatch)


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted() as running:
        running.on("POST /v2/tasks", stream(*WHOLE))
        running.on(f"POST /v2/tasks/{TASK}/cancel", answer({"task_id": TASK, "state": "canceled"}, 202))
        running.on("GET /readyz", answer({"status": "ok", "version": "9", "role": "control"}))
        running.on("GET /v2/nodes", answer({"nodes": [NODE]}))
        running.on("GET /v2/nodes/n1", answer(NODE))
        running.on("POST /v2/nodes/n1/pardon", answer({"success": True, "node_id": "n1", "was_quarantined": True}))
        running.on("POST /v2/nodes/n1/drain", answer({"node_id": "n1", "draining": True}, 202))
        running.on("POST /v2/nodes/n1/pools/p0/drain", answer({"node_id": "n1", "pool": POOL}, 202))
        running.on("DELETE /v2/nodes/n1", answer({"success": True}))
        running.on("GET /v2/pools", answer({"pools": [POOL]}))
        running.on("GET /v2/catalog", answer({"models": {}, "nodes": {}}))
        running.on("GET /v1/models", answer({"data": [{"id": "m"}]}))
        running.on("GET /v2/tasks", answer({"tasks": [VIEW]}))
        running.on(f"GET /v2/tasks/{TASK}", answer(VIEW))
        yield running


@pytest.fixture
def llorch(control: ScriptedControl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    line = CommandLine(monkeypatch, tmp_path)
    line.env(LLORCH_URL=control.url, LLORCH_TOKEN=SECRET)
    return line


def body_of(control: ScriptedControl) -> dict[str, Any]:
    """The one submission, without the id that it was given."""
    (asked,) = control.asked("POST /v2/tasks")
    body = asked.json()
    assert len(body.pop("task_id")) == 36
    return body


def lines_of(ran: Ran) -> dict[str, str]:
    """`error: ...` and its companions, by name."""
    return dict(line.split(": ", 1) for line in ran.err.splitlines())


# ---------------------------------------------------------------- submit: what goes in


async def test_a_prompt_as_an_argument_is_answered_on_standard_output_and_nothing_else_is(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("POST /v2/tasks", stream(QUEUED, *WHOLE))
    assert await llorch("submit", "-m", "m", "Hello") == (0, "t0 t1 ", "")
    assert body_of(control) == {"prompt": "Hello", "model": "m"}
    assert control.requests[0].headers["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    ("argv", "stdin", "prompt"),
    [
        ((), b"piped", "piped"),
        (("-",), b"piped\n", "piped"),
        (("argument",), b"piped\n", "piped\nargument"),
        (("argument",), b"", "argument"),
        (("-",), b"two\nlines\n", "two\nlines"),
        (("--", "-x"), b"", "-x"),
        (("[bold] [/foo]",), "ünï — 🙂".encode(), "ünï — 🙂\n[bold] [/foo]"),
    ],
)
async def test_the_prompt_is_what_is_piped_in_a_newline_and_the_argument(
    control: ScriptedControl, llorch: CommandLine, argv: Sequence[str], stdin: bytes, prompt: str
) -> None:
    ran = await llorch("submit", "-m", "m", *argv, stdin=stdin)
    assert ran.code == 0
    assert body_of(control)["prompt"] == prompt


async def test_every_flag_of_submit_reaches_the_body(control: ScriptedControl, llorch: CommandLine) -> None:
    ran = await llorch(
        "submit", "-m", "m", "-s", "Be brief", "--max-tokens", "5", "--temperature", "0.5", "--seed", "7",
        "--pin", "n1/p0", "--prefer", "a,b", "--prefer", "c", "--avoid", "d", "--zone", "z", "--priority", "batch",
        "--deadline", "1.5s", "--on-node-loss", "continue", "Hello",
    )  # fmt: skip
    assert ran.code == 0
    assert body_of(control) == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}],
        "max_tokens": 5, "temperature": 0.5, "seed": 7, "priority": "batch", "deadline_ms": 1500,
        "on_node_loss": "continue",
        "placement": {"pin": "n1/p0", "prefer": ["a", "b", "c"], "avoid": ["d"], "zone": "z"},
    }  # fmt: skip


@pytest.mark.parametrize("flags", [(), ("--no-stream",), ("--detach",)])
async def test_the_same_command_under_the_same_key_is_the_same_request(
    control: ScriptedControl, llorch: CommandLine, flags: Sequence[str]
) -> None:
    control.on("POST /v2/tasks", answer({**VIEW, "text": "x"}) if flags else stream(*WHOLE))
    for _ in range(2):
        assert (await llorch("submit", "-m", "m", "--idempotency-key", "build-7", *flags, "Hello")).code == 0
    once, again = control.asked("POST /v2/tasks")
    assert once.headers["Idempotency-Key"] == again.headers["Idempotency-Key"] == "build-7"
    assert once.body == again.body
    ran = await llorch("submit", "-m", "m", "--idempotency-key", "a\nb", "Hello")
    assert (ran.code, ran.out) == (2, "")
    assert "255 printable" in lines_of(ran)["error"]


async def test_chat_sends_a_message_without_a_system_message(control: ScriptedControl, llorch: CommandLine) -> None:
    await llorch("submit", "-m", "m", "--chat", "Hello")
    assert body_of(control) == {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


async def test_the_model_may_be_left_out_if_there_is_one(control: ScriptedControl, llorch: CommandLine) -> None:
    assert (await llorch("submit", "Hello")).code == 0
    assert body_of(control)["model"] == "m"


async def test_several_models_must_be_told_apart_and_none_is_no_capacity(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("GET /v1/models", answer({"data": [{"id": "b"}, {"id": "a"}]}), answer({"data": []}))
    several, none = await llorch("submit", "Hello"), await llorch("submit", "Hello")
    assert (several.code, lines_of(several)["error"]) == (2, "there are 2 models: a, b")
    assert (none.code, lines_of(none)["error"]) == (6, "there is no model")
    assert control.asked("POST /v2/tasks") == []


# ---------------------------------------------------------------- submit: what comes out


async def test_no_stream_prints_the_text_of_the_finished_task(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/tasks", answer({**VIEW, "text": "t0 [bold] [/foo] \x1b[31m"}))
    assert await llorch("submit", "-m", "m", "--no-stream", "Hello") == (0, "t0 [bold] [/foo] \x1b[31m", "")
    assert control.requests[0].headers["Accept"] == "application/json"


@pytest.mark.parametrize("form", [("--json",), ("-o", "json"), ("-o", "jsonl")])
async def test_json_prints_each_event_as_one_line_with_its_place(
    control: ScriptedControl, llorch: CommandLine, form: Sequence[str]
) -> None:
    control.on("POST /v2/tasks", stream(QUEUED, started(), token(0, "a\nb\u2028c"), end()))
    ran = await llorch("submit", "-m", "m", *form, "Hello")
    assert (ran.code, ran.err) == (0, "")
    events = [json.loads(line) for line in ran.out.split("\n") if line]
    assert [event["event"] for event in events] == ["queued", "started", "token", "end"]
    assert events[2] == {"event": "token", "id": "000000000020", "t": "a\nb\u2028c", "i": 0}
    assert "id" not in events[0]


async def test_a_whole_task_is_one_document_in_json_and_yaml(control: ScriptedControl, llorch: CommandLine) -> None:
    task = {**VIEW, "text": "t0 \x1b"}
    control.on("POST /v2/tasks", answer(task))
    for argv, read in (
        (("--no-stream", "--json"), json.loads),
        (("--no-stream", "-o", "jsonl"), json.loads),
        (("-o", "yaml"), yaml.safe_load),
    ):
        ran = await llorch("submit", "-m", "m", *argv, "Hello")
        assert (ran.code, ran.err) == (0, "")
        assert read(ran.out) == task


async def test_detaching_prints_the_tasks_id_alone(control: ScriptedControl, llorch: CommandLine) -> None:
    taken = {"task_id": TASK, "state": "placed", "events_url": f"/v2/tasks/{TASK}/events"}
    control.on("POST /v2/tasks", answer(taken, 202))
    for argv in ((), ("-q",)):
        assert await llorch("submit", "-m", "m", "--detach", *argv, "Hello") == (0, f"{TASK}\n", "")
    assert json.loads((await llorch("submit", "-m", "m", "--detach", "--json", "Hello")).out) == taken


async def test_text_is_printed_as_it_came_and_never_read_as_markup(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    said = "[bold]x[/bold] [/foo] \x1b[31mred\x07\x9b \r\n ünï 🙂"
    control.on("POST /v2/tasks", stream(started(), token(0, said), end()))
    assert await llorch("submit", "-m", "m", "Hello") == (0, said, "")


async def test_flags_that_mean_nothing_are_told_and_nothing_is_sent(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    for words in (
        "-q", "-o name", "--json -q", "--json -o yaml", "-o toml", "--max-tokens 0", "--max-tokens many",
        "--temperature -1", "--temperature nan", "--temperature inf", "--seed -1", "--deadline soon", "--nonsense",
        "--timeout soon",
    ):  # fmt: skip
        ran = await llorch("submit", "-m", "m", *words.split(), "Hello")
        assert (ran.code, ran.out) == (2, ""), words
        assert ran.err.startswith("error: "), words
    assert control.requests == []


async def test_a_prompt_that_is_none_is_a_usage_error(control: ScriptedControl, llorch: CommandLine) -> None:
    for argv, stdin in (((), b""), (("",), b""), (("  ",), b"\n"), (("-",), b""), ((), b"\xff")):
        ran = await llorch("submit", "-m", "m", *argv, stdin=stdin)
        assert (ran.code, ran.out) == (2, ""), (argv, stdin)
    assert control.requests == []


async def test_an_argument_that_is_not_utf_8_is_refused_and_not_changed(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    ran = await llorch("submit", "-m", "m", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert (ran.code, lines_of(ran)["error"]) == (2, "the prompt is not UTF-8 text")
    assert control.requests == []


# ---------------------------------------------------------------- submit: exit codes


REFUSALS = {
    1: (Code.ENGINE_FAILED, Code.NODE_LOST, Code.INTERNAL, Code.CONFLICT),
    2: (Code.INVALID_REQUEST, Code.CONTEXT_LENGTH_EXCEEDED, Code.PAYLOAD_TOO_LARGE),
    3: (Code.UNAUTHENTICATED, Code.FORBIDDEN),
    4: (Code.MODEL_NOT_FOUND, Code.NODE_NOT_FOUND, Code.POOL_NOT_FOUND),
    6: (Code.NO_CAPACITY, Code.MODEL_NOT_AVAILABLE, Code.QUEUE_FULL, Code.DRAINING),
    8: (Code.DEADLINE_EXCEEDED, Code.QUEUE_TIMEOUT, Code.ENGINE_STALLED),
}


@pytest.mark.parametrize("exit_code", REFUSALS)
async def test_a_refusal_has_its_exit_code_and_says_what_why_and_what_next(
    control: ScriptedControl, llorch: CommandLine, exit_code: int
) -> None:
    for code in REFUSALS[exit_code]:
        control.on("POST /v2/tasks", refusal(code, "it can't be\x1b[2J done", hint="do this", request_id="abc-1"))
        expected = f"error: it can't be[2J done\nwhy: {code}\nhint: do this\nrequest-id: abc-1\n"
        assert await llorch("submit", "-m", "m", "Hello") == (exit_code, "", expected)
        assert await llorch("submit", "-m", "m", "--no-stream", "Hello") == (exit_code, "", expected)


@pytest.mark.parametrize(
    ("events", "exit_code"),
    [
        ((started(), error("NODE_LOST")), 1),
        ((error("NO_CAPACITY"),), 6),
        ((QUEUED, error("QUEUE_TIMEOUT")), 8),
        ((QUEUED, error("RECOVERING")), 6),
        ((error("SOMETHING_NEW"),), 1),
        ((started(), token(0), error("NODE_LOST")), 7),
        ((started(), token(0), error("ENGINE_FAILED")), 7),
        ((started(), token(0), error("DEADLINE_EXCEEDED")), 8),
        ((started(), token(0), end("canceled")), 1),
        ((started(), token(0), end("length")), 0),
    ],
)
async def test_the_last_event_of_a_stream_decides_the_exit_code(
    control: ScriptedControl, llorch: CommandLine, events: Sequence[bytes], exit_code: int
) -> None:
    control.on("POST /v2/tasks", stream(*events))
    ran = await llorch("submit", "-m", "m", "Hello")
    assert (ran.code, ran.out) == (exit_code, "t0 " if token(0) in events else "")
    assert ran.err.startswith("error: ") is (exit_code != 0)
    if exit_code and events[-1] != end("canceled"):
        assert lines_of(ran)["request-id"] == "req-1"


async def test_a_whole_task_that_was_canceled_has_failed(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/tasks", answer({**VIEW, "finish_reason": "canceled", "text": "t0 "}))
    ran = await llorch("submit", "-m", "m", "--no-stream", "Hello")
    assert (ran.code, ran.out) == (1, "t0 ")


@pytest.mark.parametrize("then", [Then.CUT, Then.END])
async def test_a_stream_that_breaks_after_output_began_is_7_and_names_the_task(
    control: ScriptedControl, llorch: CommandLine, then: Then
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=then))
    ran = await llorch("submit", "-m", "m", "Hello")
    assert (ran.code, ran.out) == (7, "t0 ")
    task_id = control.asked("POST /v2/tasks")[0].json()["task_id"]
    assert lines_of(ran)["hint"] == f"what is left may still be there: llorch task logs {task_id} --after 000000000020"


async def test_a_stream_that_breaks_is_taken_up_again_and_nobody_notices(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.CUT))
    control.on("GET events", stream(token(0), token(1), end()))
    assert await llorch("submit", "-m", "m", "Hello") == (0, "t0 t1 ", "")


@pytest.mark.parametrize("flags", [(), ("--json",), ("--no-stream",), ("--detach", "-q")])
async def test_a_submission_that_is_lost_is_sent_again_and_nobody_notices(
    control: ScriptedControl, llorch: CommandLine, flags: Sequence[str]
) -> None:
    whole = {"--no-stream", "--detach"} & set(flags)
    control.on("POST /v2/tasks", hang_up, refusal(Code.RECOVERING), answer(VIEW) if whole else stream(*WHOLE))
    ran = await llorch("submit", "-m", "m", *flags, "Hello")
    assert (ran.code, ran.err) == (0, "")
    assert len(control.asked("POST /v2/tasks")) == 3


async def test_an_answer_that_is_not_what_the_node_wrote_is_7(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), token(1), end(of="t0 ")))
    ran = await llorch("submit", "-m", "m", "Hello")
    assert (ran.code, ran.out) == (7, "t0 t1 ")
    assert lines_of(ran)["error"] == "the stream is not what the node wrote"


async def test_a_stream_that_breaks_before_any_output_is_5(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/tasks", hang_up)
    ran = await llorch("submit", "-m", "m", "Hello")
    assert (ran.code, ran.out) == (5, "")


@pytest.mark.parametrize(
    "said", [answer(b"<html>"), answer({}, 302, {"Location": "/x"}), stream(*WHOLE, headers={"Content-Type": "text/x"})]
)
async def test_what_is_no_llorch_is_5(control: ScriptedControl, llorch: CommandLine, said: Answer) -> None:
    control.on("POST /v2/tasks", said)
    ran = await llorch("submit", "-m", "m", "Hello")
    assert (ran.code, ran.out) == (5, "")
    assert "<html>" not in ran.err


async def test_a_stream_whose_token_was_revoked_says_so_and_is_3(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.CUT))
    control.on("GET events", refusal(Code.UNAUTHENTICATED, "no valid token was presented"))
    ran = await llorch("submit", "-m", "m", "Hello")
    assert (ran.code, ran.out) == (3, "t0 ")
    assert lines_of(ran)["error"] == "the stream was cut off: its token is good no more"
    assert "no valid token" in lines_of(ran)["why"]


async def test_a_certificate_that_nobody_trusts_is_5_and_tls_ca_mends_it(llorch: CommandLine, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path / "tls")
    async with scripted(tls=server_context(str(cert), str(key))) as control:
        control.on("POST /v2/tasks", stream(*WHOLE))
        ran = await llorch("submit", "--url", control.url, "-m", "m", "Hello")
        assert (ran.code, ran.out) == (5, "")
        for way in ("llorch context add NAME --url URL --ca-pin SHA256", "--tls-ca FILE"):
            assert way in lines_of(ran)["hint"]
        assert control.requests == []
        ran = await llorch("submit", "--url", control.url, "--tls-ca", str(cert), "-m", "m", "Hello")
        assert ran == (0, "t0 t1 ", "")


async def test_a_timeout_is_8_and_the_control_sees_the_cancel(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.SILENCE))
    ran = await llorch("submit", "--timeout", "1s", "-m", "m", "Hello")
    assert (ran.code, ran.out) == (8, "t0 ")
    assert lines_of(ran)["error"] == "it took longer than --timeout, 1 s"
    (asked,) = control.asked("POST /v2/tasks")
    assert [other.path for other in control.requests[1:]] == [f"/v2/tasks/{asked.json()['task_id']}/cancel"]


ATTACHED = SSE | {"Idempotency-Replayed": "true", "X-Llorch-Task": TASK}
LEFT = f"left task {TASK} to whoever submitted it before, under the same key\n"
KEYED = ("submit", "-m", "m", "--idempotency-key", "k", "Hello")


async def test_a_timeout_over_a_task_that_somebody_submitted_before_leaves_it(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.SILENCE, headers=ATTACHED))
    ran = await llorch(*KEYED, "--timeout", "1s")
    assert (ran.code, ran.out) == (8, "t0 ")
    assert ran.err == f"{LEFT}error: it took longer than --timeout, 1 s\n"
    assert len(control.requests) == 1


async def test_a_closed_pipe_over_a_task_that_somebody_submitted_before_leaves_it(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(_text: str) -> None:
        raise OutputClosed

    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.SILENCE, headers=ATTACHED))
    monkeypatch.setattr(submit, "write_out", closed)
    ran = await llorch(*KEYED)
    assert (ran.code, ran.err) == (141, LEFT)
    assert len(control.requests) == 1


# ---------------------------------------------------------------- the other commands


CLIENT_COMMANDS = [
    (("status",), "GET /readyz"),
    (("node", "ls"), "GET /v2/nodes"),
    (("node", "show", "n1"), "GET /v2/nodes/n1"),
    (("node", "pardon", "n1"), "POST /v2/nodes/n1/pardon"),
    (("node", "drain", "n1", "--no-wait"), "POST /v2/nodes/n1/drain"),
    (("node", "rm", "n1"), "DELETE /v2/nodes/n1"),
    (("pool", "ls"), "GET /v2/pools"),
    (("pool", "show", "n1/p0"), "GET /v2/nodes/n1"),
    (("pool", "drain", "n1/p0"), "POST /v2/nodes/n1/pools/p0/drain"),
    (("logs", "n1/p0"), "GET /v2/nodes/n1/pools/p0/logs"),
    (("logs", "n1/p0", "-f"), "GET /v2/nodes/n1/pools/p0/logs"),
    (("task", "ls"), "GET /v2/tasks"),
    (("task", "show", TASK), f"GET /v2/tasks/{TASK}"),
    (("task", "cancel", TASK), f"POST /v2/tasks/{TASK}/cancel"),
    (("task", "logs", TASK), f"GET /v2/tasks/{TASK}/events"),
    (("explain", TASK), f"GET /v2/tasks/{TASK}/placement"),
    (("explain", "--dry-run", "-m", "m"), "POST /v2/placement"),
    (("submit", "-m", "m", "Hello"), "POST /v2/tasks"),
]


@pytest.mark.parametrize(("argv", "what"), CLIENT_COMMANDS, ids=lambda part: " ".join(part[:2]) if part else "")
async def test_every_client_command_has_the_same_codes_for_the_same_troubles(
    control: ScriptedControl, llorch: CommandLine, argv: Sequence[str], what: str
) -> None:
    for said, exit_code in (
        (refusal(Code.UNAUTHENTICATED, "who?"), 3),
        (refusal(Code.FORBIDDEN, "not you"), 3),
        (refusal(Code.NOT_FOUND, "nothing"), 4),
        (refusal(Code.NO_CAPACITY, "full"), 6),
        (refusal(Code.INTERNAL, "oh"), 1),
        (answer(b"<html>"), 5),
        (answer({}, 307, {"Location": "/elsewhere"}), 5),
    ):
        if argv == ("status",) and exit_code == 6:
            continue  # 503 is how a control that drains says so
        control.on(what, said)
        ran = await llorch(*argv)
        assert (ran.code, ran.out) == (exit_code, ""), (argv, exit_code, ran)
        assert ran.err.startswith("error: ")
        assert "Traceback" not in ran.err


@pytest.mark.parametrize(("argv", "what"), CLIENT_COMMANDS, ids=lambda part: " ".join(part[:2]) if part else "")
async def test_every_client_command_gives_up_after_its_timeout_and_where_nobody_is(
    control: ScriptedControl, llorch: CommandLine, argv: Sequence[str], what: str
) -> None:
    control.on(what, no_answer)
    assert (await llorch(*argv, "--timeout", "100ms")).code == 8
    ran = await llorch(*argv, "--url", "http://127.0.0.1:1")
    assert (ran.code, lines_of(ran)["why"]) == (5, "Connection refused")


async def test_lists_come_as_table_names_json_lines_and_yaml(control: ScriptedControl, llorch: CommandLine) -> None:
    for argv, rows, name in (
        (("node", "ls"), [NODE], "n1"),
        (("pool", "ls"), [POOL], "n1/p0"),
        (("task", "ls"), [VIEW], TASK),
    ):
        table = await llorch(*argv)
        head, row, *rest = table.out.split("\n")
        assert (table.code, table.err, rest) == (0, "", [""])
        assert head == head.upper()
        assert "n1" in row
        assert (await llorch(*argv, "-q")).out == (await llorch(*argv, "-o", "name")).out == f"{name}\n"
        assert json.loads((await llorch(*argv, "--json")).out) == rows
        assert [json.loads(line) for line in (await llorch(*argv, "-o", "jsonl")).out.splitlines()] == rows
        assert yaml.safe_load((await llorch(*argv, "-o", "yaml")).out) == rows


@pytest.mark.parametrize("state", ["ejected", "half_open"])
async def test_a_pool_that_is_passed_over_is_shown_so(
    control: ScriptedControl, llorch: CommandLine, state: str
) -> None:
    broken = POOL | {"breaker": {"state": state, "ejected_ms": 5_000, "reason": "5 tasks in a row failed"}}
    well = POOL | {"pool_id": "p1", "breaker": {"state": "closed", "ejected_ms": None, "reason": None}}
    control.on("GET /v2/pools", answer({"pools": [broken, well, POOL | {"breaker": "?"}]}))
    control.on("GET /v2/nodes/n1", answer({**NODE, "pools": [broken]}))
    _, first, second, third = (await llorch("pool", "ls")).out.splitlines()
    assert f"  ready,{state}  " in first
    assert "  ready  " in second
    assert "  ready  " in third
    assert f"  ready,{state}  " in (await llorch("node", "show", "n1")).out


async def test_one_thing_comes_as_fields_name_json_and_yaml(control: ScriptedControl, llorch: CommandLine) -> None:
    for argv, value, name in ((("node", "show", "n1"), NODE, "n1"), (("task", "show", TASK), VIEW, TASK)):
        assert f"{name}\n" in (await llorch(*argv)).out
        assert (await llorch(*argv, "-q")).out == f"{name}\n"
        assert json.loads((await llorch(*argv, "--json")).out) == value
        assert json.loads((await llorch(*argv, "-o", "jsonl")).out) == value
        assert yaml.safe_load((await llorch(*argv, "-o", "yaml")).out) == value


async def test_a_node_is_shown_with_its_gpus_and_pools(control: ScriptedControl, llorch: CommandLine) -> None:
    shown = (await llorch("node", "show", "n1")).out
    assert "1.0G/24G" in shown
    assert "41C" in shown
    assert "3/4" in shown


async def test_a_quarantined_node_is_shown_with_why_and_can_be_pardoned(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    shut_out = NODE | {"state": "quarantined", "quarantine": {"reason": "lies (3)", "age_ms": 1, "left_ms": 9}}
    control.on("GET /v2/nodes", answer({"nodes": [shut_out]}))
    control.on("GET /v2/nodes/n1", answer(shut_out))
    for argv in (("node", "ls"), ("node", "show", "n1")):
        ran = await llorch(*argv)
        assert ("quarantined" in ran.out, "lies (3)" in ran.out) == (True, True)
    ran = await llorch("status")
    assert (ran.code, "problem  node n1 is quarantined for lies (3)\n" in ran.out) == (1, True)
    ran = await llorch("node", "pardon", "n1")
    assert (ran.code, ran.out, ran.err) == (0, "", "n1 may come back\n")
    control.on("POST /v2/nodes/n1/pardon", answer({"success": True, "node_id": "n1", "was_quarantined": False}))
    assert (await llorch("node", "pardon", "n1")).err == "n1 was not quarantined\n"
    assert json.loads((await llorch("node", "pardon", "n1", "--json")).out)["was_quarantined"] is False


async def test_what_a_node_says_can_not_move_the_cursor_or_break_a_table(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("GET /v2/pools", answer({"pools": [{**POOL, "last_error": "[bold]a[/foo]\x1b[2J\nb"}]}))
    ran = await llorch("pool", "ls")
    assert ran.out.count("\n") == 2
    assert ran.out.rstrip("\n").endswith("[bold]a[/foo][2J b")


@pytest.mark.parametrize(
    ("nodes", "pools", "problem"),
    [
        ([NODE], [POOL], None),
        ([NODE | {"state": "draining"}, NODE], [POOL], None),
        ([NODE | {"state": "offline"}], [POOL], "node n1 is offline"),
        ([NODE | {"suspect": True}], [POOL], "node n1 is suspect: it has missed heartbeats"),
        ([NODE], [POOL, POOL | {"pool_id": "p1", "state": "failed", "last_error": "no"}], "pool n1/p1 has failed: no"),
        ([NODE], [POOL | {"breaker": {"state": "closed", "ejected_ms": None, "reason": None}}], None),
        (
            [NODE],
            [POOL | {"breaker": {"state": "ejected", "ejected_ms": 12_300, "reason": "5 tasks in a row failed"}}],
            "pool n1/p0 is ejected for 12 s more: 5 tasks in a row failed",
        ),
        ([NODE], [POOL | {"breaker": {"state": "half_open", "ejected_ms": None, "reason": "its trial failed"}}], None),
        ([NODE | {"state": "draining"}], [POOL | {"bound": False, "draining": True}], "no pool takes tasks"),
        ([NODE], [POOL | {"bound": False, "ready": False, "state": "loading"}], "no pool takes tasks"),
        ([NODE], [], "there is no pool"),
        ([], [], "no node has joined"),
    ],
)
async def test_status_is_0_if_all_serves_and_else_1_with_the_reason(
    control: ScriptedControl, llorch: CommandLine, nodes: list[Any], pools: list[Any], problem: str | None
) -> None:
    control.on("GET /v2/nodes", answer({"nodes": nodes}))
    control.on("GET /v2/pools", answer({"pools": pools}))
    ran = await llorch("status")
    assert (ran.code, ran.err) == (0 if problem is None else 1, "")
    assert ("problem" in ran.out) is (problem is not None)
    assert f"problem  {problem}\n" in ran.out or problem is None
    assert (await llorch("status", "-q")).out == ("ok\n" if problem is None else "degraded\n")
    document = json.loads((await llorch("status", "--json")).out)
    assert document["problems"] == ([] if problem is None else [problem])


async def test_status_of_a_control_that_drains_is_1(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("GET /readyz", answer({"status": "draining", "version": "9"}, 503))
    ran = await llorch("status")
    assert (ran.code, ran.err) == (1, "")
    assert "problem  the control is draining\n" in ran.out


async def test_status_of_a_control_that_blames_itself_is_1(control: ScriptedControl, llorch: CommandLine) -> None:
    storm = {"reason": "nodes vanished", "age_ms": 1_000}
    control.on("GET /readyz", answer({"status": "ok", "version": "9", "storm": storm}))
    ran = await llorch("status")
    assert (ran.code, ran.err) == (1, "")
    assert "problem  the control blames itself, and keeps what it knew of its nodes: nodes vanished\n" in ran.out


async def test_a_dry_run_that_is_refused_has_the_code_of_the_refusal(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    error_of = {"MODEL_NOT_FOUND": 4, "NO_CAPACITY": 6, "POOL_NOT_FOUND": 4}
    for code, exit_code in error_of.items():
        refused = {"outcome": "refuse", "model": "m", "pools": [], "error": {"code": code, "hint": "do this"}}
        control.on("POST /v2/placement", answer(refused))
        ran = await llorch("explain", "--dry-run", "-m", "m", "--pin", "n1")
        assert (ran.code, ran.err) == (exit_code, "")
        assert "hint: do this" in ran.out
    assert control.asked("POST /v2/placement")[-1].json()["placement"] == {"pin": "n1"}
    for argv in ((), (TASK, "--dry-run"), (TASK, "-m", "m"), (TASK, "--pin", "n1")):
        assert (await llorch("explain", *argv)).code == 2


async def test_a_tasks_output_is_read_again_from_a_place(control: ScriptedControl, llorch: CommandLine) -> None:
    events = f"GET /v2/tasks/{TASK}/events"
    control.on(events, stream(*WHOLE), stream(token(1), end()), answer(b"", 204))
    assert await llorch("task", "logs", TASK) == (0, "t0 t1 ", "")
    assert await llorch("task", "logs", TASK, "--after", "000000000020") == (0, "t1 ", "")
    assert await llorch("task", "logs", TASK, "--after", "000000001000") == (0, "", "")
    assert control.asked(events)[1].headers["Last-Event-ID"] == "000000000020"
    assert (await llorch("task", "logs", TASK, "-q")).code == 2
    control.on(events, stream(started(), token(0), error("NODE_LOST")))
    assert (await llorch("task", "logs", TASK)).code == 7


async def test_a_tasks_output_goes_on_where_its_control_went(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on(f"GET /v2/tasks/{TASK}/events", stream(started(), token(0), then=Then.CUT), stream(token(1), end()))
    assert await llorch("task", "logs", TASK) == (0, "t0 t1 ", "")


async def test_cancelling_says_so_on_standard_error(control: ScriptedControl, llorch: CommandLine) -> None:
    assert await llorch("task", "cancel", TASK) == (0, "", f"canceled {TASK}\n")
    assert await llorch("task", "cancel", TASK, "-q") == (0, f"{TASK}\n", "")


# ---------------------------------------------------------------- tracebacks


async def test_an_unexpected_fault_shows_a_traceback_only_with_debug(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> object:
        raise ZeroDivisionError("secret words")

    monkeypatch.setattr(api.LlorchClient, "submit", broken)
    ran = await llorch("submit", "-m", "m", "Hello")
    assert (ran.code, ran.out) == (1, "")
    assert lines_of(ran) == {
        "error": "an unexpected fault: ZeroDivisionError",
        "hint": "--debug shows where; please report it",
    }
    shown = await llorch("submit", "-m", "m", "--debug", "Hello")
    assert (shown.code, shown.out) == (1, "")
    assert "Traceback (most recent call last)" in shown.err
    assert shown.err.endswith(ran.err)


# ---------------------------------------------------------------- secrets


async def test_a_token_in_an_argument_works_and_is_warned_of(control: ScriptedControl, llorch: CommandLine) -> None:
    ran = await llorch("node", "ls", "-q", "--token", "in-an-argument")
    assert (ran.code, ran.out) == (0, "n1\n")
    assert ran.err.startswith("warning: --token: a secret on the command line shows in the list of processes")
    assert "in-an-argument" not in ran.err
    assert control.requests[0].headers["Authorization"] == "Bearer in-an-argument"


async def test_a_token_from_a_file_or_standard_input_is_used_in_silence(
    control: ScriptedControl, llorch: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    for argv, stdin, secret in (
        (("--token", f"@{file}"), b"", "from-a-file"),
        (("--token-file", str(file)), b"", "from-a-file"),
        (("--token", "-"), b"from-a-pipe\n", "from-a-pipe"),
        (("--token-file", "-"), b"from-a-pipe\n", "from-a-pipe"),
    ):
        assert await llorch("node", "ls", "-q", *argv, stdin=stdin) == (0, "n1\n", "")
        assert control.requests[-1].headers["Authorization"] == f"Bearer {secret}"


async def test_a_token_that_is_piped_in_never_becomes_a_prompt(control: ScriptedControl, llorch: CommandLine) -> None:
    ran = await llorch("submit", "-m", "m", "--token", "-", "Hello", stdin=b"from-a-pipe\n")
    assert ran == (0, "t0 t1 ", "")
    assert body_of(control)["prompt"] == "Hello"
    assert control.requests[-1].headers["Authorization"] == "Bearer from-a-pipe"
    for argv in (("-",), ()):
        ran = await llorch("submit", "-m", "m", "--token", "-", *argv, stdin=b"from-a-pipe\n")
        assert (ran.code, ran.out) == (2, "")
        said = "standard input holds the token, so it can't hold the prompt" if argv else "there is no prompt"
        assert lines_of(ran)["error"] == said
        assert "from-a-pipe" not in ran.err
    assert len(control.requests) == 1


async def test_client_commands_never_read_the_settings_file_of_the_working_directory(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    (llorch.work / "llorch.yaml").write_text("url: http://127.0.0.1:1\nnonsense: [\n")
    for argv, _ in CLIENT_COMMANDS:
        if "explain" not in argv and "logs" not in argv:
            assert (await llorch(*argv)).code == 0, argv
    assert (await llorch("config", "check", "client")).code == 0
    assert (await llorch("config", "check", "control")).code == 2, "a role does read it"


async def test_a_broken_standard_output_is_1_and_cancels_the_task(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.SILENCE))

    class Full:
        def isatty(self) -> bool:
            return False

        closed = False

        def write(self, _text: str) -> None:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            raise OSError

        def flush(self) -> None:
            pass

    monkeypatch.setattr("llorch.cli.output.sys", type("Sys", (), {"stdout": Full(), "stderr": sys.stderr}))
    ran = await llorch("submit", "-m", "m", "Hello")
    assert ran.code == 1
    assert [asked.path.rsplit("/", 1)[-1] for asked in control.requests] == ["tasks", "cancel"]


async def test_a_token_that_was_cut_off_is_told_before_the_control_refuses_it(llorch: CommandLine) -> None:
    whole = write_token(secrets.token_bytes(ID_BYTES + SECRET_BYTES))[1]
    for shown, told in ((whole[:-3], True), (whole, False)):
        llorch.env(LLORCH_TOKEN=shown)
        ran = await llorch("node", "ls")
        assert ("cut off or mistyped" in ran.err) is told
        assert shown not in ran.err
