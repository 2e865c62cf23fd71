"""How an answer is framed on its connection, and what is known of a client that is behind or gone."""

from __future__ import annotations

import asyncio
import re
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.http_connection import Connection
from llorch.outlet import Outlet, date_now, head_of
from llorch.web import STREAM_WRITE_BUFFER_BYTES


class Transport:
    def __init__(self) -> None:
        self.sent = b""
        self.waiting = 0
        self.closing = self.aborted = False
        self.limits: list[int] = []

    def write(self, data: bytes) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def set_write_buffer_limits(self, high: int) -> None:
        self.limits.append(high)

    def get_extra_info(self, _name: str) -> None:
        return None

    def abort(self) -> None:
        self.aborted = True


class Protocol(BaseProtocol):
    """aiohttp's own flow control; without a server."""

    bounded = False


def an_outlet(**more: Any) -> tuple[Outlet, Transport, Protocol]:
    loop = asyncio.new_event_loop()
    loop.close()
    protocol, transport = Protocol(loop), Transport()
    protocol.transport = cast(asyncio.Transport, transport)
    return Outlet(cast(Connection, protocol), "r1", **more), transport, protocol


def head_and_body(sent: bytes) -> tuple[str, dict[str, str], bytes]:
    head, _, body = sent.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", fields.pop("Date"))
    return first, fields, body


IDS = {"X-Request-Id": "r1", "X-Correlation-Id": "r1"}


def test_an_answer_of_unknown_length_is_chunked() -> None:
    outlet, transport, _ = an_outlet()
    outlet.begin(200, {"Content-Type": "text/plain"})
    outlet.write(b"x" * 26)
    assert outlet.write_now(b"y" * 17)
    done = outlet.finish()
    first, fields, body = head_and_body(transport.sent)
    assert first == "HTTP/1.1 200 OK"
    assert fields == {"Content-Type": "text/plain", **IDS, "Transfer-Encoding": "chunked"}
    assert body == b"1a\r\n" + b"x" * 26 + b"\r\n11\r\n" + b"y" * 17 + b"\r\n0\r\n\r\n"
    assert done.keep_alive is True
    assert done.status == 200


def test_an_answer_of_known_length_is_what_is_written() -> None:
    outlet, transport, _ = an_outlet()
    outlet.begin(404, {"content-length": "6"})
    outlet.write(b"one")
    assert outlet.write_now(b"two")
    done = outlet.finish()
    first, fields, body = head_and_body(transport.sent)
    assert (first, fields, body) == ("HTTP/1.1 404 Not Found", {"content-length": "6", **IDS}, b"onetwo")
    assert (done.keep_alive, done.status) == (True, 404)


def test_an_older_client_gets_no_chunks_and_the_end_of_the_connection_for_the_end_of_the_answer() -> None:
    outlet, transport, _ = an_outlet(old=True)
    outlet.begin(200, {})
    outlet.write(b"one")
    done = outlet.finish()
    _, fields, body = head_and_body(transport.sent)
    assert (fields, body, done.keep_alive) == ({**IDS, "Connection": "close"}, b"one", False)


def test_an_older_client_that_stays_is_told_that_it_may_where_the_length_is_known() -> None:
    outlet, transport, _ = an_outlet(old=True)
    outlet.begin(200, {"content-length": "3"})
    outlet.write(b"one")
    _, fields, body = head_and_body(transport.sent)
    assert (fields["Connection"], body, outlet.finish().keep_alive) == ("keep-alive", b"one", True)


@pytest.mark.parametrize("headers", [{}, {"content-length": "3"}])
@pytest.mark.parametrize("old", [False, True])
def test_a_client_that_closes_is_told_so(old: bool, headers: dict[str, str]) -> None:
    outlet, transport, _ = an_outlet(old=old, keep_alive=False)
    outlet.begin(200, headers)
    outlet.write(b"one")
    assert head_and_body(transport.sent)[1]["Connection"] == "close"
    assert outlet.finish().keep_alive is False


def test_a_whole_answer_has_its_length_and_comes_once() -> None:
    outlet, transport, _ = an_outlet()
    outlet.whole(web.Response(status=429, body=b'{"a": 1}', headers={"Retry-After": "3"}, content_type="text/json"))
    first, fields, body = head_and_body(transport.sent)
    assert (first, body) == ("HTTP/1.1 429 Too Many Requests", b'{"a": 1}')
    assert fields == {"Retry-After": "3", "Content-Type": "text/json", "content-length": "8", **IDS}


