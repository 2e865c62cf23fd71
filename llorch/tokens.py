"""Tokens that llorch makes: how they are written, what is kept of them, and which of them are in force.

    llt1_<id>.<secret>_<crc>                    a client's
    llj1_<sha256 of the CA>.<id>.<secret>_<crc> for a machine that joins: it knows its cluster before it says the secret

Owns the text of a token (the checksum tells a cut-off paste from a wrong token; secret scanners can look for the
prefix), the record that stands for it (a digest, never the secret) and the store of records as one value. Random bytes
and `now` (seconds since 1970) come in. Files are `control/token_files`'s.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from llorch.auth import CLIENT_SCOPES, Scope, digest
from llorch.errors import Code, LlorchError, invalid

SECRET_BYTES = 32
ID_BYTES = 5
KEEP_ENDED_S = 30 * 86_400.0  # revoked and expired ones are listed for so long
MAX_TOKENS = 10_000
USED = "used"
GRANTABLE = (Scope.SUBMIT, Scope.READ, Scope.METRICS, Scope.ADMIN)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TEXT = re.compile(
    r"(llt1_|llj1_(?P<ca>[A-Za-z0-9_-]{43})\.)(?P<id>[a-z2-7]{8})\.[A-Za-z0-9_-]{43}_(?P<crc>[0-9a-f]{8})"
)
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")


class Kind(StrEnum):
    CLIENT = "client"
    JOIN = "join"


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def write_token(random: bytes, ca_digest: bytes | None = None) -> tuple[str, str]:
    """(id, text) of a new token out of ID_BYTES + SECRET_BYTES random bytes. With `ca_digest` it is a join token."""
    token_id = base64.b32encode(random[:ID_BYTES]).decode("ascii").lower()
    head = "llt1_" if ca_digest is None else f"llj1_{b64url(ca_digest)}."
    text = f"{head}{token_id}.{b64url(random[ID_BYTES:])}"
    return token_id, f"{text}_{_crc(text)}"


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode('ascii')):08x}"


def is_whole(text: str) -> bool:
    """False for what looks like a token of ours and was cut off or mistyped. Other text may be another's token."""
    if not text.startswith(("llt1_", "llj1_")):
        return True
    return _TEXT.fullmatch(text) is not None and _crc(text[:-9]) == text[-8:]


def read_join_token(text: str) -> bytes:
    """The SHA-256 of the authority that a join token is for. Raises INVALID_REQUEST, which never quotes it."""
    match = _TEXT.fullmatch(text)
    if match is None or match["ca"] is None:
        raise invalid("this is no join token", hint="`llorch token join` on the control prints the whole command")
    if _crc(text[:-9]) != match["crc"]:
        raise invalid("the join token is not whole, or mistyped", hint="copy all of it: it ends in _ and 8 characters")
    return base64.urlsafe_b64decode(match["ca"] + "=")


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept of a token. Times are seconds since 1970; `expires` None: never. `uses_left` is of join tokens."""

    id: str
    kind: Kind
    name: str
    digest: bytes = field(repr=False)
    created: float
    scopes: frozenset[Scope] = frozenset()
    expires: float | None = None
    models: frozenset[str] | None = None
    revoked: float | None = None
    uses_left: int | None = None
    node_id: str | None = None

    @property
    def fingerprint(self) -> str:
        return self.digest.hex()[:8]

    def ended(self, now: float) -> str | None:
        """Why it is not in force: one word; None if it is."""
        if self.revoked is not None:
            return "revoked"
        if self.expires is not None and now >= self.expires:
            return "expired"
        return USED if self.uses_left == 0 else None

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "id": self.id,
            "kind": self.kind.value,
            "name": self.name,
            "sha256": self.digest.hex(),
            "created": self.created,
            "scopes": sorted(scope.value for scope in self.scopes),
        }
        more = {
            "expires": self.expires,
            "models": None if self.models is None else sorted(self.models),
            "revoked": self.revoked,
            "uses_left": self.uses_left,
            "node_id": self.node_id,
        }
        return value | {name: item for name, item in more.items() if item is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        models = value.get("models")
        kind = Kind(value["kind"])
        expires, revoked, uses = value.get("expires"), value.get("revoked"), value.get("uses_left")
        stamped = bytes.fromhex(value["sha256"])
        if len(stamped) != 32 or (uses is not None and not isinstance(uses, int)):
            raise ValueError("not a record of a token")
        return cls(
            id=str(value["id"]),
            kind=kind,
            name=str(value["name"]),
            digest=stamped,
            created=float(value["created"]),
            scopes=frozenset(map(Scope, value["scopes"])),
            expires=None if expires is None else float(expires),
            models=None if models is None else frozenset(map(str, models)),
            revoked=None if revoked is None else float(revoked),
            uses_left=uses,
            node_id=value.get("node_id"),
        )


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody wants a new token to be. `life_s` None: it never expires."""

    kind: Kind = Kind.CLIENT
    name: str = ""  # its id, if none is given: two people who ask for a token are two principals
    scopes: frozenset[Scope] = CLIENT_SCOPES
    life_s: float | None = None
    models: frozenset[str] | None = None
    uses: int | None = None
    node_id: str | None = None

    def check(self) -> None:
        """Raises INVALID_REQUEST that names the field."""
        if self.name and not _NAME.fullmatch(self.name):
            raise invalid("`name` is 1 to 64 of letters, digits, . _ -", param="name")
        if self.kind is Kind.CLIENT and (not self.scopes or not self.scopes <= set(GRANTABLE)):
            raise invalid(f"`scopes` are some of {', '.join(GRANTABLE)}", param="scopes")
        if self.life_s is not None and not 1 <= self.life_s <= 100 * 365 * 86_400:
            raise invalid("`expires_s` is between a second and a hundred years", param="expires_s")
        if self.models is not None and not (self.models and all(map(_MODEL.fullmatch, self.models))):
            raise invalid("`models` are ids of models, one at least", param="models")
        if self.uses is not None and not 1 <= self.uses <= 10_000:
            raise invalid("`uses` is between 1 and 10000", param="uses")


