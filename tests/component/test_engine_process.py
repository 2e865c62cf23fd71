"""One engine with all that may go wrong with it: each ends in a stated way, with no process and no port left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llorch.errors import LlorchError
from llorch.node import engine_process
from llorch.node.engine_process import Ended, EngineProcess
from llorch.node.engines.shim_linux import start_time
from llorch.node.engines.spec import Launch
from llorch.node.listeners import Holder, holder
from tests.cluster import alive, descendants, eventually
from tests.component.engine_harness import (
    FAMILY,
    ended_after,
    left,
    living,
    python,
    record,
    runtime,
    said,
    sh,
    simulated,
)
from tests.component.engine_harness import (
    engine_process as made,
)
from tests.component.memory_cgroup import memory_cgroup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is left is looked for in /proc")

# Stands for an engine that is loading: it listens, says 503, and the given line is what becomes of it.
LOADING = """
import http.server, os, signal, sys, threading, time
class Loading(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503)
        self.end_headers()
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Loading)
threading.Thread(target=server.serve_forever, daemon=True).start()
print("loading", flush=True)
exec(sys.argv[2])
"""
LASTS = "time.sleep(600)"


def loading(engine: EngineProcess, then: str) -> Launch:
    return python(LOADING, str(engine.port), then)


def shim_of(files: engine_process.RuntimeDir) -> int:
    pid = record(files)["shim"]["pid"]
    assert isinstance(pid, int)
    return pid


def nothing_listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


@asynccontextmanager
async def nothing_left(engine: EngineProcess) -> AsyncIterator[None]:
    """Afterwards there is no process of it, nothing listens on its port, and its files go."""
    before = descendants(os.getpid())
    yield
    assert descendants(os.getpid()) <= before
    assert engine.pid is not None and not alive(engine.pid)
    assert nothing_listens(engine.port)
    engine.remove_files()


async def ended(engine: EngineProcess, within_s: float = 15.0) -> Ended:
    return await asyncio.wait_for(engine.wait(), within_s)


async def test_one_that_ends_at_once_again_and_again_says_so_each_time(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    for _ in range(3):
        engine = made(files)
        async with nothing_left(engine):
            await engine.start(sh("echo cannot find my model >&2; exit 3"), os.environ)
            assert await ended(engine) == Ended("exited with code 3", "cannot find my model")
    assert left(files) == []


@pytest.mark.parametrize(
    ("then", "how"),
    [
        ("print('no memory for it', flush=True); os._exit(1)", "exited with code 1"),
        ("print('no memory for it', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("print('no memory for it', flush=True); os.kill(os.getpid(), 40)", "killed by signal 40"),
    ],
)
async def test_one_that_ends_while_it_loads_says_how_and_why(tmp_path: Path, then: str, how: str) -> None:
    files = runtime(tmp_path)
    engine = made(files)
    async with nothing_left(engine):
        await engine.start(loading(engine, then), os.environ)
        assert await ended(engine) == Ended(how, "no memory for it")
    assert left(files) == []


async def test_one_that_ignores_sigterm_with_children_that_do_is_killed_after_the_grace(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    engine = made(files, stop_grace_s=0.5)
    async with nothing_left(engine):
        await engine.start(python(FAMILY), os.environ)
        pids = [int(pid) for pid in await eventually(lambda: said(files, "pids"))]
        assert len(living(pids)) == 3
        began = time.monotonic()
        engine.terminate()
        assert (await ended(engine)).how == "killed by SIGKILL"
        assert 0.5 <= time.monotonic() - began < 5
        assert living(pids) == []


async def test_the_simulated_engine_that_ignores_sigterm_is_killed_and_one_that_does_not_ends_itself(
    tmp_path: Path,
) -> None:
    files = runtime(tmp_path)
    for flags, how in (("--ignore-sigterm",), "killed by SIGKILL"), ((), "exited with code 0"):
        engine = made(files, stop_grace_s=0.5 if flags else 10.0)
        async with nothing_left(engine):
            await engine.start(simulated(engine, *flags), os.environ)
            await eventually(engine_listens(engine), what="it listens")
            engine.terminate()
            assert (await ended(engine)).how == how


def engine_listens(engine: EngineProcess) -> Any:
    async def look() -> bool:
        return await engine.port_holder() is Holder.ITS

    return look


async def test_one_that_hangs_is_killed_after_the_grace(tmp_path: Path) -> None:
    """A stopped process takes no signal but SIGKILL; one that was stopped and one in a loop end alike."""
    files = runtime(tmp_path)
    for then in ("os.kill(os.getpid(), signal.SIGSTOP)", "signal.signal(15, signal.SIG_IGN)\nwhile True: pass"):
        engine = made(files, stop_grace_s=0.3)
        async with nothing_left(engine):
            await engine.start(loading(engine, then), os.environ)
            await eventually(engine_listens(engine), what="it listens")
            engine.terminate()
            assert (await ended(engine)).how == "killed by SIGKILL"


# What an engine does that the kernel kills for memory: itself, or in a process of its own for which it gives up.
EATS = """
import os, sys
def eat():
    held = []
    while True:
        held.append(os.urandom(1024) * 1024)
