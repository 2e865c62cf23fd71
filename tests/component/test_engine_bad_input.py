"""What a node is given that it can't use: directories, disks, ports, programs, models, and files of its own that are
torn. The error is where a person looks for it, and whatever else serves goes on.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import secrets
import shutil
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from llorch import web
from llorch.errors import Code, ConfigError, LlorchError
from llorch.node import pool_events as ev
from llorch.node import standing
from llorch.node.pools import Pools
from llorch.node.supervisor import Supervisor
from tests import gguf_bytes
from tests.cluster import alive, eventually, expected_text
from tests.component.node_harness import POOL, SERVICE_TOKEN
from tests.component.test_engine_failures import Seen, command, error, pool_now, state
from tests.component.test_node_process import Process, node_process
from tests.component.test_supervisor import hurried, left, pid_of, plan, ready, supervised, until
from tests.starts import STARTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of running processes are Linux's")

FOLDERS = ("keys", "pids", "logs", "engines", "ends")


# ---------------------------------------------------------------- directories


@pytest.mark.parametrize("name", [*FOLDERS, "agent.lock"])
async def test_a_runtime_directory_that_can_not_be_used_is_named_at_the_start(tmp_path: Path, name: str) -> None:
    """Modes mean nothing to root, so a file lies where a directory should, or the other way round."""
    if name == "agent.lock":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("somebody's")
    supervisor = Supervisor(Pools(), [], runtime_dir=tmp_path, starts=STARTS)
    with pytest.raises(ConfigError) as caught:
        await supervisor.start()
    await supervisor.close()
    assert caught.value.message.startswith(f"the runtime directory can't be used: {tmp_path / name}: ")
    assert caught.value.hint is not None and "--runtime-dir" in caught.value.hint


@contextmanager
def spoiled(folder: Path) -> Iterator[None]:
    """A file in the place of a directory."""
    shutil.rmtree(folder)
    folder.write_text("somebody's")
    try:
        yield
    finally:
        folder.unlink()
        folder.mkdir(mode=0o700)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("keys", "the engine's key can't be written to {}: Not a directory"),
        pytest.param(
            "pids", "the engine's pid file can't be written to {}/p-r0.json: Not a directory", marks=pytest.mark.slow
        ),
        pytest.param(
            "logs", "the engine's log can't be written to {}/p-r0.log: Not a directory", marks=pytest.mark.slow
        ),
    ],
)
async def test_a_directory_that_goes_bad_fails_what_is_started_and_is_mended_by_a_load(
    tmp_path: Path, name: str, reason: str
) -> None:
    pools = plan(), plan(id="q")
    async with supervised(tmp_path, *pools, clock=hurried(), orphan_grace_s=60.0) as supervisor:
        await until(lambda: ready(supervisor) and ready(supervisor, "q"))
        lease = supervisor.pools.acquire("q", "t")
        with spoiled(tmp_path / name):
            supervisor.post(ev.Restart("p"))
            await until(lambda: state(supervisor) == "failed")
            assert error(supervisor) == reason.format(tmp_path / name)
            supervisor.post(ev.Purge("p"))  # its logs can't be removed, which is no reason to fail
            assert ready(supervisor, "q")
            assert supervisor.pools.acquire("q", "u").url == lease.url
        supervisor.post(ev.Load("p"))
        await until(lambda: ready(supervisor))
    if name != "pids":  # with it went what would have told of q's files
        assert left(tmp_path) == []


@pytest.mark.slow
async def test_a_handoff_that_can_not_be_written_is_told_and_written_once_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with supervised(tmp_path, plan(), plan(id="q")) as supervisor:
        await until(lambda: ready(supervisor) and ready(supervisor, "q"))
        with spoiled(tmp_path / "engines"):
            supervisor.post(ev.Restart("p"))
            await until(lambda: "it can't be written: Not a directory" in error(supervisor))
            assert state(supervisor) == "starting" and ready(supervisor, "q")
            first = pid_of(tmp_path)
        await until(lambda: ready(supervisor))
        assert alive(first) and pid_of(tmp_path) == first, "nothing was loaded again"
    assert caplog.text.count("handoff.unwritten file=p-r0.json") == 1, "and it is no flood"
    assert "Traceback" not in caplog.text


@pytest.mark.slow
async def test_how_engines_ended_can_be_lost_and_nothing_else_is(tmp_path: Path) -> None:
    async with supervised(tmp_path, plan(), clock=hurried()) as supervisor:
        await until(lambda: ready(supervisor))
        first = pid_of(tmp_path)
        with spoiled(tmp_path / "ends"):
            os.kill(first, 9)
            await until(lambda: not ready(supervisor))
            await until(lambda: ready(supervisor))
            assert pid_of(tmp_path) != first


# ---------------------------------------------------------------- ports and programs


async def test_a_port_that_is_taken_meanwhile_ends_the_start_and_the_next_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stranger hears no key, and goes on."""
    from llorch.node import engine_process

    seen, real = Seen(), engine_process.free_port
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.setblocking(False)
        ports = iter([stranger.getsockname()[1]])
        monkeypatch.setattr(engine_process, "free_port", lambda: next(ports, None) or real())
        async with supervised(tmp_path, command("/bin/sleep", "600"), plan(id="q"), told=seen.told) as supervisor:
            await until(lambda: "another program listens on its port" in error(supervisor))
            await until(lambda: ready(supervisor, "q"))
        with pytest.raises(BlockingIOError):
            stranger.accept()


