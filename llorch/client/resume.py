"""A stream that is lost: how far it was read, whether it is whole, and how long it is looked for.

Owns what a client remembers of one stream over all of its connections: the last event's place, so that nothing is shown
twice; the count and the digest of what was shown, so that a stream which is not what the node wrote is a fault and not
an answer; and the patience for a control that is away. Pure: clocks and chance come in, delays and faults go out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from llorch.backoff import Backoff
from llorch.client.events import End, Event, Migrated, ServerError, Started, Token
from llorch.client.faults import ClientFault, StreamBroken, Unreachable
from llorch.errors import Code
from llorch.messages import TASK_ID

# A control that is deployed anew is away for as long as a container takes to stop and to start, tens of seconds; its
# nodes meanwhile go on, and keep what they wrote for minutes. After a minute a person wants to know.
RESUME_FOR_S = 60.0
# Where nothing ever came back: the time a control is given to come back itself, and its recovery window (15 s), within
# which it can't say yet whether it has the task.
FIND_FOR_S = 30.0
RESUME_BACKOFF = Backoff(first_s=0.1, most_s=1.0)  # a control that is back has its crowd within a second, spread out
MOST_RETRY_AFTER_S = 5.0  # of what a peer asks for: it does not know how soon the next one is there
HELD_S = 5.0  # a request that was held this long had been taken: its loss is another outage, with a time of its own
MAX_OUTAGES = 20  # one after the other, with not one event between them

# What a control says of itself, not of the task: it is about to go, or has just come.
_AWAY = (Code.RECOVERING, Code.DRAINING)
# What a control says, of a task that is there, for as long as its nodes are not back.
_ALONE = (Code.TASK_NOT_FOUND, Code.MODEL_NOT_FOUND, Code.MODEL_NOT_AVAILABLE, Code.NO_CAPACITY)
# What it says when the others, who lost it too, are back before us.
_CROWDED = (Code.QUEUE_FULL, Code.RATE_LIMITED)


@dataclass(frozen=True, slots=True)
class Looking:
    """A task is looked for, since `since_s`; `why` says what came last. `answered`: it came from a control."""

    why: str
    since_s: float
    answered: bool = False


Tell: TypeAlias = Callable[[Looking], None]


def tell_nobody(_: Looking) -> None:
    pass


def delay_s(failures: int, chance: float, retry_after_ms: int | None) -> float:
    """How long to wait after so many failures: not before the peer said, and not all at once."""
    asked_s = min((retry_after_ms or 0) / 1_000, MOST_RETRY_AFTER_S)
    return max(RESUME_BACKOFF.delay_s(failures, chance), asked_s * (1 + chance / 4))


class Place:
    """How far a task's stream was read. `task_id` is None while it is not known.

    Where the caller did not name the task, the control does: anew for each time that it is submitted, until it has put
    something out. A name that is no id is nothing to follow, nor fit for a hint that is typed.
    `last` is the id of the last event, and `begun` tells that there was one: that the task has put something out.
    """

    def __init__(self, url: str, task_id: str | None, *, after: str | None = None) -> None:
        self.task_id = task_id
        self.last = after
        self.attempt: int | None = None  # whose log `last` is of
        self.untouched = True  # nothing has been received or lost yet
        self.begun = False
        self._url = url
        self._named = task_id is not None
        self._known = False  # there is such a task: a control that says otherwise has just started
        self._count: int | None = None if after else 0  # of its tokens; None: where it begins is not known
        self._digest = None if after else hashlib.sha256()
        self._failures = 0
        self._outages = 0
        self._lost_at = 0.0
        self._asked_at = 0.0

    # ---- what came

    def accepted(self, task_id: str | None) -> None:
        """A control has answered with the task's stream."""
        self._known = True
        self._name(task_id)

    def _name(self, task_id: str | None) -> None:
        if not self._named and not self.begun and task_id is not None and TASK_ID.fullmatch(task_id):
            self.task_id = task_id

    def moved(self, event: Event) -> bool:
        """Note an event. False for one that was there before: nothing is shown twice.

        Raises StreamBroken for one that can't be the next.
        """
        self.untouched = False
        if event.id is not None and self.last is not None and not _is_after(event.id, self.last):
            return False
        match event:
            case Started(task_id=task_id, attempt=attempt):
                self._name(task_id)
                self.attempt = attempt or None
            case Migrated(attempt=attempt):
                self.attempt = attempt or None
            case Token():
                self._take(event)
            case End():
                self._check(event)
        self._known = True
        self._failures = self._outages = 0
        if event.id is not None:
            self.last = event.id
            self.begun = True
        return True

    def _take(self, token: Token) -> None:
        if "i" in token.wire:
            if self._count is not None and token.index != self._count:
                raise self._torn(f"token {token.index} came where token {self._count} belongs")
            self._count = token.index
        if self._count is not None:
            self._count += 1
        if self._digest is not None:
            self._digest.update(token.text.encode("utf-8", "replace"))

    def _check(self, end: End) -> None:
        """The end in the log is of all of its text. One that a control makes is in no log, and may know of none."""
        told = end.wire.get("sha256")
        if self._digest is None or end.id is None or not isinstance(told, str):
            return
        if told != self._digest.hexdigest():
            raise self._torn("its sha256 is not that of the text that came")

    def _torn(self, why: str) -> StreamBroken:
        return self._broken("the stream is not what the node wrote", why, "all of it")

    # ---- what did not

    def asked(self, now: float) -> None:
        """A request is about to be sent."""
        self._asked_at = now

    def may_wait(self, error: ServerError) -> bool:
        """Whether what a control refused may be otherwise soon, and is not the answer itself."""
        if error.code in _AWAY or error.by_proxy:
            return True
        if self.begun:
            return error.retriable or error.code is Code.TASK_NOT_FOUND
        return self._known and error.code in (*_ALONE, *_CROWDED)

    def lost(self, now: float, *, taken: bool = False) -> float:
        """Note a failure; since when, in seconds, there have been nothing but failures.

        `taken`: the request had been sent, and its connection was lost.
        """
        self.untouched = False
        if taken and now - self._asked_at >= HELD_S:
            self._known = True
            self._failures = 0
        if self._failures == 0:
            self._lost_at = now
            self._outages += 1
        self._failures += 1
        return now - self._lost_at

    def delay_s(self, since_s: float, chance: float, retry_after_ms: int | None) -> float | None:
        """How long to wait before asking again; None if it was looked for long enough."""
        patience_s = RESUME_FOR_S if self._known else FIND_FOR_S
        if since_s >= patience_s or self._outages > MAX_OUTAGES:
            return None
        return delay_s(self._failures, chance, retry_after_ms)

    def fault(self, why: str) -> ClientFault:
        """What a stream that is given up has come to."""
        if self.begun:
            after = f" --after {self.last}" if self.last is not None and _offset(self.last) is not None else ""
            return self._broken("the stream broke off after output had begun", why, "what is left", after)
        if self.task_id is None:
            hint = "the task may be running; the same command with the same key finds it"
        else:
            hint = f"the task may be running: llorch task show {self.task_id}"
        return Unreachable(f"lost the connection to {self._url}", why=why, hint=hint)

    def shut_out(self, why: str) -> StreamBroken:
        """What a stream has come to whose token is good no more: output had begun under it."""
        hint = "`llorch token new` on the control makes another token"
        message = "the stream was cut off: its token is good no more"
        return StreamBroken(message, task_id=self.task_id or "", why=why, hint=hint, revoked=True)

    def _broken(self, message: str, why: str, what: str, after: str = "") -> StreamBroken:
        hint = f"{what} may still be there: llorch task logs {self.task_id}{after}" if self.task_id else None
        return StreamBroken(message, task_id=self.task_id or "", why=why, hint=hint)


def _is_after(id: str, other: str) -> bool:
    """One that is no offset is not compared."""
    here, there = _offset(id), _offset(other)
    return here is None or there is None or here > there


def _offset(id: str) -> int | None:
    try:
        return int(id, 16)
    except ValueError:
        return None
