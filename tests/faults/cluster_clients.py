"""Clients in virtual time: each sends one task and brings it to its end, whatever happens on the way.

They do what LlorchClient does: a key with every task, the same key again as long as nothing was seen, the stream at the
last whole event after that. What they read is held against the promises as it comes.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from llorch.control import intake, routes_tasks
from llorch.control.answers import NativeStream, OpenAiAnswer
from llorch.control.follow import follow
from llorch.control.state import CONTROL
from llorch.control.tasks import Task
from llorch.errors import Code, LlorchError
from tests.faults.cluster_parts import MODEL, Asked, Network, SimControl

RETRY_S = 0.3
PATIENCE_S = 20.0  # with a node that has what it was reading, and is lost


class Connection:
    """One request of a client, an outlet.Outlet: what the control writes, and whether either side has gone."""

    def __init__(self, client: SimClient, control: SimControl) -> None:
        self.client = client
        self.control = control
        self.open = True
        self.handler: asyncio.Task[Any] | None = None
        self._under_way: list[bytes] = []  # to a client that reads nothing

    def close(self) -> None:
        """Nothing passes any more; the control's handler is told as a server tells it."""
        self.open = False

    abort = close

    def begin(self, status: int, headers: Any, *, hold: bool = False) -> None:
        self.client.committed(status, headers)

    def write(self, data: bytes) -> None:
        if not self.open or not self.control.alive:
            raise ConnectionResetError("the client has gone")
        if self.client.stalled:
            self._under_way.append(data)
        else:
            self._arrives(data)

    def write_now(self, data: bytes) -> bool:
        if not self.open or not self.control.alive or self.client.stalled:
            return False
        self._arrives(data)
        return True

    @property
    def behind(self) -> bool:
        return self.client.stalled

    async def drained(self) -> None:
        while self.client.stalled and self.open:
            await self.client.reads_on.wait()
        if not self.open or not self.control.alive:
            raise ConnectionResetError("the client has gone")

    def reads_on(self) -> None:
        """The client goes on."""
        under_way, self._under_way = self._under_way, []
        for data in under_way if self.open else ():
            self._arrives(data)

    def flush(self) -> None: ...

    def finish(self) -> Connection:
        return self

    def cut(self) -> Connection:
        self.close()
        return self

    def _arrives(self, data: bytes) -> None:
        try:
            self.client.receive(data)
        except Exception as error:  # the control would take it for a fault of its own
            self.client.failure = error
            raise


