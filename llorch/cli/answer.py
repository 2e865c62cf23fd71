"""Printing one task's stream: the text as it comes, or JSON lines; and what its end means as an exit code.

Owns nothing but the way from events to standard output. What to do with the task when it can't be printed any more is
for whoever submitted it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, Callable

from llorch.cli.exits import Exit, after_output, of_code
from llorch.cli.output import Format, Output, is_terminal, report, report_of_peer, write_err, write_out
from llorch.client.events import End, Event, Failed, Token
from llorch.client.render import JsonLines, Progress, Renderer, TextRenderer
from llorch.client.text import plain


def progress() -> Progress:
    return Progress(write_err if is_terminal(sys.stderr) else None)


def renderer(output: Output, write: Callable[[str], None], *, raw: bool) -> Renderer:
    if output.format in (Format.JSON, Format.JSONL):
        strip = is_terminal(sys.stdout) and not raw
        return JsonLines((lambda line: write(plain(line))) if strip else write, progress())
    return TextRenderer(write, progress(), terminal=is_terminal(sys.stdout), raw=raw)


async def print_stream(
    events: AsyncGenerator[Event, None],
    output: Output,
    *,
    raw: bool = False,
    write: Callable[[str], None] = write_out,
) -> int:
    """Print events until the last one; the exit code that it stands for."""
    return await show_stream(events, renderer(output, write, raw=raw))


async def show_stream(events: AsyncGenerator[Event, None], shown: Renderer) -> int:
    """The same with a renderer that the caller knows, so that the client can tell it what it looks for."""
    began = False
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                shown.show(event)
                match event:
                    case Token():
                        began = True
                    case End(finish_reason=reason):
                        return ended(reason)
                    case Failed():
                        shown.close()
                        return failed(event, began)
    finally:
        with contextlib.suppress(Exception):  # what made us leave is what matters
            shown.close()
    return Exit.OK  # nothing came after the event that was asked for


def ended(finish_reason: str) -> int:
    if finish_reason != "canceled":
        return Exit.OK
    report("the task was canceled", why="somebody else canceled it, or it had no reader for too long")
    return Exit.FAILED


def failed(event: Failed, began: bool) -> int:
    error = event.error
    report_of_peer(
        error.message + (" (its text so far is printed)" if began else ""),
        why=f"{error.code}",
        hint=error.hint,
        request_id=error.request_id,
    )
    code = str(event.wire.get("code"))
    return after_output(code) if began else of_code(code)


def print_whole(task: dict[str, object], output: Output, *, raw: bool) -> int:
    """A finished task as one document, or its text alone."""
    text = task.get("text")
    if output.format is not Format.TABLE:
        output.one(task, name=str(task.get("task_id")))
    elif isinstance(text, str):
        terminal = is_terminal(sys.stdout)
        shown = plain(text) if terminal and not raw else text
        write_out(shown + ("\n" if terminal and not shown.endswith("\n") else ""))
    return ended(str(task.get("finish_reason")))
