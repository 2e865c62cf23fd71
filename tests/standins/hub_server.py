"""A stand-in for the Hugging Face hub: the routes of it that `huggingface_hub` and a fetch of one file use.

    GET /api/models/{org}/{repo}?blobs=true        its files, their sizes and, of large ones, their SHA-256
    GET /{org}/{repo}/resolve/{commit}/{path}      a redirect to where the bytes are, on another host, as there

As documented at https://huggingface.co/docs/hub/api, and as seen in the library's own calls.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import web

from llorch import listen
from tests.standins.blob_server import BlobServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """`repos`: by name, path to bytes. `token`: without it there is nothing. `lies`: digests that are not those."""

    blobs: BlobServer
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    lies: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def _may(self, request: web.Request) -> bool:
        return self.token is None or request.headers.get("Authorization") == f"Bearer {self.token}"

    async def model(self, request: web.Request) -> web.StreamResponse:
        repo = f"{request.match_info['org']}/{request.match_info['repo']}"
        self.asked.append(request.path_qs)
        if self.gated:
            return web.json_response(
                {"error": "gated"}, status=403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}
            )
        if repo not in self.repos or not self._may(request):
            return web.json_response({"error": "none"}, status=401, headers={"X-Error-Code": "RepoNotFound"})
        siblings = []
        for path, data in self.repos[repo].items():
            digest = self.lies.get(path, hashlib.sha256(data).hexdigest())
            lfs = {"lfs": {"sha256": digest, "size": len(data), "pointerSize": 134}} if path.endswith(".gguf") else {}
            siblings.append({"rfilename": path, "size": len(data), "blobId": "0" * 40, **lfs})
        return web.json_response({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []})

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        repo, path = f"{request.match_info['org']}/{request.match_info['repo']}", request.match_info["path"]
        self.asked.append(request.path_qs)
        if path not in self.repos.get(repo, {}) or request.match_info["commit"] != COMMIT or not self._may(request):
            return web.Response(status=404)
        self.blobs.files[f"/{path}"] = self.repos[repo][path]
        other = self.blobs.url.replace("127.0.0.1", "localhost")
        return web.Response(
            status=302, headers={"Location": f"{other}/{path}?X-Signature=a%2Fb", "X-Repo-Commit": COMMIT}
        )


@contextlib.asynccontextmanager
async def hub_server(blobs: BlobServer) -> AsyncIterator[HubServer]:
    hub = HubServer(blobs)
    app = web.Application()
    app.router.add_get("/api/models/{org}/{repo}", hub.model)
    app.router.add_get("/{org}/{repo}/resolve/{commit}/{path:.+}", hub.resolve)
    server = await listen.serve(app, "127.0.0.1", 0, shutdown_timeout_s=0.1)
    hub.url = server.url
    try:
        yield hub
    finally:
        await server.close()
