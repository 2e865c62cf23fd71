"""What `llorch dev` looks at on this machine before it starts anything, and when an engine would not start.

Owns the looks (is xllamacpp there and whole, is the model a file that an engine can open, is the port free, can a
context be kept) and the port that is held until the control takes it. Raises Failure or ConfigError with the mend;
the words are `dev_words`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from llorch.cli import contexts
from llorch.cli.dev_words import SIMULATED, Fault, install_words, program_words, short_path, wheel_fault
from llorch.cli.exits import Exit
from llorch.cli.output import Failure
from llorch.errors import ConfigError

WHEEL = "xllamacpp"
LOOPBACK = "127.0.0.1"
IMPORT_WITHIN_S = 20.0  # a first CUDA initialisation takes some seconds


def failure(fault: Fault, code: Exit = Exit.FAILED) -> Failure:
    return Failure(fault.message, code=code, why=fault.why, hint=fault.hint)


def check_system() -> None:
    if sys.platform != "linux":
        raise Failure(
            "llorch dev needs Linux, as nodes do",
            code=Exit.USAGE,
            hint="control and client run here: llorch control, llorch chat --url URL",
        )


# ---------------------------------------------------------------- llama.cpp


def check_wheel() -> None:
    """That it is there. Whether it is whole is asked when an engine ended: to import it here would cost every start."""
    if importlib.util.find_spec(WHEEL) is None:
        raise Failure(
            f"the engine llamacpp needs the package {WHEEL}, which is not installed",
            code=Exit.USAGE,
            hint=f"{_install()}; {SIMULATED}",
        )


def _install(*, again: bool = False) -> str:
    requirement = WHEEL
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("llorch") or ():
            if line.startswith(WHEEL):
                requirement = line.partition(";")[0].strip()
    has_pip = importlib.util.find_spec("pip") is not None
    return install_words(sys.executable, requirement, has_pip=has_pip, again=again)


async def wheel_trouble(env: Mapping[str, str]) -> Fault | None:
    """What is wrong with xllamacpp, found by importing it in a process of its own: it may end that."""
    asked = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", f"import {WHEEL}", env=dict(env),  # not what lies in this directory
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(IMPORT_WITHIN_S):
            _, said = await asked.communicate()
    except TimeoutError:
        return None
    finally:
        if asked.returncode is None:
            asked.kill()
            await asked.wait()
    return wheel_fault(asked.returncode or 0, said.decode("utf-8", "replace"), _install(again=True))


# ---------------------------------------------------------------- the model


def check_model(ref: str) -> None:
    """That a node could open it. Raises ConfigError with what to do."""
    if ref == "demo":
        return
    from llorch.node.catalog import Catalog, check_ref

    try:
        if check_ref(ref).startswith(("hf:", "https:", "http:")):
            return  # the node fetches it
        Catalog().find(ref)
    except ConfigError as error:
        hint = f"-m file:{Path(ref).absolute()}" if Path(ref).is_file() else "-m demo, or -m file:/abs/path.gguf"
        raise ConfigError(error.message, hint=hint) from None


# ---------------------------------------------------------------- the port


@contextlib.contextmanager
def held_port(port: int) -> Iterator[int]:
    """A port for the control, 0 meaning any, so that the nodes know its URL before it is there. Nobody who asks for
    any port is given it meanwhile: it is bound here and not listened on, which Linux lets a second socket share that
    has SO_REUSEADDR too, as every listener of llorch has. Raises Failure if it is taken.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((LOOPBACK, port))
        except OSError as error:
            raise Failure(
                f"port {port} of {LOOPBACK} can't be listened on",
                code=Exit.USAGE,
                why=error.strerror,
                hint="give another --port, or none: then a free one is taken",
            ) from None
        yield int(sock.getsockname()[1])


# ---------------------------------------------------------------- the context


def check_context_place(path: Path) -> None:
    """That a context can be kept, as far as can be told without leaving anything. Raises Failure or ConfigError."""
    folder = next(folder for folder in path.parents if os.path.lexists(folder))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise Failure(
            f"the context of this cluster can't be kept in {path.parent}",
            code=Exit.USAGE,
            why=f"{folder} can't be written" if folder.is_dir() else f"{folder} is not a directory",
            hint="XDG_CONFIG_HOME=DIR llorch dev, with a directory that can; or -p PROMPT, which keeps none",
        )
    contexts.load(path)


def is_current(env: Mapping[str, str]) -> bool:
    """Whether commands in a shell like this one would take the current context: its variables go before."""
    return not any(env.get(name) for name in ("LLORCH_URL", "LLORCH_TOKEN", "LLORCH_TOKEN_FILE", "LLORCH_TLS_CA"))


def program() -> str:
    """What a person types for llorch in a shell like this one."""
    found, typed = shutil.which("llorch"), Path(shutil.which(sys.argv[0]) or sys.argv[0]).absolute()
    if not typed.exists():
        return f"{short_path(sys.executable, _home())} -m llorch"
    same = found is not None and Path(found).samefile(typed)
    return program_words(str(typed), found=same, python=sys.executable, home=_home())


def shown_path(path: Path) -> str:
    return short_path(str(path), _home())


def _home() -> str:
    try:
        return str(Path.home())
    except RuntimeError:  # this user has none
        return "/nonexistent"
