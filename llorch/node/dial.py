"""Opening a link: the node dials a control and switches the connection to records.

Owns the HTTP/1.1 Upgrade, byte by byte: request head, answer head, and what came after it. Bounded in bytes and time,
and never quotes what the peer sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar
from urllib.parse import quote, urlsplit

from llorch import __version__, records
from llorch.errors import Code, LlorchError
from llorch.link import Link, LinkOwner
from llorch.messages import decode_object
from llorch.node.credentials import Credentials

TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 16 * 1024
MAX_ANSWER_BYTES = 64 * 1024

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})(?: |$)")
_FIELD_VALUE = re.compile(r"[\x21-\x7e]{1,1024}")


class Owner(LinkOwner, Protocol):
    """Who takes the link over, and sends on it."""

    connection: Link | None


T = TypeVar("T", bound=Owner)


class _Handshake(asyncio.Protocol):
    """Collects an answer: its head, then its body, until another protocol takes the connection over."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.ended = False
        self._more = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._more.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self._more.set()

    async def until(self, done: Callable[[bytearray], bool], most_bytes: int) -> bool:
        """Wait until `done(received)`; False if the connection ended or the answer is too long."""
        while not done(self.received):
            if self.ended or len(self.received) > most_bytes:
                return False
            self._more.clear()
            await self._more.wait()
        return True


def _lost(what: str) -> LlorchError:
    return LlorchError(Code.NODE_LOST, f"the link could not be opened: {what}")


async def dial(
    url: str,
    node_id: str,
    lease_id: str,
    credentials: Credentials,
    epoch: str,
    take: Callable[[], T],
) -> T:
    """The owner of a new link to the control at `url`: `take` makes it, just before the first record.

    Raises LlorchError: the control's refusal, LEASE_STALE if it is not the process of `epoch` that gave out the lease,
    or NODE_LOST when it can't be reached.
    """
    transport: asyncio.Transport | None = None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            transport, handshake = await _connect(url, credentials)
            transport.write(_request(url, node_id, lease_id, credentials.headers))
            if not await handshake.until(lambda received: b"\r\n\r\n" in received, MAX_HEAD_BYTES):
                raise _lost("the control did not answer the upgrade")
            head = bytes(handshake.received).partition(b"\r\n\r\n")[0]
            status, headers = _read_head(head)
            if status != 101:
                raise await _refusal(handshake, len(head) + 4, status, headers)
            if headers.get("upgrade", "").lower() != records.UPGRADE:
                raise _lost("the control answered with another protocol")
            if headers.get("x-llorch-epoch") != epoch:
                raise LlorchError(Code.LEASE_STALE, "another control process answered than gave out the lease")
            if handshake.ended:
                raise _lost("the control closed it at once")
    except BaseException as error:
        if transport is not None:
            transport.abort()
        if isinstance(error, TimeoutError):
            raise _lost(f"no answer within {TIMEOUT_S:.0f} s") from None
        if isinstance(error, OSError):
            raise _lost(error.strerror or type(error).__name__) from None
        raise
    owner = take()
    link = owner.connection = Link(owner)
    link.start(transport, bytes(handshake.received[len(head) + 4 :]))
    return owner


async def _connect(url: str, credentials: Credentials) -> tuple[asyncio.Transport, _Handshake]:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    host = parts.hostname or ""
    transport, protocol = await asyncio.get_running_loop().create_connection(
        _Handshake,
        host,
        parts.port or (443 if secure else 80),
        ssl=(credentials.context or ssl.create_default_context()) if secure else None,
        server_hostname=(credentials.server_name or host) if secure else None,
    )
    return transport, protocol


def _request(url: str, node_id: str, lease_id: str, shown: Mapping[str, str]) -> bytes:
    if not _FIELD_VALUE.fullmatch(lease_id):
        raise _lost("the control gave out a lease that no header can carry")
    parts = urlsplit(url)
    path = f"{parts.path.rstrip('/')}/v2/nodes/{quote(node_id, safe='')}/link"
    host = parts.netloc.rpartition("@")[2]
    fields = {
        "Host": host,
        **shown,
        "Connection": "Upgrade",
        "Upgrade": records.UPGRADE,
        "X-Llorch-Lease": lease_id,
        "User-Agent": f"llorch/{__version__}",
    }
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def _read_head(head: bytes) -> tuple[int, Mapping[str, str]]:
    first, *lines = head.split(b"\r\n")
    status = _STATUS.match(first)
    if status is None:
        raise _lost("the answer is not HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(status[1]), headers


async def _refusal(handshake: _Handshake, start: int, status: int, headers: Mapping[str, str]) -> LlorchError:
    """The control's error object; one that can't be read is named by its status."""
    length = headers.get("content-length", "")
    if length.isdecimal() and len(length) < 10 and int(length) <= MAX_ANSWER_BYTES:
        end = start + int(length)
        if await handshake.until(lambda received: len(received) >= end, MAX_ANSWER_BYTES + MAX_HEAD_BYTES):
            with contextlib.suppress(LlorchError):
                wire = decode_object(bytes(handshake.received[start:end])).get("error")
                return LlorchError.from_wire(wire, fallback=_BY_STATUS.get(status, Code.NODE_LOST))
    return LlorchError(_BY_STATUS.get(status, Code.NODE_LOST), f"the control answered HTTP {status} to the upgrade")


_BY_STATUS = {
    401: Code.UNAUTHENTICATED,
    403: Code.FORBIDDEN,
    404: Code.NODE_UNKNOWN,
    409: Code.LEASE_STALE,
    426: Code.UPGRADE_REQUIRED,
}
