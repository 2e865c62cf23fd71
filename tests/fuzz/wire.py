"""HTTP/1.1 by hand: bytes out as a case has them, an answer in. A client library would mend or refuse such requests.

Owns the reading of answers, however they are framed. A connection is used again while its answers are whole.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
CONTINUE = 100  # "send the body": no answer yet


class Ending(StrEnum):
    WHOLE = "whole"
    CUT = "cut"  # the connection ended in the middle of it
    LEFT = "left"  # it took longer than the client waits, so the client left
    GARBLED = "garbled"  # what came is no HTTP
    NONE = "none"  # the connection ended and nothing had come


@dataclass(frozen=True, slots=True)
class Answer:
    """`headers` by lower-case name; of one that comes twice, the last."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    ending: Ending = Ending.WHOLE


@dataclass(slots=True)
class _SoFar:
    """What has come of an answer."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    def answer(self, ending: Ending) -> Answer:
        return Answer(self.status, self.headers, bytes(self.body), ending)


class Connection:
    """One client's connection to one role, opened when it is needed."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, raw: bytes, *, head_only: bool, within_s: float, close_after: bool, hang_up: bool) -> Answer:
        """`hang_up`: nothing follows what was sent, so the rest of a body never comes."""
        reused = self._streams is not None
        answer = await self._try(raw, head_only, within_s, hang_up)
        if reused and answer.ending is Ending.NONE:  # the server had closed it while it was idle
            answer = await self._try(raw, head_only, within_s, hang_up)
        ended = answer.headers.get("connection", "").lower() == "close" or answer.status == 101
        if close_after or hang_up or ended or answer.ending is not Ending.WHOLE:
            self.close()
        return answer

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _try(self, raw: bytes, head_only: bool, within_s: float, hang_up: bool) -> Answer:
        so_far = _SoFar()
        try:
            async with asyncio.timeout(within_s):
                if self._streams is None:
                    self._streams = await asyncio.open_connection(self._host, self._port, limit=MAX_HEAD_BYTES)
                reader, writer = self._streams
                writer.write(raw)
                with contextlib.suppress(OSError):  # it may answer, and close, before it has read everything
                    await writer.drain()
                    if hang_up:
                        writer.write_eof()
                await _read(reader, so_far, head_only)
        except TimeoutError:
            return so_far.answer(Ending.LEFT)
        except (asyncio.IncompleteReadError, OSError):
            self.close()
            return so_far.answer(Ending.CUT if so_far.status else Ending.NONE)
        except (ValueError, asyncio.LimitOverrunError):
            self.close()
            return so_far.answer(Ending.GARBLED)
        return so_far.answer(Ending.WHOLE)


async def _read(reader: asyncio.StreamReader, so_far: _SoFar, head_only: bool) -> None:
    status = CONTINUE
    while status == CONTINUE:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
    so_far.status = status
    for line in lines:
        name, _, value = line.partition(":")
        so_far.headers[name.lower()] = value.strip()
    headers = so_far.headers
    if head_only or so_far.status in (101, 204, 304):
        return
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
            so_far.body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    elif "content-length" in headers:
        so_far.body += await reader.readexactly(min(int(headers["content-length"]), MAX_BODY_BYTES))
    else:
        while data := await reader.read(65_536):
            so_far.body += data
