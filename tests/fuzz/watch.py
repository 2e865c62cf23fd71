"""One execution of one target, watched: what it may raise, how long it may take, how much memory it may hold.

Owns what a crash is: an exception that the target does not declare, an oracle that does not hold, an exception that
Python could raise nowhere and printed, more than a second of CPU time, more than 64 MiB of memory. Time is CPU time of
this thread, and what seems slow or large is run again before it counts, so that a busy machine finds nothing.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

LARGEST_BYTES = 64 * 1024
SLOW_S = 1.0  # for an input of 64 KiB: what takes this long there takes minutes for a body of some megabytes
HANG_S = 4.0  # then it is stopped: whoever is in a loop without end never comes back to be measured
LARGE_BYTES = 64 * 1024 * 1024  # a thousand times the largest input


class Shape(StrEnum):
    """What inputs of a target look like: which mutations make sense."""

    JSON = "json"
    LINES = "lines"
    BINARY = "binary"


@dataclass(frozen=True, slots=True)
class Target:
    """A parser under test. `run` checks its own oracles, and raises AssertionError where one does not hold.

    `refuses`: what it may raise for an input that it does not take. `words`: what its inputs are made of, for the
    mutations. `schemas`: pydantic models whose JSON it reads, for inputs that are nearly valid.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    refuses: tuple[type[Exception], ...] = ()
    shape: Shape = Shape.JSON
    words: tuple[bytes, ...] = ()
    schemas: tuple[Any, ...] = ()
    largest: int = LARGEST_BYTES


@dataclass(frozen=True, slots=True)
class Crash:
    """`where` is the same for inputs that show the same fault."""

    target: str
    kind: str
    where: str
    story: str
    data: bytes


class _Hung(BaseException):
    """Raised by the timer, out of whatever runs. No target catches it."""


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise _Hung


@dataclass(slots=True)
class Watch:
    """What is seen of an execution beside what it raises. `refusal`: how the input was refused, "" if it was taken."""

    unraisable: str = ""
    refusal: str = ""


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Takes the timer and the hook of exceptions that Python can't raise, for as long as the block runs."""
    watch = Watch()

    def hear(unraisable: sys.UnraisableHookArgs) -> None:
        watch.unraisable = f"{unraisable.exc_type.__name__}, which nobody could catch"

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the most that was held so far is what is held now
    before, hook = signal.signal(signal.SIGVTALRM, _stop), sys.unraisablehook
    sys.unraisablehook = hear
    try:
        yield watch
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        sys.unraisablehook = hook


def execute(target: Target, data: bytes, watch: Watch, *, measured: bool = True) -> Crash | None:
    """Run `target` on `data`. `measured`: what seems slow or large is run again, and counts if it is so again."""
    watch.unraisable = watch.refusal = ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.thread_time()
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
        try:
            target.run(data)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except target.refuses as error:
        watch.refusal = f"{type(error).__name__} at {_where(error)}: {str(error)[:60]}"
    except _Hung:
        return Crash(target.name, "slow", "did not end", f"stopped after {HANG_S:g} s of CPU time", data)
    except Exception as error:
        kind = "oracle" if isinstance(error, AssertionError) else type(error).__name__
        return Crash(target.name, kind, _where(error), "".join(traceback.format_exception(error)), data)
    if watch.unraisable:
        return Crash(target.name, "unraisable", watch.unraisable, watch.unraisable, data)
    if measured:
        if time.thread_time() - began > SLOW_S:
            return _slow(target, data, watch)
        if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 > LARGE_BYTES:
            return _large(target, data, watch)
    return None


def _slow(target: Target, data: bytes, watch: Watch) -> Crash | None:
    began = time.thread_time()
    again = execute(target, data, watch, measured=False)
    seconds = time.thread_time() - began
    if again is None and seconds > SLOW_S:
        again = Crash(target.name, "slow", "too slow", f"{seconds:.1f} s of CPU time", data)
    return again


def _large(target: Target, data: bytes, watch: Watch) -> Crash | None:
    tracemalloc.start()
    try:
        execute(target, data, watch, measured=False)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return Crash(target.name, "large", "too large", f"{held >> 20} MiB at once", data) if held > LARGE_BYTES else None


def _where(error: BaseException) -> str:
    """The innermost place in the code of llorch or of the target itself. By hand: `traceback` reads the source."""
    place, step = "outside", error.__traceback__
    while step is not None:
        path = step.tb_frame.f_code.co_filename
        if "/llorch/" in path or "/fuzz/" in path:
            place = f"{path.rpartition('/')[2]}:{step.tb_lineno}"
        step = step.tb_next
    return place
