"""An engine's answer is the same however its bytes come, and what is none is refused without being quoted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch import http_answer
from llorch.http_answer import (
    MAX_HEAD_BYTES,
    MAX_SIZE_LINE_BYTES,
    MAX_TRAILER_BYTES,
    MOST_SIZES,
    Answer,
    BadAnswer,
)

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def read(*pieces: bytes) -> tuple[Answer, bytes]:
    """A reader that was fed `pieces`, and the body it gave out."""
    answer = Answer()
    return answer, b"".join([answer.feed(piece) for piece in pieces])


def one_by_one(raw: bytes) -> list[bytes]:
    return [raw[at : at + 1] for at in range(len(raw))]


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


# ---------------------------------------------------------------- whole answers


@dataclass(frozen=True)
class Whole:
    """An answer, and what it means."""

    raw: bytes
    body: bytes
    status: int = 200
    reusable: bool = True
    ends_with_the_connection: bool = False


WHOLE = {
    "a length": Whole(OK + b"Content-Length: 5\r\n\r\nhello", b"hello"),
    "a length of nothing": Whole(OK + b"Content-Length: 0\r\n\r\n", b""),
    "no reason": Whole(b"HTTP/1.1 200\r\ncontent-length:2\r\n\r\nok", b"ok"),
    "an empty reason": Whole(b"HTTP/1.1 500 \r\ncontent-length:2\r\n\r\nno", b"no", status=500),
    "a reason in another alphabet": Whole(b"HTTP/1.1 400 \xd0\x9d\r\nContent-Length: 0\r\n\r\n", b"", status=400),
    "space around values": Whole(OK + b"X: \t a b \t\r\nContent-Length:\t 1 \t \r\n\r\nx", b"x"),
    "a body that looks like a head": Whole(OK + b"Content-Length: 8\r\n\r\n\r\n\r\n\r\n\r\n", b"\r\n" * 4),
    "chunks of one size": Whole(CHUNKED + chunk(b"abc") * 4 + b"0\r\n\r\n", b"abc" * 4),
    "chunks of many sizes": Whole(
        CHUNKED + b"".join(chunk(b"x" * size) for size in (1, 16, 2, 2, 3)) + b"0\r\n\r\n", b"x" * 24
    ),
    "sizes in either case, and with zeros before": Whole(
        CHUNKED + b"a\r\n0123456789\r\nA\r\n9876543210\r\n00a\r\n0123456789\r\n000\r\n\r\n",
        b"012345678998765432100123456789",
    ),
    "extensions": Whole(
        CHUNKED + chunk(b"ab", b";n=1") * 3 + chunk(b"cd", b' ; n="2;3"') + chunk(b"ef") + b"0;last\r\n\r\n",
        b"ab" * 3 + b"cdef",
    ),
    "space after sizes": Whole(CHUNKED + chunk(b"ab", b" \t") * 2 + b"0 \r\n\r\n", b"abab"),
    "chunks of line ends": Whole(CHUNKED + chunk(b"\r\n") * 3 + chunk(b"2\r\n") + b"0\r\n\r\n", b"\r\n" * 3 + b"2\r\n"),
    "chunks that look like the next one": Whole(CHUNKED + chunk(b"\r\n2\r\n5") * 3 + b"0\r\n\r\n", b"\r\n2\r\n5" * 3),
    "no chunk": Whole(CHUNKED + b"0\r\n\r\n", b""),
    "trailers": Whole(CHUNKED + chunk(b"ab") + b"0\r\nX: 1\r\nContent-Length: 9\r\n\r\n", b"ab"),
    "a coding in capitals": Whole(OK + b"TRANSFER-ENCODING: Chunked\r\n\r\n" + chunk(b"ab") + b"0\r\n\r\n", b"ab"),
    "all that comes": Whole(OK + b"\r\nall\r\n\r\n", b"all\r\n\r\n", reusable=False, ends_with_the_connection=True),
    "all that comes, which is nothing": Whole(OK + b"X: 1\r\n\r\n", b"", reusable=False, ends_with_the_connection=True),
    "HTTP/1.0 with a length": Whole(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", reusable=False),
    "HTTP/1.0 to its end": Whole(b"HTTP/1.0 200 OK\r\n\r\nok", b"ok", reusable=False, ends_with_the_connection=True),
    "no content": Whole(b"HTTP/1.1 204 No Content\r\nX: 1\r\n\r\n", b"", status=204),
    "no content, with the length of another": Whole(
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"", status=304
    ),
    "an interim answer before": Whole(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok", b"ok"),
    "interim answers with fields before": Whole(
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\nContent-Length: 9\r\n\r\n" * 2 + CHUNKED + chunk(b"ok") + b"0\r\n\r\n",
        b"ok",
    ),
    "close": Whole(OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nok", b"ok", reusable=False),
    "close in capitals, among others": Whole(
        OK + b"Connection: x, CLOSE\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"", reusable=False
    ),
    "close before another field of that name": Whole(
        OK + b"Connection: close\r\nConnection: x\r\nContent-Length: 0\r\n\r\n", b"", reusable=False
    ),
    "keep-alive": Whole(OK + b"Connection: keep-alive\r\nContent-Length: 2\r\n\r\nok", b"ok"),
}


def check(whole: Whole, *pieces: bytes) -> dict[str, str]:
    """That `pieces` are the answer; its fields."""
    answer, body = read(*pieces)
    assert (answer.status, body, answer.done) == (whole.status, whole.body, not whole.ends_with_the_connection)
    assert answer.reusable is whole.reusable
    answer.eof()
    assert answer.done
    return dict(answer.headers)


@pytest.mark.parametrize("what", WHOLE)
def test_an_answer_is_the_same_at_every_split_point(what: str) -> None:
    whole = WHOLE[what]
    raw = whole.raw
    headers = check(whole, raw)
    for at in range(len(raw) + 1):
        assert check(whole, raw[:at], raw[at:]) == headers
    assert check(whole, *one_by_one(raw)) == headers


@pytest.mark.parametrize("what", [what for what in WHOLE if "chunk" in what or "extension" in what])
def test_chunks_are_the_same_at_every_two_split_points(what: str) -> None:
    whole = WHOLE[what]
    begin = whole.raw.index(b"\r\n\r\n") + 4
    head, raw = whole.raw[:begin], whole.raw[begin:]
    for first in range(len(raw) + 1):
        for second in range(first, len(raw) + 1):
            answer, body = read(head + raw[:first], raw[first:second], raw[second:])
            assert (body, answer.done, answer.reusable) == (whole.body, True, True)


@pytest.mark.parametrize("what", WHOLE)
def test_an_answer_is_not_done_before_its_last_byte(what: str) -> None:
    whole = WHOLE[what]
    end = len(whole.raw)
    for at in range(end):
        answer, body = read(whole.raw[:at])
        assert not answer.done and not answer.reusable
        assert whole.body.startswith(body)
    answer, _ = read(whole.raw)
    assert answer.done is not whole.ends_with_the_connection


def test_a_status_is_known_once_the_head_is_whole() -> None:
    raw = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 503 No\r\nRetry-After: 1\r\nContent-Length: 9\r\n\r\n"
    answer = Answer()
    for byte in one_by_one(raw):
        assert (answer.status, answer.headers) == (0, {})
        answer.feed(byte)
    assert (answer.status, answer.headers) == (503, {"retry-after": "1", "content-length": "9"})


def test_the_names_of_fields_are_in_lower_case_and_their_values_as_they_came() -> None:
    answer, _ = read(OK + b"X-One:  A  b\t\r\nx_two:\r\nX!#$%&'*+.^`|~-3: \xe9:\r\nContent-Length: 0\r\n\r\n")
    assert answer.headers == {"x-one": "A  b", "x_two": "", "x!#$%&'*+.^`|~-3": "é:", "content-length": "0"}


def test_a_field_that_comes_twice_is_one_list() -> None:
    answer, _ = read(OK + b"X: a\r\nY: c\r\nx: b\r\nContent-Length: 0\r\n\r\n")
    assert answer.headers["x"] == "a, b"


@pytest.mark.parametrize("what", [what for what in WHOLE if not WHOLE[what].ends_with_the_connection])
def test_a_connection_on_which_more_came_than_the_answer_is_not_used_again(what: str) -> None:
    whole = WHOLE[what]
    for more in (b"x", OK):
        for pieces in ((whole.raw + more,), (whole.raw, more), one_by_one(whole.raw + more)):
            answer, body = read(*pieces)
            assert (body, answer.done, answer.reusable) == (whole.body, True, False)


# ---------------------------------------------------------------- any answer


@st.composite
def answers_and_cuts(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """An answer, its body of parts of which many have one size, and where it is cut."""
    size = draw(st.integers(1, 40))
    same = st.binary(min_size=size, max_size=size)
    parts = draw(st.lists(st.one_of(same, same, st.binary(min_size=1, max_size=300)), max_size=12))
    framing = draw(st.sampled_from(("chunked", "length", "end")))
    body = b"".join(parts)
    if framing == "chunked":
        raw = CHUNKED + b"".join(chunk(part) for part in parts) + b"0\r\n\r\n"
    elif framing == "length":
        raw = OK + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    else:
        raw = OK + b"X: 1\r\n\r\n" + body
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    return raw, cuts


def cut(raw: bytes, cuts: list[int]) -> list[bytes]:
    return [raw[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


def by_another_reader(raw: bytes) -> tuple[int, list[Any], bytes] | None:
    """Status, fields and body of an answer whose connection ends after `raw`; None if it is none."""
    h11 = pytest.importorskip("h11")
    other = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    other.send(h11.Request(method="POST", target="/", headers=[("Host", "x"), ("Content-Length", "0")]))
    other.send(h11.EndOfMessage())
    status, fields, body = 0, [], b""
    try:
        for data in (raw, b""):
            if other.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
                break
            other.receive_data(data)
            while (event := other.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    status, fields = event.status_code, list(event.headers)
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    return status, fields, body
                elif isinstance(event, h11.ConnectionClosed):
                    return None
    except h11.RemoteProtocolError:
        return None
    return None


@given(answers_and_cuts())
@settings(max_examples=60, deadline=None)
def test_another_reader_of_http_reads_the_same(given_: tuple[bytes, list[int]]) -> None:
    raw, cuts = given_
    answer, body = read(*cut(raw, cuts))
    answer.eof()
    fields = [(name.encode(), value.encode("latin-1")) for name, value in answer.headers.items()]
    assert (answer.status, fields, body) == by_another_reader(raw)


@given(
    st.sampled_from([whole.raw for whole in WHOLE.values()]),
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(b"\r\n \t:;,0159aAfgx\0\x7f\xff-_+/")), min_size=1, max_size=3),
    st.integers(0, 2),
)
@settings(max_examples=120, deadline=None)
def test_what_is_spoilt_is_refused_or_read_as_another_reader_reads_it(
    raw: bytes, spoil: list[tuple[float, int]], how: int
) -> None:
    """Bytes are replaced, put in between, or taken away. Whatever two readers take for an answer is the same one."""
    spoilt = bytearray(raw)
    for where, byte in spoil:
        at = int(where * (len(spoilt) - 1))
        spoilt[at : at + (1 if how else 0)] = b"" if how == 2 else bytes([byte])
    try:
        answer, body = read(bytes(spoilt))
        answer.eof()
    except BadAnswer:
        return
    other = by_another_reader(bytes(spoilt))
    if other is not None:
        assert (answer.status, body) == (other[0], other[2])


# ---------------------------------------------------------------- no answer

WORD = b"53cret"

MALFORMED = {
    "another protocol": WORD + b"\r\n\r\n",
    "another version": b"HTTP/2 200 " + WORD + b"\r\n\r\n",
    "another minor version": b"HTTP/1.2 200 " + WORD + b"\r\n\r\n",
    "a protocol in small letters": b"http/1.1 200 " + WORD + b"\r\n\r\n",
    "an empty line before": b"\r\n" + OK + b"\r\n",
    "a status of two digits": b"HTTP/1.1 20 " + WORD + b"\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 " + WORD + b"\r\n\r\n",
    "a status that is none": b"HTTP/1.1 abc " + WORD + b"\r\n\r\n",
    "a status of six hundred": b"HTTP/1.1 600 " + WORD + b"\r\n\r\n",
    "two spaces before the status": b"HTTP/1.1  200 " + WORD + b"\r\n\r\n",
    "a control character in the reason": b"HTTP/1.1 200 \x01" + WORD + b"\r\n\r\n",
    "a line end of LF": b"HTTP/1.1 200 " + WORD + b"\nX: 1\r\n\r\n",
    "a field without colon": OK + WORD + b"\r\n\r\n",
    "a field without name": OK + b": " + WORD + b"\r\n\r\n",
    "a space before the colon": OK + WORD + b" : 1\r\n\r\n",
    "a space before the name": OK + b" " + WORD + b": 1\r\n\r\n",
    "a field on two lines": OK + b"X: 1\r\n " + WORD + b"\r\n\r\n",
    "a zero in a field": OK + b"X: \0" + WORD + b"\r\n\r\n",
    "a CR in a field": OK + b"X: a\r" + WORD + b"\r\n\r\n",
    "a LF in a field": OK + b"X: a\nY: " + WORD + b"\r\n\r\n",
    "a name beyond ASCII": OK + b"\xe9" + WORD + b": 1\r\n\r\n",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + WORD,
    "one length twice": OK + b"Content-Length: 6\r\ncontent-length: 6\r\n\r\n" + WORD,
    "a list of lengths": OK + b"Content-Length: 6, 6\r\n\r\n" + WORD,
    "two codings": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(WORD),
    "a length and a coding": OK + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(WORD),
    "a coding and a length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n" + chunk(WORD),
    "another coding": OK + b"Transfer-Encoding: gzip\r\n\r\n" + WORD,
    "a coding of codings": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunk(WORD),
    "a coding of nothing": OK + b"Transfer-Encoding:\r\n\r\n" + WORD,
    "a coding in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(WORD),
    "a length with a sign": OK + b"Content-Length: +6\r\n\r\n" + WORD,
    "a length below zero": OK + b"Content-Length: -6\r\n\r\n" + WORD,
    "a length with an underscore": OK + b"Content-Length: 1_0\r\n\r\n" + WORD,
    "a length in words": OK + b"Content-Length: " + WORD + b"\r\n\r\n",
    "a length of nothing": OK + b"Content-Length:\r\n\r\n" + WORD,
    "a length in another alphabet": OK + b"Content-Length: \xb2\r\n\r\n" + WORD,
    "a length without end": OK + b"Content-Length: " + b"1" * 16 + b"\r\n\r\n" + WORD,
    "a size with a sign": CHUNKED + b"+6\r\n" + WORD + b"\r\n",
    "a size below zero": CHUNKED + b"-6\r\n" + WORD + b"\r\n",
    "a size with an underscore": CHUNKED + b"0_6\r\n" + WORD + b"\r\n",
    "a size with a space before": CHUNKED + b" 6\r\n" + WORD + b"\r\n",
    "a size of hexadecimal's sign": CHUNKED + b"0x6\r\n" + WORD + b"\r\n",
    "a size of nothing": CHUNKED + b"\r\n" + WORD + b"\r\n",
    "a size that is only an extension": CHUNKED + b";x\r\n" + WORD + b"\r\n",
    "a size in words": CHUNKED + b"size " + WORD + b"\r\n",
    "a size and words": CHUNKED + b"6 " + WORD + b"\r\n",
    "a size without end": CHUNKED + b"000000006\r\n" + WORD + b"\r\n",
    "a size that ends with LF": CHUNKED + b"6\n" + WORD + b"\r\n0\r\n\r\n",
    "a LF in an extension": CHUNKED + b"6;x\ny\r\n" + WORD + b"\r\n",
    "a CR in an extension": CHUNKED + b"6;x\ry\r\n" + WORD + b"\r\n",
    "an extension too long": CHUNKED + b"6;" + b"x" * MAX_SIZE_LINE_BYTES + b"\r\n" + WORD + b"\r\n",
    "a chunk without its end": CHUNKED + b"6\r\n" + WORD + b"0\r\n\r\n",
    "a chunk that is longer than it said": CHUNKED + b"5\r\n" + WORD + b"\r\n0\r\n\r\n",
    "a chunk that is shorter than it said": CHUNKED + b"7\r\n" + WORD + b"\r\n0\r\n\r\n",
    "a chunk that ends with LF": CHUNKED + b"6\r\n" + WORD + b"\n0\r\n\r\n",
    "another protocol from now on": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: " + WORD + b"\r\n\r\n",
    "an interim answer that is none": b"HTTP/1.1 100 Continue\r\n\r\n" + WORD + b"\r\n\r\n",
}


def refuse(*pieces: bytes) -> None:
    """That `pieces` are no answer, and that nothing of them is told."""
    with pytest.raises(BadAnswer) as refused:
        read(*pieces)
    error = refused.value
    assert error.args and WORD.decode() not in repr(error)
    assert error.__cause__ is None and error.__context__ is None


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_malformed_is_no_answer_and_is_not_quoted(what: str) -> None:
    raw = MALFORMED[what]
    refuse(raw)
    refuse(*one_by_one(raw))


@pytest.mark.parametrize("spoilt", range(6))
@pytest.mark.parametrize("ending", [b"", b"\n", b"\r", b"\n\r", b"\r\r\n", b"x", b"xy"])
def test_a_chunk_among_equal_ones_that_does_not_end_is_no_answer(spoilt: int, ending: bytes) -> None:
    chunks = [chunk(WORD)] * 6
    chunks[spoilt] = b"6\r\n" + WORD + ending
    raw = CHUNKED + b"".join(chunks) + b"0\r\n\r\n"
    refuse(raw)
    refuse(*one_by_one(raw))
    refuse(raw[:-9], raw[-9:])


@pytest.mark.parametrize("size", [b"5", b"7", b"+6", b"6_", b" 6", b"", b"g"])
def test_a_chunk_among_equal_ones_that_says_another_size_is_no_answer(size: bytes) -> None:
    raw = CHUNKED + chunk(WORD) * 3 + size + b"\r\n" + WORD + b"\r\n" + chunk(WORD) + b"0\r\n\r\n"
    refuse(raw)
    refuse(*one_by_one(raw))


def in_pieces(raw: bytes, size: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, len(raw), size)]


@pytest.mark.parametrize(
    "raw",
    [
        OK + b"X: " + b"x" * MAX_HEAD_BYTES,
        OK + b"X: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        OK + b"X: 1\r\n" * (MAX_HEAD_BYTES // 6) + b"Content-Length: 0\r\n\r\n",
        CHUNKED + b"6;" + b"x" * MAX_SIZE_LINE_BYTES,
        CHUNKED + b"0\r\nX: " + b"x" * MAX_TRAILER_BYTES,
        b"HTTP/1.1 100 Continue\r\n\r\n" * MAX_HEAD_BYTES,
    ],
    ids=["a field", "a field, to its end", "many fields", "an extension", "a trailer", "interim answers"],
)
def test_what_grows_without_end_is_no_answer(raw: bytes) -> None:
    refuse(raw)
    refuse(*in_pieces(raw, 100))


def test_a_head_and_lines_within_their_bounds_are_read() -> None:
    field = b"x" * (MAX_HEAD_BYTES - len(CHUNKED))
    extension = b";" + b"x" * (MAX_SIZE_LINE_BYTES - 2)
    raw = CHUNKED[:-2] + b"X:" + field + b"\r\n\r\n" + chunk(b"ok", extension) + b"0\r\nX: "
    raw += b"x" * (MAX_TRAILER_BYTES - 4) + b"\r\n\r\n"
    for pieces in ([raw], in_pieces(raw, 100)):
        answer, body = read(*pieces)
        assert (len(answer.headers["x"]), body, answer.reusable) == (len(field), b"ok", True)


def test_a_head_of_spaces_takes_no_longer_than_another() -> None:
    """With several ways to tell a value from the space around it, this one would take hours."""
    spaces = b" " * 30_000
    refuse(OK + b"X:" + spaces + b"\0\r\n\r\n")
    answer, _ = read(OK + b"X: a" + spaces + b"b\r\nContent-Length: 0\r\n\r\n")
    assert answer.headers["x"] == "a" + spaces.decode() + "b"


def test_no_more_sizes_are_remembered_than_there_is_room_for() -> None:
    for count in range(MOST_SIZES + 10):
        answer, body = read(CHUNKED + chunk(b"ok", b";%d" % count))
        assert (body, answer.done) == (b"ok", False)
    assert 0 < len(http_answer._sizes) <= MOST_SIZES


# ---------------------------------------------------------------- the connection's end


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1",
        OK + b"Content-Le",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        OK + b"Content-Length: 5\r\n\r\n",
        OK + b"Content-Length: 5\r\n\r\nhell",
        CHUNKED,
        CHUNKED + b"5",
        CHUNKED + b"5\r\n",
        CHUNKED + b"5\r\nhell",
        CHUNKED + b"5\r\nhello",
        CHUNKED + b"5\r\nhello\r",
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"0",
        CHUNKED + b"0\r\n",
        CHUNKED + b"0\r\nX: 1\r\n",
        CHUNKED + b"0\r\n\r",
    ],
)
def test_an_answer_that_ends_early_is_none(raw: bytes) -> None:
    answer, _ = read(raw)
    with pytest.raises(BadAnswer):
        answer.eof()
    assert not answer.done and not answer.reusable


def test_an_answer_that_is_over_stays_so_when_its_connection_ends() -> None:
    for raw in (OK + b"Content-Length: 2\r\n\r\nok", CHUNKED + b"0\r\n\r\n", OK + b"\r\nok"):
        answer, _ = read(raw)
        for _ in range(2):
            answer.eof()
            assert answer.done
