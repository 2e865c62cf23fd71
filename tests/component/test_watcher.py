"""The watcher over a real directory: what is seen, how soon, and that nothing in there can hurt it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llorch.node.handoff import MAX_HANDOFF_BYTES, Handoff, render
from llorch.node.pool_events import HandoffBad, HandoffGone, HandoffSeen
from llorch.node.watcher import Watcher

Event = HandoffSeen | HandoffBad | HandoffGone
DEADLINE_S = 10.0
TRIES = 5  # for what has to be quick: a machine may stall once, and what is slow by its making is slow each time


def handoff(replica: str = "r0", port: int = 8000) -> Handoff:
    return Handoff(pool_id="p", replica_id=replica, engine="vllm", url=f"http://127.0.0.1:{port}", model="m")


def put(directory: Path, made: Handoff) -> None:
    temporary = directory / f".{made.file_name}.tmp"
    temporary.write_bytes(render(made))
    temporary.replace(directory / made.file_name)


async def until(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not fact():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def watching(directory: Path, *, polling: bool = False, rescan_s: float = 5.0) -> AsyncIterator[list[Event]]:
    events: list[Event] = []
    watcher = Watcher(directory, events.append, polling=polling, rescan_s=rescan_s)
    await watcher.start()
    try:
        yield events
    finally:
        await watcher.close()


async def test_what_is_there_at_the_start_is_reported_and_the_directory_is_made(tmp_path: Path) -> None:
    async with watching(tmp_path / "run" / "engines") as events:
        assert events == []
        assert (tmp_path / "run" / "engines").is_dir()
    put(tmp_path, handoff())
    async with watching(tmp_path) as events:
        assert events == [HandoffSeen(handoff())]


@pytest.mark.parametrize("polling", [False, True])
async def test_a_handoff_appears_changes_and_goes(tmp_path: Path, polling: bool) -> None:
    async with watching(tmp_path, polling=polling, rescan_s=60) as events:
        put(tmp_path, handoff())
        await until(lambda: events == [HandoffSeen(handoff())])
        put(tmp_path, handoff(port=8001))
        await until(lambda: events[1:] == [HandoffSeen(handoff(port=8001))])
        (tmp_path / "p-r0.json").unlink()
        await until(lambda: events[2:] == [HandoffGone("p-r0.json")])


async def test_a_rename_is_seen_well_within_a_second(tmp_path: Path) -> None:
    async with watching(tmp_path, rescan_s=60) as events:
        put(tmp_path, handoff("first"))
        await until(lambda: len(events) == 1)  # the notifications are on
        took_s = []
        for number in range(2, 2 + TRIES):
            began = time.monotonic()
            put(tmp_path, handoff(f"r{number}"))
            await until(lambda n=number: len(events) == n)
            took_s.append(time.monotonic() - began)
            if took_s[-1] < 1.0:
                break
        assert min(took_s) < 1.0


async def test_a_busy_directory_does_not_put_it_off(tmp_path: Path) -> None:
    async with watching(tmp_path, rescan_s=60) as events:
        put(tmp_path, handoff("first"))
        await until(lambda: len(events) == 1)
        took_s = []
        noise = 0
        for number in range(2, 2 + TRIES):
            put(tmp_path, handoff(f"r{number}"))
            began = time.monotonic()
            while len(events) < number and time.monotonic() - began < DEADLINE_S:
                noise += 1
                (tmp_path / f".noise-{noise}").touch()
                await asyncio.sleep(0.005)
            took_s.append(time.monotonic() - began)
            if took_s[-1] < 1.0:
                break
        assert min(took_s) < 1.0


async def test_what_no_notification_tells_is_seen_by_the_rescan(tmp_path: Path) -> None:
    events: list[Event] = []
    watcher = Watcher(tmp_path, events.append, rescan_s=0.05)
    watcher._watch = watcher._rescan  # type: ignore[method-assign]  # as on a network mount: inotify is silent
    await watcher.start()
    try:
        put(tmp_path, handoff())
        await until(lambda: events == [HandoffSeen(handoff())])
    finally:
        await watcher.close()


async def test_a_touch_is_no_change(tmp_path: Path) -> None:
    put(tmp_path, handoff())
    async with watching(tmp_path, rescan_s=0.02) as events:
        put(tmp_path, handoff())
        os.utime(tmp_path / "p-r0.json")
        put(tmp_path, handoff("r1"))
        await until(lambda: len(events) == 2)
        assert events == [HandoffSeen(handoff()), HandoffSeen(handoff("r1"))]


async def test_bad_files_are_reported_once_until_they_change_and_none_hangs_it(tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere.txt"
    secret.write_bytes(render(handoff("link")))
    directory = tmp_path / "engines"
    directory.mkdir()
    os.mkfifo(directory / "p-fifo.json")
    (directory / "p-link.json").symlink_to(secret)
    (directory / "p-dir.json").mkdir()
    (directory / "p-huge.json").write_bytes(b" " * (MAX_HANDOFF_BYTES + 1))
    (directory / "p-torn.json").write_bytes(render(handoff("torn"))[:-9])
    (directory / "p-name.json").write_bytes(render(handoff("other")))
    (directory / "p-device.json").symlink_to("/dev/zero")
    (directory / ".hidden.json").write_text("{")
    (directory / "README.txt").write_text("not a handoff")
    async with watching(directory, rescan_s=0.02) as events:
        assert {event.name: event.reason for event in events if isinstance(event, HandoffBad)} == {
            "p-fifo.json": "it is not a regular file",
            "p-link.json": "it is not a regular file",
            "p-dir.json": "it is not a regular file",
            "p-device.json": "it is not a regular file",
            "p-huge.json": f"it is larger than {MAX_HANDOFF_BYTES} bytes",
            "p-torn.json": "the file is not JSON (line 6, column 16): Expecting value",
            "p-name.json": "its name does not match its content: it should be p-other.json",
        }
        count = len(events)
        put(directory, handoff("good"))  # several rescans later nothing else was said again
        await until(lambda: len(events) > count)
        assert events[count:] == [HandoffSeen(handoff("good"))]
        put(directory, handoff("torn"))
        await until(lambda: events[count + 1 :] == [HandoffSeen(handoff("torn"))])


async def test_a_directory_that_was_removed_is_made_again_and_watched(tmp_path: Path) -> None:
    directory = tmp_path / "engines"
    directory.mkdir()
    put(directory, handoff())
    async with watching(directory, rescan_s=0.05) as events:
        (directory / "p-r0.json").unlink()
        directory.rmdir()
        await until(lambda: events[1:] == [HandoffGone("p-r0.json")])
        await until(directory.is_dir)
        put(directory, handoff())
        await until(lambda: events[2:] == [HandoffSeen(handoff())])


async def test_a_file_that_is_written_in_place_ends_up_right(tmp_path: Path) -> None:
    raw = json.dumps(json.loads(render(handoff()))).encode()
    async with watching(tmp_path, rescan_s=0.02) as events:
        with (tmp_path / "p-r0.json").open("wb", buffering=0) as file:
            for byte in raw:
                file.write(bytes([byte]))
                await asyncio.sleep(0)
        await until(lambda: bool(events) and events[-1] == HandoffSeen(handoff()))
        assert all(isinstance(event, HandoffBad) for event in events[:-1])
