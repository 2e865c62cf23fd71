"""`LlorchClient` as a client of a run: it resumes and retries by itself, and what it yields is written down."""

from __future__ import annotations

import contextlib

from llorch.client.api import LlorchClient
from llorch.client.faults import ClientFault
from llorch.errors import LlorchError
from tests.faults.history import Recorder
from tests.faults.tasks import Ask


async def run_llorch(ask: Ask, client: LlorchClient, recorder: Recorder) -> None:
    """One task. What it sees counts as one connection, whatever the client did to get it."""

    def note(what: str, **fields: object) -> None:
        recorder.note(what, task=ask.marker, **fields)

    note(
        "task", form=ask.form, model=ask.model, tokens=ask.tokens, task_id=ask.task_id, key=None,
        deadline_s=ask.deadline_s, script=ask.script,
    )  # fmt: skip
    note("send", conn=1, op="post", after=None)
    how, closed = "abandoned", "left"
    try:
        async with contextlib.aclosing(client.submit(ask.body())) as events:
            async for event in events:
                ident = int(event.id, 16) if event.id is not None else None
                note("event", conn=1, kind=event.kind, id=ident, size=None, crc=None, data=dict(event.wire))
        how, closed = "terminal", "end"
    except ClientFault as fault:
        note("fault_said", conn=1, kind=type(fault).__name__, why=fault.message)
        how, closed = "client fault", "broken"
    except LlorchError as error:
        note("answer", conn=1, op="post", status=error.status, code=error.code.value)
        how, closed = "refused", "end"
    finally:
        note("closed", conn=1, how=closed)
        note("over", how=how)
