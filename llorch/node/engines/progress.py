"""What an engine's `/metrics` says of its work: counters that move while it works, and how busy it is.

Surface: read(engine, text) -> Progress | None; None: there is no counter of a known engine in it.

Owns the names, as each engine writes them in Prometheus' text format, and a reader of that format for these names
alone, which takes whatever an engine may send: what can't be read is passed over, and work is bounded by the text's
length. Pure. Names: llama.cpp tools/server/README.md; vLLM docs/usage/metrics, of which some were renamed; SGLang
docs/references/production_metrics. Format: https://prometheus.io/docs/instrumenting/exposition_formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MAX_TEXT_CHARS = 8 * 1024 * 1024  # vLLM's histograms with several models and ranks come to some 1 MiB
MAX_BUSY = 2**31
_NUMBER = re.compile(r"[+-]?(?:\d{1,32}(?:\.\d{0,32})?|\.\d{1,32})(?:[eE][+-]?\d{1,3})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Progress:
    """`counters` of one engine are always of the same names in the same order. `busy`: requests that it works on.
    `kv_usage`: the part of its cache that is in use, 0 to 1.
    """

    counters: tuple[float, ...]
    busy: int | None = None
    kv_usage: float | None = None


@dataclass(frozen=True, slots=True)
class _Family:
    """The names of one engine. Of `usage` the first that is there counts, for newer versions have newer names.

    `stale`: what it shows as busy is written now and then, so that 0 means nothing.
    """

    counters: tuple[str, ...]
    busy: str
    usage: tuple[str, ...]
    stale: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.counters, self.busy, *self.usage)


LLAMA_CPP = _Family(
    ("llamacpp:n_decode_total", "llamacpp:tokens_predicted_total", "llamacpp:prompt_tokens_total"),
    "llamacpp:requests_processing",
    ("llamacpp:kv_cache_usage_ratio",),
)
VLLM = _Family(
    ("vllm:iteration_tokens_total_count", "vllm:generation_tokens_total", "vllm:prompt_tokens_total"),
    "vllm:num_requests_running",
    ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
)
SGLANG = _Family(
    ("sglang:realtime_tokens_total", "sglang:generation_tokens_total", "sglang:prompt_tokens_total"),
    "sglang:num_running_reqs",
    ("sglang:token_usage",),
    stale=True,
)
ALL = (LLAMA_CPP, VLLM, SGLANG)
_FAMILIES: Mapping[str, tuple[_Family, ...]] = {
    "llamacpp": (LLAMA_CPP,),
    "llama-server": (LLAMA_CPP,),
    "simulated": (LLAMA_CPP,),
    "vllm": (VLLM,),
    "sglang": (SGLANG,),
}


def read(engine: str, text: str) -> Progress | None:
    """What `text` says. `engine` is its name where llorch knows it; else it may be any of those with known names."""
    if len(text) > MAX_TEXT_CHARS:
        return None
    families = _FAMILIES.get(engine, ALL)
    wanted = frozenset(name for family in families for name in family.names)
    seen: dict[str, list[float]] = {}
    for name, value in _samples(text, wanted):
        seen.setdefault(name, []).append(value)
    for family in families:
        if any(name in seen for name in family.counters):
            return _progress(family, seen)
    return None


def _samples(text: str, wanted: frozenset[str]) -> Iterator[tuple[str, float]]:
    """(name, value) of each line that is about one of the names, whatever its labels: ranks and models add up."""
    at = 0
    while at < len(text):
        end = text.find("\n", at)
        line, at = (text[at:], len(text)) if end < 0 else (text[at:end], end + 1)
        name, brace, labels = line.partition("{")
        if brace:
            words = [name.strip(" \t"), *labels.rpartition("}")[2].split(None, 2)] if "}" in labels else []
        else:
            words = line.split(None, 3)
        if 2 <= len(words) <= 3 and words[0] in wanted and _NUMBER.fullmatch(words[1]):  # the third is a time
            value = float(words[1])
            if 0 <= value < float("inf"):
                yield words[0], value


def _progress(family: _Family, seen: Mapping[str, list[float]]) -> Progress:
    counters = tuple(min(sum(seen.get(name, ())), float(2**1023)) for name in family.counters)
    running = sum(seen[family.busy]) if family.busy in seen else None
    busy = int(running) if running is not None and running <= MAX_BUSY else None
    usage = next((max(seen[name]) for name in family.usage if name in seen), None)
    return Progress(
        counters,
        None if family.stale and busy == 0 else busy,
        usage if usage is not None and usage <= 1 else None,
    )
