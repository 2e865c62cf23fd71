"""How a control goes: not ready, no new tasks, a grace for running ones, then every client and node gets its word."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llorch.control import app
from llorch.control.audience import ShuttingDown
from llorch.reload import Source
from tests.component.control_harness import ControlUnderTest, a_control, eventually, pool, settings


@contextlib.asynccontextmanager
async def a_running_control(
    monkeypatch: pytest.MonkeyPatch, folder: Path, **more: Any
) -> AsyncIterator[ControlUnderTest]:
    """As `llorch control` runs it, signal handlers and all. The test ends it by a signal."""
    made: list[Any] = []
    serving = app.serving

    @contextlib.asynccontextmanager
    async def seen(of: Any) -> AsyncIterator[Any]:
        async with serving(of) as pair:
            made.append(pair)
            yield pair

    monkeypatch.setattr(app, "serving", seen)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        own = settings(data_dir=str(folder), **more)
        running = asyncio.create_task(app.run(own, Source(lambda: own, ())))
        await eventually(lambda: made)
        control = ControlUnderTest(session, *made[0])
        try:
            yield control
            assert await asyncio.wait_for(running, 10) == 0
        finally:
            running.cancel()
            await asyncio.wait((running,))
            await control.close()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


async def test_a_stopping_control_is_not_ready_refuses_new_tasks_and_lets_running_ones_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with a_running_control(monkeypatch, tmp_path, shutdown_grace=10.0) as control:
        node = await control.join("a")
        assert (await control.ask("GET", "/readyz", who=None).answer()).status == 200
        asking = control.whole()
        attempt = (await node.asked()).begin().say("one")
        await control.state(attempt.task_id, "streaming")
        terminate()

        async def draining() -> bool:
            return (await control.ask("GET", "/readyz", who=None).answer()).status == 503

        await eventually(draining, within_s=2)
        assert (await control.ask("GET", "/livez", who=None).answer()).status == 200
        for refused in (
            control.submit(), control.whole(), control.chat(), control.chat(stream=False), control.submit(detach=True),
        ):  # fmt: skip
            answer = await refused.answer()
            assert (answer.status, answer.code) == (503, "DRAINING")
            assert "Retry-After" in answer.headers
        attempt.say("two").end()
        assert (await asking.answer()).json["text"] == "onetwo"


async def test_after_the_grace_every_client_gets_the_end_of_its_kind_and_the_node_a_shutdown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with a_running_control(monkeypatch, tmp_path, shutdown_grace=0.2) as control:
        node = await control.join("a", pool(slots=7))
        native, whole, v1, v1_whole = control.submit(), control.whole(), control.chat(), control.chat(stream=False)
        attempts = [await node.asked() for _ in range(4)]
        for attempt in attempts:
            if attempt.header["path"] == "native":
                attempt.begin().say("one")
            elif attempt.header["stream"]:
                attempt.accept().head().data(b"data: {}\n\n")
            else:
                attempt.accept()
        detached = control.submit(detach=True)
        kept = (await node.asked()).begin().say("one")
        assert (await detached.answer()).status == 202
        following = control.events(kept.task_id)
        reader = (await node.reader()).accept().head().data(kept.log)
        await following.has(b"one")
        await native.has(b"one")
        await v1.has(b"data: {}")
        terminate()
        answer = await native.answer()
        assert (answer.status, answer.terminals, answer.cut) == (200, [], False)
        answer = await following.answer()
        assert (answer.terminals, answer.cut) == ([], False)
        assert (await whole.answer()).code == "DRAINING"
        answer = await v1.answer()
        assert [value["error"]["code"] for _, value in answer.events if "error" in value] == ["DRAINING"]
        assert (await v1_whole.answer()).code == "DRAINING"
        await node.link_ended()
        for attempt in [*attempts, kept, reader]:
            assert attempt.detached == "shutdown"
            assert not attempt.canceled


async def test_a_queued_task_gets_its_end_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with a_running_control(monkeypatch, tmp_path, shutdown_grace=0.0) as control:
        node = await control.join("a", pool(slots=1))
        holder = control.submit()
        (await node.asked()).begin()
        native, v1 = control.submit(), control.chat()
        await native.has(b"queued")
        await control.waiting(2)
        terminate()
        answer = await native.answer()
        assert (answer.terminals, answer.cut) == ([], False)
        assert (await v1.answer()).code == "DRAINING"
        assert (await holder.answer()).terminals == []
        assert len(node.opened) == 1


async def test_a_second_signal_does_not_wait_for_the_grace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with a_running_control(monkeypatch, tmp_path, shutdown_grace=60.0) as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin()
        await asking.has(b"started")
        terminate()
        await eventually(lambda: control.control.stopping.is_set())
        started = time.monotonic()
        terminate()
        assert (await asking.answer()).terminals == []
        await node.link_ended()
        assert time.monotonic() - started < 3.0
        assert attempt.detached == "shutdown"


async def test_the_end_of_a_control_does_not_wait_for_its_readers() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.submit()
        attempt = (await node.asked()).begin()
        await asking.has(b"started")
        await asking.leave()
        following = control.events(attempt.task_id)
        (await node.reader()).accept().head().data(attempt.log)
        await following.has(b"started")
        ended_at = time.monotonic()
    assert time.monotonic() - ended_at < 2.0
    assert following.done


async def test_a_task_that_comes_back_while_the_control_stops_does_not_wait_for_a_slot() -> None:
    """Its node was lost a moment before, so it was neither on a node nor in the queue when all were let go."""
    async with a_control() as control:
        node = await control.join("a")
        control.submit()
        await node.asked()
        (task,) = control.control.dispatcher.tasks.running_tasks()
        control.control.dispatcher.stop()

        async def said(position: int, eta_ms: int | None) -> None: ...

        with pytest.raises(ShuttingDown):
            await control.control.dispatcher._room.claim(task, said, front=True)
