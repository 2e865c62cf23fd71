"""What `llorch dev` does itself when its keeper was killed and left roles that do not end by themselves."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from llorch.cli import contexts, dev_cluster
from llorch.cli.keeper import process_start
from tests.cluster import alive


async def test_what_a_killed_keeper_left_is_ended_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev_cluster, "ROLE_GRACE_S", 0.05)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    state = tmp_path / "state"
    state.mkdir()
    (state / "control.log").write_text("")
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    role, bystander = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for process in (role, bystander):
            assert process.stdout is not None
            await process.stdout.readline()
        with contexts.changing(contexts.contexts_path({"XDG_CONFIG_HOME": str(tmp_path)})) as known:
            known.named |= {"dev": contexts.Context("u", keeper="5:5"), "dev-2": contexts.Context("u", keeper="6:6")}
        hello = {"state": str(state), "keeper": "5:5"}
        cluster = dev_cluster.Cluster(None, hello, dev_cluster.Tokens.make())  # type: ignore[arg-type]
        cluster._started += [f"{role.pid}:{process_start(role.pid)}", f"{bystander.pid}:1"]
        await cluster._clean_up()
        assert await role.wait() == -9
        assert alive(bystander.pid), "its id is not the id of a role any more"
        assert not state.exists()
        assert set(contexts.load(contexts.contexts_path({"XDG_CONFIG_HOME": str(tmp_path)})).named) == {"dev-2"}
    finally:
        for process in (role, bystander):
            if process.returncode is None:
                process.kill()
            await process.wait()
