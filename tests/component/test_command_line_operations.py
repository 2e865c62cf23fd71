"""Operating nodes and pools from the command line, against a scripted control: what is sent, what is said while it
runs, how it ends, and how engines' logs are read."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llorch.backoff import Backoff
from llorch.cli import operations, pool_words
from llorch.client import resume
from llorch.errors import Code
from tests.cluster import eventually
from tests.component.command_line import CommandLine, Ran
from tests.component.scripted_control import (
    SSE,
    Answer,
    ScriptedControl,
    Then,
    answer,
    event,
    hang_up,
    no_answer,
    refusal,
    scripted,
    stream,
)
from tests.component.test_command_line import NODE, POOL
from tests.component.test_command_line_processes import finished, started_process

ROOT = Path(__file__).parent.parent.parent
BEGAN = "2025-01-02T03:04:05.000Z"
LOGS = "GET /v2/nodes/n1/pools/p0/logs"
LOOK = "GET /v2/nodes/n1"


def operation(kind: str, state: str = "running", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "state": state, "started_at": BEGAN, "model": None, "message": None} | more


def pooled(kind: str, state: str = "running", **more: Any) -> dict[str, Any]:
    """The view of p0 with this operation; `more` is of the pool, but for the operation's message."""
    message = more.pop("message", None)
    return {**POOL, "operation": operation(kind, state, message=message), **more}


def noded(*pools: dict[str, Any], **more: Any) -> Answer:
    return answer({**NODE, "pools": list(pools)} | more)


def taken(pool: dict[str, Any]) -> Answer:
    return answer({"node_id": "n1", "pool": {key: value for key, value in pool.items() if key != "node_id"}}, 202)


@pytest.fixture
async def control() -> AsyncIterator[ScriptedControl]:
    async with scripted(lasting=True) as running:
        yield running


