"""Exceptions of connections as people read them: why, and what mends it; nothing that a peer sent."""

from __future__ import annotations

import errno
import ssl

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey

from llorch.reach import why_unreachable

KEY = ConnectionKey("h", 1, True, True, None, None, None)


def certificate(message: str) -> aiohttp.ClientConnectorCertificateError:
    error = ssl.SSLCertVerificationError()
    error.verify_message = message
    return aiohttp.ClientConnectorCertificateError(KEY, error)


@pytest.mark.parametrize(
    ("error", "why", "hint"),
    [
        (aiohttp.ClientConnectorError(KEY, ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('h', 1)")),
         "Connection refused", "llorch control"),
        (aiohttp.ClientConnectorError(KEY, OSError("odd")), "the connection failed", "--join"),
        (aiohttp.ClientConnectorDNSError(KEY, OSError(-2, "x")), "the host name does not resolve", "--join"),
        (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError()), "the TLS handshake failed", "http://"),
        (certificate("self-signed certificate"), "can't be verified: self-signed certificate", "--tls-ca"),
        (certificate("Hostname mismatch, certificate is not valid for 'h'"), "Hostname mismatch", "host name"),
        (certificate("IP address mismatch"), "IP address mismatch", "host name"),
        (aiohttp.ConnectionTimeoutError(), "did not answer in time", "firewalls"),
        (TimeoutError(), "did not answer in time", "firewalls"),
        (aiohttp.ServerDisconnectedError(), "closed the connection", "https://"),
        (aiohttp.ClientPayloadError("what the peer sent"), "the connection was lost", "still running"),
        (ConnectionResetError("what the peer sent"), "the connection was lost", "still running"),
        (aiohttp.ClientResponseError(None, (), message="what the peer sent"), "does not speak HTTP", "port"),  # type: ignore[arg-type]
        (ssl.SSLCertVerificationError(), "can't be verified", "--tls-ca"),
        (ssl.SSLError(), "the TLS handshake failed", "http://"),
    ],
)  # fmt: skip
def test_every_failure_of_a_connection_says_why_and_what_to_do(error: Exception, why: str, hint: str) -> None:
    told = why_unreachable(error, "--join")
    assert why in told[0]
    assert hint in told[1]
    assert "what the peer sent" not in "".join(told)
    assert type(error).__name__ not in "".join(told)
