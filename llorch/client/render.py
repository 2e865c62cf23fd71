"""A task's events on a terminal, in a file or in a pipe.

Owns what of a model's text reaches a terminal (all but control characters, unless raw), the one line of progress that a
terminal gets while nothing has come yet, and JSON lines. Tokens are written as they come and are never read as markup.
Never asks what it writes to: that comes in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

from llorch.client.events import End, Event, Migrated, Queued, Started, Token
from llorch.client.resume import Looking
from llorch.client.text import one_line, plain

_CLEAR_LINE = "\r\x1b[K"
TOLD_AFTER_S = 1.0  # a task that is found again sooner was never away, as a person sees it


class Renderer(Protocol):
    def show(self, event: Event) -> None: ...

    def looking(self, note: Looking) -> None: ...

    def close(self) -> None: ...


class Progress:
    """One line on standard error that comes and goes; silent unless `write` leads to a terminal."""

    def __init__(self, write: Callable[[str], None] | None) -> None:
        self._write = write
        self._shown = False

    def show(self, text: str) -> None:
        if self._write is not None:
            self._write(f"{_CLEAR_LINE}{one_line(text)}")
            self._shown = True

    def looking(self, note: Looking, *, below: bool = False) -> None:
        """That a task is looked for; `below` a line of text that is not at its end."""
        if note.since_s < TOLD_AFTER_S:
            return
        if below and self._write is not None and not self._shown:
            self._write("\n")
        what = "the control is not ready" if note.answered else "connection lost"
        self.show(f"{what}; looking for the task again ({note.since_s:.0f} s)")

    def clear(self) -> None:
        if self._write is not None and self._shown:
            self._write(_CLEAR_LINE)
            self._shown = False


class TextRenderer:
    """The text alone. A terminal also gets a last newline, so that the prompt stands on its own line."""

    def __init__(self, write: Callable[[str], None], progress: Progress, *, terminal: bool, raw: bool) -> None:
        self._write = write
        self._progress = progress
        self._terminal = terminal
        self._strip = terminal and not raw
        self._open_line = False

    def show(self, event: Event) -> None:
        match event:
            case Token(text=text):
                self._progress.clear()
                shown = plain(text) if self._strip else text
                if shown:
                    self._open_line = not shown.endswith("\n")
                    self._write(shown)
            case Queued(position=position):
                self._progress.show(f"queued, position {position}")
            case Started(node_id=node_id, pool_id=pool_id):
                self._progress.show(f"running on {node_id}/{pool_id}")
            case Migrated(source=source, target=target):
                if not self._open_line:
                    self._progress.show(f"moved from {source} to {target}")
            case End():
                self.close()

    def looking(self, note: Looking) -> None:
        self._progress.looking(note, below=self._open_line)

    def close(self) -> None:
        self._progress.clear()
        if self._terminal and self._open_line:
            self._open_line = False
            self._write("\n")


class JsonLines:
    """One JSON object per event. A task that is looked for is no event of its own, and told beside them."""

    def __init__(self, write: Callable[[str], None], progress: Progress) -> None:
        self._write = write
        self._progress = progress

    def show(self, event: Event) -> None:
        self._progress.clear()
        self._write(json_line(event.to_json()))

    def looking(self, note: Looking) -> None:
        self._progress.looking(note)

    def close(self) -> None:
        self._progress.clear()


def json_line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
