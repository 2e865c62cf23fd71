"""Every error that leaves llorch: one tree, one table, one JSON shape.

    LlorchError                 carries a Code; status, type and whether a retry can help come from the table
    └── ConfigError             a fault in settings: exit code 2, nothing was started

Owns the codes, their HTTP status, the OpenAI `type` word, whether a retry can help, and the hint a person gets when the
raiser has nothing better to say. Callers branch on codes, never on text. Never holds a secret, a prompt or an output:
messages are written by llorch, not copied from a peer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

Failure = TypeVar("Failure", bound=Exception)

MAX_WIRE_TEXT_CHARS = 2_000  # of one text in a peer's error; ours are a line or two
MAX_DETAILS_CHARS = 16 * 1024  # of its details; more than that is no help to anybody
MAX_RETRY_AFTER_MS = 24 * 3_600_000


class Code(StrEnum):
    """Stable error codes; they may be added to, never renamed."""

    INVALID_REQUEST = "INVALID_REQUEST"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    FORBIDDEN = "FORBIDDEN"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    TASK_NOT_FOUND = "TASK_NOT_FOUND"
    NODE_NOT_FOUND = "NODE_NOT_FOUND"
    POOL_NOT_FOUND = "POOL_NOT_FOUND"
    NODE_UNKNOWN = "NODE_UNKNOWN"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    LEASE_STALE = "LEASE_STALE"
    NODE_ID_CONFLICT = "NODE_ID_CONFLICT"
    NODE_QUARANTINED = "NODE_QUARANTINED"
    CONFLICT = "CONFLICT"
    GAP = "GAP"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    UNSUPPORTED_MEDIA = "UNSUPPORTED_MEDIA"
    UNTRUSTED_ADDRESS = "UNTRUSTED_ADDRESS"
    IDEMPOTENCY_MISMATCH = "IDEMPOTENCY_MISMATCH"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    UPGRADE_REQUIRED = "UPGRADE_REQUIRED"
    RATE_LIMITED = "RATE_LIMITED"
    QUEUE_FULL = "QUEUE_FULL"
    ALL_SLOTS_BUSY = "ALL_SLOTS_BUSY"
    CANCELED = "CANCELED"
    INTERNAL = "INTERNAL"
    NODE_LOST = "NODE_LOST"
    ENGINE_FAILED = "ENGINE_FAILED"
    MODEL_NOT_AVAILABLE = "MODEL_NOT_AVAILABLE"
    NO_CAPACITY = "NO_CAPACITY"
    DRAINING = "DRAINING"
    RECOVERING = "RECOVERING"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    ENGINE_STALLED = "ENGINE_STALLED"
    INSUFFICIENT_STORAGE = "INSUFFICIENT_STORAGE"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a code says when its raiser adds nothing. `type` is from the OpenAI SDKs' vocabulary."""

    status: int
    type: str
    retriable: bool
    hint: str | None = None


_BAD = "invalid_request_error"
_ABSENT = "not_found_error"
_BUSY = "rate_limit_error"
_FAULT = "server_error"

