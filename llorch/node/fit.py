"""Whether a model fits into a pool's memory, before an engine finds out in the driver.

Surface:
    asked(args)             what a pool's own arguments say of where the memory goes
    need(header, size, ..)  an estimate: weights + context + overhead
    room(gpus, inventory)   what there is
    judge(..), judge_ram(..)    a verdict, with the numbers in its text

Owns the estimate and the judgement. A measured peak beats the estimate. Of the two mistakes that a judgement can make
the lenient one is chosen: what is let through wrongly fails in the driver, while what is refused wrongly could have
served. So memory that a newer engine may save (one latent vector instead of keys and values, windows of attention)
counts as saved, and an estimate is refused only if nine tenths of it don't fit. Never looks at the machine: facts come
in.

How llama.cpp lays out memory: src/llama-model.cpp (the input embedding stays in RAM), src/llama-kv-cache.cpp and
-iswa.cpp (cells, windows), src/llama-context.cpp (compute buffers). Checked against its own logs in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llorch.messages import Gpu
from llorch.node.engines.gguf import Header, Shape

GIB = 1 << 30
UBATCH = 512  # tokens computed at a time: llama.cpp's --ubatch-size
CELLS = 256  # a slot's cells are rounded up to so many (GGML_PAD)
CONTEXT_BYTES = 512 << 20  # a driver's context and the kernels, per GPU: 300 to 500 MiB are met; ollama sets 457 aside
UNKNOWN_COMPUTE_BYTES = 256 << 20  # of a file that does not tell its vocabulary
ESTIMATE_SHARE = 0.9  # what of an estimate must fit at least: overhead, alone, may be wrong by half
MEASURED_SHARE = 0.97  # of a measured peak: drivers round
CACHE_BYTES: Mapping[str, float] = {
    "f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}  # fmt: skip
F16 = "f16"
# One layer in so many attends to all of the context, the others to a window; for files that don't tell by
# `sliding_window_pattern`. As in llama.cpp's `set_swa_pattern`. An architecture with a window that is not here is taken
# to have it in every layer: the least that it can need.
WINDOWED: Mapping[str, int] = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gemma-embedding": 6, "gpt-oss": 2, "cohere2": 4, "llama4": 4, "exaone4": 4,
    "olmo2": 4, "smallthinker": 4,
}  # fmt: skip
LLAMA4_WINDOW = 8192  # said nowhere in its files
# Arguments after which nobody can tell from outside what goes where.
_BY_HAND = frozenset(
    {
        "-ot", "--override-tensor", "-cmoe", "--cpu-moe", "-ncmoe", "--n-cpu-moe", "-nkvo", "--no-kv-offload",
        "-md", "--model-draft", "-mm", "--mmproj", "--lora", "--lora-scaled", "--control-vector", "-fit", "--fit",
        "--device", "-dev", "-mg", "--main-gpu", "-sm", "--split-mode",
    }
)  # fmt: skip
_LAYERS = frozenset({"-ngl", "--gpu-layers", "--n-gpu-layers"})
_KEYS = frozenset({"-ctk", "--cache-type-k"})
_VALUES = frozenset({"-ctv", "--cache-type-v"})
_UBATCH = frozenset({"-ub", "--ubatch-size"})


@dataclass(frozen=True, slots=True)
class Asked:
    """`estimable` False: no estimate holds, for tensors are placed by hand or more is loaded than the model."""

    estimable: bool = True
    gpu_layers: int | None = None
    keys: str = F16
    values: str = F16
    ubatch: int = UBATCH
    whole_windows: bool = False


AS_USUAL = Asked()


@dataclass(frozen=True, slots=True)
class Need:
    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int

    @property
    def total(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.overhead_bytes


@dataclass(frozen=True, slots=True)
class Room:
    """The GPUs of a pool, as one. `total_bytes` 0: their driver does not tell, so nothing can be judged."""

    total_bytes: int
    free_bytes: int
    where: str
    count: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """`permanent`: not even with all of that memory free. `text` has the numbers, `hint` what mends it."""

    fits: bool
    permanent: bool
    text: str
    hint: str | None = None


# ---------------------------------------------------------------- what is needed


def asked(args: Sequence[str]) -> Asked:
    """Reads only flags that change the need; what the engine thinks of the others is its own business."""
    words = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    given: dict[str, str] = {}
    for place, word in enumerate(words):
        name = word.replace("_", "-") if word.startswith("--") else word
        given.pop(name, None)  # of a flag that is given twice the last counts, also under another of its names
        given[name] = words[place + 1] if place + 1 < len(words) else ""

    def last(names: frozenset[str]) -> str | None:
        return next((value for name, value in reversed(given.items()) if name in names), None)

    layers, ubatch = last(_LAYERS), last(_UBATCH)
    keys, values = last(_KEYS) or F16, last(_VALUES) or F16
    return Asked(
        estimable=not _BY_HAND & given.keys()
        and keys in CACHE_BYTES
        and values in CACHE_BYTES
        and (layers is None or layers.isdecimal()),
        gpu_layers=int(layers) if layers and layers.isdecimal() and len(layers) < 10 else None,
        keys=keys,
        values=values,
        ubatch=int(ubatch) if ubatch and ubatch.isdecimal() and 0 < len(ubatch) < 8 else UBATCH,
        whole_windows="--swa-full" in given,
    )


def need(
    header: Header | None,
    file_bytes: int,
    *,
    ctx: int,
    slots: int,
    gpus: int = 1,
    args: Asked = AS_USUAL,
) -> Need:
    """Of one engine. `file_bytes`: of all files of the model; `header`: of the first, None where it is no GGUF, whose
    weights alone are then counted. `ctx` is for one slot. `gpus` 0: it runs in RAM.
    """
    if header is None:
        return Need(file_bytes, 0, gpus * CONTEXT_BYTES)
    shape = header.shape
    weights, share = _weights(shape, file_bytes), 1.0
    if gpus and args.gpu_layers is not None and shape.blocks and args.gpu_layers <= shape.blocks:
        # The last layers go to the GPU, and the output only with one more than there are.
        share = args.gpu_layers / shape.blocks
        weights = int((weights - min(shape.output_bytes, weights)) * share)
    elif not gpus:
        weights = file_bytes
    kv = int(_kv_bytes(header.architecture, shape, ctx=ctx, slots=slots, args=args) * share)
    compute = _compute_bytes(shape, args.ubatch)
    return Need(weights, kv, max(1, gpus) * compute + gpus * CONTEXT_BYTES)


def _weights(shape: Shape, file_bytes: int) -> int:
    """What of a model goes to a GPU: all but the embedding at its input, where that is not its output, too."""
    counted = shape.tensor_bytes
    size = min(counted, file_bytes) if counted and shape.parts == 1 else file_bytes
    if shape.output_bytes or shape.parts > 1:  # the output of a split model may lie in another file
        size -= min(shape.embedding_bytes, size)
    return size


def _kv_bytes(architecture: str, shape: Shape, *, ctx: int, slots: int, args: Asked) -> int:
    if not shape.blocks or shape.blocks > 100_000:
        return 0
    heads = max(shape.heads, default=0)
    by_head = (shape.embedding_length or 0) // heads if heads else 0
    key = by_head if shape.key_length is None else shape.key_length
    value = by_head if shape.value_length is None else shape.value_length
    cell = key * CACHE_BYTES[args.keys] + (0 if shape.latent else value * CACHE_BYTES[args.values])
    full = _up(ctx)
    window = LLAMA4_WINDOW if architecture == "llama4" else shape.window
    part = min(full, _up(window + args.ubatch)) if window and not args.whole_windows else full
    total = 0.0
    for layer in range(shape.blocks):
        if shape.attention_every and (layer + 1) % shape.attention_every:
            continue
        cells = part if part < full and _windowed(architecture, shape, layer) else full
        total += _heads_kv(shape, layer, heads) * cell * cells
    return int(total) * slots


def _heads_kv(shape: Shape, layer: int, heads: int) -> int:
    """0 in layers that don't attend, as of hybrid models."""
    if not shape.heads_kv:
        return heads  # of which each has keys and values of its own
    return shape.heads_kv[layer] if layer < len(shape.heads_kv) and len(shape.heads_kv) > 1 else shape.heads_kv[0]


