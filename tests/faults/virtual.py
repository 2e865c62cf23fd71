"""Time and wires that a test turns by hand, for running llorch's own parts with neither clock nor network.

    VirtualLoop    an event loop whose time passes only when `advance` says so
    Wire           a connection of two `llorch.link.Link`s: bytes in flight until they are delivered, cut or lost
    Engine         every engine of a node: what Runner asks over HTTP is answered by whoever turns the test
    Answer         one answer of an engine, chunk by chunk

Everything is deterministic: the same calls in the same order give the same run.
"""

from __future__ import annotations

import asyncio
import json
from asyncio import base_events, events
from collections import deque
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from llorch.link import Link
from llorch.node.engine_connections import Taker

MAX_TURNS = 3_000  # of the loop, until nothing is left to do: more is a loop that never comes to rest
WIRE_HIGH_BYTES = 2_000  # unsent bytes at which a writer is told to wait; small, so that it happens


FAULTS: list[str] = []  # what llorch logged as a fault of its own, since the newest loop began


class VirtualLoop(base_events.BaseEventLoop):
    """asyncio without a selector: callbacks run in `settle`, timers when `advance` has reached them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._selector = SimpleNamespace(select=lambda timeout: ())
        self.set_exception_handler(self._failed)
        self.failures: list[str] = []
        FAULTS.clear()

    def time(self) -> float:
        return self.now

    def ticking(self) -> float:
        """A clock that never shows the same time twice, as a real one does."""
        self.now += 1e-9
        return self.now

    def _process_events(self, event_list: object) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")

    def _next_timer(self) -> float | None:
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return scheduled[0]._when if scheduled else None  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Run all that can run now."""
        for _ in range(MAX_TURNS):
            timer = self._next_timer()
            if not self._ready and (timer is None or timer > self.now):  # type: ignore[attr-defined]
                break
            self.now += 1e-9  # nothing takes no time: waits for what is left of a wait come to an end
            self._run_once()  # type: ignore[attr-defined]
        else:
            raise AssertionError("the loop never comes to rest")
        assert not self.failures and not FAULTS, [*self.failures, *FAULTS]

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        self.settle()
        while (timer := self._next_timer()) is not None and timer <= until:
            self.now = max(self.now, timer)
            self.settle()
        self.now = max(self.now, until)
        self.settle()

    def __enter__(self) -> VirtualLoop:
        """As the running loop."""
        events._set_running_loop(self)
        return self

    def __exit__(self, *_: object) -> None:
        events._set_running_loop(None)

    def end(self) -> None:
        """Cancel whatever still runs, and close."""
        with self:
            for task in asyncio.all_tasks(self):
                task.cancel()
            for _ in range(10):  # whatever comes of it: what was tested is over
                self._run_once()  # type: ignore[attr-defined]
        self.close()


# ---------------------------------------------------------------- wires


