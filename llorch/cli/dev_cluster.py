"""The processes of one `llorch dev`, seen from it: the keeper, a control, some nodes, and when they are ready.

Owns what the roles are given (flags, an environment with tokens made now, nothing of this machine's own settings) and
the waiting for their ready lines and pools. Ends nothing itself: it lets go of the keeper's pipe, and the keeper ends
everything (see `llorch.cli.keeper`). Only if somebody killed the keeper does it tidy up itself. Tokens travel in the
environment and in that pipe, never in an argument list.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llorch
from llorch.cli import contexts
from llorch.cli.dev_words import role_fault
from llorch.cli.keeper import ROLE_GRACE_S, STRAY_GRACE_S, is_alive
from llorch.cli.output import Failure
from llorch.errors import ConfigError

READY_WITHIN_S = 60.0  # a role that has printed no ready line by then never will
LOOK_EVERY_S = 0.02
CONTEXT = "dev"
CONTEXT_TRIES = 5
_OWN_SETTINGS = ("LLORCH_", "ORCHESTRATORD_", "POOL_MANAGERD_", "NOTIFY_SOCKET")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Made for one run. The admin token is for nobody but whoever reads the context file."""

    api: str = field(repr=False)
    service: str = field(repr=False)
    node: str = field(repr=False)

    @classmethod
    def make(cls) -> Tokens:
        return cls(*(secrets.token_hex(24) for _ in range(3)))


class LogTail:
    """The lines of a role's log as they are written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def new_lines(self) -> list[str]:
        """Whole lines since the last look."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode("utf-8", "replace").splitlines()

    def whole(self) -> str:
        try:
            return self._path.read_text("utf-8", "replace")
        except OSError:
            return ""


