"""`llorch pool`: the pools that a control knows, why they take no tasks, and what an operator does with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from llorch.cli import logs
from llorch.cli.connection import connected
from llorch.cli.flags import Call, client_command
from llorch.cli.operations import Deadline, PoolName, Reason, Wait, deadline_s, operate_pool, pool_named
from llorch.cli.output import Column, Format, fields
from llorch.cli.pool_words import name_of, note_of, operation_words
from llorch.cli.units import age

app = typer.Typer(help="Look at pools, and operate them.", no_args_is_help=True, rich_markup_mode=None)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="An id, or a reference: hf:, https:, file:.", show_default=False)
]
MaybeModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="One that the pool may load; its own if left out.")
]


def _state(pool: Mapping[str, Any]) -> str:
    words = [str(pool.get("state") or ("ready" if pool.get("ready") else "not ready"))]
    breaker = pool.get("breaker")
    passed_over = breaker.get("state") if isinstance(breaker, Mapping) else None
    words += [passed_over] if passed_over in ("ejected", "half_open") else []
    words += ["draining"] if pool.get("draining") and "draining" not in words else []
    words += [str(pool["node_state"])] if pool.get("node_state") not in (None, "online", *words) else []
    return ",".join(words)


POOL_COLUMNS = (
    Column("node", lambda pool: pool.get("node_id")),
    Column("pool", lambda pool: pool.get("pool_id")),
    Column("model", lambda pool: pool.get("model")),
    Column("engine", lambda pool: pool.get("engine")),
    Column("state", _state),
    Column("bound", lambda pool: pool.get("bound")),
    Column("slots free", lambda pool: f"{pool.get('slots_free', 0)}/{pool.get('slots_total', 0)}"),
    Column("seen", lambda pool: age(pool.get("facts_age_ms"))),
    Column("note", note_of),
    Column("last error", lambda pool: pool.get("last_error")),
)
REPLICA_COLUMNS = (
    Column("replica", lambda replica: replica.get("id")),
    Column("state", lambda replica: replica.get("state")),
    Column("owned", lambda replica: replica.get("owned")),
    Column("slots free", lambda replica: replica.get("slots_free")),
    Column("breaker", lambda replica: replica.get("breaker")),
)


async def ls(call: Call) -> None:
    """List the pools: model, engine, state, free slots, and why one takes no tasks."""
    async with connected(call.target) as client:
        pools = await client.pools()
    call.output.rows(pools, POOL_COLUMNS, name=name_of)


async def show(call: Call, name: PoolName) -> None:
    """Show one pool: all facts, its replicas, what holds it, its last operation and error."""
    node_id, pool_id = pool_named(name)
    async with connected(call.target) as client:
        pool = await client.pool(node_id, pool_id)
    if call.output.format is not Format.TABLE:
        call.output.one(pool, name=name)
        return
    facts = {key: value for key, value in pool.items() if key not in ("replicas", "operation", "breaker")}
    facts |= {"operation": _operation(pool), "breaker": _breaker(pool)}
    call.output.one(facts, name=name, text=lambda: fields(facts))
    if pool.get("replicas"):
        call.output.rows(pool["replicas"], REPLICA_COLUMNS, name=lambda replica: str(replica.get("id")))


def _operation(pool: Mapping[str, Any]) -> str | None:
    operation = pool.get("operation")
    if not isinstance(operation, Mapping):
        return None
    words = operation_words(pool) or f"{operation.get('kind')} {operation.get('state')}"
    return f"{words} (since {operation['started_at']})" if operation.get("started_at") else words


def _breaker(pool: Mapping[str, Any]) -> str | None:
    breaker = pool.get("breaker")
    if not isinstance(breaker, Mapping):
        return None
    reason = breaker.get("reason")
    return f"{breaker.get('state')}" + (f": {reason}" if reason else "")


async def drain(call: Call, name: PoolName, deadline: Deadline = None, reason: Reason = None, wait: Wait = True) -> int:
    """Take no new tasks and let those that run end. The engine stays loaded: `unload` frees its memory."""
    wish = {"deadline_s": deadline_s(deadline), "reason": reason}
    return await operate_pool(call, name, "drain", wish, wait=wait)


async def undrain(call: Call, name: PoolName, wait: Wait = True) -> int:
    """Take tasks again."""
    return await operate_pool(call, name, "undrain", {}, wait=wait)


async def load(call: Call, name: PoolName, model: MaybeModel = None, wait: Wait = True) -> int:
    """Start the engine, with a model if one is named."""
    return await operate_pool(call, name, "load", {"model": model}, wait=wait)


async def unload(call: Call, name: PoolName, deadline: Deadline = None, wait: Wait = True) -> int:
    """Let running tasks end, stop the engine and free its memory."""
    return await operate_pool(call, name, "unload", {"deadline_s": deadline_s(deadline)}, wait=wait)


async def reload(call: Call, name: PoolName, model: Model, deadline: Deadline = None, wait: Wait = True) -> int:
    """Have another model instead; the old one stays if the new one does not work."""
    wish = {"model": model, "deadline_s": deadline_s(deadline)}
    return await operate_pool(call, name, "reload", wish, wait=wait)


async def restart(call: Call, name: PoolName, deadline: Deadline = None, wait: Wait = True) -> int:
    """Let running tasks end, and start the engine anew."""
    return await operate_pool(call, name, "restart", {"deadline_s": deadline_s(deadline)}, wait=wait)


async def purge(call: Call, name: PoolName, wait: Wait = True) -> int:
    """Of a stopped pool: forget failures, and remove its engines' logs."""
    return await operate_pool(call, name, "purge", {}, wait=wait)


for _command in (ls, show, drain, undrain, load, unload, reload, restart, purge):
    app.command(_command.__name__)(client_command(_command))
app.command("logs")(client_command(logs.logs))
