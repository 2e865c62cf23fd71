"""A node with a link that answers an operator's calls as a test says, and remembers them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from llorch.errors import MEANINGS, Code
from llorch.records import Type
from tests.component.control_harness import LinkedNode, Stream, error_wire, eventually

Say = Callable[[dict[str, Any]], Any]


class OperatedNode:
    """`on` says what comes to "METHOD /path": a value, a Code to refuse with, or what makes one of the body."""

    def __init__(self, node: LinkedNode) -> None:
        self.node = node
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._answers: dict[str, Any] = {}

    def on(self, what: str, answer: Any) -> None:
        self._answers[what] = answer

    def bodies(self, what: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.asked if asked == what]

    async def serve(self) -> None:
        while True:
            await eventually(lambda: len(self.node.calls) > len(self.asked), within_s=60, what="a call")
            call = self.node.calls[len(self.asked)]
            await self._whole(call)
            self._answer(call)

    async def _whole(self, call: Stream) -> None:
        await eventually(lambda: len(call.body) == call.header.get("body_len", 0), within_s=5, what="a call's body")

    def _answer(self, call: Stream) -> None:
        what = f"{call.header['method']} {call.header['path']}"
        body = json.loads(call.body) if call.body else {}
        self.asked.append((what, body))
        short = what.partition("?")[0]
        said = self._answers.get(what, self._answers.get(short, Code.NOT_FOUND))
        if callable(said):
            said = said(body)
        if isinstance(said, Code):
            self._say(call, MEANINGS[said].status, {"error": error_wire(said, "the node says so")})
        elif said is not None:  # None: no answer at all
            self._say(call, 202 if call.header["method"] == "POST" else 200, said)

    @staticmethod
    def _say(call: Stream, status: int, value: object) -> None:
        call.emit_json(Type.HEAD, {"status": status, "headers": {"content-type": "application/json"}})
        call.data(value if isinstance(value, bytes) else json.dumps(value).encode())
        call.tail()


@contextlib.asynccontextmanager
async def operated(node: LinkedNode) -> AsyncIterator[OperatedNode]:
    """Answers for as long as the block runs."""
    answering = OperatedNode(node)
    serving = asyncio.create_task(answering.serve())
    try:
        yield answering
    finally:
        serving.cancel()
        await asyncio.wait((serving,))
        if not serving.cancelled() and (fault := serving.exception()) is not None:
            raise fault
