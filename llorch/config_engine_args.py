"""What a pool's `args:` and `env:` may not take from llorch, and why not.

Owns the list of engine flags that llorch's promises, or its view of a pool, rest on: where an engine listens, behind
which key, what it serves there, what it writes down, which model it has and how many slots. They are refused where the
settings are read, and once more where an engine is started. Flags: llama.cpp, tools/server/README.md, which reads `_`
in a flag as `-`. Pure.
"""

from __future__ import annotations

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
    "--log-file": "the engine's log is kept in the runtime directory: llorch pool logs",
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
# Environment names that say the same as flags, and our own.
RESERVED_ENV = {
    "LLAMA_ARG_": "write it as a flag in `args`",
    "LLAMA_API_KEY": _KEY,
    "LLORCH_": "llorch's own settings are not for an engine",
}


def why_not_arg(arg: str) -> str | None:
    """Why a pool's args may not have this word, in which `--flag=value` is one; None if they may."""
    name = arg.partition("=")[0]
    return RESERVED.get(name.replace("_", "-") if name.startswith("--") else name)


def why_not_env(name: str) -> str | None:
    """Why a pool's env may not have this name; None if it may."""
    return next((why for start, why in RESERVED_ENV.items() if name.startswith(start)), None)
