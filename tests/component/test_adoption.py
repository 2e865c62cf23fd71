"""What a killed agent leaves: its engines go on and are the next one's; nobody else's process is touched."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from llorch import demo
from llorch.errors import LlorchError
from llorch.node import adoption
from llorch.node.adoption import challenge, clear_strays, end, forget, look
from llorch.node.engine_process import EngineProcess, RuntimeDir
from llorch.node.engine_record import Left, Verdict
from llorch.node.engines.shim_linux import argv_digest, start_time
from llorch.node.listeners import Holder
from llorch.web import client_session
from tests.cluster import alive, eventually
from tests.component.engine_harness import (
    FAMILY,
    IDS,
    NAME,
    ended_after,
    engine_process,
    left,
    living,
    python,
    record,
    runtime,
    said,
    sh,
    simulated,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="without /proc nothing is proved, and nothing adopted")

# Stands for an agent: starts an engine, says that it listens, lasts.
AGENT = """
import asyncio, os, sys
from pathlib import Path
from tests.component import engine_harness as harness
from llorch.node.engines.spec import Launch

async def main():
    engine = harness.engine_process(harness.runtime(Path(sys.argv[1])), orphan_grace_s=float(sys.argv[2]))
    flags = [word.format(port=engine.port, key=engine.key_file) for word in sys.argv[3:]]
    launch = Launch(tuple(flags)) if flags else harness.simulated(engine)
    await engine.start(launch, os.environ, meta={"model": "m", "slots": 4})
    (engine._files.engines / harness.NAME).write_text('{"api_key_file": "%s"}' % engine.key_file)
    while not flags and await engine.port_holder() != "its":
        await asyncio.sleep(0.01)
    print("started", flush=True)
    await engine.wait()

asyncio.run(main())
"""


@contextmanager
def killed_agent(root: Path, *argv: str, grace_s: float = 300.0) -> Iterator[RuntimeDir]:
    """An engine runs that was a killed agent's. It ends with the test, at the latest."""
    files = runtime(root)
    agent = subprocess.Popen([sys.executable, "-c", AGENT, str(root), str(grace_s), *argv], stdout=subprocess.PIPE)
    assert agent.stdout is not None
    with agent.stdout as stdout:
        assert stdout.readline() == b"started\n"
    agent.kill()
    agent.wait()
    content = record(files)
    with ended_after(content["pid"], content["shim"]["pid"]):
        yield files


def adopt(files: RuntimeDir, one: Left, **settings: Any) -> EngineProcess:
    return EngineProcess.adopt(files, one, **{"stop_grace_s": 5.0, "orphan_grace_s": 300.0, "ids": IDS} | settings)


async def asked(one: Left) -> str | None:
    async with client_session() as http:
        return await challenge(http, one)


async def test_an_engine_outlives_its_killed_agent_and_is_the_next_ones_as_if_it_had_started_it(tmp_path: Path) -> None:
    with killed_agent(tmp_path) as files:
        before = record(files)
        [one] = await look(files)
        assert (one.name, one.verdict, one.pid, one.port) == (NAME, Verdict.OURS, before["pid"], before["port"])
        assert one.meta == {"model": "m", "slots": 4}
        assert await asked(one) is None
        engine = adopt(files, one, stop_grace_s=1.0)
        assert (engine.pid, engine.port, str(engine.key_file)) == (
            before["pid"],
            before["port"],
            before["api_key_file"],
        )
        after = record(files)
        assert after["agent"] == {"pid": os.getpid(), "start_time": start_time(os.getpid())}
        assert after == before | {"agent": after["agent"], "stop_grace_s": 1.0}
        assert await engine.port_holder() is Holder.ITS
        waiting = asyncio.ensure_future(engine.wait())
        engine.terminate()
        ended = await asyncio.wait_for(waiting, 10.0)
        assert (ended.how, ended.oom) == ("exited with code 0", False) and "listening on" in ended.said
        assert not alive(before["pid"])
        engine.remove_files()
        await eventually(lambda: not alive(before["shim"]["pid"]))
        assert left(files) == [f"engines/{NAME}"] or left(files) == []


async def test_the_end_of_an_adopted_engine_is_seen_and_told_as_that_of_ones_own(tmp_path: Path) -> None:
    with killed_agent(tmp_path) as files:
        [one] = await look(files)
        engine = adopt(files, one)
        waiting = asyncio.ensure_future(engine.wait())
        assert one.pid is not None
        os.kill(one.pid, signal.SIGKILL)
        assert (await asyncio.wait_for(waiting, 10.0)).how == "killed by SIGKILL"
        engine.remove_files()
        assert left(files) == []


