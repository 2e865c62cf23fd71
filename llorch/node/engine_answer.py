"""An engine's HTTP answer as it comes, however it may break.

Owns how an engine is connected to, what counts as a broken connection, that a reader of an answer always learns of its
end, and how much of an error answer is read. Never decodes an answer and never quotes one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager

import aiohttp

from llorch.web import client_session

MAX_ERROR_BYTES = 64 * 1024  # of an engine's error answer
ERROR_BODY_TIMEOUT_S = 5.0

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


async def error_body(response: aiohttp.ClientResponse) -> bytes:
    """The start of an error answer; one that does not come is an empty one."""
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(ERROR_BODY_TIMEOUT_S):
            await read_into(parts, response, MAX_ERROR_BYTES)
    except BROKEN:
        pass
    return b"".join(parts)


async def read_into(parts: list[bytes], response: aiohttp.ClientResponse, limit: int) -> None:
    """The body, to its end or up to `limit` bytes: aiohttp's own read(n) gives what happens to be there."""
    while limit > 0 and (part := await response.content.read(limit)):
        parts.append(part)
        limit -= len(part)


def engine_session() -> AbstractAsyncContextManager[aiohttp.ClientSession]:
    """For requests to engines: each has a connection of its own.

    An engine may close a kept one in the very moment in which it is used again (of 300 tasks, 4 at a time, llama.cpp's
    server did so to 5), and nobody can tell whether such a request was read. A connection on loopback costs less than
    a token.
    """
    return client_session(reuse=False)
