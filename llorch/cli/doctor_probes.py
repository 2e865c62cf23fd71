"""The looks of `llorch doctor` at the network: a name, its addresses, a TLS handshake, an answer. Facts, no judgement.

Owns the limit of each, and that a look which hangs can't keep the process: what blocks runs in threads that nobody
waits for at the end. Sends a token only where it is handed one; follows no redirect; reads so much and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

from llorch.cli.doctor_reach_findings import Answer, Certificate, Handshake, Lookup, Met, Peer, Try, shown

if TYPE_CHECKING:
    import aiohttp

    from llorch.pki import Cert

LOOKUP_S = 4.0  # a resolver asks its second server after five: a first one that is dead is worth telling
CONNECT_S = 2.5  # a second SYN goes out after one
HANDSHAKE_S = 2.5
ANSWER_S = 2.5
MAX_ADDRESSES = 4
MAX_ANSWER_BYTES = 4 * 1024 * 1024
_NO_WAY = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM})

T = TypeVar("T")


async def in_thread(work: Callable[[], T], limit_s: float) -> T:
    """What `work` gives. Raises TimeoutError; `work` then goes on alone, and ends with the process."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if not outcome.done():
            if error is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except Exception as failed:  # it belongs to whoever waits
            error = failed
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="doctor", daemon=True).start()
    async with asyncio.timeout(limit_s):
        return await outcome


# ---------------------------------------------------------------- name and connection


async def lookup(host: str) -> Lookup:
    def ask() -> Lookup:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return Lookup(tuple(dict.fromkeys(str(address[0]) for *_, address in found)))

    try:
        return await in_thread(ask, LOOKUP_S)
    except TimeoutError:
        return Lookup(why=f"no answer within {LOOKUP_S:.0f} s")
    except (OSError, UnicodeError) as error:
        return Lookup(why=(getattr(error, "strerror", None) or "it is no host name").lower())


async def connect(addresses: tuple[str, ...], port: int) -> tuple[Try, ...]:
    """One connection to each, all at once, closed again."""
    return tuple(await asyncio.gather(*(_try(address, port) for address in addresses[:MAX_ADDRESSES])))


async def _try(address: str, port: int) -> Try:
    def open_and_close() -> None:
        socket.create_connection((address, port), timeout=CONNECT_S).close()

    try:
        await in_thread(open_and_close, CONNECT_S + 0.2)
    except TimeoutError:
        return Try(address, Met.SILENCE)
    except ConnectionRefusedError:
        return Try(address, Met.REFUSED)
    except OSError as error:
        met = Met.NO_WAY if error.errno in _NO_WAY else Met.REFUSED
        return Try(address, met, (error.strerror or type(error).__name__).lower())
    return Try(address, Met.OPEN)


# ---------------------------------------------------------------- TLS


async def handshake(address: str, port: int, context: ssl.SSLContext, server_name: str) -> Handshake:
    """As a caller with this `context` meets it; a certificate that it does not believe is looked at all the same."""
    try:
        return await in_thread(lambda: _handshake(address, port, context, server_name), HANDSHAKE_S + 0.2)
    except TimeoutError:
        return Handshake(why=f"no answer to the handshake within {HANDSHAKE_S:.0f} s")


def _handshake(address: str, port: int, context: ssl.SSLContext, server_name: str) -> Handshake:
    until = time.monotonic() + HANDSHAKE_S
    try:
        return Handshake(_shown(address, port, context, server_name, until))
    except ssl.SSLCertVerificationError as error:
        code, said = error.verify_code, error.verify_message
    except (OSError, ValueError) as error:
        return Handshake(why=_why_no_tls(error))
    from llorch.tls import cluster_client_context

    try:
        anybody = cluster_client_context(b"", check=False)
        return Handshake(_shown(address, port, anybody, server_name, until), code, said)
    except (OSError, ValueError) as error:
        return Handshake(why=_why_no_tls(error))


