"""`python -m tests.faults.planted [NAME...]`: plants one bug at a time in a copy of the code, and sees it caught.

A bug is caught when the validator reports one of the rules that it breaks, in a run of its plan, with a few seeds to
try. Without the bugs each plan has to pass: those runs come first (`--only-bugs` leaves them out). Prints a table; exit
code 1 if a bug was not caught, or a plan did not pass. `--list` names the bugs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import llorch
from tests.faults.bugs import BUGS, Bug
from tests.faults.plans import PLANS

ROOT = Path(llorch.__file__).parent.parent
RUN_WITHIN_S = 240.0
SEEDS = 5  # a bug may need a moment that a run does not have


@dataclass(frozen=True, slots=True)
class Outcome:
    rules: Counter[str]
    invalid: list[str]
    first: str  # the first violation


def plant(bug: Bug, root: Path) -> None:
    """Change the code below `root`. Raises ValueError where a change does not fit."""
    for change in bug.changes:
        path = root / "llorch" / change.file
        text = path.read_text()
        if text.count(change.old) != 1:
            raise ValueError(f"{bug.name}: its text is {text.count(change.old)} times in {change.file}")
        path.write_text(text.replace(change.old, change.new))


def run(plan: str, seed: int, root: Path, folder: Path) -> Outcome:
    """A run of the code below `root`, in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(root)}
    argv = [sys.executable, "-m", "tests.faults.planted", "--one", plan, "--seed", str(seed), "--folder", str(folder)]
    try:
        done = subprocess.run(
            argv, cwd=root, env=env, capture_output=True, text=True, timeout=RUN_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(Counter(), [f"not over within {RUN_WITHIN_S:g} s"], "")
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return Outcome(Counter(), [f"it ended with {done.returncode}: {done.stderr[-2_000:]}"], "")
    return Outcome(Counter(told["rules"]), told["invalid"], told["first"])


def one(plan: str, seed: int, folder: Path) -> None:
    """In the copy: a run, and its verdict on stdout."""
    from tests.faults.run import one as judged

    verdict = judged(replace(PLANS[plan], seed=seed), folder)
    rules = Counter(violation.rule for violation in verdict.violations)
    first = str(verdict.violations[0]) if verdict.violations else ""
    print(json.dumps({"rules": rules, "invalid": verdict.invalid, "first": first}))


def copied(root: Path) -> Path:
    for name in ("llorch", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def check(bug: Bug, folder: Path) -> tuple[bool, str]:
    """Whether `bug` is caught, and how that reads."""
    with tempfile.TemporaryDirectory(prefix="llorch-planted-") as place:
        root = copied(Path(place))
        plant(bug, root)
        seen: Counter[str] = Counter()
        for seed in range(1, SEEDS + 1):
            outcome = run(bug.plan, seed, root, folder / f"{bug.name.replace(' ', '-')}-{seed}")
            seen += outcome.rules
            if bug.rules & set(outcome.rules):
                rules = ", ".join(f"{rule} {count}" for rule, count in outcome.rules.most_common())
                return True, f"seed {seed}: {rules}"
            if outcome.invalid:
                seen[f"invalid: {outcome.invalid[0]}"] += 1
        return False, f"not caught; {dict(seen)}"


def whole(plan: str, folder: Path) -> tuple[bool, str]:
    """Whether a plan passes with nothing planted."""
    with tempfile.TemporaryDirectory(prefix="llorch-planted-") as place:
        outcome = run(plan, 1, copied(Path(place)), folder / f"plan-{plan}")
        if outcome.rules or outcome.invalid:
            return False, f"{dict(outcome.rules)} {outcome.first} {outcome.invalid}"
        return True, "passes with nothing planted"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.planted", description=__doc__)
    parser.add_argument("names", nargs="*", help="of bugs; all of them")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only-bugs", action="store_true", help="don't run the plans with nothing planted")
    parser.add_argument("--folder", type=Path, help="where histories and logs are left")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.one:
        one(given.one, given.seed, given.folder)
        return 0
    if given.list:
        print("\n".join(f"{bug.name}  ({bug.plan})" for bug in BUGS))
        return 0
    unknown = set(given.names) - {bug.name for bug in BUGS}
    if unknown:
        parser.error(f"no such bug: {', '.join(sorted(unknown))}")
    chosen = [bug for bug in BUGS if not given.names or bug.name in given.names]
    folder = given.folder or Path(tempfile.mkdtemp(prefix="llorch-planted-runs-"))
    print(f"{len(chosen)} bugs; histories and logs in {folder}", flush=True)
    failed: list[str] = []
    plans = [] if given.only_bugs else sorted({bug.plan for bug in chosen})
    work = [(f"plan {plan}", lambda plan=plan: whole(plan, folder)) for plan in plans]
    work += [(bug.name, lambda bug=bug: check(bug, folder)) for bug in chosen]
    for name, judged in work:
        started = time.monotonic()
        good, how = judged()
        print(f"{'ok    ' if good else 'FAILED'} {name:55} {time.monotonic() - started:4.0f} s  {how}", flush=True)
        if not good:
            failed.append(name)
    print(f"\n{len(work) - len(failed)} of {len(work)} as it should be" + (f"; failed: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
