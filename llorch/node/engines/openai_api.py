"""What an engine's answer to a task becomes in the task's log.

Surface:
    NativeDecoder(facts) -> Decoder                     the answer to a native task: engine bytes in, log bytes out
    openai_decoder(facts, request) -> Decoder           the answer to a `/v1` request, streamed or in one piece
    normalise_error(status, body) -> LlorchError        an engine's error answer in our words

Owns what an answer becomes in the log, with exactly one terminal event. What was asked is `requests`. Never does I/O,
keeps a connection or knows a slot. Bytes go in as they come from a 200 answer; nothing is given out before the first
content, so an attempt whose decoder gave out nothing may still run elsewhere: it ends with `error` set and no bytes.
Surfaces: https://platform.openai.com/docs/api-reference, https://docs.anthropic.com/en/api, llama.cpp tools/server.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic_core import from_json, to_json

from llorch.errors import Code, LlorchError
from llorch.messages import Timings
from llorch.node.engines.alike import Shape, shape_of
from llorch.node.engines.chunks import Chunk, Meter
from llorch.node.engines.chunks import Usage as Usage
from llorch.node.engines.chunks import normalise_error as normalise_error
from llorch.node.engines.requests import EngineRequest
from llorch.openai_paths import MESSAGES, SERVED
from llorch.sse import Splitter, SseError, parse

MAX_HELD_BYTES = 4 * 1024 * 1024  # one whole task log; a larger answer passes through unread

# ---------------------------------------------------------------- the answer


@dataclass(slots=True, unsafe_hash=True)  # see replicas.Lease
class TaskFacts:
    """Who a decoder speaks for; never changed. `accepted_at` is monotonic seconds, the start of ttft."""

    task_id: str
    node_id: str
    pool_id: str
    model: str
    attempt: int = 1
    accepted_at: float = 0.0
    request_id: str | None = None


class Decoder(Protocol):
    """One engine answer. `now` is monotonic seconds."""

    @property
    def first_content(self) -> bool:
        """Something was given out: the log is no longer empty."""

    @property
    def done(self) -> bool:
        """The terminal event was given out, or the attempt failed before any: nothing more will be."""

    @property
    def error(self) -> LlorchError | None: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def usage(self) -> Usage: ...
    @property
    def timings(self) -> Timings: ...
    def feed(self, data: bytes, now: float) -> bytes:
        """Log bytes that `data` completes; b"" while there is nothing to show."""

    def finish(self, now: float, cut: bool = False) -> bytes:
        """The engine's answer ended (`cut`: its connection broke). The last log bytes, with the terminal event."""

    def cancel(self, now: float) -> bytes:
        """The task was cancelled; no token follows."""

    def fail(self, error: LlorchError, now: float) -> bytes:
        """The attempt ends for a reason outside the answer (stall, deadline)."""


MOST_SHAPES = 8  # that chunks of one answer are looked for in vain

_UNREADABLE = "the engine sent what can't be read as a stream of events"
_DONE = "[DONE]"


def _payload(block: bytes) -> str | None:
    """The data of a block, None for comments. Nearly every block is one `data: ` line, so that is tried first."""
    if block.startswith(b"data: ") and block.find(b"\n") == len(block) - 2 and b"\r" not in block:
        return block[6:-2].decode("utf-8", "replace")
    event = parse(block)
    return None if event is None else event.data


def _value(payload: str) -> Mapping[str, Any]:
    """The chunk in `payload`. Raises SseError: an engine that sends something else is broken."""
    try:
        value = from_json(payload)
    except ValueError:  # it may be half of a surrogate pair, which the slower one takes
        try:
            value = json.loads(payload)
        except (ValueError, RecursionError):
            raise SseError(_UNREADABLE) from None
    if not isinstance(value, dict):
        raise SseError(_UNREADABLE)
    return value


def _utf8(raw: bytes) -> bytes:
    return raw.decode("utf-8", "replace").encode()


def _ended_early(cut: bool) -> LlorchError:
    how = "its connection broke" if cut else "it closed the stream"
    return LlorchError(Code.ENGINE_FAILED, f"the engine ended without finishing its answer: {how}")


# ---------------------------------------------------------------- decoders


