from __future__ import annotations

from typing import Any

import pytest

from llorch.errors import MEANINGS, Code, LlorchError


def test_every_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(Code)


@pytest.mark.parametrize("code", list(Code))
def test_every_error_survives_the_wire(code: Code) -> None:
    error = LlorchError(code, "what", param="p", hint="h", retry_after_ms=5, details={"a": 1})
    back = LlorchError.from_wire(error.to_wire(request_id="r", task_id="t"))
    assert back.to_wire(request_id="r", task_id="t") == error.to_wire(request_id="r", task_id="t")


@pytest.mark.parametrize("wire", [None, 1, [], {}, {"code": 500}, {"code": "NOPE", "message": 1, "retry_after_ms": -1}])
def test_a_malformed_error_of_a_peer_becomes_the_fallback(wire: Any) -> None:
    error = LlorchError.from_wire(wire, fallback=Code.ENGINE_FAILED)
    assert error.code is Code.ENGINE_FAILED
    assert isinstance(error.message, str)


def test_what_a_client_can_mend_is_not_called_retriable() -> None:
    for code, meaning in MEANINGS.items():
        if meaning.status in (400, 401, 403, 404, 413, 415, 422):
            assert not meaning.retriable, code
        if meaning.status in (429, 503):
            assert meaning.retriable, code
