"""What the proofs share: a verdict in few lines, looks at engines and nodes, raw clients that leave as they like."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster import Cluster, Running

PAGE = 4096


@dataclass
class Verdict:
    """The figures of one proof, and whether it holds."""

    name: str
    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def figure(self, text: str) -> None:
        self.lines.append(f"     {text}")

    def check(self, holds: bool, text: str) -> None:
        """One claim, with its figure in the words."""
        self.lines.append(f"{'ok  ' if holds else 'FAILS'} {text}")
        if not holds:
            self.failures.append(text)

    @property
    def holds(self) -> bool:
        return not self.failures

    def text(self) -> str:
        return "\n".join([f"{self.name}: {'holds' if self.holds else 'DOES NOT HOLD'}", *self.lines])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: Sequence[float], unit: str = "s", digits: int = 3) -> str:
    """median, p95, p99 and the largest, in words."""
    if not values:
        return "no values"
    named = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
    said = " ".join(f"{name} {percentile(values, share):.{digits}f}" for name, share in named)
    return f"{said} {unit} (n={len(values)})"


def rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * PAGE


def cpu_s(pid: int) -> float:
    """The processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- engines and nodes


class Engine:
    """The engine of a pool, asked directly: where it listens and its key are in its handoff file."""

    def __init__(self, cluster: Cluster, node: str, pool: str = "p0") -> None:
        handoff = json.loads((cluster.folder / node / ".runtime" / "engines" / f"{pool}-r0.json").read_text())
        self._session = cluster.session
        self.url = handoff["url"]
        key_file = handoff.get("api_key_file")
        self._headers = {"Authorization": f"Bearer {Path(key_file).read_text().strip()}"} if key_file else {}

    async def get(self, path: str) -> Any:
        async with self._session.get(self.url + path, headers=self._headers) as response:
            assert response.status == 200, (path, response.status)
            return await response.json(content_type=None)

    async def active(self) -> int:
        """How many of its slots generate now."""
        return sum(bool(slot["is_processing"]) for slot in await self.get("/slots"))


async def node_tasks(cluster: Cluster, node: Running) -> list[dict[str, Any]]:
    """The node's own reports of its tasks."""
    headers = cluster.headers(cluster.tokens["LLORCH_SERVICE_TOKEN"])
    async with cluster.session.get(node.url + "/v2/tasks", headers=headers) as response:
        tasks: list[dict[str, Any]] = (await response.json())["tasks"]
        return tasks


def wall_of(text: str | None) -> float:
    """A report's time; one that is not there yet lies ahead of all."""
    return float("inf") if text is None else datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


# ---------------------------------------------------------------- raw clients


class RawClient:
    """One request on a connection of its own, read as far as wished, and left without a word."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer
        self.got = b""

    @classmethod
    async def post(cls, url: str, path: str, token: str, body: object, **headers: str) -> RawClient:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        raw = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}", f"Content-Length: {len(raw)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + raw)
        await writer.drain()
        return cls(reader, writer)

    async def until(self, mark: bytes, count: int = 1, within_s: float = 30.0) -> None:
        """Read until `mark` has come `count` times."""
        async with asyncio.timeout(within_s):
            while self.got.count(mark) < count:
                data = await self.reader.read(65_536)
                assert data, f"it ended early: {self.got[-300:]!r}"
                self.got += data

    def leave(self, *, reset: bool = False) -> None:
        """Close the connection: with a FIN, or with an RST."""
        if reset:
            sock: socket.socket = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def sampled(look: Any, every_s: float = 0.01) -> AsyncIterator[list[tuple[float, Any]]]:
    """(time, value) of `look()` as long as the block lasts."""
    samples: list[tuple[float, Any]] = []

    async def loop() -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                value = await look()
                samples.append((time.monotonic(), value))
            await asyncio.sleep(every_s)

    task = asyncio.ensure_future(loop())
    try:
        yield samples
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
