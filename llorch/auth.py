"""Bearer tokens: who presents one, and what they may do.

Owns parsing token lists, principals and scopes, the check, and fingerprints. Keeps digests, never the tokens
themselves, so that nothing that prints a ring can print a secret. Fails closed: an empty ring admits nobody.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from llorch.errors import Code, LlorchError

MIN_TOKEN_CHARS = 32  # 128 bits in hex; shorter ones can be guessed over a network in time
MAX_TOKEN_CHARS = 512
DEFAULT_PRINCIPAL = "default"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOKEN = re.compile(r"[\x21-\x7e]+")


class Scope(StrEnum):
    """What a route asks for. OPEN asks for nothing; ADMIN implies all the others but NODE, JOIN and CONTROL."""

    OPEN = "open"
    SUBMIT = "submit"
    READ = "read"
    METRICS = "metrics"
    ADMIN = "admin"
    NODE = "node"  # a node, towards a control
    JOIN = "join"  # a machine that is to become a node
    CONTROL = "control"  # a control, towards a node


CLIENT_SCOPES = frozenset({Scope.SUBMIT, Scope.READ})
ADMIN_SCOPES = frozenset({Scope.SUBMIT, Scope.READ, Scope.METRICS, Scope.ADMIN})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a credential stands for. Two tokens with one name are one principal: that is how a token is rotated.

    `node_id`: of a certificate, which is for one node; a shared node token is for any. `models`: those that it may use;
    None: all. `token_id`: of a token that llorch made. `joined` (of a certificate) and `expires`: seconds since 1970.
    """

    name: str
    scopes: frozenset[Scope]
    fingerprint: str = ""
    node_id: str | None = None
    models: frozenset[str] | None = None
    token_id: str | None = None
    joined: float | None = None
    issuer: str = ""  # of a certificate: the authority's name
    expires: float | None = None

    def may(self, scope: Scope) -> bool:
        return scope is Scope.OPEN or scope in self.scopes

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


ANONYMOUS = Principal("anonymous", frozenset())


_MADE = re.compile(r"(ll[tj]1_)[A-Za-z0-9._-]{12,}")


def masked(text: str) -> str:
    """`text` without the tokens of llorch's that somebody has put where none belongs."""
    return _MADE.sub(r"\1***", text) if "1_" in text else text


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def fingerprint(token: str) -> str:
    """Enough of a digest to tell tokens apart in logs; nothing to guess the token from."""
    return digest(token).hex()[:8]


def parse_tokens(text: str, *, min_chars: int = MIN_TOKEN_CHARS) -> list[tuple[str, str]]:
    """(principal, token) pairs from a comma or line list; lines starting with # are comments.

    Raises ValueError that names the item by position and never quotes it.
    """
    pairs: list[tuple[str, str]] = []
    items = [
        part.strip() for line in text.splitlines() if not line.lstrip().startswith("#") for part in line.split(",")
    ]
    for position, item in enumerate(filter(None, items), 1):
        name, equals, token = item.partition("=")
        if not equals or not _NAME.fullmatch(name) or not token.strip("="):
            # A base64 token may end in `=`: that is padding, not a name.
            name, token = DEFAULT_PRINCIPAL, item
        if not _TOKEN.fullmatch(token):
            raise ValueError(f"token {position} has characters that no HTTP header can carry")
        if len(token) < min_chars:
            raise ValueError(f"token {position} is shorter than {min_chars} characters")
        if len(token) > MAX_TOKEN_CHARS:
            raise ValueError(f"token {position} is longer than {MAX_TOKEN_CHARS} characters")
        pairs.append((name, token))
    return pairs


class TokenRing:
    """All the tokens that are valid at a role right now, as digests."""

    __slots__ = ("_entries",)

    def __init__(
        self,
        entries: Iterable[tuple[str, str, frozenset[Scope]]] = (),
        digests: Iterable[tuple[bytes, Principal]] = (),
    ) -> None:
        """`entries`: (name, token, scopes). `digests`: of tokens whose text is not known here. The later one counts."""
        self._entries = {digest(token): Principal(name, scopes, fingerprint(token)) for name, token, scopes in entries}
        self._entries.update(digests)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Principal]:
        return iter(self._entries.values())

    def __repr__(self) -> str:
        return f"TokenRing({len(self)} tokens)"

    def identify(self, token: str, now: float) -> Principal | None:
        """Who presents `token` at `now` (seconds since 1970).

        Looked up by its SHA-256: what a comparison's time tells of a digest leads to no token that has it.
        """
        found = self._entries.get(digest(token))
        return found if found is not None and (found.expires is None or now < found.expires) else None

    def holds(self, principal: Principal, now: float) -> bool:
        """Whether who was identified before still would be, and as the same."""
        return principal in self._entries.values() and (principal.expires is None or now < principal.expires)


def presented_token(headers: Mapping[str, str]) -> str | None:
    """The credential of a request: `Authorization: Bearer`, else `api-key`, else `x-api-key` (Azure's, Anthropic's)."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("api-key") or headers.get("x-api-key") or None


def authorize(principal: Principal | None, *scopes: Scope) -> Principal:
    """The principal of a request that needs one of `scopes`. Missing and wrong are the same 401, too little is 403."""
    if Scope.OPEN in scopes:
        return principal or ANONYMOUS
    if principal is None:
        raise LlorchError(Code.UNAUTHENTICATED, "no valid token was presented")
    if not any(map(principal.may, scopes)):
        needs = [scope.value for scope in scopes]
        raise LlorchError(
            Code.FORBIDDEN, f"this credential lacks the scope {' or '.join(needs)}", details={"needs": needs}
        )
    return principal
