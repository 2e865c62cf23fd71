"""`llorch node`: the agent on a GPU machine; `llorch node ls|show|drain|...`: the nodes that a control knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from llorch.cli.connection import connected
from llorch.cli.flags import Call, client_command, flag_values, role_flags, with_flags
from llorch.cli.loading import loading
from llorch.cli.operations import Deadline, NodeId, Reason, Wait, deadline_s, operate_node
from llorch.cli.output import Column, Format, fields, hint, usage, write_err
from llorch.cli.pool_words import drain_words
from llorch.cli.roles import role_settings
from llorch.cli.units import age, size
from llorch.config import NodeSettings

app = typer.Typer(help="Run a node, or look at the nodes there are, and operate them.", rich_markup_mode=None)


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
    Column("note", lambda node: note_of(node)),
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


def note_of(node: Mapping[str, Any]) -> str | None:
    """Why it takes no tasks, if that is somebody's wish or what it did."""
    reason = quarantined_for(node)
    return f"quarantined for {reason}" if reason is not None else drain_words(node)


def _vram(node: Mapping[str, Any]) -> str:
    gpus = [gpu for gpu in node.get("gpus") or [] if isinstance(gpu, Mapping)]
    total = sum(gpu.get("vram_total_bytes") or 0 for gpu in gpus)
    return f"{size(sum(gpu.get('vram_used_bytes') or 0 for gpu in gpus))}/{size(total)}" if total else "-"


async def ls(call: Call) -> None:
    """List the nodes."""
    async with connected(call.target) as client:
        call.output.rows(await client.nodes(), NODE_COLUMNS, name=lambda node: str(node.get("node_id")))


async def show(call: Call, node_id: NodeId) -> None:
    """Show one node: its GPUs and its pools."""
    async with connected(call.target) as client:
        node = await client.node(node_id)
    if call.output.format is Format.TABLE:
        from llorch.cli.pool import POOL_COLUMNS

        facts = {name: value for name, value in node.items() if name not in ("gpus", "pools")}
        facts["draining"] = drain_words(node) or False
        call.output.one(facts, name=node_id, text=lambda: fields(facts) + "\n")
        if node.get("gpus"):
            call.output.rows(node["gpus"], GPU_COLUMNS, name=lambda gpu: str(gpu.get("uuid")))
        call.output.rows(node.get("pools") or [], POOL_COLUMNS[1:], name=lambda pool: str(pool.get("pool_id")))
    else:
        call.output.one(node, name=node_id)


async def drain(
    call: Call, node_id: NodeId, deadline: Deadline = None, reason: Reason = None, wait: Wait = True
) -> int:
    """Take no new tasks on any of its pools, and let those that run end."""
    wish = {"deadline_s": deadline_s(deadline), "reason": reason}
    return await operate_node(call, node_id, "drain", wish, wait=wait)


async def undrain(call: Call, node_id: NodeId, wait: Wait = True) -> int:
    """Take tasks again."""
    return await operate_node(call, node_id, "undrain", {}, wait=wait)


async def rm(call: Call, node_id: NodeId) -> None:
    """Forget a node that is gone. One that runs comes back by itself."""
    async with connected(call.target) as client:
        node = await client.node(node_id)  # raises NODE_NOT_FOUND: to remove what is not there is not asked for
        answer = await client.remove_node(node_id)
    if call.format_given:
        call.output.one({"node_id": node_id, **answer}, name=node_id)
    else:
        write_err(f"removed {node_id}\n")
    if node.get("online"):
        hint(f"it was online and will register again: stop `llorch node` there, or revoke what it shows ({RIGHTS})")


async def pardon(call: Call, node_id: NodeId) -> None:
    """Let a quarantined node back at once, and forget what it did."""
    async with connected(call.target) as client:
        answer = await client.pardon(node_id)
    if call.format_given:
        call.output.one(answer, name=node_id)
    else:
        was = "may come back" if answer.get("was_quarantined") else "was not quarantined"
        write_err(f"{node_id} {was}\n")


RIGHTS = "`llorch certs revoke`, `llorch token revoke`"
GPU_COLUMNS = (
    Column("gpu", lambda gpu: gpu.get("index")),
    Column("name", lambda gpu: gpu.get("name")),
    Column("vram", lambda gpu: f"{size(gpu.get('vram_used_bytes') or 0)}/{size(gpu.get('vram_total_bytes') or 0)}"),
    Column("foreign", lambda gpu: size(gpu.get("vram_foreign_bytes") or 0)),
    Column("busy", lambda gpu: "-" if gpu.get("utilization") is None else f"{gpu['utilization']:.0%}"),
    Column("temp", lambda gpu: "-" if gpu.get("temperature_c") is None else f"{gpu['temperature_c']:.0f}C"),
    Column("driver", lambda gpu: gpu.get("driver")),
)

for _command in (ls, show, drain, undrain, pardon, rm):
    app.command(_command.__name__)(client_command(_command))
