"""`python -m tests.faults.proofs NAME`: one proof at full size. Its figures on standard output; exit 1 if it fails.

Without a name: which there are. `--small` runs the size that the default tests run, `--keep` leaves the logs.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

PROOFS = {
    "node_killed": "a node is killed under load: what had shown nothing runs elsewhere at once, the rest is told",
    "control_killed": "hundreds of streams outlive their control, three times",
    "stalled": "a thousand stalled readers cost a window each and hold up nobody",
    "leaving": "a client that leaves frees its engine slot",
    "rotation": "tokens and authorities are rotated under load, and no request fails",
    "fair": "one principal sends 50 times what another does, which waits at most twice as long as alone",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.proofs")
    parser.add_argument(
        "name", choices=[*PROOFS, "all"], nargs="?", help="; ".join(f"{n}: {w}" for n, w in PROOFS.items())
    )
    parser.add_argument("--small", action="store_true", help="the size of the default tests")
    parser.add_argument("--keep", action="store_true", help="leave the processes' logs where they are")
    given = parser.parse_args(argv)
    if given.name is None:
        parser.print_help()
        return 2
    failed = 0
    for name in PROOFS if given.name == "all" else (given.name,):
        module = importlib.import_module(f"tests.faults.proof_{name}")
        folder = Path(tempfile.mkdtemp(prefix=f"llorch-proof-{name}-"))
        began = time.monotonic()
        verdict = asyncio.run(module.prove(folder, module.SMALL if given.small else module.FULL))
        print(f"{verdict.text()}\n     took {time.monotonic() - began:.0f} s", flush=True)
        failed += not verdict.holds
        if given.keep:
            print(f"     logs: {folder}", flush=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
