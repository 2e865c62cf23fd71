"""API keys of engines, from the files that their handoffs name.

Owns how such a file is read: the first line that is no comment, from a regular file (a FIFO would stop the node), again
when it has changed. A key never leaves this module but to its caller, and no error quotes one.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

MAX_KEY_BYTES = 4096
MOST_KEPT = 1_024  # every start of an engine has a file of its own
_KEY = re.compile(r"[\x21-\x7e]+")


def read_key(path: str) -> str:
    """The first key in a key file. Raises OSError, or ValueError if there is none."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError("the key file is not a regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        raw = file.read(MAX_KEY_BYTES)
    lines = (line.strip() for line in raw.decode("ascii").splitlines())
    key = next((line for line in lines if line and not line.startswith("#")), "")
    if not _KEY.fullmatch(key):
        raise ValueError("there is no key in the key file")
    return key


class EngineKeys:
    """Keys that were read before, until their files change: one stat per request."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int, int], str]] = {}

    def read(self, path: str) -> str:
        """As `read_key`."""
        seen = Path(path).stat()
        version = (seen.st_mtime_ns, seen.st_ino, seen.st_size)
        known = self._known.get(path)
        if known is None or known[0] != version:
            if len(self._known) >= MOST_KEPT:
                self._known.clear()
            known = self._known[path] = (version, read_key(path))
        return known[1]
