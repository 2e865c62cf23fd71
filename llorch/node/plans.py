"""From a pool in the settings to a plan that can be started: its engine chosen, its models named, its GPUs there.

Owns the refusals that come before anything is started, each with the mend. A model that has to be fetched first is no
reason for one. Pure: what engines, GPUs and models there are comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from llorch.config_pools import PoolSpec
from llorch.errors import ConfigError
from llorch.node.engines import command, external, simulated
from llorch.node.engines.auto import EngineFacts, engine, wants_model
from llorch.node.engines.spec import GGUF, HF, Engine
from llorch.node.modelref import model_id
from llorch.node.pool_events import Wanted

MODELLESS = (external.NAME, simulated.NAME)


@dataclass(frozen=True, slots=True)
class Plan:
    """A pool of the settings, its engine chosen (`spec.engine` names it). `choices`: model ids → their references.

    `refusal`: why it can't be started as things are; it has no engine then, and is planned again when it is to start.
    """

    spec: PoolSpec
    engine: Engine | None
    choices: Mapping[str, str]
    refusal: str | None = None

    @property
    def takes_files(self) -> bool:
        """Its models are files on this machine."""
        return self.engine is not None and wants_model(self.engine, self.spec)

    @property
    def on_gpu(self) -> bool:
        """Its engine is one that computes on GPUs where there are some: a simulated one does not."""
        return self.spec.engine not in MODELLESS

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.spec, self.choices, self.refusal)


def refused(spec: PoolSpec, error: ConfigError) -> Plan:
    """A pool that is listed all the same, so that whoever looks finds out why it does not serve."""
    hint = f" ({error.hint})" if error.hint else ""
    choices = {model_id(ref): ref for ref in _refs(spec) or [spec.id]}
    return Plan(spec, None, choices, f"{error.message.removeprefix(f'pool {spec.id}: ')}{hint}")


def plan_pool(
    spec: PoolSpec, facts: EngineFacts, check_model: Callable[[str], object], *, gpus: frozenset[int], allow_cpu: bool
) -> Plan:
    """`check_model` is given each model reference, and raises ConfigError for one that can't be served from here.

    Raises ConfigError naming the pool.
    """
    try:
        return _plan(spec, facts, check_model, gpus=gpus, allow_cpu=allow_cpu)
    except ConfigError as error:
        raise ConfigError(f"pool {spec.id}: {error.message}", hint=error.hint) from None


def _plan(
    spec: PoolSpec, facts: EngineFacts, check_model: Callable[[str], object], *, gpus: frozenset[int], allow_cpu: bool
) -> Plan:
    refs = _refs(spec)
    if spec.engine in MODELLESS:
        chosen = engine(spec.engine, facts, gpus=False, allow_cpu=True)
        return Plan(spec, chosen, _named(refs or [spec.id]))
    if not refs and spec.engine == command.NAME and not command.names_model(spec):
        refs = [spec.id]
    if not refs:
        raise ConfigError("it needs a model", hint="model: demo, or file:/abs/path.gguf")
    missing = [index for index in spec.gpus or () if index not in gpus]
    if missing:
        there = ", ".join(map(str, sorted(gpus))) or "none"
        raise ConfigError(f"there is no GPU {missing[0]}: this machine has {there}", hint="gpus: [] for the CPU")
    wants_gpu = bool(gpus) if spec.gpus is None else bool(spec.gpus)
    chosen = engine(spec.engine, facts, gpus=wants_gpu, allow_cpu=allow_cpu)
    for ref in refs if GGUF in chosen.formats and HF not in chosen.formats else ():
        check_model(ref)
    return Plan(replace(spec, engine=chosen.name), chosen, _named(refs))


def _refs(spec: PoolSpec) -> list[str]:
    return list(dict.fromkeys(((spec.model,) if spec.model is not None else ()) + spec.models))


def _named(refs: list[str]) -> dict[str, str]:
    """By the ids that clients name. Two models of one pool need two."""
    named: dict[str, str] = {}
    for ref in refs:
        other = named.setdefault(model_id(ref), ref)
        if other != ref:
            raise ConfigError(f"two of its models are both called {model_id(ref)}", hint="give one file another name")
    return named
