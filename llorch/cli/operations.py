"""Asking for an operation on a node or a pool, and following it to its end.

Owns the waiting: what is said of it on standard error (one line that is rewritten on a terminal, else a line per
change), and what its end means as an exit code. Never undoes anything: who stops waiting leaves the operation to the
node.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llorch.cli.connection import connected
from llorch.cli.exits import Exit
from llorch.cli.flags import Call
from llorch.cli.interrupts import Interrupts
from llorch.cli.output import Failure, is_terminal, report_of_peer, usage, write_err
from llorch.cli.pool_words import UNSEEN_FOR_S, Asked, Lines, Outcome, Patience, Seen, asked_of_pool, node_seen
from llorch.client.text import one_line
from llorch.config_kinds import BadValue, duration

if TYPE_CHECKING:
    from llorch.client.api import LlorchClient

LOOK_EVERY_S = 0.5  # a node tells its control of a change within 0.25 s
CONTROL_AWAY_S = 30.0  # a restarted control has its nodes back within seconds
AWAY = "the control is away or has just started; looking again"
_DEADLINE = duration("0s", "1d")

NodeId = Annotated[str, typer.Argument(metavar="NODE", show_default=False)]
PoolName = Annotated[str, typer.Argument(metavar="NODE/POOL", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it to its end.")]
Deadline = Annotated[
    str | None,
    typer.Option("--deadline", metavar="TIME", help="End tasks that run longer, e.g. 10m.", show_default=False),
]
Reason = Annotated[
    str | None, typer.Option("--reason", metavar="TEXT", help="Shown to whoever asks why.", show_default=False)
]

Look = Callable[[], Awaitable[Seen]]


def pool_named(name: str) -> tuple[str, str]:
    """Node and pool of a NODE/POOL. Raises Failure (usage)."""
    node_id, slash, pool_id = name.partition("/")
    if not (node_id and slash and pool_id) or "/" in pool_id:
        raise usage(f"{name} names no pool", "NODE/POOL; `llorch pool ls -q` lists them")
    return node_id, pool_id


def deadline_s(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return _DEADLINE.parse(text)
    except BadValue as bad:
        raise usage(f"--deadline {bad.message}", bad.hint) from None


async def operate_pool(call: Call, name: str, kind: str, wish: Mapping[str, Any], *, wait: bool) -> int:
    """One operation on a pool; the exit code that its end means."""
    node_id, pool_id = pool_named(name)
    latest: dict[str, Any] = {"node_id": node_id}

    async def ask(client: LlorchClient) -> tuple[Seen, Look]:
        answer = await client.operate_pool(node_id, pool_id, kind, wish)
        latest.update(answer["pool"] if isinstance(answer.get("pool"), dict) else {})
        asked, seen = asked_of_pool(kind, wish.get("model"), latest)

        async def look() -> Seen:
            pool = await _pool_of(client, node_id, pool_id)
            latest.update(pool or {})
            return _if_there(asked, pool, node_id)

        return seen, look

    return await _carried_out(
        call,
        name,
        kind,
        ask,
        latest,
        wait=wait,
        shows=f"llorch pool show {name}",
        on_failure=f"llorch pool logs {name}",
    )


async def operate_node(call: Call, node_id: str, kind: str, wish: Mapping[str, Any], *, wait: bool) -> int:
    """Drain or undrain a node; the exit code that its end means."""
    latest: dict[str, Any] = {}

    async def ask(client: LlorchClient) -> tuple[Seen, Look]:
        latest.update(await client.operate_node(node_id, kind, wish))

        async def look() -> Seen:
            node = await client.node(node_id)
            latest.update(node)
            _must_be_there(node_id, node.get("state"))
            return node_seen(kind, node)

        return Seen(Outcome.RUNNING, Asked(kind).doing), look

    where = f"llorch node show {node_id}"
    return await _carried_out(call, node_id, kind, ask, latest, wait=wait, shows=where, on_failure=where)


async def _pool_of(client: LlorchClient, node_id: str, pool_id: str) -> dict[str, Any] | None:
    """The pool as its control sees it now; None if its node has it no more."""
    from llorch.errors import Code, LlorchError

    try:
        return await client.pool(node_id, pool_id)
    except LlorchError as error:
        if error.code is not Code.POOL_NOT_FOUND:
            raise
        return None


def _if_there(asked: Asked, pool: Mapping[str, Any] | None, node_id: str) -> Seen:
    if pool is not None:
        _must_be_there(node_id, pool.get("node_state"))
    return asked.seen(pool)


def _must_be_there(node_id: str, state: object) -> None:
    """Raises Failure for a node that nothing is heard of any more."""
    if state in ("offline", "quarantined"):
        raise Failure(
            f"node {one_line(node_id)} is {state} now, so nobody knows how far it is",
            hint=f"llorch node show {one_line(node_id)}",
        )


# ---------------------------------------------------------------- waiting


async def _carried_out(
    call: Call,
    name: str,
    kind: str,
    ask: Callable[[LlorchClient], Awaitable[tuple[Seen, Look]]],
    latest: Mapping[str, Any],
    *,
    wait: bool,
    shows: str,
    on_failure: str,
) -> int:
    """Ask, wait if that is wanted, and say how it ended. `latest` is the newest view, for those who want it as JSON."""
    from llorch.client.faults import TimedOut

    taken = False
    try:
        async with connected(call.target) as client:
            with Interrupts() as interrupts:
                try:
                    seen, look = await ask(client)
                    taken = True
                    if wait:
                        seen = await _followed(name, kind, seen, look, shows)
                except asyncio.CancelledError as ended:
                    if not interrupts.ours(ended):
                        raise
                    went = f"left; the node goes on with it: {shows} says how far it is" if taken else "interrupted"
                    write_err(f"{went}\n")
                    return Exit.INTERRUPTED
    except TimedOut as error:
        if taken:
            error.hint = f"the node goes on with it: {shows} says how far it is"
        raise
    return _told(call, name, seen, latest, shows=shows, on_failure=on_failure)


async def _followed(name: str, kind: str, seen: Seen, look: Look, shows: str) -> Seen:
    """Look again and again until it has ended. Raises Failure when it is gone, or what the look raised for long."""
    from llorch.client.faults import ClientFault
    from llorch.errors import Code, LlorchError

    told = _Told(name)
    unseen, away = Patience(), Patience()
    try:
        while seen.outcome in (Outcome.RUNNING, Outcome.UNSEEN):
            if unseen.missing_s(seen.outcome is Outcome.UNSEEN, time.monotonic()) >= UNSEEN_FOR_S:
                raise Failure(
                    f"{one_line(name)}: the {kind} is not among what the node reports any more",
                    why="the node was started anew, or another operation took its place",
                    hint=shows,
                )
            told.tell(seen)
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                seen = await look()
                away.missing_s(False, time.monotonic())
            except (ClientFault, LlorchError) as error:
                patience_s = (
                    {Code.RECOVERING: CONTROL_AWAY_S, Code.NODE_NOT_FOUND: UNSEEN_FOR_S}.get(error.code, 0.0)
                    if isinstance(error, LlorchError)
                    else CONTROL_AWAY_S
                )
                if away.missing_s(True, time.monotonic()) >= patience_s:
                    raise
                seen = Seen(Outcome.RUNNING, AWAY)
    finally:
        told.close()
    return seen


class _Told:
    """What is said while it runs: one line that is rewritten on a terminal, else a line per change."""

    def __init__(self, name: str) -> None:
        from llorch.cli.answer import progress

        self._name = name
        self._began = time.monotonic()
        self._progress = progress() if is_terminal(sys.stderr) else None
        self._lines = Lines()

    def tell(self, seen: Seen) -> None:
        now = time.monotonic()
        if self._progress is not None:
            self._progress.show(f"{self._name}: {seen.text} ({now - self._began:.0f} s)")
        elif (line := self._lines.line(seen, now)) is not None:
            write_err(f"{one_line(f'{self._name}: {line}')}\n")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.clear()


def _told(call: Call, name: str, seen: Seen, latest: Mapping[str, Any], *, shows: str, on_failure: str) -> int:
    failed = seen.outcome is Outcome.FAILED
    if call.format_given:
        call.output.one(latest, name=name)
    elif not failed:
        still = seen.outcome is not Outcome.DONE
        more = f": {shows} says how far it is" if still else f": {seen.why}" if seen.why else ""
        write_err(f"{one_line(f'{name}: {seen.phase}{more}')}\n")
    if failed:
        report_of_peer(f"{name}: {seen.phase}", why=seen.why, hint=on_failure)
    return Exit.FAILED if failed else Exit.OK
