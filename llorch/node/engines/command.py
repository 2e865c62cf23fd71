"""A program of the owner's own, by the template in the pool's `command:`. It has to speak the OpenAI surface.

Owns how the template is filled. Where the program listens, what it writes down and whether it asks for a key is the
owner's to see to: it finds its key in {key_file} and in LLORCH_ENGINE_KEY, and a supervisor ends it should it listen
beyond loopback.
"""

from __future__ import annotations

from dataclasses import dataclass

from llorch.config_engine_args import fill, placeholders
from llorch.config_pools import PoolSpec
from llorch.errors import ConfigError
from llorch.node.engines.spec import GGUF, HF, Launch, model_argument, visible_gpus

NAME = "command"
KEY_ENV = "LLORCH_ENGINE_KEY"


def names_model(pool: PoolSpec) -> bool:
    """Its model has to be found before it starts."""
    return "model" in placeholders(pool.command)


@dataclass(frozen=True, slots=True)
class Command:
    version: str | None = None
    name: str = NAME
    needs_model: bool = False
    formats: frozenset[str] = frozenset({GGUF, HF})
    inner_ports_open: bool = False

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        if not pool.command:
            raise ConfigError(f"pool {pool.id} has no command", hint="command: /opt/engine/serve --port {port}")
        values = {
            "port": str(port),
            "model": model_argument(pool, model_path) if names_model(pool) else "",
            "gpus": ",".join(map(str, pool.gpus or ())),
            "slots": str(pool.slots),
            "ctx": str(pool.ctx),
            "key_file": key_file,
        }
        argv = tuple(fill(word, values) for word in pool.command)
        return Launch(argv, {**visible_gpus(pool), **dict(pool.env)}, KEY_ENV)
