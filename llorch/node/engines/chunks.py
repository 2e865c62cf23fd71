"""What an engine's answer means, chunk by chunk, whichever of its surfaces it came from.

Owns the reading of chat, completion, Responses and Anthropic JSON (text, usage, timings, finish reason, errors) and the
wording of an engine's errors in our codes. Never renders anything, and never quotes what a model was asked or said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llorch.errors import Code, LlorchError, invalid
from llorch.messages import Timings

MAX_MESSAGE_CHARS = 500
MAX_REASON_CHARS = 64
MAX_COUNT = 2**53  # what an engine says beyond it is no number of tokens
MAX_RATE = 1e9  # tokens per second; also keeps Infinity out of what is reported


# ---------------------------------------------------------------- errors


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text[:MAX_MESSAGE_CHARS]).strip()


def _error_object(body: object) -> Mapping[str, Any]:
    """The innermost error object of an engine's answer, whichever of the known shapes it has."""
    if isinstance(body, Mapping):
        inner = body.get("error")
        if isinstance(inner, Mapping):
            return inner
        return {"message": inner} if isinstance(inner, str) else body
    return {}


_TOO_LONG = re.compile(
    r"maximum context length|exceeds? the (?:available )?context|context size|longer than the model's context",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(r"\bmodels?\b.{0,300}(not found|not exist)|not found.{0,40}\bmodel\b", re.IGNORECASE)


def normalise_error(status: int, body: bytes) -> LlorchError:
    """An engine's non-2xx answer. Its own words pass only if they are about the request (4xx), bounded and cleaned."""
    try:
        wire = _error_object(json.loads(body))
    except (ValueError, RecursionError):
        wire = {}
    return _normalised(status, wire)


def _normalised(status: int, wire: Mapping[str, Any]) -> LlorchError:
    said = wire.get("message")
    message = _clean(said) if isinstance(said, str) else ""
    if status == 400 and (wire.get("type") == "exceed_context_size_error" or _TOO_LONG.search(message)):
        sizes = {name: size for name in ("n_prompt_tokens", "n_ctx") if (size := _count(wire.get(name))) is not None}
        text = "the prompt is longer than the context of a slot"
        if len(sizes) == 2:
            text += f" ({sizes['n_prompt_tokens']} tokens, room for {sizes['n_ctx']})"
        return LlorchError(Code.CONTEXT_LENGTH_EXCEEDED, text, details=sizes or None)
    if status == 404 and (wire.get("code") == "model_not_found" or _NO_MODEL.search(message)):
        # Where others may load and unload: the client asked for what we said is here.
        return LlorchError(Code.MODEL_NOT_AVAILABLE, "the engine does not have the model that its pool says it has")
    if status == 501:
        return invalid(message or "the engine of this model does not support this route")
    if status == 413:
        return LlorchError(Code.PAYLOAD_TOO_LARGE, "the engine refuses a body of this size")
    if status == 429:
        # Not ALL_SLOTS_BUSY: a slot is free here, so the task would come back at once, again and again.
        return LlorchError(Code.MODEL_NOT_AVAILABLE, "the engine is busy with requests of others")
    if status == 503:
        return LlorchError(
            Code.MODEL_NOT_AVAILABLE, "the engine is not ready: its model is loading, or it is overloaded"
        )
    if 400 <= status < 500 and status not in (401, 403, 408):  # those three are between the node and its engine
        return invalid(message or f"the engine refused the request (HTTP {status})")
    return LlorchError(Code.ENGINE_FAILED, f"the engine answered HTTP {status}")


def stream_error(wire: object) -> LlorchError:
    """An error object inside a stream that had begun with 200."""
    error = _error_object({"error": wire})
    code = error.get("code")
    if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600:
        return _normalised(code, error)
    return LlorchError(Code.ENGINE_FAILED, "the engine reported an error in its stream")


# ---------------------------------------------------------------- reading chunks


@dataclass(slots=True)
class Usage:
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class Chunk:
    """What one JSON value of a stream means, whichever surface it is from."""

    text: str = ""
    content: bool = False
    terminal: bool = False
    usage_only: bool = False
    error: LlorchError | None = None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT else None


def _rate(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < MAX_RATE:
        return None
    return float(value)


def _reason(value: object) -> str | None:
    return _clean(value)[:MAX_REASON_CHARS] if isinstance(value, str) else None


_THOUGHT_KEYS = ("reasoning_content", "reasoning")  # old and new name of one thing: some send both
_GIVEN_UP = frozenset({"abort", "error"})  # of vLLM and SGLang: what came so far is no whole answer
_OTHER_CONTENT_KEYS = ("tool_calls", "function_call", "refusal", "audio")
_ENDED_RESPONSES = {"response.completed": "stop", "response.incomplete": "length"}


class Meter:
    """What an answer amounted to: usage, finish reason, times. Mutated by the decoder that owns it."""

    __slots__ = (
        "_accepted_at",
        "_decode_tps",
        "_first_at",
        "_last_at",
        "_prompt_tps",
        "counted",
        "finish_reason",
        "usage",
    )

    def __init__(self, accepted_at: float) -> None:
        self._accepted_at = accepted_at
        self._first_at: float | None = None
        self._last_at: float | None = None
        self._prompt_tps: float | None = None
        self._decode_tps: float | None = None
        self.finish_reason: str | None = None
        self.usage = Usage()
        self.counted = 0  # chunks with content: what tokens_out is until the engine has said it

    def content(self, now: float, count: int = 1) -> None:
        """Streamed chunks with content came."""
        self.counted += count
        if self.counted > self.usage.tokens_out:
            self.usage.tokens_out = self.counted
        if self._first_at is None:
            self._first_at = now
        self._last_at = now

    def mark(self, now: float) -> None:
        if self._first_at is None:
            self._first_at = now
        self._last_at = now

    @property
    def ttft_ms(self) -> float | None:
        return None if self._first_at is None else round((self._first_at - self._accepted_at) * 1000, 3)

    @property
    def decode_ms(self) -> float | None:
        if self._first_at is None or self._last_at is None:
            return None
        return round((self._last_at - self._first_at) * 1000, 3)

    @property
    def timings(self) -> Timings:
        return Timings(
            ttft_ms=self.ttft_ms, decode_ms=self.decode_ms, prompt_tps=self._prompt_tps, decode_tps=self._decode_tps
        )

    def read(self, value: Mapping[str, Any]) -> Chunk:
        """One chunk, or one whole answer that was not streamed."""
        kind = value.get("type")
        if value.get("error") or kind == "error":
            return Chunk(error=stream_error(value.get("error")))
        if isinstance(timings := value.get("timings"), Mapping):
            self._read_timings(timings)
        if isinstance(usage := value.get("usage"), Mapping):
            self._read_usage(usage)
        choices = value.get("choices")
        if isinstance(choices, list):
            return self._read_choices(choices, usage_only=not choices and isinstance(usage, Mapping))
        return self._read_named(kind, value) if isinstance(kind, str) else Chunk()

    @staticmethod
    def counts(value: Mapping[str, Any]) -> bool:
        """Whether a chunk says anything that is to be counted, beside its text."""
        return isinstance(value.get("usage"), Mapping) or isinstance(value.get("timings"), Mapping)

    def _read_usage(self, usage: Mapping[str, Any]) -> None:
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        cached = _count(details.get("cached_tokens")) if isinstance(details, Mapping) else None
        sent = _count(usage.get("prompt_tokens", usage.get("input_tokens")))
        if cached is None and (cached := _count(usage.get("cache_read_input_tokens"))) is not None and sent is not None:
            # Anthropic counts as input what was neither read from a cache nor written to one.
            sent += cached + (_count(usage.get("cache_creation_input_tokens")) or 0)
        got = _count(usage.get("completion_tokens", usage.get("output_tokens")))
        if sent is not None:
            self.usage.tokens_in = sent
        if got is not None:
            self.usage.tokens_out = got
        if cached is not None:
            self.usage.cached_tokens = cached

    def _read_timings(self, timings: Mapping[str, Any]) -> None:
        self._prompt_tps = _rate(timings.get("prompt_per_second"))
        self._decode_tps = _rate(timings.get("predicted_per_second"))
        if (cached := _count(timings.get("cache_n"))) is not None:
            self.usage.cached_tokens = cached

    def _read_choices(self, choices: list[Any], *, usage_only: bool) -> Chunk:
        chunk = Chunk(usage_only=usage_only)
        texts: list[str] = []
        for choice in choices:
            if not isinstance(choice, Mapping):
                continue
            part = choice.get("delta") or choice.get("message")
            if isinstance(part, Mapping):
                thoughts = (text for key in _THOUGHT_KEYS if isinstance(text := part.get(key), str) and text)
                texts += [next(thoughts, ""), text if isinstance(text := part.get("content"), str) else ""]
                chunk.content = chunk.content or any(part.get(key) for key in _OTHER_CONTENT_KEYS)
            elif isinstance(text := choice.get("text"), str):
                texts.append(text)
            if (reason := _reason(choice.get("finish_reason"))) is not None:
                if reason in _GIVEN_UP:
                    return Chunk(error=LlorchError(Code.ENGINE_FAILED, "the engine gave the request up"))
                self.finish_reason = reason
                chunk.terminal = True
        chunk.text = "".join(texts)
        chunk.content = chunk.content or bool(chunk.text)
        return chunk

    def _read_named(self, kind: str, value: Mapping[str, Any]) -> Chunk:
        """The Responses and Anthropic surfaces name their events."""
        if kind == "response.failed":
            return Chunk(error=LlorchError(Code.ENGINE_FAILED, "the engine reported an error in its stream"))
        if kind.startswith("response."):
            response = value.get("response")
            if isinstance(response, Mapping) and isinstance(usage := response.get("usage"), Mapping):
                self._read_usage(usage)
            if kind in _ENDED_RESPONSES:
                self.finish_reason = _ENDED_RESPONSES[kind]
            return Chunk(content=kind.endswith(".delta"), terminal=kind in _ENDED_RESPONSES)
        if kind == "message_start" and isinstance(message := value.get("message"), Mapping):
            if isinstance(usage := message.get("usage"), Mapping):
                self._read_usage(usage)
        elif kind == "message_delta" and isinstance(delta := value.get("delta"), Mapping):
            if (reason := _reason(delta.get("stop_reason"))) is not None:
                self.finish_reason = reason
        elif kind == "message" and (reason := _reason(value.get("stop_reason"))) is not None:
            self.finish_reason = reason
        return Chunk(content=kind == "content_block_delta", terminal=kind == "message_stop")
