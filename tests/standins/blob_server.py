"""A stand-in for a place on the web that has files: with ranges and validators, and as unreliable as a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from llorch import listen

CHUNK_BYTES = 64 * 1024


@dataclass
class BlobServer:
    """`cuts`: after how many bytes of its body each answer breaks off; `statuses`: what is answered instead, one each.

    `sent` counts the bytes of bodies, of every answer.
    """

    files: dict[str, bytes | Path] = field(default_factory=dict)
    etag: str | None = '"v1"'
    modified: str | None = None
    ranges: bool = True
    length: bool = True
    encoding: str | None = None
    redirects: dict[str, str] = field(default_factory=dict)
    cuts: deque[int] = field(default_factory=deque)
    statuses: deque[int] = field(default_factory=deque)
    pause_s: float = 0.0  # between chunks
    hold_at: int | None = None  # of a body: nothing more until `go`
    go: asyncio.Event = field(default_factory=asyncio.Event)
    sent: int = 0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def ranges_asked(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.requests.append((request.path_qs, dict(request.headers)))
        if path in self.redirects:
            return web.Response(status=302, headers={"Location": self.redirects[path]})
        if self.statuses:
            return web.Response(status=self.statuses.popleft(), headers={"Retry-After": "0"})
        held = self.files.get(path)
        if held is None:
            return web.Response(status=404)
        size = held.stat().st_size if isinstance(held, Path) else len(held)
        start, end, status = 0, size, 200
        headers = {"Accept-Ranges": "bytes"} if self.ranges else {}
        validator = self.etag or self.modified
        if self.etag is not None:
            headers["ETag"] = self.etag
        if self.modified is not None:
            headers["Last-Modified"] = self.modified
        if self.encoding is not None:
            headers["Content-Encoding"] = self.encoding
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if self.ranges and wanted and request.headers.get("If-Range", validator) == validator:
            start, end, status = int(wanted[1]), int(wanted[2]) + 1 if wanted[2] else size, 206
            if start >= size:
                return web.Response(status=416, headers={"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        response = web.StreamResponse(status=status, headers=headers)
        if self.length:
            response.content_length = end - start
        else:
            response.enable_chunked_encoding()
        await response.prepare(request)
        cut = self.cuts.popleft() if self.cuts else None
        await self._pour(request, response, held, start, end, cut)
        return response

    async def _pour(
        self,
        request: web.Request,
        response: web.StreamResponse,
        held: bytes | Path,
        start: int,
        end: int,
        cut: int | None,
    ) -> None:
        begun = start
        with held.open("rb") if isinstance(held, Path) else contextlib.nullcontext(None) as file:
            while start < end:
                if self.hold_at is not None and start >= self.hold_at:
                    await self.go.wait()
                count = min(CHUNK_BYTES, end - start)
                if cut is not None:
                    count = min(count, begun + cut - start)
                    if count <= 0:
                        assert request.transport is not None
                        request.transport.close()  # an abort would take back what the other has not read yet
                        return
                if file is not None:
                    file.seek(start)
                    data = file.read(count)
                else:
                    assert isinstance(held, bytes)
                    data = held[start : start + count]
                await response.write(data)
                self.sent += len(data)
                start += len(data)
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)


@contextlib.asynccontextmanager
async def blob_server() -> AsyncIterator[BlobServer]:
    served = BlobServer()
    app = web.Application()
    app.router.add_route("GET", "/{path:.*}", served.answer)
    server = await listen.serve(app, "127.0.0.1", 0, shutdown_timeout_s=0.1)
    served.url = server.url
    try:
        yield served
    finally:
        served.go.set()
        await server.close()
