"""`llorch submit` against a real control and node: what it prints, how it ends, and what becomes of what it leaves."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.cluster import Cluster, eventually, expected_text, simulated
from tests.e2e.shared import end_of, kept, run, start, visiting

SLOW = simulated("slow", "slow", 1, "--delay-ms", "20", "--tokens", "5000")


async def it_was_canceled(llorch: Cluster) -> None:
    """The last task has ended so, and its slot is free."""

    async def ended() -> bool:
        task = (await llorch.get("/v2/tasks"))["tasks"][0]
        return (task["state"], task.get("finish_reason")) == ("canceled", "canceled")

    await eventually(ended, within_s=5.0, what="the task is canceled")

    async def free() -> bool:
        node = await llorch.get("/v2/nodes/a")
        return all(pool["slots_free"] == pool["slots_total"] and pool["in_flight"] == 0 for pool in node["pools"])

    await eventually(free, within_s=5.0, what="the slot is free")


@pytest.fixture(scope="module")
def one_for_both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    async def start(cluster: Cluster) -> None:
        await cluster.start_control()
        await cluster.start_node("a", [simulated("p0", "sim", 8), SLOW])

    with kept(tmp_path_factory.mktemp("submit"), start) as cluster:
        yield cluster


@pytest.fixture
async def llorch(one_for_both: Cluster) -> AsyncIterator[Cluster]:
    async with visiting(one_for_both) as cluster:
        yield cluster


async def test_submit_prints_the_answer_and_each_trouble_has_its_exit_code(llorch: Cluster) -> None:
    submit = ("submit", "-m", "sim", "--max-tokens", "5")
    piped, lines, ids, stranger, late = await asyncio.gather(
        run(llorch, *submit, "go on", stdin=b"t0 t1 "),
        run(llorch, *submit, "-s", "Be brief", "--seed", "1", "--temperature", "0", "--json", "Hello"),
        run(llorch, *submit, "--detach", "Hello"),
        run(llorch, *submit, "Hello", LLORCH_TOKEN="a-token-that-nobody-gave-out"),
        run(llorch, "submit", "-m", "slow", "--deadline", "500ms", "Hello"),
    )
    assert piped == (0, expected_text(5), "")
    events = [json.loads(line) for line in lines[1].splitlines()]
    assert [event["i"] for event in events if event["event"] == "token"] == [0, 1, 2, 3, 4]
    assert (events[0]["event"], events[-1]["event"], events[-1]["tokens_out"]) == ("started", "end", 5)
    assert (stranger[0], stranger[1], late[0]) == (3, "", 8)
    for _, _, err in (stranger, late):
        assert [line.partition(": ")[0] for line in err.splitlines()] == ["error", "why", "hint", "request-id"]
    assert await run(llorch, "task", "logs", ids[1].strip()) == (0, expected_text(5), "")


async def test_what_submit_leaves_is_cancelled_at_the_node(llorch: Cluster) -> None:
    interrupted = await start(llorch, "submit", "-m", "slow", "Hello")
    assert interrupted.stdout is not None
    await interrupted.stdout.readexactly(6)
    interrupted.send_signal(signal.SIGINT)
    code, _, err = await end_of(interrupted)
    assert (code, err) == (130, "canceled\n")
    await it_was_canceled(llorch)

    command = f"{sys.executable} -m llorch submit -m slow Hello | head -c 4; echo ${{PIPESTATUS[0]}}"
    shell = await asyncio.create_subprocess_exec(
        "bash", "-c", command, env=llorch.client_env(), stdin=DEVNULL, stdout=PIPE, stderr=PIPE
    )
    assert await end_of(shell) == (0, "t0 t141\n", "")
    await it_was_canceled(llorch)

    code, out, err = await run(llorch, "submit", "-m", "slow", "--timeout", "1s", "Hello")
    assert (code, out[:6]) == (8, "t0 t1 ")
    assert err == "error: it took longer than --timeout, 1 s\n"
    await it_was_canceled(llorch)
