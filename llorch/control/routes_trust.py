"""Trust over HTTP: the authority's certificates, a node's certificate, and tokens. Each handler parses, calls, replies.

What any of it means is `access`'s, and `llorch.tokens`'s. A token's text is in one answer, to whoever made it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiohttp import web

from llorch.auth import Scope
from llorch.control import on_record
from llorch.control.state import CONTROL
from llorch.errors import Code, LlorchError, invalid
from llorch.logs import Log
from llorch.messages import CertificateRequest, NewToken
from llorch.tokens import Kind, Record, Wish, parse_scopes
from llorch.web import PRINCIPAL, Route, json_response, read_model

MAX_JOIN_LIFE_S = 30 * 86_400.0  # a way into the cluster that lies about for longer is one too many

log = Log("control.trust")


async def authorities(request: web.Request) -> web.StreamResponse:
    """The bundle, for whoever knows a hash that one of it must have."""
    authority = request.app[CONTROL].access.authority
    if authority is None:
        raise LlorchError(Code.NOT_FOUND, "this control serves without TLS, and so has no authority")
    return web.Response(
        body=authority.trust.bundle_pem, headers={"Content-Type": "application/x-pem-file", "Cache-Control": "no-cache"}
    )


async def sign(request: web.Request) -> web.StreamResponse:
    """A node's certificate: the first for a join token, the next for the certificate it has."""
    access, principal = request.app[CONTROL].access, request[PRINCIPAL]
    message = await read_model(request, CertificateRequest)
    csr = message.csr.encode()
    access.may_issue(principal, message.node_id, csr)
    await on_record.certificate_signed(request, message.node_id)
    try:
        chain = await asyncio.to_thread(access.issue, principal, csr, message.node_id)
    except LlorchError as error:
        on_record.certificate_refused(request, message.node_id, error)
        raise
    assert access.authority is not None
    log.info("certificate.issued", node_id=message.node_id, by=principal.name, peer=request.remote)
    return json_response(
        {"certificate": chain.decode("ascii"), "authorities": access.authority.trust.bundle_pem.decode("ascii")}
    )


async def list_tokens(request: web.Request) -> web.StreamResponse:
    files = request.app[CONTROL].access.files
    now = time.time()
    return json_response({"tokens": [token_view(record, files.last_used, now) for record in files.tokens.records]})


async def new_token(request: web.Request) -> web.StreamResponse:
    access = request.app[CONTROL].access
    wish = wish_of(await read_model(request, NewToken))
    await on_record.token_made(request, wish.kind.value, wish.name)
    record, text = await asyncio.to_thread(access.new_token, wish)
    log.info("token.made", token_id=record.id, kind=record.kind, name=record.name, by=request[PRINCIPAL].name)
    return json_response({**token_view(record, {}, time.time()), "token": text}, status=201)


async def revoke_token(request: web.Request) -> web.StreamResponse:
    """Idempotent: one that was revoked stays so."""
    access, which = request.app[CONTROL].access, request.match_info["token"]
    await on_record.tokens_revoked(request, access.to_be_revoked(which))
    revoked = access.revoke_token(which)
    for record in revoked:
        log.info("token.revoked", token_id=record.id, name=record.name, by=request[PRINCIPAL].name)
    return json_response({"revoked": [record.id for record in revoked]})


def wish_of(message: NewToken) -> Wish:
    """What a request for a token asks for. Raises INVALID_REQUEST that names the field."""
    if message.name == "":
        raise invalid("`name` is 1 to 64 of letters, digits, . _ -", param="name")
    kind = Kind.JOIN if message.join else Kind.CLIENT
    wish = Wish(
        kind=kind,
        name=message.name or "",
        scopes=parse_scopes(message.scopes) if message.scopes is not None else Wish().scopes,
        life_s=message.expires_s if message.expires_s is not None else (3_600.0 if message.join else None),
        models=frozenset(message.models) if message.models is not None else None,
        uses=(message.uses or 1) if message.join else None,
        node_id=message.node_id if message.join else None,
    )
    wish.check()
    if kind is Kind.JOIN and (wish.life_s or 0.0) > MAX_JOIN_LIFE_S:
        raise invalid("a join token lives for 30 days at most", param="expires_s")
    return wish


def token_view(record: Record, last_used: dict[str, float], now: float) -> dict[str, Any]:
    """What may be known of a token: everything but what it is."""
    return {
        "id": record.id,
        "kind": record.kind.value,
        "name": record.name,
        "fingerprint": record.fingerprint,
        "scopes": sorted(scope.value for scope in record.scopes),
        "models": None if record.models is None else sorted(record.models),
        "node_id": record.node_id,
        "uses_left": record.uses_left,
        "state": record.ended(now) or "valid",
        "age_s": round(now - record.created),
        "expires_in_s": None if record.expires is None else round(record.expires - now),
        "last_used_s": round(now - last_used[record.id]) if record.id in last_used else None,
    }


ROUTES = (
    Route("GET", "/cacerts", Scope.OPEN, authorities, "The cluster's authority, PEM", returns="application/x-pem-file"),
    Route("POST", "/v2/nodes/csr", Scope.JOIN, sign, "A node's certificate", CertificateRequest, also=(Scope.NODE,)),
    Route("GET", "/v2/tokens", Scope.ADMIN, list_tokens, "Every token: name, fingerprint, age, last used"),
    Route("POST", "/v2/tokens", Scope.ADMIN, new_token, "A new token; its text is shown once", NewToken, status=201),
    Route("DELETE", "/v2/tokens/{token}", Scope.ADMIN, revoke_token, "Revoke by id or name; idempotent"),
)
