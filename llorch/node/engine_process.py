"""One engine process of ours and the files that belong to it, from its start to its end.

Owns the port, the API key of this start, the pid file, the log, and the way it ends: SIGTERM to its group, a grace,
SIGKILL. The launcher ties the engine's life to this process, so that none outlives its agent; what a killed agent left
behind is cleared by `clear_leftovers`. Never decides whether an engine should run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from llorch import whole_file
from llorch.logs import Log, printable
from llorch.node.engines.environment import for_engine
from llorch.node.engines.spec import LOOPBACK, Launch

LAUNCHER = "llorch.node.engines.launch"
TAIL_BYTES = 16 * 1024
MAX_LINE_CHARS = 300
POLL_S = 0.05

log = Log("engines")


class RuntimeDir:
    """Where things are under the node's runtime directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()  # engines get these paths, and have working directories of their own choice
        self.engines = self.root / "engines"
        self.pids = self.root / "pids"
        self.logs = self.root / "logs"
        self.keys = self.root / "keys"

    def make(self) -> None:
        for directory in (self.root, self.engines, self.pids, self.logs, self.keys):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def free_port() -> int:
    """A loopback port nobody listens on now. Should another take it first, the engine ends and gets a new one."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        return int(sock.getsockname()[1])


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid it names a process for good. Linux only."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] != b"Z" else None


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signal the group that `pid` leads, or it alone while it is still in ours."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)


class EngineProcess:
    """An engine that was started. `ended` says how it went once `wait` has returned."""

    def __init__(self, files: RuntimeDir, name: str, stop_grace_s: float, ids: Mapping[str, str]) -> None:
        """`name` is that of its handoff file; `ids` go with everything that is logged of it."""
        self._files = files
        self._name = name
        self._stop_grace_s = stop_grace_s
        self._ids = ids
        self._process: asyncio.subprocess.Process | None = None
        self._ending = asyncio.Event()
        stem = name.removesuffix(".json")
        self.key_file = files.keys / f"{stem}-{secrets.token_hex(4)}.key"
        self.log_file = files.logs / f"{stem}.log"
        self.port = free_port()
        whole_file.replace(self.key_file, secrets.token_urlsafe(32).encode() + b"\n", durable=False)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self, launch: Launch, env: Mapping[str, str]) -> None:
        """Raises OSError when the program that starts engines can't itself be started."""
        with contextlib.suppress(FileNotFoundError):
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        argv = [sys.executable, "-m", LAUNCHER, "--parent", str(os.getpid()), "--log", str(self.log_file), "--"]
        given = for_engine(env) | dict(launch.env)
        if launch.key_env is not None:
            given[launch.key_env] = self.key_file.read_text().strip()
        output = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *argv, *launch.argv, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                env=given,
            )  # fmt: skip
        finally:
            os.close(output)
        digest = hashlib.sha256("\0".join(launch.argv).encode()).hexdigest()
        try:
            self._record(digest)
        except OSError:
            signal_group(self._process.pid, signal.SIGKILL)  # without its pid file nobody could find it again
            await self._process.wait()
            raise
        log.info("engine.started", **self._ids, pid=self._process.pid, port=self.port)

    def _record(self, argv_digest: str) -> None:
        """Write the pid file, by which the next agent knows what is ours."""
        pid = self.pid
        content = {
            "pid": pid,
            "start_time": start_time(pid) if pid is not None else None,
            "argv_digest": argv_digest,
            "port": self.port,
            "api_key_file": str(self.key_file),
            "log": str(self.log_file),
        }
        whole_file.replace(self._files.pids / self._name, json.dumps(content).encode(), durable=False)

    def terminate(self) -> None:
        """Ask it to end; `wait` sees to it that it does."""
        self._ending.set()

    async def wait(self) -> str:
        """Until it has ended, by itself or because `terminate` was called. How it ended, for people.

        Cancelled, it kills the engine first: nobody is left to look after it.
        """
        process = self._process
        assert process is not None  # start() came first
        ended = asyncio.ensure_future(process.wait())
        asked = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait((ended, asked), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                signal_group(process.pid, signal.SIGTERM)
                await asyncio.wait((ended,), timeout=self._stop_grace_s)
            if not ended.done():
                log.warning("engine.killed", **self._ids, pid=process.pid, grace_s=self._stop_grace_s)
                signal_group(process.pid, signal.SIGKILL)
                await ended
        finally:
            asked.cancel()
            if not ended.done():
                signal_group(process.pid, signal.SIGKILL)
                ended.cancel()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # children of its own, if it had any
        code = process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with code {code}"
        log.info("engine.exited", **self._ids, pid=process.pid, how=how, asked=self._ending.is_set())
        return how

    def last_words(self) -> str:
        """The last line that it wrote: the engine's own words, which may quote what it was asked."""
        return next((line for line in reversed(tail(self.log_file, 20)) if line.strip()), "")

    def remove_files(self) -> None:
        """Its handoff, pid and key files; the log stays for people."""
        for path in (self._files.engines / self._name, self._files.pids / self._name, self.key_file):
            path.unlink(missing_ok=True)


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, without control characters, each of bounded length."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            raw = file.read(TAIL_BYTES)
    except OSError:
        return []
    text = raw.decode("utf-8", "replace").splitlines()
    return [printable(line)[:MAX_LINE_CHARS] for line in text[-lines:]]


# ---------------------------------------------------------------- what an earlier agent left


async def clear_leftovers(files: RuntimeDir, stop_grace_s: float) -> None:
    """End the engines that a killed agent left, and remove their files. Only what a pid file proves ours is ended."""
    for path in sorted(files.pids.glob("*.json")):
        left = _read_object(path)
        pid, started = left.get("pid"), left.get("start_time")
        if isinstance(pid, int) and pid > 1 and isinstance(started, int) and start_time(pid) == started:
            log.warning("engine.leftover", name=path.name, pid=pid)
            await _end_stranger(pid, started, stop_grace_s)
        _forget(files, path, left.get("api_key_file"))


def _read_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _forget(files: RuntimeDir, pid_file: Path, key_file: object) -> None:
    if isinstance(key_file, str) and Path(key_file).parent == files.keys:
        Path(key_file).unlink(missing_ok=True)
    (files.engines / pid_file.name).unlink(missing_ok=True)
    pid_file.unlink(missing_ok=True)


async def _end_stranger(pid: int, started: int, grace_s: float) -> None:
    """End a process that is not a child of ours, so that its end can only be polled for."""
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        signal_group(pid, number)
        waited_s = 0.0
        while start_time(pid) == started and waited_s < patience_s:
            await asyncio.sleep(POLL_S)
            waited_s += POLL_S
