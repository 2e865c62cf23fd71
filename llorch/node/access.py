"""Who may call this node, what it shows controls, and the certificates of its listener.

With a certificate of the cluster, controls come with theirs and no token crosses the wire. Without one (static mode)
the tokens and certificate files of the settings do that work, by hand. Owns which of the two it is, for each control.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import aiohttp

from llorch import tickets, tls
from llorch.auth import MIN_TOKEN_CHARS, Principal, Scope, TokenRing, parse_tokens
from llorch.config import NodeSettings
from llorch.errors import Code, LlorchError
from llorch.node.credentials import CertificateCredentials, Credentials, TokenCredentials
from llorch.node.peers import Peers
from llorch.quotas import Quotas
from llorch.sessions import Sessions
from llorch.web import Gate

if TYPE_CHECKING:
    from llorch.node.certificate import NodeCertificate

LOOK_EVERY_S = 1.0
_CONTROL_SCOPES = frozenset({Scope.CONTROL, Scope.METRICS})
_NODE_SCOPES = frozenset({Scope.NODE})  # to ask for a model's bytes, with a ticket


class Access:
    """Use `open`. `identities` is None where the listener has no TLS."""

    def __init__(self, settings: NodeSettings, certificate: NodeCertificate | None) -> None:
        self._settings = settings
        self.certificate = certificate
        self.sessions = Sessions()
        self.ring = token_ring(settings)
        self._token = _node_token(settings)
        self._outgoing = tls.client_context(settings.tls_ca)
        self.identities: tls.Identities | None = self._identities()

    @classmethod
    async def open(cls, settings: NodeSettings, node_id: str, session: aiohttp.ClientSession) -> Access:
        """Joins first, where that is to be done. Raises ConfigError."""
        certificate = None
        if any(url.startswith("https:") for url in settings.join):
            from llorch.node.join import member  # 50 ms that a node without certificates need not pay

            certificate = await member(settings, node_id, session)
        return cls(settings, certificate)

    def _identities(self) -> tls.Identities | None:
        settings, own = self._settings, None
        if settings.tls_cert and settings.tls_key:
            own = tls.server_context(settings.tls_cert, settings.tls_key)
        if self.certificate is not None and (own is not None or not settings.bind.loopback):
            return self.certificate.identities(own)
        return tls.Identities(own) if own is not None else None

    def credentials(self, url: str) -> Credentials:
        """What is shown to the control at `url`."""
        if self.certificate is not None and url.startswith("https:"):
            return CertificateCredentials(self.certificate)
        return TokenCredentials(lambda: self._token, self._outgoing)

    def gate(self, refused: Callable[[Code], None], quotas: Quotas | None = None) -> Gate:
        """What stands before every route of this node."""
        return Gate(
            ring=lambda: self.ring,
            refused=refused,
            metrics_open=self._settings.bind.loopback,
            certified=self.certified if self.certificate is not None else None,
            sessions=self.sessions,
            quotas=quotas or Quotas(),
        )

    def certified(self, peer: tls.Peer) -> Principal:
        """Whom a certificate stands for: a node obeys controls, and nobody else. Other nodes may bring a ticket."""
        if time.time() >= peer.ends:
            raise LlorchError(Code.UNAUTHENTICATED, "the certificate has expired")
        node = peer.role is tls.Role.NODE
        return Principal(
            f"{peer.role}:{peer.name}",
            _NODE_SCOPES if node else _CONTROL_SCOPES,
            peer.serial[:8].lower(),
            node_id=peer.name if node else None,
            expires=peer.ends,
        )

    def peers(self) -> Peers:
        """What this node shows to other nodes, and by what it knows their tickets."""
        return Peers(self.certificate, lambda: service_tokens(self._settings), lambda: self._outgoing)

    async def step(self) -> float:
        """What a credential that is no longer good had opened ends. Returns the seconds until the next look."""
        now = time.time()
        self.sessions.end(lambda one: (one.expires is not None and now < one.expires) or self.ring.holds(one, now))
        return LOOK_EVERY_S

    def renewed(self) -> None:
        """The certificate is another: the listener shows it from the next connection on."""
        new = self._identities()
        if new is not None and self.identities is not None:
            self.identities.default, self.identities.named = new.default, new.named

    def settled(self, settings: NodeSettings) -> None:
        """Take over settings that were read anew. Raises ConfigError, and changes nothing."""
        before, self._settings = self._settings, settings
        try:
            outgoing: ssl.SSLContext = tls.client_context(settings.tls_ca)
            new = self._identities()
        except BaseException:
            self._settings = before
            raise
        self._outgoing, self.ring, self._token = outgoing, token_ring(settings), _node_token(settings)
        if new is not None and self.identities is not None:
            self.identities.default, self.identities.named = new.default, new.named


def token_ring(settings: NodeSettings) -> TokenRing:
    """The controls that may call this node with a token; and nodes, for models, with what follows from it."""
    pairs = parse_tokens(settings.service_token or "", min_chars=1 if settings.dev else MIN_TOKEN_CHARS)
    knocks = [("node", tickets.knock_of(token), _NODE_SCOPES) for _, token in pairs]
    return TokenRing([*knocks, *((name, token, _CONTROL_SCOPES) for name, token in pairs)])


def service_tokens(settings: NodeSettings) -> list[str]:
    return [token for _, token in parse_tokens(settings.service_token or "", min_chars=1)]


def _node_token(settings: NodeSettings) -> str:
    """The first of the node tokens is presented, all are accepted."""
    pairs = parse_tokens(settings.node_token or settings.service_token or "", min_chars=1)
    return pairs[0][1] if pairs else ""
