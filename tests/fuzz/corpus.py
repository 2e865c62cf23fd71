"""The kept inputs: `corpus/NAME.txt` for each target, one Python bytes literal a line, `#` lines say why.

What a fuzzer once found interesting is tried again by every run, and by the tests. Text, so that a change can be read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
LARGEST_KEPT_BYTES = 1_000  # larger ones are tests of their own, made by a line of code
MOST_KEPT_BYTES = 8 * 1024  # of one target, as text; the smallest go first, for they reach most for what they cost


def kept(name: str) -> tuple[bytes, ...]:
    """The inputs that are kept for a target."""
    path = FOLDER / f"{name}.txt"
    if not path.exists():
        return ()
    lines = (line.strip() for line in path.read_text().splitlines())
    return tuple(ast.literal_eval(line) for line in lines if line and not line.startswith("#"))


def keep(name: str, inputs: Iterable[bytes]) -> int:
    """Add those of `inputs` that are new, the small ones first, as far as there is room. Returns how many."""
    there, path = set(kept(name)), FOLDER / f"{name}.txt"
    room = MOST_KEPT_BYTES - (path.stat().st_size if path.exists() else 0)
    lines: list[str] = []
    for data in sorted(set(inputs) - there, key=lambda data: (len(data), data)):
        room -= len(repr(data)) + 1
        if room < 0 or len(data) > LARGEST_KEPT_BYTES:
            break
        lines.append(f"{data!r}\n")
    if lines:
        with path.open("a") as file:
            file.writelines(lines)
    return len(lines)
