"""An engine that says more than a reader's window: `python -m tests.faults.proof_flood PORT PACE_S`.

Answers /v1/completions. A request for one token gets one (that is how a node asks whether an engine works); any other
gets SAID_BYTES, a piece every PACE_S, and then nothing until its client leaves. The simulated engine's tokens are a few
bytes each: it would take minutes to fill the windows of a thousand readers with them.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web

PIECE_BYTES = 8 * 1024
SAID_BYTES = 384 * 1024  # more than the 128 KiB window, and what sockets hold beside it


def _chunk(text: str) -> dict[str, object]:
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": None}
    return {"id": "flood", "object": "text_completion", "created": 0, "model": "flood", "choices": [choice]}


async def complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if body.get("max_tokens") == 1:
        return web.json_response(_chunk("x"))
    event = f"data: {json.dumps(_chunk('x' * PIECE_BYTES))}\n\n".encode()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(SAID_BYTES // PIECE_BYTES):
        await response.write(event)
        await asyncio.sleep(float(sys.argv[2]))
    await asyncio.Event().wait()
    return response


async def health(request: web.Request) -> web.StreamResponse:
    return web.json_response({"status": "ok"})


def main() -> None:
    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/health", health)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, handler_cancellation=True, access_log=None)


if __name__ == "__main__":
    main()
