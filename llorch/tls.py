"""TLS contexts, for the side that listens and the side that calls, and who a listener is by which name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import ssl
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from llorch.errors import ConfigError

CONTROL_NAME = "llorch.control"  # a control, to nodes: under this name it asks for their certificate
JOIN_NAME = "llorch.join"  # a control, to nodes that have none yet
BACKDATE_S = 300.0  # of every certificate: clocks of machines that have just started are wrong by minutes
TRUST_DOMAIN = "spiffe://llorch"


class Role(StrEnum):
    """What a certificate of the cluster is for."""

    CONTROL = "control"
    NODE = "node"


def spiffe_id(role: Role, name: str) -> str:
    return f"{TRUST_DOMAIN}/{role}/{name}"


def node_name(node_id: str) -> str:
    """The DNS name of a node in its certificate: an id may have letters that no host name has."""
    return f"{hashlib.sha256(node_id.encode()).hexdigest()[:40]}.node.llorch"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who showed a certificate of the cluster. Times are seconds since 1970.

    `joined`: of a node, when it came in with a token; what is renewed keeps it, whichever control renews.
    """

    role: Role
    name: str
    joined: float
    ends: float
    serial: str
    issuer: str  # the common name of the authority that signed it


def peer_of(connection: object) -> Peer | None:
    """Whose certificate a verified connection has shown; None if it had to show none. Cheap where it had not.

    Raises ValueError, which says why, for one that OpenSSL accepts and llorch does not.
    """
    if not isinstance(connection, ssl.SSLObject) or connection.context.verify_mode is ssl.CERT_NONE:
        return None
    shown: dict[str, Any] | None = connection.getpeercert()
    if not shown:
        return None
    names = [value for entry in shown.get("subject", ()) for key, value in entry if key == "commonName"]
    ids = [value for kind, value in shown.get("subjectAltName", ()) if kind == "URI"]
    if len(ids) != 1 or len(names) != 1:
        raise ValueError("the certificate has not one common name and one URI")
    role, slash, name = str(ids[0]).removeprefix(f"{TRUST_DOMAIN}/").partition("/")
    if not slash or ids[0] != f"{TRUST_DOMAIN}/{role}/{name}" or role not in list(Role):
        raise ValueError("the certificate's URI is none of this cluster's")
    if names[0] != name:
        raise ValueError("the certificate's common name and its URI differ")
    joined = [str(value) for entry in shown.get("subject", ()) for key, value in entry if key == "serialNumber"]
    if role == Role.NODE and not (len(joined) == 1 and joined[0].isascii() and joined[0].isdecimal()):
        raise ValueError("the certificate does not say when its node joined")
    ends = ssl.cert_time_to_seconds(str(shown["notAfter"]))
    signers = [value for entry in shown.get("issuer", ()) for key, value in entry if key == "commonName"]
    serial = str(shown.get("serialNumber", "")).lower().lstrip("0")
    return Peer(Role(role), name, float(*joined[:1]), ends, serial, str(*signers[:1]))


class Identities:
    """Who one listener is, by the name that a connection asks for: `named`, else `default`.

    Certificates change while it serves by assigning another context: a connection keeps what it was shown.
    """

    def __init__(self, default: ssl.SSLContext, named: Mapping[str, ssl.SSLContext] | None = None) -> None:
        self.default = default
        self.named: dict[str, ssl.SSLContext] = dict(named or {})

    def choose(self, server_name: str | None) -> ssl.SSLContext:
        return self.named.get(server_name.lower(), self.default) if server_name is not None else self.default


