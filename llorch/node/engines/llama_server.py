"""llama.cpp's `llama-server`, and the flags that every program speaking its command line is started with.

Owns those flags: loopback, a port, a key from a file, no state shared between the requests of different people. Never
looks for the binary: `detect` does. Flags: llama.cpp, tools/server/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from llorch.config_pools import PoolSpec
from llorch.node.engines.spec import GGUF, LOOPBACK, Launch, refuse_reserved, visible_gpus

NAME = "llama-server"

# Newer than some builds in use. Without the first a build has no RAM prompt cache at all, so nothing is lost with it.
# The cache was reported to restore the content of another conversation (llama.cpp#27148).
# What slots do, with the prompts in some builds, is nobody's to ask; tests may, by the pool's own `--slots`.
# `--metrics` shows counters, behind the key: whether a busy engine moves is told by nothing else.
OPTIONAL = (("--cache-ram", "0"), ("--no-cache-idle-slots",), ("--no-webui",), ("--no-slots",), ("--metrics",))
ALL_LAYERS = "999"  # every layer: builds before `auto` left them all on the CPU


def server_flags(pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> list[str]:
    """What every llama-server-like program is started with; the context is divided between the slots. It stands after
    the pool's own arguments, for of a flag that is given twice these programs take the last.

    Raises ConfigError for an argument that settings would not have let through.
    """
    refuse_reserved(pool, NAME)
    flags = ["--host", LOOPBACK, "--port", str(port), "--api-key-file", key_file, "--alias", model_id]
    flags += ["--parallel", str(pool.slots), "--ctx-size", str(pool.ctx * pool.slots)]
    flags += ["--model", model_path] if model_path is not None else []
    return [*pool.args, *flags]


def gpu_flags(pool: PoolSpec) -> list[str]:
    if pool.gpus is None:
        return []
    return ["--n-gpu-layers", ALL_LAYERS if pool.gpus else "0"]


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """`flags` are those the binary knows, of the optional ones."""

    program: str
    version: str | None = None
    flags: frozenset[str] = frozenset(option[0] for option in OPTIONAL)
    name: str = NAME
    needs_model: bool = True
    formats: frozenset[str] = frozenset({GGUF})
    inner_ports_open: bool = False

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        argv = [self.program]
        argv += [word for option in OPTIONAL if option[0] in self.flags for word in option]
        argv += gpu_flags(pool)
        argv += server_flags(pool, model_id=model_id, port=port, key_file=key_file, model_path=model_path)
        return Launch(tuple(argv), {**visible_gpus(pool), **dict(pool.env)})
