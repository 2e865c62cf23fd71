"""One task's life at the control: admit, claim, relay, and retry or finish.

Owns the order of these steps, what is tried again and what is not, and the promise that every admitted task ends
exactly once with its claim released. Never looks into log bytes: it passes them on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from llorch.breaker import TRIAL_TIMEOUT_S
from llorch.control import placement
from llorch.control.admission import Admission
from llorch.control.audience import Audience, Client, ShuttingDown, SlowReader, farewell_of
from llorch.control.decision import Decision
from llorch.control.doubts import Doubts
from llorch.control.ejection import blames
from llorch.control.feed import Feed, Lost, Refused, Stopped
from llorch.control.log_reader import LogReader, LogReaders, Opener
from llorch.control.metrics import ControlMetrics
from llorch.control.registry import Claim, Registry
from llorch.control.rereads import Read, Rereads
from llorch.control.retries import Retries
from llorch.control.surplus import Surplus
from llorch.control.tasks import State, Task, TaskStore
from llorch.control.verdicts import GoElsewhere, early_tail, serves_another, verdict
from llorch.control.waiting import WaitingRoom
from llorch.errors import Code, LlorchError
from llorch.logs import Log
from llorch.messages import Head, Tail
from llorch.quotas import Quotas
from llorch.tasks import Guard

MOST_LOADING_S = 3_600.0  # of a load, in which no first byte is missed: a node gives its largest model half of that
ACCEPT_TIMEOUT_S = 1.0  # a node that has not answered an OPEN by then is asked no longer
ACCEPT_AT_LAST_S = 10.0  # the same where no other pool could take the task
LAST_WORD_S = 0.1  # for the TAIL, after a client has gone: many go once they have read what they needed
DEADLINE_SLACK_S = 2.0  # the node ends a task at its deadline; the control does if the node has not
PING_AFTER_S = 15.0

log = Log("control.dispatch")


class Dispatcher:
    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        opener: Opener,
        metrics: ControlMetrics,
        quotas: Quotas | None = None,
        *,
        queue_timeout_s: float,
        queue_timeout_batch_s: float,
        ttft_timeout_s: float,
        recovering: Callable[[], bool] = lambda: False,
        reread: Read | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`reread`: ask a node for the report of one of its pools, and take it over."""
        self.tasks = TaskStore()
        self.readers = LogReaders(registry, opener, metrics)
        self.surplus = Surplus(self.tasks, registry, self.readers)
        self._registry = registry
        self._room = WaitingRoom(
            registry,
            admission,
            metrics,
            self.tasks,
            queue_timeout_s=queue_timeout_s,
            queue_timeout_batch_s=queue_timeout_batch_s,
            hold_refusals=recovering,
            may_go=self._may_go,
            goes=self._goes,
            clock=clock,
        )
        self._opener = opener
        self._metrics = metrics
        self._quotas = quotas or Quotas()
        self._ttft_timeout_s = ttft_timeout_s
        self._retries = Retries(lambda: self.tasks.running)
        self._clock = clock
        self._guard = Guard("control.dispatch")
        self._rereads = Rereads(self._guard, reread)
        self._doubts = Doubts(registry, opener, self._guard, self.registry_changed)
        self._audiences: dict[str, Audience] = {}  # of the tasks that run
        self._reading: dict[str, LogReader] = {}  # of the tasks that are on a node
        self.draining = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    # ---- what routes call

    def explain(self, wish: placement.Wish) -> Decision:
        """A dry run: where this would go now, and why."""
        return self._room.snapshot(wish).decision()

    def place_in_line(self, task: Task) -> tuple[int | None, int | None]:  # position, estimated wait in ms
        return self._room.place_in_line(task)

    def audience(self, task_id: str) -> Audience | None:
        """Who listens to a task that runs here; None if it does not."""
        return self._audiences.get(task_id)

    def registry_changed(self) -> None:
        """After every change of the registry: say which pools came and went, and serve who waits."""
        for event in self._registry.events():
            log.info(event.word, **event.fields)
        self._room.pump()
        self.readers.news.tell()

    def start(self, task: Task, client: Client) -> Audience:
        """Take `task` in and run it: from here on it is known, and goes on by itself, whatever becomes of `client`.

        Raises DRAINING, CONFLICT for the id of a task that runs, or RATE_LIMITED.
        """
        if self.draining:
            raise LlorchError(Code.DRAINING, "this control is shutting down", retry_after_ms=2_000)
        if task.task_id in self._audiences:
            raise LlorchError(Code.CONFLICT, "a task with this task_id is running", param="task_id")
        self._quotas.charge(task.task_id, task.owner, len(task.body), task.max_tokens, self._clock())
        # A client names what it likes: only models that exist become labels.
        task.label = task.wish.model if self._registry.models().has_model(task.wish.model) else ""
        self.tasks.add(task)
        self._quiet.clear()
        audience = self._audiences[task.task_id] = Audience(task, client, back=self._room.pump)
        audience.running = self._guard.spawn(self._run(task, audience), f"task.{task.task_id}")
        return audience

    async def serve(self, task: Task, client: Client, *, started: Callable[[], None] = lambda: None) -> Tail:
        """Run `task` for `client`; `started` is called once it is taken in. Returns its TAIL; raises LlorchError when
        it fails before or without one.

        Cancelled (the client left): the task goes on for those who still listen, or may come back. Raises ShuttingDown
        when the control goes first.
        """
        audience = self.start(task, client)
        started()
        assert audience.running is not None
        try:
            outcome = await asyncio.shield(audience.running)
        except asyncio.CancelledError:
            audience.left()
            raise
        if audience.trouble is not None:
            raise audience.trouble
        if isinstance(outcome, Exception):
            raise outcome.copy() if isinstance(outcome, LlorchError) else outcome
        return outcome

    def cancel(self, task: Task) -> None:
        """End a task, wherever it is in its life. Idempotent."""
        task.cancel_wanted = True
        reader = self._reading.get(task.task_id)
        if reader is not None:
            reader.cancel()
        self._room.end(task.task_id, LlorchError(Code.CANCELED, "the task was canceled"))

    @contextlib.asynccontextmanager
    async def attached(
        self, node_id: str, mine: Task, offset: int, *, patience_s: float | None = None
    ) -> AsyncIterator[LogReader]:
        """A reader of a task's log, for one who came back. It is detached at the end."""
        reader = await self.readers.attach(
            node_id, mine.task_id, offset, mine.attempt, native=mine.native, patience_s=patience_s
        )
        farewell = "left"
        try:
            yield reader
        except (asyncio.CancelledError, ConnectionError, ShuttingDown) as error:
            farewell = farewell_of(error)
            raise
        finally:
            reader.close(farewell)
            self._room.was_read(mine)

    async def quiet(self, timeout_s: float) -> None:
        """Wait until no task runs, at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._quiet.wait()

    def stop(self) -> None:
        """Let go of every task: clients get their ends, nodes keep what runs."""
        self.draining = True
        self.readers.stop()
        self._room.close(ShuttingDown)

    async def close(self) -> None:
        """After `stop`: wait for what still runs."""
        await self._guard.close()

    def _may_go(self, task_id: str) -> bool:
        """Whether a task that waits may be placed: somebody listens, and if it is a retry, it is its turn."""
        audience = self._audiences.get(task_id)
        return audience is None or (not audience.silent and self._retries.may_go(audience.task))

    def _goes(self, task_id: str) -> None:
        audience = self._audiences.get(task_id)
        if audience is not None:
            self._retries.goes(audience.task)

    def _tried(self, task: Task) -> None:
        """It is not being tried again any more: another may be."""
        if self._retries.over(task):
            self._room.pump()

    # ---- the life of a task

    async def _run(self, task: Task, audience: Audience) -> Tail | Exception:
        """From its admission to its end. What goes wrong is returned: whoever asked for it may have left long ago."""
        started = self._clock()
        outcome: Tail | Exception
        audience.opened()
        self._metrics.inflight.add(1, task.label)
        try:
            outcome = await self._attempts(task, audience)
            self._finish(task, outcome, None)
        except LlorchError as error:
            outcome = error
            self._finish(task, None, error)
        except (asyncio.CancelledError, ConnectionError) as error:
            if task.tail is not None:  # it had read its end, and did not wait for ours
                self._finish(task, task.tail, None)
            else:
                task.abandoned = True
                self._finish(task, None, LlorchError(Code.CANCELED, "the client left"))
            if isinstance(error, asyncio.CancelledError):
                raise
            outcome = error
        except ShuttingDown as error:
            outcome, task.stopped = error, True
            self._finish(task, None, LlorchError(Code.DRAINING, "this control was stopped"))
        except Exception:
            log.fault("task.fault", task_id=task.task_id, request_id=task.request_id)
            outcome = LlorchError(Code.INTERNAL, "an unexpected fault; it was logged")
            self._finish(task, None, outcome)
        finally:
            self._metrics.inflight.add(-1, task.label)
            self._audiences.pop(task.task_id, None)
            audience.ended()
            self._tried(task)
            self._metrics.task_seconds.observe(self._clock() - started, task.label)
        return outcome

    async def _attempts(self, task: Task, audience: Audience) -> Tail:
        failure: LlorchError | None = None
        while True:
            try:
                claim = await self._room.claim(task, audience.waiting, front=failure is not None)
            except LlorchError as error:
                if failure is not None and error.code is Code.QUEUE_TIMEOUT and self._retries.holds(task):
                    raise failure from None  # there were slots, but not for one more retry
                raise
            try:
                tail = await self._attempt(task, claim, audience)
                self._judge(claim, tail)
                return tail
            except GoElsewhere as gone:
                failure = gone.error
                self._give_up(task, claim, gone)
            finally:
                self._room.release(claim)

    def _give_up(self, task: Task, claim: Claim, gone: GoElsewhere) -> None:
        """After an attempt that showed nothing: raise its error, or leave the task ready for the next one."""
        now = self._clock()
        task.enter(State.QUEUED)
        if task.cancel_wanted:
            raise LlorchError(Code.CANCELED, "the task was canceled")
        if gone.blamed:
            self._registry.failed(claim, now)
        if gone.error.code is Code.NODE_LOST:
            self._registry.probed(claim.node_id, False, now)  # without a link, nothing goes there before it answers
        another = serves_another(gone.error, task.wish.model)
        if another or gone.error.code is Code.MODEL_NOT_AVAILABLE:
            self._rereads.ask(claim.node_id, claim.pool_id, now)
        if gone.busy:
            self._registry.busy(claim, now, full=gone.error.code is Code.ALL_SLOTS_BUSY, another=another)
        else:
            task.waited_s = 0.0
            if gone.lost:
                why = self._retries.lost(task)
            else:
                task.wish = placement.excluding(task.wish, ((claim.node_id, claim.pool_id),))
                why = self._retries.failed(task)
                if why is None and self._room.refusal(task.wish) is not None:
                    why = "no other pool could take it"
            if why is not None:
                log.info("task.given_up", task_id=task.task_id, code=gone.error.code, attempts=task.attempt, why=why)
                raise gone.error
        task.node_id = task.pool_id = None
        self._metrics.retried(gone.error.code)
        log.info(
            "task.requeued", task_id=task.task_id, node_id=claim.node_id, pool_id=claim.pool_id, code=gone.error.code
        )

    def _judge(self, claim: Claim, tail: Tail) -> None:
        """What an answer's end says of the pool that gave it."""
        if tail.error is None:
            if tail.finish_reason != "canceled":
                self._registry.succeeded(claim, self._clock())
        elif blames(LlorchError.from_wire(tail.error, fallback=Code.ENGINE_FAILED)):
            self._registry.failed(claim, self._clock())

    async def _attempt(self, task: Task, claim: Claim, audience: Audience) -> Tail:
        if task.cancel_wanted:
            raise LlorchError(Code.CANCELED, "the task was canceled")
        task.attempt += 1
        task.node_id, task.pool_id = claim.node_id, claim.pool_id
        task.queued_ms = round((self._clock() - task.received_at) * 1_000, 3)
        task.opened += ((task.attempt, claim.node_id),)
        task.enter(State.PLACED)
        feed = Feed()
        try:
            header = task.open_header(self._registry.epoch, self._clock())
            upstream = self._opener.open(claim.node_id, header, task.body, feed)
        except LlorchError as error:
            raise GoElsewhere(error, lost=True) from None
        self._metrics.routing.observe(self._clock() - task.received_at)
        log.debug(
            "task.routed", task_id=task.task_id, node_id=claim.node_id, pool_id=claim.pool_id, attempt=task.attempt
        )
        reader = LogReader(
            self.readers,
            claim.node_id,
            task.task_id,
            task.attempt,
            feed,
            upstream,
            native=task.native,
            clock=self._clock,
        )
        return await self._read_through(task, claim, reader, audience)

    async def _read(self, task: Task, claim: Claim, reader: LogReader, audience: Audience) -> Tail:
        head = await self._first(task, claim, reader, audience)
        if isinstance(head, Tail):  # canceled before its first byte
            return head
        task.enter(State.STREAMING)
        self._tried(task)
        task.body = b""  # it is not sent again; a long prompt is not kept for as long as its answer takes
        self._metrics.ttft.observe(self._clock() - task.received_at, task.label)
        audience.begin(head)
        try:
            return await self._relay(task, reader, audience)
        except SlowReader:
            raise
        except (asyncio.CancelledError, ConnectionError):
            task.tail = await reader.last_word(LAST_WORD_S)
            if task.tail is not None:
                self._judge(claim, task.tail)
            raise

    async def _read_through(self, task: Task, claim: Claim, reader: LogReader, audience: Audience) -> Tail:
        """Until the log has ended or its reader goes: failing takes the task with it, leaving does not."""
        self.readers.add(reader)
        self._reading[task.task_id] = reader
        farewell = "left"
        try:
            return await self._read(task, claim, reader, audience)
        except (asyncio.CancelledError, ConnectionError, ShuttingDown) as error:
            farewell = farewell_of(error)
            raise
        except GoElsewhere:
            reader.discard()
            raise
        except BaseException:
            reader.cancel()
            raise
        finally:
            del self._reading[task.task_id]
            reader.close(farewell)

    async def _first(self, task: Task, claim: Claim, reader: LogReader, audience: Audience) -> Head | Tail:
        """Everything up to HEAD. Raises GoElsewhere while the task can still run somewhere else."""
        accepted = False
        sent_at = now = self._clock()
        until, patient_until = now + ACCEPT_TIMEOUT_S, now + ACCEPT_AT_LAST_S
        ping_at = now + PING_AFTER_S - (now - task.received_at) % PING_AFTER_S  # counted from the client's request

        def taken() -> bool:
            nonlocal accepted, until
            before, accepted = until, True
            self._registry.accepted(claim)
            until = self._clock() + self._patience_s(task, claim)
            if not task.stream or self._registry.loading(claim):
                self._tried(task)  # it shows nothing before that is done: others are not to wait as long
            audience.accepted()
            return until >= before  # else the wait below is too long

        reader.when_accepted(taken)
        while True:
            item = await reader.next(max(0.0, min(ping_at, until) - self._clock()))
            if item is None:
                now = self._clock()
                if accepted and now - sent_at < MOST_LOADING_S and self._registry.loading(claim):
                    until = now + self._patience_s(task, claim)
                if now >= until:
                    task.check_deadline(now)
                    if accepted:
                        error = LlorchError(Code.ENGINE_STALLED, "the node did not send a first byte in time")
                        raise GoElsewhere(error, blamed=True)
                    silent = self._opener.silent(claim.node_id, sent_at)
                    if silent:
                        self._doubts.begin(claim.node_id)
                    if now < patient_until and self._nowhere_else(task, claim, lost=silent):
                        until += ACCEPT_TIMEOUT_S
                        continue
                    error = LlorchError(Code.NODE_LOST, "the node did not answer in time")
                    raise GoElsewhere(error, lost=silent, blamed=not silent)
                if now >= ping_at:
                    ping_at += PING_AFTER_S
                    await audience.idle()
            elif isinstance(item, Head):
                return item
            elif isinstance(item, Refused):
                raise verdict(item.error, refused=True)
            elif isinstance(item, Tail):
                return early_tail(item)
            elif isinstance(item, Lost):
                raise GoElsewhere(LlorchError(Code.NODE_LOST, f"the node was lost: {item.reason}"), lost=True)
            elif isinstance(item, Stopped):
                raise ShuttingDown

    def _nowhere_else(self, task: Task, claim: Claim, *, lost: bool) -> bool:
        """A node that is slow to answer is better than none, or than the queue; one that is gone tells by its link."""
        if not lost and not self._retries.has_room(task):
            return True
        tried = ((claim.node_id, claim.pool_id),)
        return self._room.refusal(placement.excluding(task.wish, tried)) is not None

    def _patience_s(self, task: Task, claim: Claim) -> float:
        """How long HEAD may take. An answer that isn't streamed comes whole, so only its deadline bounds it."""
        left = float("inf") if task.deadline_at is None else task.deadline_at - self._clock() + DEADLINE_SLACK_S
        if not task.stream:
            return left
        return min(left, self._ttft_timeout_s, TRIAL_TIMEOUT_S if claim.trial else left)

    async def _relay(self, task: Task, reader: LogReader, audience: Audience) -> Tail:
        clock = self._clock
        passed_at = clock()

        def take(data: bytes) -> bool:
            """Of a client that keeps up no task is woken for a token."""
            nonlocal passed_at
            if not audience.direct(data):
                return False
            task.offset += len(data)
            reader.offset += len(data)
            passed_at = clock()
            return True

        reader.pass_directly(take)
        while True:
            now = self._clock()
            patience_s = passed_at + PING_AFTER_S - now
            if task.deadline_at is not None:
                task.check_deadline(now - DEADLINE_SLACK_S)
                patience_s = min(patience_s, task.deadline_at + DEADLINE_SLACK_S - now)
            item = await reader.next(max(0.0, patience_s))
            if isinstance(item, bytes):
                await audience.write(item)
                task.offset += len(item)
                reader.passed_on(len(item))
                passed_at = self._clock()
            elif item is None:
                if self._clock() >= passed_at + PING_AFTER_S:
                    await audience.idle()
                    passed_at = self._clock()
            elif isinstance(item, Tail):
                return item
            elif isinstance(item, Refused):
                raise item.error
            elif isinstance(item, Stopped):
                raise ShuttingDown

    def _finish(self, task: Task, tail: Tail | None, error: LlorchError | None) -> None:
        """The one place where a task ends at this control."""
        task.end(tail, error)
        self._room.settle(task)
        self._quotas.settle(task.task_id, task.cost, self._clock())
        self.tasks.ended(task)
        if self.tasks.running == 0:
            self._quiet.set()
        self._metrics.ended(task)
        log.info(
            "task.ended",
            task_id=task.task_id,
            request_id=task.request_id,
            node_id=task.node_id,
            pool_id=task.pool_id,
            outcome=task.state.value,
            code=task.error.code.value if task.error is not None else None,
            attempts=task.attempt,
            tokens_out=tail.tokens_out if tail is not None else None,
        )
