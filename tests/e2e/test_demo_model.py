"""The model in the box as people meet it: every way in ends by itself, at the end of a sentence."""

from __future__ import annotations

import json

import pytest

from tests.cluster import Cluster
from tests.e2e.shared import run

pytestmark = pytest.mark.llama

STORY = "Tell me a story about a fox"


@pytest.mark.slow
async def test_every_way_in_reads_well_and_stops_by_itself(llorch: Cluster) -> None:
    await llorch.start_control()
    await llorch.start_node("a", [{"id": "p0", "engine": "llamacpp", "model": "demo", "slots": 2, "ctx": 1024}])

    _, native = await llorch.post("/v2/tasks", {"model": "demo", "prompt": "Once upon a time", "seed": 1})
    _, messages = await llorch.post(
        "/v2/tasks", {"model": "demo", "messages": [{"role": "user", "content": STORY}], "seed": 1}
    )
    _, completion = await llorch.post("/v1/completions", {"model": "demo", "prompt": "Once upon a time", "seed": 1})
    assert (native["finish_reason"], messages["finish_reason"]) == ("stop", "stop")
    assert completion["choices"][0]["finish_reason"] == "stop"
    ask = {"model": "demo", "messages": [{"role": "user", "content": STORY}], "seed": 1}
    _, chat = await llorch.post("/v1/chat/completions", ask)
    assert chat["choices"][0]["finish_reason"] == "stop"
    _, stream = await llorch.post("/v1/chat/completions", {**ask, "stream": True})
    streamed = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"
    pieces = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed)

    said = chat["choices"][0]["message"]["content"]
    for text in (native["text"], messages["text"], completion["choices"][0]["text"], said, pieces):
        assert len(text.split()) > 30
        assert text[-1] in '.!?"'
    assert all("fox" in text for text in (messages["text"], said, pieces))

    status, out, err = await run(llorch, "submit", "--seed", "1", "Why is the sky blue?")
    assert (status, err) == (0, "")
    assert out.strip().startswith("The sky is blue because")


async def test_a_chat_remembers_what_was_said(llorch: Cluster) -> None:
    await llorch.start_control()
    await llorch.start_node("a", [{"id": "p0", "engine": "llamacpp", "model": "demo", "slots": 2, "ctx": 1024}])
    asked = f"{STORY}\nThank you!\n/save said.json\n"
    status, out, err = await run(llorch, "chat", "--seed", "1", stdin=asked.encode())
    assert status == 0, err
    said = json.loads((llorch.folder / "said.json").read_text())
    story, thanks = [message["content"] for message in said if message["role"] == "assistant"]
    assert out == f"{story}\n{thanks}\n"
    assert "fox" in story
    assert thanks[-1] in ".!?"
    tasks = (await llorch.get("/v2/tasks"))["tasks"]
    first, second = sorted(task["tokens_in"] for task in tasks)
    assert second > first + 50  # the story went along
