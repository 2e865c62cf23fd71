"""The whole command, and the one place where an exception becomes an exit code and lines on standard error.

Owns the list of commands and the last word on errors. Never prints a traceback unless --debug asks for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from llorch import __version__
from llorch.cli import completion, config, context, control, dev, explain, node, pool, status, submit, task, version
from llorch.cli.completion import COMPLETE_VARIABLE, accept_completion
from llorch.cli.exits import Exit, of_code
from llorch.cli.output import Failure, OutputClosed, OutputFailed, abandon_output, report, write_err, write_out
from llorch.errors import ConfigError, LlorchError

PROGRAM = "llorch"

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
status.register(app)
app.add_typer(pool.app, name="pool")
app.add_typer(task.app, name="task")
explain.register(app)
app.add_typer(config.app, name="config")
app.add_typer(context.app, name="context")
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
        if "--debug" in words:
            traceback.print_exc()
        return explain_error(error)
    return outcome if isinstance(outcome, int) else Exit.OK


def explain_error(error: Exception) -> int:
    """Print what went wrong; the exit code that stands for it."""
    match error:
        case OutputClosed():
            return Exit.BROKEN_PIPE
        case OutputFailed():
            report(f"standard output can't be written: {error}")
            return Exit.FAILED
        case Failure():
            report(error.message, why=error.why, hint=error.hint)
            return error.code
        case typer.TyperException() if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            write_err(f"{error.format_message()}\n")
            return Exit.USAGE
        case typer.TyperException():
            report(error.format_message(), hint=_usage_hint(error))
            return error.exit_code
        case typer.Abort():
            return Exit.INTERRUPTED
        case ConfigError():
            report(error.message, hint=error.hint)
            return Exit.USAGE
        case LlorchError():
            request_id = getattr(error, "request_id", None)
            report(error.message, why=error.code.value, hint=error.hint, request_id=request_id)
            return of_code(error.code.value)
        case _:
            return _explain_other(error)


def _usage_hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context is not None else PROGRAM} --help"


def _explain_other(error: Exception) -> int:
    if "llorch.client.faults" in sys.modules:  # without it, the fault can't be one of its kinds
        from llorch.client.faults import ClientFault, StreamBroken, TimedOut

        if isinstance(error, ClientFault):
            report(error.message, why=error.why, hint=error.hint)
            if isinstance(error, StreamBroken):
                return Exit.BROKE_OFF
            return Exit.TIMEOUT if isinstance(error, TimedOut) else Exit.UNREACHABLE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        report(f"{where}{error.strerror or type(error).__name__}")
        return Exit.FAILED
    report(f"an unexpected fault: {type(error).__name__}", hint="--debug shows where; please report it")
    return Exit.FAILED
