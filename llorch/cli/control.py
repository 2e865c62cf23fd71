"""`llorch control`: the control plane, in the foreground."""

from __future__ import annotations

from typing import Any

import typer

from llorch.cli.flags import flag_values, role_flags, with_flags
from llorch.cli.loading import loading
from llorch.cli.roles import role_settings
from llorch.config import ControlSettings


def control(_: object) -> None:
    """Run a control plane: accepts clients, places tasks, relays streams."""


def _run(given: dict[str, Any]) -> int:
    settings, source = role_settings(ControlSettings, flag_values(ControlSettings, given), given["config"])
    with loading():
        from llorch.control.app import main
    return main(settings, source)


def register(app: typer.Typer) -> None:
    app.command("control")(with_flags(_run, control, role_flags(ControlSettings)))
