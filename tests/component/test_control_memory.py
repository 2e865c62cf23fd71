"""What a task took at a control is free once it has ended, without a collection: nothing of it hangs in a circle.

A control that answers a thousand tasks a second was stopped by its collector for 50 to 160 ms each second, and worked
in memory that no cache had seen, for as long as each task left 35 objects behind.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable

import pytest

from llorch.control.answers import OpenAiAnswer, Stream
from llorch.control.audience import Audience
from llorch.control.feed import Feed
from llorch.control.log_reader import LogReader
from llorch.outlet import Outlet
from tests.component.control_harness import Attempt, ControlUnderTest, LinkedNode, a_control, eventually, lost_soon
from tests.component.test_control_streams import FAILURES, FORMS, Asking, asked, begin, detached

KINDS = (Audience, Feed, LogReader, Outlet, OpenAiAnswer, Stream)


def kept() -> list[str]:
    return [type(each).__name__ for each in gc.get_objects() if isinstance(each, KINDS)]


async def to_its_end(node: LinkedNode, attempt: Attempt) -> str:
    begin(attempt)
    if attempt.header["path"] == "native":
        attempt.end()
    elif attempt.header["stream"]:
        attempt.data(b"data: [DONE]\n\n").tail(finish_reason="stop")
    else:
        attempt.data(b" " * (1_000 - len(attempt.log))).tail(finish_reason="stop")
    return ""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", [to_its_end, *FAILURES])
async def test_nothing_of_a_task_waits_for_the_collector(
    form: Callable[[ControlUnderTest], Asking],
    end: Callable[[LinkedNode, Attempt], Awaitable[str]],
    monkeypatch: pytest.MonkeyPatch,
    without_collection: None,
) -> None:
    lost_soon(monkeypatch)
    async with a_control() as control:
        node, asking, attempt = await asked(control, form)
        await end(node, attempt)
        if form is not detached:
            await asking.answer()
        await control.idle()
        await eventually(lambda: not kept(), what=f"no {set(kept())}")
