"""The looks of `llorch doctor` at this machine: directories, files, ports, limits, inotify. Facts, no judgement.

Changes nothing: no file is made, and a port that is tried is let go at once. Blocking: disks and mounts may hang, so
each is called in a thread of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

from llorch.cli.doctor_findings import Directory, Port, SecretFile, Use
from llorch.cli.doctor_node_findings import Watch
from llorch.cli.doctor_probes import errno_name
from llorch.config_kinds import HostPort

MAX_NAMED = 3  # a server may have many workers on one socket
_LISTENS = "0A"  # TCP_LISTEN in /proc/net/tcp, include/net/tcp_states.h
_IN_CREATE = 0x100  # sys/inotify.h


# ---------------------------------------------------------------- files


def look_at_directory(given: Path) -> Directory:
    path = given.absolute()
    there = path.exists()
    above = next(one for one in (path, *path.parents) if one.exists())
    facts = above.stat()
    space = os.statvfs(above)
    read_only = bool(space.f_flag & os.ST_RDONLY)
    return Directory(
        path=str(path),
        there=there,
        is_directory=stat.S_ISDIR(facts.st_mode),
        above="" if there else str(above),
        writable=not read_only and os.access(above, os.W_OK | os.X_OK),
        mode=stat.S_IMODE(facts.st_mode),
        owned=facts.st_uid == os.geteuid(),
        free_bytes=space.f_bavail * space.f_frsize,
    )


def look_at_secrets(own: Iterable[Path], given: Iterable[str]) -> tuple[SecretFile, ...]:
    """Those that are there, or can't be looked at: `own` are llorch's, `given` are named in the settings."""
    found = []
    paths = [*((path, True) for path in own), *((Path(path).expanduser(), False) for path in given)]
    for path, ours in ((path.absolute(), ours) for path, ours in paths):
        try:
            with path.open("rb") as file:  # that it can be read is what a role needs
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                found.append(SecretFile(str(path), mode, ours=ours))
        except FileNotFoundError:
            continue
        except OSError as error:
            found.append(SecretFile(str(path), None, (error.strerror or errno_name(error)).lower()))
    return tuple(found)


def hard_file_limit() -> int | None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else hard


# ---------------------------------------------------------------- ports


def look_at_port(bind: HostPort) -> Port:
    """Whether a role could listen there, as it would; it is let go at once."""
    if bind.port == 0:
        return Port(str(bind), Use.ANY)
    try:
        found = socket.getaddrinfo(bind.host, bind.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return Port(str(bind), Use.IMPOSSIBLE, (error.strerror or "it does not resolve").lower())
    failed: OSError | None = None
    free = False
    for family, *_, address in dict.fromkeys(found):
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind(address)
                sock.listen(1)  # with SO_REUSEADDR alone, a port that another only bound could be bound too
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return Port(str(bind), Use.TAKEN, by=who_listens(bind.port))
                failed = error  # `localhost` leads to ::1 also where the kernel has no IPv6
            else:
                free = True
    if failed is not None and not free:
        return Port(str(bind), Use.IMPOSSIBLE, (failed.strerror or errno_name(failed)).lower())
    return Port(str(bind), Use.FREE)


def who_listens(port: int) -> str:
    """The programs and pids behind a port, as far as /proc shows them to this user. Never their arguments: those may
    hold secrets.
    """
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listening(Path("/proc/net") / table, port)}
    if not inodes:
        return ""
    found: list[str] = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(_inode(link) in inodes for link in (directory / "fd").iterdir()):
                found.append(f"{(directory / 'comm').read_text().strip()}, pid {directory.name}")
    return "; ".join(found[:MAX_NAMED])


def _listening(table: Path, port: int) -> Iterable[str]:
    """The inodes of the sockets that listen on a port: proc_pid_net(5)."""
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return []
    rows = (line.split() for line in lines)
    return [row[9] for row in rows if row[3] == _LISTENS and int(row[1].rpartition(":")[2], 16) == port]


def _inode(link: Path) -> str:
    return str(link.readlink()).removeprefix("socket:[").removesuffix("]")


# ---------------------------------------------------------------- notifications


def look_at_watch(given: Path, *, polling: bool) -> Watch:
    """A real watch on the directory, or on what is there of it, taken off at once."""
    directory = given.absolute()
    above = next(one for one in (directory, *directory.parents) if one.exists())
    return Watch(
        directory=str(directory),
        filesystem=filesystem_of(str(above.resolve()), _read("/proc/self/mountinfo")),
        error=None if polling else _watch(above),
        instances=_limit("max_user_instances"),
        watches=_limit("max_user_watches"),
        polling=polling,
    )


def _watch(directory: Path) -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "inotify_init1"):
        return "this system has no inotify"
    descriptor = libc.inotify_init1(os.O_CLOEXEC)
    if descriptor < 0:
        return errno.errorcode.get(ctypes.get_errno(), "unknown")
    try:
        if libc.inotify_add_watch(descriptor, os.fsencode(directory), _IN_CREATE) < 0:
            return errno.errorcode.get(ctypes.get_errno(), "unknown")
    finally:
        os.close(descriptor)
    return None


def filesystem_of(path: str, mountinfo: str) -> str:
    """The type of the filesystem that holds `path`, by the lines of proc_pid_mountinfo(5); empty if none does."""
    best, kind = "", ""
    for line in mountinfo.splitlines():
        mount, separator, rest = line.partition(" - ")
        fields = mount.split()
        if not separator or len(fields) < 5:
            continue
        point = fields[4].replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # a later mount on the same point hides the earlier one
            best, kind = point, rest.split()[0]
    return kind


def _limit(name: str) -> int | None:
    text = _read(f"/proc/sys/fs/inotify/{name}").strip()
    return int(text) if text.isdigit() else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def nvidia_cards() -> int:
    """NVIDIA display controllers on the PCI bus (vendor 10de, class 03xxxx), whatever their driver does."""
    count = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        if _read(f"{device}/vendor").strip() == "0x10de" and _read(f"{device}/class").startswith("0x03"):
            count += 1
    return count
