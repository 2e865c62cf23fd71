"""The logs of a pool's engines, from afar: the newest lines, or those that came after a cursor.

Owns the cursor: how far each replica's log was read, and of which file, for they are rotated. Blocking, and short:
what is read at once is bounded. Never shows a control character.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llorch.logs import printable
from llorch.node.engine_log import MAX_LINE_CHARS, tail
from llorch.node.engines.shim_files import generations

READ_BYTES = 128 * 1024  # of one log at once: a follower asks twice a second
MAX_DIGITS = 20  # of a file's number, and of a place in it

LATELY_S = 3600.0  # a replica that did not come up is gone from its pool, and why it did not is what is asked

Place = tuple[int, int]  # a file's number, and how far it was read


def read(logs: Path, pool_id: str, replicas: Sequence[str], lines: int, after: str | None) -> dict[str, Any]:
    """`{"lines": [{"replica", "text"}], "cursor"}`. A cursor that is not ours means the newest lines.

    Each replica has its share of `lines`, lest the words of one hide those of the others.
    """
    places = _places(after)
    replicas = [*gone_lately(logs, pool_id, replicas), *replicas]
    each = max(1, lines // max(1, len(replicas)))
    found: list[dict[str, str]] = []
    cursors: list[str] = []
    for replica in replicas:
        path = logs / f"{pool_id}-{replica}.log"
        place = places.get(replica)
        if place is None:
            texts, place = tail(path, each), _end(path)
        else:
            texts, place = _after(path, place, min(each, lines - len(found)))
        texts = texts[max(0, len(texts) + len(found) - lines) :]
        found += [{"replica": replica, "text": text} for text in texts]
        cursors.append(f"{replica}={place[0]}:{place[1]}")
    return {"lines": found, "cursor": ",".join(cursors)}


def gone_lately(logs: Path, pool_id: str, there: Sequence[str]) -> list[str]:
    """Replicas whose logs were written lately, beside those that are there."""
    name = re.compile(rf"{re.escape(pool_id)}-(r\d+)\.log")
    found = []
    for path in sorted(logs.glob("*.log")):
        match = name.fullmatch(path.name)
        if match is not None and match[1] not in there:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime < LATELY_S:
                    found.append(match[1])
    return found


def _places(after: str | None) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for part in (after or "")[:4_096].split(","):
        replica, _, place = part.partition("=")
        file, _, offset = place.partition(":")
        if file.isdecimal() and offset.isdecimal() and max(len(file), len(offset)) <= MAX_DIGITS:
            places[replica] = (int(file), int(offset))
    return places


def _end(path: Path) -> Place:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_size


def _after(path: Path, place: Place, lines: int) -> tuple[list[str], Place]:
    """The whole lines since `place`, the oldest first and no more than `lines`; over a rotation, too. A log that is
    shorter than it was is another one, under a number that was free again."""
    texts: list[str] = []
    for name in _since(path, place[0]) if lines > 0 else ():
        try:
            with name.open("rb") as file:
                found = os.fstat(file.fileno())
                number = found.st_ino
                start = place[1] if number == place[0] and place[1] <= found.st_size else 0
                file.seek(start)
                raw = file.read(READ_BYTES)
        except OSError:
            continue
        whole = raw.splitlines(keepends=True)
        if whole and not whole[-1].endswith(b"\n") and len(raw) < READ_BYTES:
            whole.pop()  # it is still being written
        whole = whole[: lines - len(texts)]
        texts += [printable(line.decode("utf-8", "replace").rstrip("\r\n"))[:MAX_LINE_CHARS] for line in whole]
        place = (number, start + sum(map(len, whole)))
        if len(texts) >= lines or len(raw) == READ_BYTES:
            break
    return texts, place


def _since(path: Path, number: int) -> list[Path]:
    """The log and what it was rotated to, the oldest first, from the file with that number on; all if that is gone."""
    files = [Path(name) for name in generations(str(path)) if os.path.lexists(name)]
    for count, file in enumerate(files, 1):
        if _end(file)[0] == number:
            return files[:count][::-1]
    return files[::-1]
