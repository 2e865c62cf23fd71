"""Messages that two readers could cut at different places, and others that are no HTTP: bytes in, statuses out.

Every line of the corpus hides a request for /smuggled where a reader that is less strict would find one. It is never
served, whether the bytes come at once, one by one, or cut in the midst of a line.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from aiohttp import web as aiohttp_web

from llorch import listen, web
from llorch.auth import Scope, TokenRing
from llorch.web import Gate, Route

LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
SMUGGLED = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
HOST = "Host: x\r\n"
LATER = "\r\n" + SMUGGLED  # ends the head, and begins another


@dataclass(frozen=True)
class Line:
    """`statuses`: of all the answers that come, in order."""

    name: str
    sent: str
    statuses: tuple[int, ...] = (400,)


def post(headers: str, body: str = SMUGGLED, version: str = "1.1") -> str:
    return f"POST /read HTTP/{version}\r\n{HOST}{headers}\r\n{body}"


def get(headers: str) -> str:
    return f"GET /open HTTP/1.1\r\n{HOST}{headers}\r\n"


def chunks(body: str) -> str:
    return post("Transfer-Encoding: chunked\r\n", body)


CHUNKED = "Transfer-Encoding: chunked\r\n"
CORPUS = [
    # ---- where the body ends
    Line("length and chunked", post("Content-Length: 6\r\n" + CHUNKED, "0\r\n\r\n" + SMUGGLED)),
    Line("chunked and length", post(CHUNKED + "Content-Length: 6\r\n", "0\r\n\r\n" + SMUGGLED)),
    Line("two lengths", post("Content-Length: 0\r\nContent-Length: 35\r\n")),
    Line("two equal lengths", post("Content-Length: 0\r\nContent-Length: 0\r\n")),
    Line("a list of lengths", post("Content-Length: 0, 35\r\n")),
    Line("a list of equal lengths", post("Content-Length: 0, 0\r\n")),
    Line("length with a sign", post("Content-Length: +0\r\n")),
    Line("negative length", post("Content-Length: -1\r\n")),
    Line("hexadecimal length", post("Content-Length: 0x0\r\n")),
    Line("length with an underscore", post("Content-Length: 4_4\r\n")),
    Line("empty length", post("Content-Length:\r\n")),
    Line("length of full-width digits", post("Content-Length: \uff10\r\n")),
    Line("length of 64 bits", post("Content-Length: 18446744073709551615\r\n")),
    Line("length beyond 64 bits", post("Content-Length: 18446744073709551616\r\n")),
    Line("blank before the colon of a length", post("Content-Length : 0\r\n")),
    Line("tab before the colon of an encoding", post("Transfer-Encoding\t: chunked\r\n", "0\r\n\r\n" + SMUGGLED)),
    Line("line folding before an encoding", post("X: y\r\n Transfer-Encoding: chunked\r\n", "0\r\n\r\n" + SMUGGLED)),
    Line("line folding of an encoding", post("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n" + SMUGGLED)),
    Line("identity", post("Transfer-Encoding: identity\r\n")),
    Line("identity and length", post("Transfer-Encoding: identity\r\nContent-Length: 0\r\n")),
    Line("chunked, identity", post("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n" + SMUGGLED)),
    Line("gzip, chunked", post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n" + SMUGGLED)),
    Line("chunked, chunked", post("Transfer-Encoding: chunked, chunked\r\n", "0\r\n\r\n" + SMUGGLED)),
    Line("chunked twice", post(CHUNKED * 2, "0\r\n\r\n" + SMUGGLED)),
    Line("chunked with a parameter", post("Transfer-Encoding: chunked;q=1\r\n", "0\r\n\r\n" + SMUGGLED)),
    Line("quoted chunked", post('Transfer-Encoding: "chunked"\r\n', "0\r\n\r\n" + SMUGGLED)),
    Line("xchunked", post("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n" + SMUGGLED)),
    Line("vertical tab before chunked", post("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n" + SMUGGLED)),
    Line("empty encoding", post("Transfer-Encoding:\r\n")),
    Line("chunked in HTTP/1.0", post(CHUNKED, "0\r\n\r\n" + SMUGGLED, version="1.0")),
    # ---- chunks
    Line("chunk extension", chunks("3;x=y\r\nabc\r\n0\r\n\r\n" + SMUGGLED)),
    Line("chunk extension without end", chunks("3;" + "x" * 20_000)),
    Line("chunk extension with a bare LF", chunks("3;\nabc\r\n0\r\n\r\n" + SMUGGLED)),
    Line("chunk size with a bare LF", chunks("3\nabc\n0\n\n" + SMUGGLED)),
    Line("chunk size with a bare CR", chunks("3\rabc\r\n0\r\n\r\n" + SMUGGLED)),
    Line("chunk size with 0x", chunks("0x3\r\nabc\r\n0\r\n\r\n" + SMUGGLED)),
    Line("chunk size with a blank", chunks("3 \r\nabc\r\n0\r\n\r\n" + SMUGGLED)),
    Line("chunk size with a sign", chunks("+3\r\nabc\r\n0\r\n\r\n" + SMUGGLED)),
    Line("negative chunk size", chunks("-3\r\nabc\r\n0\r\n\r\n" + SMUGGLED)),
    Line("chunk size beyond 64 bits", chunks("10000000000000003\r\nabc\r\n0\r\n\r\n" + SMUGGLED)),
    Line("empty chunk size", chunks("\r\nabc\r\n0\r\n\r\n" + SMUGGLED)),
    Line("chunk longer than it said", chunks("3\r\nabcd\r\n0\r\n\r\n" + SMUGGLED)),
    Line("chunk ended by a bare LF", chunks("3\r\nabc\n0\r\n\r\n" + SMUGGLED)),
    Line("trailer", chunks("0\r\nX: y\r\n\r\n" + SMUGGLED)),
    Line("trailer that frames", chunks("0\r\nContent-Length: 35\r\n\r\n" + SMUGGLED)),
    Line("last chunk ended by a bare LF", chunks("0\r\n\n" + SMUGGLED)),
    # ---- lines
    Line("bare LF after the request line", f"GET /open HTTP/1.1\nHost: x\r\n{LATER}"),
    Line("bare LF throughout", "GET /open HTTP/1.1\nHost: x\n\nGET /smuggled HTTP/1.1\nHost: x\n\n"),
    Line("bare LF in a value", get("X: y\nContent-Length: 35\r\n") + SMUGGLED),
    Line("bare CR in a value", get("X: y\rContent-Length: 35\r\n") + SMUGGLED),
    Line("bare CR ends a line", f"GET /open HTTP/1.1\r\nHost: x\r{LATER}"),
    Line("CR CR LF", f"GET /open HTTP/1.1\r\nHost: x\r\r\n{LATER}"),
    Line("folded line", get("X: y\r\n z\r\n") + SMUGGLED),
    Line("first line folded", f"GET /open HTTP/1.1\r\n X: y\r\n{HOST}\r\n{SMUGGLED}"),
    Line("NUL in a value", get("X: a\x00b\r\n") + SMUGGLED),
    Line("control character in a value", get("X: a\x08b\r\n") + SMUGGLED),
    Line("DEL in a value", get("X: a\x7fb\r\n") + SMUGGLED),
    Line("NUL in a name", get("X\x00: y\r\n") + SMUGGLED),
    Line("non-ASCII name", get("X\xe9: y\r\n") + SMUGGLED),
    Line("empty name", get(": y\r\n") + SMUGGLED),
    Line("name with a blank", get("X Y: z\r\n") + SMUGGLED),
    Line("line without a colon", get("Content-Length\r\n") + SMUGGLED),
    # ---- who and where
    Line("no Host", f"GET /open HTTP/1.1\r\n\r\n{SMUGGLED}"),
    Line("two Hosts", get("Host: y\r\n") + SMUGGLED),
    Line("two equal Hosts", get(HOST) + SMUGGLED),
    Line("Host with a path", f"GET /open HTTP/1.1\r\nHost: x/y\r\n\r\n{SMUGGLED}"),
    Line("Host with a user", f"GET /open HTTP/1.1\r\nHost: a@x\r\n\r\n{SMUGGLED}"),
    Line("list of Hosts", f"GET /open HTTP/1.1\r\nHost: x, y\r\n\r\n{SMUGGLED}"),
    Line("two credentials of one kind", get("Authorization: Bearer a\r\nAuthorization: Bearer b\r\n") + SMUGGLED),
    Line("two api keys", get("api-key: a\r\nAPI-Key: b\r\n") + SMUGGLED),
    Line("another server's URL", f"GET http://y/smuggled HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("authority", f"CONNECT y:443 HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("a star", f"OPTIONS * HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("relative target", f"GET smuggled HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("empty target", f"GET  HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("fragment", f"GET /open#/smuggled HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("non-ASCII target", f"GET /open\xe9 HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("NUL in the target", f"GET /open\x00 HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("blank in the target", f"GET /open /smuggled HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("two blanks", f"GET  /open HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("tabs for blanks", f"GET\t/open\tHTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("blank after the version", f"GET /open HTTP/1.1 \r\n{HOST}\r\n{SMUGGLED}"),
    Line("method in small letters", f"get /open HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("unknown method", f"SMUGGLE /open HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    # ---- versions and other protocols
    Line("HTTP/0.9", f"GET /open\r\n{LATER}"),
    Line("HTTP/1.2", f"GET /open HTTP/1.2\r\n{HOST}\r\n{SMUGGLED}"),
    Line("HTTP/2.0", f"GET /open HTTP/2.0\r\n{HOST}\r\n{SMUGGLED}"),
    Line("HTTP/1.01", f"GET /open HTTP/1.01\r\n{HOST}\r\n{SMUGGLED}"),
    Line("http/1.1", f"GET /open http/1.1\r\n{HOST}\r\n{SMUGGLED}"),
    Line("HTTP/2 preface", f"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04{SMUGGLED}"),
    Line("TLS greeting", f"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03{SMUGGLED}"),
    Line("TLS 2.0 greeting", f"\x80\x2e\x01\x03\x01{SMUGGLED}"),
    Line("SSH", f"SSH-2.0-OpenSSH_9.0\r\n{SMUGGLED}"),
    Line("PROXY protocol", f"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n{SMUGGLED}"),
    Line("SMTP", f"EHLO x\r\n{SMUGGLED}"),
    Line("empty lines", "\r\n\r\n" + SMUGGLED),
    Line("bare LF first", "\n" + SMUGGLED),
    # ---- bounds
    Line("long target", f"GET /open?{'a' * 9_000} HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}", (414,)),
    Line("long line", get(f"X: {'a' * 9_000}\r\n") + SMUGGLED, (431,)),
    Line("long name", get(f"{'X' * 9_000}: y\r\n") + SMUGGLED, (431,)),
    Line("many lines", get("X: y\r\n" * 100) + SMUGGLED, (431,)),
    Line("large head", get(f"X: {'a' * 4_000}\r\n" * 10) + SMUGGLED, (431,)),
]  # fmt: skip

# What looks odd, has one reading, and is served; with as many requests as it holds.
PLAIN = [
    Line("pipelined", get("") + SMUGGLED, (200, 200)),
    Line("an empty line before", "\r\n" + SMUGGLED, (200,)),
    Line("an empty line between", get("") + "\r\n" + SMUGGLED, (200, 200)),
    Line("behind a body of known length", post("Content-Length: 2\r\n", "hi" + SMUGGLED), (200, 200)),
    Line("behind a chunked body", chunks("2\r\nhi\r\n0\r\n\r\n" + SMUGGLED), (200, 200)),
    Line("behind an empty chunked body", chunks("0\r\n\r\n" + SMUGGLED), (200, 200)),
    Line("Chunked in another case, with blanks", post("TRANSFER-ENCODING:\t CHUNKED \r\n", "0\r\n\r\n"), (200,)),
    Line("length with zeros in front", post("Content-Length: 002\r\n", "hi"), (200,)),
    Line("a body that nobody asked for", get("Content-Length: 35\r\n") + SMUGGLED, (200,)),
    Line("a body where there is no route", f"POST /x HTTP/1.1\r\n{HOST}Content-Length: 35\r\n\r\n{SMUGGLED}", (404,)),
    Line("no length and no encoding", post("") , (200, 200)),
    Line("HTTP/1.0", f"GET /open HTTP/1.0\r\n\r\n{SMUGGLED}", (200,)),
    Line("close", get("Connection: close\r\n") + SMUGGLED, (200,)),
    Line("an upgrade that is not known", get("Connection: Upgrade\r\nUpgrade: h2c\r\n") + SMUGGLED, (200, 200)),
    Line("an upgrade to websocket", get("Connection: Upgrade\r\nUpgrade: websocket\r\n") + SMUGGLED, (200, 200)),
    Line("a header with an underscore", get("Content_Length: 44\r\n") + SMUGGLED, (200, 200)),
    Line("text beyond ASCII", get("X: \xe9\r\n"), (200,)),
    Line("method of another protocol", f"SOURCE /open HTTP/1.1\r\n{HOST}\r\n{SMUGGLED}", (405, 200)),
    Line("OPTIONS", f"OPTIONS /open HTTP/1.1\r\n{HOST}\r\n", (405,)),
]  # fmt: skip

ENDS = ("HTTP/1.0", "close")  # with which a client ends its connection


class Served:
    def __init__(self) -> None:
        self.paths: list[str] = []

    async def answer(self, request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
        self.paths.append(request.path)
        return web.json_response({})

    async def read(self, request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
        body = await web.read_body(request, most_bytes=1_000_000)
        self.paths.append(request.path)
        return web.json_response({"bytes": len(body)})


class Client(asyncio.Protocol):
    """Keeps what came before the connection was reset, as a stream reader does not."""

    def __init__(self) -> None:
        self.came = b""
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.came += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


@asynccontextmanager
async def serving(served: Served) -> AsyncIterator[listen.Server]:
    routes = [
        Route("GET", "/open", Scope.OPEN, served.answer, ""),
        Route("GET", "/smuggled", Scope.OPEN, served.answer, ""),
        Route("GET", "/last", Scope.OPEN, served.answer, ""),
        Route("POST", "/read", Scope.OPEN, served.read, ""),
    ]
    app = web.make_app(routes, Gate(TokenRing), max_body_bytes=1_000_000)
    server = await listen.serve(app, "127.0.0.1", 0, shutdown_timeout_s=1)
    try:
        yield server
    finally:
        await server.close()


async def exchange(server: listen.Server, pieces: list[bytes]) -> tuple[tuple[int, ...], bytes]:
    """The statuses of all answers to `pieces`, sent one after the other, and everything that came."""
    transport, client = await asyncio.get_running_loop().create_connection(Client, server.host, server.port)
    for piece in (*pieces, LAST):
        transport.write(piece)
        await asyncio.sleep(0)
    await asyncio.wait_for(client.ended.wait(), 5)
    transport.close()
    return tuple(int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", client.came)), client.came


def pieces_of(sent: str, step: int) -> list[bytes]:
    raw = sent.encode("utf-8" if any(ord(char) > 255 for char in sent) else "latin-1")
    return [raw[at : at + step] for at in range(0, len(raw), step)]


@pytest.mark.parametrize("line", CORPUS, ids=lambda line: line.name)
async def test_what_can_be_read_in_two_ways_is_refused_and_nothing_after_it_is_served(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served()
    with caplog.at_level(logging.DEBUG):
        async with serving(served) as server:
            statuses, came = await exchange(server, pieces_of(line.sent, 1 << 20))
    assert statuses == line.statuses
    assert served.paths == []
    assert came.startswith(b"HTTP/1.")  # from the very first byte
    assert [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info] == []


@pytest.mark.parametrize("line", PLAIN, ids=lambda line: line.name)
async def test_what_has_one_reading_is_served_as_often_as_it_asks(line: Line) -> None:
    served = Served()
    async with serving(served) as server:
        statuses, _ = await exchange(server, pieces_of(line.sent, 1 << 20))
    assert statuses == line.statuses + (() if line.name in ENDS else (200,))
    assert len(served.paths) == statuses.count(200)


@pytest.mark.parametrize("step", [7, 64])
async def test_it_is_the_same_however_the_bytes_arrive(step: int) -> None:
    served = Served()
    async with serving(served) as server:
        for line in CORPUS:
            assert (await exchange(server, pieces_of(line.sent, step)))[0] == line.statuses, line.name
        assert served.paths == []
        for line in PLAIN:
            statuses, _ = await exchange(server, pieces_of(line.sent, step))
            assert statuses == line.statuses + (() if line.name in ENDS else (200,)), line.name


@pytest.mark.parametrize("before", ["", get("")], ids=["alone", "behind another"])
async def test_a_body_that_breaks_and_that_nobody_reads_ends_the_connection(before: str) -> None:
    served = Served()
    async with serving(served) as server:
        sent = before + get(CHUNKED) + "3;x=y\r\nabc\r\n0\r\n\r\n" + SMUGGLED
        statuses, _ = await exchange(server, pieces_of(sent, 1 << 20))
    assert set(statuses) == {200}
    assert served.paths == ["/open"] * (1 + bool(before))


async def test_what_is_no_request_is_told_so_behind_another_too() -> None:
    served = Served()
    async with serving(served) as server:
        for line in CORPUS:
            assert (await exchange(server, pieces_of(get("") + line.sent, 1 << 20)))[0] == (200, *line.statuses), (
                line.name
            )
    assert served.paths == ["/open"] * len(CORPUS)
