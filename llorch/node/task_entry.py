"""One attempt of one task on a node, as others see it: its log, its readers' going, its report.

Owns what a reader's going means for the attempt, and what is told of it. Which attempts there are, and how long they
are remembered, is `tasklog`'s; how one runs is `execution`'s. Pure but for the log that it holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol

from llorch.errors import LlorchError
from llorch.messages import Open
from llorch.node.tasklog import TaskLog

LOST_GRACE_S = 30.0  # a /v1 client can't come back, but a control that restarts may
NATIVE = "native"


class Gone(StrEnum):
    """Why a reader went: its client left, or it ended with no word and its control may have died."""

    LEFT = "left"
    LOST = "lost"


def orphan_until(
    *, native: bool, detach: bool, left_at: float, lost_at: float | None, reconnect_grace_s: float
) -> float | None:
    """When a task whose last reader went at `left_at` ends for want of readers; None: it runs to its end.

    `lost_at` is when a reader was last lost since somebody first read again. Such a reader may come back, whatever the
    others meant by leaving: two controls that read one task never cancel each other's.
    """
    if detach:
        return None
    if native:
        return None if lost_at is not None else left_at + reconnect_grace_s
    return left_at if lost_at is None else lost_at + LOST_GRACE_S


class State(StrEnum):
    ACCEPTED = "accepted"
    RUNNING = "running"
    SEALED = "sealed"


class Run(Protocol):
    """The execution of a task, for those who read its log. It ends for the first reason given; ending is idempotent."""

    def give_body(self, body: bytes) -> None: ...
    def cancel(self) -> None: ...
    def stop(self, why: LlorchError) -> None: ...


@dataclass(slots=True, eq=False)
class TaskEntry:
    """One attempt of one task on this node. `accepted_at` and `sealed_at` measure; the `_wall` times are for people."""

    opening: Open
    log: TaskLog
    accepted_at: float
    accepted_wall: float
    state: State = State.ACCEPTED
    run: Run | None = None
    sealed_at: float | None = None
    sealed_wall: float | None = None
    lost_at: float | None = None
    streamed: bool = True  # events, which can carry an error; not one whole answer
    tokens_out: int = 0
    told: set[str] = field(default_factory=set)  # epochs of the controls that were sent the TAIL
    final: dict[str, Any] | None = None  # the report, once nothing in it can change

    @property
    def task_id(self) -> str:
        return self.opening.task_id

    @property
    def native(self) -> bool:
        return self.opening.path == NATIVE

    @property
    def key(self) -> tuple[str, int]:
        return self.opening.task_id, self.opening.attempt

    def report(self) -> dict[str, Any]:
        """TaskReport: what a control or a person may know. Fields that are unknown are left out."""
        if self.final is not None:
            return self.final
        opening, tail = self.opening, self.log.tail
        out: dict[str, Any] = {
            "task_id": opening.task_id,
            "attempt": opening.attempt,
            "epoch": opening.epoch,
            "owner": opening.owner,
            "path": opening.path,
            "key_digest": opening.key_digest,
            "body_digest": opening.body_digest,
            "model": opening.model,
            "pool_id": opening.pool_id,
            "state": self.state.value,
            "offset": self.log.end,
            "tokens_out": self.tokens_out,
            "started_at": _rfc3339(self.accepted_wall),
        }
        if self.sealed_wall is not None:
            out["ended_at"] = _rfc3339(self.sealed_wall)
        if tail is not None:
            out["tokens_in"], out["tokens_out"] = tail.tokens_in, tail.tokens_out
            out["cached_tokens"] = tail.cached_tokens
            out["finish_reason"] = tail.finish_reason
            out["ttft_ms"], out["decode_ms"] = tail.timings.ttft_ms, tail.timings.decode_ms
            out["code"] = tail.error["code"] if tail.error is not None else None
        out = {name: value for name, value in out.items() if value is not None}
        if self.sealed_wall is not None:
            self.final = out
        return out


def _rfc3339(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