async def test_an_adopted_engine_stays_beyond_the_grace_and_a_released_one_does_not(tmp_path: Path) -> None:
    with killed_agent(tmp_path, sys.executable, "-c", FAMILY, grace_s=1.0) as files:
        pids = [int(pid) for pid in await eventually(lambda: said(files, "pids"))]
        [one] = await look(files)
        engine = adopt(files, one, orphan_grace_s=1.0, stop_grace_s=0.3)
        waiting = asyncio.ensure_future(engine.wait())
        done, _ = await asyncio.wait((waiting,), timeout=2.2)  # beyond the grace: nothing happens, which takes its time
        assert not done and living(pids) == pids
        engine.release()
        await waiting
        await eventually(lambda: not living(pids), what="nobody has come for it")
        await eventually(lambda: left(files) == [f"ends/{NAME}"], what="its files")


async def test_one_that_is_released_is_adopted_again(tmp_path: Path) -> None:
    with killed_agent(tmp_path) as files:
        for _ in range(3):
            [one] = await look(files)
            assert one.verdict is Verdict.OURS and await asked(one) is None
            engine = adopt(files, one)
            engine.release()
            assert record(files)["agent"] is None and (await engine.wait()).how.startswith("it was left running")
        [one] = await look(files)
        assert await end(files, one, 5.0)


async def test_one_that_has_just_ended_is_not_adopted(tmp_path: Path) -> None:
    with killed_agent(tmp_path) as files:
        [one] = await look(files)
        assert one.pid is not None
        os.kill(one.pid, signal.SIGKILL)
        await eventually(lambda: one.record and one.record.shim and not alive(one.record.shim.pid))
        with pytest.raises(LlorchError, match="just ended"):
            adopt(files, one)
        assert await look(files) == []
        clear_strays(files)
        assert left(files) == []


async def test_an_engine_that_nobody_wants_is_ended_with_all_it_has(tmp_path: Path) -> None:
    with killed_agent(tmp_path, sys.executable, "-c", FAMILY) as files:
        pids = [int(pid) for pid in await eventually(lambda: said(files, "pids"))]
        [one] = await look(files)
        assert await end(files, one, 0.3)
        assert living(pids) == [] and left(files) == []


async def test_an_engine_without_its_shim_is_ended_too(tmp_path: Path) -> None:
    """It can't come about but by an engine that takes the signal of its shim's death away."""
    deaf = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nprint('deaf now', flush=True)\ntime.sleep(600)"
    with killed_agent(tmp_path, sys.executable, "-c", deaf) as files:
        await eventually(lambda: said(files, "deaf"))
        os.kill(record(files)["shim"]["pid"], signal.SIGKILL)
        await eventually(lambda: not alive(record(files)["shim"]["pid"]))
        [one] = await look(files)
        assert one.verdict is Verdict.UNTENDED and one.pid is not None and alive(one.pid)
        assert await end(files, one, 5.0)
        assert not alive(one.pid) and left(files) == []


