"""The command line as a process of its own: signals, pipes, terminals, and what it loads before it knows what to do."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from llorch.errors import Code
from tests.cluster import eventually
from tests.component.scripted_control import (
    QUEUED,
    SSE,
    TASK,
    WHOLE,
    Asked,
    ScriptedControl,
    Then,
    answer,
    end,
    no_answer,
    refusal,
    scripted,
    started,
    stream,
    token,
)

LLORCH = (sys.executable, "-m", "llorch")
PIPE_BYTES = 64 * 1024
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted(lasting=True) as running:
        yield running


@pytest.fixture
def env(control: ScriptedControl, tmp_path: Path) -> dict[str, str]:
    foreign = ("LLORCH_", "XDG_", "PYTHONUNBUFFERED")  # the last would hide what a buffer does
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"HOME": str(tmp_path), "LLORCH_URL": control.url, "LLORCH_TOKEN": "t", "PYTHONPATH": str(ROOT)}


def task_of(control: ScriptedControl) -> str:
    return str(control.asked("POST /v2/tasks")[0].json()["task_id"])


def canceled(control: ScriptedControl) -> bool:
    return bool(control.asked(f"POST /v2/tasks/{task_of(control)}/cancel"))


async def on_any_cancel(control: ScriptedControl, say: Callable[..., Any]) -> None:
    """Answer the cancellation of whichever task was submitted."""
    control.on(f"POST /v2/tasks/{task_of(control)}/cancel", say)


@contextlib.asynccontextmanager
async def started_process(*argv: str, env: dict[str, str], **how: Any) -> AsyncIterator[Process]:
    how = {"stdin": DEVNULL, "stdout": PIPE, "stderr": PIPE} | how
    process = await asyncio.create_subprocess_exec(*LLORCH, *argv, env=env, **how)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def finished(process: Process) -> tuple[int, str, str]:
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, (out or b"").decode(), (err or b"").decode()


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
async def test_a_signal_cancels_the_task_and_leaves_with_130(
    control: ScriptedControl, env: dict[str, str], number: signal.Signals
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.SILENCE))
    async with started_process("submit", "-m", "m", "Hello", env=env) as process:
        assert process.stdout is not None
        assert await process.stdout.readexactly(3) == b"t0 "
        await on_any_cancel(control, answer({"task_id": TASK}, 202))
        process.send_signal(number)
        assert await finished(process) == (130, "", "canceled\n")
    assert canceled(control)


@pytest.mark.parametrize("flags", [("--no-stream",), ("--detach",), ()])
async def test_a_signal_before_the_first_byte_cancels_too(
    control: ScriptedControl, env: dict[str, str], flags: tuple[str, ...]
) -> None:
    control.on("POST /v2/tasks", no_answer)
    async with started_process("submit", "-m", "m", *flags, "Hello", env=env) as process:
        await eventually(lambda: control.asked("POST /v2/tasks"))
        await on_any_cancel(control, answer({"task_id": TASK}, 202))
        process.send_signal(signal.SIGINT)
        assert await finished(process) == (130, "", "canceled\n")
    assert canceled(control)


async def test_a_signal_while_the_control_is_away_leaves_at_once_and_says_what_may_still_run(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.SILENCE))
    async with started_process("submit", "-m", "m", "Hello", env=env) as process:
        assert process.stdout is not None
        assert await process.stdout.readexactly(3) == b"t0 "
        await control.go()
        process.send_signal(signal.SIGINT)
        told = f"interrupted; task {task_of(control)} may still be running\n"
        assert await finished(process) == (130, "", told)


async def test_a_signal_over_a_task_that_the_control_has_named_cancels_it(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    control.on("POST /v2/tasks", stream(QUEUED, token(0), then=Then.SILENCE, headers=SSE | {"X-Llorch-Task": TASK}))
    control.on(f"POST /v2/tasks/{TASK}/cancel", answer({"task_id": TASK}, 202))
    async with started_process("submit", "-m", "m", "--idempotency-key", "k", "Hello", env=env) as process:
        assert process.stdout is not None
        assert await process.stdout.readexactly(3) == b"t0 "
        process.send_signal(signal.SIGINT)
        assert await finished(process) == (130, "", "canceled\n")


async def test_a_signal_over_a_task_that_somebody_submitted_before_leaves_it(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    attached = SSE | {"X-Llorch-Task": TASK, "Idempotency-Replayed": "true"}
    control.on("POST /v2/tasks", stream(QUEUED, token(0), then=Then.SILENCE, headers=attached))
    async with started_process("submit", "-m", "m", "--idempotency-key", "k", "Hello", env=env) as process:
        assert process.stdout is not None
        assert await process.stdout.readexactly(3) == b"t0 "
        process.send_signal(signal.SIGINT)
        told = f"left task {TASK} to whoever submitted it before, under the same key\n"
        assert await finished(process) == (130, "", told)
    assert len(control.requests) == 1, "it is not cancelled"


async def test_a_signal_over_a_task_that_only_the_control_can_name_leaves_it_to_the_control(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    control.on("POST /v2/tasks", no_answer)
    async with started_process("submit", "-m", "m", "--idempotency-key", "k", "Hello", env=env) as process:
        await eventually(lambda: control.asked("POST /v2/tasks"))
        process.send_signal(signal.SIGINT)
        assert await finished(process) == (130, "", "interrupted; the task may still be running\n")


async def test_a_second_signal_leaves_at_once_though_the_cancel_has_no_answer(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0), then=Then.SILENCE))
    async with started_process("submit", "-m", "m", "Hello", env=env) as process:
        assert process.stdout is not None
        await process.stdout.readexactly(3)
        await on_any_cancel(control, no_answer)
        process.send_signal(signal.SIGINT)
        await eventually(lambda: canceled(control))
        process.send_signal(signal.SIGINT)
        # Had it waited for the answer until its own limit, it would say that the task may still be running.
        assert await finished(process) == (130, "", "")


async def test_a_signal_breaks_out_of_a_write_that_nobody_reads(control: ScriptedControl, env: dict[str, str]) -> None:
    control.on("POST /v2/tasks", stream(started(), token(0, "x" * 4 * PIPE_BYTES), then=Then.SILENCE))
    reading, writing = os.pipe()
    try:
        async with started_process("submit", "-m", "m", "Hello", env=env, stdout=writing) as process:

            def full() -> bool:
                return bool(struct.unpack("i", fcntl.ioctl(reading, termios.FIONREAD, b"\0" * 4))[0] >= PIPE_BYTES)

            await eventually(full)
            await on_any_cancel(control, answer({"task_id": TASK}, 202))
            process.send_signal(signal.SIGINT)
            assert await finished(process) == (130, "", "canceled\n")
    finally:
        os.close(reading)
        os.close(writing)
    assert canceled(control)


async def test_a_signal_ends_a_command_that_only_looks_with_130(control: ScriptedControl, env: dict[str, str]) -> None:
    control.on("GET /v2/nodes", no_answer)
    control.on(f"GET /v2/tasks/{TASK}/events", stream(started(), token(0), then=Then.SILENCE))
    for argv, what in ((("node", "ls"), "GET /v2/nodes"), (("task", "logs", TASK), f"GET /v2/tasks/{TASK}/events")):
        async with started_process(*argv, env=env) as process:
            await eventually(lambda what=what: control.asked(what))
            process.send_signal(signal.SIGINT)
            code, _, err = await finished(process)
        assert (code, err) == (130, "")
    assert [asked.method for asked in control.requests] == ["GET", "GET"], "who only reads cancels nothing"


# ---------------------------------------------------------------- pipes


async def test_a_reader_that_leaves_is_141_without_a_word_and_cancels_the_task(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    async def tokens_until_the_client_leaves(_asked: Asked, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(started())
        await on_any_cancel(control, answer({"task_id": TASK}, 202))
        for index in range(2_000):
            await response.write(token(index))
            await asyncio.sleep(0.005)
        return response

    control.on("POST /v2/tasks", tokens_until_the_client_leaves)
    shell = await asyncio.create_subprocess_exec(
        "bash", "-c", f"{sys.executable} -m llorch submit -m m Hello | head -c 1; echo ${{PIPESTATUS[0]}}",
        env=env, stdin=DEVNULL, stdout=PIPE, stderr=PIPE,
    )  # fmt: skip
    assert await finished(shell) == (0, "t141\n", "")
    assert canceled(control)


async def test_every_command_ends_a_broken_pipe_with_141_and_no_word(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    control.on("GET /v2/nodes", answer({"nodes": [{"node_id": "n1"}]}))
    for argv in (("node", "ls"), ("--help",), ("config", "schema")):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            async with started_process(*argv, env=env, stdout=writing) as process:
                assert await finished(process) == (141, "", ""), argv
        finally:
            os.close(writing)


async def test_closed_standard_streams_are_no_fault_of_the_program(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    control.on("POST /v2/tasks", stream(*WHOLE))

    async def submit(closing: str) -> tuple[int, str, str]:
        shell = await asyncio.create_subprocess_exec(
            "bash", "-c", f"{sys.executable} -m llorch submit -m m Hello {closing}",
            env=env, stdin=DEVNULL, stdout=PIPE, stderr=PIPE,
        )  # fmt: skip
        return await finished(shell)

    assert await asyncio.gather(*map(submit, ("<&-", "2>&-", ">&-", ">/dev/full"))) == [
        (0, "t0 t1 ", ""),
        (0, "t0 t1 ", ""),
        (1, "", "error: standard output can't be written: it is closed\n"),
        (1, "", "error: standard output can't be written: No space left on device\n"),
    ]


# ---------------------------------------------------------------- terminals


async def on_a_terminal(*argv: str, env: dict[str, str], stderr: bool = False) -> tuple[int, str]:
    """Exit code, and what a terminal was sent."""
    master, slave = pty.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST  # what is written arrives as it is
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    try:
        how = {"stderr" if stderr else "stdout": slave}
        async with started_process(*argv, env=env, **how) as process:
            code, *_ = await finished(process)
    finally:
        os.close(slave)
    os.set_blocking(master, False)
    shown = b""
    with contextlib.suppress(OSError):
        while data := os.read(master, 65536):
            shown += data
    os.close(master)
    return code, shown.decode()


async def test_a_terminal_is_spared_control_characters_unless_raw(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    said = "[bold]x[/foo] \x1b[31mred\x07\x9b\x7f\r\ttab\nünï 🙂"
    control.on("POST /v2/tasks", stream(started(), token(0, said), end()))
    submit = ("submit", "-m", "m", "Hello")
    assert await on_a_terminal(*submit, env=env) == (0, "[bold]x[/foo] [31mred\ttab\nünï 🙂\n")
    assert await on_a_terminal(*submit, "--raw", env=env) == (0, said + "\n")
    control.on("POST /v2/tasks", answer({"task_id": TASK, "finish_reason": "stop", "text": said}))
    assert await on_a_terminal(*submit, "--no-stream", env=env) == (0, "[bold]x[/foo] [31mred\ttab\nünï 🙂\n")


async def test_only_a_terminal_is_shown_progress_and_it_goes_away_again(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    control.on("POST /v2/tasks", stream(QUEUED, started(), token(0), end()))
    code, shown = await on_a_terminal("submit", "-m", "m", "Hello", env=env, stderr=True)
    assert code == 0
    assert "queued, position 2" in shown
    assert "running on n1/p0" in shown
    assert shown.endswith("\r\x1b[K"), "the line is cleared before the first token"


async def test_a_task_that_is_looked_for_is_told_on_a_terminal_beside_json_too(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    control.on("POST /v2/tasks", refusal(Code.RECOVERING, retry_after_ms=1_100), answer({}, 502), stream(*WHOLE))
    began = time.monotonic()
    code, shown = await on_a_terminal("submit", "-m", "m", "--json", "Hello", env=env, stderr=True)
    assert code == 0
    seconds = [int(said) for said in re.findall(r"looking for the task again \((\d+) s\)", shown)]
    assert seconds and min(seconds) >= 1 and max(seconds) <= time.monotonic() - began, shown
    assert shown.endswith("\r\x1b[K"), "the line is cleared before the first event"


async def test_a_command_that_is_proposed_holds_no_words_of_a_peer(
    control: ScriptedControl, env: dict[str, str]
) -> None:
    detach = ("submit", "-m", "m", "--detach", "Hello")
    for word, shown in ((TASK, f"hint: llorch task logs {TASK}\n"), ("x; reboot", "")):
        control.on("POST /v2/tasks", answer({"task_id": word}, 202))
        assert await on_a_terminal(*detach, env=env, stderr=True) == (0, shown)


async def test_results_have_no_colour_anywhere(control: ScriptedControl, env: dict[str, str]) -> None:
    control.on("GET /v2/nodes", answer({"nodes": [{"node_id": "n1", "models": ["\x1b[31m"]}]}))
    forced = env | {"FORCE_COLOR": "1", "PY_COLORS": "1", "CLICOLOR_FORCE": "1"}
    for argv in (("node", "ls"), ("--help",), ("node", "lss")):
        async with started_process(*argv, env=forced) as process:
            _, out, err = await finished(process)
        assert out + err
        assert "\x1b" not in out + err, argv
    code, shown = await on_a_terminal("node", "ls", env=env)
    assert (code, "\x1b" in shown) == (0, False)


# ---------------------------------------------------------------- what is loaded


@pytest.mark.parametrize(
    ("argv", "loaded"),
    [
        (["--help"], []),
        (["--version"], []),
        (["context", "ls"], ["pydantic"]),  # typer's, to read the words
    ],
)
def test_help_and_version_load_nothing_heavy(argv: list[str], loaded: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; from llorch.cli.main import run; code = run(sys.argv[1:]);"
        "heavy = {'aiohttp', 'pydantic', 'rich', 'prometheus_client', 'watchfiles', 'uvloop', 'xllamacpp', 'pynvml'};"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, *argv],
        capture_output=True, text=True, check=True, timeout=30,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)},
    )  # fmt: skip
    assert ran.stderr == f"0 {loaded}\n"


# ---------------------------------------------------------------- completion


@pytest.mark.parametrize(("shell", "file"), [("bash", "llorch.bash"), ("zsh", "_llorch"), ("fish", "llorch.fish")])
async def test_a_shells_script_is_the_committed_one_and_what_it_calls_completes(
    env: dict[str, str], shell: str, file: str
) -> None:
    script = (ROOT / "completions" / file).read_text()
    async with started_process(env=env | {"_LLORCH_COMPLETE": f"source_{shell}"}) as process:
        code, out, _ = await finished(process)
    assert (code, out.strip()) == (0, script.strip())
    assert f"_LLORCH_COMPLETE=complete_{shell}" in script
    asking = {
        "_LLORCH_COMPLETE": f"complete_{shell}", "COMP_WORDS": "llorch sta", "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "llorch sta", "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    async with started_process(env=env | asking) as process:
        code, out, err = await finished(process)
    assert (code, err) == (0, "")
    assert "status" in out
    assert "submit" not in out
