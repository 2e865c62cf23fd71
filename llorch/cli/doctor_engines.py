"""What this machine's GPUs and engines answer, asked in a process of its own: `python -m` this module.

    stdin: a node's settings without their secrets, pickled by the parent ─▶ stdout: one line of JSON

Drivers and CUDA libraries hang, and take their process with them; whoever started this one ends it and its children
when its time is over. Owns both ends of that pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pickle
import signal
import sys
from typing import Any

from llorch.cli.doctor_machine import nvidia_cards
from llorch.cli.doctor_node_findings import Driver, Engines
from llorch.config import NodeSettings
from llorch.errors import ConfigError

LIMIT_S = 8.0  # a first CUDA initialisation takes some seconds
DIES_WITHIN_S = 1.0


async def ask(settings: NodeSettings) -> tuple[Driver, Engines] | None:
    """None if there is no answer in time, or the process that asked has died of it."""
    plain = dataclasses.replace(settings, service_token=None, node_token=None, join_token=None)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "llorch.cli.doctor_engines", start_new_session=True,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(LIMIT_S):
            said, _ = await child.communicate(pickle.dumps(plain))
        value = json.loads(said.strip().rpartition(b"\n")[2])
    except (TimeoutError, ValueError, OSError):
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # its children too: whatever it asked hangs with it
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):  # one that hangs in the driver does not even die of that
            async with asyncio.timeout(DIES_WITHIN_S):
                await child.wait()
    return Driver(**_tuples(value["driver"])), Engines(**_tuples(value["engines"]))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(item) if isinstance(item, list) else item for name, item in fields.items()}


# ---------------------------------------------------------------- the other end


def look_at_driver() -> Driver:
    from llorch.node.gpu import GpuInventory

    why = None
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # NVMLError of many kinds, or whatever a broken driver's library does
        why = type(error).__name__
    gpus = GpuInventory().read()
    version = next((gpu.driver for gpu in gpus), None)
    named = tuple(f"{gpu.name} ({gpu.vram_total_bytes >> 30} GiB)" for gpu in gpus)
    return Driver(nvidia_cards(), why, version, named)


def look_at_engines(settings: NodeSettings, gpu_count: int) -> Engines:
    from llorch.node.catalog import Catalog
    from llorch.node.engines.detect import detect
    from llorch.node.planner import Planner

    facts = detect(settings.llama_server, env=os.environ, look_for_gpus=gpu_count > 0)
    there = []
    if facts.llama_server is not None and facts.llama_server_problem is None:
        there.append(f"llama-server {facts.llama_server_version or 'of unknown version'}{_gpu(facts.llama_server_gpu)}")
    if facts.xllamacpp_version is not None:
        there.append(f"xllamacpp {facts.xllamacpp_version}{_gpu(facts.xllamacpp_gpu)}")
    if facts.vllm:
        there.append(f"vllm {facts.vllm_version or 'of unknown version'}")
    if facts.sglang_python is not None:
        there.append(f"sglang {facts.sglang_version or 'of unknown version'}")
    planner, pools = Planner(settings, Catalog(settings.data_dir, kept=False), frozenset(range(gpu_count))), []
    try:
        for spec in settings.effective_pools():
            plan = planner.plan(spec, facts)
            pools.append(f"{spec.id}: {', '.join(plan.choices)} on {plan.spec.engine}")
    except ConfigError as error:
        return Engines(tuple(there), tuple(pools), error.message, error.hint)
    return Engines(tuple(there), tuple(pools))


def _gpu(can: bool) -> str:
    return ", can use the GPU" if can else ""


def main() -> None:
    settings = pickle.load(sys.stdin.buffer)
    driver = look_at_driver()
    engines = look_at_engines(settings, len(driver.gpus))
    print(json.dumps({"driver": dataclasses.asdict(driver), "engines": dataclasses.asdict(engines)}), flush=True)


if __name__ == "__main__":
    main()
