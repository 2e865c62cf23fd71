"""The cluster that a run breaks: a control, three nodes with three models, a proxy before each way in.

Owns how its parts are found, hit and brought back. Each part is a real process; what an engine did is read from its
journal. Kills and stops go by pid, to processes of this cluster alone: those that work in its folder, wherever they
have gone. A node has one of two lives, drawn from the seed each time it is started: its engines end with their agent,
or they stay and the next agent takes them over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster import Cluster, Running, belonging, descendants, lasting_port, simulated
from tests.faults.history import Recorder
from tests.faults.proxy import Proxy

GRACE_S = 3.0  # of a native task whose reader left
EARLY_GRACE_S = 10.0  # the same before its first byte, at the control
RECOVERY_S = 4.0
RECONNECT_S = 5.0
OFFLINE_S = 6.0  # longer than a lost connection is waited for, as by default
LOG_LIMIT_BYTES = 64 * 1024
TTFT_S = 3.0
ORPHAN_GRACE_S = 60.0  # of engines that stay: longer than any node is away
KEPT = 0.5  # of the lives of a node: that its engines stay when it goes
ENDED_WITHIN_S = 5.0  # a shim that is told to, with its engine: after 1 s it kills it

CONTROL_FLAGS = (
    "--heartbeat-interval", "500ms", "--offline-after", f"{OFFLINE_S:g}s", "--recovery-window", f"{RECOVERY_S:g}s",
    "--shutdown-grace", "1s", "--slow-reader-timeout", "1500ms", "--ttft-timeout", f"{TTFT_S:g}s",
)  # fmt: skip
NODE_FLAGS = (
    "--reconnect-grace", f"{GRACE_S:g}s", "--log-limit", f"{LOG_LIMIT_BYTES // 1024}KiB", "--stop-grace", "1s",
    "--shutdown-grace", "1s", "--log-level", "debug",
)  # fmt: skip

Pools = dict[str, list[dict[str, Any]]]


def usual_pools() -> Pools:
    """Three nodes: `sim` on all; `odd`, whose engines have the faults that a request names, save on b; `bulk` on b."""
    steady = ("--tokens", "100000", "--ttft-ms", "60", "--delay-ms", "15")
    quick = ("--tokens", "100000", "--ttft-ms", "20", "--delay-ms", "0")
    return {
        "a": [simulated("p0", "sim", 4, *steady), simulated("p1", "odd", 2, *steady, "--obey")],
        "b": [
            simulated("p0", "sim", 4, *steady),
            simulated("p1", "odd", 2, *steady),
            simulated("p2", "bulk", 2, *quick),
        ],
        "c": [simulated("p0", "sim", 4, *steady), simulated("p1", "odd", 2, *steady, "--obey")],
    }


class Broken:
    """A cluster and the ways in which it can be broken."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession, recorder: Recorder, pools: Pools) -> None:
        self.cluster = Cluster(folder.resolve(), session)
        self.recorder = recorder
        self.pools = pools
        self.port = lasting_port()
        self.tls_ca: str | None = None
        self.seed = 0
        self._lives: dict[str, int] = {}
        self.keeps: dict[str, bool] = {}  # whether a node's engines stay when it goes, of its present life
        self.clients = Proxy(lambda: self.port)
        self.links = {node: Proxy(lambda: self.port) for node in pools}
        self.journals = {f"{node}/{pool['id']}": folder / f"journal-{node}-{pool['id']}" for node, pool in self.each()}
        self._read: dict[str, int] = dict.fromkeys(self.journals, 0)
        self.running: dict[str, str] = {}  # marker → pool, of what engines run now

    def each(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for node, pools in self.pools.items():
            for pool in pools:
                yield node, pool

    def facts(self) -> dict[str, Any]:
        return {
            f"{node}/{pool['id']}": {
                "node": node, "model": pool["model"], "slots": pool["slots"], "obeys": "--obey" in pool["args"],
            }
            for node, pool in self.each()
        }  # fmt: skip

    @property
    def client_url(self) -> str:
        return self.clients.url

    # ---- life

    async def start(self) -> None:
        await self.clients.start()
        for proxy in self.links.values():
            await proxy.start()
        await self.start_control()
        await asyncio.gather(*(self.start_node(node) for node in self.pools))
        for node, pools in self.pools.items():
            await self.cluster.bound(node, len(pools))

    async def start_control(self) -> None:
        await self.cluster.start_control(*CONTROL_FLAGS, port=self.port)

    async def start_node(self, node: str) -> None:
        await self.cluster.start_node(
            node, self.journaled(node), *NODE_FLAGS, *self.life(node), join=self.links[node].url, wait=False
        )

    def life(self, node: str) -> tuple[str, ...]:
        """What becomes of its engines when a node that is started now goes: the same for the same seed."""
        number = self._lives[node] = self._lives.get(node, 0) + 1
        keeps = self.keeps[node] = random.Random(f"{self.seed}/{node}/{number}").random() < KEPT
        self.recorder.note("life", node=node, number=number, keeps=keeps)
        return ("--orphan-grace", f"{ORPHAN_GRACE_S:g}s", "--keep-engines") if keeps else ("--orphan-grace", "0s")

    def journaled(self, node: str) -> list[dict[str, Any]]:
        """A node's pools, with engines that keep their journals."""
        return [
            {**pool, "args": [*pool["args"], "--journal", str(self.journals[f"{node}/{pool['id']}"])]}
            for pool in self.pools[node]
        ]

    async def close(self) -> None:
        await self.clients.close()
        for proxy in self.links.values():
            await proxy.close()
        for running in self.parts():
            with contextlib.suppress(ProcessLookupError):
                running.process.send_signal(signal.SIGCONT)
        await self.cluster.close()
        await self.end_kept()

    async def end_kept(self) -> None:
        """The engines that their agents have left: each is ended by its shim. What does not is killed, and told."""
        folder = self.cluster.folder
        kept = {int(shim["pid"]) for file in self.engine_files() if (shim := file.get("shim"))} & belonging(folder)
        for pid in kept:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + ENDED_WITHIN_S
        while (left := belonging(folder)) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self.recorder.note("ended", asked=len(kept), left={pid: _argv(pid) for pid in left})
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # ---- its parts

    @property
    def control(self) -> Running:
        assert self.cluster.control is not None
        return self.cluster.control

    def parts(self) -> list[Running]:
        return [self.control, *self.cluster.nodes.values()] if self.cluster.control is not None else []

    def engines(self, node: str) -> dict[str, list[int]]:
        """The engine processes of each of a node's pools, by the journals that they are started with."""
        found: dict[str, list[int]] = {f"{node}/{pool['id']}": [] for pool in self.pools[node]}
        for pid in belonging(self.cluster.folder):
            argv = _argv(pid)
            if "llorch.node.engines.simulated_server" in argv and "--journal" in argv:
                journal = Path(argv[argv.index("--journal") + 1])
                pool = next(pool for pool, path in self.journals.items() if path == journal)
                if pool in found:
                    found[pool].append(pid)
        return found

    def engine_files(self) -> Iterator[dict[str, Any]]:
        """What the pid files of all engines say."""
        for path in self.cluster.folder.glob("*/.runtime/pids/*.json"):
            with contextlib.suppress(OSError, ValueError):
                yield json.loads(path.read_text())

    def strangers(self) -> list[int]:
        """Processes of this cluster that belong to no living part: not even as an engine that an agent has claimed."""
        living = {running.pid for running in self.parts() if running.process.poll() is None}
        ours = living.union(*map(descendants, living))
        for file in self.engine_files():
            if (file.get("agent") or {}).get("pid") in living:
                shim = int((file.get("shim") or {}).get("pid", 0))
                ours |= {shim} | (descendants(shim) if shim else set())
        return sorted((belonging(self.cluster.folder) | descendants(os.getpid())) - ours)

    def read_journals(self) -> None:
        """Take over the whole lines that engines have written since."""
        for pool, path in self.journals.items():
            if not path.exists():
                continue
            with path.open("rb") as lines:
                lines.seek(self._read[pool])
                data = lines.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[pool] += len(whole)
            for line in whole.splitlines():
                entry = json.loads(line)
                self.recorder.add({"what": "engine", "pool": pool, **entry})
                if entry["step"] in ("serving", "dead"):  # what the one before it ran died with it
                    self.running = {name: where for name, where in self.running.items() if where != pool}
                marker = entry.get("marker")
                if marker is not None and entry["step"] == "arrived":
                    self.running[marker] = pool
                elif marker is not None and self.running.get(marker) == pool:
                    del self.running[marker]

    async def watch_journals(self) -> None:
        while True:
            self.read_journals()
            await asyncio.sleep(0.02)

    async def look(self) -> dict[str, list[Any]] | None:
        """The pools as the control sees them: [slots_total, slots_free, in_flight, bound, state]; None: it is away."""
        try:
            async with asyncio.timeout(2.0):
                nodes = await self.cluster.get("/v2/nodes")
        except (aiohttp.ClientError, OSError, TimeoutError, AssertionError):
            return None
        return {
            f"{node['node_id']}/{pool['pool_id']}": [
                pool["slots_total"], pool["slots_free"], pool["in_flight"],
                bool(pool["bound"] and node["online"] and node["reachable"]), pool["state"],
            ]
            for node in nodes["nodes"]
            for pool in node["pools"]
        }  # fmt: skip

    async def queued(self) -> float | None:
        """How many tasks wait, by the control's own metric."""
        url = self.cluster.url + "/metrics"
        try:
            async with asyncio.timeout(2.0), self.cluster.session.get(url, headers=self.cluster.headers()) as answer:
                lines = (await answer.text()).splitlines()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("llorch_queue_depth{"))

    # ---- hits: each returns when the part works again, as far as a process can

    async def kill_control(self, after_s: float, number: int = signal.SIGKILL) -> None:
        await _end(self.control, number)
        await asyncio.sleep(after_s)
        await self.start_control()

    async def kill_node(self, node: str, after_s: float, number: int = signal.SIGKILL) -> None:
        running, keeps, before = self.cluster.nodes[node], self.keeps[node], self.engines(node)
        await _end(running, number)
        self.recorder.note("went", node=node, keeps=keeps, engines=before)
        await asyncio.sleep(after_s)
        await self.start_node(node)

    async def kill_engine(self, pool: str, *, by_shim: bool = False) -> None:
        """`by_shim`: its shim is killed, and it has to go with it."""
        for pid in self.engines(pool.partition("/")[0])[pool]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(_parent(pid) if by_shim else pid, signal.SIGKILL)

    async def stop(self, pids: list[int], for_s: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(for_s)
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


async def _end(running: Running, number: int) -> None:
    if number == signal.SIGKILL:
        running.kill()
        return
    running.process.send_signal(number)
    until = time.monotonic() + 15.0
    while running.process.poll() is None:
        if time.monotonic() > until:
            running.kill()
            raise AssertionError(f"{running.name} did not end within 15 s of SIGTERM")
        await asyncio.sleep(0.02)


def _parent(pid: int) -> int:
    """Raises ProcessLookupError for one that has gone, or is nobody's child."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        raise ProcessLookupError(pid) from None
    if parent <= 1:
        raise ProcessLookupError(pid)
    return parent


def _argv(pid: int) -> list[str]:
    """Empty of one that has gone."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return []
