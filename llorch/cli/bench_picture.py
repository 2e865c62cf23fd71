"""A picture of what `llorch bench run` measured, by matplotlib, which is there only where somebody asked for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llorch.cli.bench_words import label
from llorch.cli.exits import Exit
from llorch.cli.output import Failure, usage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
_LATENCIES = (("first token", "ttft_ms"), ("between tokens", "itl_ms"), ("end to end", "e2e_ms"))


def check(path: Path) -> None:
    """Whether a picture can be drawn there: asked before a load is sent. Raises Failure."""
    if path.suffix.lower() not in SUFFIXES:
        raise usage(f"--plot {path}: a picture is {' or '.join(SUFFIXES)}", f"--plot {path.stem or 'bench'}.svg")
    if not path.parent.is_dir():
        raise usage(f"--plot {path}: there is no directory {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Failure("--plot needs matplotlib, which is not installed", code=Exit.USAGE, hint=install()) from None


def install() -> str:
    """The command that adds it to this very installation."""
    from importlib.util import find_spec

    from llorch.cli.dev_words import install_words

    return install_words(sys.executable, "matplotlib>=3.9", has_pip=find_spec("pip") is not None)


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Tokens/s and latencies over the steps, to `path`. Raises OSError."""
    from matplotlib.figure import Figure

    steps: Sequence[Mapping[str, Any]] = document["steps"]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(f"{document['model']} at {document['url']}", parse_math=False)
    rates, *latencies = figure.subplots(1, 1 + len(_LATENCIES))
    rates.plot([step["output_tokens_per_s"] for step in steps], marker="o", color="black")
    rates.set_title("tokens/s")
    for axes, (title, key) in zip(latencies, _LATENCIES, strict=True):
        _draw_latency(axes, title, [step[key] for step in steps])
    for axes in (rates, *latencies):
        axes.set_xticks(range(len(steps)), [label(step) for step in steps])
        axes.set_xlabel("requests a second" if steps[0]["rate_per_s"] is not None else "at a time")
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
    figure.savefig(path)


def _draw_latency(axes: Axes, title: str, found: Sequence[Mapping[str, float] | None]) -> None:
    for percent, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
        values = [float("nan") if each is None else each[percent] for each in found]
        axes.plot(values, style, marker="o", color="black", label=percent)
    axes.set_title(f"{title}, ms")
    axes.legend()
