"""What a control puts on record, in which words, and what it does not do unless that is on disk.

Owns the events of the control's audit log and their fields, so that whoever searches it finds one word for one thing.
Never says more of a request than who made it, from where, and what it asked for: no header, no body, no query.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from llorch import __version__
from llorch.audit import Audit, AuditLog, Unaudited
from llorch.audit_chain import Value
from llorch.auth import ANONYMOUS, MIN_TOKEN_CHARS, Principal, Scope, fingerprint, masked, presented_token
from llorch.control.metrics import ControlMetrics
from llorch.control.refusals import WINDOW_S, Refusals
from llorch.control.state import CONTROL, Control
from llorch.control.tasks import Task
from llorch.errors import Code, LlorchError
from llorch.settings import ControlSettings
from llorch.tokens import Record
from llorch.web import PRINCIPAL, REQUEST_ID
from llorch.wishes import DrainWish, PoolWish

ALLOWED, REFUSED = "allowed", "refused"
LOCAL = "local"  # whoever may write the data directory


def audit_log(settings: ControlSettings, metrics: ControlMetrics) -> Audit:
    """The audit log of a control, not started. Of `llorch dev` there is none: it leaves nothing behind."""
    if settings.dev:
        return Unaudited()
    return AuditLog(settings.data_dir, keep_files=settings.audit_files, unwritten=metrics.unaudited)


def _who(principal: Principal) -> dict[str, Value]:
    return {"principal": principal.name, "fingerprint": principal.fingerprint or None}


def _by(request: web.Request) -> dict[str, Value]:
    return _who(request[PRINCIPAL]) | {"peer": request.remote, "request_id": request[REQUEST_ID]}


def started(audit: Audit, *, host: str, port: int, tls: str) -> None:
    """`tls`: "on", "off" on loopback, or "off-mesh" where somebody chose to do without."""
    audit.record("control.start", version=__version__, bind=f"{host}:{port}", tls=tls)


def stopped(audit: Audit) -> None:
    audit.record("control.stop", version=__version__)


# ---------------------------------------------------------------- who was not let in


class Doorkeeper:
    """Puts refused credentials on record: one by one while they are few, and then how many there were."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._refusals = Refusals()

    def denied(self, request: web.Request, code: Code, wanted: Sequence[Scope]) -> None:
        if self._refusals.refused(request.remote):
            self._audit.record(
                "auth.failed",
                **self._whoever(request),
                scope=" or ".join(scope.value for scope in wanted),
                peer=request.remote,
                request_id=request[REQUEST_ID],
                decision=REFUSED,
                reason=code.value,
                method=request.method,
                path=masked(request.path),
            )

    def _whoever(self, request: web.Request) -> dict[str, Value]:
        """Of a token that is not valid the fingerprint, for it may have been; of what can't be one of ours, none."""
        token = presented_token(request.headers)
        if request[PRINCIPAL] is not ANONYMOUS or token is None or len(token) < MIN_TOKEN_CHARS:
            return _who(request[PRINCIPAL])
        return {"principal": ANONYMOUS.name, "fingerprint": fingerprint(token)}

    def refused_tls(self, peer: str, why: str) -> None:
        """A handshake that failed: nobody came as far as a request."""
        if self._refusals.refused(peer):
            self._audit.record("auth.failed", peer=peer, decision=REFUSED, reason=why, kind="tls")

    def sum_up(self) -> None:
        for peer, count in self._refusals.sums().items():
            self._audit.record("auth.failed", peer=peer, decision=REFUSED, reason="more of the same", count=count)

    async def step(self) -> float:
        self.sum_up()
        return WINDOW_S


# ---------------------------------------------------------------- tasks


def task_accepted(audit: Audit, principal: Principal, peer: str | None, task: Task) -> None:
    """It is known here from now on, and will be run for its principal, or read where it was run before."""
    audit.record(
        "task.repeated" if task.replayed else "task.accepted",
        principal=principal.name,
        fingerprint=principal.fingerprint or None,
        peer=peer,
        request_id=task.request_id,
        scope=Scope.SUBMIT.value,
        task_id=task.task_id,
        decision=ALLOWED,
        path=task.path,
        model=task.wish.model,
        detach=task.detach,
    )


async def task_canceled(request: web.Request, task_id: str, owner: str | None) -> None:
    """By its owner, or by an admin: then only if that is on disk."""
    audit, own = request.app[CONTROL].audit, request[PRINCIPAL].name == owner
    scope = Scope.SUBMIT if own else Scope.ADMIN
    fields = _by(request) | {"scope": scope.value, "task_id": task_id, "owner": owner, "decision": ALLOWED}
    if own:
        audit.record("task.canceled", **fields)
    else:
        await audit.require("task.canceled", **fields)


def task_hidden(control: Control, principal: Principal, task_id: str, owner: str) -> None:
    """Somebody asked for another's task, and was told that there is none."""
    control.audit.record(
        "task.hidden", **_who(principal), task_id=task_id, owner=owner, decision=REFUSED, reason=Code.TASK_NOT_FOUND
    )


# ---------------------------------------------------------------- nodes


async def node_joins(request: web.Request, node_id: str) -> None:
    """A machine that was never here may come in only if that is on disk; one that was may always come back."""
    control = request.app[CONTROL]
    if node_id in control.registry.nodes or node_id in (control.roster.saved or ()):
        return
    await control.audit.require(
        "node.joined", **_by(request), scope=Scope.NODE.value, node_id=node_id, decision=ALLOWED
    )


def node_registered(request: web.Request, node_id: str, refusal: LlorchError | None = None) -> None:
    fields = _by(request) | {"scope": Scope.NODE.value, "node_id": node_id}
    if refusal is None:
        request.app[CONTROL].audit.record("node.registered", **fields, decision=ALLOWED)
    else:
        request.app[CONTROL].audit.record("node.refused", **fields, decision=REFUSED, reason=refusal.code.value)


