"""A stand-in for SGLang's server, as its module `sglang.launch_server` would be run; it needs no GPU and has no model.

Its surface is the real one's of 0.5.23: `sglang serve --help`, docs/references/production_metrics, and the words of
sglang/srt/entrypoints. Its key guards everything but `/health*`, `/ready*` and `/metrics`; it takes it from its command
line alone, and writes its arguments into its log at the level `info`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from aiohttp import web

from tests.standins.surface import Ask, Handler, Standin, parser, serve

HEALTH_TAKES_S = 0.2  # the real one looks once a second whether its token came


class Sglang(Standin):
    def guarded(self, path: str) -> bool:
        return not path.startswith(("/health", "/ready", "/metrics"))

    def error(self, status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
        return {"object": "error", "message": message, "type": kind, "param": param, "code": status}

    def too_long(self, tokens: int) -> str:
        return f"The input ({tokens} tokens) is longer than the model's context length ({self.ctx} tokens)."

    def choice(self, ask: Ask, text: str, finish: str | None) -> dict[str, Any]:
        return {"matched_stop": None}

    def metrics(self) -> str:
        counts = self.counts
        ranks = f'engine_type="unified",model_name="{self.model}",pp_rank="0",tp_rank="0"'
        return (
            "# HELP sglang:realtime_tokens_total Total number of tokens processed (updated on each log interval).\n"
            "# TYPE sglang:realtime_tokens_total counter\n"
            f'sglang:realtime_tokens_total{{{ranks},mode="prefill_compute"}} {counts.tokens_in}.0\n'
            f'sglang:realtime_tokens_total{{{ranks},mode="decode"}} {counts.tokens_out}.0\n'
            "# TYPE sglang:num_running_reqs gauge\n"
            f"sglang:num_running_reqs{{{ranks}}} {counts.running}.0\n"
            "# TYPE sglang:token_usage gauge\n"
            f"sglang:token_usage{{{ranks}}} 0.5\n"
            "# TYPE sglang:prompt_tokens_total counter\n"
            f'sglang:prompt_tokens_total{{{ranks},is_streaming="True"}} {counts.tokens_in}.0\n'
        )

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {
            ("GET", "/health"): self._health,
            ("GET", "/health_generate"): self._health,
            ("GET", "/get_server_info"): self._info,
        }

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        """It generates a token to know; while it hangs there is no answer for long."""
        await asyncio.sleep(20 if self.hung else HEALTH_TAKES_S)
        return web.Response(status=503 if self.hung else 200)

    async def _info(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"context_length": self.ctx, "max_running_requests": self.slots})


def main() -> None:
    flags = parser("sglang serve")
    flags.add_argument("--model-path", "--model", required=True)
    flags.add_argument("--api-key")
    flags.add_argument("--context-length", type=int, default=4096)
    flags.add_argument("--max-running-requests", type=int, default=256)
    flags.add_argument("--enable-metrics", action="store_true")
    flags.add_argument("--enable-cache-report", action="store_true")
    flags.add_argument("--log-level", default="info")
    flags.add_argument("--mem-fraction-static", type=float, default=0.9)
    given = flags.parse_args()
    if given.log_level == "info":
        print(f"server_args={vars(given)}", flush=True)
    name = given.served_model_name or given.model_path
    sys.stdout.flush()
    serve(Sglang(name, given.api_key, given.max_running_requests, given.context_length), given.host, given.port)


if __name__ == "__main__":
    main()