if sys.argv[1] == "itself" or os.fork() == 0:
    eat()
os.wait()
print("a worker has died", flush=True)
sys.exit(9)
"""

# Stands for an agent in a cgroup with its engines.
AGENT = """
import asyncio, os, sys
from dataclasses import astuple
from pathlib import Path
from tests.component.engine_harness import engine_process, python, runtime
async def main():
    engine = engine_process(runtime(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(str(os.getpid()))
    await engine.start(python(sys.argv[3], *sys.argv[4:]), os.environ)
    print(engine.pid, engine.port, *astuple(await engine.wait()), sep="\t")
    engine.remove_files()
asyncio.run(main())
"""


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("who", "how", "words"),
    [
        ("itself", "killed by SIGKILL: out of memory", ""),
        ("worker", "exited with code 9: out of memory", "a worker has died"),
    ],
)
async def test_one_that_the_kernel_kills_for_memory_says_so_and_its_agent_lives(
    tmp_path: Path, version: int, who: str, how: str, words: str
) -> None:
    with memory_cgroup(version, 96 * 1024 * 1024) as procs:
        agent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", AGENT, str(tmp_path), str(procs), EATS, who, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(agent.communicate(), 40.0)
        assert agent.returncode == 0
        pid, port, *ending = out.decode().removesuffix("\n").split("\t")
        assert ending == [how, words, "True"]
        assert not alive(int(pid)) and nothing_listens(int(port)) and procs.read_text() == ""
    assert left(runtime(tmp_path)) == []


async def test_one_killed_by_somebody_else_was_not_out_of_memory(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    engine = made(files)
    async with nothing_left(engine):
        await engine.start(sh("echo here; exec sleep 600"), os.environ)
        await eventually(lambda: "here" in engine.log_file.read_text())
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        assert await ended(engine) == Ended("killed by SIGKILL", "here", oom=False)


async def test_one_whose_shim_is_killed_goes_with_its_session(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    engine = made(files)
    async with nothing_left(engine):
        await engine.start(sh("sleep 600 & echo child $!; sleep 600"), os.environ)
        [child] = await eventually(lambda: said(files, "child"))
        with ended_after(int(child)):
            os.kill(shim_of(files), signal.SIGKILL)
            assert (await ended(engine)).how == "its shim was killed by SIGKILL"
            await eventually(lambda: not alive(int(child)), what="its child has gone")
    assert left(files) == []


async def test_a_shim_that_does_not_end_its_engine_is_ended_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "BACKSTOP_S", 0.3)
    files = runtime(tmp_path)
    engine = made(files, stop_grace_s=0.2)
    async with nothing_left(engine):
        await engine.start(sh("exec sleep 600"), os.environ)
        os.kill(shim_of(files), signal.SIGSTOP)
        engine.terminate()
        assert "did not end it in time" in (await ended(engine)).how


async def test_one_whose_port_somebody_else_takes_is_ended_and_the_next_has_another(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    engine = made(files)
    with socket.create_server(("127.0.0.1", engine.port)):
        before = descendants(os.getpid())
        await engine.start(sh("exec sleep 600"), os.environ)
        assert await engine.port_holder() is Holder.OTHER
        assert (await ended(engine)).how == f"another program listens on its port {engine.port}"
        assert descendants(os.getpid()) <= before
        engine.remove_files()
        assert made(files).port != engine.port


async def test_a_port_is_an_engines_own_if_it_or_one_of_its_children_listens(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    engine = made(files)
    async with nothing_left(engine):
        child = "import os\nif os.fork():\n os.wait()\nos.setsid()\n"
        await engine.start(python(child + LOADING, str(engine.port), LASTS), os.environ)
        assert await engine.port_holder() is Holder.NOBODY
        await eventually(engine_listens(engine), what="its child listens")
        assert holder(os.getppid(), engine.port) is Holder.ITS, "everything here is a descendant"
        other = made(files, "other-r0.json")
        await other.start(sh("exec sleep 600"), os.environ)
        assert other.pid is not None and holder(other.pid, engine.port) is Holder.OTHER
        for one in (engine, other):
            one.terminate()
            await ended(one)
        other.remove_files()


async def test_released_it_runs_on_unclaimed_and_keeps_its_files(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    engine = made(files, orphan_grace_s=1.0)
    await engine.start(sh("exec sleep 600"), os.environ)
    pid = engine.pid
    assert pid is not None
    shim = shim_of(files)
    with ended_after(pid):
        waiting = asyncio.ensure_future(engine.wait())
        await asyncio.sleep(0)
        engine.release()
        assert (await waiting).how == "it was left running for the next agent"
        engine.remove_files()
        assert alive(pid) and record(files)["agent"] is None and engine.key_file.exists()
        await eventually(lambda: not alive(pid), what="nobody has come for it")
        await eventually(lambda: not engine.key_file.exists() and not (files.pids / "p-r0.json").exists())
    os.waitpid(shim, 0)  # an agent that has released it ends


async def test_a_wait_that_is_given_up_ends_the_engine_at_once(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    engine = made(files, stop_grace_s=600.0)
    await engine.start(sh("trap '' TERM; echo ready; sleep 600"), os.environ)
    waiting = asyncio.ensure_future(engine.wait())
    await asyncio.sleep(0)  # its first step: who is given up before that has not begun to wait
    await eventually(lambda: "ready" in engine.log_file.read_text())
    shim = shim_of(files)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert engine.pid is not None
    await eventually(lambda: not alive(engine.pid or 0), what="it has gone")
    os.waitpid(shim, 0)
    engine.remove_files()


async def test_a_start_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    for turns in range(0, 60, 6):
        before = descendants(os.getpid())
        engine = made(files)
        starting = asyncio.ensure_future(engine.start(sh("exec sleep 600"), os.environ))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        if starting.done():
            engine.terminate()
            await ended(engine)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await eventually(lambda before=before: descendants(os.getpid()) <= before, what="nothing runs")  # type: ignore[misc]
        engine.remove_files()
        assert left(files) == []


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (("/nonexistent/engine", "--port", "1"), "there is no program /nonexistent/engine"),
        (("/etc/passwd",), "/etc/passwd may not be run"),
        (("FOLDER/odd",), "odd is no program for this machine"),
    ],
)
async def test_what_can_not_be_run_is_told_in_words(tmp_path: Path, argv: tuple[str, ...], word: str) -> None:
    files = runtime(tmp_path)
    odd = tmp_path / "odd"
    odd.write_bytes(b"\x7fELF nothing")
    odd.chmod(0o700)
    engine = made(files)
    with pytest.raises(LlorchError) as caught:
        await engine.start(Launch(tuple(word.replace("FOLDER", str(tmp_path)) for word in argv)), os.environ)
    assert word in caught.value.message
    engine.remove_files()
    assert left(files) == []


@pytest.mark.parametrize("folder", ["keys", "pids", "logs"])
async def test_a_directory_that_can_not_be_written_is_named_with_what_mends_it(tmp_path: Path, folder: str) -> None:
    """A file in its place stands for it: root may write anywhere."""
    files = runtime(tmp_path)
    (tmp_path / folder).rmdir()
    (tmp_path / folder).touch()
    with pytest.raises(LlorchError) as caught:
        await made(files).start(sh("touch made"), os.environ)
    assert str(tmp_path / folder) in caught.value.message and caught.value.hint
    assert not (tmp_path / "made").exists() and descendants(os.getpid()) == set()


async def test_what_no_program_can_be_given_is_refused(tmp_path: Path) -> None:
    engine = made(runtime(tmp_path))
    for launch in (Launch(("true", "a\0b")), Launch(("true",), {"A": "\0"})):
        with pytest.raises(ValueError, match="NUL"):
            await engine.start(launch, os.environ)


async def test_no_secret_is_in_the_argv_or_the_environment_of_its_shim(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    engine = made(files)
    env = os.environ | {"HF_TOKEN": "s3cret", "LLORCH_NODE_TOKEN": "s3cret"}
    await engine.start(Launch(("sleep", "600"), {"OWN": "s3cret"}), env)
    shim = shim_of(files)
    for pid, what in ((shim, "cmdline"), (shim, "environ"), (engine.pid, "cmdline")):
        assert b"s3cret" not in Path(f"/proc/{pid}/{what}").read_bytes()
    seen = Path(f"/proc/{engine.pid}/environ").read_bytes()
    assert b"OWN=s3cret" in seen and seen.count(b"s3cret") == 1
    assert start_time(shim) is not None and "s3cret" not in (files.pids / "p-r0.json").read_text()
    engine.terminate()
    await ended(engine)
