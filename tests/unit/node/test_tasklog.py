"""Task logs: bytes at an offset never change, every reader sees every byte once in order, readers gone, retention."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llorch.errors import Code, LlorchError
from llorch.messages import Head, Open, Tail
from llorch.node.retention import ENTRY_BYTES, SEALED_V1_S, Limits, TaskLogs
from llorch.node.task_entry import LOST_GRACE_S, Gone, State, TaskEntry, orphan_until
from llorch.node.tasklog import HASHED_AT_ONCE_BYTES, TaskLog


class Collector:
    """A reader that takes all it may as soon as it is woken, or only when told to."""

    def __init__(self, source: TaskLog, offset: int = 0, *, lazy: bool = False) -> None:
        self.source, self.offset, self.lazy = source, offset, lazy
        self.got = b""
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1
        if not self.lazy:
            self.drain()

    def fresh(self, data: bytes) -> None:
        assert self.source.read(self.source.end - len(data), len(data)) == data
        self.wake()

    def drain(self, limit: int = 7) -> None:
        while data := self.source.take(self, limit):
            self.got += data


def tail_of(source: TaskLog, **more: object) -> Tail:
    return Tail.model_validate({"length": source.end, "sha256": source.sha256, **more})


def test_reader_is_woken_by_head_bytes_and_tail() -> None:
    source = TaskLog()
    reader = Collector(source)
    source.attach(reader)
    source.begin(Head(), b"one")
    source.append(b"two")
    source.seal(tail_of(source))
    assert (reader.woken, reader.got) == (3, b"onetwo")


def test_detached_reader_is_woken_no_more() -> None:
    source = TaskLog()
    reader = Collector(source)
    source.attach(reader)
    source.begin(Head(), b"one")
    assert source.detach(reader)
    source.append(b"two")
    assert reader.got == b"one"
    assert not source.detach(reader)


def test_sealed_log_never_grows() -> None:
    source = TaskLog()
    source.begin(Head(), b"one")
    source.seal(tail_of(source))
    for change in (lambda: source.append(b"x"), lambda: source.seal(tail_of(source))):
        with pytest.raises(RuntimeError):
            change()
    assert source.end == 3


def test_no_bytes_before_the_head_and_one_head() -> None:
    source = TaskLog()
    with pytest.raises(RuntimeError):
        source.append(b"x")
    source.begin(Head(), b"x")
    with pytest.raises(RuntimeError):
        source.begin(Head(), b"y")


def test_tail_states_the_length() -> None:
    source = TaskLog()
    source.begin(Head(), b"one")
    with pytest.raises(RuntimeError):
        source.seal(Tail(length=2))


def test_oldest_bytes_go_and_reading_them_is_a_gap() -> None:
    source = TaskLog(kept_bytes=4)
    source.begin(Head(), b"abcdef")
    assert (source.start, source.end) == (2, 6)
    assert source.read(2, 100) == b"cdef"
    with pytest.raises(LlorchError) as refused:
        source.read(1, 1)
    assert refused.value.code is Code.GAP
    assert refused.value.details == {"offset": 1, "kept_from": 2}


def test_offset_past_the_end_is_invalid() -> None:
    source = TaskLog()
    source.begin(Head(), b"abc")
    assert source.read(3, 1) == b""
    with pytest.raises(LlorchError) as refused:
        source.attach(Collector(source, 4))
    assert refused.value.code is Code.INVALID_REQUEST


def test_attaching_below_what_is_kept_is_a_gap() -> None:
    source = TaskLog(kept_bytes=2)
    source.begin(Head(), b"abcdef")
    with pytest.raises(LlorchError) as refused:
        source.attach(Collector(source, 0))
    assert refused.value.code is Code.GAP


def test_sha256_is_of_all_bytes_also_those_that_went() -> None:
    source = TaskLog(kept_bytes=3)
    source.begin(Head(), b"abcdef")
    source.append(b"ghi")
    assert source.sha256 == hashlib.sha256(b"abcdefghi").hexdigest()


def log_of(pieces: list[bytes], kept_bytes: int) -> TaskLog:
    source = TaskLog(kept_bytes)
    source.begin(Head(), pieces[0])
    for piece in pieces[1:]:
        source.append(piece)
    return source


@pytest.mark.parametrize("kept_bytes", [1, 1_000, HASHED_AT_ONCE_BYTES, HASHED_AT_ONCE_BYTES + 1, 1 << 20])
@pytest.mark.parametrize(
    "sizes",
    [
        [1] * 50,
        [HASHED_AT_ONCE_BYTES - 1, 1, 1],
        [HASHED_AT_ONCE_BYTES, HASHED_AT_ONCE_BYTES],
        [HASHED_AT_ONCE_BYTES + 1, 1, 3 * HASHED_AT_ONCE_BYTES, 5],
        [700] * 100,
        [5, 0, HASHED_AT_ONCE_BYTES - 6, 0, 1, 0],
    ],
)
def test_sha256_is_of_all_bytes_whatever_the_sizes_of_the_pieces(sizes: list[int], kept_bytes: int) -> None:
    pieces = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    source = log_of(pieces, kept_bytes)
    assert source.end - source._hashed < HASHED_AT_ONCE_BYTES  # so much is left for the end, at most
    assert source.sha256 == hashlib.sha256(b"".join(pieces)).hexdigest()
    source.append(b"more")
    assert source.sha256 == hashlib.sha256(b"".join(pieces) + b"more").hexdigest()


def test_sha256_may_be_asked_for_at_any_time_and_changes_nothing() -> None:
    source, whole = TaskLog(kept_bytes=HASHED_AT_ONCE_BYTES + 100), hashlib.sha256()
    for number in range(60):
        piece = bytes([number]) * (number * 37 % 1_500)
        whole.update(piece)
        if number:
            source.append(piece)
        else:
            source.begin(Head(), piece)
        if number % 3 == 0:
            assert source.sha256 == source.sha256 == whole.hexdigest()
    assert source.start > 0


@given(
    st.lists(st.integers(0, 3 * HASHED_AT_ONCE_BYTES // 2), min_size=1, max_size=8),
    st.integers(1, 3 * HASHED_AT_ONCE_BYTES),
    st.sets(st.integers(0, 7)),
)
@settings(max_examples=60, deadline=None)
def test_sha256_is_of_all_bytes(sizes: list[int], kept_bytes: int, asked: set[int]) -> None:
    source, whole = log_of([b"first"], kept_bytes), hashlib.sha256(b"first")
    for number, size in enumerate(sizes):
        piece = bytes([number]) * size
        source.append(piece)
        whole.update(piece)
        if number in asked:
            assert source.sha256 == whole.hexdigest()
    assert source.sha256 == whole.hexdigest()


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=6), st.integers(1, 30), st.booleans(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_each_offset_has_its_bytes_whichever_piece_came_last(
    pieces: list[bytes], kept_bytes: int, sealed: bool, hashed: bool
) -> None:
    whole = b"".join(pieces)
    source = log_of(pieces, kept_bytes)
    assert not hashed or source.sha256
    if sealed:
        source.seal(tail_of(source))
    assert (source.start, source.end) == (max(0, len(whole) - kept_bytes), len(whole))
    for offset in range(source.end + 1):
        for limit in (1, len(pieces[-1]) - 1, len(pieces[-1]), len(pieces[-1]) + 1, 1_000):
            if limit <= 0:
                continue
            if offset < source.start:
                with pytest.raises(LlorchError) as refused:
                    source.read(offset, limit)
                assert refused.value.code is Code.GAP
            else:
                assert source.read(offset, limit) == whole[offset : offset + limit]


def test_who_keeps_up_is_given_the_piece_itself() -> None:
    source, piece = log_of([b"one"], 100), b"a piece that is not copied"
    source.append(piece)
    assert source.read(3, 100) is piece
    source.append(b"next")
    assert source.read(3, 26) == piece


def test_a_sealed_log_keeps_its_bytes_once() -> None:
    piece = b"a piece that is copied"
    source = log_of([piece], 100)
    source.seal(tail_of(source))
    assert source.read(0, 100) == piece
    assert source.read(0, 100) is not piece


@given(
    st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 800), st.integers(1, 50)), max_size=5),
)
def test_every_reader_sees_every_byte_once_in_order(chunks: list[bytes], joins: list[tuple[int, int, int]]) -> None:
    """Readers join after some chunk, at any offset there is, and read in pieces of any size."""
    source = TaskLog()
    whole = b"".join(chunks)
    readers: list[tuple[int, Collector]] = []
    for number, chunk in enumerate(chunks):
        for after, offset, _limit in joins:
            if after == number and offset <= source.end:
                reader = Collector(source, offset)
                source.attach(reader)
                reader.wake()
                readers.append((offset, reader))
        if number == 0:
            source.begin(Head(), chunk)
        else:
            source.append(chunk)
    source.seal(tail_of(source))
    for offset, reader in readers:
        assert reader.got == whole[offset:]


class LogMachine(RuleBasedStateMachine):
    """Against a model that keeps everything: no byte at an offset ever changes, whatever is read or dropped."""

    KEPT = 64

    def __init__(self) -> None:
        super().__init__()
        self.source = TaskLog(kept_bytes=self.KEPT)
        self.everything = b""
        self.readers: list[Collector] = []
        self.begun = False

    @precondition(lambda self: not self.source.sealed)
    @rule(data=st.binary(min_size=1, max_size=100))
    def write(self, data: bytes) -> None:
        if self.begun:
            self.source.append(data)
        else:
            self.source.begin(Head(), data)
            self.begun = True
        self.everything += data

    @rule(back=st.integers(0, 80))
    def join(self, back: int) -> None:
        offset = max(0, self.source.end - back)
        reader = Collector(self.source, offset, lazy=True)
        if offset < self.source.start:
            with pytest.raises(LlorchError):
                self.source.attach(reader)
            return
        self.source.attach(reader)
        reader.first = offset  # type: ignore[attr-defined]
        self.readers.append(reader)

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 100), limit=st.integers(1, 30))
    def read(self, which: int, limit: int) -> None:
        reader = self.readers[which % len(self.readers)]
        if reader.offset < self.source.start:
            with pytest.raises(LlorchError) as refused:
                self.source.take(reader, limit)
            assert refused.value.code is Code.GAP
            return
        reader.got += self.source.take(reader, limit)

    @precondition(lambda self: not self.source.sealed)
    @rule()
    def seal(self) -> None:
        self.source.seal(tail_of(self.source))

    @invariant()
    def bytes_never_change(self) -> None:
        source = self.source
        assert source.end == len(self.everything)
        assert source.end - source.start <= self.KEPT
        assert source.read(source.start, self.KEPT) == self.everything[source.start :]
        for reader in self.readers:
            first: int = reader.first  # type: ignore[attr-defined]
            assert reader.got == self.everything[first : reader.offset]

    @invariant()
    def fits_protects_attached_readers(self) -> None:
        source = self.source
        pending = [reader.offset for reader in self.readers if reader.offset >= source.start]
        for count in (1, 10, self.KEPT):
            lost = max(0, source.end + count - self.KEPT)
            assert source.fits(count) == all(offset >= lost for offset in pending)


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


async def test_writer_waits_until_the_reader_has_made_room() -> None:
    source = TaskLog(kept_bytes=10)
    reader = Collector(source, lazy=True)
    source.attach(reader)
    source.begin(Head(), b"x" * 10)
    waiting = asyncio.ensure_future(source.room(5, 30))
    await asyncio.sleep(0)
    assert not waiting.done()
    source.take(reader, 4)
    await asyncio.sleep(0)
    assert not waiting.done()
    source.take(reader, 1)
    assert await asyncio.wait_for(waiting, 5)


async def test_writer_goes_on_when_the_slow_reader_leaves() -> None:
    source = TaskLog(kept_bytes=10)
    reader = Collector(source, lazy=True)
    source.attach(reader)
    source.begin(Head(), b"x" * 10)
    waiting = asyncio.ensure_future(source.room(5, 30))
    await asyncio.sleep(0)
    source.detach(reader)
    assert await asyncio.wait_for(waiting, 5)


async def test_writer_waits_no_longer_than_its_limit() -> None:
    source = TaskLog(kept_bytes=10)
    source.attach(Collector(source, lazy=True))
    source.begin(Head(), b"x" * 10)
    assert not await source.room(5, 0.01)


# ---------------------------------------------------------------- the store


def opening(attempt: int = 1, path: str = "native", **more: object) -> Open:
    given_id = more.pop("task_id", None) or str(uuid.uuid4())
    return Open.model_validate({"task_id": given_id, "attempt": attempt, "pool_id": "p0", "path": path, **more})


def finish(logs: TaskLogs, entry: TaskEntry, now: float, body: bytes = b"x") -> None:
    entry.log.begin(Head(), body)
    entry.log.seal(tail_of(entry.log))
    logs.sealed(entry, now, now)


def test_repeated_open_attaches_and_a_lower_attempt_conflicts() -> None:
    logs = TaskLogs(Limits())
    first = opening(attempt=2)
    assert logs.overtaken(first) is None
    entry = logs.add(first, 0, 0)
    assert logs.known(first) is entry
    assert logs.overtaken(first) is None
    with pytest.raises(LlorchError) as refused:
        logs.known(first.model_copy(update={"attempt": 1}))
    assert refused.value.code is Code.CONFLICT


def test_higher_attempt_overtakes_the_lower() -> None:
    logs = TaskLogs(Limits())
    first = opening()
    entry = logs.add(first, 0, 0)
    second = first.model_copy(update={"attempt": 2})
    assert logs.known(second) is None
    assert logs.overtaken(second) is entry
    newer = logs.add(second, 1, 1)
    finish(logs, entry, 2)
    assert logs.get(first.task_id) is newer
    assert logs.running == [newer]


@pytest.mark.parametrize("attempt", [2, 3])
@pytest.mark.parametrize("change", [{"owner": "someone-else"}, {"body_digest": "ff"}])
def test_open_of_another_owner_or_body_conflicts_whatever_its_attempt(change: dict[str, Any], attempt: int) -> None:
    """A later attempt would end the task: it must be the same one."""
    logs = TaskLogs(Limits())
    first = opening(attempt=2, owner="me", body_digest="aa")
    logs.add(first, 0, 0)
    with pytest.raises(LlorchError) as refused:
        logs.known(first.model_copy(update={**change, "attempt": attempt}))
    assert refused.value.code is Code.CONFLICT


@pytest.mark.parametrize(
    ("native", "detach", "lost_at", "until"),
    [
        (False, False, None, 100.0),  # /v1, left: at once
        (False, False, 100.0, 100.0 + LOST_GRACE_S),
        (True, False, None, 110.0),
        (True, False, 90.0, None),  # native, lost: to its end
        (True, True, None, None),
        (False, True, 90.0, None),
    ],
)
def test_when_a_task_without_readers_ends(
    native: bool, detach: bool, lost_at: float | None, until: float | None
) -> None:
    assert orphan_until(native=native, detach=detach, left_at=100.0, lost_at=lost_at, reconnect_grace_s=10.0) == until


def test_v1_task_is_cancelled_when_its_last_reader_leaves_not_before() -> None:
    logs = TaskLogs(Limits())
    entry = logs.add(opening(path="/v1/completions"), 0, 0)
    one, two = Collector(entry.log), Collector(entry.log)
    logs.attach(entry, one)
    logs.attach(entry, two)
    assert not logs.leave(entry, one, Gone.LEFT, 1)
    assert logs.leave(entry, two, Gone.LEFT, 1)


def test_lost_v1_reader_may_come_back_for_a_while() -> None:
    logs = TaskLogs(Limits())
    entry = logs.add(opening(path="/v1/completions"), 0, 0)
    reader = Collector(entry.log)
    logs.attach(entry, reader)
    assert not logs.leave(entry, reader, Gone.LOST, 5)
    assert logs.orphaned(5 + LOST_GRACE_S - 0.1) == []
    assert logs.orphaned(5 + LOST_GRACE_S) == [entry]
    assert logs.orphaned(1_000) == []


def test_two_controls_that_read_one_task_do_not_cancel_each_other() -> None:
    """One control dies while the other's client leaves: the first one's client may still come back."""
    logs = TaskLogs(Limits())
    entry = logs.add(opening(path="/v1/completions"), 0, 0)
    dying, other = Collector(entry.log), Collector(entry.log)
    logs.attach(entry, dying)
    logs.attach(entry, other)
    logs.leave(entry, dying, Gone.LOST, 1)
    assert not logs.leave(entry, other, Gone.LEFT, 2)
    assert logs.orphaned(3) == []


def test_native_reader_that_comes_back_within_grace_keeps_the_task() -> None:
    logs = TaskLogs(Limits(reconnect_grace_s=10))
    entry = logs.add(opening(), 0, 0)
    reader = Collector(entry.log)
    logs.attach(entry, reader)
    assert not logs.leave(entry, reader, Gone.LEFT, 1)
    again = Collector(entry.log)
    logs.attach(entry, again)
    assert logs.orphaned(50) == []
    logs.leave(entry, again, Gone.LEFT, 60)
    assert logs.orphaned(69.9) == []
    assert logs.orphaned(70) == [entry]


def test_reader_of_a_sealed_log_leaves_without_effect() -> None:
    logs = TaskLogs(Limits())
    entry = logs.add(opening(path="/v1/completions"), 0, 0)
    reader = Collector(entry.log)
    logs.attach(entry, reader)
    finish(logs, entry, 1)
    assert not logs.leave(entry, reader, Gone.LEFT, 2)


def test_sealed_logs_stay_for_their_time() -> None:
    logs = TaskLogs(Limits(sealed_native_s=600))
    native = logs.add(opening(), 0, 0)
    v1 = logs.add(opening(path="/v1/completions"), 0, 0)
    finish(logs, native, 10)
    finish(logs, v1, 10)
    logs.expire(10 + SEALED_V1_S - 0.1)
    assert logs.get(v1.task_id) is v1
    logs.expire(10 + SEALED_V1_S)
    with pytest.raises(LlorchError) as gone:
        logs.get(v1.task_id)
    assert gone.value.code is Code.TASK_NOT_FOUND
    logs.expire(609.9)
    assert logs.get(native.task_id) is native
    logs.expire(610)
    assert len(logs) == 0


def test_oldest_sealed_logs_go_first_when_all_together_are_too_much() -> None:
    logs = TaskLogs(Limits(all_kept_bytes=3 * (ENTRY_BYTES + 1_000)))
    running = logs.add(opening(), 0, 0)
    running.log.begin(Head(), b"r" * 1_000)
    sealed = []
    for number, path in enumerate(("native", "/v1/completions", "native")):
        entry = logs.add(opening(path=path), 0, 0)
        finish(logs, entry, number, b"x" * 1_000)
        sealed.append(entry)
    assert set(logs) == {running, *sealed[1:]}


def test_reports_are_what_runs_and_what_a_control_was_not_told() -> None:
    logs = TaskLogs(Limits())
    running = logs.add(opening(), 0, 0)
    native = logs.add(opening(), 0, 0)
    plain = logs.add(opening(path="/v1/completions"), 0, 0)
    keyed = logs.add(opening(path="/v1/completions", key_digest="ab"), 0, 0)
    for entry in (native, plain, keyed):
        finish(logs, entry, 1)
    logs.tell(native, "epoch-a")

    def ids(epoch: str | None) -> set[str]:
        return {report["task_id"] for report in logs.reports(epoch)}

    assert ids("epoch-a") == {running.task_id, keyed.task_id}
    assert ids("epoch-b") == {running.task_id, native.task_id, keyed.task_id}
    assert ids(None) == ids("epoch-b")
    # The same once those controls are known, for what is sealed, told and forgotten from now on.
    logs.tell(keyed, "epoch-a")
    running.told.add("epoch-a")
    finish(logs, running, 2)
    later = logs.add(opening(), 0, 0)
    finish(logs, later, 3)
    assert ids("epoch-a") == {later.task_id}
    assert ids("epoch-b") == {running.task_id, native.task_id, keyed.task_id, later.task_id}
    logs.expire(602)
    assert ids("epoch-b") == ids(None) == {later.task_id}


def test_reports_of_sealed_tasks_are_the_newest_thousand() -> None:
    logs = TaskLogs(Limits())
    for number in range(1_005):
        entry = logs.add(opening(), 0, 0)
        finish(logs, entry, number / 1_000)
        last = entry
    reports = logs.reports(None)
    assert len(reports) == 1_000
    assert reports[-1]["task_id"] == last.task_id


def test_report_reads_as_a_person_would() -> None:
    logs = TaskLogs(Limits())
    entry = logs.add(opening(epoch="e", model="m"), 1, 1_700_000_000.25)
    assert entry.report()["started_at"] == "2023-11-14T22:13:20.250Z"
    assert entry.report()["state"] == State.ACCEPTED
    entry.log.seal(Tail(length=0, error={"code": "ENGINE_FAILED"}, status=502))
    logs.sealed(entry, 2, 1_700_000_001)
    report = entry.report()
    assert (report["state"], report["code"], report["ended_at"]) == (
        "sealed",
        "ENGINE_FAILED",
        "2023-11-14T22:13:21.000Z",
    )
