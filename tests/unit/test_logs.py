from __future__ import annotations

import asyncio
import errno
import io
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llorch import logs
from llorch.errors import Code, LlorchError
from llorch.logs import LEAVES_WITHIN_S, MAX_VALUE_CHARS, Log, _line, _Stderr, configure, printable, render_value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("n1/p0", "n1/p0"),
        (1.5, "1.5"),
        ("two words", '"two words"'),
        ("a\nnode.registered node_id=forged", '"a\\nnode.registered node_id=forged"'),
        ("\x1b[2J", '"\\x1b[2J"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("\u202egnp", '"\\u202egnp"'),
        ("", '""'),
    ],
)
def test_no_value_can_forge_a_line_or_move_a_cursor(value: object, shown: str) -> None:
    assert render_value(value) == shown


def test_a_long_value_is_cut() -> None:
    assert len(render_value("x" * 10_000)) < MAX_VALUE_CHARS + 10


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[31mb\tc\nd\x07\u202e") == "a[31mb\tc\nd"


# ---------------------------------------------------------------- what is written when something fails


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What a role writes to stderr."""
    stderr, root, ours = io.StringIO(), logging.getLogger(), logging.getLogger("llorch")
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(ours, "level", ours.level)
    configure("debug")
    return stderr.getvalue


def fail_over(prompt: str) -> None:
    int(prompt)


def test_a_traceback_says_where_and_which_and_nothing_of_what_was_quoted(written: Callable[[], str]) -> None:
    try:
        fail_over("a prompt")
    except ValueError:
        Log("x").fault("loop.failed", loop="a")
    assert "loop.failed loop=a" in written()
    assert "in fail_over" in written()
    assert written().endswith("\nValueError\n")
    assert "invalid literal" not in written()


def test_causes_and_groups_are_told_the_same_way(written: Callable[[], str]) -> None:
    try:
        try:
            raise KeyError("CANARY")
        except KeyError as error:
            raise ExceptionGroup("CANARY", [OSError(2, "No such file"), LlorchError(Code.GAP, "CANARY")]) from error
    except ExceptionGroup:
        Log("x").fault("loop.failed")
    assert "\nKeyError\nthen\n" in written()
    assert "\nFileNotFoundError: No such file\n" in written()
    assert "\nLlorchError: GAP\n" in written()
    assert written().endswith("\nExceptionGroup\n")
    told = [line for line in written().splitlines() if not line.startswith("    ")]  # those are our own source
    assert not any("CANARY" in line for line in told)


def test_a_librarys_words_are_one_line_that_forges_nothing(written: Callable[[], str]) -> None:
    logging.getLogger("asyncio").error("Task was lost\nfuture: <Task exception=ValueError('CANARY')>")
    logging.getLogger("other").warning("a\x1b[2J\x00b")
    logging.getLogger("llorchestra").warning("not ours")
    lines = written().splitlines()
    assert lines[0].endswith('ERROR library.logged logger=asyncio message="Task was lost"')
    assert lines[1].endswith('WARNING library.logged logger=other message="a\\x1b[2J\\x00b"')
    assert lines[2].endswith('WARNING library.logged logger=llorchestra message="not ours"')
    assert len(lines) == 3


def test_a_frame_limit_keeps_the_newest(written: Callable[[], str]) -> None:
    def left(depth: int) -> None:
        right(depth)

    def right(depth: int) -> None:
        if depth == 0:
            raise RuntimeError
        left(depth - 1)

    try:
        left(100)
    except RuntimeError:
        Log("x").fault("loop.failed")
    assert len(written().splitlines()) < 100
    assert "raise RuntimeError" in written()


# ---------------------------------------------------------------- when lines leave, and in which order


class Pieces(io.StringIO):
    """Remembers what came at once."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    """What a role writes to stderr, of which pytest hears nothing: beside its handler a line is made otherwise."""
    stderr, root, ours = Pieces(), logging.RootLogger(logging.WARNING), logging.getLogger("llorch")
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(logs, "_ROOT", root)
    monkeypatch.setattr(ours, "level", ours.level)
    for logger in (ours, logging.getLogger("other")):
        monkeypatch.setattr(logger, "parent", root)
    configure("info")
    return stderr


def events(text: str) -> list[str]:
    return [line.split()[2] for line in text.splitlines()]


async def passed() -> None:
    await asyncio.sleep(2 * LEAVES_WITHIN_S)


class Full(Pieces):
    """A file on a disk that is full: what could not be written is written again by each flush."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("closed", [False, True])
def test_nobody_is_stopped_by_a_stderr_that_takes_nothing(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = _Stderr()
    handler.stream = Full()
    if closed:
        handler.stream = io.StringIO()
        handler.stream.close()
    handler.say(logging.INFO, "task.ended", {"n": 1})

    async def main() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
        handler.say(logging.INFO, "task.ended", {"n": 2})
        await passed()
        assert told == []

    asyncio.run(main())


def test_lines_leave_together_after_a_moment(pieces: Pieces) -> None:
    async def main() -> None:
        for event in ("one", "two"):
            Log("x").info(event)
        await asyncio.sleep(0)
        Log("x").info("three")
        Log("x").debug("unheard")
        assert pieces.pieces == []
        await passed()
        (piece,) = pieces.pieces
        assert events(piece) == ["one", "two", "three"]
        Log("x").info("four")
        await passed()
        assert events(pieces.pieces[1]) == ["four"]

    asyncio.run(main())


def test_a_warning_leaves_at_once_behind_what_was_said_before_it(pieces: Pieces) -> None:
    async def main() -> None:
        Log("x").info("one")
        Log("x").warning("two")
        assert events(pieces.getvalue()) == ["one", "two"]
        Log("x").info("three")
        Log("x").error("four")
        Log("x").info("five")
        assert events(pieces.getvalue()) == ["one", "two", "three", "four"]
        await passed()

    asyncio.run(main())
    assert events(pieces.getvalue()) == ["one", "two", "three", "four", "five"]


def test_a_librarys_words_stand_behind_what_was_said_before_them(pieces: Pieces) -> None:
    async def main() -> None:
        Log("x").info("one")
        logging.getLogger("other").warning("of a library")
        assert events(pieces.getvalue()) == ["one", "library.logged"]

    asyncio.run(main())


def test_a_line_says_what_was_so_when_it_was_said(pieces: Pieces) -> None:
    async def main() -> None:
        names, at = ["a"], Path("/there")
        Log("x").info("one", names=names, at=at, code=Code.INTERNAL)
        names.append("b")
        await passed()

    asyncio.run(main())
    assert pieces.getvalue().split(" ", 2)[2] == """one names="['a']" at=/there code=INTERNAL\n"""


def test_where_no_loop_runs_a_line_leaves_at_once(pieces: Pieces) -> None:
    for event in ("one", "two"):
        Log("x").info(event)
        assert events(pieces.getvalue())[-1] == event


def a_loop_that_ends_in_the_same_turn() -> None:
    loop = asyncio.new_event_loop()

    def say() -> None:
        Log("x").info("held")
        loop.stop()

    loop.call_soon(say)
    loop.run_forever()
    loop.close()


def test_what_a_loop_left_behind_leaves_with_the_next_line(pieces: Pieces) -> None:
    a_loop_that_ends_in_the_same_turn()
    assert pieces.pieces == []
    Log("x").info("two")
    assert events(pieces.getvalue()) == ["held", "two"]


def test_what_a_loop_left_behind_leaves_with_another_loops_lines(pieces: Pieces) -> None:
    async def main() -> None:
        Log("x").info("two")
        await passed()

    a_loop_that_ends_in_the_same_turn()
    asyncio.run(main())
    assert events(pieces.getvalue()) == ["held", "two"]


def test_what_a_loop_left_behind_leaves_at_the_end_of_the_process(pieces: Pieces) -> None:
    a_loop_that_ends_in_the_same_turn()
    (handler,) = logs._ROOT.handlers
    logging.shutdown([weakref.ref(handler)])  # what `atexit` calls
    assert events(pieces.getvalue()) == ["held"]


def test_what_waits_leaves_before_the_log_is_configured_anew(pieces: Pieces) -> None:
    async def main() -> None:
        Log("x").info("one")
        configure("warning")
        assert events(pieces.getvalue()) == ["one"]
        Log("x").info("unheard")

    asyncio.run(main())
    assert events(pieces.getvalue()) == ["one"]


def test_lines_of_many_threads_are_all_there_and_whole(pieces: Pieces) -> None:
    def say(of: int) -> None:
        for number in range(100):
            Log("x").info("said", of=of, number=number)

    async def main() -> None:
        threads = [threading.Thread(target=say, args=(of,)) for of in range(4)]
        for thread in threads:
            thread.start()
        for number in range(100):
            Log("x").info("said", of=4, number=number)
            await asyncio.sleep(0)
        for thread in threads:
            thread.join()
        await passed()

    asyncio.run(main())
    said = [line.split(" ", 2)[2] for line in pieces.getvalue().splitlines()]
    assert sorted(said) == sorted(f"said of={of} number={number}" for of in range(5) for number in range(100))


def test_who_can_not_be_told_is_not_stopped(pieces: Pieces) -> None:
    pieces.close()
    Log("x").info("unheard")


# ---------------------------------------------------------------- one text, whichever way it was made


PARTS = st.sampled_from(
    ["a", "Z9", ".", "_", "1_", "llt1_", "0123456789abcd", " ", "=", '"', "\\", "\n", "\u202e", "é", ""]
)
VALUES = st.one_of(
    st.lists(PARTS, max_size=4).map("".join),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.sampled_from([*Code, b"bytes", "x" * 480, "x" * 501, ["a", "b"], ("a",), {"a": 1}, "-", "%s", "n1/p0"]),
)
FIELDS = st.dictionaries(st.sampled_from(["task_id", "why", "n2", "Key", "a_b"]), VALUES, max_size=4)


@example({"why": "llt1_0123456789abcd"})
@example({"why": "x" * 501})
@example({"why": 0.1 + 0.2})
@example({"why": "a b=c", "n2": "d"})
@given(FIELDS)
def test_a_line_is_the_same_text_made_at_once_or_value_by_value(fields: dict[str, object]) -> None:
    words = [f"{name}={render_value(value)}" for name, value in fields.items() if value is not None]
    assert _line("task.ended", fields) == " ".join(["task.ended", *words])


@given(st.floats(1, 4e9), st.sampled_from([logging.DEBUG, logging.INFO]))
def test_a_line_that_is_held_has_the_stamp_that_logging_would_give_it(now: float, level: int) -> None:
    handler = _Stderr()
    handler.stream = io.StringIO()
    with mock.patch("time.time", lambda: now):
        handler.say(level, "task.ended", {"n": 1})
        record = logging.LogRecord("llorch.x", level, "", 0, "%s", ("task.ended n=1",), None)
    assert handler.stream.getvalue() == handler.format(record) + "\n"
