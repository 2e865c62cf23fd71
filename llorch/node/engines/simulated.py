"""The simulated engine: a scripted server without a model, for tests, benchmarks and `llorch dev --nodes N`."""

from __future__ import annotations

from dataclasses import dataclass

from llorch.config_pools import PoolSpec
from llorch.node.engines.llama_server import server_flags
from llorch.node.engines.spec import Launch

NAME = "simulated"


@dataclass(frozen=True, slots=True)
class Simulated:
    """`python` is the interpreter that has llorch."""

    python: str
    version: str | None = None
    name: str = NAME
    needs_model: bool = False
    formats: frozenset[str] = frozenset()
    inner_ports_open: bool = False

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        argv = [self.python, "-m", "llorch.node.engines.simulated_server"]
        argv += server_flags(pool, model_id=model_id, port=port, key_file=key_file, model_path=None)
        return Launch(tuple(argv), dict(pool.env))
