"""`llorch version`."""

from __future__ import annotations

import platform

import typer

from llorch import __version__
from llorch.cli.flags import local_command
from llorch.cli.output import Output


def version(output: Output) -> None:
    """Print the version."""
    facts = {"version": __version__, "python": platform.python_version(), "platform": platform.platform(terse=True)}
    output.one(facts, name=__version__, text=lambda: f"llorch {__version__}\n")


def register(app: typer.Typer) -> None:
    app.command("version")(local_command(version))
