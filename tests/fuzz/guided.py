"""One target under atheris, in a process of its own: libFuzzer keeps what reaches new code, we make the inputs.

A program, for libFuzzer never comes back: `python -m tests.fuzz.guided NAME EXECUTIONS SEED FOLDER` leaves
`FOLDER/result.json`, and what it found interesting under `FOLDER/corpus`. A crash is written down, and it goes on.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from pathlib import Path


def main(name: str, executions: int, seed: int, folder: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["llorch"]):
        from tests.fuzz.parsers import targets, tidy
    from tests.fuzz.corpus import kept
    from tests.fuzz.engine import Result, shrink
    from tests.fuzz.mutate import Mutator
    from tests.fuzz.watch import execute, watching

    logging.disable(logging.CRITICAL)
    target = next(target for target in targets() if target.name == name)
    corpus, start = folder / "corpus", [*target.seeds, *kept(name)]
    corpus.mkdir(parents=True)
    for at, data in enumerate(start):
        (corpus / f"kept-{at}").write_bytes(data)
    mutator, result = Mutator(target, random.Random(f"{name}/{seed}")), Result()

    def change(data: bytes, largest: int, number: int) -> bytes:
        if number % 4 == 0:
            return bytes(atheris.Mutate(data, len(data) + 64))[:largest]
        return mutator.next((data, start[number % len(start)]))[:largest]

    with watching() as watch:

        def once(data: bytes) -> None:
            result.executions += 1
            crash = execute(target, data, watch)
            if crash is not None and result.add(crash):
                result.crashes[crash.kind, crash.where] = shrink(target, crash, watch)
            result.accepted += crash is None and not watch.refusal
            if result.executions >= executions:
                tidy()
                _leave(result.executions, result.accepted, list(result.crashes.values()), folder)

        options = [f"-seed={seed}", f"-max_len={target.largest}", "-rss_limit_mb=0", "-timeout=600", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], once, custom_mutator=change)
        atheris.Fuzz()


def _leave(executions: int, accepted: int, crashes: list[object], folder: Path) -> None:
    wire = [
        {field: getattr(crash, field) for field in ("target", "kind", "where", "story")} | {"data": crash.data.hex()}  # type: ignore[attr-defined]
        for crash in crashes
    ]
    (folder / "result.json").write_text(json.dumps({"executions": executions, "accepted": accepted, "crashes": wire}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
