"""What an earlier agent has left: which engines still run and are ours, which have ended, which are somebody else's.

Surface:
    look(files)                 every pid file, and what the kernel confirms of it
    challenge(http, left)       the last proof: the engine knows its key, and knows a wrong one
    end(files, left, grace_s)   end an engine of ours that nobody wants
    forget(files, left)         remove the files of one that has ended, or that is none of ours
    clear_strays(files)         remove keys, handoffs and records that belong to no pid file

Owns the proofs. No process is touched that is not proved ours by pid, start time and argv, and no key is sent to a port
before the kernel has said that the engine itself listens there. Never decides which engines are wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import stat
from dataclasses import replace
from pathlib import Path

import aiohttp

from llorch.logs import Log
from llorch.node.engine_answer import BROKEN
from llorch.node.engine_keys import read_key
from llorch.node.engine_process import BACKSTOP_S, ENGINE_MARK, RuntimeDir, end_all, signal_session
from llorch.node.engine_record import Facts, Left, Named, Record, Verdict, judge, parse
from llorch.node.engines import shim_files
from llorch.node.engines.shim_linux import argv_digest, parent_of, start_time
from llorch.node.engines.spec import LOOPBACK
from llorch.node.listeners import Holder, holder, session
from llorch.node.process_hold import ProcessHold

MOST_FILES = 4_096  # of pid files that are looked at
ARGV_SETTLES_S = 1.5  # a shim writes down within a second that its engine has changed its argv
CHALLENGE_WITHIN_S = 3.0
# Every engine guards it, and a GET of it generates nothing; `/v1/models` is open to all in some versions of llama.cpp.
GUARDED = "/v1/completions"
REFUSED = (401, 403)
OUR_KEY = re.compile(r".+-[0-9a-f]{8}\.key")

log = Log("adoption")


async def look(files: RuntimeDir) -> list[Left]:
    """Every engine that a pid file speaks of. Nothing is changed."""
    left = await asyncio.to_thread(_look, files)
    if any(_unsettled(one) for one in left):
        await asyncio.sleep(ARGV_SETTLES_S)
        left = await asyncio.to_thread(_look, files)
    return left


def _unsettled(left: Left) -> bool:
    """All is as it should be but its argv, which it may just have changed."""
    record = left.record
    if left.verdict is not Verdict.STRANGER or record is None or record.engine is None or record.shim is None:
        return False
    facts = _facts(record)
    return judge(record, replace(facts, engine_digest=record.argv_digest))[0] is Verdict.OURS


def _look(files: RuntimeDir) -> list[Left]:
    found = []
    for path in sorted(files.pids.glob("*.json"))[:MOST_FILES]:
        try:
            record = parse(_read_own(path), frozenset({os.getpid(), os.getppid()}))
            if not _key_is_ours(files, record):
                raise ValueError("its key file is none of ours")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            why = (error.strerror if isinstance(error, OSError) else str(error)) or "it can't be read"
            found.append(Left(path.name, Verdict.STRANGER, why if len(why) < 100 else "it can't be read"))
            continue
        found.append(Left(path.name, *judge(record, _facts(record)), record))
    return found


def _read_own(path: Path) -> bytes:
    """A file that this user alone may have written. Raises OSError, or ValueError if it is anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.geteuid() or seen.st_mode & 0o077:
            raise ValueError("it is no private file of this user")
        raw = file.read(shim_files.MAX_RECORD_BYTES + 1)
    if len(raw) > shim_files.MAX_RECORD_BYTES:
        raise ValueError("it is too large")
    return raw


def _key_is_ours(files: RuntimeDir, record: Record) -> bool:
    key_file = Path(record.api_key_file)
    return record.engine is None or (key_file.parent == files.keys and OUR_KEY.fullmatch(key_file.name) is not None)


def _facts(record: Record) -> Facts:
    engine, shim = record.engine, record.shim
    return Facts(
        engine_started=start_time(engine.pid) if engine is not None else None,
        engine_parent=parent_of(engine.pid) if engine is not None else None,
        engine_digest=argv_digest(engine.pid) if engine is not None else None,
        shim_started=start_time(shim.pid) if shim is not None else None,
    )


# ---------------------------------------------------------------- the key


async def challenge(http: aiohttp.ClientSession, left: Left, *, keyed: bool = True) -> str | None:
    """Why an engine that runs as ours must not be adopted, or None. One that still loads is ours by its pid, and so is
    one too busy to answer. `keyed`: it asks for its key at all.
    """
    record = left.record
    assert record is not None and record.engine is not None  # look() found it
    whose = await asyncio.to_thread(holder, record.engine.pid, record.port)
    if whose is Holder.NOBODY:
        return None
    if whose is Holder.UNKNOWN:
        return None  # nobody may look; its pid, its start and its argv are what they were
    if whose is not Holder.ITS:
        return f"another program listens on its port {record.port}"
    if not keyed:
        return None
    try:
        key = await asyncio.to_thread(read_key, record.api_key_file)
    except (OSError, ValueError):
        return "its key file can't be read"
    status = await _ask(http, record.port, secrets.token_urlsafe(32))
    if status is None or status == 503:
        return None
    if status not in REFUSED:
        return f"it takes a wrong key: HTTP {status}"
    status = await _ask(http, record.port, key)
    return "it refuses its own key" if status in REFUSED else None


