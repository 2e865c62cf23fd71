"""From an HTTP request to a task: what the control reads of a body, and no more. Pure.

Owns the peek at a /v1 body (model, stream), the reading of a native one, and the headers that shape a task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from llorch.control.placement import Wish
from llorch.control.tasks import Task
from llorch.errors import Code, LlorchError, invalid
from llorch.messages import TASK_ID, TaskBody, decode_object, model_id_ok, parse

MAX_DEADLINE_MS = 86_400_000
MAX_KEY_CHARS = 255
MAX_ESTIMATED_TOKENS = 10_000_000  # the most that a native body may ask for
PRIORITIES = ("interactive", "batch")  # the first one is what is meant where nothing is said

# Headers of the client that go on to the node, and from there to the engine where it knows them.
_FORWARDED = ("content-type", "accept", "traceparent", "anthropic-version", "anthropic-beta", "openai-beta")
_JSON_TYPES = ("", "application/json", "application/x-www-form-urlencoded")  # the last is what curl -d says of JSON


def native_task(
    raw: bytes, headers: Mapping[str, str], *, owner: str, request_id: str, task_id: str, now: float
) -> Task:
    """The task of a native body. Raises INVALID_REQUEST that names the field."""
    body = parse(TaskBody, decode_object(raw))
    if body.on_node_loss == "continue":
        raise invalid("continuation on another node is not available yet", param="on_node_loss", hint='use "fail"')
    wanted = body.placement
    wish = Wish(
        model=body.model,
        pin=wanted.pin,
        prefer=tuple(wanted.prefer),
        avoid=tuple(wanted.avoid),
        allow_fallback=wanted.allow_fallback,
        zone=wanted.zone,
    )
    return Task(
        task_id=body.task_id or task_id,
        owner=owner,
        wish=wish,
        path="native",
        stream=True,
        detach=body.detach,
        body=raw,
        body_digest=hashlib.sha256(raw).hexdigest(),
        headers=_forwarded(headers, request_id),
        request_id=request_id,
        received_at=now,
        deadline_at=None if body.deadline_ms is None else now + body.deadline_ms / 1_000,
        priority=body.priority,
        max_tokens=body.max_tokens,
        key_digest=_key_digest(headers, owner),
        first_try=_first_try(headers),
        named=body.task_id is not None,
    )


def openai_task(
    path: str, raw: bytes, headers: Mapping[str, str], *, owner: str, request_id: str, task_id: str, now: float
) -> Task:
    """The task of a /v1 body, at a path that is served. Only `model` and `stream` are read; the node reads the rest."""
    content_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type in _JSON_TYPES or content_type.endswith("+json"):
        asked = decode_object(raw)
        model, stream = _peek(asked)
        max_tokens = _max_tokens(asked)
    elif "X-Llorch-Model" in headers:
        model, stream, max_tokens = headers["X-Llorch-Model"], False, None
        if not model_id_ok(model):
            raise invalid("X-Llorch-Model is not a model id", param="X-Llorch-Model")
    else:
        raise LlorchError(Code.UNSUPPORTED_MEDIA, "only JSON bodies name their model")
    if headers.get("X-Llorch-On-Node-Loss", "fail") != "fail":
        raise invalid(
            "continuation on another node is not available yet", param="X-Llorch-On-Node-Loss", hint='use "fail"'
        )
    deadline_ms = _deadline_ms(headers.get("X-Llorch-Deadline-Ms"))
    return Task(
        task_id=task_id,
        owner=owner,
        wish=Wish(model=model, pin=headers.get("X-Llorch-Pin") or None),
        path=path,
        stream=stream,
        max_tokens=max_tokens,
        detach=False,
        body=raw,
        body_digest=hashlib.sha256(raw).hexdigest(),
        headers=_forwarded(headers, request_id),
        request_id=request_id,
        received_at=now,
        deadline_at=None if deadline_ms is None else now + deadline_ms / 1_000,
        priority=_priority(headers.get("X-Llorch-Priority")),
        key_digest=_key_digest(headers, owner),
        first_try=_first_try(headers),
    )


def event_offset(headers: Mapping[str, str], query: Mapping[str, str]) -> int:
    """The log offset a reader wants: `?after=`, else `Last-Event-ID`, else 0."""
    text = query.get("after") or headers.get("Last-Event-ID") or ""
    if not text:
        return 0
    if len(text) > 12 or any(char not in "0123456789abcdefABCDEF" for char in text):
        raise invalid("not an event id: up to 12 hex digits", param="Last-Event-ID")
    return int(text, 16)


def event_attempt(headers: Mapping[str, str], query: Mapping[str, str]) -> int | None:
    """Of which attempt the offset is, where a reader says so: `?attempt=`, else `X-Llorch-Attempt`."""
    text = query.get("attempt") or headers.get("X-Llorch-Attempt") or ""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise invalid("not the number of an attempt", param="X-Llorch-Attempt")
    return int(text)


def check_task_id(task_id: str) -> str:
    if TASK_ID.fullmatch(task_id) is None:
        raise LlorchError(Code.TASK_NOT_FOUND, "no such task")
    return task_id


def _peek(body: dict[str, Any]) -> tuple[str, bool]:
    model, stream = body.get("model"), body.get("stream", False)
    if not isinstance(model, str) or not model:
        raise invalid("`model` is missing", param="model", hint="GET /v1/models lists them")
    if not model_id_ok(model):
        raise invalid("`model` is not a model id", param="model", hint="GET /v1/models lists them")
    if stream is not None and not isinstance(stream, bool):
        raise invalid("`stream` is not a boolean", param="stream")
    return model, bool(stream)


def _max_tokens(body: dict[str, Any]) -> int | None:
    """For an estimate alone: whether it is valid is for the node to say."""
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = body.get(name)
        if isinstance(value, int) and value > 0:
            return min(value, MAX_ESTIMATED_TOKENS)
    return None


def _deadline_ms(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and 1 <= int(text) <= MAX_DEADLINE_MS):
        raise invalid(f"X-Llorch-Deadline-Ms is not between 1 and {MAX_DEADLINE_MS}", param="X-Llorch-Deadline-Ms")
    return int(text)


def _priority(text: str | None) -> str:
    if text not in (None, *PRIORITIES):
        raise invalid(f"X-Llorch-Priority is not one of {', '.join(PRIORITIES)}", param="X-Llorch-Priority")
    return text or PRIORITIES[0]


def _key_digest(headers: Mapping[str, str], owner: str) -> str | None:
    """Keys are the client's to choose; what is kept and sent to nodes is a digest, which also keeps owners apart."""
    key = headers.get("Idempotency-Key")
    if key is None:
        return None
    if not (0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        raise invalid(f"Idempotency-Key is not 1 to {MAX_KEY_CHARS} printable characters", param="Idempotency-Key")
    return hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()


def _first_try(headers: Mapping[str, str]) -> bool:
    """Whether the client says that it sends this for the first time; one that says nothing may repeat itself."""
    return headers.get("X-Llorch-Try") == "1"


def _forwarded(headers: Mapping[str, str], request_id: str) -> dict[str, str]:
    """Those that are known, and plain enough for any request that they may become part of."""
    kept = {name: headers[name] for name in _FORWARDED if name in headers}
    plain = {name: text for name, text in kept.items() if len(text) <= 1_024 and text.isascii() and text.isprintable()}
    return plain | {"x-request-id": request_id}
