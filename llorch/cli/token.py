"""`llorch token new|ls|revoke|join`: who may come in.

On a control's own machine they work on its data directory, so that the first token needs none; elsewhere, or where a
URL or a context says so, they ask the control with an admin token. A token's text goes to standard output, once.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llorch.cli import contexts
from llorch.cli.connection import connected
from llorch.cli.control_here import DataDir, has_been, local_settings, need_a_control
from llorch.cli.flags import Call, client_command
from llorch.cli.output import Column, Failure, Format, hint, usage, write_err, write_out
from llorch.cli.units import age
from llorch.config_kinds import NODE_ID_PATTERN, URL, BadValue, duration, show_duration
from llorch.errors import Code, ConfigError, LlorchError
from llorch.tokens import Kind, Wish, is_whole, parse_scopes

if TYPE_CHECKING:
    from llorch.client.api import LlorchClient

app = typer.Typer(help="Make, list and revoke tokens.", no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Whose it is.", show_default=False)]

_LIFE = duration("1s", "36500d")
_OURS = re.compile(r"ll[tj]1_[A-Za-z0-9_.-]*")


def local_directory(call: Call, data_dir: str | None) -> str | None:
    """The data directory to work on; None: ask the control. Raises Failure for one that is no control's."""
    directory = _directory(call, data_dir)
    if directory is not None:
        need_a_control(directory)
    return directory


def _directory(call: Call, data_dir: str | None) -> str | None:
    if data_dir is not None:
        return str(Path(data_dir).expanduser())
    if call.context is not None or call.flags.get("url") is not None or os.environ.get("LLORCH_URL"):
        return None
    if contexts.load(contexts.contexts_path(os.environ)).current is not None:
        return None
    return local_settings(None, call.config).data_dir


@contextlib.asynccontextmanager
async def _asking(call: Call) -> AsyncIterator[LlorchClient]:
    """A client for the control. One that refuses may be this machine's own, where no token is needed."""
    try:
        async with connected(call.target) as client:
            yield client
    except LlorchError as error:
        if error.code in (Code.UNAUTHENTICATED, Code.FORBIDDEN):
            where = _directory_here(call.config) or "DIR"
            error.hint = f"an admin's token does it; on the control's own machine none is needed: --data-dir {where}"
        raise


def _directory_here(config: str | None) -> str | None:
    """The data directory that a control here would have, if one has been there."""
    try:
        here = local_settings(None, config).data_dir
    except (ConfigError, Failure):  # they are no matter of who asks a control elsewhere
        return None
    return here if has_been(here) else None


def _life(text: str, flag: str) -> float:
    try:
        return _LIFE.parse(text)
    except BadValue as bad:
        raise usage(f"{flag}: {bad.message}", bad.hint or "for example 90d") from None


def _checked(wish: Wish) -> Wish:
    """Raises Failure that names the flag."""
    try:
        wish.check()
    except LlorchError as error:
        raise usage(error.message.replace(f"`{error.param}`", f"--{error.param}")) from None
    return wish


async def _make(call: Call, directory: str | None, wish: Wish) -> dict[str, Any]:
    """A new token: the view of it, with its text."""
    if directory is None:
        async with _asking(call) as client:
            return await client.new_token(_wire(wish))
    from llorch.control.routes_trust import token_view, wish_of
    from llorch.control.token_files import TokenFiles
    from llorch.messages import NewToken, parse

    digest = _authority_digest(directory) if wish.kind is Kind.JOIN else None
    record, text = TokenFiles(directory).new(wish_of(parse(NewToken, _wire(wish))), time.time(), digest)
    return {**token_view(record, {}, time.time()), "token": text}


def _wire(wish: Wish) -> dict[str, Any]:
    """What the control is asked for. No `name` and no `models`: whoever and all."""
    wanted: dict[str, Any]
    if wish.kind is Kind.JOIN:
        wanted = {"join": True, "expires_s": wish.life_s, "uses": wish.uses, "node_id": wish.node_id}
    else:
        name = wish.name or None
        models = None if wish.models is None else sorted(wish.models)
        scopes = sorted(scope.value for scope in wish.scopes)
        wanted = {"scopes": scopes, "name": name, "expires_s": wish.life_s, "models": models}
    return {name: value for name, value in wanted.items() if value is not None}