class _Stream(ABC):
    """What both decoders of event streams share: cutting, reading, and that the first end is the only one.

    A subclass renders: what a block adds to the log, and the three ways to end it.
    """

    def __init__(self, facts: TaskFacts) -> None:
        self._facts = facts
        self._meter = Meter(facts.accepted_at)
        self._splitter = Splitter()
        self._complete = False  # the chunk that ends an answer was read: the text is whole, whatever follows
        self._shape: Shape | None = None  # of the chunks that are alike
        self._tries = MOST_SHAPES  # to find one, of which none has come twice
        self.first_content = False
        self.done = False
        self.error: LlorchError | None = None

    @property
    def finish_reason(self) -> str | None:
        return self._meter.finish_reason

    @property
    def usage(self) -> Usage:
        return self._meter.usage

    @property
    def timings(self) -> Timings:
        return self._meter.timings

    def feed(self, data: bytes, now: float) -> bytes:
        if self.done:
            return b""
        splitter, shape = self._splitter, self._shape
        if shape is not None and self.first_content and not splitter.waiting:
            texts, end = shape.run(data, 0)
            if end == len(data):  # nearly always, once an answer has begun
                self._tries = MOST_SHAPES
                self._meter.content(now, len(texts))
                return self._render_alike(data, texts)
        out: list[bytes] = []
        buffer, at = splitter.join(data), 0
        try:
            while not self.done:
                if self._shape is not None and self.first_content:
                    texts, end = self._shape.run(buffer, at)
                    if texts:
                        self._tries = MOST_SHAPES
                        self._meter.content(now, len(texts))
                        out.append(self._render_alike(buffer[at:end], texts))
                        at = end
                        continue
                end = splitter.end(buffer, at)
                if not end:
                    break
                self._take(buffer[at:end], now, out)
                at = end
            splitter.hold(buffer, at)
        except SseError:
            out.append(self.fail(LlorchError(Code.ENGINE_FAILED, _UNREADABLE), now))
        return out[0] if len(out) == 1 else b"".join(out)

    def finish(self, now: float, cut: bool = False) -> bytes:
        if self.done:
            return b""
        out: list[bytes] = []
        rest = self._splitter.finish()
        try:
            if rest.endswith((b"\r\r", b"\n\r")):  # a CR that waited for its LF did end the event
                self._take(rest, now, out)
        except SseError:
            out.append(self.fail(LlorchError(Code.ENGINE_FAILED, _UNREADABLE), now))
        if not self.done:
            out.append(self._end(now) if self._complete else self.fail(_ended_early(cut), now))
        return b"".join(out)

    def fail(self, error: LlorchError, now: float) -> bytes:
        if self.done:
            return b""
        self.done = True
        self.error = error
        return self._render_error(error) if self.first_content else b""

    def _take(self, block: bytes, now: float, out: list[bytes]) -> None:
        payload = None if self.done else _payload(block)
        if payload is None:
            return
        if payload.strip() == _DONE:
            out.append(self._end(now, block))
            return
        value = _value(payload)
        chunk = self._meter.read(value)
        if chunk.error is not None:
            out.append(self.fail(chunk.error, now))
            return
        if chunk.content:
            self._meter.content(now)
            if chunk.text and self._tries and not chunk.terminal and not Meter.counts(value):
                self._tries -= 1
                self._shape = shape_of(block, chunk.text)
        self._complete = self._complete or chunk.terminal
        out.append(self._render(block, chunk))

    @abstractmethod
    def _render(self, block: bytes, chunk: Chunk) -> bytes: ...
    @abstractmethod
    def _render_alike(self, data: bytes, texts: list[bytes]) -> bytes:
        """As `_render`, of several blocks in one, once the log has begun: `data` says `texts` and nothing else."""

    @abstractmethod
    def _end(self, now: float, block: bytes = b"") -> bytes: ...
    @abstractmethod
    def _render_error(self, error: LlorchError) -> bytes: ...


class NativeDecoder(_Stream):
    """Engine chunks to native events. Ids are log offsets after their event, from `offset` on."""

    def __init__(self, facts: TaskFacts, *, offset: int = 0) -> None:
        super().__init__(facts)
        self._offset = offset
        self._index = 0
        self._digest = hashlib.sha256()

    def cancel(self, now: float) -> bytes:
        """`end {canceled}`, after `started` if nothing was shown yet: a cancelled stream is a whole one."""
        if self.done:
            return b""
        self._meter.finish_reason = "canceled"
        return self._end(now)

    def _event(self, name: str, value: Mapping[str, Any]) -> bytes:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        rest = f"\nevent: {name}\ndata: {text}\n\n".encode("utf-8", "replace")
        self._offset += len(b"id: ") + 12 + len(rest)
        return b"id: %012x" % self._offset + rest

    def _begin(self) -> bytes:
        if self.first_content:
            return b""
        self.first_content = True
        facts = self._facts
        started = {"task_id": facts.task_id, "node_id": facts.node_id, "pool_id": facts.pool_id, "model": facts.model}
        return self._event("started", started | {"attempt": facts.attempt})

    def _render(self, block: bytes, chunk: Chunk) -> bytes:
        if not chunk.text:
            return b""
        begun = self._begin()
        return begun + self._token(chunk.text)

    def _token(self, text: str) -> bytes:
        raw = text.encode("utf-8", "replace")  # JSON may escape half a surrogate pair; UTF-8 has no such thing
        self._digest.update(raw)
        token = self._event("token", {"t": raw.decode(), "i": self._index})
        self._index += 1
        return token

    def _render_alike(self, data: bytes, texts: list[bytes]) -> bytes:
        joined = b"".join(texts)
        if not joined.isascii() or b"\\" in joined:
            return b"".join(self._token(json.loads(b'"%b"' % text)) for text in map(_utf8, texts))
        self._digest.update(joined)
        offset, index, out = self._offset, self._index, []
        for text in texts:  # as `_event` writes it, of text that JSON takes as it is
            rest = b'\nevent: token\ndata: {"t":"%b","i":%d}\n\n' % (text, index)
            offset += 16 + len(rest)
            out.append(b"id: %012x%b" % (offset, rest))
            index += 1
        self._offset, self._index = offset, index
        return b"".join(out)

    def _end(self, now: float, block: bytes = b"") -> bytes:
        begun = self._begin()
        self.done = True
        meter = self._meter
        reason = meter.finish_reason
        if reason != "canceled":
            meter.finish_reason = reason = "length" if reason in ("length", "max_tokens") else "stop"
        end = {
            "finish_reason": reason,
            "tokens_in": meter.usage.tokens_in,
            "tokens_out": meter.usage.tokens_out,
            "cached_tokens": meter.usage.cached_tokens,
            "ttft_ms": meter.ttft_ms,
            "decode_ms": meter.decode_ms,
            "sha256": self._digest.hexdigest(),
        }
        return begun + self._event("end", end)

    def _render_error(self, error: LlorchError) -> bytes:
        return self._event("error", error.to_wire(request_id=self._facts.request_id, task_id=self._facts.task_id))


