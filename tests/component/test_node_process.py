"""A whole node as a process, with a simulated engine, joined to a scripted control."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llorch import web
from tests.cluster import alive, descendants, eventually, expected_text
from tests.component.node_harness import NODE_TOKEN, POOL, SERVICE_TOKEN, ScriptedControl, ScriptedLink

MAIN = """
import json, sys
from llorch.config import NodeSettings, HostPort, PoolSpec
from llorch.node.app import main
from llorch.reload import Source
given = json.loads(sys.argv[1])
pools = tuple(PoolSpec(**{**pool, "args": tuple(pool["args"])}) for pool in given.pop("pools"))
settings = NodeSettings(bind=HostPort("127.0.0.1", 0), pools=pools, **{**given, "join": tuple(given["join"])})
sys.exit(main(settings, Source(lambda: settings, ())))
"""


@dataclass
class Process:
    process: asyncio.subprocess.Process
    control: ScriptedControl
    folder: Path
    url: str
    said: list[str]

    async def pool_ready(self) -> ScriptedLink:
        def ready() -> bool:
            reports = [*self.control.registered, *self.control.beats]
            return any(pool.get("ready") for report in reports for pool in report.get("pools", ()))

        await eventually(ready, within_s=30.0, what="the pool is ready")
        return await self.control.linked()

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 20.0)


@contextlib.asynccontextmanager
async def node_process(
    folder: Path, *args: str, env: dict[str, str] | None = None, main: str = MAIN, **settings: Any
) -> AsyncIterator[Process]:
    control = ScriptedControl()
    await control.start()
    given = {
        "join": [control.url],
        "data_dir": str(folder / "data"),
        "node_id": "n1",
        "service_token": SERVICE_TOKEN,
        "node_token": NODE_TOKEN,
        "pools": [{"id": POOL, "engine": "simulated", "model": "m", "slots": 2, "args": args}],
    } | settings
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", main, json.dumps(given), stderr=asyncio.subprocess.PIPE, env={**os.environ, **(env or {})}
    )
    said: list[str] = []
    ready = asyncio.get_running_loop().create_future()
    assert process.stderr is not None

    async def listen(stderr: asyncio.StreamReader) -> None:
        while line := (await stderr.readline()).decode():
            said.append(line.rstrip())
            if line.startswith("ready url=") and not ready.done():
                ready.set_result(line.strip().removeprefix("ready url="))

    listening = asyncio.ensure_future(listen(process.stderr))
    try:
        url = await asyncio.wait_for(ready, 20.0)
        yield Process(process, control, folder, url, said)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 15.0)
            except TimeoutError:
                process.kill()
                await process.wait()
        await listening
        await control.close()


async def test_prompt_runs_on_the_simulated_engine(tmp_path: Path) -> None:
    async with node_process(tmp_path, address="http://127.0.0.1:4444", zone="rack-1") as node:
        link = await node.pool_ready()
        assert node.control.registered[0]["address"] == "http://127.0.0.1:4444"  # as it was told, not where it listens
        assert node.control.registered[0]["zone"] == "rack-1"
        stream = link.open({"model": "m", "prompt": "Hello", "max_tokens": 5})
        await eventually(lambda: stream.tail is not None)
        assert stream.text == expected_text(5)
        assert stream.tail is not None
        assert stream.tail["tokens_out"] == 5
        async with web.client_session() as session:
            headers = {"Authorization": f"Bearer {SERVICE_TOKEN}"}
            body = b'{"prompt":"Hello","model":"m","max_tokens":3}'
            path = f"{node.url}/v2/pools/{POOL}/infer"
            async with session.post(path, data=body, headers=headers) as response:
                text = (await response.read()).decode()
        assert text.count("event: token") == 3
        assert stat.S_IMODE((node.folder / "data").stat().st_mode) == 0o700
        assert len([line for line in node.said if line.startswith("ready ")]) == 1


async def test_sigterm_lets_tasks_end_and_deregisters_last(tmp_path: Path) -> None:
    async with node_process(tmp_path, "--delay-ms", "25", "--tokens", "20") as node:
        link = await node.pool_ready()
        stream = link.open({"model": "m", "prompt": "Hello", "max_tokens": 20})
        await eventually(lambda: stream.text)
        engines = descendants(node.process.pid)
        assert engines
        node.process.send_signal(signal.SIGTERM)
        await eventually(lambda: any(beat.get("draining") for beat in node.control.beats), what="it says so")
        late = link.open({"model": "m", "prompt": "Hello"})
        await eventually(lambda: late.refused is not None)
        assert late.refused is not None
        assert late.refused["code"] == "DRAINING"
        async with web.client_session() as session, session.get(f"{node.url}/readyz") as response:
            assert response.status == 503
        assert node.control.gone == []
        assert await node.ended() == 0
        assert stream.tail is not None
        assert stream.text == expected_text(20)
        assert node.control.gone == ["n1"]
        assert not any(map(alive, engines))


async def test_second_signal_ends_tasks_with_a_word(tmp_path: Path) -> None:
    async with node_process(tmp_path, "--delay-ms", "50", "--tokens", "100000") as node:
        link = await node.pool_ready()
        stream = link.open({"model": "m", "prompt": "Hello", "max_tokens": 100_000})
        await eventually(lambda: stream.text)
        node.process.send_signal(signal.SIGTERM)
        await eventually(lambda: any(beat.get("draining") for beat in node.control.beats))
        node.process.send_signal(signal.SIGTERM)
        assert await node.ended() == 0
        assert stream.tail is not None
        assert stream.tail["error"]["code"] == "NODE_LOST"
        assert stream.events_seen[-1][0] == "error"


async def test_grace_bounds_the_drain(tmp_path: Path) -> None:
    async with node_process(tmp_path, "--delay-ms", "50", "--tokens", "100000", shutdown_grace=0.3) as node:
        link = await node.pool_ready()
        stream = link.open({"model": "m", "prompt": "Hello", "max_tokens": 100_000})
        await eventually(lambda: stream.text)
        node.process.send_signal(signal.SIGTERM)
        assert await node.ended() == 0
        assert stream.events_seen[-1][0] == "error"


async def test_engine_that_dies_in_the_middle_ends_the_stream_with_an_error(tmp_path: Path) -> None:
    async with node_process(tmp_path, "--die-after", "3") as node:
        link = await node.pool_ready()
        stream = link.open({"model": "m", "prompt": "Hello", "max_tokens": 10})
        await eventually(lambda: stream.tail is not None)
        assert stream.tail is not None
        assert stream.tail["error"]["code"] == "ENGINE_FAILED"
        assert stream.events_seen[-1][0] == "error"
        assert expected_text(3).startswith(stream.text)


async def test_service_manager_is_told_when_it_serves(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(path)
        told.setblocking(False)
        async with node_process(tmp_path, env={"NOTIFY_SOCKET": path}) as node:
            assert await asyncio.get_running_loop().sock_recv(told, 100) == b"READY=1"
            node.process.send_signal(signal.SIGTERM)
            assert await node.ended() == 0
            assert await asyncio.get_running_loop().sock_recv(told, 100) == b"STOPPING=1"


async def test_no_token_and_no_prompt_reaches_the_log(tmp_path: Path) -> None:
    async with node_process(tmp_path, log_level="debug") as node:
        link = await node.pool_ready()
        stream = link.open({"model": "m", "prompt": "a-secret-prompt", "max_tokens": 3})
        await eventually(lambda: stream.tail is not None)
        bad = link.open({"model": "m", "prompt": "a-secret-prompt", "a-secret-field": 1})
        await eventually(lambda: bad.tail is not None)
        async with web.client_session() as session, session.get(f"{node.url}/v2/pools") as response:
            assert response.status == 401
        node.process.send_signal(signal.SIGTERM)
        await node.ended()
        said = "\n".join(node.said)
        assert "task.ended" in said
        for secret in ("a-secret-prompt", "a-secret-field", SERVICE_TOKEN, NODE_TOKEN, "t0 t1"):
            assert secret not in said
