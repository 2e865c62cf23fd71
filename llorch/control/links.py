"""The links: one connection per node, records of many tasks on it.

Owns the control's end of a link: stream ids, credit, which stream belongs to which feed, and what a node must not do. A
node that breaks the protocol loses its link. Never decides what a task does next: it tells feeds and its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llorch import records
from llorch.control.feed import Accepted, Feed, Item, Lost, Refused, Stopped, Upstream
from llorch.control.strikes import Offence
from llorch.errors import Code, LlorchError
from llorch.link import Link
from llorch.logs import Log
from llorch.messages import Head, Tail, parse
from llorch.records import CreditOverrun, Kind, ReceiveCredit, Record, RecordError, SendCredit, Type

log = Log("control.links")

MAX_STREAM_ID = 0xFFFF_FFFF

NOTHING = memoryview(b"")

_KNOWN = frozenset(Type)

M = TypeVar("M", bound=BaseModel)


class ForeignStream(RecordError):
    """On a stream that was never opened: not a late record, for those are on streams that were."""


class OutOfOrder(RecordError):
    """A node sends, on each stream: perhaps ACCEPT, then HEAD, DATA and a TAIL that counts it; or less of that."""


def offence_of(error: RecordError) -> Offence:
    """What a node did that broke the protocol. All of it is proof: a connection loses the end of what was sent, and
    never a part of it, and what is late stays on its own connection, whose stream ids are used once."""
    if isinstance(error, CreditOverrun):
        return Offence.CREDIT_OVERRUN
    if isinstance(error, ForeignStream):
        return Offence.FOREIGN_STREAM
    return Offence.OUT_OF_ORDER if isinstance(error, OutOfOrder) else Offence.MALFORMED_RECORD


def parse_record(model: type[M], payload: bytes) -> M:
    """A record's JSON as `model`. Raises RecordError: a node of ours sends no malformed ones."""
    try:
        quick = model.model_validate_json(payload)  # in one step; what it does not take is looked at more closely,
    except ValidationError:
        pass
    else:
        if not isinstance(quick, Tail) or quick.error is None:  # and so is an error, whose details may be anything
            return quick
    try:
        return parse(model, records.decode_json(payload))
    except LlorchError:
        raise RecordError(f"malformed {model.__name__} record") from None


def read_item(record: Record) -> Item | None:
    """What a record of a node tells a reader; None for those that tell it nothing."""
    kind, payload = record.type, record.payload
    if kind == Kind.DATA:
        return payload
    if kind == Kind.ACCEPT:
        return Accepted()
    if kind == Kind.HEAD:
        return parse_record(Head, payload)
    if kind == Kind.TAIL:
        return parse_record(Tail, payload)
    if kind == Kind.REFUSE:
        return Refused(LlorchError.from_wire(records.decode_json(payload)))
    if kind == Kind.DETACH:
        return Lost("the node let go of this reader")
    if kind in (Kind.OPEN, Kind.BODY, Kind.ATTACH, Kind.CANCEL):
        raise RecordError(f"a node may not send {Type(kind).name}")
    return None


@dataclass(slots=True)
class Order:
    """Which records may still come on a stream that is read from `offset`. Each `check` raises OutOfOrder."""

    offset: int = 0
    accepted: bool = False
    headed: bool = False

    def check(self, item: Item) -> None:
        if isinstance(item, bytes):
            if not self.headed:
                raise OutOfOrder("DATA before HEAD")
            self.offset += len(item)
        elif isinstance(item, Head):
            if self.headed:
                raise OutOfOrder("a second HEAD")
            self.headed = True
        elif isinstance(item, Accepted):
            if self.accepted or self.headed:
                raise OutOfOrder("a second ACCEPT, or a late one")
            self.accepted = True
        elif isinstance(item, Tail) and item.length != self.offset:
            raise OutOfOrder("a TAIL that does not count the DATA")


@dataclass(slots=True)
class _Stream:
    feed: Feed
    unsent: memoryview  # of the body; held back by credit
    may_send: SendCredit = field(default_factory=SendCredit)
    may_arrive: ReceiveCredit = field(default_factory=ReceiveCredit)
    order: Order = field(default_factory=Order)


