"""`llorch model ls|stage|verify|rm`: which nodes have which models, and having them there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llorch.cli.connection import connected
from llorch.cli.exits import Exit, of_code
from llorch.cli.flags import Call, client_command
from llorch.cli.interrupts import Interrupts
from llorch.cli.model_progress import progress, shares, short
from llorch.cli.output import Column, Failure, Format, hint, report_of_peer, usage, warn, write_err
from llorch.cli.units import size
from llorch.client.text import one_line

if TYPE_CHECKING:
    from llorch.client.models import Models, Nodes
    from llorch.errors import LlorchError

app = typer.Typer(help="Look at models, stage and remove them on nodes.", no_args_is_help=True, rich_markup_mode=None)

POLL_S = 0.5  # as often as a bar has something new to show
LOST_FOR_S = 60.0  # a control that is started anew is back by then; nodes go on meanwhile
STATES = ("staged", "staging", "failed", "retired")

NodeList = Annotated[
    str, typer.Option("--nodes", metavar="all|NODE,...", help="On which nodes; offline ones are passed over by all.")
]


# ---------------------------------------------------------------- ls


def rows_of(catalog: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per model, with what each node reports of it as `reports`."""
    models, nodes = _table(catalog.get("models")), _table(catalog.get("nodes"))
    reports: dict[str, dict[str, Mapping[str, Any]]] = {}
    for node_id, node in nodes.items():
        listed = node.get("models")
        for report in listed if isinstance(listed, list) else ():
            if isinstance(report, Mapping):
                reports.setdefault(str(report.get("id")), {})[node_id] = report
    return [{"id": model, **entry, "reports": reports.get(model, {})} for model, entry in models.items()]


def _table(value: object) -> dict[str, Mapping[str, Any]]:
    found = value.items() if isinstance(value, Mapping) else ()
    return {str(name): entry for name, entry in found if isinstance(entry, Mapping)}


def state_of(row: Mapping[str, Any]) -> str | None:
    """`staged`, or how many nodes are how far: `staged 2, staging 45% on n3, failed on n4`."""
    reports = row.get("reports") or {}
    by_state: dict[str, list[str]] = {}
    for node_id, report in reports.items():
        by_state.setdefault(str(report.get("state") or "staged"), []).append(node_id)
    if len(by_state) == 1 and "staging" not in by_state:
        return next(iter(by_state))
    parts = []
    for state in [*(each for each in STATES if each in by_state), *(each for each in by_state if each not in STATES)]:
        if state == "staged":
            parts.append(f"staged {len(by_state[state])}")
        elif state == "staging":
            parts += [f"staging {_percent(reports[node_id])} on {node_id}" for node_id in by_state[state]]
        else:
            parts.append(f"{state} on {' '.join(by_state[state])}")
    return ", ".join(parts) or None


def _percent(report: Mapping[str, Any]) -> str:
    done = report.get("progress")
    return f"{min(1.0, max(0.0, done)) * 100:.0f}%" if isinstance(done, (int, float)) else "0%"


def conflict_of(row: Mapping[str, Any]) -> str | None:
    """Of an id that stands for several contents, which nodes have which."""
    if not row.get("conflict"):
        return None
    digests = row.get("digests")
    found = digests.items() if isinstance(digests, Mapping) else ()
    return "; ".join(f"{short(digest)} on {' '.join(map(str, nodes))}" for digest, nodes in found) or "yes"


def conflict_notes(catalog: Mapping[str, Any]) -> list[str]:
    """For `llorch status`: what is wrong with models, though tasks are served."""
    return [
        f"model {row['id']} has several contents: {found}" for row in rows_of(catalog) if (found := conflict_of(row))
    ]


def _error_of(row: Mapping[str, Any]) -> str | None:
    found = [f"{node_id}: {report['error']}" for node_id, report in row["reports"].items() if report.get("error")]
    return "; ".join(found) or None


MODEL_COLUMNS = (
    Column("model", lambda row: row.get("id")),
    Column("nodes", lambda row: row.get("nodes")),
    Column("ready pools", lambda row: row.get("ready_pools")),
    Column("size", lambda row: size(row.get("size_bytes")) if row.get("size_bytes") else None),
    Column("sha256", lambda row: short(row.get("sha256"))),
    Column("state", state_of),
    Column("conflict", conflict_of),
    Column("error", _error_of),
)


