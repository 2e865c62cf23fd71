"""What benchmarks say: percentiles, a table for people, one JSON document for programs, and what was required.

Owns no measurement. A figure beyond its requirement is told and makes a benchmark's exit status 1: it is for people who
compare, not for a test run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Figure = float | int | str | None


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """The smallest of the values, in order, that `percent` of them do not exceed; None of nothing.

    A value that was measured, never one between two: of 100 values the 99th percentile is the second highest.
    """
    if not ordered:
        return None
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def spread(values: Iterable[float], *, scale: float = 1.0, digits: int = 1) -> dict[str, float | None]:
    """p50, p99 and the highest, each times `scale`."""
    ordered = sorted(values)
    named = {"p50": percentile(ordered, 50), "p99": percentile(ordered, 99), "max": percentile(ordered, 100)}
    return {name: None if value is None else round(value * scale, digits) for name, value in named.items()}


@dataclass(frozen=True, slots=True)
class Required:
    """One requirement, and what was measured: `value` may be `most` at most. None was not measured, and is not met."""

    what: str
    value: float | None
    most: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value is not None and self.value <= self.most

    def __str__(self) -> str:
        told = "not measured" if self.value is None else f"{show(self.value)} {self.unit}".strip()
        limit = f"{show(self.most)} {self.unit}".strip()
        return f"{'holds' if self.met else 'FAILS'}: {self.what}: {told}, at most {limit}"


def show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    cells = [list(heads), *([show(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(heads))]
    lines = []
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *others]))
    return "\n".join(line.rstrip() for line in lines)


def machine() -> dict[str, Figure]:
    """Where it was measured: of figures from different machines only ratios can be compared. `loop_ms`: a million turns
    of an empty loop, which take a third longer or twice as long while somebody else uses the core."""
    began = time.perf_counter()
    for _ in range(1_000_000):
        pass
    loop_ms = (time.perf_counter() - began) * 1_000
    return {
        "loop_ms": round(loop_ms, 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def report(
    name: str,
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
    required: Sequence[Required],
    text: str,
    *,
    as_json: bool,
) -> int:
    """Print one benchmark's outcome. Returns the exit status: 0 if all that was required holds."""
    if as_json:
        told = [asdict(each) | {"met": each.met} for each in required]
        outcome = {"benchmark": name, "machine": machine(), "settings": settings, "figures": figures, "required": told}
        print(json.dumps(outcome, indent=1))
    else:
        print(text)
        print(", ".join(f"{name.replace('_', ' ')} {show(value)}" for name, value in machine().items()))
        for each in required:
            print(each)
    sys.stdout.flush()
    return 0 if all(each.met for each in required) else 1
