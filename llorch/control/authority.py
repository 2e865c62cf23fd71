"""The cluster's authority on disk: made at a control's first start, it signs what nodes and controls show each other.

    <data>/pki/authority.pem   0600  the key (under a passphrase, if there is one), the authority, then those that it
                                     succeeded, and for each of them the successor under its signature
    <data>/pki/issued.json     0600  which node holds a certificate until when, and whose were revoked

Owns both files, the lock under which they change, and rotation: the new authority signs from the first moment, and who
trusts only an older one trusts it through that one's signature. Several controls may share the directory. Blocking.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llorch import pki, private
from llorch.errors import Code, ConfigError, LlorchError
from llorch.pki import Cert, Signer

DIRECTORY, FILE_NAME, ISSUED_NAME = "pki", "authority.pem", "issued.json"
MAX_SUCCEEDED = 4  # each makes every handshake of a control 500 bytes longer

_KEY = re.compile(rb"-----BEGIN (ENCRYPTED )?PRIVATE KEY-----.*?-----END (ENCRYPTED )?PRIVATE KEY-----\n?", re.S)


@dataclass(frozen=True, slots=True)
class Issued:
    """The newest certificate of one node. Times are seconds since 1970; `authority`: the pin of who signed it."""

    node_id: str
    serial: str
    issued: float
    ends: float
    authority: str
    key: str = ""  # SHA-256 of its key
    token: str = ""  # the id of the join token that it was issued for; empty for one that was renewed
    confirmed: bool = False  # the node has shown it: until then it may not have got it, and goes on with the one before
    before: tuple[str, ...] = ()  # the pins of those that signed what it may have instead

    @property
    def signers(self) -> set[str]:
        """The pins of all that may have signed what the node has."""
        return {self.authority} if self.confirmed else {self.authority, *self.before}


@dataclass(frozen=True, slots=True)
class Trust:
    """What one moment's files say: whom to sign with, whom to trust, what was issued. Values only."""

    signer: Signer
    succeeded: tuple[Cert, ...]  # older authorities that are still trusted, the newest first
    crosses: tuple[Cert, ...]  # the chain from the newest to the oldest of them
    issued: dict[str, Issued]
    revoked: dict[str, float]

    @property
    def bundle(self) -> tuple[Cert, ...]:
        return (self.signer.cert, *self.succeeded)

    @property
    def digest(self) -> bytes:
        """What join tokens and pins say of the authority that signs."""
        return pki.sha256(self.signer.cert)

    @property
    def ends(self) -> float:
        return pki.ends(self.signer.cert)

    @property
    def bundle_pem(self) -> bytes:
        return pki.pem_of(self.bundle)

    @property
    def bundle_id(self) -> str:
        """What nodes compare to know whether they have the bundle of today."""
        return pki.bundle_id(self.bundle)

    def chain_pem(self, cert: Cert) -> bytes:
        """A certificate with what leads from it to any authority of the bundle."""
        return pki.pem_of((cert, *self.crosses))

    def refusal(self, node_id: str, issued: float, ends: float, now: float, issuer: str | None = None) -> str | None:
        """Why a certificate that its authority did sign is no good any more; None if it is."""
        if issuer is not None and issuer not in map(pki.common_name, self.bundle):
            return "the authority that signed the certificate is trusted no more"
        if now >= ends:
            return "the certificate has expired"
        if issued <= self.revoked.get(node_id, 0.0):
            return "the certificate was revoked"
        return None

    def holders(self, authority: Cert, now: float) -> list[str]:
        """The nodes that may have no certificate in force but one of this authority."""
        pin = pki.pin_of(authority)
        in_force = [one for one in self.issued.values() if one.ends > now]
        return sorted(one.node_id for one in in_force if pin in one.signers)


