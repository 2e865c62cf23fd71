"""`llorch chat` from a pipe, against a scripted control: what is sent, what is printed, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from llorch.cli.chat_session import Chat
from llorch.cli.chat_terminal import Terminal
from llorch.cli.chat_turn import Stops
from llorch.cli.main import run
from llorch.cli.output import OutputClosed, OutputFailed, write_out
from llorch.client.api import LlorchClient
from llorch.errors import MEANINGS, Code
from tests.cluster import eventually
from tests.component.command_line import CommandLine, Ran
from tests.component.scripted_control import (
    QUEUED,
    SSE,
    Answer,
    Asked,
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

ROOT = Path(__file__).parent.parent.parent


def says(*texts: str, reason: str = "stop") -> Answer:
    return stream(QUEUED, started(), *(token(i, text) for i, text in enumerate(texts)), end(reason))


@pytest.fixture(autouse=True)
def quick_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    resume_quickly(monkeypatch)


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted() as running:
        running.on("GET /v1/models", answer({"data": [{"id": "m"}]}))
        running.on("POST /v2/tasks", says("one"), says("two\n"), says("thr", "ee"), says("four"), says("five"))
        yield running


@pytest.fixture
def llorch(control: ScriptedControl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    line = CommandLine(monkeypatch, tmp_path)
    line.env(LLORCH_URL=control.url, LLORCH_TOKEN="t")
    return line


def bodies(control: ScriptedControl) -> list[dict[str, Any]]:
    found = [asked.json() for asked in control.asked("POST /v2/tasks")]
    assert len({body.pop("task_id") for body in found}) == len(found)
    return found


def said(control: ScriptedControl) -> list[list[str]]:
    """What each turn was asked with: the contents of its messages."""
    return [[message["content"] for message in body["messages"]] for body in bodies(control)]


def lines_of(ran: Ran) -> list[tuple[str, str]]:
    return [(name, text) for name, _, text in (line.partition(": ") for line in ran.err.splitlines())]


# ---------------------------------------------------------------- turns


async def test_every_line_is_a_message_and_every_turn_is_sent_the_whole_conversation(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    ran = await llorch("chat", stdin=b"Hello\n\nAnd then?\r\nLast")
    assert ran == (0, "one\ntwo\nthree\n", "")
    assert bodies(control)[2] == {
        "model": "m",
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "two\n"},
            {"role": "user", "content": "Last"},
        ],
    }
    assert said(control)[:2] == [["Hello"], ["Hello", "one", "And then?"]]


async def test_the_flags_reach_every_turn_and_the_argument_is_the_first_message(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    flags = ("-m", "m", "-s", "Be brief.", "--temperature", "0.5", "--max-tokens", "7", "--seed", "3")
    ran = await llorch("chat", *flags, "/not a command", stdin=b"second\n")
    assert ran == (0, "one\ntwo\n", "")
    assert said(control) == [["Be brief.", "/not a command"], ["Be brief.", "/not a command", "one", "second"]]
    for body in bodies(control):
        assert body["messages"][0]["role"] == "system"
        assert {name: body[name] for name in body if name != "messages"} == {
            "model": "m", "temperature": 0.5, "max_tokens": 7, "seed": 3,
        }  # fmt: skip


async def test_blocks_backslashes_and_double_slashes_come_as_one_message(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    text = b'"""\na\n  b\\\n\n/help\n"""\nc \\\nd\n//etc\ne \\'
    assert (await llorch("chat", stdin=text)).code == 0
    assert [turn[-1] for turn in said(control)] == ["a\n  b\\\n\n/help", "c \nd", "/etc", "e"]


async def test_a_pipe_gets_what_the_model_said_with_its_control_characters(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("POST /v2/tasks", says("[bold]\x1b[31mred\r", " ünï 🙂"))
    assert await llorch("chat", stdin=b"x\n") == (0, "[bold]\x1b[31mred\r ünï 🙂\n", "")


async def test_an_empty_answer_is_an_empty_line_and_no_turn(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/tasks", says(), says("two"))
    assert await llorch("chat", stdin=b"first\nsecond\n") == (0, "\ntwo\n", "")
    assert said(control)[1] == ["second"]


async def test_nothing_piped_in_asks_nothing(control: ScriptedControl, llorch: CommandLine) -> None:
    for stdin in (b"", b"\n  \n"):
        assert await llorch("chat", stdin=stdin) == (0, "", "")
    assert control.asked("POST /v2/tasks") == []


async def test_a_connection_that_the_control_closed_while_a_line_was_awaited_is_not_used_again(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = threading.Event()

    async def says_one_and_leaves(_asked: Asked, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        await response.write(started() + token(0, "one") + end())
        await response.write_eof()
        assert request.transport is not None
        request.transport.close()
        try:
            await asyncio.Event().wait()
        finally:  # it is closed, which ends whoever answers there
            closed.set()
        return response

    class Typed(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            assert line != b"second\n" or closed.wait(10)
            return line

    control.on("POST /v2/tasks", says_one_and_leaves, says("two"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Typed(b"first\nsecond\n")))
    assert await asyncio.to_thread(run, ["chat"]) == 0
    assert capsys.readouterr() == ("one\ntwo\n", "")


# ---------------------------------------------------------------- commands


async def test_commands_change_what_the_next_turn_is_asked_with(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("GET /v1/models", answer({"data": [{"id": "n"}, {"id": "m"}]}))
    lines = (
        "first", "/system Be brief.", "/model n", "second", "/system -", "third", "/clear", "fourth", "/exit", "never",
    )  # fmt: skip
    ran = await llorch("chat", "-m", "m", stdin="\n".join(lines).encode())
    assert ran == (0, "one\ntwo\nthree\nfour\n", "")
    assert said(control) == [
        ["first"],
        ["Be brief.", "first", "one", "second"],
        ["first", "one", "second", "two\n", "third"],
        ["fourth"],
    ]
    assert [body["model"] for body in bodies(control)] == ["m", "n", "n", "n"]


async def test_retry_asks_the_last_question_again_in_place_of_its_answer(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    ran = await llorch("chat", "--seed", "4294967295", stdin=b"/retry\nfirst\n/retry\n/retry\nsecond")
    assert (ran.code, ran.out) == (2, "one\ntwo\nthree\nfour\n")
    assert lines_of(ran)[0] == ("error", "nothing has been asked yet")
    assert said(control) == [["first"], ["first"], ["first"], ["first", "three", "second"]]
    assert [body["seed"] for body in bodies(control)] == [2**32 - 1, 0, 1, 2**32 - 1], "another try, another seed"


async def test_a_retry_that_fails_leaves_the_answer_that_there_was(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("POST /v2/tasks", says("one"), refusal(Code.QUEUE_FULL, "full"), says("two"), says("three"))
    ran = await llorch("chat", stdin=b"first\n/retry\nsecond\n/retry\n")
    assert (ran.code, ran.out) == (6, "one\ntwo\nthree\n")
    assert said(control)[2:] == [["first", "one", "second"], ["first", "one", "second"]]


async def test_lists_and_help_go_to_standard_error(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("GET /v1/models", answer({"data": [{"id": "n"}, {"id": "m\x1b[2J"}]}))
    ran = await llorch("chat", "-m", "n", "-s", "Be\x07 brief.", stdin=b"/model\n/system\n/system -\n/system\n/help\n")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.startswith("  m[2J\n* n\nBe brief.\nthere is no system message\n/model [NAME] ")
    assert "/exit" in ran.err


async def test_a_command_that_can_not_be_done_is_told_and_fails_the_run(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    for line, code, message, advice in (
        ("/model nope", 4, "there is no model nope", "there are: m"),
        ("/modle m", 2, "there is no command /modle", "did you mean /model? /help lists them; // begins a message"),
        ("/save talk.md", 1, "there is no conversation to save", "nothing has been answered yet"),
        ('"""', 2, 'a block that begins with """ has no end', 'end it with a line of """'),
    ):
        ran = await llorch("chat", stdin=line.encode())
        assert (ran.code, ran.out) == (code, "")
        assert [name for name, _ in lines_of(ran)] == ["error", "hint"]
        assert lines_of(ran)[0][1] == message
        assert lines_of(ran)[1][1].startswith(advice)
    ran = await llorch("chat", stdin=b"/model nope\nHello\n")
    assert (ran.code, ran.out, bodies(control)[0]["model"]) == (4, "one\n", "m"), "the model is as it was"


