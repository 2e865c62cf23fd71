"""Raw clients: they speak HTTP, write down all that they see, and come back by themselves.

Written for the harness, so that a fault of `LlorchClient` can't hide one of the server. Owns one task from its first
request to its end: what is sent, what is read, when its client goes, and how it comes back. Judges nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import ssl
import time
import uuid
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp

from llorch import sse
from tests.faults.history import Recorder
from tests.faults.tasks import Ask

CONNECT_TIMEOUT_S = 3.0
SILENT_AFTER_S = 6.0  # a native stream says something more often than that, unless its connection is dead
SILENT_V1_S = 20.0  # a /v1 stream is silent for 15 s while it waits
PAUSE_S = (0.05, 0.3)  # between two tries
RECEIVE_BUFFER_BYTES = 16 * 1024  # small, so that a client that takes nothing is felt soon
AGAIN = frozenset({"RECOVERING", "DRAINING"})
BROKEN = (aiohttp.ClientError, OSError, TimeoutError, sse.SseError)
FORGET_AFTER_S = 8.0  # a task that nobody knows for so long is not looked for any more


def socket_factory(info: Any) -> socket.socket:
    sock = socket.socket(info[0], info[1], info[2])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    sock.setblocking(False)
    return sock


def trusting(tls_ca: str | None) -> ssl.SSLContext | bool:
    return True if tls_ca is None else ssl.create_default_context(cafile=tls_ca)


@contextlib.asynccontextmanager
async def raw_session(tls_ca: str | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """A connection of its own for each request, and nothing done behind the client's back."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=socket_factory, ssl=trusting(tls_ca))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        yield session


class Gone(Exception):
    """This client goes, as it was to."""


