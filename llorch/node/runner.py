"""One task on this node: accepted against a slot, sent to its engine, its answer written to its log.

Owns the steps of a task (accept, body, engine, log, seal), its deadline and its cancelling, and that its slot is given
back on every path. Engine bytes are translated by `engines.openai_api` and kept by `tasklog`; who reads them is nothing
to this module. Never logs a prompt, an output or a key, and never runs more than the pools have slots for.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Protocol

import aiohttp

from llorch.breaker import TRIAL_TIMEOUT_S
from llorch.errors import Code, LlorchError, invalid, without_frames
from llorch.logs import Log
from llorch.messages import Head, Open, Tail, TaskBody, Timings, decode_object, parse
from llorch.node.answer_wire import error_wire
from llorch.node.engine_answer import BROKEN, error_body, told_of_its_end
from llorch.node.engine_keys import EngineKeys
from llorch.node.engines import openai_api
from llorch.node.engines.openai_api import Decoder, EngineRequest, NativeDecoder, TaskFacts
from llorch.node.replicas import Lease
from llorch.node.tasklog import NATIVE, Gone, Reader, State, TaskEntry, TaskLogs
from llorch.openai_paths import served
from llorch.tasks import Guard
from llorch.web import MIN_BODY_RATE

BODY_TIMEOUT_S = 30.0  # a slot is held while the body comes, so it must not come for ever; a large one takes longer
ROOM_TIMEOUT_S = 30.0  # a reader that is a whole log behind for this long is overtaken
STALL_AFTER_S = 120.0  # an engine that has begun to stream and is silent for this long has stopped
PIECE_BYTES = 256 * 1024  # of a large answer that goes into the log at once
SWEEP_S = 0.5
READ_POLL_S = 0.05  # how often a node that drains looks whether ended tasks have been read
STREAM_HEADERS = {"content-type": "text/event-stream"}

# What an engine may learn of the request besides its body. Everything else is between the client and llorch;
# llama-server, for one, goes on generating after a disconnect when it is shown X-Conversation-Id.
FORWARDED_HEADERS = frozenset(
    {"traceparent", "tracestate", "x-request-id", "anthropic-version", "anthropic-beta", "openai-beta"}
)

# It failed, fell silent, or can't be reached.
_ENGINES_FAULT = frozenset({Code.ENGINE_FAILED, Code.ENGINE_STALLED})

_PLAIN = re.compile(r"[\x20-\x7e]{1,256}")

log = Log("node.runner")


class SlotHolder(Protocol):
    """The pools, as a task sees them."""

    def acquire(self, pool_id: str, task_id: str, model: str | None = None) -> Lease: ...
    def told(self, task_id: str, failed: bool, now: float) -> None: ...
    def release(self, task_id: str) -> None: ...
    def measured(self, pool_id: str, *, prompt_tps: float | None, decode_tps: float | None) -> None: ...


class Counted(Protocol):
    """Who counts tasks."""

    def began(self, model: str) -> None: ...
    def ended(self, model: str, outcome: str, code: str, tail: Tail) -> None: ...


class Runner:
    """Every task that runs on this node. One caller, on one loop."""

    def __init__(
        self,
        node_id: str,
        pools: SlotHolder,
        logs: TaskLogs,
        session: aiohttp.ClientSession,
        counted: Counted,
        *,
        max_body_bytes: int,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.node_id = node_id
        self.logs = logs
        self.pools = pools
        self.session = session
        self.counted = counted
        self.keys = EngineKeys()
        self.changed = changed
        self.clock, self.wall = clock, wall
        self.max_body_bytes = max_body_bytes
        self._guard = Guard("node.runner")
        self._executions: set[Execution] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._executions)

    # ---- what links and routes call

    def accept(self, opening: Open) -> tuple[TaskEntry, bool]:
        """The task of an OPEN, and whether it is new: then its body has to be given. Raises LlorchError to refuse.

        A slot is held from here on. Nothing of the body is needed to say yes or no.
        """
        known = self.logs.known(opening)
        if known is not None:
            return known, False
        if opening.body_len > self.max_body_bytes:
            raise LlorchError(Code.PAYLOAD_TOO_LARGE, f"the body is over {self.max_body_bytes} bytes")
        if opening.prefix_len:
            raise invalid("this node does not continue tasks that began elsewhere", param="prefix_len")
        if opening.path != NATIVE:
            served(opening.path)
        self._fence(opening)
        lease = self.pools.acquire(opening.pool_id, _slot(opening), opening.model)
        entry = self.logs.add(opening, self.clock(), self.wall())
        execution = Execution(self, entry, lease)
        entry.run = execution
        self._executions.add(execution)
        self._idle.clear()
        execution.start(self._guard)
        self.counted.began(lease.model)
        self.changed()
        return entry, True

    def _fence(self, opening: Open) -> None:
        """A higher attempt ends a lower one, also where there is no slot for it yet: the lower one may hold it."""
        older = self.logs.overtaken(opening)
        if older is not None:
            self.cancel(older)

    def attach(self, entry: TaskEntry, reader: Reader) -> None:
        self.logs.attach(entry, reader)

    def leave(self, entry: TaskEntry, reader: Reader, why: Gone) -> None:
        """`reader` goes; what becomes of the task is decided here, now or later."""
        if self.logs.leave(entry, reader, why, self.clock()):
            self.cancel(entry)

    def cancel(self, entry: TaskEntry) -> None:
        """End a task; a task that has ended stays as it is."""
        if entry.run is not None:
            entry.run.cancel()

    def discard(self, entry: TaskEntry) -> None:
        """End a task that its control has taken elsewhere: nobody is to find this attempt any more, or its end."""
        self.logs.discard(entry)
        self.cancel(entry)

    def never_came(self, entry: TaskEntry) -> None:
        """The rest of its body can't come: it is as if it had never been here, and whoever asks again has it run."""
        if entry.run is not None:
            self.logs.discard(entry)
            entry.run.stop(LlorchError(Code.NODE_LOST, "the task did not come here whole"))

    # ---- the life of the node

    async def sweep(self) -> float:
        """A step of a loop: readers that did not come back, engines that fell silent, logs past their time."""
        now = self.clock()
        for entry in self.logs.orphaned(now):
            log.info("task.orphaned", task_id=entry.task_id, node_id=self.node_id)
            self.cancel(entry)
        for execution in self._executions:
            execution.check(now)
        self.logs.expire(now)
        return SWEEP_S

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing runs and what has ended was read by those who are still reading it."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                while self.logs.being_read:  # noqa: ASYNC110
                    await asyncio.sleep(READ_POLL_S)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End what still runs, with a word to its readers."""
        for execution in list(self._executions):
            execution.stop(LlorchError(Code.NODE_LOST, "the node was stopped before the task had ended"))
        await self._idle.wait()
        await self._guard.close()

    def ended(self, execution: Execution, tail: Tail) -> None:
        """`execution` has sealed its log."""
        entry = execution.entry
        entry.run = None  # what it took to run it is not kept with what it said
        self._executions.discard(execution)
        if not self._executions:
            self._idle.set()
        slot, failed = _slot(entry.opening), _failed(tail)
        if failed is not None:
            self.pools.told(slot, failed, self.clock())
        self.pools.release(slot)
        self.logs.sealed(entry, self.clock(), self.wall())
        self.pools.measured(
            entry.opening.pool_id, prompt_tps=tail.timings.prompt_tps, decode_tps=tail.timings.decode_tps
        )
        code = str(tail.error["code"]) if tail.error is not None else ""
        canceled = tail.finish_reason == "canceled"
        outcome = "canceled" if canceled else "failed" if tail.error is not None else "done"
        self.counted.ended(execution.lease.model, outcome, code, tail)
        (log.info if code and not canceled else log.debug)(
            "task.ended",
            task_id=entry.task_id,
            node_id=self.node_id,
            pool_id=entry.opening.pool_id,
            attempt=entry.opening.attempt,
            outcome=outcome,
            code=code or None,
            tokens_out=tail.tokens_out,
        )
        self.changed()


def _too_late() -> LlorchError:
    return LlorchError(Code.DEADLINE_EXCEEDED, "the task's deadline has passed")


def _slot(opening: Open) -> str:
    """Who holds the slot: an attempt that overtakes another holds one of its own while the other still ends."""
    return f"{opening.task_id}/{opening.attempt}"


def _failed(tail: Tail) -> bool | None:
    """Whether the engine is to blame for a task that ended like this; None where its end says nothing of the engine:
    a cancel, a deadline, a body that can't be served, this node's own stop."""
    if tail.error is None:
        return None if tail.finish_reason == "canceled" else False
    return True if tail.error["code"] in _ENGINES_FAULT else None


class Execution:
    """One attempt. `run` talks to the engine; whatever becomes of it, `_sealed` ends the log and frees the slot.

    Sealing is a callback of the asyncio task, not a `finally` in it: a task that is cancelled before its first step
    runs none of its own code.
    """

    def __init__(self, runner: Runner, entry: TaskEntry, lease: Lease) -> None:
        loop = asyncio.get_running_loop()
        self.entry = entry
        self.lease = lease
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
        self._heard_at = 0.0

    # ---- what others ask of it

    def start(self, guard: Guard) -> None:
        self._arm(self.entry.opening.deadline_ms)
        self._task = guard.spawn(self._run(), f"task.{self.entry.task_id}")
        self._task.add_done_callback(self._ended)

    def give_body(self, body: bytes) -> None:
        if self._body is not None and not self._body.done():
            self._body.set_result(body)

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
        if began and not self._pending and now - self._heard_at > STALL_AFTER_S:
            self.stop(LlorchError(Code.ENGINE_STALLED, f"the engine sent nothing for {STALL_AFTER_S:.0f} s"))
        elif streamed and not began and self.lease.trial and now - self.entry.accepted_at > TRIAL_TIMEOUT_S:
            self.stop(LlorchError(Code.ENGINE_STALLED, "the engine, which is being tried, sent no first token in time"))

    # ---- its life

    async def _run(self) -> None:
        try:
            request = self._encode(await self._whole_body())
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
                self._heard_at = now = clock()
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
        self._heard_at = self._runner.clock()

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
