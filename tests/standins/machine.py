"""A stand-in for a node's machine, for a node that is a process: a clock on the wall and one GPU, as a file has them.

Imported before the node starts. `LLORCH_TEST_MACHINE` names the file: JSON with `wall` (ISO time) and `foreign` (bytes
of the GPU that a program of somebody else's holds). The machine is read ten times a second, and its own clock is fast.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from llorch.messages import Gpu
from llorch.node import app
from llorch.node.gpu import GpuInventory
from llorch.node.machine import Machine
from tests.standins.nvml import GB, Card, StandInNvml

VARIABLE = "LLORCH_TEST_MACHINE"
FASTER = 40
SOMEBODY = 1  # a pid that is no engine's
_file = Path(os.environ[VARIABLE])


def said() -> dict[str, Any]:
    found = json.loads(_file.read_text())
    assert isinstance(found, dict)
    return found


class FromFile(GpuInventory):
    def __init__(self) -> None:
        self.card = Card(total=80 * GB, used=0)
        super().__init__(StandInNvml(self.card), sysfs=_file.parent / "no-amd", host_pids=True)

    def read(self, own_pids: Iterable[int] = ()) -> list[Gpu]:
        foreign = int(said()["foreign"])
        self.card.used = foreign
        self.card.running = [(SOMEBODY, foreign)] if foreign else []
        return super().read(own_pids)


def _machine(data_dir: Path) -> Machine:
    return Machine(
        data_dir,
        inventory=FromFile(),
        clock=lambda: time.monotonic() * FASTER,
        wall=lambda: datetime.fromisoformat(said()["wall"]),
    )


app.Machine = _machine  # type: ignore[misc, assignment]
app.REFRESH_S = 0.1
