"""Exceptions of connections as people read them: why, and what mends it."""

from __future__ import annotations

import errno
import ssl
from types import SimpleNamespace

import aiohttp
import pytest

from llorch.reach import why_unreachable

KEY = SimpleNamespace(ssl=True, host="desk", port=8080, is_ssl=True)


def certificate(said: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, said)
    error.verify_message = said
    return error


@pytest.mark.parametrize(
    ("error", "why", "hint"),
    [
        (
            aiohttp.ClientConnectorCertificateError(KEY, certificate("self-signed certificate")),
            "self-signed",
            "--tls-ca",
        ),
        (certificate("IP address mismatch, certificate is not valid for '10.0.0.1'."), "IP address", "host name"),
        (aiohttp.ClientConnectorDNSError(KEY, OSError(-2, "?")), "does not resolve", "--join"),
        (aiohttp.ClientConnectorSSLError(KEY, OSError(1, "?")), "TLS handshake", "http://"),
        (aiohttp.ClientConnectorError(KEY, OSError(errno.ECONNREFUSED, "?")), "Connection refused", "llorch control"),
        (TimeoutError(), "in time", "firewalls"),
        (aiohttp.ServerDisconnectedError(), "without an answer", "https://"),
        (ConnectionResetError(), "was lost", "llorch control"),
    ],
)
def test_every_way_not_to_reach_a_peer_says_why_and_what_to_do(error: Exception, why: str, hint: str) -> None:
    told = why_unreachable(error, "--join")
    assert why in told[0]
    assert hint in told[1]
    assert type(error).__name__ not in "".join(told)
