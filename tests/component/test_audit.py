"""The audit log on a real disk: restarts, crashes, full disks, rotation, permissions, two controls at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from llorch import audit, audit_files
from llorch.audit import AuditLog
from llorch.audit_chain import CHECKPOINT, Verdict, verify
from llorch.audit_files import Keys, chain_files, chains, read_lines
from llorch.errors import Code, ConfigError, LlorchError
from tests.cluster import eventually


def lines_of(folder: Path) -> list[bytes]:
    return [line for path in chain_files(folder / "audit") for line in read_lines(path)]


def records(folder: Path) -> list[dict[str, Any]]:
    return [record for line in lines_of(folder) if (record := json.loads(line))["event"] != CHECKPOINT]


def events(folder: Path) -> list[str]:
    return [record["event"] for record in records(folder)]


def verdict(folder: Path) -> Verdict:
    keys = Keys.read(folder / "audit")
    return verify(lines_of(folder), keys.public, keys.mac)


@contextlib.asynccontextmanager
async def opened(folder: Path, **more: Any) -> AsyncIterator[AuditLog]:
    log = AuditLog(folder, **more)
    await log.start()
    try:
        yield log
    finally:
        await log.close()


class Disk:
    """`os.write` and `os.fsync` as the audit log sees them. `room` bytes fit; `fault` is what more of them costs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.fault: int | None = None
        self.at_sync: int | None = None
        self._write, self._fsync = os.write, os.fsync
        monkeypatch.setattr(audit_files.os, "write", self.write)
        monkeypatch.setattr(audit_files.os, "fsync", self.fsync)

    def full(self, room: int = 0) -> None:
        self.room, self.fault = room, errno.ENOSPC

    def mend(self) -> None:
        self.room = self.fault = self.at_sync = None

    def write(self, fd: int, data: Any) -> int:
        if self.room is None:
            return self._write(fd, data)
        if not self.room:
            assert self.fault is not None
            raise OSError(self.fault, os.strerror(self.fault))
        written = self._write(fd, bytes(data)[: self.room])
        self.room -= written
        return written

    def fsync(self, fd: int) -> None:
        if self.at_sync is not None:
            raise OSError(self.at_sync, os.strerror(self.at_sync))
        self._fsync(fd)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(audit, "RETRY_AFTER_S", 0.02)
    made = Disk(monkeypatch)
    yield made
    made.mend()


# ---------------------------------------------------------------- what is written, and when


async def test_records_are_in_the_file_soon_and_a_required_one_when_it_returns(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        log.record("control.start", version="1")
        await eventually(lambda: events(tmp_path) == ["control.start"], within_s=2)
        await log.require("node.registered", node_id="a", decision="allowed")
        assert events(tmp_path)[-1] == "node.registered"
        log.record("task.accepted", task_id="t")
    assert events(tmp_path) == ["control.start", "node.registered", "task.accepted"]
    found = verdict(tmp_path)
    assert found.whole
    assert found.checkpoint is not None
    assert found.checkpoint.seq == found.last_seq  # the last line


async def test_the_first_record_of_a_run_is_signed_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        await log.require("control.start")
        assert [json.loads(line)["event"] for line in lines_of(tmp_path)] == [CHECKPOINT, "control.start", CHECKPOINT]
        await log.require("link.up")
        assert json.loads(lines_of(tmp_path)[-1])["event"] == "link.up"


async def test_checkpoints_come_after_so_many_records_and_after_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "CHECKPOINT_EVERY_RECORDS", 10)

    def signed_to_the_end() -> bool:
        found = verdict(tmp_path)
        return found.checkpoint is not None and found.checkpoint.seq == found.last_seq

    async with opened(tmp_path) as log:
        await log.require("control.start")
        for number in range(10):
            await log.require("link.up")
            assert signed_to_the_end() is (number == 9)
        monkeypatch.setattr(audit, "CHECKPOINT_EVERY_S", 0.02)
        await log.require("link.lost")
        await eventually(signed_to_the_end, within_s=2)


