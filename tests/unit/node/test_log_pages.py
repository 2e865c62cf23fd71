"""The logs of engines from afar: nothing twice, nothing lost, and no cursor that hurts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.node import log_pages
from llorch.node.engines.shim_files import RotatedLog
from llorch.wishes import PoolLogs


def write(folder: Path, replica: str, text: str, mode: str = "a") -> Path:
    path = folder / f"p-{replica}.log"
    with path.open(mode) as file:
        file.write(text)
    return path


def read(folder: Path, *replicas: str, lines: int = 100, after: str | None = None) -> tuple[list[tuple[str, str]], str]:
    page = log_pages.read(folder, "p", replicas or ("r0",), lines, after)
    PoolLogs.model_validate(page)  # what a control takes
    return [(line["replica"], line["text"]) for line in page["lines"]], page["cursor"]


def texts(found: list[tuple[str, str]]) -> list[str]:
    return [text for _, text in found]


def test_a_follower_sees_each_line_once_and_none_that_is_not_whole(tmp_path: Path) -> None:
    write(tmp_path, "r0", "one\ntwo\n")
    found, cursor = read(tmp_path, lines=1)
    assert texts(found) == ["two"]
    assert read(tmp_path, after=cursor) == ([], cursor)
    write(tmp_path, "r0", "three\nfo")
    found, cursor = read(tmp_path, after=cursor)
    assert texts(found) == ["three"]
    write(tmp_path, "r0", "ur\n")
    assert texts(read(tmp_path, after=cursor)[0]) == ["four"]


def test_a_log_that_is_not_there_yet_is_followed_from_its_first_line(tmp_path: Path) -> None:
    found, cursor = read(tmp_path)
    assert found == []
    write(tmp_path, "r0", "first\n")
    assert texts(read(tmp_path, after=cursor)[0]) == ["first"]


def test_a_follower_loses_nothing_over_a_rotation(tmp_path: Path) -> None:
    log = RotatedLog(str(tmp_path / "p-r0.log"), limit=40)
    log.write(b"line 0\n")
    found, cursor = read(tmp_path)
    for number in range(1, 12):
        log.write(f"line {number}\n".encode())
    log.close()
    more, cursor = read(tmp_path, after=cursor)
    assert texts(found + more) == [f"line {number}" for number in range(12)]
    assert read(tmp_path, after=cursor)[0] == []


def test_of_a_file_that_was_rotated_away_all_that_is_left_is_shown(tmp_path: Path) -> None:
    log = RotatedLog(str(tmp_path / "p-r0.log"), limit=20)
    log.write(b"line 000\n")
    _, cursor = read(tmp_path)
    with (tmp_path / "p-r0.log").open("rb"):  # so its number is nobody else's meanwhile
        for number in range(1, 9):
            log.write(f"line {number:03}\n".encode())
        log.close()
        assert texts(read(tmp_path, after=cursor)[0]) == [f"line {number:03}" for number in range(4, 9)]


def test_a_new_log_under_the_number_of_an_old_one_is_read_from_its_beginning(tmp_path: Path) -> None:
    """File systems give a freed number out again at once."""
    path = write(tmp_path, "r0", "an old and rather long line\n")
    _, cursor = read(tmp_path)
    os.truncate(path, 0)
    write(tmp_path, "r0", "new\n")
    assert texts(read(tmp_path, after=cursor)[0]) == ["new"]


def test_no_more_lines_than_asked_for_and_each_replica_has_its_share(tmp_path: Path) -> None:
    names = ("r0", "r1", "r2", "r3")
    for name in names:
        write(tmp_path, name, "".join(f"{name} {number}\n" for number in range(100)))
    found, cursor = read(tmp_path, *names, lines=10)
    assert [replica for replica, _ in found] == [name for name in names for _ in range(2)]
    assert ("r0", "r0 99") in found
    assert len(read(tmp_path, *names, lines=2)[0]) == 2
    for name in names:
        write(tmp_path, name, "".join(f"{name} more {number}\n" for number in range(9)))
    got: list[tuple[str, str]] = []
    while page := read(tmp_path, *names, lines=10, after=cursor)[0]:
        assert len(page) <= 10
        got += page
        cursor = read(tmp_path, *names, lines=10, after=cursor)[1]
    assert sorted(got) == sorted((name, f"{name} more {number}") for name in names for number in range(9))


def test_the_cursor_of_the_largest_pool_is_one_that_a_control_takes(tmp_path: Path) -> None:
    names = tuple(f"r{number}" for number in range(64))
    for name in names:
        write(tmp_path, name, f"{name}\n")
    _, cursor = read(tmp_path, *names)
    write(tmp_path, "r63", "more\n")
    assert read(tmp_path, *names, after=cursor)[0] == [("r63", "more")]


def test_no_control_character_and_no_endless_line_is_shown(tmp_path: Path) -> None:
    write(tmp_path, "r0", "ok\n")
    _, cursor = read(tmp_path)
    with (tmp_path / "p-r0.log").open("ab") as file:
        file.write(b"\x1b[2Jred \xff\r\n" + b"x" * 300_000 + b"\nend\n")
    got: list[tuple[str, str]] = []
    for _ in range(6):
        page, cursor = read(tmp_path, after=cursor)
        got += page
    assert all(len(text) <= 300 and text.isprintable() for _, text in got)
    assert got[0] == ("r0", "[2Jred \ufffd") and got[-1] == ("r0", "end")


HUGE = "9" * 30


@pytest.mark.parametrize(
    "after",
    ["", ",", "r0", "r0=", "r0=1", "r0=1:", "r0=-1:5", "r0=1:2:3", f"r0={{}}:{HUGE}", "r0={}:" + "9" * 19, "=1:1",
     "r0=\u0663:\u0663", "../../etc/passwd=1:1", "r0={}:1\0", "x" * 100_000],
)  # fmt: skip
def test_a_cursor_that_is_not_ours_costs_nobody_anything(tmp_path: Path, after: str) -> None:
    path = write(tmp_path, "r0", "a line\n")
    found, cursor = read(tmp_path, after=after.replace("{}", str(path.stat().st_ino)))
    assert texts(found) in (["a line"], [])
    assert cursor == f"r0={path.stat().st_ino}:7"


@settings(max_examples=50, deadline=None)
@given(after=st.text(max_size=200) | st.from_regex(r"\A(r0=\d{1,25}:\d{1,25},?){1,3}\Z"), lines=st.integers(1, 5))
def test_any_cursor_is_read_or_passed_over(tmp_path_factory: pytest.TempPathFactory, after: str, lines: int) -> None:
    folder = tmp_path_factory.mktemp("logs")
    write(folder, "r0", "one\ntwo\n")
    found, _ = read(folder, lines=lines, after=after)
    assert len(found) <= lines


def test_a_folder_or_a_link_in_the_place_of_a_log_is_none(tmp_path: Path) -> None:
    (tmp_path / "p-r0.log").mkdir()
    assert read(tmp_path)[0] == [] and read(tmp_path, after="r0=1:1")[0] == []
