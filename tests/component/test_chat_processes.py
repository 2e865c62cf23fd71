"""`llorch chat` at a real terminal: a process of its own behind a pseudo-terminal, typed at as a person does."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import resource
import signal
import struct
import sys
import termios
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from llorch.errors import Code
from tests.cluster import eventually
from tests.component.scripted_control import (
    SSE,
    Answer,
    Asked,
    ScriptedControl,
    Then,
    answer,
    end,
    refusal,
    scripted,
    started,
    stream,
    token,
)

ROOT = Path(__file__).parent.parent.parent
WITHIN_S = 30.0  # a busy machine takes long to start a process
PROMPT = ">>>"  # the blank after it is shown by moving the cursor
UP, LEFT, ALT_ENTER, ENTER = "\x1b[A", "\x1b[D", "\x1b\r", "\r"
CTRL_C, CTRL_D, CTRL_BACKSLASH = "\x03", "\x04", "\x1c"


def says(text: str) -> Answer:
    return stream(started(), token(0, text), end())


def stalls(text: str) -> Answer:
    return stream(started(), token(0, text), then=Then.SILENCE)


class Chat:
    """One `llorch chat` and the terminal it runs in: what was typed, what is to be seen."""

    def __init__(self, process: Process, master: int) -> None:
        self.process = process
        self._master = master
        self._seen = b""
        self._looked = 0
        asyncio.get_running_loop().add_reader(master, self._read)

    def _read(self) -> None:
        try:
            self._seen += os.read(self._master, 65536)
        except OSError:  # the other end is closed
            asyncio.get_running_loop().remove_reader(self._master)

    @property
    def screen(self) -> str:
        """All that was ever shown, without what moves the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._seen.decode(errors="replace")).replace("\r", "")

    async def shows(self, text: str) -> str:
        """Wait until `text` is shown, after what was waited for before; what came before it."""

        def found() -> bool:
            return self.screen.find(text, self._looked) >= 0

        with contextlib.suppress(AssertionError):
            await eventually(found, within_s=WITHIN_S)
        assert found(), f"{text!r} in {self.screen[self._looked :]!r}"
        at = self.screen.find(text, self._looked)
        between, self._looked = self.screen[self._looked : at], at + len(text)
        return between

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    async def prompts(self, after: str = "") -> str:
        """Wait until it reads keys: only then ^C is one of them, and no signal. What is typed before is typed ahead.

        `after` is what is shown at the end of what came before: a prompt may be drawn more than once.
        """
        between = await self.shows(after) + after if after else ""
        between += await self.shows(PROMPT)
        await eventually(lambda: not self.flags() & termios.ISIG, within_s=WITHIN_S, what="the raw mode")
        return between

    async def ends(self) -> int:
        async with asyncio.timeout(WITHIN_S):
            return await self.process.wait()

    def flags(self) -> int:
        return int(termios.tcgetattr(self._master)[3])

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._master)


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted() as running:
        running.on("GET /v1/models", answer({"data": [{"id": "m"}]}))
        yield running


@pytest.fixture
def env(control: ScriptedControl, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLORCH_", "XDG_", "LC_"))}
    own = {"HOME": str(tmp_path), "LLORCH_URL": control.url, "LLORCH_TOKEN": "t", "PYTHONPATH": str(ROOT)}
    return kept | own | {"TERM": "xterm-256color", "LANG": "C.UTF-8"}


@contextlib.asynccontextmanager
async def chatting(env: dict[str, str], *argv: str, **how: Any) -> AsyncIterator[Chat]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llorch", "chat", *argv,
        env=env, cwd=env["HOME"], start_new_session=True, preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
        **({"stdin": slave, "stdout": slave, "stderr": slave} | how),
    )  # fmt: skip
    chat = Chat(process, master)
    try:
        yield chat
    finally:
        chat.close()
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(slave)
        os.close(master)


def asked(control: ScriptedControl) -> list[list[str]]:
    """What each turn was asked with: the contents of its messages."""
    bodies = [one.json() for one in control.asked("POST /v2/tasks")]
    return [[message["content"] for message in body["messages"]] for body in bodies]


def cancels(control: ScriptedControl) -> list[Asked]:
    return [one for one in control.requests if one.path.endswith("/cancel")]


def in_pipe(reading: int) -> int:
    """How many bytes wait to be read."""
    return int(struct.unpack("i", fcntl.ioctl(reading, termios.FIONREAD, b"\0" * 4))[0])


def on_cancel(control: ScriptedControl, say: Answer) -> None:
    """Answer the cancellation of whichever task was submitted last."""
    task_id = control.asked("POST /v2/tasks")[-1].json()["task_id"]
    control.on(f"POST /v2/tasks/{task_id}/cancel", say)


# ---------------------------------------------------------------- typing


