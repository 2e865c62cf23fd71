"""How far a benchmark is, on standard error: one line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys

from llorch.cli.bench_words import progress
from llorch.cli.dev import Waiting
from llorch.cli.output import is_terminal, write_err

LINE_EVERY_S = 10.0  # where there is no terminal


class Progress:
    """`waiting` is shown while the work goes on. If `quiet` nothing is told."""

    def __init__(self, *, quiet: bool) -> None:
        terminal = is_terminal(sys.stderr)
        self.waiting = Waiting(write_err if terminal and not quiet else None)
        self._lines = not terminal and not quiet
        self._said_s = 0.0
        self._last = ""

    def say(self, text: str) -> None:
        self.waiting.text, self._said_s = text, 0.0
        if self._lines:
            write_err(f"{text}\n")

    def tell(self, words: str, ended: int, failed: int, since_s: float, of: str) -> None:
        self.waiting.text = self._last = progress(words, ended, failed, since_s, of)
        if self._lines and since_s - self._said_s >= LINE_EVERY_S:
            self._said_s = since_s
            write_err(f"{self._last}\n")

    def step_ended(self) -> None:
        if self._lines and self._last:
            write_err(f"{self._last}\n")
