"""The client's side of a task: one class per form of answer.

Owns what is written to a client and when: the commit to a status, `queued` events, pings, error events and frames. Log
bytes pass through as they came, those of a stream event by event; only when an answer fails does this look whether they
had ended already. Every write is bounded in time, so that a reader that stalls costs 30 s, not for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from llorch import sse
from llorch.control.audience import SlowReader
from llorch.control.dispatch import PING_AFTER_S
from llorch.control.tasks import Task
from llorch.errors import Code, LlorchError
from llorch.messages import Head, Tail
from llorch.outlet import Outlet
from llorch.web import error_response, json_response

SSE_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
MAX_HELD_BYTES = 64 * 1024  # of an event that has not come whole; a larger one is passed on in parts
LAST_BLOCK_BYTES = 4 * 1024  # of the last pieces, kept to see whether they ended the answer: its last event is small
NO_TEXT_SHA256 = hashlib.sha256(b"").hexdigest()
QUEUED_EVERY_S = 0.99  # `queued` events come at most once a second; timers may be a little early
MAX_COLLECTED_BYTES = 16 * 1024 * 1024  # a native answer that was asked for as one JSON document

# Of an engine's headers these mean something to the client; the rest are the engine's own business.
_FROM_ENGINE = frozenset({"content-type", "content-length", "content-disposition", "retry-after"})


def canceled_event(tail: Tail | None) -> bytes:
    """The end of a native task that was canceled before its first byte: made here, so without an id."""
    return sse.encode(
        "end",
        json.dumps(
            {
                "finish_reason": "canceled",
                "tokens_in": tail.tokens_in if tail else 0,
                "tokens_out": 0,
                "cached_tokens": 0,
                "ttft_ms": None,
                "decode_ms": None,
                "sha256": NO_TEXT_SHA256 if tail else None,  # what was shown is not kept here
            }
        ),
    )


def error_event(error: LlorchError, request_id: str, task_id: str) -> bytes:
    """A terminal event that the control makes: without an id, for it is in no log."""
    return sse.encode("error", json.dumps(error.to_wire(request_id=request_id, task_id=task_id)))


def empty_end(tail: Tail, request_id: str, task_id: str) -> bytes:
    """The terminal event of a native task whose log is empty."""
    if tail.error is None or tail.finish_reason == "canceled" or tail.error.get("code") == Code.CANCELED:
        return canceled_event(tail)
    return error_event(LlorchError.from_wire(tail.error, fallback=Code.ENGINE_FAILED), request_id, task_id)


def task_headers(task: Task) -> dict[str, str]:
    headers = {"X-Llorch-Task": task.task_id}
    if task.node_id is not None and task.pool_id is not None:
        headers |= {
            "X-Llorch-Node": task.node_id,
            "X-Llorch-Pool": task.pool_id,
            "X-Llorch-Attempts": str(task.attempt),
        }
    if task.replayed:
        headers["Idempotency-Replayed"] = "true"
    if task.queued_ms is not None:
        headers["X-Llorch-Queue-Ms"] = str(round(task.queued_ms))
    return headers


def refusal(error: LlorchError, request_id: str, task: Task) -> web.Response:
    """An error as a whole answer, with what is known of the task."""
    response = error_response(error, request_id, task.task_id)
    response.headers.update(task_headers(task))
    return response


class Stream:
    """An answer that is written piece by piece. `whole` tells whether something else may come after the last piece."""

    def __init__(self, outlet: Outlet, write_timeout_s: float) -> None:
        self._outlet = outlet
        self._write_timeout_s = write_timeout_s
        self._last = (b"", b"")
        self._split = sse.Splitter()
        self.committed = False
        self.whole = True
        self._torn = False  # a part of an event waits for its rest

    def commit(self, status: int, headers: Mapping[str, str], *, hold: bool = False) -> None:
        if not self.committed:
            self.committed = True
            self._outlet.begin(status, headers, hold=hold)

    def flush(self) -> None:
        self._outlet.flush()

    def direct(self, data: bytes) -> bool:
        """Write whole events at once to a client that keeps up. False: nothing was done, `write_events` has to wait."""
        if self._torn or not data.endswith(b"\n\n") or not self._outlet.write_now(data):
            return False
        self.whole = True
        self._last = (self._last[1], data[-LAST_BLOCK_BYTES:])
        return True

    async def write(self, data: bytes, *, whole: bool = True) -> None:
        self.whole = whole
        self._last = (self._last[1], data[-LAST_BLOCK_BYTES:])
        outlet = self._outlet
        outlet.write(data)
        if not outlet.behind:
            return
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await outlet.drained()
        except TimeoutError:
            self.abort()
            raise SlowReader("the client took no byte in time") from None

    async def write_events(self, data: bytes) -> None:
        """Bytes of an event stream, as far as they are whole events; the rest waits for its end.

        A client would take what was cut off for an event when an error comes after it.
        """
        split = self._split
        if split.waiting or not data.endswith(b"\n\n"):  # nearly every piece of a log is whole events
            data = b"".join(split.feed(data))
            if split.waiting > MAX_HELD_BYTES:
                self._torn = False
                await self.write(data + split.finish(), whole=False)
                return
            self._torn = split.waiting > 0
        if data:
            await self.write(data)

    def write_rest(self) -> None:
        """The log has ended, and with it what looked like the beginning of an event."""
        rest, self._torn = self._split.finish(), False
        if rest:
            self.write_end(rest)

    def write_end(self, data: bytes) -> None:
        """What ends an answer is small: nobody waits until the client has taken it."""
        self.whole = True
        self._outlet.write(data)

    async def ping(self) -> None:
        if self.committed and self.whole:
            await self.write(sse.comment("ping"))

    def last_block(self) -> bytes:
        """The last whole event that was written, as far as the last two pieces hold it; b"" if one was cut."""
        blocks = sse.Splitter().feed(b"".join(self._last)) if self.whole else []
        return blocks[-1].rstrip(b"\r\n") if blocks else b""

    def write_last(self, event: bytes) -> None:
        """One more event, in place of one that has not come whole; apart from one that was passed on in parts."""
        self.write_end(event if self.whole else b"\n\n" + event)

    def finished(self) -> web.StreamResponse:
        return self._outlet.finish()

    def cut(self) -> web.StreamResponse:
        return self._outlet.cut()

    def abort(self) -> None:
        self._outlet.abort()


def _not_directly(_data: bytes) -> bool:
    return False


class NativeStream:
    """SSE of native events: the log's own, and the control's `queued`, pings and, if the node can't, the last one."""

    def __init__(self, outlet: Outlet, task: Task, write_timeout_s: float, *, again: bool = False) -> None:
        self._task = task
        self._stream = Stream(outlet, write_timeout_s)
        self.direct = self._stream.direct
        self._again = again  # the task is there: whatever becomes of it is told in its stream
        self._said_queued_at = float("-inf")

    @property
    def committed(self) -> bool:
        return self._stream.committed

    def broken_off(self) -> web.StreamResponse:
        """The end of this connection, and not of the task."""
        return self._stream.cut()

    def _commit(self) -> None:
        self._stream.commit(200, SSE_HEADERS | task_headers(self._task))

    async def waiting(self, position: int, eta_ms: int | None) -> None:
        now = time.monotonic()
        if now - self._said_queued_at < QUEUED_EVERY_S:
            return
        self._said_queued_at = now
        self._commit()
        await self._stream.write(sse.encode("queued", json.dumps({"position": position, "eta_ms": eta_ms})))

    async def idle(self) -> None:
        """Commits too, so that a client can tell a task that waits from a control that hangs."""
        self._commit()
        await self._stream.ping()

    def begin(self, head: Head) -> None:
        self._commit()

    async def write(self, data: bytes) -> None:
        await self._stream.write_events(data)

    def ended(self, tail: Tail) -> web.StreamResponse:
        self._commit()
        self._stream.write_rest()
        if tail.length == 0:
            self._stream.write_end(empty_end(tail, self._task.request_id, self._task.task_id))
        return self._stream.finished()

    def failed(self, error: LlorchError, request_id: str) -> web.StreamResponse:
        if not self._stream.committed and error.code is not Code.CANCELED and not self._again:
            return refusal(error, request_id, self._task)
        self._commit()
        if not _terminal(self._stream.last_block()):  # the node was lost between its last event and its TAIL
            canceled = error.code is Code.CANCELED
            task_id = self._task.task_id
            self._stream.write_last(canceled_event(None) if canceled else error_event(error, request_id, task_id))
        return self._stream.finished()

    def stopped(self, request_id: str) -> web.StreamResponse:
        """The control goes: no terminal event, so the client knows that there is more to fetch."""
        if not self._stream.committed:
            return refusal(stopping(), request_id, self._task)
        return self._stream.finished()


