"""This process as others on its machine may see it: a role keeps its secrets to itself once it has read them.

Surface:
    forget(names)       secrets leave the environment, so that no child inherits them
    close_to_others()   no core dump, and no other process of this user may look inside (Linux)

What `/proc/PID/environ` shows is what the process was started with, whatever it has removed since; the kernel shows it
to root alone once a process can't be looked into. Neither keeps anything from root. Never decides what is secret.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterable

PR_SET_DUMPABLE = 4  # prctl(2)


def forget(names: Iterable[str]) -> None:
    """Remove variables from the environment of this process and of those that it starts from now on."""
    for name in names:
        os.environ.pop(name, None)


def close_to_others() -> None:
    """No core dump, no debugger but root's: the memory of a role holds tokens and prompts. Children are not bound by
    it. Where it can't be done the role is as open as any program, which is no reason not to run.
    """
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, *map(ctypes.c_ulong, (0, 0, 0, 0)))
