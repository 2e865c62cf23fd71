"""The keeper of one `llorch dev`: it starts the roles, and ends everything when its standard input ends.

Owns the role processes, their state directory and the context of one `llorch dev`. Its input is a pipe whose other end
only that process holds, so whatever ends it, SIGKILL included, ends the pipe: there is one way out for every ending.
The roles are the keeper's children, so no process id can be taken for another's; it is their subreaper, so what they
leave behind comes to it. Never decides what to start: lines of JSON on its input say so, lines on its output tell what
became of it. Imports little: it must be there before anything that could need it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROLE_GRACE_S = 10.0  # for the roles to end by themselves; twice what they give their tasks here
STRAY_GRACE_S = 2.0  # for killed processes to be gone
TICK_S = 0.02
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


class Ended(Exception):
    """SIGTERM: the same as the end of the input."""


def process_start(pid: int) -> str | None:
    """When a process started, in the kernel's ticks: with its pid, its name for all time. None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def is_alive(keeper: str) -> bool:
    """Whether the process that a context names ("pid:start") still runs."""
    pid, _, start = keeper.partition(":")
    return pid.isdigit() and process_start(int(pid)) == start


class Keeper:
    def __init__(self) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="llorch-dev-"))
        self.identity = f"{os.getpid()}:{process_start(os.getpid())}"
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._roles: dict[str, subprocess.Popen[bytes]] = {}
        self._context: tuple[Path, str] | None = None
        self._speaking = threading.Lock()

    def serve(self) -> None:
        """Do what the lines say until there are no more."""
        if sys.platform == "linux":
            self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._say({"state": str(self.state), "keeper": self.identity})
        for line in sys.stdin.buffer:
            if not line.endswith(b"\n"):
                return  # its writer ended in the middle of it
            order = json.loads(line)
            if "start" in order:
                self._start(order)
            elif "context" in order:
                self._context = (Path(order["path"]), order["context"])

    def _say(self, message: dict[str, Any]) -> None:
        with self._speaking, contextlib.suppress(OSError, ValueError):  # perhaps nobody listens any more
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()

    # ------------------------------------------------------------ roles

    def _start(self, order: dict[str, Any]) -> None:
        name, keeper = order["start"], os.getpid()

        def die_with_keeper() -> None:
            if sys.platform == "linux":
                self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
                if os.getppid() != keeper:
                    os._exit(1)

        log = -1
        try:
            log = os.open(self.state / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            role = subprocess.Popen(
                order["argv"],
                env=order["env"],
                cwd=self.state,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # ^C at the terminal is for `llorch dev`, which sees to the roles
                preexec_fn=die_with_keeper,
            )
        except OSError as error:
            self._say({"ended": name, "code": 127, "why": error.strerror})
            return
        finally:
            if log >= 0:
                os.close(log)
        self._roles[name] = role
        self._say({"started": name, "role": f"{role.pid}:{process_start(role.pid)}"})
        threading.Thread(target=self._watch, args=(name, role.pid), daemon=True).start()

    def _watch(self, name: str, pid: int) -> None:
        """Tell when a role ends. It is not reaped, so its pid stays its own until `close`."""
        with contextlib.suppress(ChildProcessError):
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            if found is not None:
                code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
                self._say({"ended": name, "code": code})

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """End the roles and whatever they started, forget the context, remove the state. Every step is tried."""
        for role in self._roles.values():
            _signal(role.pid, signal.SIGTERM)
        until = time.monotonic() + ROLE_GRACE_S
        while any(_runs(role.pid) for role in self._roles.values()) and time.monotonic() < until:
            time.sleep(TICK_S)
        for role in self._roles.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(role.pid, signal.SIGKILL)
            role.wait()
        _end_strays()
        if self._context is not None:
            from llorch.cli import contexts
            from llorch.errors import LlorchError

            with contextlib.suppress(LlorchError, OSError):
                contexts.remove(*self._context, keeper=self.identity)
        shutil.rmtree(self.state, ignore_errors=True)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _runs(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
    except ChildProcessError:
        return False


def _end_strays() -> None:
    """Kill what the roles left: as their subreaper this process has become its parent."""
    until = time.monotonic() + STRAY_GRACE_S
    while time.monotonic() < until:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                for pid in _children():
                    _signal(pid, signal.SIGKILL)
                time.sleep(TICK_S)
        except ChildProcessError:
            return


def _children() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_bytes()
        except OSError:
            continue
        if int(stat.rpartition(b")")[2].split()[1]) == os.getpid():
            found.append(int(entry.name))
    return found


def _end(_number: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Ended


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    keeper = None
    try:
        keeper = Keeper()
        keeper.serve()
    except Ended:
        pass
    except OSError as error:
        if keeper is not None:
            raise
        print(json.dumps({"failed": f"{error.filename or 'its state'}: {error.strerror}"}), flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if keeper is not None:
            keeper.close()


if __name__ == "__main__":
    main()
