"""Packet filter rules from the settings of a role: what has to be open, to whom, and nothing else of llorch's.

Owns one nftables table, `inet llorch`, which judges the ports of llorch alone and may be loaded again and again. What
it accepts another table of the machine can still drop: so each opening comes with the words that open it in ufw. Never
loads anything. Syntax: https://wiki.nftables.org, nft(8).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llorch.config_kinds import HostPort, Network, is_loopback

TABLE = "inet llorch"


@dataclass(frozen=True, slots=True)
class Opening:
    """A port, and who may come in. `sources` None: everybody; empty: nobody. `named`: which they are, in words."""

    bind: HostPort
    purpose: str
    sources: tuple[Network, ...] | None
    named: tuple[str, ...] = ()


def rules(role: str, opening: Opening, notes: Sequence[str] = ()) -> str:
    """A file for `nft -f`."""
    bind, sources = opening.bind, opening.sources
    outside = not is_loopback(bind.host)
    lines = [
        "#!/usr/sbin/nft -f",
        f"# What may come in at this {role} of llorch: --bind {bind}.",
        "# `nft -c -f FILE` checks it, `nft -f FILE` loads it, also over an older one;",
        f"# `nft delete table {TABLE}` takes it away. Other tables keep their say: what they drop stays dropped.",
        *(f"# {note}" for note in notes),
        "",
        f"table {TABLE}",
        f"delete table {TABLE}",
        f"table {TABLE} {{",
    ]
    if outside and sources:
        lines += _sets(sources)
    lines += [
        "    chain input {",
        "        type filter hook input priority filter; policy accept;",
        "",
        "        # Commands on this machine; and engines, which listen on loopback and for nobody else.",
        '        iifname "lo" accept',
        "        ip daddr 127.0.0.0/8 drop",
        "        ip6 daddr ::1 drop",
        "",
        *(f"        {line}" for line in _judged(opening, outside=outside)),
        "    }",
        "}",
    ]
    if outside:
        lines += ["", "# The same openings where ufw keeps the rules:", *_ufw(opening)]
    return "".join(f"{line}\n" for line in lines)


def _judged(opening: Opening, *, outside: bool) -> list[str]:
    """The rules of one port."""
    bind, sources = opening.bind, opening.sources
    at = f"{_at(bind)}tcp dport {bind.port}"
    lines = [f"# {opening.purpose}"]
    if not outside:
        return [*lines, f"{at} drop"]
    lines += [f"#   {name}" for name in opening.named]
    if sources is None:
        return [*lines, f"{at} accept"]
    words = {"ip": 4, "ip6": 6} if not _at(bind) else {"ip": 4} if _at(bind).startswith("ip ") else {"ip6": 6}
    networks = _by_family(sources)
    lines += [f"{at} {word} saddr @from{version} accept" for word, version in words.items() if networks[version]]
    return [*lines, f"{at} drop"]


def _at(bind: HostPort) -> str:
    """A match for the one address that it listens on; nothing for a name, or for all addresses."""
    try:
        address = ipaddress.ip_address(bind.host.partition("%")[0])
    except ValueError:
        return ""
    if address.is_unspecified or address.is_loopback:
        return ""
    return f"{'ip' if address.version == 4 else 'ip6'} daddr {address} "


def _by_family(sources: Iterable[Network]) -> dict[int, list[Network]]:
    """Without what lies in another: nft refuses intervals that overlap."""
    found: dict[int, list[Network]] = {}
    four = [network for network in sources if isinstance(network, ipaddress.IPv4Network)]
    six = [network for network in sources if isinstance(network, ipaddress.IPv6Network)]
    found[4], found[6] = list(ipaddress.collapse_addresses(four)), list(ipaddress.collapse_addresses(six))
    return found


def show(network: Network) -> str:
    """One address without its prefix."""
    return str(network.network_address) if network.num_addresses == 1 else str(network)


def _sets(sources: tuple[Network, ...]) -> list[str]:
    lines = []
    for version, networks in _by_family(sources).items():
        if networks:
            lines += [
                f"    set from{version} {{",
                f"        type ipv{version}_addr",
                "        flags interval",
                f"        elements = {{ {', '.join(map(show, networks))} }}",
                "    }",
                "",
            ]
    return lines


def _ufw(opening: Opening) -> list[str]:
    port = opening.bind.port
    if opening.sources is None:
        return [f"#   ufw allow proto tcp to any port {port}"]
    networks = [network for family in _by_family(opening.sources).values() for network in family]
    allowed = [f"#   ufw allow proto tcp from {show(network)} to any port {port}" for network in networks]
    return allowed or [f"#   ufw deny proto tcp to any port {port}"]
