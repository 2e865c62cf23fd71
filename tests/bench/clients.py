"""The client side of a load: one connection that asks and reads, as lean as Python allows.

A load generator shares its core with an engine, so what it costs is what it can't measure. Reads HTTP/1.1 as a control
of ours writes it: a status, and a body with a length, in chunks, or none. Never retries, and judges no answer: that is
for who asked.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field

CONNECT_WITHIN_S = 30.0
CONNECTION_LOST = "connection lost"


@dataclass(slots=True, eq=False)
class Answer:
    """One answer, whole or as far as it came. Times are monotonic seconds. `failure`: why there is no whole one."""

    due: float
    status: int = 0
    began_at: float = 0.0  # its head was there
    ended_at: float = 0.0
    body: bytearray = field(default_factory=bytearray)
    failure: str | None = None

    @property
    def kind(self) -> str | None:
        """What went wrong, in a word or two; None if nothing did, as far as HTTP goes."""
        if self.failure is not None or self.status == 200:
            return self.failure
        try:
            return f"{self.status} {json.loads(self.body)['error']['code']}"
        except (ValueError, KeyError, TypeError):
            return str(self.status)


class Connection(asyncio.Protocol):
    """Asks for one thing at a time. `done` gets each answer; `heard`, if given, the bytes of a body as they come."""

    def __init__(
        self, done: Callable[[Connection, Answer], None], heard: Callable[[bytes], None] | None = None
    ) -> None:
        self._done = done
        self._heard = heard
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._received = b""
        self._left = 0  # bytes of the body, or of its present chunk with the line's end after it
        self._chunked = False
        self._headed = False

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes, due: float) -> None:
        assert self._answer is None
        self._answer = Answer(due)
        if self._transport is None:
            self._end(CONNECTION_LOST)
        else:
            self._transport.write(request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None:
            self._end(CONNECTION_LOST)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            return
        self._received = self._received + data if self._received else data
        if not self._headed and not self._head(self._answer):
            return
        if self._chunked:
            self._chunks(self._answer)
        else:
            piece, self._received = self._received[: self._left], self._received[self._left :]
            self._left -= len(piece)
            self._take(self._answer, piece)
            if not self._left:
                self._end(None)

    # ---- inside

    def _head(self, answer: Answer) -> bool:
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return False
        answer.began_at = time.monotonic()
        answer.status = int(head[9:12])
        lines = head.lower().split(b"\r\n")
        self._chunked = b"transfer-encoding: chunked" in lines
        self._left = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        self._received, self._headed = rest, True
        return True

    def _chunks(self, answer: Answer) -> None:
        """Take what is whole; a chunk is passed on when all of it is there, which for a token's is at once."""
        received, at = self._received, 0
        while True:
            line = received.find(b"\r\n", at)
            if line < 0:
                break
            size = int(received[at:line], 16)
            begin, end = line + 2, line + 2 + size
            if len(received) < end + 2:
                break
            at = end + 2
            if size == 0:
                self._received = received[at:]
                self._end(None)
                return
            self._take(answer, received[begin:end])
        self._received = received[at:]

    def _take(self, answer: Answer, piece: bytes) -> None:
        answer.body += piece
        if self._heard is not None:
            self._heard(piece)

    def _end(self, failure: str | None) -> None:
        answer, self._answer = self._answer, None
        assert answer is not None
        answer.ended_at, answer.failure = time.monotonic(), failure
        self._headed = self._chunked = False
        self._done(self, answer)


def post(path: str, body: object, token: str) -> bytes:
    """A request, ready to be sent again and again."""
    raw = json.dumps(body, separators=(",", ":")).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


async def connect(
    port: int,
    context: ssl.SSLContext | None,
    done: Callable[[Connection, Answer], None],
    heard: Callable[[bytes], None] | None = None,
) -> Connection:
    """Raises OSError or TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_WITHIN_S):
        _, connection = await loop.create_connection(
            lambda: Connection(done, heard),
            "127.0.0.1",
            port,
            ssl=context,
            server_hostname="127.0.0.1" if context is not None else None,
        )
    return connection