@pytest.mark.slow
async def test_a_program_that_is_not_there_fails_its_pool_alone(tmp_path: Path) -> None:
    async with supervised(tmp_path, command("/nonexistent/serve"), plan(id="q"), clock=hurried()) as supervisor:
        await until(lambda: state(supervisor) == "failed")
        assert error(supervisor) == "there is no program /nonexistent/serve"
        await until(lambda: ready(supervisor, "q"))


async def test_wishes_that_come_while_the_node_starts_are_refused_and_engines_ends_are_not_lost(tmp_path: Path) -> None:
    """A load that is granted before the engines of an earlier agent are found would start a second one beside them."""
    pools = Pools([plan().wanted])
    supervisor = Supervisor(pools, [plan()], runtime_dir=tmp_path, starts=STARTS)
    with pytest.raises(LlorchError) as caught:
        supervisor.ask(ev.Load("p"))
    assert caught.value.code is Code.RECOVERING and caught.value.retry_after_ms
    supervisor.post(ev.Hold("p", "hours", "it serves again from Mon 08:00"))
    assert pools.pool_report("p")["held"] == []
    await supervisor.start()
    try:
        assert pools.pool_report("p")["held"] == ["hours: it serves again from Mon 08:00"]
        assert supervisor.running() == [], "what may not run now is not started first"
        supervisor.ask(ev.Undrain("p"))
    finally:
        await supervisor.close()


# ---------------------------------------------------------------- a whole node


@asynccontextmanager
async def calling(node: Process) -> AsyncIterator[Any]:
    """`await call("POST", path, body)` gives status and JSON, with the service token."""
    headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
    async with web.client_session() as session:

        async def call(method: str, path: str, body: Any = None) -> tuple[int, Any]:
            async with session.request(method, node.url + path, json=body, headers=headers) as response:
                return response.status, await response.json(content_type=None)

        yield call


def simulated(**more: Any) -> dict[str, Any]:
    return {"id": POOL, "engine": "simulated", "model": "m", "slots": 2, "args": [], **more}


async def serves(node: Process, model: str = "m", pool: str = POOL, tokens: int = 3) -> None:
    link = await node.control.linked()
    await eventually(lambda: pool_now(node.control, pool).get("ready"), within_s=30.0)
    stream = link.open({"model": model, "prompt": "go", "max_tokens": tokens}, pool_id=pool, model=model)
    await eventually(lambda: stream.tail is not None or stream.refused is not None)
    assert stream.refused is None and stream.tail is not None and not stream.tail.get("error")
    if model == "m":
        assert stream.text == expected_text(tokens)


def bombs(folder: Path) -> dict[str, tuple[bytes, str]]:
    good = gguf_bytes.file(gguf_bytes.key("general.architecture", gguf_bytes.STRING, gguf_bytes.text("llama")))
    array = struct.pack("<IQ", gguf_bytes.STRING, 1 << 60)
    return {
        "empty": (b"", "it is cut short"),
        "cut": (good[:30], "it is cut short"),
        "lies": (gguf_bytes.file(n_keys=1 << 60), "keys"),
        "bomb": (gguf_bytes.file(gguf_bytes.key("a", gguf_bytes.ARRAY, array)), "it"),
    }


