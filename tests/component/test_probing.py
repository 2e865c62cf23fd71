"""What is asked of an engine before it may serve, however its answers are cut on the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from llorch.node import probing
from llorch.node.engines.progress import Progress
from llorch.node.handoff import Handoff

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

COMPLETION = {"choices": [{"text": "t0 ", "finish_reason": "length"}]}
PROPS = {"total_slots": 3, "default_generation_settings": {"n_ctx": 512}}


@contextlib.asynccontextmanager
async def an_engine(
    *, embeds: bool = False, chats: bool = False, cut: bool = True, hangs: str = "", asked: list[str] | None = None
) -> AsyncIterator[Handoff]:
    """Each of its answers comes in two pieces, the second when the first must have been read.

    To `hangs` it never answers; `asked` hears of every path.
    """

    @web.middleware
    async def seen(request: web.Request, handler: Handler) -> web.StreamResponse:
        if asked is not None:
            asked.append(request.path)
        if request.path == hangs:
            await asyncio.Event().wait()
        return await handler(request)

    async def pieces(request: web.Request, value: object) -> web.StreamResponse:
        raw = json.dumps(value).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(raw))})
        await response.prepare(request)
        await response.write(raw[: len(raw) // 2])
        await asyncio.sleep(0.02)
        if not cut:
            await response.write(raw[len(raw) // 2 :])
        elif request.transport is not None:
            request.transport.abort()
        return response

    async def complete(request: web.Request) -> web.StreamResponse:
        return web.Response(status=501) if embeds or chats else await pieces(request, COMPLETION)

    async def chat(request: web.Request) -> web.StreamResponse:
        return await pieces(request, COMPLETION) if chats else web.Response(status=404)

    async def metrics(_request: web.Request) -> web.StreamResponse:
        return web.Response(text='vllm:generation_tokens_total{model_name="m"} 7.0\n' + "# x\n" * 500_000)

    async def embed(request: web.Request) -> web.StreamResponse:
        return await pieces(request, {"data": [{"embedding": [0.25] * 30_000}]})

    async def props(request: web.Request) -> web.StreamResponse:
        return await pieces(request, PROPS)

    async def health(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok"})

    app = web.Application(middlewares=[seen])
    app.router.add_get("/health", health)
    app.router.add_post("/v1/completions", complete)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/metrics", metrics)
    app.router.add_post("/v1/embeddings", embed)
    app.router.add_get("/props", props)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield Handoff(pool_id="p", replica_id="r0", engine="vllm", url=url, model="m")
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("embeds", [False, True])
async def test_an_answer_that_comes_in_pieces_is_read_whole(embeds: bool) -> None:
    async with an_engine(embeds=embeds, cut=False) as handoff, aiohttp.ClientSession() as http:
        assert await probing.generates(http, handoff) == probing.Answer(slots=3, ctx=512)


async def test_an_engine_that_only_chats_is_ready_by_a_chat() -> None:
    asked: list[str] = []
    async with an_engine(chats=True, cut=False, asked=asked) as handoff, aiohttp.ClientSession() as http:
        await probing.generates(http, handoff)
    assert asked == ["/health", "/v1/completions", "/v1/chat/completions", "/props"]


async def test_counters_are_read_from_a_long_page_and_none_where_nothing_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with an_engine(cut=False) as handoff, aiohttp.ClientSession() as http:
        assert await probing.progress(http, handoff) == Progress((0.0, 7.0, 0.0))
    monkeypatch.setattr(probing, "HEALTH_TIMEOUT_S", 0.05)
    async with an_engine(hangs="/metrics") as handoff, aiohttp.ClientSession() as http:
        assert await probing.progress(http, handoff) is None
    async with aiohttp.ClientSession() as http:
        assert await probing.progress(http, handoff) is None


async def test_an_answer_that_breaks_off_is_none() -> None:
    async with an_engine() as handoff, aiohttp.ClientSession() as http:
        with pytest.raises(probing.NotYet, match="no proper answer to /v1/completions"):
            await probing.generates(http, handoff)


async def test_an_engine_that_hangs_is_not_ready_though_its_health_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "TOKEN_TIMEOUT_S", 0.05)
    async with an_engine(hangs="/v1/completions") as handoff, aiohttp.ClientSession() as http:
        with pytest.raises(probing.NotYet, match="no answer to /v1/completions"):
            await probing.generates(http, handoff)


async def test_an_engine_that_is_too_busy_to_say_how_it_is_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "HEALTH_TIMEOUT_S", 0.05)
    async with an_engine(hangs="/health") as handoff, aiohttp.ClientSession() as http:
        assert await probing.lost(http, handoff) is None
    async with aiohttp.ClientSession() as http:
        assert await probing.lost(http, handoff) == "nothing listens at its url any more"


async def test_looking_at_an_engine_asks_for_nothing_that_keeps_it_awake() -> None:
    """llama-server puts its model to sleep where nothing is asked; `/slots` counts as being asked."""
    asked: list[str] = []
    async with an_engine(cut=False, asked=asked) as handoff, aiohttp.ClientSession() as http:
        for _ in range(3):
            assert await probing.lost(http, handoff) is None
        assert asked == ["/health"] * 3
        asked.clear()
        await probing.generates(http, handoff)  # once, before it may serve
        assert asked == ["/health", "/v1/completions", "/props"]
