"""Whether a model fits: the estimate against what llama.cpp itself logged of known models, and the judgement of it.

The models are headers alone, with the tensors of the real ones. The figures are from logs of llama.cpp, `model buffer
size`, `KV buffer size` and `compute buffer size`, as their users have published them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.messages import Gpu
from llorch.node import fit
from llorch.node.engines.gguf import Header, Shape, parse_header
from llorch.node.fit import Asked, Need, asked, judge, judge_ram, need, room
from tests.gguf_bytes import STRING, file, key, number, tensor, text

MIB = 1 << 20
GIB = 1 << 30
F32, Q4_0, Q8_0, Q4_K, Q6_K = 0, 2, 8, 12, 14


def model(architecture: str, tensors: list[bytes], **numbers: int) -> bytes:
    keys = [number(f"{architecture}.{name}", value) for name, value in numbers.items()]
    return file(key("general.architecture", STRING, text(architecture)), *keys, tensors=tuple(tensors))


def llama_3_8b() -> bytes:
    """Q4_K_M: six bits for half of the values and of what leads back into the stream."""
    tensors = [tensor("token_embd.weight", 4096, 128256, kind=Q4_K), tensor("output.weight", 4096, 128256, kind=Q6_K)]
    tensors += [tensor("output_norm.weight", 4096), tensor("rope_freqs.weight", 64)]
    for layer in range(32):
        finer = Q6_K if layer < 4 or layer >= 28 or (layer - 4) % 3 == 2 else Q4_K
        named = [
            ("attn_q", 4096, 4096, Q4_K), ("attn_k", 4096, 1024, Q4_K), ("attn_v", 4096, 1024, finer),
            ("attn_output", 4096, 4096, Q4_K), ("ffn_gate", 4096, 14336, Q4_K), ("ffn_up", 4096, 14336, Q4_K),
            ("ffn_down", 14336, 4096, finer),
        ]  # fmt: skip
        tensors += [tensor(f"blk.{layer}.{name}.weight", *shape, kind=kind) for name, *shape, kind in named]
        tensors += [tensor(f"blk.{layer}.{name}_norm.weight", 4096) for name in ("attn", "ffn")]
    return model("llama", tensors, block_count=32, embedding_length=4096, **attention(32, 8))


def qwen3_30b() -> bytes:
    """A mixture of 128 experts, Q8_0, with heads larger than its width would make them."""
    tensors = [tensor(f"{name}.weight", 2048, 151936, kind=Q8_0) for name in ("token_embd", "output")]
    tensors.append(tensor("output_norm.weight", 2048))
    for layer in range(48):
        named: list[tuple[str, tuple[int, ...]]] = [
            ("attn_q", (2048, 4096)), ("attn_k", (2048, 512)), ("attn_v", (2048, 512)), ("attn_output", (4096, 2048)),
            ("ffn_gate_exps", (2048, 768, 128)), ("ffn_up_exps", (2048, 768, 128)), ("ffn_down_exps", (768, 2048, 128)),
        ]  # fmt: skip
        tensors += [tensor(f"blk.{layer}.{name}.weight", *shape, kind=Q8_0) for name, shape in named]
        plain = [("ffn_gate_inp", (2048, 128)), ("attn_norm", (2048,)), ("ffn_norm", (2048,))]
        plain += [("attn_q_norm", (128,)), ("attn_k_norm", (128,))]
        tensors += [tensor(f"blk.{layer}.{name}.weight", *shape) for name, shape in plain]
    return model("qwen3moe", tensors, block_count=48, embedding_length=2048, expert_count=128, **attention(32, 4, 128))


def attention(heads: int, heads_kv: int, length: int | None = None) -> dict[str, int]:
    lengths = {} if length is None else {"attention.key_length": length, "attention.value_length": length}
    return {"attention.head_count": heads, "attention.head_count_kv": heads_kv, **lengths}


def sized(data: bytes) -> tuple[Header, int]:
    """A header, and the size of the whole file."""
    header = parse_header(data)
    return header, len(data) + (header.shape.tensor_bytes or 0)


def mib(count: float) -> float:
    return round(count / MIB, 2)


# ---------------------------------------------------------------- what llama.cpp logged


def test_llama_3_8b_needs_what_llama_cpp_allocated_for_it() -> None:
    header, size = sized(llama_3_8b())
    needed = need(header, size, ctx=512, slots=1)
    assert round(header.shape.parameters / 1e9, 2) == 8.03
    assert mib(header.shape.embedding_bytes) == 281.81  # CPU buffer size
    assert mib(needed.weights_bytes) == 4403.49  # CUDA0 buffer size
    assert mib(needed.kv_bytes) == 64  # KV self size
    assert mib(needed.overhead_bytes - fit.CONTEXT_BYTES) == 258.5  # CUDA0 compute buffer size
    assert mib(need(header, size, ctx=2048, slots=4).kv_bytes) == 1024


def test_a_mixture_of_experts_needs_what_llama_cpp_allocated_for_it() -> None:
    header, size = sized(qwen3_30b())
    needed = need(header, size, ctx=16384, slots=4)
    assert mib(header.shape.embedding_bytes) == 315.3
    assert mib(needed.weights_bytes) == pytest.approx(30658.12, abs=0.05)  # tensors begin at round addresses
    assert mib(needed.kv_bytes) == 6144
    assert mib(needed.overhead_bytes - fit.CONTEXT_BYTES) == 300.75
    assert 0.9 < header.shape.expert_bytes / needed.weights_bytes < 1


@pytest.mark.parametrize(
    ("ctx", "slots", "args", "logged"),
    [(341, 3, "--swa-full", 27.0), (256, 4, "--swa-full", 18.0), (8192, 1, "", 8 * 3 + 1 * 15)],
)
def test_gemma_3_270m_keeps_the_cells_that_llama_cpp_keeps(ctx: int, slots: int, args: str, logged: float) -> None:
    """Cells are rounded up per slot; 15 of its 18 layers have a window of 512, and keep a batch beyond it."""
    shape = {"block_count": 18, "embedding_length": 640, "attention.sliding_window": 512, **attention(4, 1, 256)}
    header = parse_header(model("gemma3", [], **shape))
    assert mib(need(header, 1, ctx=ctx, slots=slots, args=asked(args.split())).kv_bytes) == logged


def test_gpt_oss_20b_keeps_768_cells_in_every_other_layer() -> None:
    """A window of 128 and a batch of 512, rounded up: 12 layers of 18 MiB in all, beside 12 with all of the context."""
    shape = {"block_count": 24, "embedding_length": 2880, "attention.sliding_window": 128, **attention(64, 8, 64)}
    header = parse_header(model("gpt-oss", [], **shape))
    assert mib(need(header, 1, ctx=8192, slots=1).kv_bytes) == 192 + 18


def test_a_latent_cache_has_no_values() -> None:
    shape = {"block_count": 61, "embedding_length": 7168, **attention(128, 1)}
    shape |= {"attention.key_length": 576, "attention.value_length": 512, "attention.key_length_mla": 192}
    header = parse_header(model("deepseek2", [], **shape))
    assert mib(need(header, 1, ctx=32768, slots=1, args=asked(["-ctk", "q8_0"])).kv_bytes) == 1166.62  # KV self size


# ---------------------------------------------------------------- what changes the need


def plain(**changes: object) -> Header:
    shape = Shape(blocks=4, embedding_length=1024, heads=(8,), heads_kv=(2,), vocabulary=1000)
    fields = {name: changes.get(name, getattr(shape, name)) for name in Shape.__slots__}
    return Header(3, 0, "llama", None, None, None, False, Shape(**fields))  # type: ignore[arg-type]


def kv(header: Header, **more: int) -> int:
    return need(header, GIB, **{"ctx": 1024, "slots": 1} | more).kv_bytes  # type: ignore[arg-type]


def test_layers_that_do_not_attend_keep_nothing() -> None:
    whole = kv(plain())
    assert whole == 4 * 2 * 128 * 2 * 2 * 1024
    assert kv(plain(heads_kv=(2, 0, 0, 2))) == whole // 2
    assert kv(plain(attention_every=4)) == whole // 4
    assert kv(plain(heads_kv=())) == whole * 4  # as many as there are heads
    assert kv(plain(blocks=None)) == kv(plain(heads=(), heads_kv=(2,), key_length=0, value_length=0)) == 0


def test_windows_are_told_by_the_file_before_they_are_taken_from_what_is_known() -> None:
    cell = 2 * 128 * 2 * 2
    long = {"ctx": 4096}
    assert kv(plain(window=256, pattern=(1, 1, 1, 0)), **long) == cell * (3 * 768 + 4096)
    assert kv(plain(window=256, pattern=(2,)), **long) == cell * (2 * 768 + 2 * 4096)
    assert kv(plain(window=256), **long) == cell * 4 * 768  # an architecture that is not known: the least it can be
    assert kv(plain(window=100_000), **long) == kv(plain(window=0), **long) == cell * 4 * 4096


def test_what_a_pool_asks_of_the_engine_changes_the_need() -> None:
    header, size = sized(llama_3_8b())
    usual = need(header, size, ctx=4096, slots=1)

    def asking(args: str) -> Need:
        return need(header, size, ctx=4096, slots=1, args=asked(args.split()))

    assert asking("--flash-attn on").total == usual.total
    assert asking("--cache-type-k q8_0 -ctv q4_0").kv_bytes == usual.kv_bytes * (34 + 18) // 128
    assert asking("--n-gpu-layers 999") == asking("-ngl 33") == usual
    half = asking("-ngl 99 --n_gpu_layers=16")
    assert half.kv_bytes == usual.kv_bytes // 2
    assert half.weights_bytes == (usual.weights_bytes - header.shape.output_bytes) // 2
    assert asking("-ngl 0").weights_bytes == 0
    assert asking("-ub 1024").overhead_bytes - usual.overhead_bytes == usual.overhead_bytes - fit.CONTEXT_BYTES


@pytest.mark.parametrize(
    ("args", "estimable"),
    [
        ("", True), ("-fa on -t 4", True), ("-ngl 20", True), ("-ngl auto", False), ("-ngl", False), ("-ctk q9", False),
        ("-ot exps=CPU", False), ("--override_tensor=exps=CPU", False), ("--cpu-moe", False), ("--n-cpu-moe 3", False),
        ("--mmproj /m.gguf", False), ("-md /draft.gguf", False), ("--split-mode none", False),
    ],
)  # fmt: skip
def test_nothing_is_estimated_of_what_is_placed_by_hand(args: str, estimable: bool) -> None:
    assert asked(args.split()).estimable is estimable


@given(st.lists(st.text(max_size=12), max_size=8))
def test_no_argument_breaks_the_reading(args: list[str]) -> None:
    asked(args)


def test_every_gpu_has_a_context_and_a_buffer_of_its_own() -> None:
    header, size = sized(llama_3_8b())
    one, two, none = (need(header, size, ctx=4096, slots=1, gpus=count) for count in (1, 2, 0))
    assert two.overhead_bytes == 2 * one.overhead_bytes
    assert none.overhead_bytes == one.overhead_bytes - fit.CONTEXT_BYTES
    assert none.weights_bytes == size
    assert need(None, size, ctx=4096, slots=1) == Need(size, 0, fit.CONTEXT_BYTES)


def test_a_file_is_never_taken_for_more_than_its_bytes() -> None:
    huge = parse_header(model("llama", [tensor("w", 1 << 60, 1 << 60), tensor("token_embd.weight", 1 << 60, 1 << 60)]))
    assert need(huge, 5 * GIB, ctx=128, slots=1).weights_bytes == 5 * GIB
    lying = plain(embedding_bytes=1 << 80, output_bytes=1 << 80, tensor_bytes=1 << 90, vocabulary=1 << 60)
    assert need(lying, 5 * GIB, ctx=128, slots=1, args=Asked(gpu_layers=1)).total < 20 * GIB


def test_of_a_split_model_the_files_count_and_not_the_first_ones_tensors() -> None:
    split = plain(parts=3, tensor_bytes=GIB, embedding_bytes=GIB // 4)
    assert need(split, 12 * GIB, ctx=128, slots=1).weights_bytes == 12 * GIB - GIB // 4
    assert need(plain(tensor_bytes=None), 12 * GIB, ctx=128, slots=1).weights_bytes == 12 * GIB


@given(
    st.builds(
        Shape,
        blocks=st.none() | st.integers(0, 1 << 64), embedding_length=st.none() | st.integers(0, 1 << 64),
        heads=st.lists(st.integers(0, 1 << 64), max_size=3).map(tuple),
        heads_kv=st.lists(st.integers(0, 1 << 64), max_size=3).map(tuple),
        key_length=st.none() | st.integers(0, 1 << 64), window=st.none() | st.integers(0, 1 << 64),
        pattern=st.lists(st.integers(0, 3), max_size=3).map(tuple), vocabulary=st.none() | st.integers(0, 1 << 64),
        attention_every=st.none() | st.integers(0, 9), tensor_bytes=st.none() | st.integers(0, 1 << 80),
    )
)  # fmt: skip
def test_whatever_a_file_claims_there_is_an_estimate(shape: Shape) -> None:
    needed = need(Header(3, 0, "gemma3", None, None, None, False, shape), GIB, ctx=4096, slots=4)
    assert min(needed.weights_bytes, needed.kv_bytes, needed.overhead_bytes) >= 0
    assert judge(needed, None, GIB, GIB).text


# ---------------------------------------------------------------- another's estimate


def test_the_estimate_is_near_that_of_xllamacpp(tmp_path: Path) -> None:
    """Its rule, ollama's of old, is of the time before flash attention: it sets more aside for a batch, never less."""
    xllamacpp = pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    header, _ = sized(data := with_vocabulary())
    path = tmp_path / "llama-2-7b.gguf"
    path.write_bytes(data)
    with path.open("r+b") as sparse:
        sparse.truncate(len(data) + (header.shape.tensor_bytes or 0) + MIB)
    theirs = xllamacpp.estimate_gpu_layers(
        [{"name": "CUDA", "memory_free": 80 * GIB}], str(path), [], 4096, 512, 1, "f16"
    )
    ours = need(header, path.stat().st_size, ctx=4096, slots=1)
    assert theirs.layers == 33
    assert ours.total <= theirs.vram_size <= ours.total * 1.1


