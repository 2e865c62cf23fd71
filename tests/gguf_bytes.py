"""GGUF files, written byte by byte: good ones, and such as no writer would make."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U32, BOOL, STRING, ARRAY, U64, F64 = 4, 7, 8, 9, 10, 12


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, *shape: int, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)


def number(name: str, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


def numbers(name: str, values: Sequence[int]) -> bytes:
    return key(name, ARRAY, struct.pack(f"<IQ{len(values)}I", U32, len(values), *values))


def file(
    *keys: bytes,
    tensors: tuple[bytes, ...] = (),
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
