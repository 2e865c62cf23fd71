"""llama.cpp's `llama-server`, and the flags that every program speaking its command line is started with.

Owns those flags: loopback, a port, a key from a file, no state shared between the requests of different people. Never
looks for the binary: `detect` does. Flags: llama.cpp, tools/server/README.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llorch.config_pools import PoolSpec
from llorch.errors import ConfigError
from llorch.node.engines.spec import LOOPBACK, Launch, visible_gpus

NAME = "llama-server"

# A pool's own `args` may not change what llorch's promises and its view of the pool rest on.
RESERVED = {
    "--host": "engines listen on loopback only",
    "--port": "llorch picks a free port",
    "--reuse-port": "llorch picks a free port",
    "--api-key": "llorch makes a key for every start",
    "--api-key-file": "llorch makes a key for every start",
    "--alias": "set the pool's `model`",
    "-a": "set the pool's `model`",
    "--model": "set the pool's `model`",
    "-m": "set the pool's `model`",
    "--parallel": "set the pool's `slots`",
    "-np": "set the pool's `slots`",
    "--ctx-size": "set the pool's `ctx`, which is for one slot",
    "-c": "set the pool's `ctx`, which is for one slot",
}

# Newer than some builds in use. Without the first a build has no RAM prompt cache at all, so nothing is lost with it.
# The cache was reported to restore the content of another conversation (llama.cpp#27148).
OPTIONAL = (("--cache-ram", "0"), ("--no-cache-idle-slots",), ("--no-webui",))
ALL_LAYERS = "999"  # every layer: builds before `auto` left them all on the CPU


def check_args(args: Iterable[str]) -> None:
    """Raises ConfigError for arguments of a pool that llorch sets itself."""
    for arg in args:
        name = arg.partition("=")[0]
        if name in RESERVED:
            raise ConfigError(f"{name} can't be given in a pool's args: {RESERVED[name]}")


def server_flags(pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> list[str]:
    """What every llama-server-like program is started with; the context is divided between the slots."""
    check_args(pool.args)
    flags = ["--host", LOOPBACK, "--port", str(port), "--api-key-file", key_file, "--alias", model_id]
    flags += ["--parallel", str(pool.slots), "--ctx-size", str(pool.ctx * pool.slots)]
    return [*flags, "--model", model_path] if model_path is not None else flags


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

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        argv = [self.program]
        argv += server_flags(pool, model_id=model_id, port=port, key_file=key_file, model_path=model_path)
        argv += [word for option in OPTIONAL if option[0] in self.flags for word in option]
        return Launch((*argv, *gpu_flags(pool), *pool.args), {**visible_gpus(pool), **dict(pool.env)})
