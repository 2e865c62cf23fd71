"""A memory cgroup of a test's own, with a limit that can be exceeded. Skips with the reason where there is none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
GONE_WITHIN_S = 10.0


@contextmanager
def memory_cgroup(version: int, limit_bytes: int) -> Iterator[Path]:
    """The file to which a process writes its pid to be in it."""
    folder = (V1 if version == 1 else V2) / f"llorch-test-{os.getpid()}-{time.monotonic_ns()}"
    limits = (
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if version == 1 else ("memory.max", "memory.swap.max")
    )
    _made(folder, version, limits[0])
    try:
        (folder / limits[0]).write_text(str(limit_bytes))
        if (folder / limits[1]).exists():
            (folder / limits[1]).write_text(str(limit_bytes if version == 1 else 0))
        yield folder / "cgroup.procs"
    finally:
        _removed(folder)


def _made(folder: Path, version: int, limit: str) -> None:
    if version == 2 and "memory" not in _controllers():
        pytest.skip(f"cgroup v2 has no memory controller here: {V2}/cgroup.subtree_control says {_controllers()}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup (v{version}) can be made at {folder.parent}: {error.strerror}")
    if not (folder / limit).exists():
        folder.rmdir()
        pytest.skip(f"a cgroup (v{version}) at {folder.parent} has no {limit}")


def _controllers() -> list[str]:
    try:
        return (V2 / "cgroup.subtree_control").read_text().split()
    except OSError:
        return []


def _removed(folder: Path) -> None:
    until = time.monotonic() + GONE_WITHIN_S
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            assert time.monotonic() < until, f"processes are left in {folder}: {(folder / 'cgroup.procs').read_text()}"
            time.sleep(0.05)
