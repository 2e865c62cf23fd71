"""Who waits for a slot, and how the slots are given out.

Owns the step from a task to a claim: at once, after waiting, or a refusal where waiting can't help. Choosing a pool and
taking its claim is one synchronous step, with no await between the two. Where pools are shared by models, asks
`swapping` which are set aside for whom. Never opens anything on a node.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from llorch.control import placement, swapping
from llorch.control.admission import Admission, being_loaded, serving_slots
from llorch.control.decision import Snapshot
from llorch.control.line import BATCH, Waiter
from llorch.control.metrics import ControlMetrics
from llorch.control.registry import Claim, Registry
from llorch.control.tasks import Task, TaskStore
from llorch.errors import Code, LlorchError
from llorch.logs import Log
from llorch.messages import Tail, TaskReport

WAIT_TICK_S = 1.0  # how often a waiting task looks up: queue position, whether waiting still makes sense
REFUSE_AFTER_S = 5.0  # a node's restart takes about 3 s; a queue must not answer NO_CAPACITY meanwhile
LOADING_SPARED_S = 600.0  # of loading, that does not count as waiting: two load-timeouts; loading beyond it does

Said = Callable[[int, int | None], Awaitable[None]]  # told (position, eta_ms) at every tick

log = Log("control.waiting")


class WaitingRoom:
    """Hands each free slot to exactly one task: to the first that waits for it, else to the one that just came."""

    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        metrics: ControlMetrics,
        tasks: TaskStore,
        *,
        queue_timeout_s: float,
        queue_timeout_batch_s: float,
        hold_refusals: Callable[[], bool] = lambda: False,
        may_go: Callable[[str], bool] = lambda _task_id: True,
        goes: Callable[[str], None] = lambda _task_id: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hold_refusals`: while true, what would be refused waits: nodes that are known are still coming back.

        `may_go`: whether a task that waits may be given a slot just now; until then it keeps its place, and others pass
        it by. `goes`: told of each that was, before the next is asked about.
        """
        self._registry = registry
        self._admission = admission
        self._metrics = metrics
        self._tasks = tasks
        self._queue_timeout_s = queue_timeout_s
        self._queue_timeout_batch_s = queue_timeout_batch_s
        self._hold_refusals = hold_refusals
        self._may_go = may_go
        self._goes = goes
        self._clock = clock
        self._waiting: dict[str, asyncio.Future[Claim]] = {}
        self._closed: Callable[[], BaseException] | None = None
        self._aside = swapping.NOTHING  # which pools are set aside for a model that waits

    def snapshot(self, wish: placement.Wish, waiter: Waiter | None = None) -> Snapshot:
        """What a decision about `wish` is made from, at this moment: for one who waits, or who comes now."""
        now = self._clock()
        told = pools = self._registry.pool_facts(now)
        if self._aside or self._registry.swappable(now):
            told = swapping.explained(waiter or Waiter("", wish, "", now), pools, self._aside, now)
        return Snapshot(wish, tuple(told), now, self._registry.models())

    def refusal(self, wish: placement.Wish) -> LlorchError | None:
        """Why waiting would not help; None if a pool can take it, or may soon."""
        pools = self._registry.pool_facts(self._clock(), model=wish.model)
        return placement.refusal(wish, pools, self._registry.models())

    def place_in_line(self, task: Task) -> tuple[int | None, int | None]:
        """(position, estimated wait in ms) of a waiting task."""
        now = self._clock()
        return self._admission.position(task.task_id, now), self._admission.eta_ms(task.task_id, now)

    async def claim(self, task: Task, said: Said, *, front: bool) -> Claim:
        """A slot for `task`. `front`: it was admitted before and comes back. Raises the refusal, or what `end` says."""
        if self._closed is not None:
            raise self._closed()
        if task.cancel_wanted:
            raise LlorchError(Code.CANCELED, "the task was canceled")
        now = self._clock()
        task.check_deadline(now)
        waiter = Waiter(
            task.task_id,
            task.wish,
            task.owner,
            task.received_at if front else now,
            priority=task.priority,
            size=len(task.body),
            deadline_at=task.deadline_at,
            front=front,
        )
        if not front:
            self.pump(task.wish.model)  # time alone may have freed a slot; what is free after this is of no use to them
            claim = self._take_best(waiter, now)
            if claim is not None:
                self._admission.given(waiter, now)
                return claim
            self._refuse_if_hopeless(task)
        slots = serving_slots(task.wish.model, self._registry.pool_facts(now, model=task.wish.model))
        known = self._registry.models().has_model(task.wish.model)
        self._admission.enqueue(waiter, now, slots, known=known)
        future = self._waiting[task.task_id] = asyncio.get_running_loop().create_future()
        try:
            self.pump(task.wish.model)
            return await self._wait(task, future, said)
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._registry.release(future.result(), used=False)
            raise
        finally:
            self._admission.remove(task.task_id, self._clock())
            del self._waiting[task.task_id]
            self._metrics.waited(self._clock() - now)
            self.pump()  # this one left the queue, perhaps with its slot unused: those behind it may be served now

    def settle(self, task: Task) -> None:
        """`task` has ended: its principal is charged what it cost, as soon as that is known.

        Where its client left, its node may go on with it, and the same client read it by its id.
        """
        if task.abandoned and task.attempt:
            self._admission.leave(task.task_id, task.attempt)
            known = self._registry.task(task.task_id)
            if known is not None and known[1].state == "sealed":
                self._reported(known[1])
            return
        self._admission.settle(task.task_id, task.tail, ran=task.attempt > 0)

    def was_read(self, mine: Task) -> None:
        """One who came back has read a log, perhaps to its end, of which its node then reports nothing more."""
        if mine.tail is not None:
            self._admission.ended_elsewhere(mine.task_id, mine.attempt, mine.tail)

    def release(self, claim: Claim) -> None:
        """Give a slot back, and hand it on."""
        self._registry.release(claim)
        self.pump()

    def pump(self, model: str | None = None) -> None:
        """Hand free slots to waiting tasks, or to those of one model. Called after every change of the registry, every
        claim's end, and whatever else lets one go that could not."""
        for report in self._registry.ended():
            self._reported(report)
        if not self._waiting:
            self._aside = swapping.NOTHING
            return
        now = self._clock()
        self._aside = self._set_aside(now)
        free: dict[str, list[placement.PoolFacts]] = {}  # by model: looked up once, and again after each claim

        def free_pools(model: str) -> list[placement.PoolFacts]:
            if model not in free:
                free[model] = self._free_pools(model)
            return free[model]

        def place(waiter: Waiter) -> Claim | None:
            claim = self._take(waiter, free_pools(waiter.wish.model))
            if claim is not None:
                del free[waiter.wish.model]
                self._goes(waiter.task_id)
            return claim

        def came_in_time(waiter: Waiter) -> bool:
            model = waiter.wish.model
            return not self._aside or waiter.turn_at <= swapping.latest(free_pools(model), model, self._aside)

        def any_free(model: str) -> bool:
            if not free_pools(model):
                return False
            oldest = self._admission.oldest(model) if self._aside else None
            return oldest is None or came_in_time(oldest)

        def may_go(waiter: Waiter) -> bool:
            return came_in_time(waiter) and self._may_go(waiter.task_id)

        for waiter, claim in self._admission.match(place, now, model, any_free=any_free, may_go=may_go):
            future = self._waiting.get(waiter.task_id)
            if future is None or future.done():
                self._registry.release(claim, used=False)
            else:
                future.set_result(claim)

    def end(self, task_id: str, error: BaseException) -> None:
        """Have a waiting task's `claim` raise `error`."""
        waiting = self._waiting.get(task_id)
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)

    def close(self, make_error: Callable[[], BaseException]) -> None:
        """Have every `claim` raise this, also those of tasks that come back from now on."""
        self._closed = make_error
        for task_id in list(self._waiting):
            self.end(task_id, make_error())

    # ---- inside

    async def _wait(self, task: Task, future: asyncio.Future[Claim], said: Said) -> Claim:
        timeout_s = self._queue_timeout_batch_s if task.priority == BATCH else self._queue_timeout_s
        deadline_at = float("inf") if task.deadline_at is None else task.deadline_at
        hopeless_since: float | None = None
        spared_s = 0.0
        while not future.done():
            since = self._clock()
            position, eta_ms = self.place_in_line(task)
            await said(position or 1, eta_ms)
            loading = spared_s < LOADING_SPARED_S and self._loading(task.wish.model)
            left_s = float("inf") if loading else timeout_s - task.waited_s
            tick_s = min(WAIT_TICK_S, left_s, deadline_at - self._clock())
            await asyncio.wait((future,), timeout=max(0.0, tick_s))
            now = self._clock()
            if loading:
                spared_s += now - since
            else:
                task.waited_s += now - since
            if future.done():
                break
            task.check_deadline(now)
            if task.waited_s >= timeout_s:
                raise LlorchError(
                    Code.QUEUE_TIMEOUT, f"no slot became free within {timeout_s:g} s", retry_after_ms=5_000
                )
            if self.refusal(task.wish) is None:
                hopeless_since = None
            elif hopeless_since is None:
                hopeless_since = now
            elif now - hopeless_since >= REFUSE_AFTER_S:
                self._refuse_if_hopeless(task)
        return future.result()

    def _loading(self, model: str) -> bool:
        return being_loaded(model, self._registry.pool_facts(self._clock(), model=model))

    def _reported(self, report: TaskReport) -> None:
        tail = Tail(
            length=report.offset,
            tokens_in=report.tokens_in,
            tokens_out=report.tokens_out,
            cached_tokens=report.cached_tokens,
        )
        self._admission.ended_elsewhere(report.task_id, report.attempt, tail)

    def _free_pools(self, model: str) -> list[placement.PoolFacts]:
        pools = self._registry.pool_facts(self._clock(), model=model)
        return [pool for pool in pools if pool.placeable and (pool.takes == model or pool.swappable)]

    def _set_aside(self, now: float) -> swapping.Plan:
        """Of the pools that several models share; most clusters have none."""
        swapped = self._registry.swapped()
        if not swapped:
            return swapping.NOTHING
        lines = [
            (model, (waiter for waiter in waiters if self._may_go(waiter.task_id)))
            for model, waiters in self._admission.by_age()
            if model in swapped
        ]
        return swapping.plan(lines, lambda model: self._registry.pool_facts(now, model=model), now)

    def _take_best(self, waiter: Waiter, now: float) -> Claim | None:
        """As `_take`, among all pools: most tasks ask for nothing but their model, and most models are loaded."""
        wish = waiter.wish
        if not self._aside and not (wish.prefer or wish.avoid or wish.constrained):
            began = time.perf_counter()
            picked = self._registry.best(wish.model, now)
            if picked is not None:
                self._metrics.placing.observe(time.perf_counter() - began)
                return self._claim(waiter, picked)
        return self._take(waiter, self._free_pools(wish.model))

    def _take(self, waiter: Waiter, pools: list[placement.PoolFacts]) -> Claim | None:
        """Choose among `pools` and take, in one step."""
        model, now = waiter.wish.model, self._clock()
        began = time.perf_counter()
        picked = swapping.choose(waiter, pools, self._aside, now, lambda: self._registry.pool_facts(now, model=model))
        self._metrics.placing.observe(time.perf_counter() - began)
        return None if picked is None else self._claim(waiter, picked)

    def _claim(self, waiter: Waiter, picked: tuple[str, str]) -> Claim:
        task = self._tasks.get(waiter.task_id)
        if task is not None:
            task.placement = self.snapshot(waiter.wish, waiter)  # of the moment before the claim, for the facts move on
        claim = self._registry.claim(*picked, waiter.task_id, task.attempt + 1 if task else 1, waiter.wish.model)
        self._metrics.placed("placed", "")
        log.info("placement.decided", task_id=waiter.task_id, node_id=claim.node_id, pool_id=claim.pool_id)
        return claim

    def _refuse_if_hopeless(self, task: Task) -> None:
        error = self.refusal(task.wish)
        if error is not None and not self._hold_refusals():
            task.placement = self.snapshot(task.wish)
            self._metrics.placed("refused", error.code)
            raise error
