"""Who may come in at a control, and who it is to them.

Owns the ring of tokens (those of the settings and those of the data directory), the principals that certificates stand
for, the certificates that its listener shows, and the look for changes of all of these: a change is read whole, then
swapped, and what a revoked credential had opened is ended. Static mode is the same without an authority.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from llorch import private, tls
from llorch.auth import ADMIN_SCOPES, CLIENT_SCOPES, MIN_TOKEN_CHARS, Principal, Scope, TokenRing, parse_tokens
from llorch.config import ControlSettings
from llorch.control.nodes import Node
from llorch.control.own_names import names_here
from llorch.control.token_files import TokenFiles, principals
from llorch.errors import Code, ConfigError, LlorchError
from llorch.logs import Log
from llorch.quotas import Quotas
from llorch.sessions import REVOKED, Sessions
from llorch.tokens import Kind, Record, Wish, is_whole
from llorch.web import Gate

if TYPE_CHECKING:
    from llorch.control.authority import Authority, Trust

LOOK_EVERY_S = 1.0  # a revocation has to be in force within 5 s
SAVE_USE_EVERY_S = 60.0
PAIR_LIFE_S = 30 * 86_400.0  # of our certificate: its key never leaves the process, and every start makes another

log = Log("control.access")


class Access:
    """Use `open`. `ring` and `identities` are what is in force now; `step` keeps them so."""

    def __init__(self, settings: ControlSettings, authority: Authority | None, files: TokenFiles) -> None:
        self.settings = settings
        self.authority = authority
        self.files = files
        self.sessions = Sessions()
        self.ring = TokenRing()
        self.identities: tls.Identities | None = None
        self.pair: tuple[bytes, bytes] | None = None  # our certificate within the cluster, and its key
        self.outgoing: ssl.SSLContext | None = None  # for calls to nodes that have certificates
        self._pair_made = 0.0
        self._shown_until: float | None = None
        self._shown: dict[str, tls.Peer] = {}  # certificates that nodes have shown and that are not confirmed yet
        self._tls_stamps: tuple[object, ...] = ()
        self._use_saved = time.monotonic()
        self._failed: dict[str, str] = {}
        self._tokens_in_force = files.tokens
        self._trust_in_force: Trust | None = None
        self.noted: Callable[[str, dict[str, str | int]], None] = lambda _event, _fields: None  # changes found on disk

    @classmethod
    def open(cls, settings: ControlSettings) -> Access:
        """Blocking. Makes the authority at the first start. Raises ConfigError."""
        authority = None
        if settings.tls_cert and settings.tls_key:
            tls.server_context(settings.tls_cert, settings.tls_key)  # before anything is made
        if serves_tls(settings):
            from llorch.control.authority import Authority  # 50 ms that a control without certificates need not pay

            authority, made = Authority.open(settings.data_dir, settings.ca_passphrase, time.time())
            if made:
                log.info("authority.made", path=Path(settings.data_dir) / "pki")
        access = cls(settings, authority, TokenFiles(settings.data_dir))
        if not settings.dev:
            access.files.load()
            access.files.load_use()
        access._tokens_in_force = access.files.tokens
        access._make_ring()
        access._make_identities()
        if authority is not None:
            access._trust_in_force = authority.trust
        return access

    # ------------------------------------------------------------ who comes in

    def gate(
        self,
        refused: Callable[[Code], None],
        denied: Callable[[web.Request, Code, Sequence[Scope]], None] = lambda _request, _code, _wanted: None,
        quotas: Quotas | None = None,
    ) -> Gate:
        """What stands before every route of this control."""
        return Gate(
            denied=denied,
            ring=lambda: self.ring,
            refused=refused,
            metrics_open=self.settings.bind.loopback,
            look_again=self.look_again,
            certified=self.certified if self.authority is not None else None,
            identified=self.identified,
            sessions=self.sessions,
            quotas=quotas or Quotas(),
        )

    @property
    def admits_clients(self) -> bool:
        return any(principal.may(Scope.SUBMIT) for principal in self.ring)

    def _make_ring(self) -> None:
        now = time.time()
        self.ring = TokenRing(static_tokens(self.settings), principals(self.files.tokens, now))

    def certified(self, peer: tls.Peer) -> Principal:
        """Whom a certificate stands for. Raises UNAUTHENTICATED for one that is no good any more."""
        assert self.authority is not None
        if peer.role is not tls.Role.NODE:
            return Principal(f"{peer.role}:{peer.name}", frozenset(), peer.serial[:8])
        principal = Principal(
            name=f"node:{peer.name}",
            scopes=frozenset({Scope.NODE}),
            fingerprint=peer.serial[:8].lower(),
            node_id=peer.name,
            joined=peer.joined,
            issuer=peer.issuer,
            expires=peer.ends,
        )
        refusal = self._refusal(principal, time.time())
        held = self.authority.trust.issued.get(peer.name)
        if refusal is None and (held is None or held.serial != peer.serial or not held.confirmed):
            self._shown[peer.name] = peer
        if refusal is not None:
            raise LlorchError(
                Code.UNAUTHENTICATED, refusal, hint="`llorch token join` on the control makes it a member again"
            )
        return principal

    def _refusal(self, principal: Principal, now: float) -> str | None:
        assert self.authority is not None
        return _refused(principal, now, self.authority.trust)

    def _still_good(self, principal: Principal) -> bool:
        now = time.time()
        if principal.joined is not None:
            return self._refusal(principal, now) is None
        return self.ring.holds(principal, now)

    def look_again(self, token: str) -> bool:
        """A token that llorch may have made, and the ring does not hold: it may be a second old."""
        if token.startswith(("llt1_", "llj1_")) and is_whole(token):
            before = self.ring
            self._try("tokens", self._look_at_tokens)
            return self.ring is not before
        return False

    def identified(self, principal: Principal) -> None:
        """A credential was presented just now."""
        if principal.token_id is not None:
            self.files.last_used[principal.token_id] = time.time()

    def told(self) -> dict[str, str]:
        """What nodes are told of the authorities with every answer, so that they notice when others are trusted."""
        return {} if self.authority is None else {"authorities": self.authority.trust.bundle_id}

    def told_to_node(self, principal: Principal) -> dict[str, str]:
        """The same, and to a node that has shown a certificate the key of the cluster's tickets: another one after the
        authority was rotated."""
        if self.authority is None or principal.joined is None:
            return self.told()
        return {**self.told(), "ticket_key": self.authority.trust.ticket_key}

    # ------------------------------------------------------------ tokens

    def new_token(self, wish: Wish) -> tuple[Record, str]:
        """Raises INVALID_REQUEST, or CONFLICT where there is no authority that a machine could join."""
        pin = None
        if wish.kind is Kind.JOIN:
            if self.authority is None:
                raise LlorchError(
                    Code.CONFLICT, "this control serves without TLS, so no other machine can join it",
                    hint="start it with --bind 0.0.0.0:8080",
                )  # fmt: skip
            pin = self.authority.trust.digest
        record, text = self.files.new(wish, time.time(), pin)
        self._make_ring()
        return record, text

    def revoke_token(self, which: str) -> list[Record]:
        """In force at once, here; within a second at controls on the same directory. For the loop's own thread: what is
        being served is ended here. `to_be_revoked` says beforehand which those are.
        """
        revoked = self.files.revoke(which, time.time())
        self._make_ring()
        self._end_sessions()
        return revoked

    def to_be_revoked(self, which: str) -> list[Record]:
        """Raises NOT_FOUND if there is none."""
        return self.files.tokens.revoke(which, time.time())[1]

    def may_issue(self, principal: Principal, node_id: str, csr: bytes) -> None:
        """Raises what `issue` would, as far as that can be told before: nothing is put on record for it.

        FORBIDDEN for another's id or a credential that gives no certificate, CONFLICT without an authority.
        """
        if self.authority is None:
            raise LlorchError(Code.CONFLICT, "this control has no authority: it serves without TLS")
        if principal.node_id is not None and principal.node_id != node_id:
            raise LlorchError(Code.FORBIDDEN, "this credential is for another node", param="node_id")
        if principal.joined is None and Scope.JOIN not in principal.scopes:
            raise LlorchError(
                Code.FORBIDDEN,
                "a shared node token gives no certificate",
                hint="`llorch token join` makes one that does",
            )
        if principal.joined is not None or self.authority.is_repeated(csr, node_id, principal.token_id or ""):
            return
        record = next((one for one in self.files.tokens.records if one.id == principal.token_id), None)
        if record is None or record.ended(time.time()) is not None:
            raise LlorchError(Code.UNAUTHENTICATED, "no valid token was presented")
        self.authority.check_free(node_id, time.time(), take_over=principal.node_id == node_id)

    def issue(self, principal: Principal, csr: bytes, node_id: str) -> bytes:
        """A node's certificate with its chain (PEM): its first, for a join token, or the next one of its own.

        Raises FORBIDDEN for another's id, UNAUTHENTICATED for a token that is used up, NODE_ID_CONFLICT.
        """
        assert self.authority is not None
        now, life_s = time.time(), self.settings.node_cert_life
        if principal.joined is not None:
            return self.authority.issue_node(csr, node_id, now, life_s, renews=principal)
        token_id, used = principal.token_id or "", []

        def use() -> None:  # first, so that of many at once no more get one than it has uses
            self.files.use(token_id, now)
            used.append(token_id)

        take_over = principal.node_id == node_id
        try:
            return self.authority.issue_node(csr, node_id, now, life_s, take_over=take_over, token=token_id, use=use)
        except LlorchError:
            for one in used:
                self.files.give_back(one)
            raise
        finally:
            self._make_ring()

    def to_node(self, node: Node | None) -> ssl.SSLContext | None:
        """What to call a node with; None for one that has no certificate: it is shown the service token."""
        return self.outgoing if node is not None and node.certified else None

    def service_token(self) -> str:
        """What is presented to nodes that have no certificate: the first of the service tokens."""
        tokens = parse_tokens(self.settings.service_token or "", min_chars=1)
        return tokens[0][1] if tokens else ""

    # ------------------------------------------------------------ for metrics

    def ages_s(self) -> dict[str, float]:
        """The age of the newest token of each name, by name."""
        now = time.time()
        valid = [one for one in self.files.tokens.records if one.kind is Kind.CLIENT and one.ended(now) is None]
        return {record.name: now - record.created for record in valid}

    def expiries_s(self) -> dict[str, float]:
        """How long each certificate of this control is still good, by what it is for."""
        now, found = time.time(), {}
        if self.authority is not None:
            found = {"authority": self.authority.trust.ends - now, "control": self._pair_made + PAIR_LIFE_S - now}
        if self._shown_until is not None:
            found["tls-cert"] = self._shown_until - now
        return found

    # ------------------------------------------------------------ who we are

    def _make_identities(self) -> None:
        """The certificates of the files and of the authority as they are now. Raises ConfigError, changes nothing."""
        settings, authority, now = self.settings, self.authority, time.time()
        if authority is None:
            return
        pair = self.pair
        if pair is None or now - self._pair_made > PAIR_LIFE_S / 3:
            pair = authority.control_pair(socket.gethostname()[:63], names_here(settings), now, PAIR_LIFE_S)
            self._pair_made = now
        bundle = authority.trust.bundle_pem
        own = tls.cluster_server_context(*pair)
        mutual = tls.mutual_server_context(*pair, bundle)
        stamps = self._stamps()
        shown = own
        if settings.tls_cert and settings.tls_key:
            shown = tls.server_context(settings.tls_cert, settings.tls_key)
            self._shown_until = authority.read_expiry(Path(settings.tls_cert))
        named = {tls.CONTROL_NAME: mutual, tls.JOIN_NAME: own}
        if self.identities is None:
            self.identities = tls.Identities(shown, named)
        else:
            self.identities.default, self.identities.named = shown, named
        self.outgoing = tls.cluster_client_context(bundle, pair)
        self.pair, self._tls_stamps = pair, stamps

    def _stamps(self) -> tuple[object, ...]:
        files = (self.settings.tls_cert, self.settings.tls_key)
        return tuple(private.stamp(Path(path)) for path in files if path)

    # ------------------------------------------------------------ changes

    async def step(self) -> float:
        """Look whether something has changed, and put it in force. What can't be read stays as it was, and is told."""
        self._try("tokens", self._look_at_tokens)
        self._try("authority", self._look_at_authority)
        if self._shown and self.authority is not None:
            shown, self._shown = self._shown, {}
            try:
                await asyncio.to_thread(self.authority.saw, self.authority.seen(shown.values(), time.time()))
            except LlorchError as error:
                log.warning("certificates.unconfirmed", reason=error.message)
        self._try("certificate", self._look_at_certificate)
        self._end_sessions()
        if time.monotonic() - self._use_saved >= SAVE_USE_EVERY_S and not self.settings.dev:
            self._use_saved = time.monotonic()
            await asyncio.to_thread(self.files.save_use)
        return LOOK_EVERY_S

    def _end_sessions(self) -> None:
        for principal in self.sessions.end(self._still_good):
            log.warning("session.ended", principal=principal.name, fingerprint=principal.fingerprint, why=REVOKED)

    def _try(self, what: str, look: Callable[[], None]) -> None:
        try:
            look()
        except ConfigError as error:
            if self._failed.get(what) != error.message:
                log.error("access.unchanged", what=what, why=error.message, hint=error.hint)
            self._failed[what] = error.message
        else:
            self._failed.pop(what, None)

    def _look_at_tokens(self) -> None:
        if self.settings.dev:
            return
        self.files.load()
        if self.files.tokens is not self._tokens_in_force:
            self._note_tokens()
            self._make_ring()

    def _note_tokens(self) -> None:
        """Say what others have done to the tokens; what was done through this control is on record already."""
        known = {one.id: one for one in self._tokens_in_force.records}
        own, self.files.own = self.files.own, set()
        for one in self.files.tokens.records:
            if one.id in own:
                continue
            if one.id not in known:
                self.noted("token.created", {"token_id": one.id, "name": one.name, "kind": one.kind.value})
            elif one.revoked is not None and known[one.id].revoked is None:
                self.noted("token.revoked", {"token_id": one.id, "name": one.name, "kind": one.kind.value})
        self._tokens_in_force = self.files.tokens
        log.info("tokens.reloaded", tokens=len(self.files.tokens.records))

    def _look_at_authority(self) -> None:
        """Compared with what is in force: a node's renewal may have read the files meanwhile."""
        if self.authority is None:
            return
        from llorch.control.authority import BY_HAND

        self.authority.refresh()
        trust, before = self.authority.trust, self._trust_in_force
        if trust is before:
            if time.time() - self._pair_made > PAIR_LIFE_S / 3:
                self._make_identities()
            return
        assert before is not None
        for node_id, when in trust.revoked.items():
            if before.revoked.get(node_id) != when:
                self.noted("certificate.revoked", {"node_id": node_id})
        for node_id, one in trust.issued.items():
            held = before.issued.get(node_id)
            if one.token == BY_HAND and (held is None or held.serial != one.serial):
                self.noted("certificate.issued", {"node_id": node_id})
        if trust.bundle != before.bundle:
            self.noted("authority.changed", {"count": len(trust.bundle)})
            self.pair = None
            self._make_identities()
            log.info("authority.reloaded", authorities=len(trust.bundle))
        self._trust_in_force = trust

    def _look_at_certificate(self) -> None:
        if self._stamps() != self._tls_stamps:
            self._make_identities()
            log.info("certificate.reloaded", path=self.settings.tls_cert)

    def settled(self, settings: ControlSettings) -> None:
        """Take over settings that were read anew. Raises ConfigError, and changes nothing."""
        before, self.settings = self.settings, settings
        if settings.tls_names != before.tls_names:
            self.pair = None
        try:
            self._make_identities()
        except ConfigError:
            self.settings = before
            raise
        self._make_ring()


def _refused(principal: Principal, now: float, trust: Trust) -> str | None:
    """Why somebody's certificate is no good any more; None if it is."""
    assert principal.joined is not None and principal.expires is not None
    return trust.refusal(principal.node_id or "", principal.joined, principal.expires, now, principal.issuer)


def serves_tls(settings: ControlSettings) -> bool:
    """Whether this control listens with TLS: beyond loopback always, unless a mesh does it."""
    if settings.tls == "off-mesh":
        return False
    return settings.tls == "on" or settings.tls_cert is not None or not settings.bind.loopback


def static_tokens(settings: ControlSettings) -> list[tuple[str, str, frozenset[Scope]]]:
    """(name, token, scopes) of the tokens that the settings hold."""
    shortest = 1 if settings.dev else MIN_TOKEN_CHARS
    entries: list[tuple[str, str, frozenset[Scope]]] = []
    for text, scopes in (
        (settings.api_token, CLIENT_SCOPES),
        (settings.admin_token, ADMIN_SCOPES),
        (settings.node_token or settings.service_token, frozenset({Scope.NODE})),
    ):
        entries += [(name, token, scopes) for name, token in parse_tokens(text or "", min_chars=shortest)]
    return entries
