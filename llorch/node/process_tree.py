"""Which processes belong to which, as the kernel knows it: an engine's children hold its memory.

Owns one look through /proc (Linux; elsewhere there is nothing to find). Blocking, some milliseconds. Never ends
anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
# Of /proc/PID/stat, counted behind the name. Documentation/filesystems/proc.rst of the kernel.
_PARENT, _SESSION = 1, 3


def descendants(pids: Iterable[int], *, proc: Path = PROC) -> set[int]:
    """Of `pids` those that live, their descendants, and who is in the session that one of them leads: an engine leads
    one, so that a child whose own parent has ended is found by it.
    """
    wanted = set(pids)
    if not wanted:
        return set()
    below: defaultdict[int, list[int]] = defaultdict(list)
    living = set()
    for pid, parent, session in _processes(proc):
        living.add(pid)
        below[parent].append(pid)
        if session != parent:
            below[session].append(pid)
    found: set[int] = set()
    left = list(wanted & living)
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += below[pid]
    return found


def _processes(proc: Path) -> Iterable[tuple[int, int, int]]:
    """(pid, parent, session) of each that can be read."""
    try:
        names = [entry.name for entry in proc.iterdir() if entry.name.isdecimal()]
    except OSError:
        return
    for name in names:
        try:
            stat = (proc / name / "stat").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        fields = stat.rpartition(b")")[2].split()
        if len(fields) > _SESSION:
            yield int(name), int(fields[_PARENT]), int(fields[_SESSION])
