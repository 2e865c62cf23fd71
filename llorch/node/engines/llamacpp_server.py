"""The llama.cpp server of the xllamacpp wheel behind llama-server's command line: `python -m` this module.

It exists so that a node with the wheel needs no other program, and starts both in one way. Owns the flags it knows (an
unknown one ends it with exit code 2) and what no flag can change: loopback only, no web page, no other origin. Never
logs a prompt or an answer, and no Python runs between a request and its answer. Flags: llama.cpp,
tools/server/README.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from llorch.node.engines import gguf
from llorch.node.engines.spec import LOOPBACK

FAILED = 1
MISUSED = 2
ERRORS_ONLY = 1  # llama.cpp's warnings quote the requests that they are about

# Each with what it sets of xllamacpp's CommonParams.
NUMBERS = (
    ("--parallel", "-np", "n_parallel"),
    ("--ctx-size", "-c", "n_ctx"),
    ("--n-gpu-layers", "--gpu-layers", "-ngl", "n_gpu_layers"),
    ("--main-gpu", "-mg", "main_gpu"),
    ("--threads", "-t", "cpuparams.n_threads"),
    ("--threads-batch", "-tb", "cpuparams_batch.n_threads"),
    ("--threads-http", "n_threads_http"),
    ("--batch-size", "-b", "n_batch"),
    ("--ubatch-size", "-ub", "n_ubatch"),
    ("--predict", "--n-predict", "-n", "n_predict"),
    ("--cache-ram", "-cram", "cache_ram_mib"),
    ("--cache-reuse", "n_cache_reuse"),
    ("--ctx-checkpoints", "n_ctx_checkpoints"),
    ("--seed", "-s", "sampling.seed"),
    ("--top-k", "sampling.top_k"),
)
LEAST = {"n_parallel": 1, "n_ctx": 0}  # llama.cpp's own choice of slots would differ from the pool's
FRACTIONS = (
    ("--temp", "--temperature", "sampling.temp"),
    ("--top-p", "sampling.top_p"),
    ("--min-p", "sampling.min_p"),
    ("--repeat-penalty", "sampling.penalty_repeat"),
    ("--rope-freq-base", "rope_freq_base"),
    ("--rope-freq-scale", "rope_freq_scale"),
    ("--slot-prompt-similarity", "-sps", "slot_prompt_similarity"),
)
TEXTS = (
    ("--chat-template", "chat_template"),
    ("--mmproj", "-mm", "mmproj.path"),
)
SWITCHES: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("--metrics",), "endpoint_metrics", True),
    (("--slots",), "endpoint_slots", True),
    (("--no-slots",), "endpoint_slots", False),
    (("--jinja",), "use_jinja", True),
    (("--no-jinja",), "use_jinja", False),
    (("--embeddings", "--embedding"), "embedding", True),
    (("--no-webui", "--no-ui"), "ui", False),
    (("--cache-prompt",), "cache_prompt", True),
    (("--no-cache-prompt",), "cache_prompt", False),
    (("--cache-idle-slots",), "cache_idle_slots", True),
    (("--no-cache-idle-slots",), "cache_idle_slots", False),
    (("--context-shift",), "ctx_shift", True),
    (("--no-context-shift",), "ctx_shift", False),
    (("--cont-batching", "-cb"), "cont_batching", True),
    (("--kv-unified", "-kvu"), "kv_unified", True),
    (("--no-kv-unified",), "kv_unified", False),
    (("--no-kv-offload", "-nkvo"), "no_kv_offload", True),
    (("--swa-full",), "swa_full", True),
    (("--warmup",), "warmup", True),
    (("--no-warmup",), "warmup", False),
)
CACHE_TYPES = {word: word.upper() for word in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")}
# Words that stand for a value of an enumeration: its name, the prefix of its values, what a word is short for.
WORDS = (
    (("--flash-attn", "-fa"), "flash_attn_type", "llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_",
     {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}),
    (("--split-mode", "-sm"), "split_mode", "llama_split_mode", "LLAMA_SPLIT_MODE_",
     {"none": "NONE", "layer": "LAYER", "row": "ROW"}),
    (("--pooling",), "pooling_type", "llama_pooling_type", "LLAMA_POOLING_TYPE_",
     {"none": "NONE", "mean": "MEAN", "cls": "CLS", "last": "LAST", "rank": "RANK"}),
    (("--reasoning-format",), "reasoning_format", "common_reasoning_format", "COMMON_REASONING_FORMAT_",
     {"none": "NONE", "auto": "AUTO", "deepseek": "DEEPSEEK", "deepseek-legacy": "DEEPSEEK_LEGACY"}),
    (("--cache-type-k", "-ctk"), "cache_type_k", "ggml_type", "GGML_TYPE_", CACHE_TYPES),
    (("--cache-type-v", "-ctv"), "cache_type_v", "ggml_type", "GGML_TYPE_", CACHE_TYPES),
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """One line for a mistake; the node shows the last line of an engine's log."""

    def error(self, message: str) -> NoReturn:
        _end(MISUSED, message)


