"""`llorch bench overhead`: real processes for as long as it measures, and nothing afterwards, whatever ended it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest

from tests.cluster import alive, descendants, eventually
from tests.e2e.shared import end_of

ENDS_WITHIN_S = 60.0  # on a machine that has much to do; 8 s on one that has not


async def overhead(folder: Path) -> Process:
    """A short one, on a machine with settings that are not meant for it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    env |= {
        "TMPDIR": str(folder),
        "HOME": str(folder / "home"),
        "LLORCH_TLS_CERT": "/nowhere",
        "LLORCH_TOKEN": "x" * 40,
    }
    settings = folder / "home" / ".config" / "llorch" / "config.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text("nonsense: 1\n")
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llorch", "bench", "overhead", "--json", "--duration", "2s",
        env=env | {"PYTHONPATH": str(Path(__file__).parents[2])}, cwd=folder, stdout=PIPE, stderr=PIPE,
    )  # fmt: skip


async def test_what_llorch_adds_is_measured_in_time_and_nothing_is_left_behind(tmp_path: Path) -> None:
    code, out, err = await end_of(await overhead(tmp_path), within_s=ENDS_WITHIN_S)
    assert code == 0, err
    found = json.loads(out)
    assert [load["concurrency"] for load in found["loads"]] == [1, 32]
    for load in found["loads"]:
        for side in ("alone", "behind"):
            step = load[side]
            assert step["requests"]["failed"] == 0
            assert step["requests"]["ok"] >= load["concurrency"]
            assert step["output_tokens_mean"] == load["output_tokens"]
            assert step["per_token_ms"]["p50"] >= found["engine"]["token_every_ms"] - 1
        assert set(load["added"]) >= {"ttft_p50_ms", "ttft_p99_ms", "per_token_mean_ms", "e2e_p50_ms"}
        assert 0 < load["added"]["tokens_per_s_ratio"] < 2
        # Not that it is more than nothing: with 32 at once on two busy cores, it is not always.
        ttft_ms = [load[side]["ttft_ms"]["p50"] for side in ("alone", "behind")]
        assert load["added"]["ttft_p50_ms"] == pytest.approx(ttft_ms[1] - ttft_ms[0], abs=0.01)
    assert found["failed"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_interrupted_it_leaves_nothing_behind_either(number: signal.Signals, tmp_path: Path) -> None:
    process = await overhead(tmp_path)
    assert process.stderr is not None
    async with asyncio.timeout(ENDS_WITHIN_S):
        while not (await process.stderr.readline()).startswith(b"round 1"):
            pass
    below = descendants(process.pid)
    assert len(below) >= 4  # a keeper, an engine, a control, a node
    process.send_signal(number)
    out, _ = await asyncio.wait_for(process.communicate(), ENDS_WITHIN_S)
    assert (process.returncode, out) == (-signal.SIGKILL if number is signal.SIGKILL else 130, b"")
    await eventually(lambda: not list(filter(alive, below)), within_s=20, what="every process gone")
    await eventually(lambda: [path.name for path in tmp_path.iterdir()] == ["home"], what="its state gone")
