"""What `llorch bench` says: steps as tables, what to mind about them, and how far one is. From figures to text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llorch.cli.bench_figures import rows_of
from llorch.cli.output import table

BUSY = 0.8  # of one core: beyond, what is measured may be this client
EARLY = 0.9  # of the tokens that were asked for: fewer, and other answers were measured than were meant
LATE_MS = 20.0


def ms(value: float | None) -> str:
    """0.634 -> 0.63ms, 72.1 -> 72.1ms, 1234.5 -> 1234ms, 12345 -> 12.3s."""
    if value is None:
        return "-"
    if abs(value) >= 10_000:
        return f"{value / 1000:.1f}s"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}ms"


def more_ms(value: float | None) -> str:
    return "-" if value is None else ("+" if value >= 0 else "") + ms(value)


def rate(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def label(step: Mapping[str, Any]) -> str:
    return str(step["concurrency"]) if step["rate_per_s"] is None else f"{step['rate_per_s']:g}/s"


# ---------------------------------------------------------------- llorch bench run


def report(document: Mapping[str, Any]) -> str:
    """All steps: what came, how fast, and what went wrong."""
    steps: Sequence[Mapping[str, Any]] = document["steps"]
    good = any(step["goodput"] for step in steps)
    titles = ["load", "requests", "failed", "req/s", "tokens/s", "tokens out", *(["goodput", "good/s"] if good else [])]
    text = table(titles, [_rates(step, good) for step in steps])
    rows = [
        [label(step), name, *(ms(found[key]) for key in ("p50", "p90", "p99", "max"))]
        for step in steps
        for name, found in rows_of(step)
    ]
    if rows:
        text += "\n" + table(["load", "time", "p50", "p90", "p99", "max"], rows)
    errors = [[label(step), count, kind] for step in steps for kind, count in step["errors"].items()]
    if errors:
        text += "\n" + table(["load", "failed", "error"], errors)
    return text


def _rates(step: Mapping[str, Any], good: bool) -> list[object]:
    mean, sent = step["output_tokens_mean"], step["requests"]
    row: list[object] = [label(step), sent["sent"], sent["failed"], rate(step["requests_per_s"])]
    row += [rate(step["output_tokens_per_s"]), "-" if mean is None else f"{mean:g}"]
    if good:
        share = step["goodput"]["share"]
        row += ["-" if share is None else f"{share:.1%}", rate(step["goodput"]["requests_per_s"])]
    return row


def cautions(document: Mapping[str, Any]) -> Iterator[str]:
    """What whoever reads the figures should know about them."""
    steps = [step for step in document["steps"] if step["requests"]["ok"]]
    if any(step["tokens_counted_by"] != "usage" for step in steps):
        yield "the endpoint does not count tokens (usage): chunks with text are counted, which may hold several"
    asked = document["output_tokens"]
    early = [step for step in steps if (step["output_tokens_mean"] or asked) < EARLY * asked]
    if early:
        yield (
            f"answers ended after {early[0]['output_tokens_mean']:g} tokens, not {asked}: --ignore-eos has vLLM, "
            "SGLang and llama.cpp go on"
        )
    for step in steps:
        if step["client_cpu"] > BUSY:
            busy = step["client_cpu"]
            yield f"at {label(step)} this client was busy for {busy:.0%} of the time: its own limits are in the figures"
        late = step["late_ms"]
        if step["rate_per_s"] is not None and late is not None and late["p99"] > LATE_MS:
            yield f"at {label(step)} requests were sent up to {ms(late['max'])} late; their times count from when due"


def progress(words: str, ended: int, failed: int, since_s: float, of: str) -> str:
    """`8 at a time: 51 requests, 1 failed, 6 s of 30s`"""
    return f"{words}: {ended} requests{f', {failed} failed' if failed else ''}, {since_s:.0f} s{of}"


# ---------------------------------------------------------------- llorch bench overhead

CROWDED = 0.5  # runnable processes for each CPU, before anything was started here

_SHOWN = (
    ("first token p50", "ttft_ms", "p50", "ttft_p50_ms"),
    ("first token p99", "ttft_ms", "p99", "ttft_p99_ms"),
    ("per token mean", "per_token_ms", "mean", "per_token_mean_ms"),
    ("between tokens p99", "itl_ms", "p99", "itl_p99_ms"),
    ("end to end p50", "e2e_ms", "p50", "e2e_p50_ms"),
    ("end to end p99", "e2e_ms", "p99", "e2e_p99_ms"),
)


def overhead_report(document: Mapping[str, Any]) -> str:
    """The two sides of each load, and what llorch adds."""
    rows: list[list[object]] = []
    for load in document["loads"]:
        alone, behind, more = load["alone"], load["behind"], load["added"]
        name = label(alone)
        for title, key, of, difference in _SHOWN:
            sides = [ms(side[key][of]) if side[key] else "-" for side in (alone, behind)]
            rows.append([name, title, *sides, more_ms(more[difference])])
        ratio = more["tokens_per_s_ratio"]
        sides = [rate(side["output_tokens_per_s"]) for side in (alone, behind)]
        rows.append([name, "tokens/s", *sides, "-" if ratio is None else f"{ratio - 1:+.1%}"])
    return table(["load", "figure", "engine alone", "behind llorch", "added"], rows)


def overhead_cautions(document: Mapping[str, Any]) -> Iterator[str]:
    load, cpus = document["load_before"], document["cpus"] or 1
    if load > CROWDED * cpus:
        yield f"the machine was at work before this began (load {load:.1f} on {cpus} CPUs): that is in the figures, too"
    for each in document["loads"]:
        for side, words in (("alone", "at the engine"), ("behind", "behind llorch")):
            for kind, count in each[side]["errors"].items():
                yield f"at {label(each[side])}, failed {words}: {count} x {kind}"
