from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.cli.bench_answer import Sample
from llorch.cli.bench_figures import MAX_KINDS, Slo, Tally, Values, added, percentile
from llorch.cli.bench_plan import Load


def sample(
    due: float, *tokens: float, end: float | None = None, error: str | None = None, sent: float | None = None
) -> Sample:
    ended = end if end is not None else tokens[-1] if tokens else due
    return Sample(due, due if sent is None else sent, ended, tokens, tokens=len(tokens), error=error)


def figures(*samples: Sample, slo: Slo | None = None, began: float = 0.0, until: float | None = None) -> dict[str, Any]:
    tally = Tally(Load(concurrency=1), slo or Slo())
    tally.begin(began, until)
    for each in samples:
        tally.add(each)
    return tally.figures()


@pytest.mark.parametrize(("percent", "value"), [(50, 5), (90, 9), (99, 10), (100, 10), (10, 1), (1, 1)])
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(percent: float, value: float) -> None:
    assert percentile(range(1, 11), percent) == value


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_figures_are_values_that_were_measured_and_rise(values: list[float]) -> None:
    of = Values()
    for value in values:
        of.add(value)
    found = of.figures()
    assert found is not None
    assert found["p50"] <= found["p90"] <= found["p99"] <= found["max"] == round(max(values), 3)
    assert {found["p50"], found["p90"], found["p99"]} <= {round(value, 3) for value in values}
    assert sum(value <= sorted(values)[-(-len(values) // 2) - 1] for value in values) * 2 >= len(values)


def test_of_very_many_values_an_even_part_is_kept_and_maximum_mean_and_count_are_of_all() -> None:
    """Of all of the time: it gets slower and slower here, and that shows."""
    of = Values(limit=1000)
    values = [float(number) for number in range(100_000)]
    values[77_777] = 1e6
    for value in values:
        of.add(value)
    found = of.figures()
    assert found is not None
    assert (found["count"], found["max"], found["mean"]) == (100_000, 1e6, round(sum(values) / 100_000, 3))
    assert 500 <= found["kept"] <= 1000
    assert found["p50"] == pytest.approx(50_000, rel=0.01)
    assert found["p99"] == pytest.approx(99_000, rel=0.01)


def test_times_count_from_when_a_request_was_due_not_from_when_it_was_sent() -> None:
    found = figures(sample(1.0, 3.0, 3.5, end=4.0, sent=2.5))
    assert (found["ttft_ms"]["p50"], found["e2e_ms"]["p50"], found["late_ms"]["p50"]) == (2000.0, 3000.0, 1500.0)
    assert (found["itl_ms"]["p50"], found["per_token_ms"]["p50"]) == (500.0, 500.0)


def test_rates_are_of_the_time_that_was_meant_and_what_came_later_counts_for_latency_alone() -> None:
    found = figures(sample(0.0, 1.0, 2.0), sample(2.0, 3.0, 5.0), began=0.0, until=4.0)
    assert found["duration_s"] == 4.0
    assert found["requests_per_s"] == 0.25  # one of two ended in time
    assert found["output_tokens_per_s"] == 0.75  # three of four tokens came in time
    assert found["e2e_ms"]["count"] == 2


def test_without_such_a_time_rates_go_on_to_the_last_answer() -> None:
    found = figures(sample(10.0, 11.0, 12.0), sample(10.0, 13.0, 14.0), began=10.0)
    assert (found["duration_s"], found["requests_per_s"], found["output_tokens_per_s"]) == (4.0, 0.5, 1.0)


def test_several_stretches_are_one_time_and_what_lay_between_is_none() -> None:
    tally = Tally(Load(concurrency=1), Slo())
    tally.begin(0.0, 2.0)
    tally.add(sample(0.0, 1.0))
    tally.begin(100.0, 102.0)
    tally.add(sample(100.0, 101.0))
    tally.begin(200.0, None)
    tally.add(sample(200.0, 201.0))
    found = tally.figures()
    assert (found["duration_s"], found["requests_per_s"]) == (5.0, 0.6)


def test_a_failed_request_is_counted_by_its_kind_and_in_no_latency() -> None:
    found = figures(sample(0.0, 1.0), sample(0.0, 9.0, error="cut stream"), sample(0.0, error="timeout", end=2.0))
    assert found["requests"] == {"sent": 3, "ok": 1, "failed": 2}
    assert found["errors"] == {"cut stream": 1, "timeout": 1}
    assert (found["ttft_ms"]["count"], found["ttft_ms"]["max"]) == (1, 1000.0)


def test_a_peer_that_makes_up_codes_fills_no_memory() -> None:
    found = figures(*(sample(0.0, error=f"HTTP 500 {number}") for number in range(100)))
    assert len(found["errors"]) == MAX_KINDS + 1
    assert sum(found["errors"].values()) == 100


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_ms=1000), 1), (Slo(ttft_ms=2000), 2), (Slo(itl_ms=100), 1), (Slo(e2e_ms=1900), 1),
        (Slo(ttft_ms=2000, itl_ms=100), 1), (Slo(ttft_ms=1), 0),
    ],
)  # fmt: skip
def test_goodput_is_the_part_of_all_requests_that_kept_to_every_limit(slo: Slo, good: int) -> None:
    quick, slow = sample(0.0, 1.0, 1.1, 1.2), sample(0.0, 2.0, 2.5, 3.0)
    found = figures(quick, slow, sample(0.0, error="timeout"), slo=slo, until=4.0)
    assert found["goodput"] == {"share": round(good / 3, 4), "requests_per_s": good / 4}


def test_without_limits_there_is_no_goodput_and_without_an_answer_no_latency() -> None:
    found = figures(sample(0.0, error="timeout"), until=1.0)
    assert (found["goodput"], found["ttft_ms"], found["output_tokens_mean"]) == (None, None, None)


def test_one_token_has_no_time_between_tokens_and_keeps_to_any_limit_of_it() -> None:
    found = figures(sample(0.0, 1.0), slo=Slo(itl_ms=1), until=2.0)
    assert (found["itl_ms"], found["per_token_ms"], found["goodput"]["share"]) == (None, None, 1.0)


def test_how_tokens_were_counted_is_said() -> None:
    own, theirs = sample(0.0, 1.0), Sample(0.0, 0.0, 1.0, (1.0,), tokens=7, counted=True)
    assert [figures(*each)["tokens_counted_by"] for each in ((own,), (theirs,), (own, theirs))] == [
        "chunks",
        "usage",
        "mixed",
    ]
    assert figures(theirs)["output_tokens_mean"] == 7


def test_what_is_added_is_the_difference_and_of_tokens_the_part_that_is_left() -> None:
    alone = figures(sample(0.0, 1.0, 1.25), until=2.0)
    behind = figures(sample(0.0, 1.5, 2.5), until=2.0)
    found = added(alone, behind)
    assert (found["ttft_p50_ms"], found["per_token_mean_ms"], found["e2e_p99_ms"]) == (500.0, 750.0, 1250.0)
    assert found["tokens_per_s_ratio"] == 0.5
    assert set(added(figures(until=1.0), behind).values()) == {None}
