"""`LlorchClient`: a control's API, as calls and as streams of typed events.

Owns one connection pool, and what becomes of a submission whose connection is lost: it is sent again under the key that
it was sent with, so that the control finds the task if it has it and runs it if it never did; once the task has put
something out, its log is read on from there. Errors that the control answers are `ServerError`; what goes wrong on the
way is a `ClientFault`. How long a task is looked for is `resume.py`'s to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp

from llorch import __version__, sse, tls, web
from llorch.client import resume
from llorch.client.events import TERMINAL, Event, ServerError, read_event, server_error
from llorch.client.faults import ClientFault, StreamBroken, TimedOut, Unreachable, unreachable
from llorch.client.operations import Operations
from llorch.client.resume import Looking, Place, Tell, tell_nobody
from llorch.client.submission import Submission, to_json
from llorch.errors import Code, LlorchError
from llorch.messages import decode_object

CALL_TIMEOUT_S = 30.0  # for what a control answers out of its own memory
SILENCE_S = 45.0  # three pings of the control's: a stream this quiet, begun or not, has lost its connection
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
_PROXY_STATUSES = (502, 503, 504)  # what a proxy answers when the control behind it does not
_ACCEPTED = (200, 202)  # of a submission; another answer may name a task that never was
_JSON = {"Accept": "application/json"}
_SSE = {"Accept": "text/event-stream"}
# No connection, or one to what does not speak HTTP (ClientResponseError): no control has the request.
_NEVER_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientResponseError,
    aiohttp.InvalidURL,
)

Answer = contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]


class _Lost(Exception):
    """The connection failed. `sent`: the request may have reached the control. `taken`: it did, and was cut off."""

    def __init__(self, fault: Unreachable, *, sent: bool, taken: bool) -> None:
        super().__init__(fault.message)
        self.fault = fault
        self.sent = sent
        self.taken = taken


class LlorchClient(Operations):
    """An async context manager. `url` is a control's base URL; `tls_ca` names a file with further authorities, or, if
    it is `pinned`, with the only ones.
    """

    def __init__(self, url: str, token: str | None = None, *, tls_ca: str | None = None, pinned: bool = False) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._tls_ca, self._pinned = tls_ca, pinned
        self._stack = contextlib.AsyncExitStack()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> LlorchClient:
        context = tls.client_context(self._tls_ca, only=self._pinned) if urlsplit(self.url).scheme == "https" else None
        self._session = await self._stack.enter_async_context(web.client_session(tls=context))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._session = None
        await self._stack.aclose()

    # ------------------------------------------------------------ tasks

    def submit(
        self, body: Mapping[str, Any] | Submission, *, key: str | None = None, tell: Tell = tell_nobody
    ) -> AsyncGenerator[Event, None]:
        """Run a task; its events as they come, the last one an End or a Failed.

        `key` is its idempotency key, made here if none is given: the same body under the same key attaches to the task
        that there is. `tell` hears of every look for a task whose connection is lost. Close the iterator
        (`contextlib.aclosing`) to leave early; that alone does not cancel the task at once.
        """
        task = _submission(body, key)
        place = Place(self.url, task.task_id)

        def ask() -> Answer:
            if place.last is None or place.task_id is None:
                return self._post(task, _SSE, silence_s=SILENCE_S)
            return self._follow(place.task_id, place)

        return self._stream(place, ask, tell)

    def follow(
        self, task_id: str, after: str | None = None, *, tell: Tell = tell_nobody
    ) -> AsyncGenerator[Event, None]:
        """The events of a task from its start, or those after the event with id `after`: none, if that was its last."""
        place = Place(self.url, task_id, after=after)
        return self._stream(place, lambda: self._follow(task_id, place), tell)

    async def submit_whole(
        self, body: Mapping[str, Any] | Submission, *, key: str | None = None, tell: Tell = tell_nobody
    ) -> dict[str, Any]:
        """Run a task and return it when it has ended, with its `text`. Resumes as `submit` does."""
        return await self._submit_for_json(_submission(body, key), tell)

    async def detach(
        self, body: Mapping[str, Any] | Submission, *, key: str | None = None, tell: Tell = tell_nobody
    ) -> dict[str, Any]:
        """Leave a task with the cluster; returns `{task_id, state, events_url}` once a node has taken it."""
        task = _submission(body, key)
        task.body["detach"] = True
        return await self._submit_for_json(task, tell)

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

    async def pardon(self, node_id: str) -> dict[str, Any]:
        """Forget what a node did that it may not; one that is quarantined may come back at once."""
        return await self.call("POST", f"/v2/nodes/{_path(node_id)}/pardon")

    async def pools(self) -> list[dict[str, Any]]:
        return await self._list("/v2/pools", "pools")

    async def models(self) -> list[str]:
        return [str(model.get("id")) for model in await self._list("/v1/models", "data")]

    async def tokens(self) -> list[dict[str, Any]]:
        return await self._list("/v2/tokens", "tokens")

    async def new_token(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Its view, and for this once its text as `token`."""
        return await self.call("POST", "/v2/tokens", wanted)

    async def revoke_token(self, which: str) -> list[str]:
        """By id or name; the ids of those that were in force until now."""
        revoked = (await self.call("DELETE", f"/v2/tokens/{_path(which)}")).get("revoked")
        return [str(token_id) for token_id in revoked] if isinstance(revoked, list) else []

    async def ready(self) -> dict[str, Any]:
        """`{status, version, role}`: a control that drains says so, which is no error."""
        return await self.call("GET", "/readyz", accept=(200, 503))

    async def call(
        self,
        method: str,
        path: str,
        body: object | None = None,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        accept: tuple[int, ...] = (200, 201, 202),
    ) -> dict[str, Any]:
        """One JSON call that may be repeated: it is, within its time, while a control that has just started says so.

        Raises ServerError, Unreachable or TimedOut.
        """
        limit: asyncio.Timeout | None = None
        data = None if body is None else to_json(body)
        failures = 0
        try:
            async with asyncio.timeout(timeout_s) as limit:
                while True:
                    async with self._request(method, path, data, _JSON) as response:
                        if response.status in accept:
                            return _object(await _read(response, MAX_ANSWER_BYTES), self.url)
                        refused = await _refusal(response, self.url)
                    failures += 1
                    await self._pause(refused, failures, limit)
        except _Lost as lost:
            raise lost.fault from None
        except _FAILURES as error:
            if limit is not None and limit.expired():
                raise TimedOut(f"{self.url} did not answer within {timeout_s:g} s") from None
            raise unreachable(self.url, error) from None

    async def _pause(self, refused: Exception, failures: int, limit: asyncio.Timeout) -> None:
        """Until a call may be repeated. Raises `refused` if it is not to be, or not in time."""
        if not isinstance(refused, ServerError) or refused.code is not Code.RECOVERING:
            raise refused
        delay_s = resume.delay_s(failures, random.random(), refused.retry_after_ms)
        until = limit.when()
        if until is not None and asyncio.get_running_loop().time() + delay_s >= until:
            raise refused
        await asyncio.sleep(delay_s)

    async def _list(self, path: str, name: str) -> list[dict[str, Any]]:
        """The list of objects under `name`, without what is none."""
        found = (await self.call("GET", path)).get(name)
        if not isinstance(found, list):
            raise _stranger(self.url)
        return [entry for entry in found if isinstance(entry, dict)]

    async def raw_events(self, path: str) -> AsyncGenerator[sse.Event, None]:
        """The events of a stream that is no task's, over one connection, as they came. Raises ServerError, or
        Unreachable for a silent one too."""
        try:
            async with self._request("GET", path, None, _SSE, within_s=SILENCE_S) as response:
                if response.status != 200:
                    raise await _refusal(response, self.url)
                if response.content_type != "text/event-stream":
                    raise _stranger(self.url)
                async with contextlib.aclosing(_raw_events(response)) as events:
                    async for event in events:
                        yield event
        except _Lost as lost:
            raise lost.fault from None
        except _FAILURES as error:
            raise unreachable(self.url, error) from None

    # ------------------------------------------------------------ underneath

    async def _stream(self, place: Place, ask: Callable[[], Answer], tell: Tell) -> AsyncGenerator[Event, None]:
        """Events until the terminal one, over as many connections as it takes."""
        after = place.last
        while True:
            place.asked(time.monotonic())
            try:
                async with ask() as response:
                    if response.status == 204 and place.begun:
                        raise place.fault("its log has ended without a last event")
                    if response.status == 204 and after is not None:
                        return
                    if response.status != 200:
                        raise await _refusal(response, self.url)
                    if response.content_type != "text/event-stream":
                        raise _stranger(self.url)
                    place.accepted(response.headers.get("X-Llorch-Task"))
                    async with contextlib.aclosing(_events(response)) as events:
                        async for event in events:
                            if not place.moved(event):
                                continue
                            yield event
                            if isinstance(event, TERMINAL):
                                return
                raise _cut_short(self.url)
            except (_Lost, ServerError, ClientFault, *_FAILURES) as error:
                await self._look_again(place, error, tell)

    async def _submit_for_json(self, task: Submission, tell: Tell) -> dict[str, Any]:
        place = Place(self.url, task.task_id)
        while True:
            place.asked(time.monotonic())
            try:
                async with self._post(task, _JSON) as response:
                    if response.status not in _ACCEPTED:
                        raise await _refusal(response, self.url)
                    return _object(await _read(response, MAX_ANSWER_BYTES), self.url)
            except (_Lost, ServerError, ClientFault, *_FAILURES) as error:
                place.task_id = task.task_id
                await self._look_again(place, error, tell)

    async def _look_again(self, place: Place, error: Exception, tell: Tell) -> None:
        """After an attempt has failed: returns when it is time for the next one. Raises where that would be in vain."""
        match error:
            case _Lost() if place.untouched and not error.sent:
                raise error.fault from None
            case StreamBroken():
                raise error
            case ClientFault():
                raise (error if place.untouched else place.fault(error.message)) from None
            case ServerError():
                why, taken = f"{error.message} ({error.code})", False
                if place.begun and error.code is Code.UNAUTHENTICATED:
                    raise place.shut_out(why) from None
                if not place.may_wait(error):
                    raise (place.fault(why) if place.begun else error) from None
            case _Lost():
                why, taken = error.fault.why or "the connection was lost", error.taken
            case _:
                why, taken = unreachable(self.url, error).why or "the connection was lost", _was_cut(error)
        since_s = place.lost(time.monotonic(), taken=taken)
        refused = error if isinstance(error, ServerError) else None
        tell(Looking(why, since_s, answered=refused is not None and not refused.by_proxy))
        delay_s = place.delay_s(since_s, random.random(), None if refused is None else refused.retry_after_ms)
        if delay_s is None:
            raise (place.fault(why) if place.begun or refused is None or refused.by_proxy else refused) from None
        await asyncio.sleep(delay_s)

    @contextlib.asynccontextmanager
    async def _post(
        self, task: Submission, headers: Mapping[str, str], *, silence_s: float | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """`silence_s`: until the answer's head, after the body; a control that streams pings before it has a word."""
        data = task.wire()
        within_s = None if silence_s is None else silence_s + len(data) / web.MIN_BODY_RATE
        wanted = {**headers, **task.headers()}
        async with self._request("POST", "/v2/tasks", data, wanted, within_s=within_s) as response:
            if response.status in _ACCEPTED:
                task.accepted(response.headers)
            yield response

    def _follow(self, task_id: str, place: Place) -> Answer:
        """A control that follows a task pings before it has anything to say, so silence is a fault here too."""
        headers = dict(_SSE)
        if place.last is not None:
            headers["Last-Event-ID"] = place.last
        if place.attempt is not None:
            headers["X-Llorch-Attempt"] = str(place.attempt)
        return self._request("GET", f"/v2/tasks/{_path(task_id)}/events", None, headers, within_s=SILENCE_S)

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str], *, within_s: float | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer's head; its body is the caller's to read. Raises _Lost if there is none `within_s`."""
        assert self._session is not None, "use it as `async with LlorchClient(...) as client`"
        sent = {"User-Agent": f"llorch/{__version__}", **headers}
        if self._token is not None:
            sent["Authorization"] = f"Bearer {self._token}"
        if data is not None:
            sent["Content-Type"] = "application/json"
        try:
            async with asyncio.timeout(within_s):
                response = await self._session.request(
                    method, self.url + path, data=data, headers=sent, allow_redirects=False
                )
        except _FAILURES as error:
            was_sent = not isinstance(error, _NEVER_SENT)
            fault = unreachable(self.url, error)
            raise _Lost(fault, sent=was_sent, taken=was_sent and _was_cut(error)) from None
        async with response:
            try:
                yield response
            finally:
                _leave(response)


def _leave(response: aiohttp.ClientResponse) -> None:
    """One that was not read to its end goes at once: over TLS a goodbye has the connection open for another 30 s, and
    what has no loop by then never closes it."""
    if response.connection is not None and response.connection.transport is not None:
        response.connection.transport.abort()


def _submission(body: Mapping[str, Any] | Submission, key: str | None) -> Submission:
    return body if isinstance(body, Submission) else Submission(body, key)


def _was_cut(error: Exception) -> bool:
    """Whether a connection ended, and not merely the patience with it."""
    return not isinstance(error, (TimeoutError, sse.SseError))


def _cut_short(url: str) -> _Lost:
    why = "it ended before its last event"
    return _Lost(Unreachable(f"can't reach {url}", why=why), sent=True, taken=True)


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[Event, None]:
    """The events of one connection that this client knows."""
    async with contextlib.aclosing(_raw_events(response)) as events:
        async for raw in events:
            event = _read_event(raw)
            if event is not None:
                yield event


async def _raw_events(response: aiohttp.ClientResponse) -> AsyncGenerator[sse.Event, None]:
    """The events of one connection. Ends where it ends; a silent one raises TimeoutError."""
    decoder = sse.Decoder()
    while True:
        async with asyncio.timeout(SILENCE_S):
            data = await response.content.readany()
        if not data:
            if (last := decoder.finish()) is not None:
                yield last
            return
        for event in decoder.feed(data):
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
    by_proxy = False
    if not isinstance(wire, Mapping):
        wire = {"code": fallback.value, "message": f"{url} answered {response.status} and did not say why"}
        by_proxy = response.status in _PROXY_STATUSES
    refused = server_error(wire, fallback=fallback, request_id=request_id)
    refused.by_proxy = by_proxy
    if refused.retry_after_ms is None:
        refused.retry_after_ms = _retry_after_ms(response.headers.get("Retry-After", ""))
    return refused


def _retry_after_ms(seconds: str) -> int | None:
    """Of the header's two forms, the one that needs no clock of the peer's."""
    return int(seconds) * 1_000 if seconds.isascii() and seconds.isdigit() and len(seconds) < 10 else None


def _object(raw: bytes, url: str) -> dict[str, Any]:
    try:
        return decode_object(raw)
    except LlorchError:
        raise _stranger(url) from None


def _stranger(url: str) -> Unreachable:
    return Unreachable(f"what answers at {url} is not llorch", hint="check the host and the port in --url")


def _path(word: str) -> str:
    return quote(word, safe="")
