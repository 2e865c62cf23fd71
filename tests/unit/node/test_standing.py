"""What operators asked, over restarts of the agent: written whole, and read as if a stranger had written it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.config_pools import PoolSpec
from llorch.node import pool_events as ev
from llorch.node import standing
from llorch.node.pool_events import Wanted
from llorch.node.pools import Pools
from llorch.tasks import Guard


def pools(**changes: Any) -> Pools:
    spec = PoolSpec(id="p", engine="simulated", model="m", **changes)
    return Pools([Wanted(spec, {"m": "m"})])


def test_what_was_asked_is_asked_again_after_a_restart(tmp_path: Path) -> None:
    before = pools()
    before.handle(ev.Drain("p", "new kernel"), 0.0)
    before.handle(ev.Drain(None, "the roof leaks"), 0.0)
    path = tmp_path / "wishes.json"
    standing.write(path, before.wishes())
    assert path.stat().st_mode & 0o777 == 0o600
    after = pools()
    after.restore(standing.read(path))
    assert after.wishes() == before.wishes() and after.drained == "the roof leaks"
    assert after.pool_report("p")["held"] == ["operator: new kernel"]


def test_a_pool_that_serves_another_model_does_so_again_though_that_of_the_settings_is_gone() -> None:
    spec = PoolSpec(id="p", engine="simulated", model="m")
    wish = {"model": {"id": "other", "ref": "file:/other.gguf", "instead_of": "m"}}
    made = Pools([Wanted(spec, {"m": "m"}, refusal="m can't be read")])
    assert made.pool_report("p")["state"] == "failed"
    made.restore({"pools": {"p": wish}})
    (spawn,) = [action for action in made.handle(ev.Start(), 0.0) if isinstance(action, ev.Spawn)]
    assert (spawn.model, spawn.ref) == ("other", "file:/other.gguf")
    stays = Pools([Wanted(spec, {"m": "m"}, refusal="m can't be read")])
    stays.restore({"pools": {"p": {"model": wish["model"] | {"instead_of": "another"}}}})
    assert stays.pool_report("p")["last_error"] == "m can't be read"
    assert not [action for action in stays.handle(ev.Start(), 0.0) if isinstance(action, ev.Spawn)]


def test_no_file_is_no_wish(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert standing.read(tmp_path / "none.json") == {} and caplog.text == ""


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"a": 1e999}', b'{"drained": "\\ud800"}', b'{"a":1,"a":2}',
     b'{"drained": "' + b"x" * 2_000_000 + b'"}'],
    ids=["empty", "torn", "list", "number", "bytes", "deep", "infinite", "surrogate", "twice", "large"],
)  # fmt: skip
def test_what_was_never_written_is_nobodys_wish_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, raw: bytes
) -> None:
    path = tmp_path / "wishes.json"
    path.write_bytes(raw)
    assert standing.read(path) == {}
    assert "wishes.unread file=wishes.json" in caplog.text


@pytest.mark.parametrize("what", ["fifo", "folder", "link in a circle"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str) -> None:
    path = tmp_path / "wishes.json"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    assert standing.read(path) == {}
    assert "wishes.unread" in caplog.text


def test_a_place_that_can_not_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    standing.write(tmp_path / "file" / "wishes.json", {})
    assert "wishes.unwritten" in caplog.text and "a restart forgets them" in caplog.text


async def test_what_the_disk_does_not_take_is_kept_until_it_does_and_only_the_last_of_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "AGAIN_S", 0.01)
    folder = tmp_path / "data"
    folder.write_text("in the way")
    kept = standing.Standing(folder / "wishes.json")
    async with asyncio.timeout(10), guarded(kept.step):
        kept.changed({"drained": "first"})
        await asyncio.sleep(0.05)
        kept.changed({"drained": "second"})
        folder.unlink()
        folder.mkdir()
        while standing.read(folder / "wishes.json") != {"drained": "second"}:
            await asyncio.sleep(0.01)
        (folder / "wishes.json").unlink()
        await asyncio.sleep(0.05)
        assert not (folder / "wishes.json").exists()  # it is not written again for nothing


async def test_news_does_not_wait_for_the_next_try_of_what_failed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.write_text("in the way")
    kept = standing.Standing(folder / "wishes.json")
    async with asyncio.timeout(5), guarded(kept.step):  # half of what it would wait
        kept.changed({"drained": "first"})
        await asyncio.sleep(0.05)
        folder.unlink()
        folder.mkdir()
        kept.changed({"drained": "second"})
        while standing.read(folder / "wishes.json") != {"drained": "second"}:
            await asyncio.sleep(0.01)


async def test_what_is_told_while_it_is_written_is_written_too(tmp_path: Path) -> None:
    kept = standing.Standing(tmp_path / "wishes.json")
    kept.changed({"drained": "first"})
    writing = asyncio.create_task(kept.settle())
    await asyncio.sleep(0)
    kept.changed({"drained": "second"})
    assert await kept.settle() and await writing
    assert standing.read(tmp_path / "wishes.json") == {"drained": "second"}


@contextlib.asynccontextmanager
async def guarded(step: Callable[[], Awaitable[float]]) -> AsyncIterator[None]:
    guard = Guard("test")
    guard.loop(step, "step")
    try:
        yield
    finally:
        await guard.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
WISH = st.fixed_dictionaries(
    {},
    optional={
        "drained": JSON,
        "unloaded": JSON,
        "model": JSON | st.fixed_dictionaries({"id": JSON, "ref": JSON, "instead_of": st.just("m") | JSON}),
    },
)


@settings(max_examples=100, deadline=None)
@given(
    wishes=st.fixed_dictionaries({"drained": JSON, "pools": JSON | st.fixed_dictionaries({"p": JSON | WISH})}) | JSON
)
def test_whatever_it_says_the_pools_can_report_and_go_on(wishes: Any) -> None:
    made = pools()
    made.restore(wishes)
    made.handle(ev.Start(), 0.0)
    json.dumps(made.report())
    assert isinstance(made.wishes(), dict) and json.loads(json.dumps(made.wishes())) == made.wishes()
    made.handle(ev.Undrain(None), 1.0)
    made.handle(ev.Undrain("p"), 1.0)
    made.handle(ev.Load("p"), 2.0)
    made.handle(ev.Tick(), 3.0)
    assert made.pool_report("p")["state"] == "starting"
