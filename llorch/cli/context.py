"""`llorch context ls|use|add|rm|show`: names for controls."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llorch.auth import fingerprint
from llorch.cli import contexts
from llorch.cli.flags import flag_values, local_command, role_flags, with_flags
from llorch.cli.output import Column, Failure, Output, usage, warn, write_err, write_out
from llorch.cli.sources import read_secret
from llorch.config import ClientSettings, resolve

app = typer.Typer(help="Names for controls, with their tokens.", no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]

_COLUMNS = (
    Column("current", lambda row: "*" if row["current"] else ""),
    Column("name", lambda row: row["name"]),
    Column("url", lambda row: row["url"]),
    Column("token", lambda row: row["token"]),
)


def _path() -> Path:
    return contexts.contexts_path(os.environ)


def _row(name: str, context: contexts.Context, current: str | None) -> dict[str, Any]:
    token = f"sha256:{fingerprint(context.token)}" if context.token else context.token_file
    return {
        "name": name, "current": name == current, "url": context.url, "token": token, "tls_ca": context.tls_ca,
    }  # fmt: skip


def ls(output: Output) -> None:
    """List the contexts; * is the one in use."""
    known = contexts.load(_path())
    rows = [_row(name, context, known.current) for name, context in sorted(known.named.items())]
    output.rows(rows, _COLUMNS, name=lambda row: str(row["name"]))


def use(_: object, name: Name) -> None:
    """Make a context the one in use."""
    with contexts.changing(_path()) as known:
        known.get(name)
        known.current = name
    write_err(f"now in context {name}\n")


def rm(_: object, name: Name) -> None:
    """Forget a context and its token."""
    contexts.load(_path()).get(name)
    contexts.remove(_path(), name)
    write_err(f"forgot context {name}\n")


def show(
    output: Output,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False)] = None,
    token: Annotated[bool, typer.Option("--token", help="Print the token alone, for $(...).")] = False,
) -> None:
    """Show a context, the one in use if none is named."""
    known = contexts.load(_path())
    name = name or known.current
    if name is None:
        raise usage("no context is in use", "`llorch context use NAME`, or name one here")
    context = known.get(name)
    if not token:
        output.one(_row(name, context, known.current), name=name)
    elif context.token is not None:
        write_out(f"{context.token}\n")
    elif context.token_file is not None:
        write_out(f"{read_secret(context.token_file).strip()}\n")
    else:
        raise usage(f"context {name} has no token")


def add(
    _: object,
    name: Name,
    use_it: Annotated[bool, typer.Option("--use", help="Make it the one in use.")] = False,
    ca_pin: Annotated[
        str | None,
        typer.Option(
            "--ca-pin", metavar="SHA256", show_default=False,
            help="Trust the cluster's authority with this digest, and no other: `llorch certs status` shows it.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Name a control: its --url, and its --token-file or --token (- reads it from standard input)."""


def _add(given: dict[str, Any]) -> None:
    name, use_it = given["name"], given["use_it"]
    if not contexts.NAME.fullmatch(name):
        raise usage(f"{name!r} is no name for a context", "letters, digits, . _ -, at most 64")
    if given.get("url") is None:
        raise usage("a context needs a URL", "--url https://control.example:8080")
    flags = flag_values(ClientSettings, given)
    # Only what is written here: nothing of the environment or of a file may end up under this name.
    resolved = resolve(ClientSettings, flags=flags, env={}, files=[], read_file=read_secret)
    for warning in resolved.warnings:
        warn(warning)
    settings = resolved.settings
    by_file = flags.get("token_file") if flags.get("token_file") != "-" else None  # what was piped in is gone
    pin, tls_ca = given.get("ca_pin"), settings.tls_ca
    if pin is not None:
        if tls_ca is not None:
            raise usage("--ca-pin and --tls-ca say different things", "give one of them")
        tls_ca = str(_pinned(settings.url, pin, name))
    context = contexts.Context(
        url=settings.url,
        token=None if by_file else settings.token,
        token_file=str(Path(by_file).expanduser().absolute()) if by_file else None,
        tls_ca=str(Path(tls_ca).expanduser().absolute()) if tls_ca else None,
        ca_pin=pin,
    )
    with contexts.changing(_path()) as known:
        known.named[name] = context
        if use_it or known.current is None:
            known.current = name
    write_err(f"context {name} is {context.url}\n")


def _pinned(url: str, pin: str, name: str) -> Path:
    """The file with the authority of this digest, as the control at `url` has it. Nothing else is believed of it."""
    from llorch import private
    from llorch.client.authorities import fetch_authority

    pem = asyncio.run(fetch_authority(url, pin))
    path = contexts.authority_path(_path(), name)
    private.make_directory(path.parent)
    try:
        private.write(path, pem)
    except OSError as error:
        raise Failure(f"{path} can't be written: {error.strerror}") from None
    return path


def _command(own: Callable[..., None]) -> Callable[..., None]:
    return with_flags(lambda given: own(None, **given), own, ())


app.command("ls")(local_command(ls))
app.command("use")(_command(use))
app.command("rm")(_command(rm))
app.command("show")(local_command(show))
_KEPT = ("url", "token", "token_file", "tls_ca")  # of a client's settings
app.command("add")(with_flags(_add, add, [flag for flag in role_flags(ClientSettings) if flag.name in _KEPT]))
