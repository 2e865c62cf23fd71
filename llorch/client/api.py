"""`LlorchClient`: a control's API, as calls and as streams of typed events.

Owns one connection pool, the task id of each submission (made here, so that a task can be cancelled or taken up again
before a byte of its answer has come), and the resumption of a stream whose connection was lost. Errors that the control
answers are `ServerError`; what goes wrong on the way is a `ClientFault`. Never retries a submission: it only ever looks
for the one that it made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp

from llorch import __version__, sse, tls, web
from llorch.backoff import Backoff
from llorch.client.events import TERMINAL, Event, Token, read_event, server_error
from llorch.client.faults import ClientFault, StreamBroken, TimedOut, Unreachable, unreachable
from llorch.errors import Code, LlorchError
from llorch.messages import decode_object

CALL_TIMEOUT_S = 30.0  # for what a control answers out of its own memory
SILENCE_S = 45.0  # three pings of the control's: a stream this quiet has lost its connection
RESUME_FOR_S = 15.0  # how long a lost stream is looked for: a control that restarts knows its nodes' tasks by then
RESUME_BACKOFF = Backoff(first_s=0.1, most_s=1.0)
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 256 * 1024

_BY_STATUS = {
    400: Code.INVALID_REQUEST,
    401: Code.UNAUTHENTICATED,
    403: Code.FORBIDDEN,
    404: Code.NOT_FOUND,
    405: Code.METHOD_NOT_ALLOWED,
    413: Code.PAYLOAD_TOO_LARGE,
    429: Code.RATE_LIMITED,
    503: Code.NO_CAPACITY,
    504: Code.DEADLINE_EXCEEDED,
}
_FAILURES = (aiohttp.ClientError, OSError, TimeoutError, sse.SseError)
# No connection, or one to what does not speak HTTP (ClientResponseError): no control has the request.
_NEVER_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientResponseError,
    aiohttp.InvalidURL,
)

Answer = contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]


class _Lost(Exception):
    """The connection failed before an answer came. `sent`: the request may have reached the control."""

    def __init__(self, fault: Unreachable, *, sent: bool) -> None:
        super().__init__(fault.message)
        self.fault = fault
        self.sent = sent


class LlorchClient:
    """An async context manager. `url` is a control's base URL; `tls_ca` names a file with further authorities."""

    def __init__(self, url: str, token: str | None = None, *, tls_ca: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._tls_ca = tls_ca
        self._stack = contextlib.AsyncExitStack()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> LlorchClient:
        context = tls.client_context(self._tls_ca) if urlsplit(self.url).scheme == "https" else None
        self._session = await self._stack.enter_async_context(web.client_session(tls=context))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._session = None
        await self._stack.aclose()

    # ------------------------------------------------------------ tasks

    def submit(self, body: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Run a task; its events as they come, the last one an End or a Failed.

        Close the iterator (`contextlib.aclosing`) to leave early; that alone does not cancel the task at once.
        """
        task = with_task_id(body)
        headers = {"Accept": "text/event-stream"}
        return self._stream(task["task_id"], lambda: self._request("POST", "/v2/tasks", task, headers))

    def follow(self, task_id: str, after: str | None = None) -> AsyncGenerator[Event, None]:
        """The events of a task from its start, or those after the event with id `after`: none, if that was its last."""
        return self._stream(task_id, lambda: self._follow(task_id, after), after=after)

    async def submit_whole(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Run a task and return it when it has ended, with its `text`."""
        return await self.call("POST", "/v2/tasks", with_task_id(body), timeout_s=None)

    async def detach(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Leave a task with the cluster; returns `{task_id, state, events_url}` once a node has taken it."""
        return await self.call("POST", "/v2/tasks", {**with_task_id(body), "detach": True}, timeout_s=None)

    async def cancel(self, task_id: str) -> dict[str, Any]:
        return await self.call("POST", f"/v2/tasks/{_path(task_id)}/cancel")

    async def task(self, task_id: str) -> dict[str, Any]:
        return await self.call("GET", f"/v2/tasks/{_path(task_id)}")

    async def tasks(self) -> list[dict[str, Any]]:
        return await self._list("/v2/tasks", "tasks")

    async def placement(self, task_id: str) -> dict[str, Any]:
        """Why a task went where it went."""
        return await self.call("GET", f"/v2/tasks/{_path(task_id)}/placement")

    async def dry_run(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Where a task would go now, and why."""
        return await self.call("POST", "/v2/placement", body)

    # ------------------------------------------------------------ the cluster

    async def nodes(self) -> list[dict[str, Any]]:
        return await self._list("/v2/nodes", "nodes")

    async def node(self, node_id: str) -> dict[str, Any]:
        return await self.call("GET", f"/v2/nodes/{_path(node_id)}")

    async def pools(self) -> list[dict[str, Any]]:
        return await self._list("/v2/pools", "pools")

    async def models(self) -> list[str]:
        return [str(model.get("id")) for model in await self._list("/v1/models", "data")]

    async def ready(self) -> dict[str, Any]:
        """`{status, version, role}`: a control that drains says so, which is no error."""
        return await self.call("GET", "/readyz", accept=(200, 503))

    async def call(
        self,
        method: str,
        path: str,
        body: object | None = None,
        *,
        timeout_s: float | None = CALL_TIMEOUT_S,
        accept: tuple[int, ...] = (200, 201, 202),
    ) -> dict[str, Any]:
        """One JSON call. Raises ServerError, Unreachable or TimedOut."""
        limit: asyncio.Timeout | None = None
        try:
            async with (
                asyncio.timeout(timeout_s) as limit,
                self._request(method, path, body, {"Accept": "application/json"}) as response,
            ):
                if response.status not in accept:
                    raise await _refusal(response, self.url)
                return _object(await _read(response, MAX_ANSWER_BYTES), self.url)
        except _Lost as lost:
            raise lost.fault from None
        except _FAILURES as error:
            if timeout_s is not None and limit is not None and limit.expired():
                raise TimedOut(f"{self.url} did not answer within {timeout_s:g} s") from None
            raise unreachable(self.url, error) from None

    async def _list(self, path: str, name: str) -> list[dict[str, Any]]:
        """The list of objects under `name`, without what is none."""
        found = (await self.call("GET", path)).get(name)
        if not isinstance(found, list):
            raise _stranger(self.url)
        return [entry for entry in found if isinstance(entry, dict)]

    # ------------------------------------------------------------ underneath

    async def _stream(
        self, task_id: str, first: Callable[[], Answer], *, after: str | None = None
    ) -> AsyncGenerator[Event, None]:
        """Events until the terminal one, over as many connections as it takes."""
        place = _Place(task_id, self.url, after)
        opener = first
        while True:
            try:
                async with opener() as response:
                    if response.status == 204 and after is not None and place.untouched:
                        return
                    if response.status != 200:
                        raise await _refusal(response, self.url)
                    async with contextlib.aclosing(_events(response, self.url)) as events:
                        async for event in events:
                            if not place.moved(event):
                                continue
                            yield event
                            if isinstance(event, TERMINAL):
                                return
                why = "it ended before its last event"
            except _Lost as lost:
                if place.untouched and not lost.sent:
                    raise lost.fault from None
                why = lost.fault.why or "the connection was lost"
            except _FAILURES as error:
                why = unreachable(self.url, error).why or "the connection was lost"
            except ClientFault as fault:
                if place.untouched:
                    raise
                raise place.fault(fault.message) from None
            except LlorchError as error:
                if place.untouched:
                    raise
                why = f"{error.message} ({error.code})"
                if not error.retriable and not (place.known and error.code is Code.TASK_NOT_FOUND):
                    raise place.fault(why) from None
            await asyncio.sleep(place.delay_s(time.monotonic(), random.random(), why))
            opener = lambda: self._follow(task_id, place.last)  # noqa: E731 - one line of its own says it best

    def _follow(self, task_id: str, after: str | None) -> Answer:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after is not None else {})
        return self._request("GET", f"/v2/tasks/{_path(task_id)}/events", None, headers)

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, path: str, body: object | None, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer's head; its body is the caller's to read. Raises _Lost if there is none."""
        assert self._session is not None, "use it as `async with LlorchClient(...) as client`"
        sent = {"User-Agent": f"llorch/{__version__}", **headers}
        if self._token is not None:
            sent["Authorization"] = f"Bearer {self._token}"
        data = None
        if body is not None:
            data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
            sent["Content-Type"] = "application/json"
        try:
            response = await self._session.request(
                method, self.url + path, data=data, headers=sent, allow_redirects=False
            )
        except _FAILURES as error:
            raise _Lost(unreachable(self.url, error), sent=not isinstance(error, _NEVER_SENT)) from None
        async with response:
            yield response


class _Place:
    """How far a stream was read, and how long its next part has been looked for."""

    def __init__(self, task_id: str, url: str, after: str | None) -> None:
        self.task_id = task_id
        self.url = url
        self.last = after
        self.untouched = True  # nothing has been received or lost yet
        self.known = False  # there is such a task: a control that says otherwise has just started
        self._began = False
        self._failures = 0
        self._lost_at = 0.0

    def moved(self, event: Event) -> bool:
        """Note an event. False for one that was there before: nothing is shown twice."""
        self.untouched = False
        if event.id is not None and self.last is not None and not _is_after(event.id, self.last):
            return False
        self._failures = 0
        self.known = True
        self.last = event.id or self.last
        self._began = self._began or isinstance(event, Token)
        return True

    def delay_s(self, now: float, chance: float, why: str) -> float:
        """How long to wait before looking again. Raises when it has been looked for long enough."""
        self.untouched = False
        self._failures += 1
        if self._failures == 1:
            self._lost_at = now
        elif now - self._lost_at > RESUME_FOR_S:
            raise self.fault(why)
        return RESUME_BACKOFF.delay_s(self._failures, chance)

    def fault(self, why: str) -> ClientFault:
        if not self._began:
            hint = "the task may be running; `llorch task show` tells"
            return Unreachable(f"lost the connection to {self.url}", why=why, hint=f"{hint} ({self.task_id})")
        return StreamBroken(
            "the stream broke off after output had begun",
            task_id=self.task_id,
            why=why,
            hint=f"what is left may still be there: llorch task logs {self.task_id}",
        )


def _is_after(id: str, other: str) -> bool:
    """Ids are offsets in hexadecimal. One that is not is not compared."""
    try:
        return int(id, 16) > int(other, 16)
    except ValueError:
        return True


def with_task_id(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with an id of its own, which is what makes it possible to cancel it, or to find it again."""
    return {**body, "task_id": body.get("task_id") or str(uuid.uuid4())}


async def _events(response: aiohttp.ClientResponse, url: str) -> AsyncGenerator[Event, None]:
    """The events of one connection. Ends where it ends; a silent one raises TimeoutError."""
    if response.content_type != "text/event-stream":
        raise _stranger(url)
    decoder = sse.Decoder()
    while True:
        async with asyncio.timeout(SILENCE_S):
            data = await response.content.readany()
        if not data:
            last = decoder.finish()
            event = _read_event(last) if last is not None else None
            if event is not None:
                yield event
            return
        for raw in decoder.feed(data):
            event = _read_event(raw)
            if event is not None:
                yield event


def _read_event(raw: sse.Event) -> Event | None:
    try:
        return read_event(raw)
    except LlorchError as error:
        raise sse.SseError(f"an event whose data is not JSON: {error.message}") from None


async def _read(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while size <= most_bytes and (chunk := await response.content.readany()):
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)[:most_bytes]


async def _refusal(response: aiohttp.ClientResponse, url: str) -> Exception:
    """What an answer that is not the hoped-for one means."""
    if 300 <= response.status < 400:
        return Unreachable(f"{url} leads elsewhere", why=f"it answered {response.status}", hint="give the final URL")
    if response.status < 300:
        return _stranger(url)
    request_id = response.headers.get("X-Request-Id")
    fallback = _BY_STATUS.get(response.status, Code.INTERNAL)
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            wire = decode_object(await _read(response, MAX_ERROR_BYTES)).get("error")
    except LlorchError:
        wire = None
    if not isinstance(wire, Mapping):
        wire = {"code": fallback.value, "message": f"{url} answered {response.status} and did not say why"}
    return server_error(wire, fallback=fallback, request_id=request_id)


def _object(raw: bytes, url: str) -> dict[str, Any]:
    try:
        return decode_object(raw)
    except LlorchError:
        raise _stranger(url) from None


def _stranger(url: str) -> Unreachable:
    return Unreachable(f"what answers at {url} is not llorch", hint="check the host and the port in --url")


def _path(word: str) -> str:
    return quote(word, safe="")
