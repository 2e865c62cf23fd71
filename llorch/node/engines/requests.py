"""What an engine is asked: from a task's body to the request that goes to it.

Owns what of a native task an engine is told and in which of its words, and how a `/v1` body is changed on its way: what
it may hold at all is `fields`. Surfaces: https://platform.openai.com/docs/api-reference, llama.cpp tools/server. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from llorch.errors import invalid
from llorch.messages import TaskBody
from llorch.node.engines import fields
from llorch.openai_paths import CHAT, COMPLETIONS, served

NATIVE_PARAMETERS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repeat_penalty",
    "seed",
    "stop",
    "grammar",
    "json_schema",
)


@dataclass(slots=True, unsafe_hash=True)  # see replicas.Lease
class EngineRequest:
    """What to POST to an engine as application/json; never changed. `path` comes after its URL."""

    path: str
    body: bytes
    stream: bool
    client_asked_usage: bool = True


def encode_native(body: TaskBody, model: str, engine: str = "") -> EngineRequest:
    """A native task for an engine that knows its model as `model`. Always streams, always with usage.

    `engine` is the engine's name: for the same thing they have names of their own. Of one that says nothing we know it
    is taken to speak as llama.cpp and OpenAI do.
    """
    wire: dict[str, Any] = {"model": model}
    fields.check_media("messages", body.messages)
    if body.messages is not None:
        # A native stream is all that the model says; parsed thoughts would go missing from it.
        wire |= {"messages": body.messages, **_thoughts_as_text(engine)}
    else:
        wire["prompt"] = body.prompt
    for name in NATIVE_PARAMETERS:
        value = getattr(body, name)
        if value is not None:
            wire |= _word(engine, name, value, chat=body.messages is not None)
    wire |= {"stream": True, "stream_options": {"include_usage": True}}
    return EngineRequest(COMPLETIONS if body.messages is None else CHAT, to_json(wire), stream=True)


_LLAMA_CPP = frozenset({"llamacpp", "llama-server", "simulated"})
_VLLM, _SGLANG = "vllm", "sglang"


def _thoughts_as_text(engine: str) -> dict[str, Any]:
    """vLLM has no such field: its thoughts come in a field of their own, which is read as text (`chunks`)."""
    if engine == _SGLANG:
        return {"separate_reasoning": False}
    return {} if engine == _VLLM else {"reasoning_format": "none"}


def _word(engine: str, name: str, value: Any, *, chat: bool) -> dict[str, Any]:
    """A native parameter as `engine` calls it. vLLM: docs/features/structured_outputs; SGLang: docs/advanced_features/
    structured_outputs; others know OpenAI's form of a schema in chats.
    """
    if name == "repeat_penalty" and engine in (_VLLM, _SGLANG):
        return {"repetition_penalty": value}
    if name == "grammar" and engine == _VLLM:
        return {"structured_outputs": {"grammar": value}}
    if name == "grammar" and engine == _SGLANG:
        return {"ebnf": value}
    if name == "json_schema" and engine not in _LLAMA_CPP and (chat or engine in (_VLLM, _SGLANG)):
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}}
    return {name: value}


def encode_openai(path: str, body: Mapping[str, Any], model: str, raw: bytes = b"") -> EngineRequest:
    """A client's `/v1/*` body for an engine that knows its model as `model`. Raises LlorchError for what is refused.

    `raw`: the body as it came, which goes on as it is where nothing in it has to be another.
    """
    where = served(path)
    fields.check(body)
    _one_sequence(path, body)
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise invalid("`stream` is true or false", param="stream")
    streamed = bool(stream) and where.streams
    wire = fields.without_refused(body)
    same = bool(raw) and len(wire) == len(body) and body.get("model") == model
    wire["model"] = model
    asked = True
    if streamed and where.usage_on_request:
        options = body.get("stream_options")
        if options is not None and not isinstance(options, Mapping):
            raise invalid("`stream_options` is an object", param="stream_options")
        asked = (options or {}).get("include_usage") is True
        same = same and asked
        wire["stream_options"] = {**(options or {}), "include_usage": True}
    return EngineRequest(where.path, raw if same else to_json(wire), stream=streamed, client_asked_usage=asked)


def _one_sequence(path: str, body: Mapping[str, Any]) -> None:
    """A request is accepted against one slot, so it may run one sequence."""
    for name in ("n", "best_of"):
        count = body.get(name)
        if count is not None and (isinstance(count, bool) or count != 1):
            raise invalid(
                f"`{name}` above 1 is not available: each choice takes a slot; send more requests", param=name
            )
    prompt = body.get("prompt")
    if path == COMPLETIONS and isinstance(prompt, list) and len(prompt) > 1 and _several_prompts(prompt):
        raise invalid("give one prompt: each takes a slot; send more requests", param="prompt")


def _several_prompts(prompt: list[Any]) -> bool:
    """A list of numbers, or of numbers and strings, is one prompt given as tokens; of strings or lists, several."""
    return all(isinstance(part, str) for part in prompt) or any(isinstance(part, list | dict) for part in prompt)
