"""llama.cpp from the xllamacpp wheel, run as a process of its own that takes llama-server's flags.

A process, not a thread: a crash of the engine costs its tasks, not the node, and its memory goes when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from llorch.config_pools import PoolSpec
from llorch.node.engines.llama_server import OPTIONAL, gpu_flags, server_flags
from llorch.node.engines.spec import GGUF, Launch, visible_gpus

NAME = "llamacpp"


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """`python` is the interpreter that has llorch and xllamacpp."""

    python: str
    version: str | None = None
    name: str = NAME
    needs_model: bool = True
    formats: frozenset[str] = frozenset({GGUF})
    inner_ports_open: bool = False

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        argv = [self.python, "-m", "llorch.node.engines.llamacpp_server"]
        argv += [word for option in OPTIONAL for word in option]
        argv += gpu_flags(pool)
        argv += server_flags(pool, model_id=model_id, port=port, key_file=key_file, model_path=model_path)
        return Launch(tuple(argv), {**visible_gpus(pool), **dict(pool.env)})
