"""How a node becomes a member: a certificate for a join token, and later the next one for the one it has.

    /cacerts, not believed ─▶ one of them has the SHA-256 in the token? ─▶ verified TLS ─▶ the token ─▶ a certificate

Owns that order: the secret leaves this machine only on a connection to a holder of that authority. Bounded in time and
bytes; never quotes what a peer sent.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from llorch import pki, tls
from llorch.backoff import Backoff
from llorch.config import NodeSettings
from llorch.errors import Code, ConfigError, LlorchError
from llorch.logs import Log
from llorch.messages import decode_json
from llorch.node.certificate import Holding, NodeCertificate
from llorch.reach import why_unreachable
from llorch.tokens import read_join_token

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 256 * 1024
RETRY = Backoff(first_s=1.0, most_s=15.0)
RENEW_RETRY = Backoff(first_s=5.0, most_s=600.0)
AGAIN_AFTER_S = 1.0  # between two renewals, whatever controls say
_USED = "a join token is good for an hour, and once, unless it was made for more: `llorch token join` makes another"
_IN_VAIN = frozenset({Code.UNAUTHENTICATED, Code.FORBIDDEN, Code.NODE_ID_CONFLICT, Code.INVALID_REQUEST})

log = Log("node.join")


class WrongAuthority(ConfigError):
    """What answers is not the cluster that the token is for. The token has not been sent."""


async def member(settings: NodeSettings, node_id: str, session: aiohttp.ClientSession) -> NodeCertificate | None:
    """This node's certificate, with which it is a member of its cluster; None where it shows tokens of the settings.

    A join token that it has not used yet makes it join anew. Raises ConfigError where it can be no member.
    """
    urls = [url for url in settings.join if url.startswith("https:")]
    if not urls:
        return None
    certificate = await asyncio.to_thread(NodeCertificate.load, settings.data_dir, node_id)
    token = settings.join_token
    if token is not None and (certificate is None or not certificate.came_with(token)):
        return await join(session, urls, token, node_id, settings.data_dir)
    if certificate is not None and not certificate.expired(time.time()):
        return certificate
    if settings.service_token is not None:
        return None
    why = "has no certificate yet" if certificate is None else "was away for so long that its certificate has expired"
    raise ConfigError(
        f"{node_id} {why}, and there is no join token",
        hint=f"`llorch token join --node {node_id}` on the control prints the command that starts this node",
    )


async def join(
    session: aiohttp.ClientSession, urls: Sequence[str], token: str, node_id: str, data_dir: str | Path
) -> NodeCertificate:
    """This node's first certificate, from the first control that gives one; asks until one does.

    Raises ConfigError where asking again would be in vain: another cluster answers, or the token is no good (any more).
    """
    digest, key = read_join_token(token), pki.make_key()  # one key: an answer that was lost is asked for again with it
    failures = 0
    while True:
        in_vain: list[ConfigError] = []
        for url in urls:
            try:
                holding = await _first(session, url.rstrip("/"), digest, token, key, node_id)
            except WrongAuthority as error:
                in_vain.append(error)
            except LlorchError as error:
                if error.code in _IN_VAIN:
                    hint = _USED if error.code is Code.UNAUTHENTICATED else error.hint
                    in_vain.append(ConfigError(f"{url} does not let {node_id} join: {error.message}", hint=hint))
                    continue
                failures += 1
                tell = log.warning if failures in (1, 10) or failures % 100 == 0 else log.debug
                tell("join.failed", node_id=node_id, url=url, reason=error.message, hint=error.hint)
            else:
                certificate = await asyncio.to_thread(NodeCertificate.take, data_dir, node_id, holding, token)
                left_s = round(certificate.ends - time.time())
                log.info("node.joined", node_id=node_id, url=url, expires_s=left_s)
                return certificate
        if len(in_vain) == len(urls):  # another control may know the token, or be the right one
            raise in_vain[0]
        await asyncio.sleep(RETRY.delay_s(failures, random.random()))


async def _first(
    session: aiohttp.ClientSession, url: str, digest: bytes, token: str, key: pki.Key, node_id: str
) -> Holding:
    anybody = tls.cluster_client_context(b"", check=False)
    status, answer = await _ask(session, "GET", f"{url}/cacerts", anybody, tls.JOIN_NAME)
    authority = None
    if status == 200:
        try:
            authority = pki.matching(pki.read_certs(answer), digest)
        except ValueError:
            authority = None
    if authority is None:
        raise WrongAuthority(
            f"{url} is not the cluster that the join token is for; the token was not sent",
            hint="check the URL; `llorch token join` on that cluster's control prints both",
        )
    trusting = tls.cluster_client_context(pki.pem_of([authority]))
    return await _certificate(session, url, trusting, tls.JOIN_NAME, {"Authorization": f"Bearer {token}"}, key, node_id)


async def _certificate(
    session: aiohttp.ClientSession,
    url: str,
    context: ssl.SSLContext,
    server_name: str,
    headers: Mapping[str, str],
    key: pki.Key,
    node_id: str,
) -> Holding:
    """A certificate for `key`, which does not leave this machine."""
    body = {"node_id": node_id, "csr": pki.make_request(key, node_id).decode("ascii")}
    status, answer = await _ask(session, "POST", f"{url}/v2/nodes/csr", context, server_name, headers, body)
    try:
        value = decode_json(answer)
    except LlorchError:
        value = None
    if status != 200 or not isinstance(value, dict):
        wire = value.get("error") if isinstance(value, dict) else None
        raise LlorchError.from_wire(wire, fallback=Code.NODE_LOST)
    try:
        chain, authorities = (str(value[name]).encode() for name in ("certificate", "authorities"))
        return Holding.of(key, chain, authorities, node_id)
    except (KeyError, ValueError, IndexError):
        raise LlorchError(Code.NODE_LOST, "the control's certificate can't be read") from None


async def _ask(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    context: ssl.SSLContext,
    server_name: str,
    headers: Mapping[str, str] | None = None,
    body: Mapping[str, Any] | None = None,
) -> tuple[int, bytes]:
    """(status, body) of an answer. Raises NODE_LOST where there is none to read."""
    data = None if body is None else json.dumps(body).encode()
    sent = {**(headers or {}), **({} if data is None else {"Content-Type": "application/json"})}
    try:
        async with (
            asyncio.timeout(TIMEOUT_S),
            session.request(
                method, url, data=data, headers=sent, ssl=context, server_hostname=server_name, allow_redirects=False
            ) as response,
        ):
            parts, size = [], 0
            async for part in response.content.iter_any():
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise LlorchError(Code.NODE_LOST, "the control's answer is too large")
                parts.append(part)
            return response.status, b"".join(parts)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        why, hint = why_unreachable(error, "--join")
        raise LlorchError(Code.NODE_LOST, f"the control can't be reached: {why}", hint=hint) from None


class Renewal:
    """Keeps one node's certificate in force. `renewed` hears of each new one."""

    def __init__(
        self,
        certificate: NodeCertificate,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        renewed: Callable[[], None],
    ) -> None:
        self._certificate = certificate
        self._renewed = renewed
        self._session = session
        self._urls = [url.rstrip("/") for url in urls]
        self._failures = 0
        self._random = random.random()

    async def run(self) -> None:
        certificate = self._certificate
        while True:
            due_s = certificate.renew_at(self._random) - time.time()
            if self._failures:
                due_s = max(0.0, RENEW_RETRY.delay_s(self._failures, random.random()))
            try:
                async with asyncio.timeout(max(0.0, due_s)):
                    await certificate.wanted.wait()
            except TimeoutError:
                pass
            certificate.wanted.clear()
            await self._renew()
            await asyncio.sleep(AGAIN_AFTER_S)

    async def _renew(self) -> None:
        certificate = self._certificate
        why: LlorchError | None = None
        for url in self._urls:
            try:
                holding = await _certificate(
                    self._session, url, certificate.outgoing, tls.CONTROL_NAME, {}, pki.make_key(), certificate.node_id
                )
                await asyncio.to_thread(certificate.replace, holding)
            except LlorchError as error:
                why = error
                continue
            self._failures, self._random = 0, random.random()
            self._renewed()
            log.info(
                "certificate.renewed",
                node_id=certificate.node_id,
                url=url,
                expires_s=round(certificate.ends - time.time()),
            )
            return
        self._failures += 1
        left_s = certificate.ends - time.time()
        tell = log.error if left_s < 86_400 else log.warning
        reason, hint = (why.message, why.hint) if why is not None else ("there is no control to ask", None)
        tell("certificate.unrenewed", node_id=certificate.node_id, reason=reason, hint=hint, expires_s=round(left_s))
