"""The line at which a chat is typed: editing, history, search, completion, text of several lines.

Owns the keys, and that nothing that is typed is shown amid an answer. Knows nothing of models or tasks.
"""

from __future__ import annotations

import contextlib
import sys
import termios
from collections.abc import Callable, Iterable, Iterator, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

from llorch.cli.chat_files import History
from llorch.cli.chat_lines import WORDS, more
from llorch.cli.output import is_terminal

PROMPT = ">>> "
CONTINUED = "... "


class Cleared(Exception):
    """^C at the prompt: the line is to be forgotten. `empty`: there was nothing on it."""

    def __init__(self, *, empty: bool) -> None:
        super().__init__()
        self.empty = empty


class _Break(Exception):
    """What the library raises for ^C: a KeyboardInterrupt would end the event loop."""


class Terminal:
    """`models` gives the names that /model completes."""

    def __init__(
        self,
        history: History,
        models: Callable[[], Sequence[str]],
        *,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._history = _Kept(history)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=self._history,
            completer=_Words(models),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            enable_suspend=True,
            key_bindings=_keys(),
            prompt_continuation=lambda _width, _line, wraps: CONTINUED if wraps == 0 else "",
            interrupt_exception=_Break,
            input=input,
            output=output or _output(),
        )

    async def read(self) -> str:
        """One complete text. Raises EOFError for ^D, Cleared for ^C."""
        try:
            return await self._session.prompt_async(handle_sigint=False)  # signals have their owner: chat_turn.Stops
        except _Break:
            raise Cleared(empty=not self._session.default_buffer.text) from None

    def remember(self, text: str) -> None:
        """As if it had been typed here."""
        self._history.append_string(text)


def _output() -> Output | None:
    """Standard error, if standard output is no terminal; None leaves a terminal that can do nothing to the library."""
    if is_terminal(sys.stdout) and is_dumb_terminal():
        return None
    output = create_output(sys.stdout if is_terminal(sys.stdout) else sys.stderr)
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False  # nothing here needs to know the cursor's place, and a late answer would be typed in
    return output


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus("DEFAULT_BUFFER")

    @keys.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        longer = more(buffer.text)
        if longer is None:
            buffer.validate_and_handle()
        else:
            buffer.document = Document(longer)

    @keys.add("escape", "enter", filter=typing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Kept(InMemoryHistory):
    """A history that is in memory, and in its file as long as that can be written."""

    def __init__(self, history: History) -> None:
        super().__init__(history.load())
        self._file = history

    def store_string(self, string: str) -> None:
        super().store_string(string)
        self._file.append(string)


class _Words(Completer):
    """Commands; after /model the models, after /save the files."""

    def __init__(self, models: Callable[[], Sequence[str]]) -> None:
        self._models = models
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        word, blank, rest = document.text_before_cursor.partition(" ")
        if not word.startswith("/"):
            return
        if not blank:
            yield from _starting(WORDS, word)
        elif word == "/model":
            yield from _starting(self._models(), rest)
        elif word in ("/save", "/save!"):
            for found in self._paths.get_completions(Document(rest), complete_event):
                slash = "/" if found.display_text.endswith("/") else ""  # a folder, as a shell writes it
                yield Completion(found.text + slash, found.start_position, found.display)


def _starting(words: Iterable[str], start: str) -> Iterator[Completion]:
    for word in words:
        if word.startswith(start):
            yield Completion(word, start_position=-len(start))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is typed now is not shown, and waits for the next prompt; ^C is a signal, as ever."""
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (OSError, ValueError, termios.error):  # no terminal, then
        yield
        return
    during = [*before]
    during[3] &= ~(termios.ECHO | termios.ICANON)  # by lines, it would cut long ones short and swallow a ^D
    termios.tcsetattr(fd, termios.TCSANOW, during)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # it has been closed
            termios.tcsetattr(fd, termios.TCSANOW, before)
