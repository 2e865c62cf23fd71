"""vLLM, SGLang and commands of one's own as pools: started, proven, asked, counted and ended. Stand-ins play the first
two, for they need a GPU; what is between a task and them is the real thing.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from llorch.config_pools import PoolSpec
from llorch.errors import LlorchError
from llorch.messages import Open, Tail
from llorch.node import engine_process, listeners, probing
from llorch.node.engine_connections import engines
from llorch.node.engine_keys import read_key
from llorch.node.engines.command import Command
from llorch.node.engines.progress import Progress
from llorch.node.engines.sglang import Sglang
from llorch.node.engines.spec import Engine
from llorch.node.engines.vllm import Vllm
from llorch.node.handoff import Handoff, parse, render
from llorch.node.metrics import NodeMetrics
from llorch.node.plans import Plan
from llorch.node.pools import Pools
from llorch.node.retention import Limits, TaskLogs
from llorch.node.runner import Runner
from llorch.node.supervisor import Supervisor
from llorch.web import client_session
from tests.cluster import eventually
from tests.standins import ollama_standin
from tests.standins.surface import STORE_ENV
from tests.starts import STARTS

ROOT = Path(__file__).parents[2]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VLLM = Vllm((sys.executable, "-m", "tests.standins.vllm_standin"), "0.33.0")
SGLANG = Sglang(sys.executable, "0.5.23")
COMMAND = Command()
CTX = 64
ENGINES: dict[str, Engine] = {"vllm": VLLM, "sglang": SGLANG}


def plan(name: str, folder: Path, *args: str, **changes: Any) -> Plan:
    """A pool on a stand-in. What is run as `sglang.launch_server` is one, too."""
    package = folder / "sglang"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(
        "from tests.standins.sglang_standin import main\nif __name__ == '__main__':\n    main()\n"
    )
    env = (("PYTHONPATH", f"{folder}:{ROOT}"), *changes.pop("env", ()))
    made = PoolSpec(id="p", engine=name, model="hf:org/m", slots=2, ctx=CTX, args=args, env=env, gpus=(0, 1))
    return Plan(replace(made, **changes), ENGINES.get(name, COMMAND), {"org/m": "hf:org/m"})


@dataclass
class Node:
    """A supervisor and a runner on the same pools."""

    supervisor: Supervisor
    runner: Runner
    http: aiohttp.ClientSession

    @property
    def handoff(self) -> Handoff:
        ((_, _, _, handoff),) = self.supervisor.pools.replicas()
        assert handoff is not None
        return handoff

    @property
    def key(self) -> str:
        assert self.handoff.api_key_file is not None
        return read_key(self.handoff.api_key_file)

    async def run(self, body: dict[str, Any], path: str = "native") -> tuple[str, Tail]:
        """A task, to its end: its log and how it ended."""
        raw = json.dumps({"model": self.handoff.model} | body).encode()
        opening = Open(
            task_id=str(uuid.uuid4()), pool_id="p", model=self.handoff.model, path=path, body_len=len(raw), epoch="e"
        )
        entry, new = self.runner.accept(opening)
        assert new and entry.run is not None
        entry.run.give_body(raw)
        await eventually(lambda: entry.log.sealed, what="the end of a task")
        tail = entry.log.tail
        assert tail is not None
        return entry.log.read(0, 1 << 20).decode(), tail

    async def get(self, path: str, key: str | None) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self.http.get(self.handoff.url + path, headers=headers) as answer:
            return answer.status


@asynccontextmanager
async def node(folder: Path, made: Plan, **settings: Any) -> AsyncIterator[Node]:
    pools = Pools([made.wanted])
    supervisor = Supervisor(
        pools, [made], runtime_dir=folder / "run", **{"starts": STARTS, "stop_grace_s": 5.0} | settings
    )
    await supervisor.start()
    try:
        async with engines() as asking, client_session() as http:
            metrics = NodeMetrics("n")
            logs = TaskLogs(Limits())
            runner = Runner("n", pools, logs, asking, metrics, max_body_bytes=1 << 20, changed=lambda: None)
            yield Node(supervisor, runner, http)
            await runner.close()
    finally:
        await supervisor.close()


async def ready(running: Node) -> None:
    def look() -> bool:
        health = running.supervisor.pools.health("p")
        return bool(health["ready"] or health["last_error"])

    await eventually(look, within_s=20)
    health = running.supervisor.pools.health("p")
    assert health["ready"], health


def texts(log: str) -> str:
    blocks = (line.removeprefix("data: ") for line in log.splitlines() if line.startswith("data: {"))
    return "".join(json.loads(block).get("t", "") for block in blocks)


def expected(count: int) -> str:
    return "".join(f"t{number} " for number in range(count))


@pytest.mark.parametrize("name", ENGINES)
async def test_an_engine_that_speaks_otherwise_serves_native_and_v1_tasks_and_its_usage_counts(
    name: str, tmp_path: Path
) -> None:
    async with node(tmp_path, plan(name, tmp_path)) as running:
        await ready(running)
        report = running.supervisor.pools.pool_report("p")
        assert (report["engine"], report["slots_total"], report["ctx"]) == (name, 2, CTX)
        assert running.handoff.engine_version == ENGINES[name].version

        for body in ({"prompt": "one two three"}, {"messages": [{"role": "user", "content": "one two three"}]}):
            log, tail = await running.run(body | {"max_tokens": 5, "repeat_penalty": 1.1})
            assert texts(log) == expected(5), log
            assert (tail.error, tail.finish_reason) == (None, "length")
            assert (tail.tokens_in, tail.tokens_out, tail.cached_tokens) == (3, 5, 2)

        chat = {"messages": [{"role": "user", "content": "one two"}], "stream": True, "max_tokens": 4}
        log, tail = await running.run(chat, CHAT)
        assert log.endswith("data: [DONE]\n\n") and '"usage"' not in log, "nobody asked for the usage"
        assert (tail.tokens_in, tail.tokens_out, tail.error) == (2, 4, None)
        log, tail = await running.run(chat | {"stream_options": {"include_usage": True}}, CHAT)
        assert '"choices": [], "usage"' in log
        log, tail = await running.run({"prompt": "one two", "max_tokens": 3}, COMPLETIONS)
        assert json.loads(log)["choices"][0]["text"] == expected(3)
        assert (tail.tokens_in, tail.tokens_out) == (2, 3)


@pytest.mark.parametrize("name", ENGINES)
async def test_its_errors_are_told_in_our_words(name: str, tmp_path: Path) -> None:
    async with node(tmp_path, plan(name, tmp_path)) as running:
        await ready(running)
        for path in ("native", COMPLETIONS):
            log, tail = await running.run({"prompt": "word " * CTX, "max_tokens": 2}, path)
            assert log == "" and tail.error is not None
            assert (tail.error["code"], tail.status) == ("CONTEXT_LENGTH_EXCEEDED", 400)
        log, tail = await running.run({"prompt": "give up #abort", "max_tokens": 5})
        assert tail.error is not None and tail.error["code"] == "ENGINE_FAILED", "what came is no whole answer"
        assert "event: end" not in log
        assert running.supervisor.pools.pool_report("p")["slots_free"] == 2


@pytest.mark.parametrize("name", ENGINES)
async def test_its_key_stands_on_no_command_line_and_in_no_log(name: str, tmp_path: Path) -> None:
    async with node(tmp_path, plan(name, tmp_path)) as running:
        await ready(running)
        assert await running.get("/v1/models", running.key) == 200
        assert await running.get("/v1/models", "another-key") == await running.get("/v1/models", None) == 401
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert running.key.encode() not in process.read_bytes()
            except OSError:
                continue
        assert running.key not in (tmp_path / "run" / "logs" / "p-r0.log").read_text()


async def test_what_vllm_leaves_open_beside_its_key_no_task_reaches(tmp_path: Path) -> None:
    async with node(tmp_path, plan("vllm", tmp_path)) as running:
        await ready(running)
        body = {"model": "org/m", "prompt": "Hi", "max_tokens": 1}
        async with running.http.post(running.handoff.url + "/invocations", json=body) as answer:
            assert answer.status == 200, "the real one asks for no key there either"
        for path in ("/invocations", "/pause", "/v1/../pause", "/v1/load_lora_adapter"):
            with pytest.raises(LlorchError):
                await running.run({"prompt": "Hi"}, path)


@pytest.mark.parametrize("name", ENGINES)
async def test_its_key_may_look_like_a_flag(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "secrets", SimpleNamespace(token_hex=lambda count: "-" * 2 * count))
    async with node(tmp_path, plan(name, tmp_path)) as running:
        await ready(running)
        assert running.key == "-" * 64
        assert (await running.run({"prompt": "one", "max_tokens": 1}))[1].tokens_out == 1


@pytest.mark.parametrize("name", ENGINES)
async def test_its_counters_move_while_it_works_and_stand_still_while_it_hangs(name: str, tmp_path: Path) -> None:
    async with node(tmp_path, plan(name, tmp_path)) as running:
        await ready(running)
        before = await probing.progress(running.http, running.handoff)
        await running.run({"prompt": "one two", "max_tokens": 5})
        after = await probing.progress(running.http, running.handoff)
        assert isinstance(before, Progress) and isinstance(after, Progress)
        assert before.counters != after.counters and after.kv_usage in (0.25, 0.5)

        hanging = asyncio.ensure_future(running.run({"prompt": "stop here #hang", "max_tokens": 5}))
        await eventually(lambda: running.supervisor.pools.pool_report("p")["slots_free"] == 1)
        stuck: Progress = await eventually(lambda: _busy(running), what="the engine at its task")  # type: ignore[arg-type, return-value]
        again = await probing.progress(running.http, running.handoff)
        assert again is not None and again.counters == stuck.counters and again.busy == 1
        if name == "vllm":
            assert await probing.lost(running.http, running.handoff) is None, "its health says nothing of a hang"
        for entry in running.runner.logs.running:
            running.runner.cancel(entry)
        _, tail = await hanging
        assert tail.finish_reason == "canceled"


async def _busy(running: Node) -> Progress | None:
    """Once its task has its first token, and no more come."""
    entries = [entry for entry in running.runner.logs.running if entry.tokens_out]
    found = await probing.progress(running.http, running.handoff)
    return found if entries and found is not None and found.busy == 1 else None


@pytest.mark.parametrize("name", ENGINES)
async def test_a_port_that_its_parts_open_is_told_from_its_own(name: str, tmp_path: Path) -> None:
    """PyTorch's store listens on every address in the real ones, whatever their flags say."""
    launch = plan(name, tmp_path, env=((STORE_ENV, "1"),))
    made = launch.engine.launch(launch.spec, model_id="m", port=0, key_file="/k", model_path="/m")
    env = {"PATH": "/usr/bin", "LLORCH_ENGINE_KEY": "k", **made.env}
    process = await asyncio.create_subprocess_exec(*made.argv, env=env, start_new_session=True)
    try:
        found = await eventually(lambda: listeners.exposed(process.pid), within_s=20)
        assert [address.rpartition(":")[0] for address in found] == ["0.0.0.0"]
        port = int(found[0].rpartition(":")[2])
        assert listeners.exposed(process.pid, port) == found and listeners.exposed(process.pid, port - 1) == []
        assert launch.engine.inner_ports_open
    finally:
        process.kill()
        await process.wait()


