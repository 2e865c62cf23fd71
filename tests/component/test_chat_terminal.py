"""The line at which a chat is typed: keys in, texts out; in this process, with a pipe for a keyboard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from llorch.cli.chat_files import History
from llorch.cli.chat_terminal import Cleared, Terminal

UP, DOWN, LEFT, HOME, ALT_ENTER, CTRL_R, TAB = "\x1b[A", "\x1b[B", "\x1b[D", "\x1b[H", "\x1b\r", "\x12", "\t"
ENTER, CTRL_C, CTRL_D, CTRL_U = "\r", "\x03", "\x04", "\x15"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


def at(keys: PipeInput, path: Path | None = None) -> Terminal:
    def warn(text: str) -> None:
        raise AssertionError(text)

    return Terminal(History(path, warn), lambda: ["demo", "llama-8b", "llama-70b"], input=keys, output=DummyOutput())


async def typed(terminal: Terminal, keys: PipeInput, text: str) -> str:
    keys.send_text(text)
    return await terminal.read()


@pytest.mark.parametrize(
    ("keystrokes", "text"),
    [
        ("Hello" + ENTER, "Hello"),
        ("Helo" + LEFT + "l" + ENTER, "Hello"),
        ("ello" + HOME + "H" + ENTER, "Hello"),
        ("wrong" + CTRL_U + "right" + ENTER, "right"),
        ("one" + ALT_ENTER + "two" + ENTER, "one\ntwo"),
        ("one" + ALT_ENTER + "two" + UP + "!" + ENTER, "one!\ntwo"),
        ("one \\" + ENTER + "two" + ENTER, "one \ntwo"),
        ("\\" + ENTER + ENTER, "\n"),
        ('"""' + ENTER + "a" + ENTER + ENTER + "b" + ENTER + '"""' + ENTER, '"""\na\n\nb\n"""'),
        ("\x1b[200~one\r\n  two\\\rthree\n\x1b[201~four" + ENTER, "one\n  two\\\nthree\nfour"),
        ("ünï 🙂" + ENTER, "ünï 🙂"),
        ("a" + CTRL_D + "b" + ENTER, "ab"),
        ("typed ahead\n", "typed ahead"),
    ],
)
async def test_keys_become_one_text(keys: PipeInput, keystrokes: str, text: str) -> None:
    assert await typed(at(keys), keys, keystrokes) == text


async def test_what_was_typed_comes_back_by_arrow_and_by_search_also_at_the_next_start(
    keys: PipeInput, tmp_path: Path
) -> None:
    path = tmp_path / "history"
    terminal = at(keys, path)
    for text in ("first", "a" + ALT_ENTER + "b", "third"):
        await typed(terminal, keys, text + ENTER)
    terminal.remember("an argument")
    assert await typed(terminal, keys, UP + ENTER) == "an argument"
    assert await typed(terminal, keys, UP * 4 + "!" + ENTER) == "a!\nb", "through the lines of a text first"
    assert await typed(terminal, keys, UP * 3 + DOWN + "?" + ENTER) == "a!?\nb"
    assert await typed(terminal, keys, UP * 9 + "!" + ENTER) == "first!"
    later = at(keys, path)
    assert await typed(later, keys, UP + ENTER) == "first!"
    assert await typed(later, keys, CTRL_R + "hir" + ENTER + ENTER) == "third"
    assert await typed(later, keys, UP * 5 + ENTER) == "a!\nb"
    assert path.stat().st_mode & 0o777 == 0o600


async def test_ctrl_c_clears_the_line_and_ctrl_d_on_an_empty_one_ends_it(keys: PipeInput) -> None:
    terminal = at(keys)
    for keystrokes, empty in (("junk" + CTRL_C, False), (CTRL_C, True)):
        with pytest.raises(Cleared) as cleared:
            await typed(terminal, keys, keystrokes)
        assert cleared.value.empty is empty
    assert await typed(terminal, keys, "next" + ENTER) == "next"
    with pytest.raises(EOFError):
        await typed(terminal, keys, CTRL_D)


@pytest.mark.parametrize(
    ("keystrokes", "text"),
    [
        ("/mo" + TAB + ENTER, "/model"),
        ("/model d" + TAB + ENTER, "/model demo"),
        ("/model l" + TAB + "7" + TAB + ENTER, "/model llama-70b"),
        ("/save! su" + TAB + "x" + ENTER, "/save! sub/x"),
        ("say /mo" + TAB + ENTER, "say /mo"),
        ("mo" + TAB + ENTER, "mo"),
    ],
)
async def test_tab_completes_commands_models_and_files(
    keys: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keystrokes: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("sub")
    assert await typed(at(keys), keys, keystrokes) == text
