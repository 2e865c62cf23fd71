"""`llorch version`."""

from __future__ import annotations

import platform
from typing import Annotated

import typer

from llorch import __version__
from llorch.cli.flags import with_flags
from llorch.cli.output import Format, Output


def version(
    _: object, output: Annotated[Format, typer.Option("--output", "-o", metavar="|".join(Format))] = Format.TABLE
) -> None:
    """Print the version."""
    facts = {"version": __version__, "python": platform.python_version(), "platform": platform.platform(terse=True)}
    Output(output).one(facts, name=__version__, text=lambda: f"llorch {__version__}\n")


def register(app: typer.Typer) -> None:
    app.command("version")(with_flags(lambda given: version(None, **given), version, ()))
