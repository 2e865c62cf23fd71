"""Starts an engine so that it can't outlive its agent, whatever program it is. A program: `python -m ...launch`.

    python -m llorch.node.engines.launch --parent PID [--log FILE] -- ARGV...

Owns what must hold before the engine's first instruction: its own session, SIGKILL at its parent's death and no rights
beyond its parent's (Linux), no core dumps (they would hold prompts), files readable by this user alone. Then it becomes
the engine. Imports little, for it runs before every engine.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # prctl(2)
CANNOT_START = 127  # what shells use for a program that isn't there


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends. Exits at once if it has already ended: the signal would never come.

    Linux means the parent's *thread* that started this process: it has to be one that lives as long as the agent.
    """
    if sys.platform != "linux":
        return
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def gain_no_rights() -> None:
    """From here on no program that is executed gains rights by it, set-uid or with file capabilities: whoever takes an
    engine over has this user's rights and no way to more. Linux only. It includes nvidia-modprobe, so the driver's
    device files have to be there: the agent's own look at the GPUs, which comes first, makes them.
    """
    if sys.platform == "linux":
        _prctl(PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
        print(f"launch: prctl: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="llorch-launch")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--log")
    parser.add_argument("argv", nargs=argparse.REMAINDER)
    given = parser.parse_args(argv)
    command = given.argv[1:] if given.argv[:1] == ["--"] else given.argv
    if not command:
        parser.error("nothing to launch")
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getpid() != os.getsid(0):
        os.setsid()
    if given.log is not None:
        descriptor = os.open(given.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    gain_no_rights()
    die_with_parent(given.parent)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python, which a program inherits
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"launch: {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(CANNOT_START)


if __name__ == "__main__":
    main()
