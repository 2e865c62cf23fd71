"""An engine's log within its bounds, on a disk that takes everything and on one that does not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llorch.node.engine_log import tail
from llorch.node.engines import shim_files
from llorch.node.engines.shim_files import LOG_FILES, TAIL_BYTES, Locked, RotatedLog, generations, read, replace


def test_a_log_never_has_more_than_its_files_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    log = RotatedLog(str(path), limit=100)
    for number in range(60):
        log.write(b"%03d %s\n" % (number, b"x" * 20))
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= LOG_FILES * 100
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.log", "a.log.1", "a.log.2"]
    words = "".join(Path(name).read_text() for name in reversed(generations(str(path))))
    numbers = [int(line[:3]) for line in words.splitlines()]
    assert numbers == list(range(numbers[0], 60)) and len(numbers) == 4 * LOG_FILES
    assert [line[:3] for line in tail(path, 7)] == [f"{number:03d}" for number in range(53, 60)]


def test_a_log_goes_on_where_the_one_before_ended(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    for word in (b"first\n", b"second\n"):
        log = RotatedLog(str(path), limit=100)
        log.open()
        log.write(word)
        log.close()
    assert path.read_text() == "first\nsecond\n"
    assert (path.stat().st_mode & 0o777, log.last_lines(5, 80)) == (0o600, ["second"])


def test_what_a_full_disk_does_not_take_is_dropped_counted_and_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 10
    written = os.write

    def full(descriptor: int, words: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = written(descriptor, words[:room])
        room -= count
        return count

    path = tmp_path / "a.log"
    log = RotatedLog(str(path), limit=1000)
    log.open()
    monkeypatch.setattr(os, "write", full)
    log.write(b"0123456789abcdef\n")
    log.write(b"lost\n")
    assert (log.lost_bytes, path.read_text()) == (7 + 5, "0123456789")
    assert log.last_lines(5, 80) == ["0123456789abcdef", "lost"]
    room = 1000
    log.write(b"kept\n")
    assert path.read_text() == "0123456789\n-- llorch: 12 bytes of this log could not be written\nkept\n"
    assert log.lost_bytes == 12


def test_a_log_that_can_not_be_opened_is_told_unless_it_is_for_want_of_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotADirectoryError):
        (tmp_path / "file").touch()
        RotatedLog(str(tmp_path / "file" / "a.log")).open()
    monkeypatch.setattr(RotatedLog, "_open", lambda _self: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    log = RotatedLog(str(tmp_path / "a.log"))
    log.open()
    log.write(b"words\n")
    assert (log.lost_bytes, log.last_lines(1, 80)) == (6, ["words"])


def test_the_tail_in_memory_is_bounded_and_shows_no_control_characters(tmp_path: Path) -> None:
    log = RotatedLog(str(tmp_path / "a.log"))
    for _ in range(5):
        log.write(b"x" * TAIL_BYTES)
    log.write(b"\n\x1b[2Jred\xff\x07 \xc3\xa9\tend\n")
    assert len(log.tail) == TAIL_BYTES
    assert log.last_lines(1, 80) == ["[2Jred\ufffd \xe9\tend"]
    assert [len(line) for line in log.last_lines(5, 300)] == [300, len("[2Jred? e\tend")]


def test_notes_stand_on_lines_of_their_own_and_are_no_words_of_the_engine(tmp_path: Path) -> None:
    log = RotatedLog(str(tmp_path / "a.log"))
    log.write(b"no line end")
    log.note("engine ended")
    first, second = (tmp_path / "a.log").read_text().splitlines()
    assert first == "no line end" and second.startswith("-- 2") and second.endswith(" llorch: engine ended")
    assert log.last_lines(5, 80) == ["no line end"]


def test_a_record_is_written_whole_for_this_user_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace(str(path), {"a": 1})
    assert (read(str(path)), path.stat().st_mode & 0o777) == ({"a": 1}, 0o600)
    with pytest.raises(TypeError):
        replace(str(path), {"a": object()})
    with pytest.raises(OSError):
        replace(str(tmp_path / "none" / "a.json"), {})
    assert read(str(path)) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_record_that_is_none_reads_as_empty(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    assert read(str(tmp_path / "a.json")) == {} == read(str(tmp_path / "none"))


def test_a_lock_that_another_keeps_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim_files, "LOCK_WITHIN_S", 0.0)
    with Locked(str(tmp_path)), pytest.raises(BlockingIOError), Locked(str(tmp_path)):
        raise AssertionError("both have it")
    with Locked(str(tmp_path)):
        pass
