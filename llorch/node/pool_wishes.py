"""What operators asked of a pool, as JSON that outlives the agent: a drain, an unloading, another model.

Owns what of a pool counts as such, and what of it is believed when it is read again. Where it is kept is `standing`'s.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llorch.messages import model_id_ok
from llorch.node.pool_events import ReplicaState, Step, step
from llorch.node.pool_models import EXTERNAL
from llorch.node.replicas import MAX_WHY_CHARS, OPERATOR, Pool

MAX_REF_CHARS = 4_096  # as in the wishes of operators


def wish_of(pool: Pool) -> dict[str, Any]:
    """What an operator asked of a pool; empty if nothing. A model counts until the settings name another, and once it
    is proven."""
    wish: dict[str, Any] = {}
    if OPERATOR in pool.holds:
        wish["drained"] = pool.holds[OPERATOR]
    before = pool.reloading.before if pool.reloading is not None else None
    model, choices, loaded = (before.model, before.choices, before.loaded) if before else _now_of(pool)
    if not loaded:
        wish["unloaded"] = True
    if pool.spec is not None and not pool.on_demand and model is not None:
        ref = choices.get(model)
        if ref is not None and pool.spec.model is not None and ref != pool.spec.model:
            wish["model"] = {"id": model, "ref": ref, "instead_of": pool.spec.model}
    return wish


def _now_of(pool: Pool) -> tuple[str | None, Mapping[str, str], bool]:
    return pool.model, pool.choices, pool.loaded


def restore(pool: Pool, wish: Mapping[str, Any]) -> None:
    drained, model = wish.get("drained"), wish.get("model")
    if isinstance(drained, str):
        pool.holds[OPERATOR] = drained[:MAX_WHY_CHARS]
    pool.loaded = wish.get("unloaded") is not True
    if not isinstance(model, Mapping) or pool.spec is None or pool.spec.engine == EXTERNAL or pool.on_demand:
        return
    model_id, ref = model.get("id"), model.get("ref")
    if not isinstance(model_id, str) or not isinstance(ref, str) or model.get("instead_of") != pool.spec.model:
        return
    if model_id_ok(model_id) and 0 < len(ref) <= MAX_REF_CHARS:
        pool.choices, pool.model = {model_id: ref}, model_id
        pool.last_error = None
        for replica in pool.own:  # that the settings' own model can't be used is nothing to this one
            if replica.state is ReplicaState.FAILED:
                replica.state = step(replica.state, Step.FORGIVEN)
