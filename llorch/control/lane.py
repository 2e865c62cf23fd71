"""The short way of a `/v1` request: from its bytes to a task and back, beside aiohttp.

Nearly every request of a control is one of these, and what a library's objects cost it is more than what is done for
it. So a POST to a served path that has come in one piece, with a token that is good for it, is answered here; anything
else about it (another version of HTTP, a certificate, an `Expect`, a key that may have been used before, a body that is
wrong or large) is left to aiohttp and the handlers, as if nobody had looked. Where requests begin and end has been
settled before (`framing`). Never answers a refusal of who asks or of what was asked.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from llorch import tls
from llorch.auth import Principal, Scope
from llorch.control import intake, on_record
from llorch.control.answers import OpenAiAnswer
from llorch.control.audience import Audience, ShuttingDown
from llorch.control.state import Control
from llorch.control.tasks import Task
from llorch.errors import LlorchError
from llorch.http_connection import Connection, Ride
from llorch.ids import new_request_id, new_task_id
from llorch.logs import Log
from llorch.messages import Tail
from llorch.openai_paths import SERVED
from llorch.outlet import Outlet
from llorch.web import Gate, error_response, sane_id

MAX_BODY_BYTES = 256 * 1024  # beyond this, who looks at a body has others wait for it

_FIRST = re.compile(rb"POST (/v1/[a-z_/]+) HTTP/1\.1\r\n")
_WANT_MORE = ("Expect", "Upgrade", "Idempotency-Key", "Transfer-Encoding", "Content-Encoding")  # than is done here
_FIELD = re.compile(r"([^:\r\n]+):[ \t]*([^\r\n]*)")

log = Log("control.lane")


class Lane:
    """A http_connection.Lane."""

    def __init__(self, control: Control, gate: Gate) -> None:
        self._control = control
        self._gate = gate
        self._most_bytes = min(MAX_BODY_BYTES, control.max_body_bytes)

    def __call__(self, connection: Connection, request: bytes) -> Ride | None:
        first = _FIRST.match(request)
        if first is None:
            return None
        path = first[1].decode()
        head_end = request.find(b"\r\n\r\n")
        if path not in SERVED or len(request) - head_end - 4 > self._most_bytes:
            return None
        lines = request[first.end() - 2 : head_end]
        if not lines.isascii() or b" \r\n" in lines or b"\t\r\n" in lines or lines.endswith((b" ", b"\t")):
            return None
        headers = CIMultiDict(_FIELD.findall(lines.decode("ascii")))
        for name in _WANT_MORE:
            if name in headers:
                return None
        if "Connection" in headers and any(text.lower() != "keep-alive" for text in headers.getall("Connection")):
            return None
        principal = self._who(connection, headers)
        if principal is None:
            return None
        given = headers.get("X-Request-Id") or headers.get("X-Correlation-Id")
        try:
            task = intake.openai_task(
                path,
                request[head_end + 4 :],
                headers,
                owner=principal.name,
                request_id=given if given is not None and sane_id(given) else new_request_id(),
                task_id=new_task_id(),
                now=time.monotonic(),
            )
        except LlorchError:
            return None
        if not principal.may_use(task.wish.model):
            return None
        ride = _Ride(self._control, self._gate, connection, principal, task)
        ride.begin()
        return ride

    def _who(self, connection: Connection, headers: CIMultiDict[str]) -> Principal | None:
        """Who asks, if it is somebody who may."""
        transport, gate = connection.transport, self._gate
        if transport is None:
            return None
        if gate.certified is not None:
            try:
                if tls.peer_of(transport.get_extra_info("ssl_object")) is not None:
                    return None
            except ValueError:
                return None
        found = gate.of_token(headers)
        return found if found is not None and found.may(Scope.SUBMIT) else None


class _Ride:
    """One request, from its admission to the end of its answer."""

    __slots__ = ("_answer", "_audience", "_connection", "_control", "_gate", "_outlet", "_over", "_principal", "_task")

    def __init__(self, control: Control, gate: Gate, connection: Connection, principal: Principal, task: Task) -> None:
        self._control = control
        self._gate = gate
        self._connection = connection
        self._principal = principal
        self._task = task
        self._outlet = Outlet(connection, task.request_id)
        self._answer = OpenAiAnswer(self._outlet, task, control.slow_reader_timeout_s)
        self._audience: Audience | None = None
        self._over = False  # its client has gone, or was sent away

    def begin(self) -> None:
        control, principal, task = self._control, self._principal, self._task
        quotas = self._gate.quotas
        try:
            quotas.request(principal, task.received_at)
            quotas.begin_stream(principal.name)
        except LlorchError as error:  # there is no task yet that could be named
            self._send(error_response(error, task.request_id))
            return
        try:
            audience = control.dispatcher.start(task, self._answer)
        except BaseException as error:
            quotas.end_stream(principal.name)
            if not isinstance(error, LlorchError):
                raise
            self._send(self._answer.failed(error, task.request_id))
            return
        self._gate.sessions.begin(principal, self)
        self._audience = audience
        self._gate.identified(principal)
        on_record.task_accepted(control.audit, principal, _peer(self._connection), task)
        assert audience.running is not None
        audience.running.add_done_callback(self._ended)

    # ---- who may end it

    def lost(self) -> None:
        """The client has gone (http_connection.Ride)."""
        if self._audience is not None and not self._over:
            self._over = True
            self._audience.left()

    def cancel(self, _why: str) -> None:
        """Its credential is good no longer (sessions.Serving)."""
        self._connection.force_close()
        self.lost()  # what waits for a client that does not read keeps the connection for a while yet

    # ---- its end

    def _ended(self, running: asyncio.Task[Tail | Exception]) -> None:
        self._gate.sessions.end_of(self._principal, self)
        self._gate.quotas.end_stream(self._principal.name)
        audience = self._audience
        assert audience is not None
        if self._connection.transport is None:
            return
        try:
            self._send(self._response(running, audience))
        except ConnectionError:
            self._connection.force_close()
        except Exception:
            log.fault("request.failed", task_id=self._task.task_id, request_id=self._task.request_id)
            self._connection.force_close()

    def _response(self, running: asyncio.Task[Tail | Exception], audience: Audience) -> web.StreamResponse:
        answer, request_id = self._answer, self._task.request_id
        if running.cancelled():
            raise ConnectionResetError("the task was let go of")
        outcome = running.result()
        if audience.trouble is not None:
            outcome = audience.trouble
        try:
            if isinstance(outcome, Tail):
                return answer.ended(outcome)
            if isinstance(outcome, ShuttingDown):
                return answer.stopped(request_id)
            if isinstance(outcome, LlorchError):
                raise outcome.copy()
        except LlorchError as error:
            return answer.failed(error, request_id)
        raise outcome

    def _send(self, response: Any) -> None:
        """What is not on its way yet: a refusal."""
        if isinstance(response, web.Response):
            self._outlet.whole(response)
        keep = getattr(response, "keep_alive", None) is not False
        self._connection.answered(keep=keep)


def _peer(connection: Connection) -> str | None:
    transport = connection.transport
    name = transport.get_extra_info("peername") if transport is not None else None
    return str(name[0]) if name else None
