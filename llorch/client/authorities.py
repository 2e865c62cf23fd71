"""A cluster's authority, fetched from whoever answers at a URL and believed for its digest alone."""

from __future__ import annotations

import asyncio
import base64
import binascii

import aiohttp

from llorch import pki, tls, web
from llorch.client.faults import Unreachable, unreachable
from llorch.errors import ConfigError

TIMEOUT_S = 10.0


def read_pin(text: str) -> bytes:
    """A SHA-256 as `llorch certs status` shows it (base64url), or in hex with or without colons. Raises ConfigError."""
    plain = text.strip().removeprefix("sha256:").removeprefix("SHA256:")
    try:
        if len(plain.replace(":", "")) == 64:
            return bytes.fromhex(plain.replace(":", ""))
        digest = base64.urlsafe_b64decode(plain.rstrip("=") + "=" * (-len(plain.rstrip("=")) % 4))
    except (ValueError, binascii.Error):
        digest = b""
    if len(digest) != 32:
        raise ConfigError("this is no SHA-256", hint="`llorch certs status` on the control shows the authority's")
    return digest


async def fetch_authority(url: str, pin: str) -> bytes:
    """The authority (PEM) with this digest. Raises ConfigError if what answers has none such, or Unreachable."""
    digest = read_pin(pin)
    if not url.startswith("https://"):
        raise ConfigError(f"{url} is not https://, so there is no authority to pin")
    anybody = tls.cluster_client_context(b"", check=False)
    try:
        async with (
            asyncio.timeout(TIMEOUT_S),
            web.client_session(tls=anybody) as session,
            session.get(f"{url.rstrip('/')}/cacerts", allow_redirects=False) as response,
        ):
            raw = bytearray()
            async for part in response.content.iter_any():
                raw += part
                if len(raw) > pki.MAX_PEM_BYTES:
                    break
            certs = pki.read_certs(bytes(raw)) if response.status == 200 else []
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise unreachable(url, error) from None
    except ValueError:
        certs = []
    found = pki.matching(certs, digest)
    if found is None:
        raise Unreachable(
            f"{url} is not the cluster with this authority",
            why="none of the certificates that it showed has this digest",
            hint="check the URL and the digest: `llorch certs status` on the control shows it",
        )
    return pki.pem_of([found])
