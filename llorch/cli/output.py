"""What goes to standard output, and what to standard error.

Owns the one way to write to standard output (a closed pipe and a full disk have their own ends), the formats of
results, and the lines `error:`, `why:`, `hint:`, `request-id:`. Results go to standard output and nothing else does. No
colour, no markup: what a node or a model says is text.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TextIO

from llorch.cli.exits import Exit
from llorch.client.text import one_line, plain, unbroken


class OutputClosed(Exception):
    """Nobody reads standard output any more: `llorch ... | head`."""


class OutputFailed(Exception):
    """Standard output can't be written: a full disk, a closed descriptor."""


class Failure(Exception):
    """A command that can't do what it was asked, in the words that a person sees."""

    def __init__(
        self, message: str, *, code: Exit = Exit.FAILED, why: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.why = why
        self.hint = hint


def usage(message: str, hint: str | None = None) -> Failure:
    return Failure(message, code=Exit.USAGE, hint=hint)


def write_out(text: str) -> None:
    """`text` to standard output, at once."""
    out: TextIO | None = sys.stdout
    if out is None:
        raise OutputFailed("it is closed")
    try:
        out.write(text)
        out.flush()
    except BrokenPipeError:
        abandon_output()
        raise OutputClosed from None
    except OSError as error:
        abandon_output()
        raise OutputFailed(error.strerror or "it can't be written") from None


def write_err(text: str) -> None:
    """`text` to standard error; if nobody listens there, there is nobody to tell."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


def abandon_output() -> None:
    """Let what is still buffered go nowhere: Python flushes at its end, and would fail again there."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def hint(text: str) -> None:
    write_err(f"hint: {plain(text)}\n")


def warn(text: str) -> None:
    write_err(f"warning: {plain(text)}\n")


def report(message: str, *, why: str | None = None, hint: str | None = None, request_id: str | None = None) -> None:
    """The lines of one error, in words of this machine. Those of a peer go through `report_of_peer`."""
    lines = [("error", message), ("why", why), ("hint", hint), ("request-id", request_id)]
    write_err("".join(f"{name}: {plain(text)}\n" for name, text in lines if text))


def report_of_peer(
    message: str, *, why: str | None = None, hint: str | None = None, request_id: str | None = None
) -> None:
    """The same, each on one line: what a control or a node says must not pass for a line that llorch says."""
    report(one_line(message), why=one_line(why or ""), hint=one_line(hint or ""), request_id=one_line(request_id or ""))


# ---------------------------------------------------------------- results


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    YAML = "yaml"
    NAME = "name"


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    cell: Callable[[Mapping[str, Any]], object]


@dataclass(frozen=True, slots=True)
class Output:
    """How this command's result is wanted."""

    format: Format = Format.TABLE

    def rows(
        self, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], *, name: Callable[[Mapping[str, Any]], str]
    ) -> None:
        """A list of like things. `name` is what -q and -o name print of each."""
        match self.format:
            case Format.TABLE:
                write_out(table([column.title for column in columns], [[c.cell(row) for c in columns] for row in rows]))
            case Format.NAME:
                write_out("".join(f"{_cell(name(row))}\n" for row in rows))
            case Format.JSONL:
                write_out(_shown("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)))
            case _:
                self._document(list(rows))

    def one(self, value: Mapping[str, Any], *, name: str, text: Callable[[], str] | None = None) -> None:
        """One thing. `text` is how a person reads it; without it, all its fields."""
        match self.format:
            case Format.TABLE:
                write_out(_shown(text() if text is not None else fields(value)))
            case Format.NAME:
                write_out(f"{_cell(name)}\n")
            case Format.JSONL:
                write_out(_shown(json.dumps(value, ensure_ascii=False) + "\n"))
            case _:
                self._document(value)

    def _document(self, value: object) -> None:
        if self.format is Format.YAML:
            import yaml

            text = yaml.safe_dump(value, allow_unicode=True, sort_keys=False)
        else:
            text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
        write_out(_shown(text))


def _shown(text: str) -> str:
    """A terminal is spared control characters; a file or a pipe gets what there is."""
    return plain(text) if is_terminal(sys.stdout) else text


def _cell(value: object) -> str:
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return one_line(",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)) or "-"


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns two blanks apart; the last one is as long as it is."""
    cells = [[title.upper() for title in titles], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "".join(f"{line}\n" for line in lines)


def fields(value: Mapping[str, Any]) -> str:
    """`name: value` lines; what is nested is shown as JSON."""
    names = {name: one_line(name) for name in value}
    width = max(map(len, names.values()), default=0) + 1
    lines = []
    for name, item in value.items():
        nested = isinstance(item, dict) or (isinstance(item, list) and any(isinstance(part, dict) for part in item))
        shown = unbroken(json.dumps(item, ensure_ascii=False)) if nested and item else _cell(item)
        lines.append(f"{names[name] + ':':<{width}} {shown}\n")
    return "".join(lines)
