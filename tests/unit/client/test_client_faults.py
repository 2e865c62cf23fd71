"""What a client's failures are as three lines: what failed, why, what to do. The words for connections: test_reach."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from llorch import sse
from llorch.client.faults import ClientFault, unreachable


@pytest.mark.parametrize(
    ("error", "why", "hint"),
    [
        (aiohttp.ClientResponseError(None, (), message="what the peer sent"), "does not speak HTTP", "LLORCH_URL"),  # type: ignore[arg-type]
        (sse.SseError("what the peer sent"), "no stream of events", "--url"),
    ],
)
def test_a_control_that_can_not_be_reached_is_named_with_where_its_url_came_from(
    error: Exception, why: str, hint: str
) -> None:
    fault: Any = unreachable("http://h:1", error)
    assert isinstance(fault, ClientFault)
    assert fault.message == "can't reach http://h:1"
    assert why in fault.why
    assert hint in fault.hint
    assert "what the peer sent" not in fault.why + fault.hint
