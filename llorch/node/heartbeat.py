"""Membership: one loop per control that keeps this node registered, beating and linked.

    register ─▶ link ─▶ a full beat every interval, a delta soon after each change
       ▲          │ link ends: beat at once, then every 0.2 to 2 s, until it is back
       └──────────┴── NODE_UNKNOWN, LEASE_STALE, another epoch

Owns the lease, the sequence of beats, and when to try again. What is said is `reports`; what runs over the link is
`link`. Never gives up: a control that refuses the token today may accept it after its next reload.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import aiohttp

from llorch.backoff import Backoff
from llorch.errors import MEANINGS, Code, LlorchError
from llorch.logs import Log
from llorch.messages import decode_json
from llorch.node import reports
from llorch.node.credentials import Credentials
from llorch.node.dial import dial
from llorch.node.link import Calls, NodeLink
from llorch.node.reports import Identity, Snapshot
from llorch.node.state import Node
from llorch.reach import why_unreachable

RETRY = Backoff(first_s=0.4, most_s=2.0)  # 0.2 to 2 s with its jitter
SLOW_RETRY = Backoff(first_s=5.0, most_s=30.0)  # for refusals that only a person can mend
COALESCE_S = 0.02  # what changes together is told together
MOST_TOLD = 8  # different reasons of failures in a row that are warned of: a peer can make up as many as it likes
CALL_TIMEOUT_S = 5.0
LEAVE_TIMEOUT_S = 2.0
MAX_ANSWER_BYTES = 1024 * 1024

_REGISTER_AGAIN = frozenset({Code.NODE_UNKNOWN, Code.LEASE_STALE, Code.NODE_ID_CONFLICT})
_FOR_A_PERSON = frozenset(
    {Code.UNAUTHENTICATED, Code.FORBIDDEN, Code.NODE_ID_CONFLICT, Code.NODE_QUARANTINED, Code.UNTRUSTED_ADDRESS}
)

log = Log("node.heartbeat")


@dataclass(slots=True)
class Lease:
    lease_id: str
    epoch: str
    interval_s: float
    seq: int = 0
    held: bool = False  # a beat or a link was accepted under it


class _LeaseEnded(Exception):
    """This registration is no longer in force; the next one may be."""


class Membership:
    """This node at one control. `run` it as a task; `leave` after that task has ended."""

    def __init__(
        self,
        node: Node,
        identity: Identity,
        url: str,
        credentials: Credentials,
        session: aiohttp.ClientSession,
        calls: Calls,
        *,
        early_beat_s: float,
    ) -> None:
        self.url = url.rstrip("/")
        self._node = node
        self._identity = identity
        self._credentials = credentials
        self._session = session
        self._calls = calls
        self._early_beat_s = early_beat_s
        self._lease: Lease | None = None
        self._link: NodeLink | None = None
        self._sent: Snapshot | None = None
        self._rtt_ms: float | None = None
        self._failures = 0
        self._told: set[str] = set()  # the reasons of these failures that a person was told
        self._event = asyncio.Event()
        self._changed_at: float | None = None
        self._beat_now = False

    @property
    def linked(self) -> bool:
        return self._link is not None

    def notify(self) -> None:
        """Something that controls are told about has changed."""
        if self._changed_at is None:
            self._changed_at = time.monotonic()
            self._event.set()

    def beat_now(self) -> None:
        """A full beat at once, whether or not anything has changed: so that a new certificate is seen."""
        self._beat_now = True
        self._event.set()

    async def run(self) -> None:
        while True:
            try:
                lease = self._lease = await self._register()
                await self._keep(lease)
            except _LeaseEnded as ended:
                log.info("node.reregisters", node_id=self._node.node_id, url=self.url, why=str(ended))
                self._failures += 1
                # A control that has restarted answers, and knows nobody: back at once, however often it failed before.
                anew = lease.held and str(ended) == Code.NODE_UNKNOWN
                pause_s = 0 if anew or self._failures == 1 else RETRY.delay_s(self._failures, random.random())
            except LlorchError as error:
                pause_s = self._pause_s(error)
            except Exception:
                log.fault("loop.failed", loop="heartbeat", node_id=self._node.node_id, url=self.url)
                pause_s = RETRY.most_s
            await self._drop_link("registering again")
            await asyncio.sleep(pause_s)

    async def leave(self) -> None:
        """Say goodbye, so that nobody waits for this node. Never fails: the control notices anyway."""
        if self._lease is not None:
            with contextlib.suppress(LlorchError):
                await self._call("DELETE", self._path(), None, timeout_s=LEAVE_TIMEOUT_S)
                log.info("node.deregistered", node_id=self._node.node_id, url=self.url)
        await self._drop_link("this node leaves")

    # ---- one lease

    async def _register(self) -> Lease:
        self._changed_at = None  # what changes while the answer is on its way, it does not know
        now = self._snapshot(None)
        answer = await self._call("POST", "/v2/nodes/register", reports.register(self._identity, now))
        lease_id, epoch, interval_ms = (answer.get(name) for name in ("lease_id", "epoch", "heartbeat_interval_ms"))
        if not (isinstance(lease_id, str) and isinstance(epoch, str) and isinstance(interval_ms, int)):
            raise LlorchError(Code.NODE_LOST, "the control's answer to the registration can't be read")
        self._sent = now
        self._heard(answer)
        log.info("node.registered", node_id=self._node.node_id, url=self.url, epoch=epoch)
        return Lease(lease_id, epoch, max(interval_ms / 1_000, 0.01))

    async def _keep(self, lease: Lease) -> None:
        """Beats, deltas and the link, until the lease ends. The registration itself was the first full beat."""
        due, last_delta, registered_now = time.monotonic(), 0.0, True
        while True:
            now = time.monotonic()
            if now >= due or self._beat_now:
                self._beat_now = False
                due = time.monotonic() + await self._renew(lease, beat=not registered_now)
                registered_now = False
            elif self._changed_at is not None and now >= self._delta_due(last_delta):
                last_delta = now
                if not await self._tell_changes(lease):
                    due = now
            until = due if self._changed_at is None else min(due, self._delta_due(last_delta))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    await self._event.wait()
            self._event.clear()

    def _delta_due(self, last_delta: float) -> float:
        changed_at = self._changed_at if self._changed_at is not None else time.monotonic()
        return max(changed_at + COALESCE_S, last_delta + self._early_beat_s)

    async def _renew(self, lease: Lease, *, beat: bool) -> float:
        """A full beat, and the link if it is down. Returns the seconds until the next time."""
        try:
            interval_s = await self._beat(lease) if beat else lease.interval_s
            if self._link is None:
                await self._open_link(lease)
            self._failures = 0
            self._told.clear()
            lease.held = True
            return interval_s
        except LlorchError as error:
            if error.code in _REGISTER_AGAIN:
                raise _LeaseEnded(error.code.value) from None
            return self._pause_s(error)

    async def _beat(self, lease: Lease) -> float:
        self._changed_at = None
        now = self._snapshot(lease.epoch)
        answer = await self._post_beat(lease, reports.full(self._next(lease), now))
        self._sent = now
        next_ms = answer.get("next_heartbeat_ms")
        return max(next_ms / 1_000, 0.01) if isinstance(next_ms, int) else lease.interval_s

    async def _tell_changes(self, lease: Lease) -> bool:
        """A delta. False if it did not arrive: a full beat has to make up for it."""
        self._changed_at = None
        now = self._snapshot(lease.epoch)
        before, self._sent = self._sent, None
        if before is None:
            return False
        message = reports.delta(self._next(lease), before, now)
        if message is not None:
            try:
                await self._post_beat(lease, message)
            except LlorchError as error:
                if error.code in _REGISTER_AGAIN:
                    raise _LeaseEnded(error.code.value) from None
                log.debug("heartbeat.failed", node_id=self._node.node_id, url=self.url, code=error.code)
                return False
        self._sent = now
        return True

    async def _post_beat(self, lease: Lease, message: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        answer = await self._call("POST", f"{self._path()}/heartbeat", message)
        self._rtt_ms = round((time.monotonic() - started) * 1_000, 3)
        self._node.metrics.beat(self._rtt_ms)
        self._heard(answer)
        return answer

    def _heard(self, answer: dict[str, Any]) -> None:
        """What a control tells with its answers: which authorities there are, and what tickets are signed with."""
        self._credentials.heard(answer.get("authorities"))
        if self._node.stager is not None:
            self._node.stager.peers.heard(self.url, answer.get("ticket_key"))

    def _next(self, lease: Lease) -> reports.Beat:
        lease.seq += 1
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return reports.Beat(lease.lease_id, self._identity.boot_id, lease.seq, stamp, self._rtt_ms)

    def _snapshot(self, epoch: str | None) -> Snapshot:
        """What is true now. `epoch`: of the control that it is for; None: it may know nothing yet."""
        node = self._node
        return reports.snapshot(
            draining=node.draining,
            pools=node.pool_reports(),
            gpus=node.gpu_reports(),
            catalog=node.model_reports(),
            tasks=node.runner.logs.reports(epoch),
        )

    # ---- the link

    async def _open_link(self, lease: Lease) -> None:
        def take() -> NodeLink:
            self._link = NodeLink(self._node.runner, self._calls, lease.epoch, self._link_lost)
            return self._link

        await dial(self.url, self._node.node_id, lease.lease_id, self._credentials, lease.epoch, take)
        log.info("link.up", node_id=self._node.node_id, url=self.url)

    def _link_lost(self, link: NodeLink, reason: str) -> None:
        if self._link is link:
            self._link = None
            self.beat_now()
            log.warning("link.lost", node_id=self._node.node_id, url=self.url, reason=reason)

    async def _drop_link(self, reason: str) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close(reason)

    # ---- calls

    def _path(self) -> str:
        return f"/v2/nodes/{quote(self._node.node_id, safe='')}"

    def _pause_s(self, error: LlorchError) -> float:
        """How long to wait after a failure, which is logged once for each reason in a row."""
        self._failures += 1
        if error.code in _FOR_A_PERSON:
            hint = self._credentials.mend if error.code in (Code.UNAUTHENTICATED, Code.FORBIDDEN) else error.hint
            log.error(
                "control.refuses",
                node_id=self._node.node_id,
                url=self.url,
                code=error.code,
                reason=error.message,
                hint=hint,
            )
            return SLOW_RETRY.delay_s(self._failures, random.random())
        another = error.message not in self._told and len(self._told) < MOST_TOLD
        if another:
            self._told.add(error.message)
        tell = log.warning if another or self._failures == 10 or self._failures % 100 == 0 else log.debug
        tell(
            "heartbeat.failed",
            node_id=self._node.node_id,
            url=self.url,
            code=error.code,
            reason=error.message,
            hint=error.hint if error.hint != MEANINGS[error.code].hint else None,  # which is for clients
            failures=self._failures,
        )
        return RETRY.delay_s(self._failures, random.random())

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> dict[str, Any]:
        """One request to the control. Raises its refusal, or NODE_LOST where there is no answer to read."""
        shown = self._credentials
        headers = {**shown.headers, "Content-Type": "application/json"}
        data = json.dumps(body, separators=(",", ":")).encode() if body is not None else None
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method,
                    self.url + path,
                    data=data,
                    headers=headers,
                    ssl=shown.context or True,
                    server_hostname=shown.server_name,
                    allow_redirects=False,
                ) as response,
            ):
                answer = await _whole(response)
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why, hint = why_unreachable(error, "--join")
            raise LlorchError(Code.NODE_LOST, f"the control can't be reached: {why}", hint=hint) from None
        try:
            value = decode_json(answer)
        except LlorchError:
            value = None
        if status >= 400:
            wire = value.get("error") if isinstance(value, dict) else None
            if isinstance(wire, dict) or status in _BY_STATUS:
                raise LlorchError.from_wire(wire, fallback=_BY_STATUS.get(status, Code.NODE_LOST))
        if not isinstance(value, dict) or status >= 400:
            raise LlorchError(
                Code.NODE_LOST, f"what answered with HTTP {status} is no control", hint="check the URL in --join"
            )
        return value


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise LlorchError(Code.NODE_LOST, "the control's answer is too large")
        parts.append(part)
    return b"".join(parts)


_BY_STATUS = {401: Code.UNAUTHENTICATED, 403: Code.FORBIDDEN}
