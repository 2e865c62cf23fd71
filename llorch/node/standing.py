"""What operators asked of this node, kept on disk: a drained node stays drained when its agent is started again.

Owns the file `<data>/wishes.json`. What is in it, and what it means, is `pools`. A file that can't be read is nobody's
wish, and is said so; one that can't be written is tried again at the next change. Blocking, for one small file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from llorch import whole_file
from llorch.errors import LlorchError
from llorch.logs import Log
from llorch.messages import decode_object

MAX_BYTES = 1024 * 1024  # 256 pools with their reasons are a tenth of it

log = Log("node.standing")


def read(path: Path) -> dict[str, Any]:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        log.error("wishes.unread", file=path.name, reason=error.strerror)
        return {}
    try:
        if len(raw) > MAX_BYTES:
            raise ValueError
        return decode_object(raw)
    except (LlorchError, ValueError):
        log.error("wishes.unread", file=path.name, reason="it is not what was written")
        return {}


def write(path: Path, wishes: dict[str, Any]) -> None:
    try:
        whole_file.replace(path, json.dumps(wishes, indent=1).encode() + b"\n")
    except OSError as error:
        log.error("wishes.unwritten", file=path.name, reason=error.strerror, hint="a restart forgets them")
