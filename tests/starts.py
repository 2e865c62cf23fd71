"""Starts of engines on a machine that nobody looks at: room for all, no model to fetch unless a test says so."""

from __future__ import annotations

from typing import Any

from llorch.config_pools import PoolSpec
from llorch.node.engine_start import NoRoom, Starts
from llorch.node.plans import Plan


async def _no_model(ref: str, _said: Any) -> Any:
    raise AssertionError(f"nobody said where {ref} is")


async def _any_room(_start: object, _plan: Plan, _model: Any) -> NoRoom | None:
    return None


async def _room_for_both(_plan: Plan, _model: Any) -> bool:
    return True


async def _never_again(spec: PoolSpec) -> Plan:
    raise AssertionError(f"pool {spec.id} was planned")


STARTS = Starts(
    model=_no_model,
    room=_any_room,
    beside=_room_for_both,
    plan=_never_again,
    here=lambda _ref: None,
    mask=lambda gpus: ",".join(map(str, gpus)),
)
