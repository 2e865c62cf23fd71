"""A task as the control knows it, and the bounded store of those it has seen.

Owns the control's view of a task: what was asked, where it is, how it ended. The truth about a task is its log on its
node; this is what can be answered without asking. Never holds a task's output. Pure.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from llorch.control.decision import Snapshot
from llorch.control.placement import Wish
from llorch.errors import Code, LlorchError, without_frames
from llorch.messages import Tail, TaskReport

MAX_ENDED_TASKS = 10_000  # the views of ended tasks that are kept; about 1 KB each
MAX_EXPLAINED_TASKS = 200  # of them, those whose placement can still be explained: it holds the facts of every pool


class State(StrEnum):
    QUEUED = "queued"
    PLACED = "placed"
    STREAMING = "streaming"
    DONE = "done"
    FAILED = "failed"
    CANCELED = "canceled"


ENDED = frozenset({State.DONE, State.FAILED, State.CANCELED})

TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.PLACED, State.FAILED, State.CANCELED}),
    State.PLACED: frozenset({State.QUEUED, State.STREAMING, *ENDED}),
    State.STREAMING: ENDED,
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Task:
    """One task from its admission to its end. Times are seconds on the control's monotonic clock."""

    task_id: str
    owner: str
    wish: Wish
    path: str  # "native", or the /v1 path
    stream: bool
    detach: bool
    body: bytes
    body_digest: str
    headers: dict[str, str]
    request_id: str
    received_at: float
    deadline_at: float | None = None
    priority: str = "interactive"  # or "batch"
    max_tokens: int | None = None  # of its answer, where its client said so
    key_digest: str | None = None  # of its owner and its Idempotency-Key
    first_try: bool = False  # its client says that this is no repetition
    state: State = State.QUEUED
    attempt: int = 0
    losses: int = 0
    retries: int = 0
    node_id: str | None = None
    pool_id: str | None = None
    offset: int = 0  # log bytes that were relayed
    queued_ms: float | None = None
    waited_s: float = 0.0  # in the queue, since its last attempt that was more than a full pool
    label: str = ""  # the model's name in metrics; empty for one that does not exist
    placement: Snapshot | None = None
    error: LlorchError | None = None
    tail: Tail | None = None
    cancel_wanted: bool = False
    stopped: bool = False  # this control let go of it, because it shuts down
    abandoned: bool = False  # its reader left; the node decides what becomes of it
    named: bool = False  # its client chose its task_id
    opened: tuple[tuple[int, str], ...] = ()  # each attempt and its node, of those run from here
    replayed: bool = False  # not run for this request: an earlier one sent the same

    @classmethod
    def read_again(cls, task_id: str, *, owner: str, request_id: str, now: float) -> Task:
        """A native task as one knows it who only has its id, and comes to read it."""
        wish = Wish(model="")
        return cls(task_id, owner, wish, "native", True, False, b"", "", {}, request_id, now)

    @classmethod
    def of_report(cls, node_id: str, report: TaskReport, *, now: float) -> Task:
        """A task of before this control's time, as its node reports it."""
        task = cls.read_again(report.task_id, owner=report.owner, request_id="", now=now)
        task.wish, task.path = Wish(model=report.model or ""), report.path
        task.key_digest, task.body_digest = report.key_digest, report.body_digest or ""
        task.node_id, task.pool_id, task.attempt = node_id, report.pool_id, report.attempt
        task.state = State.STREAMING
        return task

    @property
    def native(self) -> bool:
        return self.path == "native"

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def cost(self) -> int | None:
        """Tokens that an ended task took; None if nobody knows, for its end was not read."""
        if self.tail is not None:
            return self.tail.tokens_in + self.tail.tokens_out
        return None if self.offset else 0

    def open_header(self, epoch: str, now: float) -> dict[str, Any]:
        """What an OPEN says of the task's present attempt."""
        header: dict[str, Any] = {
            "task_id": self.task_id,
            "attempt": self.attempt,
            "pool_id": self.pool_id,
            "model": self.wish.model,
            "path": self.path,
            "stream": self.stream,
            "detach": self.detach,
            "owner": self.owner,
            "epoch": epoch,
            "key_digest": self.key_digest,
            "body_digest": self.body_digest,
            "headers": self.headers,
            "prefix_len": 0,
        }
        if self.deadline_at is not None:
            header["deadline_ms"] = max(1, int((self.deadline_at - now) * 1_000))
        return header

    def enter(self, state: State) -> None:
        """Raises ValueError on a step that the table doesn't have; nothing changes then."""
        if state is self.state:
            return
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"task {self.task_id}: {self.state} -> {state}")
        self.state = state

    def end(self, tail: Tail | None, error: LlorchError | None) -> None:
        """Its TAIL, or why there is none, and the state that follows. Raises as `enter`."""
        self.tail = tail
        if tail is not None and tail.error is not None:
            error = LlorchError.from_wire(tail.error, fallback=Code.ENGINE_FAILED)
        if error is not None and error.code is not Code.CANCELED:
            self.error = without_frames(error)
            self.enter(State.FAILED)
        elif error is not None or (tail is not None and tail.finish_reason == "canceled"):
            self.enter(State.CANCELED)
        else:
            self.enter(State.DONE)

    def as_read(self, tail: Tail | None) -> Task:
        """The same, as one knows it who has read it to its end; or not so far, for its reader left."""
        read = replace(self, state=State.STREAMING, error=None, abandoned=tail is None)
        read.end(tail, None if tail is not None else LlorchError(Code.CANCELED, "the client left"))
        return read

    def check_deadline(self, now: float) -> None:
        if self.deadline_at is not None and now >= self.deadline_at:
            raise LlorchError(Code.DEADLINE_EXCEEDED, "the task's deadline has passed")

    def view(self, *, position: int | None = None, eta_ms: int | None = None) -> dict[str, Any]:
        """The task view of the API."""
        tail = self.tail
        view: dict[str, Any] = {
            "task_id": self.task_id,
            "state": self.state.value,
            "model": self.wish.model,
            "node_id": self.node_id,
            "pool_id": self.pool_id,
            "attempt": self.attempt,
            "offset": tail.length if tail is not None else self.offset,
            "tokens_in": tail.tokens_in if tail else 0,
            "tokens_out": tail.tokens_out if tail else 0,
            "cached_tokens": tail.cached_tokens if tail else 0,
            "queue_ms": self.queued_ms,
            "ttft_ms": tail.timings.ttft_ms if tail else None,
            "decode_ms": tail.timings.decode_ms if tail else None,
        }
        if self.state is State.QUEUED and position is not None:
            view["queue"] = {"position": position, "eta_ms": eta_ms}
        if tail is not None and tail.finish_reason is not None:
            view["finish_reason"] = tail.finish_reason
        elif self.state is State.CANCELED:
            view["finish_reason"] = "canceled"
        if self.error is not None:
            view["error"] = self.error.to_wire(request_id=self.request_id, task_id=self.task_id)
        return view