def _authority_digest(directory: str) -> bytes:
    """Of the authority that a machine joins. Its key stays shut, so no passphrase is asked for."""
    from llorch.client.authorities import read_pin

    pin = _pin_of(directory)
    if pin is None:
        raise Failure(
            f"the control of {directory} has no authority, so no other machine can join it",
            why="it serves without TLS", hint="start it with --bind 0.0.0.0:8080",
        )  # fmt: skip
    return read_pin(pin)


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
    try:
        scopes = parse_scopes(scope.split(","))
    except LlorchError as error:
        raise usage(error.message.replace("`scopes`", "--scope")) from None
    some = None if models is None else frozenset(model.strip() for model in models.split(",") if model.strip())
    life_s = None if expires is None else _life(expires, "--expires")
    if name == "":
        raise usage("--name is 1 to 64 of letters, digits, . _ -", "without it, the token's id is its name")
    wish = _checked(Wish(name=name or "", scopes=scopes, life_s=life_s, models=some))
    directory = local_directory(call, data_dir)
    made = await _make(call, directory, wish)
    if call.format_given and call.output.format is not Format.NAME:
        call.output.one(made, name=str(made["id"]))
    else:
        write_out(f"{made['token']}\n")
    write_err(f"{_where(call, directory)}: token {made['id']} of {made['name']}, shown this once\n")
    write_err(
        f"it expires in {show_duration(life_s)}\n"
        if life_s is not None
        else "it does not expire; with --expires 90d it would\n"
    )
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
    uses: Annotated[int, typer.Option("--uses", metavar="N", min=1, max=10_000, help="For how many machines.")] = 1,
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
    if node is not None and not re.fullmatch(NODE_ID_PATTERN, node):
        raise usage(f"--node: {node!r} is no id for a node", "letters, digits, . _ -, at most 63")
    if at is not None:
        at = _url_to_join(at)
    life_s = _life(ttl, "--ttl")
    wish = _checked(Wish(kind=Kind.JOIN, life_s=life_s, uses=uses, node_id=node))
    directory = local_directory(call, data_dir)
    url = at or (call.target.url if directory is None else _control_url(Path(directory)))
    if not url.startswith("https://"):
        raise Failure(f"a machine can't join at {url}", why=_UNENCRYPTED, hint=_ENCRYPT)
    made = await _make(call, directory, wish)
    command = f"LLORCH_JOIN_TOKEN={made['token']} llorch node --join {url}" + (f" --node-id {node}" if node else "")
    if call.format_given and call.output.format is not Format.NAME:
        call.output.one({**made, "command": command}, name=str(made["id"]))
    elif call.format_given:
        write_out(f"{made['token']}\n")
    else:
        write_out(f"{command}\n")
    times = "once" if uses == 1 else f"{uses} times"
    write_err(f"{_where(call, directory)}: good {times}; it expires in {show_duration(life_s)}\n")
    if not node:
        hint("add --model REF, or a settings file with pools, as for any node")


_UNENCRYPTED = "its token would cross the network unencrypted"
_ENCRYPT = "start the control with --bind 0.0.0.0:8080, or give --at https://HOST:PORT"


def _url_to_join(text: str) -> str:
    """Raises Failure (usage) for what no machine can join at."""
    try:
        url = URL.parse(text)
    except BadValue as bad:
        raise usage(f"--at: {bad.message}", bad.hint) from None
    if not url.startswith("https://"):
        raise usage(f"--at: a machine can't join at {url}: {_UNENCRYPTED}", "--at https://HOST:PORT")
    return url


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
        async with _asking(call) as client:
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
    which = _id_of(which)
    directory = local_directory(call, data_dir)
    if directory is None:
        async with _asking(call) as client:
            revoked = await client.revoke_token(which)
    else:
        from llorch.control.token_files import TokenFiles

        revoked = [record.id for record in TokenFiles(directory).revoke(which, time.time())]
    if call.format_given:
        call.output.one({"revoked": revoked}, name=which)
    write_err(f"{_where(call, directory)}: revoked {', '.join(revoked) or 'nothing: it was already'}\n")


def _id_of(which: str) -> str:
    """The id, where a token was pasted: the text is neither sent nor shown. Raises Failure for a part of one."""
    pasted = _OURS.search(which)
    if pasted is None:
        return which
    text = pasted[0]
    if not is_whole(text):
        raise usage("this token is cut off or mistyped", "`llorch token ls` lists the ids; or paste all of it")
    return text.split(".")[-2][-8:]  # the id stands before the secret


def _where(call: Call, directory: str | None) -> str:
    return call.target.url if directory is None else directory


for _command in (new, ls, revoke, join):
    app.command(_command.__name__)(client_command(_command))