MEANINGS: Mapping[Code, Meaning] = {
    Code.INVALID_REQUEST: Meaning(400, _BAD, False),
    Code.CONTEXT_LENGTH_EXCEEDED: Meaning(400, _BAD, False, "shorten the prompt, or use a pool with a larger ctx"),
    Code.UNAUTHENTICATED: Meaning(
        401, "authentication_error", False, "send `Authorization: Bearer TOKEN`; llorch submit reads LLORCH_TOKEN"
    ),
    Code.FORBIDDEN: Meaning(
        403,
        "permission_error",
        False,
        "use a token with that scope; an admin token has them all",
    ),
    Code.MODEL_NOT_FOUND: Meaning(404, _ABSENT, False, "`llorch pool ls` and GET /v1/models list the models there are"),
    Code.NOT_FOUND: Meaning(404, _ABSENT, False, "GET /openapi.json lists every route"),
    Code.METHOD_NOT_ALLOWED: Meaning(405, _BAD, False, "GET /openapi.json lists every route and its methods"),
    Code.TASK_NOT_FOUND: Meaning(404, _ABSENT, False, "`llorch task ls` lists the tasks that are still known"),
    Code.NODE_NOT_FOUND: Meaning(404, _ABSENT, False, "`llorch node ls` lists the nodes"),
    Code.POOL_NOT_FOUND: Meaning(404, _ABSENT, False, "`llorch pool ls` lists the pools"),
    Code.NODE_UNKNOWN: Meaning(404, _ABSENT, False, "register again: POST /v2/nodes/register"),
    Code.REQUEST_TIMEOUT: Meaning(408, _BAD, True, "send the whole request at once"),
    Code.LEASE_STALE: Meaning(409, _BAD, False, "a newer registration of this node is in force; register again"),
    Code.NODE_ID_CONFLICT: Meaning(
        409, _BAD, False, "give each machine its own --node-id, or wait until the other expires"
    ),
    Code.NODE_QUARANTINED: Meaning(
        409, _BAD, True, "look at that machine; `llorch node pardon NODE` lets it back at once"
    ),
    Code.CONFLICT: Meaning(409, _BAD, False),
    Code.GAP: Meaning(410, _BAD, False, "these bytes are no longer kept; send the task again"),
    Code.PAYLOAD_TOO_LARGE: Meaning(413, _BAD, False, "raise --max-body, or send less"),
    Code.UNSUPPORTED_MEDIA: Meaning(415, _BAD, False, "send JSON with a `model`, or name it in X-Llorch-Model"),
    Code.UNTRUSTED_ADDRESS: Meaning(422, _BAD, False, "advertise the address this node is reached from (--address)"),
    Code.IDEMPOTENCY_MISMATCH: Meaning(
        422, _BAD, False, "this Idempotency-Key was sent with another body; make a new key for a new request"
    ),
    Code.DIGEST_MISMATCH: Meaning(
        422, _BAD, False, "the bytes are not those that were meant: look at where they came from, then stage it again"
    ),
    Code.UPGRADE_REQUIRED: Meaning(426, _BAD, False, "send `Connection: Upgrade` and `Upgrade: llorch-records/1`"),
    Code.RATE_LIMITED: Meaning(429, _BUSY, True),
    Code.QUEUE_FULL: Meaning(429, _BUSY, True, "retry after the time given; `llorch status` shows the queue"),
    Code.ALL_SLOTS_BUSY: Meaning(429, _BUSY, True, "place it on another pool, or wait for a slot"),
    Code.CANCELED: Meaning(499, "canceled", False),
    Code.INTERNAL: Meaning(500, _FAULT, True, "look for this request id in the log of `llorch control`"),
    Code.NODE_LOST: Meaning(502, _FAULT, True, "send it again; what the node had not sent is lost"),
    Code.ENGINE_FAILED: Meaning(502, _FAULT, True, "`llorch pool ls` shows the engine's last error"),
    Code.MODEL_NOT_AVAILABLE: Meaning(
        503, _FAULT, True, "`llorch pool ls` shows which pools have the model and their state"
    ),
    Code.NO_CAPACITY: Meaning(503, _FAULT, True, "`llorch explain --dry-run -m MODEL` says why no pool can take it"),
    Code.DRAINING: Meaning(503, _FAULT, True, "it is shutting down; retry after the time given"),
    Code.RECOVERING: Meaning(
        503, _FAULT, True, "this control has just started and its nodes are coming back; retry after the time given"
    ),
    Code.DEADLINE_EXCEEDED: Meaning(504, _FAULT, False, "allow more time with deadline_ms"),
    Code.QUEUE_TIMEOUT: Meaning(504, _FAULT, True, "no slot became free in time; `llorch status` shows the load"),
    Code.ENGINE_STALLED: Meaning(504, _FAULT, True, "the engine stopped answering; `llorch pool ls` shows its state"),
    Code.INSUFFICIENT_STORAGE: Meaning(507, _FAULT, True, "make room on the disk that holds --data-dir"),
}


