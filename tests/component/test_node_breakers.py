"""A pool of two engines, one of which fails: it is passed over for a while; what is not its fault does not count."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llorch.node import execution
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from llorch.records import Type
from tests.component.node_harness import (
    MODEL,
    POOL,
    ScriptedEngine,
    ScriptedLink,
    Setup,
    Stream,
    eventually,
    node_between,
)


@dataclass
class Two:
    setup: Setup
    link: ScriptedLink
    first: ScriptedEngine  # which is asked while both are as busy
    second: ScriptedEngine

    def replica(self, replica_id: str = "r0") -> dict[str, Any]:
        report = self.setup.node.pools.pool_report(POOL)
        return dict(next(each for each in report["replicas"] if each["id"] == replica_id))

    def tick(self, later_s: float = 0.0) -> None:
        self.setup.node.pools.handle(ev.Tick(), time.monotonic() + later_s)

    async def ended(self, stream: Stream) -> Stream:
        await eventually(lambda: stream.tail is not None, what="TAIL")
        await eventually(lambda: not len(self.setup.node.runner), what="nothing runs")
        return stream

    async def fails(self, status: int = 500) -> Stream:
        """A task at the first engine, which answers with `status`."""
        stream = self.link.prompt()
        (await self.first.asked()).reply(b"{}", status)
        return await self.ended(stream)

    async def runs_out_of_time(self) -> None:
        """A task whose deadline comes while the engine works; a later one where the engine was not asked before it."""
        for deadline_ms in (50, 400, 3200):
            await self.ended(self.link.prompt(deadline_ms=deadline_ms))
            if not self.first.calls.empty():
                await self.first.asked()
                return
        raise AssertionError("the engine was not asked within 3.2 s")


@contextlib.asynccontextmanager
async def two_engines(folder: Path) -> AsyncIterator[Two]:
    second = ScriptedEngine()
    await second.start()
    try:
        async with node_between(folder) as setup:
            offer = Handoff(pool_id=POOL, replica_id="r1", engine="external", url=second.url, model=MODEL, slots=2)
            for action in setup.node.pools.handle(ev.HandoffSeen(offer), 0.0):
                if isinstance(action, ev.Probe):
                    setup.node.pools.handle(ev.ProbeOk(POOL, "r1", action.probe), 0.0)
            yield Two(setup, await setup.link(), setup.engine, second)
    finally:
        await second.close()


async def test_an_engine_that_fails_again_and_again_is_passed_over_and_its_slots_are_not_offered(
    tmp_path: Path,
) -> None:
    async with two_engines(tmp_path) as two:
        for _ in range(5):
            assert two.replica()["breaker"] == "closed"
            stream = await two.fails()
            assert (stream.tail or {})["error"]["code"] == "ENGINE_FAILED"
        assert (two.replica()["breaker"], two.setup.node.slots_free) == ("ejected", 2)
        beats = two.setup.control.beats
        await eventually(lambda: any(pool["slots_free"] == 2 for beat in beats for pool in beat.get("pools", ())))
        for _ in range(2):
            stream = two.link.prompt()
            call = await two.second.asked()
            call.say("t0 ")
            call.end()
            await two.ended(stream)
        two.tick(15.1)
        assert (two.replica()["breaker"], two.setup.node.slots_free) == ("half_open", 3)
        stream = two.link.prompt()
        call = await two.first.asked()
        assert two.replica()["slots_free"] == 0
        call.say("t0 ")
        call.end()
        await two.ended(stream)
        assert (two.replica()["breaker"], two.setup.node.slots_free) == ("closed", 4)


@pytest.mark.parametrize("how", ["400", "429", "cancel", "cancel at once", "deadline"])
async def test_what_is_no_fault_of_the_engine_does_not_count(tmp_path: Path, how: str) -> None:
    async with two_engines(tmp_path) as two:
        for _ in range(4):
            await two.fails()
        for _ in range(6):
            if how.isdigit():
                await two.fails(int(how))
                continue
            if how == "deadline":
                await two.runs_out_of_time()
                continue
            stream = two.link.prompt()
            call = await two.first.asked()
            if how == "cancel":
                call.say("t0 ")
                await eventually(lambda s=stream: s.text == "t0 ")
            two.link.send(stream.id, Type.CANCEL)
            await two.ended(stream)
        assert two.replica()["breaker"] == "closed"
        await two.fails()  # and it is no success either: this is the fifth in a row
        assert two.replica()["breaker"] == "ejected"


async def test_an_engine_that_breaks_off_counts_too_and_one_good_answer_begins_the_row_anew(tmp_path: Path) -> None:
    async with two_engines(tmp_path) as two:
        for good in (True, False):
            for _ in range(4):
                stream = two.link.prompt()
                call = await two.first.asked()
                call.say("t0 ")
                call.cut()
                await two.ended(stream)
            if good:
                stream = two.link.prompt()
                call = await two.first.asked()
                call.say("t0 ")
                call.end()
                await two.ended(stream)
        assert two.replica()["breaker"] == "closed"
        await two.fails()
        assert two.replica()["breaker"] == "ejected"


async def test_an_engine_that_hangs_when_it_is_tried_is_given_up_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "TRIAL_TIMEOUT_S", 0.1)
    async with two_engines(tmp_path) as two:
        for _ in range(5):
            await two.fails()
        other = two.link.prompt()
        await two.second.asked()  # it hangs as well, and is left alone: it is no trial
        two.tick(15.1)
        stream = two.link.prompt()
        call = await two.first.asked()
        await eventually(lambda: stream.tail is not None, what="TAIL")
        assert (stream.tail or {})["error"]["code"] == "ENGINE_STALLED"
        await eventually(call.disconnected.is_set)
        assert two.replica()["breaker"] == "ejected"
        assert other.tail is None
