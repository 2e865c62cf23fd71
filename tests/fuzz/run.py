"""`python -m tests.fuzz.run --executions 1000000`: every parser of `parsers.py` on mutated inputs, a million of them.

Coverage decides what is worth more mutations where atheris is installed (`pip install atheris`), else the outcome of
each input does, and a seed gives the same run again. Prints a line for each target. Exit code 1: something crashed; its
input is in the folder that is printed, and `--replay FILE --target NAME` runs it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz import corpus
from tests.fuzz.engine import Result, explore
from tests.fuzz.parsers import targets
from tests.fuzz.watch import Crash, Target, execute, watching

LEAST_EACH = 20_000
ROOT = Path(__file__).parent.parent.parent
GUIDED_WITHIN_S = 3_600


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--executions", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--target", action="append", default=[], help="this one only; may be given again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="without atheris, though it is installed")
    parser.add_argument("--keep", action="store_true", help="add what reached new code to tests/fuzz/corpus")
    parser.add_argument("--folder", type=Path, help="where crashes are kept; a new one under the temporary folder")
    parser.add_argument("--replay", type=Path, help="run this one input, and show what becomes of it")
    return parser.parse_args(argv)


def chosen(names: list[str]) -> list[Target]:
    known = {target.name: target for target in targets()}
    for name in names:
        if name not in known:
            sys.exit(f"no target {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def guided(target: Target, executions: int, seed: int, folder: Path) -> Result:
    """The target under atheris, in a process of its own."""
    place = folder / f"guided-{target.name}"
    argv = [sys.executable, "-m", "tests.fuzz.guided", target.name, str(executions), str(seed), str(place)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    ended = subprocess.run(
        argv, capture_output=True, text=True, timeout=GUIDED_WITHIN_S, check=False, cwd=folder, env=env
    )
    try:
        told = json.loads((place / "result.json").read_text())
    except FileNotFoundError:
        story = f"exit code {ended.returncode}\n{ended.stderr[-4_000:]}"
        result = Result()
        result.add(Crash(target.name, "died", "the process", story, b""))
        return result
    result = Result(told["executions"], told["accepted"])
    for wire in told["crashes"]:
        result.add(Crash(**{**wire, "data": bytes.fromhex(wire["data"])}))
    result.interesting = [path.read_bytes() for path in (place / "corpus").iterdir() if path.name[:4] != "kept"]
    shutil.rmtree(place)
    return result


def told(result: Result, folder: Path) -> None:
    for number, crash in enumerate(result.crashes.values()):
        path = folder / f"{crash.target}-{number}"
        path.write_bytes(crash.data)
        print(f"    {crash.kind} at {crash.where}: {path}\n      {crash.story.strip().splitlines()[-1]}", flush=True)


def replayed(target: Target, path: Path) -> int:
    with watching() as watch:
        crash = execute(target, path.read_bytes(), watch)
    print(crash.story if crash is not None else watch.refusal or "accepted")
    return 1 if crash is not None else 0


def main(argv: list[str]) -> int:
    given, logged = parsed(argv), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        return run(given)
    finally:
        logging.disable(logged)


def run(given: argparse.Namespace) -> int:
    wanted = chosen(given.target)
    if given.replay is not None:
        return replayed(wanted[0], given.replay)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="llorch-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    steered = not given.plain and importlib.util.find_spec("atheris") is not None
    each = max(-(-given.executions // len(wanted)), min(LEAST_EACH, given.executions))
    how = "atheris" if steered else "mutations"
    print(f"{len(wanted)} targets, {each} executions each, seed {given.seed}, {how}; {folder}", flush=True)
    executions, crashes, began = 0, 0, time.monotonic()
    for target in wanted:
        started = time.monotonic()
        result = guided(target, each, given.seed, folder) if steered else explore(target, each, given.seed)
        seconds = time.monotonic() - started
        print(
            f"{target.name}: {result.executions} executions, {result.accepted} accepted, "
            f"{len(result.crashes)} crashes, {result.executions / seconds:.0f}/s",
            flush=True,
        )
        told(result, folder)
        if given.keep:
            print(f"    {corpus.keep(target.name, result.interesting)} inputs more are kept")
        executions, crashes = executions + result.executions, crashes + len(result.crashes)
    print(f"\n{executions} executions, {crashes} crashes, {time.monotonic() - began:.0f} s")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
