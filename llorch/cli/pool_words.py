"""Why a pool or a node takes no tasks, and how far an operation is, in words: from the views of a control.

Owns what is said at once and what only now and then, and when an operation that is waited for has ended, and how. Never
believes a view to be whole: a control may be older or newer than this client. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SAME_LINE_EVERY_S = 5.0  # for a log of a build: what only counts on is said no more often
UNSEEN_FOR_S = 5.0  # a beat brings changes within 0.25 s; an operation that is missing longer than this is gone

View = Mapping[str, Any]

DOING = {
    "drain": "draining", "undrain": "taking tasks again", "load": "loading", "unload": "unloading",
    "reload": "reloading", "restart": "restarting", "purge": "purging",
}  # fmt: skip
DONE = {
    "drain": "drained", "undrain": "takes tasks again", "load": "loaded", "unload": "unloaded", "reload": "reloaded",
    "restart": "restarted", "purge": "purged",
}  # fmt: skip


def name_of(pool: View) -> str:
    return f"{pool.get('node_id')}/{pool.get('pool_id')}"


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _pools_of(node: View) -> list[View]:
    pools = node.get("pools")
    return [pool for pool in pools if isinstance(pool, Mapping)] if isinstance(pools, list) else []


def operation_of(pool: View | None) -> View:
    """The last operation; empty if there was none."""
    operation = None if pool is None else pool.get("operation")
    return operation if isinstance(operation, Mapping) else {}


def _with_model(word: str, model: object) -> str:
    return f"{word} {model}" if isinstance(model, str) and model else word


def why_waiting(pool: View) -> list[str]:
    """What keeps tasks away from a pool by somebody's wish, or for a while: no fault of anything."""
    held = "; ".join(_texts(pool.get("held")))
    words = []
    if pool.get("draining"):
        words.append(f"draining ({held})" if held else "draining")
    elif held:
        words.append(f"held: {held}")
    if pool.get("loading"):
        words.append(_with_model("loading", pool["loading"]))
    return words


def operation_words(pool: View) -> str | None:
    """What is being done with a pool, or failed when it was done last."""
    operation = operation_of(pool)
    kind, state = str(operation.get("kind")), operation.get("state")
    if state not in ("running", "failed"):
        return None
    doing = _with_model(DOING.get(kind, kind), operation.get("model"))
    message = operation.get("message")
    return f"{doing}{' failed' if state == 'failed' else ''}" + (f": {message}" if message else "")


def note_of(pool: View) -> str | None:
    """All of that in one cell, each thing once."""
    words = why_waiting(pool)
    operation = operation_words(pool)
    if operation is not None and operation not in words:
        error = pool.get("last_error")  # which has a place of its own
        words.append(operation.removesuffix(f": {error}") if error else operation)
    return "; ".join(words) or None


def drain_words(node: View) -> str | None:
    """`draining (operator: kernel update)`: the reason is that of its pools, who all have it."""
    if not node.get("draining"):
        return None
    pools = _pools_of(node)
    held = [_texts(pool.get("held")) for pool in pools]
    everywhere = [text for text in held[0] if all(text in each for each in held)] if held else []
    return f"draining ({'; '.join(everywhere)})" if everywhere else "draining"


# ---------------------------------------------------------------- an operation that is waited for


class Outcome(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    UNSEEN = "unseen"  # what was asked for is not, or not yet, among what the node reports


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at an operation. A new `phase` is said at once, `progress` only now and then; `why` it failed."""

    outcome: Outcome
    phase: str
    progress: str = ""
    why: str | None = None

    @property
    def text(self) -> str:
        return f"{self.phase}, {self.progress}" if self.progress else self.phase


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, and how its node marks it: by when it began."""

    kind: str
    model: str | None = None
    started_at: object = None

    @property
    def doing(self) -> str:
        return _with_model(DOING.get(self.kind, self.kind), self.model)

    @property
    def done(self) -> str:
        return _with_model(DONE.get(self.kind, self.kind), self.model)

    def seen(self, pool: View | None) -> Seen:
        """How far it is, by a later look at the pool; None: it is not there."""
        operation = operation_of(pool)
        if pool is None or (operation.get("kind"), operation.get("started_at")) != (self.kind, self.started_at):
            return Seen(Outcome.UNSEEN, self.doing)
        return self._state(pool, operation)

    def _state(self, pool: View, operation: View) -> Seen:
        message = operation.get("message")
        message = message if isinstance(message, str) and message else None
        match operation.get("state"):
            case "done":
                return Seen(Outcome.DONE, self.done, why=message)
            case "failed":
                last_error = pool.get("last_error")
                why = message or (last_error if isinstance(last_error, str) else None)
                return Seen(Outcome.FAILED, f"{self.doing} failed", why=why)
            case _:
                return Seen(Outcome.RUNNING, self.doing, message or _tasks([pool]))


def asked_of_pool(kind: str, model: str | None, answered: View) -> tuple[Asked, Seen]:
    """What the node has made of the wish: its operation, or nothing, because there was nothing to do."""
    operation = operation_of(answered)
    asked = Asked(kind, model, operation.get("started_at"))
    if operation.get("kind") != kind:
        return asked, Seen(Outcome.DONE, asked.done)
    return asked, asked.seen(answered)


def node_seen(kind: str, node: View) -> Seen:
    """How far a node is with draining, or with taking tasks again: as far as the last of its pools."""
    asked = Asked(kind)
    if bool(node.get("draining")) != (kind == "drain"):
        return Seen(Outcome.UNSEEN, asked.doing)
    pools = _pools_of(node)
    its_own = [(pool, operation) for pool in pools if (operation := operation_of(pool)).get("kind") == kind]
    for pool, operation in its_own:
        if operation.get("state") == "failed":
            message = operation.get("message") or pool.get("last_error")
            why = f"pool {pool.get('pool_id')}" + (f": {message}" if message else "")
            return Seen(Outcome.FAILED, f"{asked.doing} failed", why=why)
    running = [pool for pool, operation in its_own if operation.get("state") == "running"]
    busy = kind == "drain" and any(pool.get("in_flight") for pool in pools)
    if not running and not busy:
        return Seen(Outcome.DONE, asked.done)
    left = f"{len(running)} of {len(pools)} pools" if running else ""
    return Seen(Outcome.RUNNING, asked.doing, ", ".join(part for part in (left, _tasks(pools)) if part))


def _tasks(pools: Iterable[View]) -> str:
    """How many tasks of this control run there."""
    counts = [count for pool in pools if isinstance(count := pool.get("in_flight"), int)]
    count = sum(counts)
    return "" if not count else "1 task runs" if count == 1 else f"{count} tasks run"


class Lines:
    """Which looks get a line where lines stay: a new phase at once, the same one with other figures now and then."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._text = ""
        self._at = 0.0

    def line(self, seen: Seen, now: float) -> str | None:
        if seen.phase == self._phase and (seen.text == self._text or now - self._at < SAME_LINE_EVERY_S):
            return None
        self._phase, self._text, self._at = seen.phase, seen.text, now
        return seen.text


class Patience:
    """How long an operation that was taken may be missing from what the node reports, or its control be away."""

    def __init__(self) -> None:
        self._since: float | None = None

    def missing_s(self, missing: bool, now: float) -> float:
        """For how long it has been missing without a break."""
        if not missing:
            self._since = None
            return 0.0
        if self._since is None:
            self._since = now
        return now - self._since
