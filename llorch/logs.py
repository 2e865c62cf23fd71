"""Log lines: `time level event key=value ...` on stderr.

Owns the format and the escaping of values, so that no peer can forge a line or move a terminal's cursor. Callers pass
ids, codes and numbers; never tokens, prompts or outputs. A traceback is written without the messages of its exceptions:
libraries quote in them what they could not read, and that may be any of the three.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import string
import sys
import time
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from llorch.auth import masked
from llorch.errors import LlorchError

ROOT = "llorch"
_ROOT = logging.getLogger()
_NOTHING = contextlib.nullcontext()
MAX_VALUE_CHARS = 500
LEAVES_WITHIN_S = 0.02  # what a crash may cost of what went well; warnings and errors wait for nothing
MAX_FRAMES = 30
_PLAIN_CHARS = string.ascii_letters + string.digits + "._:/@%+*,~[]()-"
_PLAIN = re.compile(f"[{re.escape(_PLAIN_CHARS)}]+")
_PLAIN_BYTES = _PLAIN_CHARS.encode()
_BETWEEN = b" =" * MAX_VALUE_CHARS
_STAY = frozenset({str, int, float, bool, type(None)})
_LEVELS = {level: logging.getLevelName(level) for level in (logging.DEBUG, logging.INFO)}


def render_value(value: object) -> str:
    """One value as a word: quoted and escaped where it isn't plain ASCII without blanks."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "-" if value is None else masked(str(value))
    if len(text) > MAX_VALUE_CHARS:
        text = text[:MAX_VALUE_CHARS] + "..."
    if _PLAIN.fullmatch(text):
        return text
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'


def _line(event: str, fields: Mapping[str, object]) -> str:
    """An event and its fields as one line."""
    words = [f"{key}={value}" for key, value in fields.items() if value is not None]
    line = " ".join((event, *words))
    # Nearly always every value is a plain word. That is seen from all of them at once: what is left without the plain
    # characters is a blank and an equals sign for each.
    if (
        line.encode("utf-8", "replace").translate(None, _PLAIN_BYTES) == _BETWEEN[: 2 * len(words)]
        and "= " not in line
        and line[-1] != "="
        and "1_" not in line
        and len(line) <= MAX_VALUE_CHARS
        and float not in map(type, fields.values())
    ):
        return line
    return " ".join([event, *(f"{key}={render_value(value)}" for key, value in fields.items() if value is not None)])


def printable(text: str) -> str:
    """`text` without control characters (tab and newline stay), for a terminal."""
    return "".join(char for char in text if char in "\t\n" or (char.isprintable()))


class Log:
    """A named source of events: `log.info("node.registered", node_id=...)`."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{ROOT}.{name}")

    def _emit(self, level: int, event: str, fields: dict[str, Any], *, trace: bool = False) -> None:
        if not self._logger.isEnabledFor(level):
            return
        if level <= logging.INFO and len(_ROOT.handlers) == 1 and isinstance(_ROOT.handlers[0], _Stderr):
            _ROOT.handlers[0].say(level, event, fields)
        else:
            self._logger.log(level, "%s", _line(event, fields), exc_info=trace)

    def debug(self, event: str, **fields: Any) -> None:
        self._emit(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._emit(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._emit(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._emit(logging.ERROR, event, fields)

    def fault(self, event: str, **fields: Any) -> None:
        """A bug of ours: an error with the traceback of the exception being handled."""
        self._emit(logging.ERROR, event, fields, trace=True)


class _Stderr(logging.StreamHandler[TextIO]):
    """Where lines go. Those at `info` and below are many: they are made and leave together, within `LEAVES_WITHIN_S`,
    or before one that is worse. One by one, each costs a task four times as much, and a write of its own."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_Formatter())
        self._held: list[tuple[float, int, str, Mapping[str, object]]] = []
        self._leaving: asyncio.AbstractEventLoop | None = None  # by whose timer they do
        self._second = 0
        self._stamp = ""

    def say(self, level: int, event: str, fields: Mapping[str, object]) -> None:
        if not _STAY.issuperset(map(type, fields.values())):  # what may be another by the time it is written
            fields = {key: value if type(value) in _STAY else str(value) for key, value in fields.items()}
        loop = asyncio._get_running_loop()
        with self.lock or _NOTHING:
            self._held.append((time.time(), level, event, fields))
            if loop is not None and loop is self._leaving:
                return
            self._leaving = loop
        if loop is None:
            self.flush()
        else:
            loop.call_later(LEAVES_WITHIN_S, self.flush)

    def emit(self, record: logging.LogRecord) -> None:
        self._write_held()
        super().emit(record)

    def flush(self) -> None:
        with self.lock or _NOTHING:
            self._write_held()
            with contextlib.suppress(OSError, ValueError):
                super().flush()

    def _write_held(self) -> None:
        held, self._held, self._leaving = self._held, [], None
        if held:
            text = "".join([f"{self._time(at)} {_LEVELS[level]} {_line(event, of)}\n" for at, level, event, of in held])
            try:
                self.stream.write(text)
            except (OSError, ValueError):
                pass  # as logging does: who can't be told what happens is not stopped by it

    def _time(self, at: float) -> str:
        second = int(at)
        if second != self._second:
            self._second, self._stamp = second, time.strftime(_Formatter.default_time_format, time.gmtime(second))
        return f"{self._stamp}.{int(at % 1 * 1_000):03d}Z"


class _Formatter(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.name != ROOT and not record.name.startswith(f"{ROOT}."):
            # A library's words: on one line, and of asyncio's only the first, for the others hold reprs of objects.
            first = record.message.partition("\n")[0]
            record.message = f"library.logged logger={render_value(record.name)} message={render_value(first)}"
        return super().formatMessage(record)

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        return "" if ei[1] is None else "\n".join(_story(ei[1]))


def _story(error: BaseException) -> list[str]:
    """An exception and what led to it: where and which, never what it says unless its words are our own."""
    lines: list[str] = []
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        lines += [*_story(before), "then"]
    lines += [line.rstrip("\n") for line in traceback.format_tb(error.__traceback__, limit=-MAX_FRAMES)]
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            lines += _story(inner)
    lines.append(type(error).__qualname__ + _own_words(error))
    return lines


def _own_words(error: BaseException) -> str:
    if isinstance(error, LlorchError):
        return f": {error.code}"
    return f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""


def configure(level: str) -> None:
    """Send this process's events of `level` and above to stderr. Other libraries are heard from WARNING on."""
    for handler in _ROOT.handlers:
        handler.flush()
    _ROOT.handlers[:] = [_Stderr()]
    _ROOT.setLevel(logging.WARNING)
    logging.getLogger(ROOT).setLevel(level.upper())
