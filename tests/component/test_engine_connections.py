"""Asking engines over real sockets: which connection serves whom, when one is kept, and what is told of its end.

The engines speak what the test scripts, byte by byte; each accepted connection is in the test's hands.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import uvloop

from llorch.node import engine_connections
from llorch.node.engine_connections import Engines, Exchange, engines
from tests.certificates import certificate
from tests.cluster import eventually

WITHIN_S = 10.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TO_THE_END = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture(autouse=True)
def kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What closes a connection in a test is what the test is about."""
    for name in ("KEPT_IDLE_S", "LINGER_S", "CONNECT_TIMEOUT_S"):
        monkeypatch.setattr(engine_connections, name, 10 * WITHIN_S)


class Accepted:
    """A connection, as the engine has it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def request(self) -> bytes:
        """The next request, head and body."""
        async with asyncio.timeout(WITHIN_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            assert length is not None
            return head + await self._reader.readexactly(int(length[1]))

    def say(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self, data: bytes = OK) -> bytes:
        request = await self.request()
        self.say(data)
        return request

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def gone(self) -> None:
        """Waits until the other side has closed; what it sends before that is a fault."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(WITHIN_S):
                assert await self._reader.read(1) == b""
        self.close()

    @property
    def open(self) -> bool:
        return not self._reader.at_eof() and self._reader.exception() is None


class Engine:
    """A listening socket and what it accepted."""

    def __init__(self) -> None:
        self.url = ""
        self.every: list[Accepted] = []
        self._new: asyncio.Queue[Accepted] = asyncio.Queue()

    async def accepted(self) -> Accepted:
        return await asyncio.wait_for(self._new.get(), WITHIN_S)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.every.append(Accepted(reader, writer))
        self._new.put_nowait(self.every[-1])


