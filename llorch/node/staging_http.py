"""One file over HTTP: from where it lies to a partial file here, as often interrupted as it may be.

Owns the requests: ranges, what makes going on safe (a digest, or the source's own validator), redirects, sizes, and
when trying again helps. Another machine's bytes are never quoted and its headers never believed beyond their form:
what counts at the end is the digest, where one is known.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from urllib.parse import urljoin, urlsplit

import aiohttp
from yarl import URL

from llorch.backoff import Backoff
from llorch.config_kinds import is_loopback, plain_http_abroad
from llorch.errors import Code, LlorchError
from llorch.logs import Log
from llorch.node.catalog_file import PartialState
from llorch.node.engines.gguf import MAGIC
from llorch.node.staging_partial import Partial
from llorch.reach import why_unreachable
from llorch.web import bound_kernel_buffer

BATCH_BYTES = 1024 * 1024  # handed to the disk at once; the next is read meanwhile
MAX_REDIRECTS = 5
MAX_FILE_BYTES = 8 << 40  # the largest published model is an eighth of it
HEAD_TIMEOUT_S = 30.0
READ_TIMEOUT_S = 30.0  # without a byte; a session's own setting
PEER_WINDOW_BYTES = 1024 * 1024  # on its way from another node, near by: what a restart costs is hardly more
SLOW_WINDOW_S, SLOW_BYTES = 60.0, 64 * 1024  # who sends less in that time is as good as gone
BACKOFF = Backoff(first_s=0.5, most_s=15.0)
FAILURES_IN_A_ROW = 6  # with hardly a byte between them: about 45 s
PROGRESS_BYTES = 256 * 1024  # what ends a row of failures
MAX_ATTEMPTS = 1_000  # a line that breaks every few MB still gets there
MAX_RETRY_AFTER_S = 60.0

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.A)
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{1,512}"')

log = Log("node.staging")


@dataclass(frozen=True, slots=True)
class Remote:
    """Where one file lies. `label` is what people are shown, without queries. `headers` go to `url`'s host alone.

    `peer`: another node, which redirects nobody. `context`, `server_name`: for TLS to `url`'s host.
    """

    name: str
    url: str
    label: str
    headers: Mapping[str, str] = field(default_factory=dict)
    context: ssl.SSLContext | None = None
    server_name: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    peer: bool = False

    def meant(self, sha256: str | None, size_bytes: int | None) -> Remote:
        """The same, with what is known of it from elsewhere."""
        size_bytes = self.size_bytes if self.size_bytes is not None else size_bytes
        return replace(self, sha256=self.sha256 or sha256, size_bytes=size_bytes)


class _TryAgain(Exception):
    """This attempt failed; the next may not. `error` is what is raised when there is none."""

    def __init__(self, error: LlorchError, after_s: float = 0.0) -> None:
        super().__init__(error.message)
        self.error = error
        self.after_s = after_s


class Download:
    """One file. `room(size, there)` is asked before a byte is written and raises where the rest has none; `at(length)`
    is told how much is here; `pace(count)` waits until so many bytes may come.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        remote: Remote,
        partial: Partial,
        *,
        room: Callable[[int, int], None],
        at: Callable[[int], None],
        pace: Callable[[int], Awaitable[None]],
    ) -> None:
        self._session = session
        self._remote = remote
        self._partial = partial
        self._room = room
        self._at = at
        self._pace = pace
        self._given_up = False

    async def run(self) -> str:
        """Fetch all of it. Returns its digest; the partial file holds it and is open. Raises LlorchError."""
        try:
            resumed = await self._resume()
            digest = await self._whole()
            if resumed and self._remote.sha256 not in (None, digest):
                # Perhaps what was there already was not what it seemed: once more, and all of it.
                await asyncio.to_thread(self._partial.discard)
                digest = await self._whole()
        except OSError as error:
            raise storage_error(error) from None
        finally:
            self._given_up = True
        if self._remote.sha256 not in (None, digest):
            await asyncio.to_thread(self._partial.discard)
            raise wrong_digest(self._remote.label, str(self._remote.sha256), digest)
        return digest

    async def _resume(self) -> bool:
        """Take up what an earlier attempt left, if it may be of this file: the source has yet to say so."""
        there = await asyncio.to_thread(self._partial.look)
        state, remote = self._partial.state, self._remote
        if not there or state is None or remote.size_bytes not in (None, state.size_bytes):
            return False
        same_digest = remote.sha256 is not None and state.sha256 == remote.sha256
        if not same_digest and (state.source != _source(remote) or state.validator is None):
            return False
        if not same_digest and remote.sha256 is not None and state.sha256 is not None:
            return False
        self._room(state.size_bytes, there)
        await asyncio.to_thread(self._partial.resume, self._at, lambda: self._given_up)
        log.info("staging.resumed", source=remote.label, offset=self._partial.length)
        return True

    async def _whole(self) -> str:
        failures = attempts = 0
        while True:
            before = self._partial.length
            try:
                await self._attempt()
                return self._partial.digest
            except _TryAgain as again:
                attempts += 1
                failures = 1 if self._partial.length - before >= PROGRESS_BYTES else failures + 1
                if failures >= FAILURES_IN_A_ROW or attempts >= MAX_ATTEMPTS:
                    raise again.error from None
                pause_s = max(again.after_s, BACKOFF.delay_s(failures, random.random()))
                log.info(
                    "staging.interrupted",
                    source=self._remote.label,
                    offset=self._partial.length,
                    reason=again.error.message,
                    pause_s=round(pause_s, 2),
                )
            await asyncio.sleep(pause_s)

    # ---------------------------------------------------------------- one attempt

    async def _attempt(self) -> None:
        """All that is missing. Raises _TryAgain; LlorchError where no further attempt helps."""
        partial = self._partial
        if partial.state is not None and partial.length == partial.state.size_bytes:
            return
        try:
            async with self._answer(self._headers()) as response:
                if response.status == 416:
                    await asyncio.to_thread(partial.discard)  # what was there is not of what is there now
                    raise _TryAgain(self._broken("it has no such part of the file"))
                self._check_status(response)
                await self._begin(response)
                await self._receive(response)
        except (aiohttp.ClientError, TimeoutError, ssl.SSLError, ConnectionError) as error:
            why, _ = why_unreachable(error, "the reference")
            unverified = isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLCertVerificationError)
            fault = self._broken(why, retriable=not unverified)
            if unverified:
                raise fault from None
            raise _TryAgain(fault) from None
        if partial.state is not None and partial.length < partial.state.size_bytes:
            raise _TryAgain(self._broken("it ended too soon"))

    def _headers(self) -> dict[str, str]:
        partial = self._partial
        if not partial.length or partial.state is None:
            return {}
        headers = {"Range": f"bytes={partial.length}-"}
        if partial.state.validator is not None and partial.state.source == _source(self._remote):
            return {**headers, "If-Range": partial.state.validator}
        # With the digest the end will tell: another place may call the same file something else. Without: from nothing.
        return headers if self._remote.sha256 is not None else {}

    @asynccontextmanager
    async def _answer(self, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer at the end of the redirects. What opens the first host is never shown to another."""
        url, shown = self._remote.url, dict(self._remote.headers)
        context, server_name = self._remote.context, self._remote.server_name
        for _ in range(MAX_REDIRECTS + 1):
            async with asyncio.timeout(HEAD_TIMEOUT_S):
                response = await self._session.get(
                    URL(url, encoded=True),  # a signature is of the very letters
                    headers={**shown, **headers},
                    ssl=context or True,
                    server_hostname=server_name,
                    allow_redirects=False,
                )
            try:
                if response.status not in (301, 302, 303, 307, 308) or self._remote.peer:
                    yield response
                    return
                onward = self._redirect(url, response.headers.get("Location", ""))
            finally:
                response.close()
            if _host(onward) != _host(url):
                shown, context, server_name = {}, None, None
            url = onward
        raise self._broken(f"it redirects more than {MAX_REDIRECTS} times", retriable=False)

    def _redirect(self, url: str, location: str) -> str:
        try:
            onward = urljoin(url, location)
            scheme, host = urlsplit(onward).scheme, urlsplit(onward).hostname or ""
            port = urlsplit(onward).port
        except ValueError:
            raise self._broken("it redirects to what is no URL", retriable=False) from None
        if (
            scheme not in ("http", "https")
            or not host
            or port == 0
            or "@" in urlsplit(onward).netloc
            or not (onward.isascii() and onward.isprintable() and " " not in onward)
        ):
            raise self._broken("it redirects to what is no URL", retriable=False)
        if plain_http_abroad(onward) or (scheme == "http" and urlsplit(url).scheme == "https"):
            raise self._broken("it redirects to plain HTTP", retriable=False)
        if is_loopback(host) and not is_loopback(urlsplit(url).hostname or ""):
            raise self._broken("it redirects to this machine itself", retriable=False)
        return onward

    def _check_status(self, response: aiohttp.ClientResponse) -> None:
        status = response.status
        if status in (200, 206):
            if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
                raise self._broken("it sends the file packed, though asked not to", retriable=False)
            return
        said = f"HTTP {status}"
        if status in (404, 410):
            raise LlorchError(Code.MODEL_NOT_FOUND, f"there is no such file at {self._remote.label} ({said})")
        if status in (408, 425, 429) or status >= 500:
            raise _TryAgain(self._broken(said), _retry_after_s(response))
        hint = "that place wants a credential that this node does not have" if status in (401, 403) else None
        raise self._broken(said, hint=hint, retriable=False)

    async def _begin(self, response: aiohttp.ClientResponse) -> None:
        """Match what is there with what is coming: go on at its end, or start from nothing."""
        partial, remote = self._partial, self._remote
        start, total = _extent(response)
        if total is None:
            raise self._broken("it does not say how long the file is", retriable=False)
        if total > MAX_FILE_BYTES:
            raise self._broken(f"the file is larger than {MAX_FILE_BYTES >> 40} TiB", retriable=False)
        if remote.size_bytes not in (None, total):
            raise LlorchError(
                Code.DIGEST_MISMATCH, f"{remote.label} has {total} bytes, and {remote.size_bytes} were meant"
            )
        state = PartialState(
            source=_source(remote), validator=_validator(response), sha256=remote.sha256, size_bytes=total
        )
        before = partial.state
        if start and before is not None and start == partial.length and self._goes_on(state, before):
            return
        if start:
            await asyncio.to_thread(partial.discard)
            raise _TryAgain(self._broken("the file there is another one now"))
        await asyncio.to_thread(partial.discard)
        self._room(total, 0)
        self._at(0)
        await asyncio.to_thread(partial.begin, state)

    def _goes_on(self, state: PartialState, before: PartialState) -> bool:
        """A 206 that does not repeat the validator has been matched by its sender, by If-Range."""
        matched = before.validator is not None and state.validator is None and state.source == before.source
        return state.continues(before) or (matched and state.size_bytes == before.size_bytes)

    async def _receive(self, response: aiohttp.ClientResponse) -> None:
        """Read and write at once: one batch is on its way to the disk while the next one comes."""
        partial, batch = self._partial, bytearray()
        if self._remote.peer and response.connection is not None and response.connection.transport is not None:
            bound_kernel_buffer(response.connection.transport, socket.SO_RCVBUF, PEER_WINDOW_BYTES)
        left = (partial.state.size_bytes if partial.state is not None else 0) - partial.length
        writing: asyncio.Future[None] | None = None
        window_ends, in_window = time.monotonic() + SLOW_WINDOW_S, 0
        try:
            async for chunk in response.content.iter_any():
                left -= len(chunk)
                if left < 0:
                    raise self._broken("it sends more than it said", retriable=False)
                batch += chunk
                in_window += len(chunk)
                await self._pace(len(chunk))
                now = time.monotonic()
                if now > window_ends:
                    if in_window < SLOW_BYTES:
                        raise _TryAgain(self._broken(f"it sent {in_window} bytes in {SLOW_WINDOW_S:g} s"))
                    window_ends, in_window = now + SLOW_WINDOW_S, 0
                if len(batch) >= BATCH_BYTES:
                    if writing is not None:
                        await writing
                    writing = self._write(bytes(batch))
                    batch.clear()
        finally:
            # Also of what was cut off: the next attempt goes on from there.
            if writing is not None:
                await asyncio.shield(writing)
            if batch:
                await asyncio.shield(self._write(bytes(batch)))

    def _write(self, data: bytes) -> asyncio.Future[None]:
        return asyncio.ensure_future(self._written(data))

    async def _written(self, data: bytes) -> None:
        await asyncio.to_thread(self._check_and_write, data)
        self._at(self._partial.length)

    def _check_and_write(self, data: bytes) -> None:
        if self._partial.length == 0 and self._remote.name.endswith(".gguf") and data[:4] != MAGIC[: len(data)]:
            raise self._broken("what it sends is not a GGUF", retriable=False)
        self._partial.write(data)

    def _broken(self, why: str, *, hint: str | None = None, retriable: bool = True) -> LlorchError:
        return LlorchError(
            Code.MODEL_NOT_AVAILABLE,
            f"{self._remote.label}: {why}",
            hint=hint or ("stage it again: what is here already is kept" if retriable else "try another source"),
            retriable=retriable,
        )


def wrong_digest(what: str, wanted: str, found: str) -> LlorchError:
    return LlorchError(
        Code.DIGEST_MISMATCH,
        f"{what} has the digest {found[:12]}..., and {wanted[:12]}... was meant",
        details={"wanted": wanted, "found": found},
    )


def storage_error(error: OSError) -> LlorchError:
    """What a failing disk means for a staging. What is partly there stays."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return LlorchError(
            Code.INSUFFICIENT_STORAGE,
            "the disk became full; what is here already is kept",
            hint="make room on the disk that holds --data-dir, then stage it again",
        )
    return LlorchError(
        Code.MODEL_NOT_AVAILABLE,
        f"the models' directory can't be used: {error.strerror or type(error).__name__}",
        hint="look at the disk that holds --data-dir, and at who may write there",
    )


def _source(remote: Remote) -> str:
    return hashlib.sha256(remote.url.encode()).hexdigest()


def _host(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _extent(response: aiohttp.ClientResponse) -> tuple[int, int | None]:
    """(where the answer begins, how long the whole file is); None: it does not say, or not in order."""
    if response.status == 206:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or not int(found[1]) <= int(found[2]) == int(found[3]) - 1:
            return 0, None
        return int(found[1]), int(found[3])
    return 0, response.content_length


def _validator(response: aiohttp.ClientResponse) -> str | None:
    """What proves that a later range is of the same file: a strong ETag, else a date."""
    etag = response.headers.get("ETag", "")
    if _STRONG_ETAG.fullmatch(etag):
        return etag
    date = response.headers.get("Last-Modified", "")
    return date if not etag and 0 < len(date) <= 64 and date.isascii() and date.isprintable() else None


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), MAX_RETRY_AFTER_S) if text.isascii() and text.isdecimal() and len(text) < 6 else 0.0
