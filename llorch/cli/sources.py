"""Where settings come from on a real machine: the files that exist, the environment, paths with `~`.

Owns the search for configuration files and the reading of secrets' files, which `llorch.config` leaves to its caller.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llorch.cli.contexts import config_home
from llorch.cli.output import Failure, usage
from llorch.config import ConfigFile, Resolved, RoleSettings, resolve, settings_for
from llorch.config_kinds import PATH

SYSTEM_FILE = Path("/etc/llorch/config.yaml")
LOCAL_FILE = Path("llorch.yaml")
MAX_FILE_BYTES = 1024 * 1024

S = TypeVar("S", bound=RoleSettings)


def config_files(explicit: str | None, *, local: bool, env: Mapping[str, str], search: bool = True) -> list[ConfigFile]:
    """The settings files there are, the strongest first. `local`: ./llorch.yaml counts, unless one is given."""
    files = []
    if explicit is not None:
        path = Path(explicit).expanduser()
        try:
            files.append(ConfigFile(explicit, _read(path)))
        except (OSError, ValueError) as error:
            raise usage(f"the settings file {explicit} can't be read: {_why(error)}") from None
    for path in _searched(explicit, local=local, env=env) if search else ():
        try:
            files.append(ConfigFile(str(path), _read(path)))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise usage(f"the settings file {path} can't be read: {_why(error)}") from None
    return files


def _searched(explicit: str | None, *, local: bool, env: Mapping[str, str]) -> list[Path]:
    places = [LOCAL_FILE] if local and explicit is None else []
    return [*places, config_home(env) / "config.yaml", SYSTEM_FILE]


def settings_paths(explicit: str | None, *, local: bool, env: Mapping[str, str], search: bool = True) -> list[str]:
    """The settings files that count, whether or not they are there."""
    given = [] if explicit is None else [explicit]
    return given + ([str(path) for path in _searched(explicit, local=local, env=env)] if search else [])


def _why(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "not UTF-8 text"


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES).decode("utf-8-sig")


def read_secret(path: str) -> str:
    """The text of a secret's file; "-" is standard input."""
    if path == "-":
        if sys.stdin is None:
            raise OSError("standard input is closed")
        return sys.stdin.buffer.read(MAX_FILE_BYTES).decode()
    return _read(Path(path).expanduser())


def resolve_here(
    cls: type[S],
    flags: Mapping[str, Any],
    *,
    config: str | None,
    local: bool,
    search: bool = True,
    read_file: Callable[[str], str] = read_secret,
    env: Mapping[str, str] = os.environ,
) -> Resolved[S]:
    """The settings of a role on this machine, with every path expanded. Raises ConfigFaults, or Failure."""
    files = config_files(config, local=local, env=env, search=search)
    resolved = resolve(cls, flags=flags, env=env, files=files, read_file=read_file)
    return dataclasses.replace(resolved, settings=_expanded(resolved))


def _expanded(resolved: Resolved[S]) -> S:
    settings, changes = resolved.settings, {}
    for setting in settings_for(type(settings)):
        value = getattr(settings, setting.field, None) if setting.kind is PATH else None
        if isinstance(value, str):
            changes[setting.field] = _expand(value)
    data_home = os.environ.get("XDG_DATA_HOME", "")
    if resolved.origin.get("data-dir") == "default" and Path(data_home).is_absolute():
        changes["data_dir"] = str(Path(data_home) / "llorch")
    return dataclasses.replace(settings, **changes)


def _expand(path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise Failure(f"the home directory in {path} is not known", hint="give the whole path") from None