class Told:
    """Who asks (a Taker): all that it was told, in order."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 0, dict[str, str](), b""
        self.broken: str | None = "not ended"
        self.calls: list[str] = []
        self.over = asyncio.Event()
        self.on: dict[str, Callable[[], None]] = {}  # what it does when it is told so

    def _told(self, what: str) -> None:
        self.calls.append(what)
        self.on.get(what, lambda: None)()

    def answered(self, status: int, headers: Mapping[str, str]) -> None:
        self.status, self.headers = status, dict(headers)
        self._told("answered")

    def received(self, data: bytes) -> None:
        assert data
        self.body += data
        self._told("received")

    def ended(self, broken: str | None) -> None:
        self.broken = broken
        self._told("ended")
        self.over.set()

    async def end(self) -> str | None:
        await asyncio.wait_for(self.over.wait(), WITHIN_S)
        assert self.calls.count("ended") == 1 and self.calls[-1] == "ended" and self.calls.count("answered") <= 1
        return self.broken


class Asking:
    """Engines, one of them, and what was asked of it."""

    def __init__(self, asking: Engines, engine: Engine) -> None:
        self.engines, self.engine = asking, engine
        self.exchange: Exchange | None = None  # the latest

    def ask(self, told: Told | None = None, body: bytes = b"{}", **headers: str) -> Told:
        told = told or Told()
        self.exchange = self.engines.ask(self.engine.url, "/v1/x", headers, body, told)
        assert told.calls == []
        return told

    @property
    def asked(self) -> Exchange:
        assert self.exchange is not None
        return self.exchange

    async def begun(self, data: bytes, body: bytes) -> tuple[Told, Accepted]:
        """One whose answer has begun with `data`, of which `body` was told."""
        told = self.ask()
        accepted = await self.engine.accepted()
        await accepted.answer(data)
        await eventually(lambda: told.body == body)
        return told, accepted

    async def exchanged(self, data: bytes = OK) -> Accepted:
        """One whole exchange, on a new connection."""
        told = self.ask()
        accepted = await self.engine.accepted()
        await accepted.answer(data)
        assert await told.end() is None
        return accepted


@contextlib.asynccontextmanager
async def listening(tls: ssl.SSLContext | None = None) -> AsyncIterator[Engine]:
    engine = Engine()
    server = await asyncio.start_server(engine.accept, "127.0.0.1", 0, ssl=tls)
    engine.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()
        for accepted in engine.every:
            accepted.close()
        await server.wait_closed()


@contextlib.asynccontextmanager
async def asking_one() -> AsyncIterator[Asking]:
    """At its end no task is left, and no connection."""
    before = asyncio.all_tasks()
    async with listening() as engine:
        async with engines() as asking:
            yield Asking(asking, engine)
        assert {task.get_name() for task in asyncio.all_tasks() - before if "node.engines" in task.get_name()} == set()
        for accepted in engine.every:
            await accepted.gone()


# ---------------------------------------------------------------- one exchange


async def test_a_request_is_sent_as_it_was_asked_and_its_answer_told_piece_by_piece() -> None:
    async with asking_one() as at:
        at.engine.url += "/base/"
        told = at.ask(body=b'{"a": "\xc3\xa9"}', Authorization="Bearer k")
        accepted = await at.engine.accepted()
        host = at.engine.url.removeprefix("http://").removesuffix("/base/")
        assert (
            await accepted.request()
            == (
                b"POST /base/v1/x HTTP/1.1\r\nHost: %b\r\nAccept: */*\r\nAccept-Encoding: identity\r\n"
                b'Authorization: Bearer k\r\nContent-Length: 11\r\n\r\n{"a": "\xc3\xa9"}'
            )
            % host.encode()
        )
        accepted.say(b"HTTP/1.1 201 Made\r\nX-One: 1\r\nTransfer-Encoding: chunked\r\n\r\n")
        await eventually(lambda: told.calls == ["answered"])
        assert (told.status, told.headers) == (201, {"x-one": "1", "transfer-encoding": "chunked"})
        accepted.say(b"2\r\nab\r\n")
        await eventually(lambda: told.body == b"ab")
        accepted.say(b"1\r\nc\r\n0\r\n\r\n")
        assert await told.end() is None
        assert told.calls == ["answered", "received", "received", "ended"]
        assert told.body == b"abc"


@pytest.mark.parametrize("url", ["", "unix:///x", "ftp://127.0.0.1", "http://", "http://x:99999", "http://\u00e9.test"])
async def test_the_url_of_no_engine_is_refused(url: str) -> None:
    async with engines() as asking:
        with pytest.raises(ValueError):
            asking.ask(url, "/v1/x", {}, b"", Told())


def test_the_name_of_a_host_is_as_its_url_has_it() -> None:
    for url, host in (("http://[::1]:80/", "[::1]:80"), ("http://localhost", "localhost:80"), ("https://h", "h:443")):
        assert engine_connections._Place(url).fields.startswith(f"Host: {host}\r\n")


async def test_an_answer_that_ends_with_its_connection_is_whole() -> None:
    async with asking_one() as at:
        told, accepted = await at.begun(TO_THE_END + b"all of", b"all of")
        accepted.say(b" it")
        accepted.close()
        assert await told.end() is None
        assert told.body == b"all of it"
        await at.exchanged()


async def test_an_answer_that_ends_with_a_broken_connection_is_not() -> None:
    async with asking_one() as at:
        told, accepted = await at.begun(TO_THE_END + b"all of", b"all of")
        accepted.reset()
        assert await told.end() == "ConnectionResetError"
        assert told.body == b"all of"


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1", CHUNKED, CHUNKED + b"5\r\nhel", OK[:-1]], ids=["nothing", "a word", "a head", "2", "3"]
)
@pytest.mark.parametrize("reset", [False, True])
async def test_what_a_new_connection_says_before_it_closes_is_all_and_nothing_is_sent_again(
    said: bytes, reset: bool
) -> None:
    async with asking_one() as at:
        told = at.ask()
        accepted = await at.engine.accepted()
        await accepted.answer(said)
        if b"\r\n\r\n" in said:
            await eventually(lambda: told.status == 200)
        (accepted.reset if reset else accepted.close)()
        assert await told.end() in ("ConnectionResetError", "ServerDisconnectedError")
        assert (told.status == 200) is (b"\r\n\r\n" in said)
        assert len(at.engine.every) == 1


@pytest.mark.parametrize("said", [b"SSH-2.0\r\n", CHUNKED + b"zz\r\n", b"HTTP/1.1 101 Switching\r\n\r\n"])
async def test_what_is_no_answer_breaks_it_and_its_connection_is_closed(said: bytes) -> None:
    async with asking_one() as at:
        told = at.ask()
        accepted = await at.engine.accepted()
        await accepted.answer(said)
        assert await told.end() == "BadAnswer"
        await accepted.gone()
        assert len(at.engine.every) == 1


async def test_who_asked_may_go_at_any_word_and_is_told_no_other() -> None:
    async with asking_one() as at:
        for word in ("answered", "received"):
            for go in (Exchange.abort, Exchange.finish):
                told = Told()
                told.on[word] = lambda go=go: go(at.asked)
                at.ask(told)
                accepted = await at.engine.accepted()
                await accepted.answer(CHUNKED + b"1\r\na\r\n1\r\nb\r\n")
                await eventually(lambda told=told: told.calls)
                accepted.say(b"1\r\nc\r\n")
                if go is Exchange.abort:
                    await accepted.gone()
                accepted.close()
                assert told.calls == ["answered", "received"][: 1 + (word == "received")]


# ---------------------------------------------------------------- connections that are kept


async def test_a_connection_is_used_again() -> None:
    async with asking_one() as at:
        accepted = await at.exchanged()
        for answer in (
            CHUNKED + b"2\r\nok\r\n0\r\n\r\n",
            b"HTTP/1.1 204 No\r\n\r\n",
            b"HTTP/1.1 100 C\r\n\r\n" + OK,
            OK,
        ):
            told = at.ask()
            await accepted.answer(answer)
            assert await told.end() is None
            assert told.body == (b"" if b"204" in answer else b"ok")
        assert len(at.engine.every) == 1


async def test_two_requests_at_a_time_have_a_connection_each_and_the_newest_is_used_first() -> None:
    async with asking_one() as at:
        first, second = at.ask(), at.ask()
        one, other = await at.engine.accepted(), await at.engine.accepted()
        for accepted in (one, other):
            await accepted.request()
        one.say(OK)
        await eventually(lambda: first.over.is_set() or second.over.is_set())
        other.say(OK)
        assert (await first.end(), await second.end()) == (None, None)
        told = at.ask()
        await other.answer()
        assert await told.end() is None
        assert len(at.engine.every) == 2


async def test_engines_have_connections_of_their_own() -> None:
    async with asking_one() as at, listening() as another:
        await at.exchanged()
        told = Told()
        at.engines.ask(another.url, "/", {}, b"", told)
        await (await another.accepted()).answer()
        assert await told.end() is None


async def test_a_kept_connection_is_closed_after_a_while_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_connections, "KEPT_IDLE_S", 0.05)
    async with asking_one() as at:
        loop = asyncio.get_running_loop()
        for _ in range(2):  # the second time, nobody looks any more
            told, since = Told(), [0.0]
            told.on["ended"] = lambda since=since: since.append(loop.time())
            at.ask(told)
            accepted = await at.engine.accepted()
            await accepted.answer()
            await accepted.gone()
            assert loop.time() - since[-1] >= 0.049
            await eventually(lambda: at.engines._look is None)
        assert len(at.engine.every) == 2


async def test_of_two_kept_connections_the_one_that_was_used_stays() -> None:
    async with asking_one() as at:
        first, second = at.ask(), at.ask()
        for _ in range(2):
            await (await at.engine.accepted()).answer()
        assert (await first.end(), await second.end()) == (None, None)
        place = at.engines._places[at.engine.url]
        older, newer = place.idle
        older.idle_since -= engine_connections.KEPT_IDLE_S
        assert at.engines._look is not None
        at.engines._look.cancel()
        at.engines._close_idle()
        assert place.idle == [newer]
        assert at.engines._look is not None  # for the other one
        await eventually(lambda: at.engines.open == {newer})


async def test_a_connection_in_use_is_not_closed_however_long_it_takes() -> None:
    async with asking_one() as at:
        kept = await at.exchanged()
        (connection,) = at.engines.open
        connection.idle_since -= engine_connections.KEPT_IDLE_S
        told = at.ask()
        await kept.request()
        assert at.engines._look is not None
        at.engines._look.cancel()
        at.engines._close_idle()
        assert at.engines._look is None
        kept.say(OK)
        assert await told.end() is None


async def test_who_asks_again_at_the_end_of_an_answer_has_its_connection() -> None:
    async with asking_one() as at:
        told, again = Told(), Told()
        told.on["ended"] = lambda: at.ask(again) and None
        at.ask(told)
        accepted = await at.engine.accepted()
        for _ in range(2):
            await accepted.answer()
        assert await again.end() is None
        assert len(at.engine.every) == 1


@pytest.mark.parametrize("how", [Accepted.close, Accepted.reset])
async def test_a_kept_connection_that_closes_as_it_is_used_again_costs_a_second_try(
    how: Callable[[Accepted], None],
) -> None:
    async with asking_one() as at:
        kept = await at.exchanged()
        told = at.ask(body=b"the same")
        sent = await kept.request()
        how(kept)
        fresh = await at.engine.accepted()
        assert await fresh.answer() == sent
        assert await told.end() is None
        assert (told.body, told.calls) == (b"ok", ["answered", "received", "ended"])
        assert len(at.engine.every) == 2


async def test_a_request_is_sent_twice_at_most() -> None:
    async with asking_one() as at:
        first, second = at.ask(), at.ask()
        kept = [await at.engine.accepted(), await at.engine.accepted()]
        for accepted in kept:
            await accepted.answer()
        assert (await first.end(), await second.end()) == (None, None)
        told = at.ask()  # on one of two that are kept
        for accepted in kept:
            accepted.close()
        fresh = await at.engine.accepted()
        await fresh.request()
        fresh.close()
        assert await told.end() == "ServerDisconnectedError"
        assert (told.calls, len(at.engine.every)) == (["ended"], 3)


async def test_a_kept_connection_that_said_a_word_is_not_replaced() -> None:
    for said, why in ((b"H", "ServerDisconnectedError"), (b"x", "BadAnswer"), (CHUNKED, "ServerDisconnectedError")):
        async with asking_one() as at:
            kept = await at.exchanged()
            told = at.ask()
            await kept.answer(said)
            kept.close()
            assert await told.end() == why
            assert len(at.engine.every) == 1


async def test_a_kept_connection_that_closes_by_itself_is_forgotten() -> None:
    async with asking_one() as at:
        kept = await at.exchanged()
        kept.close()
        await eventually(lambda: not at.engines._places[at.engine.url].idle)
        await at.exchanged()
        assert len(at.engine.every) == 2


@pytest.mark.parametrize(
    "answer",
    [
        OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        OK.replace(b"HTTP/1.1", b"HTTP/1.0"),
        OK + b"and more",
    ],
    ids=["close", "HTTP/1.0", "more than the answer"],
)
async def test_a_connection_that_is_not_to_be_used_again_is_closed(answer: bytes) -> None:
    async with asking_one() as at:
        accepted = await at.exchanged(answer)
        await accepted.gone()
        await at.exchanged()
        assert len(at.engine.every) == 2


async def test_bytes_that_nobody_asked_for_close_a_kept_connection() -> None:
    async with asking_one() as at:
        accepted = await at.exchanged()
        accepted.say(OK)
        await accepted.gone()
        await at.exchanged()
        assert len(at.engine.every) == 2


# ---------------------------------------------------------------- leaving


async def test_an_answer_that_is_not_wanted_any_more_closes_its_connection() -> None:
    async with asking_one() as at:
        for said in (b"", b"HTTP/1.1 2", CHUNKED + b"2\r\nok\r\n"):
            told = at.ask()
            accepted = await at.engine.accepted()
            await accepted.answer(said)
            if b"ok" in said:
                await eventually(lambda told=told: told.body)
            at.asked.abort()
            await accepted.gone()
            assert "ended" not in told.calls


async def test_a_kept_connection_is_closed_by_who_leaves_it_in_use() -> None:
    async with asking_one() as at:
        kept = await at.exchanged()
        told = at.ask()
        await kept.request()
        at.asked.abort()
        await kept.gone()
        await at.exchanged()
        assert told.calls == [] and len(at.engine.every) == 2


async def test_whenever_it_is_left_while_it_connects_its_connection_is_closed() -> None:
    async with asking_one() as at:
        for turns in range(12):
            told = at.ask()
            for _ in range(turns):
                await asyncio.sleep(0)
            at.asked.abort()
            assert told.calls == []
        told, request = at.ask(body=b"last"), b""
        while not request.endswith(b"last"):  # those that were left come first, and are closed
            accepted = await at.engine.accepted()
            try:
                request = await accepted.request()
            except (asyncio.IncompleteReadError, ConnectionError):
                continue
            if not request.endswith(b"last"):
                await accepted.gone()
        accepted.say(OK)
        assert await told.end() is None
        assert [task for task in asyncio.all_tasks() if "node.engines" in task.get_name()] == []


async def test_a_second_try_that_is_left_is_closed_too() -> None:
    async with asking_one() as at:
        kept = await at.exchanged()
        told = at.ask()
        await kept.request()
        kept.close()
        fresh = await at.engine.accepted()
        at.asked.abort()
        await fresh._reader.read()
        assert told.calls == []


async def test_who_has_heard_enough_leaves_the_connection_to_the_next_if_the_end_comes_in_time() -> None:
    async with asking_one() as at:
        told = at.ask()
        told.on["received"] = lambda: at.asked.finish()
        accepted = await at.engine.accepted()
        await accepted.answer(CHUNKED + b"4\r\nDONE\r\n")
        await eventually(lambda: told.body)
        place = at.engines._places[at.engine.url]
        assert not place.idle
        left = at.asked
        (connection,) = at.engines.open
        timer = connection._timer
        assert timer is not None and not timer.cancelled()
        accepted.say(b"0\r\n\r\n")
        await eventually(lambda: place.idle)
        assert timer.cancelled()
        again = at.ask()
        left.abort()  # it is not its connection any more
        left.pause()
        await accepted.answer()
        assert await again.end() is None
        assert told.calls == ["answered", "received"]
        assert len(at.engine.every) == 1


async def test_who_has_heard_enough_and_all_leaves_the_connection_at_once() -> None:
    async with asking_one() as at:
        told = at.ask()
        told.on["received"] = lambda: at.asked.finish()
        accepted = await at.engine.accepted()
        await accepted.answer(CHUNKED + b"4\r\nDONE\r\n0\r\n\r\n")
        await eventually(lambda: at.engines._places[at.engine.url].idle)
        again = at.ask()
        await accepted.answer()
        assert await again.end() is None
        assert told.calls == ["answered", "received"]


@pytest.mark.parametrize("then", [b"", b"1\r\nx\r\n", b"zz\r\n", b"0\r\n\r\nmore"])
async def test_an_answer_whose_end_does_not_come_in_time_takes_its_connection_with_it(
    monkeypatch: pytest.MonkeyPatch, then: bytes
) -> None:
    monkeypatch.setattr(engine_connections, "LINGER_S", 0.02)
    async with asking_one() as at:
        told = at.ask()
        told.on["received"] = lambda: at.asked.finish()
        accepted = await at.engine.accepted()
        await accepted.answer(CHUNKED + b"4\r\nDONE\r\n")
        await eventually(lambda: told.body)
        accepted.say(then)
        await accepted.gone()
        assert told.calls == ["answered", "received"]
        await at.exchanged()


# ---------------------------------------------------------------- pauses


async def test_what_comes_during_a_pause_is_told_after_it() -> None:
    async with asking_one() as at:
        told, accepted = await at.begun(CHUNKED + b"1\r\na\r\n", b"a")
        paused = at.asked
        for _ in range(2):
            paused.pause()
        accepted.say(b"1\r\nb\r\n0\r\n\r\n")
        for _ in range(3):  # all that while others are served
            await at.exchanged(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert (told.body, told.over.is_set()) == (b"a", False)
        for _ in range(2):
            paused.resume()
        assert await told.end() is None
        assert told.body == b"ab"


async def test_a_pause_ends_with_the_exchange() -> None:
    async with asking_one() as at:
        told = at.ask()
        told.on["received"] = lambda: at.asked.pause()
        accepted = await at.engine.accepted()
        await accepted.answer()
        assert await told.end() is None
        at.asked.pause()  # too late: it has no connection any more
        again = at.ask()
        await accepted.answer()
        assert await again.end() is None


async def test_who_has_heard_enough_during_a_pause_leaves_the_connection_to_the_next() -> None:
    async with asking_one() as at:
        _, accepted = await at.begun(CHUNKED + b"1\r\na\r\n", b"a")
        at.asked.pause()
        at.asked.finish()
        accepted.say(b"0\r\n\r\n")
        await eventually(lambda: at.engines._places[at.engine.url].idle)
        again = at.ask()
        await accepted.answer()
        assert await again.end() is None


# ---------------------------------------------------------------- connecting


class Tries(list[str]):
    """The URLs' hosts to which a connection was tried."""


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Tries:
    made, connect = Tries(), engine_connections._Place.connect

    def counted(self: Any, asking: Engines) -> Awaitable[Any]:
        made.append(self.host)
        return connect(self, asking)

    monkeypatch.setattr(engine_connections._Place, "connect", counted)
    return made