class SimClient:
    """One task. `want` tokens; `end` is how it went for the client: a finish reason or an error's code."""

    def __init__(self, network: Network, number: int, *, want: int, native: bool, by_key: bool) -> None:
        self.network = network
        self.loop = network.loop
        self.label = f"c{number}"
        self.want = want
        self.native = native
        self.by_key = by_key
        self.task_id: str | None = None  # once it is known
        self.offset = 0  # of the log, after the last whole event
        self.tokens: list[str] = []
        self.attempt = 0  # of which it has read
        self.lost_since: float | None = None
        self.end: str | None = None
        self.away = self.stalled = False
        self.reads_on = asyncio.Event()
        self.came_at = self.ended_at = self.loop.now
        self.cancelled = self.torn = self.was_away = False
        self.failure: Exception | None = None
        self.sends = 0
        self._rest = b""
        self._connection: Connection | None = None
        self._status = 0
        self.running = self.loop.create_task(self.run())

    # ---- what happens to it

    def leave(self) -> None:
        """It vanishes, with no word."""
        self.away = self.was_away = True
        self.running.cancel()
        self.hang_up()

    def come_back(self) -> None:
        self.away = self.stalled = False
        self.running = self.loop.create_task(self.run())

    def stall(self, stalled: bool) -> None:
        self.stalled = stalled
        self.was_away = True  # so slow, it may be taken for gone
        if not stalled and self._connection is not None:
            self._connection.reads_on()
        self.reads_on.set()
        self.reads_on = asyncio.Event()

    def hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self.reads_on.set()
            self.reads_on = asyncio.Event()
            if connection.handler is not None:
                connection.handler.cancel()

    def cut_off(self) -> None:
        """The control has died under it."""
        if self._connection is not None:
            self.hang_up()

    # ---- what it does

    async def run(self) -> None:
        while self.end is None:
            control = self.network.control
            if control is not None:
                await self.ask(control)
            if self.end is None:
                if not self.native and self.offset:
                    self.end = "broken"  # a /v1 answer can't be resumed
                    return
                await asyncio.sleep(RETRY_S)

    async def ask(self, control: SimControl) -> None:
        self._rest, self._status, self.torn = b"", 0, False
        connection = self._connection = Connection(self, control)
        again = self.native and self.task_id is not None and (self.offset > 0 or not self.by_key)
        work = self.resume(control, connection) if again else self.submit(control, connection)
        connection.handler = self.loop.create_task(work)
        await asyncio.wait((connection.handler,))
        if connection is not self._connection:
            return  # it was cut off
        self._connection = None
        connection.close()
        if connection.handler.cancelled():
            return
        error = connection.handler.exception()
        if isinstance(error, LlorchError):
            self.refused(error)
        elif error is not None and not isinstance(error, ConnectionError | routes_tasks.ShuttingDown):
            raise error
        elif error is None:
            self.answered(connection.handler.result())

    async def submit(self, control: SimControl, connection: Connection) -> Any:
        """As routes_tasks.submit and .openai do."""
        self.sends += 1
        body = {"model": MODEL, "prompt": self.label} | ({"seed": 1} if self.native else {"stream": True})
        headers = {"Idempotency-Key": self.label, "X-Llorch-Try": str(self.sends), "Content-Type": "application/json"}
        common: Any = {
            "owner": "me", "request_id": "r",
            "task_id": f"{int(self.label[1:]):08x}-{self.sends:04x}-0000-0000-{self.network.leases:012x}",
            "now": self.loop.time(),
        }  # fmt: skip
        self.network.leases += 1
        raw = json.dumps(body).encode()
        if self.native:
            task = intake.native_task(raw, headers, **common)
        else:
            task = intake.openai_task("/v1/completions", raw, headers, **common)
        earlier = await control.state.replays.earlier(task)
        answer: NativeStream | OpenAiAnswer
        outlet: Any = connection
        if self.native:
            answer = NativeStream(outlet, task, 30.0, again=earlier is not None)
        else:
            answer = OpenAiAnswer(outlet, task, 30.0)
        self.task_id = earlier or task.task_id
        request: Any = Asked(app={CONTROL: control.state}, remote=self.label)
        return await routes_tasks._serve(request, task, answer, earlier)

    async def resume(self, control: SimControl, connection: Connection) -> Any:
        """As routes_tasks.follow_events does."""
        state, task_id = control.state, self.task_id
        assert task_id is not None
        await state.replays.seek(task_id)
        if state.dispatcher.tasks.get(task_id) is None and state.registry.task(task_id) is None:
            state.recovery.check(self.loop.time(), "its nodes may still bring this task")
            raise LlorchError(Code.TASK_NOT_FOUND, "no such task")
        mine = Task.read_again(task_id, owner="me", request_id="r", now=self.loop.time())
        outlet: Any = connection
        answer = NativeStream(outlet, mine, 30.0, again=True)
        return await follow(state, mine, answer, self.offset, attempt=self.attempt or None)

    # ---- what it reads

    def committed(self, status: int, headers: Any) -> None:
        self._status = status
        told = headers["X-Llorch-Task"]
        if self.offset:
            assert told == self.task_id, "another task than the one it has begun to read"
        self.task_id = told

    def answered(self, response: Any) -> None:
        """The response has ended in order."""
        if self._status:
            return
        if response.status == 204:
            assert self.offset, "nothing was seen, and nothing is said to be left"
            self.ended("sealed")
            return
        error = json.loads(response.body)["error"]
        self.refused(LlorchError.from_wire(error))

    def refused(self, error: LlorchError) -> None:
        code = error.code
        if not self._status and not self.offset:
            self.task_id = None  # it was told of no task: it sends its own again
        if code in (Code.RECOVERING, Code.DRAINING, Code.QUEUE_FULL):
            return  # it asks again
        if code is Code.NODE_LOST and self.offset:
            self.lost_since = self.loop.now if self.lost_since is None else self.lost_since
            if self.loop.now < self.lost_since + PATIENCE_S:
                return
        if code is Code.TASK_NOT_FOUND and not self.offset:
            return
        self.ended(code.value)

    def ended(self, how: str) -> None:
        assert self.end is None, "a second end"
        self.end, self.ended_at = how, self.loop.now
        self.check_end()

    def receive(self, data: bytes) -> None:
        self.lost_since = None
        assert self.end is None, "something after the end"
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        for block in blocks:
            if not block.startswith(b":"):
                self.event(block)

    def event(self, block: bytes) -> None:
        assert self.end is None, "something after the end"
        lines = {name: value for name, _, value in (line.partition(b": ") for line in block.split(b"\n"))}
        if not self.native:
            self.frame(lines[b"data"], len(block) + 2)
            return
        if b"id" in lines and int(lines[b"id"], 16) != self.offset + len(block) + 2:
            self.torn = True  # its node was lost within an event: then the control's end has to be what follows
            return
        name = lines[b"event"].decode()
        value = json.loads(lines[b"data"])
        assert not self.torn or (name == "error" and b"id" not in lines), "bytes were lost or came twice"
        if b"id" in lines:
            self.offset += len(block) + 2
        if name == "started":
            assert not self.tokens and value["task_id"] == self.task_id
            self.attempt = value["attempt"]
        elif name == "token":
            assert value["i"] == len(self.tokens)
            self.token(value["t"])
        elif name in ("end", "error"):
            self.ended(value["finish_reason"] if name == "end" else value["code"])
        else:
            assert name == "queued" and b"id" not in lines and not self.tokens, name

    def frame(self, data: bytes, size: int) -> None:
        if data == b"[DONE]":
            self.ended("stop")
            return
        try:
            value = json.loads(data)
        except ValueError:
            self.torn = True
            return
        assert not self.torn or "error" in value
        self.offset += size
        if "error" in value:
            self.ended(value["error"]["code"])
        elif value["choices"] and value["choices"][0]["text"]:
            self.token(value["choices"][0]["text"])

    def token(self, text: str) -> None:
        """Its own text, of one execution, each token in its place."""
        label, run, index = text.split(":")
        assert label == self.label, "somebody else's text"
        assert int(index) == len(self.tokens), "tokens were lost or came twice"
        assert not self.tokens or self.tokens[0].split(":")[1] == run, "the text of two executions"
        self.tokens.append(text)

    def check_end(self) -> None:
        if self.end == "stop":
            assert len(self.tokens) == self.want, "an end that is not the end"
        if self.end == "sealed":
            self.end = "stop" if len(self.tokens) == self.want else "canceled"