async def ls(call: Call) -> None:
    """List the models: where they are, how far they are staged, which ids stand for two contents."""
    async with connected(call.target) as client:
        rows = rows_of(await _models(client).catalog())
    call.output.rows(rows, MODEL_COLUMNS, name=lambda row: str(row.get("id")))


# ---------------------------------------------------------------- stage


async def stage(
    call: Call,
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="hf:org/repo[:quant|/file], https://..., or a model that a node has.",
            show_default=False,
        ),
    ],
    nodes: NodeList = "all",
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="NODE", help="Have the others fetch it from this node.", show_default=False),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id and leave.")] = False,
) -> int:
    """Have a model on nodes: fetched once from outside, and by the others from the node that has it."""
    wanted = node_list(nodes)
    async with connected(call.target) as client:
        models = _models(client)
        job = await models.stage(ref, wanted, source)
        for node_id in job.get("offline") or ():
            warn(one_line(f"{node_id} is offline and is passed over"))
        if no_wait:
            call.output.one(job, name=str(job.get("job")), text=lambda: f"{job.get('job')}\n")
            return Exit.OK
        shown = progress(quiet=call.output.format is Format.NAME)
        try:
            job = await _leaving(
                "the nodes go on: the same command follows them again, and `llorch model ls` shows how far they are",
                lambda: _follow(models.stage_job, lambda: models.stage(ref, wanted, source), job, shown.show),
                shown.close,
            )
        finally:
            shown.close()
    return _told(call, job)


def _told(call: Call, job: Mapping[str, Any]) -> int:
    """The result of a job that has ended, and an error for each node that does not have it."""
    if call.output.format is Format.TABLE:
        rows = [{"node": node_id, **share} for node_id, share in shares(job)]
        call.output.rows(rows, STAGED_COLUMNS, name=str)
    else:
        call.output.one(job, name=str(job.get("model")))
    for node_id, share in shares(job):
        if share.get("state") == "failed":
            _report(node_id, share.get("error"))
    return Exit.OK if job.get("state") == "done" else Exit.FAILED


STAGED_COLUMNS = (
    Column("node", lambda row: row.get("node")),
    Column("state", lambda row: row.get("state")),
    Column("size", lambda row: size(row.get("bytes_total")) if row.get("bytes_total") else None),
    Column("sha256", lambda row: short(row.get("sha256"))),
)


def _report(node_id: str, error: object) -> None:
    told: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    message, code, mend = (str(told.get(name) or "") for name in ("message", "code", "hint"))
    report_of_peer(f"{node_id}: {message or 'it failed'}", why=code, hint=mend)


async def _follow(
    look: Callable[[str], Awaitable[dict[str, Any]]],
    again: Callable[[], Awaitable[dict[str, Any]]],
    job: dict[str, Any],
    show: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """A job until it ends. A control that was started anew has forgotten it: it is asked for `again`."""
    from llorch.client.events import ServerError
    from llorch.client.faults import ClientFault
    from llorch.errors import Code

    loop = asyncio.get_running_loop()
    heard = loop.time()
    while job.get("state") == "running":
        show(job)
        await asyncio.sleep(POLL_S)
        try:
            job = await look(str(job.get("job")))
        except ServerError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            job = await again()
        except ClientFault:
            if loop.time() - heard > LOST_FOR_S:
                raise
            continue
        heard = loop.time()
    show(job)
    return job


async def _leaving(
    told: str, work: Callable[[], Awaitable[dict[str, Any]]], close: Callable[[], None]
) -> dict[str, Any]:
    """`work`, which somebody else goes on with when it is left: by ^C, or for want of time."""
    with Interrupts() as interrupts:
        try:
            return await work()
        except asyncio.CancelledError as ended:
            close()
            hint(told)
            if not interrupts.ours(ended):
                raise
    raise Failure("interrupted", code=Exit.INTERRUPTED)


# ---------------------------------------------------------------- verify


async def verify(
    call: Call,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Every model, if not given.", show_default=False)
    ] = None,
    nodes: NodeList = "all",
) -> int:
    """Read models again and compare their digests. Exit 1 if one is not what it was."""
    wanted = node_list(nodes)
    async with connected(call.target) as client:
        models = _models(client)
        job = await models.verify(model, wanted)
        for node_id in job.get("offline") or ():
            warn(one_line(f"{node_id} is offline and is passed over"))
        counted = _Counted(quiet=call.output.format is Format.NAME)
        job = await _leaving(
            "the nodes read on; what they find is in their logs, and in this control's",
            lambda: _follow(models.verify_job, lambda: models.verify(model, wanted), job, counted.show),
            lambda: None,
        )
    checks = [check for check in job.get("checks") or () if isinstance(check, Mapping)]
    call.output.rows(checks, CHECK_COLUMNS, name=lambda check: f"{check.get('node_id')}/{check.get('model')}")
    for check in checks:
        if check.get("state") != "ok":
            _report(f"{check.get('node_id')}/{check.get('model')}", check.get("error"))
    return Exit.OK if job.get("state") == "done" else Exit.FAILED


