"""`llorch chat`: a conversation with a model, typed at a terminal or read from a pipe.

Owns where messages come from, and the way out. What they mean, what is asked and what is answered is chat_session's.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from llorch.cli.connection import connected
from llorch.cli.exits import Exit
from llorch.cli.flags import Call, client_command
from llorch.cli.interrupts import Interrupted, Interrupts
from llorch.cli.output import Failure, OutputClosed, OutputFailed, is_terminal, usage, warn, write_err, write_out
from llorch.cli.submit import MaxTokens, Model, Seed, Temperature, only_of

if TYPE_CHECKING:
    from llorch.cli.chat_session import Chat, Runner
    from llorch.client.api import LlorchClient

T = TypeVar("T")
MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # of one that is piped in: more than any model reads

System = Annotated[str | None, typer.Option("--system", "-s", help="A system message.", show_default=False)]
Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The first message.", show_default=False)]


async def chat(
    call: Call,
    invoked: typer.Context,
    prompt: Prompt = None,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
) -> int:
    """Talk with a model; /help at its prompt lists the commands.

    Each turn sends the whole conversation. ^C stops an answer, ^D leaves. What is piped in is read as a message a line,
    each answer ends in a newline, and the exit code is that of the first line that failed. --timeout is per answer.
    """
    if call.format_given:
        raise usage("a conversation is text", "`llorch submit --json` prints each event of an answer as JSON")
    if temperature is not None and not math.isfinite(temperature):
        raise usage("--temperature is not a number", "0 to 10")
    for text in (prompt, system):
        if text is not None and any("\ud800" <= char <= "\udfff" for char in text):
            raise usage("the arguments are not UTF-8 text")
    if call.target.took_stdin:
        raise usage("standard input holds the token, so it can't hold messages", "use --token-file FILE")
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    options = {name: value for name, value in options.items() if value is not None}
    timeout_s, debug = call.target.timeout_s, bool(invoked.params.get("debug"))
    async with connected(replace(call.target, timeout_s=None)) as client:
        models, chosen = await _models(client, model, timeout_s)

        def begin(run: Runner, write: Callable[[str], None], *, talkative: bool) -> Chat:
            from llorch.cli.chat_session import Chat

            return Chat(
                client,
                chosen,
                models=models,
                system=system or None,
                options=options,
                timeout_s=timeout_s,
                run=run,
                write=write,
                talkative=talkative,
                debug=debug,
            )

        if is_terminal(sys.stdin) and (is_terminal(sys.stdout) or is_terminal(sys.stderr)):
            return await _at_a_terminal(begin, call.target.url, prompt, debug=debug)
        return await _from_a_pipe(begin, prompt, debug=debug)


async def _models(client: LlorchClient, wanted: str | None, timeout_s: float | None) -> tuple[list[str], str]:
    """The models there are, and the one to begin with. Raises what is wrong before anything has been typed."""
    from llorch.cli.chat_session import no_model
    from llorch.cli.chat_turn import within

    async with within(timeout_s):
        found = sorted(await client.models())
    if wanted is None:
        return found, only_of(found)
    if found and wanted not in found:  # none at all is how a control that has just started looks
        raise no_model(wanted, found)
    return found, wanted


Begin = Callable[..., "Chat"]


# ---------------------------------------------------------------- at a terminal


async def _at_a_terminal(begin: Begin, url: str, first: str | None, *, debug: bool) -> int:
    from llorch.cli.chat_files import History, history_path
    from llorch.cli.chat_terminal import Cleared, Terminal, quiet
    from llorch.cli.chat_turn import Stops
    from llorch.cli.endings import explain_error
    from llorch.client.text import one_line

    with Stops() as stops:
        session = begin(stops.run, stops.guarded(write_out), talkative=True)
        write_err(f"llorch chat: {one_line(session.model)} at {url}\n/help lists the commands, ^D leaves\n")
        terminal = Terminal(History(history_path(os.environ), warn), lambda: session.models)

        async def take(work: Coroutine[Any, Any, int]) -> None:
            try:
                with quiet():
                    await work
            except (OutputClosed, OutputFailed):
                raise
            except Exception as error:  # a conversation is not to be lost with one answer
                explain_error(error, debug=debug)

        if first is not None and first.strip():
            terminal.remember(first)
            await take(session.say(first))
        idle = 0  # ^C on an empty line, times in a row
        while not session.over and not stops.leaving:
            try:
                text = await stops.run(terminal.read())
            except EOFError:
                break
            except Cleared as cleared:
                idle = idle + 1 if cleared.empty else 0
                if idle >= 2:
                    write_err("^D leaves\n")
                continue
            idle = 0
            if text is not None:
                await take(session.take(text))
    return Exit.INTERRUPTED if stops.leaving else Exit.OK


# ---------------------------------------------------------------- from a pipe


async def _from_a_pipe(begin: Begin, first: str | None, *, debug: bool) -> int:
    from llorch.cli.endings import explain_error

    outcome: int = Exit.OK
    with Interrupts() as interrupts:
        session = begin(_plainly, interrupts.guarded(write_out), talkative=False)
        try:
            if first is not None and first.strip():
                outcome = await session.say(first)
            for text in _texts(interrupts):
                for _ in range(3):  # the loop stood still: let it see which connections have gone since
                    await asyncio.sleep(0)
                code = await session.take(text)
                outcome = outcome or code
                if interrupts.hit or session.over:
                    break
        except Failure as error:  # what is piped in can't be read on
            code = explain_error(error, debug=debug)
            outcome = outcome or code
        except (asyncio.CancelledError, Interrupted):
            if not interrupts.hit:
                raise
        return Exit.INTERRUPTED if interrupts.hit else outcome


async def _plainly(work: Coroutine[Any, Any, T]) -> T | None:
    return await work


def _texts(interrupts: Interrupts) -> Iterator[str]:
    """Complete texts, as standard input has them. Raises Failure (usage) for what is none."""
    from llorch.cli.chat_lines import Lines

    source = sys.stdin.buffer if sys.stdin is not None and not sys.stdin.closed else None
    lines: list[bytes] = []

    def next_line(_: str) -> None:
        if interrupts.hit:  # since we last looked; from here on a signal breaks out
            raise Interrupted
        lines.append(source.readline(MAX_MESSAGE_BYTES) if source is not None else b"")

    reading = interrupts.guarded(next_line)
    gathered, size = Lines(), 0
    while True:
        try:
            reading("")
            raw = lines.pop()
            size += len(raw)
            if size >= MAX_MESSAGE_BYTES:
                raise usage(f"a message of more than {MAX_MESSAGE_BYTES} bytes", "send less at a time")
            line = raw.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise usage("what is piped in is not UTF-8 text") from None
        except OSError as error:
            raise usage(f"standard input can't be read: {error.strerror}") from None
        text = gathered.add(line) if raw else gathered.finish()
        if text is not None:
            size = 0
            yield text
        if not raw:
            return


def register(app: typer.Typer) -> None:
    app.command("chat")(client_command(chat))