@dataclass(frozen=True, slots=True)
class Tokens:
    """The records of one cluster, the oldest first. Every change is another value."""

    records: tuple[Record, ...] = ()

    def add(self, wish: Wish, now: float, random: bytes, ca_digest: bytes | None = None) -> tuple[Tokens, Record, str]:
        """(all, the new record, the text, which is known to nobody again)."""
        wish.check()
        kept = self.without_old(now)
        if len(kept.records) >= MAX_TOKENS:
            raise LlorchError(Code.CONFLICT, f"there are {MAX_TOKENS} tokens already", hint="`llorch token revoke`")
        token_id, text = write_token(random, ca_digest)
        record = Record(
            id=token_id,
            kind=wish.kind,
            name=wish.name or token_id,
            digest=digest(text),
            created=now,
            scopes=wish.scopes if wish.kind is Kind.CLIENT else frozenset({Scope.JOIN}),
            expires=None if wish.life_s is None else now + wish.life_s,
            models=wish.models,
            uses_left=wish.uses,
            node_id=wish.node_id,
        )
        return replace(kept, records=(*kept.records, record)), record, text

    def revoke(self, which: str, now: float) -> tuple[Tokens, list[Record]]:
        """Revoke the token with this id, or all in force with this name; or the one whose text this is, for a leaked
        token is what a person has at hand. Raises NOT_FOUND if there is none.
        """
        if which.startswith(("llt1_", "llj1_")):
            which = next((one.id for one in self.records if one.digest == digest(which)), "")
        found = [one for one in self.records if which in (one.id, one.name) and one.revoked is None]
        by_id = [one for one in found if one.id == which]
        chosen = by_id or [one for one in found if one.ended(now) is None]
        if not chosen:
            if any(one.id == which for one in self.records):
                return self, []
            raise LlorchError(Code.NOT_FOUND, "no token has this id or name", hint="`llorch token ls` lists them")
        ids = {one.id for one in chosen}
        return self._map(lambda one: replace(one, revoked=now) if one.id in ids else one), chosen

    def use(self, token_id: str, now: float) -> Tokens:
        """A join token was used once. Raises UNAUTHENTICATED if it is not in force (any more)."""
        found = next((one for one in self.records if one.id == token_id), None)
        if found is None or found.ended(now) is not None:
            raise LlorchError(Code.UNAUTHENTICATED, "no valid token was presented")
        if found.uses_left is None:
            return self
        return self._map(lambda one: replace(one, uses_left=(one.uses_left or 1) - 1) if one is found else one)

    def give_back(self, token_id: str) -> Tokens:
        """A use of a join token that came to nothing."""
        return self._map(
            lambda one: (
                replace(one, uses_left=one.uses_left + 1) if one.id == token_id and one.uses_left is not None else one
            )
        )

    def without_old(self, now: float) -> Tokens:
        """Without those that ended so long ago that nobody asks for them any more. One that was revoked stays for as
        long as it would be good without that: another control's store may not know it yet.
        """

        def asked_for(one: Record) -> bool:
            return one.expires is None or now - one.expires < KEEP_ENDED_S

        return replace(self, records=tuple(filter(asked_for, self.records)))

    def merged(self, other: Tokens) -> Tokens:
        """Both; of one that both have, what has been revoked or used anywhere stays so."""
        mine = {one.id: one for one in self.records}
        for theirs in other.records:
            ours = mine.get(theirs.id)
            mine[theirs.id] = theirs if ours is None else _the_stricter(ours, theirs)
        return replace(self, records=tuple(sorted(mine.values(), key=lambda one: (one.created, one.id))))

    def _map(self, change: Any) -> Tokens:
        return replace(self, records=tuple(map(change, self.records)))

    def to_json(self) -> dict[str, Any]:
        return {"version": 1, "tokens": [one.to_json() for one in self.records]}

    @classmethod
    def from_json(cls, value: Any) -> Tokens:
        """Raises ValueError for what `to_json` did not write."""
        try:
            return cls(tuple(map(Record.from_json, value["tokens"])))
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError("not a file of tokens") from None


def _the_stricter(ours: Record, theirs: Record) -> Record:
    revoked = [when for when in (ours.revoked, theirs.revoked) if when is not None]
    uses = [left for left in (ours.uses_left, theirs.uses_left) if left is not None]
    return replace(ours, revoked=min(revoked, default=None), uses_left=min(uses, default=None))


def parse_scopes(words: Iterable[str]) -> frozenset[Scope]:
    """Scopes as a person names them. Raises INVALID_REQUEST."""
    named = [word.strip() for word in words if word.strip()]
    known = {scope.value: scope for scope in GRANTABLE}
    strange: Sequence[str] = [word for word in named if word not in known]
    if strange or not named:
        raise invalid(f"`scopes` are some of {', '.join(known)}", param="scopes")
    return frozenset(known[word] for word in named)
