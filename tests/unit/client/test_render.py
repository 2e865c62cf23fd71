"""What of a stream reaches a terminal, a pipe, a script."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from llorch.client.events import End, Event, Migrated, Queued, Started, Token
from llorch.client.render import JsonLines, Progress, TextRenderer
from llorch.client.resume import Looking
from llorch.client.text import one_line, plain

QUEUED = Queued(wire={}, position=2, eta_ms=None)
STARTED = Started(wire={}, task_id="t", node_id="n\x1b[2J", pool_id="p\n", model="m", attempt=1)
END = End(wire={}, finish_reason="stop", tokens_in=1, tokens_out=1)
MIGRATED = Migrated(wire={}, attempt=2, source="a/p", target="b/p")


def token(text: str) -> Token:
    return Token(wire={"t": text}, text=text, index=0)


def shown(*events: Event, terminal: bool = True, raw: bool = False, progress: bool = True) -> tuple[str, str]:
    """What went to standard output and to standard error."""
    out: list[str] = []
    err: list[str] = []
    renderer = TextRenderer(out.append, Progress(err.append if progress else None), terminal=terminal, raw=raw)
    for event in events:
        renderer.show(event)
    renderer.close()
    return "".join(out), "".join(err)


def test_a_pipe_gets_every_byte_and_nothing_more() -> None:
    text = "\x1b[31m[bold]\x00\r\n\x9b[/foo]"
    assert shown(QUEUED, STARTED, token(text), END, terminal=False, progress=False) == (text, "")


def test_a_terminal_gets_text_without_control_characters_and_a_last_newline() -> None:
    assert shown(token("a\x1b[31mb\x07\r"), token("\tc"), END, progress=False)[0] == "a[31mb\tc\n"
    assert shown(token("a\n"), END, progress=False)[0] == "a\n"
    assert shown(token("\x1b"), END, progress=False)[0] == ""
    assert shown(END, progress=False)[0] == ""
    assert shown(token("a\x1b[31m"), END, raw=True, progress=False)[0] == "a\x1b[31m\n"


def test_progress_is_one_line_that_goes_before_the_first_token_and_can_not_be_forged() -> None:
    out, err = shown(QUEUED, STARTED, token("x"), MIGRATED, END)
    assert out == "x\n"
    assert err == "\r\x1b[Kqueued, position 2\r\x1b[Krunning on n[2J/p\r\x1b[K"
    assert shown(MIGRATED)[1] == "\r\x1b[Kmoved from a/p to b/p\r\x1b[K"


def looked_for(*events: Event, since_s: float, answered: bool = False) -> tuple[str, str]:
    out: list[str] = []
    err: list[str] = []
    renderer = TextRenderer(out.append, Progress(err.append), terminal=True, raw=False)
    for event in events:
        renderer.show(event)
    err.clear()
    for note in (Looking("gone\x1b[2J", since_s, answered), Looking("gone", since_s + 1, answered)):
        renderer.looking(note)
    renderer.show(token("y"))
    renderer.close()
    return "".join(out), "".join(err)


def test_a_task_that_is_looked_for_is_told_on_a_line_of_its_own_that_goes_when_it_is_found() -> None:
    line, clear = "connection lost; looking for the task again ({} s)", "\r\x1b[K"
    told = f"{clear}{line.format(2)}{clear}{line.format(3)}{clear}"
    assert looked_for(since_s=2) == ("y\n", told)
    assert looked_for(STARTED, since_s=2) == ("y\n", told)
    assert looked_for(token("x\n"), since_s=2) == ("x\ny\n", told)
    assert looked_for(token("x"), since_s=2) == ("xy\n", "\n" + told), "what is printed stays as it is"
    assert "the control is not ready; looking" in looked_for(since_s=2, answered=True)[1]


def test_a_task_that_is_found_within_a_second_was_never_away() -> None:
    assert looked_for(token("x"), since_s=-0.5) == ("xy\n", "")


def test_json_lines_hold_events_of_the_task_alone() -> None:
    out: list[str] = []
    err: list[str] = []
    lines = JsonLines(out.append, Progress(err.append))
    lines.looking(Looking("gone", 5.0))
    assert (out, err) == ([], ["\r\x1b[Kconnection lost; looking for the task again (5 s)"])
    lines.show(token("x"))
    assert (len(out), err[1:]) == (1, ["\r\x1b[K"]), "the line goes before the next event"
    lines.looking(Looking("gone", 6.0))
    lines.close()
    assert (len(out), err[-1]) == (1, "\r\x1b[K")


@given(st.text())
def test_text_fit_for_a_terminal_has_no_control_characters_and_loses_nothing_else(text: str) -> None:
    kept = plain(text)
    assert not any((ord(char) < 32 and char not in "\t\n") or 127 <= ord(char) < 160 for char in kept)
    assert kept == "".join(char for char in text if char in kept)
    assert "\n" not in one_line(text)
    assert plain(kept) == kept


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_json_lines_are_one_line_an_event_whatever_is_in_it(text: str) -> None:
    lines: list[str] = []
    JsonLines(lines.append, Progress(None)).show(token(text))
    assert lines[0].count("\n") == 1
    assert json.loads(lines[0]) == {"event": "token", "t": text}
