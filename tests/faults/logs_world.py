"""One node, two controls, their clients: the logs of tasks and everybody who reads them, beside a model of both.

Real are the node's Runner, Pools, TaskLogs and its end of each link, the control's end, the records between them and
the credit of each stream. Moved by hand are the engine's chunks, the wires, the clients, the controls' lives, and time.
"""

from __future__ import annotations

import hashlib
from typing import Any

import aiohttp

from llorch import records
from llorch.control.feed import Accepted, Feed, Refused, Said
from llorch.control.links import Links
from llorch.control.links import NodeLink as ControlEnd
from llorch.errors import Code
from llorch.link import Link
from llorch.messages import Head, Tail
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from llorch.node.link import ACCEPT_WITHIN_S
from llorch.node.link import NodeLink as NodeEnd
from llorch.node.pools import Pools
from llorch.node.retention import SEALED_V1_S
from llorch.node.runner import SWEEP_S
from llorch.node.task_entry import Gone, TaskEntry
from llorch.records import Record, Type
from tests.faults.logs_model import KEPT_BYTES, LIMITS, SLOTS, Ctl, Reading, Story, WatchedLogs, WatchedRunner, weight
from tests.faults.moves import World, move
from tests.faults.small import CREDIT_BYTES, MOST_REPORTED
from tests.faults.virtual import End, Engine, Uncounted, Wire

PATHS = ("native", "native", "/v1/completions")
WORDS = (b"left", b"slow", b"lost", b"shutdown")
LOST_WORDS = (b"lost", b"shutdown")
MOST_TASKS, MOST_READINGS = 12, 12
SLACK_S = 1e-6


