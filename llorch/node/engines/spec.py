"""What the rest of a node may ask of an engine: how to start it, and its name and version.

Surface: `Launch(argv, env, key_env)` and the Protocol `Engine`. All else about an engine (its requests and its answers)
lives in `openai_api`. An engine never starts anything itself: the supervisor does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llorch.config_engine_args import why_not_arg
from llorch.config_pools import PoolSpec
from llorch.errors import ConfigError

LOOPBACK = "127.0.0.1"
GGUF, HF = "gguf", "hf"


@dataclass(frozen=True, slots=True)
class Launch:
    """A program to run. `env` is added to what `environment` leaves of the agent's own.

    `key_env`: the name under which the program finds its API key in its environment, where it can't read it from a
    file. Whoever starts it puts the key there: command lines are for everybody to see, this is for its user alone.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    key_env: str | None = None


class Engine(Protocol):
    """A way to serve one model on one loopback port, behind an API key, with `GET /health` and the OpenAI surface."""

    @property
    def name(self) -> str:
        """The word for it in settings and reports."""

    @property
    def version(self) -> str | None: ...
    @property
    def needs_model(self) -> bool:
        """It can't start without a model on this machine."""

    @property
    def formats(self) -> frozenset[str]:
        """What a model of it may be: GGUF, a file; HF, a directory or a name on the hub. Empty: it takes none."""

    @property
    def inner_ports_open(self) -> bool:
        """Its own parts listen to each other beyond loopback, and no flag changes that. The port that it was given
        is on loopback all the same."""

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        """How to start one replica of `pool`. `model_id` is what clients name; `key_file` holds the API key."""


def refuse_reserved(pool: PoolSpec, engine: str) -> None:
    """Raises ConfigError for an argument that settings would not have let through."""
    for arg in pool.args:
        why = why_not_arg(arg, engine)
        if why is not None:
            raise ConfigError(f"{arg.partition('=')[0]} can't be given to an engine: {why}")


def model_argument(pool: PoolSpec, model_path: str | None) -> str:
    """A model as a word that no program takes for a flag."""
    if not model_path or model_path.startswith("-"):
        raise ConfigError(f"pool {pool.id} has no model that can be given to an engine", hint="set the pool's `model`")
    return model_path


def visible_gpus(pool: PoolSpec) -> Mapping[str, str]:
    """The environment that shows an engine its pool's GPUs, numbered as NVML and nvidia-smi number them."""
    if pool.gpus is None:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, pool.gpus))}
