"""SGLang's server: `python -m sglang.launch_server`, with its key from the environment.

Owns its flags. It takes its key from nothing but its command line, or from a file that names all flags; so the few
lines that start it read the key from the environment and give it to the parser, where no list of processes shows it.
It would write its arguments into its log, key and all, at any level below `warning`. Its parts find each other through
PyTorch's TCPStore, which listens on every address, without a key: only the machine's packet filter closes that.
Flags: `sglang serve --help` of 0.5.23, whose middleware leaves only `/health*`, `/ready*` and `/metrics` without key.
"""

from __future__ import annotations

from dataclasses import dataclass

from llorch.config_pools import PoolSpec
from llorch.node.engines.spec import GGUF, HF, LOOPBACK, Launch, model_argument, refuse_reserved, visible_gpus

NAME = "sglang"
KEY_ENV = "LLORCH_ENGINE_KEY"
# Run by the interpreter that has sglang, which need not have llorch. Children are spawned from the module's own name.
START = (
    "import os, runpy, sys; "
    f"sys.argv += ['--api-key=' + os.environ.pop('{KEY_ENV}')]; "
    "runpy.run_module('sglang.launch_server', run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True, slots=True)
class Sglang:
    """`python` is the interpreter that has sglang."""

    python: str
    version: str | None = None
    name: str = NAME
    needs_model: bool = True
    formats: frozenset[str] = frozenset({GGUF, HF})
    inner_ports_open: bool = True

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        refuse_reserved(pool, NAME)
        argv = [self.python, "-c", START]
        if pool.gpus is not None and len(pool.gpus) > 1:
            argv += ["--tensor-parallel-size", str(len(pool.gpus))]
        argv += ["--enable-metrics", "--enable-cache-report"]
        argv += pool.args  # in front: of a flag that is given twice the last counts
        argv += ["--model-path", model_argument(pool, model_path), "--served-model-name", model_id]
        argv += ["--host", LOOPBACK, "--port", str(port), "--log-level", "warning"]
        argv += ["--max-running-requests", str(pool.slots), "--context-length", str(pool.ctx)]
        return Launch(tuple(argv), {**visible_gpus(pool), **dict(pool.env)}, KEY_ENV)
