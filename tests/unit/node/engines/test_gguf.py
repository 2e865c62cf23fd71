"""The header of a GGUF: what is read from it, and that no damage or lie in it gets past or costs memory."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.node.engines import gguf
from llorch.node.engines.gguf import Header, Shape, parse_header, read_header
from tests.gguf_bytes import ARRAY, BOOL, F64, STRING, U32, U64, file, key, number, numbers, tensor, text

ARCHITECTURE = key("general.architecture", STRING, text("llama"))
WHOLE = file(
    ARCHITECTURE,
    key("general.name", STRING, text("a name")),
    key("general.file_type", U32, struct.pack("<I", 15)),
    key("llama.context_length", U32, struct.pack("<I", 4096)),
    key("llama.rope.freq_base", F64, struct.pack("<d", 10000.0)),
    key("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("▁b")),
    key("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ", U64, 2) + bytes(16)),
    key("nested", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U32, 1) + bytes(4)),
    key("tokenizer.chat_template", STRING, text("{{ messages }}")),
    tensors=(tensor("token_embd.weight", 64, 2), tensor("output_norm.weight", 64)),
)


def test_a_header_is_read() -> None:
    assert replace(parse_header(WHOLE), shape=Shape()) == Header(3, 2, "llama", "a name", 4096, "Q4_K_M", True)


def test_what_comes_after_the_header_is_not_looked_at() -> None:
    assert parse_header(WHOLE + b"\xff" * 100) == parse_header(WHOLE)


def test_a_file_is_read_as_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(WHOLE + bytes(64))
    assert read_header(path) == parse_header(WHOLE)


@pytest.mark.parametrize("offset", [0, 4096])
def test_a_file_that_ends_before_its_tensors_is_refused_at_every_length(tmp_path: Path, offset: int) -> None:
    far = text("w") + struct.pack("<IQIQ", 1, 64, 0, offset)
    header = file(ARCHITECTURE, key("general.alignment", U32, struct.pack("<I", 64)), tensors=(far,))
    begins = -(-len(header) // 64) * 64 + offset
    path = tmp_path / "a.gguf"
    for size in (len(header), begins - 1, begins):
        path.write_bytes(header + bytes(size - len(header)))
        with pytest.raises(ValueError, match="ends before its tensors"):
            read_header(path)
    path.write_bytes(header + bytes(begins + 1 - len(header)))
    assert read_header(path).tensors == 1


@pytest.mark.parametrize("alignment", [0, 1 << 31])
def test_an_alignment_that_cannot_be_is_refused(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "a.gguf"
    told = key("general.alignment", U32, struct.pack("<I", alignment))
    path.write_bytes(file(ARCHITECTURE, told, tensors=(tensor("w", 1),)) + bytes(64))
    with pytest.raises(ValueError, match="alignment"):
        read_header(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.gguf")


def test_what_a_file_does_not_say_is_none() -> None:
    assert parse_header(file(ARCHITECTURE)) == Header(3, 0, "llama", None, None, None, False)


def test_an_unnamed_file_type_is_its_number() -> None:
    assert parse_header(file(ARCHITECTURE, key("general.file_type", U32, struct.pack("<I", 999)))).file_type == "999"


def test_a_number_where_a_text_belongs_is_no_text() -> None:
    with pytest.raises(ValueError, match="architecture"):
        parse_header(file(key("general.architecture", U32, bytes(4))))


@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_a_header_cut_at_any_byte_is_refused(length: int) -> None:
    with pytest.raises(ValueError):
        parse_header(WHOLE[:length])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut short"),
        (b"PK\x03\x04" + bytes(40), "does not begin with GGUF"),
        (file(ARCHITECTURE, version=1), "version is 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "version is 50331648"),  # big-endian
        (file(), "architecture"),
        (file(ARCHITECTURE, n_keys=2**64 - 1), "18446744073709551615 keys"),
        (file(ARCHITECTURE, n_tensors=2**63), "9223372036854775808 tensors"),
        (file(ARCHITECTURE, n_keys=gguf.MAX_KEYS), "cut short"),
        (file(ARCHITECTURE, n_tensors=gguf.MAX_TENSORS), "cut short"),
        (file(ARCHITECTURE, ARCHITECTURE), "twice"),
        (file(key("k" * 70_000, U32, bytes(4))), "bytes of a key"),
        (file(key("k", 13, bytes(8))), "unknown type 13"),
        (file(key("k", STRING, struct.pack("<Q", 2**40))), "bytes of text"),
        (file(key("k", STRING, struct.pack("<Q", gguf.MAX_STRING_BYTES))), "cut short"),
        (file(key("k", ARRAY, struct.pack("<IQ", U64, 2**61))), "items in a list"),
        (file(key("k", ARRAY, struct.pack("<IQ", U64, gguf.MAX_ARRAY_ITEMS))), "cut short"),
        (file(key("k", ARRAY, struct.pack("<IQ", STRING, gguf.MAX_ARRAY_ITEMS))), "cut short"),
        (file(key("k", ARRAY, struct.pack("<IQ", 99, 1))), "unknown type 99"),
        (file(key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 10_000)), "unknown type 9"),
        (file(ARCHITECTURE, tensors=(tensor("t", 1, 1, 1, 1, 1),)), "5 dimensions"),
        (file(ARCHITECTURE, tensors=(tensor("t" * 65, 1),)), "tensor's name"),
    ],
)
def test_a_lie_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_header(data)


def test_a_lie_about_a_length_costs_no_memory() -> None:
    data = file(key("k", ARRAY, struct.pack("<IQ", U64, gguf.MAX_ARRAY_ITEMS)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            parse_header(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


def test_a_header_without_end_is_refused_at_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_header(WHOLE)
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", len(WHOLE) // 2)
    with pytest.raises(ValueError, match="its header is larger than"):
        parse_header(WHOLE)


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=8))
def test_damage_is_read_or_refused_but_never_worse(at: int, damage: bytes) -> None:
    try:
        parse_header(WHOLE[:at] + damage + WHOLE[at + len(damage) :])
    except ValueError:
        pass


def test_the_shape_of_a_model_is_read() -> None:
    shape = parse_header(
        file(
            number("llama.block_count", 2),  # before the architecture is told
            ARCHITECTURE,
            number("llama.embedding_length", 64),
            number("llama.attention.head_count", 8),
            numbers("llama.attention.head_count_kv", [2, 0]),
            number("llama.attention.key_length", 16),
            number("llama.attention.value_length", 24),
            number("llama.attention.sliding_window", 512),
            key("llama.attention.sliding_window_pattern", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\x01\x00"),
            number("llama.full_attention_interval", 4),
            number("llama.expert_count", 8),
            key("split.count", 2, struct.pack("<H", 3)),
            tensors=(
                tensor("token_embd.weight", 64, 100, kind=8),
                tensor("output.weight", 64, 100, kind=2),
                tensor("blk.0.ffn_up_exps.weight", 64, 32, 8, kind=1),
                tensor("blk.0.attn_norm.weight", 64),
            ),
        )
    ).shape
    assert shape == Shape(
        blocks=2, embedding_length=64, heads=(8,), heads_kv=(2, 0), key_length=16, value_length=24, window=512,
        pattern=(1, 0), attention_every=4, experts=8, vocabulary=100, parts=3,
        parameters=6400 + 6400 + 16384 + 64, tensor_bytes=6800 + 3600 + 32768 + 256,
        embedding_bytes=6800, output_bytes=3600, expert_bytes=32768,
    )  # fmt: skip


def test_a_tensor_of_an_unknown_type_leaves_the_sum_unknown() -> None:
    shape = parse_header(file(ARCHITECTURE, tensors=(tensor("a", 64), tensor("b", 64, kind=999)))).shape
    assert (shape.tensor_bytes, shape.parameters) == (None, 128)


@pytest.mark.parametrize("kind", sorted(gguf.TENSOR_TYPES))
def test_tensor_types_are_as_large_as_ggml_says(kind: int) -> None:
    ggml = pytest.importorskip("gguf")
    known = {int(each): tuple(size) for each, size in ggml.GGML_QUANT_SIZES.items()}
    if kind == 9:  # Q8_1 is never in a file: gguf-py still has the form in which its two scales were 32 bits each
        assert gguf.TENSOR_TYPES[kind] == (32, 36)
    elif kind in known:  # an older gguf-py knows fewer
        assert gguf.TENSOR_TYPES[kind] == known[kind]


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IQ", STRING, 1) + text("x"),
        struct.pack("<IQ", 6, 2) + bytes(8),
        struct.pack("<IQ", 5, 1) + struct.pack("<i", -1),
        struct.pack("<IQ", U32, gguf.MAX_LAYERS + 1) + bytes(4 * (gguf.MAX_LAYERS + 1)),
    ],
    ids=["texts", "floats", "below zero", "more than any model's layers"],
)
def test_a_list_that_is_none_of_layers_is_passed_over(value: bytes) -> None:
    header = parse_header(file(ARCHITECTURE, key("llama.attention.head_count_kv", ARRAY, value), number("k", 7)))
    assert header.shape.heads_kv == ()


def test_a_file_full_of_lists_costs_no_memory() -> None:
    values = struct.pack("<IQ", 0, gguf.MAX_LAYERS) + bytes(gguf.MAX_LAYERS)
    data = file(*(key(f"{place}.attention.head_count_kv", ARRAY, values) for place in range(1000)), ARCHITECTURE)
    tracemalloc.start()
    try:
        parse_header(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1024 * 1024
