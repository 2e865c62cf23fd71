"""The whole command: one command line in, an exit code out.

Owns the list of commands and the way out of them. Never prints a traceback unless --debug asks for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from llorch import __version__
from llorch.cli import (
    audit,
    bench,
    certs,
    chat,
    completion,
    config,
    context,
    control,
    dev,
    doctor,
    explain,
    logs,
    model,
    node,
    pool,
    status,
    submit,
    task,
    token,
    version,
)
from llorch.cli.completion import COMPLETE_VARIABLE, accept_completion
from llorch.cli.endings import PROGRAM, explain_error
from llorch.cli.exits import Exit
from llorch.cli.output import abandon_output, write_out

app = typer.Typer(
    name=PROGRAM,
    add_completion=False,  # `llorch completion` prints the script; nothing writes to a shell's start-up files
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        write_out(f"{PROGRAM} {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """One command that turns machines with GPUs into one place to send prompts to."""


dev.register(app)
control.register(app)
app.add_typer(node.app, name="node")
submit.register(app)
chat.register(app)
status.register(app)
app.add_typer(pool.app, name="pool")
app.add_typer(model.app, name="model")
app.add_typer(task.app, name="task")
logs.register(app)
explain.register(app)
app.add_typer(doctor.app, name="doctor")
app.add_typer(token.app, name="token")
app.add_typer(certs.app, name="certs")
app.add_typer(config.app, name="config")
app.add_typer(context.app, name="context")
app.add_typer(audit.app, name="audit")
app.add_typer(bench.app, name="bench")
completion.register(app)
version.register(app)


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line; its exit code. Everything that a person must know has been printed by then."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(ValueError, OSError):
                stream.reconfigure(errors="replace")  # a locale that lacks a character must not end an answer
    if COMPLETE_VARIABLE in os.environ:
        accept_completion()
    try:
        outcome = typer.main.get_command(app).main(args=words, prog_name=PROGRAM, standalone_mode=False)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # in the help text
            abandon_output()
            return Exit.BROKEN_PIPE
        return leaving.code if isinstance(leaving.code, int) else Exit.OK if leaving.code is None else Exit.FAILED
    except Exception as error:
        return explain_error(error, debug="--debug" in words)
    return outcome if isinstance(outcome, int) else Exit.OK