CHECK_COLUMNS = (
    Column("node", lambda check: check.get("node_id")),
    Column("model", lambda check: check.get("model")),
    Column("state", lambda check: check.get("state")),
    Column("sha256", lambda check: short(check.get("sha256"))),
)


class _Counted:
    """A line on standard error whenever a model more has been read."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._said = 0

    def show(self, job: Mapping[str, Any]) -> None:
        checks = [check for check in job.get("checks") or () if isinstance(check, Mapping)]
        read = sum(check.get("state") in ("ok", "failed") for check in checks)
        if read > self._said and not self._quiet:
            self._said = read
            write_err(f"read {read} of {len(checks)}\n")


# ---------------------------------------------------------------- rm


async def rm(
    call: Call,
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False)],
    nodes: Annotated[
        str, typer.Option("--nodes", metavar="all|NODE,...", help="From which nodes.", show_default=False)
    ],
    retire: Annotated[bool, typer.Option("--retire", help="Keep the files, and offer the model no more.")] = False,
) -> int:
    """Remove a model's files from nodes."""
    from llorch.errors import LlorchError

    wanted = node_list(nodes)
    failed: list[LlorchError] = []
    async with connected(call.target) as client:
        models = _models(client)
        if wanted == "all":
            wanted = await _who_has(models, model)
        results = []
        for node_id in wanted:
            try:
                answer = await models.remove(node_id, model, retire=retire)
            except LlorchError as error:
                failed.append(error)
                _report(node_id, {"message": error.message, "code": error.code.value, "hint": error.hint})
                continue
            results.append({"node_id": node_id, "model": model, **answer})
            if not call.format_given:
                write_err(one_line(f"{'retired' if retire else 'removed'} {model} on {node_id}") + "\n")
    if call.format_given:
        call.output.rows(results, (Column("node", lambda row: row["node_id"]),), name=lambda row: str(row["node_id"]))
    codes = {of_code(error.code.value) for error in failed}
    return Exit.OK if not codes else codes.pop() if len(codes) == 1 and not results else Exit.FAILED


async def _who_has(models: Models, model: str) -> list[str]:
    nodes = _table((await models.catalog()).get("models")).get(model, {}).get("nodes")
    if not isinstance(nodes, list) or not nodes:
        raise Failure(
            f"no node has a model {model}", code=Exit.NOT_FOUND, hint="`llorch model ls` lists the models there are"
        )
    return [str(node_id) for node_id in nodes]


# ---------------------------------------------------------------- in common


def node_list(given: str) -> Nodes:
    """`all`, or ids with commas between them."""
    if given == "all":
        return "all"
    nodes = [node_id.strip() for node_id in given.split(",")]
    if not all(nodes):
        raise usage("--nodes is all, or node ids with commas between them", "`llorch node ls` lists the nodes")
    return list(dict.fromkeys(nodes))


def _models(client: Any) -> Models:
    from llorch.client.models import Models

    return Models(client)


for _command in (ls, stage, verify, rm):
    app.command(_command.__name__)(client_command(_command))
