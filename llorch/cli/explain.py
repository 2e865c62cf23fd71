"""`llorch explain`: why a task went where it went, or where one would go now, pool by pool.

Owns the words of the explanation. The decision is the control's; fields that it leaves out are left out here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from llorch.cli.connection import connected
from llorch.cli.exits import Exit, of_code
from llorch.cli.flags import Call, client_command
from llorch.cli.output import usage
from llorch.cli.submit import Avoid, Model, Pin, Prefer, Zone, only_model, placement_wish
from llorch.cli.units import age, size
from llorch.client.text import unbroken

_ANY_PROMPT = "?"  # where a task goes does not depend on what it asks


async def explain(
    call: Call,
    task_id: Annotated[str | None, typer.Argument(metavar="[TASK]", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask where a task would go now; run none.")] = False,
    model: Model = None,
    pin: Pin = None,
    prefer: Prefer = None,
    avoid: Avoid = None,
    zone: Zone = None,
) -> int:
    """Say why a task went where it went; with --dry-run, where one would go now."""
    wish = placement_wish(pin, prefer, avoid, zone)
    if dry_run == (task_id is not None):
        raise usage("give either a task's id or --dry-run", "llorch explain --dry-run -m MODEL")
    if task_id is not None and (model or wish):
        raise usage("-m, --pin, --prefer, --avoid and --zone are for --dry-run")
    async with connected(call.target) as client:
        if task_id is not None:
            decision = await client.placement(task_id)
        else:
            body: dict[str, Any] = {"model": model or await only_model(client), "prompt": _ANY_PROMPT}
            decision = await client.dry_run(body | ({"placement": wish} if wish else {}))
    picked = _picked(decision)
    call.output.one(decision, name=picked or "-", text=lambda: _page(decision))
    error = _mapping(decision.get("error"))
    if dry_run and decision.get("outcome") == "refuse":
        return of_code(str(error.get("code"))) if error else Exit.NO_CAPACITY
    return Exit.OK


def _page(decision: Mapping[str, Any]) -> str:
    return "".join(f"{unbroken(line)}\n" for line in lines(decision))  # reasons quote what nodes say


def lines(decision: Mapping[str, Any]) -> Iterator[str]:
    """The decision for a person: what, why, then each pool, the best first."""
    picked, outcome = _picked(decision), str(decision.get("outcome") or "unknown")
    task = f"task {decision['task_id']} ({decision.get('state')}): " if decision.get("task_id") else ""
    model = f" of {decision['model']}" if decision.get("model") else ""
    yield f"{task}{outcome}{f' on {picked}' if picked else ''}{model}"
    if decision.get("reason"):
        yield f"  because: {decision['reason']}"
    hint = _mapping(decision.get("error")).get("hint")
    if hint:
        yield f"  hint: {hint}"
    pools = [pool for pool in decision.get("pools") or [] if isinstance(pool, Mapping)]
    for pool in sorted(pools, key=_order):
        yield from _pool_lines(pool, picked)


def _order(pool: Mapping[str, Any]) -> tuple[float, str]:
    rank = pool.get("rank")
    return (rank if isinstance(rank, int) else float("inf"), _name(pool))


def _pool_lines(pool: Mapping[str, Any], picked: str | None) -> Iterator[str]:
    filters = [entry for entry in pool.get("filters") or [] if isinstance(entry, Mapping)]
    failed = [entry for entry in filters if not entry.get("passed", entry.get("ok", True))]
    rank = f"rank {pool['rank']}" if pool.get("rank") is not None else "not possible" if failed else "possible"
    seen = f", facts {age(pool['facts_age_ms'])} old" if pool.get("facts_age_ms") is not None else ""
    yield ""
    yield f"{'*' if _name(pool) == picked else ' '} {_name(pool)}: {rank}{seen}"
    for entry in failed:
        yield f"    no  {entry.get('name')}: {entry.get('reason') or 'not met'}"
    met = [str(entry.get("name")) for entry in filters if entry not in failed]
    if met:
        yield f"    yes {', '.join(met)}"
    terms = _mapping(pool.get("score"))
    if terms and not failed:
        yield f"    score {', '.join(f'{name} {_term(name, value)}' for name, value in terms.items())}"


def _term(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return size(value)
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _picked(decision: Mapping[str, Any]) -> str | None:
    """The pool that was chosen, as "node/pool", in either of the forms that a control may use."""
    picked = _mapping(decision.get("picked")) or decision
    return _name(picked) if picked.get("node_id") else None


def _name(pool: Mapping[str, Any]) -> str:
    return f"{pool.get('node_id')}/{pool.get('pool_id')}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def register(app: typer.Typer) -> None:
    app.command("explain")(client_command(explain))
