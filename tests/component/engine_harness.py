"""Engines of a test and what is left of them: stand-in programs, a runtime directory, and looks at what still runs."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llorch.node.engine_process import EngineProcess, RuntimeDir
from llorch.node.engines.shim_linux import start_time
from llorch.node.engines.spec import Launch
from tests.cluster import alive

NAME = "p-r0.json"
IDS = {"pool_id": "p", "replica": "r0"}

# Stands for an engine that starts others, in sessions of their own, none of which SIGTERM ends. Says its pids.
FAMILY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pids = [os.getpid()]
for depth in range(2):
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write, b"%d" % os.getpid())
            time.sleep(600)
        os._exit(0)  # the other one is an orphan
    pids.append(int(os.read(read, 20)))
print("pids", *pids, flush=True)
if sys.argv[1:] == ["leave"]:
    os._exit(7)
time.sleep(600)
"""


def runtime(root: Path) -> RuntimeDir:
    files = RuntimeDir(root)
    files.make()
    return files


def python(code: str, *args: str) -> Launch:
    return Launch((sys.executable, "-c", code, *args))


def sh(script: str) -> Launch:
    return Launch(("/bin/sh", "-c", script))


def simulated(engine: EngineProcess, *args: str) -> Launch:
    argv = [sys.executable, "-m", "llorch.node.engines.simulated_server", "--port", str(engine.port)]
    return Launch((*argv, "--host", "127.0.0.1", "--api-key-file", str(engine.key_file), "--alias", "m", *args))


def engine_process(files: RuntimeDir, name: str = NAME, **settings: Any) -> EngineProcess:
    return EngineProcess(files, name, **{"stop_grace_s": 5.0, "orphan_grace_s": 0.0, "ids": IDS} | settings)


def record(files: RuntimeDir, name: str = NAME) -> dict[str, Any]:
    content = json.loads((files.pids / name).read_text())
    assert isinstance(content, dict)
    return content


def said(files: RuntimeDir, word: str, name: str = NAME) -> list[str]:
    """The words of the line of an engine's log that begins with `word`; none if there is no such line yet."""
    log = files.logs / name.replace(".json", ".log")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.split()[1:] for line in lines if line.startswith(word + " ")), [])


def left(files: RuntimeDir) -> list[str]:
    """What is left in the runtime directory but for logs."""
    folders = (files.engines, files.pids, files.ends, files.keys)
    return sorted(str(path.relative_to(files.root)) for folder in folders for path in folder.iterdir())


def living(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if alive(pid)]


@contextmanager
def ended_after(*pids: int) -> Iterator[None]:
    """Should the test fail, nothing of it goes on."""
    named = {pid: start_time(pid) for pid in pids}
    try:
        yield
    finally:
        for pid, started in named.items():
            if started is not None and start_time(pid) == started:
                os.kill(pid, signal.SIGKILL)
