"""Where an engine listens, as the kernel knows it: whatever its flags say, its own sockets tell the truth.

Surface:
    exposed(pid, port)  the addresses beyond loopback at which a process, or one of its session, listens for TCP
    holder(pid, port)   whether a loopback port is a process's own, or one's that it started
    session(pid)        the processes of the session that a process leads
    listening(table)    the listening sockets of a /proc/net/tcp or tcp6

Owns the reading of /proc (Linux; elsewhere nothing is found, nor of a program that may not be looked into: its flags
are then all there is). Blocking and short. Never ends anything.
Format: Documentation/networking/proc_net_tcp.rst of the kernel.
"""

from __future__ import annotations

import contextlib
import ipaddress
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

LISTEN = "0A"
PARENT_FIELD, SESSION_FIELD = 1, 3  # of /proc/PID/stat, counted behind the name
PROC = Path("/proc")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def exposed(pid: int, only_port: int | None = None) -> list[str]:
    """`address:port` of each, sorted; of one port alone where an engine can't help having others (PyTorch's store).
    An engine leads a session of its own, so its helpers are found by that.
    """
    inodes = {inode for member in session(pid) for inode in _sockets(member)}
    found = set()
    for name in ("tcp", "tcp6"):  # of the engine's own network namespace
        with contextlib.suppress(OSError):
            for inode, address, port in listening((PROC / str(pid) / "net" / name).read_text()):
                if inode in inodes and not _loopback(address) and only_port in (None, port):
                    found.add(f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}")
    return sorted(found)


class Holder(StrEnum):
    """Whose a port is."""

    ITS = "its"
    NOBODY = "nobody"
    OTHER = "other"
    UNKNOWN = "unknown"  # no Linux, or the process may not be looked into


def holder(pid: int, port: int) -> Holder:
    """Who takes what is sent to 127.0.0.1:`port` from here: what listens there, else what listens everywhere."""
    exact, any_address, seen = set[str](), set[str](), False
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for inode, address, at in listening((PROC / "self" / "net" / name).read_text()):
                if at == port and str(address) in ("127.0.0.1", "::ffff:127.0.0.1"):
                    exact.add(inode)
                elif at == port and address.is_unspecified:
                    any_address.add(inode)
            seen = True
    wanted = exact or any_address
    if not wanted:
        return Holder.NOBODY if seen else Holder.UNKNOWN
    own: set[str] = set()
    for member in _tree(pid):
        try:
            next((PROC / str(member) / "fd").iterdir(), None)
        except PermissionError:
            return Holder.UNKNOWN
        except OSError:
            continue
        own.update(_sockets(member))
    return Holder.ITS if wanted <= own else Holder.OTHER


def listening(table: str) -> Iterator[tuple[str, Address, int]]:
    """(inode, address, port) of each listening socket. Lines that can't be read are passed over."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == LISTEN:
            with contextlib.suppress(ValueError):
                host, _, port = fields[1].partition(":")
                yield fields[9], _address(host), int(port, 16)


def _address(text: str) -> Address:
    """The kernel prints each 32-bit word of an address as a number of this machine's byte order."""
    raw = bytes.fromhex(text)
    words = (raw[at : at + 4] for at in range(0, len(raw), 4))
    return ipaddress.ip_address(b"".join(word[::-1] if sys.byteorder == "little" else word for word in words))


def _loopback(address: Address) -> bool:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def session(pid: int) -> Iterator[int]:
    """The processes of the session that a process leads, itself first, whether or not it is there."""
    yield pid
    if not PROC.is_dir():
        return
    for entry in PROC.iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended, or is no process
            member = int(entry.name)
            if int((entry / "stat").read_bytes().rpartition(b")")[2].split()[SESSION_FIELD]) == pid != member:
                yield member


def _tree(pid: int) -> set[int]:
    """A process, its session, and whatever any of them has started."""
    parents: dict[int, list[int]] = {}
    found, todo = {pid}, [pid]
    for entry in PROC.iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            member = int(entry.name)
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            parents.setdefault(int(fields[PARENT_FIELD]), []).append(member)
            if int(fields[SESSION_FIELD]) == pid:
                todo.append(member)
    while todo:
        member = todo.pop()
        found.add(member)
        todo += [child for child in parents.get(member, ()) if child not in found]
    return found


def _sockets(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(entry.readlink())
                if target.startswith("socket:["):
                    yield target[len("socket:[") : -1]
