"""Background work with names: every loop has a parent that awaits it, and none ends unnoticed.

Owns the set of tasks of one component. A task that ends with an error is logged as `loop.ended`; a loop's step that
fails is logged as `loop.failed` and tried again.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from llorch.logs import Log

log = Log("tasks")


def settle_memory() -> None:
    """Once a role has started: what was made until now stays, and the collector need not look at it again.

    Of what a task leaves, next to nothing is in a cycle, and much is kept for a while: logs, reports, ended tasks. So
    few objects are looked at at a time (50,000 stopped everything for 20 to 60 ms, every three seconds at a thousand
    tasks a second), and all of them seldom.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 5, 200)


class Guard:
    """The parent of some tasks. `close()` cancels and awaits them all."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `work` once; an exception is logged, for nobody else awaits it."""
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}.{name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def loop(self, step: Callable[[], Awaitable[float]], name: str) -> asyncio.Task[Any]:
        """Run `step` for ever; it returns the seconds to wait. A step that raises is logged and tried again in 1 s."""
        return self.spawn(self._forever(step, name), name)

    async def _forever(self, step: Callable[[], Awaitable[float]], name: str) -> None:
        while True:
            try:
                pause_s = await step()
            except Exception:
                log.fault("loop.failed", loop=f"{self._name}.{name}")
                pause_s = 1.0
            await asyncio.sleep(pause_s)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            try:
                raise error
            except BaseException:
                log.fault("loop.ended", loop=task.get_name())

    async def close(self) -> None:
        """Cancel what still runs and wait until it has ended."""
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
