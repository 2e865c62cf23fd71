"""The load generator of `llorch bench`: connections, requests and the time of each read.

Owns the connections to one endpoint, closed and open loops of requests, and what ends a request otherwise than by its
answer. A read's time is taken before anything else is done with it, and nothing is parsed beyond the framing of HTTP
until a step is over, or until so much waits that memory would be short. Never follows a redirect.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from llorch import __version__
from llorch.cli.bench_answer import CUT, TIMEOUT, Exchange, read_answer
from llorch.cli.bench_figures import Tally
from llorch.cli.bench_plan import Ask, Load, arrivals
from llorch.http_answer import Answer, BadAnswer

CONNECT_WITHIN_S = 10.0
PAUSE_S = 0.1  # of one that works in a closed loop, after a failure: what is refused at once is not to be flooded
MAX_ANSWER_BYTES = 64 * 1024 * 1024
WAITING_BYTES = 64 * 1024 * 1024  # of answers that have not been read yet; more are read at once, which costs time
WARM_TOKENS = 16  # of a request that is not counted: it opens a connection and wakes the engine
NOT_HTTP = "no HTTP"
TOO_LARGE = "answer too large"
CROWDED = "too many at a time"


class ConnectFault(Exception):
    """No connection; the reason is its cause."""


class _Wire(asyncio.Protocol):
    """One connection, and at most one request on it."""

    def __init__(self) -> None:
        self.open = True
        self._transport: asyncio.Transport | None = None
        self._response = Answer()
        self._exchange: Exchange | None = None
        self._ended: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    async def send(self, request: bytes, exchange: Exchange) -> None:
        """Until the answer is whole, or never will be."""
        assert self._transport is not None
        self._response, self._exchange = Answer(), exchange
        self._ended = asyncio.get_running_loop().create_future()
        exchange.sent_s = time.monotonic()
        self._transport.write(request)
        try:
            await self._ended
        except asyncio.CancelledError:  # it has taken too long, or nobody wants it any more
            self._end(time.monotonic(), TIMEOUT)
            raise

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        exchange = self._exchange
        if exchange is None:  # what nobody has asked for
            self.close()
            return
        try:
            body = self._response.feed(data)
        except BadAnswer:
            self._end(now, NOT_HTTP)
            return
        if body:
            exchange.times.append(now)
            exchange.parts.append(body)
            exchange.size += len(body)
        if self._response.done:
            self._end(now, None)
        elif exchange.size > MAX_ANSWER_BYTES:
            self._end(now, TOO_LARGE)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._end(time.monotonic(), _cut(self._response))

    def _end(self, now: float, fault: str | None) -> None:
        exchange, response = self._exchange, self._response
        if exchange is None:
            return
        self._exchange = None
        exchange.ended_s, exchange.fault, exchange.status = now, fault, response.status
        exchange.content_type = response.headers.get("content-type", "")
        if fault is not None or not response.reusable:
            self.close()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()


def _cut(answer: Answer) -> str | None:
    """What an answer lacks whose connection has ended."""
    try:
        answer.eof()
    except BadAnswer:
        return CUT
    return None


class Endpoint:
    """Whom the requests go to. An async context manager: its connections end with it."""

    def __init__(self, base: str, token: str | None, tls: ssl.SSLContext | None, timeout_s: float) -> None:
        parts = urlsplit(base)
        self.base = base
        self._host, self._tls, self._timeout_s = parts.hostname or "", tls, timeout_s
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._path = parts.path
        head = [f"Host: {parts.netloc}", "Accept-Encoding: identity", f"User-Agent: llorch-bench/{__version__}"]
        if token is not None:
            head.append(f"Authorization: Bearer {token}")
        self._head = "\r\n".join(head)
        self._idle: deque[_Wire] = deque()
        self._all: set[_Wire] = set()

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        for wire in self._all:
            wire.close()
        self._all.clear()

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {self._path}{path} HTTP/1.1", self._head]
        if body is not None:
            accept = "text/event-stream" if body.get("stream") else "application/json"
            lines += [f"Accept: {accept}", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        return "\r\n".join([*lines, "", ""]).encode() + data

    def chat(self, ask: Ask, number: int, output_tokens: int | None = None) -> bytes:
        return self.request("POST", "/v1/chat/completions", ask.body(number, output_tokens))

    async def exchange(self, request: bytes, due_s: float | None = None) -> Exchange:
        """One request and its answer. `due_s`: when it was to be sent, if that is not now. What fails is a fault of the
        exchange; only one that is cancelled raises.
        """
        seen = Exchange(time.monotonic() if due_s is None else due_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(request, seen)
        except TimeoutError:
            _fail(seen, TIMEOUT)
        except ConnectFault as error:
            _fail(seen, f"no connection: {connection_words(error.__cause__)}")
        return seen

    async def _send(self, request: bytes, seen: Exchange) -> None:
        """A connection that was kept may have been closed just now: then the request goes over a new one."""
        while True:
            kept = self._take()
            wire = kept or await self.connect()
            try:
                await wire.send(request, seen)
            finally:
                self._put_back(wire)
            if kept is None or seen.fault != CUT or seen.status or seen.parts:
                return

    def _take(self) -> _Wire | None:
        while self._idle:
            wire = self._idle.pop()
            if wire.open:
                return wire
            self._all.discard(wire)
        return None

    def _put_back(self, wire: _Wire) -> None:
        if wire.open:
            self._idle.append(wire)
        else:
            self._all.discard(wire)

    async def connect(self) -> _Wire:
        """Raises ConnectFault."""
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                name = self._host if self._tls is not None else None
                _, wire = await asyncio.get_running_loop().create_connection(
                    _Wire, self._host, self._port, ssl=self._tls, server_hostname=name
                )
        except (OSError, TimeoutError, ssl.CertificateError) as error:
            raise ConnectFault from error
        self._all.add(wire)
        return wire


def _fail(seen: Exchange, fault: str) -> None:
    seen.fault, seen.ended_s = fault, time.monotonic()
    seen.sent_s = seen.sent_s or seen.ended_s


def connection_words(error: BaseException | None) -> str:
    """Why there is no connection, in a few words: also a kind of error."""
    import socket

    match error:
        case socket.gaierror():
            return "the host name does not resolve"
        case ssl.SSLError():
            return "TLS failed"
        case TimeoutError():
            return "no answer in time"
        case OSError() if error.strerror and not error.strerror.startswith("Multiple"):
            return error.strerror.partition(":")[0] if error.errno is None else _named(error.errno)
        case _:
            return "it failed"


def _named(number: int) -> str:
    import os

    return os.strerror(number)


# ---------------------------------------------------------------- steps


@dataclass(slots=True)
class Step:
    """One stretch of one load. `seconds` or `requests` says how long."""

    load: Load
    ask: Ask
    seconds: float | None = None
    requests: int | None = None
    warmup: int = 0
    most_at_a_time: int = 10_000
    tell: Callable[[int, int, float], None] = lambda _ended, _failed, _since_s: None


async def measure(endpoint: Endpoint, step: Step, numbers: Iterator[int], tally: Tally) -> None:
    """Run one step into `tally`. `numbers` gives each request one that no other has, as prompts follow from it."""
    await _warm_up(endpoint, step, numbers)
    began_s, cpu_s = time.monotonic(), time.process_time()
    until_s = None if step.seconds is None else began_s + step.seconds
    tally.begin(began_s, until_s)
    sink = Sink(tally, step, began_s)
    with _no_collector():
        if step.load.rate_per_s is None:
            await _closed(endpoint, step, numbers, sink, until_s)
        else:
            await _open(endpoint, step, numbers, sink, began_s)
    tally.watched(time.process_time() - cpu_s, time.monotonic() - began_s)
    sink.read_all()


class Sink:
    """Takes exchanges as they end, and reads them later."""

    def __init__(self, tally: Tally, step: Step, began_s: float) -> None:
        self._tally, self._step, self._began_s = tally, step, began_s
        self._waiting: deque[Exchange] = deque()
        self._bytes = 0
        self._ended = self._failed = 0

    def take(self, exchange: Exchange) -> None:
        self._waiting.append(exchange)
        self._bytes += exchange.weight
        self._ended += 1
        self._failed += not exchange.answered
        while self._bytes > WAITING_BYTES:
            self._read_one()
        self._step.tell(self._ended, self._failed, time.monotonic() - self._began_s)

    def read_all(self) -> None:
        while self._waiting:
            self._read_one()

    def _read_one(self) -> None:
        exchange = self._waiting.popleft()
        self._bytes -= exchange.weight
        self._tally.add(read_answer(exchange))


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """A look for garbage takes as long as several tokens, and finds next to none here."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _warm_up(endpoint: Endpoint, step: Step, numbers: Iterator[int]) -> None:
    async def one() -> None:
        tokens = min(WARM_TOKENS, step.ask.output_tokens)
        while left:
            left.pop()
            await endpoint.exchange(endpoint.chat(step.ask, next(numbers), tokens))

    left = [None] * step.warmup
    async with _together() as group:
        for _ in range(min(step.warmup, step.load.concurrency or step.warmup)):
            group.create_task(one(), name="bench.warmup")


