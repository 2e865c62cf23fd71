"""`python -m tests.faults.run --seeds 20 --faults 50`: runs of the harness, seed after seed, each judged.

Prints a line for each seed as it ends, then what it broke. Exit code 0: every run passed; 1: a promise was broken; 2: a
run was invalid, which shows nothing. What a failing seed left (its history and all logs) stays in its folder; the same
seed has the same schedule again.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.faults.certified import Certified, authority_of
from tests.faults.harness import Plan, run
from tests.faults.validator import judge
from tests.faults.verdict import Verdict

SHOWN = 15  # violations of a seed; its history has them all


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many runs")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--faults", type=int, default=50, help="faults of each run")
    parser.add_argument("--clients", type=int, default=24, help="tasks at a time")
    parser.add_argument("--folder", type=Path, help="where what failed is kept; a new one under the temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep what passed, too")
    parser.add_argument("--tls", action="store_true", help="with an authority: certificates and TLS on every way")
    return parser.parse_args(argv)


def one(plan: Plan, folder: Path, *, certified: bool = False) -> Verdict:
    """One run, judged. A failure of the harness itself makes it invalid."""
    try:
        if certified:
            return judge(asyncio.run(run(plan, folder, Certified, authority_of(folder))))
        return judge(asyncio.run(run(plan, folder)))
    except Exception:  # the edge of a run: the next seed goes on
        verdict = Verdict()
        verdict.invalid.append(f"the harness failed:\n{traceback.format_exc()}")
        return verdict


def told(seed: int, verdict: Verdict, seconds: float) -> str:
    kinds = " ".join(f"{kind}={count}" for kind, count in sorted(verdict.faults.items()))
    state = "passed" if verdict.passed else "INVALID" if verdict.invalid else "FAILED"
    return (
        f"seed {seed}: {state}, {sum(verdict.faults.values())} faults, {verdict.ended} of {verdict.tasks} tasks ended, "
        f"{verdict.rate:.1f}/s, {len(verdict.violations)} violations, {seconds:.0f} s\n    {kinds}\n"
        f"    engines whose agent went: {_counted(verdict.engines) or 'none'}"
    )


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))


def main(argv: list[str]) -> int:
    given = parsed(argv)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="llorch-faults-"))
    print(f"seeds {given.first} to {given.first + given.seeds - 1}, {given.faults} faults each; {folder}", flush=True)
    verdicts: dict[int, Verdict] = {}
    began = time.monotonic()
    for seed in range(given.first, given.first + given.seeds):
        started = time.monotonic()
        place = folder / f"seed-{seed}"
        verdict = verdicts[seed] = one(Plan(seed, given.faults, given.clients), place, certified=given.tls)
        print(told(seed, verdict, time.monotonic() - started), flush=True)
        for reason in verdict.invalid:
            print(f"    invalid: {reason}", flush=True)
        for violation in verdict.violations[:SHOWN]:
            print(f"    {violation}", flush=True)
        if verdict.passed and not given.keep:
            shutil.rmtree(place, ignore_errors=True)
    return summed(verdicts, time.monotonic() - began, folder)


def summed(verdicts: dict[int, Verdict], seconds: float, folder: Path) -> int:
    faults, outcomes, engines = Counter[str](), Counter[str](), Counter[str]()
    for verdict in verdicts.values():
        faults += verdict.faults
        outcomes += verdict.outcomes
        engines += verdict.engines
    failed = [seed for seed, verdict in verdicts.items() if verdict.violations]
    invalid = [seed for seed, verdict in verdicts.items() if verdict.invalid]
    print(f"\n{len(verdicts)} seeds, {sum(faults.values())} faults, {sum(outcomes.values())} tasks, {seconds:.0f} s")
    print(f"faults: {_counted(faults)}\nengines whose agent went: {_counted(engines)}")
    print("tasks: " + ", ".join(f"{what} {count}" for what, count in outcomes.most_common()))
    print(f"violations: {sum(len(verdict.violations) for verdict in verdicts.values())}")
    if failed or invalid:
        print(f"failed: {failed}, invalid: {invalid}; what they left is in {folder}")
    return 1 if failed else 2 if invalid else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
