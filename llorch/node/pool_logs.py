"""The logs of a pool's engines, for people: the newest lines, or those that came after a cursor.

Owns the cursor: how far each replica's log was read, and of which file, for they are rotated. Blocking, and short:
what is read at once is bounded. Never shows a control character.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llorch.logs import printable
from llorch.node.engine_process import tail

READ_BYTES = 256 * 1024  # of one log at once: some thousand lines
MAX_LINE_CHARS = 300


def read(logs: Path, pool_id: str, replicas: Sequence[str], lines: int, after: str | None) -> dict[str, Any]:
    """`{"lines": [{"replica", "text"}], "cursor"}`. A cursor that is not ours, or of a gone log, starts anew."""
    places = _places(after)
    found: list[dict[str, str]] = []
    cursors: list[str] = []
    for replica in replicas:
        path = logs / f"{pool_id}-{replica}.log"
        texts, place = _after(path, places.get(replica)) if after is not None else (tail(path, lines), _end(path))
        found += [{"replica": replica, "text": text} for text in texts[-lines:]]
        cursors.append(f"{replica}={place}")
    return {"lines": found, "cursor": ",".join(cursors)}


def _places(after: str | None) -> dict[str, tuple[int, int]]:
    """By replica: the log file's number and how far it was read."""
    places: dict[str, tuple[int, int]] = {}
    for part in (after or "")[:8_192].split(","):
        replica, _, place = part.partition("=")
        file, _, offset = place.partition(":")
        if file.isdecimal() and offset.isdecimal() and len(place) < 64:
            places[replica] = (int(file), int(offset))
    return places


def _end(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "0:0"
    return f"{found.st_ino}:{found.st_size}"


def _after(path: Path, place: tuple[int, int] | None) -> tuple[list[str], str]:
    """Whole lines since `place`. Of a log that was rotated since, the new one from its beginning."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            same = place is not None and place[0] == found.st_ino and place[1] <= found.st_size
            start = place[1] if place is not None and same else 0
            start = max(start, found.st_size - READ_BYTES)
            file.seek(start)
            raw = file.read(READ_BYTES)
    except OSError:
        return [], "0:0"
    whole = raw[: raw.rfind(b"\n") + 1] if len(raw) < READ_BYTES else raw
    texts = [printable(line)[:MAX_LINE_CHARS] for line in whole.decode("utf-8", "replace").splitlines()]
    return texts, f"{found.st_ino}:{start + len(whole)}"
