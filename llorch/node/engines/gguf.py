"""What a GGUF file says of itself, read before an engine opens it.

Owns the check of the header: magic, version, counts and lengths against bounds and against the bytes that are there,
for parsers of this format have read past their buffers; and that the file does not end before its tensors begin. It
also gives the model's shape, as far as its need of memory follows from it: what the file claims, unchecked. Never reads
a tensor's numbers, which no header vouches for.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol, TypeAlias

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
_BOOL, _STRING, _ARRAY = 7, 8, 9
_ITEMS = {**_INTEGERS, _BOOL: "<?"}

# The only lists that are kept: one number a layer. More layers than any model has, so that a file full of such keys
# costs no more memory than its own bytes.
_KEPT_LISTS = (".attention.head_count", ".attention.head_count_kv", ".attention.sliding_window_pattern")
MAX_LAYERS = 1_024
MAX_KEPT_LISTS = 16

# ggml's tensor types: how many numbers a block of them holds, in how many bytes (ggml.h, ggml-common.h).
TENSOR_TYPES: Mapping[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18),
}  # fmt: skip
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_(ch)?exps\.")

# llama.cpp's `enum llama_ftype`, as far as it is met in files.
FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip


Value: TypeAlias = int | str | tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Shape:
    """The model as its file claims it. None, (), or 0 of a count: the file does not say.

    `heads_kv` has one number for every layer or one for all. `window` is that of sliding window attention, `pattern`
    which layers have it: each told by itself, or one in so many without. Every `attention_every`th layer attends, the
    others are recurrent. `latent`: one latent vector is kept for keys and values (MLA). Of the bytes of tensors,
    `embedding_bytes` are looked up row by row, `output_bytes` 0 if the same ones serve at the output, `expert_bytes`
    those of experts. `tensor_bytes` is None if one has a type that is not known here. Only those of this file, where
    the model has several (`parts`).
    """

    blocks: int | None = None
    embedding_length: int | None = None
    heads: tuple[int, ...] = ()
    heads_kv: tuple[int, ...] = ()
    key_length: int | None = None
    value_length: int | None = None
    latent: bool = False
    window: int | None = None
    pattern: tuple[int, ...] = ()
    attention_every: int | None = None
    experts: int = 0
    vocabulary: int | None = None
    parts: int = 1
    parameters: int = 0
    tensor_bytes: int | None = 0
    embedding_bytes: int = 0
    output_bytes: int = 0
    expert_bytes: int = 0


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
    shape: Shape = Shape()


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
            self.skip_items(inner, self.count(MAX_ARRAY_ITEMS, "items in a list"), depth)
        else:
            raise ValueError(f"it has a value of the unknown type {kind}")

    def skip_items(self, inner: int, items: int, depth: int = 0) -> None:
        if inner in _SIZES:
            self.skip(items * _SIZES[inner])
        else:
            for _ in range(items):
                self.skip_value(inner, depth + 1)

    def value(self, kind: int, *, lists: bool) -> Value:
        """A whole number, a text, or with `lists` a short list of whole numbers; None for all else, passed over."""
        if kind in _INTEGERS:
            number: int = struct.unpack(_INTEGERS[kind], self.take(_SIZES[kind]))[0]
            return number
        if kind == _STRING:
            return self.text(MAX_STRING_BYTES, "text")
        if kind == _ARRAY and lists:
            return self._numbers()
        self.skip_value(kind)
        return None

    def _numbers(self) -> tuple[int, ...] | None:
        inner = self.u32()
        items = self.count(MAX_ARRAY_ITEMS, "items in a list")
        if inner in _ITEMS and items <= MAX_LAYERS:
            return tuple(int(each[0]) for each in struct.iter_unpack(_ITEMS[inner], self.take(items * _SIZES[inner])))
        self.skip_items(inner, items)
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
    values: dict[str, Value] = {}
    lists = 0
    for _ in range(keys):
        key = reader.text(MAX_KEY_BYTES, "a key")
        if key in values:
            raise ValueError(f"it has the key {key[:80]!r} twice")
        kept = key.endswith(_KEPT_LISTS) and lists < MAX_KEPT_LISTS
        lists += kept
        values[key] = reader.value(reader.u32(), lists=kept)
    table = _Tensors()
    for _ in range(tensors):
        table.read_one(reader)
    if size is not None and tensors:
        _check_end(size, reader.taken, table.furthest, _number(values, "general.alignment"))
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
        shape=_shape(architecture, values, table),
    )


class _Tensors:
    """Sums over the table of tensors, of which no entry is kept."""

    def __init__(self) -> None:
        self.furthest = 0  # where the last one begins, after the start of all of them
        self.parameters = 0
        self.total: int | None = 0
        self.embedding = self.output = self.experts = 0
        self.vocabulary: int | None = None

    def read_one(self, reader: _Reader) -> None:
        name = reader.text(MAX_TENSOR_NAME_BYTES, "a tensor's name")
        dimensions = reader.u32()
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"it claims a tensor of {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", reader.take(dimensions * 8))
        kind = reader.u32()
        self.furthest = max(self.furthest, reader.u64())
        numbers = math.prod(shape)
        self.parameters += numbers
        per_block, block_bytes = TENSOR_TYPES.get(kind, (1, 0))
        size = numbers // per_block * block_bytes
        self.total = None if self.total is None or not block_bytes else self.total + size
        if name == _EMBEDDING:
            self.embedding = size
            self.vocabulary = shape[1] if dimensions > 1 else None
        elif name == _OUTPUT:
            self.output = size
        elif _EXPERTS.match(name):
            self.experts += size


def _shape(architecture: str, values: Mapping[str, Value], table: _Tensors) -> Shape:
    def number(name: str) -> int | None:
        return _number(values, f"{architecture}.{name}")

    def numbers(name: str) -> tuple[int, ...]:
        value = values.get(f"{architecture}.{name}")
        found = value if isinstance(value, tuple) else (value,) if isinstance(value, int) else ()
        return found if all(each >= 0 for each in found) else ()

    return Shape(
        blocks=number("block_count"),
        embedding_length=number("embedding_length"),
        heads=numbers("attention.head_count"),
        heads_kv=numbers("attention.head_count_kv"),
        key_length=number("attention.key_length"),
        value_length=number("attention.value_length"),
        latent=number("attention.key_length_mla") is not None,
        window=number("attention.sliding_window"),
        pattern=numbers("attention.sliding_window_pattern"),
        attention_every=number("full_attention_interval"),
        experts=number("expert_count") or 0,
        vocabulary=table.vocabulary,
        parts=_number(values, "split.count") or 1,
        parameters=table.parameters,
        tensor_bytes=table.total,
        embedding_bytes=table.embedding,
        output_bytes=table.output,
        expert_bytes=table.experts,
    )


def _check_end(size: int, header_bytes: int, furthest: int, alignment: int | None) -> None:
    """The last tensor must begin within the file; whether it also ends there, the engine finds by its type."""
    alignment = ALIGNMENT if alignment is None else alignment
    if not 0 < alignment <= MAX_ALIGNMENT:
        raise ValueError(f"it claims an alignment of {alignment}")
    start = -(-header_bytes // alignment) * alignment
    if start + furthest >= size:
        raise ValueError(f"it ends before its tensors do: it has {size} bytes, and more are needed")


def _text(values: Mapping[str, Value], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) and value else None


def _number(values: Mapping[str, Value], key: str) -> int | None:
    value = values.get(key)
    return value if isinstance(value, int) and value >= 0 else None
