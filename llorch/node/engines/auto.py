"""Which engines this machine has, and which one `engine: auto` means.

Owns the registry and the choice, which falls on llama.cpp alone: others take all of a GPU's memory, and minutes to
start, so a person has to have named them. A llama-server that can use the GPU, else xllamacpp if it can, else the CPU
where that was asked for or there is no GPU. A GPU that would be left unused is refused with the mend, for the loss is
easy not to notice and hard to explain later. Facts come in from `detect`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llorch.config_pools import PoolSpec
from llorch.errors import Code, ConfigError, LlorchError
from llorch.node.engines import command, external, llama_server, llamacpp, sglang, simulated, vllm
from llorch.node.engines.command import Command
from llorch.node.engines.external import External
from llorch.node.engines.llama_server import LlamaServer
from llorch.node.engines.llamacpp import LlamaCpp
from llorch.node.engines.sglang import Sglang
from llorch.node.engines.simulated import Simulated
from llorch.node.engines.spec import Engine
from llorch.node.engines.vllm import Vllm

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
    vllm: tuple[str, ...] = ()  # what starts it; empty: it is not here
    vllm_version: str | None = None
    sglang_python: str | None = None  # the interpreter that has it
    sglang_version: str | None = None

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


def _vllm(facts: EngineFacts) -> Engine:
    if not facts.vllm:
        raise ConfigError("vllm was not found", hint=elsewhere(vllm.NAME))
    return Vllm(facts.vllm, facts.vllm_version)


def _sglang(facts: EngineFacts) -> Engine:
    if facts.sglang_python is None:
        raise ConfigError("sglang was not found", hint=elsewhere(sglang.NAME))
    return Sglang(facts.sglang_python, facts.sglang_version)


def elsewhere(name: str) -> str:
    """The mend for an engine that has an environment of its own, as these mostly do."""
    return f"put the program {name} of its environment in the agent's PATH, or start it with engine: command"


def _command(_facts: EngineFacts) -> Engine:
    return Command()


def _simulated(facts: EngineFacts) -> Engine:
    return Simulated(facts.python)


ENGINES: Mapping[str, Callable[[EngineFacts], Engine]] = {
    llamacpp.NAME: _llamacpp,
    llama_server.NAME: _llama_server,
    vllm.NAME: _vllm,
    sglang.NAME: _sglang,
    command.NAME: _command,
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


def wants_model(made: Engine, pool: PoolSpec) -> bool:
    """The pool's model has to be on this machine before `made` starts."""
    return made.needs_model or (made.name == command.NAME and command.names_model(pool))
