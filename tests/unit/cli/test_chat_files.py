"""The files of a chat: a history that never stands in the way, and saved files that are whole or not there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from llorch.cli import chat_files
from llorch.cli.chat_files import History, history_path, save
from llorch.cli.output import Failure


class Warnings(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def warnings() -> Warnings:
    return Warnings()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- history


def test_the_history_is_under_the_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert history_path({"XDG_STATE_HOME": "/s"}) == Path("/s/llorch/chat_history")
    for env in ({}, {"XDG_STATE_HOME": "relative"}):
        assert history_path(env) == Path("/home/x/.local/state/llorch/chat_history")

    def homeless(*_: object) -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    assert history_path({}) is None


def test_what_was_typed_is_there_again_whole_and_in_order_and_private(tmp_path: Path, warnings: Warnings) -> None:
    path = tmp_path / "state" / "llorch" / "chat_history"
    typed = ["Hello", "two\nlines", 'quotes " and \\', "ünï 🙂\u2028", "bad \udce9", "/save x"]
    first = History(path, warnings)
    assert first.load() == []
    for text in typed:
        first.append(text)
    assert History(path, warnings).load() == typed
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert warnings == []


def test_a_file_and_a_folder_that_others_may_read_are_made_private(tmp_path: Path, warnings: Warnings) -> None:
    path = tmp_path / "chat_history"
    path.write_text('"old"\n')
    path.chmod(0o644)
    assert History(path, warnings).load() == ["old"]
    assert mode(path) == 0o600
    tmp_path.chmod(0o755)
    History(path, warnings).append("new")
    assert mode(tmp_path) == 0o700
    assert warnings == []


def test_a_file_of_another_user_is_left_alone(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat_history"
    path.write_text('"theirs"\n')
    monkeypatch.setattr(chat_files.os, "geteuid", lambda: path.stat().st_uid + 1)
    assert History(path, warnings).load() == []
    assert warnings == [f"the history in {path} can't be read: it is another user's"]


def test_torn_and_foreign_lines_are_skipped(tmp_path: Path, warnings: Warnings) -> None:
    path = tmp_path / "chat_history"
    path.write_bytes(b'"a"\nnonsense\n\xff\xfe\n["a list"]\n17\n"b"\n"to')
    assert History(path, warnings).load() == ["a", "b"]
    assert warnings == []


def test_what_is_added_after_a_torn_line_is_not_lost_with_it(tmp_path: Path, warnings: Warnings) -> None:
    path = tmp_path / "chat_history"
    path.write_bytes(b'"a"\n"to')
    history = History(path, warnings)
    history.append("b")
    history.append("c")
    assert path.read_bytes() == b'"a"\n"to\n"b"\n"c"\n'
    assert History(path, warnings).load() == ["a", "b", "c"]


def test_the_file_is_bounded_while_a_chat_runs(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_files, "HISTORY_BYTES", 1000)
    path = tmp_path / "chat_history"
    history = History(path, warnings)
    for number in range(100):
        history.append(f"{number:02}" + "x" * 95)
        assert path.stat().st_size <= 2000
    assert History(path, warnings).load()[-1].startswith("99")
    assert warnings == []


def test_the_history_is_bounded_and_keeps_the_newest(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_files, "HISTORY_ENTRIES", 10)
    path = tmp_path / "chat_history"
    history = History(path, warnings)
    for number in range(21):
        history.append(f"t{number}")
    assert History(path, warnings).load() == [f"t{number}" for number in range(11, 21)]
    assert len(path.read_text().splitlines()) == 10, "more than twice as many: the file is cut"
    assert mode(path) == 0o600
    assert content(tmp_path) == ["chat_history"]


def test_long_texts_are_bounded_in_bytes(tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_files, "HISTORY_BYTES", 1000)
    path = tmp_path / "chat_history"
    history = History(path, warnings)
    for number in range(20):
        history.append(f"{number:02}" + "x" * 95)
    kept = History(path, warnings).load()
    assert [text[:2] for text in kept] == ["15", "16", "17", "18", "19"], "half of the bound, so that it lasts"
    assert path.stat().st_size == 500
    history.append("y" * chat_files.ENTRY_BYTES)
    assert History(path, warnings).load() == kept, "what is too long for the file is left out of it"
    assert warnings == []


@pytest.mark.parametrize("what", ["directory", "pipe", "folder is a file", "device"])
def test_a_history_that_can_not_be_kept_is_told_once(tmp_path: Path, warnings: Warnings, what: str) -> None:
    path = tmp_path / "llorch" / "chat_history"
    path.parent.mkdir()
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)  # to open one for reading would wait for ever
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.parent.rmdir()
        path.parent.write_text("")
    history = History(path, warnings)
    assert history.load() == []
    history.append("a")
    history.append("b")
    (warning,) = warnings
    assert warning.startswith(f"the history in {path} can't be ")


def test_without_a_home_there_is_no_history_and_no_word(warnings: Warnings) -> None:
    history = History(None, warnings)
    history.append("a")
    assert (history.load(), warnings) == ([], [])


def test_a_full_disk_is_told_once(tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    history = History(tmp_path / "chat_history", warnings)
    monkeypatch.setattr(chat_files.os, "write", full)
    history.append("a")
    history.append("b")
    assert warnings == [f"the history in {tmp_path}/chat_history can't be written: No space left on device"]


# ---------------------------------------------------------------- saving


def test_a_file_is_saved_and_never_overwritten_unless_that_was_said(tmp_path: Path) -> None:
    file = tmp_path / "a talk.md"
    assert save(str(file), "one ü", force=False) == file
    with pytest.raises(Failure) as refused:
        save(str(file), "two", force=False)
    assert (refused.value.message, refused.value.hint) == (f"{file} exists", f"/save! {file} replaces it")
    assert file.read_text() == "one ü"
    file.chmod(0o640)
    save(str(file), "three", force=True)
    assert (file.read_text(), mode(file)) == ("three", 0o640)
    assert content(tmp_path) == ["a talk.md"]


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(str(tmp_path / "a"), "", force=False)
        save(str(tmp_path / "b"), "", force=True)
    finally:
        os.umask(before)
    assert (mode(tmp_path / "a"), mode(tmp_path / "b")) == (0o640, 0o640)


def test_a_tilde_is_the_home_and_a_link_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save("~/real", "one", force=False)
    (tmp_path / "link").symlink_to("real")
    save("~/link", "two", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "two"


def test_where_a_file_system_knows_no_links_it_is_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EPERM, "none here")

    monkeypatch.setattr(Path, "hardlink_to", none)
    save(str(tmp_path / "a"), "one", force=False)
    with pytest.raises(Failure, match="exists"):
        save(str(tmp_path / "a"), "two", force=False)
    assert ((tmp_path / "a").read_text(), content(tmp_path)) == ("one", ["a"])


def test_a_file_that_appears_in_between_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    fsync = os.fsync

    def meanwhile(fd: int) -> None:
        fsync(fd)
        file.write_text("theirs")

    monkeypatch.setattr(chat_files.os, "fsync", meanwhile)
    with pytest.raises(Failure, match="exists"):
        save(str(file), "ours", force=False)
    assert (file.read_text(), content(tmp_path)) == ("theirs", ["a"])


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_text("before")

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chat_files.os, "fsync", full)
    with pytest.raises(Failure, match="can't be written: No space left on device"):
        save(str(file), "after", force=True)
    assert (file.read_text(), content(tmp_path)) == ("before", ["a"])


@pytest.mark.parametrize("force", [True, False])
def test_what_is_no_file_and_a_folder_that_is_not_there_are_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    for name, said in (
        (str(tmp_path), "is not a file"),
        (str(tmp_path / "null"), "is not a file"),
        (str(tmp_path / "none" / "a"), "can't be written: No such file or directory"),
        ("~nobody-of-that-name/a", "can't be written"),
        ("a\0b", "can't be written"),
        (str(tmp_path / ("x" * 300)), "can't be written: File name too long"),
    ):
        with pytest.raises(Failure, match=said):
            save(name, "text", force=force)
    assert content(tmp_path) == ["null"]
