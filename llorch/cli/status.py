"""`llorch status`: is the cluster fit to take tasks? Exit 1 if something that should serve does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from llorch.cli.connection import connected
from llorch.cli.exits import Exit
from llorch.cli.flags import Call, client_command
from llorch.cli.model import conflict_notes
from llorch.cli.node import NODE_COLUMNS, quarantined_for
from llorch.cli.output import Format, write_out
from llorch.cli.pool_words import drain_words, name_of, note_of


def problems(nodes: Sequence[Mapping[str, Any]], pools: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong, one line each. Draining is a wish of somebody's, and nothing wrong."""
    found = []
    for node in nodes:
        if (reason := quarantined_for(node)) is not None:
            found.append(f"node {node.get('node_id')} is quarantined for {reason}")
        elif node.get("state") not in ("online", "draining"):
            found.append(f"node {node.get('node_id')} is {node.get('state')}")
        elif node.get("suspect"):
            found.append(f"node {node.get('node_id')} is suspect: it has missed heartbeats")
    for pool in pools:
        name = f"pool {pool.get('node_id')}/{pool.get('pool_id')}"
        if pool.get("state") == "failed":
            error = pool.get("last_error")
            found.append(f"{name} has failed" + (f": {error}" if error else ""))
        breaker = pool.get("breaker") or {}
        if breaker.get("state") == "ejected":
            left_s = round((breaker.get("ejected_ms") or 0) / 1_000)
            found.append(f"{name} is ejected for {left_s} s more: {breaker.get('reason')}")
    if not any(pool.get("bound") for pool in pools):
        found.append("no pool takes tasks" if pools else "there is no pool" if nodes else "no node has joined")
    return found


def notes(nodes: Sequence[Mapping[str, Any]], pools: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is nobody's fault and still keeps tasks away: wishes, loads, operations. One line each."""
    words = [(f"node {node.get('node_id')}", drain_words(node)) for node in nodes]
    drained = {node.get("node_id") for node in nodes if node.get("draining")}
    others = [pool for pool in pools if pool.get("node_id") not in drained and pool.get("state") != "failed"]
    words += [(f"pool {name_of(pool)}", note_of(pool)) for pool in others]  # one that has failed is a problem
    return [f"{name}: {note}" for name, note in words if note is not None]


async def status(call: Call) -> int:
    """Show the control, its nodes and their slots; exit 1 if anything is wrong."""
    async with connected(call.target) as client:
        control, nodes, pools = await client.ready(), await client.nodes(), await client.pools()
        conflicts = conflict_notes(await client.call("GET", "/v2/catalog"))
    found, told = problems(nodes, pools), [*notes(nodes, pools), *conflicts]
    if control.get("status") != "ok":
        found.insert(0, f"the control is {control.get('status')}")
    if control.get("storm"):
        reason = control["storm"].get("reason")
        found.insert(0, f"the control blames itself, and keeps what it knew of its nodes: {reason}")
    if call.output.format is Format.TABLE:
        _print(call.target.url, control, nodes, pools, found)
        _print_notes(told)
        if nodes:
            write_out("\n")
            call.output.rows(nodes, NODE_COLUMNS, name=str)
    else:
        document = {
            "url": call.target.url,
            "control": control,
            "problems": found,
            "notes": told,
            "nodes": nodes,
            "pools": pools,
        }
        call.output.one(document, name="ok" if not found else "degraded")
    return Exit.FAILED if found else Exit.OK


def _print(
    url: str,
    control: Mapping[str, Any],
    nodes: Sequence[Mapping[str, Any]],
    pools: Sequence[Mapping[str, Any]],
    found: Sequence[str],
) -> None:
    free, total = (sum(pool.get(name) or 0 for pool in pools) for name in ("slots_free", "slots_total"))
    ready = sum(bool(pool.get("ready")) for pool in pools)
    from llorch.client.text import one_line

    told, version = (one_line(str(control.get(name))) for name in ("status", "version"))
    write_out(
        f"control  {url}  {told}  version {version}\n"
        f"nodes    {sum(node.get('state') == 'online' for node in nodes)} of {len(nodes)} online\n"
        f"pools    {ready} of {len(pools)} ready, {free} of {total} slots free\n"
    )
    write_out("".join(f"problem  {one_line(problem)}\n" for problem in found))


def _print_notes(words: Sequence[str]) -> None:
    from llorch.client.text import one_line

    write_out("".join(f"note     {one_line(word)}\n" for word in words))


def register(app: typer.Typer) -> None:
    app.command("status")(client_command(status))