def _shown(address: str, port: int, context: ssl.SSLContext, server_name: str, until: float) -> Certificate | None:
    """The certificate that is shown. Raises OSError, which SSLError is, and TimeoutError."""
    with socket.create_connection((address, port), timeout=max(0.1, until - time.monotonic())) as sock:
        sock.settimeout(max(0.1, until - time.monotonic()))
        with context.wrap_socket(sock, server_hostname=server_name) as secure:
            der = secure.getpeercert(binary_form=True)
    if der is None:
        return None
    from cryptography import x509

    return read_certificate(x509.load_der_x509_certificate(der))


def read_certificate(cert: Cert) -> Certificate:
    """Raises ValueError for one that can't be read."""
    from cryptography import x509

    from llorch import pki

    names: tuple[str, ...] = ()
    with contextlib.suppress(x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        named = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        addresses = (str(ip) for ip in named.get_values_for_type(x509.IPAddress))
        names = (*named.get_values_for_type(x509.DNSName), *addresses)
    return Certificate(
        _name(cert.subject), _name(cert.issuer), names, pki.begins(cert), pki.ends(cert)
    )  # fmt: skip


def _name(name: object) -> str:
    """A common name, or the whole where there is none."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    assert isinstance(name, x509.Name)
    common = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(common[0].value) if common else name.rfc4514_string() or "nobody"


def _why_no_tls(error: Exception) -> str:
    """Quotes nothing that was received."""
    from llorch.tls import why_refused

    if isinstance(error, TimeoutError):
        return f"no answer to the handshake within {HANDSHAKE_S:.0f} s"
    if isinstance(error, ssl.SSLError):
        said = why_refused(error) or "the handshake failed"
        return "plain text instead of TLS" if said in ("no TLS", "http request", "record layer failure") else said
    if isinstance(error, OSError):
        return (error.strerror or "the connection was closed in the handshake").lower()
    return "its certificate can't be read"


# ---------------------------------------------------------------- HTTP


@dataclass(frozen=True, slots=True)
class Asker:
    """Questions to one peer at one address, so that a name is looked up once. `server_name`: whom TLS has to show."""

    session: aiohttp.ClientSession
    peer: Peer
    address: str
    server_name: str | None = None

    async def ask(self, path: str, headers: Mapping[str, str] | None = None, *, raw: bool = False) -> Answer:
        """`raw`: the body as bytes, whatever it is."""
        import aiohttp

        peer = self.peer
        host = f"[{self.address}]" if ":" in self.address else self.address
        url = f"{'https' if peer.secure else 'http'}://{host}:{peer.port}{peer.base}{path}"
        named = f"[{peer.host}]" if ":" in peer.host else peer.host
        sent = {"Host": f"{named}:{peer.port}", **(headers or {})}
        secure: dict[str, str] = {"server_hostname": self.server_name or peer.host} if peer.secure else {}
        before = time.time()
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                self.session.request("GET", url, headers=sent, allow_redirects=False, **secure) as response,  # type: ignore[arg-type]
            ):
                skew_s = _skew(response.headers.get("Date"), before, time.time())
                body = bytearray()
                async for part in response.content.iter_any():
                    body += part
                    if len(body) > MAX_ANSWER_BYTES:
                        return Answer(response.status, why="its answer is too large", skew_s=skew_s)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            from llorch.reach import why_unreachable

            return Answer(why=shown(why_unreachable(error, peer.setting)[0]))
        return Answer(response.status, bytes(body) if raw else _json(bytes(body)), skew_s=skew_s)


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _skew(date: str | None, before: float, after: float) -> float | None:
    """How far the peer's clock is ahead, in seconds, by its Date header: that is cut to whole seconds, and was made at
    some moment of ours between `before` and `after`. 0 where that explains it.
    """
    try:
        theirs = parsedate_to_datetime(date).timestamp() if date is not None else None
    except (ValueError, TypeError, OverflowError):
        return None
    if theirs is None:
        return None
    if theirs + 1 < before:
        return theirs + 1 - before
    return max(0.0, theirs - after)


# ---------------------------------------------------------------- addresses of this machine


def is_own(address: str) -> bool:
    """Whether an address is this machine's. Nothing is sent: only such a one can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


async def addresses_of(host: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the addresses of a host, those of them that are this machine's)."""
    found = (await lookup(host)).addresses
    return found, tuple(address for address in found if is_own(address))


def errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, os.strerror(error.errno or 0))
