"""From a pool in the settings to a plan that can be started: its engine chosen, its model found, its GPUs there.

Owns the refusals that come before anything is started, each with the mend. Pure: what engines, GPUs and models there
are comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llorch.config_pools import PoolSpec
from llorch.errors import ConfigError
from llorch.node.engines import external, simulated
from llorch.node.engines.auto import EngineFacts, engine
from llorch.node.engines.spec import Engine
from llorch.node.modelref import model_id

MODELLESS = (external.NAME, simulated.NAME)


@dataclass(frozen=True, slots=True)
class Plan:
    """A pool of the settings, its engine chosen (`spec.engine` names it) and its model found."""

    spec: PoolSpec
    engine: Engine
    model_id: str
    model_path: str | None = None


def plan_pool(
    spec: PoolSpec, facts: EngineFacts, find_model: Callable[[str], str], *, gpu_count: int, allow_cpu: bool
) -> Plan:
    """`find_model` gives the path of a model ref, or raises. Raises ConfigError naming the pool."""
    try:
        return _plan(spec, facts, find_model, gpu_count=gpu_count, allow_cpu=allow_cpu)
    except ConfigError as error:
        raise ConfigError(f"pool {spec.id}: {error.message}", hint=error.hint) from None


def _plan(
    spec: PoolSpec, facts: EngineFacts, find_model: Callable[[str], str], *, gpu_count: int, allow_cpu: bool
) -> Plan:
    if spec.engine in MODELLESS:
        chosen = engine(spec.engine, facts, gpus=False, allow_cpu=True)
        return Plan(spec, chosen, model_id(spec.model or spec.id))
    if spec.model is None:
        raise ConfigError("it needs a model", hint="model: demo, or file:/abs/path.gguf")
    missing = [index for index in spec.gpus or () if index >= gpu_count]
    if missing:
        raise ConfigError(f"there is no GPU {missing[0]}: this machine has {gpu_count}", hint="gpus: [] for the CPU")
    wants_gpu = gpu_count > 0 if spec.gpus is None else bool(spec.gpus)
    chosen = engine(spec.engine, facts, gpus=wants_gpu, allow_cpu=allow_cpu)
    return Plan(replace(spec, engine=chosen.name), chosen, model_id(spec.model), find_model(spec.model))
