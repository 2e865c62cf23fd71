"""`llorch token new|ls|revoke|join`: who may come in.

On a control's own machine they work on its data directory, so that the first token needs none; elsewhere, or where a
URL or a context says so, they ask the control with an admin token. A token's text goes to standard output, once.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llorch.cli import contexts
from llorch.cli.connection import connected
from llorch.cli.flags import Call, client_command
from llorch.cli.output import Column, Failure, Format, hint, usage, write_err, write_out
from llorch.cli.sources import resolve_here
from llorch.cli.units import age
from llorch.config import ControlSettings
from llorch.config_kinds import BadValue, duration, show_duration

if TYPE_CHECKING:
    from llorch.control.access import Access

app = typer.Typer(help="Make, list and revoke tokens.", no_args_is_help=True, rich_markup_mode=None)

DataDir = Annotated[
    str | None,
    typer.Option(
        "--data-dir", metavar="DIR", help="Work on this data directory of a control, on its own machine.",
        show_default=False,
    ),
]  # fmt: skip
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Whose it is.", show_default=False)]

_LIFE = duration("1s", "36500d")


def local_directory(call: Call, data_dir: str | None) -> str | None:
    """The data directory to work on; None: ask the control."""
    if data_dir is not None:
        return str(Path(data_dir).expanduser())
    if call.context is not None or call.flags.get("url") is not None or os.environ.get("LLORCH_URL"):
        return None
    if contexts.load(contexts.contexts_path(os.environ)).current is not None:
        return None
    return local_settings(None, call.config).data_dir


def local_settings(data_dir: str | None, config: str | None) -> ControlSettings:
    """The control's settings on this machine."""
    flags = {} if data_dir is None else {"data_dir": data_dir}
    return resolve_here(ControlSettings, flags, config=config, local=True).settings


def _access(directory: str, config: str | None) -> Access:
    """What a control in this directory would work with. `tls` is on: its bind address is not known here."""
    from llorch.control.access import Access

    settings = local_settings(directory, config)
    return Access.open(dataclasses.replace(settings, data_dir=directory, tls="on", tls_cert=None, tls_key=None))


