"""From the settings to a pool's replicas, and what of a pool outlives a change of them.

Owns those rules: how many replicas there are and under which names, what of other settings needs other engines, and
that an operator's reload counts until the settings name another model. Starts and ends nothing. Pure.
"""

from __future__ import annotations

from dataclasses import replace

from llorch.config_pools import PoolSpec
from llorch.node.pool_events import Wanted
from llorch.node.pool_models import EXTERNAL, comes_and_goes
from llorch.node.replicas import HOURS, OPERATOR, OWNER, Pool, Replica


def outfit(pool: Pool, wanted: Wanted) -> None:
    """Give the pool what the settings say, and as many replicas: those that it has stay, as far as they are wanted."""
    spec = pool.spec = wanted.spec
    pool.engine, pool.choices, pool.on_demand = spec.engine, dict(wanted.choices), comes_and_goes(spec)
    pool.ctx, pool.device_mask = spec.ctx, ",".join(map(str, spec.gpus or ())) or None
    for replica in pool.own[spec.replicas :]:
        replica.leaves = True
    for _ in range(spec.replicas - len(pool.own)):
        another(pool)


def another(pool: Pool) -> Replica:
    """A replica more, under the lowest number that is free."""
    spec = pool.spec
    assert spec is not None  # only pools of the settings get any
    number = next(number for number in range(len(pool.replicas) + 1) if f"r{number}" not in pool.replicas)
    replica = Replica(f"r{number}", owned=spec.engine != EXTERNAL, spawned=True, slots=spec.slots)
    pool.replicas[replica.id] = replica
    return replica


def same_engines(old: PoolSpec, new: PoolSpec) -> bool:
    """Only when the pool serves is another matter now, not what."""
    return _hard(old) == _hard(new)


def _hard(spec: PoolSpec) -> PoolSpec:
    return replace(spec, hours=None, yield_to_owner=False, idle_unload_s=None)


def holds_that_stay(pool: Pool, spec: PoolSpec) -> dict[str, str]:
    """Those for which the settings still give a reason; of the others nobody will tell that they have ended."""
    reasons = {OPERATOR, *([OWNER] if spec.yield_to_owner else []), *([HOURS] if spec.hours is not None else [])}
    return {who: why for who, why in pool.holds.items() if who in reasons}


def reloaded_to(pool: Pool, wanted: Wanted) -> dict[str, str] | None:
    """What an operator had a pool serve instead of its model; None where the settings name another by now."""
    old, new = pool.spec, wanted.spec
    if old is None or pool.on_demand or comes_and_goes(new) or (old.model, old.engine) != (new.model, new.engine):
        return None
    ref = pool.choices.get(pool.model) if pool.model is not None else None
    return {pool.model: ref} if pool.model is not None and ref is not None and ref != new.model else None
