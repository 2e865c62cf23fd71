"""Engines that crash, hang, will not start, will not end, or eat all memory: what becomes of their pool, by a whole
supervisor with real processes, and that no process and no port of theirs is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llorch import web
from llorch.config_pools import PoolSpec
from llorch.errors import Code, LlorchError
from llorch.node import log_pages
from llorch.node import pool_events as ev
from llorch.node.engine_keys import read_key
from llorch.node.engine_start import NoRoom
from llorch.node.engines.command import Command
from llorch.node.plans import Plan
from llorch.node.supervisor import Supervisor, Told
from tests.cluster import alive, descendants, eventually, expected_text
from tests.component.memory_cgroup import memory_cgroup
from tests.component.node_harness import POOL, ScriptedControl
from tests.component.test_engine_process import EATS, LASTS, LOADING, nothing_listens
from tests.component.test_node_process import node_process
from tests.component.test_supervisor import hurried, left, pid_of, plan, ready, supervised, until
from tests.starts import STARTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is left is looked for in /proc")

GIB = 1 << 30
SHELL = "/bin/sh", "-c"
SILENT = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("it listens", flush=True)
time.sleep(600)
"""
DEAF_TO_SIGTERM = "trap '' TERM; echo it will not end; while :; do sleep 600; done"


def command(*words: str, **changes: Any) -> Plan:
    spec = replace(PoolSpec(id="p", engine="command", model="m", slots=2, command=words), **changes)
    return Plan(spec, Command(), {"m": "m"})


@dataclass
class Seen:
    """What a supervisor tells of, and the engines that it had."""

    notes: list[ev.Note] = field(default_factory=list)
    ended: list[ev.EndTasks] = field(default_factory=list)
    states: list[str] = field(default_factory=list)

    @property
    def told(self) -> Told:
        return Told(note=self.notes.append, end_tasks=self.ended.append)

    def count(self, event: str) -> int:
        return sum(note.event == event for note in self.notes)

    def follow(self, supervisor: Supervisor, pool: str = "p") -> None:
        """Each state of a pool that is another than the one before."""

        def look(pool_id: str) -> None:
            state = str(supervisor.pools.pool_report(pool)["state"]) if pool_id == pool else ""
            if state and self.states[-1:] != [state]:
                self.states.append(state)

        supervisor.pools.subscribe(look)


@contextmanager
def nothing_left(root: Path, caplog: pytest.LogCaptureFixture) -> Iterator[list[tuple[int, int]]]:
    """(pid, port) of every engine that was started; afterwards none lives, listens, or has a file."""
    caplog.set_level("INFO", "llorch")
    before = descendants(os.getpid())
    engines: list[tuple[int, int]] = []
    yield engines
    found = re.findall(r"engine\.started .*pid=(\d+) port=(\d+)", caplog.text)
    engines += [(int(pid), int(port)) for pid, port in found]
    assert not [pid for pid, _ in engines if alive(pid)]
    assert all(nothing_listens(port) for _, port in engines)
    assert descendants(os.getpid()) <= before
    assert left(root) == [] and list((root / "ends").iterdir()) == []


def state(supervisor: Supervisor, pool: str = "p") -> str:
    return str(supervisor.pools.pool_report(pool)["state"])


def error(supervisor: Supervisor, pool: str = "p") -> str:
    return str(supervisor.pools.health(pool)["last_error"])


def shown(supervisor: Supervisor, pool: str = "p") -> list[str]:
    """The log of its engines, as it is read from afar."""
    page = log_pages.read(supervisor.files.logs, pool, ["r0"], 50, None)
    return [line["text"] for line in page["lines"]]


async def answer(supervisor: Supervisor, task: str, prompt: str, tokens: int = 4) -> str:
    """A task, through a lease of its pool."""
    lease = supervisor.pools.acquire("p", task)
    try:
        return await ask(lease.url, lease.api_key_file, prompt, tokens)
    finally:
        supervisor.pools.release(task)


async def ask(url: str, key_file: str | None, prompt: str, tokens: int) -> str:
    assert key_file is not None
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens}
    headers = {"Authorization": f"Bearer {read_key(key_file)}"}
    async with web.client_session() as http, http.post(f"{url}/v1/completions", json=body, headers=headers) as response:
        return str((await response.json())["choices"][0]["text"])


# ---------------------------------------------------------------- it ends


