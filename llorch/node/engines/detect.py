"""Looks at this machine for engines: llama-server, the xllamacpp wheel, vllm, sglang; and whether llama.cpp has a GPU.

Owns the questions asked of them, each with a timeout, in processes of their own: a broken CUDA library must not take
the node with it. vllm and sglang are asked nothing, for to import them takes long: their files say what they are.
Answers with facts; `auto` chooses. Blocking: call it off the event loop.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from llorch.logs import Log, printable
from llorch.node.engines.auto import EngineFacts
from llorch.node.engines.environment import for_engine
from llorch.node.engines.llama_server import OPTIONAL

MAX_FIRST_LINE_BYTES = 256  # of a script; the kernel reads as much
SITE = "site-packages"
_PLAIN = re.compile(r"[\x21-\x7e]{1,64}")
ASK_TIMEOUT_S = 20.0  # a first CUDA initialisation takes some seconds
_DEVICE = re.compile(r"^\s+\w+: .*\([1-9]\d* MiB", re.MULTILINE)  # BLAS is listed as a device too, with 0 MiB
_VERSION = re.compile(r"version:\s*([\x21-\x7e]{1,64})")
_COUNT_GPUS = "import xllamacpp as x; print('gpus', sum('GPU' in str(d['type']) for d in x.get_device_info()))"

log = Log("engines")


def detect(llama_server: str | None, *, env: Mapping[str, str], look_for_gpus: bool = True) -> EngineFacts:
    """The facts. `llama_server` is a path from the settings; without one PATH is searched."""
    env = for_engine(env)
    program = shutil.which(llama_server or "llama-server", path=env.get("PATH"))
    if program is not None:
        version, flags, server_gpu, problem = _ask_llama_server(program, env)
    else:
        version, flags, server_gpu = None, frozenset[str](), False
        problem = "there is no such program" if llama_server is not None else None
    wheel = _xllamacpp_version()
    vllm, sglang = _script("vllm", env), _script("sglang", env)
    sglang_python = None if sglang is None else _interpreter(sglang)
    return EngineFacts(
        python=sys.executable,
        llama_server=program or llama_server,
        llama_server_version=version,
        llama_server_flags=flags,
        llama_server_gpu=server_gpu,
        llama_server_problem=problem,
        xllamacpp_version=wheel,
        xllamacpp_gpu=wheel is not None and look_for_gpus and _xllamacpp_gpu(env),
        vllm=() if vllm is None else (vllm,),
        vllm_version=None if vllm is None else _release("vllm", _interpreter(vllm)),
        sglang_python=sglang_python,
        sglang_version=None if sglang_python is None else _release("sglang", sglang_python),
    )


def _ask(argv: list[str], env: Mapping[str, str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=ASK_TIMEOUT_S, env=dict(env), stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {ASK_TIMEOUT_S:.0f} s"
    except OSError as error:
        return 126, error.strerror or type(error).__name__
    return done.returncode, (done.stdout + b"\n" + done.stderr).decode("utf-8", "replace")


def _ask_llama_server(program: str, env: Mapping[str, str]) -> tuple[str | None, frozenset[str], bool, str | None]:
    """(version, optional flags it knows, it lists a GPU, why it can't be used)."""
    code, said = _ask([program, "--version"], env)
    if code != 0:
        last = printable(said.strip().rpartition("\n")[2])[:200]
        return None, frozenset(), False, f"`{program} --version` failed ({last or f'exit {code}'})"
    found = _VERSION.search(said)
    _, usage = _ask([program, "--help"], env)
    flags = frozenset(option[0] for option in OPTIONAL if re.search(rf"(?<![\w-]){option[0]}(?![\w-])", usage))
    code, devices = _ask([program, "--list-devices"], env)
    return found[1] if found else None, flags, code == 0 and _DEVICE.search(devices) is not None, None


# ---------------------------------------------------------------- engines with a Python environment of their own


def _script(name: str, env: Mapping[str, str]) -> str | None:
    """The program that a package brings: in our own environment, which need not be in PATH, else in PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name, path=env.get("PATH"))


def _interpreter(script: str) -> str | None:
    """Who runs a script: by its first line, else who lies beside it. `env` and shells would find who knows what."""
    try:
        with Path(script).open("rb") as file:
            first = file.readline(MAX_FIRST_LINE_BYTES)
    except OSError:
        return None
    words = os.fsdecode(first[2:]).split() if first.startswith(b"#!") else []
    if len(words) == 1 and Path(words[0]).is_absolute() and "python" in Path(words[0]).name:
        return words[0]
    beside = (Path(script).resolve().parent / name for name in ("python3", "python"))
    return next((str(python) for python in beside if os.access(python, os.X_OK)), None)


def _release(package: str, python: str | None) -> str | None:
    """The version of a package in the environment of an interpreter."""
    if python is None:
        return None
    places = [str(place) for place in Path(python).parent.parent.glob(f"lib/python3*/{SITE}")]
    found = (one.version for one in importlib.metadata.distributions(name=package, path=places))
    return next((version for version in found if _PLAIN.fullmatch(version)), None)


def _xllamacpp_version() -> str | None:
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _xllamacpp_gpu(env: Mapping[str, str]) -> bool:
    code, said = _ask([sys.executable, "-c", _COUNT_GPUS], env)
    counted = re.search(r"^gpus (\d+)$", said, re.MULTILINE)
    if code != 0 or counted is None:
        log.warning("engine.unusable", engine="llamacpp", exit_code=code)
        return False
    return int(counted[1]) > 0
