"""The shim as a process: what holds before an engine begins, what becomes of its words, and that all of it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llorch.node.engine_log import tail
from llorch.node.engine_process import RuntimeDir
from llorch.node.engines.shim_files import LOG_BYTES, LOG_FILES, generations
from llorch.node.engines.shim_linux import argv_digest, start_time
from tests.cluster import alive, eventually
from tests.component.engine_harness import FAMILY, NAME, ended_after, left, living, record, runtime, said

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="subreapers and the parent's death signal are Linux's")

SHIM = [sys.executable, "-S", "-P", "-m", "llorch.node.engines.shim", "p-r0"]
ENDS_WITHIN_S = 20.0
SHIM_MB = 12.0

# Stands for an engine: says what it is, then lasts if it is to.
FACTS = """
import ctypes, json, os, resource, signal, sys
open("made", "w").close()
dies_with = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(dies_with), 0, 0, 0)
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print("facts", json.dumps({
    "pid": os.getpid(), "sid": os.getsid(0), "pgid": os.getpgid(0), "core": resource.getrlimit(resource.RLIMIT_CORE),
    "rights": int(status["NoNewPrivs"]), "dies_with": dies_with.value, "argv": sys.argv[2:],
    "first": int(open("/proc/self/oom_score_adj").read()), "named": json.load(open(sys.argv[1]))["pid"],
    "environment": dict(os.environ),
}), flush=True)
print("to stderr", file=sys.stderr, flush=True)
"""


class Kept:
    """A shim that this test has started, and what it said."""

    def __init__(self, files: RuntimeDir, argv: Sequence[str], prefix: Sequence[str] = (), **changes: Any) -> None:
        (files.keys / "k.key").write_text("key\n")
        record = {
            "port": 1, "api_key_file": str(files.keys / "k.key"), "log": str(files.logs / "p-r0.log"),
            "agent": {"pid": os.getpid(), "start_time": start_time(os.getpid())}, "stop_grace_s": 0.3,
            "orphan_grace_s": 300.0, "meta": {"any": ["thing"]},
        }  # fmt: skip
        wish = {
            "argv": argv,
            "env": {"PATH": os.environ["PATH"], "GIVEN": "yes"},
            "files": {
                "pid": str(files.pids / NAME), "end": str(files.ends / NAME), "log": str(files.logs / "p-r0.log"),
                "handoff": str(files.engines / NAME), "key": str(files.keys / "k.key"),
            },
            "record": record | changes,
        }  # fmt: skip
        self.files = files
        self.process = subprocess.Popen(
            [*prefix, *SHIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=files.root,
            env={"PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        with self.process.stdin as stdin, self.process.stdout as stdout:
            stdin.write(json.dumps(wish).encode())
            stdin.close()
            self.said = json.loads(stdout.read())
        self.engine = self.said.get("pid", 0)

    def wait(self) -> int:
        return self.process.wait(ENDS_WITHIN_S)

    def end(self) -> dict[str, Any]:
        content = json.loads((self.files.ends / NAME).read_text())
        assert isinstance(content, dict)
        return content

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_an_engine_has_a_session_private_files_no_core_no_new_rights_and_ordinary_signals(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    with Kept(files, [sys.executable, "-I", "-c", FACTS, str(files.pids / NAME), "--agent", "x y"]) as kept:
        assert kept.wait() == 0
        facts = json.loads(" ".join(said(files, "facts")))
        assert facts["sid"] == facts["pgid"] == facts["pid"] == kept.engine != os.getsid(0)
        assert facts["named"] == kept.engine, "its pid file was there before it ran"
        assert (facts["core"], facts["rights"], facts["dies_with"]) == ([0, 0], 1, signal.SIGKILL)
        assert facts["first"] == 500, "of all on this machine the kernel is to take it first"
        assert facts["argv"] == ["--agent", "x y"]
        assert facts["environment"].items() >= {"GIVEN": "yes"}.items() and "PYTHONPATH" not in facts["environment"]
        assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o600
    # What Python ignores by its own choice it would ignore in the engine too; seen in a program that isn't Python.
    with Kept(files, ["grep", "SigIgn", "/proc/self/status"]) as kept:
        kept.wait()
        ignored = int(kept.end()["last"][0].split()[1], 16)
        assert not ignored & sum(1 << number - 1 for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGINT))


def test_what_an_engine_says_is_in_a_private_log_from_start_to_start(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    for number in range(2):
        with Kept(files, ["/bin/sh", "-c", f"echo out {number}; echo err {number} >&2; exit {number}"]) as kept:
            assert kept.wait() == number
            assert kept.end()["last"] == [f"out {number}", f"err {number}"]
    lines = [line for line in tail(files.logs / "p-r0.log", 20) if not line.startswith("-- ")]
    assert lines == ["out 0", "err 0", "out 1", "err 1"]
    assert stat.S_IMODE((files.logs / "p-r0.log").stat().st_mode) == 0o600


def test_a_pid_file_says_whose_the_engine_is_and_follows_its_argv(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    with Kept(files, ["/bin/sleep", "600"]) as kept:
        first = record(files)
        assert first["pid"] == kept.engine and first["start_time"] == start_time(kept.engine)
        assert first["shim"] == {"pid": kept.process.pid, "start_time": start_time(kept.process.pid)}
        assert first["agent"]["pid"] == os.getpid() and first["meta"] == {"any": ["thing"]}
        assert first["argv_digest"] == argv_digest(kept.engine)
        assert stat.S_IMODE((files.pids / NAME).stat().st_mode) == 0o600
        kept.process.terminate()
        kept.wait()
    with Kept(files, ["/bin/sh", "-c", "sleep 0.2; exec sleep 600"]) as kept:
        before = record(files)["argv_digest"]

        def followed() -> bool:
            now = record(files)["argv_digest"]
            return bool(now != before and now == argv_digest(kept.engine))

        asyncio.run(eventually(followed, what="the argv of what it has become"))


def test_all_that_an_engine_started_ends_with_it_whatever_it_ignores(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    with Kept(files, [sys.executable, "-c", FAMILY]) as kept:
        pids = family(files)
        with ended_after(*pids):
            kept.process.terminate()
            assert kept.wait() == 128 + signal.SIGKILL
            assert living(pids) == []
            assert (kept.end()["signal"], kept.end()["why"], kept.end()["stuck"]) == (signal.SIGKILL, "asked", 0)


def test_what_an_engine_leaves_when_it_ends_by_itself_is_ended(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    with Kept(files, [sys.executable, "-c", FAMILY, "leave"]) as kept:
        assert kept.wait() == 7
        pids = family(files)
        assert len(pids) == 3 and living(pids) == []
        assert (kept.end()["exit_code"], kept.end()["why"], kept.end()["oom"]) == (7, None, False)


def family(files: RuntimeDir) -> list[int]:
    return [int(pid) for pid in asyncio.run(eventually(lambda: said(files, "pids"), what="the engine's pids"))]


def test_the_end_of_a_shim_is_the_end_of_its_engine(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    with Kept(files, ["sleep", "600"]) as kept, ended_after(kept.engine):
        kept.process.kill()
        kept.wait()
        asyncio.run(eventually(lambda: not alive(kept.engine), what="the engine is gone"))


def test_at_once_means_without_the_grace(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    with Kept(files, [sys.executable, "-c", FAMILY], stop_grace_s=600.0) as kept:
        pids = family(files)
        kept.process.terminate()
        kept.process.send_signal(signal.SIGUSR1)
        kept.wait()
        assert living(pids) == []


# ---------------------------------------------------------------- nobody's engine

# Stands for an agent: starts a shim that claims to be its, says the pids, lasts.
AGENT = """
import json, sys, time
from pathlib import Path
from tests.component.engine_harness import runtime
from tests.component.test_shim import Kept
kept = Kept(runtime(Path(sys.argv[1])), sys.argv[3:], orphan_grace_s=float(sys.argv[2]))
print(kept.process.pid, kept.engine, flush=True)
time.sleep(600)
"""


def agent(root: Path, grace_s: float, *argv: str) -> tuple[subprocess.Popen[str], int, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(root), str(grace_s), *argv], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        shim, engine = map(int, process.stdout.readline().split())
    return process, shim, engine


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_without_a_grace_an_engine_is_gone_when_its_agent_is_killed(
    tmp_path: Path, number: signal.Signals
) -> None:
    files = runtime(tmp_path)
    process, shim, engine = agent(tmp_path, 0.0, sys.executable, "-c", FAMILY)
    with process, ended_after(process.pid, shim, engine):
        pids = [int(pid) for pid in await eventually(lambda: said(files, "pids"))]
        process.send_signal(number)
        process.wait()
        await eventually(lambda: not living([shim, *pids]), within_s=5.0, what="all of it is gone")
        assert left(files) == [f"ends/{NAME}"]


async def test_an_engine_that_nobody_claims_goes_when_its_grace_has_run_out(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    process, shim, engine = agent(tmp_path, 0.8, sys.executable, "-c", FAMILY)
    with process, ended_after(process.pid, shim, engine):
        pids = [int(pid) for pid in await eventually(lambda: said(files, "pids"))]
        process.kill()
        process.wait()
        assert living(pids) == pids and left(files) != []
        await eventually(lambda: not living([shim, *pids]), what="all of it is gone")
        assert left(files) == [f"ends/{NAME}"]
        assert json.loads((files.ends / NAME).read_text())["why"] == "orphan"


@pytest.mark.parametrize("what", ["removed", "another's", "torn"])
async def test_a_pid_file_that_does_not_name_it_claims_nothing(tmp_path: Path, what: str) -> None:
    files = runtime(tmp_path)
    with Kept(files, ["sleep", "600"], orphan_grace_s=0.3) as kept, ended_after(kept.engine):
        if what == "removed":
            (files.pids / NAME).unlink()
        else:
            other = json.dumps(record(files) | {"shim": {"pid": kept.process.pid, "start_time": 1}})
            (files.pids / NAME).write_text(other if what == "another's" else other[:40])
        await eventually(lambda: kept.process.poll() is not None, what="it has ended")
        assert not alive(kept.engine)
        assert (files.pids / NAME).exists() is (what != "removed"), "what is not its own is not its to remove"


def test_nothing_is_started_for_an_agent_that_has_gone(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    named = {"pid": gone.pid, "start_time": start_time(gone.pid)}
    gone.wait()
    files = runtime(tmp_path)
    with Kept(files, [sys.executable, "-c", FACTS], agent=named) as kept:
        assert kept.said["error"] == "agent" and kept.wait() == 127
        assert not (tmp_path / "made").exists() and not (files.pids / NAME).exists()


def test_nothing_is_started_beside_another_of_its_name(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    with Kept(files, ["sleep", "600"]) as kept:
        with Kept(files, ["touch", "made"]) as second:
            assert second.said["error"] == "record" and second.wait() == 127
        assert record(files)["pid"] == kept.engine and alive(kept.engine) and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("stage", "word"), [("program", "No such file"), ("log", "Is a directory"), ("record", "Is a directory")]
)
def test_what_can_not_be_started_is_told_and_leaves_nothing(tmp_path: Path, stage: str, word: str) -> None:
    files = runtime(tmp_path)
    if stage != "program":
        ({"log": files.logs / "p-r0.log", "record": files.pids / NAME}[stage] / "in the way").mkdir(parents=True)
    argv = ["/nonexistent/engine"] if stage == "program" else ["touch", "made"]
    with Kept(files, argv) as kept:
        assert kept.wait() == 127
        assert kept.said["error"] == stage and kept.said["reason"].startswith(word)
    assert not (tmp_path / "made").exists() and not (files.pids / NAME).is_file()


# ---------------------------------------------------------------- words, and room for them


def test_a_log_is_rotated_and_its_end_is_there(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    count = LOG_BYTES * (LOG_FILES + 1) // 64
    with Kept(files, ["/bin/sh", "-c", f"yes {'x' * 63} | head -n {count}; echo the end"]) as kept:
        assert kept.wait() == 0
        assert kept.end()["last"][-1] == "the end" and kept.end()["lost_bytes"] == 0
    log = files.logs / "p-r0.log"
    sizes = [Path(name).stat().st_size for name in generations(str(log))]
    assert len(sizes) == LOG_FILES == len(list(files.logs.iterdir()))
    assert max(sizes) <= LOG_BYTES and sizes[1] > LOG_BYTES - 64 * 1024 <= sizes[2]
    assert "the end" in tail(log, 3)


def test_a_disk_that_takes_no_more_does_not_keep_an_engine_waiting(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the same errors, and room for the small ones."""
    files = runtime(tmp_path)
    limited = ["/bin/bash", "-c", 'ulimit -f 64; exec "$@"', "limited"]
    with Kept(files, ["/bin/sh", "-c", "yes | head -c 4000000; echo the end"], limited) as kept:
        assert kept.wait() == 0
        assert kept.end()["last"][-1] == "the end"
        assert 4_000_000 - 70_000 < kept.end()["lost_bytes"] <= 4_000_100
    assert (files.logs / "p-r0.log").stat().st_size <= 64 * 1024


def test_it_is_small_and_loads_nothing_heavy(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    with Kept(files, ["sleep", "600"]) as kept:
        status = Path(f"/proc/{kept.process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
        assert int(line.split()[1]) / 1024 < SHIM_MB
    heavy = {
        "asyncio",
        "typing",
        "dataclasses",
        "pathlib",
        "subprocess",
        "logging",
        "hashlib",
        "_hashlib",
        "llorch.logs",
    }
    code = f"import sys, llorch.node.engines.shim; print(sorted({heavy!r} & set(sys.modules)))"
    env = {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([*SHIM[:3], "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"
