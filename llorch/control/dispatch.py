"""One task's life at the control: admit, claim, relay, and retry or finish.

Owns the order of these steps, the queue of waiting tasks, and the promise that every admitted task ends exactly once
with its claim released. Choosing a pool and taking its claim is one synchronous step: no await between the two. Never
looks into log bytes: it passes them on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

from llorch.control import placement
from llorch.control.admission import Admission, Waiter
from llorch.control.feed import Accepted, Feed, Lost, Refused, Stopped, Upstream
from llorch.control.metrics import ControlMetrics
from llorch.control.registry import Claim, Registry
from llorch.control.tasks import State, Task, TaskStore
from llorch.errors import Code, LlorchError
from llorch.logs import Log
from llorch.messages import Head, Tail

ACCEPT_TIMEOUT_S = 1.0  # a node that has not answered an OPEN by then is asked no longer
MAX_RETRIES = 2
MAX_LOSSES = 3  # the third node lost under a task ends it
WAIT_TICK_S = 1.0  # how often a waiting task looks up: queue position, deadline, whether waiting still makes sense
REFUSE_AFTER_S = 5.0  # a node's restart takes about 3 s; a queue must not answer NO_CAPACITY meanwhile
DEADLINE_SLACK_S = 2.0  # the node ends a task at its deadline; the control does if the node has not
PING_AFTER_S = 15.0

# A refusal with one of these sends the task back to the front of the queue: nothing has gone wrong.
_NOT_A_FAILURE = frozenset({Code.ALL_SLOTS_BUSY})

log = Log("control.dispatch")


class Client(Protocol):
    """The one who asked, as dispatch sees it: an HTTP response in one of its forms, or a detached task's record."""

    async def waiting(self, position: int, eta_ms: int | None) -> None:
        """The task waits for a slot; said about once a second."""

    async def accepted(self) -> None:
        """A node has taken the task."""

    async def idle(self) -> None:
        """`PING_AFTER_S` without a byte."""

    async def begin(self, head: Head) -> None:
        """The first byte is here. From now on the task can't be retried."""

    async def write(self, data: bytes) -> None:
        """Log bytes. Returns when the client's side has taken them."""


class Opener(Protocol):
    """How dispatch reaches nodes: over their link, or by HTTP for those that have none."""

    def open(self, node_id: str, header: dict[str, Any], body: bytes, feed: Feed) -> Upstream:
        """Raises LlorchError NODE_LOST when there is no way to the node."""


class _GoElsewhere(Exception):
    """This attempt showed nothing to the client; another may follow."""

    def __init__(self, error: LlorchError, *, lost: bool = False, busy: bool = False) -> None:
        super().__init__(error.message)
        self.error, self.lost, self.busy = error, lost, busy


class SlowReader(ConnectionError):
    """The client took no byte for too long; it is treated as gone, and may come back for the rest."""


class ShuttingDown(Exception):
    """The control goes; the task stays on its node."""


def _farewell(error: BaseException) -> str:
    """The DETACH reason for a reader that ends this way."""
    if isinstance(error, ShuttingDown):
        return "shutdown"
    return "slow" if isinstance(error, SlowReader) else "left"


