"""The names and addresses of a control's machine, as far as others may reach it by them."""

from __future__ import annotations

import socket

from llorch.config import ControlSettings


def names_here(settings: ControlSettings) -> list[str]:
    """The names and addresses by which clients may reach this machine, for the cluster's own certificate."""
    names = ["localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn(), *settings.tls_names]
    if settings.bind.everywhere:
        names += primary_addresses()
    else:
        names.append(settings.bind.host)
    return [name for name in dict.fromkeys(names) if name and name.isascii() and len(name) <= 253]


def primary_addresses() -> list[str]:
    """The addresses from which this machine reaches others. Nothing is sent: a UDP socket that connects has a route."""
    found: list[str] = []
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((far, 9))
                found.append(str(sock.getsockname()[0]))
        except OSError:
            continue
    return found
