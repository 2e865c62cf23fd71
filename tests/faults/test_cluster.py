"""The cluster that a run breaks: what it sees of processes whose parent has gone, and that it ends them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from tests.cluster import alive, belonging, eventually, simulated
from tests.faults.cluster import Broken
from tests.faults.history import Recorder


class Kept(Broken):
    def life(self, node: str) -> tuple[str, ...]:
        self.keeps[node] = True
        return ("--orphan-grace", "60s", "--keep-engines")


@pytest.mark.timeout(90)
@pytest.mark.slow
async def test_engines_that_outlive_their_agent_are_seen_and_ended_at_the_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "history.jsonl")
    async with aiohttp.ClientSession() as session:
        broken = Kept(tmp_path, session, recorder, {"a": [simulated(), simulated("p1", "odd", 2)]})
        try:
            await broken.start()
            before = broken.engines("a")
            assert all(len(pids) == 1 for pids in before.values()) and broken.strangers() == []
            await broken.kill_node("a", 0.0)
            await broken.cluster.bound("a", 2)
            assert broken.engines("a") == before and broken.strangers() == [], "they are another agent's, and its own"
            broken.cluster.nodes["a"].kill()
            engines = [pid for pids in before.values() for pid in pids]
            assert set(engines) < set(broken.strangers()), "and now nobody's, with their shims"
            assert broken.engines("a") == before
        finally:
            await broken.close()
    recorder.close()
    [ended] = [entry for entry in recorder.entries if entry["what"] == "ended"]
    assert (ended["asked"], ended["left"]) == (2, {})
    assert not any(map(alive, engines)) and not belonging(tmp_path)


async def test_what_has_no_pid_file_is_found_killed_and_told(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "history.jsonl")
    async with aiohttp.ClientSession() as session:
        broken = Broken(tmp_path, session, recorder, {})
        stray = await asyncio.create_subprocess_exec("sleep", "60", cwd=tmp_path)
        assert broken.strangers() == [stray.pid]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.faults.cluster.ENDED_WITHIN_S", 0.1)
            await broken.close()
        assert await stray.wait() == -9
    recorder.close()
    [ended] = [entry for entry in recorder.entries if entry["what"] == "ended"]
    assert ended["left"] == {stray.pid: ["sleep", "60", ""]}
    await eventually(lambda: not belonging(tmp_path))


def test_the_lives_of_nodes_are_the_seeds(tmp_path: Path) -> None:
    """Half of them keep their engines, in an order that a seed gives again."""

    def lives(seed: int) -> list[bool]:
        recorder = Recorder(tmp_path / "history.jsonl")
        broken = Broken(tmp_path, None, recorder, {})  # type: ignore[arg-type]
        broken.seed = seed
        kept = ["--keep-engines" in broken.life(node) for _ in range(100) for node in ("a", "b", "c")]
        recorder.close()
        return kept

    assert lives(1) == lives(1) != lives(2)
    assert 120 < sum(lives(1)) < 180
