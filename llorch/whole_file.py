"""Files that are written whole: whoever looks sees the old one or the new one, never half of one.

Owns how that is done, and nothing of what is in them; `private.py` says who may read those that hold secrets.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def replace(
    path: Path,
    data: bytes,
    *,
    mode: int | None = 0o600,
    only_new: bool = False,
    durable: bool = True,
    owner: tuple[int, int] | None = None,
) -> None:
    """Put a file at `path`. Raises OSError and leaves what was there.

    `mode`: whatever the umask says; None: what the umask leaves. `only_new`: FileExistsError if there is one, and
    OSError where the file system knows no links. `durable`: the old one or the new one is there after a power cut, too
    (and the new one for certain after `sync_directory`); not needed for hints, nor for what no restart of the machine
    survives. `owner`: uid and gid, which root may give.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # not made of a name that may be as long as any may be
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if only_new:
            path.hardlink_to(temporary)
        else:
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_directory(directory: Path) -> None:
    """Have the names in it on disk, too: a power cut must not undo what was made, or revoked."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
