"""What is typed at a chat: text of several lines, messages, commands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.cli import chat_lines
from llorch.cli.chat_lines import BLOCK, USAGE, Command, Do, Lines, Meaning, Say, Wrong, help_text, more, read


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("", None),
        (" \n\t ", None),
        ("Hello", Say("Hello")),
        ("  indented\n    code  \n", Say("  indented\n    code")),
        ("a / b", Say("a / b")),
        ("//etc/hosts is what?", Say("/etc/hosts is what?")),
        ("  //x", Say("/x")),
        ('"""\none\n\ntwo\n"""', Say("one\n\ntwo")),
        ('"""on one line"""', Say("on one line")),
        ('"""\n/help\n"""', Say("/help")),
        ('"""\ndef f():\n    """Doc."""\n    """a\n    b"""\n"""', Say('def f():\n    """Doc."""\n    """a\n    b"""')),
        ('"""first\nlast"""', Say("first\nlast")),
        ('""" \na\n  """ \n', Say("a")),
        ('"""\na\n"""\nb', Say('"""\na\n"""\nb')),
        ('""""""', None),
        ('what does """ mean?', Say('what does """ mean?')),
        ('"""Doc."""\nimport x', Say('"""Doc."""\nimport x')),
        ("/help", Do(Command.HELP)),
        ("/?", Do(Command.HELP)),
        ("/help me", Do(Command.HELP, "me")),
        (" /HELP ", Do(Command.HELP)),
        ("/model", Do(Command.MODEL)),
        ("/model  b ", Do(Command.MODEL, "b")),
        ("/model\tb", Do(Command.MODEL, "b")),
        ("/system Be brief.\nAnd kind.", Do(Command.SYSTEM, "Be brief.\nAnd kind.")),
        ('/system """\nBe\nbrief.\n"""', Do(Command.SYSTEM, "Be\nbrief.")),
        ("/system -", Do(Command.SYSTEM, "-")),
        ("/save a file.md", Do(Command.SAVE, "a file.md")),
        ('/save """', Do(Command.SAVE, '"""')),
        ("/save! a.md", Do(Command.SAVE, "a.md", force=True)),
        ("/exit", Do(Command.EXIT)),
        ("/bye", Do(Command.EXIT)),
        ("/quit", Do(Command.EXIT)),
        ("/retry", Do(Command.RETRY)),
        ("/clear", Do(Command.CLEAR)),
    ],
)
def test_a_complete_text_is_a_message_or_a_command(text: str, meaning: Meaning) -> None:
    assert read(text) == meaning


@pytest.mark.parametrize(
    ("text", "said", "advice"),
    [
        ("/modle x", "there is no command /modle", "did you mean /model? "),
        ("/sav x.md", "there is no command /sav", "did you mean /save? "),
        ("/xyzzy", "there is no command /xyzzy", "/help lists them"),
        ("/", "there is no command /", "/help lists them"),
        ("/ model", "there is no command /", "/help lists them"),
        ("/usr/bin/python", "there is no command /usr/bin/python", "// begins a message with a slash"),
        ("/save", "/save needs a file", "/save FILE"),
        ("/save!", "/save! needs a file", "/save! FILE"),
        ("/save a.md\nand then?", "/save takes one line", "/save FILE"),
        ("/model a\nb", "/model takes one line", "/model [NAME]"),
        ("/clear my throat", "/clear takes nothing after it", "forget the conversation"),
        ('"""never closed', 'a block that begins with """ has no end', "end it"),
        ('/system """never closed', 'a block that begins with """ has no end', "end it"),
        ("caf\udce9", "that is not UTF-8 text", "locale"),
    ],
)
def test_what_is_neither_is_told_with_a_way_on(text: str, said: str, advice: str) -> None:
    meaning = read(text)
    assert isinstance(meaning, Wrong)
    assert meaning.message == said
    assert advice in meaning.hint


@pytest.mark.parametrize(
    ("text", "longer"),
    [
        ("Hello", None),
        ("Hello \\", "Hello \n"),
        ("a\nb\\", "a\nb\n"),
        ("C:\\\\", None),
        ("amid \\ it", None),
        ('"""', '"""\n'),
        ('"""\n\n', '"""\n\n\n'),
        ('"""\na \\', '"""\na \\\n'),  # within a block a backslash is text
        ('"""\na\n"""', None),
        ('"""\n  """Doc."""', '"""\n  """Doc."""\n'),
        ('"""\na"""', '"""\na"""\n'),
        ('"""a\nb"""', None),
        ('/system """Be', '/system """Be\n'),
        ('/model """', None),
        ('say """', None),
        ("/system Be \\", "/system Be \n"),
    ],
)
def test_an_open_block_and_a_backslash_ask_for_another_line(text: str, longer: str | None) -> None:
    assert more(text) == longer


@given(st.text(alphabet='"\\/ab \n'))
def test_any_text_is_read_and_whatever_asks_for_more_can_be_ended(text: str) -> None:
    read(text)
    longer = more(text)
    if longer is not None:
        assert longer.endswith("\n")
        assert more(longer) is None or more(longer + '"""') is None


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.text(alphabet='" \nx'))
def test_a_block_says_any_text_that_has_no_such_line_of_its_own(text: str) -> None:
    if text.strip() and all(line.strip(" \t\r") != BLOCK for line in text.split("\n")):
        assert read(f'"""\n{text}\n"""') == Say(text)


@given(st.lists(st.text(alphabet='"\\/ x') | st.sampled_from([BLOCK, f"{BLOCK}x", "/system", "/System \\", "\\", ""])))
def test_lines_that_come_one_by_one_are_what_they_are_together(lines: list[str]) -> None:
    gathered, pending = Lines(), ""
    for line in lines:
        longer = more(pending + line)
        complete = None if longer is not None else pending + line
        assert gathered.add(line) == complete
        pending = longer or ""
    assert gathered.finish() == pending


@pytest.mark.parametrize("first", [BLOCK, f"{BLOCK}x", "x\\"])
def test_a_long_text_is_not_looked_at_from_its_start_at_every_line(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def counting(text: str) -> str | None:
        looked.append(len(text))
        return more(text)

    monkeypatch.setattr(chat_lines, "more", counting)
    gathered = Lines()
    for line in [first] + ["y\\"] * 1000:
        assert gathered.add(line) is None
    assert len(gathered.add(BLOCK) or "") > 2000
    assert sum(looked) < 4000


def test_help_names_every_command_and_fits_a_screen() -> None:
    lines = help_text().splitlines()
    for command in Command:
        assert any(line.startswith(f"/{command}") and USAGE[command].what in line for line in lines)
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 80
