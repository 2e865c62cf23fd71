"""`llorch submit`: send a prompt, print the answer as it comes.

Owns where the prompt comes from (argument, standard input, both), the body that is made of the flags, and that a task
whose output nobody can take any more is cancelled: on ^C, on a closed pipe, when --timeout has passed. One that was
there before, under the same key, is left: somebody else may be reading it.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from llorch.cli.connection import connected
from llorch.cli.exits import Exit
from llorch.cli.flags import Call, client_command
from llorch.cli.interrupts import Interrupted, Interrupts
from llorch.cli.output import (
    Failure,
    Format,
    OutputClosed,
    OutputFailed,
    hint,
    is_terminal,
    usage,
    write_err,
    write_out,
)
from llorch.config_kinds import BadValue, duration

if TYPE_CHECKING:
    from llorch.client.api import LlorchClient
    from llorch.client.render import Progress
    from llorch.client.submission import Submission

T = TypeVar("T")
CANCEL_WITHIN_S = 2.0  # after ^C: long enough for a control that lives, short enough for a person
_DEADLINE = duration("1ms", "1d")

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="[PROMPT|-]", help="The prompt; what is piped in comes before it.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="May be left out if there is only one.", show_default=False),
]
System = Annotated[str | None, typer.Option("--system", "-s", help="A system message; implies --chat.")]
Chat = Annotated[bool, typer.Option("--chat", help="Send the prompt as a chat message, through the chat template.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", metavar="N", min=1, help="End after this many tokens.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", metavar="T", min=0, help="0 always takes the likeliest token.")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="The same seed, the same answer.")]
Pin = Annotated[str | None, typer.Option("--pin", metavar="NODE[/POOL]", help="Run it there or not at all.")]
Prefer = Annotated[list[str] | None, typer.Option("--prefer", metavar="NODE[/POOL]", help="Take it first. Repeatable.")]
Avoid = Annotated[list[str] | None, typer.Option("--avoid", metavar="NODE[/POOL]", help="Take it last. Repeatable.")]
Zone = Annotated[str | None, typer.Option("--zone", metavar="ZONE", help="Run it in this zone or not at all.")]
Priority = Annotated[str | None, typer.Option("--priority", metavar="interactive|batch", help="What may wait.")]
Deadline = Annotated[str | None, typer.Option("--deadline", metavar="TIME", help="Fail after this long, e.g. 30s.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key",
        metavar="KEY",
        help="Run again with the same key, the same command attaches to the task that there is.",
        show_default=False,
    ),
]
OnNodeLoss = Annotated[str | None, typer.Option("--on-node-loss", metavar="fail|continue", help="What to do then.")]


async def submit(
    call: Call,
    prompt: Prompt = None,
    model: Model = None,
    system: System = None,
    chat: Chat = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    pin: Pin = None,
    prefer: Prefer = None,
    avoid: Avoid = None,
    zone: Zone = None,
    priority: Priority = None,
    deadline: Deadline = None,
    on_node_loss: OnNodeLoss = None,
    idempotency_key: Key = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print tokens as they come.")] = True,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it with the cluster; print its id.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Keep control characters on a terminal.")] = False,
) -> int:
    """Send a prompt and print the answer as it comes.

    The prompt is the argument, or what is piped in, or both: what is piped in, a newline, the argument. With --json,
    each event is one line of JSON; with --no-stream, the finished task is one JSON document.
    """
    from llorch.client.submission import Submission

    if call.output.format is Format.NAME and not detach:
        raise usage("-q prints ids, and an answer has none", "add --detach, or leave -q out")
    if temperature is not None and not math.isfinite(temperature):
        raise usage("--temperature is not a number", "0 to 10")
    text = read_prompt(prompt, stdin_taken=call.target.took_stdin)
    body = task_body(text, system, chat=chat)
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "priority": priority}
    options |= {"deadline_ms": deadline_ms(deadline), "on_node_loss": on_node_loss}
    body |= {name: value for name, value in options.items() if value is not None}
    wish = placement_wish(pin, prefer, avoid, zone)
    if wish:
        body["placement"] = wish
    async with connected(call.target) as client:
        body["model"] = model or await only_model(client)
        task = Submission(body, idempotency_key)
        stream = stream and call.output.format is not Format.YAML  # which is one document
        return await _run(client, call, task, stream=stream, detach=detach, raw=raw)


async def _run(client: LlorchClient, call: Call, task: Submission, *, stream: bool, detach: bool, raw: bool) -> int:
    from llorch.cli.answer import print_whole, progress, renderer, show_stream

    waiting = progress()
    with Interrupts() as interrupts:
        try:
            if detach:
                return print_detached(await _waited(client.detach(task, tell=waiting.looking), waiting), call)
            if not stream:
                whole = await _waited(client.submit_whole(task, tell=waiting.looking), waiting)
                return print_whole(whole, call.output, raw=raw)
            shown = renderer(call.output, interrupts.guarded(write_out), raw=raw)
            return await show_stream(client.submit(task, tell=shown.looking), shown)
        except (asyncio.CancelledError, Interrupted, OutputClosed, OutputFailed) as ended:
            interrupts.ours(ended)
            if task.attached:
                told = f"left {named(task.task_id)} to whoever submitted it before, under the same key\n"
            elif await cancel_quietly(client, task.task_id):
                told = "canceled\n"
            else:
                told = f"interrupted; {named(task.task_id)} may still be running\n"
            if interrupts.hit or task.attached:
                write_err(told)
            if not interrupts.hit:
                raise
            return Exit.INTERRUPTED


async def _waited(answer: Awaitable[T], waiting: Progress) -> T:
    try:
        return await answer
    finally:
        waiting.clear()


def named(task_id: str | None) -> str:
    return "the task" if task_id is None else f"task {task_id}"


async def cancel_quietly(client: LlorchClient, task_id: str | None) -> bool:
    """Cancel a task whose output is not wanted any more; what brought us here is told, a failure of this is not.

    True if it does not run on: also where the control knows of none, because it never came that far. One whose id only
    the control knows is left to the control, which cancels what nobody reads.
    """
    from llorch.client.faults import ClientFault
    from llorch.errors import Code, LlorchError

    if task_id is None:
        return False
    try:
        async with asyncio.timeout(CANCEL_WITHIN_S):
            await client.cancel(task_id)
    except LlorchError as error:
        return error.code is Code.TASK_NOT_FOUND
    except (ClientFault, TimeoutError):
        return False
    return True


def print_detached(answer: dict[str, Any], call: Call) -> int:
    from llorch.messages import TASK_ID

    task_id = str(answer.get("task_id"))
    call.output.one(answer, name=task_id, text=lambda: f"{task_id}\n")
    if call.output.format is Format.TABLE and is_terminal(sys.stderr) and TASK_ID.fullmatch(task_id):
        hint(f"llorch task logs {task_id}")
    return Exit.OK


# ---------------------------------------------------------------- the body


def read_prompt(argument: str | None, *, stdin_taken: bool = False) -> str:
    """The prompt from the argument and from what is piped in. Raises Failure (usage) when there is none.

    `stdin_taken`: a token was piped in. It must never end up in a prompt.
    """
    piped = ""
    if stdin_taken:
        if argument == "-":
            raise usage("standard input holds the token, so it can't hold the prompt", "use --token-file FILE")
    elif argument == "-" or not is_terminal(sys.stdin):
        piped = _piped().rstrip("\n")
    parts = [part for part in (piped, argument if argument != "-" else None) if part]
    text = "\n".join(parts)
    if not text.isprintable() and any("\ud800" <= char <= "\udfff" for char in text):
        raise usage("the prompt is not UTF-8 text")
    if not text.strip():
        raise usage("there is no prompt", 'llorch submit "Hello", or pipe it in')
    return text


def _piped() -> str:
    if sys.stdin is None or sys.stdin.closed:
        return ""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise usage(f"what is piped in is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise usage(f"standard input can't be read: {error.strerror}") from None


def task_body(text: str, system: str | None, *, chat: bool) -> dict[str, Any]:
    """A raw prompt, unless a system message or --chat asks for the model's chat template."""
    if system is None and not chat:
        return {"prompt": text}
    lead = [{"role": "system", "content": system}] if system is not None else []
    return {"messages": [*lead, {"role": "user", "content": text}]}


def placement_wish(
    pin: str | None, prefer: list[str] | None, avoid: list[str] | None, zone: str | None
) -> dict[str, Any]:
    wish = {"pin": pin, "prefer": _names(prefer), "avoid": _names(avoid), "zone": zone}
    return {name: value for name, value in wish.items() if value}


def _names(given: list[str] | None) -> list[str]:
    return [name.strip() for entry in given or () for name in entry.split(",") if name.strip()]


def deadline_ms(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return max(1, round(_DEADLINE.parse(text) * 1000))
    except BadValue as bad:
        raise usage(f"--deadline {bad.message}", bad.hint) from None


async def only_model(client: LlorchClient) -> str:
    """The one model there is. Raises Failure that lists them if there are several."""
    return only_of(await client.models())


def only_of(models: list[str]) -> str:
    if len(models) == 1:
        return models[0]
    if models:
        raise usage(f"there are {len(models)} models: {', '.join(sorted(models))}", "choose one with -m MODEL")
    raise Failure(
        "there is no model", code=Exit.NO_CAPACITY, hint="`llorch status` shows what is wrong; a node brings a model"
    )


def register(app: typer.Typer) -> None:
    app.command("submit")(client_command(submit))
