"""From the samples of one step of `llorch bench` to its figures, and from two of them to what lies between.

Percentiles are by nearest rank: each is a time that was measured. Of each figure at most `KEPT` values are kept; from
there on every second, fourth, ... one is, while count, mean and maximum are of all.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llorch.cli.bench_answer import Sample
from llorch.cli.bench_plan import Load

KEPT = 200_000  # 1.6 MB for each of a step's figures
PERCENTILES = (50, 90, 99)
MAX_KINDS = 20  # of errors: a peer chooses their codes
OTHER = "other"


def percentile(ordered: Sequence[float], percent: float) -> float:
    """By nearest rank: the least value that `percent` of the values do not exceed. There must be one."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


class Values:
    """One figure's values, in milliseconds: all of them, or of many an even part."""

    __slots__ = ("_kept", "_limit", "_stride", "_sum", "count", "most")

    def __init__(self, limit: int = KEPT) -> None:
        self._kept = array("d")
        self._limit = limit
        self._stride = 1
        self._sum = 0.0
        self.count = 0
        self.most = 0.0

    def add(self, value: float) -> None:
        if self.count % self._stride == 0:
            self._kept.append(value)
            if len(self._kept) > self._limit:
                self._kept = self._kept[::2]
                self._stride *= 2
        self.count += 1
        self._sum += value
        self.most = max(self.most, value)

    def figures(self) -> dict[str, float | int] | None:
        """None without a value."""
        if not self.count:
            return None
        ordered = sorted(self._kept)
        found: dict[str, float | int] = {
            f"p{percent}": round(percentile(ordered, percent), 3) for percent in PERCENTILES
        }
        found |= {"max": round(self.most, 3), "mean": round(self._sum / self.count, 3)}
        return found | {"count": self.count, "kept": len(ordered)}


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to, in milliseconds, to count as good; `itl` is the mean time between its tokens."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    e2e_ms: float | None = None

    @property
    def given(self) -> bool:
        return any(limit is not None for limit in (self.ttft_ms, self.itl_ms, self.e2e_ms))

    def met(self, ttft_ms: float, itl_ms: float | None, e2e_ms: float) -> bool:
        pairs = ((ttft_ms, self.ttft_ms), (itl_ms, self.itl_ms), (e2e_ms, self.e2e_ms))
        return all(limit is None or value is None or value <= limit for value, limit in pairs)


