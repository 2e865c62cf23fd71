"""One attempt at a task, from its acceptance to its sealed log: body, slot, engine, translation, log, end.

Owns those steps, the attempt's deadline and its cancelling. Engine bytes are translated by `engines.openai_api` and
kept by `tasklog`. Never logs a prompt, an output or a key; which attempts run, and what frees their slots, is the
runner's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Protocol

import aiohttp

from llorch.breaker import TRIAL_TIMEOUT_S
from llorch.errors import Code, LlorchError, without_frames
from llorch.logs import Log
from llorch.messages import Head, Tail, TaskBody, Timings, decode_object, parse
from llorch.node.answer_wire import error_wire
from llorch.node.engine_answer import BROKEN, error_body, told_of_its_end
from llorch.node.engine_keys import EngineKeys
from llorch.node.engines import openai_api
from llorch.node.engines.openai_api import Decoder, EngineRequest, NativeDecoder, TaskFacts
from llorch.node.replicas import Lease
from llorch.node.tasklog import NATIVE, State, TaskEntry
from llorch.tasks import Guard
from llorch.web import MIN_BODY_RATE

BODY_TIMEOUT_S = 30.0  # a slot is held while the body comes, so it must not come for ever; a large one takes longer
ROOM_TIMEOUT_S = 30.0  # a reader that is a whole log behind for this long is overtaken
STALL_AFTER_S = 120.0  # an engine that has begun to stream and is silent for this long has stopped
PIECE_BYTES = 256 * 1024  # of a large answer that goes into the log at once
STREAM_HEADERS = {"content-type": "text/event-stream"}

# What an engine may learn of the request besides its body. Everything else is between the client and llorch;
# llama-server, for one, goes on generating after a disconnect when it is shown X-Conversation-Id.
FORWARDED_HEADERS = frozenset(
    {"traceparent", "tracestate", "x-request-id", "anthropic-version", "anthropic-beta", "openai-beta"}
)

_PLAIN = re.compile(r"[\x20-\x7e]{1,256}")

log = Log("node.execution")


class Host(Protocol):
    """Who runs attempts, as one of them sees it."""

    node_id: str
    session: aiohttp.ClientSession
    keys: EngineKeys
    clock: Callable[[], float]

    def ended(self, execution: Execution, tail: Tail) -> None: ...


class Execution:
    """One attempt. `run` talks to the engine; whatever becomes of it, `_sealed` ends the log and frees the slot.

    Sealing is a callback of the asyncio task, not a `finally` in it: a task that is cancelled before its first step
    runs none of its own code.
    """

    def __init__(self, runner: Host, entry: TaskEntry, lease: Lease) -> None:
        loop = asyncio.get_running_loop()
        self.entry = entry
        self.lease = lease
        self._seat: asyncio.Future[Lease] | None = None if lease.replica_id is not None else loop.create_future()
        self._runner = runner
        self._facts = TaskFacts(
            task_id=entry.task_id,
            node_id=runner.node_id,
            pool_id=lease.pool_id,
            model=lease.model,
            attempt=entry.opening.attempt,
            accepted_at=entry.accepted_at,
            request_id=entry.opening.headers.get("x-request-id"),
        )
        self._body: asyncio.Future[bytes] | None = loop.create_future()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._decoder: Decoder | None = None
        self._head = Head(headers=STREAM_HEADERS)  # of a native stream that is canceled before its engine answered
        self._pending = b""  # decoded, and not yet in the log
        self._stopped: LlorchError | None = None
        self._failed: LlorchError | None = None
        self.heard_at = 0.0

    # ---- what others ask of it

    def start(self, guard: Guard) -> None:
        self._arm(self.entry.opening.deadline_ms)
        self._task = guard.spawn(self._run(), f"task.{self.entry.task_id}")
        self._task.add_done_callback(self._ended)

    def give_body(self, body: bytes) -> None:
        if self._body is not None and not self._body.done():
            self._body.set_result(body)

    def seat(self, lease: Lease) -> None:
        if self._seat is not None and not self._seat.done():
            self._seat.set_result(lease)

    def cancel(self) -> None:
        late = self._timer is not None and asyncio.get_running_loop().time() >= self._timer.when()
        self.stop(_too_late() if late else LlorchError(Code.CANCELED, "the task was canceled"))

    def stop(self, why: LlorchError) -> None:
        """End it now, for the first reason given."""
        if self._stopped is None and self._task is not None and not self._task.done():
            self._stopped = why
            self._task.cancel()

    def check(self, now: float) -> None:
        """Called by the sweep: an engine that has begun its stream must not fall silent."""
        streamed = self.entry.streamed and self._decoder is not None
        began = streamed and self._decoder is not None and self._decoder.first_content
        if began and not self._pending and now - self.heard_at > STALL_AFTER_S:
            self.stop(LlorchError(Code.ENGINE_STALLED, f"the engine sent nothing for {STALL_AFTER_S:.0f} s"))
        elif streamed and not began and self.lease.trial and now - self.entry.accepted_at > TRIAL_TIMEOUT_S:
            self.stop(LlorchError(Code.ENGINE_STALLED, "the engine, which is being tried, sent no first token in time"))

    # ---- its life

    async def _run(self) -> None:
        try:
            request = self._encode(await self._whole_body())
            if self._seat is not None:  # its model is on its way
                self.lease = await self._seat
            self.entry.state = State.RUNNING
            await self._exchange(request)
        except LlorchError as error:
            self._failed = without_frames(error)

    def _check_model(self, asked: object) -> None:
        """Without a model in the OPEN, as with curl, the body's own must be the pool's: engines ignore it."""
        if self.entry.opening.model is None and isinstance(asked, str) and asked != self.lease.model:
            raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"pool {self.lease.pool_id} serves {self.lease.model}")

    async def _whole_body(self) -> bytes:
        assert self._body is not None  # it is read once
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S + self.entry.opening.body_len / MIN_BODY_RATE):
                return await self._body
        except TimeoutError:
            raise LlorchError(Code.REQUEST_TIMEOUT, "the body did not arrive in time") from None
        finally:
            self._body = None  # a long prompt is not kept for as long as its answer takes

    def _encode(self, body: bytes) -> EngineRequest:
        """What the engine is asked; decides the decoder too. Raises LlorchError for a body that is refused."""
        opening, lease = self.entry.opening, self.lease
        value = decode_object(body)
        if opening.path == NATIVE:
            task = parse(TaskBody, value)
            self._check_model(task.model)
            request = openai_api.encode_native(task, lease.served_as, lease.engine)
            self._decoder = NativeDecoder(self._facts)
            if opening.deadline_ms is None:
                self._arm(task.deadline_ms)
        else:
            request = openai_api.encode_openai(opening.path, value, lease.served_as)
            self._check_model(value.get("model"))
            self._decoder = openai_api.openai_decoder(self._facts, request)
        self.entry.streamed = request.stream
        return request

    async def _exchange(self, request: EngineRequest) -> None:
        headers = {"Content-Type": "application/json"}
        headers.update(
            (name, value)
            for name, value in self.entry.opening.headers.items()
            if name in FORWARDED_HEADERS and value.isascii() and value.isprintable()
        )
        if self.lease.api_key_file is not None:
            headers["Authorization"] = f"Bearer {self._key(self.lease.api_key_file)}"
        try:
            response = await self._runner.session.post(
                self.lease.url.rstrip("/") + request.path, data=request.body, headers=headers, allow_redirects=False
            )
        except BROKEN as error:
            raise LlorchError(
                Code.ENGINE_FAILED, "the engine can't be reached", details={"reason": type(error).__name__}
            ) from None
        try:
            with told_of_its_end(response):
                if response.status != 200:
                    raise openai_api.normalise_error(response.status, await error_body(response))
                self._head = _head(request, response)
                await self._copy(response)
        finally:
            response.close()  # an answer that is not read to its end keeps the engine generating

    def _key(self, path: str) -> str:
        try:
            return self._runner.keys.read(path)
        except (OSError, ValueError):
            raise LlorchError(Code.ENGINE_FAILED, "the engine's API key can't be read") from None

    async def _copy(self, response: aiohttp.ClientResponse) -> None:
        """The engine's answer into the log, chunk by chunk as it comes."""
        decoder, clock = self._decoder, self._runner.clock
        assert decoder is not None  # set by _encode
        cut = False
        try:
            async for chunk in response.content.iter_any():
                self.heard_at = now = clock()
                data = decoder.feed(chunk, now)
                if data:
                    await self._write(data)
                if decoder.done:
                    break
        except BROKEN:
            cut = True
        last = decoder.finish(clock(), cut)
        if last:
            await self._write(last)

    async def _write(self, data: bytes) -> None:
        """Log bytes. Waits while an attached reader would lose bytes by it, so that a large answer passes whole."""
        entry = self.entry
        entry.tokens_out = self._decoder.usage.tokens_out if self._decoder is not None else 0
        if entry.log.fits(len(data)):
            self._put(data)
            return
        self._pending = data
        while self._pending:
            # Blocks of a stream stay whole: what is pending when the task is stopped is written before its last event.
            piece = self._pending[: min(PIECE_BYTES, entry.log.kept_bytes)]
            if not await entry.log.room(len(piece), ROOM_TIMEOUT_S):
                log.warning("reader.overtaken", task_id=entry.task_id, node_id=self._runner.node_id)
            self._pending = self._pending[len(piece) :]
            self._put(piece)
        self.heard_at = self._runner.clock()

    def _put(self, data: bytes) -> None:
        if self.entry.log.head is None:
            self.entry.log.begin(self._head, data)
        else:
            self.entry.log.append(data)

    def _arm(self, deadline_ms: int | None) -> None:
        if deadline_ms is not None:
            self._timer = asyncio.get_running_loop().call_later(deadline_ms / 1_000, self.stop, _too_late())

    # ---- its end

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            tail = self._seal(self._failure(task))
        except Exception:
            log.fault("task.unsealed", task_id=self.entry.task_id, node_id=self._runner.node_id)
            tail = self._seal_as_it_is()
        self._task = None  # which keeps its CancelledError, whose frames keep this
        self._runner.ended(self, tail)

    def _seal_as_it_is(self) -> Tail:
        """After a fault of ours: the slot goes free all the same, and readers learn that this is the end."""
        source = self.entry.log
        if source.tail is None:
            fault = LlorchError(Code.INTERNAL, "an unexpected fault on the node; it was logged")
            status = fault.status if source.head is None else None
            source.seal(Tail(length=source.end, sha256=source.sha256, error=fault.to_wire(), status=status))
        assert source.tail is not None
        return source.tail

    def _failure(self, task: asyncio.Task[None]) -> LlorchError | None:
        """Why the attempt ended, if not by itself."""
        if self._stopped is not None and task.cancelled():
            return self._stopped
        if task.cancelled():
            return LlorchError(Code.NODE_LOST, "the node was stopped before the task had ended")
        if task.exception() is not None:
            return LlorchError(Code.INTERNAL, "an unexpected fault on the node; it was logged")
        return self._failed

    def _seal(self, failure: LlorchError | None) -> Tail:
        now, entry = self._runner.clock(), self.entry
        decoder = self._decoder
        if decoder is None and entry.native:
            decoder = NativeDecoder(self._facts)
        last, self._pending = self._pending, b""
        if failure is not None and decoder is not None:
            last += decoder.cancel(now) if failure.code is Code.CANCELED else decoder.fail(failure, now)
        if last:
            self._put(last)
        error = decoder.error if decoder is not None else failure
        empty = entry.log.head is None
        tail = Tail(
            length=entry.log.end,
            finish_reason=_finish_reason(decoder, error),
            tokens_in=decoder.usage.tokens_in if decoder is not None else 0,
            tokens_out=decoder.usage.tokens_out if decoder is not None else 0,
            cached_tokens=decoder.usage.cached_tokens if decoder is not None else 0,
            timings=decoder.timings if decoder is not None else Timings(),
            sha256=entry.log.sha256,
            error=error_wire(error, request_id=self._facts.request_id, task_id=entry.task_id) if error else None,
            status=error.status if error and empty else None,
        )
        entry.log.seal(tail)
        return tail


def _finish_reason(decoder: Decoder | None, error: LlorchError | None) -> str | None:
    if decoder is not None and decoder.finish_reason is not None:
        return decoder.finish_reason
    return "canceled" if error is not None and error.code is Code.CANCELED else None


def _head(request: EngineRequest, response: aiohttp.ClientResponse) -> Head:
    """HEAD for the client: what the bytes are. The length only where they pass unchanged and whole."""
    if request.stream:
        return Head(status=200, headers=STREAM_HEADERS)
    kind = response.headers.get("Content-Type", "")
    headers = {"content-type": kind if _PLAIN.fullmatch(kind) else "application/json"}
    if response.content_length is not None and "Content-Encoding" not in response.headers:
        headers["content-length"] = str(response.content_length)
    return Head(status=200, headers=headers)


def _too_late() -> LlorchError:
    return LlorchError(Code.DEADLINE_EXCEEDED, "the task's deadline has passed")
