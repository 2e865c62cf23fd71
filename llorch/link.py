"""One connection that carries records: the part of a link that both of its ends share.

Owns framing on a transport, pings (one per `PING_AFTER_S` of silence, `MAX_UNANSWERED` without an answer end it) and
the transport's flow control. What a record means is its owner's: control/links.py and node/link.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import Protocol

from llorch import records
from llorch.errors import without_frames
from llorch.records import Kind, Record, RecordError

PING_AFTER_S = 5.0
MAX_UNANSWERED = 3
WRITE_HIGH_BYTES = 1024 * 1024  # beyond this much unsent, senders hold their DATA back
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 2, 1, 3
USER_TIMEOUT_MS = 5_000  # a black-holed peer is noticed in about 5 s


def tune_socket(sock: socket.socket, *, idle_s: int = KEEPALIVE_IDLE_S, user_timeout_ms: int = USER_TIMEOUT_MS) -> None:
    """TCP settings that notice a dead peer in seconds; what the platform lacks is left out.

    The user timeout also ends a connection whose peer takes nothing for so long: shorter than a reader may be slow, it
    would end the reader.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", idle_s),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", user_timeout_ms),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


class LinkOwner(Protocol):
    """Who gives the records their meaning."""

    def link_record(self, record: Record) -> None:
        """A record arrived. Raising RecordError closes the link."""

    def link_lost(self, reason: str) -> None:
        """The connection has ended; called once."""

    def link_writable(self) -> None:
        """The transport takes bytes again after it was full."""


class _Nobody:
    """The owner of a link that has ended. The real one may hold the link, and neither is to keep the other in memory:
    what a peer has sent last hangs on both, and it may come back a hundred times a second."""

    def link_record(self, record: Record) -> None: ...
    def link_lost(self, reason: str) -> None: ...
    def link_writable(self) -> None: ...


class Link(asyncio.Protocol):
    """A transport that has been switched to records. `start` begins it; `inner` is the protocol it took over from."""

    def __init__(self, owner: LinkOwner, inner: asyncio.Protocol | None = None) -> None:
        self._owner: LinkOwner = owner
        self._inner = inner
        self._decoder = records.Decoder()
        self._transport: asyncio.Transport | None = None
        self._reason = "connection closed by the peer"
        self.heard_at = time.monotonic()  # when anything came last
        self._heard = False
        self._unanswered = 0
        self._timer: asyncio.TimerHandle | None = None
        self._pong: asyncio.Future[None] | None = None
        self.full = False
        self.fault: RecordError | None = None  # what the peer did, if the link ended for that
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, transport: asyncio.Transport, received: bytes = b"") -> None:
        """Take `transport` over. `received` is what already came after the handshake."""
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            tune_socket(sock)
        transport.set_protocol(self)
        self._timer = asyncio.get_running_loop().call_later(PING_AFTER_S, self._tick)
        if received:
            self.data_received(received)

    # ---- sending

    def send(self, encoded: bytes) -> None:
        """Queue encoded records. After the end of the link this does nothing: `lost` tells."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encoded)

    async def ping(self, timeout_s: float) -> bool:
        """True if the peer answers within `timeout_s`."""
        if self.lost.done():
            return False
        if self._pong is None:
            self._pong = asyncio.get_running_loop().create_future()
        pong = self._pong
        self.send(records.encode(0, Kind.PING))
        await asyncio.wait((pong, self.lost), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return pong.done()

    def close(self, reason: str) -> None:
        """End the link after what is queued has been sent."""
        self._reason = reason
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: str) -> None:
        """End the link at once."""
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self.heard_at = time.monotonic()
        try:
            for record in self._decoder.feed(data):
                if record.type == Kind.PING:
                    if not self.full:  # a peer that asks and never reads must not fill our memory with answers
                        self.send(records.encode(0, Kind.PONG))
                elif record.type == Kind.PONG:
                    if self._pong is not None and not self._pong.done():
                        self._pong.set_result(None)
                    self._pong = None
                else:
                    self._owner.link_record(record)
        except RecordError as error:
            self.fault = without_frames(error)
            self.abort(f"protocol error: {error}")

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        self._owner.link_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None  # asyncio's own fails when it is aborted after its end
        if self._timer is not None:
            self._timer.cancel()
        if not self.lost.done():
            self.lost.set_result(None)
        owner, self._owner = self._owner, _Nobody()
        inner, self._inner = self._inner, None
        owner.link_lost(self._reason)
        if inner is not None:
            inner.connection_lost(exc)

    def _tick(self) -> None:
        if self._heard:
            self._heard, self._unanswered = False, 0
        elif self._unanswered >= MAX_UNANSWERED:
            self.abort(f"no answer to {MAX_UNANSWERED} pings")
            return
        else:
            self._unanswered += 1
            self.send(records.encode(0, Kind.PING))
        self._timer = asyncio.get_running_loop().call_later(PING_AFTER_S, self._tick)
