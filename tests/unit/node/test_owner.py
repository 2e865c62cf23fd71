"""When a pool stands back for the owner of its machine, and when it comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.config_hours import parse
from llorch.config_pools import PoolSpec
from llorch.messages import Gpu
from llorch.node import owner as rules
from llorch.node.owner import BACKGROUND_BYTES, FORGOTTEN_AFTER_S, FREE_FOR_S, IN_USE_FOR_S, SETTLED_AFTER_S, Owner

MIB, GIB = 1 << 20, 1 << 30
STEP_S = 5.0
POOL = PoolSpec(id="p", gpus=(0,), yield_to_owner=True)


def card(foreign: float, ours: float = 0, busy: float = 0.0, index: int = 0, uuid: str = "") -> Gpu:
    return Gpu(
        index=index, uuid=uuid or f"GPU-{index}", name="x", vram_total_bytes=24 * GIB, utilization=busy,
        vram_used_bytes=int((foreign + ours) * GIB), vram_foreign_bytes=int(foreign * GIB),
    )  # fmt: skip


@dataclass
class Machine:
    """A node that looks every five seconds."""

    specs: tuple[PoolSpec, ...] = (POOL,)
    now: float = 50_000.0
    owner: Owner = field(default_factory=Owner)

    def after(self, seconds: float, *gpus: Gpu) -> str | None:
        """Why the first pool is held, when the GPUs have been like this for so long."""
        held = None
        for _ in range(int(seconds / STEP_S)):
            self.now += STEP_S
            held = self.look(*gpus)["p"]
        return held

    def look(self, *gpus: Gpu) -> dict[str, str | None]:
        return self.owner.decide(self.specs, gpus, weekday=0, minutes=0, now=self.now)


def test_a_pool_stands_back_when_others_use_its_gpu_and_comes_back_after() -> None:
    machine = Machine()
    assert machine.after(60, card(0.3, ours=10)) is None
    assert machine.after(IN_USE_FOR_S, card(6.2, ours=10)) is None
    assert machine.after(STEP_S, card(6.2, ours=10)) == "owner: 6.2 GiB of GPU 0 are used by other programs"
    assert machine.after(3600, card(7.9)) == "owner: 6.2 GiB of GPU 0 are used by other programs"  # word for word
    assert machine.after(FREE_FOR_S, card(0.3)) is not None
    assert machine.after(STEP_S, card(0.3)) is None


def test_a_program_that_starts_and_ends_unloads_nothing() -> None:
    machine = Machine()
    machine.after(60, card(0.3))
    for _ in range(10):
        assert machine.after(IN_USE_FOR_S, card(6)) is None
        assert machine.after(STEP_S, card(0.3)) is None


def test_a_pause_between_two_programs_loads_nothing() -> None:
    machine = Machine()
    machine.after(60, card(0.3))
    machine.after(60, card(6))
    for _ in range(10):
        assert machine.after(FREE_FOR_S, card(0.3)) is not None
        assert machine.after(STEP_S, card(6)) is not None


def test_a_pool_that_does_not_yield_is_never_held() -> None:
    machine = Machine((PoolSpec(id="p", gpus=(0,)),))
    assert machine.after(600, card(20, busy=1.0)) is None


def test_only_the_pools_of_the_gpu_that_is_used_stand_back() -> None:
    specs = (
        POOL,
        PoolSpec(id="other", gpus=(1,), yield_to_owner=True),
        PoolSpec(id="all", yield_to_owner=True),
        PoolSpec(id="cpu", gpus=(), yield_to_owner=True),
    )
    machine = Machine(specs)
    machine.after(60, card(0), card(0, index=1))
    machine.after(60, card(0), card(9, index=1))
    held = machine.look(card(0), card(9, index=1))
    text = "owner: 9.0 GiB of GPU 1 are used by other programs"
    assert held == {"p": None, "other": text, "all": text, "cpu": None}


# ---------------------------------------------------------------- what is always there


@pytest.mark.parametrize("desktop", [0.0, 0.4, 1.9])
def test_a_desktop_does_not_hold_a_pool_back(desktop: float) -> None:
    machine = Machine()
    assert machine.after(3600, card(desktop)) is None
    assert machine.after(3600, card(desktop + 0.4, ours=10, busy=1.0)) is None  # a window more
    assert machine.after(60, card(desktop + 3)) is not None


def test_a_program_that_was_there_first_is_no_background() -> None:
    assert Machine().after(60, card(8)) is not None


def test_a_program_that_was_there_first_and_is_small_is_seen_the_next_time() -> None:
    machine = Machine()
    assert machine.after(60, card(1.5)) is None
    machine.after(60, card(0.1))
    assert machine.after(60, card(1.5)) is not None


def test_what_lies_there_unused_becomes_background_if_it_is_little() -> None:
    machine = Machine()
    machine.after(60, card(0))
    assert machine.after(60, card(1.5)) is not None  # somebody has logged in
    assert machine.after(SETTLED_AFTER_S, card(1.5)) is not None
    assert machine.after(FREE_FOR_S + STEP_S, card(1.5)) is None
    assert machine.after(60, card(1.9, ours=10)) is None


@pytest.mark.parametrize(
    "gpu", [card(BACKGROUND_BYTES / GIB + 0.1), card(1.5, busy=0.2)], ids=["it is much", "it is used"]
)
def test_what_is_more_or_is_used_stays_the_owners(gpu: Gpu) -> None:
    machine = Machine()
    machine.after(60, card(0))
    assert machine.after(SETTLED_AFTER_S * 10, gpu) is not None


def test_what_changes_all_the_time_does_not_settle() -> None:
    machine = Machine()
    machine.after(60, card(0))
    for _ in range(20):
        assert machine.after(SETTLED_AFTER_S / 2, card(0.8)) is not None
        assert machine.after(SETTLED_AFTER_S / 2, card(1.8)) is not None


# ---------------------------------------------------------------- who computes


def test_a_gpu_that_computes_while_nothing_of_ours_is_on_it_is_in_use() -> None:
    machine = Machine()
    machine.after(60, card(0.3))
    assert machine.after(60, card(0.4, busy=0.9)) == "owner: GPU 0 computes for other programs"
    assert machine.after(60, card(0.4, busy=0.3)) is not None
    assert machine.after(STEP_S, card(0.4, busy=0.3)) is None


def test_a_gpu_that_computes_for_us_is_not() -> None:
    assert Machine().after(3600, card(0.3, ours=0.4, busy=1.0)) is None


def test_a_gpu_that_does_not_tell_how_busy_it_is_is_judged_by_its_memory() -> None:
    machine = Machine()
    untold = card(0.3).model_copy(update={"utilization": None})
    assert machine.after(60, untold) is None
    assert machine.after(60, card(5).model_copy(update={"utilization": None})) is not None


# ---------------------------------------------------------------- GPUs that come and go


def test_a_gpu_that_is_not_told_of_for_a_while_stays_as_it_was() -> None:
    machine = Machine()
    machine.after(60, card(0))
    machine.after(60, card(6))
    assert machine.after(FORGOTTEN_AFTER_S - STEP_S) is not None
    assert machine.after(STEP_S) is None


def test_what_is_remembered_does_not_grow() -> None:
    machine = Machine()
    for number in range(500):
        machine.after(STEP_S, card(0, uuid=f"MIG-{number}"))
    assert len(machine.owner._gpus) <= FORGOTTEN_AFTER_S / STEP_S + 1


# ---------------------------------------------------------------- hours


def test_hours_hold_a_pool_at_once_and_say_until_when() -> None:
    spec = PoolSpec(id="p", hours=parse("mon-fri 18:00-08:00"))
    owner = Owner()

    def at(weekday: int, hour: int) -> str | None:
        return owner.decide([spec], [], weekday=weekday, minutes=hour * 60, now=0.0)["p"]

    assert at(0, 12) == "hours: it serves again from mon 18:00"
    assert at(0, 18) is None
    assert at(5, 7) is None
    assert at(5, 8) == "hours: it serves again from mon 18:00"


def test_hours_come_before_the_owner_and_do_not_need_them() -> None:
    spec = PoolSpec(id="p", hours=parse("00:00-01:00"), yield_to_owner=True)
    machine = Machine((spec,))
    machine.after(60, card(0))
    assert machine.after(60, card(9)) is not None
    held = machine.owner.decide([spec], [card(9)], weekday=0, minutes=600, now=machine.now)["p"]
    assert held == "hours: it serves again from tue 00:00"


def test_a_clock_that_is_put_back_or_forward_takes_the_hours_with_it() -> None:
    spec = PoolSpec(id="p", hours=parse("sun 01:00-03:00"))
    owner = Owner()
    seen = [
        owner.decide([spec], [], weekday=6, minutes=minutes, now=float(step))["p"] is None
        for step, minutes in enumerate((59, 119, 180, 179, 120, 60, 59, 179, 180))
    ]
    assert seen == [False, True, False, True, True, True, False, True, False]


# ---------------------------------------------------------------- always


@given(st.lists(st.tuples(st.floats(0, 24), st.floats(0, 24), st.floats(0, 1)), min_size=1, max_size=60))
def test_nothing_changes_faster_than_it_may(steps: list[tuple[float, float, float]]) -> None:
    machine, before, changed = Machine(), None, None
    for foreign, ours, busy in steps:
        held = machine.after(STEP_S, card(foreign, ours, busy))
        if (held is None) != (before is None):
            wait = IN_USE_FOR_S if held else FREE_FOR_S
            assert changed is None or machine.now - changed >= wait
            changed = machine.now
        elif held is not None:
            assert held == before
        before = held


def test_the_thresholds_leave_room_for_each_other() -> None:
    assert rules.OUR_TRACE_BYTES < rules.MARGIN_BYTES < rules.BACKGROUND_BYTES
    assert IN_USE_FOR_S < FREE_FOR_S < SETTLED_AFTER_S
    assert rules.IDLE_SHARE < rules.BUSY_SHARE
