"""The supervisor with real engine processes: started, offered, probed, watched and ended, with nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from llorch.config_pools import PoolSpec
from llorch.errors import Code, ConfigError, LlorchError
from llorch.messages import TaskBody
from llorch.node import pool_events as ev
from llorch.node import probing
from llorch.node.catalog import Catalog
from llorch.node.engine_keys import read_key
from llorch.node.engine_log import tail
from llorch.node.engine_process import start_time
from llorch.node.engines.external import External
from llorch.node.engines.llamacpp import LlamaCpp
from llorch.node.engines.openai_api import NativeDecoder, TaskFacts
from llorch.node.engines.requests import encode_native
from llorch.node.engines.simulated import Simulated
from llorch.node.engines.spec import Launch
from llorch.node.handoff import Handoff, render
from llorch.node.plans import Plan
from llorch.node.pools import Pools
from llorch.node.supervisor import Supervisor, Told
from llorch.web import client_session
from tests.starts import STARTS

DEADLINE_S = 30.0
DEMO = replace(STARTS, model=Catalog().ensure)


def plan(*args: str, **changes: Any) -> Plan:
    spec = replace(PoolSpec(id="p", engine="simulated", model="m", slots=2, args=args), **changes)
    return Plan(spec, External() if spec.engine == "external" else Simulated(sys.executable), {"m": "m"})


async def until(fact: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not fact():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def supervised(root: Path, *plans: Plan, **settings: Any) -> AsyncIterator[Supervisor]:
    pools = Pools(one.wanted for one in plans)
    supervisor = Supervisor(pools, plans, runtime_dir=root, **{"starts": STARTS, "stop_grace_s": 5.0} | settings)
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.close()


def hurried() -> Callable[[], float]:
    """A clock for backoffs, ten times as fast. What a process needs to start is drawn out by as much: five failures
    still count as five within 5 min while each start takes under 6 s."""
    began = time.monotonic()
    return lambda: began + (time.monotonic() - began) * 10


def alive(pid: int) -> bool:
    return start_time(pid) is not None


def pid_of(root: Path, name: str = "p-r0") -> int:
    pid = json.loads((root / "pids" / f"{name}.json").read_text())["pid"]
    assert isinstance(pid, int)
    return pid


def left(root: Path) -> list[str]:
    kinds = ("engines", "pids", "keys")
    return sorted(str(path.relative_to(root)) for kind in kinds for path in (root / kind).iterdir())


def ready(supervisor: Supervisor, pool: str = "p") -> bool:
    return bool(supervisor.pools.health(pool)["ready"])


async def test_a_pool_of_the_settings_becomes_ready_and_ends_with_its_agent(tmp_path: Path) -> None:
    async with supervised(tmp_path, plan(replicas=2)) as supervisor:
        await until(lambda: supervisor.pools.pool_report("p")["slots_free"] == 4)
        pids = [pid_of(tmp_path, "p-r0"), pid_of(tmp_path, "p-r1")]
        assert all(os.getpgid(pid) == pid for pid in pids)
        wire = json.loads((tmp_path / "pids" / "p-r0.json").read_text())
        assert {"pid", "start_time", "argv_digest", "port", "api_key_file", "log", "shim", "agent"} <= set(wire)
        assert wire["start_time"] == start_time(wire["pid"])
        lease = supervisor.pools.acquire("p", "t")
        assert lease.api_key_file is not None and lease.url.startswith("http://127.0.0.1:")
        key = Path(lease.api_key_file).read_text().strip()
        assert len(key) >= 32 and key not in Path(f"/proc/{pids[0]}/cmdline").read_text()
        for name in left(tmp_path):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "engines").stat().st_mode) == 0o700
    assert not any(alive(pid) for pid in pids)
    assert left(tmp_path) == []


async def test_an_engine_sees_none_of_our_secrets(tmp_path: Path) -> None:
    """What its pool gives it explicitly it has, whatever it is."""
    hidden = ("LLORCH_ADMIN_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "HTTPS_PROXY", "NVIDIA_API_KEY")
    env = os.environ | dict.fromkeys(hidden, "s3cret") | {"LLAMA_ARG_TOOLS": "all", "CUDA_CACHE_PATH": "/cuda"}
    async with supervised(tmp_path, plan(env=(("HTTP_PROXY", "given"),)), env=env) as supervisor:
        await until(lambda: ready(supervisor))
        seen = dict(
            entry.split(b"=", 1)
            for entry in Path(f"/proc/{pid_of(tmp_path)}/environ").read_bytes().split(b"\0")
            if entry
        )
        assert b"s3cret" not in seen.values() and b"LLAMA_ARG_TOOLS" not in seen
        assert (seen[b"HTTP_PROXY"], seen[b"CUDA_CACHE_PATH"]) == (b"given", b"/cuda")
        status = Path(f"/proc/{pid_of(tmp_path)}/status").read_text()
        assert "NoNewPrivs:\t1\n" in status and "Umask:\t0077\n" in status
        assert (
            "Max core file size        0                    0" in Path(f"/proc/{pid_of(tmp_path)}/limits").read_text()
        )


@dataclass(frozen=True, slots=True)
class Everywhere:
    """An engine that works, and listens on every address whatever it is told."""

    name: str = "everywhere"
    version: str | None = None
    needs_model: bool = False
    formats: frozenset[str] = frozenset()
    inner_ports_open: bool = False

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        return Launch((sys.executable, "-c", EVERYWHERE, str(port)))


EVERYWHERE = """
import http.server, sys
class Engine(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    do_POST = do_GET
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Engine).serve_forever()
"""


async def test_an_engine_that_others_can_reach_is_ended_and_never_ready(tmp_path: Path) -> None:
    bad = Plan(PoolSpec(id="p", engine="simulated", model="m"), Everywhere(), {"m": "m"})
    notes: list[ev.Note] = []
    seen: set[bool] = set()
    async with supervised(tmp_path, bad, told=Told(note=notes.append)) as supervisor:
        supervisor.pools.subscribe(lambda _pool: seen.add(ready(supervisor)))
        # A first start may end by itself: its port, free on loopback, need not be free everywhere.
        await until(lambda: "it listens on 0.0.0.0:" in (supervisor.pools.health("p")["last_error"] or ""))
        assert supervisor.pools.health("p")["last_error"].endswith(": engines listen on loopback only")
        notes.clear()
        await until(lambda: any(note.event == "engine.ended" for note in notes))
    assert seen == {False}


async def test_an_engine_that_is_killed_is_started_again_and_the_log_says_whose_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llorch")
    notes: list[ev.Note] = []
    async with supervised(tmp_path, plan(), told=Told(note=notes.append), node_id="n1", clock=hurried()) as supervisor:
        await until(lambda: ready(supervisor))
        first = pid_of(tmp_path)
        os.kill(first, signal.SIGKILL)
        await until(lambda: not ready(supervisor))
        assert "killed by SIGKILL" in supervisor.pools.health("p")["last_error"]
        await until(lambda: ready(supervisor))
        assert pid_of(tmp_path) != first
        assert len(list((tmp_path / "keys").iterdir())) == 1
    assert any(note.event == "engine.ended" for note in notes)
    for event in ("engine.started", "engine.exited", "engine.ended", "pool.ready"):
        assert f"{event} node_id=n1 pool_id=p replica=r0" in caplog.text


async def test_an_engine_that_cannot_start_fails_its_pool_and_says_why(tmp_path: Path) -> None:
    """Five starts with their backoffs, on a hurried clock; the reason is the last line of the log."""
    broken = plan("--no-such-flag")
    async with supervised(tmp_path, broken, plan(id="q"), clock=hurried()) as supervisor:
        await until(lambda: supervisor.pools.pool_report("p")["state"] == "failed")
        error = supervisor.pools.health("p")["last_error"]
        assert error.startswith("exited with code 2") and "no-such-flag" in error
        assert any("no-such-flag" in line for line in tail(supervisor.files.logs / "p-r0.log", 50))
        await until(lambda: ready(supervisor, "q"))
        assert not any(Path(name).name.startswith("p-") for name in left(tmp_path))


async def test_arguments_that_llorch_sets_itself_are_refused(tmp_path: Path) -> None:
    async with supervised(tmp_path, plan("--host", "0.0.0.0")) as supervisor:
        await until(lambda: supervisor.pools.health("p")["last_error"])
        assert "--host can't be given" in supervisor.pools.health("p")["last_error"]
        assert not list((tmp_path / "logs").iterdir())


async def test_one_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async with supervised(tmp_path, plan("--ignore-sigterm"), stop_grace_s=0.5) as supervisor:
        await until(lambda: ready(supervisor))
        pid = pid_of(tmp_path)
        began = time.monotonic()
    assert 0.5 <= time.monotonic() - began < 5
    assert not alive(pid)
    assert left(tmp_path) == []


async def test_closing_during_a_start_leaves_nothing(tmp_path: Path) -> None:
    for turns in range(6):
        async with supervised(tmp_path, plan("--load-s", "60")) as supervisor:
            for _ in range(turns):
                await asyncio.sleep(0.03)
            assert not ready(supervisor)
        assert left(tmp_path) == []


async def test_stopped_before_its_start_has_begun_it_does_end(tmp_path: Path) -> None:
    async with supervised(tmp_path, plan()) as supervisor:
        supervisor.post(ev.Unload("p"))
        await until(lambda: supervisor.pools.pool_report("p")["state"] == "stopped")
        await until(lambda: left(tmp_path) == [])
        supervisor.post(ev.Load("p"))
        await until(lambda: ready(supervisor))


async def test_a_removed_handoff_stops_the_engine_and_a_foreign_one_is_rewritten(tmp_path: Path) -> None:
    notes: list[ev.Note] = []
    file = tmp_path / "engines" / "p-r0.json"
    async with supervised(tmp_path, plan(), told=Told(note=notes.append)) as supervisor:
        await until(lambda: ready(supervisor))
        own, pid = file.read_bytes(), pid_of(tmp_path)
        file.write_bytes(own.replace(b'"slots": 2', b'"slots": 9'))
        await until(lambda: file.read_bytes() == own)
        await until(lambda: any(note.event == "handoff.invalid" for note in notes))
        assert ready(supervisor) and alive(pid)
        file.unlink()
        await until(lambda: not alive(pid))
        assert not ready(supervisor)
        await until(lambda: supervisor.pools.pool_report("p")["state"] == "stopped")


async def test_a_restart_keeps_the_pool_and_changes_the_process(tmp_path: Path) -> None:
    async with supervised(tmp_path, plan()) as supervisor:
        await until(lambda: ready(supervisor))
        first = pid_of(tmp_path)
        supervisor.pools.acquire("p", "t")
        supervisor.post(ev.Restart("p"))
        assert alive(first)
        supervisor.pools.release("t")
        await until(lambda: not alive(first))
        await until(lambda: ready(supervisor))
        assert pid_of(tmp_path) != first


async def test_a_loading_engine_is_given_its_time_and_no_more(tmp_path: Path) -> None:
    async with supervised(tmp_path, plan("--load-s", "60"), load_timeout_s=0.5) as supervisor:
        await until(lambda: "not ready within" in (supervisor.pools.health("p")["last_error"] or ""))


async def test_a_second_agent_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    async with supervised(tmp_path, plan()) as supervisor:
        await until(lambda: ready(supervisor))
        other = Supervisor(Pools(), [], runtime_dir=tmp_path, starts=STARTS)
        with pytest.raises(ConfigError, match="another agent"):
            await other.start()
        await other.close()
        assert ready(supervisor) and alive(pid_of(tmp_path))


@pytest.mark.llama
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
async def test_real_llama_cpp_becomes_ready_and_answers_through_its_lease(tmp_path: Path) -> None:
    spec = PoolSpec(id="p", engine="llamacpp", model="demo", slots=2, ctx=256, gpus=())
    async with supervised(tmp_path, Plan(spec, LlamaCpp(sys.executable), {"demo": "demo"}), starts=DEMO) as supervisor:
        await until(lambda: ready(supervisor))
        report = supervisor.pools.pool_report("p")
        assert (report["slots_total"], report["ctx"], report["last_error"]) == (2, 256, None)
        lease = supervisor.pools.acquire("p", "t")
        made = encode_native(TaskBody(model="demo", prompt="Hello", max_tokens=3), lease.model)
        decoder = NativeDecoder(TaskFacts("t", "n", "p", "demo"))
        assert lease.api_key_file is not None
        key = {"Authorization": f"Bearer {read_key(lease.api_key_file)}"}
        async with client_session() as http, http.post(lease.url + made.path, data=made.body, headers=key) as response:
            raw = decoder.feed(await response.read(), 1.0) + decoder.finish(2.0)
        assert raw.count(b"event: end\n") == 1 and raw.count(b"event: error\n") == 0
        assert decoder.usage.tokens_out == 3 and decoder.finish_reason == "length"
        ((_, _, _, handoff),) = supervisor.pools.replicas()
        assert handoff is not None
        async with client_session() as http:
            found = await probing.progress(http, handoff)
        assert found is not None and found.busy == 0 and all(count > 0 for count in found.counters)
        async with client_session() as http, http.post(lease.url + made.path, data=made.body) as response:
            assert response.status == 401
        for what in ("cmdline", "environ"):
            assert read_key(lease.api_key_file).encode() not in Path(f"/proc/{pid_of(tmp_path)}/{what}").read_bytes()


# ---------------------------------------------------------------- engines of others


@pytest.fixture
def outspoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is not ready yet is news at once, and asked again soon."""
    monkeypatch.setattr("llorch.node.engine_checks.QUIET_S", 0.0)
    monkeypatch.setattr("llorch.node.engine_checks.PROBE_MOST_S", 0.05)