class NameReader:
    """Reads the server name out of a TLS greeting. OpenSSL does the reading, on bytes that were only peeked at.

    The certificate, and whether the client must show one, have to be settled before the handshake begins: in its midst
    OpenSSL lets the certificate be changed and not the demand.
    """

    def __init__(self) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.sni_callback = self._heard
        self._found: list[str | None] = []

    def read(self, hello: bytes) -> tuple[bool, str | None]:
        """(whether the greeting is whole or is none, the name in it)."""
        self._found.clear()
        incoming = ssl.MemoryBIO()
        incoming.write(hello)
        # A name that is not ASCII is none. Python can't raise that out of OpenSSL, and would print a traceback of it.
        unraisable, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            self._context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True).do_handshake()
        except ssl.SSLWantReadError:
            return False, None
        except ssl.SSLError:
            pass  # our own alert below; or no TLS, of which the real handshake will say so
        finally:
            sys.unraisablehook = unraisable
        return True, self._found[0] if self._found else None

    def _heard(self, _connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int:
        self._found.append(name)
        return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME  # far enough: no key is used


def why_refused(error: Exception) -> str | None:
    """Why a handshake failed, in words of ours or of OpenSSL's; None where the peer only went away."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or type(error).__name__
        return _REASONS.get(reason, reason.lower().replace("_", " "))
    return "no handshake in time" if isinstance(error, TimeoutError) else None


_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no client certificate",
    "HTTP_REQUEST": "plain HTTP on a TLS port",
    "WRONG_VERSION_NUMBER": "no TLS",
}


def server_context(cert_file: str, key_file: str) -> ssl.SSLContext:
    """For a listener. Raises ConfigError when the files can't be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION  # each costs us a handshake, and the client nothing
    try:
        # The pass phrase of an encrypted key would be asked for on the terminal, which a service does not have.
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
    except OSError as error:
        reason = _reason(error, "not a matching, unencrypted PEM pair")
        raise ConfigError(f"the certificate {cert_file} with key {key_file} can't be used: {reason}") from None
    return context


def mutual_server_context(cert_pem: bytes, key_pem: bytes, trusted_pem: bytes) -> ssl.SSLContext:
    """For a listener to which every peer has to show a certificate of the cluster."""
    context = cluster_server_context(cert_pem, key_pem)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=trusted_pem.decode("ascii"))
    context.num_tickets = 0  # a resumed session would not look at the certificate again
    return context


def cluster_server_context(cert_pem: bytes, key_pem: bytes) -> ssl.SSLContext:
    """For a listener that shows the cluster's own certificate and asks for none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, cert_pem, key_pem)
    return context


def cluster_client_context(
    trusted_pem: bytes, pair: tuple[bytes, bytes] | None = None, *, check: bool = True
) -> ssl.SSLContext:
    """For calls within the cluster: its authorities and no others; `pair` is our own certificate chain and key.

    Without `check` whoever answers is believed: for asking who it is, and nothing else.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if check:
        context.load_verify_locations(cadata=trusted_pem.decode("ascii"))
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if pair is not None:
        _load_pair(context, *pair)
    return context


def _load_pair(context: ssl.SSLContext, cert_pem: bytes, key_pem: bytes) -> None:
    """OpenSSL takes these from a file alone: one in memory where there is such a thing, else a private one."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("llorch", os.MFD_CLOEXEC)
        path = f"/proc/self/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp(prefix="llorch-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(cert_pem + key_pem)
            file.flush()
            context.load_cert_chain(path)
    finally:
        if not path.startswith("/proc/"):
            with contextlib.suppress(OSError):
                Path(path).unlink()


def _reason(error: OSError, if_tls: str) -> str:
    """An SSLError is an OSError whose words are OpenSSL's own; a file that can't be read has the system's."""
    return if_tls if isinstance(error, ssl.SSLError) else error.strerror or type(error).__name__


def client_context(ca_file: str | None, *, only: bool = False) -> ssl.SSLContext:
    """For calls: the system's authorities, and `ca_file` if one is given; that alone, if `only`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if only and ca_file else ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            reason = _reason(error, "no PEM certificate in it")
            raise ConfigError(f"the authority file {ca_file} can't be used: {reason}") from None
    return context
