"""What a GGUF file says of itself, read before an engine opens it.

Owns the check of the header: magic, version, counts and lengths against bounds and against the bytes that are there,
for parsers of this format have read past their buffers; and that the file does not end before its tensors begin. Never
reads a tensor's numbers, which no header vouches for.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 had 32-bit counts; llama.cpp dropped it in 2023

# Bounds well above every published model, so that a lie costs a short read and not memory.
MAX_KEYS = 65_536
MAX_TENSORS = 1_000_000
MAX_KEY_BYTES = 65_535  # the format's own limit
MAX_TENSOR_NAME_BYTES = 64  # GGML_MAX_NAME
MAX_DIMENSIONS = 4
MAX_STRING_BYTES = 16 * 1024 * 1024  # chat templates and licences
MAX_ARRAY_ITEMS = 16_000_000  # vocabularies and their merges
MAX_HEADER_BYTES = 512 * 1024 * 1024
MAX_DEPTH = 4  # arrays of arrays
ALIGNMENT = 32  # of the tensors, where the file does not say
MAX_ALIGNMENT = 1 << 20

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_STRING, _ARRAY = 8, 9

# llama.cpp's `enum llama_ftype`, as far as it is met in files.
FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """`file_type` is a quantisation's name, or its number where that has none here. None: the file does not say."""

    version: int
    tensors: int
    architecture: str
    name: str | None
    ctx_train: int | None
    file_type: str | None
    has_chat_template: bool


class Openable(Protocol):
    """A path, for one. This module has no business with a file system of its own."""

    def open(self, mode: Literal["rb"]) -> BinaryIO: ...


def read_header(path: Openable, *, first: bool = True) -> Header:
    """Raises ValueError with what is wrong with the file, OSError when it can't be read.

    Only the `first` file of a split model describes it; of the others the architecture is "".
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return _read(file, size, first)


def parse_header(data: bytes) -> Header:
    """The header in `data`, the beginning of a file or all of it. Raises ValueError with what is wrong with it."""
    return _read(io.BytesIO(data), None, True)


class _Reader:
    """Takes what is there and no more."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.taken = 0

    def take(self, count: int) -> bytes:
        self.taken += count
        if self.taken > MAX_HEADER_BYTES:
            raise ValueError(f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB")
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("it ends within its header: it is cut short or damaged")
        return data

    def skip(self, count: int) -> None:
        while count > 0:  # in pieces, so that a false length can't claim memory
            count -= len(self.take(min(count, 1 << 20)))

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def count(self, limit: int, what: str) -> int:
        count = self.u64()
        if count > limit:
            raise ValueError(f"it claims {count} {what}, more than {limit}")
        return count

    def text(self, limit: int, what: str) -> str:
        return self.take(self.count(limit, f"bytes of {what}")).decode("utf-8", "replace")

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.skip(self.count(MAX_STRING_BYTES, "bytes of text"))
        elif kind == _ARRAY and depth < MAX_DEPTH:
            inner = self.u32()
            items = self.count(MAX_ARRAY_ITEMS, "items in a list")
            if inner in _SIZES:
                self.skip(items * _SIZES[inner])
            else:
                for _ in range(items):
                    self.skip_value(inner, depth + 1)
        else:
            raise ValueError(f"it has a value of the unknown type {kind}")

    def value(self, kind: int) -> int | str | None:
        """A whole number or a text; None for everything else, which is passed over."""
        if kind in _INTEGERS:
            number: int = struct.unpack(_INTEGERS[kind], self.take(_SIZES[kind]))[0]
            return number
        if kind == _STRING:
            return self.text(MAX_STRING_BYTES, "text")
        self.skip_value(kind)
        return None


def _read(file: BinaryIO, size: int | None, first: bool) -> Header:
    """`size` is that of the whole file, None where only its beginning is at hand."""
    reader = _Reader(file)
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.u32()
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}; known are {', '.join(map(str, VERSIONS))}")
    tensors = reader.count(MAX_TENSORS, "tensors")
    keys = reader.count(MAX_KEYS, "keys")
    values: dict[str, int | str | None] = {}
    for _ in range(keys):
        key = reader.text(MAX_KEY_BYTES, "a key")
        if key in values:
            raise ValueError(f"it has the key {key[:80]!r} twice")
        values[key] = reader.value(reader.u32())
    furthest = max((_tensor_offset(reader) for _ in range(tensors)), default=None)
    if size is not None and furthest is not None:
        _check_end(size, reader.taken, furthest, _number(values, "general.alignment"))
    architecture = _text(values, "general.architecture") or ""
    if first and not architecture:
        raise ValueError("it does not say of which architecture it is")
    ctx_train = _number(values, f"{architecture}.context_length")
    kind = _number(values, "general.file_type")
    return Header(
        version=version,
        tensors=tensors,
        architecture=architecture,
        name=_text(values, "general.name"),
        ctx_train=ctx_train,
        file_type=None if kind is None else FILE_TYPES.get(kind, str(kind)),
        has_chat_template=bool(values.get("tokenizer.chat_template")),
    )


def _tensor_offset(reader: _Reader) -> int:
    """Where a tensor begins, after the start of all of them."""
    reader.skip(reader.count(MAX_TENSOR_NAME_BYTES, "bytes of a tensor's name"))
    dimensions = reader.u32()
    if dimensions > MAX_DIMENSIONS:
        raise ValueError(f"it claims a tensor of {dimensions} dimensions")
    reader.skip(dimensions * 8 + 4)
    return reader.u64()


def _check_end(size: int, header_bytes: int, furthest: int, alignment: int | None) -> None:
    """The last tensor must begin within the file; whether it also ends there, the engine finds by its type."""
    alignment = ALIGNMENT if alignment is None else alignment
    if not 0 < alignment <= MAX_ALIGNMENT:
        raise ValueError(f"it claims an alignment of {alignment}")
    start = -(-header_bytes // alignment) * alignment
    if start + furthest >= size:
        raise ValueError(f"it ends before its tensors do: it has {size} bytes, and more are needed")


def _text(values: Mapping[str, int | str | None], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) and value else None


def _number(values: Mapping[str, int | str | None], key: str) -> int | None:
    value = values.get(key)
    return value if isinstance(value, int) and value >= 0 else None
