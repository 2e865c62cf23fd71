"""The node's end of a link: one connection to one control, the records of many tasks on it.

Owns which stream reads which log, credit both ways, whose turn it is when much is waiting, and what a control must not
do: one that breaks the protocol loses its link. DATA leaves from the log's own wake-up, with no asyncio task or future
per token. Never decides what becomes of a task whose reader goes: it says why the reader went.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from llorch import records
from llorch.errors import Code, LlorchError
from llorch.link import Link
from llorch.logs import Log
from llorch.messages import Attach, Head, NodeCall, Open, Tail, parse
from llorch.node.answer_wire import error_wire, tail_wire
from llorch.node.execution import STREAM_HEADERS
from llorch.node.runner import Runner
from llorch.node.task_entry import Gone, TaskEntry
from llorch.node.tasklog import TaskLog
from llorch.records import MAX_PAYLOAD_BYTES, SURPLUS, Kind, ReceiveCredit, Record, RecordError, SendCredit, Type
from llorch.tasks import Guard

TURN_BYTES = 64 * 1024  # one stream's share before the others have theirs
ACCEPT_WITHIN_S = 0.005  # it leaves with what is said first, if that comes by then: a wake-up less at both ends
MAX_CALL_BODY_BYTES = 4 * 1024 * 1024  # of a call of the node's own routes: wishes and tickets, no prompts

_LEFT_WORDS = frozenset({b"left", b"slow"})
_KNOWN = frozenset(Type)
_FROM_CONTROL = frozenset({Kind.BODY, Kind.CREDIT, Kind.DETACH, Kind.CANCEL})

log = Log("node.link")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one of the node's own routes answers, over HTTP and over a link alike."""

    status: int
    body: bytes
    content_type: str = "application/json"


Calls = Callable[[NodeCall, bytes], Awaitable[Answer]]


@dataclass(slots=True)
class _Body:
    """A body that is coming. `deliver` takes it whole; None: nobody wants it (a repeated OPEN)."""

    want: int
    deliver: Callable[[bytes], None] | None
    parts: list[bytes] = field(default_factory=list)
    got: int = 0
    credit: ReceiveCredit = field(default_factory=ReceiveCredit)

    @property
    def whole(self) -> bool:
        return self.got == self.want


class _Stream:
    """One stream of the control: a reader of a log (a tasklog.Reader), and perhaps a body that is still coming."""

    __slots__ = (
        "_head_sent", "_link", "_of_events", "_queued", "body", "credit", "entry", "id", "log", "offset", "unsaid",
    )  # fmt: skip

    def __init__(self, link: NodeLink, stream_id: int, offset: int = 0) -> None:
        self._link = link
        self._head_sent = False
        self._of_events = False
        self._queued = False
        self.id = stream_id
        self.offset = offset
        self.credit = SendCredit()
        self.body: _Body | None = None
        self.entry: TaskEntry | None = None
        self.log: TaskLog | None = None
        self.unsaid = b""  # the ACCEPT, until it is sent: before anything else of this stream

    def say(self, *said: bytes) -> None:
        self._link.send(b"".join((self.taken(), *said)))

    def taken(self) -> bytes:
        """What was not said yet, for who says it now."""
        unsaid, self.unsaid = self.unsaid, b""
        return unsaid

    def wake(self) -> None:
        """Something may be sent. Sends it, unless others wait before it or the connection is full."""
        if self._queued:
            return
        if self._link.full:
            self.queue()
        else:
            self.turn()

    def fresh(self, data: bytes) -> None:
        """What was just appended goes out as it is to a reader that has all that is before it, and room."""
        source, size, connection = self.log, len(data), self._link.connection
        if source is None or connection is None or connection.full or self._queued:
            self.wake()
            return
        if not self._head_sent or self.offset + size != source.end:
            self.wake()
            return
        if size > self.credit.available or size > TURN_BYTES - records.HEADER.size:
            self.wake()
            return
        self.offset += size
        self.credit.available -= size
        connection.send(records.HEADER.pack(self.id, Kind.DATA, size) + data)
        source.took()

    def queue(self) -> None:
        self._queued = True
        self._link.wait_turn(self)

    def turn(self) -> None:
        """Send what credit and this turn allow: HEAD, DATA, and TAIL once all is read."""
        self._queued = False
        source = self.log
        if source is None:
            return
        out: list[bytes] = []
        if not self._head_sent and source.head is not None:
            self._head_sent = True
            self._of_events = source.head.headers.get("content-type") == STREAM_HEADERS["content-type"]
            out.append(_head_record(self.id, source.head))
        left = TURN_BYTES
        try:
            while self.offset != source.end and (count := min(left, self.credit.available, MAX_PAYLOAD_BYTES)):
                # Of an event that fits no record a part has to go; any other waits until there is credit for all of it.
                data = source.take(self, count, tear=count == MAX_PAYLOAD_BYTES or not self._of_events)
                if not data:
                    break
                self.credit.available -= len(data)
                left -= len(data)
                out.append(records.encode(self.id, Kind.DATA, data))
        except LlorchError as error:  # GAP: it was overtaken
            self.say(*out)
            self._link.refuse(self, error)
            return
        tail = source.tail if self.offset == source.end else None
        if tail is not None:
            out.append(records.encode_json(self.id, Kind.TAIL, tail_wire(tail)))
        if out:
            self.say(*out)
        if tail is not None:
            self._link.finished(self)
        elif left < TURN_BYTES and self.credit.available and self.offset != source.end:
            self.queue()  # what was sent was its share; if nothing was, it waits for credit


