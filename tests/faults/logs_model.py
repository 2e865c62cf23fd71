"""The model of a node's logs, and the parts of the real node that tell it what they do.

Owns what is true of each attempt: the bytes it wrote, who reads it, and when it has to end for want of readers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from llorch.control.feed import Feed, Upstream
from llorch.control.links import Links
from llorch.control.links import NodeLink as ControlEnd
from llorch.errors import Code, LlorchError
from llorch.messages import Head, Tail
from llorch.node.link import NodeLink as NodeEnd
from llorch.node.retention import ENTRY_BYTES, Limits, TaskLogs
from llorch.node.runner import Runner
from llorch.node.task_entry import LOST_GRACE_S, Gone, TaskEntry
from llorch.node.tasklog import Reader, TaskLog
from tests.faults.virtual import Wire

KEPT_BYTES = 1_500
LIMITS = Limits(
    kept_bytes=KEPT_BYTES, all_kept_bytes=5 * (ENTRY_BYTES + 600), sealed_native_s=40.0, reconnect_grace_s=10.0
)
SLOTS = 3


class Heard:
    """A task's log, and what was written to it."""

    def __init__(self, log: TaskLog, truth: bytearray) -> None:
        self._log = log
        self._truth = truth

    def begin(self, head: Head, first: bytes, **more: Any) -> None:
        self._truth.extend(first)
        self._log.begin(head, first, **more)

    def append(self, data: bytes) -> None:
        self._truth.extend(data)
        self._log.append(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


@dataclass(eq=False)
class Story:
    """What the model knows of one attempt on the node: the truth about its bytes, and about its audience."""

    entry: TaskEntry
    truth: bytearray = field(default_factory=bytearray)
    readers: set[tuple[Wire, int]] = field(default_factory=set)
    lost_at: float | None = None
    due: float | None = None  # when it has to end for want of readers
    may_end: bool = False  # somebody cancelled it, or overtook it, or cannot give it its body any more
    must_end: bool = False
    told: set[str] = field(default_factory=set)
    sealed_at: float | None = None

    def listen(self) -> None:
        """Keep what its execution writes, apart from the log."""
        log: Any = Heard(self.entry.log, self.truth)
        self.entry.log = log

    def leave(self, reader: tuple[Wire, int], lost: bool, now: float) -> None:
        """DESIGN "Reader gone", in its own words."""
        self.readers.discard(reader)
        if lost:
            self.lost_at = now
        if self.readers or self.entry.opening.detach:
            return
        if self.entry.opening.path == "native":
            self.due = None if self.lost_at is not None else now + LIMITS.reconnect_grace_s
        else:
            self.due = now if self.lost_at is None else max(now, self.lost_at + LOST_GRACE_S)
        if self.due is not None and self.due <= now:
            self.may_end = self.must_end = True  # at once: who comes after this comes too late

    def attach(self, reader: tuple[Wire, int]) -> None:
        if not self.readers:
            self.lost_at = self.due = None
        self.readers.add(reader)


class Ears(Protocol):
    """Who is told."""

    stories: dict[TaskEntry, Story]

    def attached(self, story: Story, reader: Any) -> None: ...

    def left(self, story: Story, reader: Any, why: Gone) -> None: ...

    def expired(self, before: list[TaskEntry], hidden: int, now: float) -> None: ...


class WatchedRunner(Runner):
    """Tells the model who reads what, and checks at that moment what can only be known then."""

    def __init__(self, world: Ears, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.world = world

    def story(self, entry: TaskEntry) -> Story:
        return self.world.stories[entry]

    def accept(self, opening: Any) -> tuple[TaskEntry, bool]:
        older = self.logs._running.get(opening.task_id)
        if older is not None and older.opening.attempt < opening.attempt and older.opening.owner == opening.owner:
            self.story(older).may_end = self.story(older).must_end = True
        try:
            entry, new = super().accept(opening)
        except LlorchError as error:
            if error.code is Code.ALL_SLOTS_BUSY:
                assert self.pools.accepted("p") == SLOTS, "refused with a slot free"
            raise
        if new:
            story = self.world.stories[entry] = Story(entry)
            story.listen()
        assert self.pools.accepted("p") <= SLOTS
        return entry, new

    def attach(self, entry: TaskEntry, reader: Reader) -> None:
        story = self.story(entry)
        length, start = len(story.truth), len(story.truth) - min(len(story.truth), KEPT_BYTES)
        try:
            super().attach(entry, reader)
        except LlorchError as error:
            assert reader.offset < start if error.code is Code.GAP else reader.offset > length, error.code
            raise
        assert start <= reader.offset <= length
        self.world.attached(story, reader)

    def leave(self, entry: TaskEntry, reader: Reader, why: Gone) -> None:
        self.world.left(self.story(entry), reader, why)
        super().leave(entry, reader, why)


class WatchedLogs(TaskLogs):
    """Tells the model what is forgotten, when it is."""

    def __init__(self, world: Ears) -> None:
        super().__init__(LIMITS)
        self.world = world

    def expire(self, now: float) -> None:
        before = [entry for entry in self if entry.log.sealed]
        hidden = self.hidden_bytes()
        super().expire(now)
        self.world.expired(before, hidden, now)

    def hidden_bytes(self) -> int:
        """Of attempts that nobody can find: overtaken ones until their turn comes, discarded ones until they end."""
        taking = {entry for queue in (self._sealed_native, self._sealed_v1) for entry in queue} | set(self.running)
        return sum(weight(entry) for entry in taking if self._entries.get(entry.task_id) is not entry)


class Ctl:
    """A control, as far as the logs of a node see one: an epoch, a link, and clients that read through it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.life = 1
        self.links = Links()
        self.wire: Wire | None = None  # the newest
        self.node_end: NodeEnd | None = None  # while the node believes in it

    @property
    def epoch(self) -> str:
        return f"{self.name}{self.life}"

    @property
    def link(self) -> ControlEnd | None:
        return self.links.get("n")


@dataclass(eq=False)
class Reading:
    """One client reading one task through one control. `offset` is where it is; it keeps what it has read before."""

    task_id: str
    control: Ctl
    feed: Feed
    upstream: Upstream
    wire: Wire
    stream: int
    offset: int
    header: dict[str, Any] | None  # of its OPEN; None: an ATTACH
    attempt: int
    story: Story | None = None
    owed: int = 0
    accepted: bool = False
    headed: bool = False
    over: bool = False
    refused: Code | None = None
    tail: Tail | None = None
    told_to_go: bool = False

    @property
    def key(self) -> tuple[Wire, int]:
        return self.wire, self.stream


def weight(entry: TaskEntry) -> int:
    return entry.log.end - entry.log.start + ENTRY_BYTES