class LlorchError(Exception):
    """An error with a code. `status`, `type` and `retriable` follow from the code unless given.

    `param` names the offending field of the request. `details` is JSON-able and holds no secret.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        param: str | None = None,
        hint: str | None = None,
        retriable: bool | None = None,
        retry_after_ms: int | None = None,
        status: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        meaning = MEANINGS[code]
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.hint = hint if hint is not None else meaning.hint
        self.retriable = meaning.retriable if retriable is None else retriable
        self.retry_after_ms = retry_after_ms
        self.status = meaning.status if status is None else status
        self.type = meaning.type
        self.details = details

    def to_wire(self, *, request_id: str | None = None, task_id: str | None = None) -> dict[str, Any]:
        """The error object (without the `error` envelope)."""
        wire: dict[str, Any] = {
            "code": self.code.value,
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "retriable": self.retriable,
            "request_id": request_id,
        }
        if self.retry_after_ms is not None:
            wire["retry_after_ms"] = self.retry_after_ms
        if self.hint is not None:
            wire["hint"] = self.hint
        if task_id is not None:
            wire["task_id"] = task_id
        if self.details is not None:
            wire["details"] = dict(self.details)
        return wire

    def envelope(self, *, request_id: str | None = None, task_id: str | None = None) -> dict[str, Any]:
        return {"error": self.to_wire(request_id=request_id, task_id=task_id)}

    def copy(self) -> LlorchError:
        """The same, to be raised: one that is kept must not hold the frames that it passes through."""
        return LlorchError(
            self.code,
            self.message,
            param=self.param,
            hint=self.hint,
            retriable=self.retriable,
            retry_after_ms=self.retry_after_ms,
            status=self.status,
            details=self.details,
        )

    @classmethod
    def from_wire(cls, wire: object, *, fallback: Code = Code.INTERNAL) -> LlorchError:
        """The error a peer of ours sent; anything malformed becomes `fallback` without quoting it."""
        if not isinstance(wire, Mapping):
            return cls(fallback, "the peer sent no readable error")
        wire = bounded(wire)
        try:
            code = Code(str(wire.get("code")))
        except ValueError:
            code = fallback
        message, param, hint = wire.get("message"), wire.get("param"), wire.get("hint")
        after, retriable, details = wire.get("retry_after_ms"), wire.get("retriable"), wire.get("details")
        return cls(
            code,
            message if isinstance(message, str) else code.value,
            param=param if isinstance(param, str) else None,
            hint=hint if isinstance(hint, str) else None,
            retriable=retriable if isinstance(retriable, bool) else None,
            retry_after_ms=after if isinstance(after, int) and after >= 0 else None,
            details=details if isinstance(details, Mapping) else None,
        )


def bounded(wire: Mapping[str, Any]) -> dict[str, Any]:
    """An error object of a peer, with no more in it than one of ours would have: it is kept, and shown to people."""
    fields: dict[str, Any] = {
        name: value[:MAX_WIRE_TEXT_CHARS] if isinstance(value, str) else value
        for name in ("code", "message", "type", "param", "hint", "request_id", "task_id")
        if isinstance(value := wire.get(name), str | None) and name in wire
    }
    after, retriable, details = wire.get("retry_after_ms"), wire.get("retriable"), wire.get("details")
    if isinstance(after, int) and not isinstance(after, bool) and after >= 0:
        fields["retry_after_ms"] = min(after, MAX_RETRY_AFTER_MS)
    if isinstance(retriable, bool):
        fields["retriable"] = retriable
    if isinstance(details, Mapping) and len(json.dumps(details)) <= MAX_DETAILS_CHARS:
        fields["details"] = details
    return fields


def without_frames(error: Failure) -> Failure:
    """`error`, to be kept: the frames of its traceback would keep all that was local to them, bodies and connections,
    and where one of those keeps the error, only a rare collection ends the cycle."""
    error.__context__ = error.__cause__ = error.__traceback__ = None
    return error


class ConfigError(LlorchError):
    """Settings that can't be used. The message is what a person sees, all faults at once."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(Code.INVALID_REQUEST, message, hint=hint)


def invalid(message: str, *, param: str | None = None, hint: str | None = None) -> LlorchError:
    """A fault in what the client sent: 400, no retry helps."""
    return LlorchError(Code.INVALID_REQUEST, message, param=param, hint=hint)
