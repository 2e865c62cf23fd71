"""Where the kernel counts out-of-memory kills: both versions of cgroups, as a machine and as a container see them."""

from __future__ import annotations

import pytest

from llorch.node.engines.shim_linux import counter_files

V1 = "30 25 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2 = "31 25 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"
OTHER = "29 25 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n1 1 8:1 / / rw - ext4 /dev/sda rw\nodd\n"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files"),
    [
        ("4:memory:/a/b\n0::/\n", OTHER + V1, ["/sys/fs/cgroup/memory/a/b/memory.oom_control"]),
        ("0::/system.slice/x.service\n", V2, ["/sys/fs/cgroup/system.slice/x.service/memory.events"]),
        ("0::/\n", V2, ["/sys/fs/cgroup/memory.events"]),
        (
            "9:cpu,memory:/a\n0::/b\n",
            V1 + V2,
            ["/sys/fs/cgroup/memory/a/memory.oom_control", "/sys/fs/cgroup/b/memory.events"],
        ),
        # a container that sees its own part of the tree
        ("0::/docker/1\n", V2.replace(" / /sys", " /docker/1 /sys"), ["/sys/fs/cgroup/memory.events"]),
        ("0::/docker/1/sub\n", V2.replace(" / /sys", " /docker/1 /sys"), ["/sys/fs/cgroup/sub/memory.events"]),
        ("0::/docker/12\n", V2.replace(" / /sys", " /docker/1 /sys"), []),
        ("0::/a\n", V2.replace("/sys/fs/cgroup", "/sys/with\\040blank"), ["/sys/with blank/a/memory.events"]),
        ("4:memory:/a\n", OTHER, []),
        ("odd\n::\n", "odd\n - \n", []),
        ("", "", []),
    ],
)
def test_the_counters_of_a_process(cgroup: str, mounts: str, files: list[str]) -> None:
    assert counter_files(cgroup, mounts) == [*files, "/proc/vmstat"]
