"""What a connection's exceptions are in words: what failed, why, what to do; nothing that a peer sent."""

from __future__ import annotations

import errno
import ssl
from typing import Any

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey

from llorch import sse
from llorch.client.faults import ClientFault, unreachable

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
        (aiohttp.ClientConnectorError(KEY, OSError("odd")), "the connection failed", "--url"),
        (aiohttp.ClientConnectorDNSError(KEY, OSError(-2, "x")), "the host name does not resolve", "host"),
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
        (sse.SseError("what the peer sent"), "no stream of events", "port"),
    ],
)  # fmt: skip
def test_every_failure_of_a_connection_says_why_and_what_to_do(error: Exception, why: str, hint: str) -> None:
    fault: Any = unreachable("http://h:1", error)
    assert isinstance(fault, ClientFault)
    assert fault.message == "can't reach http://h:1"
    assert why in fault.why
    assert hint in fault.hint
    assert "what the peer sent" not in fault.why + fault.hint