@pytest.fixture
def llorch(control: ScriptedControl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.setattr(operations, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(operations, "UNSEEN_FOR_S", 0.1)
    monkeypatch.setattr(operations, "CONTROL_AWAY_S", 0.2)
    monkeypatch.setattr(resume, "RESUME_FOR_S", 0.2)
    monkeypatch.setattr(resume, "RESUME_BACKOFF", Backoff(first_s=0.001, most_s=0.02))
    line = CommandLine(monkeypatch, tmp_path)
    line.env(LLORCH_URL=control.url, LLORCH_TOKEN="t")
    return line


def lines_of(ran: Ran) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in ran.err.splitlines() if line.startswith(("error", "why", "hint")))


# ---------------------------------------------------------------- what is sent


@pytest.mark.parametrize(
    ("argv", "kind", "body"),
    [
        (("drain", "n1/p0"), "drain", {}),
        (("drain", "n1/p0", "--deadline", "10m", "--reason", "new disk"), "drain",
         {"deadline_s": 600.0, "reason": "new disk"}),
        (("undrain", "n1/p0"), "undrain", {}),
        (("load", "n1/p0"), "load", {}),
        (("load", "n1/p0", "b"), "load", {"model": "b"}),
        (("unload", "n1/p0", "--deadline", "0"), "unload", {"deadline_s": 0.0}),
        (("reload", "n1/p0", "hf:a/b"), "reload", {"model": "hf:a/b"}),
        (("restart", "n1/p0", "--deadline", "1.5s"), "restart", {"deadline_s": 1.5}),
        (("purge", "n1/p0"), "purge", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wait", [True, False])
async def test_each_operation_on_a_pool_is_asked_for_with_its_wish(
    control: ScriptedControl, llorch: CommandLine, argv: tuple[str, ...], kind: str, body: dict[str, Any], wait: bool
) -> None:
    what = f"POST /v2/nodes/n1/pools/p0/{kind}"
    control.on(what, taken(pooled(kind)))
    control.on(LOOK, noded(pooled(kind, "done")))
    ran = await llorch("pool", *argv, *(() if wait else ("--no-wait",)))
    assert (ran.code, ran.out) == (0, "")
    assert [asked.json() for asked in control.asked(what)] == [body]
    assert len(control.requests) == 1 + wait


@pytest.mark.parametrize("name", ["n1", "n1/", "/p0", "n1/p0/x", ""])
@pytest.mark.parametrize("command", [("pool", "drain"), ("pool", "show"), ("pool", "logs"), ("logs",)])
async def test_what_names_no_pool_is_a_usage_error(
    control: ScriptedControl, llorch: CommandLine, command: tuple[str, ...], name: str
) -> None:
    ran = await llorch(*command, name)
    assert (ran.code, lines_of(ran)["hint"]) == (2, "NODE/POOL; `llorch pool ls -q` lists them")
    assert control.requests == []


async def test_a_deadline_that_is_none_is_a_usage_error(control: ScriptedControl, llorch: CommandLine) -> None:
    for argv in (("pool", "drain", "n1/p0"), ("node", "drain", "n1")):
        ran = await llorch(*argv, "--deadline", "soon")
        assert (ran.code, "--deadline" in lines_of(ran)["error"]) == (2, True)
    assert control.requests == []


# ---------------------------------------------------------------- waiting, and how it ends


async def test_an_operation_is_followed_by_a_line_per_change(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/nodes/n1/pools/p0/reload", taken(pooled("reload", in_flight=2)))
    control.on(
        LOOK,
        noded(pooled("reload", in_flight=1)),
        noded(pooled("reload", message="proving it")),
        noded(pooled("reload", "done")),
    )
    ran = await llorch("pool", "reload", "n1/p0", "b")
    assert ran == (0, "", "n1/p0: reloading b, 2 tasks run\nn1/p0: reloaded b\n")


async def test_what_only_counts_on_gets_a_line_now_and_then(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_words, "SAME_LINE_EVERY_S", 0.0)
    control.on("POST /v2/nodes/n1/pools/p0/drain", taken(pooled("drain", in_flight=2)))
    control.on(LOOK, *(noded(pooled("drain", in_flight=left)) for left in (2, 1, 1)), noded(pooled("drain", "done")))
    ran = await llorch("pool", "drain", "n1/p0")
    assert ran.err.splitlines() == [
        "n1/p0: draining, 2 tasks run", "n1/p0: draining, 1 task runs", "n1/p0: drained",
    ]  # fmt: skip


async def test_on_a_terminal_one_line_is_written_again_and_again_and_goes(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("operations", "answer"):
        monkeypatch.setattr(f"llorch.cli.{module}.is_terminal", lambda asked: asked is sys.stderr)
    control.on("POST /v2/nodes/n1/pools/p0/drain", taken(pooled("drain", in_flight=2)))
    control.on(LOOK, noded(pooled("drain", in_flight=1)), noded(pooled("drain", "done")))
    ran = await llorch("pool", "drain", "n1/p0")
    assert ran.err == (
        "\r\x1b[Kn1/p0: draining, 2 tasks run (0 s)\r\x1b[Kn1/p0: draining, 1 task runs (0 s)\r\x1b[Kn1/p0: drained\n"
    )


async def test_where_there_was_nothing_to_do_nothing_is_waited_for(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    for told in (pooled("undrain", "done"), POOL, pooled("reload", "failed")):
        control.on("POST /v2/nodes/n1/pools/p0/undrain", taken(told))
        assert await llorch("pool", "undrain", "n1/p0") == (0, "", "n1/p0: takes tasks again\n")
    assert control.asked(LOOK) == []


@pytest.mark.parametrize("early", [True, False], ids=["in the answer", "later"])
async def test_a_failed_operation_is_1_with_the_reason_and_where_to_look(
    control: ScriptedControl, llorch: CommandLine, early: bool
) -> None:
    failed = pooled("reload", "failed", last_error="out of memory\nby far")
    control.on("POST /v2/nodes/n1/pools/p0/reload", taken(failed if early else pooled("reload")))
    control.on(LOOK, noded(failed))
    ran = await llorch("pool", "reload", "n1/p0", "b")
    assert (ran.code, ran.out, lines_of(ran)) == (
        1, "",
        {"error": "n1/p0: reloading b failed", "why": "out of memory by far", "hint": "llorch pool logs n1/p0"},
    )  # fmt: skip
    control.on(LOOK, noded({**failed, "operation": operation("reload", "failed", message="it has no such model")}))
    if not early:
        assert lines_of(await llorch("pool", "reload", "n1/p0", "b"))["why"] == "it has no such model"


async def test_no_wait_says_where_to_look(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/nodes/n1/pools/p0/drain", taken(pooled("drain")))
    ran = await llorch("pool", "drain", "n1/p0", "--no-wait")
    assert ran == (0, "", "n1/p0: draining: llorch pool show n1/p0 says how far it is\n")


async def test_the_pool_is_the_result_for_those_who_ask_for_one(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/nodes/n1/pools/p0/drain", taken(pooled("drain")))
    control.on(LOOK, noded(pooled("drain", "done")))
    ran = await llorch("pool", "drain", "n1/p0", "--json")
    assert (ran.code, ran.err) == (0, "n1/p0: draining\n")
    assert json.loads(ran.out) == pooled("drain", "done")  # with its node, also where the view of the node had none
    ran = await llorch("pool", "drain", "n1/p0", "--no-wait", "-o", "yaml")
    assert yaml.safe_load(ran.out) == pooled("drain")
    assert (await llorch("pool", "drain", "n1/p0", "-q")).out == "n1/p0\n"


async def test_when_the_time_is_up_the_operation_is_not(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/nodes/n1/pools/p0/drain", taken(pooled("drain")))
    control.on(LOOK, noded(pooled("drain")))
    ran = await llorch("pool", "drain", "n1/p0", "--timeout", "150ms")
    assert (ran.code, lines_of(ran)["error"]) == (8, "it took longer than --timeout, 0.15 s")
    assert lines_of(ran)["hint"] == "the node goes on with it: llorch pool show n1/p0 says how far it is"
    control.on("POST /v2/nodes/n1/pools/p0/drain", no_answer)
    ran = await llorch("pool", "drain", "n1/p0", "--timeout", "150ms")
    assert (ran.code, "hint" in lines_of(ran)) == (8, False)


@pytest.mark.parametrize(
    "pools", [[POOL], [], [pooled("drain") | {"operation": operation("drain", started_at="later")}]],
    ids=["no operation", "no pool", "another one"],
)  # fmt: skip
async def test_an_operation_that_is_not_there_any_more_is_not_waited_for(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch, pools: list[dict[str, Any]]
) -> None:
    control.on("POST /v2/nodes/n1/pools/p0/drain", taken(pooled("drain")))
    control.on(LOOK, noded(*pools))
    ran = await llorch("pool", "drain", "n1/p0")
    assert (ran.code, lines_of(ran)["hint"]) == (1, "llorch pool show n1/p0")
    assert "is not among what the node reports any more" in lines_of(ran)["error"]
    monkeypatch.setattr(operations, "UNSEEN_FOR_S", 5.0)
    control.on(LOOK, *([noded(*pools)] * 3), noded(pooled("drain", "done")))  # an older view than the answer was
    assert (await llorch("pool", "drain", "n1/p0")).code == 0


async def test_a_node_that_goes_offline_is_not_waited_for(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/nodes/n1/pools/p0/drain", taken(pooled("drain")))
    control.on("POST /v2/nodes/n1/drain", answer({"node_id": "n1", "draining": True}, 202))
    for state in ("offline", "quarantined"):
        control.on(LOOK, noded(pooled("drain"), state=state))
        for argv in (("pool", "drain", "n1/p0"), ("node", "drain", "n1")):
            ran = await llorch(*argv)
            assert (ran.code, lines_of(ran)["hint"]) == (1, "llorch node show n1")
            assert lines_of(ran)["error"] == f"node n1 is {state} now, so nobody knows how far it is"


async def test_a_control_that_is_away_for_a_while_is_waited_for_and_one_that_stays_away_is_not(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.on("POST /v2/nodes/n1/pools/p0/drain", taken(pooled("drain")))
    missing = refusal(Code.NODE_NOT_FOUND, "no such node")
    control.on(LOOK, hang_up, hang_up, missing, noded(pooled("drain", "done")))
    ran = await llorch("pool", "drain", "n1/p0")
    assert (ran.code, ran.err.splitlines()[1:]) == (
        0, ["n1/p0: the control is away or has just started; looking again", "n1/p0: drained"]
    )  # fmt: skip
    control.on(LOOK, hang_up)
    assert (await llorch("pool", "drain", "n1/p0")).code == 5
    control.on(LOOK, missing)
    assert (await llorch("pool", "drain", "n1/p0")).code == 4
    control.on(LOOK, refusal(Code.FORBIDDEN, "not you"))
    assert (await llorch("pool", "drain", "n1/p0")).code == 3


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (refusal(Code.NODE_NOT_FOUND), 4),
        (refusal(Code.POOL_NOT_FOUND), 4),
        (refusal(Code.CONFLICT), 1),
        (refusal(Code.NODE_LOST), 1),
        (refusal(Code.FORBIDDEN), 3),
        (refusal(Code.INVALID_REQUEST), 2),
        (hang_up, 5),
    ],
)
async def test_what_is_refused_ends_in_its_code(
    control: ScriptedControl, llorch: CommandLine, said: Answer, code: int
) -> None:
    control.on("POST /v2/nodes/n1/pools/p0/restart", said)
    control.on("POST /v2/nodes/n1/drain", said)
    for argv in (("pool", "restart", "n1/p0"), ("node", "drain", "n1")):
        ran = await llorch(*argv)
        assert (ran.code, ran.out) == (code, "")
        assert ran.err.startswith("error: ")


async def test_an_interrupt_leaves_the_operation_to_the_node(control: ScriptedControl, tmp_path: Path) -> None:
    control.on("POST /v2/nodes/n1/pools/p0/drain", taken(pooled("drain")))
    control.on(LOOK, noded(pooled("drain")))
    env = {"HOME": str(tmp_path), "LLORCH_URL": control.url, "LLORCH_TOKEN": "t", "PYTHONPATH": str(ROOT)}
    async with started_process("pool", "drain", "n1/p0", env=env) as process:
        await eventually(lambda: control.asked(LOOK), what="a look")
        process.send_signal(signal.SIGINT)
        left = "left; the node goes on with it: llorch pool show n1/p0 says how far it is\n"
        assert await finished(process) == (130, "", f"n1/p0: draining\n{left}")


# ---------------------------------------------------------------- nodes


async def test_a_node_is_drained_when_all_its_pools_are(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on("POST /v2/nodes/n1/drain", answer({"node_id": "n1", "draining": True}, 202))
    second = pooled("drain") | {"pool_id": "p1"}
    control.on(
        LOOK,
        noded(POOL),  # as it was before
        noded(pooled("drain", in_flight=1), second, draining=True),
        noded(pooled("drain", "done"), pooled("drain", "done", in_flight=1), draining=True),
        noded(pooled("drain", "done"), pooled("drain", "done"), draining=True),
    )
    ran = await llorch("node", "drain", "n1", "--deadline", "10m", "--reason", "kernel update")
    assert (ran.code, ran.out, ran.err.splitlines()[-1]) == (0, "", "n1: drained")
    (asked,) = control.asked("POST /v2/nodes/n1/drain")
    assert asked.json() == {"deadline_s": 600.0, "reason": "kernel update"}
    assert len(control.asked(LOOK)) == 4


async def test_a_node_that_takes_tasks_again_or_fails_to_drain_says_so(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("POST /v2/nodes/n1/undrain", answer({"node_id": "n1", "draining": False}, 202))
    control.on(LOOK, noded(POOL, draining=True), noded(pooled("undrain")), noded(pooled("undrain", "done")))
    ran = await llorch("node", "undrain", "n1")
    assert ran == (0, "", "n1: taking tasks again\nn1: takes tasks again\n")
    control.on("POST /v2/nodes/n1/drain", answer({"node_id": "n1", "draining": True}, 202))
    control.on(LOOK, noded(pooled("drain", "failed", message="it does not end"), draining=True))
    ran = await llorch("node", "drain", "n1")
    assert (ran.code, lines_of(ran)) == (
        1,
        {"error": "n1: draining failed", "why": "pool p0: it does not end", "hint": "llorch node show n1"},
    )


async def test_a_node_is_removed_and_one_that_lives_is_said_to_come_back(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on("DELETE /v2/nodes/n1", answer({"success": True}))
    control.on(LOOK, noded(online=False, state="offline"))
    assert await llorch("node", "rm", "n1") == (0, "", "removed n1\n")
    control.on(LOOK, noded())
    ran = await llorch("node", "rm", "n1", "--json")
    assert (ran.code, json.loads(ran.out)) == (0, {"node_id": "n1", "success": True})
    assert "register again" in lines_of(ran)["hint"]
    control.on(LOOK, refusal(Code.NODE_NOT_FOUND))
    assert (await llorch("node", "rm", "n1")).code == 4
    assert len(control.asked("DELETE /v2/nodes/n1")) == 2


# ---------------------------------------------------------------- why a pool takes no tasks


async def test_lists_and_status_say_why_a_pool_takes_no_tasks(control: ScriptedControl, llorch: CommandLine) -> None:
    pools = [
        {**POOL, "state": "draining", "draining": True, "held": ["operator: kernel update"]},
        {**POOL, "pool_id": "p1", "held": ["owner: 6.2 GiB of GPU 0 are others'"]},
        {**POOL, "pool_id": "p2", "loading": "b"},
        pooled("reload", "failed", message="no such file") | {"pool_id": "p3"},
        {**POOL, "pool_id": "p4", "held": [], "loading": None, "operation": None},
    ]
    drained = {**NODE, "node_id": "n2", "draining": True, "state": "draining", "pools": [pools[0]]}
    control.on("GET /v2/pools", answer({"pools": [*pools, {**pools[0], "node_id": "n2"}]}))
    control.on("GET /v2/nodes", answer({"nodes": [NODE, drained]}))
    control.on("GET /v2/nodes/n2", answer(drained))
    control.on("GET /v2/catalog", answer({"models": {}, "nodes": {}}))
    control.on("GET /readyz", answer({"status": "ok", "version": "9", "role": "control"}))
    rows = (await llorch("pool", "ls")).out.splitlines()[1:]
    words = [
        "draining (operator: kernel update)", "held: owner: 6.2 GiB of GPU 0 are others'", "loading b",
        "reloading failed: no such file",
    ]  # fmt: skip
    assert all(word in row for word, row in zip(words, rows, strict=False))
    assert "  draining  " in rows[0]  # once, though state and wish both say so
    assert rows[4].split()[-2:] == ["-", "-"]
    ran = await llorch("status")
    notes = [line.removeprefix("note     ") for line in ran.out.splitlines() if line.startswith("note ")]
    assert notes == [
        "node n2: draining (operator: kernel update)",
        *(f"pool n1/p{number}: {word}" for number, word in enumerate(words)),
    ]
    assert ran.code == 0
    assert json.loads((await llorch("status", "--json")).out)["notes"] == notes
    for argv in (("node", "ls"), ("node", "show", "n2")):
        assert "draining (operator: kernel update)" in (await llorch(*argv)).out


async def test_a_pool_is_shown_with_all_that_is_known_of_it(control: ScriptedControl, llorch: CommandLine) -> None:
    replica = {"id": "r0", "state": "ready", "owned": True, "slots_free": 3, "breaker": "closed"}
    pool = pooled("reload", "failed", message="no such file", replicas=[replica], held=["hours: 18:00-08:00"])
    pool |= {"breaker": {"state": "ejected", "reason": "5 tasks in a row failed"}, "last_error": "oh"}
    control.on(LOOK, noded(pool))
    shown = (await llorch("pool", "show", "n1/p0")).out
    for words in (
        f"reloading failed: no such file (since {BEGAN})", "ejected: 5 tasks in a row failed", "hours: 18:00-08:00",
        "oh\n", "REPLICA", "r0 ",
    ):  # fmt: skip
        assert words in shown
    assert json.loads((await llorch("pool", "show", "n1/p0", "--json")).out) == pool
    assert (await llorch("pool", "show", "n1/p0", "-q")).out == "n1/p0\n"
    assert (await llorch("pool", "show", "n1/p1")).code == 4
    assert "no pool p1" in lines_of(await llorch("pool", "show", "n1/p1"))["error"]


# ---------------------------------------------------------------- logs


def written(*texts: str, replica: str = "r0", cursor: str = "c1") -> dict[str, Any]:
    return {"lines": [{"replica": replica, "text": text} for text in texts], "cursor": cursor}


def logged(*texts: str, cursor: str = "c1") -> bytes:
    return event("log", written(*texts, cursor=cursor)).replace(b"event:", f"id: {cursor}\nevent:".encode())


@pytest.mark.parametrize("command", [("logs",), ("pool", "logs")])
async def test_an_engines_log_is_printed(
    control: ScriptedControl, llorch: CommandLine, command: tuple[str, ...]
) -> None:
    control.on(LOGS, answer(written("one\x1b[2J", "ünï")))
    assert await llorch(*command, "n1/p0") == (0, "one\x1b[2J\nünï\n", "")
    assert control.requests[-1].path.endswith("/logs?lines=200")
    assert (await llorch(*command, "n1/p0", "-n", "7")).code == 0
    assert control.requests[-1].path.endswith("/logs?lines=7")
    ran = await llorch(*command, "n1/p0", "--json")
    assert [json.loads(line) for line in ran.out.splitlines()] == written("one\x1b[2J", "ünï")["lines"]
    assert (await llorch(*command, "n1/p0", "-q")).code == 2
    assert (await llorch(*command, "n1/p0", "--lines", "0")).code == 2
    control.on(LOGS, refusal(Code.POOL_NOT_FOUND))
    assert (await llorch(*command, "n1/p0")).code == 4


async def test_lines_say_whose_they_are_where_there_are_several_replicas(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    both = written("a")["lines"] + written("b", replica="r1")["lines"]
    control.on(LOGS, answer({"lines": both, "cursor": "c"}))
    assert (await llorch("logs", "n1/p0")).out == "r0 | a\nr1 | b\n"


async def test_a_terminal_is_spared_control_characters_unless_raw(
    control: ScriptedControl, llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llorch.cli.logs.is_terminal", lambda _stream: True)
    control.on(LOGS, answer(written("one\x1b[2J")))
    assert (await llorch("logs", "n1/p0")).out == "one[2J\n"
    assert (await llorch("logs", "n1/p0", "--raw")).out == "one\x1b[2J\n"


async def test_a_followed_log_goes_on_where_it_broke_off(control: ScriptedControl, llorch: CommandLine) -> None:
    control.on(
        LOGS,
        stream(logged("one"), b": ping\n\n", logged("two", cursor="c 2"), then=Then.CUT),
        stream(event("error", {"code": "NODE_LOST", "message": "the node is away"})),
        stream(logged("three", cursor="c3")),
        refusal(Code.FORBIDDEN, "not any more"),
    )
    ran = await llorch("logs", "n1/p0", "-f", "--lines", "5")
    assert (ran.code, ran.out) == (3, "one\ntwo\nthree\n")
    assert [asked.path.partition("?")[2] for asked in control.requests] == [
        "lines=5&follow=1", "after=c+2&follow=1", "after=c+2&follow=1", "after=c3&follow=1",
    ]  # fmt: skip
    assert ran.err.count("looking for the log again") == 2


async def test_a_followed_log_that_stays_away_is_given_up_and_one_that_never_was_at_once(
    control: ScriptedControl, llorch: CommandLine
) -> None:
    control.on(LOGS, stream(logged("one"), then=Then.CUT), hang_up)
    ran = await llorch("logs", "n1/p0", "-f")
    assert (ran.code, ran.out) == (5, "one\n")
    for said, code in ((refusal(Code.NODE_LOST), 1), (hang_up, 5), (answer({}), 5), (stream(headers=SSE), 5)):
        control.requests.clear()
        control.on(LOGS, said)
        assert (await llorch("logs", "n1/p0", "-f")).code == code
        assert len(control.requests) == (2 if said is hang_up else 1)  # a GET on a connection that ends is sent again
