"""`llorch dev`: a whole cluster for as long as it runs, and nothing afterwards, whatever ended it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.cluster import Cluster, alive, descendants, eventually


def contexts(llorch: Cluster) -> str:
    files = list((llorch.folder / "home").rglob("contexts.json"))
    return files[0].read_text() if files else ""


@pytest.mark.llama
def test_dev_with_a_prompt_streams_real_llama_cpp_and_leaves_nothing(llorch: Cluster) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "llorch", "dev", "-p", "Once upon a time"],
        env=llorch.env(),
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    assert len(ran.stdout.split()) > 10
    assert '"dev"' not in contexts(llorch)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda ending: ending.name)
async def test_dev_leaves_no_process_and_no_context(llorch: Cluster, ending: signal.Signals) -> None:
    dev = llorch.start("dev", ["dev", "--nodes", "2", "--engine", "simulated"])
    await eventually(lambda: "ready: http" in dev.text(), within_s=30.0, what=f"dev is ready\n{dev.text()}")
    below = descendants(dev.pid)
    assert len(below) >= 6, "keeper, control, two nodes and their engines"
    assert '"dev"' in contexts(llorch)
    dev.process.send_signal(ending)
    dev.process.wait(20)
    await eventually(lambda: not [pid for pid in below if alive(pid)], within_s=15.0, what="every process gone")
    assert '"dev"' not in contexts(llorch)
