"""The ids of the nodes, on disk: so that a control that starts knows whom to wait for.

A hint and no state: without the file, or with one that can't be read, the control waits out its recovery window.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from llorch import whole_file
from llorch.errors import ConfigError
from llorch.logs import Log

FILE_NAME = "nodes.json"
MAX_FILE_BYTES = 1024 * 1024

log = Log("control.roster")


class Roster:
    """`nodes.json` in the data directory."""

    def __init__(self, data_dir: str) -> None:
        self._path = Path(data_dir).expanduser() / FILE_NAME
        self._failed = False
        self.saved = self._load()  # None where nothing can be told

    def prepare(self) -> None:
        """Make the directory, private if it is new. Raises ConfigError if it can't be used."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the directory {self._path.parent} can't be used: {error.strerror}", hint="give another --data-dir"
            ) from None

    def _load(self) -> frozenset[str] | None:
        try:
            with self._path.open("rb") as file:
                value = json.loads(file.read(MAX_FILE_BYTES))
            return frozenset(str(node_id) for node_id in value["nodes"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            log.warning("roster.unread", path=self._path)
            return None

    def save(self, node_ids: Iterable[str]) -> None:
        """Write them if they have changed. Blocking. A disk that is full costs the hint, and is told once."""
        wanted = frozenset(node_ids)
        if wanted == self.saved:
            return
        try:
            whole_file.replace(self._path, json.dumps({"nodes": sorted(wanted)}).encode(), mode=None, durable=False)
        except OSError as error:
            if not self._failed:
                log.warning("roster.unsaved", path=self._path, reason=error.strerror)
            self._failed = True
            return
        self.saved, self._failed = wanted, False
