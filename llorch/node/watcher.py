"""Watches the directory of handoff files and says what appeared, changed, went, or can't be accepted.

Owns reading those files without being hurt by them (links, FIFOs, devices, huge files), telling a real change from a
touch, and seeing changes where no notification comes (network mounts): it rescans every few seconds, and polls if asked
to. Never decides what a handoff means for a pool.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import watchfiles

from llorch.logs import Log
from llorch.node.handoff import MAX_HANDOFF_BYTES, SUFFIX, Network, parse
from llorch.node.pool_events import HandoffBad, HandoffGone, HandoffSeen
from llorch.tasks import Guard

RESCAN_S = 5.0  # what the notifications missed is seen this much later
POLL_S = 0.3
STEP_MS = 20  # a rename is reported this long after it; the default of 50 waits for more
DEBOUNCE_MS = 200  # a directory that never rests is looked at this often; the default is 1.6 s
MAX_FILES = 4_096  # more is not a directory of handoffs

log = Log("watcher")

Found = dict[str, bytes | str]  # by file name: its content, or why it can't be read


class Watcher:
    """`on_event` is called in the event loop, in the order of what was seen."""

    def __init__(
        self,
        directory: Path,
        on_event: Callable[[HandoffSeen | HandoffBad | HandoffGone], None],
        *,
        engine_cidrs: Sequence[Network] = (),
        polling: bool = False,
        rescan_s: float = RESCAN_S,
    ) -> None:
        self._directory = directory
        self._on_event = on_event
        self._cidrs = tuple(engine_cidrs)
        self._polling = polling
        self._rescan_s = POLL_S if polling else rescan_s
        self._known: Found = {}
        self._said: int | None = None  # why the directory can't be read, as last told
        self._scanning = asyncio.Lock()
        self._guard = Guard("watcher")

    async def start(self) -> None:
        """Report what is there, then keep watching. The directory is made if it is missing."""
        await self.scan()
        if not self._polling:
            self._guard.loop(self._watch, "changes")
        self._guard.loop(self._rescan, "rescan")

    async def close(self) -> None:
        await self._guard.close()

    async def scan(self) -> None:
        """Look once, and report what differs from the last look."""
        async with self._scanning:
            try:
                found = await asyncio.to_thread(look, self._directory)
            except OSError as error:
                self._unreadable(error)
                return
            self._said = None
            for name in sorted(self._known.keys() - found.keys()):
                del self._known[name]
                self._on_event(HandoffGone(name))
            for name, content in sorted(found.items()):
                if self._known.get(name) != content:
                    self._known[name] = content
                    self._on_event(self._judge(name, content))

    def _unreadable(self, error: OSError) -> None:
        """What was seen before stays: no engine is to go because a disk has trouble."""
        if self._said != error.errno:
            log.error("handoffs.unreadable", directory=str(self._directory), reason=error.strerror)
        self._said = error.errno

    def _judge(self, name: str, content: bytes | str) -> HandoffSeen | HandoffBad:
        if isinstance(content, str):
            return HandoffBad(name, content)
        try:
            return HandoffSeen(parse(name, content, self._cidrs))
        except ValueError as error:
            return HandoffBad(name, str(error))

    async def _watch(self) -> float:
        """Scan at each notification, until the directory goes away or notifications end."""
        await self.scan()
        if not self._directory.is_dir():
            return self._rescan_s
        changes = watchfiles.awatch(
            self._directory, watch_filter=None, debounce=DEBOUNCE_MS, step=STEP_MS, recursive=False
        )
        change = asyncio.ensure_future(_next(changes))
        try:
            await asyncio.sleep(0)  # its first step turns the notifications on: what came before is seen by this scan
            while True:
                await self.scan()
                if not self._directory.is_dir() or not await change:
                    return 0.1  # watch the one that the scan, or somebody, makes in its place
                change = asyncio.ensure_future(_next(changes))
        finally:
            change.cancel()
            await asyncio.wait((change,))
            await changes.aclose()

    async def _rescan(self) -> float:
        await self.scan()
        return self._rescan_s


async def _next(changes: AsyncGenerator[object, None]) -> bool:
    """True at the next change, False when there will be none."""
    return await anext(changes, None) is not None


def look(directory: Path) -> Found:
    """The handoff files in `directory`, which is made if it is missing. Hidden and other files don't count."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if _is_handoff(entry.name))
    if len(names) > MAX_FILES:
        log.warning("handoffs.too_many", files=len(names), most=MAX_FILES)
    read = ((name, _read(directory / name)) for name in names[:MAX_FILES])
    return {name: content for name, content in read if content is not None}


def _is_handoff(name: str) -> bool:
    if not name.endswith(SUFFIX) or name.startswith("."):
        return False
    return name.isprintable() and name.isascii()


def _read(path: Path) -> bytes | str | None:
    """The content, a reason, or None if it went away meanwhile. Never waits: not on a FIFO, not on a device."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return "it is not a regular file"
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            return "it is not a regular file"
        return f"it can't be opened: {error.strerror}"
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return "it is not a regular file"
        try:
            content = file.read(MAX_HANDOFF_BYTES + 1)
        except OSError as error:
            return f"it can't be read: {error.strerror}"
    return content if len(content) <= MAX_HANDOFF_BYTES else f"it is larger than {MAX_HANDOFF_BYTES} bytes"