def test_a_writer_of_aiohttps_learns_that_the_answer_has_begun() -> None:
    class Writer:
        output_size = 0

    outlet, transport, _ = an_outlet(writer=Writer)
    outlet.begin(200, {})
    assert len(transport.sent) == Writer.output_size > 0


@pytest.mark.parametrize("field", [("X", "a\r\nY: b"), ("X", "a\n"), ("X", "\r"), ("X\r\nY", "a"), ("X\n", "a")])
def test_a_field_with_a_line_break_sends_nothing(field: tuple[str, str]) -> None:
    outlet, transport, _ = an_outlet()
    with pytest.raises(ValueError, match="line break"):
        outlet.begin(200, dict([field]))
    assert transport.sent == b""


FIELD = st.text(alphabet="ab:\r\n \x85\u2028\xe9", max_size=4)


@settings(max_examples=60)
@given(st.dictionaries(FIELD, FIELD, max_size=3), st.integers(200, 599))
def test_a_head_has_as_many_lines_as_fields_whatever_those_are(fields: dict[str, str], status: int) -> None:
    try:
        head = head_of(status, fields)
    except ValueError:
        assert any(char in f"{name}{value}" for name, value in fields.items() for char in "\r\n")
        return
    assert len(re.findall(rb"\r\n|\r|\n", head)) == len(fields) + 3
    assert head.endswith(b" GMT\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)


def test_the_date_is_that_of_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    for now, text in ((1_700_000_000.9, "Tue, 14 Nov 2023 22:13:20 GMT"), (1_700_000_001.0, "22:13:21 GMT")):
        monkeypatch.setattr("time.time", lambda now=now: now)
        assert date_now().endswith(text)


# ---------------------------------------------------------------- clients that are behind, or gone


def test_to_one_that_is_behind_nothing_is_written_now() -> None:
    outlet, transport, _ = an_outlet()
    transport.waiting = STREAM_WRITE_BUFFER_BYTES
    assert not outlet.behind
    assert outlet.write_now(b"one")
    transport.waiting += 1
    before = transport.sent
    assert outlet.behind
    assert not outlet.write_now(b"two")
    assert transport.sent == before


@pytest.mark.parametrize("closing", [True, False], ids=["it goes", "it has gone"])
def test_to_one_that_has_gone_nothing_is_written_and_who_writes_is_told(closing: bool) -> None:
    outlet, transport, protocol = an_outlet()
    outlet.begin(200, {})
    transport.closing, before = closing, transport.sent
    if not closing:
        protocol.transport = None
    assert not outlet.write_now(b"one")
    for write in (lambda: outlet.write(b"one"), outlet.finish, lambda: outlet.begin(200, {})):
        with pytest.raises(ConnectionResetError):
            write()
    assert transport.sent == before
    assert outlet.behind is not closing


def test_the_send_buffer_is_bounded_once_for_each_connection() -> None:
    outlet, transport, protocol = an_outlet()
    outlet.begin(200, {})
    Outlet(cast(Connection, protocol), "r2").begin(200, {})
    assert transport.limits == [STREAM_WRITE_BUFFER_BYTES]


def test_to_wait_until_one_has_caught_up_ends_when_it_has_and_raises_when_it_has_gone() -> None:
    async def wait() -> None:
        protocol = Protocol(asyncio.get_running_loop())
        protocol.connection_made(cast(asyncio.Transport, asyncio.Transport()))
        outlet = Outlet(cast(Connection, protocol), "r1")
        await outlet.drained()  # nobody waits for one that is not behind
        for lost in (False, True):
            protocol.pause_writing()
            waiting = asyncio.ensure_future(outlet.drained())
            await asyncio.sleep(0)
            assert not waiting.done()
            if not lost:
                protocol.resume_writing()
                await waiting
            else:
                protocol.connection_lost(None)
                with pytest.raises(ConnectionResetError):
                    await waiting
                with pytest.raises(ConnectionResetError):
                    await outlet.drained()

    asyncio.run(wait())


def test_an_answer_that_is_cut_ends_the_connection_and_says_no_end() -> None:
    outlet, transport, protocol = an_outlet()
    outlet.begin(200, {})
    outlet.write(b"one")
    done = outlet.cut()
    assert (transport.aborted, done.keep_alive, done.status) == (True, False, 200)
    assert transport.sent.endswith(b"3\r\none\r\n")
    protocol.transport = None
    outlet.abort()  # and of one that has gone nothing more
