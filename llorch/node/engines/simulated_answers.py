"""How the simulated engine words its answers: as llama.cpp's server does, path by path. Pure.

Owns the JSON of chunks and whole answers of `/completion`, `/v1/completions`, `/v1/chat/completions`, `/v1/messages`
and `/v1/embeddings`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

EMBEDDING_SIZE = 8


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    lead = f"event: {name}\n" if name else ""
    return f"{lead}data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Told:
    """What an answer says of itself."""

    model: str
    tokens_in: int
    finish: str
    usage_wanted: bool
    tokens_out: int = 0
    seconds: float = 0.0

    def took(self, tokens_out: int, seconds: float) -> None:
        self.tokens_out, self.seconds = tokens_out, seconds

    def usage(self) -> dict[str, Any]:
        return {
            "completion_tokens": self.tokens_out,
            "prompt_tokens": self.tokens_in,
            "total_tokens": self.tokens_in + self.tokens_out,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    def timings(self) -> dict[str, Any]:
        ms = self.seconds * 1_000
        return {
            "cache_n": 0,
            "prompt_n": self.tokens_in,
            "prompt_ms": 1.0,
            "prompt_per_second": self.tokens_in * 1_000.0,
            "predicted_n": self.tokens_out,
            "predicted_ms": ms,
            "predicted_per_second": self.tokens_out / self.seconds if self.seconds else 0.0,
        }


class Shape(Protocol):
    """One path's wording."""

    def lead(self, told: Told) -> Iterator[bytes]: ...
    def token(self, told: Told, text: str) -> bytes: ...
    def end(self, told: Told) -> Iterator[bytes]: ...
    def whole(self, told: Told, text: str) -> dict[str, Any]: ...


class Chat:
    def _chunk(self, told: Told, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "choices": choices,
            "created": 1_700_000_000,
            "id": "chatcmpl-simulated",
            "model": told.model,
            "system_fingerprint": "simulated",
            "object": "chat.completion.chunk",
        }

    def _delta(self, told: Told, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return self._chunk(told, [{"finish_reason": finish, "index": 0, "delta": delta}])

    def lead(self, told: Told) -> Iterator[bytes]:
        yield event(self._delta(told, {"role": "assistant", "content": None}))

    def token(self, told: Told, text: str) -> bytes:
        return event(self._delta(told, {"content": text}))

    def end(self, told: Told) -> Iterator[bytes]:
        yield event(self._delta(told, {}, told.finish))
        if told.usage_wanted:
            yield event(self._chunk(told, []) | {"usage": told.usage(), "timings": told.timings()})
        yield DONE

    def whole(self, told: Told, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return self._chunk(told, [{"finish_reason": told.finish, "index": 0, "message": message}]) | {
            "object": "chat.completion",
            "usage": told.usage(),
            "timings": told.timings(),
        }


class Completion:
    def _chunk(self, told: Told, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "choices": choices,
            "created": 1_700_000_000,
            "id": "chatcmpl-simulated",
            "model": told.model,
            "system_fingerprint": "simulated",
            "object": "text_completion",
        }

    def _choice(self, told: Told, text: str, finish: str | None) -> dict[str, Any]:
        return self._chunk(told, [{"text": text, "index": 0, "logprobs": None, "finish_reason": finish}])

    def lead(self, told: Told) -> Iterator[bytes]:
        return iter(())

    def token(self, told: Told, text: str) -> bytes:
        return event(self._choice(told, text, None))

    def end(self, told: Told) -> Iterator[bytes]:
        yield event(self._choice(told, "", told.finish))
        if told.usage_wanted:
            yield event(self._chunk(told, []) | {"usage": told.usage(), "timings": told.timings()})
        yield DONE

    def whole(self, told: Told, text: str) -> dict[str, Any]:
        return self._choice(told, text, told.finish) | {"usage": told.usage(), "timings": told.timings()}


class Native:
    """llama.cpp's own `/completion`: no [DONE], the last chunk has `stop: true`."""

    def lead(self, told: Told) -> Iterator[bytes]:
        return iter(())

    def token(self, told: Told, text: str) -> bytes:
        return event({"index": 0, "content": text, "stop": False, "tokens_evaluated": told.tokens_in})

    def end(self, told: Told) -> Iterator[bytes]:
        yield event(self.whole(told, ""))

    def whole(self, told: Told, text: str) -> dict[str, Any]:
        return {
            "index": 0,
            "content": text,
            "stop": True,
            "model": told.model,
            "tokens_predicted": told.tokens_out,
            "tokens_evaluated": told.tokens_in,
            "stop_type": "limit" if told.finish == "length" else "eos",
            "timings": told.timings(),
        }


class Messages:
    """The Anthropic shape."""

    def _message(self, told: Told, content: list[dict[str, Any]], stop: str | None) -> dict[str, Any]:
        return {
            "id": "msg_simulated",
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": told.model,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {"input_tokens": told.tokens_in, "output_tokens": told.tokens_out, "cache_read_input_tokens": 0},
        }

    def _stop(self, told: Told) -> str:
        return "max_tokens" if told.finish == "length" else "end_turn"

    def lead(self, told: Told) -> Iterator[bytes]:
        yield event({"type": "message_start", "message": self._message(told, [], None)}, "message_start")
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        yield event(block, "content_block_start")

    def token(self, told: Told, text: str) -> bytes:
        delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
        return event(delta, "content_block_delta")

    def end(self, told: Told) -> Iterator[bytes]:
        yield event({"type": "content_block_stop", "index": 0}, "content_block_stop")
        delta = {"stop_reason": self._stop(told), "stop_sequence": None}
        usage = {"output_tokens": told.tokens_out}
        yield event({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def whole(self, told: Told, text: str) -> dict[str, Any]:
        return self._message(told, [{"type": "text", "text": text}], self._stop(told))


SHAPES: Mapping[str, Shape] = {
    "/v1/chat/completions": Chat(),
    "/v1/completions": Completion(),
    "/completion": Native(),
    "/v1/messages": Messages(),
}


def embeddings(model: str, texts: list[str]) -> dict[str, Any]:
    """A short vector per text that depends on the text alone."""
    rows = [
        {
            "object": "embedding",
            "index": index,
            "embedding": [((sum(text.encode()) + 1) * (place + 1) % 97) / 97 for place in range(EMBEDDING_SIZE)],
        }
        for index, text in enumerate(texts)
    ]
    count = sum(max(1, len(text.split())) for text in texts)
    return {
        "object": "list",
        "model": model,
        "data": rows,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