async def test_models_that_can_not_be_used_fail_their_pools_with_the_reason_and_the_others_serve(
    tmp_path: Path,
) -> None:
    made = bombs(tmp_path)
    for name, (raw, _) in made.items():
        (tmp_path / f"{name}.gguf").write_bytes(raw)
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "link.gguf").symlink_to("/etc/passwd")
    refs = [*made, "fifo", "link", "absent"]
    bad = [{"id": one, "engine": "llamacpp", "model": f"file:{tmp_path}/{one}.gguf", "args": []} for one in refs]
    no_program = {"id": "prog", "engine": "command", "model": "c", "command": ["/nonexistent/serve"], "args": []}
    no_llama = {"id": "llama", "engine": "llama-server", "model": "demo", "args": []}
    pools = [simulated(), no_program, no_llama, *bad]
    async with node_process(tmp_path, pools=pools, allow_cpu=True, llama_server="/nonexistent/llama") as node:
        await serves(node)

        def reasons() -> dict[str, Any]:
            return {one["id"]: pool_now(node.control, str(one["id"])).get("last_error") for one in pools[1:]}

        await eventually(lambda: all(reasons().values()), what="each has its reason")
        told = reasons()
        assert told["prog"] == "there is no program /nonexistent/serve"
        assert "/nonexistent/llama can't be used: there is no such program" in told["llama"]
        for name, (_, words) in made.items():
            assert f"{name}.gguf is not a usable GGUF: " in told[name] and words in told[name]
        assert "fifo.gguf is not a file" in told["fifo"]
        assert "link.gguf is not a usable GGUF: it does not begin with GGUF" in told["link"]
        assert "absent.gguf can't be read: No such file or directory" in told["absent"]
        assert {pool_now(node.control, name)["state"] for name in (*refs, "llama")} == {"failed"}
        async with calling(node) as call:
            # An operator can have it serve something that is usable all the same.
            status, _ = await call("POST", "/v2/pools/cut/reload", {"model": "demo"})
            assert status == 202
            await serves(node, "demo", "cut")
            await wishes_are_refused(call, tmp_path)
        await serves(node)


async def wishes_are_refused(call: Any, folder: Path) -> None:
    """References that lead elsewhere, to a pool that serves: refused at once, or by the reload that fails."""
    asked = "/v2/pools/cut/reload"
    for ref in (
        "file:/models/../../etc/passwd", "file:relative.gguf", "-rf", "--model=/etc/passwd", "file:/a\0b.gguf",
        "../../etc/passwd", "hf:../../x/y", "https://h/../x.gguf", "file:/a\nb.gguf", "", "x" * 5_000, "file:/a\x1b[2J",
    ):  # fmt: skip
        status, told = await call("POST", asked, {"model": ref})
        assert (status, told["error"]["code"]) == (400, "INVALID_REQUEST"), ref
        assert told["error"]["param"] == "model" and "\x1b" not in told["error"]["message"]
    for ref in (f"file:{folder}/link.gguf", f"file:{folder}/fifo.gguf", "file:/dev/zero", "file:/etc"):
        status, _ = await call("POST", asked, {"model": ref})
        assert status == 202, ref

        async def failed() -> str:
            _, report = await call("GET", "/v2/pools/cut")
            operation = report["operation"]
            return str(operation["message"]) if operation["state"] == "failed" else ""

        said = await eventually(failed)
        assert "is not a file" in said or "not a usable GGUF" in said
        _, report = await call("GET", "/v2/pools/cut")
        assert (report["model"], report["ready"]) == ("demo", True)