async def test_an_engine_that_names_itself_is_known_by_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before its shim has written that down."""
    look_once, looked = adoption._look, Event()

    def watched(files: RuntimeDir) -> list[Left]:
        found = look_once(files)
        looked.set()
        return found

    monkeypatch.setattr(adoption, "_look", watched)
    files = runtime(tmp_path)
    engine = engine_process(files)
    await engine.start(python("import time; time.sleep(600)"), os.environ)
    right = record(files)
    (files.pids / NAME).write_text(json.dumps(right | {"argv_digest": "0" * 64}))
    async with asyncio.timeout(10.0):
        looking = asyncio.ensure_future(look(files))
        await eventually(looked.is_set)
        (files.pids / NAME).write_text(json.dumps(right))
        assert [one.verdict for one in await looking] == [Verdict.OURS]
    engine.terminate()
    await engine.wait()


# ---------------------------------------------------------------- strangers


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with us."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        assert process.poll() is None, "a stranger was ended"
        process.kill()


def forged(files: RuntimeDir, pid: Any, name: str = NAME, **changes: Any) -> Path:
    key = files.keys / f"p-r0-{'0' * 8}.key"
    key.write_text("key")
    started = start_time(pid) if isinstance(pid, int) and 0 < pid < 2**31 else 1
    content = {
        "pid": pid, "start_time": started, "port": 1, "api_key_file": str(key), "log": "", "agent": None,
        "argv_digest": argv_digest(pid) if started != 1 else "", "shim": {"pid": pid, "start_time": started},
    }  # fmt: skip
    path = files.pids / name
    path.write_text(json.dumps(content | changes))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "changes",
    [{"start_time": 12345}, {"argv_digest": hashlib.sha256(b"other").hexdigest()}, {}],
    ids=["recycled pid", "other program", "no child of its shim"],
)
async def test_a_process_that_only_has_the_pid_is_never_touched(
    tmp_path: Path, stranger: subprocess.Popen[bytes], changes: dict[str, Any]
) -> None:
    files = runtime(tmp_path)
    forged(files, stranger.pid, **changes)
    [one] = await look(files)
    assert one.verdict is Verdict.STRANGER
    forget(files, one)
    clear_strays(files)
    assert left(files) == []


@pytest.mark.parametrize("pid", [1, 0, -1, -2, True, "7", 2**31, 2**70, 1.5, [1], {"pid": 2}, "own", "parent"])
async def test_a_hostile_pid_hurts_nobody(tmp_path: Path, pid: Any) -> None:
    files = runtime(tmp_path)
    pid = {"own": os.getpid(), "parent": os.getppid()}.get(pid, pid) if isinstance(pid, str) else pid
    forged(files, pid)
    [one] = await look(files)
    assert one.verdict is Verdict.STRANGER
    forget(files, one)
    assert left(files) == [f"keys/p-r0-{'0' * 8}.key"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"pid": ' + b"9" * 70_000, b"{}" + b" " * 70_000, b"{}"],
)
async def test_a_pid_file_that_is_none_is_no_engine(tmp_path: Path, raw: bytes) -> None:
    files = runtime(tmp_path)
    (files.pids / NAME).write_bytes(raw)
    (files.pids / NAME).chmod(0o600)
    [one] = await look(files)
    assert (one.verdict, one.pid, one.port, one.meta) == (Verdict.STRANGER, None, 0, {})
    forget(files, one)
    assert left(files) == []


@pytest.mark.parametrize("what", ["link", "pipe", "directory", "open to others", "another's"])
async def test_a_pid_file_that_others_may_have_written_is_not_believed(tmp_path: Path, what: str) -> None:
    files = runtime(tmp_path)
    engine = engine_process(files, orphan_grace_s=60.0)  # for a shim, too, that file is nobody's
    await engine.start(python("import time; time.sleep(600)"), os.environ)
    try:
        path, elsewhere = files.pids / NAME, tmp_path / "elsewhere.json"
        raw = path.read_bytes()
        if what == "open to others":
            path.chmod(0o644)
        elif what == "another's":
            if os.geteuid() != 0:
                pytest.skip("only root can give files away")
            os.chown(path, 12345, 12345)
        else:
            path.unlink()
            elsewhere.write_bytes(raw)
            elsewhere.chmod(0o600)
            make = {"link": lambda: path.symlink_to(elsewhere), "pipe": lambda: os.mkfifo(path, 0o600)}
            make.get(what, path.mkdir)()
        [one] = await look(files)
        assert one.verdict is Verdict.STRANGER
        forget(files, one)
        assert engine.pid is not None and alive(engine.pid)
        assert what != "link" or elsewhere.exists()
    finally:
        engine.terminate()
        await engine.wait()


async def test_a_key_file_elsewhere_is_neither_read_nor_removed(tmp_path: Path) -> None:
    with killed_agent(tmp_path) as files:
        precious = tmp_path / "precious"
        precious.write_text("mine")
        for path in (precious, files.keys / ".." / "precious", files.pids / NAME, "", "/etc/passwd"):
            (files.pids / NAME).write_text(json.dumps(right := record(files) | {"api_key_file": str(path)}))
            [one] = await look(files)
            assert (one.verdict, one.why, one.record) == (Verdict.STRANGER, "its key file is none of ours", None)
        forget(files, one)
        assert precious.exists() and Path("/etc/passwd").exists() and right


# ---------------------------------------------------------------- the key

# Stand for engines that do not keep their door, and for one that is not done yet.
DOOR = """
import http.server, sys
class Door(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = eval(sys.argv[3])(self.headers.get("Authorization") == "Bearer " + open(sys.argv[2]).read().strip())
        self.send_response(status)
        self.end_headers()
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Door).serve_forever()
"""


@asynccontextmanager
async def door(root: Path, rule: str) -> AsyncIterator[Left]:
    files = runtime(root)
    engine = engine_process(files, stop_grace_s=0.3)
    await engine.start(python(DOOR, str(engine.port), str(engine.key_file), rule), os.environ)
    try:
        await eventually(engine_listens(engine), what="it listens")
        [one] = await look(files)
        assert one.verdict is Verdict.OURS
        yield one
    finally:
        engine.terminate()
        await engine.wait()


def engine_listens(engine: EngineProcess) -> Any:
    async def look() -> bool:
        return await engine.port_holder() is Holder.ITS

    return look


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("lambda right: 200 if right else 401", None),
        ("lambda right: 404 if right else 403", None),
        ("lambda right: 503", None),
        ("lambda right: 503 if right else 401", None),
        ("lambda right: 200", "it takes a wrong key: HTTP 200"),
        ("lambda right: 404", "it takes a wrong key: HTTP 404"),
        ("lambda right: 401", "it refuses its own key"),
    ],
)
async def test_an_engine_knows_its_key_and_a_wrong_one(tmp_path: Path, rule: str, why: str | None) -> None:
    async with door(tmp_path, rule) as one:
        assert await asked(one) == why


async def test_an_engine_that_does_not_listen_yet_is_ours_by_its_pid(tmp_path: Path) -> None:
    with killed_agent(tmp_path, "sleep", "600") as files:
        [one] = await look(files)
        assert one.verdict is Verdict.OURS and await asked(one) is None


async def test_no_key_is_sent_to_a_port_that_another_program_has(tmp_path: Path) -> None:
    with killed_agent(tmp_path, "sleep", "600") as files:
        [one] = await look(files)
        with socket.create_server(("127.0.0.1", one.port)) as other:
            other.setblocking(False)
            assert await asked(one) == f"another program listens on its port {one.port}"
            with pytest.raises(BlockingIOError):
                other.accept()
        assert await end(files, one, 5.0), "it is ours all the same, and goes"


async def test_an_engine_that_does_not_answer_is_ours_by_its_pid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llorch.node.adoption.CHALLENGE_WITHIN_S", 0.3)
    async with door(tmp_path, "lambda right: 401") as one:
        assert one.pid is not None
        os.kill(one.pid, signal.SIGSTOP)
        assert await asked(one) is None


@pytest.mark.llama
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
async def test_real_llama_cpp_is_adopted_with_its_model_loaded(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "llorch.node.engines.llamacpp_server", "--host", "127.0.0.1", "--port", "{port}"]
    program += ["--api-key-file", "{key}", "--alias", "m", "--parallel", "1", "--ctx-size", "256"]
    with killed_agent(tmp_path, *program, "--model", demo.model_path()) as files:
        await eventually(lambda: said(files, "llamacpp_server:"), what="it listens")
        [one] = await look(files)
        assert one.verdict is Verdict.OURS and await asked(one) is None
        key = files.keys / next(iter(files.keys.iterdir())).name
        key.write_text("another\n")
        assert await asked(one) == "it refuses its own key"
        assert await end(files, one, 5.0)


# ---------------------------------------------------------------- what belongs to nobody


async def test_handoffs_of_external_engines_are_withdrawn_and_what_others_offer_stays(tmp_path: Path) -> None:
    files = runtime(tmp_path)
    external = files.pids / "ext-r0.json"
    external.write_text('{"pid": null}\n')
    external.chmod(0o600)
    for name in ("ext-r0.json", "others-r0.json"):
        (files.engines / name).write_text('{"pool_id": "x"}')
    key = files.keys / f"p-r0-{'a' * 8}.key"
    key.write_text("key")
    (files.engines / "stale-r0.json").write_text(json.dumps({"api_key_file": str(key)}))
    (files.keys / "a person's.key").write_text("key")
    (files.pids / ".0123.tmp").write_text("torn")
    (files.ends / "old-r0.json").write_text("{}")
    [one] = await look(files)
    assert (one.verdict, one.pid) == (Verdict.GONE, None)
    forget(files, one)
    clear_strays(files)
    assert left(files) == ["engines/others-r0.json", "keys/a person's.key"]


async def test_the_files_of_an_engine_that_runs_are_no_strays(tmp_path: Path) -> None:
    with killed_agent(tmp_path) as files:
        before = left(files)
        clear_strays(files)
        assert left(files) == before and len(before) == 3


def test_the_simulated_engine_of_the_harness_takes_its_key_from_a_file(tmp_path: Path) -> None:
    engine = engine_process(runtime(tmp_path))
    assert engine.key_file.read_text().strip() not in " ".join(simulated(engine).argv)


async def test_what_an_engine_had_started_ends_with_it_though_its_shim_was_killed_too(tmp_path: Path) -> None:
    """Nobody was left to end it: it may hold memory still. What has not the engine's mark is not touched."""
    files = runtime(tmp_path)
    engine = engine_process(files, orphan_grace_s=60.0)
    await engine.start(sh("sleep 600 & echo child $!; env -i sleep 600 & echo other $!; sleep 600"), {})
    try:
        child, other = [int((await eventually(lambda word=word: said(files, word)))[0]) for word in ("child", "other")]
        pids = record(files)
        os.kill(pids["shim"]["pid"], signal.SIGKILL)
        await eventually(lambda: not alive(pids["pid"]))
        assert alive(child) and alive(other)
        [one] = await look(files)
        assert one.verdict is Verdict.GONE
        forget(files, one)
        await eventually(lambda: not alive(child))
        assert alive(other)
    finally:
        for pid in (child, other):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        engine.terminate()
        await engine.wait()
