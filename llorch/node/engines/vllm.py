"""vLLM's OpenAI server: `vllm serve MODEL`.

Owns its flags. Its key goes by the environment, and guards only `/v1`: `/invocations`, `/pause`, `/update_weights` and
others stay open to whoever reaches its port, so it is on loopback, and a node calls the paths of one table alone. Its
parts find each other through PyTorch's TCPStore, which listens on every address, without a key: only the machine's
packet filter closes that. Flags: docs/cli of 0.33; docs/usage/security.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llorch.config_pools import PoolSpec
from llorch.node.engines.spec import (
    GGUF,
    HF,
    LOOPBACK,
    Launch,
    model_argument,
    refuse_reserved,
    visible_gpus,
)

NAME = "vllm"
KEY_ENV = "VLLM_API_KEY"
QUIET_SINCE = (0, 10)  # before it every prompt was logged unless a flag said not to; with it that flag began to go
_RELEASE = re.compile(r"(\d{1,4})\.(\d{1,4})")


@dataclass(frozen=True, slots=True)
class Vllm:
    """`program` is what `serve` follows."""

    program: tuple[str, ...]
    version: str | None = None
    name: str = NAME
    needs_model: bool = True
    formats: frozenset[str] = frozenset({GGUF, HF})
    inner_ports_open: bool = True

    def launch(self, pool: PoolSpec, *, model_id: str, port: int, key_file: str, model_path: str | None) -> Launch:
        refuse_reserved(pool, NAME)
        argv = [*self.program, "serve", model_argument(pool, model_path)]
        if pool.gpus is not None and len(pool.gpus) > 1:
            argv += ["--tensor-parallel-size", str(len(pool.gpus))]
        argv += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        argv += ["--disable-log-requests"] if self._logs_prompts else []
        argv += pool.args  # in front: of a flag that is given twice the last counts
        argv += ["--host", LOOPBACK, "--port", str(port), "--served-model-name", model_id]
        argv += ["--max-num-seqs", str(pool.slots), "--max-model-len", str(pool.ctx)]
        env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **visible_gpus(pool), **dict(pool.env)}
        return Launch(tuple(argv), env, KEY_ENV)

    @property
    def _logs_prompts(self) -> bool:
        release = _RELEASE.match(self.version or "")
        return release is not None and (int(release[1]), int(release[2])) < QUIET_SINCE
