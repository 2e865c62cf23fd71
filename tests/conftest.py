"""What every test gets: the leak check after component and e2e tests, and a cluster on demand."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, cluster, descendants

LEAKS_WITHIN_S = 10.0


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """A component, e2e or fuzz test leaves no process and no file descriptor."""
    if not {"component", "e2e", "faults", "fuzz"} & set(Path(request.node.path).parts):
        yield
        return
    children, files = descendants(os.getpid()), _open_files()
    yield
    until = time.monotonic() + LEAKS_WITHIN_S
    while time.monotonic() < until:
        left = descendants(os.getpid()) - children
        if not left and _open_files() <= files + 2:
            return
        gc.collect()  # what waits in a cycle is no leak; done only now, for it takes as long as a small test
        time.sleep(0.05)
    targets = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    pytest.fail(f"left behind: processes {left}, {_open_files() - files} files more: {targets}")


@pytest.fixture
async def llorch(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path) as running:
        yield running
