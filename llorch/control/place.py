"""Where a control can be reached, written down in its data directory for commands on the same machine."""

from __future__ import annotations

import json
from pathlib import Path

from llorch import private
from llorch.config import ControlSettings
from llorch.control.own_names import primary_addresses
from llorch.errors import ConfigError
from llorch.logs import Log

FILE_NAME = "control.json"

log = Log("control.place")


def url_for_others(settings: ControlSettings, url: str, port: int) -> str:
    """The URL by which another machine most likely reaches this control: `url`, unless it listens at every address."""
    if not settings.bind.everywhere:
        return url
    named = [*settings.tls_names, *primary_addresses()]
    if not named:
        return url
    host = f"[{named[0]}]" if ":" in named[0] else named[0]
    return f"{url.partition('://')[0]}://{host}:{port}"


def write_place(data_dir: str, url: str) -> None:
    """A disk that is full costs the hint and no more."""
    try:
        private.write(Path(data_dir) / FILE_NAME, json.dumps({"url": url}).encode() + b"\n")
    except OSError as error:
        log.warning("place.unwritten", reason=error.strerror)


def read_place(directory: Path) -> str | None:
    try:
        value = json.loads(private.read(directory / FILE_NAME, secret=False) or b"null")
    except (ConfigError, ValueError):
        return None
    url = value.get("url") if isinstance(value, dict) else None
    return url if isinstance(url, str) else None
