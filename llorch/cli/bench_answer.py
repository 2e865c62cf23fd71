"""What one request of `llorch bench` comes to: from the reads of its connection, each with its time, to a sample.

Done after the measurement, as reading JSON would cost time in its midst. A token has the time of the read that brought
it; two that one read brought are no time apart, as whoever reads them sees it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llorch import sse

CUT = "cut stream"
TIMEOUT = "timeout"
SILENT = "no output"
NOT_A_STREAM = "not a stream"
_TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")  # of a delta: each is output


@dataclass(slots=True)
class Exchange:
    """One request as it went: `times[i]` is when the body's bytes `parts[i]` were read. Seconds of one clock.

    `fault`: what ended it otherwise than by an answer of the endpoint's.
    """

    due_s: float
    sent_s: float = 0.0
    ended_s: float = 0.0
    status: int = 0
    content_type: str = ""
    fault: str | None = None
    times: list[float] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    @property
    def weight(self) -> int:
        """Bytes of memory, about: a read costs a time and two objects beside what it brought."""
        return 500 + self.size + 100 * len(self.parts)

    @property
    def answered(self) -> bool:
        return self.fault is None and self.status == 200


@dataclass(frozen=True, slots=True)
class Sample:
    """`token_s`: when each chunk with output was read. `tokens` and `prompt_tokens` are the endpoint's own counts if it
    gave any (`counted`); else the chunks. `error` is None if all of the answer came.
    """

    due_s: float
    sent_s: float
    ended_s: float
    token_s: tuple[float, ...] = ()
    tokens: int = 0
    prompt_tokens: int | None = None
    counted: bool = False
    error: str | None = None


def read_answer(exchange: Exchange) -> Sample:
    due_s, sent_s, ended_s = exchange.due_s, exchange.sent_s, exchange.ended_s
    if exchange.status not in (0, 200):
        return Sample(due_s, sent_s, ended_s, error=refusal(exchange.status, b"".join(exchange.parts)))
    if exchange.status == 200 and not exchange.content_type.startswith("text/event-stream"):
        return Sample(due_s, sent_s, ended_s, error=exchange.fault or NOT_A_STREAM)
    stream = _Stream()
    try:
        splitter = sse.Splitter()
        for at_s, part in zip(exchange.times, exchange.parts, strict=True):
            for block in splitter.feed(part):
                stream.take(block, at_s)
    except sse.SseError:
        stream.error = stream.error or NOT_A_STREAM
    error = stream.error or exchange.fault
    if error is None and not stream.finished:
        error = CUT
    if error is None and not stream.token_s:
        error = SILENT
    usage = stream.usage
    tokens, prompt_tokens = _count(usage.get("completion_tokens")), _count(usage.get("prompt_tokens"))
    counted = tokens is not None and error is None
    return Sample(
        due_s, sent_s, ended_s, tuple(stream.token_s),
        tokens=tokens if tokens is not None and counted else len(stream.token_s),
        prompt_tokens=prompt_tokens, counted=counted, error=error,
    )  # fmt: skip


class _Stream:
    """A stream of chat completion chunks as far as it matters here."""

    def __init__(self) -> None:
        self.token_s: list[float] = []
        self.usage: Mapping[str, Any] = {}
        self.finished = False
        self.error: str | None = None

    def take(self, block: bytes, at_s: float) -> None:
        event = sse.parse(block)
        if event is None:
            return
        if event.data == "[DONE]":
            self.finished = True
            return
        try:
            chunk = json.loads(event.data)
        except (ValueError, RecursionError):
            self.error = self.error or NOT_A_STREAM
            return
        if not isinstance(chunk, dict):
            return
        if "error" in chunk:
            self.error = self.error or f"in the stream: {_code(chunk) or 'error'}"
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict):
                continue
            self.finished = self.finished or bool(choice.get("finish_reason"))
            delta = choice.get("delta")
            if isinstance(delta, dict) and any(delta.get(name) for name in _TEXTS):
                self.token_s.append(at_s)


def refusal(status: int, body: bytes) -> str:
    """`HTTP 429 RATE_LIMITED`: the status, and the code that the body names."""
    try:
        code = _code(json.loads(body))
    except (ValueError, RecursionError):
        code = None
    return f"HTTP {status} {code}" if code else f"HTTP {status}"


def message_of(body: bytes) -> str | None:
    """What a refusal says to a person, in the shapes that there are."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    error = said.get("error")
    found = error.get("message") if isinstance(error, dict) else error or said.get("message") or said.get("detail")
    return found if isinstance(found, str) else None


def code_of(body: bytes) -> str | None:
    try:
        return _code(json.loads(body))
    except (ValueError, RecursionError):
        return None


def _code(said: object) -> str | None:
    """The code of an error object: a word, or else its type. Engines put the status there, which says nothing new."""
    error = said.get("error") if isinstance(said, dict) else None
    if not isinstance(error, dict):
        return None
    words = (error.get("code"), error.get("type"))
    found = next((word for word in words if isinstance(word, str) and word and not word.isdigit()), None)
    return None if found is None else found[:60]


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
