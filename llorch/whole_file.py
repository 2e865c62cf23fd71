"""Files that are written whole: whoever looks sees the old one or the new one, also after a power cut.

Owns how that is done, and nothing of what is in them; `private.py` says who may read those that hold secrets.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

MOST_NAME_CHARS = 100  # of a temporary file's name, so that a long name does not become too long a one


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

    `mode`: whatever the umask says; None: what the umask leaves. `only_new`: FileExistsError if there is one.
    `durable`: on disk before this returns, as is its name; not needed for what no restart of the machine survives.
    `owner`: uid and gid, which root may give.
    """
    temporary = path.with_name(f".{path.name[:MOST_NAME_CHARS]}.{secrets.token_hex(6)}")
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
            _link(temporary, path)
        else:
            temporary.replace(path)
        if durable:
            sync_directory(path.parent)
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


def _link(temporary: Path, path: Path) -> None:
    """Where a file system knows no links, looking first is the best there is."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError from None
        temporary.replace(path)