async def test_a_conversation_is_saved_and_nothing_is_lost_when_it_can_not_be(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    lines = ("Hi", "/save none/talk.md", "/save talk.json", "again", "/save talk.json", "/save! talk.json", "/save ~/t")
    ran = await llorch("chat", stdin="\n".join(lines).encode())
    assert (ran.code, ran.out) == (1, "one\ntwo\n")
    assert lines_of(ran) == [
        ("error", "none/talk.md can't be written: No such file or directory"),
        ("hint", "nothing is lost; give another name"),
        ("error", "talk.json exists"),
        ("hint", "/save! talk.json replaces it"),
    ]
    assert [m["content"] for m in json.loads((llorch.work / "talk.json").read_text())] == [
        "Hi",
        "one",
        "again",
        "two\n",
    ]
    assert (llorch.home / "t").read_text() == "You:\nHi\n\nm:\none\n\nYou:\nagain\n\nm:\ntwo\n"


# ---------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    ("said_by_control", "code", "printed", "why"),
    [
        (refusal(Code.QUEUE_FULL, "full", hint="retry"), 6, "", "QUEUE_FULL"),
        (refusal(Code.UNAUTHENTICATED, "who?"), 3, "", "UNAUTHENTICATED"),
        (refusal(Code.MODEL_NOT_FOUND, "none"), 4, "", "MODEL_NOT_FOUND"),
        (stream(started(), token(0, "pa"), error("NODE_LOST", "gone")), 7, "pa\n", "NODE_LOST"),
        (stream(error("QUEUE_TIMEOUT", "waited")), 8, "", "QUEUE_TIMEOUT"),
        (stream(started(), token(0, "pa"), then=Then.CUT), 7, "pa\n", None),
        (stream(started(), token(0, "pa"), end("canceled")), 1, "pa\n", "somebody else canceled it"),
    ],
)
async def test_a_turn_that_fails_is_told_is_not_kept_and_gives_the_exit_code(
    control: ScriptedControl, llorch: CommandLine, said_by_control: Answer, code: int, printed: str, why: str | None
) -> None:
    control.on("POST /v2/tasks", says("one"), said_by_control, says("three"), refusal(Code.INTERNAL))
    ran = await llorch("chat", stdin=b"first\nsecond\nthird\nfourth\n")
    assert (ran.code, ran.out) == (code, f"one\n{printed}three\n"), "of the first that failed, and it goes on"
    told = lines_of(ran)
    assert told[0][0] == "error"
    assert any(name == "why" and (why is None or text.startswith(why)) for name, text in told)
    assert said(control)[2] == ["first", "one", "third"]
    assert "Traceback" not in ran.err