class OpenAiAnswer:
    """A /v1 answer: the engine's own bytes with the engine's status, streamed or not."""

    def __init__(self, outlet: Outlet, task: Task, write_timeout_s: float) -> None:
        self._task = task
        self._stream = Stream(outlet, write_timeout_s)
        self._last_word = time.monotonic()
        self._length: int | None = None  # of the whole answer, where it was announced
        self._events = False  # it is a stream of them
        self.direct: Callable[[bytes], bool] = _not_directly  # once it has begun, if it is

    @property
    def committed(self) -> bool:
        return self._stream.committed

    async def waiting(self, position: int, eta_ms: int | None) -> None:
        if time.monotonic() - self._last_word >= PING_AFTER_S:
            await self.idle()

    async def idle(self) -> None:
        """A stream commits and pings; an answer in one piece can only wait for its status."""
        self._last_word = time.monotonic()
        if self._task.stream:
            self._stream.commit(200, SSE_HEADERS | task_headers(self._task))
            await self._stream.ping()

    def begin(self, head: Head) -> None:
        headers = {name.lower(): value for name, value in head.headers.items() if name.lower() in _FROM_ENGINE}
        length = headers.pop("content-length", "")
        if length.isascii() and length.isdigit() and not self._task.stream:
            self._length = int(length[:18])
            headers["content-length"] = str(self._length)
        if self._task.stream:
            headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            self._events = headers.get("content-type", "").lower().startswith("text/event-stream")
        self._stream.commit(head.status, headers | task_headers(self._task), hold=self._length is not None)
        if self._events:
            self.direct = self._stream.direct

    async def write(self, data: bytes) -> None:
        if self._length is not None and self._task.offset + len(data) > self._length:
            self._stream.flush()
            raise LlorchError(Code.ENGINE_FAILED, "the answer is longer than it was announced")
        if self._events:
            await self._stream.write_events(data)
        else:
            await self._stream.write(data, whole=False)

    def ended(self, tail: Tail) -> web.StreamResponse:
        if tail.length == 0:
            error = LlorchError(Code.CANCELED, "the task was canceled")
            if tail.error is not None:
                error = LlorchError.from_wire(tail.error, fallback=Code.ENGINE_FAILED)
            return self.failed(error, self._task.request_id)
        if not self._task.stream and (tail.error is not None or self._length not in (None, tail.length)):
            raise self._cut()
        self._stream.write_rest()
        return self._stream.finished()

    def failed(self, error: LlorchError, request_id: str) -> web.StreamResponse:
        if not self._stream.committed:
            return refusal(error, request_id, self._task)
        if not self._task.stream:
            raise self._cut()
        last = self._stream.last_block()  # its node may have said the same, though its TAIL was not read
        if last != b"data: [DONE]" and not last.startswith(b'data: {"error"'):
            frame = json.dumps(error.envelope(request_id=request_id, task_id=self._task.task_id))
            self._stream.write_last(sse.encode("", frame))
        return self._stream.finished()

    def stopped(self, request_id: str) -> web.StreamResponse:
        return self.failed(stopping(), request_id)

    def _cut(self) -> ConnectionResetError:
        """An answer in one piece can't be completed: a cut body tells its client so, a short one would lie."""
        self._stream.flush()
        return ConnectionResetError("the answer can't be completed")


