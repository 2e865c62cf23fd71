"""Records: what travels between control and node, on a link or inside an HTTP body.

    u32 stream | u8 type | u32 length | payload          big-endian; a whole record is at most 64 KiB

Owns the framing, the incremental decoder, and the arithmetic of credit. Sans-I/O: bytes in, records out. A malformed
record raises RecordError (the peer erred) and the decoder stays broken: the only cure is to close the connection.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from pydantic_core import PydanticSerializationError, to_json

from llorch.errors import LlorchError
from llorch.messages import decode_object

MAX_RECORD_BYTES = 64 * 1024
HEADER = struct.Struct(">IBI")
MAX_PAYLOAD_BYTES = MAX_RECORD_BYTES - HEADER.size
INITIAL_CREDIT_BYTES = 128 * 1024  # per stream and direction
CONTENT_TYPE = "application/x-llorch-records"
UPGRADE = "llorch-records/1"
SURPLUS = b"surplus"  # a CANCEL's payload: not its client's wish, but an attempt that the task has left behind

_U32 = struct.Struct(">I")


class Type(IntEnum):
    OPEN = 1
    BODY = 2
    ATTACH = 3
    ACCEPT = 4
    REFUSE = 5
    HEAD = 6
    DATA = 7
    TAIL = 8
    CREDIT = 9
    DETACH = 10
    CANCEL = 11
    PING = 12
    PONG = 13


class Kind:
    """The same as plain numbers, for what is done for each record: to look up an enum's member costs more than the rest
    of a comparison."""

    OPEN, BODY, ATTACH, ACCEPT, REFUSE, HEAD, DATA, TAIL, CREDIT, DETACH, CANCEL, PING, PONG = map(int, Type)


class RecordError(Exception):
    """The peer broke the protocol; the connection can't be trusted any further."""


class CreditOverrun(RecordError):
    """The peer sent more than it was granted."""


class Record(NamedTuple):
    stream: int
    type: int  # a Type, or a number this version doesn't know and skips
    payload: bytes


def encode(stream: int, type: int, payload: bytes = b"") -> bytes:
    """One record. Raises ValueError if the payload is too long: cut BODY and DATA first."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"record payload of {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES}")
    return HEADER.pack(stream, type, len(payload)) + payload


def encode_json(stream: int, type: int, value: object) -> bytes:
    """`value` as JSON that `decode_json` takes: half a surrogate pair, as a header can hold, becomes `?`."""
    try:
        payload = to_json(value)  # a quarter of what json.dumps takes
    except PydanticSerializationError:
        payload = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return encode(stream, type, payload)


def encode_cut(stream: int, type: int, data: bytes | memoryview) -> Iterator[bytes]:
    """BODY or DATA of any length, as records that fit."""
    for start in range(0, len(data), MAX_PAYLOAD_BYTES):
        yield encode(stream, type, bytes(data[start : start + MAX_PAYLOAD_BYTES]))


def encode_credit(stream: int, granted_bytes: int) -> bytes:
    return encode(stream, Kind.CREDIT, _U32.pack(granted_bytes))


def decode_credit(payload: bytes) -> int:
    if len(payload) != _U32.size:
        raise RecordError("CREDIT payload is not a u32")
    return int(_U32.unpack(payload)[0])


def decode_json(payload: bytes) -> dict[str, Any]:
    """A JSON object from a peer of ours, as strict as any. Raises RecordError without quoting it."""
    try:
        return decode_object(payload)
    except LlorchError:
        raise RecordError("record payload is not a JSON object") from None


_make = tuple.__new__


class Decoder:
    """Cuts a byte stream into records, however it arrives."""

    __slots__ = ("_broken", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._broken = False

    def feed(self, data: bytes) -> list[Record]:
        """The records that `data` completes. Raises RecordError on a length over the limit."""
        if self._broken:
            raise RecordError("the decoder met a malformed record before")
        if self._rest:
            data = self._rest + data
        out: list[Record] = []
        at, end, size, unpack = 0, len(data), HEADER.size, HEADER.unpack_from
        while end - at >= size:
            stream, kind, length = unpack(data, at)
            if length > MAX_PAYLOAD_BYTES:
                self._broken = True
                raise RecordError(f"record payload of {length} bytes, at most {MAX_PAYLOAD_BYTES}")
            stop = at + size + length
            if stop > end:
                break
            out.append(_make(Record, (stream, kind, data[at + size : stop])))  # twice as fast as Record(...)
            at = stop
        self._rest = data[at:]
        return out

    @property
    def pending(self) -> int:
        """Bytes of a record that has not ended. Not zero when a connection ends: it was cut."""
        return len(self._rest)


class SendCredit:
    """What may still be sent on a stream before the reader grants more."""

    __slots__ = ("available",)

    def __init__(self, initial: int = INITIAL_CREDIT_BYTES) -> None:
        self.available = initial

    def take(self, wanted: int) -> int:
        """How many of `wanted` bytes may go now; they are spent."""
        taken = min(wanted, self.available)
        self.available -= taken
        return taken

    def grant(self, granted: int) -> None:
        self.available += granted


class ReceiveCredit:
    """What the peer may still send us on a stream, and what we owe it.

    `arrived` is called for each payload, `passed_on` when its bytes have left us (to a client, to an engine).
    Grants are collected until half the window is due, so that a token costs no CREDIT record.
    """

    __slots__ = ("_due", "_half", "_open")

    def __init__(self, initial: int = INITIAL_CREDIT_BYTES) -> None:
        self._open = initial
        self._due = 0
        self._half = initial // 2

    def arrived(self, count: int) -> None:
        """Raises RecordError if the peer sent more than it was granted."""
        self._open -= count
        if self._open < 0:
            raise CreditOverrun("credit overrun")

    def passed_on(self, count: int) -> int:
        """The bytes to grant now (0: not yet worth a record)."""
        self._due += count
        if self._due < self._half:
            return 0
        due, self._due = self._due, 0
        self._open += due
        return due
