"""A node's own certificate: on disk, in force, and when it has to be renewed.

    <data>/pki/node.pem  0600  its key, its certificate and what leads from it to an authority, then the authorities;
                               and the SHA-256 of the join token that it came with

Owns the file and the TLS contexts that are made of it. Getting a certificate is `join`'s. Whoever holds the file is the
node, until its certificate is revoked at a control.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass, replace
from pathlib import Path

from llorch import pki, private, tls
from llorch.auth import digest
from llorch.errors import ConfigError, LlorchError
from llorch.pki import Cert, Key

DIRECTORY, FILE_NAME = "pki", "node.pem"
_NOTE = "joined with "
RENEW_AFTER = 2 / 3  # of its life
RENEW_JITTER = 0.05  # of its life, before or after: nodes that joined together do not renew together

_KEY = re.compile(rb"-----BEGIN PRIVATE KEY-----.*?-----END PRIVATE KEY-----\n?", re.S)


@dataclass(frozen=True, slots=True)
class Holding:
    """What a node holds at one moment."""

    key: Key
    chain: tuple[Cert, ...]  # its own certificate first
    authorities: tuple[Cert, ...]
    came_with: str = ""

    @property
    def cert(self) -> Cert:
        return self.chain[0]

    @property
    def pair(self) -> tuple[bytes, bytes]:
        return pki.pem_of(self.chain), pki.key_pem(self.key)

    def to_pem(self) -> bytes:
        note = f"{_NOTE}{self.came_with}\n".encode()
        return note + pki.key_pem(self.key) + pki.pem_of((*self.chain, *self.authorities))

    @classmethod
    def of(cls, key: Key, chain_pem: bytes, authorities_pem: bytes, node_id: str) -> Holding:
        """What a control answered, checked. Raises ValueError or LlorchError."""
        chain, authorities = pki.read_certs(chain_pem), pki.read_certs(authorities_pem)
        pki.check_issued(chain[0], authorities, key, node_id)
        return cls(key, tuple(chain), tuple(authorities))


class NodeCertificate:
    """Use `load` or `take`. `outgoing` and `listening` are contexts of the newest certificate."""

    def __init__(self, node_id: str, path: Path, holding: Holding) -> None:
        self.node_id = node_id
        self._path = path
        self.wanted = asyncio.Event()  # something has to be renewed before its time
        self._heard = ""
        self._use(holding)

    def _use(self, holding: Holding) -> None:
        trusted = pki.pem_of(holding.authorities)
        self.outgoing = tls.cluster_client_context(trusted, holding.pair)
        self.listening = tls.mutual_server_context(*holding.pair, trusted)
        self.shown = tls.cluster_server_context(*holding.pair)
        self.holding = holding

    @classmethod
    def load(cls, data_dir: str | Path, node_id: str) -> NodeCertificate | None:
        """The one on disk; None if there is none. Raises ConfigError if it is another's or can't be read."""
        held = cls.load_any(data_dir)
        if held is not None and held.node_id != node_id:
            raise ConfigError(
                f"the certificate in {held._path} is for {held.node_id}, not for {node_id}",
                hint=f"--node-id {held.node_id}, or another --data-dir; or move the file away and join again",
            )
        return held

    @classmethod
    def load_any(cls, data_dir: str | Path) -> NodeCertificate | None:
        """The same, whoever it is for."""
        path = Path(data_dir).expanduser() / DIRECTORY / FILE_NAME
        data = private.read(path)
        if data is None:
            return None
        try:
            found = _KEY.search(data)
            if found is None:
                raise ValueError("there is no key in it")
            certs = pki.read_certs(_KEY.sub(b"", data))
            authorities = tuple(cert for cert in certs if cert.issuer == cert.subject)
            chain = tuple(cert for cert in certs if cert.issuer != cert.subject)
            if not chain:
                raise ValueError("there is no certificate in it")
            note = data.partition(b"\n")[0].decode("ascii", "replace")
            holding = Holding(pki.read_key(found[0]), chain, authorities, note.removeprefix(_NOTE))
            node_id = pki.common_name(chain[0])
            pki.check_issued(chain[0], authorities, holding.key, node_id)
        except LlorchError as error:
            raise ConfigError(
                f"the certificate in {path} can't be used: {error.message}", hint="move the file away and join again"
            ) from None
        except ValueError as error:
            raise ConfigError(
                f"the certificate in {path} can't be used: {error}", hint="move the file away and join again"
            ) from None
        return cls(node_id, path, holding)

    @classmethod
    def take(cls, data_dir: str | Path, node_id: str, holding: Holding, token: str) -> NodeCertificate:
        """Keep a first certificate. Blocking. Raises ConfigError if it can't be written."""
        path = Path(data_dir).expanduser() / DIRECTORY / FILE_NAME
        private.make_directory(path.parent)
        holding = replace(holding, came_with=digest(token).hex())
        certificate = cls(node_id, path, holding)
        certificate._store(holding)
        return certificate

    def replace(self, holding: Holding) -> None:
        """A newer certificate, in force for every connection from now on. Blocking. Raises ConfigError."""
        holding = replace(holding, came_with=self.holding.came_with)
        self._store(holding)
        self._use(holding)

    def _store(self, holding: Holding) -> None:
        try:
            private.write(self._path, holding.to_pem())
        except OSError as error:
            raise ConfigError(f"{self._path} can't be written: {error.strerror}", hint="make room there") from None

    def came_with(self, token: str) -> bool:
        """Whether this is what the token was used for."""
        return self.holding.came_with == digest(token).hex()

    # ------------------------------------------------------------ time

    def expired(self, now: float) -> bool:
        return now >= self.ends

    @property
    def ends(self) -> float:
        return pki.ends(self.holding.cert)

    def renew_at(self, random: float) -> float:
        """When to renew, in seconds since 1970. `random` is between 0 and 1."""
        begins = pki.begins(self.holding.cert) + tls.BACKDATE_S
        life = self.ends - begins
        return begins + life * (RENEW_AFTER + RENEW_JITTER * (2 * random - 1))

    def heard(self, authorities: str) -> None:
        """A control's short name for the bundle of today: another one than ours means that it is time to renew."""
        if authorities != pki.bundle_id(self.holding.authorities) and authorities != self._heard:
            self._heard = authorities
            self.wanted.set()

    def identities(self, own: ssl.SSLContext | None) -> tls.Identities:
        """For this node's listener: to controls, which call it by its name in the cluster, with certificates on both
        sides; to others `own`, or the cluster's certificate.
        """
        return tls.Identities(own or self.shown, {tls.node_name(self.node_id): self.listening})
