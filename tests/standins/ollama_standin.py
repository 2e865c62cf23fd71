"""A stand-in for an Ollama that someone runs already: `serve()` in this process, on any address of this machine.

Its surface is the real one's: docs/openai.md and docs/api.md of Ollama. There is no `/health`, no key, no `/metrics`;
models are called `name:tag`, and what it does not have it says with 404.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from tests.standins.surface import Ask, Handler, Standin


class Ollama(Standin):
    def guarded(self, path: str) -> bool:
        return False

    def error(self, status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
        if status == 404:
            message = f"model '{self.asked}' not found"
        return {"error": {"message": message, "type": "api_error", "param": None, "code": None}}

    @property
    def asked(self) -> str:
        return str(self.seen[-1].get("model"))

    def too_long(self, tokens: int) -> str:
        return "the input length exceeds the context length"

    def choice(self, ask: Ask, text: str, finish: str | None) -> dict[str, Any]:
        return {}

    def metrics(self) -> str:
        raise web.HTTPNotFound

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {("GET", "/"): self._root, ("GET", "/api/version"): self._version}

    async def _root(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(text="Ollama is running")

    async def _version(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"version": "0.12.0"})


async def serve(model: str, host: str = "127.0.0.1") -> tuple[Ollama, web.AppRunner, str]:
    """The stand-in, what ends it (`cleanup()`), and its URL."""
    ollama = Ollama(model, None, 4, 4096)
    runner = web.AppRunner(ollama.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, host, 0).start()
    return ollama, runner, f"http://{host}:{runner.addresses[0][1]}"
