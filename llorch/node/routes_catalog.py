"""The catalog over HTTP and over links: list, stage, remove, verify; and a model's bytes, for other nodes.

Owns how the bytes leave: to whom (a ticket, beside a credential of the cluster), which part of which file, and how
fast. What is staged and how is `staging`'s. Nothing leaves but whole, digested models of the catalog.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from pathlib import Path

from aiohttp import web

from llorch import tickets
from llorch.auth import Scope
from llorch.errors import Code, LlorchError, invalid
from llorch.logs import Log
from llorch.node.catalog import not_here
from llorch.node.catalog_file import BlobFile, BlobListing, Entry
from llorch.node.route_call import Ask, Call, Reply
from llorch.node.staging import Stager
from llorch.node.staging_http import PEER_WINDOW_BYTES
from llorch.node.state import NODE, Node
from llorch.private import stamp
from llorch.web import PRINCIPAL, Route, bound_kernel_buffer, json_response
from llorch.wishes import StageOrder

CHUNK_BYTES = 1024 * 1024  # read at once
MAX_BLOBS = 8  # that leave at a time; others are told to come again, for a disk reads one after the other best
BUSY_RETRY_MS = 2_000
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})?", re.A)

log = Log("node.routes")


def stager_of(node: Node) -> Stager:
    if node.stager is None:
        raise LlorchError(Code.CONFLICT, "this node stages no models")
    return node.stager


# ---------------------------------------------------------------- over HTTP and links


def catalog(node: Node, _ask: Ask) -> Reply:
    """As it is now; heartbeats tell it as last read."""
    if node.stager is None:
        return 200, {"models": node.model_reports()}
    return 200, {
        "models": [one.model_dump(exclude_none=True, exclude={"gone"}) for one in node.stager.catalog.report()]
    }


async def stage(node: Node, ask: Ask) -> Reply:
    return 202, await stager_of(node).order(ask.read(StageOrder))


async def remove(node: Node, ask: Ask) -> Reply:
    model = ask.params["model"]
    if _flag(ask, "retire", otherwise=False):
        entry = await stager_of(node).retire(model)
        return 200, {"model": model, "state": entry.state}
    await stager_of(node).remove(model)
    return 200, {"model": model, "state": "removed"}


async def verify(node: Node, ask: Ask) -> Reply:
    """What was found, once all of it is read; with `?wait=false` at once, and it shows in the model's state. Whoever
    stops waiting stops nothing."""
    model, waits = ask.params["model"], _flag(ask, "wait", otherwise=True)
    verifying = stager_of(node).verify(model)
    return (200, await asyncio.shield(verifying)) if waits else (202, {"model": model, "state": "verifying"})


def _flag(ask: Ask, name: str, *, otherwise: bool) -> bool:
    given = ask.query.get(name)
    if given not in (None, "true", "false"):
        raise invalid(f"`{name}` is true or false", param=name)
    return otherwise if given is None else given == "true"


CALLS = (
    Call("GET", "/v2/catalog", Scope.CONTROL, "The models on this machine", catalog),
    Call("POST", "/v2/catalog/stage", Scope.CONTROL, "Have a model here; idempotent", stage, 202, StageOrder),
    Call("DELETE", "/v2/catalog/{model}", Scope.CONTROL, "Remove a model; ?retire=true: only retire it", remove),
    Call("POST", "/v2/catalog/{model}/verify", Scope.CONTROL, "Read a model's files again and compare", verify),
)


# ---------------------------------------------------------------- a model's bytes


async def blob(request: web.Request) -> web.StreamResponse:
    """`?list=1`: its files. Else the bytes of `?file=N` (0), whole or by `Range`."""
    node = request.app[NODE]
    stager, model = stager_of(node), request.match_info["model"]
    entry = stager.catalog.get(model)
    tickets.check(
        stager.peers.keys(),
        request.headers.get("X-Llorch-Ticket", ""),
        model=model,
        digest=entry.sha256 if entry is not None else None,
        source=stager.node_id,
        destination=request[PRINCIPAL].node_id,
        now=time.time(),
    )
    if entry is None or entry.sha256 is None or not entry.here:
        raise not_here(model)
    if request.query.get("list"):
        return json_response(_listing(entry).model_dump())
    number = request.query.get("file", "0")
    if not (number.isascii() and number.isdecimal() and len(number) < 6 and int(number) < len(entry.files)):
        raise invalid(f"`file` is a number below {len(entry.files)}", param="file")
    place = int(number)
    path = stager.catalog.paths(entry)[place]
    if await asyncio.to_thread(stamp, path) != entry.files[place].stamp:
        raise LlorchError(Code.CONFLICT, f"{model} is not what it was when its digest was computed", hint="verify it")
    if stager.serving >= MAX_BLOBS:
        words = f"{MAX_BLOBS} models are being fetched here already"
        raise LlorchError(Code.RATE_LIMITED, words, retry_after_ms=BUSY_RETRY_MS)
    stager.serving += 1
    try:
        return await _send(request, stager, entry, place, path)
    finally:
        stager.serving -= 1


def _listing(entry: Entry) -> BlobListing:
    files = [
        BlobFile(name=Path(file.name).name, size_bytes=file.size_bytes, sha256=file.sha256 or "")
        for file in entry.files
    ]
    return BlobListing(model=entry.id, sha256=entry.sha256 or "", files=files)


async def _send(request: web.Request, stager: Stager, entry: Entry, place: int, path: Path) -> web.StreamResponse:
    file = entry.files[place]
    size, etag = file.size_bytes, f'"{file.sha256}"'
    start, end = _wanted(request, size, etag) or (0, size)
    headers = {"Accept-Ranges": "bytes", "ETag": etag, "Content-Type": "application/octet-stream"}
    if start >= end:
        return web.Response(status=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    partly = _wanted(request, size, etag) is not None
    if partly:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    response = web.StreamResponse(status=206 if partly else 200, headers=headers)
    response.content_length = end - start
    try:
        descriptor = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LlorchError(Code.CONFLICT, f"{entry.id} can't be read here: {error.strerror}", hint="verify it") from None
    try:
        if request.transport is not None:
            bound_kernel_buffer(request.transport, socket.SO_SNDBUF, PEER_WINDOW_BYTES)
        await response.prepare(request)
        log.info("blob.asked", model=entry.id, to=request[PRINCIPAL].name, offset=start, bytes=end - start)
        while start < end:
            data = await asyncio.to_thread(os.pread, descriptor, min(CHUNK_BYTES, end - start), start)
            if not data:
                break
            start += len(data)
            await stager.pace(len(data))
            async with asyncio.timeout(request.app[NODE].slow_reader_timeout_s):
                await response.write(data)
    except TimeoutError:
        log.warning("reader.slow", model=entry.id, offset=start)
    finally:
        os.close(descriptor)
    if start < end and request.transport is not None:
        request.transport.abort()  # an end in good order would pass for a whole answer
    else:
        await response.write_eof()
    return response


def _wanted(request: web.Request, size: int, etag: str) -> tuple[int, int] | None:
    """The range that is asked for: (begin, end), empty where the file has none of it. None: all, also of several."""
    found = _RANGE.fullmatch(request.headers.get("Range", ""))
    if found is None or request.headers.get("If-Range", etag) != etag:
        return None
    return int(found[1]), min(size, int(found[2]) + 1) if found[2] else size


BLOB = Route(
    "GET",
    "/v2/catalog/{model}/blob",
    Scope.CONTROL,
    blob,
    "A model's bytes, for a node that has a ticket",
    returns="application/octet-stream",
    also=(Scope.NODE,),
)