# ---------------------------------------------------------------- a command of one's own


def command(*words: str, **changes: Any) -> Plan:
    program = (sys.executable, "-m", "tests.standins.vllm_standin", "serve")
    env = (("PYTHONPATH", str(ROOT)),)
    made = PoolSpec(id="p", engine="command", command=(*program, *words), model="hf:org/m", slots=2, ctx=CTX, env=env)
    return Plan(replace(made, **changes), COMMAND, {"org/m": "hf:org/m"})


async def test_a_command_is_filled_with_what_it_is_to_serve_and_finds_its_key(tmp_path: Path) -> None:
    made = command(
        "{model}", "--served-model-name", "org/m", "--port", "{port}", "--max-num-seqs={slots}", "--max-model-len",
        "{ctx}", "--dtype", '{"a": 1}', gpus=(0, 1),
    )  # fmt: skip
    async with node(tmp_path, made) as running:
        await ready(running)
        pid = json.loads((tmp_path / "run" / "pids" / "p-r0.json").read_text())["pid"]
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[4:-1]
        port = running.handoff.url.rpartition(":")[2]
        assert words == [
            "org/m", "--served-model-name", "org/m", "--port", port, "--max-num-seqs=2",
            "--max-model-len", str(CTX), "--dtype", '{"a": 1}',
        ]  # fmt: skip
        environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
        assert f"LLORCH_ENGINE_KEY={running.key}" in environ and "CUDA_VISIBLE_DEVICES=0,1" in environ
        log, tail = await running.run({"prompt": "one two", "max_tokens": 3})
        assert texts(log) == expected(3) and tail.error is None


