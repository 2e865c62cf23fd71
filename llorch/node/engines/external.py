"""An engine that someone else runs: a URL in the settings. It is offered by a handoff, never started or ended."""

from __future__ import annotations

from dataclasses import dataclass

from llorch.config_pools import PoolSpec
from llorch.errors import ConfigError
from llorch.node.engines.spec import Launch

NAME = "external"


@dataclass(frozen=True, slots=True)
class External:
    version: str | None = None
    name: str = NAME
    needs_model: bool = False
    formats: frozenset[str] = frozenset()
    inner_ports_open: bool = False

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        raise ConfigError(f"pool {pool.id} is external: llorch does not start it")
