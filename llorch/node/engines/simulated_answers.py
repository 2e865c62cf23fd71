"""How the simulated engine words its answers: as llama.cpp's server does, path by path. Pure.

Owns the JSON of chunks and whole answers of `/completion`, `/v1/completions`, `/v1/chat/completions`, `/v1/responses`,
`/v1/messages` and `/v1/embeddings`, and of `/metrics`. Measured on llama.cpp's server in xllamacpp 2026.10: a chat has
its usage in a chunk of no choices, and only when asked; a completion has it on its last choice, always.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

EMBEDDING_SIZE = 8
CREATED = 1_700_000_000  # answers are the same at any time


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    lead = f"event: {name}\n" if name else ""
    return f"{lead}data: {_dump(value)}\n\n".encode()


_dump = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Told:
    """What an answer says of itself."""

    model: str
    tokens_in: int
    finish: str
    usage_wanted: bool
    tokens_out: int = 0  # so far
    prompt_s: float = 0.0
    predicted_s: float = 0.0

    def usage(self) -> dict[str, Any]:
        return {
            "completion_tokens": self.tokens_out,
            "prompt_tokens": self.tokens_in,
            "total_tokens": self.tokens_in + self.tokens_out,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    def timings(self) -> dict[str, Any]:
        return {
            "cache_n": 0,
            "prompt_n": self.tokens_in,
            "prompt_ms": round(self.prompt_s * 1_000, 3),
            "prompt_per_token_ms": self.prompt_s * 1_000 / self.tokens_in if self.tokens_in else 0.0,
            "prompt_per_second": self.tokens_in / self.prompt_s if self.prompt_s else 0.0,
            "predicted_n": self.tokens_out,
            "predicted_ms": round(self.predicted_s * 1_000, 3),
            "predicted_per_token_ms": self.predicted_s * 1_000 / self.tokens_out if self.tokens_out else 0.0,
            "predicted_per_second": self.tokens_out / self.predicted_s if self.predicted_s else 0.0,
        }


class Shape(Protocol):
    """One path's wording. `text` is a token's in `token`, the whole answer's in `end` and `whole`."""

    def lead(self, told: Told) -> Iterator[bytes]: ...
    def token(self, told: Told, text: str) -> bytes: ...
    def end(self, told: Told, text: str) -> Iterator[bytes]: ...
    def whole(self, told: Told, text: str) -> dict[str, Any]: ...


class Chat:
    def _chunk(self, told: Told, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "choices": choices,
            "created": CREATED,
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

    def end(self, told: Told, text: str) -> Iterator[bytes]:
        last = self._delta(told, {}, told.finish)
        if told.usage_wanted:
            yield event(last)
            yield event(self._chunk(told, []) | {"usage": told.usage(), "timings": told.timings()})
        else:
            yield event(last | {"timings": told.timings()})
        yield DONE

    def whole(self, told: Told, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return self._chunk(told, [{"finish_reason": told.finish, "index": 0, "message": message}]) | {
            "object": "chat.completion",
            "usage": told.usage(),
            "timings": told.timings(),
        }


class Completion:
    def _choice(self, told: Told, text: str, finish: str | None) -> dict[str, Any]:
        return {
            "choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": finish}],
            "created": CREATED,
            "model": told.model,
            "system_fingerprint": "simulated",
            "object": "text_completion",
            "id": "chatcmpl-simulated",
        }

    def lead(self, told: Told) -> Iterator[bytes]:
        return iter(())

    def token(self, told: Told, text: str) -> bytes:
        return event(self._choice(told, text, None))

    def end(self, told: Told, text: str) -> Iterator[bytes]:
        yield event(self.whole(told, ""))
        yield DONE

    def whole(self, told: Told, text: str) -> dict[str, Any]:
        return self._choice(told, text, told.finish) | {"usage": told.usage(), "timings": told.timings()}


