from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch import sse
from llorch.sse import Decoder, Event, Splitter, SseError

STREAMS = {
    "lf": b'data: a\n\nevent: token\nid: 00000000001f\ndata: {"t":"x"}\n\n: ping\n\ndata: b\n\n',
    "crlf": b'data: a\r\n\r\nevent: token\r\nid: 00000000001f\r\ndata: {"t":"x"}\r\n\r\n: ping\r\n\r\ndata: b\r\n\r\n',
    "cr": b'data: a\r\revent: token\rid: 00000000001f\rdata: {"t":"x"}\r\r: ping\r\rdata: b\r\r',
    "mixed": b'data: a\r\n\nevent: token\rid: 00000000001f\ndata: {"t":"x"}\n\r\n: ping\n\rdata: b\r\r\n',
}
EVENTS = [Event("", "a"), Event("token", '{"t":"x"}', "00000000001f"), Event("", "b")]


def decoded(*parts: bytes) -> list[Event]:
    decoder = Decoder()
    out = [event for part in parts for event in decoder.feed(part)]
    last = decoder.finish()
    return out + ([last] if last else [])


@pytest.mark.parametrize("name", STREAMS)
def test_every_split_point_gives_the_same_events(name: str) -> None:
    wire = STREAMS[name]
    for cut in range(len(wire) + 1):
        assert decoded(wire[:cut], wire[cut:]) == EVENTS, cut


@pytest.mark.parametrize("name", STREAMS)
def test_every_split_point_gives_the_same_blocks(name: str) -> None:
    """A relay passes blocks on as they came: the last half of a line end may not slip into the next one."""
    wire = STREAMS[name]
    whole = Splitter()
    blocks = [block for block in (*whole.feed(wire), whole.finish()) if block]
    assert len(blocks) == 4
    for cut in range(len(wire) + 1):
        splitter = Splitter()
        got = [*splitter.feed(wire[:cut]), *splitter.feed(wire[cut:]), splitter.finish()]
        assert [block for block in got if block] == blocks, cut


@pytest.mark.parametrize("name", STREAMS)
def test_every_pair_of_split_points_gives_the_same_events(name: str) -> None:
    wire = STREAMS[name]
    for first in range(0, len(wire) + 1, 3):
        for second in range(first, len(wire) + 1, 2):
            assert decoded(wire[:first], wire[first:second], wire[second:]) == EVENTS, (first, second)


@pytest.mark.parametrize("name", STREAMS)
def test_byte_by_byte_gives_the_same_events(name: str) -> None:
    assert decoded(*(bytes([byte]) for byte in STREAMS[name])) == EVENTS


@given(st.binary(max_size=300), st.lists(st.integers(1, 20), max_size=100))
def test_blocks_put_together_are_the_bytes_that_came(data: bytes, sizes: list[int]) -> None:
    splitter, rest, out = Splitter(), data, b""
    for size in sizes:
        out += b"".join(splitter.feed(rest[:size]))
        rest = rest[size:]
    out += b"".join(splitter.feed(rest))
    assert out + splitter.finish() == data


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"data: x", b":c", b"id"]), max_size=30), st.data())
def test_blocks_do_not_depend_on_the_chunks(parts: list[bytes], draw: st.DataObject) -> None:
    data = b"".join(parts)
    cut = draw.draw(st.integers(0, len(data)))
    whole, cutter = Splitter(), Splitter()
    expected = [*whole.feed(data), whole.finish()]
    assert cutter.feed(data[:cut]) + cutter.feed(data[cut:]) + [cutter.finish()] == expected


def test_several_data_lines_are_one_event() -> None:
    assert decoded(b"data: a\ndata:b\ndata\n\n") == [Event("", "a\nb\n")]


def test_a_comment_is_no_event_and_a_block_of_its_own() -> None:
    assert Splitter().feed(b": ping\n\n") == [b": ping\n\n"]
    assert decoded(b": ping\n\n") == []


def test_an_event_without_data_is_dropped() -> None:
    assert decoded(b"event: x\nid: 1\n\n") == []


def test_a_cut_event_is_dropped() -> None:
    assert decoded(b"data: whole\n\ndata: cut\n") == [Event("", "whole")]


def test_a_byte_order_mark_is_skipped() -> None:
    assert decoded(b"\xef\xbb\xbfdata: a\n\n") == [Event("", "a")]


def test_an_event_without_end_is_refused_at_the_limit() -> None:
    splitter = Splitter(limit=100)
    splitter.feed(b"data: " + b"x" * 90)
    with pytest.raises(SseError):
        splitter.feed(b"x" * 20)


@given(
    st.text(alphabet=st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=50),
    st.text(max_size=100),
)
def test_what_was_encoded_is_decoded(kind: str, data: str) -> None:
    same_but_for_line_ends = data.replace("\r\n", "\n").replace("\r", "\n")
    assert decoded(sse.encode(kind, data, id="00ff")) == [Event(kind, same_but_for_line_ends, "00ff")]
