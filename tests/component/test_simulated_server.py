"""The simulated engine over HTTP: its script, its shapes, its slots, its faults; as a process where that matters."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llorch.node.engines import simulated_script, simulated_server
from llorch.node.engines.progress import Progress, read
from tests.cluster import eventually, expected_text

KEY = "a-key-for-this-test-only-0123456789"
UP_WITHIN_S = 30.0
CHAT, COMPLETIONS, NATIVE = "/v1/chat/completions", "/v1/completions", "/completion"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "go on"}]},
    COMPLETIONS: {"prompt": "go on"},
    NATIVE: {"prompt": "go on"},
    MESSAGES: {"messages": [{"role": "user", "content": "go on"}]},
    RESPONSES: {"input": "go on"},
}
BOUND = {CHAT: "max_completion_tokens", NATIVE: "n_predict", RESPONSES: "max_output_tokens"}


class Engine:
    def __init__(self, session: aiohttp.ClientSession, url: str = "") -> None:
        self.session = session
        self.url = url

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, str]:
        async with self.session.post(self.url + path, json=body, headers=headers) as answer:
            return answer.status, await answer.text()

    async def whole(self, path: str, **body: Any) -> Any:
        status, text = await self.post(path, ASK[path] | body)
        assert status == 200, text
        return json.loads(text)

    async def events(self, path: str, **body: Any) -> list[str]:
        """The data of each event of a stream."""
        status, text = await self.post(path, ASK[path] | body | {"stream": True})
        assert status == 200, text
        assert text.endswith("\n\n")
        return [line[6:] for line in text.splitlines() if line.startswith("data: ")]

    async def part(self, path: str, **body: Any) -> str:
        """What came of a stream that broke off."""
        got = b""
        with pytest.raises(aiohttp.ClientPayloadError):
            async with self.session.post(self.url + path, json=ASK[path] | body | {"stream": True}) as answer:
                assert answer.status == 200
                async for piece in answer.content.iter_any():
                    got += piece
        return got.decode()

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as answer:
            assert answer.status == 200
            return await answer.json(content_type=None)

    async def state(self, **wanted: int) -> bool:
        state = await self.get("/simulated/state")
        return {name: state[name] for name in wanted} == wanted


class EngineProcess(Engine):
    def __init__(self, session: aiohttp.ClientSession, process: asyncio.subprocess.Process, log: Path) -> None:
        super().__init__(session)
        self.process = process
        self.log = log

    def listening(self) -> str:
        said = self.log.read_text()
        assert self.process.returncode is None, said
        return said.split()[-1] if "listening on" in said else ""


def flags(folder: Path, *args: str, key: bool) -> list[str]:
    keys = folder / "keys"
    keys.write_text(f"another-key\n{KEY}\n")
    given = ["--host", "127.0.0.1", "--port", "0", "--alias", "sim", "--parallel", "2", *args]
    return [*given, "--api-key-file", str(keys)] if key else given


def client() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=30)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


@asynccontextmanager
async def simulated(folder: Path, *args: str, key: bool = False) -> AsyncIterator[Engine]:
    """In this process: for everything but its life and its death."""
    script, given = simulated_script.parse(flags(folder, *args, key=key))
    keys = simulated_server.read_keys(given.api_key_file)
    runner = await simulated_server.serve(script, keys, given.host, given.port, given.journal)
    try:
        async with client() as session:
            yield Engine(session, simulated_server.url_of(runner))
    finally:
        await runner.cleanup()


@asynccontextmanager
async def simulated_process(folder: Path, *args: str, key: bool = False) -> AsyncIterator[EngineProcess]:
    log = folder / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "llorch.node.engines.simulated_server", *flags(folder, *args, key=key)),
            stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        async with client() as session:
            engine = EngineProcess(session, process, log)
            engine.url = await eventually(engine.listening, within_s=UP_WITHIN_S, what="its line that it listens")
            yield engine
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with simulated(tmp_path) as running:
        yield running


def text_in(path: str, value: Any) -> str:
    """The text of one chunk or one whole answer."""
    if path in (CHAT, COMPLETIONS):
        text = ""
        for choice in value["choices"]:
            text += choice["text"] if path == COMPLETIONS else (choice.get("delta") or choice["message"])["content"]
        return text
    if path == NATIVE:
        return str(value["content"])
    if path == MESSAGES:
        return "".join(part["text"] for part in value["content"])
    return "".join(part["text"] for item in value["output"] for part in item["content"])


def streamed_text(path: str, events: list[str]) -> str:
    text = ""
    for value in (json.loads(event) for event in events if event != "[DONE]"):
        if path == CHAT:
            text += "".join(choice["delta"].get("content") or "" for choice in value["choices"])
        elif path in (COMPLETIONS, NATIVE):
            text += text_in(path, value)
        elif value["type"] == "content_block_delta":
            text += value["delta"]["text"]
        elif value["type"] == "response.output_text.delta":
            text += value["delta"]
    return text


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize("path", ASK)
async def test_token_i_is_the_same_on_every_path_streamed_or_not(engine: Engine, path: str) -> None:
    bound = {BOUND.get(path, "max_tokens"): 5}
    assert text_in(path, await engine.whole(path, **bound)) == expected_text(5)
    assert streamed_text(path, await engine.events(path, **bound)) == expected_text(5)
    assert text_in(path, await engine.whole(path)) == expected_text(16)


async def test_a_prompt_that_ends_in_a_token_is_gone_on_from(engine: Engine) -> None:
    for path in (COMPLETIONS, NATIVE):
        assert text_in(path, await engine.whole(path, prompt="go on t3 t41 ", max_tokens=3)) == expected_text(3, 42)
        assert text_in(path, await engine.whole(path, prompt="go on t41", max_tokens=1)) == "t0 "
        assert text_in(path, await engine.whole(path, prompt="got41 ", max_tokens=1)) == "t0 "
    said = [{"role": "user", "content": "t5 "}, {"role": "assistant", "content": "t0 t1 "}]
    assert text_in(CHAT, await engine.whole(CHAT, messages=said, max_tokens=2)) == expected_text(2, 2)
    said[-1]["content"] = [{"type": "text", "text": "t0 t1 t2 "}]  # type: ignore[assignment]
    assert text_in(CHAT, await engine.whole(CHAT, messages=said, max_tokens=2)) == expected_text(2, 3)
    assert text_in(CHAT, await engine.whole(CHAT, messages=said[:1], max_tokens=2)) == expected_text(2)


async def test_an_answer_ends_at_the_script_s_length_or_at_the_request_s(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--tokens", "8") as engine:
        for bound, count, finish in ((None, 8, "stop"), (3, 3, "length"), (8, 8, "length"), (9, 8, "stop")):
            body = {} if bound is None else {"max_tokens": bound}
            answer = await engine.whole(COMPLETIONS, **body)
            assert answer["choices"][0]["text"] == expected_text(count)
            assert answer["choices"][0]["finish_reason"] == finish
            assert answer["usage"] == {
                "prompt_tokens": 2,
                "completion_tokens": count,
                "total_tokens": 2 + count,
                "prompt_tokens_details": {"cached_tokens": 0},
            }
        assert (await engine.whole(MESSAGES, max_tokens=3))["stop_reason"] == "max_tokens"
        assert (await engine.whole(MESSAGES, max_tokens=30))["stop_reason"] == "end_turn"


# ---------------------------------------------------------------- llama.cpp's shapes


async def test_a_chat_has_its_usage_in_a_chunk_of_no_choices_and_only_when_asked(engine: Engine) -> None:
    *chunks, done = await engine.events(CHAT, max_tokens=2, stream_options={"include_usage": True})
    first, *tokens, last, usage = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]"
    assert first["choices"] == [{"finish_reason": None, "index": 0, "delta": {"role": "assistant", "content": None}}]
    assert [chunk["choices"][0]["delta"] for chunk in tokens] == [{"content": "t0 "}, {"content": "t1 "}]
    assert last["choices"] == [{"finish_reason": "length", "index": 0, "delta": {}}]
    assert "timings" not in last
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)
    assert (usage["timings"]["predicted_n"], usage["timings"]["cache_n"]) == (2, 0)
    *_, last_of_all, done = await engine.events(CHAT, max_tokens=2)
    assert done == "[DONE]"
    unasked = json.loads(last_of_all)
    assert unasked["choices"][0]["finish_reason"] == "length"
    assert "usage" not in unasked
    assert unasked["timings"]["predicted_n"] == 2


@pytest.mark.parametrize("asked", [True, False])
async def test_a_completion_has_its_usage_on_its_last_choice_asked_or_not(engine: Engine, asked: bool) -> None:
    *chunks, done = await engine.events(COMPLETIONS, max_tokens=2, stream_options={"include_usage": asked})
    *tokens, last = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in tokens] == ["t0 ", "t1 "]
    assert [chunk["choices"][0]["finish_reason"] for chunk in tokens] == [None, None]
    assert last["choices"] == [{"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert last["usage"]["completion_tokens"] == 2
    assert last["timings"]["predicted_n"] == 2


async def test_llama_cpp_s_own_path_ends_with_a_chunk_that_stops_and_no_done(engine: Engine) -> None:
    *tokens, last = [json.loads(event) for event in await engine.events(NATIVE, n_predict=2)]
    assert [(chunk["content"], chunk["stop"], chunk["tokens_predicted"]) for chunk in tokens] == [
        ("t0 ", False, 1),
        ("t1 ", False, 2),
    ]
    assert (last["content"], last["stop"], last["stop_type"], last["tokens_predicted"]) == ("", True, "limit", 2)
    assert last["timings"]["predicted_n"] == 2


async def test_anthropic_s_events_come_in_their_order(engine: Engine) -> None:
    events = [json.loads(event) for event in await engine.events(MESSAGES, max_tokens=2)]
    delta = "content_block_delta"
    assert [event["type"] for event in events] == [
        *("message_start", "content_block_start", delta, delta, "content_block_stop", "message_delta", "message_stop")
    ]
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    assert events[-2]["usage"]["output_tokens"] == 2


async def test_a_response_ends_with_all_of_it(engine: Engine) -> None:
    last = json.loads((await engine.events(RESPONSES, max_output_tokens=2))[-1])
    assert last["type"] == "response.completed"
    assert text_in(RESPONSES, last["response"]) == expected_text(2)
    assert last["response"]["usage"]["output_tokens"] == 2


async def test_embeddings_depend_on_the_text_alone(engine: Engine) -> None:
    vectors = []
    for text in ("one", "two", "one"):
        _, answer = await engine.post("/v1/embeddings", {"input": [text]})
        vectors.append(json.loads(answer)["data"][0]["embedding"])
    assert vectors[0] == vectors[2] != vectors[1]


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        (CHAT, b"{bad", 400, "invalid_request_error"),
        (CHAT, b"[]", 400, "invalid_request_error"),
        (COMPLETIONS, b'"\xff"', 400, "invalid_request_error"),
        ("/v1/nothing", b"{}", 404, "not_found_error"),
        ("/health", b"{}", 404, "not_found_error"),
    ],
)
async def test_an_error_is_worded_as_llama_cpp_s(
    engine: Engine, path: str, body: bytes, status: int, kind: str
) -> None:
    async with engine.session.post(engine.url + path, data=body) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["type"]) == (status, status, kind)


# ---------------------------------------------------------------- keys, loading, what it tells


async def test_health_needs_no_key_and_all_else_does(tmp_path: Path) -> None:
    async with simulated(tmp_path, key=True) as engine:
        assert await engine.get("/health") == {"status": "ok"}
        for path in ("/props", "/metrics", "/slots", "/v1/models", "/simulated/requests", "/simulated/state"):
            async with engine.session.get(engine.url + path) as answer:
                assert answer.status == 401, path
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": f"Bearer {KEY}"}, 200),
            ({"Authorization": "Bearer another-key"}, 200),
            ({"X-Api-Key": KEY}, 200),
        ):
            got, text = await engine.post(COMPLETIONS, {"prompt": "x"}, **headers)
            assert got == status, headers
            if status == 401:
                assert json.loads(text)["error"]["type"] == "authentication_error"


async def test_while_it_loads_it_says_so(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--load-s", "0.3", key=True) as engine:
        for path in ("/health", "/props"):
            async with engine.session.get(engine.url + path) as answer:
                assert answer.status == 503
                error = (await answer.json())["error"]
                assert error == {"code": 503, "message": "Loading model", "type": "unavailable_error"}

        async def loaded() -> bool:
            async with engine.session.get(engine.url + "/health") as answer:
                return answer.status == 200

        await eventually(loaded)


async def test_it_tells_its_slots_its_context_and_its_name(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--parallel", "3", "--ctx-size", "3000", "--model", "/nonexistent") as engine:
        props = await engine.get("/props")
        assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (3, 1000)
        assert [model["id"] for model in (await engine.get("/v1/models"))["data"]] == ["sim"]
        assert [slot["is_processing"] for slot in await engine.get("/slots")] == [False] * 3


async def test_it_shows_what_reached_it_but_no_secret(tmp_path: Path) -> None:
    async with simulated_process(tmp_path, key=True) as engine:
        headers = {"Authorization": f"Bearer {KEY}", "X-Api-Key": KEY, "X-Request-Id": "r1"}
        body = {"prompt": "hidden-prompt", "max_tokens": 1, "unknown_field": {"a": [1]}}
        status, text = await engine.post(COMPLETIONS, body, **headers)
        assert status == 200
        assert "unknown_field" not in text
        async with engine.session.get(engine.url + "/simulated/requests", headers=headers) as answer:
            [seen] = json.loads(shown := await answer.text())
        assert (seen["path"], seen["body"], seen["headers"]["x-request-id"]) == (COMPLETIONS, body, "r1")
        assert KEY not in shown
        assert "hidden-prompt" not in engine.log.read_text()


# ---------------------------------------------------------------- slots


async def test_its_journal_tells_what_became_of_each_request_by_the_name_in_its_prompt(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    def steps() -> list[tuple[str, str | None, int | None]]:
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
        return [(line["step"], line.get("marker"), line.get("tokens")) for line in lines]

    async with simulated(tmp_path, "--journal", str(journal), "--delay-ms", "5") as engine:
        await engine.whole(COMPLETIONS, prompt="#one go", max_tokens=3)
        await engine.whole(CHAT, messages=[{"role": "user", "content": "#two"}], max_completion_tokens=1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await engine.whole(COMPLETIONS, prompt="no name", max_tokens=10_000)
        await eventually(lambda: steps()[-1][0] == "aborted")
    served, *rest, arrived, aborted = steps()
    assert served == ("serving", None, None)
    assert rest == [("arrived", "one", 0), ("finished", "one", 3), ("arrived", "two", 0), ("finished", "two", 1)]
    assert arrived == ("arrived", None, 0)
    assert aborted[:2] == ("aborted", None)


async def test_the_last_word_of_its_journal_is_that_it_dies_as_it_was_told_to(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    async with simulated_process(tmp_path, "--journal", str(journal), "--obey") as engine:
        with pytest.raises(aiohttp.ClientError):
            await engine.whole(COMPLETIONS, prompt="#a!die@0 go", max_tokens=4)
    steps = [json.loads(line)["step"] for line in journal.read_text().splitlines()]
    assert steps == ["serving", "arrived", "dead"]


async def test_one_that_obeys_has_the_fault_that_a_prompt_names(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--obey") as engine:
        whole = await engine.events(COMPLETIONS, prompt="#a go", max_tokens=4)
        assert streamed_text(COMPLETIONS, whole) == expected_text(4)
        part = await engine.part(COMPLETIONS, prompt="#a!truncate@2 go", max_tokens=4)
        assert ("t1 " in part, "t2 " in part) == (True, False)
    async with simulated(tmp_path) as engine:
        events = await engine.events(COMPLETIONS, prompt="#a!truncate@2 go", max_tokens=4)
        assert streamed_text(COMPLETIONS, events) == expected_text(4)


async def test_no_more_run_than_it_has_slots_and_the_others_wait(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--delay-ms", "10", "--tokens", "20") as engine:
        asked = [asyncio.create_task(engine.whole(COMPLETIONS)) for _ in range(5)]
        await eventually(lambda: engine.state(active=2, waiting=3))
        text = await (await engine.session.get(engine.url + "/metrics")).text()
        assert "llamacpp:requests_processing 2\n" in text
        assert "llamacpp:requests_deferred 3\n" in text
        assert [slot["is_processing"] for slot in await engine.get("/slots")] == [True, True]
        answers = await asyncio.gather(*asked)
        assert {answer["choices"][0]["text"] for answer in answers} == {expected_text(20)}
        assert await engine.state(active=0, waiting=0, started=5, finished=5, aborted=0, tokens_out=100)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("delay_ms", ["0", "60000"])
async def test_a_client_that_leaves_frees_its_slot(tmp_path: Path, streamed: bool, delay_ms: str) -> None:
    async with simulated(tmp_path, "--delay-ms", delay_ms, "--tokens", "100000000") as engine:
        left = [asyncio.create_task(engine.whole(COMPLETIONS, stream=streamed)) for _ in range(3)]
        await eventually(lambda: engine.state(active=2, waiting=1))
        for one in left:
            one.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await eventually(lambda: engine.state(active=0, waiting=0, finished=0))


async def test_two_hundred_streams_run_at_once(tmp_path: Path) -> None:
    args = ("--parallel", "200", "--delay-ms", "20", "--tokens", "20")
    async with simulated(tmp_path, *args) as engine:
        asked = [asyncio.create_task(engine.events(CHAT)) for _ in range(200)]
        await eventually(lambda: engine.state(active=200), what="all of them at once")
        for events in await asyncio.gather(*asked):
            assert streamed_text(CHAT, events) == expected_text(20)


async def test_the_first_token_waits_and_each_after_it(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--ttft-ms", "200", "--delay-ms", "50", "--tokens", "5") as engine:
        began = time.monotonic()
        answer = await engine.whole(COMPLETIONS)
        assert time.monotonic() - began >= 0.4
        assert answer["timings"]["prompt_ms"] >= 200
        assert answer["timings"]["predicted_ms"] >= 190


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("delay_ms", ["0", "5"])
async def test_it_dies_after_so_many_tokens_and_not_before_they_were_sent(tmp_path: Path, delay_ms: str) -> None:
    async with simulated_process(tmp_path, "--die-after", "3", "--delay-ms", delay_ms) as engine:
        await engine.whole(COMPLETIONS, max_tokens=3)  # a request that asks for no more is left alone
        part = await engine.part(COMPLETIONS)
        assert streamed_text(COMPLETIONS, [line[6:] for line in part.splitlines() if line]) == expected_text(3)
        assert await asyncio.wait_for(engine.process.wait(), 10) == 1


async def test_it_dies_with_no_word_on_an_answer_in_one_piece(tmp_path: Path) -> None:
    async with simulated_process(tmp_path, "--die-after", "0") as engine:
        with pytest.raises(aiohttp.ClientConnectionError):
            await engine.whole(COMPLETIONS)
        assert await asyncio.wait_for(engine.process.wait(), 10) == 1


async def test_a_stream_that_hangs_says_nothing_more_while_health_is_well(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--hang-after", "2") as engine:
        asked = ASK[COMPLETIONS] | {"stream": True}
        async with engine.session.post(engine.url + COMPLETIONS, json=asked) as answer:
            for i in range(2):
                assert json.loads((await answer.content.readline())[6:])["choices"][0]["text"] == f"t{i} "
                await answer.content.readline()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(answer.content.readany(), 0.3)
            assert await engine.get("/health") == {"status": "ok"}
            assert await engine.state(active=1, tokens_out=2)
        await eventually(lambda: engine.state(active=0, aborted=1))


@pytest.mark.parametrize("after", [0, 3])
async def test_a_stream_is_cut_and_the_engine_lives_on(tmp_path: Path, after: int) -> None:
    async with simulated_process(tmp_path, "--truncate-after", str(after)) as engine:
        part = await engine.part(CHAT)
        assert streamed_text(CHAT, [line[6:] for line in part.splitlines() if line]) == expected_text(after)
        assert 'finish_reason":"' not in part
        with pytest.raises(aiohttp.ClientPayloadError):
            await engine.whole(CHAT)
        assert await engine.state(active=0, aborted=2, finished=0)
        assert engine.log.read_text().count("\n") == 1


async def test_garbage_is_neither_an_event_nor_json(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--garbage-after", "2") as engine:
        async with engine.session.post(engine.url + COMPLETIONS, json=ASK[COMPLETIONS] | {"stream": True}) as answer:
            raw = await answer.read()
        *good, _, bad, _ = raw.split(b"\n\n")
        assert len(good) == 2
        with pytest.raises(ValueError):
            json.loads(bad.removeprefix(b"data: "))
        async with engine.session.post(engine.url + COMPLETIONS, json=ASK[COMPLETIONS]) as answer:
            assert answer.status == 200
            with pytest.raises(ValueError):
                json.loads(await answer.read())


async def test_a_status_answers_every_generation(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--status", "500") as engine:
        for path in (*ASK, "/v1/embeddings"):
            status, text = await engine.post(path, ASK.get(path, {"input": "x"}))
            error = json.loads(text)["error"]
            assert (path, status, error["code"], error["type"]) == (path, 500, 500, "server_error")
        assert await engine.get("/health") == {"status": "ok"}


# ---------------------------------------------------------------- its life


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_also_in_the_middle_of_an_answer(tmp_path: Path, number: signal.Signals) -> None:
    async with simulated_process(tmp_path, "--delay-ms", "60000") as engine:
        asked = asyncio.create_task(engine.whole(COMPLETIONS))
        await eventually(lambda: engine.state(active=1))
        engine.process.send_signal(number)
        assert await asyncio.wait_for(engine.process.wait(), 5) == 0
        with pytest.raises(aiohttp.ClientConnectionError):
            await asked


async def test_one_that_ignores_sigterm_goes_on(tmp_path: Path) -> None:
    async with simulated_process(tmp_path, "--ignore-sigterm", "--delay-ms", "20") as engine:
        asked = asyncio.create_task(engine.whole(COMPLETIONS))
        await eventually(lambda: engine.state(active=1))
        engine.process.send_signal(signal.SIGTERM)
        assert (await asked)["choices"][0]["text"] == expected_text(16)
        assert await engine.get("/health") == {"status": "ok"}


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["--bogus"], 2, "--bogus"),
        (["--host", "0.0.0.0"], 2, "0.0.0.0"),
        (["--parallel", "0"], 2, "0 is less than 1"),
        (["--tokens", "many"], 2, "--tokens"),
        (["--api-key-file", "/nonexistent"], 2, "/nonexistent"),
        (["--api-key-file", os.devnull], 2, "no key"),
    ],
)
async def test_a_flag_it_does_not_know_or_take_ends_it(
    capsys: pytest.CaptureFixture[str], args: list[str], code: int, word: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        await simulated_server.run(["--port", "0", *args])
    assert ended.value.code == code
    assert word in capsys.readouterr().err.splitlines()[-1]


async def test_a_port_that_is_taken_ends_it_with_one_line(engine: Engine, tmp_path: Path) -> None:
    port = engine.url.rpartition(":")[2]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llorch.node.engines.simulated_server", "--port", port), stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), UP_WITHIN_S)
    assert process.returncode == 1
    [line] = said.decode().splitlines()
    assert port in line


# ---------------------------------------------------------------- what it counts, and an engine that stands still


async def counters(engine: Engine) -> Progress:
    async with engine.session.get(engine.url + "/metrics") as answer:
        found = read("simulated", await answer.text())
    assert found is not None
    return found


async def test_its_counters_stand_still_while_a_request_hangs(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--hang-after", "3") as engine:
        await engine.whole(COMPLETIONS, max_tokens=2)
        assert (await counters(engine)).counters[1] == 2
        hanging = asyncio.ensure_future(engine.events(COMPLETIONS, max_tokens=9))
        await eventually(lambda: engine.state(hung=1))
        stuck = await counters(engine)
        assert stuck.busy == 1 and stuck.counters[1] == 5
        await engine.whole(COMPLETIONS, max_tokens=2)
        assert (await counters(engine)).counters == stuck.counters
        hanging.cancel()
        await eventually(lambda: engine.state(hung=0))
        assert (await counters(engine)).counters[1] == 7


async def test_a_deaf_one_takes_connections_and_answers_nothing_any_more(tmp_path: Path) -> None:
    async with simulated(tmp_path, "--deaf-after", "3", "--delay-ms", "5") as engine:
        await engine.whole(COMPLETIONS, max_tokens=3)
        others = [asyncio.ensure_future(engine.events(path, max_tokens=200)) for path in (COMPLETIONS, CHAT)]
        await asyncio.sleep(0)
        for path in ("/health", "/metrics", "/v1/models"):

            async def silent(path: str = path) -> bool:
                try:
                    async with asyncio.timeout(0.1):
                        await engine.get(path)
                except TimeoutError:
                    return True
                return False

            await eventually(silent, what=path)
        assert not any(other.done() for other in others)
        for other in others:
            other.cancel()
