"""One end of a link against a socket: framing at every split point, pings, silence, a full connection, and its ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llorch import link, records
from llorch.link import Link
from llorch.records import Decoder, Record, RecordError, Type
from tests.cluster import eventually

PING = records.encode(0, Type.PING)
PONG = records.encode(0, Type.PONG)


class Owner:
    """A link.LinkOwner that keeps what it is told."""

    def __init__(self, refuses: int | None = None) -> None:
        self.records: list[Record] = []
        self.lost: list[str] = []
        self.writable = 0
        self._refuses = refuses

    def link_record(self, record: Record) -> None:
        if record.type == self._refuses:
            raise RecordError("not this one")
        self.records.append(record)

    def link_lost(self, reason: str) -> None:
        self.lost.append(reason)

    def link_writable(self) -> None:
        self.writable += 1


class Peer:
    """The other end, which sends exactly what it is told to and reads only when it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._decoder = Decoder()
        self._read: list[Record] = []

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def next(self, within_s: float = 5.0) -> Record | None:
        """The next record, or None at the end of the connection."""
        while not self._read:
            try:
                data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, 65_536), within_s)
            except ConnectionError:
                return None
            if not data:
                return None
            self._read += self._decoder.feed(data)
        return self._read.pop(0)


@asynccontextmanager
async def linked(owner: Owner, received: bytes = b"") -> AsyncIterator[tuple[Link, Peer]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    theirs.setblocking(False)
    ours.setblocking(False)
    made = Link(owner)
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, ours)
    made.start(transport, received)
    try:
        yield made, Peer(theirs)
    finally:
        theirs.close()
        made.abort("the test is over")
        await made.lost


SOME = [Record(1, Type.ACCEPT, b""), Record(1, Type.DATA, b"data: x\n\n" * 5), Record(3, 200, b"from a later version")]
WIRE = b"".join(records.encode(*record) for record in SOME)


class NoTransport(asyncio.Transport):
    def get_extra_info(self, name: str, default: object = None) -> object:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass


async def test_records_arrive_whole_wherever_they_were_cut_also_behind_the_handshake() -> None:
    for cut in range(len(WIRE) + 1):
        owner = Owner()
        one = Link(owner)
        one.start(NoTransport(), WIRE[:cut])
        one.data_received(WIRE[cut:])
        assert owner.records == SOME, cut
        one.connection_lost(None)


async def test_a_ping_is_answered_and_says_whether_the_peer_does() -> None:
    owner = Owner()
    async with linked(owner) as (one, peer):
        await peer.send(PING)
        assert await peer.next() == Record(0, Type.PONG, b"")
        asking = asyncio.ensure_future(one.ping(5.0))
        assert await peer.next() == Record(0, Type.PING, b"")
        await peer.send(PONG)
        assert await asking is True
        assert await one.ping(0.02) is False
        await peer.send(PONG)  # late: it answers nobody, and not the next one that asks
        await peer.next()
        assert await one.ping(0.02) is False
    assert owner.records == []  # pings are the link's own
    assert await one.ping(5.0) is False


async def test_a_silent_peer_is_asked_and_after_three_unanswered_pings_it_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "PING_AFTER_S", 0.02)
    owner = Owner()
    async with linked(owner) as (one, peer):
        await asyncio.wait_for(asyncio.shield(one.lost), 5)
        seen = [await peer.next() for _ in range(3)]
        assert seen == [Record(0, Type.PING, b"")] * 3
        assert await peer.next() is None
    assert owner.lost == ["no answer to 3 pings"]


async def test_a_peer_that_says_anything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PING_AFTER_S", 0.02)
    owner = Owner()
    async with linked(owner) as (one, peer):
        for _ in range(10):  # three times as long as silence may last
            assert await peer.next() == Record(0, Type.PING, b"")
            await peer.send(records.encode(1, Type.DATA, b"x"))
        await eventually(lambda: len(owner.records) == 10)
        assert not one.lost.done()


@pytest.mark.parametrize(
    "wrong",
    [records.HEADER.pack(1, Type.DATA, records.MAX_PAYLOAD_BYTES + 1), records.encode(1, Type.OPEN, b"{}")],
)
async def test_a_record_that_breaks_the_protocol_ends_the_link_and_nothing_behind_it_counts(wrong: bytes) -> None:
    owner = Owner(refuses=Type.OPEN)
    async with linked(owner) as (one, peer):
        await peer.send(records.encode(1, Type.ACCEPT) + wrong + records.encode(1, Type.DATA, b"x"))
        assert await peer.next() is None
        await asyncio.wait_for(asyncio.shield(one.lost), 5)
    assert owner.records in ([], [Record(1, Type.ACCEPT, b"")])  # those that came in one read with it may be lost too
    assert len(owner.lost) == 1
    assert owner.lost[0].startswith("protocol error: ")


async def test_a_full_connection_says_so_and_when_there_is_room_again() -> None:
    owner = Owner()
    async with linked(owner) as (one, peer):
        sent = 0
        while not one.full:
            one.send(records.encode(1, Type.DATA, b"x" * 60_000))
            sent += 1
        assert sent < 1_000
        got = [await peer.next() for _ in range(sent)]
        assert all(record is not None and len(record.payload) == 60_000 for record in got)
        await eventually(lambda: owner.writable)
        assert not one.full


async def test_a_peer_that_asks_and_never_reads_fills_no_memory() -> None:
    owner = Owner()
    async with linked(owner) as (one, peer):
        assert one._transport is not None
        flood = PING * 50_000
        for _ in range(8):
            await asyncio.wait_for(peer.send(flood), 5)
        assert one.full
        assert one._transport.get_write_buffer_size() < 2 * link.WRITE_HIGH_BYTES


async def test_close_sends_what_is_queued_and_the_end_is_told_once() -> None:
    owner, told = Owner(), []

    class Inner(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            told.append(exc)

    async with linked(owner) as (one, peer):
        one._inner = Inner()
        for _ in range(10):
            one.send(records.encode(1, Type.DATA, b"x" * 60_000))
        one.close("shutdown")
        one.send(records.encode(1, Type.DATA, b"too late"))
        got = []
        while (record := await peer.next()) is not None:
            got.append(record)
        assert [len(record.payload) for record in got] == [60_000] * 10
        await one.lost
        one.abort("again")  # its owner may not know yet
        one.close("again")
    assert owner.lost == ["shutdown"]
    assert told == [None]


async def test_a_peer_that_goes_ends_the_link() -> None:
    owner = Owner()
    async with linked(owner) as (one, peer):
        peer.sock.close()
        await asyncio.wait_for(asyncio.shield(one.lost), 5)
        one.send(PING)
    assert owner.lost == ["connection closed by the peer"]


async def test_its_socket_notices_in_seconds_that_the_peer_is_gone() -> None:
    async with linked(Owner()) as (one, _):
        assert one._transport is not None
        sock = one._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5_000
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
