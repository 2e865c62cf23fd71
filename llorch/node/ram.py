"""The memory of this machine, as far as processes of this node may have it.

Owns the reading of /proc/meminfo and of the limits of memory cgroups around this process (v2; Linux). Blocking, for
microseconds. Never limits anything.
Formats: Documentation/filesystems/proc.rst and admin-guide/cgroup-v2.rst of the kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
MAX_LEVELS = 32  # of cgroups in each other


@dataclass(frozen=True, slots=True)
class Ram:
    """`available_bytes` is the kernel's guess, page cache that it can give up included. 0 of both: not known."""

    total_bytes: int
    available_bytes: int


def ram(*, proc: Path = PROC, cgroups: Path = CGROUPS) -> Ram:
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text(proc / "meminfo"), re.MULTILINE))
    total = int(values.get("MemTotal", 0)) * 1024
    available = int(values.get("MemAvailable", 0)) * 1024
    for group in _around(proc, cgroups):
        limit = _text(group / "memory.max").strip()
        if limit.isdecimal() and int(limit) < total:
            total = int(limit)
    return Ram(total, min(available, total))


def _around(proc: Path, cgroups: Path) -> list[Path]:
    """The cgroup of this process and those that it is in. Within a container's own namespace the first is /."""
    found = re.search(r"^0::/(.*)$", _text(proc / "self" / "cgroup"), re.MULTILINE)
    parts = [part for part in found[1].split("/") if part] if found else []
    if len(parts) > MAX_LEVELS or ".." in parts:
        parts = []
    return [cgroups.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
