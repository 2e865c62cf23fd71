"""The rules about bytes: what a client is shown, over all its connections, is one log, whole and in order. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from tests.faults.excuses import Case, explained, was_canceled
from tests.faults.story import TERMINAL, Conn, Story
from tests.faults.timeline import Facts
from tests.faults.verdict import Violation

FINISHED = ("stop", "length")


def text_of(tokens: int) -> str:
    return "".join(f"t{i} " for i in range(tokens))


def check(story: Story, facts: Facts) -> Iterator[Violation]:
    yield from _Log(story, facts).check()
    for conn in story.reading():
        if conn.chunks:
            yield from _openai(story, conn)
        if conn.body is not None:
            yield from _body(story, conn)


class _Log:
    """A native task's log as its client saw it: the bytes at each offset, and the token that comes next there."""

    def __init__(self, story: Story, facts: Facts) -> None:
        self.story, self.facts = story, facts
        self.started: tuple[Any, ...] | None = None
        self.began_at = 0.0
        self.blocks: dict[int, tuple[int | None, int | None]] = {}  # end → (start, crc)
        self.next_token: dict[int, int] = {0: 0}
        self.terminal: tuple[str, int | None, Any] | None = None

    def check(self) -> Iterator[Violation]:
        for conn in self.story.conns:
            yield from self._conn(conn)

    def _bad(self, rule: str, event: dict[str, Any], what: str) -> Violation:
        return Violation(rule, self.story.marker, event["at"], f"connection {event['conn']}: {what}")

    def _conn(self, conn: Conn) -> Iterator[Violation]:
        last, ended = conn.after, False
        yield from self._elsewhere(conn)
        for event in conn.events:
            kind, ident, size = event["kind"], event["id"], event["size"]
            if ended:
                yield self._bad("nothing after the end", event, f"`{kind}` after the terminal event")
            if ident is None:
                if kind in ("token", "started", "migrated"):
                    yield self._bad("ids", event, f"`{kind}` without an id")
            else:
                start = last if size is None else ident - size
                if start != last or ident <= last:
                    lost = "lost" if start > last else "shown again"
                    yield self._bad("order", event, f"bytes {lost}: at {last:#x}, then {start:#x} to {ident:#x}")
                if kind == "started":
                    yield from self._another(event)
                known = self.blocks.setdefault(ident, (start, event["crc"]))
                if size is not None and known != (start, event["crc"]):
                    yield self._bad("bytes", event, f"other bytes than before up to {ident:#x}")
                if kind == "token":
                    yield from self._token(event, last)
                self.next_token.setdefault(ident, self.next_token.get(last, 0) + (kind == "token"))
                last = ident
            if kind in TERMINAL:
                ended = True
                yield from self._end(conn, event, last)

    def _elsewhere(self, conn: Conn) -> Iterator[Violation]:
        """What is read on is the log that was begun, and another execution's is none of it, however alike they are."""
        first = next((event for event in conn.events if event["id"] is not None), None)
        if first is None or not conn.after or conn.pool is None or self.started is None:
            return
        begun = f"{self.started[0]}/{self.started[1]}"
        if conn.pool != begun:
            yield self._bad("one execution", first, f"read on from {conn.pool}, begun on {begun}")

    def _another(self, event: dict[str, Any]) -> Iterator[Violation]:
        """`started` again: the same, or a second execution, where the first can't have been found any more."""
        data = event["data"]
        started = tuple(data.get(name) for name in ("node_id", "pool_id", "attempt", "task_id"))
        if self.started not in (None, started):
            node, story = str(self.started[0] if self.started else ""), self.story
            facts, at = self.facts, event["at"]
            gone = facts.hit(self.began_at, at, parts=("node",), hows=("kill", "term"), node=node)
            away = facts.away(node, self.began_at, at) >= facts.promises["reconnect_s"] - 1.0
            if not gone and not away and not was_canceled(story, facts, at):
                yield self._bad("one execution", event, f"a second one is shown: {started} after {self.started}")
            self.blocks.clear()
            self.next_token = {0: 0}
            self.terminal = None
        if self.started != started:
            self.started, self.began_at = started, event["at"]

    def _token(self, event: dict[str, Any], last: int) -> Iterator[Violation]:
        index, text = event["data"].get("i"), event["data"].get("t")
        expected = self.next_token.get(last)
        if text != f"t{index} ":
            yield self._bad("text", event, f"token {index} is {text!r}")
        if expected is not None and index != expected:
            yield self._bad("order", event, f"token {index} where {expected} comes next")

    def _went_with_its_log(self, terminal: tuple[str, int | None, str | None], at: float) -> bool:
        """Of a task that failed, the control knows why; what its log showed before went with the node that had it."""
        kind, offset, word = terminal
        node = str(self.started[0] if self.started else "")
        gone = self.facts.hit(self.began_at, at, parts=("node",), hows=("kill", "term"), node=node)
        away = self.facts.away(node, self.began_at, at) >= self.facts.promises["reconnect_s"] - 1.0
        same = self.terminal is not None and (kind, word) == (self.terminal[0], self.terminal[2])
        return kind == "error" and offset is None and same and (bool(gone) or away)

    def _end(self, conn: Conn, event: dict[str, Any], last: int) -> Iterator[Violation]:
        data, story = event["data"], self.story
        word = data.get("finish_reason") if event["kind"] == "end" else data.get("code")
        terminal = (event["kind"], event["id"], word)
        if self.terminal is None:
            self.terminal = terminal
        elif conn.op != "reread":
            yield self._bad("one end", event, f"a second terminal event: {terminal} after {self.terminal}")
        elif terminal != self.terminal and not self._went_with_its_log(terminal, event["at"]):
            yield self._bad("one end", event, f"read again, it ends otherwise: {terminal}, not {self.terminal}")
        if event["kind"] == "error":
            case = Case(story, self.facts, event["at"], story.output_at() is not None)
            if not explained(word, case):
                how = f"{word} ({'with' if case.output else 'without'} output): {data.get('message')}"
                yield self._bad("unexplained error", event, how)
            return
        shown = self.next_token.get(last)
        if word in FINISHED and shown != story.ask["tokens"]:
            yield self._bad("whole", event, f"ends as {word} after {shown} of {story.ask['tokens']} tokens")
        elif word == "canceled":
            if not was_canceled(story, self.facts, event["at"]):
                yield self._bad("canceled by nobody", event, "nobody canceled it")
        elif word not in FINISHED:
            yield self._bad("whole", event, f"ends as {word!r}")
        if shown is not None and event["id"] is not None:
            if data.get("sha256") != hashlib.sha256(text_of(shown).encode()).hexdigest():
                yield self._bad("digest", event, "the digest is not that of the text")
            if data.get("tokens_out") != shown and word in FINISHED:
                yield self._bad("digest", event, f"it counts {data.get('tokens_out')} tokens, {shown} were shown")


