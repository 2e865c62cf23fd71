"""A TCP proxy that breaks what passes through it: cuts, resets, swallows, delays, throttles.

Owns one listening port and every connection through it. Half-open is what TCP itself never shows at once: both ends
stay connected, no byte and no FIN arrives any more. Such a connection is lost, for bytes of it are missing; `heal`
resets it, unless it is to be left for the ends to find out.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable

TURN_BYTES = 16 * 1024
RESET = struct.pack("ii", 1, 0)


class _Pair:
    """One connection through the proxy: its halves, and whether bytes still pass."""

    def __init__(self) -> None:
        self.writers: list[asyncio.StreamWriter] = []
        self.dead = False
        self.gone = asyncio.Event()
        self._ended = 0

    async def end_of_one_side(self) -> None:
        """On a dead connection one side's end is not told to the other, which has to find out by itself."""
        self._ended += 1
        if self._ended == len(self.writers):
            self.gone.set()
        await self.gone.wait()

    def reset(self) -> None:
        self.gone.set()
        for writer in self.writers:
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()

    def cut(self) -> None:
        self.gone.set()
        for writer in self.writers:
            writer.close()


class Proxy:
    """Passes TCP from `url`'s port on to the port that `target` gives at the time."""

    resends = False  # what it swallows never arrives

    def __init__(self, target: Callable[[], int]) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._swallow_new = False
        self._refuse_new = False
        self.delay_s = 0.0
        self.bytes_per_s: float | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def dead(self) -> int:
        """Connections that swallow, and that an end still holds."""
        return sum(pair.dead for pair in self._pairs)

    async def start(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=4 * TURN_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.heal()
        for pair in list(self._pairs):
            pair.reset()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    # ---- faults

    def cut(self) -> None:
        """End every connection in order: both sides see a FIN."""
        for pair in list(self._pairs):
            pair.cut()

    def reset(self) -> None:
        for pair in list(self._pairs):
            pair.reset()

    def cut_off(self) -> None:
        """Reset what there is and whatever is opened, until `heal`."""
        self._refuse_new = True
        self.reset()

    def half_open(self, *, new_too: bool = False) -> None:
        """From now on no byte passes on the connections there are; `new_too`: nor on those that are opened."""
        self._swallow_new = new_too
        for pair in self._pairs:
            pair.dead = True

    def slow(self, *, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        self.delay_s, self.bytes_per_s = delay_s, bytes_per_s

    def heal(self, *, leave_dead: bool = False) -> None:
        """Pass everything again, at once. Connections that lost bytes are reset, or left as they are."""
        self.slow()
        self._swallow_new = self._refuse_new = False
        if not leave_dead:
            for pair in list(self._pairs):
                if pair.dead:
                    pair.reset()

    # ---- inside

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Not a coroutine: asyncio itself would complain of those that are cancelled."""
        task = asyncio.ensure_future(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = _Pair()
        pair.writers.append(writer)
        pair.dead = self._swallow_new
        self._pairs.add(pair)
        try:
            if self._refuse_new:
                pair.reset()
            elif pair.dead:
                await self._swallow(pair, reader)
            else:
                await self._pass(pair, reader, writer)
        except OSError:
            pair.cut()
        finally:
            self._pairs.discard(pair)
            for one in pair.writers:
                one.close()

    async def _pass(self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target(), limit=4 * TURN_BYTES)
        pair.writers.append(far_writer)
        pumps = [
            asyncio.ensure_future(self._pump(pair, reader, far_writer)),
            asyncio.ensure_future(self._pump(pair, far_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, to its end. An end that is no FIN ends both directions the same way."""
        try:
            while data := await reader.read(TURN_BYTES):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.bytes_per_s:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                if pair.dead:
                    await self._swallow(pair, reader)
                    return
                writer.write(data)
                await writer.drain()
            if pair.dead:
                await pair.end_of_one_side()
                return
            with contextlib.suppress(OSError):
                writer.write_eof()
        except ConnectionError:
            if pair.dead:
                await pair.end_of_one_side()
                return
            pair.reset()

    @staticmethod
    async def _swallow(pair: _Pair, reader: asyncio.StreamReader) -> None:
        """Takes what comes and says nothing, not even of the end."""
        with contextlib.suppress(ConnectionError):
            while await reader.read(TURN_BYTES):
                pass
        await pair.end_of_one_side()
