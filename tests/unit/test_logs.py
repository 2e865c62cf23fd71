from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

import pytest

from llorch.errors import Code, LlorchError
from llorch.logs import MAX_VALUE_CHARS, Log, configure, printable, render_value


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
