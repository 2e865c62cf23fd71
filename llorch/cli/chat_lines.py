"""What is typed at a chat: whether it is complete, and whether it is a message or a command.

Owns the commands, their words, and the rules for text of several lines. Pure: reads text, says what it means.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

BLOCK = '"""'  # begins and ends a text of several lines
_ALONE = re.compile(rf"^[ \t\r]*{BLOCK}[ \t\r]*$", re.MULTILINE)
_NOTHING_YET = re.compile(r"\s*(/system\s+)?", re.IGNORECASE)  # a block may still begin


class Command(StrEnum):
    MODEL = "model"
    SYSTEM = "system"
    SAVE = "save"
    RETRY = "retry"
    CLEAR = "clear"
    HELP = "help"
    EXIT = "exit"


@dataclass(frozen=True, slots=True)
class _Usage:
    takes: str  # "" for nothing, brackets around what may be left out
    what: str


USAGE = {
    Command.MODEL: _Usage("[NAME]", "list the models, or go on with another one"),
    Command.SYSTEM: _Usage("[TEXT]", "show the system message, or set it; - clears it"),
    Command.SAVE: _Usage("FILE", "save it as .md, .json, else plain text; /save! replaces a file"),
    Command.RETRY: _Usage("", "ask the last question again"),
    Command.CLEAR: _Usage("", "forget the conversation; model and system message stay"),
    Command.HELP: _Usage("", "show this"),
    Command.EXIT: _Usage("", "leave; so do /bye and ^D"),
}
_FORCED = "save!"
_WORDS = {command.value: command for command in Command} | {
    _FORCED: Command.SAVE,
    "bye": Command.EXIT,
    "quit": Command.EXIT,
    "?": Command.HELP,
}
WORDS = tuple(f"/{word}" for word in _WORDS if word.isalpha())


@dataclass(frozen=True, slots=True)
class Say:
    text: str


@dataclass(frozen=True, slots=True)
class Do:
    command: Command
    argument: str = ""
    force: bool = False


@dataclass(frozen=True, slots=True)
class Wrong:
    message: str
    hint: str


Meaning: TypeAlias = Say | Do | Wrong | None


def more(text: str) -> str | None:
    """`text` with a line to follow, where its end asks for one: an open block, a backslash. None if it is complete."""
    block = _block_of(text)
    if block is not None and block.open:
        return text + "\n"
    return text[:-1] + "\n" if _goes_on(text) else None


def _goes_on(text: str) -> bool:
    return text.endswith("\\") and not text.endswith("\\\\")


class Lines:
    """Lines that come one by one, put together as `more` says; however many they are, each is looked at once."""

    def __init__(self) -> None:
        self._text: list[str] = []  # its parts, as far as it goes
        self._block: _Block | None = None  # that is open
        self._plain = False  # it is no block, and no line can make it one

    def add(self, line: str) -> str | None:
        """The complete text that `line` is the end of, if it is."""
        if self._block is not None and not self._block.may_end_in(line):
            self._text += line, "\n"
            return None
        if self._plain:
            if not _goes_on(line):
                return self.finish(line)
            self._text.append(line[:-1] + "\n")
            return None
        text = "".join(self._text) + line
        longer = more(text)
        if longer is None:
            return self.finish(line)
        self._text = [longer]
        self._block = _block_of(text)
        self._plain = self._block is None and not _NOTHING_YET.fullmatch(longer)
        return None

    def finish(self, line: str = "") -> str:
        """What there is, complete or not; the next line begins anew."""
        text = "".join(self._text) + line
        self._text, self._block, self._plain = [], None, False
        return text


def read(text: str) -> Meaning:
    """What a complete text means; None if it is blank."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        return Wrong("that is not UTF-8 text", "check the locale of this terminal, or the file that is piped in")
    block = _block_of(text)
    if block is not None and block.open:
        return Wrong(f"a block that begins with {BLOCK} has no end", f"end it with a line of {BLOCK}")
    start = text.lstrip()
    if start.startswith("//"):
        return Say(start[1:].rstrip())
    if start.startswith("/"):
        word, rest = _split(start)
        return _command(word.lower(), block.inner if block is not None else rest.strip())
    said = block.inner if block is not None else text.strip("\n").rstrip()
    return Say(said) if said.strip() else None


def help_text() -> str:
    rows = [(f"/{command} {usage.takes}".rstrip(), usage.what) for command, usage in USAGE.items()]
    lines = [f"{words:<15} {what}" for words, what in rows]
    lines += [
        f"Alt+Enter, or \\ at a line's end, begins a new line; {BLOCK} encloses a block.",
        "^C stops an answer, ^R finds what was typed; //text says what begins with /.",
    ]
    return "".join(f"{line}\n" for line in lines)


def _command(word: str, argument: str) -> Meaning:
    command = _WORDS.get(word)
    if command is None:
        near = difflib.get_close_matches(word, _WORDS, n=1, cutoff=0.5)
        meant = f"did you mean /{near[0]}? " if near else ""
        return Wrong(f"there is no command /{word}", f"{meant}/help lists them; // begins a message with a slash")
    takes = USAGE[command].takes
    if argument and not takes and command is not Command.HELP:
        return Wrong(f"/{word} takes nothing after it", f"{USAGE[command].what}: /{word}")
    if "\n" in argument and command is not Command.SYSTEM:
        return Wrong(f"/{word} takes one line", f"/{word} {takes}".rstrip())
    if not argument and takes and not takes.startswith("["):
        return Wrong(f"/{word} needs a {takes.lower()}", f"/{word} {takes}")
    return Do(command, argument, force=word == _FORCED)


def _split(start: str) -> tuple[str, str]:
    """The word after the slash, and what comes after it."""
    word = start[1:].split(None, 1)[0] if start[1:2].strip() else ""
    return word, start[1 + len(word) :].lstrip()


# ---------------------------------------------------------------- blocks


@dataclass(frozen=True, slots=True)
class _Block:
    open: bool
    alone: bool  # the quotes that open it are alone on their line
    inner: str

    def may_end_in(self, line: str) -> bool:
        return (_ALONE.match(line) is not None) if self.alone else BLOCK in line


def _block_of(text: str) -> _Block | None:
    """The block that a message, or the text of /system, is; None if it is none. Quotes amid a line are text.

    Quotes that open it alone on their line are closed by such a line only: code has docstrings.
    """
    start = text.lstrip()
    if start.startswith("/"):
        word, rest = _split(start)
        start = rest.lstrip() if word.lower() == Command.SYSTEM.value else ""
    if not start.startswith(BLOCK):
        return None
    inner, end, after = start[len(BLOCK) :].partition(BLOCK)
    alone = _ALONE.match(start)
    if alone is not None:
        close = _ALONE.search(start, alone.end())
        inner = start[alone.end() : close.start() if close else len(start)]
        end, after = (close.group(), start[close.end() :]) if close else ("", "")
    if after.strip():
        return None
    return _Block(not end, alone is not None, inner.removeprefix("\n").removesuffix("\n"))
