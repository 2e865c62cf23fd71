"""What goes wrong on the client's own side; what a control answered is a `ServerError`.

    ClientFault             message, why, hint: the three lines a person sees
    ├── Unreachable         no connection, no TLS, or no llorch behind it
    ├── StreamBroken        the stream ended after output began, and could not be taken up again
    └── TimedOut            the caller's own limit has passed

Owns turning a connection's exceptions into words. Quotes nothing that a peer sent.
"""

from __future__ import annotations

import os
import ssl

import aiohttp

from llorch import sse


class ClientFault(Exception):
    def __init__(self, message: str, *, why: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.why = why
        self.hint = hint


class Unreachable(ClientFault):
    pass


class StreamBroken(ClientFault):
    """`task_id` names the task whose output is cut off."""

    def __init__(self, message: str, *, task_id: str, why: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, why=why, hint=hint)
        self.task_id = task_id


class TimedOut(ClientFault):
    pass


def unreachable(url: str, error: Exception) -> Unreachable:
    """The fault for an exception of aiohttp's, or of the socket under it, at `url`."""
    why, hint = _words(error)
    return Unreachable(f"can't reach {url}", why=why, hint=hint)


def _words(error: Exception) -> tuple[str, str]:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return _certificate(error.certificate_error)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the host name does not resolve", "check the host in --url"
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return "the TLS handshake failed", "is it http:// rather than https://?"
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = os.strerror(error.os_error.errno) if error.os_error.errno else "the connection failed"
        return reason, "is `llorch control` running there? --url, LLORCH_URL or a context name it"
    if isinstance(error, (aiohttp.ServerTimeoutError, TimeoutError)):
        return "it did not answer in time", "check the host, the port and the firewalls between"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection without an answer", "is it https:// rather than http://?"
    if isinstance(error, aiohttp.ClientResponseError):
        return "what answers there does not speak HTTP", "check the port in --url"
    if isinstance(error, sse.SseError):
        return "what it sent is no stream of events", "check the host and the port in --url"
    return "the connection was lost", "is `llorch control` still running there?"


def _certificate(error: Exception) -> tuple[str, str]:
    said = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else ""
    why = f"its certificate can't be verified: {said}" if said else "its certificate can't be verified"
    if "hostname" in said.lower() or "ip address" in said.lower():
        return why, "use the host name that the certificate is for"
    return why, "give the authority that signed it: --tls-ca FILE"
