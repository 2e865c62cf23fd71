"""A stand-in for vLLM: `python -m tests.standins.vllm_standin serve MODEL --flags`; it has no model and needs no GPU.

Its surface is the real one's: docs/cli/serve, docs/usage/metrics and docs/usage/security of vLLM, and the words of
vllm/entrypoints/openai. Its key guards `/v1` alone.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.standins.surface import Ask, Handler, Standin, parser, serve


@dataclass
class Vllm(Standin):
    paused: bool = False

    def guarded(self, path: str) -> bool:
        return path.startswith(("/v1", "/v2", "/inference"))

    def error(self, status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
        return {"error": {"message": message, "type": kind, "param": param, "code": status}}

    def too_long(self, tokens: int) -> str:
        return f"This model's maximum context length is {self.ctx} tokens. However, your request has {tokens} of input."

    def choice(self, ask: Ask, text: str, finish: str | None) -> dict[str, Any]:
        return {"stop_reason": None} if finish else {}

    def metrics(self) -> str:
        labels, counts = f'engine="0",model_name="{self.model}"', self.counts
        rows = (
            ("num_requests_running", "gauge", "", counts.running),
            ("num_requests_waiting", "gauge", "", counts.waiting),
            ("kv_cache_usage_perc", "gauge", "", 0.25),
            ("prompt_tokens_total", "counter", "", counts.tokens_in),
            ("generation_tokens_total", "counter", "", counts.tokens_out),
            ("iteration_tokens_total_sum", "histogram", "", counts.tokens_in + counts.tokens_out),
            ("iteration_tokens_total_bucket", "histogram", ',le="+Inf"', counts.steps),
            ("iteration_tokens_total_count", "histogram", "", counts.steps),
        )
        return "".join(
            f"# HELP vllm:{name} Of vLLM.\n# TYPE vllm:{name} {kind}\nvllm:{name}{{{labels}{more}}} {float(value)}\n"
            for name, kind, more, value in rows
        )

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {
            ("GET", "/health"): self._health,
            ("POST", "/invocations"): self.generate,  # without a key
            ("POST", "/pause"): self._pause,
        }

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        return web.Response()  # also when its engine hangs

    async def _pause(self, _request: web.Request) -> web.StreamResponse:
        self.paused = True
        await asyncio.sleep(0)
        return web.json_response({"status": "paused"})


def main() -> None:
    flags = parser("vllm serve")
    flags.add_argument("model_tag")
    flags.add_argument("--api-key", nargs="+", default=None)
    flags.add_argument("--max-num-seqs", type=int, default=256)
    flags.add_argument("--max-model-len", type=int, default=4096)
    flags.add_argument("--enable-prompt-tokens-details", action="store_true")
    flags.add_argument("--disable-uvicorn-access-log", action="store_true")
    flags.add_argument("--dtype", default="auto")
    assert sys.argv[1] == "serve", sys.argv
    given = flags.parse_args(sys.argv[2:])
    key = given.api_key[0] if given.api_key else os.environ.get("VLLM_API_KEY")
    name = given.served_model_name or given.model_tag
    serve(Vllm(name, key, given.max_num_seqs, given.max_model_len), given.host, given.port)


if __name__ == "__main__":
    main()
