"""The tokens of a cluster on disk: `tokens.json` in the data directory, digests only, and when each was last used.

Owns the lock under which they change, so that a command and several controls on one directory lose nothing, and the
look for changes that others made. What a change means is `llorch.tokens`'s. Blocking: small files, rare changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llorch import private
from llorch.auth import ADMIN_SCOPES, Principal, Scope
from llorch.errors import Code, ConfigError, LlorchError
from llorch.logs import Log
from llorch.tokens import ID_BYTES, SECRET_BYTES, USED, Kind, Record, Tokens, Wish

FILE_NAME = "tokens.json"
USE_FILE_NAME = "tokens-used.json"

T = TypeVar("T")

log = Log("control.tokens")


class TokenFiles:
    def __init__(self, data_dir: str | Path) -> None:
        self._directory = Path(data_dir).expanduser()
        self._path = self._directory / FILE_NAME
        self._use_path = self._directory / USE_FILE_NAME
        self._stamp: tuple[int, int, int] | None = None
        self.tokens = Tokens()
        self.last_used: dict[str, float] = {}
        self._saved_use: dict[str, float] = {}
        self.own: set[str] = set()  # ids of tokens that were changed here, and not by somebody else

    # ------------------------------------------------------------ reading

    def load(self) -> bool:
        """Read what is there; True if it is something new. Raises ConfigError for what can't be read or lies open."""
        stamp = private.stamp(self._path)
        if stamp == self._stamp:
            return False
        self.tokens = self._read()
        self._stamp = stamp
        return True

    def _read(self) -> Tokens:
        data = private.read(self._path)
        if data is None:
            return Tokens()
        try:
            return Tokens.from_json(json.loads(data))
        except ValueError:
            raise ConfigError(
                f"{self._path} is not a file of tokens",
                hint="restore it, or move it away: its tokens are then no longer valid",
            ) from None

    def load_use(self) -> None:
        """When tokens were last used, as far as it was written down."""
        try:
            data = private.read(self._use_path)
            used = json.loads(data) if data is not None else {}
            self.last_used = {str(token_id): float(when) for token_id, when in used.items()}
        except (ConfigError, ValueError, TypeError, AttributeError):
            self.last_used = {}
        self._saved_use = dict(self.last_used)

    # ------------------------------------------------------------ changing

    def new(self, wish: Wish, now: float, ca_digest: bytes | None = None) -> tuple[Record, str]:
        """The record and the text of a new token; nobody will see the text again."""

        def add(tokens: Tokens) -> tuple[Tokens, tuple[Record, str]]:
            changed, record, text = tokens.add(wish, now, os.urandom(ID_BYTES + SECRET_BYTES), ca_digest)
            self.own.add(record.id)
            return changed, (record, text)

        return self._change(add)

    def revoke(self, which: str, now: float) -> list[Record]:

        def revoke(tokens: Tokens) -> tuple[Tokens, list[Record]]:
            changed, revoked = tokens.revoke(which, now)
            self.own.update(record.id for record in revoked)
            return changed, revoked

        return self._change(revoke)

    def use(self, token_id: str, now: float) -> None:
        """A join token is used: once fewer for everybody. Raises UNAUTHENTICATED if another was faster."""
        self._change(lambda tokens: (tokens.use(token_id, now), None))

    def give_back(self, token_id: str) -> None:
        """The use came to nothing. Where that can't be written, the token is good once less, which is told."""
        try:
            self._change(lambda tokens: (tokens.give_back(token_id), None))
        except LlorchError as error:
            log.warning("tokens.use_lost", token_id=token_id, reason=error.message)

    def merge(self, other: Tokens) -> None:
        self._change(lambda tokens: (tokens.merged(other), None))

    def _change(self, change: Callable[[Tokens], tuple[Tokens, T]]) -> T:
        """Under the lock, from what is on disk now. Raises INSUFFICIENT_STORAGE if it can't be written."""
        with private.locked(self._directory):
            before = self._read()
            after, result = change(before)
            if after != before:
                data = json.dumps(after.to_json(), indent=1).encode() + b"\n"
                try:
                    private.write(self._path, data)
                except OSError as error:
                    raise LlorchError(
                        Code.INSUFFICIENT_STORAGE, f"{self._path} can't be written: {error.strerror}"
                    ) from None
            self.tokens, self._stamp = after, private.stamp(self._path)
        return result

    def save_use(self) -> None:
        """Write down when tokens were last used. A disk that is full costs that and no more."""
        if self.last_used == self._saved_use:
            return
        known = {record.id for record in self.tokens.records}
        self.last_used = {token_id: when for token_id, when in self.last_used.items() if token_id in known}
        try:
            private.write(self._use_path, json.dumps(self.last_used).encode())
        except OSError as error:
            log.warning("tokens.use_unsaved", reason=error.strerror)
        self._saved_use = dict(self.last_used)


def principals(tokens: Tokens, now: float) -> list[tuple[bytes, Principal]]:
    """Those in force, for a ring; join tokens that are used up too, for whoever did not get the answer to its use."""
    known = [record for record in tokens.records if record.ended(now) in (None, USED)]
    return [(record.digest, principal_of(record)) for record in known]


def principal_of(record: Record) -> Principal:
    return Principal(
        name=f"join:{record.id}" if record.kind is Kind.JOIN else record.name,
        scopes=ADMIN_SCOPES if Scope.ADMIN in record.scopes else record.scopes,
        fingerprint=record.fingerprint,
        node_id=record.node_id,
        models=record.models,
        token_id=record.id,
        expires=record.expires,
    )
