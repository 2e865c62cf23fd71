"""A route of the node that takes JSON and answers JSON, over HTTP and over a link alike: the words for the tables.

Owns what such a route is and what it is given. Which there are is in the tables; how a request comes, in `calls`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from llorch.auth import Scope
from llorch.messages import M, decode_object, parse
from llorch.node.state import Node

Reply = tuple[int, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of one route: the parameters of its path, its query, its body."""

    params: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes

    def read(self, model: type[M]) -> M:
        """The body as `model`; an empty one is an empty object. Raises INVALID_REQUEST."""
        return parse(model, decode_object(self.body) if self.body.strip() else {})


@dataclass(frozen=True, slots=True)
class Call:
    """One route: `serve` is given the node and what is asked, and returns a status and JSON, at once or later."""

    method: str
    path: str
    scope: Scope
    summary: str
    serve: Callable[[Node, Ask], Reply | Awaitable[Reply]]
    status: int = 200
    body: type[BaseModel] | None = None

    async def answer(self, node: Node, ask: Ask) -> Reply:
        reply = self.serve(node, ask)
        return reply if isinstance(reply, tuple) else await reply
