from __future__ import annotations

import random
from itertools import product

import pytest

from llorch.control import fairness
from llorch.control.fairness import BURST_TASKS_PER_SLOT, FIRST_OUTPUT_TOKENS, OUTPUT_WEIGHT, Shares, cost
from llorch.messages import Tail
from tests.unit.control.queue_simulation import Arrival, Simulation

LOAD_OF_THE_OTHER = 50  # times the small one's
TOKENS_PER_S = 100


def tail(tokens_in: int = 0, tokens_out: int = 0, cached: int = 0) -> Tail:
    return Tail(length=0, tokens_in=tokens_in, tokens_out=tokens_out, cached_tokens=cached)


def used(shares: Shares, owner: str, tokens_out: int = 100) -> None:
    """One task of `owner`, from its slot to its end."""
    shares.settle(owner, shares.charge(owner, 0), tail(tokens_out=tokens_out), ran=True)


# ---------------------------------------------------------------- counters


@pytest.mark.parametrize(
    ("ended", "tokens"),
    [
        (tail(100), 100.0),
        (tail(100, cached=80), 28.0),
        (tail(100, 50), 200.0),
        (tail(100, cached=100), 10.0),
        (tail(10, cached=100), 1.0),  # an engine that counts more cached tokens than there were
        (tail(), 0.0),
    ],
)
def test_input_counts_once_cached_input_a_tenth_and_output_twice(ended: Tail, tokens: float) -> None:
    assert cost(ended) == pytest.approx(tokens)


def test_a_task_is_charged_by_an_estimate_when_it_gets_a_slot_and_by_its_tail_when_it_ends() -> None:
    shares = Shares()
    charged = shares.charge("ann", 400)
    assert shares.counter("ann") == charged == 100 + OUTPUT_WEIGHT * FIRST_OUTPUT_TOKENS
    shares.settle("ann", charged, tail(120, 10), ran=True)
    assert shares.counter("ann") == 140


def test_an_end_that_says_nothing_of_tokens_leaves_the_estimate_and_one_that_never_ran_is_free() -> None:
    for ended, ran, left in ((None, True, True), (tail(), True, True), (None, False, False)):
        shares = Shares()
        shares.settle("ann", shares.charge("ann", 400), ended, ran=ran)
        assert (shares.counter("ann") > 0) is left


def test_the_estimate_follows_what_answers_were_like_of_this_principal_else_of_all() -> None:
    shares = Shares()
    assert shares.estimate("ann", 0) == OUTPUT_WEIGHT * FIRST_OUTPUT_TOKENS
    for _ in range(50):
        used(shares, "ann", 10)
    assert shares.estimate("ann", 0) == shares.estimate("bob", 0) == pytest.approx(20)
    for _ in range(50):
        used(shares, "bob", 1_000)
    assert shares.estimate("ann", 0) == pytest.approx(20)
    assert shares.estimate("bob", 40) == pytest.approx(2_010)
    assert shares.estimate("ann", 1 << 30) == fairness.MAX_INPUT_TOKENS + 20  # an image, not that much text


def test_who_was_idle_has_the_credit_of_one_burst_and_no_more() -> None:
    shares = Shares(slots=2)
    for _ in range(1_000):
        used(shares, "ann")
    behind = shares.counter("ann") - shares.counter("bob")
    assert behind == pytest.approx((2 * BURST_TASKS_PER_SLOT + 1) * 200, rel=0.01)  # 1: her last task itself
    for _ in range(2 * BURST_TASKS_PER_SLOT):
        assert shares.counter("bob") < shares.counter("ann")
        used(shares, "bob")
    used(shares, "bob")
    assert shares.counter("bob") >= shares.counter("ann") - 1e-6