async def test_an_engine_that_is_not_there_is_tried_once(tries: Tries) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        async with engines() as asking:
            told = Told()
            asking.ask(f"http://127.0.0.1:{free.getsockname()[1]}", "/", {}, b"", told)
            assert await told.end() == "ConnectionRefusedError"
    assert (told.calls, tries) == (["ended"], ["127.0.0.1"])


async def test_an_engine_that_has_gone_from_under_a_kept_connection_is_tried_once_more(tries: Tries) -> None:
    async with engines() as asking:
        async with listening() as engine:
            at = Asking(asking, engine)
            kept = await at.exchanged()
            told = at.ask()
            await kept.request()
        assert await told.end() == "ConnectionRefusedError"
    assert len(tries) == 2


async def test_a_host_that_nobody_knows_is_tried_once(tries: Tries, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_given: object, **_more: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "nobody knows")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    async with engines() as asking:
        told = Told()
        asking.ask("http://engine.test:1", "/", {}, b"", told)
        assert await told.end() == "gaierror"
    assert len(tries) == 1


async def test_a_name_that_no_host_can_have_is_told_as_broken(tries: Tries) -> None:
    async with engines() as asking:
        told = Told()
        asking.ask(f"http://{'x' * 64}.test:1", "/", {}, b"", told)
        assert await told.end() in ("UnicodeError", "UnicodeEncodeError")
    assert len(tries) == 1


