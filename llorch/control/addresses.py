"""Which advertised addresses a control may be made to dial.

Owns the rule that a registration cannot aim this control at itself, at a cloud's metadata service, at what is no
machine's address, or at any machine but its own: an address is the one that the registration came from, or lies in a
network that the settings name. Never resolves a name: whoever does checks the result with `check_ip`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import TypeAlias
from urllib.parse import SplitResult, urlsplit

from llorch.errors import Code, LlorchError

Ip: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# Clouds answer here with the machine's own credentials, or hand out its configuration. 169.254.169.254, the usual one,
# is link-local anyway.
_METADATA = frozenset(
    map(ipaddress.ip_address, ("169.254.169.254", "100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254"))
)
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
# An IPv4 address inside an IPv6 one, reached by somebody else's gateway: 6to4 and Teredo. (NAT64 and the old
# IPv4-compatible ones are reserved; an IPv4-mapped one is the IPv4 address itself.)
_TUNNELS = (ipaddress.ip_network("2002::/16"), ipaddress.ip_network("2001::/32"))
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\.?")
MAX_LABEL_CHARS = 63  # between two dots, as in RFC 1035; resolving anything else fails in ways of its own
_NUMERIC_TAIL = re.compile(r"(^|\.)(0[xX][0-9A-Fa-f]*|[0-9]+)\.?$")
_MEND = "advertise the address that this node registers from, or start the control with --node-cidr naming its network"


def _untrusted(why: str, hint: str | None = None) -> LlorchError:
    return LlorchError(Code.UNTRUSTED_ADDRESS, f"the address {why}", param="address", hint=hint)


def _parse(text: str | None) -> Ip | None:
    """An IP address, an IPv4-mapped one as the IPv4 address that it is; None for what is none."""
    try:
        ip = ipaddress.ip_address(text or "")
    except ValueError:
        return None
    return (isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped) or ip


def _nobodys(ip: Ip) -> str | None:
    """Why no machine of a cluster is ever dialled at this address, whatever the settings say."""
    if ip in _METADATA:
        return "is a cloud's metadata service"
    if ip.is_link_local or (isinstance(ip, ipaddress.IPv6Address) and ip.scope_id is not None):
        return "is link-local"
    if ip.is_multicast:
        return "is multicast"
    if any(ip in network for network in _TUNNELS):
        return "is an IPv4 address behind a gateway"
    if ip.is_unspecified or ip.is_reserved or ip in _THIS_NETWORK:
        return "is not a machine's address"
    return None


def check_ip(ip: str, peer: str | None, networks: Sequence[Network] = ()) -> None:
    """Refuse an IP address that a control must not be made to dial. Also for what a host name resolved to.

    `peer` is where the registration came from; `networks` are those of --node-cidr.
    """
    address, registered_from = _parse(ip), _parse(peer)
    if address is None:
        raise _untrusted("has no valid IP address")
    if address.is_loopback:
        if registered_from is None or not registered_from.is_loopback:
            raise _untrusted("is loopback, and the node is not on this machine")
        return
    why = _nobodys(address)
    if why is not None:
        raise _untrusted(why)
    if address != registered_from and not any(address in network for network in networks):
        raise _untrusted("is neither the one that this registration came from nor in --node-cidr", _MEND)


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


def host_of(address: str) -> str:
    """The host of an address that was accepted, as it is compared: lower case, no dot at the end."""
    return (_split(address).hostname or "").rstrip(".")


def check_address(address: str, peer: str | None, networks: Sequence[Network] = ()) -> None:
    """Refuse (UNTRUSTED_ADDRESS) an advertised "host:port" or URL that a control must not be made to dial.

    `peer` and `networks` are as for `check_ip`. A host name passes: whoever resolves it checks the result.
    """
    parts = _split(address)
    if parts.scheme not in ("", "http", "https"):
        raise _untrusted("is not http or https")
    if parts.username is not None or parts.password is not None:
        raise _untrusted("holds a user name or a password")
    if parts.query or parts.fragment:
        raise _untrusted("has a query or a fragment")
    host = parts.hostname or ""
    if _parse(host) is not None:
        check_ip(host, peer, networks)
        return
    # "127.1" and "0x7f000001" are no addresses by the book, but resolvers take them for one.
    name, registered_from = host.removesuffix("."), _parse(peer)
    labels_fit = all(0 < len(label) <= MAX_LABEL_CHARS for label in name.split("."))
    if not _HOST.fullmatch(host) or _NUMERIC_TAIL.search(host) or not labels_fit:
        raise _untrusted("has no valid host")
    at_home = registered_from is not None and registered_from.is_loopback
    if (name == "localhost" or name.endswith(".localhost")) and not at_home:
        raise _untrusted("is loopback, and the node is not on this machine")