def test_who_sends_costly_tasks_has_the_credit_of_one_burst_of_those() -> None:
    shares = Shares()
    used(shares, "bob", 1_000)
    for _ in range(200):
        used(shares, "ann", 100)
    reached = shares.counter("ann") - 200  # where her last slot was given
    assert reached - shares.counter("bob") == pytest.approx(BURST_TASKS_PER_SLOT * 2_000)
    assert reached - shares.counter("carl") == pytest.approx(BURST_TASKS_PER_SLOT * 200, rel=0.01)
    for _ in range(50):
        used(shares, "carl", 10)  # one that sends small ones has no less than others
    for _ in range(200):
        used(shares, "ann", 100)
    reached = shares.counter("ann") - 200
    assert reached - shares.counter("carl") == pytest.approx(BURST_TASKS_PER_SLOT * 200, rel=0.01)


def test_nobody_has_credit_at_the_beginning() -> None:
    shares = Shares(slots=8)
    assert shares.counter("ann") == shares.counter("bob") == 0.0


def test_counters_are_bounded_in_number_and_those_heard_of_lately_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "MAX_PRINCIPALS", 10)
    shares = Shares()
    for number in range(100):
        shares.seen(f"p{number}", float(number))
        shares.seen("ann", float(number))
        used(shares, "ann", 10_000)
    assert len(shares) == 10
    assert shares.counter("ann") > shares.counter("p99")


def test_another_principal_is_remembered_by_when_it_was_seen_last() -> None:
    shares = Shares()
    shares.seen("bob", 10.0)
    assert not shares.another_seen("bob", 0.0)
    shares.seen("ann", 20.0)
    assert shares.another_seen("ann", 10.0)
    assert not shares.another_seen("ann", 10.5)
    assert shares.another_seen("bob", 20.0)


def test_being_seen_again_counts_not_being_seen_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "MAX_PRINCIPALS", 2)
    shares = Shares()
    for now, owner in enumerate(("ann", "bob", "ann")):
        shares.seen(owner, float(now))
    assert shares.another_seen("carl", 2.0)
    charged = shares.charge("ann", 0)
    shares.seen("carl", 3.0)  # one too many: bob was not heard of for longest
    assert len(shares) == 2
    assert shares.counter("ann") == charged > 0


def test_the_end_of_a_task_does_not_bring_a_forgotten_principal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "MAX_PRINCIPALS", 2)
    for ended, ran in ((tail(tokens_out=100), True), (None, True), (None, False)):
        shares = Shares()
        shares.seen("ann", 0.0)
        charged = shares.charge("ann", 0)
        shares.seen("bob", 1.0)
        shares.seen("carl", 2.0)
        shares.settle("ann", charged, ended, ran=ran)
        assert len(shares) == 2
        assert shares.counter("ann") == 0.0
        assert shares.estimate("carl", 0) == (200 if ended else OUTPUT_WEIGHT * FIRST_OUTPUT_TOKENS)  # all learn of it


# ---------------------------------------------------------------- what follows for those who wait


def test_two_that_always_want_more_get_the_same_number_of_tokens() -> None:
    """Whatever their tasks are like: one sends many short ones, one few long ones."""
    long = [Arrival(0.0, "long", service_s=5.0, tokens=500, size=0) for _ in range(400)]
    short = [Arrival(0.0, "short", service_s=0.5, tokens=50, size=0) for _ in range(4_000)]
    simulation = Simulation(slots=4, limit=100_000)
    simulation.run([*short, *long])  # 4000 s of work over 4 slots
    by_half = {
        owner: sum(1 for wait in simulation.waits[owner] if wait <= 500.0) * tokens
        for owner, tokens in (("short", 50), ("long", 500))
    }
    assert by_half["short"] == pytest.approx(by_half["long"], rel=0.05)


def mean(waits: list[float]) -> float:
    return sum(waits) / len(waits)


def slowest(waits: list[float]) -> float:
    """The 95th percentile."""
    return sorted(waits)[min(len(waits) - 1, int(len(waits) * 0.95))]


def bursts(owner: str, tasks: int, period_s: float, times: int, service_s: float, first: float) -> list[Arrival]:
    tokens = round(service_s * TOKENS_PER_S)
    return [
        Arrival(first + number * period_s, owner, service_s, tokens) for number in range(times) for _ in range(tasks)
    ]


