"""Tasks over plain HTTP: `infer` and a task's log, as records for controls without a link, as they are for curl.

Owns how a log becomes an HTTP answer: when its status is known, how a slow reader is dropped, and what a reader that
ends with or without a word means for the task. Never decides what becomes of the task.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from llorch import records
from llorch.errors import LlorchError, invalid
from llorch.logs import Log
from llorch.messages import Head, Open, parse
from llorch.node.answer_wire import tail_wire
from llorch.node.execution import FORWARDED_HEADERS
from llorch.node.runner import Runner
from llorch.node.state import NODE, Node
from llorch.node.task_entry import NATIVE, Gone, TaskEntry
from llorch.records import Type
from llorch.web import REQUEST_ID, error_response, limit_send_buffer, read_body

CHUNK_BYTES = records.MAX_PAYLOAD_BYTES
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

log = Log("node.routes")


class _Reader:
    """A coroutine that reads a log (a tasklog.Reader)."""

    __slots__ = ("_news", "offset", "why")

    def __init__(self, offset: int, why: Gone) -> None:
        self.offset = offset
        self.why = why  # what it means if this reader ends before the log does
        self._news = asyncio.Event()

    def wake(self) -> None:
        self._news.set()

    def fresh(self, _data: bytes) -> None:
        self._news.set()

    async def news(self) -> None:
        await self._news.wait()
        self._news.clear()


@asynccontextmanager
async def _reading(runner: Runner, entry: TaskEntry, offset: int, why: Gone) -> AsyncIterator[_Reader]:
    reader = _Reader(offset, why)
    runner.attach(entry, reader)
    try:
        yield reader
    finally:
        runner.leave(entry, reader, reader.why)


async def infer(request: web.Request) -> web.StreamResponse:
    """Run a task here. The slot is taken before the body is read; a repeated (task, attempt) attaches."""
    node = request.app[NODE]
    opening = _opening(request)
    try:
        entry, new = node.runner.accept(opening)
    except LlorchError as error:
        return error_response(error, request[REQUEST_ID], opening.task_id)
    serve = _serve_records if _wants_records(request) else _serve_plain
    if not new:
        return await serve(request, node, entry, 0)
    try:
        body = await read_body(request, most_bytes=node.max_body_bytes)
    except BaseException:
        node.runner.never_came(entry)
        raise
    if entry.run is not None:
        entry.run.give_body(body)
    del body
    return await serve(request, node, entry, 0)


async def follow(request: web.Request) -> web.StreamResponse:
    """A task's log from `?offset=`, to its end."""
    node = request.app[NODE]
    text = request.query.get("offset", "0")
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise invalid("`offset` is a number of bytes", param="offset")
    attempt = request.query.get("attempt", "")
    if attempt and not (attempt.isascii() and attempt.isdecimal() and len(attempt) < 10):
        raise invalid("`attempt` is a number", param="attempt")
    entry = node.runner.logs.get(request.match_info["task"], int(attempt) if attempt else None)
    entry.log.check(int(text))
    serve = _serve_records if _wants_records(request) else _serve_plain
    return await serve(request, node, entry, int(text))


def _wants_records(request: web.Request) -> bool:
    return records.CONTENT_TYPE in request.headers.get("Accept", "")


def _opening(request: web.Request) -> Open:
    """What an OPEN would say. Without headers: a task of its own, attempt 1, owner `service`."""
    headers = request.headers
    forwarded = {name: headers[name] for name in FORWARDED_HEADERS if name in headers}
    wish: dict[str, Any] = {
        "task_id": headers.get("X-Llorch-Task") or str(uuid.uuid4()),
        "attempt": headers.get("X-Llorch-Attempt") or 1,
        "pool_id": request.match_info["pool"],
        "path": headers.get("X-Llorch-Path") or NATIVE,
        "owner": headers.get("X-Llorch-Owner") or "service",
        "headers": {**forwarded, "x-request-id": request[REQUEST_ID]},
        "body_len": request.content_length or 0,
    }
    if "X-Llorch-Deadline-Ms" in headers:
        wish["deadline_ms"] = headers["X-Llorch-Deadline-Ms"]
    return parse(Open, wish)


