"""What a shim asks of the kernel: rights and signals at a parent's death, who is whose child, what memory ran out.

Owns prctl and the reading of /proc and of the memory cgroup's counters. Elsewhere than on Linux there is none of it:
the functions then know nothing and do nothing. Imports little, for it is loaded once for every engine.
Formats: proc(5), Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of the kernel.
"""

from __future__ import annotations

import ctypes
import os
import sys

try:  # hashlib would bring OpenSSL along, half as much again as all the rest
    from _sha256 import sha256  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # Python 3.12 and later
    try:
        from _sha2 import sha256  # type: ignore[import-not-found, no-redef, unused-ignore]
    except ImportError:
        from hashlib import sha256  # type: ignore[assignment, no-redef, unused-ignore]

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38  # prctl(2)
ENGINE_OOM_SCORE_ADJ = 500  # of 1000: of all on this machine the engine is to go first, long before its agent
STATE, PARENT, STARTED = 0, 1, 19  # of /proc/PID/stat, counted behind the name


def prctl(option: int, value: int) -> None:
    """Raises OSError."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _read(path: str) -> bytes:
    """All of a small file; nothing if it can't be read."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib is much to load
            return file.read()
    except OSError:
        return b""


def _stat(pid: int) -> list[bytes]:
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid it names a process for good. None: it has ended,
    or can't be seen.
    """
    fields = _stat(pid)
    return int(fields[STARTED]) if len(fields) > STARTED and fields[STATE] not in b"ZX" else None


def lives(pid: int, started: int | None) -> bool:
    """Whether the process that started then still runs, as far as can be told."""
    fields = _stat(pid)
    if len(fields) > STARTED:
        return fields[STATE] not in b"ZX" and started in (None, int(fields[STARTED]))
    try:
        os.kill(pid, 0)  # /proc may hide it (hidepid), or there is none
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def parent_of(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[PARENT]) if len(fields) > PARENT else None


def argv_digest(pid: int) -> str | None:
    """SHA-256 of a process's argv, NUL between its words, as they stand in its memory now. None: nothing to be seen."""
    raw = _read(f"/proc/{pid}/cmdline")
    return digest(raw.removesuffix(b"\0")) if raw else None


def digest(argv: bytes) -> str:
    return str(sha256(argv).hexdigest())


def children() -> list[int]:
    """The direct children of this process, those that have ended included. Their pids are nobody else's until waited
    for, so that a signal to one reaches no stranger.
    """
    own = os.getpid()
    listed = _read(f"/proc/self/task/{own}/children")
    if listed or os.path.exists(f"/proc/self/task/{own}/children"):  # noqa: PTH110
        return [int(pid) for pid in listed.split()]
    try:
        entries = os.listdir("/proc")  # noqa: PTH208
    except OSError:
        return []
    return [int(entry) for entry in entries if entry.isdecimal() and parent_of(int(entry)) == own]


def give_back_memory() -> None:
    """What loading has left over, to the system: a tenth of all."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # glibc's alone
        pass


def go_first() -> None:
    """When memory runs out the kernel is to take this process rather than the agent. Lowering it needs rights."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write(str(ENGINE_OOM_SCORE_ADJ))
    except OSError:
        pass


# ---------------------------------------------------------------- memory cgroups


def counter_files(cgroup: str, mountinfo: str) -> list[str]:
    """Where the kernel may count the out-of-memory kills of a process, best first, from its /proc/PID/cgroup and
    /proc/PID/mountinfo.
    """
    v1: str | None = None
    v2: str | None = None
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            v1 = path
        elif number == "0" and not controllers:
            v2 = path
    found = []
    for kind, own, name in (("cgroup", v1, "memory.oom_control"), ("cgroup2", v2, "memory.events")):
        if own is not None and (folder := _mounted(kind, own, mountinfo)) is not None:
            found.append(f"{folder}/{name}")
    return [*found, "/proc/vmstat"]  # the whole machine's, where it has no cgroup of its own


def _mounted(kind: str, path: str, mountinfo: str) -> str | None:
    """The directory of a cgroup: `path` below the mount that shows it."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, source = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(source) < 3 or source[0] != kind:
            continue
        if kind == "cgroup" and "memory" not in source[2].split(","):
            continue
        root, point = (field.replace("\\040", " ") for field in fields[3:5])
        root = root.rstrip("/")
        if path == root or path.startswith(f"{root}/"):
            return f"{point}{path[len(root) :]}".rstrip("/")
    return None


class OomKills:
    """How many processes beside this one the kernel has killed for memory, and when the last of them."""

    def __init__(self) -> None:
        places = counter_files(
            _read("/proc/self/cgroup").decode("utf-8", "replace"),
            _read("/proc/self/mountinfo").decode("utf-8", "replace"),
        )
        self._file = next((place for place in places if self._count(place) is not None), None)
        self._seen = self._count(self._file)
        self._risen_at: float | None = None

    @staticmethod
    def _count(place: str | None) -> int | None:
        for line in _read(place).splitlines() if place is not None else ():
            word, _, number = line.partition(b" ")
            if word == b"oom_kill" and number.strip().isdigit():
                return int(number)
        return None

    def look(self, now: float) -> None:
        count = self._count(self._file)
        if count is not None and self._seen is not None and count > self._seen:
            self._risen_at = now
        self._seen = count if count is not None else self._seen

    def within(self, seconds: float, now: float) -> bool:
        self.look(now)
        return self._risen_at is not None and now - self._risen_at <= seconds
