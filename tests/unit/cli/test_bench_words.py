from __future__ import annotations

from typing import Any

import pytest

from llorch.cli.bench_answer import Sample
from llorch.cli.bench_figures import Slo, Tally
from llorch.cli.bench_plan import Load
from llorch.cli.bench_words import cautions, ms, overhead_cautions, overhead_report, progress, report


def step(
    load: Load,
    *,
    slo: Slo | None = None,
    tokens: int = 2,
    counted: bool = True,
    busy: float = 0.1,
    late: float = 0.0,
    error: str | None = None,
) -> dict[str, Any]:
    tally = Tally(load, slo or Slo())
    tally.begin(0.0, 2.0)
    tally.add(Sample(0.0, late, 1.5, (0.5, 1.0), tokens=tokens, counted=counted))
    if error is not None:
        tally.add(Sample(0.0, 0.0, 1.0, error=error))
    tally.watched(busy, 1.0)
    return tally.figures()


def document(*steps: dict[str, Any], asked: int = 2) -> dict[str, Any]:
    return {"steps": steps, "output_tokens": asked}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.634, "0.63ms"), (72.12, "72.1ms"), (1234.5, "1234ms"), (12345.6, "12.3s"), (None, "-"), (-3.0, "-3.00ms")],
)
def test_times_are_told_in_three_digits(value: float | None, text: str) -> None:
    assert ms(value) == text


def test_a_report_has_a_line_for_each_load_and_each_of_its_times() -> None:
    text = report(document(step(Load(concurrency=8)), step(Load(rate_per_s=2.5), error="cut stream")))
    rows = [line.split() for line in text.splitlines()]
    assert rows[:3] == [
        ["LOAD", "REQUESTS", "FAILED", "REQ/S", "TOKENS/S", "TOKENS", "OUT"],
        ["8", "1", "0", "0.50", "1.00", "2"],
        ["2.5/s", "2", "1", "0.50", "1.00", "2"],
    ]
    assert ["8", "first", "token", "500ms", "500ms", "500ms", "500ms"] in rows
    assert ["2.5/s", "end", "to", "end", "1500ms", "1500ms", "1500ms", "1500ms"] in rows
    assert rows[-1] == ["2.5/s", "1", "cut", "stream"]
    assert "GOOD" not in text


def test_goodput_is_told_where_there_are_limits() -> None:
    text = report(document(step(Load(concurrency=1), slo=Slo(ttft_ms=600))))
    assert text.splitlines()[1].split()[-2:] == ["100.0%", "0.50"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (document(step(Load(concurrency=1))), []),
        (document(step(Load(concurrency=1), counted=False)), ["does not count tokens"]),
        (document(step(Load(concurrency=1)), asked=10), ["ended after 2 tokens, not 10"]),
        (document(step(Load(concurrency=1), busy=0.95)), ["busy for 95%"]),
        (document(step(Load(rate_per_s=1.0), late=0.4)), ["up to 400ms late"]),
        (document(step(Load(concurrency=1), late=0.4)), []),
    ],
)
def test_what_to_mind_about_the_figures_is_said(found: dict[str, Any], words: list[str]) -> None:
    said = list(cautions(found))
    assert len(said) == len(words)
    assert all(word in line for word, line in zip(words, said, strict=True))


def test_progress_is_one_line() -> None:
    assert progress("8 at a time", 51, 1, 6.2, " of 30 s") == "8 at a time: 51 requests, 1 failed, 6 s of 30 s"
    assert progress("8 at a time", 51, 0, 6.2, "") == "8 at a time: 51 requests, 6 s"


def test_what_llorch_adds_is_told_with_both_sides() -> None:
    from llorch.cli.bench_figures import added

    alone, behind = step(Load(concurrency=4)), step(Load(concurrency=4), error="timeout")
    behind["ttft_ms"]["p50"] += 1.25
    behind["output_tokens_per_s"] *= 0.9
    loads = [{"alone": alone, "behind": behind, "added": added(alone, behind)}]
    rows = overhead_report({"loads": loads}).splitlines()
    assert rows[1].split() == ["4", "first", "token", "p50", "500ms", "501ms", "+1.25ms"]
    assert rows[-1].split() == ["4", "tokens/s", "1.00", "0.90", "-10.0%"]
    said = list(overhead_cautions({"loads": loads, "load_before": 3.0, "cpus": 2}))
    assert ["load 3.0 on 2 CPUs" in said[0], "failed behind llorch: 1 x timeout" in said[1]] == [True, True]
    assert list(overhead_cautions({"loads": [], "load_before": 0.5, "cpus": 2})) == []
