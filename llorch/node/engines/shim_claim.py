"""Who wants an engine: the pid file, whether it still speaks of this shim, and whether the agent that it names lives.

Owns what a shim reads and writes there. The agent's part (`agent`, `meta` and the graces) is the agent's to change, the
rest the shim's. Imports little, for it is loaded once for every engine.
"""

from __future__ import annotations

import errno
import os
import select

from llorch.node.engines import shim_linux as linux
from llorch.node.engines.shim_files import Locked, read, remove, replace

MAX_PID = 2**22  # of Linux

Json = dict[str, object]


def whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def seconds(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) and value >= 0 else otherwise


def identity(value: object) -> tuple[int, int | None] | None:
    """The (pid, start time) of `{"pid": ..., "start_time": ...}`."""
    if not isinstance(value, dict):
        return None
    pid = whole(value.get("pid"))
    return (pid, whole(value.get("start_time"))) if pid is not None and 1 < pid <= MAX_PID else None


class Agent:
    """The process that claims the engine. Its end is seen through a pidfd, for where /proc hides processes (hidepid) it
    can't be looked at.
    """

    def __init__(self, named: tuple[int, int | None] | None) -> None:
        self.named = named
        self.descriptor: int | None = None
        self._alive = named is not None
        if named is None:
            return
        try:
            self.descriptor = os.pidfd_open(named[0])
        except ProcessLookupError:
            self._alive = False
        except (AttributeError, OSError):  # neither has macOS, nor an old kernel
            pass
        if self.descriptor is not None and linux.start_time(named[0]) not in (None, named[1]):
            self._alive = False  # another process has its pid

    def alive(self) -> bool:
        if self.descriptor is not None and self._alive:
            self._alive = not select.select([self.descriptor], [], [], 0)[0]
        elif self._alive and self.named is not None:
            self._alive = linux.lives(*self.named)
        return self._alive

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class Claim:
    """The engine's pid file: who it says this is, and who wants it."""

    def __init__(self, path: str, own: Json, stop_grace_s: float, orphan_grace_s: float) -> None:
        self.path = path
        self.own = own
        self.stop_grace_s = stop_grace_s
        self.orphan_grace_s = orphan_grace_s
        self.agent = Agent(None)
        self._version: tuple[int, int, int] | None = None
        self._ours = False

    def write(self, content: Json) -> None:
        """At the start. Raises OSError, FileExistsError if the file is another living shim's."""
        with Locked(os.path.dirname(self.path)):  # noqa: PTH120
            there = identity(read(self.path).get("shim"))
            if there is not None and linux.start_time(there[0]) == there[1] is not None:
                raise FileExistsError(errno.EEXIST, "another engine of this name is running")
            replace(self.path, content)

    def change(self, **fields: object) -> None:
        """Raises OSError."""
        with Locked(os.path.dirname(self.path)):  # noqa: PTH120
            content = read(self.path)
            if content.get("shim") == self.own:
                replace(self.path, content | fields)

    def held(self) -> bool:
        """Whether the file is still about this shim, and its agent lives."""
        try:
            seen = os.stat(self.path, follow_symlinks=False)  # noqa: PTH116
        except OSError:
            self._version, self._ours = None, False
            return False
        version = (seen.st_ino, seen.st_mtime_ns, seen.st_size)
        if version != self._version:
            content = read(self.path)
            self._version, self._ours = version, content.get("shim") == self.own
            self.stop_grace_s = seconds(content.get("stop_grace_s"), self.stop_grace_s)
            self.orphan_grace_s = seconds(content.get("orphan_grace_s"), self.orphan_grace_s)
            named = identity(content.get("agent"))
            if named != self.agent.named:
                self.agent.close()
                self.agent = Agent(named)
        return self._ours and self.agent.alive()

    def give_up(self, *others: str) -> None:
        """Remove the file, and others that go with it, unless somebody has claimed the engine after all."""
        try:
            with Locked(os.path.dirname(self.path)):  # noqa: PTH120
                if read(self.path).get("shim") == self.own and not self.held():
                    for path in (*others, self.path):
                        remove(path)
        except OSError:
            pass