async def test_only_the_words_that_there_are_can_be_put_on_record(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        for event, fields in (("x", {"prompt": "p"}), ("x", {"authorization": "t"}), (CHECKPOINT, {})):
            with pytest.raises(TypeError, match="can't be put on record"):
                log.record(event, **fields)
            with pytest.raises(TypeError, match="can't be put on record"):
                await log.require(event, **fields)
    assert events(tmp_path) == []


async def test_many_records_keep_their_order_and_their_chain(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        for number in range(3_000):
            log.record("task.accepted", count=number)
            if number % 500 == 0:
                await log.require("node.registered", count=number)
    assert [r["count"] for r in records(tmp_path) if r["event"] == "task.accepted"] == list(range(3_000))
    assert verdict(tmp_path).whole


# ---------------------------------------------------------------- restarts and crashes


async def test_the_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    for run in range(3):
        async with opened(tmp_path) as log:
            log.record("control.start", count=run)
    assert [record["count"] for record in records(tmp_path)] == [0, 1, 2]
    found = verdict(tmp_path)
    assert found.whole
    assert found.first_seq == 1
    assert len({json.loads(line).get("chain") for line in lines_of(tmp_path)} - {None}) == 1


async def test_a_start_with_nothing_to_say_writes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    assert lines_of(tmp_path) == []


async def test_the_chain_goes_on_after_a_crash_and_what_it_left_is_signed_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        await log.require("control.start")
        for number in range(5):
            await log.require("task.accepted", count=number)
        before = lines_of(tmp_path)
    path = tmp_path / "audit" / "audit.jsonl"
    path.write_bytes(b"".join(before))  # as if killed there
    async with opened(tmp_path):
        await eventually(lambda: len(lines_of(tmp_path)) > len(before), within_s=2)
    assert json.loads(lines_of(tmp_path)[len(before)])["event"] == CHECKPOINT
    assert verdict(tmp_path).whole


@pytest.mark.parametrize("rest", [b'{"time":"2026', b"\0" * 300, b"x"], ids=["half a line", "zeros", "one byte"])
async def test_a_torn_last_line_is_set_aside_and_said_to_be(
    tmp_path: Path, rest: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as log:
        log.record("control.start")
    path = tmp_path / "audit" / "audit.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    assert not verdict(tmp_path).whole
    with caplog.at_level(logging.WARNING):
        async with opened(tmp_path) as log:
            log.record("control.start")
    assert path.read_bytes().startswith(whole)
    torn = records(tmp_path)[1]
    assert (torn["event"], torn["bytes"]) == ("audit.torn", len(rest))
    kept = tmp_path / "audit" / torn["file"]
    assert kept.read_bytes() == rest
    assert kept.stat().st_mode & 0o077 == 0
    assert verdict(tmp_path).whole
    assert "audit.torn" in caplog.text


async def test_a_torn_line_that_is_found_on_a_full_disk_is_told_of_once_there_is_room(
    tmp_path: Path, disk: Disk
) -> None:
    async with opened(tmp_path) as log:
        log.record("control.start")
    path = tmp_path / "audit" / "audit.jsonl"
    path.write_bytes(path.read_bytes() + b"half")
    disk.full()
    unwritten: list[int] = []
    async with opened(tmp_path, unwritten=unwritten.append):
        await eventually(lambda: unwritten, within_s=2)
        assert events(tmp_path) == ["control.start"]
        disk.mend()
        await eventually(lambda: events(tmp_path) == ["control.start", "audit.torn"], within_s=2)
    assert (tmp_path / "audit" / records(tmp_path)[1]["file"]).read_bytes() == b"half"
    assert verdict(tmp_path).whole


async def test_a_first_line_that_was_torn_is_set_aside_too(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        await log.require("control.start")
    path = tmp_path / "audit" / "audit.jsonl"
    path.write_bytes(path.read_bytes()[:50])
    async with opened(tmp_path) as log:
        log.record("control.start")
    assert events(tmp_path) == ["audit.torn", "control.start"]
    assert verdict(tmp_path).whole


async def test_a_log_whose_end_is_not_what_was_written_is_not_gone_on_with(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        for number in range(3):
            await log.require("task.accepted", count=number)
        crashed = lines_of(tmp_path)
    path = tmp_path / "audit" / "audit.jsonl"
    for lines, words in (
        ([*crashed[:-1], crashed[-1].replace(b"accepted", b"accEpted")], f"{path}:{len(crashed)}: "),
        ([*crashed[:-2], crashed[-1]], "lines are missing"),
        ([*crashed, b"hello\n"], "no line of an audit log"),
        ([b"hello\n"], "no checkpoint"),
    ):
        path.write_bytes(b"".join(lines))
        with pytest.raises(ConfigError, match=r"broken|no checkpoint") as refused:
            await AuditLog(tmp_path).start()
        assert words in refused.value.message
        assert "llorch audit verify" in str(refused.value.hint)
        assert path.read_bytes() == b"".join(lines)  # untouched


async def test_the_end_is_found_however_long_ago_the_last_checkpoint_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as log:
        await log.require("control.start")
        for number in range(200):
            log.record("task.accepted", count=number)
        await log.require("link.up")
        lines = lines_of(tmp_path)
    for size in (1, 100, 3_000, 1 << 20):
        monkeypatch.setattr(audit_files, "TAIL_BYTES", size)
        (tmp_path / "audit" / "audit.jsonl").write_bytes(b"".join(lines))
        async with opened(tmp_path) as log:
            log.record("control.start")
        assert verdict(tmp_path).whole


# ---------------------------------------------------------------- a disk that is full


async def test_on_a_full_disk_what_must_be_on_record_is_refused_and_the_rest_waits(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    unwritten: list[int] = []
    with caplog.at_level(logging.INFO):
        async with opened(tmp_path, unwritten=unwritten.append) as log:
            await log.require("control.start")
            whole = lines_of(tmp_path)
            disk.full(room=100)  # so that a part of a line fits
            log.record("task.accepted", count=1)
            with pytest.raises(LlorchError) as refused:
                await log.require("node.registered", node_id="a", decision="allowed")
            assert (refused.value.code, refused.value.status) == (Code.INSUFFICIENT_STORAGE, 507)
            assert refused.value.hint
            assert "No space left" in refused.value.message
            log.record("task.accepted", count=2)
            await eventually(lambda: sum(unwritten) == 3, within_s=2)
            assert lines_of(tmp_path) == whole  # and no part of a line
            assert caplog.text.count("audit.unwritten") == 1
            disk.mend()
            await eventually(lambda: len(events(tmp_path)) == 4, within_s=2)
            await log.require("node.registered", node_id="a", decision="allowed")
    assert sum(unwritten) == 3
    assert [(r["event"], r.get("count"), r.get("decision")) for r in records(tmp_path)] == [
        ("control.start", None, None),
        ("task.accepted", 1, None),
        ("node.registered", None, "refused"),
        ("task.accepted", 2, None),
        ("node.registered", None, "allowed"),
    ]
    assert "not on record: No space left" in records(tmp_path)[2]["reason"]
    assert verdict(tmp_path).whole
    assert "audit.written_again" in caplog.text


async def test_what_no_longer_fits_into_memory_is_counted_and_the_chain_says_how_much_was_lost(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit, "MAX_WAITING_RECORDS", 5)
    unwritten: list[int] = []
    async with opened(tmp_path, unwritten=unwritten.append) as log:
        await log.require("control.start")
        disk.full()
        log.record("task.accepted", count=0)
        await eventually(lambda: sum(unwritten) == 1, within_s=2)
        for number in range(1, 20):
            log.record("task.accepted", count=number)
        await eventually(lambda: sum(unwritten) == 20, within_s=2)
        disk.mend()
        await eventually(lambda: "audit.gap" in events(tmp_path), within_s=2)
        for number in range(20, 23):
            log.record("task.accepted", count=number)
    kept = [record["count"] for record in records(tmp_path) if record["event"] == "task.accepted"]
    lost = [record["count"] for record in records(tmp_path) if record["event"] == "audit.gap"]
    assert kept[:5] == [0, 1, 2, 3, 4]
    assert kept[-3:] == [20, 21, 22]
    assert len(kept) + sum(lost) == 23
    assert verdict(tmp_path).lost == sum(lost) == 15


async def test_a_write_that_is_not_known_to_be_on_disk_is_taken_back(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path) as log:
        await log.require("control.start")
        disk.at_sync = errno.EIO
        with pytest.raises(LlorchError, match="Input/output error"):
            await log.require("node.registered", decision="allowed")
        disk.mend()
    assert [(r["event"], r.get("decision")) for r in records(tmp_path)][1:] == [("node.registered", "refused")]
    assert verdict(tmp_path).whole


async def test_a_disk_that_hangs_is_as_bad_as_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    monkeypatch.setattr(audit, "REQUIRE_WITHIN_S", 0.05)
    answers = threading.Event()
    async with opened(tmp_path) as log:
        await log.require("control.start")
        write = disk.write

        def hang(fd: int, data: Any) -> int:
            answers.wait(10)
            return write(fd, data)

        monkeypatch.setattr(audit_files.os, "write", hang)
        with pytest.raises(LlorchError, match="does not answer"):
            await log.require("node.registered", decision="allowed")
        answers.set()
    assert [r.get("decision") for r in records(tmp_path)] == [None, "allowed", "refused"]


async def test_the_alarm_is_raised_once_a_minute(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    clock = [now]
    alarm = audit._Alarm(lambda _count: None)
    monkeypatch.setattr(audit.time, "monotonic", lambda: clock[0])
    for passed in (0.0, 1.0, 59.0, 60.5, 61.0):
        clock[0] = now + passed
        alarm.unwritten(2, "full", waiting=1, lost=0)
    told = [record.message for record in caplog.records if "audit.unwritten" in record.message]
    assert [line.split()[1] for line in told] == ["count=2", "count=6"]
    assert all(record.levelno == logging.ERROR for record in caplog.records)


def _mount(folder: Path, size: str) -> bool:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0


async def test_a_file_system_that_is_really_full_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "RETRY_AFTER_S", 0.02)
    folder = tmp_path / "small"
    if sys.platform != "linux" or os.geteuid() != 0 or not _mount(folder, "256k"):
        pytest.skip("needs to be allowed to mount a tmpfs")
    try:
        ballast = folder / "ballast"
        async with opened(folder) as log:
            await log.require("control.start")
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            refused = 0
            for number in range(40):
                log.record("task.accepted", count=number)
                try:
                    await log.require("node.registered", node_id="n" * 200)
                except LlorchError as error:
                    assert error.code is Code.INSUFFICIENT_STORAGE
                    refused += 1
            assert refused > 10
            ballast.unlink()
            await log.require("node.registered", node_id="last", decision="allowed")
        assert [r["count"] for r in records(folder) if r["event"] == "task.accepted"] == list(range(40))
        assert sum(r.get("decision") == "refused" for r in records(folder)) == refused
        assert verdict(folder).whole
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---------------------------------------------------------------- rotation


async def rotated(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int = 60, **more: Any) -> None:
    monkeypatch.setattr(audit, "MAX_FILE_BYTES", 4_000)
    async with opened(folder, **more) as log:
        for number in range(count):
            await log.require("task.accepted", count=number)


async def test_the_chain_goes_on_across_files_and_none_of_them_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        await rotated(tmp_path, monkeypatch)
    files = chain_files(tmp_path / "audit")
    assert len(files) > 4
    assert [path.name for path in files][:2] == ["audit-00000001.jsonl", "audit-00000002.jsonl"]
    assert files[-1].name == "audit.jsonl"
    assert all(path.stat().st_size < 6_000 for path in files)
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert all(json.loads(next(read_lines(path)))["event"] == CHECKPOINT for path in files if path.stat().st_size)
    assert [record["count"] for record in records(tmp_path)] == [*range(60), *range(60)]
    assert verdict(tmp_path).whole
    files[1].unlink()
    assert not verdict(tmp_path).whole


async def test_with_a_limit_the_oldest_files_go_and_the_chain_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rotated(tmp_path, monkeypatch, count=100, keep_files=3)
    assert len(chain_files(tmp_path / "audit")) == 3
    removed = [record for record in records(tmp_path) if record["event"] == "audit.removed"]
    found = verdict(tmp_path)
    assert found.whole
    assert found.first_seq == removed[-1]["to_seq"] + 1 > 1
    chain_files(tmp_path / "audit")[0].unlink()
    assert "does not say that they were removed" in str(verdict(tmp_path).fault)


async def test_a_crash_between_two_files_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await rotated(tmp_path, monkeypatch, count=20)
    current = tmp_path / "audit" / "audit.jsonl"
    saved = lines_of(tmp_path)
    for empty in (False, True):
        rest = chain_files(tmp_path / "audit")
        if current in rest:
            current.rename(tmp_path / "audit" / f"audit-{len(rest):08d}.jsonl")
        if empty:
            current.touch()
        async with opened(tmp_path) as log:
            log.record("control.start")
        assert lines_of(tmp_path)[: len(saved)] == saved
        assert verdict(tmp_path).whole


@pytest.mark.parametrize("failing", ["audit.jsonl", ".audit.jsonl"], ids=["the old one", "the new one"])
async def test_a_file_that_can_not_be_rotated_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(audit_files.Path, "rename", fails)
        await rotated(tmp_path, monkeypatch, count=30)
    assert [path.name for path in chain_files(tmp_path / "audit")] == ["audit.jsonl"]
    assert "audit.not_rotated" in caplog.text
    await rotated(tmp_path, monkeypatch, count=30)
    assert len(chain_files(tmp_path / "audit")) > 1
    assert len(records(tmp_path)) == 60
    assert verdict(tmp_path).whole


# ---------------------------------------------------------------- permissions, keys, two at once


async def test_everything_is_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        async with opened(tmp_path / "data") as log:
            await log.require("control.start")
    finally:
        os.umask(old)
    for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("name", ["mac.key", "signing.key"])
async def test_keys_that_others_may_read_are_refused(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path):
        pass
    key = tmp_path / "audit" / name
    for mode in (0o640, 0o604, 0o620):
        key.chmod(mode)
        with pytest.raises(ConfigError, match="can be read or changed by others") as refused:
            await AuditLog(tmp_path).start()
        assert refused.value.hint == f"chmod 600 {key}"
    key.chmod(0o600)
    async with opened(tmp_path):
        pass


async def test_a_folder_that_others_may_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit").chmod(0o770)
    with pytest.raises(ConfigError, match="others may change"):
        await AuditLog(tmp_path).start()


@pytest.mark.parametrize("name", ["mac.key", "signing.key"])
async def test_a_log_is_not_gone_on_with_other_keys(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path) as log:
        log.record("control.start")
    key = tmp_path / "audit" / name
    whole = key.read_bytes()
    key.unlink()
    with pytest.raises(ConfigError, match="is missing, and there is an audit log"):
        await AuditLog(tmp_path).start()
    key.touch(mode=0o600)
    for damaged in (b"", b"\xff" * 64, whole[:-20], b"00" * 16):
        key.write_bytes(damaged)
        with pytest.raises(ConfigError, match="damaged"):
            await AuditLog(tmp_path).start()
    other = tmp_path / "other"
    async with opened(other):
        pass
    key.write_bytes((other / "audit" / name).read_bytes())
    with pytest.raises(ConfigError, match="broken"):
        await AuditLog(tmp_path).start()
    key.write_bytes(whole)
    async with opened(tmp_path):
        pass
    assert verdict(tmp_path).whole


def test_keys_are_not_made_where_another_controls_could_be_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without links there is no way to make a file only where there is none: two controls would keep different keys."""

    def none(*_: object) -> None:
        raise OSError(errno.EPERM, "none here")

    monkeypatch.setattr(Path, "hardlink_to", none)
    with pytest.raises(ConfigError, match="can't be made: none here"):
        Keys.read_or_make(tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_keys_that_another_control_makes_in_the_same_moment_are_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists, others = Path.exists, list[AuditLog]()

    async def another() -> None:
        others.append(AuditLog(tmp_path))
        await others[0].start()
        await others[0].close()

    def looked_for(path: Path) -> bool:
        there = exists(path)
        if path.name == "mac.key" and not others:
            asyncio.run(another())
        return there

    monkeypatch.setattr(Path, "exists", looked_for)
    log = AuditLog(tmp_path)
    await log.start()
    await log.close()
    assert len(others) == 1


async def test_two_controls_on_one_data_directory_have_a_chain_each_and_the_same_keys(tmp_path: Path) -> None:
    made = [AuditLog(tmp_path) for _ in range(3)]
    await asyncio.gather(*(log.start() for log in made))
    for number, log in enumerate(made):
        await log.require("control.start", count=number)
    await asyncio.gather(*(log.close() for log in made))
    async with opened(tmp_path) as again:
        again.record("control.start", count=9)
    keys = Keys.read(tmp_path / "audit")
    found = chains(tmp_path / "audit")
    assert len(found) == 3
    ids, counts = set(), []
    for files in found:
        lines = [line for path in files for line in read_lines(path)]
        assert verify(lines, keys.public, keys.mac).whole
        ids.add(json.loads(lines[0])["chain"])
        counts.append([json.loads(line)["count"] for line in lines if b'"count"' in line])
    assert len(ids) == 3
    assert sorted(map(len, counts)) == [1, 1, 2]


async def test_a_process_of_another_is_kept_off_by_the_lock(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        await log.require("control.start")
        code = (
            "import asyncio, sys\nfrom llorch.audit import AuditLog\n"
            "async def main():\n"
            "    log = AuditLog(sys.argv[1])\n    await log.start()\n"
            "    await log.require('control.start')\n"
            "    await log.close()\n"
            "asyncio.run(main())\n"
        )
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path))
        assert await asyncio.wait_for(other.wait(), 20) == 0
        await log.require("link.up")
    assert len(chains(tmp_path / "audit")) == 2
    assert verdict(tmp_path).whole
