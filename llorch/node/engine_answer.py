"""An engine's HTTP answer as aiohttp reads it, however it may break: for questions about its health.

Owns what counts as a broken connection, and that a reader of an answer always learns of its end. Never decodes an
answer and never quotes one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp

BROKEN = (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError)  # a connection to an engine


@contextmanager
def told_of_its_end(response: aiohttp.ClientResponse) -> Iterator[None]:
    """Whoever reads `response` in here learns when its connection has gone.

    aiohttp (3.14) closes the connection at a malformed chunk and says nothing to the reader, who would wait for ever.
    """
    connection, content = response.connection, response.content
    if connection is None or connection.protocol is None:
        yield  # it has come whole, and the connection was given back
        return

    def gone(closed: asyncio.Future[None] | None) -> None:
        if closed is not None and not closed.cancelled():
            closed.exception()  # seen: asyncio need not warn of it
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection was closed within the answer"))

    closed = connection.protocol.closed
    if closed is None:
        gone(None)
        yield
        return
    closed.add_done_callback(gone)
    try:
        yield
    finally:
        closed.remove_done_callback(gone)  # the connection may serve many more answers


async def read_into(parts: list[bytes], response: aiohttp.ClientResponse, limit: int) -> None:
    """The body, to its end or up to `limit` bytes: aiohttp's own read(n) gives what happens to be there."""
    while limit > 0 and (part := await response.content.read(limit)):
        parts.append(part)
        limit -= len(part)