async def test_an_engine_that_does_not_let_connect_in_time_is_tried_once(
    tries: Tries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections, and says nothing to who begins with TLS."""
    monkeypatch.setattr(engine_connections, "CONNECT_TIMEOUT_S", 0.1)
    async with asking_one() as at:
        at.engine.url = at.engine.url.replace("http:", "https:")
        told = at.ask()
        accepted = await at.engine.accepted()
        assert await told.end() == "TimeoutError"
        await asyncio.wait_for(accepted._reader.read(), WITHIN_S)
        assert (told.calls, len(tries), len(at.engine.every)) == (["ended"], 1, 1)


async def test_who_leaves_while_it_connects_closes_what_there_is() -> None:
    async with asking_one() as at:
        at.engine.url = at.engine.url.replace("http:", "https:")
        told = at.ask()
        accepted = await at.engine.accepted()
        at.asked.abort()
        await asyncio.wait_for(accepted._reader.read(), WITHIN_S)
        assert told.calls == []


async def test_a_certificate_that_is_not_trusted_breaks_it_before_a_word_is_sent(
    tmp_path: Path, tries: Tries, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert_file, key_file = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert_file, key_file)
    trusting = ssl.create_default_context(cafile=str(cert_file))
    async with listening(context) as engine, engines() as asking:
        at = Asking(asking, engine)
        told = at.ask()
        assert await told.end() == "SSLCertVerificationError"
        assert (told.calls, len(tries), engine.every) == (["ended"], 1, [])
        monkeypatch.setattr(Engines, "tls_context", lambda _self: trusting)
        kept = await at.exchanged()
        told = at.ask()
        await kept.answer(TO_THE_END + b"all")
        kept.close()
        assert await told.end() is None
        assert (told.body, len(engine.every)) == (b"all", 1)


# ---------------------------------------------------------------- the end


async def test_closing_ends_what_is_idle_lingers_connects_or_is_in_use() -> None:
    async with listening() as engine:
        async with engines() as asking:
            at = Asking(asking, engine)
            idle = at.ask()
            idle_one = await engine.accepted()
            lingering = at.ask()
            lingering_one = await engine.accepted()
            lingering.on["received"] = at.asked.finish
            for accepted in (idle_one, lingering_one):
                await accepted.answer(CHUNKED + b"1\r\na\r\n")
            await eventually(lambda: idle.body and lingering.body)
            idle_one.say(b"0\r\n\r\n")
            assert await idle.end() is None
            in_use, in_use_one = at.ask(), idle_one
            await in_use_one.request()
            other = at.ask()
            idle_one = await engine.accepted()
            await idle_one.answer()
            assert await other.end() is None
            connecting = Told()
            asking.ask(engine.url.replace("http:", "https:"), "/", {}, b"", connecting)
            connecting_one = await engine.accepted()
        assert [task for task in asyncio.all_tasks() if "node.engines" in task.get_name()] == []
        for accepted in (idle_one, lingering_one, in_use_one):
            await accepted.gone()
        await asyncio.wait_for(connecting_one._reader.read(), WITHIN_S)
        assert asking.open == set()
        assert (in_use.calls, connecting.calls) == ([], [])


async def test_a_connection_to_an_engine_that_was_forgotten_meanwhile_is_not_kept_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_connections, "MOST_PLACES", 2)
    monkeypatch.setattr(engine_connections, "KEPT_IDLE_S", 0.02)
    async with asking_one() as at:
        told = at.ask()
        accepted = await at.engine.accepted()
        await accepted.request()
        async with listening() as one, listening() as other:
            for engine in (one, other):
                await Asking(at.engines, engine).exchanged(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert at.engine.url not in at.engines._places
        accepted.say(OK)
        assert await told.end() is None
        await accepted.gone()


async def test_no_more_engines_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_connections, "MOST_PLACES", 3)
    async with asking_one() as at:
        await at.exchanged()
        for port in range(1, 9):
            at.engines.ask(f"http://127.0.0.1:{port}", "/", {}, b"", Told()).abort()
            assert len(at.engines._places) <= 3
            assert at.engine.url in at.engines._places  # a connection to it is kept


# ---------------------------------------------------------------- the loop of a node

ON_ITS_LOOP = [
    test
    for name, test in list(globals().items())
    if name.startswith("test_") and inspect.iscoroutinefunction(test) and not inspect.signature(test).parameters
]


@pytest.mark.parametrize("scenario", ON_ITS_LOOP, ids=lambda test: test.__name__)
def test_it_is_the_same_on_the_loop_that_a_node_runs_on(scenario: Callable[[], Any]) -> None:
    uvloop.run(scenario())