async def test_a_command_that_is_not_there_says_so_and_the_node_stays(tmp_path: Path) -> None:
    made = replace(command(), spec=replace(command().spec, command=("/opt/nothing/here", "--port", "{port}")))
    async with node(tmp_path, made) as running:
        error = await eventually(lambda: running.supervisor.pools.health("p")["last_error"])
        assert "there is no program /opt/nothing/here" in error


# ---------------------------------------------------------------- an engine of someone else


@asynccontextmanager
async def ollama(model: str, host: str = "127.0.0.1") -> AsyncIterator[tuple[ollama_standin.Ollama, str]]:
    standin, runner, url = await ollama_standin.serve(model, host)
    try:
        yield standin, url
    finally:
        await runner.cleanup()


def offer(folder: Path, handoff: Handoff) -> None:
    engines = folder / "run" / "engines"
    engines.mkdir(parents=True, exist_ok=True)
    (engines / handoff.file_name).write_bytes(render(handoff))


@asynccontextmanager
async def offered(folder: Path, handoff: Handoff) -> AsyncIterator[Node]:
    """A node whose only pool was handed over."""
    pools = Pools()
    supervisor = Supervisor(pools, [], runtime_dir=folder / "run", starts=STARTS)
    await supervisor.start()
    try:
        offer(folder, handoff)
        async with engines() as asking, client_session() as http:
            runner = Runner(
                "n", pools, TaskLogs(Limits()), asking, NodeMetrics("n"), max_body_bytes=1 << 20, changed=lambda: None
            )
            await eventually(lambda: pools.ids() == ["p"], what="the handoff")
            yield Node(supervisor, runner, http)
            await runner.close()
    finally:
        await supervisor.close()


