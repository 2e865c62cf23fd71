"""What an exception means to a person and to a script: the one place where one becomes lines on standard error and an
exit code.
"""

from __future__ import annotations

import sys
import traceback

import typer

from llorch.cli.exits import Exit, of_code
from llorch.cli.output import Failure, OutputClosed, OutputFailed, report, report_of_peer, write_err
from llorch.client.text import plain
from llorch.errors import ConfigError, LlorchError

PROGRAM = "llorch"


def explain_error(error: Exception, *, debug: bool = False) -> int:
    """Print what went wrong, with `debug` where as well; the exit code that stands for it."""
    if debug:
        write_err(plain("".join(traceback.format_exception(error))))
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
            report_of_peer(error.message, why=error.code.value, hint=error.hint, request_id=request_id)
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
            report_of_peer(error.message, why=error.why, hint=error.hint)
            if isinstance(error, StreamBroken):
                return Exit.AUTH if error.revoked else Exit.BROKE_OFF
            return Exit.TIMEOUT if isinstance(error, TimedOut) else Exit.UNREACHABLE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        report(f"{where}{error.strerror or type(error).__name__}")
        return Exit.FAILED
    report(f"an unexpected fault: {type(error).__name__}", hint="--debug shows where; please report it")
    return Exit.FAILED