@asynccontextmanager
async def engine(**behaviour: Any) -> AsyncIterator[str]:
    """An engine that someone else runs. `behaviour` may be changed while it runs."""
    behaviour = behaviour.setdefault("live", behaviour)

    async def health(_request: web.Request) -> web.Response:
        return web.json_response({}, status=behaviour.get("health", 200))

    async def props(_request: web.Request) -> web.Response:
        return web.json_response({"total_slots": 3, "default_generation_settings": {"n_ctx": 1024}})

    async def complete(request: web.Request) -> web.Response:
        if behaviour.get("key") and request.headers.get("Authorization") != f"Bearer {behaviour['key']}":
            return web.json_response({}, status=401)
        asked = await request.json()
        assert asked["model"] == "big" and asked.get("max_tokens", 1) == 1
        return web.json_response({"choices": []}, status=behaviour.get(request.path, 200))

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/props", props)
    app.router.add_post("/v1/completions", complete)
    app.router.add_post("/v1/embeddings", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def offer(root: Path, url: str, **changes: Any) -> Path:
    made = replace(Handoff(pool_id="hand", replica_id="r0", engine="vllm", url=url, model="big"), **changes)
    temporary = root / "engines" / ".tmp"
    temporary.write_bytes(render(made))
    return temporary.replace(root / "engines" / made.file_name)


async def test_a_handed_off_engine_is_routable_within_two_seconds_and_outlives_us(tmp_path: Path) -> None:
    async with engine() as url:
        async with supervised(tmp_path) as supervisor:
            began = time.monotonic()
            file = offer(tmp_path, url)
            await until(lambda: "hand" in supervisor.pools.ids() and ready(supervisor, "hand"))
            assert time.monotonic() - began < 2.0
            report = supervisor.pools.pool_report("hand")
            assert (report["slots_total"], report["ctx"], report["model"]) == (3, 1024, "big")
            assert supervisor.pools.acquire("hand", "t").url == url
        assert file.exists(), "it is not ours to remove"


async def test_it_is_ready_once_it_generates_and_not_before(tmp_path: Path, outspoken: None) -> None:
    live: dict[str, Any] = {"health": 503, "/v1/completions": 500}
    async with engine(live=live) as url, supervised(tmp_path) as supervisor:
        offer(tmp_path, url)
        await until(lambda: "hand" in supervisor.pools.ids())
        await until(lambda: supervisor.pools.health("hand")["last_error"] == "it is loading its model")
        live["health"] = 200
        await until(lambda: "HTTP 500" in supervisor.pools.health("hand")["last_error"])
        with pytest.raises(LlorchError) as caught:
            supervisor.pools.acquire("hand", "t")
        assert caught.value.code is Code.MODEL_NOT_AVAILABLE
        live["/v1/completions"] = 200
        await until(lambda: ready(supervisor, "hand"))
        assert supervisor.pools.health("hand")["last_error"] is None


async def test_a_model_for_embeddings_is_ready_too(tmp_path: Path) -> None:
    async with engine(**{"/v1/completions": 501}) as url, supervised(tmp_path) as supervisor:
        offer(tmp_path, url)
        await until(lambda: "hand" in supervisor.pools.ids() and ready(supervisor, "hand"))


async def test_its_key_is_read_from_its_file(tmp_path: Path, outspoken: None) -> None:
    async with engine(key="k" * 40) as url, supervised(tmp_path) as supervisor:
        key_file = tmp_path / "engine.key"
        key_file.write_text("# the key\nwrong\n")
        offer(tmp_path, url, api_key_file=str(key_file))
        await until(lambda: "hand" in supervisor.pools.ids())
        await until(lambda: supervisor.pools.health("hand")["last_error"] == "it refuses the key in api_key_file")
        key_file.write_text("# the key\n" + "k" * 40 + "\n")
        await until(lambda: ready(supervisor, "hand"))


async def test_an_engine_that_goes_away_is_noticed_and_one_that_comes_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llorch.node.engine_checks.CHECK_S", 0.05)
    async with supervised(tmp_path) as supervisor:
        async with engine() as url:
            offer(tmp_path, url)
            await until(lambda: "hand" in supervisor.pools.ids() and ready(supervisor, "hand"))
        await until(lambda: not ready(supervisor, "hand"))
        async with engine() as url:
            offer(tmp_path, url)
            await until(lambda: ready(supervisor, "hand"))


async def test_an_external_pool_is_offered_and_withdrawn_and_its_engine_is_left_alone(tmp_path: Path) -> None:
    async with engine() as url:
        external = replace(plan(engine="external", url=url), choices={"big": "big"})
        async with supervised(tmp_path, external) as supervisor:
            await until(lambda: ready(supervisor))
            report = supervisor.pools.pool_report("p")
            assert (report["engine"], report["replicas"][0]["owned"]) == ("external", False)
        assert left(tmp_path) == []


async def test_an_external_pool_with_a_url_that_is_not_allowed_says_so(tmp_path: Path) -> None:
    external = plan(engine="external", url="http://192.0.2.1:8000")
    async with supervised(tmp_path, external) as supervisor:
        await until(lambda: "not loopback" in (supervisor.pools.health("p")["last_error"] or ""))


# ---------------------------------------------------------------- what a killed agent leaves

AGENT = """
import asyncio, sys
from pathlib import Path
from tests.component.test_supervisor import plan, ready, supervised

async def main():
    async with supervised(Path(sys.argv[1]), plan()) as supervisor:
        while not ready(supervisor):
            await asyncio.sleep(0.02)
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_what_a_killed_agent_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert await agent.stdout.readline() == b"ready\n"
        orphan = pid_of(tmp_path)
    finally:
        agent.kill()
        await agent.wait()
    await until(lambda: not alive(orphan) and left(tmp_path) == [])
    (tmp_path / "pids" / "torn-r0.json").write_text('{"pid": ')
    async with supervised(tmp_path) as supervisor:
        assert left(tmp_path) == [] and supervisor.pools.ids() == []
