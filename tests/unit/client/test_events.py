"""From SSE events to values: each kind, and what becomes of fields that are odd or missing."""

from __future__ import annotations

import json

import pytest

from llorch import sse
from llorch.client.events import End, Failed, Migrated, Queued, Started, Token, read_event, server_error
from llorch.errors import Code, LlorchError


def read(kind: str, wire: object, id: str | None = "0a") -> object:
    return read_event(sse.Event(kind, json.dumps(wire), id))


def test_each_kind_of_event_becomes_its_own_value() -> None:
    started = {"task_id": "t", "node_id": "n", "pool_id": "p", "model": "m", "attempt": 2}
    migrated = {"attempt": 2, "from": "a/p", "to": "b/p", "emitted": 5}
    end = {"finish_reason": "stop", "tokens_in": 1, "tokens_out": 2, "sha256": "x"}
    assert read("queued", {"position": 3, "eta_ms": 1500.4}, None) == Queued(
        wire={"position": 3, "eta_ms": 1500.4}, id=None, position=3, eta_ms=1500
    )
    assert read("started", started) == Started(wire=started, id="0a", **started)
    assert read("token", {"t": "x", "i": 7}) == Token(wire={"t": "x", "i": 7}, id="0a", text="x", index=7)
    assert read("migrated", migrated) == Migrated(wire=migrated, id="0a", attempt=2, source="a/p", target="b/p")
    assert read("end", end) == End(wire=end, id="0a", finish_reason="stop", tokens_in=1, tokens_out=2)
    failed = read("error", {"code": "NODE_LOST", "message": "gone"})
    assert isinstance(failed, Failed)
    assert failed.error.code is Code.NODE_LOST


@pytest.mark.parametrize("kind", ["queued", "started", "token", "migrated", "end", "error"])
@pytest.mark.parametrize("value", [None, [], {}, "text", True, -1.5])
def test_odd_fields_become_empty_ones_and_never_a_fault(kind: str, value: object) -> None:
    names = (
        "position",
        "eta_ms",
        "task_id",
        "attempt",
        "t",
        "i",
        "from",
        "finish_reason",
        "tokens_in",
        "code",
        "message",
    )
    event = read(kind, dict.fromkeys(names, value))
    assert event is not None
    assert read(kind, {}) is not None


def test_events_of_other_kinds_are_none_whatever_their_data() -> None:
    assert read_event(sse.Event("news", "not JSON", None)) is None
    assert read_event(sse.Event("", "{}", None)) is None


@pytest.mark.parametrize("data", ["", "[]", "{", '{"t": NaN}', '{"t": "a", "t": "b"}', "\ud800"])
def test_data_that_is_no_json_object_is_an_error_and_is_not_quoted(data: str) -> None:
    with pytest.raises((LlorchError, UnicodeEncodeError)):
        read_event(sse.Event("token", data, None))


def test_an_event_as_json_has_its_kind_and_its_place_first() -> None:
    event = read("token", {"t": "x", "i": 7})
    assert isinstance(event, Token)
    assert list(event.to_json().items()) == [("event", "token"), ("id", "0a"), ("t", "x"), ("i", 7)]


def test_what_a_control_says_of_an_error_is_kept_and_its_header_fills_in() -> None:
    wire = {"code": "QUEUE_FULL", "message": "full", "task_id": "t", "retriable": True, "retry_after_ms": 5}
    error = server_error(wire, request_id="from-the-header")
    assert (error.code, error.task_id, error.request_id, error.retry_after_ms) == (
        Code.QUEUE_FULL, "t", "from-the-header", 5,
    )  # fmt: skip
    assert server_error({**wire, "request_id": "own"}, request_id="header").request_id == "own"
    assert server_error("text", fallback=Code.NO_CAPACITY).code is Code.NO_CAPACITY
