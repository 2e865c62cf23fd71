"""The logs of engines, for people: the last lines, across the files that a rotation leaves.

Owns how they are read. `engines/shim_files.py` writes them.
"""

from __future__ import annotations

import os
from pathlib import Path

from llorch.logs import printable
from llorch.node.engines.shim_files import generations

TAIL_BYTES = 64 * 1024
MAX_LINE_CHARS = 300


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, without control characters, each of bounded length."""
    raw = b""
    for name in generations(str(path)):
        try:
            with Path(name).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                wanted = min(size, TAIL_BYTES - len(raw))
                file.seek(size - wanted)
                raw = file.read(wanted) + raw
        except OSError:
            break
        if len(raw) >= TAIL_BYTES or raw.count(b"\n") > lines:
            break
    text = raw.decode("utf-8", "replace").splitlines()
    return [printable(line)[:MAX_LINE_CHARS] for line in text[-lines:]]
