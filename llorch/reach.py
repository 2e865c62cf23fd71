"""Why a peer can't be reached: a connection's exceptions in words, for people who have to mend it.

Quotes nothing that a peer sent.
"""

from __future__ import annotations

import os
import ssl

import aiohttp

AUTHORITY_HINT = "give the authority that signed it: --tls-ca FILE"


def why_unreachable(error: Exception, given_by: str, authority: str = AUTHORITY_HINT) -> tuple[str, str]:
    """Why, and what mends it, for an exception of aiohttp's or of its socket. `given_by` is what holds the URL, and
    `authority` what mends an authority that is not known.
    """
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return _certificate(error.certificate_error, authority)
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate(error, authority)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the host name does not resolve", f"check the host in {given_by}"
    if isinstance(error, (aiohttp.ClientConnectorSSLError, ssl.SSLError)):
        return "the TLS handshake failed", "is it http:// rather than https://?"
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = os.strerror(error.os_error.errno) if error.os_error.errno else "the connection failed"
        return reason, f"is `llorch control` running there? the URL is from {given_by}"
    if isinstance(error, (aiohttp.ServerTimeoutError, TimeoutError)):
        return "it did not answer in time", "check the host, the port and the firewalls between"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection without an answer", "is it https:// rather than http://?"
    if isinstance(error, aiohttp.ClientResponseError):
        return "what answers there does not speak HTTP", f"check the port in {given_by}"
    return "the connection was lost", "is `llorch control` still running there?"


def _certificate(error: Exception, authority: str) -> tuple[str, str]:
    said = str(getattr(error, "verify_message", ""))
    why = f"its certificate can't be verified: {said}" if said else "its certificate can't be verified"
    if "hostname" in said.lower() or "ip address" in said.lower():
        return why, "use the host name that the certificate is for"
    return why, authority
