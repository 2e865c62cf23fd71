"""Measured peaks: what is learned, kept, written and read again, and that a strange file does no harm."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from llorch.node.peaks import MAX_BYTES, MAX_ENTRIES, MAX_FILE_BYTES, SAVE_EVERY_S, PeakKey, Peaks

KEY = PeakKey("sha256:ab", "llama-server", "b6000", 4096, 4, ("GPU-1",), ("-fa", "on"))
GIB = 1 << 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "peaks.json"


def test_the_most_that_was_measured_counts(path: Path) -> None:
    peaks = Peaks(path)
    assert peaks.peak(KEY) is None
    for size in (5 * GIB, 7 * GIB, 6 * GIB, 0, -1, MAX_BYTES + 1):
        peaks.learn(KEY, size)
    assert peaks.peak(KEY) == 7 * GIB


@pytest.mark.parametrize(
    "other",
    [
        {"model": "sha256:cd"}, {"engine": "vllm"}, {"engine_version": None}, {"ctx": 8192}, {"slots": 5},
        {"gpus": ("GPU-2",)}, {"gpus": ("GPU-1", "GPU-2")}, {"args": ()},
    ],
)  # fmt: skip
def test_a_peak_is_of_one_model_on_one_engine_with_its_settings(path: Path, other: dict[str, object]) -> None:
    peaks = Peaks(path)
    peaks.learn(KEY, GIB)
    assert peaks.peak(replace(KEY, **other)) is None  # type: ignore[arg-type]


def test_what_was_learned_is_there_after_a_restart(path: Path) -> None:
    peaks = Peaks(path)
    peaks.learn(KEY, GIB)
    assert peaks.save(0.0)
    assert Peaks(path).peak(KEY) == GIB
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"-fa" not in path.read_bytes() and b"sha256:ab" not in path.read_bytes()


def test_the_file_is_written_when_something_has_changed_and_not_often(path: Path) -> None:
    peaks = Peaks(path)
    assert not peaks.save(0.0)
    peaks.learn(KEY, GIB)
    assert peaks.save(0.0)
    peaks.learn(KEY, GIB - 1)
    assert not peaks.save(SAVE_EVERY_S)
    peaks.learn(KEY, GIB + 1)
    assert not peaks.save(SAVE_EVERY_S - 1)
    assert peaks.save(SAVE_EVERY_S - 1, at_once=True)
    assert not path.with_name("x").exists() and len(list(path.parent.iterdir())) == 1


def test_a_disk_that_takes_nothing_is_tried_again(path: Path) -> None:
    peaks = Peaks(path / "no" / "such" / "folder")
    peaks.learn(KEY, GIB)
    assert not peaks.save(0.0)
    peaks._path = path
    assert peaks.save(SAVE_EVERY_S)
    assert Peaks(path).peak(KEY) == GIB


def test_the_oldest_go_when_there_are_many(path: Path) -> None:
    peaks = Peaks(path)
    keys = [replace(KEY, ctx=number) for number in range(MAX_ENTRIES + 10)]
    for key in keys:
        peaks.learn(keys[0], 1)  # it still runs
        peaks.learn(key, GIB)
    assert peaks.peak(keys[0]) == GIB
    assert peaks.peak(keys[5]) is None
    assert peaks.peak(keys[-1]) == GIB
    peaks.save(0.0)
    assert path.stat().st_size < MAX_FILE_BYTES
    assert Peaks(path).peak(keys[-1]) == GIB


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"1", b"\xff\xfe", b"[" * 100_000, b'{"version": 1}', b'{"version": 2, "peaks": {}}',
        b'{"version": 1, "peaks": []}', b'{"version": 1, "peaks": {"x": 1}}', b'{"version": 1, "peaks": 7}',
        json.dumps({"version": 1, "peaks": {"a" * 32: -1}}).encode(), b" " * (MAX_FILE_BYTES + 1),
        json.dumps({"version": 1, "peaks": {"a" * 32: True}}).encode(),
        json.dumps({"version": 1, "peaks": {"a" * 32: 1e9}}).encode(),
        json.dumps({"version": 1, "peaks": {"a" * 32: MAX_BYTES + 1}}).encode(),
        json.dumps({"version": 1, "peaks": {f"{number:032}": 1 for number in range(MAX_ENTRIES + 1)}}).encode(),
    ],
)  # fmt: skip
def test_a_strange_file_is_an_empty_one_and_is_written_anew(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    peaks = Peaks(path)
    assert peaks._sizes == {}
    peaks.learn(KEY, GIB)
    assert peaks.save(0.0)
    assert Peaks(path).peak(KEY) == GIB


def test_a_file_cut_at_any_byte_is_an_empty_one(path: Path) -> None:
    peaks = Peaks(path)
    peaks.learn(KEY, GIB)
    peaks.save(0.0)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert Peaks(path).peak(KEY) is None


def test_what_is_no_file_is_never_waited_for(path: Path) -> None:
    os.mkfifo(path)
    assert Peaks(path).peak(KEY) is None
