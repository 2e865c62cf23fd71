"""A node and its controls: registering, beating, deltas, links lost and found, leaving."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llorch.backoff import Backoff
from llorch.node import heartbeat
from llorch.node import pool_events as ev
from llorch.node.retention import Limits
from tests.component.node_harness import POOL, Setup, eventually, node_between


def deltas(setup: Setup) -> list[dict[str, Any]]:
    return [beat for beat in setup.control.beats if beat.get("delta")]


def full_beats(setup: Setup) -> list[dict[str, Any]]:
    return [beat for beat in setup.control.beats if not beat.get("delta")]


@pytest.fixture(autouse=True)
def tried_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control that is away is tried every 20 to 200 ms, instead of every 0.2 to 2 s."""
    monkeypatch.setattr(heartbeat, "RETRY", Backoff(first_s=0.04, most_s=0.2))


async def test_registration_says_what_the_node_has(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        await setup.link()
        (message,) = setup.control.registered
        assert (message["node_id"], message["boot_id"], message["draining"]) == ("n1", "boot-1", False)
        (pool,) = message["pools"]
        assert (pool["pool_id"], pool["ready"], pool["slots_free"], pool["model"]) == (POOL, True, 2, "m")
        assert message["capabilities"]["gpus"] == message["tasks"] == []


async def test_change_goes_out_as_a_delta(tmp_path: Path) -> None:
    async with node_between(tmp_path, early_beat_s=0.05) as setup:
        link = await setup.link()
        stream = link.prompt()
        call = await setup.engine.asked()
        await eventually(lambda: deltas(setup), within_s=2.0)
        first = deltas(setup)[0]
        assert [(pool["pool_id"], pool["slots_free"]) for pool in first["pools"]] == [(POOL, 1)]
        assert [task["state"] for task in first["tasks"]] in (["accepted"], ["running"])
        assert first["lease_id"] == "lease-1"
        assert "gpus" not in first
        call.say("t0 ")
        call.end()
        await eventually(lambda: stream.tail is not None)
        await eventually(lambda: deltas(setup)[-1]["pools"][0]["slots_free"] == 2)
        last = [delta for delta in deltas(setup) if "tasks" in delta][-1]
        assert last["tasks"][0]["gone"] is True  # this control was sent the TAIL
        sequence = [beat["seq"] for beat in setup.control.beats]
        assert sequence == sorted(set(sequence))


async def test_changes_are_coalesced(tmp_path: Path) -> None:
    async with node_between(tmp_path, slots=64, early_beat_s=0.5) as setup:
        link = await setup.link()
        await asyncio.gather(*(_one(setup, link) for _ in range(40)))
        await eventually(lambda: deltas(setup))
        assert len(deltas(setup)) <= 2


async def _one(setup: Setup, link: Any) -> None:
    stream = link.prompt()
    call = await setup.engine.asked()
    call.say("t0 ")
    call.end()
    await eventually(lambda: stream.tail is not None)


async def test_full_beats_come_at_the_interval(tmp_path: Path) -> None:
    async with node_between(tmp_path, controls=1) as setup:
        await setup.link()
        setup.control.interval_ms = 20
        setup.control.refuse_beats = (404, "NODE_UNKNOWN")  # registers again, and learns the interval
        setup.node.pools.handle(ev.Drain(), 0.0)
        await eventually(lambda: len(setup.control.registered) == 2)
        setup.control.refuse_beats = None
        before = len(full_beats(setup))
        await eventually(lambda: len(full_beats(setup)) > before + 3)
        beat = full_beats(setup)[-1]
        assert beat["draining"] is True
        assert {"pools", "gpus", "catalog", "tasks", "rtt_ms", "timestamp"} <= beat.keys()


@pytest.mark.parametrize(("status", "code"), [(404, "NODE_UNKNOWN"), (409, "LEASE_STALE")])
async def test_refused_beat_registers_again(tmp_path: Path, status: int, code: str) -> None:
    async with node_between(tmp_path) as setup:
        await setup.link()
        setup.control.refuse_beats = (status, code)
        setup.node.pools.handle(ev.Drain(POOL), 0.0)
        await eventually(lambda: len(setup.control.registered) == 2)
        setup.control.refuse_beats = None
        await setup.control.linked(2)
        assert setup.control.registered[1]["boot_id"] == "boot-1"


async def test_what_changes_while_a_registration_is_on_its_way_is_told_at_once(tmp_path: Path) -> None:
    async with node_between(tmp_path, early_beat_s=0.05) as setup:
        await setup.link()

        def undrained() -> None:
            setup.control.refuse_beats = None
            setup.node.pools.handle(ev.Undrain(), 0.0)

        setup.control.meanwhile = undrained
        setup.control.refuse_beats = (404, "NODE_UNKNOWN")
        setup.node.pools.handle(ev.Drain(), 0.0)
        await eventually(lambda: len(setup.control.registered) == 2)
        assert setup.control.registered[1]["draining"] is True
        # Not with the next full beat, which is 10 s away.
        await eventually(lambda: setup.control.beats[-1].get("draining") is False, within_s=2.0)


async def test_lost_link_comes_back_and_the_beat_before_it(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        assert link.connection is not None
        link.connection.abort("cut")
        await setup.control.linked(2)
        assert len(setup.control.registered) == 1  # the lease was still in force
        assert len(full_beats(setup)) >= 1


async def test_stale_lease_at_the_link_registers_again(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        setup.control.refuse_link = (409, "LEASE_STALE")
        assert link.connection is not None
        link.connection.abort("cut")
        await eventually(lambda: len(setup.control.registered) >= 2)
        setup.control.refuse_link = None
        await setup.control.linked(2)


async def test_control_that_restarts_is_found_again_with_its_new_epoch(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        await setup.link()
        await setup.control.close()
        setup.control.epoch = "epoch-2"
        await setup.control.start()  # on the same port; it would take the old lease, but it is another process
        await eventually(lambda: len(setup.control.registered) == 2)
        await setup.control.linked(3)  # the second was given up for its epoch


async def test_control_that_is_down_is_tried_until_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with node_between(tmp_path) as setup:
        await setup.link()
        await setup.control.close()
        (membership,) = setup.node.memberships
        await eventually(lambda: not membership.linked)
        await eventually(lambda: membership._failures >= 2, what="it tries")
        said = 'can\'t be reached: Connection refused" hint="is `llorch control` running there? the URL is from --join"'
        assert said in caplog.text
        await setup.control.start()
        await setup.control.linked(2)
        await eventually(lambda: membership.linked)


async def test_control_that_is_back_and_knows_nobody_is_registered_with_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node_between(tmp_path) as setup:
        await setup.link()
        await setup.control.close()
        (membership,) = setup.node.memberships
        await eventually(lambda: membership._failures >= 2, what="it tries")
        setup.control.refuse_beats = (404, "NODE_UNKNOWN")
        await setup.control.start()
        monkeypatch.setattr(heartbeat, "RETRY", Backoff(first_s=60.0, most_s=60.0))  # what it must not wait for
        await eventually(lambda: len(setup.control.registered) == 2)
        setup.control.refuse_beats = None
        await setup.control.linked(2)


@pytest.mark.parametrize(
    ("status", "code", "mend"),
    [
        (401, "UNAUTHENTICATED", "--node-token"),  # and not what a client would have to do
        (409, "NODE_QUARANTINED", "llorch node pardon"),
    ],
)
async def test_a_refusal_is_said_aloud_with_what_mends_it_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, status: int, code: str, mend: str
) -> None:
    monkeypatch.setattr(heartbeat, "SLOW_RETRY", heartbeat.RETRY)
    async with node_between(tmp_path) as setup:
        await setup.link()
        setup.control.refuse_beats = (status, code)
        setup.node.pools.handle(ev.Drain(POOL), 0.0)
        await eventually(lambda: "control.refuses" in caplog.text)
        assert f"code={code}" in caplog.text
        assert mend in caplog.text
        setup.control.refuse_beats = None
        before = len(full_beats(setup))
        await eventually(lambda: len(full_beats(setup)) > before)


async def test_what_is_no_control_is_told_to_be_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with node_between(tmp_path) as setup:
        await setup.link()
        setup.control.refuse_beats = (404, "")
        setup.node.pools.handle(ev.Drain(POOL), 0.0)
        await eventually(lambda: "heartbeat.failed" in caplog.text)
        assert "what answered with HTTP 404 is no control" in caplog.text
        assert "--join" in caplog.text
        assert "send it again" not in caplog.text


async def test_leaving_deregisters(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        await setup.link()
    assert setup.control.gone == ["n1"]


async def test_tasks_that_run_are_reported_when_registering_again(tmp_path: Path) -> None:
    async with node_between(tmp_path, limits=Limits()) as setup:
        link = await setup.link()
        stream = link.prompt(key_digest="ab", body_digest="cd")
        call = await setup.engine.asked()
        call.say("t0 ")
        await eventually(lambda: stream.text == "t0 ")
        await setup.control.close()
        setup.control.epoch = "epoch-2"
        await setup.control.start()
        link = await setup.control.linked(3)  # the second was given up for its epoch
        (task,) = setup.control.registered[-1]["tasks"]
        assert (task["state"], task["key_digest"], task["body_digest"]) == ("running", "ab", "cd")
        assert (task["epoch"], task["offset"]) == ("epoch-1", len(stream.data))
        again = link.attach(task["task_id"], task["offset"])
        call.end()
        await eventually(lambda: again.tail is not None)


async def test_a_control_that_has_restarted_hears_of_what_ended_under_the_one_before(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.link()
        await _one(setup, link)
        setup.control.epoch = "epoch-2"
        setup.control.refuse_beats = (404, "NODE_UNKNOWN")
        setup.node.pools.handle(ev.Drain(), 0.0)
        await eventually(lambda: len(setup.control.registered) == 2)
        (task,) = setup.control.registered[1]["tasks"]  # at once, and not with the next full beat
        assert (task["state"], task["finish_reason"]) == ("sealed", "stop")
