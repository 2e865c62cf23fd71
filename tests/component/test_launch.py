"""The launcher as a process: what holds before an engine begins, and that none outlives its agent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import alive, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the parent's death signal is Linux's")

LAUNCH = [sys.executable, "-m", "llorch.node.engines.launch"]
ENDS_WITHIN_S = 20.0

# Stands for an engine: says what it is, then lasts. SIGTERM does not end it.
ENGINE = """
import json, os, resource, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("made", "w").close()
facts = {
    "pid": os.getpid(), "sid": os.getsid(0), "pgid": os.getpgid(0), "core": resource.getrlimit(resource.RLIMIT_CORE),
    "rights": next(l for l in open("/proc/self/status") if l.startswith("NoNewPrivs")).split()[1],
    "argv": sys.argv[1:], "ignored": next(l for l in open("/proc/self/status") if l.startswith("SigIgn")).split()[1],
}
print(json.dumps(facts), flush=True)
print("to stderr", file=sys.stderr, flush=True)
signal.pause() if "last" in sys.argv else None
"""

# Stands for an agent: starts an engine through the launcher, says its pid, lasts.
AGENT = """
import os, signal, subprocess, sys
parent = str(os.getpid())
engine = subprocess.Popen([*sys.argv[1].split(), "--parent", parent, "--", sys.executable, "-c", sys.argv[2], "last"])
print(engine.pid, flush=True)
signal.pause()
"""


async def run(folder: Path, *argv: str, **options: int) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *LAUNCH, *argv, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()}, **options,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), ENDS_WITHIN_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def here() -> list[str]:
    return ["--parent", str(os.getpid())]


async def test_an_engine_has_a_session_private_files_no_core_no_new_rights_and_ordinary_signals(
    tmp_path: Path,
) -> None:
    code, out, _ = await run(tmp_path, *here(), "--", sys.executable, "-I", "-c", ENGINE, "--parent", "x y")
    assert code == 0
    facts = json.loads(out)
    assert facts["sid"] == facts["pgid"] == facts["pid"] != os.getsid(0)
    assert facts["core"] == [0, 0]
    assert facts["rights"] == "1"
    assert facts["argv"] == ["--parent", "x y"]
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o600
    # What Python ignores by its own choice it would ignore in the engine too; seen in a program that isn't Python.
    _, out, _ = await run(tmp_path, *here(), "--", "grep", "SigIgn", "/proc/self/status")
    assert int(out.split()[1], 16) & 1 << signal.SIGPIPE - 1 == 0


async def test_what_an_engine_says_is_appended_to_a_private_log(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    for _ in range(2):
        code, out, err = await run(tmp_path, *here(), "--log", str(log), "--", sys.executable, "-c", ENGINE)
        assert (code, out, err) == (0, "", "")
    assert [line[:3] for line in log.read_text().splitlines()] == ['{"p', "to "] * 2
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_an_engine_is_gone_when_its_agent_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "engine.log"
    command = f"{sys.executable} -m llorch.node.engines.launch --log {log}"
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, command, ENGINE], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    with agent:
        assert agent.stdout is not None
        engine = int(agent.stdout.readline())
        try:
            await eventually(lambda: log.exists() and "to stderr" in log.read_text(), what="the engine runs")
            agent.send_signal(number)
            agent.wait()
            await eventually(lambda: not alive(engine), within_s=5.0, what="the engine is gone")
        finally:
            for pid in (agent.pid, engine):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


async def test_nothing_is_started_for_an_agent_that_has_gone(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code, out, _ = await run(tmp_path, "--parent", str(gone.pid), "--", sys.executable, "-c", ENGINE)
    assert (code, out) == (1, "")
    assert not (tmp_path / "made").exists()


async def test_in_a_session_of_its_own_already_it_starts_all_the_same(tmp_path: Path) -> None:
    code, out, _ = await run(tmp_path, *here(), "--", sys.executable, "-c", ENGINE, start_new_session=True)
    assert code == 0
    assert json.loads(out)["sid"] == json.loads(out)["pid"]


async def test_a_program_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    code, _, err = await run(tmp_path, *here(), "--", "/nonexistent/engine", "--port", "1")
    assert code == 127
    [line] = err.splitlines()
    assert "/nonexistent/engine" in line


@pytest.mark.parametrize("argv", [[], ["--parent", "1"], ["--parent", "x", "--", "true"], ["--", "true"]])
async def test_it_refuses_to_guess(tmp_path: Path, argv: list[str]) -> None:
    code, _, _ = await run(tmp_path, *argv)
    assert code == 2


async def test_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, llorch.node.engines.launch; print(sorted({'asyncio', 'aiohttp', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