def with_vocabulary() -> bytes:
    """Llama 2 7B in Q4_0, with the list of words that only the other estimate counts, its tensors one after another."""
    tensors = [("token_embd", (4096, 32000)), ("output", (4096, 32000))]
    for layer in range(32):
        tensors += [(f"blk.{layer}.attn_{name}", (4096, 4096)) for name in ("q", "k", "v", "output")]
        tensors += [(f"blk.{layer}.ffn_{name}", (4096, 11008)) for name in ("gate", "up")]
        tensors.append((f"blk.{layer}.ffn_down", (11008, 4096)))
    words = key(
        "tokenizer.ggml.tokens", 9, (8).to_bytes(4, "little") + (32000).to_bytes(8, "little") + bytes(8) * 32000
    )
    shape = {"block_count": 32, "embedding_length": 4096, **attention(32, 32)}
    keys = [number(f"llama.{name}", value) for name, value in shape.items()]
    table, offset = [], 0
    for name, (rows, columns) in tensors:
        table.append(tensor(f"{name}.weight", rows, columns, kind=Q4_0)[:-8] + offset.to_bytes(8, "little"))
        offset += rows * columns // 32 * 18
    return file(key("general.architecture", STRING, text("llama")), *keys, words, tensors=tuple(table))


# ---------------------------------------------------------------- the judgement


