"""Where a model can be had: other nodes that a control named, then where its reference points to.

Owns how each kind of source is asked which files the model has there. The bytes are `staging_http`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

import aiohttp

from llorch.config_kinds import URL, BadValue
from llorch.errors import Code, LlorchError
from llorch.messages import decode_object, parse
from llorch.node.catalog import STAGE_HINT
from llorch.node.catalog_file import BlobListing
from llorch.node.peers import Peers
from llorch.node.staging_http import Remote
from llorch.reach import why_unreachable
from llorch.wishes import StageOrder, StageSource

LISTING_TIMEOUT_S = 20.0
MAX_LISTING_BYTES = 1024 * 1024


class Source(Protocol):
    """One place. `cached`: files, by name, that are on this machine already, in somebody else's keeping."""

    @property
    def label(self) -> str: ...
    @property
    def cached(self) -> Mapping[str, Path]: ...
    async def files(self) -> Sequence[Remote]: ...


def sources_of(order: StageOrder, model: str, session: aiohttp.ClientSession, peers: Peers) -> Iterator[Source]:
    for source in order.sources:
        yield OtherNode(source, model, session, peers)
    origin = _origin(order)
    if not (order.sources and isinstance(origin, Nowhere)):  # what the nodes said tells more
        yield origin


def _origin(order: StageOrder) -> Source:
    if order.ref.startswith("hf:"):
        return Hub(order.ref)
    if order.ref.startswith(("https:", "http:")):
        return Web(order.ref)
    return Nowhere(order)


@dataclass(frozen=True, slots=True)
class OtherNode:
    source: StageSource
    model: str
    session: aiohttp.ClientSession
    peers: Peers
    cached: Mapping[str, Path] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"node {self.source.node_id}"

    async def files(self) -> Sequence[Remote]:
        try:
            base = URL.parse(self.source.url)
        except BadValue as error:
            raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"{self.label}: its address is none: {error.message}") from None
        url = f"{base}/v2/catalog/{quote(self.model, safe='')}/blob"
        knock = self.peers.knock(self.source.node_id, base, self.source.ticket)
        try:
            async with (
                asyncio.timeout(LISTING_TIMEOUT_S),
                self.session.get(
                    f"{url}?list=1",
                    headers=knock.headers,
                    ssl=knock.context or True,
                    server_hostname=knock.server_name,
                    allow_redirects=False,
                ) as response,
            ):
                raw = await response.content.read(MAX_LISTING_BYTES) if response.status != 200 else await _all(response)
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why, _ = why_unreachable(error, "")
            raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"{self.label}: {why}") from None
        listing = self._read(status, raw)
        return [
            Remote(
                name=file.name,
                url=f"{url}?file={number}",
                label=f"{self.label}, {file.name}" if len(listing.files) > 1 else self.label,
                headers=knock.headers,
                context=knock.context,
                server_name=knock.server_name,
                size_bytes=file.size_bytes,
                sha256=file.sha256,
                peer=True,
            )
            for number, file in enumerate(listing.files)
        ]

    def _read(self, status: int, raw: bytes) -> BlobListing:
        try:
            value: dict[str, Any] = decode_object(raw)
        except LlorchError:
            value = {}
        if status != 200:
            error = LlorchError.from_wire(value.get("error"), fallback=Code.MODEL_NOT_AVAILABLE)
            raise LlorchError(error.code, f"{self.label}: {error.message}", hint=error.hint)
        try:
            return parse(BlobListing, value)
        except LlorchError:
            raise LlorchError(Code.MODEL_NOT_AVAILABLE, f"{self.label}: its list of files can't be read") from None


async def _all(response: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_LISTING_BYTES:
            raise aiohttp.ClientPayloadError
        parts.append(part)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Web:
    ref: str
    cached: Mapping[str, Path] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.ref.partition("?")[0]

    async def files(self) -> Sequence[Remote]:
        name = unquote(urlsplit(self.ref).path.rpartition("/")[2])
        return [Remote(name=name, url=self.ref, label=self.label)]


class Hub:
    def __init__(self, ref: str) -> None:
        self.label = ref
        self.cached: Mapping[str, Path] = {}

    async def files(self) -> Sequence[Remote]:
        from llorch.node.staging_hub import find_on_hub

        found = await asyncio.to_thread(find_on_hub, self.label)
        self.cached = found.cached
        return found.files


@dataclass(frozen=True, slots=True)
class Nowhere:
    """A name is no place: what nobody has can't be fetched."""

    order: StageOrder
    cached: Mapping[str, Path] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.order.ref

    async def files(self) -> Sequence[Remote]:
        raise LlorchError(
            Code.MODEL_NOT_AVAILABLE,
            f"{self.order.ref} is not on this node, and no other was named that has it",
            hint=STAGE_HINT,
        )
