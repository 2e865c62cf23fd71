"""`llorch node`: the agent on a GPU machine; `llorch node ls|show|pardon`: the nodes that a control knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from llorch.cli.connection import connected
from llorch.cli.flags import Call, client_command, flag_values, role_flags, with_flags
from llorch.cli.loading import loading
from llorch.cli.output import Column, Format, fields, usage, write_err
from llorch.cli.roles import role_settings
from llorch.cli.units import age, size
from llorch.config import NodeSettings

app = typer.Typer(help="Run a node, or look at the nodes there are.", rich_markup_mode=None)


def node(_: object, context: typer.Context) -> None:
    """Run a node (`llorch node --join URL`), or look at the nodes that a control knows."""


def _run(given: dict[str, Any]) -> int | None:
    context: typer.Context = given.pop("context")
    config = given.pop("config")
    flags = flag_values(NodeSettings, given)
    if context.invoked_subcommand is not None:
        if config is not None or any(value not in (None, []) for value in flags.values()):
            raise usage(f"flags of a node mean nothing before {context.invoked_subcommand}", "put them after it")
        return None
    settings, source = role_settings(NodeSettings, flags, config)
    with loading():
        from llorch.node.app import main
    return main(settings, source)


app.callback(invoke_without_command=True)(with_flags(_run, node, role_flags(NodeSettings), group=True))

NODE_COLUMNS = (
    Column("node", lambda node: node.get("node_id")),
    Column("state", lambda node: state_of(node)),
    Column("beat", lambda node: age(node.get("heartbeat_age_ms"))),
    Column("gpus", lambda node: len(node.get("gpus") or [])),
    Column("vram", lambda node: _vram(node)),
    Column("slots free", lambda node: f"{node.get('slots_free', 0)}/{node.get('slots_total', 0)}"),
    Column("models", lambda node: node.get("models")),
    Column("quarantined for", lambda node: quarantined_for(node)),
)


def state_of(node: Mapping[str, Any]) -> str:
    """One word, and the other facts where they matter too."""
    words = [str(node.get("state") or "unknown")]
    if node.get("suspect") and node.get("online"):
        words.append("suspect")
    return ",".join(words)


def quarantined_for(node: Mapping[str, Any]) -> str | None:
    """What a node did for which it is shut out; None for one that is not."""
    quarantine = node.get("quarantine")
    return str(quarantine.get("reason")) if isinstance(quarantine, Mapping) else None


def _vram(node: Mapping[str, Any]) -> str:
    gpus = [gpu for gpu in node.get("gpus") or [] if isinstance(gpu, Mapping)]
    total = sum(gpu.get("vram_total_bytes") or 0 for gpu in gpus)
    return f"{size(sum(gpu.get('vram_used_bytes') or 0 for gpu in gpus))}/{size(total)}" if total else "-"


async def ls(call: Call) -> None:
    """List the nodes."""
    async with connected(call.target) as client:
        call.output.rows(await client.nodes(), NODE_COLUMNS, name=lambda node: str(node.get("node_id")))


async def show(call: Call, node_id: Annotated[str, typer.Argument(metavar="NODE", show_default=False)]) -> None:
    """Show one node: its GPUs and its pools."""
    async with connected(call.target) as client:
        node = await client.node(node_id)
    if call.output.format is Format.TABLE:
        from llorch.cli.pool import POOL_COLUMNS

        facts = {name: value for name, value in node.items() if name not in ("gpus", "pools")}
        call.output.one(facts, name=node_id, text=lambda: fields(facts) + "\n")
        if node.get("gpus"):
            call.output.rows(node["gpus"], GPU_COLUMNS, name=lambda gpu: str(gpu.get("uuid")))
        call.output.rows(node.get("pools") or [], POOL_COLUMNS[1:], name=lambda pool: str(pool.get("pool_id")))
    else:
        call.output.one(node, name=node_id)


async def pardon(call: Call, node_id: Annotated[str, typer.Argument(metavar="NODE", show_default=False)]) -> None:
    """Let a quarantined node back at once, and forget what it did."""
    async with connected(call.target) as client:
        answer = await client.pardon(node_id)
    if call.format_given:
        call.output.one(answer, name=node_id)
    else:
        was = "may come back" if answer.get("was_quarantined") else "was not quarantined"
        write_err(f"{node_id} {was}\n")


GPU_COLUMNS = (
    Column("gpu", lambda gpu: gpu.get("index")),
    Column("name", lambda gpu: gpu.get("name")),
    Column("vram", lambda gpu: f"{size(gpu.get('vram_used_bytes') or 0)}/{size(gpu.get('vram_total_bytes') or 0)}"),
    Column("foreign", lambda gpu: size(gpu.get("vram_foreign_bytes") or 0)),
    Column("busy", lambda gpu: "-" if gpu.get("utilization") is None else f"{gpu['utilization']:.0%}"),
    Column("temp", lambda gpu: "-" if gpu.get("temperature_c") is None else f"{gpu['temperature_c']:.0f}C"),
    Column("driver", lambda gpu: gpu.get("driver")),
)

app.command("ls")(client_command(ls))
app.command("show")(client_command(show))
app.command("pardon")(client_command(pardon))
