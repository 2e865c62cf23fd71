"""A file is there whole or not at all, whatever goes wrong while it is written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NoReturn

import pytest

from llorch import whole_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_a_file_has_the_mode_that_was_asked_for_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        whole_file.replace(tmp_path / "secret", b"x")
        whole_file.replace(tmp_path / "open", b"x", mode=0o644)
    finally:
        os.umask(before)
    assert (mode_of(tmp_path / "secret"), mode_of(tmp_path / "open")) == (0o600, 0o644)


def test_without_a_mode_it_is_what_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        whole_file.replace(tmp_path / "file", b"x", mode=None)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "file") == 0o640


@pytest.mark.parametrize("name", ["file", "n" * 255, "長" * 85])
def test_what_was_there_is_replaced_and_nothing_else_stays(tmp_path: Path, name: str) -> None:
    for data in (b"old and longer", b"new"):
        whole_file.replace(tmp_path / name, data)
    assert (tmp_path / name).read_bytes() == b"new"
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
@pytest.mark.parametrize("only_new", [True, False])
def test_a_disk_that_is_full_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, only_new: bool
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "full")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="full"):
        whole_file.replace(tmp_path / "file", b"new", only_new=only_new)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_only_a_new_one_is_made_where_that_is_asked_for(tmp_path: Path) -> None:
    whole_file.replace(tmp_path / "file", b"first", only_new=True)
    with pytest.raises(FileExistsError):
        whole_file.replace(tmp_path / "file", b"second", only_new=True)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


def test_what_no_restart_survives_is_not_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", forced.append)
    whole_file.replace(tmp_path / "file", b"x", durable=False)
    assert forced == []
    whole_file.replace(tmp_path / "file", b"x")
    whole_file.sync_directory(tmp_path)
    assert len(forced) == 2