NEED = Need(int(7.6 * GIB), GIB, GIB // 2)


def test_a_model_that_fits_is_let_through_with_the_numbers() -> None:
    verdict = judge(NEED, None, 20 * GIB, 24 * GIB, where="GPU 0")
    assert (verdict.fits, verdict.permanent, verdict.hint) == (True, False, None)
    assert verdict.text == (
        "it needs about 9.1 GiB of VRAM (weights 7.6, context 1.0, overhead 0.5); GPU 0 has 20.0 GiB free of 24.0"
    )


def test_a_model_that_does_not_fit_now_may_fit_later() -> None:
    verdict = judge(NEED, None, int(5.2 * GIB), 24 * GIB, where="GPUs 0, 1")
    assert (verdict.fits, verdict.permanent) == (False, False)
    assert verdict.text.endswith("; GPUs 0, 1 have 5.2 GiB free of 24.0")
    assert verdict.hint == "free memory on GPUs 0, 1, or take a smaller model or quantisation, or more `gpus`"


def test_a_model_that_never_fits_is_refused_for_good() -> None:
    verdict = judge(NEED, None, 8 * GIB, 8 * GIB, where="GPU 0")
    assert (verdict.fits, verdict.permanent) == (False, True)
    assert verdict.text.endswith("; GPU 0 has 8.0 GiB in all")
    assert verdict.hint == "give the pool fewer `slots` or a smaller `ctx`"  # 0.2 GiB too much, and 1.0 of context


@pytest.mark.parametrize("free", [int(NEED.total * fit.ESTIMATE_SHARE), NEED.total - 1])
def test_a_tight_fit_may_try(free: int) -> None:
    assert judge(NEED, None, free, 24 * GIB).fits
    assert not judge(NEED, None, int(NEED.total * fit.ESTIMATE_SHARE) - 1, 24 * GIB).fits


def test_a_measured_peak_beats_the_estimate_either_way() -> None:
    assert judge(NEED, 5 * GIB, 5 * GIB, 24 * GIB).fits
    verdict = judge(NEED, 12 * GIB, 10 * GIB, 24 * GIB, where="GPU 3")
    assert not verdict.fits
    assert verdict.text == "it took 12.0 GiB of VRAM when it ran before; GPU 3 has 10.0 GiB free of 24.0"


def test_where_nothing_is_known_nothing_is_refused() -> None:
    assert judge(None, None, 0, 24 * GIB).fits
    assert judge(NEED, None, 0, 0).fits
    assert judge(NEED, 99 * GIB, 0, 0).fits


def test_without_a_gpu_only_what_is_larger_than_all_of_the_ram_is_refused() -> None:
    assert judge_ram(NEED, 0, 16 * GIB).fits  # its page cache is the kernel's to give up
    assert judge_ram(NEED, 0, 0).fits
    verdict = judge_ram(NEED, 3 * GIB, 8 * GIB)
    assert (verdict.fits, verdict.permanent) == (False, True)
    assert verdict.text == (
        "it needs about 9.1 GiB of RAM (weights 7.6, context 1.0, overhead 0.5); 3.0 GiB are available of 8.0"
    )


def test_the_room_of_a_pool_is_that_of_its_gpus() -> None:
    gpus = [
        Gpu(index=index, uuid=f"GPU-{index}", name="x", vram_total_bytes=24 * GIB, vram_used_bytes=used * GIB)
        for index, used in enumerate((4, 30, 6))
    ]
    both = room((0, 2), gpus)
    assert (both.total_bytes, both.free_bytes, both.where, both.count) == (48 * GIB, 38 * GIB, "GPUs 0, 2", 2)
    assert room((1,), gpus).free_bytes == 0
    assert (room(None, gpus).count, room(None, gpus).where) == (3, "GPUs 0, 1, 2")
    assert (room((), gpus).count, room((7,), gpus).total_bytes) == (0, 0)
    untold = [*gpus, Gpu(index=3, uuid="GPU-3", name="shares the RAM")]
    assert room(None, untold).total_bytes == 0