class RawClient:
    """One task's client."""

    def __init__(
        self, ask: Ask, url: str, token: str, session: aiohttp.ClientSession, recorder: Recorder, rng: random.Random
    ) -> None:
        self.ask = ask
        self._url = url
        self._session = session
        self._recorder = recorder
        self._rng = rng
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._body = json.dumps(ask.body()).encode()
        self._conns = 0
        self._posts = 0
        self._asides: set[asyncio.Task[None]] = set()
        self._done: set[str] = set()  # what of the plan has been done
        self._current: asyncio.Task[str] | None = None
        self._going = False
        self._unknown_since: float | None = None
        self.task_id = ask.task_id
        self.last_id: str | None = None
        self.seen = 0  # tokens, by the highest index
        self.began = False  # something of its log was seen
        self.terminal = False
        self.pool: str | None = None

    def _note(self, what: str, **fields: Any) -> None:
        self._recorder.note(what, task=self.ask.marker, **fields)

    # ---- its life

    async def run(self) -> None:
        ask = self.ask
        self._note(
            "task", form=ask.form, model=ask.model, tokens=ask.tokens, task_id=ask.task_id, key=ask.key,
            deadline_s=ask.deadline_s, script=ask.script,
        )  # fmt: skip
        how = "abandoned"
        try:
            how = await self._to_its_end()
        finally:
            for aside in self._asides:
                aside.cancel()
            await asyncio.gather(*self._asides, return_exceptions=True)
            self._note("over", how=how)

    async def _to_its_end(self) -> str:
        how = "post"
        while True:
            try:
                result = await (self._post() if how == "post" else self._follow())
            except Gone:
                if "leave" in self._done:
                    return "left"
                await asyncio.sleep(self.ask.vanish_s)
                result = "broken"
            if result == "detached":
                how = "events"
                continue
            if result == "terminal" or (result == "broken" and self.terminal):  # whatever broke after its end
                await self._look_back()
                return "terminal"
            if result not in ("broken", "again"):
                return result
            if not (self.ask.key or self.task_id) or (not self.ask.native and not self.ask.key):
                return "broken"
            how = self._way_back()
            await asyncio.sleep(self._rng.uniform(*PAUSE_S) * (3 if result == "again" else 1))

    def _way_back(self) -> str:
        ask = self.ask
        if not ask.native or self.task_id is None or ask.form == "native-json":
            return "post"
        repeatable = ask.key is not None or ask.task_id is not None
        if repeatable and (self._unknown_since is not None and not self.began):
            return "post"  # nobody knows it: its submission was lost
        return "post" if repeatable and ask.back_by_post else "events"

    # ---- requests

    async def _post(self) -> str:
        ask = self.ask
        headers = {}
        if ask.key is not None:
            headers["Idempotency-Key"] = ask.key
        if not self._posts:
            headers["X-Llorch-Try"] = "1"
        self._posts += 1
        if ask.form == "native-json":
            headers["Accept"] = "application/json"
        if not ask.native and ask.deadline_s is not None:
            headers["X-Llorch-Deadline-Ms"] = str(round(ask.deadline_s * 1_000))
        path = "/v2/tasks" if ask.native else ask.path
        return await self._connection("post", "POST", path, headers, self._body)

    async def _follow(self) -> str:
        headers = {} if self.last_id is None else {"Last-Event-ID": self.last_id}
        return await self._connection("events", "GET", f"/v2/tasks/{self.task_id}/events", headers, None)

    async def _look_back(self) -> None:
        """After the end: the whole log again, and what comes after its end."""
        if not self.ask.reread or self.task_id is None or self.last_id is None:
            return
        await self._connection("reread", "GET", f"/v2/tasks/{self.task_id}/events", {}, None)
        headers = {"Last-Event-ID": self.last_id}
        await self._connection("reread", "GET", f"/v2/tasks/{self.task_id}/events", headers, None)

    async def _connection(self, op: str, method: str, path: str, headers: dict[str, str], body: bytes | None) -> str:
        """One request to the end of its answer. Returns what came of it; raises Gone."""
        self._conns += 1
        work = self._current = asyncio.ensure_future(self._exchange(self._conns, op, method, path, headers, body))
        self._plan(0)
        try:
            return await work
        except asyncio.CancelledError:
            if not self._going:
                raise
            raise Gone from None
        finally:
            self._current = None
            self._going = False
            work.cancel()
            await asyncio.wait((work,))

    async def _exchange(
        self, conn: int, op: str, method: str, path: str, headers: dict[str, str], body: bytes | None
    ) -> str:
        how = "left"
        self._note("send", conn=conn, op=op, after=headers.get("Last-Event-ID"))
        try:
            async with self._session.request(
                method, self._url + path, headers=self._headers | headers, data=body, allow_redirects=False
            ) as response:
                result = await self._answer(conn, op, response)
                how = "end"
                return result
        except BROKEN as error:
            never_sent = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            how = "unreachable" if never_sent else "silent" if isinstance(error, TimeoutError) else "broken"
            return "broken"
        finally:
            self._note("closed", conn=conn, how=how)

    async def _answer(self, conn: int, op: str, response: aiohttp.ClientResponse) -> str:
        headers = response.headers
        if self.ask.native and op == "post" and response.status in (200, 202):
            self.task_id, self.last_id = headers.get("X-Llorch-Task", self.task_id), None  # perhaps another log now
        said: dict[str, Any] = {
            "task_id": headers.get("X-Llorch-Task"),
            "node": headers.get("X-Llorch-Node"),
            "pool": headers.get("X-Llorch-Pool"),
            "replayed": headers.get("Idempotency-Replayed"),
        }
        said = {name: value for name, value in said.items() if value is not None}
        if "node" in said and "pool" in said:
            self.pool = f"{said['node']}/{said['pool']}"
        if response.status == 200 and response.content_type == "text/event-stream":
            self._note("answer", conn=conn, op=op, status=200, **said)
            self._unknown_since = None
            return await (self._native_events(conn, op, response) if self.ask.native else self._chunks(conn, response))
        raw = await asyncio.wait_for(response.read(), SILENT_V1_S)
        try:
            value = json.loads(raw) if raw else {}
        except ValueError:
            value = {}
        error = value.get("error") if isinstance(value, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        self._note("answer", conn=conn, op=op, status=response.status, code=code, **said)
        if op == "reread":
            return "terminal"
        if response.status == 202:
            return "detached"
        if response.status == 200:
            self._note("body", conn=conn, **_whole_text(self.ask, value))
            self.terminal = True
            return "terminal"
        if response.status == 204:
            return "terminal" if self.terminal else "again"
        return await self._refused(op, response, code)

    async def _refused(self, op: str, response: aiohttp.ClientResponse, code: str | None) -> str:
        now = time.monotonic()
        if code in AGAIN:
            await asyncio.sleep(min(1.0, float(response.headers.get("X-Backoff-Ms", "500")) / 1_000))
            return "again"
        if (response.status == 404 and op == "events") or (code == "NODE_LOST" and self.began):
            # Nobody knows it, or its node is away: either may be back soon.
            self._unknown_since = self._unknown_since or now
            return "unknown" if now - self._unknown_since > FORGET_AFTER_S else "again"
        return "refused"

    # ---- streams

    async def _blocks(self, conn: int, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        splitter = sse.Splitter()
        silent_s = SILENT_AFTER_S if self.ask.native else SILENT_V1_S
        while True:
            async with asyncio.timeout(silent_s):
                data = await response.content.readany()
            if not data:
                rest = splitter.finish()
                if rest:
                    yield rest
                return
            for block in splitter.feed(data):
                yield block
                if "stall" in self._done and "stalled" not in self._done:
                    self._done.add("stalled")
                    self._note("stalled", conn=conn, for_s=self.ask.stall_s)
                    await asyncio.sleep(self.ask.stall_s)

    async def _native_events(self, conn: int, op: str, response: aiohttp.ClientResponse) -> str:
        ended = False
        async with contextlib.aclosing(self._blocks(conn, response)) as blocks:
            async for block in blocks:
                event = sse.parse(block)
                if event is None:
                    continue
                try:
                    data, ident = json.loads(event.data), int(event.id, 16) if event.id is not None else None
                except ValueError:
                    data, ident = {"unreadable": True}, None
                self._note(
                    "event", conn=conn, kind=event.event, id=ident, size=len(block), crc=zlib.crc32(block), data=data
                )
                if op == "reread":
                    ended = ended or event.event in ("end", "error")
                    continue
                if event.event == "started":
                    self.pool = f"{data.get('node_id')}/{data.get('pool_id')}"
                if event.id is not None:
                    self.last_id, self.began = event.id, True
                if event.event in ("end", "error"):
                    self.terminal = ended = True
                elif event.event == "token":
                    self.seen = max(self.seen, int(data.get("i", -1)) + 1)
                    self._plan(self.seen)
        if op == "reread":
            return "terminal"
        return "terminal" if ended else "broken"

    async def _chunks(self, conn: int, response: aiohttp.ClientResponse) -> str:
        ended = False
        self.seen = 0
        async with contextlib.aclosing(self._blocks(conn, response)) as blocks:
            async for block in blocks:
                event = sse.parse(block)
                if event is None:
                    continue
                kind, more = _chunk(event.data)
                self._note("chunk", conn=conn, kind=kind, **more)
                if kind in ("done", "error"):
                    self.terminal = ended = True
                elif more.get("text"):
                    self.seen += 1
                    self.began = True
                    self._plan(self.seen)
        return "terminal" if ended else "broken"

    # ---- the plan

    def _plan(self, seen: int) -> None:
        """Do what is due after `seen` tokens. Raises Gone. What is due before the first is done a little later."""
        ask = self.ask
        for name, after in (
            ("stall", ask.stall_after), ("cancel", ask.cancel_after), ("mismatch", ask.mismatch_after),
            ("vanish", ask.vanish_after), ("leave", ask.leave_after),
        ):  # fmt: skip
            if after is None or after > seen or name in self._done:
                continue
            self._done.add(name)
            if name == "cancel":
                self._aside(self._cancel())
            elif name == "mismatch":
                self._aside(self._mismatch())
            elif name != "stall" and not seen:
                self._aside(self._go_soon(name))
            elif name != "stall":
                self._note("left", back=name == "vanish")
                raise Gone

    async def _go_soon(self, name: str) -> None:
        """Somewhere between the request and the first token."""
        await asyncio.sleep(self._rng.uniform(0.0, 0.15))
        if self._current is not None and not self._current.done() and not self.terminal:
            self._note("left", back=name == "vanish")
            self._going = True
            self._current.cancel()

    async def _cancel(self) -> None:
        """Ask for it until it is accepted, for a while. Its answers are noted as those of connection 0."""
        for _ in range(10):
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))
            if self.terminal:
                return
            if self.task_id is not None:
                status = await self._aside_request("cancel", f"/v2/tasks/{self.task_id}/cancel", {}, None)
                if status == 202:
                    return

    async def _mismatch(self) -> None:
        """The same key with another body."""
        ask = self.ask
        body = {**replace(ask, marker=f"{ask.marker}-x").body(), "max_tokens": ask.tokens + 1}
        if ask.task_id is not None:
            body["task_id"] = str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        path = "/v2/tasks" if ask.native else ask.path
        await self._aside_request("mismatch", path, {"Idempotency-Key": ask.key or ""}, json.dumps(body).encode())

    async def _aside_request(self, op: str, path: str, headers: dict[str, str], body: bytes | None) -> int:
        self._note("send", conn=0, op=op)
        status, code = 0, None
        try:
            async with (
                asyncio.timeout(SILENT_AFTER_S),
                self._session.post(self._url + path, headers=self._headers | headers, data=body) as response,
            ):
                status = response.status
                if response.content_type == "application/json":
                    value = json.loads(await response.read())
                    code = value["error"]["code"] if status >= 400 else None
        except (*BROKEN, ValueError, KeyError, TypeError):
            pass
        self._note("answer", conn=0, op=op, status=status, code=code)
        return status

    def _aside(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)


def _whole_text(ask: Ask, value: Any) -> dict[str, Any]:
    """The text of an answer in one piece, and why it ended."""
    try:
        if ask.native:
            return {"text": value["text"], "finish": value.get("finish_reason"), "state": value["state"]}
        choice = value["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return {"text": text, "finish": choice["finish_reason"]}
    except (KeyError, IndexError, TypeError):
        return {"text": None, "finish": None}


def _chunk(data: str) -> tuple[str, dict[str, Any]]:
    """What one event of a /v1 stream is."""
    if data == "[DONE]":
        return "done", {}
    try:
        value = json.loads(data)
        if "error" in value:
            return "error", {"code": value["error"].get("code")}
        text = "".join((c.get("text") or (c.get("delta") or {}).get("content") or "") for c in value["choices"])
        finish = next((c["finish_reason"] for c in value["choices"] if c.get("finish_reason")), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "other", {}
    return "text", {"text": text} | ({"finish": finish} if finish else {})
