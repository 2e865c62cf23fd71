"""What a pool's `args:` and `env:` may not take from llorch, and why not.

Owns the list of engine flags that llorch's promises, or its view of a pool, rest on: where an engine listens, behind
which key, what it serves there, what it writes down, which model it has and how many slots. They are refused where the
settings are read, and once more where an engine is started. All of these programs read `_` in a flag as `-`. Pure.

Flags: llama.cpp, tools/server/README.md; vLLM, `vllm serve --help=all`; SGLang 0.5.23, `sglang serve --help`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_LOOPBACK = "engines listen on loopback only"
_PORT = "llorch picks a free port"
_KEY = "llorch makes a key for every start"
_PLAIN = "it is llorch that calls the engine, on loopback; TLS is for what listens beyond it: --tls-cert"
_BROWSER = "no browser is a client of an engine: they come through the control"
_PAGES = "the engine would serve more than its API there"
_STATE = "it would let a request change what belongs to others"
_TOOLS = "a model's words would run programs on this machine"
_FILES = "requests could name files of this machine"
_WRITES = "it would write prompts and answers to disk"
_MODEL = "set the pool's `model`"
_SLOTS = "set the pool's `slots`"
_CTX = "set the pool's `ctx`, which is for one slot"
_LOG = "the engine's log is kept in the runtime directory: llorch pool logs"
_CONFIG = "its file could say all that is refused here: write the flags themselves"
_SPREAD = "a pool's engine is on one machine, and what a prompt holds would leave it, in clear"
_TEMPLATE = "a request could bring a template of its own, which the engine runs"

RESERVED = {
    "--host": _LOOPBACK,
    "--port": _PORT,
    "--reuse-port": _PORT,
    "--api-key": _KEY,
    "--api-key-file": _KEY,
    "--ssl-key-file": _PLAIN,
    "--ssl-cert-file": _PLAIN,
    "--path": _PAGES,
    "--api-prefix": _PAGES,
    "--public-path": _PAGES,
    "--ui": _PAGES,
    "--webui": _PAGES,
    "--ui-mcp-proxy": _BROWSER,
    "--webui-mcp-proxy": _BROWSER,
    "--cors-origins": _BROWSER,
    "--cors-methods": _BROWSER,
    "--cors-headers": _BROWSER,
    "--cors-credentials": _BROWSER,
    "--props": _STATE,
    "--slot-save-path": _STATE,
    "--lookup-cache-dynamic": _WRITES,
    "-lcd": _WRITES,
    "--tools": _TOOLS,
    "--tools-runtime": _TOOLS,
    "--agent": _TOOLS,
    "-ag": _TOOLS,
    "--mcp-servers-config": _TOOLS,
    "--mcp-servers-json": _TOOLS,
    "--media-path": _FILES,
    "--verbose": _WRITES,
    "--log-verbose": _WRITES,
    "-v": _WRITES,
    "--verbosity": _WRITES,
    "--log-verbosity": _WRITES,
    "-lv": _WRITES,
    "--log-file": _LOG,
    "--log-prompts-dir": _WRITES,
    "--alias": _MODEL,
    "-a": _MODEL,
    "--model": _MODEL,
    "-m": _MODEL,
    "--model-url": _MODEL,
    "-mu": _MODEL,
    "--docker-repo": _MODEL,
    "-dr": _MODEL,
    "--hf-repo": _MODEL,
    "-hf": _MODEL,
    "-hfr": _MODEL,
    "--hf-file": _MODEL,
    "-hff": _MODEL,
    "--hf-token": "a secret on the command line shows in the list of processes",
    "-hft": "a secret on the command line shows in the list of processes",
    "--models-dir": _MODEL,
    "--models-preset": _MODEL,
    "--models-max": _MODEL,
    "--models-autoload": _MODEL,
    "--rpc": "what a prompt holds would leave this machine, in clear",
    "--parallel": _SLOTS,
    "-np": _SLOTS,
    "--ctx-size": _CTX,
    "-c": _CTX,
    "--kv-unified-per-slot": _CTX,
}
RESERVED_VLLM = {
    "--host": _LOOPBACK,
    "--uds": _LOOPBACK,
    "--port": _PORT,
    "--api-key": _KEY,
    "--ssl-keyfile": _PLAIN,
    "--ssl-certfile": _PLAIN,
    "--ssl-ca-certs": _PLAIN,
    "--ssl-cert-reqs": _PLAIN,
    "--ssl-ciphers": _PLAIN,
    "--enable-ssl-refresh": _PLAIN,
    "--root-path": _PAGES,
    "--middleware": _PAGES,
    "--grpc": _PAGES,
    "--enable-offline-docs": _PAGES,
    "--enable-tokenizer-info-endpoint": _PAGES,
    "--profiler-config": _PAGES,
    "--allow-credentials": _BROWSER,
    "--allowed-origins": _BROWSER,
    "--allowed-methods": _BROWSER,
    "--allowed-headers": _BROWSER,
    "--trust-request-chat-template": _TEMPLATE,
    "--tool-server": _TOOLS,
    "--allowed-local-media-path": _FILES,
    "--enable-log-requests": _WRITES,
    "--enable-log-outputs": _WRITES,
    "--log-config-file": _LOG,
    "--config": _CONFIG,
    "--model": _MODEL,
    "--served-model-name": _MODEL,
    "--max-num-seqs": _SLOTS,
    "--max-model-len": _CTX,
    "--headless": _SPREAD,
    "--nnodes": _SPREAD,
    "-n": _SPREAD,
    "--node-rank": _SPREAD,
    "-r": _SPREAD,
    "--master-addr": _SPREAD,
    "--master-port": _SPREAD,
    "--data-parallel-address": _SPREAD,
    "-dpa": _SPREAD,
    "--data-parallel-rpc-port": _SPREAD,
    "-dpp": _SPREAD,
    "--data-parallel-supervisor-port": _SPREAD,
}
RESERVED_SGLANG = {
    "--host": _LOOPBACK,
    "--port": _PORT,
    "--enable-http-worker-reuseport": _PORT,
    "--api-key": _KEY,
    "--admin-api-key": _KEY,
    "--ssl-keyfile": _PLAIN,
    "--ssl-certfile": _PLAIN,
    "--ssl-ca-certs": _PLAIN,
    "--ssl-keyfile-password": _PLAIN,
    "--enable-ssl-refresh": _PLAIN,
    "--fastapi-root-path": _PAGES,
    "--smg-grpc-mode": _PAGES,
    "--grpc-mode": _PAGES,
    "--grpc-port": _PAGES,
    "--smg-http-sidecar-port": _PAGES,
    "--sidecar": _PAGES,
    "--sidecar-args": _PAGES,
    "--enable-response-store": _STATE,
    "--trust-request-chat-template": _TEMPLATE,
    "--tool-server": _TOOLS,
    "--log-requests": _WRITES,
    "--log-requests-level": _WRITES,
    "--log-requests-target": _WRITES,
    "--crash-dump-folder": _WRITES,
    "--debug-tensor-dump-output-folder": _WRITES,
    "--log-level": "below `warning` it writes its key into its log",
    "--config": _CONFIG,
    "--model": _MODEL,
    "--model-path": _MODEL,
    "--served-model-name": _MODEL,
    "--max-running-requests": _SLOTS,
    "--context-length": _CTX,
    "--nnodes": _SPREAD,
    "--node-rank": _SPREAD,
    "--dist-init-addr": _SPREAD,
    "--nccl-init-addr": _SPREAD,
}
# By the name of the engine; llama.cpp's flags stand for all others. These two take a flag's beginning for the flag.
RESERVED_OF: Mapping[str, Mapping[str, str]] = {"vllm": RESERVED_VLLM, "sglang": RESERVED_SGLANG}
# Environment names that say the same as flags, and our own.
RESERVED_ENV = {
    "VLLM_API_KEY": _KEY,
    "VLLM_SERVER_DEV_MODE": _PAGES,
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": _STATE,
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": _WRITES,
    "VLLM_LOGGING_CONFIG_PATH": _LOG,
    "SGLANG_GRPC_PORT": _PAGES,
    "SGLANG_LOGGING_CONFIG_PATH": _LOG,
    "LLAMA_ARG_": "write it as a flag in `args`",
    "LLAMA_API_KEY": _KEY,
    "LLORCH_": "llorch's own settings are not for an engine",
}


def why_not_arg(arg: str, engine: str = "auto") -> str | None:
    """Why a pool's args may not have this word, in which `--flag=value` is one; None if they may."""
    name = arg.partition("=")[0]
    name = name.replace("_", "-") if name.startswith("--") else name
    reserved = RESERVED_OF.get(engine)
    if reserved is None:
        return RESERVED.get(name)
    if name in reserved or not name.startswith("--") or name == "--":
        return reserved.get(name)
    return next((why for flag, why in reserved.items() if flag.startswith(name)), None)


def why_not_env(name: str) -> str | None:
    """Why a pool's env may not have this name; None if it may."""
    return next((why for start, why in RESERVED_ENV.items() if name.startswith(start)), None)


# ---------------------------------------------------------------- the command of a program of the owner's own

PLACEHOLDERS = ("port", "model", "gpus", "slots", "ctx", "key_file")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def placeholders(words: Iterable[str]) -> list[str]:
    """What stands in braces in a `command:`, JSON aside."""
    return [name for word in words for name in _PLACEHOLDER.findall(word)]


def fill(word: str, values: Mapping[str, str]) -> str:
    """A word of a `command:` with what its placeholders stand for. What they stand for is not looked into."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), word)