class Native:
    """llama.cpp's own `/completion`: no [DONE], the last chunk has `stop: true`."""

    def lead(self, told: Told) -> Iterator[bytes]:
        return iter(())

    def token(self, told: Told, text: str) -> bytes:
        return event(
            {
                "index": 0,
                "content": text,
                "tokens": [told.tokens_out],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": told.tokens_out,
                "tokens_evaluated": told.tokens_in,
            }
        )

    def end(self, told: Told, text: str) -> Iterator[bytes]:
        yield event(self.whole(told, ""))

    def whole(self, told: Told, text: str) -> dict[str, Any]:
        return {
            "index": 0,
            "content": text,
            "tokens": [],
            "id_slot": 0,
            "stop": True,
            "model": told.model,
            "tokens_predicted": told.tokens_out,
            "tokens_evaluated": told.tokens_in,
            "has_new_line": False,
            "truncated": False,
            "stop_type": "limit" if told.finish == "length" else "eos",
            "stopping_word": "",
            "tokens_cached": told.tokens_in + told.tokens_out,
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

    def end(self, told: Told, text: str) -> Iterator[bytes]:
        yield event({"type": "content_block_stop", "index": 0}, "content_block_stop")
        delta = {"stop_reason": self._stop(told), "stop_sequence": None}
        usage = {"output_tokens": told.tokens_out}
        yield event({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def whole(self, told: Told, text: str) -> dict[str, Any]:
        return self._message(told, [{"type": "text", "text": text}], self._stop(told))


class Responses:
    """OpenAI's newer shape. llama.cpp says `completed` also of an answer that was cut at its limit."""

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}

    def _item(self, text: str, status: str = "completed") -> dict[str, Any]:
        content = [self._part(text)] if status == "completed" else []
        return {"type": "message", "status": status, "id": "msg_simulated", "content": content, "role": "assistant"}

    def lead(self, told: Told) -> Iterator[bytes]:
        response = {"id": "resp_simulated", "object": "response", "status": "in_progress"}
        for name in ("response.created", "response.in_progress"):
            yield event({"type": name, "response": response}, name)
        name = "response.output_item.added"
        yield event({"type": name, "item": self._item("", "in_progress")}, name)
        name = "response.content_part.added"
        yield event({"type": name, "item_id": "msg_simulated", "part": {"type": "output_text", "text": ""}}, name)

    def token(self, told: Told, text: str) -> bytes:
        name = "response.output_text.delta"
        return event({"type": name, "item_id": "msg_simulated", "delta": text}, name)

    def end(self, told: Told, text: str) -> Iterator[bytes]:
        name = "response.output_text.done"
        yield event({"type": name, "item_id": "msg_simulated", "text": text}, name)
        name = "response.content_part.done"
        yield event({"type": name, "item_id": "msg_simulated", "part": self._part(text)}, name)
        name = "response.output_item.done"
        yield event({"type": name, "item": self._item(text)}, name)
        name = "response.completed"
        yield event({"type": name, "response": self.whole(told, text), "timings": told.timings()}, name)

    def whole(self, told: Told, text: str) -> dict[str, Any]:
        return {
            "id": "resp_simulated",
            "object": "response",
            "created_at": CREATED,
            "completed_at": CREATED,
            "status": "completed",
            "model": told.model,
            "output": [self._item(text)],
            "usage": {
                "input_tokens": told.tokens_in,
                "output_tokens": told.tokens_out,
                "total_tokens": told.tokens_in + told.tokens_out,
                "input_tokens_details": {"cached_tokens": 0},
            },
        }


SHAPES: Mapping[str, Shape] = {
    "/v1/chat/completions": Chat(),
    "/v1/completions": Completion(),
    "/completion": Native(),
    "/v1/messages": Messages(),
    "/v1/responses": Responses(),
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


def metrics(active: int, waiting: int, tokens_in: int, tokens_out: int) -> str:
    """Prometheus text, with llama.cpp's names. Here each token is one decode."""
    rows = (
        ("counter", "prompt_tokens_total", tokens_in),
        ("counter", "prompt_tokens_cached_total", 0),
        ("counter", "tokens_predicted_total", tokens_out),
        ("counter", "n_decode_total", tokens_out),
        ("gauge", "requests_processing", active),
        ("gauge", "requests_deferred", waiting),
    )
    return "".join(f"# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {value}\n" for kind, name, value in rows)
