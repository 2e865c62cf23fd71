"""A node in a network namespace of its own, which is cut off as a pulled cable cuts it off: frames go, nobody answers.

Needs root and iproute2: `impossible` says why it can't be. Unlike the proxy's, this partition is seen by the kernels of
both ends: segments are sent again and again, and what was not lost for too long arrives in the end.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from tests.faults.cluster import CONTROL_FLAGS, NODE_FLAGS, Broken, Pools
from tests.faults.history import Recorder

NOBODY = "02:00:00:00:00:01"  # a hardware address that no interface has


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


def impossible() -> str | None:
    """Why there can be no namespace here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    try:
        with Namespace.made():
            return None
    except (subprocess.SubprocessError, OSError) as error:
        return f"no network namespace can be made here: {error}"


class Namespace:
    """One namespace and the wire to it. The addresses of its two ends are `here` and `there`."""

    def __init__(self) -> None:
        word = secrets.token_hex(3)
        self.name, self._wire, self._far = f"llorch-{word}", f"ll{word}h", f"ll{word}n"
        net = secrets.randbelow(200) + 20
        self.here, self.there = f"10.213.{net}.1", f"10.213.{net}.2"

    @classmethod
    @contextmanager
    def made(cls) -> Iterator[Namespace]:
        space = cls()
        try:
            ip("netns", "add", space.name)
            ip("link", "add", space._wire, "type", "veth", "peer", "name", space._far, "netns", space.name)
            ip("addr", "add", f"{space.here}/30", "dev", space._wire)
            ip("link", "set", space._wire, "up")
            ip("-n", space.name, "addr", "add", f"{space.there}/30", "dev", space._far)
            ip("-n", space.name, "link", "set", space._far, "up")
            ip("-n", space.name, "link", "set", "lo", "up")
            yield space
        finally:
            subprocess.run(["ip", "link", "del", space._wire], capture_output=True, timeout=10, check=False)
            subprocess.run(["ip", "netns", "del", space.name], capture_output=True, timeout=10, check=False)

    # ---- as a link of the cluster: what the harness asks of a proxy

    dead = 0
    resends = True
    url = ""

    def half_open(self, *, new_too: bool = True) -> None:
        ip("neigh", "replace", self.there, "dev", self._wire, "lladdr", NOBODY, "nud", "permanent")
        ip("-n", self.name, "neigh", "replace", self.here, "dev", self._far, "lladdr", NOBODY, "nud", "permanent")

    def heal(self, *, leave_dead: bool = False) -> None:
        ip("neigh", "del", self.there, "dev", self._wire)
        ip("-n", self.name, "neigh", "del", self.here, "dev", self._far)

    async def start(self) -> None:
        """It is there already."""

    async def close(self) -> None:
        """Whoever made it ends it."""


class InNamespace(Broken):
    """The node `a` in a namespace, everybody else and the control here, with TLS: nothing else may leave a loopback."""

    space: Namespace
    cert: tuple[Path, Path]

    def __init__(self, folder: Path, session: aiohttp.ClientSession, recorder: Recorder, pools: Pools) -> None:
        super().__init__(folder, session, recorder, pools)
        self.links = {"a": self.space}  # type: ignore[dict-item]

    @property
    def client_url(self) -> str:
        return f"https://{self.space.here}:{self.port}"

    async def start_control(self) -> None:
        cert, key = (str(path) for path in self.cert)
        flags = ("--tls-cert", cert, "--tls-key", key, *CONTROL_FLAGS)
        await self.cluster.start_control(*flags, host=self.space.here, port=self.port)

    async def start_node(self, node: str) -> None:
        prefix = ("ip", "netns", "exec", self.space.name) if node in self.links else ()
        flags = ("--tls-ca", str(self.cert[0]), *NODE_FLAGS, *self.life(node))
        await self.cluster.start_node(node, self.journaled(node), *flags, prefix=prefix, wait=False)
