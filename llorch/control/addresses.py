"""Which advertised addresses a control may be made to dial.

Owns the rule that a registration cannot aim this control at itself, at a cloud's metadata service, or at what is no
machine's address. Never resolves a name: whoever does checks the result with `check_ip`.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TypeAlias
from urllib.parse import SplitResult, urlsplit

from llorch.errors import Code, LlorchError

Ip: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

# Clouds answer here with the machine's own credentials; 169.254.169.254, the usual one, is link-local anyway.
_METADATA = frozenset(map(ipaddress.ip_address, ("169.254.169.254", "100.100.100.200", "fd00:ec2::254")))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\.?")
MAX_LABEL_CHARS = 63  # between two dots, as in RFC 1035; resolving anything else fails in ways of its own
_NUMERIC_TAIL = re.compile(r"(^|\.)(0[xX][0-9A-Fa-f]*|[0-9]+)\.?$")


def _untrusted(why: str) -> LlorchError:
    return LlorchError(Code.UNTRUSTED_ADDRESS, f"the address {why}", param="address")


def _plain(ip: Ip) -> Ip:
    """The IPv4 address that an IPv6 one stands for, if it does: mapped, 6to4 or NAT64."""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        return ip.ipv4_mapped or ip.sixtofour or ip
    return ip


def _loopback(peer: str | None) -> bool:
    try:
        return peer is not None and _plain(ipaddress.ip_address(peer)).is_loopback
    except ValueError:
        return False


def check_ip(ip: str, peer: str | None) -> None:
    """Refuse an IP address that a control must not be made to dial. Also for what a host name resolved to."""
    try:
        plain = _plain(ipaddress.ip_address(ip))
    except ValueError:
        raise _untrusted("has no valid IP address") from None
    if plain.is_loopback:
        if not _loopback(peer):
            raise _untrusted("is loopback, and the node is not on this machine")
    elif plain in _METADATA:
        raise _untrusted("is a cloud's metadata service")
    elif plain.is_link_local:
        raise _untrusted("is link-local")
    elif plain.is_multicast:
        raise _untrusted("is multicast")
    elif plain.is_unspecified or (plain.version == 4 and (plain in _THIS_NETWORK or plain.is_reserved)):
        raise _untrusted("is not a machine's address")


def _split(address: str) -> SplitResult:
    if not address.isascii() or not address.isprintable() or set(address) & set(" \\"):
        raise _untrusted("has characters that no URL has")
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        port = parts.port
    except ValueError:
        raise _untrusted("is neither host:port nor a URL") from None
    if not parts.scheme and (port is None or parts.path):
        raise _untrusted("is neither host:port nor a URL")
    if port == 0:
        raise _untrusted("has port 0")
    return parts


def check_address(address: str, peer: str | None) -> None:
    """Refuse (UNTRUSTED_ADDRESS) an advertised "host:port" or URL that a control must not be made to dial.

    `peer` is the IP that the registration came from. A host name passes: whoever resolves it checks the result with
    `check_ip`.
    """
    parts = _split(address)
    if parts.scheme not in ("", "http", "https"):
        raise _untrusted("is not http or https")
    if parts.username is not None or parts.password is not None:
        raise _untrusted("holds a user name or a password")
    if parts.query or parts.fragment:
        raise _untrusted("has a query or a fragment")
    host = parts.hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # "127.1" and "0x7f000001" are no addresses by the book, but resolvers take them for one.
        name = host.removesuffix(".")
        labels = name.split(".")
        if (
            not _HOST.fullmatch(host)
            or _NUMERIC_TAIL.search(host)
            or not all(0 < len(label) <= MAX_LABEL_CHARS for label in labels)
        ):
            raise _untrusted("has no valid host") from None
        if (name == "localhost" or name.endswith(".localhost")) and not _loopback(peer):
            raise _untrusted("is loopback, and the node is not on this machine") from None
    else:
        check_ip(host, peer)