async def test_a_crash_loop_fails_its_pool_with_the_reason_and_the_log_and_no_other_pool(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Seen()
    bad = command(*SHELL, "echo no CUDA device found; exit 3", id="bad")
    with nothing_left(tmp_path, caplog) as engines:
        async with supervised(tmp_path, bad, plan(), clock=hurried(), told=seen.told) as supervisor:
            await until(lambda: state(supervisor, "bad") == "failed")
            assert seen.count("pool.failed") == 1 and seen.count("engine.ended") == 5
            assert error(supervisor, "bad") == "exited with code 3: no CUDA device found"
            assert shown(supervisor, "bad").count("no CUDA device found") == 5
            report = supervisor.pools.pool_report("bad")
            assert (report["slots_free"], report["operation"]["state"]) == (0, "failed")
            with pytest.raises(LlorchError) as caught:
                supervisor.pools.acquire("bad", "t")
            assert caught.value.code is Code.MODEL_NOT_AVAILABLE
            await until(lambda: ready(supervisor))
            assert await answer(supervisor, "t", "go") == expected_text(4)
            assert not any("bad-" in name for name in left(tmp_path))
            supervisor.post(ev.Load("bad"))  # a person has looked: it is tried anew, five times
            await until(lambda: seen.count("pool.failed") == 2)
    assert len(engines) == 11


@pytest.mark.slow
async def test_one_that_dies_at_every_task_fails_its_pool_and_its_words_are_not_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It becomes ready each time, which forgives nothing before it has lasted."""
    seen = Seen()
    with nothing_left(tmp_path, caplog):
        async with supervised(
            tmp_path, plan("--die-after", "2", "--obey"), clock=hurried(), told=seen.told
        ) as supervisor:
            for number in range(1, 6):
                await until(lambda: ready(supervisor))
                with pytest.raises(aiohttp.ClientError):
                    await answer(supervisor, f"t{number}", "a secret prompt")
                await until(lambda number=number: seen.count("engine.ended") == number)
            await until(lambda: state(supervisor) == "failed")
            assert error(supervisor) == "exited with code 1"


@pytest.mark.parametrize(
    ("then", "how"),
    [
        ("time.sleep(0.1); print('tensor blk.0 is missing', flush=True); os._exit(7)", "exited with code 7: tensor"),
        ("time.sleep(0.1); os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV: loading"),
    ],
)
@pytest.mark.slow
async def test_one_that_ends_while_it_loads_fails_its_pool(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, then: str, how: str
) -> None:
    seen = Seen()
    loads = command(sys.executable, "-c", LOADING, "{port}", then)
    with nothing_left(tmp_path, caplog) as engines:
        async with supervised(tmp_path, loads, clock=hurried(), told=seen.told) as supervisor:
            seen.follow(supervisor)
            await until(lambda: state(supervisor) == "failed")
            assert error(supervisor).startswith(how)
    assert len(engines) == 5
    assert "ready" not in seen.states and {"starting", "loading", "failed"} <= set(seen.states)


# ---------------------------------------------------------------- it never becomes ready


@dataclass(frozen=True, slots=True)
class Large:
    """A model of which only its size counts."""

    path: Path
    size_bytes: int = GIB


async def test_one_that_never_gets_ready_has_its_load_time_and_that_of_its_models_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """1 s and 20 s for its GiB, on a hurried clock."""

    async def model(_ref: str, _said: Any) -> Large:
        return Large(tmp_path / "m.gguf")

    clock = hurried()
    never = command(sys.executable, "-c", LOADING, "{port}", f"{LASTS} # " + "{model}")
    with nothing_left(tmp_path, caplog):
        async with supervised(
            tmp_path, never, clock=clock, load_timeout_s=1.0, starts=replace(STARTS, model=model)
        ) as supervisor:
            await until(lambda: state(supervisor) == "loading")
            began, pid = clock(), pid_of(tmp_path)
            await until(lambda: not alive(pid))
            assert clock() - began > 20.0
            assert error(supervisor) == "it was not ready within 21 s: it is loading its model"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((sys.executable, "-c", SILENT, "{port}"), "no answer to /health within 0 s"),
        ((*SHELL, "echo it sleeps; exec sleep 600"), "nothing listens at its url"),
    ],
    ids=["accepts and never answers", "never listens"],
)
@pytest.mark.slow
async def test_one_that_hangs_while_it_loads_is_killed_and_started_anew(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    why: str,
) -> None:
    monkeypatch.setattr("llorch.node.probing.HEALTH_TIMEOUT_S", 0.1)
    seen = Seen()
    with nothing_left(tmp_path, caplog) as engines:
        async with supervised(
            tmp_path, command(*words), clock=hurried(), load_timeout_s=40.0, told=seen.told
        ) as supervisor:
            await until(lambda: seen.count("engine.ended") == 2)
            assert error(supervisor) == f"it was not ready within 40 s: {why}"
    assert len(engines) in (2, 3)


@pytest.mark.slow
async def test_one_that_hangs_while_it_loads_and_ignores_sigterm_is_killed_after_the_grace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Seen()
    stubborn = command(*SHELL, DEAF_TO_SIGTERM)
    with nothing_left(tmp_path, caplog):
        async with supervised(tmp_path, stubborn, load_timeout_s=0.3, stop_grace_s=0.4, told=seen.told) as supervisor:
            await until(lambda: seen.count("engine.ended") == 1)
            assert "not ready within" in error(supervisor)
            assert "engine.exited" in caplog.text and "killed by SIGKILL" in caplog.text


async def test_memory_that_others_hold_is_waited_for_and_what_never_fits_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llorch.node.engine_start.ROOM_POLL_S", 0.02)
    free = asyncio.Event()

    async def model(_ref: str, _said: Any) -> Large:
        return Large(tmp_path / "m.gguf")

    async def room(_start: object, one: Plan, _model: Any) -> NoRoom | None:
        if one.spec.id == "never":
            return NoRoom("it needs 90 GiB of 80", hopeless=True)
        return None if free.is_set() else NoRoom("2 GiB free of 80", hopeless=False)

    waits = command(sys.executable, "-c", LOADING, "{port}", f"{LASTS} # " + "{model}")
    never = replace(waits, spec=replace(waits.spec, id="never"))
    with nothing_left(tmp_path, caplog) as engines:
        async with supervised(tmp_path, waits, never, starts=replace(STARTS, model=model, room=room)) as supervisor:
            await until(lambda: state(supervisor, "never") == "failed")
            assert error(supervisor, "never") == "it needs 90 GiB of 80"
            told = supervisor.pools.pool_report("p")["operation"]
            assert told["message"] == "it waits for memory: 2 GiB free of 80" and state(supervisor) == "starting"
            free.set()
            await until(lambda: state(supervisor) == "loading")
    assert len(engines) == 1


# ---------------------------------------------------------------- it hangs


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.node.probing.HEALTH_TIMEOUT_S", 0.1)


@pytest.mark.parametrize("fault", ["deaf", pytest.param("hang", marks=pytest.mark.slow)])
async def test_one_that_hangs_ends_its_tasks_is_drained_killed_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, impatient: None, fault: str
) -> None:
    seen = Seen()
    obeys = plan("--obey", "--ignore-sigterm")
    with nothing_left(tmp_path, caplog) as engines:
        async with supervised(tmp_path, obeys, stall_timeout_s=0.5, stop_grace_s=0.2, told=seen.told) as supervisor:
            await until(lambda: ready(supervisor))
            first = pid_of(tmp_path)
            task = asyncio.create_task(answer(supervisor, "t", f"go #x!{fault}@3", tokens=9))
            await until(lambda: seen.count("engine.stalled") == 1)
            assert [(each.code, each.task_ids) for each in seen.ended] == [(Code.ENGINE_STALLED, ("t",))]
            assert "made no token" in seen.ended[0].reason and error(supervisor) == seen.ended[0].reason
            assert not ready(supervisor) and alive(first), "it is drained: its tasks are told first"
            with pytest.raises(LlorchError):
                supervisor.pools.acquire("p", "another")
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await until(lambda: not alive(first))
            await until(lambda: ready(supervisor))
            assert await answer(supervisor, "u", "go") == expected_text(4)
            assert seen.count("engine.stalled") == 1 and error(supervisor) == "None"
    assert len(engines) == 2


@pytest.mark.slow
async def test_one_that_has_gone_deaf_before_its_task_came_is_found_out_all_the_same(
    tmp_path: Path, impatient: None
) -> None:
    """Nothing of it was ever heard while it was busy: that it counts was known from before."""
    seen = Seen()
    async with supervised(tmp_path, plan("--obey"), stall_timeout_s=0.5, told=seen.told) as supervisor:
        await until(lambda: ready(supervisor))
        ((_, _, _, handoff),) = supervisor.pools.replicas()
        assert handoff is not None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await ask(handoff.url, handoff.api_key_file, "go #x!deaf@0", 9)
        first = pid_of(tmp_path)
        supervisor.pools.acquire("p", "t")
        await until(lambda: seen.count("engine.stalled") == 1)
        supervisor.pools.release("t")
        await until(lambda: not alive(first))


async def test_a_busy_one_whose_counters_move_is_never_restarted(tmp_path: Path, impatient: None) -> None:
    """Four times as long as a stall, and nobody hears a byte of its answer before it is whole."""
    seen = Seen()
    slow = plan("--delay-ms", "60", "--tokens", "100")
    async with supervised(tmp_path, slow, stall_timeout_s=0.4, told=seen.told) as supervisor:
        await until(lambda: ready(supervisor))
        first, began = pid_of(tmp_path), time.monotonic()
        assert await answer(supervisor, "t", "go", tokens=28) == expected_text(28)
        assert time.monotonic() - began > 1.6
        assert ready(supervisor) and pid_of(tmp_path) == first
        assert seen.count("engine.stalled") == 0 and seen.ended == []


# ---------------------------------------------------------------- it will not end


@pytest.mark.parametrize(
    "wish",
    [pytest.param(ev.Unload("p"), id="unload"), pytest.param(ev.Restart("p"), id="restart", marks=pytest.mark.slow)],
)
async def test_one_that_ignores_sigterm_is_killed_after_the_grace_whoever_asks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wish: ev.Event
) -> None:
    with nothing_left(tmp_path, caplog) as engines:
        async with supervised(tmp_path, plan("--ignore-sigterm"), stop_grace_s=0.4) as supervisor:
            await until(lambda: ready(supervisor))
            first, began = pid_of(tmp_path), time.monotonic()
            supervisor.post(wish)
            await until(lambda: not alive(first))
            assert 0.4 <= time.monotonic() - began < 5.0
            if isinstance(wish, ev.Unload):
                await until(lambda: state(supervisor) == "stopped")
                await until(lambda: left(tmp_path) == [])
            else:
                await until(lambda: ready(supervisor) and pid_of(tmp_path) != first)
            assert error(supervisor) == "None", "it was told to end, and did"
    assert len(engines) == (1 if isinstance(wish, ev.Unload) else 2)


# ---------------------------------------------------------------- it eats all memory

# Stands for an agent in a cgroup with its engines, on a hurried clock.
AGENT = """
import asyncio, os, sys
from pathlib import Path
from llorch import logs
from tests.component.test_engine_failures import command, error, shown, state, supervised, hurried, until
async def main():
    Path(sys.argv[2]).write_text(str(os.getpid()))
    eats = command(sys.executable, "-c", sys.argv[3], "itself")
    async with supervised(Path(sys.argv[1]), eats, clock=hurried()) as supervisor:
        await until(lambda: state(supervisor) == "failed")
        print(error(supervisor), len(shown(supervisor)), sep="\t")
asyncio.run(main())
"""


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.slow
async def test_one_that_the_kernel_kills_for_memory_fails_its_pool_and_its_agent_lives(
    tmp_path: Path, version: int
) -> None:
    with memory_cgroup(version, 160 * 1024 * 1024) as procs:
        agent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", AGENT, str(tmp_path), str(procs), EATS, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(agent.communicate(), 50.0)
        assert agent.returncode == 0
        why, lines = out.decode().removesuffix("\n").split("\t")
        assert why == "killed by SIGKILL: out of memory" and int(lines) >= 5
        assert procs.read_text() == ""
    assert left(tmp_path) == [] and list((tmp_path / "ends").iterdir()) == []


# ---------------------------------------------------------------- a whole node


@pytest.mark.slow
async def test_a_node_with_a_pool_that_fails_and_one_that_hangs_stays_online_and_serves(tmp_path: Path) -> None:
    pools = [
        {"id": "bad", "engine": "simulated", "model": "b", "args": ["--no-such-flag"]},
        {"id": POOL, "engine": "simulated", "model": "m", "slots": 2, "args": ["--obey"]},
    ]
    async with node_process(tmp_path, pools=pools, stall_timeout=0.6, stop_grace=1.0) as node:
        link = await node.pool_ready()
        pids = tmp_path / "data" / ".runtime"
        first = pid_of(pids, f"{POOL}-r0")
        hangs = link.open({"model": "m", "prompt": "go #x!hang@3", "max_tokens": 9})
        await eventually(lambda: hangs.tail is not None)
        assert hangs.tail is not None and hangs.tail["error"]["code"] == "ENGINE_STALLED"
        assert hangs.text == expected_text(3) and hangs.events_seen[-1][0] == "error"
        await eventually(lambda: not alive(first))
        await eventually(lambda: pool_now(node.control, POOL).get("ready") and pid_of(pids, f"{POOL}-r0") != first)
        works = link.open({"model": "m", "prompt": "go", "max_tokens": 4})
        await eventually(lambda: works.tail is not None)
        assert works.text == expected_text(4)
        await eventually(lambda: "no-such-flag" in (pool_now(node.control, "bad").get("last_error") or ""))
        assert pool_now(node.control, "bad")["slots_free"] == 0
        engines = descendants(node.process.pid)
    assert not [pid for pid in engines if alive(pid)]


def pool_now(control: ScriptedControl, pool: str) -> dict[str, Any]:
    """As it was last told; nothing if it never was."""
    for report in reversed([*control.registered, *control.beats]):
        for each in report.get("pools") or ():
            if each["pool_id"] == pool:
                return dict(each)
    return {}
