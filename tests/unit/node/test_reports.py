"""What a node says of itself: registrations, full beats, deltas."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llorch.messages import Heartbeat, Register, parse
from llorch.node.reports import Beat, Identity, Snapshot, delta, full, register, snapshot

IDENTITY = Identity("n1", "boot", "0.1.0", 8, 1 << 30)
BEAT = Beat("lease", "boot", 3, "2026-01-01T00:00:00.000Z", 1.5)
TASK = "00000000-0000-4000-8000-000000000000"


def a_snapshot(**more: Any) -> Snapshot:
    given_lists: dict[str, Any] = {
        "draining": False,
        "pools": [{"pool_id": "p0", "ready": True, "slots_free": 4, "models": ["m"]}],
        "gpus": [{"index": 0, "uuid": "GPU-0", "name": "x", "utilization": 0.1}],
        "catalog": [{"id": "m", "state": "staged"}],
        "tasks": [{"task_id": TASK, "attempt": 1, "state": "running", "offset": 10}],
    }
    return snapshot(**(given_lists | more))


def test_register_is_what_a_control_reads() -> None:
    message = parse(Register, register(IDENTITY, a_snapshot()))
    assert (message.node_id, message.boot_id, message.address) == ("n1", "boot", None)
    assert [pool.pool_id for pool in message.pools] == ["p0"]
    assert message.capabilities.gpus[0].uuid == "GPU-0"
    assert message.tasks[0].task_id == TASK


def test_full_beat_carries_everything() -> None:
    message = parse(Heartbeat, full(BEAT, a_snapshot()))
    assert (message.lease_id, message.seq, message.rtt_ms, message.delta) == ("lease", 3, 1.5, False)
    assert None not in (message.pools, message.gpus, message.catalog, message.tasks)


def test_nothing_changed_is_nothing_to_say() -> None:
    assert delta(BEAT, a_snapshot(), a_snapshot()) is None


def test_delta_carries_changed_entries_whole_and_nothing_else() -> None:
    after = a_snapshot(
        pools=[
            {"pool_id": "p0", "ready": True, "slots_free": 3, "models": ["m"]},
            {"pool_id": "p1", "ready": False},
        ]
    )
    message = delta(BEAT, a_snapshot(), after)
    assert message is not None
    assert message["delta"] is True
    assert message["pools"] == list(after.entries["pools"].values())
    assert not {"gpus", "catalog", "tasks"} & message.keys()
    parse(Heartbeat, message)


def test_what_is_gone_is_said_to_be_gone() -> None:
    message = delta(BEAT, a_snapshot(), a_snapshot(tasks=[], gpus=[]))
    assert message is not None
    beat = parse(Heartbeat, message)
    assert beat.tasks is not None
    assert beat.gpus is not None
    assert [(task.task_id, task.gone) for task in beat.tasks] == [(TASK, True)]
    assert [(gpu.uuid, gpu.gone) for gpu in beat.gpus] == [("GPU-0", True)]


def test_another_attempt_is_another_task() -> None:
    after = a_snapshot(tasks=[{"task_id": TASK, "attempt": 2, "state": "running", "offset": 0}])
    message = delta(BEAT, a_snapshot(), after)
    assert message is not None
    assert [(task["attempt"], task.get("gone", False)) for task in message["tasks"]] == [(2, False), (1, True)]


def test_restless_figures_make_no_delta() -> None:
    after = a_snapshot(
        gpus=[{"index": 0, "uuid": "GPU-0", "name": "x", "utilization": 0.9}],
        tasks=[{"task_id": TASK, "attempt": 1, "state": "running", "offset": 999}],
    )
    assert delta(BEAT, a_snapshot(), after) is None


def test_draining_alone_is_worth_a_delta() -> None:
    message = delta(BEAT, a_snapshot(), a_snapshot(draining=True))
    assert message is not None
    assert message["draining"] is True


pools_strategy = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 3), max_size=5)


@given(pools_strategy, pools_strategy)
def test_applying_a_delta_gives_what_a_full_beat_gives(before: dict[str, int], after: dict[str, int]) -> None:
    def of(pools: dict[str, int]) -> Snapshot:
        return a_snapshot(pools=[{"pool_id": name, "slots_free": free} for name, free in pools.items()])

    known = dict(before)
    message = delta(BEAT, of(before), of(after))
    for pool in (message or {}).get("pools", ()):
        if pool.get("gone"):
            known.pop(pool["pool_id"])
        else:
            known[pool["pool_id"]] = pool["slots_free"]
    assert known == after
