"""The embedded engine as the process it is: real llama.cpp with the demo model, over HTTP, ended by signals."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from llorch import demo
from llorch.node.engines import llamacpp_server
from tests.component.llama_process import CTX, KEY, SLOTS, UP_WITHIN_S, Server, flags, serving

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.llama

ENDS_WITHIN_S = 5.0
MESSAGES = [{"role": "user", "content": "Tell me a story"}]


def ended(server: Server) -> int:
    return server.process.wait(UP_WITHIN_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("llama"), "--metrics") as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as made:
        yield made


async def test_health_needs_no_key_and_all_else_does(server: Server, session: aiohttp.ClientSession) -> None:
    async with session.get(server.url + "/health") as answer:
        assert (answer.status, await answer.json()) == (200, {"status": "ok"})
    for key in ("", "another"):
        status, text = await server.post(session, "/v1/completions", {"prompt": "a", "max_tokens": 1}, key)
        assert (status, json.loads(text)["error"]["code"]) == (401, 401)
    for path in ("/metrics", "/slots", "/props", "/v1/models"):
        async with session.get(server.url + path) as answer:
            assert answer.status == 401, path


async def test_the_flags_arrive(server: Server, session: aiohttp.ClientSession) -> None:
    async with session.get(server.url + "/props", headers={"Authorization": f"Bearer {KEY}"}) as answer:
        props = await answer.json()
    assert (props["total_slots"], props["model_alias"], props["ui"]) == (SLOTS, "demo", False)
    assert props["default_generation_settings"]["n_ctx"] == CTX
    async with session.get(server.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"}) as answer:
        assert "llamacpp:n_decode_total" in await answer.text()


async def test_a_page_of_another_origin_is_not_let_in(server: Server, session: aiohttp.ClientSession) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    async with session.options(server.url + "/v1/completions", headers=headers) as answer:
        assert answer.headers.get("Access-Control-Allow-Origin", "") == ""
        assert answer.headers.get("Access-Control-Allow-Credentials") != "true"


async def test_a_completion_streams_to_its_limit(server: Server, session: aiohttp.ClientSession) -> None:
    chunks = await server.chunks(session, "/v1/completions", prompt="Once upon a time", max_tokens=32, seed=1)
    *tokens, last = [chunk["choices"][0] for chunk in chunks]
    assert len(tokens) == 32
    assert all(token["text"] for token in tokens)
    assert (last["text"], last["finish_reason"]) == ("", "length")
    assert chunks[-1]["usage"]["completion_tokens"] == 32
    assert chunks[-1]["timings"]["predicted_n"] == 32


async def test_a_chat_streams_with_its_usage_in_a_chunk_of_no_choices(
    server: Server, session: aiohttp.ClientSession
) -> None:
    first, *tokens, last, usage = await server.chunks(
        session, "/v1/chat/completions", messages=MESSAGES, max_tokens=16, model="demo"
    )
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert [bool(chunk["choices"][0]["delta"]["content"]) for chunk in tokens] == [True] * 16
    assert last["choices"][0] == {"finish_reason": "length", "index": 0, "delta": {}}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 16
    assert usage["timings"]["predicted_n"] == 16


async def test_the_same_seed_says_the_same(server: Server, session: aiohttp.ClientSession) -> None:
    body = {"prompt": "The", "max_tokens": 32, "seed": 7, "temperature": 1.0, "cache_prompt": False}
    first, second = [json.loads((await server.post(session, "/v1/completions", body))[1]) for _ in range(2)]
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


async def test_a_schema_is_kept_to(server: Server, session: aiohttp.ClientSession) -> None:
    body = {"messages": MESSAGES, "max_tokens": 200, "json_schema": {"enum": ["yes", "no"]}}
    status, text = await server.post(session, "/v1/chat/completions", body)
    assert status == 200, text
    assert json.loads(json.loads(text)["choices"][0]["message"]["content"]) in ("yes", "no")


async def test_a_prompt_longer_than_a_slot_is_refused_with_both_sizes(
    server: Server, session: aiohttp.ClientSession
) -> None:
    status, text = await server.post(session, "/v1/completions", {"prompt": "the " * 2 * CTX, "max_tokens": 1})
    error = json.loads(text)["error"]
    assert (status, error["type"], error["n_ctx"]) == (400, "exceed_context_size_error", CTX)
    assert error["n_prompt_tokens"] > CTX


async def test_what_is_asked_and_said_is_not_logged(server: Server, session: aiohttp.ClientSession) -> None:
    secret = "mountainous-canary"
    _, text = await server.post(session, "/v1/completions", {"prompt": secret, "max_tokens": 16})
    for path, body in (
        ("/v1/completions", {"prompt": [secret, {}]}),
        ("/v1/completions", {"prompt": f"{secret} \ud800"}),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": [{"name": secret}]}),
    ):
        assert (await server.post(session, path, body))[0] in (400, 500)
    assert secret not in server.said()
    assert json.loads(text)["choices"][0]["text"] not in server.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_at_once_also_in_the_middle_of_an_answer(
    tmp_path: Path, session: aiohttp.ClientSession, number: signal.Signals
) -> None:
    with serving(tmp_path) as server:
        body = {"prompt": "The", "max_tokens": 400, "stream": True, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        async with session.post(server.url + "/v1/completions", json=body, headers=headers) as answer:
            await answer.content.readline()
            sent = time.monotonic()
            server.process.send_signal(number)
            ended(server)
            assert time.monotonic() - sent < ENDS_WITHIN_S


async def test_embeddings_with_a_pooling(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    with serving(tmp_path, "--embeddings", "--pooling", "last") as server:
        status, text = await server.post(session, "/v1/embeddings", {"input": ["one", "two"], "model": "demo"})
        assert status == 200, text
        assert [len(entry["embedding"]) for entry in json.loads(text)["data"]] == [128, 128]


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "folder"])
async def test_a_bad_model_ends_it_with_a_line_that_names_it(tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model.gguf"
    if damage == "text":
        model.write_text("not a model")
    elif damage == "cut":
        model.write_bytes(Path(demo.model_path()).read_bytes()[:300_000])
    elif damage == "folder":
        model.mkdir()
    server = Server(tmp_path, "--model", str(model))
    assert ended(server) == 1
    (why,) = [line for line in server.said().splitlines() if line.startswith("llamacpp_server: ")]
    assert str(model) in why
    assert (
        "can't be read" if damage in ("missing", "folder") else "is not a usable GGUF"
    ) in why  # llama.cpp never saw it


async def test_a_port_that_is_taken_ends_it(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        port = server.url.rpartition(":")[2]
        folder = tmp_path / "second"
        folder.mkdir()
        second = Server(folder, "--model", demo.model_path(), "--port", port)
        assert ended(second) == 1
        # Of its own words, for llama.cpp's threads may have the last ones.
        (why,) = [line for line in second.said().splitlines() if line.startswith("llamacpp_server: ")]
        assert port in why


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--bogus", "1"], "--bogus"),
        (["--seed", "-1"], "sampling.seed"),
        (["--api-key-file", "/nonexistent"], "/nonexistent"),
        (["--api-key-file", os.devnull], "no key"),
    ],
)
def test_a_flag_it_does_not_know_or_take_is_one_line_and_exit_2(tmp_path: Path, args: list[str], word: str) -> None:
    server = Server(tmp_path, "--model", demo.model_path(), *args)
    assert ended(server) == 2
    [line] = server.said().splitlines()
    assert word in line


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0"),
        (["--host", "::1"], "::1"),
        (["--port", "70000"], "70000"),
        (["--parallel", "0"], "n_parallel"),
        (["--threads", "many"], "--threads"),
        (["--flash-attn", "maybe"], "--flash-attn"),
        (["--mod", "abbreviated"], "--mod"),
    ],
)
def test_a_value_it_does_not_take_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], word: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        llamacpp_server.parse([*flags(tmp_path / "key"), "--model", demo.model_path(), *args])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert word in line