async def _ask(http: aiohttp.ClientSession, port: int, key: str) -> int | None:
    """The status of an answer; None if there was none in time."""
    try:
        async with (
            asyncio.timeout(CHALLENGE_WITHIN_S),
            http.get(
                f"http://{LOOPBACK}:{port}{GUARDED}",
                headers={"Authorization": f"Bearer {key}"},
                allow_redirects=False,
            ) as response,
        ):
            return response.status
    except (TimeoutError, *BROKEN, ValueError):
        return None


# ---------------------------------------------------------------- ends


async def end(files: RuntimeDir, left: Left, grace_s: float) -> bool:
    """End an engine of ours with all that it started, and remove its files. Whether it has gone."""
    record = left.record
    assert record is not None and record.engine is not None  # look() found it
    engine = ProcessHold(record.engine.pid, record.engine.start_time)
    shim = _hold(record.shim)
    log.warning("engine.unwanted", name=left.name, pid=engine.pid, why=left.why)
    try:
        if shim is not None and shim.alive():
            with contextlib.suppress(OSError):
                _set_grace(files, left.name, record, grace_s)
            shim.signal(signal.SIGTERM)
            await _within(shim, grace_s + BACKSTOP_S)
        elif engine.alive():
            signal_session(engine, signal.SIGTERM)
            await _within(engine, grace_s)
        gone = await end_all(shim or engine, engine)
    finally:
        for hold in (engine, shim):
            if hold is not None:
                hold.close()
    if gone:
        forget(files, left)
    else:
        log.error("engine.stuck", name=left.name, pid=engine.pid)
    return gone


def _hold(named: Named | None) -> ProcessHold | None:
    return None if named is None else ProcessHold(named.pid, named.start_time)


def _set_grace(files: RuntimeDir, name: str, record: Record, grace_s: float) -> None:
    path = str(files.pids / name)
    with shim_files.Locked(str(files.pids)):
        content = shim_files.read(path)
        if record.engine is not None and content.get("pid") == record.engine.pid:
            shim_files.replace(path, content | {"stop_grace_s": grace_s})


async def _within(hold: ProcessHold, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await hold.ended()


# ---------------------------------------------------------------- files


def forget(files: RuntimeDir, left: Left) -> None:
    """Remove what belongs to a pid file, and the file. A handoff goes only if it is one of ours."""
    record = left.record
    external = record is not None and record.engine is None
    if left.verdict is Verdict.GONE and record is not None and record.engine is not None:
        _end_rest(record, record.engine)
    if record is not None and record.engine is not None and _key_is_ours(files, record):
        _remove(Path(record.api_key_file))
    if external or _handoff_is_ours(files, files.engines / left.name):
        _remove(files.engines / left.name)
    _remove(files.ends / left.name)
    _remove(files.pids / left.name)


def _end_rest(record: Record, engine: Named) -> None:
    """What an engine had started, should it and its shim have been killed: it may hold memory still. Only what has its
    mark, for a session's number may be another's by now."""
    mark = f"{ENGINE_MARK}={Path(record.api_key_file).name}".encode()
    for member in session(engine.pid):
        hold = ProcessHold(member, start_time(member))
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{member}/environ").read_bytes().split(b"\0"):
                log.warning("engine.rest_ended", pid=member)
                hold.signal(signal.SIGKILL)
        hold.close()


def clear_strays(files: RuntimeDir) -> None:
    """Remove what a killed agent or shim has left that no pid file speaks of. Before anything is started."""
    kept_keys = set()
    for path in files.pids.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            kept_keys.add(parse(_read_own(path), frozenset()).api_key_file)
    for path in files.engines.glob("*.json"):
        if not os.path.lexists(files.pids / path.name) and _handoff_is_ours(files, path):
            _remove(path)
    for path in files.keys.iterdir():
        if OUR_KEY.fullmatch(path.name) and str(path) not in kept_keys:
            _remove(path)
    for path in files.ends.glob("*.json"):
        if not os.path.lexists(files.pids / path.name):
            told = shim_files.read(str(path))
            log.warning("engine.ended_alone", name=path.name, **{key: told.get(key) for key in ("why", "oom")})
            _remove(path)
    for folder in (files.pids, files.keys, files.ends):
        for path in folder.glob(".*.tmp"):
            _remove(path)


def _handoff_is_ours(files: RuntimeDir, path: Path) -> bool:
    """It names a key that we made. Others may offer engines under any name."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            content = json.loads(file.read(shim_files.MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    named = content.get("api_key_file") if isinstance(content, dict) else None
    return isinstance(named, str) and Path(named).parent == files.keys and bool(OUR_KEY.fullmatch(Path(named).name))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