class LogsWorld(World):
    def __init__(self) -> None:
        super().__init__()
        with self.loop:
            self.engine = Engine()
            self.pools = Pools()
            handoff = Handoff(
                pool_id="p", replica_id="r0", engine="e", url="http://127.0.0.1:1", model="m", slots=SLOTS
            )
            (probe,) = [act for act in self.pools.handle(ev.HandoffSeen(handoff), 0) if isinstance(act, ev.Probe)]
            self.pools.handle(ev.ProbeOk("p", "r0", probe.probe), 0)
            self.runner = WatchedRunner(
                self, "n", self.pools, WatchedLogs(self), self.engine, Uncounted(),
                max_body_bytes=5_000, changed=lambda: None, clock=self.loop.ticking, wall=self.loop.time,
            )  # fmt: skip
            self.runner._guard.loop(self.runner.sweep, "sweep")
            self.logs = self.runner.logs
            self.stories: dict[TaskEntry, Story] = {}
            self.controls = [Ctl("a"), Ctl("b")]
            self.readings: list[Reading] = []
            self.said: dict[tuple[Wire, int], bytes] = {}  # with which word the control let go of a stream
            self.tasks = 0
            self.bodies: dict[str, dict[str, Any]] = {}  # what each task was first asked with
            self.present: set[TaskEntry] = set()  # sealed and remembered
            self.decoders: dict[End, records.Decoder] = {}
            self.stream_state: dict[tuple[Wire, int], str] = {}  # as the node's records have it
            for control in self.controls:
                self.connect(control)
            self.loop.settle()

    # ---- the model's ears

    def attached(self, story: Story, reader: Any) -> None:
        key = (reader._link.connection._transport.wire, reader.id)
        story.attach(key)
        for reading in self.readings:
            if reading.key == key:
                reading.story = story
                wish, opening = reading.header, story.entry.opening
                assert (opening.task_id, opening.attempt) == (reading.task_id, reading.attempt)
                assert wish is None or wish["owner"] == opening.owner

    def left(self, story: Story, reader: Any, why: Gone) -> None:
        wire = next(wire for wire, stream in story.readers if stream == reader.id and wire.end_of is reader._link)
        key = (wire, reader.id)
        overtaken = reader.offset < len(story.truth) - KEPT_BYTES
        if wire.node.ended:
            lost = True
        elif story.entry.log.sealed and reader.offset == len(story.truth):
            lost = why is Gone.LOST  # it has read all: however it goes, nothing depends on it
        elif key in self.said:
            lost = why is Gone.LOST if overtaken else self.said[key] in LOST_WORDS  # whichever the node met first
        else:
            assert overtaken, "a reader was dropped that nobody let go of"
            lost = False
        assert lost is (why is Gone.LOST), (lost, why)
        story.leave(key, lost, self.loop.now)
        if reader.body is not None and not reader.body.whole and reader.body.deliver is not None:
            story.may_end = story.must_end = True  # the rest of its body can't come

    def node_wrote(self, end: End, data: bytes) -> None:
        """Every record that the node sends: in the order that the contract has, and nothing after the end."""
        if end is not end.wire.node:
            return
        for record in self.decoders.setdefault(end, records.Decoder()).feed(data):
            if record.stream:
                self.node_record(end.wire, record)

    def node_record(self, wire: Wire, record: Record) -> None:
        key = (wire, record.stream)
        state = self.stream_state.get(key, "new")
        kind = record.type
        if kind == Type.ACCEPT:
            assert state == "new"
            self.stream_state[key] = "accepted"
        elif kind == Type.HEAD:
            assert state == "accepted", state
            self.stream_state[key] = "headed"
        elif kind == Type.DATA:
            assert state == "headed" and record.payload, state
        elif kind == Type.TAIL:
            assert state in ("accepted", "headed"), state
            self.stream_state[key] = "over"
            for story in self.stories.values():
                if key in story.readers:
                    story.told.add(next(c.epoch for c in self.controls if c.node_end is wire.end_of))
        elif kind == Type.REFUSE:
            assert state != "over"
            self.stream_state[key] = "over"
        else:
            assert kind == Type.CREDIT and state != "new", kind

    # ---- controls and wires

    def connect(self, control: Ctl) -> bool:
        if control.node_end is not None:
            return False
        wire = Wire(self.loop, self.node_wrote)

        def lost(_: object, reason: str) -> None:
            control.node_end = None

        async def no_calls(call: object, body: bytes) -> Any:
            raise AssertionError

        node_end = NodeEnd(self.runner, no_calls, control.epoch, lost)
        control_end = ControlEnd("n", "lease", lambda link, reason: control.links.drop(link) and None)
        wire.end_of = node_end
        node_end.connection = Link(node_end)
        control_end.connection = Link(control_end)
        wire.start(node_end.connection, control_end.connection)
        control.node_end, control.wire = node_end, wire
        control.links.put(control_end)
        return True

    def control(self, number: int) -> Ctl:
        return self.controls[number % len(self.controls)]

    @move(6, which=1, node=1, count=5)
    def bytes_arrive(self, which: int, node: int, count: int) -> bool:
        wire = self.control(which).wire
        assert wire is not None
        return (wire.node if node else wire.control).deliver((1, 9, 40, 200, 1_000, 1 << 20)[count])

    @move(4, which=1)
    def a_wire_flows(self, which: int) -> bool:
        wire = self.control(which).wire
        assert wire is not None
        did = bool(wire.node.flying or wire.control.flying) and not wire.dead
        wire.flow(True)
        self.loop.settle()
        wire.flow(False)
        return did

    @move(1, which=1, silent=2)
    def a_link_is_cut(self, which: int, silent: int) -> bool:
        """Told to both, or noticed by one, or by none before its pings."""
        wire = self.control(which).wire
        assert wire is not None
        if wire.dead:
            return False
        wire.die()
        if silent == 0:
            wire.cut()
        elif silent == 1:
            wire.node.lose()
        return True

    @move(3, which=1)
    def a_node_links_again(self, which: int) -> bool:
        return self.connect(self.control(which))

    @move(1, which=1)
    def a_control_dies_and_starts(self, which: int) -> None:
        """Its clients lose it; the node hears of it now or later, as of any link."""
        control = self.control(which)
        assert control.wire is not None
        control.wire.die()
        control.life += 1
        control.links = Links()
        for reading in self.readings:
            if reading.control is control:
                reading.over = True
        control.wire.cut()

    # ---- clients

    def begin(
        self, control: Ctl, task_id: str, header: dict[str, Any] | None, body: bytes, offset: int, attempt: int = 1
    ) -> bool:
        link, wire = control.link, control.wire
        self.readings = [reading for reading in self.readings if not reading.over or reading.tail is None]
        if len(self.readings) >= MOST_READINGS:
            self.readings = [reading for reading in self.readings if not reading.over]
        if link is None or wire is None or wire.control.ended or len(self.readings) >= MOST_READINGS:
            return False
        feed = Feed()
        stream = link._last_id + 2
        attempt = attempt if header is None else header["attempt"]
        nowhere = Said(*[lambda *_: None] * 4)
        reading = Reading(task_id, control, feed, nowhere, wire, stream, offset, header, attempt)
        self.readings.append(reading)
        if header is None:
            reading.upstream = link.attach(task_id, offset, attempt, feed)
        else:
            reading.upstream = link.open(header, body, feed)
        return True

    @move(3, which=1, path=2, detach=5, keyed=1, long=3)
    def a_task_comes(self, which: int, path: int, detach: int, keyed: int, long: int) -> bool:
        if len(self.bodies) >= MOST_TASKS:
            known = {entry.task_id for entry in self.logs}
            reading = {each.task_id for each in self.readings if not each.over}
            for task_id in [each for each in self.bodies if each not in known | reading][:1]:
                del self.bodies[task_id]
        if len(self.bodies) >= MOST_TASKS:
            return False
        self.tasks += 1
        task_id = f"{self.tasks:08x}-0000-0000-0000-000000000000"
        control = self.control(which)
        stream = ', "stream": true' if PATHS[path] != "native" else ""
        body = b'{"model": "m", "prompt": "%s"%s}' % (b"x" * (1, 50, 500, 1_500)[long], stream.encode())
        header = {
            "task_id": task_id, "attempt": 1, "pool_id": "p", "model": "m", "path": PATHS[path], "owner": "me",
            "epoch": control.epoch, "detach": detach == 0, "body_digest": hashlib.sha256(body).hexdigest(),
        }  # fmt: skip
        if keyed:
            header["key_digest"] = "k" + task_id
        if not self.begin(control, task_id, header, body, 0):
            return False
        self.bodies[task_id] = {"header": header, "body": body}
        return True

    @move(2, which=1, task=11, how=3)
    def a_task_is_opened_again(self, which: int, task: int, how: int) -> bool:
        """The same attempt, a later one, an earlier one, somebody else's."""
        if not self.bodies:
            return False
        task_id = list(self.bodies)[task % len(self.bodies)]
        known = self.bodies[task_id]
        header = dict(known["header"])
        if how == 1:
            header["attempt"] += 1
        elif how == 2:
            header["attempt"] = max(1, header["attempt"] - 1)
        elif how == 3:
            header["owner"] = "somebody else"
        if not self.begin(self.control(which), task_id, header, known["body"], 0):
            return False
        if how == 1:
            known["header"] = header
        return True

    @move(3, which=1, reading=11)
    def a_client_comes_back(self, which: int, reading: int) -> bool:
        """Where it was, through any control."""
        gone = [each for each in self.readings if each.over and each.tail is None and each.refused is None]
        if not gone:
            return False
        was = gone[reading % len(gone)]
        self.readings.remove(was)
        entry = self.logs._entries.get(was.task_id)
        if entry is None or was.story is None or self.stories[entry] is not was.story:
            return False  # another attempt's bytes: a control never shows those to one who has seen the first one's
        return self.begin(self.control(which), was.task_id, None, b"", was.offset, entry.opening.attempt)

    @move(2, which=1, task=11, offset=20, other=5)
    def somebody_looks_in(self, which: int, task: int, offset: int, other: int) -> bool:
        """At any offset, kept or not, there or not; or into another attempt than the node has."""
        if not self.bodies:
            return False
        task_id = list(self.bodies)[task % len(self.bodies)]
        entry = self.logs._entries.get(task_id)
        end = 0 if entry is None else entry.log.end
        at = end + 2 if offset == 20 else end if offset == 19 else end * offset // 18
        attempt = (1 if entry is None else entry.opening.attempt) + (other == 0)
        return self.begin(self.control(which), task_id, None, b"", at, attempt)

    @move(8, reading=11)
    def a_client_takes(self, reading: int) -> bool:
        waiting = [each for each in self.readings if not each.over and each.feed._items]
        if not waiting:
            return False
        self.take(waiting[reading % len(waiting)])
        return True

    def take(self, reading: Reading) -> None:
        item = _now(reading.feed.next(0))
        story = reading.story
        if isinstance(item, Accepted):
            assert not reading.accepted and story is not None
            reading.accepted = True
        elif isinstance(item, Head):
            assert reading.accepted and not reading.headed
            reading.headed = True
        elif isinstance(item, bytes):
            assert reading.headed and story is not None
            assert item == story.truth[reading.offset : reading.offset + len(item)], "not what the log has there"
            reading.offset += len(item)
            reading.owed += len(item)
            assert reading.owed <= CREDIT_BYTES, "more than was granted"
        elif isinstance(item, Tail):
            assert reading.accepted and story is not None
            assert item.length == reading.offset == len(story.truth), "an end that is not the end"
            assert item.sha256 == hashlib.sha256(story.truth).hexdigest()
            reading.tail, reading.over = item, True
            assert not reading.feed._items
        elif isinstance(item, Refused):
            self.refused(reading, item.error.code)
        else:
            reading.over = True  # Lost

    def refused(self, reading: Reading, code: Code) -> None:
        reading.refused, reading.over = code, True
        if reading.accepted:
            assert reading.story is not None
            assert code is Code.GAP and reading.offset < len(reading.story.truth) - KEPT_BYTES, code
        else:
            assert code in (
                Code.GAP, Code.INVALID_REQUEST, Code.TASK_NOT_FOUND, Code.CONFLICT, Code.ALL_SLOTS_BUSY
            ), code  # fmt: skip

    @move(4, reading=11)
    def what_was_taken_is_passed_on(self, reading: int) -> bool:
        owing = [each for each in self.readings if not each.over and each.owed]
        if not owing:
            return False
        self.pass_on(owing[reading % len(owing)])
        return True

    def pass_on(self, reading: Reading) -> None:
        owed, reading.owed = reading.owed, 0
        reading.upstream.passed_on(owed)

    @move(2, reading=11, word=3)
    def a_client_leaves(self, reading: int, word: int) -> bool:
        there = [each for each in self.readings if not each.over]
        if not there:
            return False
        gone = there[reading % len(there)]
        self.said[gone.key] = WORDS[word]
        gone.upstream.detach(WORDS[word].decode())
        gone.over = True
        return True

    @move(1, reading=11)
    def a_task_is_cancelled(self, reading: int) -> bool:
        there = [each for each in self.readings if not each.over and each.story is not None]
        if not there:
            return False
        gone = there[reading % len(there)]
        assert gone.story is not None
        gone.story.may_end = True
        gone.told_to_go = True
        gone.upstream.cancel()
        return True

    # ---- the engine

    @move(8, which=2, count=5, size=2)
    def an_engine_says(self, which: int, count: int, size: int) -> bool:
        answers = self.engine.answers
        if not answers:
            return False
        answer = answers[which % len(answers)]
        for _ in range(count + 1):
            answer.token(f"t{answer.sent}" + "." * (1, 40, 300)[size])
        return True

    @move(2, which=2, how=5)
    def an_engine_ends(self, which: int, how: int) -> bool:
        answers = self.engine.answers
        if not answers:
            return False
        answer = answers[which % len(answers)]
        if how < 3:
            answer.end()
        elif how == 3:
            answer.begin(503)
            answer.stop(None)
        else:
            answer.stop(None if how == 4 else aiohttp.ClientPayloadError("cut"))
        return True

    # ---- time

    @move(3, seconds=4)
    def time_passes(self, seconds: int) -> None:
        for control in self.controls:
            assert control.wire is not None
            control.wire.flow(True)
        self.loop.advance((0.1, 1.0, 4.0, 11.0, 31.0)[seconds])
        for control in self.controls:
            assert control.wire is not None
            control.wire.flow(False)

    @move(1)
    def all_is_calm(self) -> None:
        """Everything arrives and everybody reads: then nobody is left waiting for what is there."""
        self.calm()

    def calm(self) -> None:
        wires = [control.wire for control in self.controls if control.wire is not None]
        for wire in wires:
            wire.flow(True)
        self.loop.advance(ACCEPT_WITHIN_S)  # what was just opened may be told so late
        for _ in range(2_000):
            self.loop.settle()
            busy = False
            for reading in self.readings:
                while not reading.over and reading.feed._items:
                    self.take(reading)
                    busy = True
                if not reading.over and reading.owed:
                    self.pass_on(reading)
                    busy = True
            if not busy:
                break
        else:
            raise AssertionError("readers never come to rest")
        for reading in self.readings:
            if reading.over or reading.wire.dead:
                continue
            story = reading.story
            assert reading.accepted and story is not None, "an OPEN or ATTACH without an answer"
            assert reading.offset == len(story.truth), "bytes that nobody was woken for"
            assert not story.entry.log.sealed, "an end that nobody was told of"
            if reading.told_to_go and story.entry.run is not None:
                assert self.stopped(story.entry), "a cancel without effect"
        for execution in self.runner._executions.values():
            if execution._pending:
                there = self.stories[execution.entry].readers
                assert any(wire.dead for wire, _ in there), "a writer waits, and nobody is behind"
        for wire in wires:
            wire.flow(False)

    @move(1, which=1)
    def a_node_reports(self, which: int) -> None:
        """To a control: all that runs, and the newest of what has ended and it was not told of."""
        epoch = self.control(which).epoch
        said = [(report["task_id"], report["attempt"], report["state"]) for report in self.logs.reports(epoch)]
        newest = [story for entry, story in self.stories.items() if self.logs._entries.get(entry.task_id) is entry]
        runs = {(s.entry.task_id, s.entry.opening.attempt) for s in newest if not s.entry.log.sealed}
        ended = [
            story
            for story in newest
            if story.entry.log.sealed and epoch not in story.told
            and (story.entry.opening.path == "native" or story.entry.opening.key_digest is not None)
        ]  # fmt: skip
        ended.sort(key=lambda story: story.entry.sealed_at or 0.0)
        assert {(task, attempt) for task, attempt, state in said if state != "sealed"} == runs
        expected = [(story.entry.task_id, story.entry.opening.attempt) for story in ended[-MOST_REPORTED:]]
        assert [(task, attempt) for task, attempt, state in said if state == "sealed"] == expected

    # ---- what is always true

    @staticmethod
    def stopped(entry: TaskEntry) -> bool:
        return entry.run is None or entry.run._stopped is not None  # type: ignore[attr-defined]

    def check(self) -> None:
        now = self.loop.now
        for entry, story in list(self.stories.items()):
            log = entry.log
            assert log.end == len(story.truth)
            assert log.end - log.start <= KEPT_BYTES
            if log.sealed:
                if story.sealed_at is None:
                    self.sealed(entry, story)
                if entry not in self.present and not story.readers:
                    del self.stories[entry]
                continue
            assert log.readers == len(story.readers)
            execution = entry.run
            stopped = execution._stopped  # type: ignore[union-attr]
            due = story.due is not None and story.due <= now + SLACK_S
            if stopped is not None:
                assert stopped.code is not Code.CANCELED or story.may_end or due, "cancelled, and nobody said so"
            else:
                assert story.due is None or now <= story.due + SWEEP_S + SLACK_S, "nobody reads it, and it runs on"
                assert not story.must_end, "it was overtaken or can't begin, and runs on"
        self.check_retention(now)
        self.check_memory()

    def sealed(self, entry: TaskEntry, story: Story) -> None:
        story.sealed_at = entry.sealed_at
        tail = entry.log.tail
        assert tail is not None and tail.length == len(story.truth)
        if tail.finish_reason == "canceled":
            due = story.due is not None and story.due <= self.loop.now + SLACK_S
            assert story.may_end or due, "cancelled, and nobody said so"
        if entry.native and story.truth:
            ends = story.truth.count(b"\nevent: end\n") + story.truth.count(b"\nevent: error\n")
            assert ends == 1 and story.truth.count(b"\nevent: started\n") == 1
            last = bytes(story.truth).rstrip().rpartition(b"\n\n")[2]
            assert b"event: end\n" in last or b"event: error\n" in last, "something after the end"
        if self.logs._entries.get(entry.task_id) is entry:
            self.present.add(entry)

    def check_retention(self, now: float) -> None:
        for entry in list(self.present):
            if self.logs._entries.get(entry.task_id) is not entry:
                self.present.discard(entry)
            else:
                assert now <= self.kept_until(entry) + SWEEP_S + SLACK_S, "kept past its time"

    @staticmethod
    def kept_until(entry: TaskEntry) -> float:
        assert entry.sealed_at is not None
        return entry.sealed_at + (LIMITS.sealed_native_s if entry.native else SEALED_V1_S)

    def expired(self, before: list[TaskEntry], hidden: int, now: float) -> None:
        """What is forgotten before its time is the oldest there is, and no more of it than is needed."""
        known = set(self.logs)
        early = [entry for entry in before if entry not in known and now < self.kept_until(entry) - SLACK_S]
        left = [entry for entry in before if entry in known]
        kept = sum(map(weight, known))
        assert kept + self.logs.hidden_bytes() <= LIMITS.all_kept_bytes or not left, "more is kept than may be"
        if early:
            assert kept + hidden + sum(map(weight, early)) > LIMITS.all_kept_bytes, "forgotten with room for it"
            newest = max(entry.sealed_at or 0.0 for entry in early)
            assert all(newest <= (entry.sealed_at or 0.0) for entry in left), "a newer one went before an older one"

    def check_memory(self) -> None:
        for reading in self.readings:
            waiting = sum(len(item) for item in reading.feed._items if isinstance(item, bytes))
            assert waiting + reading.owed <= CREDIT_BYTES + CREDIT_BYTES // 2, "a control holds more than was granted"
        for control in self.controls:
            wire = control.wire
            assert wire is None or wire.dead or len(wire.node.flying) <= MOST_READINGS * (CREDIT_BYTES + 2_500)

    def finish(self) -> None:
        for control in self.controls:
            assert control.wire is not None
            if control.wire.dead:
                control.wire.cut()
            self.connect(control)
        self.calm()
        for answer in list(self.engine.answers):
            answer.end()
        self.calm()
        self.loop.advance(45.0)
        for answer in list(self.engine.answers):
            answer.end()  # of those that waited for a reader
        self.loop.advance(45.0)
        self.check()
        assert not self.runner._executions and self.pools.accepted() == 0, "a slot is held by nobody"
        assert len(self.logs) == 0 and not self.logs._orphans
        assert not any(self.logs._untold.values()) and self.logs._sealed_bytes == 0


def _now(work: Any) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")
