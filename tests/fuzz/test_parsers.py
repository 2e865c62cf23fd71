"""A slice of the long run, and that a fault would be found by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import corpus, run, watch
from tests.fuzz.engine import explore
from tests.fuzz.parsers import targets
from tests.fuzz.watch import Shape, Target

SLICE = 60  # executions of each target, beside the seeds and what is kept
TARGETS = {target.name: target for target in targets()}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


@pytest.mark.parametrize("name", TARGETS)
def test_every_kept_input_and_a_few_new_ones_break_no_parser(name: str) -> None:
    result = explore(TARGETS[name], SLICE, seed=1)
    assert [f"{crash.kind} at {crash.where}: {crash.data[:200]!r}" for crash in result.crashes.values()] == []


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_one_that_its_parser_takes(name: str) -> None:
    """Mutations of what is refused at once would reach nothing."""
    target = TARGETS[name]
    for data in target.seeds[:1]:
        target.run(data)


def test_what_is_kept_belongs_to_a_target_and_is_small() -> None:
    for path in corpus.FOLDER.glob("*.txt"):
        assert path.stem in TARGETS
        assert all(len(data) <= corpus.LARGEST_KEPT_BYTES for data in corpus.kept(path.stem))
        assert path.stat().st_size <= 2 * corpus.MOST_KEPT_BYTES


# ---------------------------------------------------------------- faults that are planted here are found


def _raises(data: bytes) -> None:
    if b"\xff" in data:
        raise KeyError("planted")
    if len(data) % 2:
        raise ValueError("odd, and said to be refused")


def _believes(data: bytes) -> None:
    assert b"NaN" not in data, "planted"


def _never_ends(data: bytes) -> None:
    while data[:1] == b"[":
        pass


def _takes_long(data: bytes) -> None:
    if len(data) > 1_000:
        until = time.thread_time() + 0.06
        while time.thread_time() < until:
            pass


def _takes_much(data: bytes) -> None:
    assert len(b"x" * (80_000_000 if len(data) > 500 else 1)) > 0


class _Closing:
    def __del__(self) -> None:
        raise OSError("planted")


def _is_unraisable(data: bytes) -> None:
    if b"]" in data:
        _Closing()


@pytest.mark.parametrize(
    ("planted", "kind"),
    [
        (_raises, "KeyError"),
        (_believes, "oracle"),
        (_never_ends, "slow"),
        (_takes_long, "slow"),
        (_takes_much, "large"),
        (_is_unraisable, "unraisable"),
    ],
)
def test_a_planted_fault_is_found(planted: Callable[[bytes], None], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "slow":  # to fill much memory may take as long on a busy machine, and is another fault
        for name, seconds in (("SLOW_S", 0.05), ("HANG_S", 0.1)):
            monkeypatch.setattr(watch, name, seconds)
    target = Target("planted", planted, (b'{"a": 1}',), (ValueError,), Shape.JSON)
    result = explore(target, 5_000, seed=1, most_crashes=1)
    assert [crash.kind for crash in result.crashes.values()] == [kind]


def test_a_crash_is_made_small() -> None:
    target = Target("planted", _raises, (b"x" * 500 + b"\xff" + b"y" * 500,), (ValueError,), Shape.BINARY)
    result = explore(target, 10, seed=1, most_crashes=1)
    assert [crash.data for crash in result.crashes.values()] == [b"\xff"]


def test_the_same_seed_gives_the_same_inputs() -> None:
    seen: list[list[bytes]] = []
    for _ in range(2):
        inputs: list[bytes] = []
        explore(Target("planted", inputs.append, (b'{"a": [1, "b"]}',)), 300, seed=7)
        seen.append(inputs)
    assert seen[0] == seen[1]


def test_the_long_run_prints_its_crashes_keeps_their_inputs_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "targets", lambda: (Target("planted", _raises, (b"\xff",), (ValueError,)),))
    argv = ["--executions", "20", "--plain", "--folder", str(tmp_path)]
    assert run.main(argv) == 1
    assert "KeyError at test_parsers.py" in capsys.readouterr().out
    assert (tmp_path / "planted-0").read_bytes() == b"\xff"
    assert run.main(["--target", "planted", "--replay", str(tmp_path / "planted-0")]) == 1
    monkeypatch.setattr(run, "targets", lambda: (Target("planted", lambda _: None, (b"x",)),))
    assert run.main(argv) == 0
