"""A file that is only partly here: what of it is believed, and by whom it may be gone on with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llorch.node import staging_partial
from llorch.node.catalog_file import PartialState, load_partial
from llorch.node.staging_partial import Partial

DATA = bytes(range(256)) * 100
STATE = PartialState(source="a" * 64, validator='"1"', size_bytes=len(DATA))


def begun(folder: Path, count: int = 10_000) -> Partial:
    partial = Partial(folder, "m.gguf")
    partial.begin(STATE)
    partial.write(DATA[:count])
    return partial


def resumed(folder: Path) -> Partial:
    partial = Partial(folder, "m.gguf")
    partial.resume(lambda _length: None, lambda: False)
    return partial


def test_what_was_written_is_gone_on_with_and_hashed_again(tmp_path: Path) -> None:
    begun(tmp_path).close()
    partial = resumed(tmp_path)
    assert partial.length == 10_000 and partial.state is not None and partial.state.validator == '"1"'
    partial.write(DATA[10_000:])
    assert partial.digest == hashlib.sha256(DATA).hexdigest()
    partial.finish()
    assert (tmp_path / "m.gguf").read_bytes() == DATA and [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_after_the_machine_has_started_anew_only_what_was_synced_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_partial, "SYNC_EVERY_BYTES", 4_000)
    partial = begun(tmp_path, 5_000)
    monkeypatch.setattr(staging_partial, "SYNC_EVERY_BYTES", 1 << 20)
    partial.write(DATA[5_000:9_000])
    partial.close()
    assert Partial(tmp_path, "m.gguf").look() == 9_000
    (tmp_path / "boot").write_text("another run of this machine\n")
    monkeypatch.setattr(staging_partial, "_BOOT_ID", tmp_path / "boot")
    assert Partial(tmp_path, "m.gguf").look() == 5_000
    partial = resumed(tmp_path)
    assert partial.length == 5_000
    partial.write(DATA[5_000:8_000])
    partial.close()
    assert Partial(tmp_path, "m.gguf").look() == 8_000  # which is of this run


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b'{"size_bytes": 5}', None])
def test_bytes_of_which_nothing_is_known_are_not_gone_on_with(tmp_path: Path, state: bytes | None) -> None:
    begun(tmp_path).close()
    path = tmp_path / "m.gguf.partial.json"
    path.unlink() if state is None else path.write_bytes(state)
    partial = Partial(tmp_path, "m.gguf")
    assert partial.look() == 0 and partial.state is None
    partial.begin(STATE)
    assert partial.length == 0 and load_partial(path.read_bytes()).size_bytes == len(DATA)
    partial.close()


def test_what_is_no_file_of_ours_is_not_written_to(tmp_path: Path) -> None:
    begun(tmp_path).close()
    other = tmp_path / "other"
    other.write_bytes(b"kept")
    (tmp_path / "m.gguf.partial").unlink()
    (tmp_path / "m.gguf.partial").symlink_to(other)
    partial = Partial(tmp_path, "m.gguf")
    assert partial.look() == 0
    partial.begin(STATE)
    partial.write(b"x")
    partial.close()
    assert other.read_bytes() == b"kept" and not (tmp_path / "m.gguf.partial").is_symlink()


def test_more_than_the_whole_file_is_no_beginning_of_it(tmp_path: Path) -> None:
    begun(tmp_path).close()
    with (tmp_path / "m.gguf.partial").open("ab") as file:
        file.write(bytes(len(DATA)))
    assert Partial(tmp_path, "m.gguf").look() == 0


def test_reading_again_can_be_given_up(tmp_path: Path) -> None:
    begun(tmp_path).close()
    partial = Partial(tmp_path, "m.gguf")
    with pytest.raises(InterruptedError):
        partial.resume(lambda _length: None, lambda: True)
    partial.close()
