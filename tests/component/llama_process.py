"""A llama.cpp of its own for a test: the embedded engine as a process, with the demo model, over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from llorch import demo

KEY = "a-key-for-this-test-only-0123456789"
UP_WITHIN_S = 30.0
SLOTS, CTX = 2, 512


class Server:
    """A process, begun and awaited without a loop, so that the tests of a module can share one."""

    def __init__(self, folder: Path, *args: str) -> None:
        key_file = folder / "key"
        key_file.write_text(KEY + "\n")
        self.log = folder / "log"
        self.url = ""
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llorch.node.engines.llamacpp_server", *flags(key_file), *args],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip

    async def post(self, session: aiohttp.ClientSession, path: str, body: Any, key: str = KEY) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with session.post(self.url + path, json=body, headers=headers) as answer:
            return answer.status, await answer.text()

    async def chunks(self, session: aiohttp.ClientSession, path: str, **body: Any) -> list[Any]:
        """The JSON of a stream that ended with [DONE]."""
        usage = {"include_usage": True}
        status, text = await self.post(session, path, {"stream": True, "stream_options": usage, **body})
        assert status == 200, text
        data = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert data.pop() == "[DONE]"
        return [json.loads(chunk) for chunk in data]

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def listening(self) -> str:
        assert self.process.poll() is None, self.said()
        return next((line.split()[-1] for line in self.said().splitlines() if "llamacpp_server: listening" in line), "")


def flags(key_file: Path) -> list[str]:
    return [
        *("--host", "127.0.0.1", "--port", "0", "--api-key-file", str(key_file), "--alias", "demo"),
        *("--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CTX), "--cache-ram", "0", "--no-cache-idle-slots"),
        *("--no-webui", "--n-gpu-layers", "0", "--threads", "1"),  # two that share a core wait for each other
    ]


@contextmanager
def serving(folder: Path, *args: str) -> Iterator[Server]:
    server = Server(folder, "--model", demo.model_path(), *args)
    try:
        until = time.monotonic() + UP_WITHIN_S
        while not (url := server.listening()):
            assert time.monotonic() < until, server.said()
            time.sleep(0.02)
        server.url = url
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