def _head_record(stream_id: int, head: Head) -> bytes:
    return records.encode_json(stream_id, Kind.HEAD, {"status": head.status, "headers": head.headers})


def _read(model: type[M], payload: bytes) -> M:
    """What a record asks for. Unreadable JSON breaks the link; JSON of a wrong shape is refused like any other wish."""
    return parse(model, records.decode_json(payload))


class NodeLink:
    """A link.LinkOwner. `epoch` is the control's; `lost` is told once, when the connection has ended."""

    def __init__(self, runner: Runner, calls: Calls, epoch: str, lost: Callable[[NodeLink, str], None]) -> None:
        self._runner = runner
        self._calls = calls
        self._epoch = epoch
        self._on_lost = lost
        self._guard = Guard("node.link")
        self._streams: dict[int, _Stream] = {}
        self._last_id = 0
        self._waiting: deque[_Stream] = deque()
        self._turn_due = False
        self._accepted: list[int] = []  # streams whose ACCEPT waits for the timer, if it has not left before
        self._timer: asyncio.TimerHandle | None = None
        self.connection: Link | None = None

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def full(self) -> bool:
        return self.connection is None or self.connection.full

    def send(self, encoded: bytes) -> None:
        if encoded and self.connection is not None:
            self.connection.send(encoded)

    async def close(self, reason: str) -> None:
        """End the link after what is queued has been sent."""
        for stream in list(self._streams.values()):
            self.send(records.encode(stream.id, Kind.DETACH, b"shutdown"))
            self._drop(stream, Gone.LOST)
        if self.connection is not None:
            self.connection.close(reason)
        if self._timer is not None:
            self._timer.cancel()
        await self._guard.close()

    # ---- link.LinkOwner

    def link_record(self, record: Record) -> None:
        kind = record.type
        if kind in (Kind.OPEN, Kind.ATTACH):
            self._begin(record)
            return
        if kind not in _KNOWN:
            return
        if kind not in _FROM_CONTROL:
            raise RecordError(f"a control may not send {Type(kind).name}")
        stream = self._streams.get(record.stream)
        if stream is None:
            if record.stream % 2 == 0 or record.stream > self._last_id:
                raise RecordError("record on a stream that was never opened")
            return  # late: the stream has ended
        if kind == Kind.CREDIT:
            stream.credit.grant(records.decode_credit(record.payload))
            stream.wake()
        elif kind == Kind.BODY:
            self._body(stream, record.payload)
        elif kind == Kind.CANCEL:
            if stream.entry is not None:
                end = self._runner.discard if record.payload == SURPLUS else self._runner.cancel
                end(stream.entry)
        else:
            self._drop(stream, Gone.LEFT if record.payload in _LEFT_WORDS else Gone.LOST)

    def link_lost(self, reason: str) -> None:
        for stream in list(self._streams.values()):
            self._drop(stream, Gone.LOST)
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._on_lost(self, reason)

    def link_writable(self) -> None:
        self._turns()

    # ---- turns

    def wait_turn(self, stream: _Stream) -> None:
        self._waiting.append(stream)
        if not self._turn_due and not self.full:
            self._turn_due = True
            asyncio.get_running_loop().call_soon(self._turns)

    def _turns(self) -> None:
        """One turn for each stream that waits; those that want more wait again, behind the others."""
        self._turn_due = False
        for _ in range(len(self._waiting)):
            if self.full:
                return  # link_writable goes on
            stream = self._waiting.popleft()
            if stream.id in self._streams:
                stream.turn()

    # ---- streams

    def _begin(self, record: Record) -> None:
        if record.stream % 2 == 0 or record.stream <= self._last_id:
            raise RecordError("a control opens odd streams, each once")
        self._last_id = record.stream
        stream = self._streams[record.stream] = _Stream(self, record.stream)
        try:
            if record.type == Kind.ATTACH:
                self._attach(stream, _read(Attach, record.payload))
                return
            try:
                self._open(stream, Open.model_validate_json(record.payload))  # in one step: nearly all of them
                return
            except ValidationError:
                pass  # what is no OPEN of a task is looked at more closely
            wish = records.decode_json(record.payload)
            if "method" in wish and "task_id" not in wish:
                self._call(stream, parse(NodeCall, wish))
            else:
                self._open(stream, parse(Open, wish))
        except LlorchError as error:
            self.refuse(stream, error)

    def _open(self, stream: _Stream, opening: Open) -> None:
        entry, new = self._runner.accept(opening)
        self._follow(stream, entry)
        self._accepted.append(stream.id)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(ACCEPT_WITHIN_S, self._accept)
        deliver = entry.run.give_body if new and entry.run is not None else None
        self._expect(stream, opening.body_len + opening.prefix_len, deliver)
        stream.wake()

    def _attach(self, stream: _Stream, wish: Attach) -> None:
        stream.offset = wish.offset
        self._follow(stream, self._runner.logs.get(wish.task_id, wish.attempt))
        stream.wake()
        stream.say()  # who comes back waits for it

    def _follow(self, stream: _Stream, entry: TaskEntry) -> None:
        self._runner.attach(entry, stream)
        stream.entry, stream.log = entry, entry.log
        stream.unsaid = records.encode(stream.id, Kind.ACCEPT)

    def _accept(self) -> None:
        self._timer = None
        accepted, self._accepted = self._accepted, []
        streams = map(self._streams.get, accepted)
        self.send(b"".join([stream.taken() for stream in streams if stream is not None]))

    def _call(self, stream: _Stream, call: NodeCall) -> None:
        if call.body_len > MAX_CALL_BODY_BYTES:
            raise LlorchError(Code.PAYLOAD_TOO_LARGE, f"the body is over {MAX_CALL_BODY_BYTES} bytes")

        def deliver(body: bytes) -> None:
            self._guard.spawn(self._answer(stream, call, body), f"call.{stream.id}")

        self._expect(stream, call.body_len, deliver)

    async def _answer(self, stream: _Stream, call: NodeCall, body: bytes) -> None:
        """The answer of a route, sent as a log of its own."""
        answer = await self._calls(call, body)
        if self._streams.get(stream.id) is not stream:
            return
        stream.log = TaskLog(max(len(answer.body), 1))
        stream.log.begin(Head(status=answer.status, headers={"content-type": answer.content_type}), answer.body)
        stream.log.seal(Tail(length=len(answer.body), sha256=stream.log.sha256))
        stream.wake()

    def _expect(self, stream: _Stream, count: int, deliver: Callable[[bytes], None] | None) -> None:
        stream.body = _Body(count, deliver)
        self._deliver_if_whole(stream.body)

    def _body(self, stream: _Stream, payload: bytes) -> None:
        body = stream.body
        if body is None or body.got + len(payload) > body.want:
            raise RecordError("more BODY than was announced")
        body.credit.arrived(len(payload))
        body.got += len(payload)
        if body.deliver is not None:
            body.parts.append(payload)
        granted = body.credit.passed_on(len(payload))
        if granted and not body.whole:
            stream.say(records.encode_credit(stream.id, granted))
        self._deliver_if_whole(body)

    @staticmethod
    def _deliver_if_whole(body: _Body) -> None:
        if body.whole and body.deliver is not None:
            deliver, body.deliver = body.deliver, None
            whole = b"".join(body.parts)
            body.parts.clear()
            deliver(whole)

    # ---- ends

    def refuse(self, stream: _Stream, error: LlorchError) -> None:
        """REFUSE ends this reader. After an ACCEPT it means that the reader was overtaken."""
        task_id = stream.entry.task_id if stream.entry is not None else None
        stream.say(records.encode_json(stream.id, Kind.REFUSE, error_wire(error, task_id=task_id)))
        self._drop(stream, Gone.LEFT)

    def finished(self, stream: _Stream) -> None:
        """TAIL was sent."""
        entry = stream.entry
        if entry is not None:
            self._runner.logs.tell(entry, self._epoch)
        self._drop(stream, Gone.LEFT)

    def _drop(self, stream: _Stream, why: Gone) -> None:
        if self._streams.pop(stream.id, None) is None:
            return
        stream.log, stream.unsaid = None, b""  # it may be in the midst of a turn
        entry, body = stream.entry, stream.body
        if entry is None:
            return
        if body is not None and body.deliver is not None:  # the rest of it can't come any more
            end = self._runner.never_came if why is Gone.LOST else self._runner.cancel
            end(entry)
        self._runner.leave(entry, stream, why)
