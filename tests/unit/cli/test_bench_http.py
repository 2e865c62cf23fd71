from __future__ import annotations

import pytest

from llorch.cli.bench_http import MAX_HEAD_BYTES, NotHttpError, Response

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"


def read(raw: bytes, cut: int) -> tuple[Response, bytes]:
    """The answer, read in two parts that are cut there."""
    response = Response()
    body = response.feed(raw[:cut]) + (response.feed(raw[cut:]) if raw[cut:] else b"")
    return response, body


@pytest.mark.parametrize(
    ("raw", "body", "reusable"),
    [
        (CHUNKED + b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n", b"hello world", True),
        (CHUNKED + b"5\r\nhello\r\n0\r\nTrailer: 1\r\n\r\n", b"hello", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc", b"abc", True),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", b"{}", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x", False),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
    ],
)
def test_an_answer_is_read_whole_wherever_it_is_cut(raw: bytes, body: bytes, reusable: bool) -> None:
    for cut in range(1, len(raw)):
        response, got = read(raw, cut)
        assert (got, response.done, response.reusable) == (body, True, reusable), cut


@pytest.mark.parametrize(
    "raw", [CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"]
)
def test_an_answer_that_lacks_any_of_its_bytes_is_not_done_and_not_whole_at_the_connections_end(raw: bytes) -> None:
    for cut in range(len(raw)):
        response = Response()
        response.feed(raw[:cut])
        assert not response.done
        assert not response.end()


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    response, body = read(b"HTTP/1.1 200 OK\r\n\r\nabc", 20)
    assert (body, response.done, response.reusable) == (b"abc", False, False)
    assert response.end()


def test_headers_are_found_whatever_their_case() -> None:
    response, _ = read(CHUNKED, 7)
    assert response.headers["content-type"] == "text/event-stream"
    assert response.status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc",
        CHUNKED + b"x\r\n",
        CHUNKED + b"1\r\nabc\r\n",
        CHUNKED + b"1" * 2000,
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * MAX_HEAD_BYTES,
    ],
)
def test_what_is_no_http_is_told(raw: bytes) -> None:
    with pytest.raises(NotHttpError):
        Response().feed(raw)