async def started_in_vain(folder: Path, config: dict[str, Any], *argv: str) -> tuple[int, str]:
    """The exit code of a node that can't start, and what it said."""
    file = folder / "node.yaml"
    file.write_text(json.dumps(config))
    tokens = {name: secrets.token_hex(16) for name in ("LLORCH_SERVICE_TOKEN", "LLORCH_NODE_TOKEN")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llorch", "node", "--join", "http://127.0.0.1:9", "--bind", "127.0.0.1:0",
        "--allow-cpu", "--data-dir", str(folder / "data"), "--config", str(file), *argv,
        env=os.environ | tokens | {"HOME": str(folder)}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        _, said = await asyncio.wait_for(process.communicate(), 20.0)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_a_node_whose_only_pool_can_not_be_planned_ends_with_the_error(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(bombs(tmp_path)["cut"][0])
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{tmp_path}/cut.gguf"}
    code, said = await started_in_vain(tmp_path, {"pools": [pool]})
    assert code == 2 and "cut.gguf is not a usable GGUF" in said and "Traceback" not in said


async def test_a_node_without_a_runtime_directory_ends_with_the_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "keys").write_text("somebody's")
    code, said = await started_in_vain(tmp_path, {"pools": []}, "--runtime-dir", str(tmp_path / "run"))
    assert code == 2 and f"{tmp_path}/run/keys: it is no directory" in said and "Traceback" not in said


@pytest.mark.slow
async def test_a_full_disk_fails_starts_with_the_reason_and_loses_no_engine(tmp_path: Path) -> None:
    """No process of the node may write a byte to a file, which is what a full disk is to it."""
    async with node_process(tmp_path, pools=[simulated(), simulated(id="other", model="o")], stop_grace=1.0) as node:
        await serves(node)
        _, most = resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (0, most))
        async with calling(node) as call:
            status, _ = await call("POST", f"/v2/pools/{POOL}/drain", {"reason": "full"})
            assert status == 202
            await eventually(lambda: any("wishes.unwritten" in line for line in node.said))
            await call("POST", f"/v2/pools/{POOL}/undrain", {})
            await serves(node)
            await eventually(lambda: pool_now(node.control, "other").get("ready"))
            await call("POST", "/v2/pools/other/restart", {})
            await eventually(lambda: "can't be written" in (pool_now(node.control, "other")["last_error"] or ""))
            assert "File too large" in pool_now(node.control, "other")["last_error"]
            await serves(node)
            resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (most, most))
            await call("POST", "/v2/pools/other/load", {})
            await eventually(lambda: pool_now(node.control, "other").get("ready"), within_s=20.0)
            await call("POST", f"/v2/pools/{POOL}/drain", {"reason": "room again"})
            path = tmp_path / "data" / "wishes.json"
            await eventually(lambda: standing.read(path).get("pools") == {POOL: {"drained": "room again"}})
        assert not any("Traceback" in line for line in node.said)


HOSTILE = {
    "wishes.json": [
        json.dumps(
            {
                "drained": 7,
                "pools": {
                    POOL: {"drained": ["x"], "unloaded": "yes", "model": {"id": "../x", "ref": "a", "instead_of": "m"}},
                    "bad": {"model": {"id": "b", "ref": "-rf /\x00", "instead_of": "demo"}},
                    "../../etc": {"drained": "x"},
                },
            }
        ).encode(),
        b'{"drained": null, "pools": {"' + POOL.encode() + b'": {"drained": "\\ud800"}}}',
        b"[" * 100_000,
        b"\xff\xfe",
        None,
    ],
    "peaks.json": [b'{"version": 1, "peaks": {"x": 1e308}}', b"{", b"[]", b"\x00" * 300_000, None],
    "catalog.json": [
        b'{"version": 1, "models": [{"id": "../../x", "files": [{"name": "../../etc/passwd", "size_bytes": 1}]}]}',
        b'{"models": {}}', b"{", b"\xff", None,
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, id="fifos", marks=pytest.mark.slow)]
)
async def test_a_node_whose_own_files_are_hostile_is_up_and_says_which(tmp_path: Path, case: int) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    for name, contents in HOSTILE.items():
        raw = contents[case]
        if raw is None:
            os.mkfifo(data / name)
        else:
            (data / name).write_bytes(raw)
    pools = [simulated(), {"id": "bad", "engine": "llamacpp", "model": "demo", "args": []}]
    async with node_process(tmp_path, pools=pools, allow_cpu=True) as node:
        await serves(node)
        said = "\n".join(node.said)
        assert "peaks.unreadable" in said and "catalog.torn" in said
        if case == 0:
            await eventually(lambda: pool_now(node.control, "bad").get("state") == "failed")
            assert "model reference" in pool_now(node.control, "bad")["last_error"]
        else:
            assert "wishes.unread file=wishes.json" in said
            await serves(node, "demo", "bad")
        assert "Traceback" not in said and not (tmp_path / "etc").exists()


async def test_what_an_operator_gave_a_pool_is_served_though_the_settings_model_is_gone(tmp_path: Path) -> None:
    gone = f"file:{tmp_path}/gone.gguf"
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    wish = {"model": {"id": "demo", "ref": "demo", "instead_of": gone}}
    (data / "wishes.json").write_text(json.dumps({"drained": None, "pools": {POOL: wish}}))
    pools = [{"id": POOL, "engine": "llamacpp", "model": gone, "args": []}]
    async with node_process(tmp_path, pools=pools, allow_cpu=True) as node:
        await serves(node, "demo")
        assert any("pool.refused" in line and "gone.gguf" in line for line in node.said)
