"""The harness of the e2e tests: real `llorch` processes on free loopback ports, awaited by their ready lines.

Owns the processes it starts and ends them by pid. Tokens are made at run time and travel in environments only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")

READY_WITHIN_S = 30.0
LOOK_AGAIN_S = 0.001  # what a test waits for is mostly there by then
LOOK_AGAIN_AT_MOST_S = 0.02  # later it is looked for less often, for each look costs its peer as much as a request
SIMULATED = "sim"
SHIM = b"llorch.node.engines.shim"


async def eventually(look: Callable[[], T | Awaitable[T]], *, within_s: float = 10.0, what: str = "") -> T:
    """The first true value that `look` gives. Fails after `within_s`, saying what it saw last."""
    until = time.monotonic() + within_s
    again_s = LOOK_AGAIN_S
    last: Any = None
    while True:
        try:
            last = look()
            if asyncio.iscoroutine(last):
                last = await last
            if last:
                return last  # type: ignore[no-any-return]
        except (aiohttp.ClientError, OSError, AssertionError) as error:
            last = error
        if time.monotonic() > until:
            raise AssertionError(f"not within {within_s} s: {what or look!r}; last seen: {last!r}")
        await asyncio.sleep(again_s)
        again_s = min(1.5 * again_s, LOOK_AGAIN_AT_MOST_S)


def alive(pid: int) -> bool:
    """Whether `pid` runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    """Every living process below `pid`."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: set[int] = set()
    todo = [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            if child not in found:
                found.add(child)
                todo.append(child)
    return found


def belonging(folder: Path) -> set[int]:
    """Every living process of a cluster in `folder`, whoever's child it is by now: those that work there or below it,
    and the shims of its engines, which work nowhere and have a log there. Both stay when their agent goes.
    """
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            cwd = (process / "cwd").readlink()
            if cwd.is_relative_to(folder) or (cwd == Path("/") and _keeps_a_log(process, folder)):
                found.add(int(process.name))
    return {pid for pid in found if alive(pid)}


def _keeps_a_log(process: Path, folder: Path) -> bool:
    if SHIM not in (process / "cmdline").read_bytes().split(b"\0"):
        return False
    return any(opened.readlink().is_relative_to(folder) for opened in (process / "fd").iterdir())


def lasting_port() -> int:
    """A free port that nobody draws while nothing listens on it: it lies below those that the system gives out."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                return port
    raise AssertionError("no port is free between 20000 and 30000")


