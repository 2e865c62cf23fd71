"""Where requests end: whatever the pieces in which they come, and nothing that could end in two places."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch import framing
from llorch.framing import MAX_CHUNKS, MAX_FIELDS, MAX_HEAD_BYTES, MAX_LINE_BYTES, Framer

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /b?q=1 HTTP/1.1\r\nhost: x:8080\r\nContent-Length: 5\r\n\r\nhello"
CHUNK_HEAD = b"POST /c HTTP/1.1\r\nHost: [::1]:80\r\nTransfer-Encoding:  chunked \r\n\r\n"
CHUNKED = CHUNK_HEAD + b"3\r\nabc\r\nA\r\n0123\r\n5678\r\n0\r\n\r\n"
OLD = b"GET /d HTTP/1.0\r\n\r\n"
FIELDS = b"DELETE /e%20 HTTP/1.1\r\nHost:\r\nX-Empty:\r\nX-Text: \xc3\xa9 \t'\"\r\nCookie: a\r\nCookie: b\r\n\r\n"
EMPTY = b"POST /f HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
GOOD = (GET, POST, CHUNKED, OLD, FIELDS, EMPTY)


def cut(framer: Framer, pieces: list[bytes]) -> list[bytes]:
    """The requests in `pieces`, each one answered once it is whole."""
    requests, now = [], b""
    for piece in pieces:
        now += framer.feed(piece)
        while framer.done:
            requests.append(now)
            now = framer.proceed()
    return requests


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


@given(st.lists(st.sampled_from(GOOD), min_size=1, max_size=8), st.lists(st.integers(0, 2_000), max_size=20))
def test_requests_are_cut_where_they_end_however_they_arrive(requests: list[bytes], cuts: list[int]) -> None:
    framer = Framer()
    assert cut(framer, split(b"".join(requests), cuts)) == requests
    assert framer.fault is None
    assert framer.between
    assert framer.held_bytes == 0


@pytest.mark.parametrize("request_", GOOD)
def test_a_request_may_come_byte_by_byte(request_: bytes) -> None:
    assert cut(Framer(), [bytes([byte]) for byte in b"\r\n" + request_ + GET]) == [b"\r\n" + request_, GET]


def test_the_next_request_is_not_looked_at_before_the_first_is_answered() -> None:
    framer = Framer()
    assert framer.feed(GET + b"\x00\xff this is no request") == GET
    assert framer.done
    assert framer.fault is None
    assert framer.feed(b"more") == b""
    assert framer.held_bytes == len(b"\x00\xff this is no requestmore")
    assert framer.proceed() == b""
    assert framer.fault is not None


def test_a_head_is_passed_on_whole_or_not_at_all() -> None:
    framer = Framer()
    passed = [framer.feed(bytes([byte])) for byte in POST]
    assert [piece for piece in passed if piece] == [POST[:-5], b"h", b"e", b"l", b"l", b"o"]


def line(size: int, name: bytes = b"X: ") -> bytes:
    return name + b"a" * (size - len(name)) + b"\r\n"


def head(*lines: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(lines) + b"\r\n"


@pytest.mark.parametrize(
    ("whole", "status"),
    [
        (head(line(MAX_LINE_BYTES)), None),
        (head(line(MAX_LINE_BYTES + 1)), 431),
        (head(line(MAX_LINE_BYTES + 1, b"Content-Type: ")), 431),
        (head(*[b"X: y\r\n"] * (MAX_FIELDS - 1)), None),
        (head(*[b"X: y\r\n"] * MAX_FIELDS), 431),
        (head(*[line(MAX_LINE_BYTES)] * 3), None),
        (head(*[line(MAX_LINE_BYTES)] * 4), 431),
        (head(*[line(MAX_HEAD_BYTES // 40)] * 41), 431),
        (b"GET /" + b"a" * (MAX_LINE_BYTES - 14) + b" HTTP/1.1\r\nHost: x\r\n\r\n", None),
        (b"GET /" + b"a" * (MAX_LINE_BYTES - 13) + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    ],
)  # fmt: skip
@pytest.mark.parametrize("step", [1_000_000, 997])
def test_a_head_has_bounds_in_each_direction(whole: bytes, status: int | None, step: int) -> None:
    framer = Framer()
    passed = b"".join(framer.feed(whole[at : at + step]) for at in range(0, len(whole), step))
    assert (framer.fault.status if framer.fault else None) == status
    assert passed == (b"" if status else whole)


@pytest.mark.parametrize(
    "endless", [b"G" * 100, b"GET /" + b"a" * 100, b"GET / HTTP/1.1\r\nX: " + b"a" * 100, head()[:-2]]
)
def test_a_head_without_end_is_held_to_its_bound_and_no_further(endless: bytes) -> None:
    framer, more = Framer(), endless[-1:] if endless[-1:] != b"\n" else b"X: y\r\n"
    framer.feed(endless)
    for _ in range(MAX_HEAD_BYTES + MAX_LINE_BYTES):
        framer.feed(more)
        assert framer.held_bytes <= MAX_HEAD_BYTES + MAX_LINE_BYTES
    assert framer.fault is not None


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01", b"\x00", b"get / HTTP/1.1\r\n", b"\r\n\r\n", b"\n", b" GET", b"\xff"]
)
def test_what_can_become_no_request_is_refused_at_its_first_byte(garbage: bytes) -> None:
    framer = Framer()
    framer.feed(garbage)
    assert framer.fault is not None
    assert framer.feed(GET) == b""


@given(st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=50), st.lists(st.integers(), max_size=20))
def test_a_chunked_body_ends_where_it_says_and_is_passed_on_unchanged(chunks: list[bytes], cuts: list[int]) -> None:
    frames = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    whole = CHUNK_HEAD + frames + b"0\r\n\r\n"
    assert cut(Framer(), split(whole + GET, cuts)) == [whole, GET]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (b"", b"zz\r\n"), (b"", b"\r\n"), (b"", b"-1\r\n"), (b"", b"+3\r\n"), (b"", b"0x3\r\n"), (b"", b"3 \r\nabc"),
        (b"", b"3\nabc\n"), (b"", b"3;a=b\r\nabc\r\n"), (b"", b"3;" + b"a" * 100), (b"", b"ffffffffffffffff\r\n"),
        (b"", b"000000000\r\n"), (b"3\r\nabc", b"d\r\n"), (b"3\r\nabc", b"\n"),
        (b"3\r\nabc\r\n0\r\n", b"X: trailer\r\n"), (b"3\r\nabc\r\n0\r\n", b"GET / HTTP/1.1\r\n"), (b"0\r\n", b"\n"),
    ],
)  # fmt: skip
def test_a_chunk_that_could_be_read_in_two_ways_is_a_fault_after_what_was_good(good: bytes, bad: bytes) -> None:
    for pieces in ([CHUNK_HEAD + good + bad], [CHUNK_HEAD, *(bytes([byte]) for byte in good + bad + b"\n" * 12)]):
        framer = Framer()
        passed = b"".join(framer.feed(piece) for piece in pieces)
        assert framer.fault is not None
        assert passed == CHUNK_HEAD + good


def test_a_body_of_tiny_chunks_is_bounded() -> None:
    framer = Framer()
    framer.feed(CHUNK_HEAD)
    framer.feed(b"1\r\nx\r\n" * MAX_CHUNKS)
    assert framer.fault is None
    framer.feed(b"1\r\nx\r\n")
    assert framer.fault is not None


def test_a_fault_quotes_nothing() -> None:
    for raw in (b"GET /secret HTTP/1.1\r\nHost: secret\r\nHost: secret\r\n\r\n", head(b"Content-Length: secret\r\n")):
        framer = Framer()
        framer.feed(raw)
        assert framer.fault is not None
        assert "secret" not in framer.fault.why


@given(st.binary(max_size=400), st.lists(st.integers(), max_size=5))
def test_any_bytes_are_taken_or_refused_the_same_however_they_arrive(raw: bytes, cuts: list[int]) -> None:
    for data in (raw, GET[:20] + raw, CHUNK_HEAD + raw, head(raw)):
        whole, pieces = Framer(), Framer()
        assert cut(whole, [data]) == cut(pieces, split(data, cuts))
        assert whole.between == pieces.between
        if whole.fault is not None and len(data) < framing.MAX_LINE_BYTES:
            assert pieces.fault is not None
            assert pieces.fault.why == whole.fault.why