def _end(code: int, message: str) -> NoReturn:
    print(f"{Path(__file__).stem}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line. One of the tables is an attribute only if it was given, under its dotted name."""
    parser = _Parser(prog="llamacpp_server", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--model", "-m", required=True, metavar="FILE")
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=_port, required=True, metavar="PORT")
    parser.add_argument("--alias", "-a", default=None)
    parser.add_argument("--api-key-file", default=None, metavar="FILE")
    parser.add_argument("--chat-template-file", default=None, metavar="FILE")
    for table, kind in ((NUMBERS, int), (FRACTIONS, float), (TEXTS, str)):
        for *flags, attribute in table:
            parser.add_argument(*flags, dest=attribute, type=kind, metavar=kind.__name__.upper())
    for names, attribute, value in SWITCHES:
        parser.add_argument(*names, dest=attribute, action="store_const", const=value)
    for names, attribute, _, _, words in WORDS:
        parser.add_argument(*names, dest=attribute, choices=sorted(words))
    given = parser.parse_args(argv)
    for name, least in LEAST.items():
        if getattr(given, name, least) < least:
            parser.error(f"{getattr(given, name)} is too few for {name}: {least} at least")
    if given.host != LOOPBACK:
        parser.error(f"it listens on {LOOPBACK} only, not on {given.host}")
    return given


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 (any that is free) to 65535")
    return int(text)


def _keys(path: str) -> list[str]:
    keys = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not keys:
        _end(MISUSED, f"there is no key in {path}")
    return keys


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _end(MISUSED, f"can't read {path}: {getattr(error, 'strerror', None) or 'it is not text'}")


def _set(params: Any, attribute: str, value: object) -> None:
    *path, last = attribute.split(".")
    for name in path:
        params = getattr(params, name)
    setattr(params, last, value)


def build(llama: Any, given: argparse.Namespace) -> Any:
    """xllamacpp's parameters. `llama` is the module, which is imported late: it loads the GPU's libraries."""
    params = llama.CommonParams()
    flags = vars(given)
    for names, attribute, enumeration, prefix, words in WORDS:
        if (word := flags.pop(attribute, None)) is not None:
            value = getattr(getattr(llama, enumeration), prefix + words[word], None)
            if value is None:
                _end(MISUSED, f"{names[0]} {word} is not known to this version of xllamacpp")
            _set(params, attribute, value)
    fixed = ("model", "host", "port", "alias", "api_key_file", "chat_template_file")
    for attribute, value in flags.items():
        if attribute not in fixed:
            try:
                _set(params, attribute, value)
            except OverflowError:
                _end(MISUSED, f"{value} is out of range for {attribute}")
    params.model.path = given.model
    params.hostnames = [given.host]
    params.port = given.port
    if given.alias is not None:
        params.model_alias = {given.alias}
    if given.api_key_file is not None:
        params.api_keys = _keys(given.api_key_file)
    if given.chat_template_file is not None:
        params.chat_template = _text(given.chat_template_file)
    params.cors_origins = ""  # a page in somebody's browser is no client of an engine
    params.cors_credentials = False
    params.ui = False
    params.verbosity = ERRORS_ONLY
    return params


def main(argv: Sequence[str] | None = None) -> NoReturn:
    # The default action ends the process at once, also while C++ loads a model and Python could not run a handler.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    # Where llama.cpp gives up it would have a debugger, if there is one, print every stack before the process ends.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    given = parse(sys.argv[1:] if argv is None else argv)
    try:
        gguf.read_header(Path(given.model))
    except OSError as error:
        _end(FAILED, f"the model {given.model} can't be read: {error.strerror}")
    except ValueError as error:
        _end(FAILED, f"the model {given.model} is not a usable GGUF: {error}")
    try:
        import xllamacpp
    except ImportError as error:
        _end(FAILED, f"xllamacpp can't be used: {error}")
    params = build(xllamacpp, given)
    try:
        server = xllamacpp.Server(params)  # returns when the model is loaded; /health answers 503 until then
    except RuntimeError:
        _end(FAILED, f"llama.cpp did not start {given.model} on port {given.port}; the lines above say why")
    print(f"{Path(__file__).stem}: listening on {server.listening_address}", file=sys.stderr, flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
