"""One task's story: its connections in order, what each showed, and how it ended. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

NATIVE = ("native", "native-json", "detach", "llorch")
TERMINAL = ("end", "error")
ASIDE = 0  # the connection number of what a client asks beside its stream


@dataclass(slots=True)
class Conn:
    """One request and its answer."""

    number: int
    op: str
    sent: float
    after: int = 0
    status: int | None = None
    code: str | None = None
    answered: float | None = None
    replayed: bool = False
    pool: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    chunks: list[dict[str, Any]] = field(default_factory=list)
    body: dict[str, Any] | None = None
    stalled: bool = False
    closed: float | None = None
    how: str = "open"

    @property
    def until(self) -> float:
        return self.closed if self.closed is not None else float("inf")

    def terminals(self) -> list[dict[str, Any]]:
        found = [event for event in self.events if event["kind"] in TERMINAL]
        return found + [chunk for chunk in self.chunks if chunk["kind"] in ("done", "error")]


@dataclass(slots=True)
class Story:
    marker: str
    ask: dict[str, Any]
    conns: list[Conn] = field(default_factory=list)
    asides: list[Conn] = field(default_factory=list)
    left: list[tuple[float, bool]] = field(default_factory=list)  # when, and whether to come back
    over: str | None = None
    over_at: float | None = None

    @property
    def native(self) -> bool:
        return self.ask["form"] in NATIVE

    @property
    def streamed(self) -> bool:
        return self.ask["form"] not in ("native-json", "v1-json")

    @property
    def since(self) -> float:
        return self.conns[0].sent if self.conns else float(self.ask["at"])

    @property
    def until(self) -> float:
        return self.over_at if self.over_at is not None else float("inf")

    def reading(self) -> Iterator[Conn]:
        """The connections that are the client's own way to the end; not those that look back after it."""
        return (conn for conn in self.conns if conn.op in ("post", "events"))

    def output_at(self, since: float = 0.0) -> float | None:
        """When something of a log was first seen, of what was seen from `since` on."""
        seen = [event["at"] for conn in self.conns for event in conn.events if event["id"] is not None]
        seen += [chunk["at"] for conn in self.conns for chunk in conn.chunks if chunk.get("text")]
        seen += [conn.body["at"] for conn in self.conns if conn.body is not None]
        return min((at for at in seen if at >= since), default=None)

    def pool_at(self, at: float) -> str | None:
        """Where the output that was seen until then came from."""
        found = None
        for conn in self.conns:
            if conn.pool is not None and (conn.answered or conn.sent) <= at:
                found = conn.pool
            for event in conn.events:
                if event["kind"] == "started" and event["at"] <= at:
                    found = f"{event['data'].get('node_id')}/{event['data'].get('pool_id')}"
        return found

    def shown_from(self) -> set[str]:
        """Every pool whose output was seen."""
        seen = {conn.pool for conn in self.conns if conn.pool and (conn.events or conn.chunks or conn.body)}
        started = [event["data"] for conn in self.conns for event in conn.events if event["kind"] == "started"]
        return seen | {f"{data.get('node_id')}/{data.get('pool_id')}" for data in started}

    def end(self) -> tuple[float, str, str | None] | None:
        """(when, "end" or "error" or "refused", finish reason or code) of what the client took for the end."""
        for conn in self.reading():
            for event in conn.terminals():
                if event["kind"] == "end":
                    return event["at"], "end", event["data"].get("finish_reason")
                if event["kind"] == "done":
                    return event["at"], "end", "done"
                return event["at"], "error", event.get("code") or event.get("data", {}).get("code")
            if conn.body is not None:
                return conn.body["at"], "end", conn.body["finish"]
        if self.over == "refused":
            last = [conn for conn in self.reading() if conn.answered is not None][-1]
            return last.answered or last.sent, "refused", last.code
        return None

    def canceled_at(self) -> float | None:
        """When a cancel was accepted."""
        return min(
            (one.answered for one in self.asides if one.op == "cancel" and one.status == 202 and one.answered),
            default=None,
        )

    def cancel_sent_at(self) -> float | None:
        return min((one.sent for one in self.asides if one.op == "cancel"), default=None)

    def longest_absence(self) -> float:
        """The longest time between two answered connections, or to the end."""
        longest, last = 0.0, None
        for conn in self.reading():
            if conn.status in (200, 202) and conn.answered is not None:
                if last is not None:
                    longest = max(longest, conn.answered - last)
                last = conn.until
        return longest


def read(entries: Iterable[dict[str, Any]]) -> dict[str, Story]:
    """The stories by marker, in the order of their beginning."""
    stories: dict[str, Story] = {}
    conns: dict[tuple[str, int], Conn] = {}
    for entry in entries:
        what, marker = entry["what"], entry.get("task")
        if what == "task":
            stories[marker] = Story(marker, entry)
        if marker not in stories or what in ("task", "fault"):
            continue
        _take(stories[marker], conns, what, entry)
    return stories


def _take(story: Story, conns: dict[tuple[str, int], Conn], what: str, entry: dict[str, Any]) -> None:
    if what == "left":
        story.left.append((entry["at"], entry["back"]))
        return
    if what == "over":
        story.over, story.over_at = entry["how"], entry["at"]
        return
    number = entry.get("conn")
    if what == "send":
        conn = Conn(number, entry["op"], entry["at"], int(entry.get("after") or "0", 16))
        (story.asides if number == ASIDE else story.conns).append(conn)
        if number != ASIDE:
            conns[story.marker, number] = conn
        return
    if number == ASIDE:
        conn = next(one for one in story.asides if one.op == entry["op"] and one.answered is None)
    elif (story.marker, number) in conns:
        conn = conns[story.marker, number]
    else:
        return
    if what == "answer":
        conn.status, conn.code, conn.answered = entry["status"], entry.get("code"), entry["at"]
        conn.replayed = entry.get("replayed") is not None
        if "node" in entry and "pool" in entry:
            conn.pool = f"{entry['node']}/{entry['pool']}"
    elif what == "event":
        conn.events.append(entry)
    elif what == "chunk":
        conn.chunks.append(entry)
    elif what == "body":
        conn.body = entry
    elif what == "stalled":
        conn.stalled = True
    elif what == "closed":
        conn.closed, conn.how = entry["at"], entry["how"]
