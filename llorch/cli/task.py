"""`llorch task ls|show|cancel|logs`: tasks that a control knows."""

from __future__ import annotations

from typing import Annotated

import typer

from llorch.cli.connection import connected
from llorch.cli.flags import Call, client_command
from llorch.cli.output import Column, Format, usage, write_err

app = typer.Typer(help="Look at tasks, read and cancel them.", no_args_is_help=True, rich_markup_mode=None)

TaskId = Annotated[str, typer.Argument(metavar="TASK", show_default=False)]

_COLUMNS = (
    Column("task", lambda task: task.get("task_id")),
    Column("state", lambda task: task.get("state")),
    Column("model", lambda task: task.get("model")),
    Column("pool", lambda task: f"{task['node_id']}/{task.get('pool_id')}" if task.get("node_id") else None),
    Column("attempt", lambda task: task.get("attempt")),
    Column("in", lambda task: task.get("tokens_in")),
    Column("out", lambda task: task.get("tokens_out")),
    Column("reason", lambda task: task.get("finish_reason") or (task.get("error") or {}).get("code")),
)


async def ls(call: Call) -> None:
    """List your tasks, the newest first."""
    async with connected(call.target) as client:
        call.output.rows(await client.tasks(), _COLUMNS, name=lambda task: str(task.get("task_id")))


async def show(call: Call, task_id: TaskId) -> None:
    """Show one task: where it is, how far, and how it ended."""
    async with connected(call.target) as client:
        call.output.one(await client.task(task_id), name=task_id)


async def cancel(call: Call, task_id: TaskId) -> None:
    """Cancel a task. Cancelling one that has ended does nothing."""
    async with connected(call.target) as client:
        answer = await client.cancel(task_id)
    if call.format_given:
        call.output.one(answer, name=task_id)
    else:
        write_err(f"canceled {task_id}\n")


async def logs(
    call: Call,
    task_id: TaskId,
    after: Annotated[
        str | None, typer.Option("--after", metavar="ID", help="Only what came after this event.", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Keep control characters on a terminal.")] = False,
) -> int:
    """Print a task's output from its start, and follow it to its end."""
    from llorch.cli.answer import renderer, show_stream
    from llorch.cli.output import write_out

    if call.output.format in (Format.NAME, Format.YAML):
        raise usage("a task's output is text, or JSON lines with --json")
    shown = renderer(call.output, write_out, raw=raw)
    async with connected(call.target) as client:
        return await show_stream(client.follow(task_id, after, tell=shown.looking), shown)


for _command in (ls, show, cancel, logs):
    app.command(_command.__name__)(client_command(_command))
