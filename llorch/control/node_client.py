"""How the control reaches a node: over its link if it has one, else by HTTP to its address.

The only outgoing HTTP of the control. Owns the session, the reading of record bodies, and the calls of a node's own
routes. A node's bytes are bounded and never quoted in errors.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any
from urllib.parse import quote

import aiohttp

from llorch import records, web
from llorch.control.feed import Feed, Lost, Refused, Said, Stopped, Upstream
from llorch.control.links import Links, Order, read_item
from llorch.control.resolver import NodeResolver
from llorch.errors import Code, LlorchError
from llorch.logs import Log
from llorch.messages import Head, Tail, decode_json
from llorch.tasks import Guard
from llorch.tls import node_name

CALL_TIMEOUT_S = 5.0
MAX_CALL_BYTES = 4 * 1024 * 1024
DATA_TURN_BYTES = 128 * 1024  # unread bytes of one HTTP stream after which it is not read on: the link's window

log = Log("control.node_client")


class NodeClient:
    """Opens tasks on nodes, attaches to logs, calls nodes' routes. `address_of` gives a node's base URL, or None;
    `cluster_tls` what to dial one with that has a certificate: it gets ours, and no token.
    """

    def __init__(
        self,
        links: Links,
        address_of: Callable[[str], str | None],
        service_token: Callable[[], str],
        tls: ssl.SSLContext | None,
        resolver: NodeResolver,
        broke_protocol: Callable[[str, records.RecordError], None] = lambda _node_id, _error: None,
        cluster_tls: Callable[[str], ssl.SSLContext | None] = lambda _node_id: None,
    ) -> None:
        """`broke_protocol` is told of a node whose answer is no sequence of records as there may be."""
        self._links = links
        self._address_of = address_of
        self._token = service_token
        self._tls = tls
        self._cluster_tls = cluster_tls
        self.resolver = resolver
        self._broke_protocol = broke_protocol
        self._reading: dict[str, set[asyncio.Task[None]]] = {}  # of nodes without a link
        self._guard = Guard("control.node_client")
        self._stack = AsyncExitStack()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> NodeClient:
        self._session = await self._stack.enter_async_context(web.client_session(tls=self._tls, resolver=self.resolver))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._guard.close()
        await self._stack.aclose()

    def open(self, node_id: str, header: dict[str, Any], body: bytes, feed: Feed) -> Upstream:
        link = self._links.get(node_id)
        if link is not None:
            return link.open(header, body, feed)
        headers = {
            "X-Llorch-Task": header["task_id"],
            "X-Llorch-Attempt": str(header["attempt"]),
            "X-Llorch-Path": header["path"],
            "X-Llorch-Owner": header["owner"],
            **{name: value for name, value in header["headers"].items() if name in ("x-request-id", "traceparent")},
        }
        if "deadline_ms" in header:
            headers["X-Llorch-Deadline-Ms"] = str(header["deadline_ms"])
        path = f"/v2/pools/{quote(header['pool_id'], safe='')}/infer"
        upstream = self._stream(node_id, "POST", path, headers, body, feed, header["task_id"])
        if header["path"] != "native":
            upstream.detach = _cancel_first(upstream)
        return upstream

    def attach(
        self, node_id: str, task_id: str, offset: int, attempt: int, feed: Feed, *, native: bool = True
    ) -> Upstream:
        link = self._links.get(node_id)
        if link is not None:
            return link.attach(task_id, offset, attempt, feed)
        path = f"/v2/tasks/{task_id}/log?offset={offset}&attempt={attempt}"
        upstream = self._stream(node_id, "GET", path, {}, b"", feed, task_id, offset=offset)
        close, cancels = upstream.detach, upstream.detach if native else _cancel_first(upstream)

        def detach(reason: str) -> None:
            """Say why where there is a link by now; where there is none, an answer for its client alone is canceled."""
            link = self._links.get(node_id)
            if link is None:
                cancels(reason)
                return
            close(reason)
            link.attach(task_id, offset, attempt, Feed()).detach(reason)

        upstream.detach = detach
        return upstream

    def silent(self, node_id: str, since: float) -> bool:
        link = self._links.get(node_id)
        return link is not None and link.connection is not None and link.connection.heard_at < since

    async def answers(self, node_id: str, within_s: float) -> bool:
        link = self._links.get(node_id)
        if link is None or await link.answers(within_s):
            return link is not None
        link.abort("no answer to a ping")
        return False

    async def call(
        self, node_id: str, method: str, path: str, body: bytes = b"", *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """One of the node's own routes. Returns its JSON; raises LlorchError as the node did, or NODE_LOST."""
        link = self._links.get(node_id)
        if link is None:
            return await self._call_http(node_id, method, path, body, timeout_s)
        feed = Feed()
        upstream = link.open({"method": method, "path": path, "headers": {}}, body, feed)
        head, answer = Head(), b""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    item = await feed.next(None)
                    if isinstance(item, Head):
                        head = item
                    elif isinstance(item, bytes):
                        answer += item
                        upstream.passed_on(len(item))
                        if len(answer) > MAX_CALL_BYTES:
                            raise LlorchError(Code.NODE_LOST, "the node's answer is too large")
                    elif isinstance(item, Tail):
                        return _answer(head.status, answer)
                    elif isinstance(item, Refused):
                        raise item.error
                    elif isinstance(item, Lost | Stopped):
                        raise LlorchError(Code.NODE_LOST, "the node was lost while it was asked")
        except TimeoutError:
            raise LlorchError(Code.NODE_LOST, f"the node did not answer within {timeout_s:g} s") from None
        finally:
            if not feed.ended:
                upstream.detach("left")

    # ---- HTTP, for nodes without a link

    def _base(self, node_id: str) -> str:
        base = self._address_of(node_id)
        if base is None or self._session is None:
            raise LlorchError(Code.NODE_LOST, "the node has neither a link nor an address")
        return base

    def _request(self, node_id: str, method: str, url: str, headers: dict[str, str], body: bytes) -> Any:
        assert self._session is not None
        headers = {"Content-Type": "application/json", **headers}
        context = self._cluster_tls(node_id)
        if context is not None and not url.startswith("https:"):
            raise LlorchError(Code.NODE_LOST, "a node with a certificate is called by https alone")
        if context is None:
            headers["Authorization"] = f"Bearer {self._token()}"
            return self._session.request(method, url, headers=headers, data=body or None, allow_redirects=False)
        return self._session.request(
            method,
            url,
            headers=headers,
            data=body or None,
            ssl=context,
            server_hostname=node_name(node_id),
            allow_redirects=False,
        )

    async def _call_http(
        self, node_id: str, method: str, path: str, body: bytes, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        url = self._base(node_id) + path
        try:
            async with asyncio.timeout(timeout_s), self._request(node_id, method, url, {}, body) as response:
                return _answer(response.status, await _whole(response))
        except (aiohttp.ClientError, TimeoutError, OSError):
            raise LlorchError(Code.NODE_LOST, "the node did not answer") from None

    def _stream(
        self,
        node_id: str,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        feed: Feed,
        task_id: str,
        *,
        offset: int = 0,
    ) -> Said:
        url = self._base(node_id) + path
        headers["Accept"] = records.CONTENT_TYPE
        room, ask = _Room(), partial(self._request, node_id, method, url, headers, body)
        reading = self._guard.spawn(self._read(node_id, ask, Order(offset), feed, room), f"read.{task_id}")
        reading.add_done_callback(lambda _: self._was_read(node_id, reading, room))
        self._reading.setdefault(node_id, set()).add(reading)

        def cancel() -> None:
            self._guard.spawn(self._cancel(node_id, task_id, room), f"cancel.{task_id}")

        return Said(
            passed_on=room.passed_on, detach=lambda _reason: _cancel_quietly(reading), cancel=cancel, discard=cancel
        )

    def cut(self, node_id: str) -> None:
        """Read no further from a node without a link: its readers lose it."""
        for reading in list(self._reading.get(node_id, ())):
            reading.cancel()

    def _was_read(self, node_id: str, reading: asyncio.Task[None], room: _Room) -> None:
        room.begun.set()
        others = self._reading[node_id]
        others.discard(reading)
        if not others:
            del self._reading[node_id]

    async def _cancel(self, node_id: str, task_id: str, room: _Room) -> None:
        """Once the node has the task, or never will: a DELETE that overtook its POST would find nothing."""
        await room.begun.wait()
        try:
            await self._call_http(node_id, "DELETE", f"/v2/tasks/{task_id}", b"")
        except LlorchError as error:
            log.info("task.cancel_failed", task_id=task_id, node_id=node_id, code=error.code)

    async def _read(self, node_id: str, ask: Callable[[], Any], order: Order, feed: Feed, room: _Room) -> None:
        decoder = records.Decoder()
        from_node = False  # and not from something before it that answers in its place
        try:
            async with ask() as response:
                if response.status != 200:
                    feed.put(Refused(_error_of(response.status, await _whole(response))))
                    return
                from_node = response.content_type == records.CONTENT_TYPE
                async for chunk in response.content.iter_any():
                    room.begun.set()
                    for record in decoder.feed(chunk):
                        item = read_item(record)
                        if item is not None:
                            order.check(item)
                        if isinstance(item, bytes) and item:
                            if feed.take(item):
                                continue
                            room.arrived(len(item))
                        if item:
                            feed.put(item)
                        if feed.ended:
                            return
                    await room.free()
            feed.put(Lost("the answer ended without a TAIL"))
        except aiohttp.ClientConnectorError:
            feed.put(Refused(LlorchError(Code.NODE_LOST, "the node can't be reached")))
        except records.RecordError as error:
            feed.put(Lost("protocol error"))
            if from_node:
                self._broke_protocol(node_id, error)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            feed.put(Lost(type(error).__name__))
        except LlorchError as error:
            feed.put(Refused(error))
        except ValueError:  # aiohttp will not send it: no fault of the node's
            feed.put(Refused(LlorchError(Code.INVALID_REQUEST, "this can't be sent to a node")))
        finally:
            feed.put(Lost("the reading was ended"))


class _Room:
    """Stops reading a node's HTTP answer while the client is behind: the window, for bodies without credit."""

    def __init__(self) -> None:
        self._unread = 0
        self.begun = asyncio.Event()  # the node has answered, or never will
        self._below = asyncio.Event()
        self._below.set()

    def arrived(self, count: int) -> None:
        self._unread += count
        if self._unread >= DATA_TURN_BYTES:
            self._below.clear()

    def passed_on(self, count: int) -> None:
        self._unread -= count
        if self._unread < DATA_TURN_BYTES:
            self._below.set()

    async def free(self) -> None:
        await self._below.wait()


def _cancel_first(upstream: Said) -> Callable[[str], None]:
    """A closed connection tells a node nothing of why; an answer that only its client could read must end with it."""
    close = upstream.detach

    def detach(reason: str) -> None:
        if reason in ("left", "slow"):
            upstream.cancel()
        close(reason)

    return detach


def _cancel_quietly(task: asyncio.Task[Any]) -> None:
    if not task.done():
        task.cancel()


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    """An answer that is not records, to its end. Raises NODE_LOST if it is too large to be one."""
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_CALL_BYTES:
            raise LlorchError(Code.NODE_LOST, "the node's answer is too large")
        parts.append(part)
    return b"".join(parts)


def _error_of(status: int, answer: bytes, by_status: Mapping[int, Code] | None = None) -> LlorchError:
    """`by_status`: what an answer means that is no error of ours."""
    if status in (401, 403):
        # The control's own token is wrong there: nothing that the client sent, or could mend.
        return LlorchError(Code.INTERNAL, "the node refused this control's service token")
    try:
        wire = decode_json(answer)
    except LlorchError:
        wire = None
    return LlorchError.from_wire(
        wire.get("error") if isinstance(wire, dict) else None,
        fallback=(by_status or _BY_STATUS).get(status, Code.NODE_LOST),
    )


def _answer(status: int, answer: bytes) -> Any:
    if status >= 300:  # a node sends nobody elsewhere
        raise _error_of(status, answer, _CALL_BY_STATUS)
    try:
        return decode_json(answer) if answer else None
    except LlorchError:
        raise LlorchError(Code.NODE_LOST, "its answer can't be read") from None


_BY_STATUS = {
    404: Code.POOL_NOT_FOUND,
    410: Code.GAP,
    413: Code.PAYLOAD_TOO_LARGE,
    429: Code.ALL_SLOTS_BUSY,
    503: Code.MODEL_NOT_AVAILABLE,
}
_CALL_BY_STATUS = _BY_STATUS | {405: Code.METHOD_NOT_ALLOWED, 501: Code.METHOD_NOT_ALLOWED}