async def test_an_ollama_that_runs_already_serves_under_our_name_for_its_model(tmp_path: Path) -> None:
    async with ollama("qwen3:8b") as (standin, url):
        handoff = Handoff("p", "external", url, "qwen3-8b", slots=3, engine_model="qwen3:8b")
        async with offered(tmp_path, handoff) as running:
            await ready(running)
            assert await probing.progress(running.http, running.handoff) is None, "it counts nothing"
            log, tail = await running.run({"messages": [{"role": "user", "content": "one two"}], "max_tokens": 3})
            assert texts(log) == expected(3) and (tail.tokens_in, tail.tokens_out) == (2, 3)
            assert json.loads(log.split("data: ")[1].splitlines()[0])["model"] == "qwen3-8b"
            await running.run({"prompt": "x", "max_tokens": 2}, COMPLETIONS)
            assert {body["model"] for body in standin.seen} == {"qwen3:8b"}
            assert running.supervisor.pools.pool_report("p")["model"] == "qwen3-8b"
            standin.model = "another:1b"
            _, tail = await running.run({"prompt": "x", "max_tokens": 2})
            assert tail.error is not None and tail.error["code"] == "MODEL_NOT_AVAILABLE"


async def test_a_name_that_an_engine_does_not_know_is_told_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llorch.node.engine_checks.QUIET_S", 0.0)
    async with (
        ollama("qwen3:8b") as (_, url),
        offered(tmp_path, Handoff("p", "external", url, "qwen3")) as running,
    ):
        error = await eventually(lambda: running.supervisor.pools.health("p")["last_error"])
        assert error == "it has no model qwen3: set the pool's engine_model to its name there"


def test_an_engine_on_another_machine_is_used_where_the_settings_let_it() -> None:
    handoff = Handoff("p", "external", "http://10.1.2.3:11434", "qwen3", engine_model="qwen3:8b")
    with pytest.raises(ValueError, match="--engine-cidr"):
        parse("p-r0.json", render(handoff))
    assert parse("p-r0.json", render(handoff), [ip_network("10.1.0.0/16")]) == handoff
