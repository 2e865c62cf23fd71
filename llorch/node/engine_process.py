"""One engine of ours as its agent sees it, and the files that belong to it, from its start or adoption to its end.

Surface:
    EngineProcess(files, name, ...)     a port and a key for an engine; start(), wait(), terminate(), release()
    EngineProcess.adopt(files, left)    the same for an engine that an earlier agent has left
    RuntimeDir                          where things are under the runtime directory

Owns the port, the API key of this start, and the claim in the pid file. The engine itself is kept by its shim
(`engines/shim.py`), which lives as long as it does and longer than an agent may. Never decides whether an engine should
run.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import llorch
from llorch import whole_file
from llorch.errors import Code, LlorchError
from llorch.logs import Log, printable
from llorch.node.engine_record import Left
from llorch.node.engines import shim_files
from llorch.node.engines.environment import for_engine
from llorch.node.engines.shim_linux import start_time
from llorch.node.engines.spec import LOOPBACK, Launch
from llorch.node.listeners import Holder, holder, session
from llorch.node.process_hold import ProcessHold

SHIM = "llorch.node.engines.shim"
ENGINE_MARK = "STARTED_BY_LLORCH"  # in the environment of an engine and of all that it starts: the name of its key file
START_WITHIN_S = 30.0  # for the shim, on the slowest of machines; the engine may take longer to load
BACKSTOP_S = 10.0  # beyond the grace, for the shim to end what has not ended
STUCK_S = 5.0  # after SIGKILL: what is still there is stuck in the kernel
PORT_FIRST_S, PORT_MOST_S = 0.1, 2.0  # between two looks at who listens on the port
MAX_LINE_CHARS = 300
SHIM_ENV = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")

log = Log("engines")


class RuntimeDir:
    """Where things are under the node's runtime directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()  # engines get these paths, and have working directories of their own choice
        self.engines = self.root / "engines"
        self.pids = self.root / "pids"
        self.ends = self.root / "ends"  # how engines ended, until somebody has read it
        self.logs = self.root / "logs"
        self.keys = self.root / "keys"

    def make(self) -> None:
        for directory in (self.root, self.engines, self.pids, self.ends, self.logs, self.keys):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def free_port() -> int:
    """A loopback port nobody listens on now. Should another take it first, the engine is ended and gets a new one."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        return int(sock.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Ended:
    """How an engine ended, for people; the last line it said, which may quote what it was asked; and whether the kernel
    killed it for memory.
    """

    how: str
    said: str = ""
    oom: bool = False


class EngineProcess:
    """An engine of ours. `pid` is the engine's own, None before its start."""

    def __init__(
        self,
        files: RuntimeDir,
        name: str,
        *,
        stop_grace_s: float,
        orphan_grace_s: float,
        ids: Mapping[str, str],
        left: Left | None = None,
    ) -> None:
        """`name` is that of its handoff file; `ids` go with everything that is logged of it. Raises LlorchError."""
        self._files = files
        self._name = name
        self._stop_grace_s = stop_grace_s
        self._orphan_grace_s = orphan_grace_s if sys.platform == "linux" else 0.0  # elsewhere none could be adopted
        self._ids = ids
        self._ending, self._released = asyncio.Event(), asyncio.Event()
        self._shim: ProcessHold | None = None
        self._engine: ProcessHold | None = None
        self._port_is_its = False
        self._port_taken = False
        self.pid: int | None = None
        stem = name.removesuffix(".json")
        self.log_file = files.logs / f"{stem}.log"
        if left is not None and left.record is not None:
            self.port, self.key_file = left.record.port, Path(left.record.api_key_file)
            return
        self.key_file = files.keys / f"{stem}-{secrets.token_hex(4)}.key"
        try:
            self.port = free_port()
            # In hex, for a key on somebody's command line must not look like a flag of its own.
            whole_file.replace(self.key_file, secrets.token_hex(32).encode() + b"\n", durable=False)
        except OSError as error:
            raise _unwritable("the engine's key", str(files.keys), error.strerror) from None

    # ------------------------------------------------------------ start and adoption

    async def start(
        self, launch: Launch, env: Mapping[str, str], *, meta: Mapping[str, object] = MappingProxyType({})
    ) -> None:
        """`env` is the agent's own environment, `meta` a JSON object for the next agent. Raises LlorchError, OSError
        when the shim can't itself be started, ValueError for what no program can be given.
        """
        environment = for_engine(env) | dict(launch.env) | {ENGINE_MARK: self.key_file.name}
        if launch.key_env is not None:
            environment[launch.key_env] = self.key_file.read_text().strip()
        for word in (*launch.argv, *environment, *environment.values()):
            if b"\0" in os.fsencode(word):
                raise ValueError("a NUL in an argument or in the environment")
        wish = {
            "argv": launch.argv,
            "env": environment,
            "files": {
                "pid": str(self._files.pids / self._name),
                "end": str(self._files.ends / self._name),
                "handoff": str(self._files.engines / self._name),
                "key": str(self.key_file),
                "log": str(self.log_file),
            },
            "record": {
                "port": self.port,
                "api_key_file": str(self.key_file),
                "log": str(self.log_file),
                **self._claim(),
                "meta": dict(meta),
            },
        }
        child = subprocess.Popen(  # noqa: ASYNC220 - a millisecond, and from here on it can be ended
            [sys.executable, "-S", "-P", "-m", SHIM, self._name.removesuffix(".json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_shim_env(env), start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_WITHIN_S):
                said = await asyncio.to_thread(_converse, child, json.dumps(wish).encode())
            self.pid, started = _engine_of(said, launch.argv[0])
        except BaseException as error:
            child.kill()  # and its engine with it
            child.wait()
            if isinstance(error, TimeoutError):
                raise LlorchError(
                    Code.ENGINE_FAILED, f"the engine's shim did not start within {START_WITHIN_S:.0f} s"
                ) from None
            raise
        self._shim = ProcessHold(child.pid, start_time(child.pid), child)
        self._engine = ProcessHold(self.pid, started)
        log.info("engine.started", **self._ids, pid=self.pid, port=self.port)

    @classmethod
    def adopt(
        cls, files: RuntimeDir, left: Left, *, stop_grace_s: float, orphan_grace_s: float, ids: Mapping[str, str]
    ) -> EngineProcess:
        """Claim an engine that `adoption` has proved to be ours. Raises LlorchError if it has ended since."""
        graces = {"stop_grace_s": stop_grace_s, "orphan_grace_s": orphan_grace_s}
        process = cls(files, left.name, **graces, ids=ids, left=left)
        record = left.record
        assert record is not None and record.engine is not None and record.shim is not None  # it was proved
        process.pid = record.engine.pid
        process._shim = ProcessHold(record.shim.pid, record.shim.start_time)
        process._engine = ProcessHold(record.engine.pid, record.engine.start_time)
        try:
            claimed = process._shim.alive() and process._change(process._claim())
        except OSError as error:
            process._let_go()
            raise _unwritable("the engine's pid file", str(files.pids), error.strerror) from None
        if not claimed:
            process._let_go()
            raise LlorchError(Code.ENGINE_FAILED, "the engine has just ended")
        log.info("engine.adopted", **ids, pid=process.pid, port=process.port)
        return process

    def _claim(self) -> dict[str, object]:
        """What of the pid file is this agent's to say."""
        return {
            "agent": {"pid": os.getpid(), "start_time": start_time(os.getpid())},
            "stop_grace_s": self._stop_grace_s,
            "orphan_grace_s": self._orphan_grace_s,
        }

    def _change(self, fields: Mapping[str, object]) -> bool:
        """Change the pid file, if it is still this engine's. Raises OSError."""
        path = str(self._files.pids / self._name)
        with shim_files.Locked(str(self._files.pids)):
            content = shim_files.read(path)
            if content.get("pid") != self.pid:
                return False
            shim_files.replace(path, content | dict(fields))
            return True

    # ------------------------------------------------------------ its port

    async def port_holder(self) -> Holder:
        """Whose the port is. Before it is `Holder.ITS` (or UNKNOWN, where nobody can tell) no key may be sent there."""
        if self._port_is_its:
            return Holder.ITS
        if self.pid is None:
            return Holder.NOBODY
        found = await asyncio.to_thread(holder, self.pid, self.port)
        self._port_is_its = found is Holder.ITS
        return found

    async def _watch_port(self) -> None:
        """Until the port is the engine's own; returns early, and for good, if somebody else has taken it."""
        pause_s = PORT_FIRST_S
        while (found := await self.port_holder()) is Holder.NOBODY:
            await asyncio.sleep(pause_s)
            pause_s = min(PORT_MOST_S, pause_s * 2)
        if found is Holder.OTHER and await self.port_holder() is Holder.OTHER:  # a socket may be handed on in between
            self._port_taken = True
            self.terminate()

    # ------------------------------------------------------------ its end

    def terminate(self) -> None:
        """Ask it to end; `wait` sees to it that it does."""
        self._ending.set()

    def release(self) -> None:
        """Leave it running for the next agent, which has as long as the orphan grace from now on. `wait` returns."""
        with contextlib.suppress(OSError):  # then the shim sees for itself when this process has ended
            self._change({"agent": None})
        self._released.set()

    async def wait(self) -> Ended:
        """Until it has ended, by itself or because `terminate` was called; or until `release`.

        Cancelled, it has the engine ended at once: nobody is left to look after it.
        """
        shim = self._shim
        assert shim is not None  # start() came first
        ended = asyncio.ensure_future(shim.ended())
        asked, released = (asyncio.ensure_future(event.wait()) for event in (self._ending, self._released))
        port = asyncio.ensure_future(self._watch_port())
        try:
            await asyncio.wait((ended, asked, released), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and not self._released.is_set():
                shim.signal(signal.SIGTERM)
                patience_s = self._stop_grace_s + BACKSTOP_S
                await asyncio.wait((ended, released), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and self._released.is_set():
                return Ended("it was left running for the next agent")
            if not ended.done():
                log.warning("engine.killed", **self._ids, pid=self.pid, grace_s=self._stop_grace_s)
            return await self._after()
        finally:
            if not ended.done() and not self._released.is_set():
                shim.signal(signal.SIGUSR1)
            for task in (ended, asked, released, port):
                task.cancel()
            self._let_go()

    async def _after(self) -> Ended:
        """See to it that nothing is left, and find out how it ended."""
        assert self._shim is not None and self._engine is not None  # start() came first
        killed = self._shim.alive()
        gone = await end_all(self._shim, self._engine)
        told = shim_files.read(str(self._files.ends / self._name))
        if told.get("pid") != self.pid:
            told = {}
        ended = _ended(told, self._shim.returncode)
        if not gone:
            ended = Ended("it can't be ended: it is stuck in the kernel", ended.said)
        elif killed:
            ended = Ended(f"{ended.how}: its shim did not end it in time", ended.said)
        elif self._port_taken:
            ended = Ended(f"another program listens on its port {self.port}", ended.said)
        log.info("engine.exited", **self._ids, pid=self.pid, how=ended.how, asked=self._ending.is_set())
        return ended

    def _let_go(self) -> None:
        for hold in (self._shim, self._engine):
            if hold is not None:
                hold.close()

    def remove_files(self) -> None:
        """Its handoff, pid, end and key files; the log stays for people. Nothing that was left running is touched."""
        if self._released.is_set():
            return
        folders = (self._files.engines, self._files.pids, self._files.ends)
        for path in (*(folder / self._name for folder in folders), self.key_file):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.error("engine.file_left", **self._ids, file=str(path), reason=error.strerror)


async def end_all(shim: ProcessHold, engine: ProcessHold) -> bool:
    """End a shim that is late, and what it has left behind if it was killed. Whether all of it has gone."""
    if shim.alive():
        shim.signal(signal.SIGKILL)
    signal_session(engine)  # the shim's death is its engine's, but not that of the engine's children
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STUCK_S):
            await engine.ended()
            await shim.ended()
    return not engine.alive() and not shim.alive()


def signal_session(engine: ProcessHold, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal an engine and its session, which has its pid as its number. That is no other's as long as one is in it;
    should there be a process with this pid that is not the engine, then none was.
    """
    others = [member for member in session(engine.pid) if member != engine.pid]
    if not engine.alive() and start_time(engine.pid) is not None:
        return
    engine.signal(number)
    for member in others:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(member, number)


def _shim_env(env: Mapping[str, str]) -> dict[str, str]:
    kept = {name: env[name] for name in SHIM_ENV if name in env}
    return kept | {"PYTHONPATH": str(Path(llorch.__file__).parent.parent)}


def _converse(child: subprocess.Popen[bytes], wish: bytes) -> bytes:
    """Tell a shim what to keep, and hear what came of it. Nothing: it has ended without a word."""
    assert child.stdin is not None and child.stdout is not None  # it was started so
    with child.stdin, child.stdout:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(wish)
            child.stdin.close()
        return child.stdout.readline()


def _engine_of(said: bytes, program: str) -> tuple[int, int | None]:
    """Pid and start time of the engine. Raises LlorchError when there is none."""
    try:
        told = json.loads(said)
    except ValueError:
        raise LlorchError(Code.ENGINE_FAILED, "the engine's shim could not be started") from None
    if "error" not in told:
        return told["pid"], told["start_time"]
    why = f"{told['reason']}"
    match told["error"], told["errno"]:
        case "program", errno.ENOENT | errno.ENOTDIR:
            raise LlorchError(
                Code.ENGINE_FAILED, f"there is no program {program}", hint="install it, or correct the pool's settings"
            )
        case "program", errno.EACCES | errno.EPERM:
            raise LlorchError(
                Code.ENGINE_FAILED, f"{program} may not be run", hint="make it executable for the agent's user"
            )
        case "program", errno.ENOEXEC:
            raise LlorchError(Code.ENGINE_FAILED, f"{program} is no program for this machine")
        case "log", _:
            raise _unwritable("the engine's log", told["path"], why)
        case "record", errno.EEXIST:
            raise LlorchError(Code.ENGINE_FAILED, "an engine of this name is still running")
        case "record", _:
            raise _unwritable("the engine's pid file", told["path"], why)
    raise LlorchError(Code.ENGINE_FAILED, f"{program} could not be started: {why}")


def _unwritable(what: str, path: str, why: str | None) -> LlorchError:
    return LlorchError(
        Code.ENGINE_FAILED,
        f"{what} can't be written to {path}: {why}",
        hint="see that the node's runtime directory is writable for its user, and that the disk is not full",
    )


def _ended(told: Mapping[str, object], code: int | None) -> Ended:
    """From what a shim has recorded, else from its own exit code, which is what shells make of the engine's."""
    number, exit_code = told.get("signal"), told.get("exit_code")
    lines = told.get("last")
    said = next((str(line) for line in reversed(lines) if str(line).strip()), "") if isinstance(lines, list) else ""
    said = printable(said)[:MAX_LINE_CHARS]
    if not told and code is not None and code >= 0:
        number, exit_code = (code - 128, None) if code > 128 else (None, code)
    if isinstance(number, int):
        how = f"killed by {_signal_name(number)}"
    elif isinstance(exit_code, int):
        how = f"exited with code {exit_code}"
    elif code is not None:
        how = f"its shim was killed by {_signal_name(-code)}"
    else:
        how = "ended, nobody knows how"
    oom = told.get("oom") is True
    return Ended(f"{how}: out of memory" if oom else how, said, oom)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
