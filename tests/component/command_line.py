"""The command line inside this process: `run(argv)` in a thread, beside a scripted control in the test's own loop.

As `llorch` on a machine of its own: an empty home, an empty working directory, no settings but those that a test gives,
streams that are no terminal.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from llorch.cli.main import run


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class CommandLine:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.home = folder / "home"
        self.work = folder / "work"
        self._patch = monkeypatch
        for path in (self.home, self.work):
            path.mkdir()
        for name in list(os.environ):
            if name.startswith(("LLORCH_", "XDG_", "ORCHESTRATORD_", "POOL_MANAGERD_")):
                monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.chdir(self.work)

    def env(self, **values: str) -> None:
        for name, value in values.items():
            self._patch.setenv(name, value)

    async def __call__(self, *argv: str, stdin: bytes = b"") -> Ran:
        out, err = io.BytesIO(), io.BytesIO()
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        self._patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", newline=""))
        self._patch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding="utf-8", newline=""))
        code = await asyncio.to_thread(run, argv)
        sys.stdout.flush()
        sys.stderr.flush()
        return Ran(code, out.getvalue().decode(), err.getvalue().decode())
