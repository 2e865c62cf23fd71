"""What an operator asks of nodes and pools through a control, and the logs of their engines: calls of `LlorchClient`.

Owns those calls, and that a log which is followed is looked for again, where it broke off, when its control or its
node is away for a while. Never waits for an operation to end: the pool's `operation` says how far it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from llorch import sse
from llorch.client import resume
from llorch.client.events import server_error
from llorch.client.faults import Unreachable
from llorch.errors import Code, LlorchError
from llorch.messages import decode_object

_MAY_COME_BACK = (Code.NODE_LOST, Code.RECOVERING, Code.DRAINING)


class Operations(ABC):
    """`wish` is a body of `llorch.wishes`: `deadline_s`, `reason`, `model`; what is None of it is left out."""

    @abstractmethod
    async def call(self, method: str, path: str, body: object | None = None) -> dict[str, Any]:
        """One JSON call that may be repeated."""

    @abstractmethod
    def raw_events(self, path: str) -> AsyncGenerator[sse.Event, None]:
        """The events of one connection."""

    async def operate_node(self, node_id: str, kind: str, wish: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`kind`: drain or undrain. Returns `{node_id, draining}` once the node has taken it."""
        return await self.call("POST", f"{_node(node_id)}/{kind}", _given(wish))

    async def operate_pool(
        self, node_id: str, pool_id: str, kind: str, wish: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """`kind`: drain, undrain, load, unload, reload, restart or purge. Returns `{node_id, pool}` once the node has
        taken it; the pool's `operation` is this one, running or over."""
        return await self.call("POST", f"{_pool(node_id, pool_id)}/{kind}", _given(wish))

    async def remove_node(self, node_id: str) -> dict[str, Any]:
        """Forget a node. One that lives registers again at its next beat."""
        return await self.call("DELETE", _node(node_id))

    async def pool(self, node_id: str, pool_id: str) -> dict[str, Any]:
        """One pool, with its node's id and state. Raises ServerError NODE_NOT_FOUND or POOL_NOT_FOUND."""
        node = await self.call("GET", _node(node_id))
        pools = node.get("pools")
        for pool in pools if isinstance(pools, list) else ():
            if isinstance(pool, dict) and pool.get("pool_id") == pool_id:
                return {**pool, "node_id": node_id, "node_state": node.get("state")}
        code = Code.POOL_NOT_FOUND
        raise server_error({"code": code.value, "message": f"node {node_id} has no pool {pool_id}"}, fallback=code)

    async def pool_logs(
        self, node_id: str, pool_id: str, *, lines: int | None = None, after: str | None = None
    ) -> dict[str, Any]:
        """`{lines: [{replica, text}], cursor}`: the newest ones, or those after a cursor."""
        return await self.call("GET", _logs(node_id, pool_id, lines=lines, after=after))

    async def follow_pool_logs(
        self,
        node_id: str,
        pool_id: str,
        *,
        lines: int | None = None,
        after: str | None = None,
        tell: Callable[[str], None] = lambda _why: None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The same, again and again, as lines are written. Ends only by an exception: what was lost is looked for as
        long as a task would be, and `tell` hears why."""
        began, lost_at, failures = False, 0.0, 0
        while True:
            try:
                path = _logs(node_id, pool_id, lines=None if began else lines, after=after, follow="1")
                async with contextlib.aclosing(self.raw_events(path)) as events:
                    async for event in events:
                        if event.event == "error":
                            raise server_error(decode_object(event.data.encode()))
                        if event.event != "log":
                            continue
                        began, failures, after = True, 0, event.id or after
                        yield decode_object(event.data.encode())
                why = "the control ended it"
                fault: Exception = Unreachable("the log is cut off", why=why)
            except Unreachable as error:
                why, fault = error.why or error.message, error
            except LlorchError as error:
                if error.code not in _MAY_COME_BACK:
                    raise
                why, fault = error.message, error
            if not failures:
                lost_at = time.monotonic()
            failures += 1
            if not began or time.monotonic() - lost_at >= resume.RESUME_FOR_S:
                raise fault
            tell(why)
            await asyncio.sleep(resume.delay_s(failures, random.random(), None))


def _given(wish: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (wish or {}).items() if value is not None}


def _node(node_id: str) -> str:
    return f"/v2/nodes/{quote(node_id, safe='')}"


def _pool(node_id: str, pool_id: str) -> str:
    return f"{_node(node_id)}/pools/{quote(pool_id, safe='')}"


def _logs(node_id: str, pool_id: str, **query: object) -> str:
    given = _given(query)
    return f"{_pool(node_id, pool_id)}/logs" + (f"?{urlencode(given)}" if given else "")
