"""Settings that change while a role serves: read anew and checked whole, then put in force, or refused and told.

Owns when that is (a file that settings came from has changed, or SIGHUP), and which settings can: those that a role
says it can take over. What else has changed is told to need a restart, and does nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from llorch import private
from llorch.config import RoleSettings
from llorch.errors import ConfigError
from llorch.logs import Log

LOOK_EVERY_S = 1.0

S = TypeVar("S", bound=RoleSettings)

log = Log("settings")


@dataclasses.dataclass(frozen=True, slots=True)
class Source(Generic[S]):
    """Where a role's settings came from. `read` reads all of it again (blocking) and raises ConfigError; `paths` are
    the files that it read, and those that it would read if they were there.
    """

    read: Callable[[], S]
    paths: tuple[Path, ...]


class Reloader(Generic[S]):
    """`step` is a loop's. `live`: the fields that `apply` takes over; if it raises ConfigError, nothing has changed.
    What `apply` has to look at on disk it may do elsewhere, and return an awaitable.
    """

    def __init__(
        self, settings: S, source: Source[S], live: Iterable[str], apply: Callable[[S], Awaitable[None] | None]
    ) -> None:
        self.settings = settings
        self._source = source
        self._live = frozenset(live)
        self._apply = apply
        self._stamps = self._look()
        self._asked = asyncio.Event()

    def _look(self) -> tuple[object, ...]:
        return tuple(map(private.stamp, self._source.paths))

    def ask(self) -> None:
        """SIGHUP: now, whether or not a file has changed."""
        self._asked.set()

    async def step(self) -> float:
        stamps = self._look()
        if stamps == self._stamps and not self._asked.is_set():
            return LOOK_EVERY_S
        self._asked.clear()
        self._stamps = stamps
        try:
            await self._take(await asyncio.to_thread(self._source.read))
        except ConfigError as error:
            log.error("settings.refused", reason=error.message, hint="what was in force before stays in force")
        return LOOK_EVERY_S

    async def _take(self, new: S) -> None:
        names = [field.name for field in dataclasses.fields(new)]
        changed = [name for name in names if getattr(new, name) != getattr(self.settings, name)]
        live = {name: getattr(new, name) for name in changed if name in self._live}
        settings = dataclasses.replace(self.settings, **live)
        applying = self._apply(settings)
        if applying is not None:
            await applying
        self.settings = settings
        waiting = [name.replace("_", "-") for name in changed if name not in self._live]
        log.info(
            "settings.reloaded",
            changed=",".join(name.replace("_", "-") for name in sorted(live)) or "nothing",
            need_restart=",".join(waiting) or None,
        )