async def _closed(endpoint: Endpoint, step: Step, numbers: Iterator[int], sink: Sink, until_s: float | None) -> None:
    """Each of so many workers sends its next request when the answer to the last one is there."""
    left = step.requests

    async def work() -> None:
        nonlocal left
        while left is None or left > 0:
            if left is not None:
                left -= 1
            request = endpoint.chat(step.ask, next(numbers))
            if until_s is not None and time.monotonic() >= until_s:
                return
            exchange = await endpoint.exchange(request)
            sink.take(exchange)
            if not exchange.answered:
                await asyncio.sleep(PAUSE_S)

    assert step.load.concurrency is not None
    async with _together() as group:
        for _ in range(step.load.concurrency):
            group.create_task(work(), name="bench.worker")


async def _open(endpoint: Endpoint, step: Step, numbers: Iterator[int], sink: Sink, began_s: float) -> None:
    """Requests when they are due, whatever became of those before; their time counts from then."""
    assert step.load.rate_per_s is not None
    running: set[asyncio.Task[None]] = set()

    async def one(request: bytes, due_s: float) -> None:
        sink.take(await endpoint.exchange(request, due_s))

    async with _together() as group:
        for sent, after_s in enumerate(arrivals(step.ask.seed, step.load.rate_per_s)):
            if sent == step.requests or (step.seconds is not None and after_s >= step.seconds):
                return
            request, due_s = endpoint.chat(step.ask, next(numbers)), began_s + after_s
            if (wait_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            if len(running) >= step.most_at_a_time:
                now = time.monotonic()
                sink.take(Exchange(due_s, now, now, fault=CROWDED))
                continue
            task = group.create_task(one(request, due_s), name="bench.request")
            running.add(task)
            task.add_done_callback(running.discard)


@contextlib.asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """A group whose one failure is told as itself: what it is here is a fault of this program."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except* Exception as failed:
        raise failed.exceptions[0] from None
