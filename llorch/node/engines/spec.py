"""What the rest of a node may ask of an engine: how to start it, and its name and version.

Surface: `Launch(argv, env)` and the Protocol `Engine`. All else about an engine (its requests and its answers) is the
same for all of them and lives in `openai_api`. An engine never starts anything itself: the supervisor does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llorch.config_pools import PoolSpec

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Launch:
    """A program to run. `env` is added to what `environment` leaves of the agent's own."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """A way to serve one model on one loopback port, behind an API key, with `GET /health` and the OpenAI surface."""

    @property
    def name(self) -> str:
        """The word for it in settings and reports."""

    @property
    def version(self) -> str | None: ...
    @property
    def needs_model(self) -> bool:
        """It can't start without a model file on this machine."""

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        """How to start one replica of `pool`. `model_id` is what clients name; `key_file` holds the API key."""


def visible_gpus(pool: PoolSpec) -> Mapping[str, str]:
    """The environment that shows an engine its pool's GPUs, numbered as NVML and nvidia-smi number them."""
    if pool.gpus is None:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, pool.gpus))}
