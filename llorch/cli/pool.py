"""`llorch pool ls`: every pool that a control knows, and why it takes no tasks where it takes none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from llorch.cli.connection import connected
from llorch.cli.flags import Call, client_command
from llorch.cli.output import Column
from llorch.cli.units import age

app = typer.Typer(help="Look at pools.", no_args_is_help=True, rich_markup_mode=None)


def _state(pool: Mapping[str, Any]) -> str:
    words = [str(pool.get("state") or ("ready" if pool.get("ready") else "not ready"))]
    breaker = pool.get("breaker")
    passed_over = breaker.get("state") if isinstance(breaker, Mapping) else None
    words += [passed_over] if passed_over in ("ejected", "half_open") else []
    words += ["draining"] if pool.get("draining") else []
    words += [str(pool["node_state"])] if pool.get("node_state") not in (None, "online") else []
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
    Column("last error", lambda pool: pool.get("last_error")),
)


async def ls(call: Call) -> None:
    """List the pools: model, engine, state, free slots."""
    async with connected(call.target) as client:
        pools = await client.pools()
    call.output.rows(pools, POOL_COLUMNS, name=lambda pool: f"{pool.get('node_id')}/{pool.get('pool_id')}")


app.command("ls")(client_command(ls))