# ---------------------------------------------------------------- the log's own bytes


async def _serve_plain(request: web.Request, node: Node, entry: TaskEntry, offset: int) -> web.StreamResponse:
    """The status waits for HEAD. Whoever reads this way is the client itself: when it goes, it has left."""
    source = entry.log
    async with _reading(node.runner, entry, offset, Gone.LEFT) as reader:
        while source.head is None and source.tail is None:
            await reader.news()
        if source.head is None:
            wire = source.tail.error if source.tail is not None else None
            return error_response(LlorchError.from_wire(wire), request[REQUEST_ID], entry.task_id)
        if source.tail is not None and offset and offset == source.end:
            return web.Response(status=204)
        response = _response(source.head, entry, whole=offset == 0)
        limit_send_buffer(request.transport)
        await response.prepare(request)
        complete = await _pour(reader, entry, response.write, node.slow_reader_timeout_s)
        if complete:
            await response.write_eof()
        elif request.transport is not None:
            request.transport.abort()  # an end in good order would pass for a whole answer
        return response


async def _pour(
    reader: _Reader, entry: TaskEntry, write: Callable[[bytes], Awaitable[None]], slow_reader_timeout_s: float
) -> bool:
    """Every byte of the log, as it comes. False if the answer is not whole and its form has no way to say so."""
    source = entry.log
    while True:
        try:
            data = source.take(reader, CHUNK_BYTES)
        except LlorchError:  # GAP: it was overtaken
            return False
        if data:
            try:
                async with asyncio.timeout(slow_reader_timeout_s):
                    await write(data)
            except TimeoutError:
                log.warning("reader.slow", task_id=entry.task_id, offset=reader.offset)
                return False
        elif source.tail is not None:
            return source.tail.error is None or entry.streamed
        else:
            await reader.news()


def _response(head: Head, entry: TaskEntry, *, whole: bool) -> web.StreamResponse:
    headers = {name: value for name, value in head.headers.items() if whole or name != "content-length"}
    return web.StreamResponse(status=head.status, headers={**headers, **STREAM_HEADERS, "X-Llorch-Task": entry.task_id})


# ---------------------------------------------------------------- records


async def _serve_records(request: web.Request, node: Node, entry: TaskEntry, offset: int) -> web.StreamResponse:
    """ACCEPT at once, then HEAD, DATA, TAIL. An end with no word may mean that the control died."""
    async with _reading(node.runner, entry, offset, Gone.LOST) as reader:
        response = web.StreamResponse(headers={"Content-Type": records.CONTENT_TYPE, "X-Llorch-Task": entry.task_id})
        limit_send_buffer(request.transport)
        await response.prepare(request)
        await response.write(records.encode(0, Type.ACCEPT))
        while entry.log.head is None and entry.log.tail is None:
            await reader.news()
        if entry.log.head is not None:
            await response.write(records.encode_json(0, Type.HEAD, entry.log.head.model_dump()))
        try:
            done = await _pour_records(reader, entry, response, node.slow_reader_timeout_s)
        except LlorchError as error:  # GAP: it was overtaken
            reader.why = Gone.LEFT
            await response.write(records.encode_json(0, Type.REFUSE, error.to_wire(task_id=entry.task_id)))
            done = True
        if done:
            await response.write_eof()
        elif request.transport is not None:
            reader.why = Gone.LEFT  # slow is as good as gone
            request.transport.abort()
        return response


async def _pour_records(
    reader: _Reader, entry: TaskEntry, response: web.StreamResponse, slow_reader_timeout_s: float
) -> bool:
    """DATA as it comes, then TAIL. False if the reader takes nothing. Raises GAP."""
    source = entry.log
    while True:
        data = source.take(reader, CHUNK_BYTES)
        if data:
            record = records.encode(0, Type.DATA, data)
        elif source.tail is not None:
            record = records.encode_json(0, Type.TAIL, tail_wire(source.tail))
        else:
            await reader.news()
            continue
        try:
            async with asyncio.timeout(slow_reader_timeout_s):
                await response.write(record)
        except TimeoutError:
            log.warning("reader.slow", task_id=entry.task_id, offset=reader.offset)
            return False
        if not data:
            return True