async def test_a_person_types_edits_and_comes_back_another_day(
    control: ScriptedControl, env: dict[str, str], tmp_path: Path
) -> None:
    control.on("POST /v2/tasks", says("one\x1b[2J"), says("two\n"), says("three"), says("four"), says("five"))
    async with chatting(env) as chat:
        welcome = (await chat.prompts()).strip().splitlines()
        assert welcome == [f"llorch chat: m at {control.url}", "/help lists the commands, ^D leaves"]
        chat.type("Helo" + LEFT + "l" + ENTER)
        await chat.prompts(after="one[2J\n")  # spared control characters, and a line of its own after it
        chat.type(UP + " again" + ENTER)
        await chat.prompts(after="two\n")
        chat.type("a" + ALT_ENTER + "b" + ENTER)
        await chat.prompts(after="three\n")
        chat.type("\x1b[200~pasted\r\ntext\x1b[201~" + ENTER)
        await chat.prompts(after="four\n")
        chat.type("/save talk.md" + ENTER + "/model" + ENTER)
        await chat.shows("saved talk.md\n")
        await chat.prompts(after="* m\n")
        chat.type(CTRL_D)
        assert await chat.ends() == 0
        assert chat.flags() & termios.ICANON, "the terminal is as it was before"
        assert chat.flags() & termios.ECHO
    assert [turn[-1] for turn in asked(control)] == ["Hello", "Hello again", "a\nb", "pasted\ntext"]
    assert asked(control)[3][:-1] == ["Hello", "one\x1b[2J", "Hello again", "two\n", "a\nb", "three"]
    history = tmp_path / ".local" / "state" / "llorch" / "chat_history"
    assert (history.stat().st_mode & 0o777, history.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    async with chatting(env, "an argument") as chat:
        await chat.prompts(after="five\n")
        chat.type(UP * 4 + "!" + ENTER)  # past the argument, /model and /save
        await chat.prompts(after="five\n")
        chat.type("/bye" + ENTER)
        assert await chat.ends() == 0
    assert asked(control)[-1] == ["an argument", "five", "pasted\ntext!"]


async def test_what_is_typed_during_an_answer_is_not_shown_amid_it_and_is_asked_next(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    go_on = asyncio.Event()

    async def slowly(_asked: Asked, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        await response.write(started() + token(0, "first half,"))
        await go_on.wait()
        await response.write(token(1, " second half") + end())
        return response

    control.on("POST /v2/tasks", slowly, says("two"))
    async with chatting(env, "Hello") as chat:
        await chat.shows("first half,")
        assert not chat.flags() & termios.ECHO
        chat.type("ahead" * 1000 + ENTER + CTRL_D)  # longer than a line that a terminal keeps
        go_on.set()
        assert await chat.shows(" second half\n") == "", "nothing in between"
        await chat.shows("two\n")
        assert await chat.ends() == 0
    assert asked(control)[1] == ["Hello", "first half, second half", "ahead" * 1000]


# ---------------------------------------------------------------- ^C


async def test_ctrl_c_stops_the_answer_and_not_the_program_and_the_part_that_was_said_is_kept(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    control.on("POST /v2/tasks", stalls("a part"), stalls(""), says("three"))
    release = asyncio.Event()

    async def when_released(asked: Asked, request: web.Request) -> web.StreamResponse:
        await release.wait()
        return await answer({"state": "canceled"}, 202)(asked, request)

    async with chatting(env) as chat:
        await chat.prompts()
        chat.type("first" + ENTER)
        await chat.shows("a part")
        on_cancel(control, when_released)
        chat.type(CTRL_C)
        await eventually(lambda: len(cancels(control)) == 1)
        chat.type(CTRL_C)  # a second one, while the first is on its way
        release.set()
        await chat.prompts(after="\ncanceled\n")
        assert control.asked("POST /v2/tasks")[0].json()["task_id"] in cancels(control)[0].path

        chat.type("second" + ENTER)
        await eventually(lambda: len(asked(control)) == 2)
        await eventually(lambda: bool(chat.flags() & termios.ISIG))
        on_cancel(control, answer({"state": "canceled"}, 202))
        chat.type(CTRL_C)
        await chat.prompts(after="canceled\n")

        chat.type("third" + ENTER)
        await chat.shows("three\n")
        assert chat.process.returncode is None
    assert asked(control)[1] == ["first", "a part", "second"]
    assert asked(control)[2] == ["first", "a part", "third"], "of the second nothing was said"
    assert "Traceback" not in chat.screen


async def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_says_how_to_leave(
    control: ScriptedControl, env: dict[str, str], tmp_path: Path
) -> None:
    control.on("POST /v2/tasks", refusal(Code.QUEUE_FULL, "the queue is full"), says("one"))
    (tmp_path / "state").write_text("")
    async with chatting(env | {"XDG_STATE_HOME": str(tmp_path / "state")}) as chat:
        assert "warning: the history in " in await chat.prompts()
        for keys in ("junk" + CTRL_C, CTRL_C, "x" + CTRL_C, CTRL_C):  # never two in a row on an empty line
            chat.type(keys)
            assert "^D leaves" not in await chat.prompts(after="\n")
        chat.type(CTRL_C)
        await chat.prompts(after="\n^D leaves\n")
        chat.process.send_signal(signal.SIGINT)  # from elsewhere
        await chat.prompts(after="\n")

        chat.type("Hello" + ENTER)
        await chat.shows("error: the queue is full\nwhy: QUEUE_FULL\n")
        await chat.prompts(after="request-id: req-1\n")
        chat.type(UP + ENTER)
        await chat.prompts(after="one\n")
        chat.type("/nope" + ENTER)
        await chat.shows("error: there is no command /nope\nhint: ")
        await chat.prompts(after="\n")
        chat.type(CTRL_D)
        assert await chat.ends() == 0
    assert asked(control) == [["Hello"], ["Hello"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT], ids=lambda number: number.name)
async def test_a_signal_to_end_ends_it_in_order(
    control: ScriptedControl, env: dict[str, str], number: signal.Signals
) -> None:
    control.on("POST /v2/tasks", stalls("a part"))
    argv = () if number is signal.SIGHUP else ("Hello",)
    async with chatting(env, *argv) as chat:
        if argv:
            await chat.shows("a part")
            on_cancel(control, answer({"state": "canceled"}, 202))
        else:
            await chat.prompts()
        if number is signal.SIGQUIT:
            chat.type(CTRL_BACKSLASH)
        else:
            chat.process.send_signal(number)
        assert await chat.ends() == 130
        assert chat.flags() & termios.ICANON
        assert chat.flags() & termios.ECHO
    assert len(cancels(control)) == len(argv)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_signal_breaks_out_of_a_pipe_that_nobody_reads(
    control: ScriptedControl, env: dict[str, str], number: signal.Signals
) -> None:
    control.on("POST /v2/tasks", stalls("x" * 200_000))
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    try:
        async with chatting(env, "Hello", stdout=writing) as chat:
            await eventually(lambda: in_pipe(reading) > 0, within_s=WITHIN_S)
            on_cancel(control, answer({"state": "canceled"}, 202))
            chat.process.send_signal(number)
            if number is signal.SIGTERM:
                assert await chat.ends() == 130
            else:
                await chat.prompts(after="canceled\n")
    finally:
        os.close(reading)
        os.close(writing)
    assert len(cancels(control)) == 1


# ---------------------------------------------------------------- where it goes


async def test_answers_alone_go_to_a_pipe_and_the_prompt_stays_at_the_terminal(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    control.on("POST /v2/tasks", says("one\x1b[2J"))
    async with chatting(env, stdout=PIPE) as chat:
        await chat.prompts()
        chat.type("Hello" + ENTER)
        await chat.prompts(after="\n")
        chat.type(CTRL_D)
        assert await chat.ends() == 0
        assert chat.process.stdout is not None
        assert await chat.process.stdout.read() == b"one\x1b[2J\n"
    assert "one" not in chat.screen


@pytest.mark.parametrize("blocked", [False, True], ids=["in an answer", "waiting for a line"])
async def test_a_signal_ends_a_piped_chat_as_it_ends_submit(
    control: ScriptedControl, env: dict[str, str], blocked: bool
) -> None:
    control.on("POST /v2/tasks", says("one") if blocked else stalls("a part"))
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llorch", "chat", env=env, stdin=reading, stdout=PIPE, stderr=PIPE
    )

    try:
        assert process.stdout is not None
        os.write(writing, b"Hello\n")
        shown = b"one\n" if blocked else b"a part"
        async with asyncio.timeout(WITHIN_S):
            assert await process.stdout.readexactly(len(shown)) == shown
        if blocked:
            os.write(writing, b"half a line")
            await eventually(lambda: in_pipe(reading) == 0, within_s=WITHIN_S)
        else:
            on_cancel(control, answer({"state": "canceled"}, 202))
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(WITHIN_S):
            _, told = await process.communicate()
        assert (process.returncode, told) == (130, b"" if blocked else b"canceled\n")
    finally:
        os.close(reading)
        os.close(writing)
        if process.returncode is None:
            process.kill()
        await process.wait()
    assert len(cancels(control)) == (0 if blocked else 1)


async def test_a_disk_that_is_full_at_the_end_of_an_answer_fails_the_run(
    control: ScriptedControl, env: dict[str, str], tmp_path: Path
) -> None:
    control.on("POST /v2/tasks", says("one"))
    with (tmp_path / "answers").open("wb") as answers:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-B", "-m", "llorch", "chat", env=env, stdin=PIPE, stdout=answers, stderr=PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3, 3)),
        )  # fmt: skip
    async with asyncio.timeout(WITHIN_S):
        _, told = await process.communicate(b"first\nsecond\n")
    assert (process.returncode, told) == (1, b"error: standard output can't be written: File too large\n")
    assert asked(control) == [["first"]]