class Tally:
    """The samples of one load, taken one by one, in one stretch of time or several.

    Rates are of a stretch as it was meant: what came after its end counts for latency alone. One without such an end
    goes on to the end of its last request.
    """

    def __init__(self, load: Load, slo: Slo) -> None:
        self.load, self._slo = load, slo
        self._began_s = self._last_s = 0.0
        self._until_s: float | None = 0.0
        self._took_s = self._watched_s = self._cpu_s = 0.0
        self._ttft, self._itl, self._per_token, self._e2e, self._late = (Values() for _ in range(5))
        self._errors: Counter[str] = Counter()
        self._sent = self._ok = self._ended_in_time = self._good = self._good_in_time = 0
        self._tokens = self._prompt_tokens = self._with_prompt = self._counted = 0
        self._tokens_in_time = 0.0

    def begin(self, began_s: float, until_s: float | None) -> None:
        """A stretch, after all samples of the one before."""
        self._took_s = self._so_far_s()
        self._began_s = self._last_s = began_s
        self._until_s = until_s

    def _so_far_s(self) -> float:
        return self._took_s + (self._last_s if self._until_s is None else self._until_s) - self._began_s

    def watched(self, cpu_s: float, took_s: float) -> None:
        """How long this client has computed, in how long a stretch."""
        self._cpu_s += cpu_s
        self._watched_s += took_s

    def add(self, sample: Sample) -> None:
        self._sent += 1
        self._last_s = max(self._last_s, sample.ended_s)
        self._late.add(max(0.0, sample.sent_s - sample.due_s) * 1000)
        self._tokens_in_time += self._share_in_time(sample) * sample.tokens
        if sample.error is not None:
            kind = sample.error
            self._errors[kind if kind in self._errors or len(self._errors) < MAX_KINDS else OTHER] += 1
            return
        self._ok += 1
        in_time = self._until_s is None or sample.ended_s <= self._until_s
        self._ended_in_time += in_time
        self._tokens += sample.tokens
        self._counted += sample.counted
        if sample.prompt_tokens is not None:
            self._prompt_tokens += sample.prompt_tokens
            self._with_prompt += 1
        ttft_ms, e2e_ms = (sample.token_s[0] - sample.due_s) * 1000, (sample.ended_s - sample.due_s) * 1000
        self._ttft.add(ttft_ms)
        self._e2e.add(e2e_ms)
        for before_s, after_s in pairwise(sample.token_s):
            self._itl.add((after_s - before_s) * 1000)
        per_token_ms = _per_token_ms(sample)
        if per_token_ms is not None:
            self._per_token.add(per_token_ms)
        if self._slo.met(ttft_ms, per_token_ms, e2e_ms):
            self._good += 1
            self._good_in_time += in_time

    def _share_in_time(self, sample: Sample) -> float:
        if self._until_s is None or not sample.token_s:
            return 1.0
        return sum(at_s <= self._until_s for at_s in sample.token_s) / len(sample.token_s)

    @property
    def failed(self) -> int:
        return self._sent - self._ok

    def figures(self) -> dict[str, Any]:
        """As `--json` prints them; the README says what each means."""
        took_s = max(1e-9, self._so_far_s())
        good = {
            "share": round(self._good / self._sent, 4) if self._sent else None,
            "requests_per_s": round(self._good_in_time / took_s, 3),
        }
        counted = "usage" if self._counted == self._ok and self._ok else "mixed" if self._counted else "chunks"
        return {
            "concurrency": self.load.concurrency,
            "rate_per_s": self.load.rate_per_s,
            "duration_s": round(took_s, 3),
            "requests": {"sent": self._sent, "ok": self._ok, "failed": self.failed},
            "errors": dict(sorted(self._errors.items())),
            "requests_per_s": round(self._ended_in_time / took_s, 3),
            "output_tokens_per_s": round(self._tokens_in_time / took_s, 3),
            "output_tokens_mean": round(self._tokens / self._ok, 2) if self._ok else None,
            "prompt_tokens_mean": round(self._prompt_tokens / self._with_prompt, 2) if self._with_prompt else None,
            "tokens_counted_by": counted,
            "ttft_ms": self._ttft.figures(),
            "itl_ms": self._itl.figures(),
            "per_token_ms": self._per_token.figures(),
            "e2e_ms": self._e2e.figures(),
            "late_ms": self._late.figures(),
            "goodput": good if self._slo.given else None,
            "client_cpu": round(self._cpu_s / self._watched_s, 3) if self._watched_s else 0.0,
        }


def _per_token_ms(sample: Sample) -> float | None:
    """The mean time from token to token; None of a single one."""
    if sample.tokens < 2 or len(sample.token_s) < 2:
        return None
    return (sample.token_s[-1] - sample.token_s[0]) * 1000 / (sample.tokens - 1)


# ---------------------------------------------------------------- two of them

COMPARED = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("per_token_ms", "mean"), ("itl_ms", "p50"), ("itl_ms", "p99"),
            ("e2e_ms", "p50"), ("e2e_ms", "p99"))  # fmt: skip


def added(alone: Mapping[str, Any], behind: Mapping[str, Any]) -> dict[str, float | None]:
    """What one set of figures has more than the other: milliseconds, and of tokens/s the part that is left."""
    found = {f"{name.removesuffix('_ms')}_{of}_ms": _more(alone, behind, name, of) for name, of in COMPARED}
    rate, base = behind["output_tokens_per_s"], alone["output_tokens_per_s"]
    return found | {"tokens_per_s_ratio": round(rate / base, 4) if base else None}


def _more(alone: Mapping[str, Any], behind: Mapping[str, Any], name: str, of: str) -> float | None:
    if alone[name] is None or behind[name] is None:
        return None
    return round(float(behind[name][of]) - float(alone[name][of]), 3)


def rows_of(figures: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """The latencies that a step has, as they are shown: name, and what there is of it."""
    for name, key in (("first token", "ttft_ms"), ("between tokens", "itl_ms"), ("end to end", "e2e_ms")):
        if figures[key] is not None:
            yield name, figures[key]
