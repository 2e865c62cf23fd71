"""The events of a native task's stream, as values.

Owns reading one SSE event into a typed value. A field that is missing or odd becomes its empty value: what a newer
control adds or leaves out must not break a client. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from llorch import sse
from llorch.errors import Code, LlorchError
from llorch.messages import decode_object


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    """`wire` is the event's data as it came; `id` is its place in the task's log, None for what is not in it."""

    kind: ClassVar[str]
    wire: Mapping[str, Any] = field(repr=False)
    id: str | None = None

    def to_json(self) -> dict[str, Any]:
        place = {} if self.id is None else {"id": self.id}
        return {"event": self.kind, **place, **self.wire}


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(_Event):
    kind: ClassVar[str] = "queued"
    position: int
    eta_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(_Event):
    kind: ClassVar[str] = "started"
    task_id: str
    node_id: str
    pool_id: str
    model: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Token(_Event):
    kind: ClassVar[str] = "token"
    text: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated(_Event):
    kind: ClassVar[str] = "migrated"
    attempt: int
    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End(_Event):
    kind: ClassVar[str] = "end"
    finish_reason: str
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(_Event):
    kind: ClassVar[str] = "error"
    error: ServerError


Event: TypeAlias = Queued | Started | Token | Migrated | End | Failed
TERMINAL = (End, Failed)


class ServerError(LlorchError):
    """An error that a control sent: as an answer, or as the last event of a stream.

    `by_proxy`: what stands before the control said it, for want of an answer from the control.
    """

    request_id: str | None = None
    task_id: str | None = None
    by_proxy: bool = False


def server_error(wire: object, *, fallback: Code = Code.INTERNAL, request_id: str | None = None) -> ServerError:
    error = ServerError.from_wire(wire, fallback=fallback)
    assert isinstance(error, ServerError)
    fields = wire if isinstance(wire, Mapping) else {}
    error.request_id = _text(fields, "request_id") or request_id
    error.task_id = _text(fields, "task_id") or None
    return error


def read_event(raw: sse.Event) -> Event | None:
    """The event, or None for a kind that this client does not know. Raises LlorchError for data that is not JSON."""
    if raw.event not in _READERS:
        return None
    return _READERS[raw.event](decode_object(raw.data.encode()), raw.id)


def _text(wire: Mapping[str, Any], name: str) -> str:
    value = wire.get(name)
    return value if isinstance(value, str) else ""


def _count(wire: Mapping[str, Any], name: str) -> int:
    value = wire.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _queued(wire: Mapping[str, Any], id: str | None) -> Event:
    eta = wire.get("eta_ms")
    eta_ms = round(eta) if isinstance(eta, (int, float)) else None
    return Queued(wire=wire, id=id, position=_count(wire, "position"), eta_ms=eta_ms)


def _started(wire: Mapping[str, Any], id: str | None) -> Event:
    return Started(
        wire=wire,
        id=id,
        task_id=_text(wire, "task_id"),
        node_id=_text(wire, "node_id"),
        pool_id=_text(wire, "pool_id"),
        model=_text(wire, "model"),
        attempt=_count(wire, "attempt"),
    )


def _token(wire: Mapping[str, Any], id: str | None) -> Event:
    return Token(wire=wire, id=id, text=_text(wire, "t"), index=_count(wire, "i"))


def _migrated(wire: Mapping[str, Any], id: str | None) -> Event:
    attempt = _count(wire, "attempt")
    return Migrated(wire=wire, id=id, attempt=attempt, source=_text(wire, "from"), target=_text(wire, "to"))


def _end(wire: Mapping[str, Any], id: str | None) -> Event:
    return End(
        wire=wire,
        id=id,
        finish_reason=_text(wire, "finish_reason"),
        tokens_in=_count(wire, "tokens_in"),
        tokens_out=_count(wire, "tokens_out"),
    )


def _error(wire: Mapping[str, Any], id: str | None) -> Event:
    return Failed(wire=wire, id=id, error=server_error(wire))


_READERS = {
    "queued": _queued,
    "started": _started,
    "token": _token,
    "migrated": _migrated,
    "end": _end,
    "error": _error,
}
