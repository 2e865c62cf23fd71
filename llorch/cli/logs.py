"""`llorch logs NODE/POOL`, which is `llorch pool logs`: what a pool's engines write, read and followed.

Owns how a line is shown: whose it is where there are several replicas. Never changes one, but for control characters on
a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from llorch.cli.connection import connected
from llorch.cli.flags import Call, client_command
from llorch.cli.operations import PoolName, pool_named
from llorch.cli.output import Format, is_terminal, usage, write_err, write_out
from llorch.client.text import one_line, plain

MOST_LINES = 2_000  # in one answer of a control
DEFAULT_LINES = 200


class Printer:
    """`raw`: as it came, also on a terminal. `as_json`: each line one object."""

    def __init__(self, write: Callable[[str], None], *, raw: bool, as_json: bool, terminal: bool) -> None:
        self._write = write
        self._strip = terminal and not raw
        self._as_json = as_json
        self._replicas: set[str] = set()

    def show(self, lines: object) -> None:
        found = [line for line in lines if isinstance(line, Mapping)] if isinstance(lines, list) else []
        self._replicas |= {str(line.get("replica")) for line in found}
        if found:
            self._write("".join(self._line(line) for line in found))

    def _line(self, line: Mapping[str, Any]) -> str:
        if self._as_json:
            from llorch.client.render import json_line

            text = json_line(line)
        else:
            whose = f"{line.get('replica')} | " if len(self._replicas) > 1 else ""
            text = f"{whose}{line.get('text', '')}\n"
        return plain(text) if self._strip else text


async def logs(
    call: Call,
    name: PoolName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", metavar="N", min=1, max=MOST_LINES, help="This many of the newest lines.")
    ] = DEFAULT_LINES,
    raw: Annotated[bool, typer.Option("--raw", help="Keep control characters on a terminal.")] = False,
) -> None:
    """Print what a pool's engines have written, and with -f what they write."""
    if call.output.format in (Format.NAME, Format.YAML):
        raise usage("an engine's log is text, or JSON lines with --json")
    node_id, pool_id = pool_named(name)
    as_json = call.output.format is not Format.TABLE
    printer = Printer(write_out, raw=raw, as_json=as_json, terminal=is_terminal(sys.stdout))
    async with connected(call.target) as client:
        if not follow:
            printer.show((await client.pool_logs(node_id, pool_id, lines=lines)).get("lines"))
            return
        tell = _Once()
        async for found in client.follow_pool_logs(node_id, pool_id, lines=lines, tell=tell):
            tell.back()
            printer.show(found.get("lines"))


class _Once:
    """Says that the log is looked for: once for each time that it is lost."""

    def __init__(self) -> None:
        self._told = False

    def __call__(self, why: str) -> None:
        if not self._told:
            self._told = True
            write_err(f"looking for the log again: {one_line(why)}\n")

    def back(self) -> None:
        self._told = False


def register(app: typer.Typer) -> None:
    app.command("logs")(client_command(logs))
