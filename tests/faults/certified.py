"""The same cluster with an authority of its own: nodes join with tokens, and every way is TLS with certificates.

Nobody holds a shared node token; the proxies pass on what they can't read.
"""

from __future__ import annotations

import time
from pathlib import Path

import aiohttp

from llorch.control.authority import Authority
from llorch.control.token_files import TokenFiles
from llorch.tokens import Kind, Wish
from tests.faults.cluster import CONTROL_FLAGS, NODE_FLAGS, Broken, Pools
from tests.faults.history import Recorder


def _beside(folder: Path) -> Path:
    """Where the authority is made: a run empties its own folder first."""
    return folder.with_name(f"{folder.name}-authority")


def authority_of(folder: Path) -> str:
    """The file with the authority of the cluster that will be in `folder`."""
    made, _ = Authority.open(_beside(folder), None, time.time())
    path = _beside(folder) / "ca.pem"
    path.write_bytes(made.trust.bundle_pem)
    return str(path)


class Certified(Broken):
    def __init__(self, folder: Path, session: aiohttp.ClientSession, recorder: Recorder, pools: Pools) -> None:
        super().__init__(folder, session, recorder, pools)
        for shared in ("LLORCH_NODE_TOKEN", "LLORCH_SERVICE_TOKEN"):
            del self.cluster.tokens[shared]
        self._data = folder / "control"
        made, _ = Authority.open(_beside(folder), None, time.time())
        Authority.take_over(self._data, made.export(), None, force=False)
        (self._data / "nodes.json").write_text('{"nodes": []}')  # nobody was here before
        self._joined: set[str] = set()

    @property
    def client_url(self) -> str:
        return self.clients.url.replace("http://", "https://")

    async def start_control(self) -> None:
        await self.cluster.start_control("--tls", "on", *CONTROL_FLAGS, port=self.port)

    async def start_node(self, node: str) -> None:
        """With a join token the first time; later it has its certificate."""
        env = {} if node in self._joined else {"LLORCH_JOIN_TOKEN": self._token(node)}
        self._joined.add(node)
        join = self.links[node].url.replace("http://", "https://")
        await self.cluster.start_node(
            node, self.journaled(node), *NODE_FLAGS, *self.life(node), join=join, wait=False, **env
        )

    def _token(self, node: str) -> str:
        digest = Authority.open(self._data, None, time.time())[0].trust.digest
        return TokenFiles(self._data).new(Wish(kind=Kind.JOIN, uses=1, node_id=node), time.time(), digest)[1]