async def test_a_turn_whose_connection_is_lost_goes_on_and_nobody_notices(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    cut = stream(started(), token(0, "pa"), then=Then.CUT)
    control.on("POST /v2/tasks", hang_up, cut, stream(QUEUED, then=Then.CUT), refusal(Code.DRAINING), says("two"))
    control.on("GET events", stream(token(1, "rt"), end(of="part")))
    assert await llorch("chat", stdin=b"first\nsecond\n") == (0, "part\ntwo\n", "")
    tries = [asked.headers["X-Llorch-Try"] for asked in control.asked("POST /v2/tasks")]
    assert tries == ["1", "2", "1", "2", "3"]


async def test_a_conversation_that_is_too_long_is_kept(control: ScriptedControl, llorch: CommandLine) -> None:
    for too_long in (refusal(Code.CONTEXT_LENGTH_EXCEEDED), stream(error("CONTEXT_LENGTH_EXCEEDED"))):
        control.requests.clear()
        control.on("POST /v2/tasks", says("one"), too_long, says("three"), says("four"))
        ran = await llorch("chat", stdin=b"first\nsecond\n/save talk\n/clear\n/retry\n")
        assert (ran.code, ran.out) == (2, "one\nthree\n")
        hints = [text for name, text in lines_of(ran) if name == "hint"]
        assert hints == [MEANINGS[Code.CONTEXT_LENGTH_EXCEEDED].hint], "nobody types here"
        assert (llorch.work / "talk").read_text() == "You:\nfirst\n\nm:\none\n"
        assert said(control)[-1] == ["second"]
        (llorch.work / "talk").unlink()


async def test_a_timeout_is_of_one_answer_and_the_control_sees_the_cancel(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("POST /v2/tasks", says("one"), stream(started(), token(0, "pa"), then=Then.SILENCE), says("three"))
    ran = await llorch("chat", "--timeout", "1s", stdin=b"first\nsecond\nthird\n")
    assert (ran.code, ran.out) == (8, "one\npa\nthree\n")
    assert ran.err == "error: it took longer than --timeout, 1 s\n"
    stalled = control.asked("POST /v2/tasks")[1].json()["task_id"]
    assert len(control.asked(f"POST /v2/tasks/{stalled}/cancel")) == 1


@pytest.mark.parametrize("fault", [OutputClosed(), OutputFailed("No space left on device")], ids=["closed", "full"])
@pytest.mark.parametrize("last", [end(), error("NODE_LOST")], ids=["end", "error"])
async def test_an_answer_whose_last_newline_can_not_be_written_ends_it_and_nothing_more_is_asked(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch, last: bytes, fault: Exception
) -> None:
    def until_the_newline(text: str) -> None:
        if text == "\n":
            raise fault
        write_out(text)

    monkeypatch.setattr("llorch.cli.chat.write_out", until_the_newline)
    control.on("POST /v2/tasks", stream(started(), token(0, "one"), last))
    ran = await llorch("chat", stdin=b"first\nsecond\n")
    told = "" if isinstance(fault, OutputClosed) else f"error: standard output can't be written: {fault}\n"
    assert ran == (141 if isinstance(fault, OutputClosed) else 1, "one", told)
    assert len(control.requests) == 2, "the models and one task, which has ended: nothing is left to cancel"


@pytest.mark.parametrize(
    ("models", "argv", "code", "message"),
    [
        (refusal(Code.UNAUTHENTICATED, "who?"), (), 3, "who?"),
        (answer({"data": []}), (), 6, "there is no model"),
        (answer({"data": [{"id": "b"}, {"id": "a"}]}), (), 2, "there are 2 models: a, b"),
        (answer({"data": [{"id": "b"}, {"id": "a"}]}), ("-m", "c"), 4, "there is no model c"),
        (answer({}), ("--url", "http://127.0.0.1:1"), 5, "can't reach http://127.0.0.1:1"),
        (no_answer, ("--timeout", "100ms"), 8, "it took longer than --timeout, 0.1 s"),
        (answer({}), ("--json",), 2, "a conversation is text"),
        (answer({}), ("-o", "table"), 2, "a conversation is text"),
        (answer({}), ("-q",), 2, "a conversation is text"),
        (answer({}), ("--temperature", "inf"), 2, "--temperature is not a number"),
        (answer({}), ("--token", "-"), 2, "standard input holds the token, so it can't hold messages"),
        (answer({}), ("caf\udce9",), 2, "the arguments are not UTF-8 text"),
    ],
)
async def test_what_is_wrong_at_the_start_ends_it_there(
    control: ScriptedControl, llorch: CommandLine, models: Answer, argv: tuple[str, ...], code: int, message: str
) -> None:
    control.on("GET /v1/models", models)
    ran = await llorch("chat", *argv, stdin=b"Hello\n")
    assert (ran.code, ran.out) == (code, "")
    assert ("error", message) in lines_of(ran)
    assert control.asked("POST /v2/tasks") == []
    assert len(control.asked("GET /v1/models")) <= 1


async def test_a_model_that_is_named_is_tried_where_none_is_known_yet(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("GET /v1/models", answer({"data": []}))
    assert await llorch("chat", "-m", "m", stdin=b"Hello\n") == (0, "one\n", "")


async def test_what_is_piped_in_must_be_utf_8_and_of_a_bounded_length(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = await llorch("chat", stdin=b"Hello\ncaf\xe9\nnever\n")
    assert (ran.code, ran.out, ran.err) == (2, "one\n", "error: what is piped in is not UTF-8 text\n")
    control.on("POST /v2/tasks", refusal(Code.QUEUE_FULL, "full"))
    ran = await llorch("chat", stdin=b"Hello\ncaf\xe9\n")
    assert ran.code == 6, "of the first that failed"
    assert ran.err.endswith("error: what is piped in is not UTF-8 text\n")
    control.requests.clear()
    monkeypatch.setattr("llorch.cli.chat.MAX_MESSAGE_BYTES", 100)
    for long in (b"x" * 101, b'"""\n' + b"line\n" * 30, b'"""\n' + "üüüüüüüüüü\n".encode() * 5):
        ran = await llorch("chat", stdin=long)
        assert (ran.code, ran.out) == (2, "")
        assert lines_of(ran)[0] == ("error", "a message of more than 100 bytes")
    assert control.asked("POST /v2/tasks") == []


async def test_debug_shows_where_a_turn_failed(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/tasks", refusal(Code.QUEUE_FULL, "full"))
    ran = await llorch("chat", "--debug", stdin=b"first\n")
    assert ran.err.startswith("Traceback ")
    assert "error: full\nwhy: QUEUE_FULL\n" in ran.err


# ---------------------------------------------------------------- what a person is told


class Talk:
    """A chat as at a terminal, without one: `shown` is what it answered, `stops` takes the signals."""

    def __init__(self, client: LlorchClient, stops: Stops) -> None:
        self.shown = ""
        self.chat = Chat(
            client, "m", models=["m"], system=None, options={}, timeout_s=None,
            run=stops.run, write=stops.guarded(self._show), talkative=True,
        )  # fmt: skip

    def _show(self, text: str) -> None:
        self.shown += text


@pytest.fixture
async def talk(control: ScriptedControl) -> AsyncIterator[Talk]:
    async with LlorchClient(control.url, "t") as client:
        with Stops() as stops:
            yield Talk(client, stops)


@pytest.mark.parametrize(
    ("control_says", "runs_on"),
    [(answer({}, 202), False), (refusal(Code.TASK_NOT_FOUND), False), (refusal(Code.INTERNAL), True)],
    ids=["canceled", "unknown", "refused"],
)
async def test_a_retry_that_is_stopped_leaves_the_answer_that_there_was_and_says_so(
    control: ScriptedControl, talk: Talk, capsys: pytest.CaptureFixture[str], control_says: Answer, runs_on: bool
) -> None:
    control.on("POST /v2/tasks", says("one"), stream(started(), token(0, "a pa"), then=Then.SILENCE), says("three"))
    assert await talk.chat.say("first") == 0
    retry = asyncio.create_task(talk.chat.take("/retry"))
    await eventually(lambda: talk.shown == "one\na pa")
    task_id = control.asked("POST /v2/tasks")[1].json()["task_id"]
    control.on(f"POST /v2/tasks/{task_id}/cancel", control_says)
    signal.raise_signal(signal.SIGINT)
    assert await retry == 130
    told = f"stopped; task {task_id} may still be running" if runs_on else "canceled"
    assert capsys.readouterr().err == f"{told}\nthe answer before it is kept\n"
    assert await talk.chat.say("second") == 0
    assert said(control)[2] == ["first", "one", "second"]


async def test_a_person_is_told_what_an_answer_lacks_and_how_to_go_on(
    control: ScriptedControl, talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = "/clear begins anew, then /retry asks this again; until then the conversation is kept"
    for control_says, code, told in (
        (says(), 0, ["the model said nothing; /retry asks again"]),
        (says("one", reason="length"), 0, ["cut off: --max-tokens or the model's context ends here"]),
        (refusal(Code.CONTEXT_LENGTH_EXCEEDED), 2, [f"hint: {kept}"]),
        (stream(error("CONTEXT_LENGTH_EXCEEDED", hint="shorten it")), 2, [f"hint: {kept}"]),
    ):
        control.on("POST /v2/tasks", control_says)
        assert await talk.chat.say("x") == code
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if not line.startswith(("error: ", "why: ", "request-id: "))] == told


@pytest.mark.parametrize("debug", [True, False])
async def test_a_fault_of_our_own_costs_one_answer_and_debug_shows_where_it_was(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    class NobodyTypes(Terminal):
        async def read(self) -> str:
            raise EOFError

    def broken(_text: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("llorch.cli.chat.is_terminal", lambda _stream: True)
    monkeypatch.setattr("llorch.cli.chat_terminal.Terminal", NobodyTypes)
    monkeypatch.setattr("llorch.cli.chat.write_out", broken)
    control.on("POST /v2/tasks", stream(started(), token(0, "pa"), then=Then.SILENCE))
    ran = await llorch("chat", *(["--debug"] if debug else []), "Hello")
    assert ran.code == 0
    assert "error: an unexpected fault: RuntimeError\n" in ran.err
    assert ("RuntimeError: a bug\n" in ran.err, "Traceback" in ran.err) == (debug, debug)
    task_id = control.asked("POST /v2/tasks")[0].json()["task_id"]
    assert len(control.asked(f"POST /v2/tasks/{task_id}/cancel")) == 1, "nobody takes its answer any more"


# ---------------------------------------------------------------- what is loaded


def test_what_edits_lines_is_loaded_only_where_lines_are_edited(tmp_path: Path) -> None:
    program = (
        "import sys; from llorch.cli.main import run\n"
        "codes = run(['--help']), 'llorch.client.api' in sys.modules, run(['chat', '--url', 'http://127.0.0.1:1'])\n"
        "print(*codes, 'prompt_toolkit' in sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, timeout=30, stdin=subprocess.DEVNULL,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert ran.stderr.splitlines()[-1] == "0 False 5 False"
