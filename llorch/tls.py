"""TLS contexts, for the side that listens and the side that calls, and who a listener is by which name."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Mapping

from llorch.errors import ConfigError


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
    try:
        # The pass phrase of an encrypted key would be asked for on the terminal, which a service does not have.
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
    except OSError as error:
        reason = _reason(error, "not a matching, unencrypted PEM pair")
        raise ConfigError(f"the certificate {cert_file} with key {key_file} can't be used: {reason}") from None
    return context


def _reason(error: OSError, if_tls: str) -> str:
    """An SSLError is an OSError whose words are OpenSSL's own; a file that can't be read has the system's."""
    return if_tls if isinstance(error, ssl.SSLError) else error.strerror or type(error).__name__


def client_context(ca_file: str | None) -> ssl.SSLContext:
    """For calls: the system's authorities, and `ca_file` if one is given."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            reason = _reason(error, "no PEM certificate in it")
            raise ConfigError(f"the authority file {ca_file} can't be used: {reason}") from None
    return context
