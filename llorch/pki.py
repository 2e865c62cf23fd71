"""Certificates of the cluster: its authority, what it signs, and how a peer's certificate reads.

Owns the names in certificates: a role and a name as a SPIFFE id (spiffe://llorch/node/gpu-1), the node's id as common
name, and the DNS names under which roles find each other whatever their addresses are. Keys are P-256. Files belong to
`control/authority` and `node/certificate`; importing this costs 50 ms, so a role without certificates does not.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from llorch.errors import invalid
from llorch.tls import BACKDATE_S, CONTROL_NAME, JOIN_NAME, Role, node_name, spiffe_id

CA_LIFE_S = 10 * 365 * 86_400.0
MAX_PEM_BYTES = 64 * 1024
MAX_CSR_BYTES = 16 * 1024

Key: TypeAlias = ec.EllipticCurvePrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey
Cert: TypeAlias = x509.Certificate

# What `x509` raises for bytes that are no certificate or request; not all of it is a ValueError.
_UNREADABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def make_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key, passphrase: bytes | None = None) -> bytes:
    sealed = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealed)


def read_key(pem: bytes, passphrase: bytes | None = None) -> Key:
    """Raises ValueError for what is no P-256 key, or is locked with another passphrase."""
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except TypeError:  # encrypted and no passphrase given, or the other way round
        raise ValueError("it is encrypted" if passphrase is None else "it is not encrypted") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("no such key, or another passphrase") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("it is no P-256 key")
    return key


def key_digest(public: PublicKey) -> str:
    """SHA-256 of a key, in hex."""
    spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def derived(key: Key, purpose: bytes) -> str:
    """A secret (hex) that whoever holds a key has in common, for one purpose and no other."""
    private = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return hmac.new(private, purpose, hashlib.sha256).hexdigest()


def pem_of(certs: Iterable[Cert]) -> bytes:
    return b"".join(cert.public_bytes(serialization.Encoding.PEM) for cert in certs)


def read_certs(pem: bytes) -> list[Cert]:
    """The certificates of a PEM bundle. Raises ValueError if there is none, or something that is none."""
    if len(pem) > MAX_PEM_BYTES:
        raise ValueError("it is too large to be a bundle of certificates")
    try:
        certs = x509.load_pem_x509_certificates(pem)
        for cert in certs:
            _ = cert.subject, cert.extensions  # parsed at the first look, and raise there
    except _UNREADABLE as error:
        raise ValueError(f"it holds something that is no certificate: {error}") from None
    return certs


def sha256(cert: Cert) -> bytes:
    """The digest that join tokens and pins carry, of the whole certificate (DER)."""
    return hashlib.sha256(cert.public_bytes(serialization.Encoding.DER)).digest()


def pin_of(cert: Cert) -> str:
    """`sha256` in base64url without padding: 43 characters."""
    return base64.urlsafe_b64encode(sha256(cert)).rstrip(b"=").decode()


def bundle_id(certs: Iterable[Cert]) -> str:
    """A short name of what a bundle holds, whatever its order."""
    return hashlib.sha256(b"".join(sorted(map(sha256, certs)))).hexdigest()[:16]


def same_key(cert: Cert, key: Key) -> bool:
    return cert.public_key() == key.public_key()


def _when(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def begins(cert: Cert) -> float:
    return cert.not_valid_before_utc.timestamp()


def ends(cert: Cert) -> float:
    return cert.not_valid_after_utc.timestamp()


# ---------------------------------------------------------------- the authority


def make_authority(key: Key, now: float, *, life_s: float = CA_LIFE_S) -> Cert:
    """A self-signed authority. `now` in seconds since 1970."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"llorch cluster {_key_id(key.public_key()).hex()[:8]}")])
    return _authority(name, key.public_key(), name, key, now, life_s)


def cross_sign(new: Cert, old: Cert, old_key: Key) -> Cert:
    """The new authority's name and key under the old one's signature: who trusts only the old one trusts the new."""
    public = cast("PublicKey", new.public_key())
    now = begins(new) + BACKDATE_S
    return _authority(new.subject, public, old.subject, old_key, now, min(ends(new), ends(old)) - now)


