"""One attempt at a task, from its acceptance to its sealed log: body, slot, engine, translation, log, end.

Owns those steps, the attempt's deadline and its cancelling. Engine bytes are translated by `engines` and
kept by `tasklog`. Never logs a prompt, an output or a key; which attempts run, and what frees their slots, is the
runner's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Protocol

from llorch.breaker import TRIAL_TIMEOUT_S
from llorch.errors import Code, LlorchError, without_frames
from llorch.logs import Log
from llorch.messages import Head, Tail, TaskBody, Timings, decode_object, parse
from llorch.node.answer_wire import error_wire
from llorch.node.engine_connections import Engines, Exchange
from llorch.node.engine_keys import EngineKeys
from llorch.node.engines import openai_api, requests
from llorch.node.engines.openai_api import Decoder, NativeDecoder, TaskFacts
from llorch.node.engines.requests import EngineRequest
from llorch.node.replicas import Lease
from llorch.node.task_entry import NATIVE, State, TaskEntry
from llorch.tasks import Guard
from llorch.web import MIN_BODY_RATE

BODY_TIMEOUT_S = 30.0  # a slot is held while the body comes, so it must not come for ever; a large one takes longer
ROOM_TIMEOUT_S = 30.0  # a reader that is a whole log behind for this long is overtaken
STALL_AFTER_S = 120.0  # an engine that has begun to stream and is silent for this long has stopped
PIECE_BYTES = 256 * 1024  # of a large answer that goes into the log at once
STREAM_HEADERS = {"content-type": "text/event-stream"}
STREAM_HEAD = Head(headers=STREAM_HEADERS)
MAX_ERROR_BYTES = 64 * 1024  # of an engine's error answer
ERROR_BODY_TIMEOUT_S = 5.0

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
    engines: Engines
    keys: EngineKeys
    clock: Callable[[], float]

    def ended(self, execution: Execution, tail: Tail) -> None: ...


class Execution:
    """One attempt, from one call to the next: nothing waits in it, so that a token costs no turn of the loop.

    It is what reads its engine's answer (an engine_connections.Taker). Whatever becomes of it, `_end` seals the log and
    frees the slot, once.
    """

    def __init__(self, runner: Host, entry: TaskEntry, lease: Lease, guard: Guard) -> None:
        self.entry = entry
        self.lease = lease
        self._runner = runner
        self._guard = guard
        self._facts = TaskFacts(
            entry.task_id,
            runner.node_id,
            lease.pool_id,
            lease.model,
            entry.opening.attempt,
            entry.accepted_at,
            entry.opening.headers.get("x-request-id"),
        )
        self._wants_body = True
        self._request: EngineRequest | None = None  # until it is sent
        self._streams = True
        self._exchange: Exchange | None = None
        self._status = 0  # of the engine's answer, once it has begun
        self._error: list[bytes] | None = None  # what an engine says in place of an answer
        self._answer_over = False
        self._cut = False  # by a broken connection
        self._timer: asyncio.TimerHandle | None = None  # of the deadline
        self._error_timer: asyncio.TimerHandle | None = None
        self._decoder: Decoder | None = None
        self._head = STREAM_HEAD  # of a native stream that is canceled before its engine answered
        self._pending = b""  # decoded, and not yet in the log
        self._writing: asyncio.Task[None] | None = None  # waits for room in the log
        self._stopped: LlorchError | None = None
        self.over = False
        self.heard_at = 0.0
        self._arm(entry.opening.deadline_ms)

    # ---- what others ask of it

    def give_body(self, body: bytes) -> None:
        if self._wants_body and not self._deaf:
            self._wants_body = False
            self._guarded(self._begin, body)

    def seat(self, lease: Lease) -> None:
        """The model that it waits for is there."""
        if self.lease.replica_id is None and not self._deaf:
            self.lease = lease
            if self._request is not None:
                self._guarded(self._ask, self._request)

    def cancel(self) -> None:
        late = self._timer is not None and asyncio.get_running_loop().time() >= self._timer.when()
        self.stop(_too_late() if late else LlorchError(Code.CANCELED, "the task was canceled"))

    def stop(self, why: LlorchError) -> None:
        """End it, for the first reason given: the engine is left at once, the log sealed in the loop's next turn, for
        who stops it may be reading that log just now."""
        if self._deaf:
            return
        self._stopped = why
        self._leave_engine()
        asyncio.get_running_loop().call_soon(self._end, why)

    def check(self, now: float) -> None:
        """Called by the sweep: a body must come in time, and an engine that has begun its stream not fall silent."""
        if self._wants_body:
            if now - self.entry.accepted_at > BODY_TIMEOUT_S + self.entry.opening.body_len / MIN_BODY_RATE:
                self.stop(LlorchError(Code.REQUEST_TIMEOUT, "the body did not arrive in time"))
            return
        streamed = self.entry.streamed and self._decoder is not None
        began = streamed and self._decoder is not None and self._decoder.first_content
        if began and not self._pending and now - self.heard_at > STALL_AFTER_S:
            self.stop(LlorchError(Code.ENGINE_STALLED, f"the engine sent nothing for {STALL_AFTER_S:.0f} s"))
        elif streamed and not began and self.lease.trial and now - self.entry.accepted_at > TRIAL_TIMEOUT_S:
            self.stop(LlorchError(Code.ENGINE_STALLED, "the engine, which is being tried, sent no first token in time"))

    # ---- from the body to the engine

    def _begin(self, body: bytes) -> None:
        request = self._encode(body)
        if self.lease.replica_id is None:
            self._request = request  # its model is on its way
        else:
            self._ask(request)

    def _check_model(self, asked: object) -> None:
        """Without a model in the OPEN, as with curl, the body's own must be the pool's: engines ignore it."""
        if self.entry.opening.model is None and isinstance(asked, str) and asked != self.lease.model:
            raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"pool {self.lease.pool_id} serves {self.lease.model}")

    def _encode(self, body: bytes) -> EngineRequest:
        """What the engine is asked; decides the decoder too. Raises LlorchError for a body that is refused."""
        opening, lease = self.entry.opening, self.lease
        value = decode_object(body)
        if opening.path == NATIVE:
            task = parse(TaskBody, value)
            self._check_model(task.model)
            request = requests.encode_native(task, lease.served_as, lease.engine)
            self._decoder = NativeDecoder(self._facts)
            if opening.deadline_ms is None:
                self._arm(task.deadline_ms)
        else:
            request = requests.encode_openai(opening.path, value, lease.served_as, body)
            self._check_model(value.get("model"))
            self._decoder = openai_api.openai_decoder(self._facts, request)
        self.entry.streamed = request.stream
        return request

    def _ask(self, request: EngineRequest) -> None:
        self.entry.state = State.RUNNING
        self._request, self._streams = None, request.stream
        headers = {"Content-Type": "application/json"}
        headers |= {
            name: value
            for name, value in self.entry.opening.headers.items()
            if name in FORWARDED_HEADERS and value.isascii() and value.isprintable()
        }
        if self.lease.api_key_file is not None:
            headers["Authorization"] = f"Bearer {self._key(self.lease.api_key_file)}"
        try:
            self._exchange = self._runner.engines.ask(self.lease.url, request.path, headers, request.body, self)
        except ValueError as error:
            raise _unreachable(type(error).__name__) from None

    def _key(self, path: str) -> str:
        try:
            return self._runner.keys.read(path)
        except (OSError, ValueError):
            raise LlorchError(Code.ENGINE_FAILED, "the engine's API key can't be read") from None

    # ---- engine_connections.Taker

    def answered(self, status: int, headers: Mapping[str, str]) -> None:
        self._status = status
        if status == 200:
            self._head = _head(self._streams, headers)
            return
        self._error = []
        self._error_timer = asyncio.get_running_loop().call_later(ERROR_BODY_TIMEOUT_S, self._refused)

    def received(self, data: bytes) -> None:
        if self._error is None:
            if self._stopped is None and not self.over:
                try:
                    self._decode(data)
                except Exception as error:
                    self._failed(error)
            return
        self._error.append(data)
        if sum(map(len, self._error)) >= MAX_ERROR_BYTES:
            self._refused()

    def ended(self, broken: str | None) -> None:
        self._exchange = None
        if self._error is not None:
            self._refused()
        elif not self._status:
            self._fail(_unreachable(broken))
        else:
            self._answer_over, self._cut = True, broken is not None
            self._guarded(self._go_on)

    def _refused(self) -> None:
        """The engine's answer is an error; what there is of its words has been heard."""
        said = b"".join(self._error or ())[:MAX_ERROR_BYTES]
        self._fail(openai_api.normalise_error(self._status, said))

    def _decode(self, data: bytes) -> None:
        decoder = self._decoder
        assert decoder is not None  # set by _encode
        self.heard_at = now = self._runner.clock()
        decoded = decoder.feed(data, now)
        if decoded:
            kept = self.entry.log
            if self._pending or kept.head is None or not kept.fits(len(decoded)):
                self._write(decoded)
            else:
                self.entry.tokens_out = decoder.usage.tokens_out
                kept.append(decoded)
        if decoder.done:
            self._go_on()

    def _write(self, data: bytes) -> None:
        """Log bytes. They wait while an attached reader would lose bytes by them: a large answer passes whole."""
        entry, decoder = self.entry, self._decoder
        if decoder is not None:
            entry.tokens_out = decoder.usage.tokens_out
        if not self._pending and entry.log.fits(len(data)):
            self._put(data)
            return
        self._pending += data
        if self._exchange is not None:
            self._exchange.pause()
        if self._writing is None:
            self._writing = self._guard.spawn(self._write_in_pieces(), f"write.{entry.task_id}")

    async def _write_in_pieces(self) -> None:
        entry = self.entry
        while self._pending:
            # Blocks of a stream stay whole: what is pending when the task is stopped is written before its last event.
            piece = self._pending[: min(PIECE_BYTES, entry.log.kept_bytes)]
            if not await entry.log.room(len(piece), ROOM_TIMEOUT_S):
                log.warning("reader.overtaken", task_id=entry.task_id, node_id=self._runner.node_id)
            self._pending = self._pending[len(piece) :]
            self._put(piece)
        self._writing = None
        self.heard_at = self._runner.clock()
        if self._exchange is not None:
            self._exchange.resume()
        self._guarded(self._go_on)

    def _go_on(self) -> None:
        """All that was decoded is in the log, or waits to be: is that all there will be?"""
        decoder = self._decoder
        assert decoder is not None
        if self._answer_over and not decoder.done and not self._pending:
            last = decoder.finish(self._runner.clock(), self._cut)
            if last and self.entry.log.head is None and self.entry.log.fits(len(last)):
                self.entry.log.begin(self._head, last, wake=False)  # it has come whole, and is sealed below
            elif last:
                self._write(last)
        if decoder.done and not self._pending:
            if self._exchange is not None:
                self._exchange.finish()
                self._exchange = None
            self._end(None)

    def _put(self, data: bytes) -> None:
        if self.entry.log.head is None:
            self.entry.log.begin(self._head, data)
        else:
            self.entry.log.append(data)

    def _arm(self, deadline_ms: int | None) -> None:
        if deadline_ms is not None:
            self._timer = asyncio.get_running_loop().call_later(deadline_ms / 1_000, self.stop, _too_late())

    # ---- its end

    @property
    def _deaf(self) -> bool:
        """It has ended, or is about to: nothing that comes now counts."""
        return self.over or self._stopped is not None

    def _guarded(self, step: Callable[..., None], *given: object) -> None:
        """Whatever goes wrong in a step ends the attempt, and nobody else's."""
        if self._deaf:
            return
        try:
            step(*given)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, LlorchError):
            self._fail(without_frames(error))
            return
        log.fault("task.fault", task_id=self.entry.task_id, node_id=self._runner.node_id)
        self._fail(LlorchError(Code.INTERNAL, "an unexpected fault on the node; it was logged"))

    def _fail(self, error: LlorchError) -> None:
        if not self._deaf:
            self._leave_engine()
            self._end(error)

    def _leave_engine(self) -> None:
        """An answer that is not read to its end would keep the engine generating."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.abort()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _end(self, failure: LlorchError | None) -> None:
        """`failure`: why it ended, if not by itself."""
        if self.over:
            return
        self.over = True
        for timer in (self._timer, self._error_timer):
            if timer is not None:
                timer.cancel()
        try:
            tail = self._seal(failure)
        except Exception:
            log.fault("task.unsealed", task_id=self.entry.task_id, node_id=self._runner.node_id)
            tail = self._seal_as_it_is()
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


def _head(streams: bool, headers: Mapping[str, str]) -> Head:
    """HEAD for the client: what the bytes are. The length only where they pass unchanged and whole."""
    if streams:
        return STREAM_HEAD
    kind = headers.get("content-type", "")
    told = {"content-type": kind if _PLAIN.fullmatch(kind) else "application/json"}
    if "content-length" in headers and "content-encoding" not in headers:
        told["content-length"] = headers["content-length"]
    return Head(status=200, headers=told)


def _unreachable(why: str | None) -> LlorchError:
    return LlorchError(Code.ENGINE_FAILED, "the engine can't be reached", details={"reason": why})


def _too_late() -> LlorchError:
    return LlorchError(Code.DEADLINE_EXCEEDED, "the task's deadline has passed")