class End:
    """One end's transport: what it has written is in flight until the wire delivers it."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.peer: End = self  # set by the wire
        self.protocol: Link | None = None
        self.flying = bytearray()
        self.closing = self.ended = self._full = False

    def set_protocol(self, protocol: Link) -> None:
        self.protocol = protocol

    def set_write_buffer_limits(self, high: int) -> None:
        """The wire has its own limit."""

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        assert not self.closing
        self.wire.written(self, data)
        self.flying += data
        if not self._full and len(self.flying) > WIRE_HIGH_BYTES:
            self._full = True
            assert self.protocol is not None
            self.protocol.pause_writing()
        if self.wire.flows:
            self.wire.loop.call_soon(self.deliver)

    def deliver(self, count: int = 1 << 30) -> bool:
        """Hand up to `count` of the bytes in flight to the other end. False if there were none."""
        if not self.flying or self.wire.dead or self.ended:
            return False
        data = bytes(self.flying[:count])
        del self.flying[:count]
        if not self.peer.ended and self.peer.protocol is not None and not self.peer.closing:
            self.peer.protocol.data_received(data)
        if self._full and not self.closing and len(self.flying) <= WIRE_HIGH_BYTES // 4:
            self._full = False
            assert self.protocol is not None
            self.protocol.resume_writing()
        if self.closing and not self.flying:
            self.wire.loop.call_soon(self.wire.cut)
        return True

    def close(self) -> None:
        self.closing = True
        if not self.flying or self.wire.dead:
            self.wire.loop.call_soon(self.wire.cut)

    def abort(self) -> None:
        assert self.protocol is not None
        reason = self.protocol._reason
        assert not reason.startswith("protocol error"), reason  # both ends are ours
        self.closing = True
        self.flying.clear()
        self.wire.loop.call_soon(self.wire.cut)

    def lose(self) -> None:
        """This end learns that the connection has gone."""
        if not self.ended and self.protocol is not None:
            self.ended = self.closing = True
            self.protocol.connection_lost(None)


class Wire:
    """A connection. `flows`: what is written arrives by itself. `dead`: nothing arrives any more, nobody knows yet.

    `written` is told what an end writes, as it writes it.
    """

    def __init__(self, loop: VirtualLoop, written: Callable[[End, bytes], None] = lambda end, data: None) -> None:
        self.loop = loop
        self.written = written
        self.flows = self.dead = False
        self.end_of: object = None  # whose node's end it is
        self.node, self.control = End(self), End(self)
        self.node.peer, self.control.peer = self.control, self.node

    def start(self, node: Link, control: Link) -> None:
        node.start(self.node)  # type: ignore[arg-type]
        control.start(self.control)  # type: ignore[arg-type]

    @property
    def ended(self) -> bool:
        return self.node.ended and self.control.ended

    def flow(self, flows: bool) -> None:
        """Whether bytes arrive by themselves from now on; those in flight do at once."""
        self.flows = flows
        if flows:
            self.deliver_all()

    def deliver_all(self) -> None:
        self.node.deliver()
        self.control.deliver()

    def die(self) -> None:
        """What is in flight is lost, and neither end knows."""
        self.dead = True

    def cut(self) -> None:
        """What is in flight is lost, and both ends know."""
        self.dead = True
        self.node.lose()
        self.control.lose()


# ---------------------------------------------------------------- engines


class Answer:
    """One answer of an engine, an engine_connections.Exchange. `label` is the prompt that it was asked with."""

    def __init__(self, body: dict[str, Any], taker: Taker) -> None:
        self.label = str(body["prompt"])
        self.native = "seed" in body  # as the cluster's native clients send it
        self.run = 0
        self.status = 0  # not answered yet
        self.sent = 0  # tokens
        self.open = True  # the engine may still send; the node still reads
        self._taker: Taker | None = taker
        self._loop = asyncio.get_running_loop()
        self._under_way: deque[Callable[[Taker], None]] = deque()
        self._paused = False

    # ---- the engine's side

    def begin(self, status: int = 200) -> None:
        if self.status == 0:
            self.status = status
            self._say(lambda taker: taker.answered(status, {}))

    def token(self, text: str) -> None:
        self._send({"choices": [{"text": text, "index": 0, "finish_reason": None}]})
        self.sent += 1

    def end(self) -> None:
        """The last chunk, usage, and the end of the answer."""
        self._send({"choices": [{"text": "", "index": 0, "finish_reason": "stop"}]})
        self._send({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": self.sent}})
        self._put(b"data: [DONE]\n\n")
        self.stop(None)

    def stop(self, how: Exception | None) -> None:
        """The connection ends: in order, or with an error."""
        self.begin()
        broken = None if how is None else type(how).__name__
        self._say(lambda taker: taker.ended(broken))
        self.open = False

    def fail(self) -> None:
        """Nothing listens there."""
        self._say(lambda taker: taker.ended("ConnectionRefusedError"))
        self.open = False

    def _send(self, value: dict[str, Any]) -> None:
        self.begin()
        self._put(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _put(self, chunk: bytes) -> None:
        self._say(lambda taker: taker.received(chunk))

    def _say(self, what: Callable[[Taker], None]) -> None:
        if self.open:
            self._under_way.append(what)
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        while self._under_way and not self._paused and self._taker is not None:
            self._under_way.popleft()(self._taker)

    # ---- the node's side

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._loop.call_soon(self._deliver)

    def abort(self) -> None:
        """The node reads no further: an engine stops generating."""
        self.open, self._taker = False, None

    def finish(self) -> None:
        self.abort()


class Engine:
    """The engine_connections.Engines of a Runner. Answers that are begun and not over are in `answers`."""

    def __init__(self) -> None:
        self.all: list[Answer] = []
        self.down = False

    @property
    def answers(self) -> list[Answer]:
        self.all = [answer for answer in self.all if answer.open]
        return self.all

    def ask(self, url: str, path: str, headers: Mapping[str, str], body: bytes, taker: Taker) -> Answer:
        answer = Answer(json.loads(body), taker)
        if self.down:
            answer.fail()
        else:
            self.all.append(answer)
        return answer


class Uncounted:
    """A node's metrics, for nobody."""

    def began(self, model: str) -> None: ...
    def ended(self, model: str, outcome: str, code: str, tail: object) -> None: ...
