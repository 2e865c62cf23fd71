"""How a role is started: flags, environment and files to settings, then the role's own main.

Owns the order: everything that is wrong is told at once and nothing is started. The roles themselves are imported only
when one of them is to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from llorch.cli.output import warn
from llorch.cli.sources import resolve_here
from llorch.config import RoleSettings

S = TypeVar("S", bound=RoleSettings)


def role_settings(cls: type[S], flags: Mapping[str, Any], config: str | None) -> S:
    """The role's settings on this machine. A role of `llorch dev` reads no file that it was not given: what is meant
    for this machine's own roles is not meant for it.
    """
    resolved = resolve_here(cls, flags, config=config, local=True, search=not flags.get("dev"))
    for warning in resolved.warnings:
        warn(warning)
    return resolved.settings
