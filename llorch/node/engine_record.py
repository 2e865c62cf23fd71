"""An engine's pid file: what it says, and what it proves about the processes that are there now.

Owns the fields that the shim writes and the judgement. A pid file is believed in nothing that the kernel does not
confirm: pids come again, and files may be torn, old or somebody's trap. Pure: the file's bytes and what the kernel says
come in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MAX_PID = 2**22  # of Linux
MAX_PORT = 65_535


class Verdict(StrEnum):
    """What an engine is that an earlier agent has left."""

    OURS = "ours"  # it runs, and so does its shim: it can be adopted
    UNTENDED = "untended"  # it is ours and runs without a shim: it can only be ended
    GONE = "gone"  # it has ended
    STRANGER = "stranger"  # its pid is another process's, or the file is none of ours: nobody is touched


@dataclass(frozen=True, slots=True)
class Named:
    """A process, named for good by its pid and its start time in clock ticks since boot."""

    pid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class Record:
    """`engine` is None for the handoff of an engine that somebody else runs."""

    engine: Named | None
    shim: Named | None = None
    agent: Named | None = None
    argv_digest: str = ""
    port: int = 0
    api_key_file: str = ""
    meta: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the kernel says now of the pids in a record. None: there is no such process."""

    engine_started: int | None = None
    engine_parent: int | None = None
    engine_digest: str | None = None
    shim_started: int | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """An engine that an earlier agent has left. `name` is that of its files, `why` is for people."""

    name: str
    verdict: Verdict
    why: str = ""
    record: Record | None = None

    @property
    def pid(self) -> int | None:
        return self.record.engine.pid if self.record is not None and self.record.engine is not None else None

    @property
    def port(self) -> int:
        return self.record.port if self.record is not None else 0

    @property
    def meta(self) -> Mapping[str, object]:
        return self.record.meta if self.record is not None else {}


def parse(raw: bytes, protected: frozenset[int]) -> Record:
    """A record from the bytes of a pid file. Raises ValueError; also if it names one of the `protected` pids."""
    try:
        wire = json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(wire, dict):
        raise ValueError("it is no JSON object")
    if "pid" in wire and wire["pid"] is None:
        return Record(None)
    engine = _named(wire, protected)
    if engine is None:
        raise ValueError("it names no process")
    port, key_file, meta = wire.get("port"), wire.get("api_key_file"), wire.get("meta", {})
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port <= MAX_PORT:
        raise ValueError("its port is none")
    if not isinstance(key_file, str) or not isinstance(meta, dict):
        raise ValueError("its fields are not those of a pid file")
    return Record(
        engine,
        _named(wire.get("shim"), protected),
        _named(wire.get("agent"), frozenset()),
        str(wire.get("argv_digest")),
        port,
        key_file,
        meta,
    )


def _named(value: object, protected: frozenset[int]) -> Named | None:
    if not isinstance(value, dict):
        return None
    pid, started = value.get("pid"), value.get("start_time")
    if not isinstance(pid, int) or not isinstance(started, int) or isinstance(pid, bool) or isinstance(started, bool):
        return None
    if not 1 < pid <= MAX_PID or started < 0 or pid in protected:
        return None
    return Named(pid, started)


def judge(record: Record, facts: Facts) -> tuple[Verdict, str]:
    """What the engine of a record is, and why."""
    engine, shim = record.engine, record.shim
    if engine is None:
        return Verdict.GONE, "the handoff of an engine that somebody else runs"
    if facts.engine_started is None:
        return Verdict.GONE, "it has ended"
    if facts.engine_started != engine.start_time:
        return Verdict.STRANGER, "its pid is another process's now"
    if facts.engine_digest != record.argv_digest:
        return Verdict.STRANGER, "the process with its pid runs something else"
    if shim is None or facts.shim_started != shim.start_time:
        return Verdict.UNTENDED, "its shim has ended"
    if facts.engine_parent != shim.pid:
        return Verdict.STRANGER, "it is no child of the shim that its pid file names"
    return Verdict.OURS, "it runs"
