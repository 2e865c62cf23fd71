"""The history of one run: every event of clients, nodes and engines and every fault, one JSON object a line.

Owns the words that histories are written in, and the clock that their times are of: the machine's monotonic one, which
all processes read alike, so that an engine's own lines fit among those of the clients. The validator reads only this.

    run      seed, pools {"a/p0": {node, model, slots, obeys}}, promises {name: number}
    fault    fault (a number), kind, target ("control", "clients", a node, or a pool "a/p0"), phase,
             resent: what was sent meanwhile is sent again by the kernel once it is healed
    healed   fault: what it broke works again, as far as the harness can tell
    task     task (its marker), form, model, tokens, task_id, key, deadline_s, script: what is asked, once
    send     task, conn, op ("post", "events", "cancel", "mismatch"), after
    answer   task, conn, status, code, node, pool, task_id, replayed
    event    task, conn, kind, id, size, crc, data: one event of a native stream
    chunk    task, conn, kind ("text", "done", "error", "other"), text, code: one event of a /v1 stream
    body     task, conn, text, finish: an answer in one piece
    closed   task, conn, how ("end": as it should; "broken", "unreachable", "silent", "left")
    left     task, back: the client goes, for a while or for good
    stalled  task, conn, for_s: the client takes nothing for so long
    over     task, how: the client asks no more
    engine   pool, pid, step, marker, tokens: a line of an engine's journal
    life     node, number, keeps: it starts, and when it goes its engines stay for the next one, or end with it
    went     node, keeps, engines {"a/p0": [pid]}: it was killed or told to go; what ran at that moment
    back     node, engines: its pools take tasks again
    sample   pools {"a/p0": [slots_total, slots_free, in_flight, bound, state]}: as the control sees them
    stopped  no new task from here on
    calm     every fault is healed
    final    what is left when all is over: pools as in a sample, queued, tasks, engines {pool: processes}
    struck   line: a control took a node for one that lies, in its log's words
    bug      line: a role logged a bug of its own
    ended    asked, left {pid: argv}: engines without an agent that were told to end, and what did not
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

Entry = dict[str, Any]


class Recorder:
    """Writes a history down as it happens."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", encoding="utf-8")
        self.entries: list[Entry] = []

    def note(self, what: str, **fields: Any) -> Entry:
        entry = {"at": time.monotonic(), "what": what, **fields}
        self.add(entry)
        return entry

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
