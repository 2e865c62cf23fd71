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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llorch import pki, private
from llorch.auth import Principal
from llorch.errors import Code, ConfigError, LlorchError
from llorch.pki import Cert, Signer
from llorch.tls import Peer

DIRECTORY, FILE_NAME, ISSUED_NAME = "pki", "authority.pem", "issued.json"
BY_HAND = "by-hand"  # in place of a join token's id: what `llorch certs issue` made, at the command line
MAX_SUCCEEDED = 4  # each makes every handshake of a control 500 bytes longer

_KEY = re.compile(rb"-----BEGIN (ENCRYPTED )?PRIVATE KEY-----.*?-----END (ENCRYPTED )?PRIVATE KEY-----\n?", re.S)


@dataclass(frozen=True, slots=True)
class Issued:
    """The newest certificate of one node, whichever control made it. Times are seconds since 1970; `joined`: when it
    came in with a token; `authority`: the pin of who signed it.
    """

    node_id: str
    serial: str
    issued: float
    ends: float
    authority: str
    joined: float = 0.0
    key: str = ""  # SHA-256 of its key
    token: str = ""  # the id of the join token that it was issued for, or BY_HAND; empty for one that was renewed
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
    def ticket_key(self) -> str:
        """What controls of this cluster sign tickets with, by which nodes let one another fetch models."""
        return pki.derived(self.signer.key, b"llorch ticket 1")

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

    def refusal(self, node_id: str, joined: float, ends: float, now: float, issuer: str | None = None) -> str | None:
        """Why a certificate that its authority did sign is no good any more; None if it is.

        What was revoked is a node's joining, and all that was ever renewed from it, at whichever control.
        """
        if issuer is not None and issuer not in map(pki.common_name, self.bundle):
            return "the authority that signed the certificate is trusted no more"
        if now >= ends:
            return "the certificate has expired"
        if joined <= self.revoked.get(node_id, 0.0):
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
                    authority._store_issued({}, {})
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
        path, issued_path = self._directory / FILE_NAME, self._directory / ISSUED_NAME
        data, issued = private.read(path), private.read(issued_path)
        if data is None:
            raise ConfigError(f"{path} is gone", hint="restore it, or `llorch certs import` one")
        if issued is None:
            raise ConfigError(
                f"{issued_path} is gone, and with it who was revoked", hint="restore it with its authority"
            )
        return self._parse(data, issued, str(path), str(issued_path))

    def _parse(self, data: bytes, issued: bytes, path: str, issued_path: str) -> Trust:
        """What the files' contents say. Raises ConfigError that names the file."""
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
        try:
            value = json.loads(issued)
            entries = [Issued(**{**one, "before": tuple(one["before"])}) for one in value["issued"]]
            revoked = {str(node_id): float(when) for node_id, when in value["revoked"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f"{issued_path} can't be read: it is not what llorch writes", hint="restore it") from None
        return Trust(Signer(first, key), succeeded, crosses, {one.node_id: one for one in entries}, revoked)

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
        renews: Principal | None = None,
        take_over: bool = False,
        token: str = "",
        use: Callable[[], None] = lambda: None,
    ) -> bytes:
        """A certificate for a node, with its chain (PEM). `renews`: who shows the one before. Else it joins: `use`
        is called once it is clear that it may; not where its answer was lost and it asks for the same key with the same
        `token` again.

        Raises UNAUTHENTICATED for what was revoked meanwhile, or NODE_ID_CONFLICT for an id whose certificate is in
        force, unless it is to `take_over`: a new machine can't become one that is there.
        """
        made: list[Cert] = []
        public = pki.read_request(csr)
        mine = pki.key_digest(public)

        def issue(trust: Trust) -> None:
            held = trust.issued.get(node_id)
            if renews is not None:
                joined = _still_a_member(trust, renews, now)
            elif held is not None and token and (held.key, held.token) == (mine, token):
                joined = held.joined
            else:
                check_free(trust, node_id, now, take_over=take_over)
                use()
                joined = max(float(int(now)), float(int(trust.revoked.get(node_id, 0.0))) + 1)
            cert = trust.signer.issue_node(public, node_id, now, life_s, joined)
            made.append(cert)
            signer, serial = pki.pin_of(trust.signer.cert), f"{cert.serial_number:x}"
            before = () if held is None else tuple(sorted(held.signers))
            kept_token = token if renews is None else ""
            new = Issued(node_id, serial, now, pki.ends(cert), signer, joined, mine, token=kept_token, before=before)
            kept = {one.node_id: one for one in trust.issued.values() if one.ends > now}
            self._store_issued(kept | {node_id: new}, trust.revoked)

        self._change(issue)
        return self.trust.chain_pem(made[0])

    def is_repeated(self, csr: bytes, node_id: str, token: str) -> bool:
        """Whether this seems to be asked again because its answer was lost; `issue_node` decides."""
        held = self.trust.issued.get(node_id)
        return held is not None and (held.key, held.token) == (pki.key_digest(pki.read_request(csr)), token)

    def check_free(self, node_id: str, now: float, *, take_over: bool) -> None:
        """Raises NODE_ID_CONFLICT as `issue_node` would, as far as is known."""
        check_free(self.trust, node_id, now, take_over=take_over)

    def seen(self, peers: Iterable[Peer], now: float) -> dict[str, Issued]:
        """What the certificates that nodes have shown say, as entries of ours."""
        pins = {pki.common_name(cert): pki.pin_of(cert) for cert in self.trust.bundle}
        return {
            peer.name: Issued(peer.name, peer.serial, now, peer.ends, pins.get(peer.issuer, ""), peer.joined)
            for peer in peers
        }

    def saw(self, shown: Mapping[str, Issued]) -> None:
        """Nodes have shown these certificates. Those that another control made are known here from now on, too."""

        def saw(trust: Trust) -> None:
            new = {}
            for node_id, seen in shown.items():
                held = trust.issued.get(node_id)
                if held is None or (held.serial != seen.serial and held.ends < seen.ends):
                    new[node_id] = replace(seen, confirmed=True)
                elif held.serial == seen.serial and not held.confirmed:
                    new[node_id] = replace(held, confirmed=True)
            if new:
                self._store_issued(trust.issued | new, trust.revoked)

        self._change(saw)

    def revoke(self, node_id: str, now: float) -> bool:
        """No certificate of a node that joined until now is good any more, whoever renews it. False if it had none."""
        had: list[bool] = []

        def revoke(trust: Trust) -> None:
            had.append(node_id in trust.issued or node_id in trust.revoked)
            self._store_issued(
                {one.node_id: one for one in trust.issued.values() if one.node_id != node_id},
                trust.revoked | {node_id: max(now, trust.revoked.get(node_id, 0.0))},
            )

        self._change(revoke)
        return had[0]

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
    def take_over(cls, data_dir: str | Path, files: dict[str, str], passphrase: str | None, *, force: bool) -> str:
        """Take over what `export` gave, and say what that was. Nothing is written before all of it was read.

        Of the same cluster what is newer counts: the successor of an authority, a certificate's last renewal; and what
        was revoked anywhere stays so. Raises CONFLICT where another cluster's authority is, unless it is to go.
        """
        directory = Path(data_dir).expanduser() / DIRECTORY
        authority = cls(directory, passphrase.encode() if passphrase else None)
        theirs = authority._parse(
            files.get(FILE_NAME, "").encode(), files.get(ISSUED_NAME, "").encode(), "the export", "the export"
        )
        with private.locked(directory):
            mine = authority._read() if (directory / FILE_NAME).exists() else None
            known = [] if mine is None else list(map(pki.sha256, mine.bundle))
            newest = pki.sha256(theirs.signer.cert)
            same = mine is not None and (newest in known or known[0] in map(pki.sha256, theirs.bundle))
            if mine is not None and not same and not force:
                raise LlorchError(
                    Code.CONFLICT,
                    f"{directory} holds another authority",
                    hint="--force: its nodes have to join again",
                )
            issued, revoked = theirs.issued, theirs.revoked
            if mine is not None and same:
                issued = mine.issued | {
                    one.node_id: one
                    for one in issued.values()
                    if one.node_id not in mine.issued or mine.issued[one.node_id].issued < one.issued
                }
                revoked = {
                    node_id: max(mine.revoked.get(node_id, 0.0), theirs.revoked.get(node_id, 0.0))
                    for node_id in {*mine.revoked, *theirs.revoked}
                }
                issued = {one.node_id: one for one in issued.values() if one.joined > revoked.get(one.node_id, 0.0)}
            authority._store_issued(issued, revoked)
            if mine is None or not same or newest not in known:
                authority._store(theirs.signer, theirs.succeeded, theirs.crosses)
                taken = "its authority"
            else:
                taken = "no authority: the one here is the same, or follows it"
        authority.refresh()
        return taken


def check_free(trust: Trust, node_id: str, now: float, *, take_over: bool) -> None:
    """Raises NODE_ID_CONFLICT for an id whose certificate is in force."""
    held = trust.issued.get(node_id)
    if held is not None and not take_over and trust.refusal(node_id, held.joined, held.ends, now) is None:
        raise LlorchError(
            Code.NODE_ID_CONFLICT,
            f"{node_id} has a certificate already",
            hint=f"give this machine another --node-id, or `llorch token join --node {node_id}`",
        )


def _still_a_member(trust: Trust, principal: Principal, now: float) -> float:
    """When a node joined whose certificate is renewed. Raises UNAUTHENTICATED for one that is no good any more."""
    assert principal.joined is not None and principal.expires is not None and principal.node_id is not None
    why = trust.refusal(principal.node_id, principal.joined, principal.expires, now, principal.issuer)
    if why is not None:
        raise LlorchError(Code.UNAUTHENTICATED, why)
    return principal.joined
