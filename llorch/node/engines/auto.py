"""Which engines this machine has, and which one `engine: auto` means.

Owns the registry and the choice: a llama-server that can use the GPU, else xllamacpp if it can, else the CPU where that
was asked for or there is no GPU. A GPU that would be left unused is refused with the mend, for the loss is easy not to
notice and hard to explain later. Facts come in from `detect`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llorch.errors import Code, ConfigError, LlorchError
from llorch.node.engines import external, llama_server, llamacpp, simulated
from llorch.node.engines.external import External
from llorch.node.engines.llama_server import LlamaServer
from llorch.node.engines.llamacpp import LlamaCpp
from llorch.node.engines.simulated import Simulated
from llorch.node.engines.spec import Engine

AUTO = "auto"
# What the extra [llamacpp] brings, by a name that is good wherever llorch itself came from.
INSTALL = "pip install xllamacpp, where llorch itself is installed"
MEND = (
    "install a llama-server built for this GPU and put it in PATH (or --llama-server PATH), "
    "or serve from the CPU with --allow-cpu"
)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What `detect` found. `python` has llorch; a version of None means: not there, or not usable."""

    python: str
    llama_server: str | None = None
    llama_server_version: str | None = None
    llama_server_flags: frozenset[str] = frozenset()
    llama_server_gpu: bool = False
    llama_server_problem: str | None = None
    xllamacpp_version: str | None = None
    xllamacpp_gpu: bool = False

    @property
    def has_llama_server(self) -> bool:
        return self.llama_server is not None and self.llama_server_problem is None


def _llama_server(facts: EngineFacts) -> Engine:
    if facts.llama_server is None:
        raise ConfigError("llama-server was not found", hint="give it with --llama-server PATH, or put it in PATH")
    if facts.llama_server_problem is not None:
        raise ConfigError(f"{facts.llama_server} can't be used: {facts.llama_server_problem}")
    return LlamaServer(facts.llama_server, facts.llama_server_version, facts.llama_server_flags)


def _llamacpp(facts: EngineFacts) -> Engine:
    if facts.xllamacpp_version is None:
        raise ConfigError("the embedded llama.cpp is not installed", hint=INSTALL)
    return LlamaCpp(facts.python, facts.xllamacpp_version)


def _external(_facts: EngineFacts) -> Engine:
    return External()


def _simulated(facts: EngineFacts) -> Engine:
    return Simulated(facts.python)


ENGINES: Mapping[str, Callable[[EngineFacts], Engine]] = {
    llamacpp.NAME: _llamacpp,
    llama_server.NAME: _llama_server,
    external.NAME: _external,
    simulated.NAME: _simulated,
}


def engine(name: str, facts: EngineFacts, *, gpus: bool, allow_cpu: bool) -> Engine:
    """The engine called `name` on this machine. `gpus`: there are some that the pool is to use.

    Raises ConfigError when it is not here, or would leave those GPUs unused though nobody allowed it.
    """
    if name == AUTO:
        name = choose(facts, gpus=gpus, allow_cpu=allow_cpu)
    try:
        made = ENGINES[name](facts)
    except KeyError:
        raise LlorchError(Code.INVALID_REQUEST, f"there is no engine {name}") from None
    if gpus and not allow_cpu and not _uses_gpu(name, facts):
        raise ConfigError(f"this machine has a GPU that the engine {name} can't use", hint=MEND)
    return made


def _uses_gpu(name: str, facts: EngineFacts) -> bool:
    if name == llama_server.NAME:
        return facts.llama_server_gpu
    return facts.xllamacpp_gpu if name == llamacpp.NAME else True


def choose(facts: EngineFacts, *, gpus: bool, allow_cpu: bool) -> str:
    """What `auto` means here."""
    if gpus and facts.has_llama_server and facts.llama_server_gpu:
        return llama_server.NAME
    if gpus and facts.xllamacpp_version is not None and facts.xllamacpp_gpu:
        return llamacpp.NAME
    if not facts.has_llama_server and facts.xllamacpp_version is None:
        problem = f" ({facts.llama_server}: {facts.llama_server_problem})" if facts.llama_server_problem else ""
        mend = MEND if gpus and not allow_cpu else INSTALL
        raise ConfigError(f"there is no engine on this machine{problem}", hint=mend)
    if gpus and not allow_cpu:
        raise ConfigError("this machine has a GPU, and no engine here can use it", hint=MEND)
    return llamacpp.NAME if facts.xllamacpp_version is not None else llama_server.NAME