def _life(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return _LIFE.parse(text)
    except BadValue as bad:
        raise usage(f"--expires or --ttl: {bad.message}", bad.hint or "for example 90d") from None


async def _make(call: Call, directory: str | None, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A new token: the view of it, with its text."""
    if directory is None:
        async with connected(call.target) as client:
            return await client.new_token(wanted)
    from llorch.control.routes_trust import token_view, wish_of
    from llorch.messages import NewToken, parse

    record, text = _access(directory, call.config).new_token(wish_of(parse(NewToken, wanted)))
    return {**token_view(record, {}, time.time()), "token": text}


async def new(
    call: Call,
    scope: Annotated[
        str, typer.Option("--scope", metavar="SCOPES", help="Some of submit,read,metrics,admin.")
    ] = "submit,read",
    name: Name = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="DURATION", help="How long it lives: 90d.", show_default=False)
    ] = None,
    models: Annotated[
        str | None, typer.Option("--models", metavar="MODELS", help="Only these models: a,b.", show_default=False)
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a token for a client. Tokens with one name are one principal: that is how one is rotated."""
    wanted: dict[str, Any] = {"scopes": [word.strip() for word in scope.split(",") if word.strip()]}
    if name is not None:
        wanted["name"] = name
    if expires is not None:
        wanted["expires_s"] = _life(expires)
    if models is not None:
        wanted["models"] = [model.strip() for model in models.split(",") if model.strip()]
    directory = local_directory(call, data_dir)
    made = await _make(call, directory, wanted)
    if call.format_given and call.output.format is not Format.NAME:
        call.output.one(made, name=str(made["id"]))
    else:
        write_out(f"{made['token']}\n")
    write_err(f"{_where(call, directory)}: token {made['id']} of {made['name']}, shown this once\n")
    pin = _pin_of(directory)
    if pin is not None:
        hint(f"for a client: llorch context add NAME --url URL --token - --ca-pin {pin}")


def _pin_of(directory: str | None) -> str | None:
    """The digest of the authority here, for clients of a control that shows its certificate."""
    from llorch.control.authority import Authority

    if directory is None or not Authority.exists(directory):
        return None
    return Authority.pin_in(directory)


async def join(
    call: Call,
    ttl: Annotated[str, typer.Option("--ttl", metavar="DURATION", help="How long it can be used.")] = "1h",
    uses: Annotated[int, typer.Option("--uses", metavar="N", help="For how many machines.")] = 1,
    node: Annotated[
        str | None, typer.Option("--node", metavar="ID", help="For this node alone.", show_default=False)
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="URL", help="Where that machine reaches the control.", show_default=False),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Print the command that makes a machine a node. It holds a secret: paste it there, and nowhere else."""
    wanted: dict[str, Any] = {"join": True, "expires_s": _life(ttl), "uses": uses}
    if node is not None:
        wanted["node_id"] = node
    directory = local_directory(call, data_dir)
    url = at or (call.target.url if directory is None else _control_url(Path(directory)))
    if not url.startswith("https://"):
        raise Failure(
            f"a machine can't join at {url}", why="its token would cross the network unencrypted",
            hint="start the control with --bind 0.0.0.0:8080, or give --at https://HOST:PORT",
        )  # fmt: skip
    made = await _make(call, directory, wanted)
    command = f"LLORCH_JOIN_TOKEN={made['token']} llorch node --join {url}" + (f" --node-id {node}" if node else "")
    if call.format_given and call.output.format is not Format.NAME:
        call.output.one({**made, "command": command}, name=str(made["id"]))
    elif call.format_given:
        write_out(f"{made['token']}\n")
    else:
        write_out(f"{command}\n")
    times = "once" if uses == 1 else f"{uses} times"
    write_err(f"{_where(call, directory)}: good for {show_duration(wanted['expires_s'])}, {times}\n")
    if not node:
        hint("add --model REF, or a settings file with pools, as for any node")


def _control_url(directory: Path) -> str:
    """Where the control of this directory said that it can be reached."""
    from llorch.control.place import read_place

    url = read_place(directory)
    if url is None:
        raise Failure(
            f"where the control of {directory} listens is not known", why="it has not been started yet",
            hint="start it, or give --at https://HOST:PORT",
        )  # fmt: skip
    return url


_COLUMNS = (
    Column("id", lambda row: row.get("id")),
    Column("name", lambda row: row.get("name") if row.get("kind") == "client" else row.get("node_id") or "-"),
    Column("kind", lambda row: row.get("kind")),
    Column("fingerprint", lambda row: row.get("fingerprint")),
    Column("scopes", lambda row: row.get("scopes")),
    Column("models", lambda row: row.get("models") or "all"),
    Column("state", lambda row: row.get("state")),
    Column("age", lambda row: _age(row.get("age_s"))),
    Column("expires", lambda row: _age(row.get("expires_in_s"))),
    Column("last used", lambda row: _age(row.get("last_used_s"))),
    Column("uses left", lambda row: row.get("uses_left")),
)


def _age(seconds: object) -> str:
    return age(seconds * 1_000) if isinstance(seconds, (int, float)) else "-"


async def ls(
    call: Call,
    every: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False,
    data_dir: DataDir = None,
) -> None:
    """List the tokens that llorch made; those in a control's settings are not among them."""
    directory = local_directory(call, data_dir)
    if directory is None:
        async with connected(call.target) as client:
            found = await client.tokens()
    else:
        from llorch.control.routes_trust import token_view
        from llorch.control.token_files import TokenFiles

        files = TokenFiles(directory)
        files.load()
        files.load_use()
        found = [token_view(record, files.last_used, time.time()) for record in files.tokens.records]
    rows = [row for row in found if every or row.get("state") == "valid"]
    call.output.rows(rows, _COLUMNS, name=lambda row: str(row.get("id")))


async def revoke(
    call: Call,
    which: Annotated[str, typer.Argument(metavar="ID|NAME", show_default=False)],
    data_dir: DataDir = None,
) -> None:
    """Revoke a token, or all of one name: what they have opened ends within seconds."""
    directory = local_directory(call, data_dir)
    if directory is None:
        async with connected(call.target) as client:
            revoked = await client.revoke_token(which)
    else:
        from llorch.control.token_files import TokenFiles

        revoked = [record.id for record in TokenFiles(directory).revoke(which, time.time())]
    if call.format_given:
        call.output.one({"revoked": revoked}, name=which)
    write_err(f"{_where(call, directory)}: revoked {', '.join(revoked) or 'nothing: it was already'}\n")


def _where(call: Call, directory: str | None) -> str:
    return call.target.url if directory is None else directory


for _command in (new, ls, revoke, join):
    app.command(_command.__name__)(client_command(_command))
