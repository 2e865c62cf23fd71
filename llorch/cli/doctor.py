"""`llorch doctor [client|control|node]`: what is wrong here, and what mends each of it.

Takes the flags that the role is started with. Changes nothing and prints no secret; exit 1 if anything has failed, 2 if
the settings can't be used at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from llorch.cli.exits import Exit
from llorch.cli.flags import Call, client_body, client_command, client_flags, role_report, with_flags
from llorch.cli.output import Column, Format, Output, usage, write_out
from llorch.cli.sources import config_files, resolve_here
from llorch.cli.target import find_target
from llorch.client.text import one_line
from llorch.config import ControlSettings, NodeSettings, Resolved, RoleSettings

if TYPE_CHECKING:
    from llorch.cli.doctor_findings import Finding

S = TypeVar("S", bound=RoleSettings)

app = typer.Typer(help="Say what is wrong here, and what mends it.", rich_markup_mode=None)

_COLUMNS = tuple(Column(name, lambda row, name=name: row[name]) for name in ("check", "state", "found", "mend"))  # type: ignore[misc]


def report(output: Output, findings: Sequence[Finding]) -> int:
    """Print them; the exit code. -q names the checks that are not well."""
    rows = [{"check": one.check, "state": one.state.value, "found": one.found, "mend": one.mend} for one in findings]
    if output.format is Format.TABLE:
        write_out(as_text(rows))
    else:
        shown = rows if output.format is not Format.NAME else [row for row in rows if row["state"] != "ok"]
        output.rows(shown, _COLUMNS, name=lambda row: str(row["check"]))
    return Exit.FAILED if any(row["state"] == "fail" for row in rows) else Exit.OK


def as_text(rows: Sequence[Mapping[str, str]]) -> str:
    """A line for what was found, and one below it for what mends it: together they would pass any terminal's width."""
    width = max([len("CHECK"), *(len(row["check"]) for row in rows)])
    lines = [f"{'CHECK':<{width}}  STATE  FOUND"]
    for row in rows:
        lines.append(f"{row['check']:<{width}}  {row['state']:<5}  {one_line(row['found'])}")
        if row["mend"]:
            lines.append(f"{'':<{width}}         mend: {one_line(row['mend'])}")
    return "".join(f"{line}\n" for line in lines)


async def client(call: Call) -> int:
    """From a client: can the control be reached and believed, and what may the token do?"""
    target = find_target(call.flags, config=call.config, context=call.context)
    from llorch.cli import doctor_client

    return report(call.output, await doctor_client.look(target))


def _resolved(cls: type[S], flags: Mapping[str, Any], config: str | None) -> tuple[Resolved[S], tuple[str, ...]]:
    """The settings, and the files that they come from. Raises ConfigFaults."""
    files = tuple(file.path for file in config_files(config, local=True, env=os.environ))
    return resolve_here(cls, flags, config=config, local=True), files


async def control(output: Output, flags: Mapping[str, Any], config: str | None) -> int:
    """On a control's own machine: disk, secrets, authority, tokens, certificate, port, address."""
    resolved, files = _resolved(ControlSettings, flags, config)
    from llorch.cli import doctor_control

    return report(output, await doctor_control.look(resolved, files))


async def node(output: Output, flags: Mapping[str, Any], config: str | None) -> int:
    """On a GPU machine: certificate, each control as the node meets it, port, driver, engines, inotify."""
    resolved, files = _resolved(NodeSettings, flags, config)
    from llorch.cli import doctor_node

    return report(output, await doctor_node.look(resolved, files))


def doctor(_: object, typer_context: typer.Context) -> None:
    """Say what is wrong between here and the control, and what mends it; or on a control's or node's own machine."""


_as_client = client_body(client)


def _run(given: dict[str, Any]) -> Any:
    context: typer.Context = given.pop("typer_context")
    if context.invoked_subcommand is None:
        return _as_client(given)
    if any(value not in (None, []) for value in given.values()):
        raise usage(f"flags mean nothing before {context.invoked_subcommand}", "put them after it")
    return None


app.callback(invoke_without_command=True)(with_flags(_run, doctor, client_flags(), group=True))
app.command("client")(client_command(client))
app.command("control")(role_report(ControlSettings, control))
app.command("node")(role_report(NodeSettings, node))