def view_of_report(node_id: str, report: TaskReport) -> dict[str, Any]:
    """The view of a task that this control knows only from its node."""
    if report.state != "sealed":
        state = State.STREAMING if report.offset else State.PLACED
    elif report.code is not None:
        state = State.FAILED
    else:
        state = State.CANCELED if report.finish_reason == "canceled" else State.DONE
    view: dict[str, Any] = {
        "task_id": report.task_id,
        "state": state.value,
        "model": report.model,
        "node_id": node_id,
        "pool_id": report.pool_id,
        "attempt": report.attempt,
        "offset": report.offset,
        "tokens_in": report.tokens_in,
        "tokens_out": report.tokens_out,
        "cached_tokens": report.cached_tokens,
        "queue_ms": None,
        "ttft_ms": report.ttft_ms,
        "decode_ms": report.decode_ms,
    }
    if report.finish_reason is not None:
        view["finish_reason"] = report.finish_reason
    if report.code is not None:
        view["error"] = {"code": report.code}
    return view


class TaskStore:
    """Running tasks, and the newest ended ones."""

    def __init__(self, most_ended: int = MAX_ENDED_TASKS) -> None:
        self._running: dict[str, Task] = {}
        self._ended: OrderedDict[str, Task] = OrderedDict()
        self._by_key: dict[str, Task] = {}
        self._explained: deque[Task] = deque()
        self._most_ended = most_ended

    def __iter__(self) -> Iterator[Task]:
        """Newest first."""
        yield from reversed(list(self._running.values()))
        yield from reversed(list(self._ended.values()))

    @property
    def running(self) -> int:
        return len(self._running)

    def get(self, task_id: str) -> Task | None:
        return self._running.get(task_id) or self._ended.get(task_id)

    def by_key(self, key_digest: str) -> Task | None:
        """The newest task that came with this key."""
        return self._by_key.get(key_digest)

    def running_tasks(self) -> list[Task]:
        return list(self._running.values())

    def add(self, task: Task) -> None:
        earlier = self._ended.pop(task.task_id, None)
        if earlier is not None:
            self._free_key(earlier)
        self._running[task.task_id] = task
        if task.key_digest is not None:
            self._by_key[task.key_digest] = task

    def remember(self, task: Task) -> None:
        """An ended task that this control has read rather than run; or has run until its client left."""
        earlier = self.get(task.task_id)
        if earlier is None or (earlier.ended and earlier.abandoned):
            newer = self._by_key.get(task.key_digest or "")
            self.add(task)
            if newer is not None and newer is not earlier:
                self._by_key[task.key_digest or ""] = newer
            self.ended(task)

    def ended(self, task: Task) -> None:
        """Move a task to the ended ones and let its body go."""
        task.body = b""
        if self._running.pop(task.task_id, None) is not None:
            self._ended[task.task_id] = task
            self._explained.append(task)
            while len(self._explained) > MAX_EXPLAINED_TASKS:
                self._explained.popleft().placement = None
            while len(self._ended) > self._most_ended:
                self._free_key(self._ended.popitem(last=False)[1])

    def _free_key(self, task: Task) -> None:
        if task.key_digest is not None and self._by_key.get(task.key_digest) is task:
            del self._by_key[task.key_digest]