class Running:
    """One llorch process. Its stderr goes to a file, where the ready line is looked for."""

    def __init__(
        self, name: str, argv: Sequence[str], env: dict[str, str], folder: Path, prefix: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.log = folder / f"{name}-{secrets.token_hex(2)}.log"
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "llorch", *argv],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                cwd=folder,
                start_new_session=True,
            )
        self.url = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    async def ready(self) -> Running:
        def line() -> str | None:
            for text in self.text().splitlines():
                if text.startswith("ready url="):
                    return text.removeprefix("ready url=")
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended: {self.text()}")
            return None

        self.url = await eventually(line, within_s=READY_WITHIN_S, what=f"{self.name} ready\n{self.text()}") or ""
        return self

    def kill(self) -> None:
        """SIGKILL: no word, no cleaning up."""
        self.process.kill()
        self.process.wait()

    async def stop(self, number: int = signal.SIGTERM, *, within_s: float = 20.0) -> int:
        """End it in order and wait. Returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                await eventually(lambda: self.process.poll() is not None, within_s=within_s, what=f"{self.name} ends")
            except AssertionError:
                self.kill()
                raise
        return self.process.wait()


class Cluster:
    """A control, its nodes and a client session."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession) -> None:
        self.folder = folder
        self.session = session
        self.tokens = {
            "LLORCH_API_TOKEN": secrets.token_hex(16),
            "LLORCH_ADMIN_TOKEN": secrets.token_hex(16),
            "LLORCH_SERVICE_TOKEN": secrets.token_hex(16),
            "LLORCH_NODE_TOKEN": secrets.token_hex(16),
        }
        self.control: Running | None = None
        self.nodes: dict[str, Running] = {}
        self._all: list[Running] = []

    @property
    def url(self) -> str:
        assert self.control is not None
        return self.control.url

    @property
    def token(self) -> str:
        return self.tokens["LLORCH_API_TOKEN"]

    def env(self, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return clean | {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), **more}

    def client_env(self) -> dict[str, str]:
        return self.env(LLORCH_URL=self.url, LLORCH_TOKEN=self.token)

    async def start_control(self, *argv: str, port: int = 0, host: str = "127.0.0.1", **env: str) -> Running:
        data = self.folder / "control"
        if not (data / "nodes.json").exists():  # nothing was here before: there is nobody to wait for
            data.mkdir(exist_ok=True)
            (data / "nodes.json").write_text('{"nodes": []}')
        self.control = await self.start(
            "control",
            ["control", "--bind", f"{host}:{port}", "--data-dir", str(self.folder / "control"), *argv],
            **self.tokens,
            **env,
        ).ready()
        return self.control

    def start(self, name: str, argv: Sequence[str], *, prefix: Sequence[str] = (), **env: str) -> Running:
        """`prefix`: a command that becomes the process, as `ip netns exec NAME` does."""
        running = Running(name, argv, self.env(**env), self.folder, prefix)
        self._all.append(running)
        return running

    async def start_node(
        self,
        name: str,
        pools: Sequence[dict[str, Any]] | None = None,
        *argv: str,
        join: str | None = None,
        wait: bool = True,
        prefix: Sequence[str] = (),
        **env: str,
    ) -> Running:
        """A node with `pools` (default: one simulated pool "p0" of model "sim" with 4 slots), and its pools ready.

        `join`: another way to the control than its own URL. Engines end with their agent unless LLORCH_ORPHAN_GRACE
        says otherwise: a test that kills a node is to leave nothing behind.
        """
        if pools is None:
            pools = [simulated()]
        config = self.folder / f"{name}.yaml"
        config.write_text(json.dumps({"pools": list(pools)}))
        running = self.start(
            name,
            [
                "node", "--join", join or self.url, "--node-id", name, "--bind", "127.0.0.1:0",
                "--data-dir", str(self.folder / name), "--config", str(config), "--allow-cpu", *argv,
            ],
            prefix=prefix,
            **{"LLORCH_ORPHAN_GRACE": "0s"} | self.tokens | env,
        )  # fmt: skip
        self.nodes[name] = running
        await running.ready()
        if wait:
            await self.bound(name, len(pools))
        return running

    async def bound(self, name: str, pools: int, *, within_s: float = 30.0) -> None:
        async def look() -> bool:
            node = await self.get(f"/v2/nodes/{name}")
            return len([pool for pool in node["pools"] if pool["bound"]]) >= pools

        await eventually(look, within_s=within_s, what=f"{name}'s pools bound")

    def headers(self, token: str | None = None) -> dict[str, str]:
        return {"Authorization": f"Bearer {token or self.token}"}

    async def get(self, path: str, *, token: str | None = None) -> Any:
        async with self.session.get(self.url + path, headers=self.headers(token)) as response:
            assert response.status == 200, (response.status, await response.text())
            return await response.json(content_type=None)

    async def post(self, path: str, body: Any, *, accept: str = "application/json") -> tuple[int, Any]:
        headers = self.headers() | {"Accept": accept}
        async with self.session.post(self.url + path, json=body, headers=headers) as response:
            text = await response.text()
            return response.status, json.loads(text) if "json" in response.headers.get("Content-Type", "") else text

    async def complete(self, model: str = SIMULATED, tokens: int = 8, **more: Any) -> dict[str, Any]:
        """One native task, waited for."""
        status, task = await self.post("/v2/tasks", {"model": model, "prompt": "go", "max_tokens": tokens, **more})
        assert status == 200, task
        return task  # type: ignore[no-any-return]

    async def close(self) -> None:
        for running in reversed(self._all):
            if running.process.poll() is None:
                with contextlib.suppress(AssertionError):
                    await running.stop(within_s=15.0)


def simulated(pool_id: str = "p0", model: str = SIMULATED, slots: int = 4, *args: str) -> dict[str, Any]:
    return {"id": pool_id, "engine": "simulated", "model": model, "slots": slots, "args": list(args)}


def expected_text(tokens: int, first: int = 0) -> str:
    """What the simulated engine says."""
    return "".join(f"t{i} " for i in range(first, first + tokens))


@contextlib.asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[Cluster]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        running = Cluster(folder, session)
        try:
            yield running
        finally:
            await running.close()
