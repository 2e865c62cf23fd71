"""The clients people have: the openai and anthropic SDKs against a real cluster.

They are imported where they are used: it takes two seconds, that no other process of the tests should spend.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster import Cluster, cluster, expected_text, simulated
from tests.e2e.shared import kept, visiting

if TYPE_CHECKING:
    import openai


@pytest.fixture(autouse=True)
def authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the SDKs ask with refuses to start with a file that holds none, as tests have it."""
    monkeypatch.delenv("SSL_CERT_FILE")


@pytest.fixture(scope="module")
def one_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    async def start(cluster: Cluster) -> None:
        await cluster.start_control()
        cut = simulated("p1", "cut", 1, "--truncate-after", "3", "--tokens", "8")
        await cluster.start_node("a", [simulated("p0", "sim", 4, "--tokens", "64"), cut])

    with kept(tmp_path_factory.mktemp("sdks"), start) as cluster:
        yield cluster


@pytest.fixture
async def sim(one_for_all: Cluster) -> AsyncIterator[Cluster]:
    async with visiting(one_for_all) as cluster:
        yield cluster


@pytest.fixture
async def client(sim: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{sim.url}/v1", api_key=sim.token, max_retries=0) as made:
        yield made


ASK: Any = [{"role": "user", "content": "go"}]
STORY: Any = [{"role": "user", "content": "Tell me a story"}]  # longer than any max_tokens here


async def engine_requests(running: Cluster, node: str = "a") -> list[dict[str, Any]]:
    """What the simulated engine was asked, from the engine itself."""
    handoff = json.loads((running.folder / node / ".runtime" / "engines" / "p0-r0.json").read_text())
    key = Path(handoff["api_key_file"]).read_text().strip()
    async with running.session.get(
        handoff["url"] + "/simulated/requests", headers={"Authorization": f"Bearer {key}"}
    ) as response:
        return await response.json()  # type: ignore[no-any-return]


async def test_it_lists_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["cut", "sim"]
    assert (await client.models.retrieve("sim")).id == "sim"


async def test_it_chats(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="sim", messages=ASK, max_tokens=5)
    assert answer.choices[0].message.content == expected_text(5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


async def test_it_streams_without_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="sim", messages=ASK, max_tokens=5, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected_text(5)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_it_streams_with_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="sim", messages=ASK, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


async def test_it_completes_and_embeds(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="sim", prompt="t3 ", max_tokens=3)
    assert answer.choices[0].text == expected_text(3, first=4)
    vectors = await client.embeddings.create(model="sim", input=["a", "b"], encoding_format="float")
    assert [len(row.embedding) for row in vectors.data] == [8, 8]


async def test_unknown_fields_reach_the_engine(sim: Cluster, client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(
        model="sim", messages=ASK, max_tokens=1, extra_body={"from_the_future": {"depth": [1, 2]}, "mirostat": 2}
    )
    (body,) = [seen["body"] for seen in await engine_requests(sim) if "from_the_future" in seen["body"]]
    assert (body["from_the_future"], body["mirostat"]) == ({"depth": [1, 2]}, 2)


async def test_engine_internal_fields_are_refused(client: openai.AsyncOpenAI) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="n_discard"):
        await client.chat.completions.create(model="sim", messages=ASK, extra_body={"n_discard": -1})


async def test_a_wrong_key_is_an_authentication_error(sim: Cluster) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{sim.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            await stranger.models.list()
    assert caught.value.code == "UNAUTHENTICATED"


async def test_an_unknown_model_is_a_not_found_error(client: openai.AsyncOpenAI) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="nope", messages=ASK)
    assert caught.value.code == "MODEL_NOT_FOUND"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nope")


async def test_bad_json_and_bad_types_are_bad_requests(sim: Cluster, client: openai.AsyncOpenAI) -> None:
    import openai

    bad: Any = 7
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=bad, messages=ASK)
    assert caught.value.code == "INVALID_REQUEST"
    assert caught.value.param == "model"
    for raw in (b"{", b'{"model":"sim","model":"sim"}', b"[" * 50, b'{"model":"sim","x":NaN}'):
        async with sim.session.post(
            f"{sim.url}/v1/chat/completions",
            data=raw,
            headers=sim.headers() | {"Content-Type": "application/json"},
        ) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "INVALID_REQUEST"


async def test_an_engine_that_breaks_off_is_an_api_error_after_what_it_said(client: openai.AsyncOpenAI) -> None:
    import openai

    stream = await client.chat.completions.create(model="cut", messages=ASK, stream=True)
    said = ""
    with pytest.raises(openai.APIError) as caught:
        async for chunk in stream:
            said += chunk.choices[0].delta.content or ""
    assert said == expected_text(3)
    assert caught.value.code == "ENGINE_FAILED"


@pytest.mark.slow
@pytest.mark.llama
async def test_the_sdks_reach_real_llama_cpp(tmp_path: Path) -> None:
    import anthropic
    import openai

    async with cluster(tmp_path) as running:
        await running.start_control()
        await running.start_node("a", [{"id": "p0", "engine": "llamacpp", "model": "demo", "slots": 2, "ctx": 512}])
        async with anthropic.AsyncAnthropic(base_url=running.url, api_key=running.token, max_retries=0) as claude:
            message = await claude.messages.create(model="demo", max_tokens=8, messages=STORY)
            assert message.content[0].type == "text"
            assert message.usage.output_tokens == 8
            text = ""
            async with claude.messages.stream(model="demo", max_tokens=8, messages=STORY) as stream:
                async for piece in stream.text_stream:
                    text += piece
            assert text
            with pytest.raises(anthropic.NotFoundError):
                await claude.messages.create(model="nope", max_tokens=8, messages=STORY)
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=running.token, max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == ["demo"]
            answer = await client.chat.completions.create(model="demo", messages=STORY, max_tokens=8, seed=1)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 8
            chunks = [
                chunk
                async for chunk in await client.chat.completions.create(
                    model="demo", messages=STORY, max_tokens=8, stream=True, stream_options={"include_usage": True}
                )
            ]
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 8
            plain = [
                chunk
                async for chunk in await client.chat.completions.create(
                    model="demo", messages=STORY, max_tokens=8, stream=True
                )
            ]
            assert all(chunk.choices and chunk.usage is None for chunk in plain)
        task = await running.complete("demo", tokens=8, seed=1, prompt="Once upon a time")
        assert task["tokens_out"] == 8
        assert task["text"]