class NodeLink:
    """The control's end of one node's link (a link.LinkOwner)."""

    def __init__(self, node_id: str, lease_id: str, lost: Callable[[NodeLink, str], None]) -> None:
        self.node_id = node_id
        self.lease_id = lease_id
        self.connection: Link | None = None
        self._on_lost = lost
        self._streams: dict[int, _Stream] = {}
        self._last_id = -1  # ids are odd and never used twice

    def __len__(self) -> int:
        return len(self._streams)

    # ---- what dispatch asks for

    def open(self, header: Mapping[str, Any], body: bytes, feed: Feed) -> Upstream:
        """OPEN with its body: a task's, or a call of one of the node's own routes."""
        stream_id, stream = self._begin(feed, body)
        opening = records.encode_json(stream_id, Kind.OPEN, {**header, "body_len": len(body)})
        self._send_body(stream_id, stream, opening)
        return _Handle(self, stream_id)

    def attach(self, task_id: str, offset: int, attempt: int, feed: Feed) -> Upstream:
        """Read the log of a task's attempt from `offset`."""
        stream_id, stream = self._begin(feed, b"")
        stream.order.offset = offset
        wish = {"task_id": task_id, "offset": offset, "attempt": attempt}
        self._send(records.encode_json(stream_id, Kind.ATTACH, wish))
        return _Handle(self, stream_id)

    async def answers(self, timeout_s: float) -> bool:
        return self.connection is not None and await self.connection.ping(timeout_s)

    def close(self, reason: str) -> None:
        """Let go of every stream with a word (the control goes, the tasks stay), then close."""
        shutdown = reason == "shutdown"
        for stream_id, stream in list(self._streams.items()):
            self.detach(stream_id, "shutdown" if shutdown else "lost")
            stream.feed.put(Stopped() if shutdown else Lost(reason))
        if self.connection is not None:
            self.connection.close(reason)

    def abort(self, reason: str) -> None:
        """End the link at once: whoever is at its other end has no say any more."""
        if self.connection is not None:
            self.connection.abort(reason)

    # ---- link.LinkOwner

    def link_record(self, record: Record) -> None:
        stream = self._streams.get(record.stream)
        if stream is None:
            self._check_late(record)
            return
        kind = record.type
        if kind == Kind.DATA and record.payload:
            self._data(record.stream, stream, record.payload)
            return
        if kind == Kind.CREDIT:
            stream.may_send.grant(records.decode_credit(record.payload))
            self._send_body(record.stream, stream)
            return
        item = read_item(record)
        if item is None:
            return
        stream.order.check(item)
        if isinstance(item, bytes):
            return  # none: nothing to take, and free of credit, so not to be collected
        if isinstance(item, Tail | Refused | Lost):
            del self._streams[record.stream]
        stream.feed.put(item)

    def link_lost(self, reason: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.feed.put(Lost(reason))
        self._on_lost(self, reason)

    def link_writable(self) -> None:
        """Bodies are bounded by credit; nothing waits for the transport here."""

    # ---- inside

    def _data(self, stream_id: int, stream: _Stream, data: bytes) -> None:
        """Once a token: what can be passed on at once costs no more than its credit."""
        order = stream.order
        if not order.headed:
            order.check(data)
        order.offset += len(data)
        stream.may_arrive.arrived(len(data))
        if not stream.feed.take(data):
            stream.feed.put(data)
        elif granted := stream.may_arrive.passed_on(len(data)):
            self._send(records.encode_credit(stream_id, granted))

    def _check_late(self, record: Record) -> None:
        """Records on a stream that has ended are late and dropped; on one that never was, the node is wrong."""
        if record.type not in _KNOWN:
            return
        if record.stream % 2 == 0 or record.stream > self._last_id:
            raise ForeignStream("record on a stream that was never opened")

    def _begin(self, feed: Feed, body: bytes) -> tuple[int, _Stream]:
        if self._last_id + 2 > MAX_STREAM_ID:
            raise LlorchError(Code.NODE_LOST, "the link has used all its stream ids")
        self._last_id += 2
        if self._last_id + 2 > MAX_STREAM_ID:
            self.abort("all its stream ids are used")  # this stream is lost with it; the node opens a new link at once
        stream = self._streams[self._last_id] = _Stream(feed, memoryview(body))
        return self._last_id, stream

    def _send(self, encoded: bytes) -> None:
        if self.connection is not None:
            self.connection.send(encoded)

    def _send_body(self, stream_id: int, stream: _Stream, before: bytes = b"") -> None:
        """As much as there is credit for; `before` goes with it."""
        count = stream.may_send.take(len(stream.unsent))
        if count:
            for encoded in records.encode_cut(stream_id, Kind.BODY, stream.unsent[:count]):
                self._send(before + encoded)
                before = b""
            # An empty slice would hold the whole body for as long as the answer takes.
            stream.unsent = stream.unsent[count:] if count < len(stream.unsent) else NOTHING
        elif before:
            self._send(before)

    def passed_on(self, stream_id: int, count: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            granted = stream.may_arrive.passed_on(count)
            if granted:
                self._send(records.encode_credit(stream_id, granted))

    def detach(self, stream_id: int, reason: str) -> None:
        if self._streams.pop(stream_id, None) is not None:
            self._send(records.encode(stream_id, Kind.DETACH, reason.encode()))

    def cancel(self, stream_id: int, why: bytes = b"") -> None:
        if stream_id in self._streams:
            self._send(records.encode(stream_id, Kind.CANCEL, why))


class _Handle:
    """One stream of a link, for its reader (a feed.Upstream)."""

    __slots__ = ("_link", "_stream_id")

    def __init__(self, link: NodeLink, stream_id: int) -> None:
        self._link = link
        self._stream_id = stream_id

    def passed_on(self, count: int) -> None:
        self._link.passed_on(self._stream_id, count)

    def detach(self, reason: str) -> None:
        self._link.detach(self._stream_id, reason)

    def cancel(self) -> None:
        self._link.cancel(self._stream_id)

    def discard(self) -> None:
        self._link.cancel(self._stream_id, records.SURPLUS)


class Links:
    """The links that are up, at most one per node."""

    def __init__(self) -> None:
        self._links: dict[str, NodeLink] = {}

    def __iter__(self) -> Iterator[NodeLink]:
        return iter(list(self._links.values()))

    def get(self, node_id: str) -> NodeLink | None:
        return self._links.get(node_id)

    def put(self, link: NodeLink) -> None:
        """The newer link of a node replaces the older one, whose readers lose it."""
        older = self._links.get(link.node_id)
        self._links[link.node_id] = link
        if older is not None:
            older.abort("replaced by a newer link")

    def drop(self, link: NodeLink) -> bool:
        """True if `link` was its node's link; a replaced one was not."""
        if self._links.get(link.node_id) is link:
            del self._links[link.node_id]
            return True
        return False
