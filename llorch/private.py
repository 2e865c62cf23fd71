"""Files that nobody else may read: written whole under a lock, refused when they lie open.

Owns the modes (0600 in 0700 directories), whose the files are, and the lock; `whole_file.py` owns how one is replaced.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from llorch import whole_file
from llorch.errors import ConfigError

MAX_FILE_BYTES = 16 * 1024 * 1024


def make_directory(path: Path) -> None:
    """Private if it is new, as are those above it. Raises ConfigError if it can't be made."""
    try:
        for missing in reversed([one for one in (path, *path.parents) if not one.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the directory {path} can't be used: {error.strerror}", hint="give another --data-dir"
        ) from None


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Alone among the processes that change files in `directory`: the lock is on the directory itself. Blocking.

    Raises ConfigError if the directory can't be used.
    """
    import fcntl

    make_directory(directory)
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"the directory {directory} can't be used: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read(path: Path, *, secret: bool = True) -> bytes | None:
    """What is in a file; None if there is none. Raises ConfigError for one that others may read, if it is `secret`."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    if secret and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{path} holds secrets and others may read it (mode {stat.S_IMODE(mode):04o})", hint=f"chmod 600 {path}"
        )
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is too large to be what it should be")
    return data


def write(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a file, on disk before this returns. Raises OSError: the old one is there, or the new one not for certain
    after a power cut."""
    owner = None
    if os.geteuid() == 0:  # a command run as root must not take the file away from the role's own user
        directory = path.parent.stat()
        owner = directory.st_uid, directory.st_gid
    whole_file.replace(path, data, mode=mode, owner=owner)
    whole_file.sync_directory(path.parent)


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does, also where a mount swaps a symbolic link; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