def flood(shape: str, per_s: float, until: float, service_s: float, seed: int) -> list[Arrival]:
    rng, tokens = random.Random(seed), round(service_s * TOKENS_PER_S)
    times, now, together = [], 0.0, {"steady": 1, "random": 1, "bursts": 100}[shape]
    while now < until:
        times += [now] * together
        now += rng.expovariate(per_s) if shape == "random" else together / per_s
    return [Arrival(at, "big", service_s, tokens) for at in times]


def small_beside_big(
    slots: int, per_slot: int, load: float, shape: str, phase: float, service_s: float, times: int = 4, seed: int = 1
) -> tuple[list[float], list[float]]:
    """The small one's waits (alone, beside one that sends 50 times its load).

    Its bursts have `per_slot` tasks for each slot, and ask for `load` of all slots in the long run.
    """
    tasks = slots * per_slot
    period_s = per_slot / load
    small = bursts("small", tasks, period_s, times, 1.0, first=5.0 + phase)
    big = flood(shape, LOAD_OF_THE_OTHER * tasks / period_s / service_s, period_s * times, service_s, seed)
    known = [Arrival(0.0, "small", 0.1, 1)]  # so that room is kept for it from the beginning
    limit = 12 * tasks  # a quarter of it is more than a burst and what is left of the one before
    alone = Simulation(slots, limit).run(known + small)
    beside = Simulation(slots, limit).run(known + small + big)
    assert "small" not in beside.refused
    assert len(beside.waits["big"]) + beside.refused.get("big", 0) >= LOAD_OF_THE_OTHER * len(small) * 0.9
    return alone.waits["small"], beside.waits["small"]


SHAPES = list(
    product(
        (1, 2, 4, 8),  # slots
        (4, 6, 9),  # tasks of a burst for each slot
        (0.1, 0.25, 0.4),  # of all slots: less than half, its fair share
        ("steady", "random", "bursts"),
        (0.0, 0.3),  # seconds
        (0.4, 1.0),  # the other one's tasks' length, beside 1 s
    )
)


def assert_at_most_twice(alone: list[float], beside: list[float]) -> None:
    assert mean(beside) <= 2 * mean(alone)
    assert slowest(beside) <= 2 * slowest(alone)


@pytest.mark.parametrize("shape", ["steady", "random", "bursts"])
@pytest.mark.parametrize("service_s", [0.4, 1.0])
def test_beside_one_with_fifty_times_its_load_a_principal_waits_at_most_twice_as_long_as_alone(
    shape: str, service_s: float
) -> None:
    """16 tasks over 4 slots, so that alone it waits for itself."""
    assert_at_most_twice(*small_beside_big(4, 4, 0.25, shape, 0.3, service_s))


@pytest.mark.parametrize("case", random.Random(7).sample(SHAPES, 8), ids=str)
def test_it_does_so_in_bursts_of_many_shapes(case: tuple[int, int, float, str, float, float]) -> None:
    assert_at_most_twice(*small_beside_big(*case, times=3))


@pytest.mark.long
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_it_does_so_in_bursts_of_every_shape(case: tuple[int, int, float, str, float, float]) -> None:
    assert_at_most_twice(*small_beside_big(*case, times=6, seed=2))


def test_a_burst_that_would_not_wait_alone_waits_for_the_next_free_slots_and_no_longer() -> None:
    alone, beside = small_beside_big(4, 1, 0.1, "steady", 0.3, 1.0)
    assert max(alone) == 0.0
    assert max(beside) <= 1.0 + 1e-9


def test_the_big_one_gets_all_that_the_small_one_leaves() -> None:
    small = bursts("small", 16, 40.0, 5, 1.0, first=5.0)
    big = flood("steady", 50.0, 200.0, 1.0, 1)
    waits = Simulation(4, limit=200).run(small + big).waits
    assert len(waits["big"]) >= 200 * 4 - len(small)  # its slots were never idle
