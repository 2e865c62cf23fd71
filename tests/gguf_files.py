"""GGUF files for tests: a valid header, and as many bytes behind it as are wanted."""

from __future__ import annotations

import os
import struct
from pathlib import Path

_U32, _STRING = 4, 8


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(ctx: int = 2048, *, first: bool = True) -> bytes:
    """Of a model with one tensor, which begins right behind it."""
    keys = [_text("general.architecture") + struct.pack("<I", _STRING) + _text("llama")]
    keys.append(_text("llama.context_length") + struct.pack("<II", _U32, ctx))
    keys = keys if first else []
    tensor = _text("w") + struct.pack("<IQIQ", 1, 64, 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, len(keys)) + b"".join(keys) + tensor


def small(size: int = 4096, ctx: int = 2048, *, first: bool = True, fill: bytes | None = None) -> bytes:
    """A whole file of `size` bytes, different each time unless `fill` says with what."""
    head = header(ctx, first=first)
    return head + (os.urandom(size - len(head)) if fill is None else (fill * size)[: size - len(head)])


def write_large(path: Path, size: int, block_bytes: int = 1 << 20) -> None:
    """A file of random bytes, so that no two ranges of it are alike."""
    with path.open("wb") as file:
        file.write(header())
        left = size - file.tell()
        while left > 0:
            file.write(os.urandom(min(block_bytes, left)))
            left -= block_bytes