class OpenAiDecoder(_Stream):
    """A `/v1` stream: the engine's own blocks, unchanged, less comments and the usage chunk nobody asked for."""

    def __init__(self, facts: TaskFacts, request: EngineRequest) -> None:
        super().__init__(facts)
        self._path = request.path
        self._asked_usage = request.client_asked_usage
        self._held = b""

    def cancel(self, now: float) -> bytes:
        if self.done:
            return b""
        self._meter.finish_reason = "canceled"
        return self.fail(LlorchError(Code.CANCELED, "the task was canceled"), now)

    def _render(self, block: bytes, chunk: Chunk) -> bytes:
        if chunk.usage_only and not self._asked_usage:
            return b""
        if self.first_content:
            return block
        self._held += block
        if not (chunk.content or chunk.terminal) and len(self._held) <= MAX_HELD_BYTES:
            return b""
        self.first_content = True
        held, self._held = self._held, b""
        return held

    def _render_alike(self, data: bytes, texts: list[bytes]) -> bytes:
        return data

    def _end(self, now: float, block: bytes = b"") -> bytes:
        self.first_content = self.done = True
        held, self._held = self._held, b""
        if SERVED[self._path].usage_on_request:
            return held + (block or b"data: [DONE]\n\n")
        return held + block

    def _render_error(self, error: LlorchError) -> bytes:
        wire = error.to_wire(request_id=self._facts.request_id, task_id=self._facts.task_id)
        if self._path == MESSAGES:  # Anthropic's clients look at the event's name
            return b"event: error\ndata: " + to_json({"type": "error", "error": wire}) + b"\n\n"
        return b"data: " + to_json({"error": wire}) + b"\n\n"


class OpenAiAnswer:
    """A `/v1` answer in one piece. It is held until it is whole, so that an engine that dies over it can be retried."""

    def __init__(self, facts: TaskFacts) -> None:
        self._meter = Meter(facts.accepted_at)
        self._held = bytearray()
        self.first_content = False
        self.done = False
        self.error: LlorchError | None = None

    @property
    def finish_reason(self) -> str | None:
        return self._meter.finish_reason

    @property
    def usage(self) -> Usage:
        return self._meter.usage

    @property
    def timings(self) -> Timings:
        return self._meter.timings

    def feed(self, data: bytes, now: float) -> bytes:
        if self.done:
            return b""
        if self.first_content:
            return data
        self._held += data
        if len(self._held) <= MAX_HELD_BYTES:
            return b""
        self.first_content = True
        return self._release()

    def finish(self, now: float, cut: bool = False) -> bytes:
        if self.done:
            return b""
        if cut:
            return self.fail(_ended_early(cut), now)
        self.done = True
        if self.first_content:
            return b""
        try:
            chunk = self._meter.read(_value(self._held.decode("utf-8", "replace")))
        except SseError:
            self.error = LlorchError(Code.ENGINE_FAILED, "the engine sent an answer that is not JSON")
            return b""
        if chunk.error is not None:
            self.error = chunk.error
            return b""
        self._meter.mark(now)
        self.first_content = True
        return self._release()

    def cancel(self, now: float) -> bytes:
        if not self.done:  # an answer that is whole stays so, though not all of it was read yet
            self._meter.finish_reason = "canceled"
        return self.fail(LlorchError(Code.CANCELED, "the task was canceled"), now)

    def fail(self, error: LlorchError, now: float) -> bytes:
        """Nothing can be said inside a JSON body: `error` says it."""
        if not self.done:
            self.done = True
            self.error = error
        return b""

    def _release(self) -> bytes:
        held = bytes(self._held)
        self._held.clear()
        return held


def openai_decoder(facts: TaskFacts, request: EngineRequest) -> Decoder:
    """The decoder for a `/v1` request's answer."""
    return OpenAiDecoder(facts, request) if request.stream else OpenAiAnswer(facts)
