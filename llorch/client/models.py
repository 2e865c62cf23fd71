"""The models of a cluster, through one client: where they are, and having them staged, verified and removed.

Owns those routes. Every call may be repeated: a control finds the job that does the same already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import quote

from llorch.client.api import LlorchClient

REMOVE_TIMEOUT_S = 90.0  # the control gives the node 60 s

Nodes = Literal["all"] | Sequence[str]


class Models:
    def __init__(self, client: LlorchClient) -> None:
        self._client = client

    async def catalog(self) -> dict[str, Any]:
        """`{models: {id: ...}, nodes: {id: ...}}`"""
        return await self._client.call("GET", "/v2/catalog")

    async def stage(self, model: str, nodes: Nodes = "all", source: str | None = None) -> dict[str, Any]:
        """Have `model`, a reference or an id, on `nodes`; the job, which goes on by itself. `source`: the node that
        the others are to fetch it from."""
        wish: dict[str, Any] = {"model": model, "nodes": _listed(nodes)}
        return await self._client.call("POST", "/v2/catalog/stage", wish | ({} if source is None else {"from": source}))

    async def stage_job(self, job_id: str) -> dict[str, Any]:
        return await self._client.call("GET", f"/v2/catalog/stage/{_segment(job_id)}")

    async def verify(self, model: str | None = None, nodes: Nodes = "all") -> dict[str, Any]:
        """Have the files of `model`, or of all, read again and compared; the job."""
        return await self._client.call("POST", "/v2/catalog/verify", {"model": model, "nodes": _listed(nodes)})

    async def verify_job(self, job_id: str) -> dict[str, Any]:
        return await self._client.call("GET", f"/v2/catalog/verify/{_segment(job_id)}")

    async def remove(self, node_id: str, model: str, *, retire: bool = False) -> dict[str, Any]:
        """Remove a model's files from a node; `retire`: keep them, and offer it no more."""
        path = f"/v2/catalog/{_segment(node_id)}/{_segment(model)}{'?retire=true' if retire else ''}"
        return await self._client.call("DELETE", path, timeout_s=REMOVE_TIMEOUT_S)


def _listed(nodes: Nodes) -> str | list[str]:
    return nodes if isinstance(nodes, str) else list(nodes)


def _segment(word: str) -> str:
    return quote(word, safe="")