class Dispatcher:
    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        opener: Opener,
        metrics: ControlMetrics,
        *,
        queue_timeout_s: float,
        ttft_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._admission = admission
        self._opener = opener
        self._metrics = metrics
        self._queue_timeout_s = queue_timeout_s
        self._ttft_timeout_s = ttft_timeout_s
        self._clock = clock
        self._waiting: dict[str, asyncio.Future[Claim]] = {}
        self._feeds: dict[str, tuple[Feed, Upstream]] = {}
        self.tasks = TaskStore()
        self.draining = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    # ---- what routes call

    def explain(self, wish: placement.Wish) -> placement.Decision:
        """A dry run: where this would go now, and why."""
        now = self._clock()
        return placement.decide(wish, self._registry.pool_facts(now), now, self._registry.models())

    def queue_place(self, task: Task) -> tuple[int | None, int | None]:
        """(position, estimated wait in ms) of a waiting task."""
        return self._admission.position(task.task_id), self._admission.eta_ms(task.task_id, self._clock())

    def registry_changed(self) -> None:
        """After every change of the registry: say which pools came and went, and serve who waits."""
        for event in self._registry.pool_events():
            log.info(
                "pool.bound" if event.bound else "pool.unbound",
                node_id=event.node_id,
                pool_id=event.pool_id,
                model=event.model,
            )
        self.pump()

    async def run(self, task: Task, client: Client) -> Tail:
        """Serve `task` to `client`. Returns its TAIL; raises LlorchError when it fails before or without one.

        Cancelled (the client left): the node is told, and decides. Raises ShuttingDown when the control goes first.
        """
        if self.draining:
            raise LlorchError(Code.DRAINING, "this control is shutting down", retry_after_ms=2_000)
        known = self.tasks.get(task.task_id)
        if known is not None and not known.ended:
            raise LlorchError(Code.CONFLICT, "a task with this task_id is running", param="task_id")
        self.tasks.add(task)
        self._quiet.clear()
        started = self._clock()
        with self._metrics.inflight(task.wish.model):
            try:
                tail = await self._attempts(task, client)
                self._finish(task, tail, None)
                return tail
            except LlorchError as error:
                self._finish(task, None, error)
                raise
            except (asyncio.CancelledError, ConnectionError):
                task.abandoned = True
                self._finish(task, None, LlorchError(Code.CANCELED, "the client left"))
                raise
            except ShuttingDown:
                self._finish(task, None, LlorchError(Code.DRAINING, "this control was stopped"))
                raise
            finally:
                self._metrics.task_seconds(task.wish.model, self._clock() - started)

    def cancel(self, task: Task) -> None:
        """End a task, wherever it is in its life. Idempotent."""
        task.cancel_wanted = True
        feed = self._feeds.get(task.task_id)
        if feed is not None:
            feed[1].cancel()
        waiting = self._waiting.get(task.task_id)
        if waiting is not None and not waiting.done():
            waiting.set_exception(LlorchError(Code.CANCELED, "the task was canceled"))

    async def quiet(self, timeout_s: float) -> None:
        """Wait until no task runs, at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._quiet.wait()

    def stop(self) -> None:
        """Let go of every task: clients get their ends, nodes keep what runs."""
        self.draining = True
        for feed, upstream in list(self._feeds.values()):
            feed.put(Stopped())
            upstream.detach("shutdown")
        for waiting in list(self._waiting.values()):
            if not waiting.done():
                waiting.set_exception(ShuttingDown())

    def pump(self) -> None:
        """Hand free slots to waiting tasks. Called after every change of the registry and every claim's end."""
        if not self._waiting:
            return
        for waiter, claim in self._admission.match(self._place):
            future = self._waiting.get(waiter.task_id)
            if future is None or future.done():
                self._registry.release(claim)
            else:
                future.set_result(claim)

    # ---- the life of a task

    async def _attempts(self, task: Task, client: Client) -> Tail:
        front = False
        while True:
            claim = await self._claim(task, client, front=front)
            try:
                return await self._attempt(task, claim, client)
            except _GoElsewhere as gone:
                front = True
                self._give_up(task, claim, gone)
            finally:
                self._registry.release(claim)
                self.pump()

    def _give_up(self, task: Task, claim: Claim, gone: _GoElsewhere) -> None:
        """After an attempt that showed nothing: raise its error, or leave the task ready for the next one."""
        task.enter(State.QUEUED)
        self._metrics.retried(gone.error.code)
        log.info(
            "task.requeued", task_id=task.task_id, node_id=claim.node_id, pool_id=claim.pool_id, code=gone.error.code
        )
        if gone.busy:
            self._registry.busy(claim.node_id, claim.pool_id, self._clock())
            return
        if gone.lost:
            task.losses += 1
            if task.losses >= MAX_LOSSES:
                raise gone.error
            return
        task.retries += 1
        if task.retries > MAX_RETRIES or task.cancel_wanted:
            raise gone.error
        task.excluded |= {(claim.node_id, claim.pool_id)}
        wish = placement.excluding(task.wish, task.excluded)
        if self.explain(wish).outcome is not placement.Outcome.PLACED:
            raise gone.error  # no other pool could do better now
        task.wish = wish

    async def _attempt(self, task: Task, claim: Claim, client: Client) -> Tail:
        task.attempt += 1
        task.node_id, task.pool_id = claim.node_id, claim.pool_id
        task.queued_ms = round((self._clock() - task.received_at) * 1_000, 3)
        task.enter(State.PLACED)
        feed = Feed()
        try:
            upstream = self._opener.open(claim.node_id, self._open_header(task), task.body, feed)
        except LlorchError as error:
            raise _GoElsewhere(error, lost=True) from None
        self._feeds[task.task_id] = (feed, upstream)
        self._metrics.routed(self._clock() - task.received_at)
        log.debug(
            "task.routed", task_id=task.task_id, node_id=claim.node_id, pool_id=claim.pool_id, attempt=task.attempt
        )
        try:
            if task.cancel_wanted:
                upstream.cancel()
            head = await self._first(task, feed, upstream, client)
            if isinstance(head, Tail):  # canceled before its first byte
                return head
            task.enter(State.STREAMING)
            self._metrics.first_byte(task.wish.model, self._clock() - task.received_at)
            await client.begin(head)
            return await self._relay(task, feed, upstream, client)
        except BaseException as error:
            if not feed.ended:
                upstream.detach(_farewell(error))
            raise
        finally:
            self._feeds.pop(task.task_id, None)

    def _open_header(self, task: Task) -> dict[str, Any]:
        header: dict[str, Any] = {
            "task_id": task.task_id,
            "attempt": task.attempt,
            "pool_id": task.pool_id,
            "model": task.wish.model,
            "path": task.path,
            "stream": task.stream,
            "detach": task.detach,
            "owner": task.owner,
            "epoch": self._registry.epoch,
            "body_digest": task.body_digest,
            "headers": task.headers,
            "prefix_len": 0,
        }
        if task.deadline_at is not None:
            header["deadline_ms"] = max(1, int((task.deadline_at - self._clock()) * 1_000))
        return header

    async def _first(self, task: Task, feed: Feed, upstream: Upstream, client: Client) -> Head | Tail:
        """Everything up to HEAD. Raises _GoElsewhere while the task can still run somewhere else."""
        accepted = False
        until = self._clock() + ACCEPT_TIMEOUT_S
        while True:
            item = await feed.next(min(PING_AFTER_S, max(0.0, until - self._clock())))
            if item is None:
                if self._clock() < until:
                    await client.idle()
                    continue
                upstream.cancel()
                self._check_deadline(task)
                what = "did not send a first byte" if accepted else "did not answer"
                raise _GoElsewhere(
                    LlorchError(Code.ENGINE_STALLED if accepted else Code.NODE_LOST, f"the node {what} in time")
                )
            if isinstance(item, Accepted):
                accepted = True
                until = self._clock() + self._patience_s(task)
                await client.accepted()
            elif isinstance(item, Head):
                return item
            elif isinstance(item, Refused):
                raise self._refusal(item.error)
            elif isinstance(item, Tail):
                return self._early_tail(item)
            elif isinstance(item, Lost):
                raise _GoElsewhere(LlorchError(Code.NODE_LOST, f"the node was lost: {item.reason}"), lost=True)
            elif isinstance(item, Stopped):
                raise ShuttingDown

    def _patience_s(self, task: Task) -> float:
        """How long HEAD may take. An answer that isn't streamed comes whole, so only its deadline bounds it."""
        left = float("inf") if task.deadline_at is None else task.deadline_at - self._clock() + DEADLINE_SLACK_S
        return min(left, self._ttft_timeout_s) if task.stream else left

    def _refusal(self, error: LlorchError) -> Exception:
        if error.code in _NOT_A_FAILURE:
            return _GoElsewhere(error, busy=True)
        if error.status < 500 and error.code is not Code.POOL_NOT_FOUND:
            return error
        return _GoElsewhere(error)

    def _early_tail(self, tail: Tail) -> Tail:
        """A TAIL with no HEAD: nothing was shown. The client's own fault is its answer; others may be retried."""
        if tail.error is None:
            return tail
        error = LlorchError.from_wire(tail.error, fallback=Code.ENGINE_FAILED)
        if error.code in _NOT_A_FAILURE:
            raise _GoElsewhere(error, busy=True)
        if error.status >= 500 and error.code is not Code.DEADLINE_EXCEEDED:
            raise _GoElsewhere(error)
        if error.code is Code.CANCELED:
            return tail
        raise error

    async def _relay(self, task: Task, feed: Feed, upstream: Upstream, client: Client) -> Tail:
        while True:
            item = await feed.next(PING_AFTER_S)
            if isinstance(item, bytes):
                await client.write(item)
                task.offset += len(item)
                upstream.passed_on(len(item))
            elif item is None:
                self._check_deadline(task)
                await client.idle()
            elif isinstance(item, Tail):
                return item
            elif isinstance(item, Refused):
                raise item.error
            elif isinstance(item, Lost):
                raise LlorchError(Code.NODE_LOST, f"the node was lost while it answered: {item.reason}")
            elif isinstance(item, Stopped):
                raise ShuttingDown

    # ---- queue and claim

    async def _claim(self, task: Task, client: Client, *, front: bool) -> Claim:
        """A slot for `task`, at once or after waiting. Raises the refusal where waiting can't help."""
        if task.cancel_wanted:
            raise LlorchError(Code.CANCELED, "the task was canceled")
        self._check_deadline(task)
        now = self._clock()
        waiter = Waiter(task.task_id, task.wish, now, self._expires_at(task, now), front)
        if not front and self._admission.depth(task.wish.model) == 0:
            claim = self._place(waiter)
            if claim is not None:
                return claim
        self._refuse_if_hopeless(task)
        if front:
            self._admission.requeue_front(waiter)
        else:
            self._admission.enqueue(waiter, now)
        future: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self._waiting[task.task_id] = future
        try:
            self.pump()
            return await self._wait(task, waiter, future, client)
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._registry.release(future.result())
            raise
        finally:
            self._admission.remove(task.task_id)
            del self._waiting[task.task_id]
            self._metrics.waited(self._clock() - now)
            if not future.done():
                self.pump()  # this one left the queue: those behind it may be served now

    async def _wait(self, task: Task, waiter: Waiter, future: asyncio.Future[Claim], client: Client) -> Claim:
        hopeless_since: float | None = None
        while not future.done():
            position = self._admission.position(task.task_id) or 1
            await client.waiting(position, self._admission.eta_ms(task.task_id, self._clock()))
            await asyncio.wait((future,), timeout=WAIT_TICK_S)
            if future.done():
                break
            now = self._clock()
            self._check_deadline(task)
            if now >= waiter.expires_at:
                raise LlorchError(
                    Code.QUEUE_TIMEOUT,
                    f"no slot became free within {now - waiter.enqueued_at:.0f} s",
                    retry_after_ms=5_000,
                )
            if self.explain(task.wish).outcome is not placement.Outcome.REFUSE:
                hopeless_since = None
            elif hopeless_since is None:
                hopeless_since = now
            elif now - hopeless_since >= REFUSE_AFTER_S:
                self._refuse_if_hopeless(task)
        return future.result()

    def _place(self, waiter: Waiter) -> Claim | None:
        """Choose and take, in one step."""
        now = self._clock()
        with self._metrics.placing():
            picked = placement.pick(waiter.wish, self._registry.pool_facts(now, model=waiter.wish.model))
        if picked is None:
            return None
        task = self.tasks.get(waiter.task_id)
        if task is not None and not task.abandoned:
            # The explanation is of the moment before the claim; it is kept, for the facts move on.
            task.placement = self.explain(waiter.wish).to_wire()
        claim = self._registry.claim(*picked, waiter.task_id, task.attempt + 1 if task else 1)
        self._metrics.placed("placed", "")
        log.info("placement.decided", task_id=waiter.task_id, node_id=claim.node_id, pool_id=claim.pool_id)
        return claim

    def _refuse_if_hopeless(self, task: Task) -> None:
        decision = self.explain(task.wish)
        if decision.outcome is placement.Outcome.REFUSE and decision.error is not None:
            task.placement = decision.to_wire()
            self._metrics.placed("refused", decision.error.code)
            raise decision.error

    def _expires_at(self, task: Task, now: float) -> float:
        return now + self._queue_timeout_s

    def _check_deadline(self, task: Task) -> None:
        if task.deadline_at is not None and self._clock() > task.deadline_at:
            raise LlorchError(Code.DEADLINE_EXCEEDED, "the task's deadline has passed")

    def _finish(self, task: Task, tail: Tail | None, error: LlorchError | None) -> None:
        """The one place where a task ends at this control."""
        task.tail = tail
        if tail is not None and tail.error is not None:
            error = LlorchError.from_wire(tail.error, fallback=Code.ENGINE_FAILED)
        if error is not None and error.code is not Code.CANCELED:
            task.error = error
            task.enter(State.FAILED)
        elif error is not None or (tail is not None and tail.finish_reason == "canceled"):
            task.enter(State.CANCELED)
        else:
            task.enter(State.DONE)
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
            code=error.code.value if error is not None else None,
            attempts=task.attempt,
            tokens_out=tail.tokens_out if tail is not None else None,
        )
