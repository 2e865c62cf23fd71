"""`llorch config check|show|init|schema|firewall`: settings, without starting anything."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from llorch.cli import firewall
from llorch.cli.flags import local_command, with_flags
from llorch.cli.output import Column, Failure, Output, usage, warn, write_err, write_out
from llorch.cli.sources import config_files, resolve_here
from llorch.config import (
    ClientSettings,
    ConfigFaults,
    ControlSettings,
    NodeSettings,
    Resolved,
    RoleSettings,
    example_yaml,
    json_schema,
    show,
)
from llorch.config_faults import MISSING

app = typer.Typer(help="Check and show settings.", no_args_is_help=True, rich_markup_mode=None)

ROLES: dict[str, type[RoleSettings]] = {cls.role: cls for cls in (ControlSettings, NodeSettings, ClientSettings)}

Config = Annotated[str | None, typer.Option("--config", metavar="FILE", help="A settings file (YAML).")]
Role = Annotated[str | None, typer.Argument(metavar="[control|node|client]", show_default=False)]


def _role(name: str) -> type[RoleSettings]:
    if name not in ROLES:
        raise usage(f"{name!r} is no role", f"one of {', '.join(ROLES)}")
    return ROLES[name]


def _resolve(cls: type[RoleSettings], config: str | None) -> Resolved[RoleSettings]:
    return resolve_here(cls, {}, config=config, local=cls is not ClientSettings)


def check(_: object, role: Role = None, config: Config = None) -> None:
    """Check the settings of a role; without one, what the files and the environment say, whoever reads them."""
    if role is not None:
        resolved = _resolve(_role(role), config)
        for warning in resolved.warnings:
            warn(warning)
    else:
        _check_values(config)
    read = [file.path for file in config_files(config, local=role != "client", env=os.environ)]
    write_err(f"ok: {', '.join(read) or 'no settings file; environment and defaults'}\n")
    if role is None:
        write_err("hint: `llorch config check control` (or node, client) also says whether it could start\n")


def _check_values(config: str | None) -> None:
    """Every fault that some source has; that something is missing can be said only of a role."""
    faults = []
    for cls in ROLES.values():
        try:
            _resolve(cls, config)
        except ConfigFaults as error:
            faults += [fault for fault in error.faults if fault.where != MISSING and fault not in faults]
    if faults:
        raise ConfigFaults(tuple(faults))


_COLUMNS = (
    Column("setting", lambda row: row["name"]),
    Column("value", lambda row: row["value"]),
    Column("from", lambda row: row["origin"]),
)


def show_settings(output: Output, role: Role = "client", config: Config = None) -> None:
    """Show the settings in force and where each comes from. Secrets are shown as fingerprints."""
    resolved = _resolve(_role(role or "client"), config)
    rows = [{"name": name, "value": value, "origin": origin} for name, value, origin in show(resolved)]
    output.rows(rows, _COLUMNS, name=lambda row: str(row["name"]))


def init(
    _: object,
    role: Annotated[str, typer.Argument(metavar="[control|node|client]", show_default=False)] = "control",
    file: Annotated[
        str | None, typer.Option("--file", "-f", metavar="FILE", help="Write it there; never over another.")
    ] = None,
) -> None:
    """Print a settings file with every setting of a role, commented out."""
    text = example_yaml(_role(role))
    if file is None:
        write_out(text)
        return
    path = Path(file).expanduser()
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise Failure(f"{file} is there already", hint="give another name, or move it away") from None
    except OSError as error:
        raise Failure(f"{file} can't be written: {error.strerror}") from None
    write_err(f"wrote {file}\n")


def schema(_: object) -> None:
    """Print the JSON Schema of a settings file, for editors."""
    write_out(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n")


def _command(own: Callable[..., None]) -> Callable[..., None]:
    return with_flags(lambda given: own(None, **given), own, ())


app.command("check")(_command(check))
app.command("show")(local_command(show_settings))
app.command("init")(_command(init))
app.command("schema")(_command(schema))
app.add_typer(firewall.app, name="firewall")