def _openai(story: Story, conn: Conn) -> Iterator[Violation]:
    shown, ended = 0, False
    for chunk in conn.chunks:
        kind, text = chunk["kind"], chunk.get("text")

        def bad(rule: str, what: str, chunk: dict[str, Any] = chunk) -> Violation:
            return Violation(rule, story.marker, chunk["at"], f"connection {conn.number}: {what}")

        if ended:
            yield bad("nothing after the end", f"`{kind}` after the end")
        if text:
            if text != f"t{shown} ":
                yield bad("order", f"{text!r} where t{shown} comes next")
            shown += 1
        if kind == "other":
            yield bad("text", "a chunk that can't be read")
        if kind == "done" and shown != story.ask["tokens"]:
            yield bad("whole", f"[DONE] after {shown} of {story.ask['tokens']} tokens")
        ended = ended or kind in ("done", "error")


def _body(story: Story, conn: Conn) -> Iterator[Violation]:
    body = conn.body or {}
    wanted = story.ask["tokens"]
    if body["finish"] in FINISHED:
        if body["text"] != text_of(wanted):
            yield Violation("whole", story.marker, body["at"], f"the answer is not the text of {wanted} tokens")
    elif body["finish"] != "canceled" or not text_of(wanted).startswith(body["text"] or ""):
        yield Violation("whole", story.marker, body["at"], f"an answer that ends as {body['finish']!r}")
