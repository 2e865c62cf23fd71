"""Many executions of one target: mutations over its corpus, steered by what they reach; crashes made small.

Two ways to steer. Without anything installed, an input is kept for the run when its outcome is new: which exception
from which line, or that it was accepted. With atheris, libFuzzer keeps what reaches new code (`guided.py`). The first
is the same for the same seed.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from tests.fuzz.corpus import kept
from tests.fuzz.mutate import Mutator
from tests.fuzz.watch import Crash, Target, Watch, execute, watching

MOST_IN_CORPUS = 1_000
LARGEST_IN_CORPUS_BYTES = 2_000  # what grows without bound costs time, and reaches nothing else
SEEDS_SHARE = 0.25  # of the inputs that come from a seed, which is accepted; most kept ones show a way to be refused
START_SHARE = 0.5  # of the inputs that come from a seed or a kept one: what is refused early would crowd them out
SHRINK_TRIES = 400
_DIGITS = re.compile("[0-9]+")


@dataclass(slots=True)
class Result:
    """What became of one target. One crash is kept for each place and kind."""

    executions: int = 0
    accepted: int = 0
    crashes: dict[tuple[str, str], Crash] = field(default_factory=dict)
    interesting: list[bytes] = field(default_factory=list)

    def add(self, crash: Crash) -> bool:
        """True if it is the first of its kind."""
        return self.crashes.setdefault((crash.kind, crash.where), crash) is crash


def replay(target: Target) -> Result:
    """The seeds and the kept inputs, each once."""
    result = Result()
    with watching() as watch:
        for data in (*target.seeds, *kept(target.name)):
            result.executions += 1
            crash = execute(target, data, watch)
            if crash is not None and result.add(crash):
                result.crashes[crash.kind, crash.where] = shrink(target, crash, watch)
    return result


def explore(target: Target, executions: int, seed: int, *, most_crashes: int = 20) -> Result:
    """What is kept, and `executions` new inputs from `seed`; fewer once there are `most_crashes`."""
    rng = random.Random(f"{target.name}/{seed}")
    mutator, start, found = Mutator(target, rng), [*target.seeds, *kept(target.name)], list[bytes]()
    result, seen = replay(target), set[str]()
    with watching() as watch:
        until = result.executions + executions
        while result.executions < until and len(result.crashes) < most_crashes:
            pick = rng.random()
            data = mutator.next(target.seeds if pick < SEEDS_SHARE else start if pick < START_SHARE else found or start)
            result.executions += 1
            crash = execute(target, data, watch)
            if crash is not None:
                if result.add(crash):
                    result.crashes[crash.kind, crash.where] = shrink(target, crash, watch)
                continue
            result.accepted += not watch.refusal
            refusal = _DIGITS.sub("", watch.refusal)
            if refusal not in seen and len(found) < MOST_IN_CORPUS and len(data) <= LARGEST_IN_CORPUS_BYTES:
                seen.add(refusal)
                found.append(data)
    result.interesting = found
    return result


def shrink(target: Target, crash: Crash, watch: Watch) -> Crash:
    """A smaller input with the same crash: pieces are left out for as long as it stays."""
    if crash.kind in ("slow", "large"):
        return crash  # each try takes seconds, and what is slow is so by its length
    data, piece, tries = crash.data, max(1, len(crash.data) // 2), 0
    while tries < SHRINK_TRIES:
        at, shorter = 0, False
        while at < len(data) and tries < SHRINK_TRIES:
            tries += 1
            candidate = data[:at] + data[at + piece :]
            again = execute(target, candidate, watch)
            if again is not None and (again.kind, again.where) == (crash.kind, crash.where):
                data, crash, shorter = candidate, again, True
            else:
                at += piece
        if piece == 1 and not shorter:
            break
        piece = max(1, piece // 2)
    return crash
