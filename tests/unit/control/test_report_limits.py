"""No node makes a control remember more than it may, by one report or by many."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llorch.control import report_limits
from llorch.control.registry import Registry
from llorch.control.report_limits import MOST_GPUS, MOST_MODELS, MOST_NODES_PER_PEER, MOST_POOLS, MOST_TASKS
from llorch.errors import MAX_RETRY_AFTER_MS, MAX_WIRE_TEXT_CHARS, Code, LlorchError
from llorch.messages import Gpu, Heartbeat, ModelReport, PoolReport, Register, Tail, TaskReport, parse

WALL = "2025-01-02T03:04:05Z"


def register(
    registry: Registry, node_id: str = "n", *, peer: str = "10.0.0.1", now: float = 0.0, **fields: Any
) -> None:
    message = Register.model_validate({"node_id": node_id, "boot_id": f"boot-{node_id}", **fields})
    registry.register(message, now=now, wall=WALL, peer=peer, lease_id=f"lease-{node_id}")


def beat(registry: Registry, node_id: str = "n", **fields: Any) -> None:
    message = Heartbeat.model_validate({"lease_id": f"lease-{node_id}", **fields})
    registry.heartbeat(node_id, message, now=1.0, wall=WALL)


def refused(call: Any, *args: Any, **kwargs: Any) -> str | None:
    with pytest.raises(LlorchError) as caught:
        call(*args, **kwargs)
    assert caught.value.code is Code.INVALID_REQUEST
    return caught.value.param


def entries(kind: str, first: int, count: int) -> list[dict[str, Any]]:
    made = {
        "pools": lambda n: {"pool_id": f"p{n}"},
        "gpus": lambda n: {"index": n, "uuid": f"g{n}", "name": "x"},
        "catalog": lambda n: {"id": f"m{n}"},
        "tasks": lambda n: {"task_id": f"00000000-0000-0000-0000-{n:012d}"},
    }[kind]
    return [made(number) for number in range(first, first + count)]


MOST = {"pools": MOST_POOLS, "gpus": MOST_GPUS, "catalog": MOST_MODELS}


@pytest.mark.parametrize("kind", list(MOST))
def test_deltas_do_not_add_up_beyond_what_one_report_may_have(kind: str) -> None:
    registry = Registry("epoch")
    register(registry)
    beat(registry, seq=1, delta=True, **{kind: entries(kind, 0, MOST[kind])})
    held = registry._limits.total("n")
    assert refused(beat, registry, seq=2, delta=True, draining=True, **{kind: entries(kind, MOST[kind], 1)}) == kind
    node = registry.nodes["n"]
    assert (node.draining, node.seq, node.beats, registry._limits.total("n")) == (False, 1, 1, held)
    gone = [entry | {"gone": True} for entry in entries(kind, 0, 1)]
    beat(registry, seq=2, delta=True, **{kind: gone + entries(kind, MOST[kind], 1)})
    assert len(getattr(node, {"gpus": "gpus", "pools": "pools", "catalog": "catalog"}[kind])) == MOST[kind]


def test_a_whole_report_replaces_what_was_counted() -> None:
    registry = Registry("epoch")
    register(registry, pools=entries("pools", 0, MOST_POOLS))
    for round_ in range(3):
        beat(registry, seq=round_ + 1, pools=entries("pools", 1_000 * round_, MOST_POOLS))
    beat(registry, seq=9, pools=[])
    assert registry._limits.total("n") == 0


def test_of_tasks_the_oldest_are_forgotten_rather_than_the_node_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_limits, "MOST_TASKS", 10)
    registry = Registry("epoch")
    register(registry)
    for first in range(0, 100, 5):
        beat(registry, delta=True, tasks=entries("tasks", first, 5))
    one = report_limits.weight(TaskReport(task_id=entries("tasks", 1, 1)[0]["task_id"]))
    assert registry._limits.total("n") == 10 * one
    assert MOST_TASKS == 8_192


def test_all_that_a_node_reports_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_limits, "NODE_REPORTS_BYTES", 21_000)
    registry = Registry("epoch")
    fat = {"pool_id": "p0", "models": ["x" * 256] * 60}
    assert refused(register, registry, pools=[fat | {"pool_id": "p9", "models": ["x" * 256] * 100}]) == "pools"
    assert not registry.nodes
    register(registry, pools=[fat])
    assert refused(beat, registry, delta=True, catalog=entries("catalog", 0, 3)) == "pools"
    beat(registry, delta=True, catalog=entries("catalog", 0, 1))


def test_all_that_comes_from_one_address_is_bounded_and_others_are_as_free_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report_limits, "PEER_REPORTS_BYTES", 20_000)
    registry = Registry("epoch")
    fat = [{"pool_id": "p0", "models": ["x" * 256] * 30}]
    register(registry, "a", pools=fat)
    assert refused(register, registry, "b", pools=fat) == "pools"
    register(registry, "c", peer="10.0.0.2", pools=fat)
    beat(registry, "a", pools=fat)  # what it has it may repeat
    registry.deregister("a", 2.0)
    register(registry, "b", pools=fat)


def test_a_pool_that_is_read_from_a_node_counts_too() -> None:
    registry = Registry("epoch")
    register(registry, pools=entries("pools", 0, MOST_POOLS))
    assert refused(registry.merge_pool, "n", PoolReport(pool_id="one-more"), 1.0) == "pools"
    assert registry.merge_pool("n", PoolReport(pool_id="p0", model="m"), 1.0)


def test_so_many_nodes_come_from_one_address_and_the_one_longest_offline_makes_room() -> None:
    registry = Registry("epoch")
    for number in range(MOST_NODES_PER_PEER):
        register(registry, f"n{number}", now=float(number))
    with pytest.raises(LlorchError) as caught:
        register(registry, "x")
    assert caught.value.code is Code.NO_CAPACITY
    register(registry, "other", peer="10.0.0.2")
    register(registry, "n0", now=200.0)  # known: it needs no room
    registry.expire(200.0)
    register(registry, "x", now=200.0)
    assert "x" in registry.nodes and "n1" not in registry.nodes and "other" in registry.nodes


# ---------------------------------------------------------------- one report


def bad(model: Any, field: str, value: object, **rest: Any) -> bool:
    try:
        parse(model, {**rest, field: value})
    except LlorchError as error:
        assert error.code is Code.INVALID_REQUEST
        return error.param == field
    return False


TASK_ID = "00000000-0000-0000-0000-000000000001"


@pytest.mark.parametrize(
    "field", ["slots_total", "slots_free", "ctx", "vram_total_bytes", "vram_free_bytes", "generation"]
)
def test_counts_of_a_pool_are_whole_and_in_range(field: str) -> None:
    for value in (-1, 10**30, 10**399, "x", [], {}, 1.5):
        assert bad(PoolReport, field, value, pool_id="p"), value


@pytest.mark.parametrize(
    ("model", "fields", "rest"),
    [
        (PoolReport, ("prompt_tps", "decode_tps", "load_s", "kv_usage"), {"pool_id": "p"}),
        (Gpu, ("utilization", "temperature_c", "power_w"), {"index": 0, "uuid": "u", "name": "n"}),
        (ModelReport, ("progress",), {"id": "m"}),
        (TaskReport, ("ttft_ms", "decode_ms"), {"task_id": TASK_ID}),
        (Heartbeat, ("rtt_ms",), {}),
    ],
)
def test_figures_are_numbers_that_mean_something(model: Any, fields: tuple[str, ...], rest: dict[str, Any]) -> None:
    for field in fields:
        for value in (1e308, -1e308, 10**399, float("nan"), float("inf"), "x"):
            assert bad(model, field, value, **rest), (field, value)
        assert not bad(model, field, 12.5, **rest)


@pytest.mark.parametrize(
    ("model", "field", "rest"),
    [
        (PoolReport, "model", {"pool_id": "p"}),
        (PoolReport, "last_error", {"pool_id": "p"}),
        (PoolReport, "engine_version", {"pool_id": "p"}),
        (TaskReport, "owner", {"task_id": TASK_ID}),
        (TaskReport, "key_digest", {"task_id": TASK_ID}),
        (TaskReport, "finish_reason", {"task_id": TASK_ID}),
        (ModelReport, "ref", {"id": "m"}),
        (Register, "address", {"node_id": "n"}),
        (Register, "zone", {"node_id": "n"}),
        (Heartbeat, "timestamp", {}),
    ],
)
def test_texts_have_an_end(model: Any, field: str, rest: dict[str, Any]) -> None:
    assert bad(model, field, "x" * 5_000, **rest)
    assert not bad(model, field, "x" * 100, **rest)


def test_a_refusal_of_a_report_names_the_field_in_its_list() -> None:
    with pytest.raises(LlorchError) as caught:
        parse(Heartbeat, {"pools": [{"pool_id": "p0"}, {"pool_id": "p1", "slots_free": -1}]})
    assert caught.value.param == "pools.1.slots_free"
    for kind, most in (*MOST.items(), ("tasks", MOST_TASKS)):
        with pytest.raises(LlorchError) as caught:
            parse(Heartbeat, {kind: entries(kind, 0, most + 1)})
        assert caught.value.param == kind


def test_an_attempt_has_a_number_that_a_control_may_have_given_it() -> None:
    for value in (-1, 1_001, 10**20):
        assert bad(TaskReport, "attempt", value, task_id=TASK_ID)


# ---------------------------------------------------------------- errors that nodes send


def test_an_error_of_a_peer_is_kept_in_bounds_however_large_it_comes() -> None:
    wire = {
        "code": "ENGINE_FAILED", "message": "m" * 60_000, "hint": "h" * 60_000, "param": "p" * 60_000, "type": "t",
        "retriable": True, "retry_after_ms": 10**300, "details": {"x": "y" * 60_000}, "more": "z" * 60_000,
    }  # fmt: skip
    error = LlorchError.from_wire(wire)
    assert {len(text or "") for text in (error.message, error.hint, error.param)} == {MAX_WIRE_TEXT_CHARS}
    assert (error.code, error.retry_after_ms, error.details) == (Code.ENGINE_FAILED, MAX_RETRY_AFTER_MS, None)
    kept = Tail(length=0, error=wire).error
    assert kept is not None and "more" not in kept
    assert sum(len(str(value)) for value in kept.values()) < 4 * MAX_WIRE_TEXT_CHARS
    small = {"code": "GAP", "message": "m", "details": {"kept_from": 9}, "retriable": False}
    assert LlorchError.from_wire(small).details == {"kept_from": 9}


def test_a_tail_states_no_impossible_status() -> None:
    for status in (-1, 0, 99, 600, 10**30):
        with pytest.raises(ValidationError):
            Tail(length=0, status=status)
