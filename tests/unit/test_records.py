from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch import records
from llorch.records import Decoder, ReceiveCredit, Record, RecordError, SendCredit, Type

SOME = [
    Record(1, Type.OPEN, b'{"task_id":"x"}'),
    Record(1, Type.BODY, b"\x00\xff" * 40),
    Record(0, Type.PING, b""),
    Record(0xFFFFFFFF, Type.DATA, b"data: x\n\n"),
    Record(3, 200, b"from a later version"),
]
WIRE = b"".join(records.encode(*record) for record in SOME)


def test_every_split_point_gives_the_same_records() -> None:
    for cut in range(len(WIRE) + 1):
        decoder = Decoder()
        assert decoder.feed(WIRE[:cut]) + decoder.feed(WIRE[cut:]) == SOME
        assert decoder.pending == 0


def test_byte_by_byte_gives_the_same_records() -> None:
    decoder = Decoder()
    assert [record for byte in WIRE for record in decoder.feed(bytes([byte]))] == SOME


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.binary(max_size=300)), max_size=20),
    st.lists(st.integers(1, 50), max_size=200),
)
def test_what_was_encoded_is_decoded_whatever_the_chunks(items: list[tuple[int, int, bytes]], sizes: list[int]) -> None:
    wire = b"".join(records.encode(*item) for item in items)
    decoder, out = Decoder(), []
    for size in sizes:
        out += decoder.feed(wire[:size])
        wire = wire[size:]
    out += decoder.feed(wire)
    assert out == [Record(*item) for item in items]


def test_a_record_is_at_most_64_kib() -> None:
    assert len(records.encode(1, Type.DATA, b"x" * records.MAX_PAYLOAD_BYTES)) == 64 * 1024
    with pytest.raises(ValueError, match="at most"):
        records.encode(1, Type.DATA, b"x" * (records.MAX_PAYLOAD_BYTES + 1))


def test_a_lying_length_breaks_the_decoder_for_good() -> None:
    decoder = Decoder()
    with pytest.raises(RecordError):
        decoder.feed(records.HEADER.pack(1, Type.DATA, records.MAX_PAYLOAD_BYTES + 1))
    with pytest.raises(RecordError):
        decoder.feed(records.encode(1, Type.PING))


def test_long_data_is_cut_and_comes_back_whole() -> None:
    data = bytes(range(256)) * 1000
    out = Decoder().feed(b"".join(records.encode_cut(5, Type.DATA, data)))
    assert len(out) == 4
    assert b"".join(record.payload for record in out) == data


def test_a_cut_record_is_seen_as_pending() -> None:
    decoder = Decoder()
    decoder.feed(WIRE[:-1])
    assert decoder.pending > 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[1]",
        b"{",
        b"\xff",
        b"nul",
        b"[" * 100_000,
        b'{"a":NaN}',
        b'{"a":1,"a":2}',
        b'{"a":"\\ud800"}',
        b"1" * 5_000,
    ],
)
def test_malformed_json_in_a_record_is_the_peers_fault(payload: bytes) -> None:
    with pytest.raises(RecordError):
        records.decode_json(payload)


@given(
    st.dictionaries(st.text(), st.text() | st.lists(st.text() | st.integers(-(2**200), 2**200)), max_size=4),
    st.booleans(),
)
def test_what_a_header_can_hold_breaks_no_link(value: dict[str, Any], half: bool) -> None:
    """Bytes of a header that are no UTF-8 come as half surrogate pairs: they are replaced, and not a peer's fault."""
    value["half"] = "\udcff" if half else "ü"
    (record,) = Decoder().feed(records.encode_json(1, Type.OPEN, value))
    assert records.decode_json(record.payload) == value | {"half": "?" if half else "ü"}


@pytest.mark.parametrize("payload", [b"", b"\0\0\0", b"\0\0\0\0\0"])
def test_malformed_credit_is_the_peers_fault(payload: bytes) -> None:
    with pytest.raises(RecordError):
        records.decode_credit(payload)


def test_credit_survives_the_wire() -> None:
    (record,) = Decoder().feed(records.encode_credit(7, 70_000))
    assert (record.stream, record.type, records.decode_credit(record.payload)) == (7, Type.CREDIT, 70_000)


def test_a_sender_never_takes_more_than_it_was_granted() -> None:
    credit = SendCredit(100)
    assert credit.take(60) == 60
    assert credit.take(60) == 40
    assert credit.take(60) == 0
    credit.grant(10)
    assert credit.take(60) == 10


def test_an_overrun_is_the_peers_fault() -> None:
    credit = ReceiveCredit(100)
    credit.arrived(100)
    with pytest.raises(RecordError, match="overrun"):
        credit.arrived(1)


@given(st.lists(st.integers(1, 40_000), max_size=200))
def test_a_reader_that_passes_everything_on_never_stalls_its_sender(sizes: list[int]) -> None:
    send, receive = SendCredit(), ReceiveCredit()
    for size in sizes:
        left = size
        while left:
            taken = send.take(left)
            assert taken > 0, "the sender has stalled with every byte passed on"
            receive.arrived(taken)
            send.grant(receive.passed_on(taken))
            left -= taken


def test_small_tokens_cost_no_credit_record_each() -> None:
    receive, grants = ReceiveCredit(), 0
    for _ in range(1_000):
        receive.arrived(100)
        grants += bool(receive.passed_on(100))
    assert grants == 1