def _authority(subject: x509.Name, public: PublicKey, issuer: x509.Name, key: Key, now: float, life_s: float) -> Cert:
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        _builder(subject, public, issuer, key.public_key(), now, life_s)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, public: PublicKey, issuer: x509.Name, signer: PublicKey, now: float, life_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_when(now - BACKDATE_S))
        .not_valid_after(_when(now + life_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _key_id(public: PublicKey) -> bytes:
    return x509.SubjectKeyIdentifier.from_public_key(public).digest


@dataclass(frozen=True, slots=True)
class Signer:
    """An authority and its key, ready to sign."""

    cert: Cert
    key: Key

    def issue(
        self,
        public: PublicKey,
        role: Role,
        name: str,
        dns: Sequence[str],
        now: float,
        life_s: float,
        joined: float | None = None,
    ) -> Cert:
        """A certificate for one role. `dns`: the names and addresses at which it may be served. `joined`: of a node."""
        ends_at = min(now + life_s, ends(self.cert))
        alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe_id(role, name))]
        alternatives += map(_general_name, dict.fromkeys(dns))
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=False, crl_sign=False, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False,
        )  # fmt: skip
        about = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        if joined is not None:
            about.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, str(int(joined))))
        return (
            _builder(x509.Name(about), public, self.cert.subject, self.key.public_key(), now, ends_at - now)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )

    def issue_node(
        self, public: PublicKey, node_id: str, now: float, life_s: float, joined: float | None = None
    ) -> Cert:
        """`joined`: when its node came in; now, if it has only just done."""
        came = now if joined is None else joined
        return self.issue(public, Role.NODE, node_id, [node_name(node_id)], now, life_s, came)

    def issue_control(self, public: PublicKey, name: str, names: Sequence[str], now: float, life_s: float) -> Cert:
        """`names`: beside its names in the cluster, those by which clients reach it."""
        return self.issue(public, Role.CONTROL, name, [CONTROL_NAME, JOIN_NAME, *names], now, life_s)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


# ---------------------------------------------------------------- requests


def make_request(key: Key, node_id: str) -> bytes:
    """A certificate signing request (PEM) for a node."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id)])
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> PublicKey:
    """The key that a request proves to hold. Nothing else in it is believed: names come from who was authenticated.

    Raises INVALID_REQUEST.
    """
    if len(pem) > MAX_CSR_BYTES:
        raise invalid("the certificate request is too large", param="csr")
    try:
        request = x509.load_pem_x509_csr(pem)
        public = request.public_key()
        proven = request.is_signature_valid
    except _UNREADABLE:
        raise invalid("this is no PKCS#10 certificate request in PEM", param="csr") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise invalid("the key of the certificate request is not P-256", param="csr")
    if not proven:
        raise invalid("the certificate request is not signed by its own key", param="csr")
    return public


# ---------------------------------------------------------------- a node looks at what it was given


def check_issued(cert: Cert, bundle: Sequence[Cert], key: Key, node_id: str) -> None:
    """That a certificate is this node's, for this key, by one of these authorities. Raises LlorchError."""
    if not same_key(cert, key):
        raise invalid("the certificate that was issued is for another key")
    if common_name(cert) != node_id:
        raise invalid("the certificate that was issued is for another node")
    if not any(_signed_by(cert, authority) for authority in bundle):
        raise invalid("the certificate that was issued is not by the cluster's authority")


def common_name(cert: Cert) -> str:
    """Empty if it has none, or several."""
    names = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _signed_by(cert: Cert, authority: Cert) -> bool:
    try:
        cert.verify_directly_issued_by(authority)
    except _UNREADABLE:
        return False
    return True


def matching(bundle: Sequence[Cert], digest: bytes) -> Cert | None:
    """The authority with this digest, of those that somebody who is not trusted yet has sent."""
    return next((cert for cert in bundle if sha256(cert) == digest), None)