class Cluster:
    """Use `starting()`. `ended` has the exit codes of roles that have ended; `changed` is set when one does."""

    def __init__(self, process: asyncio.subprocess.Process, hello: Mapping[str, str], tokens: Tokens) -> None:
        self.state = Path(hello["state"])
        self.identity = hello["keeper"]
        self.tokens = tokens
        self.ended: dict[str, int] = {}
        self._unstarted: dict[str, str] = {}  # why a role's process could not be made
        self.changed = asyncio.Event()
        self._process = process
        self._tails: dict[str, LogTail] = {}
        self._started: list[str] = []  # "pid:start" of each role

    @classmethod
    @contextlib.asynccontextmanager
    async def starting(cls, tokens: Tokens) -> AsyncIterator[Cluster]:
        """A keeper and nothing else yet. When the block ends, everything ends."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "llorch.cli.keeper",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": _python_path()},
        )
        assert process.stdin is not None and process.stdout is not None
        listener: asyncio.Task[None] | None = None
        cluster: Cluster | None = None
        try:
            hello = json.loads(await process.stdout.readline() or "{}")
            if "state" not in hello:
                raise Failure(
                    "the keeper of `llorch dev` did not start",
                    why=hello.get("failed"),
                    hint="TMPDIR=DIR llorch dev, with a directory that can be written and has room",
                )
            cluster = cls(process, hello, tokens)
            listener = asyncio.create_task(cluster._listen(), name="dev.keeper")
            yield cluster
        finally:
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROLE_GRACE_S + STRAY_GRACE_S + 5.0):
                    await process.wait()
            if listener is not None:
                listener.cancel()
                await asyncio.gather(listener, return_exceptions=True)
            if cluster is not None and process.returncode not in (0, None):
                await cluster._clean_up()

    async def _clean_up(self) -> None:
        """What the keeper would have done, had nobody killed it. Its roles were told to end when it did."""
        until = asyncio.get_running_loop().time() + ROLE_GRACE_S
        while any(map(is_alive, self._started)):
            if asyncio.get_running_loop().time() > until:
                break
            await asyncio.sleep(LOOK_EVERY_S)
        for role in filter(is_alive, self._started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(role.partition(":")[0]), signal.SIGKILL)
        with contextlib.suppress(ConfigError):
            known = contexts.load(contexts.contexts_path(os.environ))
            for name, context in known.named.items():
                if context.keeper == self.identity:
                    contexts.remove(contexts.contexts_path(os.environ), name, keeper=self.identity)
        shutil.rmtree(self.state, ignore_errors=True)

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self._heard(json.loads(line))
            self.changed.set()
        self.ended.setdefault("keeper", 0)  # that it has ended is known here, not how
        self.changed.set()

    def _heard(self, message: Mapping[str, Any]) -> None:
        if "started" in message:
            self._started.append(message["role"])
        if "ended" in message:
            self.ended[message["ended"]] = message["code"]
            if message.get("why"):
                self._unstarted[message["ended"]] = message["why"]

    async def _tell(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        await self._process.stdin.drain()

    # ------------------------------------------------------------ roles

    async def start_role(self, name: str, words: list[str]) -> None:
        """`llorch WORDS` as a child of the keeper, its output in `<state>/<name>.log`."""
        await self.start_program(name, "llorch", words)

    async def start_program(self, name: str, module: str, words: list[str]) -> None:
        """`python -m MODULE WORDS`, likewise."""
        self._tails[name] = self.tail(name)
        argv = [sys.executable, "-m", module, *words]
        await self._tell({"start": name, "argv": argv, "env": self.environment()})

    def environment(self) -> dict[str, str]:
        """This process's, without its settings: what is meant for this machine's own roles is not meant for these."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OWN_SETTINGS)}
        return kept | {
            "PYTHONPATH": _python_path(),
            "PYTHONUNBUFFERED": "1",
            "LLORCH_API_TOKEN": self.tokens.api,
            "LLORCH_SERVICE_TOKEN": self.tokens.service,
            "LLORCH_NODE_TOKEN": self.tokens.node,
        }

    async def ready_url(self, name: str) -> str:
        """The URL of a role, from its ready line. Raises Failure if it ends, or takes too long."""
        return await self.said(name, "ready url=")

    async def said(self, name: str, words: str) -> str:
        """What follows `words` on the line that begins with them. Raises Failure as above."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_WITHIN_S):
                while True:
                    ended = name in self.ended  # looked at before the log: its last lines are there then
                    for line in self._tails[name].new_lines():
                        if line.startswith(words):
                            return line.removeprefix(words).strip()
                    if ended or "keeper" in self.ended:
                        raise self.failure(name)
                    await asyncio.sleep(LOOK_EVERY_S)
        raise self.failure(name)

    def failure(self, name: str) -> Failure:
        """Why a role did not get ready: its own words, if it had any."""
        why = self._unstarted.get(name)
        if name == "keeper" or ("keeper" in self.ended and name not in self.ended):
            return Failure("the keeper has ended", hint="somebody ended it, or memory was short")
        fault = role_fault(name, self.ended.get(name), self._tails[name].whole(), why)
        return Failure(fault.message, why=fault.why, hint=fault.hint)

    def engine_log(self, name: str) -> str:
        """What the engines of a node have written, the run before too."""
        logs = sorted((self.state / f"{name}.d" / ".runtime" / "logs").glob("*.log*"), reverse=True)
        return "".join(LogTail(path).whole() for path in logs)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self._tails)

    def tail(self, name: str) -> LogTail:
        return LogTail(self.state / f"{name}.log")

    # ------------------------------------------------------------ the context

    async def add_context(self, url: str) -> tuple[str, bool]:
        """Write a context for this cluster; its name, and whether it is the current one. A context that somebody else
        made, or that another `llorch dev` uses, is left alone: this one gets a number.
        """
        path = contexts.contexts_path(os.environ)
        for _ in range(CONTEXT_TRIES):  # another one that starts now may be faster
            name = _free_name(contexts.load(path))
            # The order is in the keeper's pipe before the context is there: at no moment could it stay behind.
            await self._tell({"context": name, "path": str(path)})
            with contexts.changing(path) as known:
                if name in known.named and not _stale(known.named[name]):
                    continue
                known.named[name] = contexts.Context(url=url, token=self.tokens.api, keeper=self.identity)
                if known.current is None:
                    known.current = name
                return name, known.current == name
        raise Failure("no name for a context is left to this cluster", hint="llorch context ls")


def _stale(context: contexts.Context) -> bool:
    """Left by a `llorch dev` whose keeper was killed."""
    return context.keeper is not None and not is_alive(context.keeper)


def _free_name(known: contexts.Contexts) -> str:
    names = (CONTEXT if number == 1 else f"{CONTEXT}-{number}" for number in range(1, 1000))
    return next(name for name in names if name not in known.named or _stale(known.named[name]))


def _python_path() -> str:
    """Where this very llorch is, first: the roles run it from another directory."""
    own = str(Path(llorch.__file__).resolve().parent.parent)
    return os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])
