"""Which processes belong to an engine, over a folder that reads like /proc, and over the real one."""

from __future__ import annotations

import os
from pathlib import Path

from llorch.node.process_tree import descendants


def proc(root: Path, *processes: tuple[int, int, int]) -> Path:
    """(pid, parent, session) of each."""
    for pid, parent, session in processes:
        (root / str(pid)).mkdir()
        (root / str(pid) / "stat").write_text(f"{pid} (an (odd) name) S {parent} {pid} {session} 0 -1 4194304 1\n")
    return root


def test_children_and_theirs_belong_to_it(tmp_path: Path) -> None:
    root = proc(tmp_path, (1, 0, 1), (10, 1, 10), (11, 10, 10), (12, 11, 10), (20, 1, 20), (21, 20, 20))
    assert descendants([10], proc=root) == {10, 11, 12}
    assert descendants([10, 20], proc=root) == {10, 11, 12, 20, 21}
    assert descendants([], proc=root) == set()


def test_a_child_whose_parent_has_ended_is_found_by_its_session(tmp_path: Path) -> None:
    root = proc(tmp_path, (1, 0, 1), (10, 1, 10), (12, 1, 10), (13, 12, 10), (14, 1, 1))
    assert descendants([10], proc=root) == {10, 12, 13}


def test_what_has_ended_is_not_there(tmp_path: Path) -> None:
    root = proc(tmp_path, (1, 0, 1), (10, 1, 10))
    (root / "11").mkdir()  # it ends while it is looked at
    (root / "12").mkdir()
    (root / "12" / "stat").write_text("12 (cut")
    assert descendants([10, 11, 12, 99], proc=root) == {10}
    assert descendants([10], proc=tmp_path / "nowhere") == set()


def test_this_process_is_found_in_the_real_one() -> None:
    assert os.getpid() in descendants([os.getppid()])
