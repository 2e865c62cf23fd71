"""The kept inputs: `corpus/NAME.txt` for each target, one Python bytes literal a line, `#` lines say why.

What a fuzzer once found interesting is tried again by every run, and by the tests. Text, so that a change can be read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
LARGEST_KEPT_BYTES = 4 * 1024  # larger ones are tests of their own, made by a line of code


def kept(name: str) -> tuple[bytes, ...]:
    """The inputs that are kept for a target."""
    path = FOLDER / f"{name}.txt"
    if not path.exists():
        return ()
    lines = (line.strip() for line in path.read_text().splitlines())
    return tuple(ast.literal_eval(line) for line in lines if line and not line.startswith("#"))


def keep(name: str, inputs: Iterable[bytes]) -> int:
    """Add `inputs` that are small and not there yet. Returns how many were added."""
    there = set(kept(name))
    new = sorted(
        {data for data in inputs if len(data) <= LARGEST_KEPT_BYTES} - there, key=lambda data: (len(data), data)
    )
    with (FOLDER / f"{name}.txt").open("a") as file:
        file.writelines(f"{data!r}\n" for data in new)
    return len(new)
