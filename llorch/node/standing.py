"""What operators asked of this node, kept on disk: a drained node stays drained when its agent is started again.

Owns the file `<data>/wishes.json`. What is in it, and what it means, is `pools`. A file that can't be read is nobody's
wish, and is said so; one that can't be written is tried again until it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llorch import whole_file
from llorch.errors import LlorchError
from llorch.logs import Log
from llorch.messages import decode_object

MAX_BYTES = 1024 * 1024  # 256 pools with their reasons are a tenth of it
AGAIN_S = 10.0  # where the disk would not take them

log = Log("node.standing")


def read(path: Path) -> dict[str, Any]:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        log.error("wishes.unread", file=path.name, reason=error.strerror)
        return {}
    try:
        if len(raw) > MAX_BYTES:
            raise ValueError
        return decode_object(raw)
    except (LlorchError, ValueError):
        log.error("wishes.unread", file=path.name, reason="it is not what was written")
        return {}


def pools(wishes: Mapping[str, Any]) -> frozenset[str]:
    """The pools of which something is asked."""
    found = wishes.get("pools")
    return frozenset(found) if isinstance(found, Mapping) else frozenset()


def write(path: Path, wishes: dict[str, Any]) -> bool:
    """Whether they are on disk now."""
    try:
        whole_file.replace(path, json.dumps(wishes, indent=1).encode() + b"\n")
    except OSError as error:
        log.error("wishes.unwritten", file=path.name, reason=error.strerror, hint="a restart forgets them")
        return False
    return True


class Standing:
    """Keeps the last that it was told at `path`, beside the event loop: a disk may be slow, or full for a while."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: dict[str, Any] | None = None
        self._news = asyncio.Event()
        self._writing = asyncio.Lock()

    def changed(self, wishes: dict[str, Any]) -> None:
        self._unwritten = wishes
        self._news.set()

    async def step(self) -> float:
        """A step of a loop: wait for news, and write it."""
        await self._news.wait()
        self._news.clear()
        if not await self.settle():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), AGAIN_S)
            self._news.set()
        return 0.0

    async def settle(self) -> bool:
        """Write what is not written yet. Whether all is."""
        async with self._writing:
            wishes = self._unwritten
            if wishes is not None and not await asyncio.to_thread(write, self._path, wishes):
                return False
            if self._unwritten is wishes:
                self._unwritten = None
            return True
