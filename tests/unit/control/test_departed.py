"""Models that were here a moment ago."""

from __future__ import annotations

from llorch.control.departed import DEPARTED_S, MAX_DEPARTED, Departed
from llorch.control.placement import Wish, refusal
from llorch.control.registry import Registry
from llorch.errors import Code
from llorch.messages import Register


def test_a_model_that_left_is_remembered_for_a_minute() -> None:
    departed = Departed()
    departed.left(["a"], 0.0)
    departed.left(["b"], 10.0)
    assert not departed.forget(DEPARTED_S - 1.0)
    assert departed.models == {"a", "b"}
    assert departed.forget(DEPARTED_S)
    assert departed.models == {"b"}


def test_one_that_leaves_again_is_remembered_from_then_on() -> None:
    departed = Departed()
    departed.left(["a", "b"], 0.0)
    departed.left(["a"], 30.0)
    departed.forget(DEPARTED_S + 10.0)
    assert departed.models == {"a"}


def test_no_more_are_remembered_than_a_bound_and_the_newest_stay() -> None:
    departed = Departed()
    departed.left((f"m{n}" for n in range(MAX_DEPARTED + 5)), 0.0)
    assert len(departed.models) == MAX_DEPARTED
    assert "m0" not in departed.models and f"m{MAX_DEPARTED + 4}" in departed.models


def code_of(registry: Registry, now: float) -> Code | None:
    registry.expire(now)
    error = refusal(Wish("m"), registry.pool_facts(now, "m"), registry.models())
    return None if error is None else error.code


def join(registry: Registry, boot: str, now: float, *pools: dict[str, object]) -> None:
    message = Register.model_validate({"node_id": "n", "boot_id": boot, "pools": list(pools)})
    registry.register(message, now=now, wall="x", peer="10.0.0.1", lease_id="l")


def test_a_restarted_nodes_model_is_not_available_until_it_is_back_or_its_absence_is_meant() -> None:
    pool: dict[str, object] = {"pool_id": "p", "model": "m", "ready": True}
    registry = Registry("epoch")
    join(registry, "b1", 0.0, pool)
    registry.deregister("n", 1.0)
    assert code_of(registry, 2.0) is Code.MODEL_NOT_AVAILABLE
    join(registry, "b2", 3.0)  # its engines are not up yet, and unknown to it
    assert code_of(registry, 4.0) is Code.MODEL_NOT_AVAILABLE
    assert code_of(registry, 1.0 + DEPARTED_S) is Code.MODEL_NOT_FOUND
    join(registry, "b2", 70.0, pool)
    join(registry, "b3", 71.0)  # killed, and back in another process
    assert code_of(registry, 72.0) is Code.MODEL_NOT_AVAILABLE
