"""The memory that a node may have, over folders that read like /proc and the cgroup file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from llorch.node.ram import Ram, ram

GIB = 1 << 30
MEMINFO = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable:  {12 * GIB // 1024} kB\nHugePages_Total: 0\n"


def machine(root: Path, cgroup: str = "0::/\n", **limits: str) -> Ram:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(MEMINFO)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, limit in limits.items():
        group = root / "cgroup" / name.strip("_").replace("__", "/")
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(limit)
    return ram(proc=root / "proc", cgroups=root / "cgroup")


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    assert machine(tmp_path, _="max\n") == Ram(16 * GIB, 12 * GIB)


@pytest.mark.parametrize("limits", [{"_": f"{8 * GIB}"}, {"a": f"{8 * GIB}\n", "a__b": "max"}, {"a__b": f"{8 * GIB}"}])
def test_a_limit_at_any_level_counts(tmp_path: Path, limits: dict[str, str]) -> None:
    assert machine(tmp_path, "1:x:/old\n0::/a/b\n", **limits) == Ram(8 * GIB, 8 * GIB)


def test_a_limit_above_the_machine_is_none(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/a\n", a=f"{99 * GIB}") == Ram(16 * GIB, 12 * GIB)


def test_a_cgroup_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1")
    assert machine(tmp_path, "0::/../\n", _="max").total_bytes == 16 * GIB


def test_where_nothing_is_told_nothing_is_known(tmp_path: Path) -> None:
    assert ram(proc=tmp_path, cgroups=tmp_path) == Ram(0, 0)


def test_this_machine_has_some() -> None:
    here = ram()
    assert 0 < here.available_bytes <= here.total_bytes