class NativeJson:
    """`Accept: application/json`: waits, and answers with the finished task and its text."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._events = sse.Decoder()
        self._text: list[str] = []
        self._size = 0

    @property
    def committed(self) -> bool:
        return False

    async def waiting(self, position: int, eta_ms: int | None) -> None:
        pass

    async def idle(self) -> None:
        pass

    def begin(self, head: Head) -> None:
        pass

    def direct(self, data: bytes) -> bool:
        return False

    async def write(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > MAX_COLLECTED_BYTES:
            raise LlorchError(Code.PAYLOAD_TOO_LARGE, "the answer is too large for one document", hint="stream it")
        try:
            for event in self._events.feed(data):
                if event.event == "token":
                    self._text.append(str(json.loads(event.data)["t"]))
        except (sse.SseError, ValueError, KeyError, TypeError):
            raise LlorchError(Code.ENGINE_FAILED, "the node's answer can't be read") from None

    def ended(self, tail: Tail) -> web.StreamResponse:
        if tail.error is not None:
            raise LlorchError.from_wire(tail.error, fallback=Code.ENGINE_FAILED)
        view: dict[str, Any] = self._task.view()
        return json_response(view | {"text": "".join(self._text)}, headers=task_headers(self._task))

    def failed(self, error: LlorchError, request_id: str) -> web.StreamResponse:
        return refusal(error, request_id, self._task)

    def stopped(self, request_id: str) -> web.StreamResponse:
        return refusal(stopping(), request_id, self._task)


class Detached:
    """Nobody listens: the log waits on its node for whoever comes."""

    async def waiting(self, position: int, eta_ms: int | None) -> None:
        pass

    async def idle(self) -> None:
        pass

    def begin(self, head: Head) -> None:
        pass

    def direct(self, data: bytes) -> bool:
        return True

    async def write(self, data: bytes) -> None:
        pass


Answer = NativeStream | OpenAiAnswer | NativeJson


def stopping() -> LlorchError:
    return LlorchError(Code.DRAINING, "this control is shutting down", retry_after_ms=2_000)


def _terminal(block: bytes) -> bool:
    """Whether an event block of a native stream is its last."""
    return any(line in (b"event: end", b"event: error") for line in block.split(b"\n"))
