"""A hold on one process, child of ours or not: signals that reach no stranger, and its end when it comes.

Owns the pidfd (Linux 5.3); without one the process is looked at again and again. Never decides when a process should
end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess

from llorch.node.engines.shim_linux import lives

POLL_S = 0.05  # where the kernel has no pidfd


class ProcessHold:
    """The process that had `pid` and `started` (None where the system does not tell) when this was made."""

    def __init__(self, pid: int, started: int | None, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self._started = started
        self._child = child
        self._descriptor: int | None = None
        self._ended = asyncio.Event()
        self._reading: asyncio.AbstractEventLoop | None = None
        try:
            self._descriptor = os.pidfd_open(pid)
        except (AttributeError, OSError):
            pass
        if not self.alive():  # another may have its pid: the descriptor would be that one's
            self._let_go()
            self._ended.set()

    def alive(self) -> bool:
        if self._child is not None:
            return self._child.returncode is None and self._child.poll() is None
        return not self._ended.is_set() and lives(self.pid, self._started)

    @property
    def returncode(self) -> int | None:
        """Of a child that has ended, as subprocess has it."""
        return self._child.returncode if self._child is not None else None

    def signal(self, number: signal.Signals) -> None:
        """To it alone; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._descriptor is not None:
                signal.pidfd_send_signal(self._descriptor, number)
            elif self.alive():
                os.kill(self.pid, number)

    async def ended(self) -> None:
        """Until it has ended."""
        if self._descriptor is None:
            while self.alive():  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(POLL_S)
            return
        if self._reading is None and not self._ended.is_set():
            self._reading = asyncio.get_running_loop()
            self._reading.add_reader(self._descriptor, self._see_end)
        await self._ended.wait()

    def _see_end(self) -> None:
        self._let_go()
        if self._child is not None:
            self._child.wait()  # it has ended
        self._ended.set()

    def _let_go(self) -> None:
        if self._reading is not None and self._descriptor is not None:
            self._reading.remove_reader(self._descriptor)
        self._reading = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def close(self) -> None:
        """Look no more. A child that still runs is nobody's to wait for in this process any more."""
        self._let_go()
        if self._child is not None and self._child.poll() is None:
            self._child.returncode = 0  # or subprocess would warn of it
