"""What the benchmarks rest on, and what would be wrong there without anybody noticing."""

from __future__ import annotations

import json

import pytest

from tests.bench import engine, nodes, placement
from tests.bench.figures import Required, percentile, report, spread, table


def test_a_percentile_is_a_value_that_was_measured_and_so_many_do_not_exceed() -> None:
    hundred = [float(value) for value in range(1, 101)]
    assert [percentile(hundred, percent) for percent in (0, 1, 50, 99, 99.5, 100)] == [1, 1, 50, 99, 100, 100]
    assert percentile([3.0], 50) == percentile([3.0], 99) == 3.0
    assert percentile([1.0, 2.0], 50) == 1.0
    assert percentile([], 99) is None
    assert spread([0.003, 0.001, 0.002], scale=1e3) == {"p50": 2.0, "p99": 3.0, "max": 3.0}
    assert spread([]) == {"p50": None, "p99": None, "max": None}


@pytest.mark.parametrize(("value", "met"), [(199.9, True), (200.0, True), (200.1, False), (None, False)])
def test_what_was_not_measured_is_not_met(value: float | None, met: bool, capsys: pytest.CaptureFixture[str]) -> None:
    required = Required("p99", value, 200.0, "us")
    assert required.met is met
    assert str(required).startswith("holds" if met else "FAILS")
    assert report("b", {}, {"p99": value}, [required], "", as_json=True) == (0 if met else 1)
    told = json.loads(capsys.readouterr().out)
    assert told["required"] == [{"what": "p99", "value": value, "most": 200.0, "unit": "us", "met": met}]


def test_a_table_has_straight_columns() -> None:
    assert table(("", "n"), [("a", 1), ("long", 12_345)]) == "           n\na          1\nlong  12,345"


def test_handling_is_read_from_a_controls_own_histogram() -> None:
    name = nodes.HANDLING
    metrics = f"""# TYPE {name} histogram
{name}_bucket{{le="0.001"}} 50.0
{name}_bucket{{le="0.0025"}} 99.0
{name}_bucket{{le="+Inf"}} 100.0
{name}_count 100.0
{name}_sum 0.2
"""
    assert nodes.handling_ms(metrics) == {"count": 100.0, "mean": 2.0, "p99_at_most": 2.5}
    assert nodes.handling_ms("") == {"count": 0.0, "mean": None, "p99_at_most": None}


@pytest.mark.parametrize(("pools", "models", "of_nodes"), [(10, 1, 1), (100, 10, 10), (35, 5, 3)])
def test_the_world_of_a_placement_has_the_pools_that_it_says(pools: int, models: int, of_nodes: int) -> None:
    world = placement.filled(pools, models)
    facts = world.registry.pool_facts(world.now)
    assert len(facts) == pools
    assert len(world.registry.nodes) == of_nodes
    assert len({pool.model for pool in facts}) == models
    assert all(pool.ready and pool.online and pool.reachable for pool in facts)
    assert sum(pool.slots_total - pool.slots_free for pool in facts) == len(world.running) == 2 * pools


def test_a_decision_of_the_benchmark_is_the_one_that_is_explained() -> None:
    world = placement.filled(40, 4)
    for _ in range(300):
        world.step()
        for beat in world.beats():
            beat()
        task = world.arrive()
        told = world.decide(task.wish).picked
        claim = world.claim(task)
        assert (claim.node_id, claim.pool_id) == told
        world.placed(task, claim)
        world.end_one()()
    assert len(world.running) == 80
    assert (
        sum(world.registry.claimed(pool.node_id, pool.pool_id) for pool in world.registry.pool_facts(world.now)) == 80
    )


async def test_the_costs_are_of_as_many_decisions_as_were_asked_for() -> None:
    costs = await placement.measure(placement.filled(20, 2), 500)
    assert len(costs.decision) == len(costs.release) == 500
    assert costs.beat
    assert len(costs.decide) == placement.DECIDES


async def test_the_parts_of_a_decision_are_told_and_nothing_stays_timed() -> None:
    world = placement.filled(20, 2)
    told = await placement.parts(world, 50)
    assert {"the best pool", "claim", "log line", "facts of all pools, to explain it"} <= set(told)
    assert "snapshot" not in vars(world.room)


def test_the_stand_in_engine_says_each_token_once() -> None:
    answers = engine.Answers(chat=True, model="m")
    said = b"".join(answers.token(number) for number in range(3)) + answers.end(3)
    assert [part.partition(b'"')[0] for part in said.split(b'"content":"')[1:]] == [b"t0 ", b"t1 ", b"t2 "]
    assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert engine.text_of(3) == "t0 t1 t2 "