class Authority:
    """`open` it; `trust` is what was read last. Every change reads the files again under their lock."""

    def __init__(self, directory: Path, passphrase: bytes | None) -> None:
        self._directory = directory
        self._passphrase = passphrase
        self._stamps: tuple[Any, ...] = ()
        self.trust: Trust

    @classmethod
    def open(cls, data_dir: str | Path, passphrase: str | None, now: float) -> tuple[Authority, bool]:
        """The authority of a data directory, and whether it was made just now. Raises ConfigError."""
        directory = Path(data_dir).expanduser() / DIRECTORY
        authority = cls(directory, passphrase.encode() if passphrase else None)
        made = False
        if not (directory / FILE_NAME).exists():
            with private.locked(directory):
                if not (directory / FILE_NAME).exists():  # another process may have been faster
                    key = pki.make_key()
                    authority._store(Signer(pki.make_authority(key, now), key), (), ())
                    made = True
        authority.refresh()
        return authority, made

    @classmethod
    def exists(cls, data_dir: str | Path) -> bool:
        return (Path(data_dir).expanduser() / DIRECTORY / FILE_NAME).exists()

    @classmethod
    def pin_in(cls, data_dir: str | Path) -> str | None:
        """The digest of the authority that signs: for that its key need not be opened."""
        data = private.read(Path(data_dir).expanduser() / DIRECTORY / FILE_NAME)
        try:
            return pki.pin_of(pki.read_certs(_KEY.sub(b"", data or b""))[0])
        except (ValueError, IndexError):
            return None

    # ------------------------------------------------------------ reading

    def refresh(self) -> bool:
        """Read the files again if they have changed; True if so. Raises ConfigError and keeps what was."""
        stamps = self._now()
        if stamps == self._stamps:
            return False
        self.trust = self._read()
        self._stamps = stamps
        return True

    def _now(self) -> tuple[Any, ...]:
        return tuple(private.stamp(self._directory / name) for name in (FILE_NAME, ISSUED_NAME))

    def _read(self) -> Trust:
        path = self._directory / FILE_NAME
        data = private.read(path)
        if data is None:
            raise ConfigError(f"{path} is gone", hint="restore it, or `llorch certs import` one")
        key_part = _KEY.search(data)
        try:
            if key_part is None:
                raise ValueError("there is no key in it")
            key = pki.read_key(key_part[0], self._passphrase)
            first, *others = pki.read_certs(_KEY.sub(b"", data))
            if not pki.same_key(first, key):
                raise ValueError("its key is not that of its certificate")
        except ValueError as error:
            hint = "--ca-passphrase-file PATH" if "encrypted" in str(error) else None
            raise ConfigError(f"the authority in {path} can't be used: {error}", hint=hint) from None
        crosses = tuple(cert for cert in others if cert.issuer != cert.subject)
        succeeded = tuple(cert for cert in others if cert.issuer == cert.subject)
        return Trust(Signer(first, key), succeeded, crosses, *self._read_issued())

    def _read_issued(self) -> tuple[dict[str, Issued], dict[str, float]]:
        path = self._directory / ISSUED_NAME
        data = private.read(path)
        if data is None:
            return {}, {}
        try:
            value = json.loads(data)
            issued = {str(one["node_id"]): Issued(**{**one, "before": tuple(one["before"])}) for one in value["issued"]}
            return issued, {str(node_id): float(when) for node_id, when in value["revoked"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f"{path} can't be read: it is not what llorch writes", hint="restore it") from None

    # ------------------------------------------------------------ writing

    def _store(self, signer: Signer, succeeded: Sequence[Cert], crosses: Sequence[Cert]) -> None:
        pem = pki.key_pem(signer.key, self._passphrase) + pki.pem_of((signer.cert, *succeeded, *crosses))
        self._write(FILE_NAME, pem)

    def _store_issued(self, issued: dict[str, Issued], revoked: dict[str, float]) -> None:
        value = {"issued": [asdict(one) for _, one in sorted(issued.items())], "revoked": revoked}
        self._write(ISSUED_NAME, json.dumps(value, indent=1).encode() + b"\n")

    def _write(self, name: str, data: bytes) -> None:
        try:
            private.write(self._directory / name, data)
        except OSError as error:
            raise LlorchError(
                Code.INSUFFICIENT_STORAGE, f"{self._directory / name} can't be written: {error.strerror}"
            ) from None

    def _change(self, change: Callable[[Trust], None]) -> None:
        with private.locked(self._directory):
            change(self._read())
        self.refresh()

    # ------------------------------------------------------------ certificates

    def issue_node(
        self,
        csr: bytes,
        node_id: str,
        now: float,
        life_s: float,
        *,
        take_over: bool = False,
        token: str = "",
        still_good: Callable[[Trust], str | None] = lambda _trust: None,
    ) -> bytes:
        """A certificate for a node, with its chain (PEM). Raises NODE_ID_CONFLICT for an id whose certificate is in
        force, unless it is to `take_over`: a new machine can't become one that is there.

        `still_good` says what is wrong by now with the one that is renewed: it may have been revoked a moment ago.
        """
        made: list[Cert] = []
        public = pki.read_request(csr)

        def issue(trust: Trust) -> None:
            why = still_good(trust)
            if why is not None:
                raise LlorchError(Code.UNAUTHENTICATED, why)
            held = trust.issued.get(node_id)
            if held is not None and not take_over and trust.refusal(node_id, held.issued, held.ends, now) is None:
                raise LlorchError(
                    Code.NODE_ID_CONFLICT,
                    f"{node_id} has a certificate already",
                    hint=f"give this machine another --node-id, or `llorch token join --node {node_id}`",
                )
            cert = trust.signer.issue_node(public, node_id, now, life_s)
            made.append(cert)
            before = () if held is None else tuple(sorted(held.signers))
            signer = pki.pin_of(trust.signer.cert)
            serial = f"{cert.serial_number:x}"
            new = Issued(node_id, serial, now, pki.ends(cert), signer, pki.key_digest(public), token, before=before)
            kept = {one.node_id: one for one in trust.issued.values() if one.ends > now}
            self._store_issued(kept | {node_id: new}, trust.revoked)

        self._change(issue)
        return self.trust.chain_pem(made[0])

    def confirm(self, serials: Mapping[str, str]) -> None:
        """Nodes have shown these certificates: {id: serial}."""

        def confirm(trust: Trust) -> None:
            shown = {
                node_id: replace(trust.issued[node_id], confirmed=True)
                for node_id, serial in serials.items()
                if node_id in trust.issued and trust.issued[node_id].serial == serial
            }
            if shown:
                self._store_issued(trust.issued | shown, trust.revoked)

        self._change(confirm)

    def is_repeated(self, csr: bytes, node_id: str, token: str) -> bool:
        """Whether this node was issued a certificate for this key and join token: its answer may have been lost."""
        held = self.trust.issued.get(node_id)
        return held is not None and (held.key, held.token) == (pki.key_digest(pki.read_request(csr)), token)

    def revoke(self, node_id: str, now: float) -> bool:
        """No certificate that a node was issued until now is good any more. False if it had none."""
        had = node_id in self.trust.issued

        def revoke(trust: Trust) -> None:
            self._store_issued(
                {one.node_id: one for one in trust.issued.values() if one.node_id != node_id},
                trust.revoked | {node_id: now},
            )

        self._change(revoke)
        return had

    def control_pair(self, name: str, names: Sequence[str], now: float, life_s: float) -> tuple[bytes, bytes]:
        """A certificate with its chain, and its key, for a control: for the life of its process."""
        key = pki.make_key()
        cert = self.trust.signer.issue_control(key.public_key(), name, names, now, life_s)
        return self.trust.chain_pem(cert), pki.key_pem(key)

    @staticmethod
    def read_expiry(path: Path) -> float | None:
        """Until when the certificate in a file is good, in seconds since 1970; None if that can't be read."""
        try:
            return pki.ends(pki.read_certs(path.read_bytes())[0])
        except (OSError, ValueError, IndexError):
            return None

    # ------------------------------------------------------------ rotation

    def rotate(self, now: float) -> None:
        """A new authority signs from now on; the old ones stay trusted until `finish`. Raises CONFLICT if there are
        too many of them.
        """

        def rotate(trust: Trust) -> None:
            if len(trust.succeeded) >= MAX_SUCCEEDED:
                raise LlorchError(
                    Code.CONFLICT, "too many older authorities are trusted", hint="llorch certs rotate --finish"
                )
            key = pki.make_key()
            cert = pki.make_authority(key, now)
            cross = pki.cross_sign(cert, trust.signer.cert, trust.signer.key)
            self._store(Signer(cert, key), trust.bundle, (cross, *trust.crosses))

        self._change(rotate)

    def finish(self, now: float, *, force: bool = False) -> None:
        """Trust the newest authority alone. Raises CONFLICT while nodes hold certificates of older ones."""

        def finish(trust: Trust) -> None:
            holders = sorted({node_id for old in trust.succeeded for node_id in trust.holders(old, now)})
            if holders and not force:
                raise LlorchError(
                    Code.CONFLICT,
                    f"these nodes hold certificates of an older authority: {', '.join(holders[:10])}",
                    hint="they renew when they next beat; with --force they have to join again",
                )
            self._store(trust.signer, (), ())

        self._change(finish)

    # ------------------------------------------------------------ to another control

    def export(self) -> dict[str, str]:
        """What makes another control one of this cluster: the files' text. It holds the key."""
        names = (FILE_NAME, ISSUED_NAME)
        found = {name: private.read(self._directory / name) for name in names}
        return {name: data.decode("ascii") for name, data in found.items() if data is not None}

    @classmethod
    def take_over(cls, data_dir: str | Path, files: dict[str, str], passphrase: str | None, *, force: bool) -> None:
        """Write what `export` gave. Raises CONFLICT where another authority is, unless it is to go (`force`)."""
        directory = Path(data_dir).expanduser() / DIRECTORY
        authority = cls(directory, passphrase.encode() if passphrase else None)
        with private.locked(directory):
            before = private.read(directory / FILE_NAME)
            given = files.get(FILE_NAME, "").encode()
            if before is not None and not force and not _same_authority(before, given):
                raise LlorchError(
                    Code.CONFLICT,
                    f"{directory} holds another authority",
                    hint="--force: its nodes have to join again",
                )
            for name, text in files.items():
                if name in (FILE_NAME, ISSUED_NAME):
                    authority._write(name, text.encode())
        authority.refresh()


def _same_authority(one: bytes, other: bytes) -> bool:
    """Whether one of them is the other, or its successor."""
    try:
        mine, theirs = ({pki.sha256(cert) for cert in pki.read_certs(_KEY.sub(b"", pem))} for pem in (one, other))
    except ValueError:
        return False
    return bool(mine & theirs)
