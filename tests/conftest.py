"""What every test gets: quick starts, the leak check after component and e2e tests, and a cluster on demand."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, belonging, cluster, descendants

LEAKS_WITHIN_S = 10.0
MACHINE_WITHIN_S = 600.0  # as long as all that ask for it take together
SLOW_WITHIN_S = 240.0  # what hangs ends then; a machine that has much to do is no fault of a test with many processes


def pytest_configure() -> None:
    """What every process of a test inherits: half of what the default run takes is hundreds of starts."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, each compiles again what the one before compiled
    sys.dont_write_bytecode = False
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):  # no test asks a public authority, and to read them takes 50 ms
        os.environ[name] = os.devnull
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # under nohup, or behind `&`, they are ignored
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # as before, here; what is started has the default again


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_WITHIN_S))


def pytest_collection_finish() -> None:
    """What was loaded stays: to look at all of it again and again would take the collector a third of some tests. And
    to look as often as it does by default takes a tenth of what remains."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def without_collection() -> Iterator[None]:
    """What a test leaves in a circle stays where it is."""
    gc.collect()  # what other tests have left
    gc.disable()
    yield
    gc.enable()


def _processes() -> set[int]:
    """Every living process below this one."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # it has none: most tests start none, and looking at all of the machine's takes longer
        return set()
    return descendants(os.getpid())


def _of(folder: Path) -> set[int]:
    """The processes of clusters in a test's folder. What left nothing there started none."""
    return belonging(folder) if folder.exists() and any(folder.iterdir()) else set()


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def whole_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Alone among the tests that ask for it, whichever worker they run in: beside one that starts 200 processes on two
    cores, whatever another one measures is that load."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # each worker has one of its own in it
    with (folder / "whole_machine").open("w") as lock:
        until = time.monotonic() + MACHINE_WITHIN_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < until, f"others had the machine for {MACHINE_WITHIN_S} s"
                time.sleep(0.05)
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """A component, e2e or fuzz test leaves no process and no file descriptor: no engine either that has outlived its
    agent, and is nobody's child here.
    """
    if not {"component", "e2e", "faults", "fuzz"} & set(Path(request.node.path).parts):
        yield
        return
    children, files = _processes(), _open_files()
    yield
    folder = request.node.funcargs.get("tmp_path")  # type: ignore[attr-defined]
    until = time.monotonic() + LEAKS_WITHIN_S
    while time.monotonic() < until:
        left = (_processes() - children) | (_of(folder) if folder is not None else set())
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