async def node_deregisters(request: web.Request, node_id: str) -> None:
    """By itself, or by an admin: then only if that is on disk."""
    audit, admin = request.app[CONTROL].audit, request[PRINCIPAL].may(Scope.ADMIN)
    scope = Scope.ADMIN if admin else Scope.NODE
    fields = _by(request) | {"scope": scope.value, "node_id": node_id, "decision": ALLOWED}
    if admin:
        await audit.require("node.deregistered", **fields)
    else:
        audit.record("node.deregistered", **fields)


def link_up(request: web.Request, node_id: str) -> None:
    request.app[CONTROL].audit.record(
        "link.up", **_by(request), scope=Scope.NODE.value, node_id=node_id, decision=ALLOWED
    )


def link_lost(control: Control, node_id: str, reason: str) -> None:
    control.audit.record("link.lost", node_id=node_id, reason=reason)


def node_expired(control: Control, node_id: str) -> None:
    control.audit.record("node.expired", node_id=node_id)


# ---------------------------------------------------------------- operations on nodes and pools


async def node_operation(request: web.Request, node_id: str, kind: str, wish: DrainWish) -> None:
    """By an admin, and only if that is on disk. `why` is what was given as a reason."""
    await request.app[CONTROL].audit.require(
        "node.operation", **_by_admin(request, node_id, None, kind), **_wished(wish), decision=ALLOWED
    )


async def pool_operation(request: web.Request, node_id: str, pool_id: str, kind: str, wish: PoolWish) -> None:
    named = None if wish.model is None else without_secrets(wish.model)
    await request.app[CONTROL].audit.require(
        "pool.operation", **_by_admin(request, node_id, pool_id, kind), **_wished(wish), model=named, decision=ALLOWED
    )


def operation_refused(request: web.Request, node_id: str, pool_id: str | None, kind: str, error: LlorchError) -> None:
    """It was to be done, and then the node did not take it, or could not be asked."""
    request.app[CONTROL].audit.record(
        "node.operation_refused" if pool_id is None else "pool.operation_refused",
        **_by_admin(request, node_id, pool_id, kind),
        decision=REFUSED,
        reason=error.code.value,
    )


def logs_read(request: web.Request, node_id: str, pool_id: str, *, follow: bool) -> None:
    """What an engine writes may quote what it was asked."""
    request.app[CONTROL].audit.record(
        "pool.logs", **_by_admin(request, node_id, pool_id, "follow" if follow else "read"), decision=ALLOWED
    )


def _by_admin(request: web.Request, node_id: str, pool_id: str | None, kind: str) -> dict[str, Value]:
    place = {"node_id": node_id} | ({} if pool_id is None else {"pool_id": pool_id})
    return _by(request) | {"scope": Scope.ADMIN.value, **place, "kind": kind}


def _wished(wish: DrainWish) -> dict[str, Value]:
    deadline_ms = None if wish.deadline_s is None else round(wish.deadline_s * 1_000)
    return {"deadline_ms": deadline_ms, "why": None if wish.reason is None else masked(wish.reason)}


def without_secrets(ref: str) -> str:
    """A model's reference as it may be on record: of a URL no user, no password, no query, and none of our tokens."""
    scheme, separator, rest = ref.partition("://")
    if separator:
        place, slash, path = rest.partition("/")
        path = path.partition("?")[0].partition("#")[0]
        ref = f"{scheme}://{place.rpartition('@')[2].partition('?')[0].partition('#')[0]}{slash}{path}"
    return masked(ref)


# ---------------------------------------------------------------- models


async def models_changed(
    request: web.Request, event: str, *, model: str | None, nodes: str, source: str | None = None
) -> None:
    """By an admin: only if that is on disk. `nodes`: their ids, or "all"; `model`: None is every one."""
    await request.app[CONTROL].audit.require(
        event, **_by(request), scope=Scope.ADMIN.value, model=model, nodes=nodes, source=source, decision=ALLOWED
    )


# ---------------------------------------------------------------- trust


async def certificate_signed(request: web.Request, node_id: str) -> None:
    """A machine becomes a node, or stays one: only if that is on disk."""
    await request.app[CONTROL].audit.require(
        "certificate.issued", **_by(request), scope=Scope.NODE.value, node_id=node_id, decision=ALLOWED
    )


async def token_made(request: web.Request, kind: str, name: str) -> None:
    await request.app[CONTROL].audit.require(
        "token.created", **_by(request), scope=Scope.ADMIN.value, kind=kind, name=name, decision=ALLOWED
    )


def certificate_refused(request: web.Request, node_id: str, error: LlorchError) -> None:
    """It was to be issued, and then was not."""
    request.app[CONTROL].audit.record(
        "certificate.refused",
        **_by(request),
        scope=Scope.NODE.value,
        node_id=node_id,
        decision=REFUSED,
        reason=error.code.value,
    )


async def tokens_revoked(request: web.Request, records: Sequence[Record]) -> None:
    """To take rights away is never refused: where it can't be put on record, that is told and made up for."""
    audit = request.app[CONTROL].audit
    for record in records:
        fields = _by(request) | {"scope": Scope.ADMIN.value, "token_id": record.id, "name": record.name}
        try:
            await audit.require("token.revoked", **fields, decision=ALLOWED)
        except LlorchError:
            audit.record("token.revoked", **fields, decision=ALLOWED)


def seen_on_disk(audit: Audit, event: str, **fields: Value) -> None:
    """Somebody changed tokens or certificates in the data directory, without asking this control."""
    audit.record(event, principal=LOCAL, decision=ALLOWED, reason="changed in the data directory", **fields)
