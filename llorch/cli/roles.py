"""How a role is started: flags, environment and files to settings, then the role's own main.

Owns the order: everything that is wrong is told at once and nothing is started; secrets, once read, leave the
environment. The roles themselves are imported only when one of them is to run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llorch import own_process
from llorch.cli.output import Failure, warn
from llorch.cli.sources import read_secret, resolve_here, settings_paths
from llorch.config import SETTINGS, Resolved, RoleSettings
from llorch.errors import ConfigError
from llorch.reload import Source

S = TypeVar("S", bound=RoleSettings)


def role_settings(cls: type[S], flags: Mapping[str, Any], config: str | None) -> tuple[S, Source[S]]:
    """The role's settings on this machine, and how to read them again. A role of `llorch dev` reads no file that it was
    not given: what is meant for this machine's own roles is not meant for it.
    """
    search, env = not flags.get("dev"), dict(os.environ)  # as it was before its secrets are forgotten
    piped: dict[str, str] = {}

    def read_file(path: str) -> str:
        """Standard input is there once; what it said stays."""
        if path != "-":
            return read_secret(path)
        if path not in piped:
            piped[path] = read_secret(path)
        return piped[path]

    def read() -> Resolved[S]:
        return resolve_here(cls, flags, config=config, local=True, search=search, read_file=read_file, env=env)

    resolved = read()
    own_process.close_to_others()
    own_process.forget(secret_variables())
    for warning in resolved.warnings:
        warn(warning)
    files = (*settings_paths(config, local=True, env=env, search=search), *resolved.files_read)
    paths = tuple(Path(path).expanduser().absolute() for path in files)
    return resolved.settings, Source(lambda: _again(read), paths)


def _again(read: Callable[[], Resolved[S]]) -> S:
    try:
        return read().settings
    except Failure as error:
        raise ConfigError(error.message, hint=error.hint) from None


def secret_variables() -> set[str]:
    """Every environment name that may hold a secret of any role: a machine's profile may set them all."""
    return {name for setting in SETTINGS if setting.secret for name in setting.env}
