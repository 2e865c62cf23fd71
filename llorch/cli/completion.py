"""`llorch completion SHELL`: the script that makes a shell complete llorch's words. `completions/` holds the same."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from llorch.cli.flags import with_flags
from llorch.cli.output import write_out

COMPLETE_VARIABLE = "_LLORCH_COMPLETE"  # how a shell asks what could come next; its script sets it


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def accept_completion() -> None:
    """Make this process able to answer a shell: typer does so itself only where it may also install completions."""
    from typer.completion import completion_init  # type: ignore[attr-defined]

    completion_init()


def completion(_: object, shell: Annotated[Shell, typer.Argument(show_default=False)]) -> None:
    """Print the completion script of a shell: `llorch completion bash > ~/.bash_completion.d/llorch`."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    write_out(get_completion_script(prog_name="llorch", complete_var=COMPLETE_VARIABLE, shell=shell.value) + "\n")


def register(app: typer.Typer) -> None:
    app.command("completion")(with_flags(lambda given: completion(None, **given), completion, ()))