def _windowed(architecture: str, shape: Shape, layer: int) -> bool:
    if len(shape.pattern) > 1:
        return bool(shape.pattern[layer]) if layer < len(shape.pattern) else True
    every = shape.pattern[0] if shape.pattern else WINDOWED.get(architecture, 0)
    return every == 0 or layer % every < every - 1


def _up(cells: int) -> int:
    return -(-cells // CELLS) * CELLS


def _compute_bytes(shape: Shape, ubatch: int) -> int:
    """The largest of what a step computes at once: a number for every word, of every token. With flash attention, as
    is the rule by now; without, it grows with the context.
    """
    if not shape.vocabulary:
        return UNKNOWN_COMPUTE_BYTES
    return min(4 * ubatch * (shape.vocabulary + (shape.embedding_length or 0)), 16 * GIB)


# ---------------------------------------------------------------- what there is


def room(wanted: Iterable[int] | None, gpus: Sequence[Gpu]) -> Room:
    """The GPUs with these indices, all of them if None."""
    indices = None if wanted is None else frozenset(wanted)
    chosen = [gpu for gpu in gpus if indices is None or gpu.index in indices]
    names = ", ".join(str(gpu.index) for gpu in chosen)
    told = all(gpu.vram_total_bytes for gpu in chosen)
    return Room(
        total_bytes=sum(gpu.vram_total_bytes for gpu in chosen) if told else 0,
        free_bytes=sum(max(0, gpu.vram_total_bytes - gpu.vram_used_bytes) for gpu in chosen),
        where=f"GPU {names}" if len(chosen) == 1 else f"GPUs {names}" if chosen else "no GPU",
        count=len(chosen),
    )


def judge(
    needed: Need | None, learned_peak: int | None, free_bytes: int, total_bytes: int, *, where: str = "the GPU"
) -> Verdict:
    """`learned_peak`: what one engine was measured to take, with these settings. None of both: nothing is refused."""
    if learned_peak is not None:
        least, words = int(learned_peak * MEASURED_SHARE), f"it took {gib(learned_peak)} GiB of VRAM when it ran before"
    elif needed is not None:
        least, words = (
            int(needed.total * ESTIMATE_SHARE),
            f"it needs about {gib(needed.total)} GiB of VRAM{_of(needed)}",
        )
    else:
        return Verdict(True, False, "nothing is known of the VRAM it needs")
    if not total_bytes:
        return Verdict(True, False, f"{words}; how much {where} has is not known")
    words += f"; {where} {'have' if where.startswith('GPUs') else 'has'}"
    if least > total_bytes:
        return Verdict(False, True, f"{words} {gib(total_bytes)} GiB in all", _mend(needed, least - total_bytes))
    text = f"{words} {gib(free_bytes)} GiB free of {gib(total_bytes)}"
    if least <= free_bytes:
        return Verdict(True, False, text)
    return Verdict(False, False, text, f"free memory on {where}, or {_mend(needed, least - free_bytes)}")


def judge_ram(needed: Need, available_bytes: int, total_bytes: int) -> Verdict:
    """For an engine without a GPU. Only what is larger than all of the RAM is refused, for good: what is available is
    an opinion of the kernel, which gives up its page cache, the mapped model itself included, when it has to.
    """
    text = (
        f"it needs about {gib(needed.total)} GiB of RAM{_of(needed)}; "
        f"{gib(available_bytes)} GiB are available of {gib(total_bytes)}"
    )
    least = int(needed.total * ESTIMATE_SHARE)
    if not total_bytes or least <= total_bytes:
        return Verdict(True, False, text)
    return Verdict(False, True, text, _mend(needed, least - total_bytes))


def _mend(needed: Need | None, excess_bytes: int) -> str:
    if needed is not None and needed.kv_bytes >= excess_bytes:
        return "give the pool fewer `slots` or a smaller `ctx`"
    return "take a smaller model or quantisation, or more `gpus`"


def _of(needed: Need) -> str:
    return (
        f" (weights {gib(needed.weights_bytes)}, context {gib(needed.kv_bytes)}, overhead {gib(needed.overhead_bytes)})"
    )


def gib(count: int) -> str:
    return f"{count / GIB:.1f}"
