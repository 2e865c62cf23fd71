"""How the end of an answer goes over a wire. Pure."""

from __future__ import annotations

import json
from typing import Any

from llorch.errors import LlorchError
from llorch.messages import Tail

MAX_ERROR_WIRE_BYTES = 16 * 1024  # of an error in a record, which must fit in 64 KiB


def tail_wire(tail: Tail) -> dict[str, Any]:
    """TAIL's JSON: as pydantic would write it, in half the time."""
    times = tail.timings
    timings = {
        name: value
        for name, value in (
            ("ttft_ms", times.ttft_ms),
            ("decode_ms", times.decode_ms),
            ("prompt_tps", times.prompt_tps),
            ("decode_tps", times.decode_tps),
        )
        if value is not None
    }
    wire = {
        "length": tail.length,
        "finish_reason": tail.finish_reason,
        "tokens_in": tail.tokens_in,
        "tokens_out": tail.tokens_out,
        "cached_tokens": tail.cached_tokens,
        "timings": timings,
        "sha256": tail.sha256,
        "error": tail.error,
        "status": tail.status,
    }
    return {name: value for name, value in wire.items() if value is not None}


def error_wire(error: LlorchError, *, request_id: str | None = None, task_id: str | None = None) -> dict[str, Any]:
    """An error that fits into a record, however long the name of the field that it is about."""
    wire = error.to_wire(request_id=request_id, task_id=task_id)
    if len(json.dumps(wire)) <= MAX_ERROR_WIRE_BYTES:
        return wire
    wire.pop("details", None)
    return {name: value[:500] if isinstance(value, str) else value for name, value in wire.items()}
