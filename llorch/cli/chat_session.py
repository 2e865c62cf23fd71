"""A chat, whoever types: messages become turns, commands change what the next turn is asked with.

Owns the conversation, the model and the last question. A turn that fails leaves the conversation as it was. Answers go
to standard output, everything else to standard error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar, assert_never

from llorch.cli.answer import ended, failed
from llorch.cli.chat_conversation import Conversation, Turn, form_of, transcript
from llorch.cli.chat_files import save
from llorch.cli.chat_lines import Command, Do, Say, Wrong, help_text, read
from llorch.cli.chat_turn import Taken, take_turn, within
from llorch.cli.endings import explain_error
from llorch.cli.exits import Exit
from llorch.cli.output import Failure, report, write_err
from llorch.client.api import LlorchClient
from llorch.client.events import End
from llorch.client.faults import ClientFault
from llorch.client.text import one_line, plain
from llorch.errors import Code, LlorchError

T = TypeVar("T")
SEEDS = 2**32


class Runner(Protocol):
    """Runs what a person may stop; None if it was stopped before it had anything to say."""

    def __call__(self, work: Coroutine[Any, Any, T]) -> Awaitable[T | None]: ...


class Chat:
    """`options` are the fields of a task that stay the same; `talkative` tells a person more."""

    def __init__(
        self,
        client: LlorchClient,
        model: str,
        *,
        models: list[str],
        system: str | None,
        options: Mapping[str, Any],
        timeout_s: float | None,
        run: Runner,
        write: Callable[[str], None],
        talkative: bool,
        debug: bool = False,
    ) -> None:
        self.models = models
        self.model = model
        self.over = False
        self.conversation = Conversation(system)
        self._client = client
        self._options = dict(options)
        self._timeout_s = timeout_s
        self._run = run
        self._write = write
        self._talkative = talkative
        self._debug = debug
        self._last: str | None = None  # what was asked last,
        self._answered = False  # and whether it is the conversation's last turn
        self._retries = 0

    async def take(self, text: str) -> int:
        """Do what a complete text means; the exit code that a script would end with."""
        match read(text):
            case None:
                return Exit.OK
            case Say(said):
                return await self.say(said)
            case Do() as wish:
                return await self._told(self._do(wish))
            case Wrong(message, advice):
                report(message, hint=advice)
                return Exit.USAGE

    async def say(self, question: str) -> int:
        """Ask what may look like a command and is none."""
        self._last, self._answered, self._retries = question, False, 0
        return await self._told(self._turn(question, self.conversation))

    async def _told(self, work: Coroutine[Any, Any, int]) -> int:
        """What `work` returns; an error becomes its words and its code."""
        try:
            return await work
        except (LlorchError, ClientFault, Failure) as error:
            self._advise(error)
            return explain_error(error, debug=self._debug)

    # ------------------------------------------------------------ turns

    async def _retry(self) -> int:
        if self._last is None:
            raise Failure("nothing has been asked yet", code=Exit.USAGE, hint="type a message")
        self._retries += 1
        asked_in = self.conversation.without_last() if self._answered else self.conversation
        return await self._turn(self._last, asked_in)

    async def _turn(self, question: str, asked_in: Conversation) -> int:
        body: dict[str, Any] = {"model": self.model, "messages": asked_in.messages(question), **self._options}
        if "seed" in body:  # the same one would give the same answer again
            body["seed"] = (body["seed"] + self._retries) % SEEDS
        turn = take_turn(self._client, body, write=self._write, timeout_s=self._timeout_s)
        taken = await self._run(turn)
        if taken is None:
            return self._stopped(None)
        if taken.failed is not None:
            self._advise(taken.failed.error)
            return failed(taken.failed, bool(taken.text))
        if taken.end is not None and taken.end.finish_reason == "canceled":
            return ended("canceled")
        if taken.end is None and self._answered:  # a /retry was stopped
            code = self._stopped(taken)
            self._note("the answer before it is kept")
            return code
        if taken.text:
            stopped = taken.end is None
            self.conversation = asked_in.with_turn(Turn(question, taken.text, self.model, stopped))
            self._answered = True
        return self._stopped(taken) if taken.end is None else self._finished(taken.text, taken.end)

    def _stopped(self, taken: Taken | None) -> int:
        if taken is None or taken.told:
            write_err("canceled\n")
        else:
            write_err(f"stopped; task {taken.task_id} may still be running\n")
        return Exit.INTERRUPTED

    def _finished(self, text: str, end: End) -> int:
        if not text and not self._talkative:
            self._write("\n")  # an answer a line, also where there is none
        elif not text:
            self._note("the model said nothing; /retry asks again")
        elif end.finish_reason == "length":
            self._note("cut off: --max-tokens or the model's context ends here")
        return Exit.OK

    def _advise(self, error: Exception) -> None:
        """What helps a person in a conversation, in place of what helps whoever sends a single prompt."""
        if self._talkative and isinstance(error, LlorchError) and error.code is Code.CONTEXT_LENGTH_EXCEEDED:
            error.hint = "/clear begins anew, then /retry asks this again; until then the conversation is kept"

    # ------------------------------------------------------------ commands

    async def _do(self, wish: Do) -> int:
        match wish.command:
            case Command.MODEL:
                return await self._choose(wish.argument)
            case Command.SYSTEM:
                self._instruct(wish.argument)
            case Command.SAVE:
                self._save(wish.argument, force=wish.force)
            case Command.RETRY:
                return await self._retry()
            case Command.CLEAR:
                self.conversation = self.conversation.cleared()
                self._answered = False
                self._note("the conversation is forgotten")
            case Command.HELP:
                write_err(help_text())
            case Command.EXIT:
                self.over = True
            case _:
                assert_never(wish.command)
        return Exit.OK

    async def _choose(self, name: str) -> int:
        found = await self._run(self._list())
        if found is None:
            return self._stopped(None)
        self.models = found
        if not name:
            names = found if self.model in found else [self.model, *found]
            write_err("".join(f"{'*' if model == self.model else ' '} {one_line(model)}\n" for model in names))
        elif name in found:
            self.model = name
            self._note(f"{one_line(name)} answers from now on")
        else:
            raise no_model(name, found)
        return Exit.OK

    async def _list(self) -> list[str]:
        async with within(self._timeout_s):
            return sorted(await self._client.models())

    def _instruct(self, text: str) -> None:
        if not text:
            system = self.conversation.system
            write_err(f"{plain(system)}\n" if system is not None else "there is no system message\n")
            return
        self.conversation = self.conversation.with_system(None if text == "-" else text)
        self._note("the system message is cleared" if text == "-" else "the system message is set")

    def _save(self, name: str, *, force: bool) -> None:
        if not self.conversation.turns:
            raise Failure("there is no conversation to save", hint="nothing has been answered yet")
        path = save(name, transcript(self.conversation, form_of(name)), force=force)
        self._note(f"saved {path}")

    def _note(self, text: str) -> None:
        if self._talkative:
            write_err(f"{plain(text)}\n")


def no_model(name: str, found: list[str]) -> Failure:
    there = f"there are: {', '.join(map(one_line, found))}" if found else "there is none; `llorch status` shows why"
    return Failure(f"there is no model {name}", code=Exit.NOT_FOUND, hint=there)
