"""`llorch bench run` against the simulated engine, a process of its own, and against servers that fail in every way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llorch.cli import bench_load, bench_picture
from tests.certificates import certificate
from tests.component.command_line import CommandLine, Ran

TOKEN_MS = 5.0
TTFT_MS = 20.0


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """The URL of an engine with a known pace."""
    argv = [sys.executable, "-m", "llorch.node.engines.simulated_server", "--port", "0", "--alias", "m"]
    argv += ["--parallel", "64", "--tokens", "1000", "--ttft-ms", str(TTFT_MS), "--delay-ms", str(TOKEN_MS)]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        yield process.stderr.readline().split()[-1]
        process.kill()


@pytest.fixture
def llorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    return CommandLine(monkeypatch, tmp_path)


async def steps(llorch: CommandLine, *argv: str, code: int = 0) -> list[dict[str, Any]]:
    ran = await llorch("bench", "run", *argv, "--json")
    assert ran.code == code, ran.err
    found = json.loads(ran.out)["steps"]
    assert isinstance(found, list)
    return found


async def seen_by(engine: str) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(f"{engine}/simulated/requests") as response:
        return [request["body"] for request in await response.json()]


# ---------------------------------------------------------------- an engine


async def test_a_run_measures_the_pace_that_the_engine_has(engine: str, llorch: CommandLine) -> None:
    (one, four) = await steps(
        llorch, f"{engine}/v1", "--concurrency", "1,4", "--requests", "8", "--output-tokens", "11", "--slo-ttft", "10ms"
    )
    for step in (one, four):
        assert step["requests"] == {"sent": 8, "ok": 8, "failed": 0}
        assert (step["output_tokens_mean"], step["tokens_counted_by"]) == (11, "usage")
        assert step["ttft_ms"]["p50"] >= TTFT_MS - 1
        assert step["per_token_ms"]["p50"] >= TOKEN_MS - 0.5
        assert step["itl_ms"]["count"] == 80
        assert step["e2e_ms"]["p50"] >= TTFT_MS + 10 * TOKEN_MS - 1
        assert step["goodput"]["share"] == 0  # none comes within 10 ms
        assert step["output_tokens_per_s"] == pytest.approx(88 / step["duration_s"], rel=0.01)
    assert (one["concurrency"], four["concurrency"]) == (1, 4)
    assert one["duration_s"] > 8 * (TTFT_MS + 10 * TOKEN_MS) / 1000 - 0.01
    assert four["requests_per_s"] > one["requests_per_s"]


async def test_no_two_prompts_are_alike_and_nothing_is_sent_that_a_strict_endpoint_refuses(
    engine: str, llorch: CommandLine
) -> None:
    before = len(await seen_by(engine))
    await steps(llorch, engine, "-m", "m", "--concurrency", "2", "--requests", "6", "--output-tokens", "2")
    bodies = (await seen_by(engine))[before:]
    prompts = {body["messages"][0]["content"] for body in bodies}
    assert len(bodies) == len(prompts) == 1 + 2 + 6  # the first look, warming up, the step
    known = {"model", "messages", "max_tokens", "stream", "stream_options"}
    assert all(set(body) == known for body in bodies)


async def test_an_open_loop_sends_at_its_rate_whatever_becomes_of_the_requests_before(
    engine: str, llorch: CommandLine
) -> None:
    (step,) = await steps(
        llorch, engine, "--rate", "40", "--requests", "20", "--output-tokens", "60", "--seed", "1", "-m", "m"
    )
    assert step["requests"] == {"sent": 20, "ok": 20, "failed": 0}
    assert (step["rate_per_s"], step["concurrency"]) == (40, None)
    # An answer takes 0.3 s: one after the other they would take 6.
    assert step["duration_s"] < 4


async def test_a_run_for_a_time_ends_at_that_time_and_waits_for_what_was_begun(
    engine: str, llorch: CommandLine
) -> None:
    (step,) = await steps(llorch, engine, "--concurrency", "3", "--duration", "300ms", "--output-tokens", "30")
    assert step["duration_s"] == 0.3
    assert step["requests"]["failed"] == 0
    assert step["requests"]["ok"] >= 3
    assert step["e2e_ms"]["count"] == step["requests"]["ok"]


async def test_a_table_goes_to_standard_output_and_progress_to_standard_error_unless_it_is_quiet(
    engine: str, llorch: CommandLine
) -> None:
    argv = ("bench", "run", engine, "--concurrency", "1", "--requests", "2", "--output-tokens", "2")
    ran = await llorch(*argv)
    assert (ran.code, ran.out.split()[:3]) == (0, ["LOAD", "REQUESTS", "FAILED"])
    assert ran.err.splitlines()[-1].startswith("1 at a time: 2 requests")
    quiet = await llorch(*argv, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "1\n", "")


async def test_a_picture_is_drawn_of_what_was_measured(engine: str, llorch: CommandLine) -> None:
    argv = ("bench", "run", engine, "--concurrency", "1,2", "--requests", "2", "--output-tokens", "2")
    ran = await llorch(*argv, "--plot", "of.svg")
    assert ran.code == 0, ran.err
    picture = (llorch.work / "of.svg").read_text()
    assert "<svg" in picture
    assert "first token, ms" in picture  # as a comment, beside the glyphs


# ---------------------------------------------------------------- servers that fail

Answer = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]


class Server:
    """Answers each request with the next of its answers, the last one again and again; `bodies` are what came."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = chain(answers, repeat(answers[-1]))
        self._running: set[asyncio.Task[Any]] = set()
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.connections = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while not writer.is_closing():
                    await self._one(reader, writer)
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            writer.close()
            self._running.discard(task)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length:")), 0)
        self.heads.append(head)
        self.bodies.append(json.loads(await reader.readexactly(length) or b"{}"))
        await next(self._answers)(writer, self.bodies[-1])

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


@contextlib.asynccontextmanager
async def serving(*answers: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server(*answers)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    server.url = f"http{'s' if tls else ''}://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
        await server.close()
        await listening.wait_closed()


CHUNK = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": null}]}\n\n'
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def in_full(*parts: bytes, close: bool = False) -> Answer:
    async def answer(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        body = b"".join(parts)
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        if close:
            writer.close()

    return answer


def refusing(status: int, code: str, message: str = "not now") -> Answer:
    async def answer(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        body = json.dumps({"error": {"code": code, "message": message}}).encode()
        writer.write(b"HTTP/1.1 %d No\r\nContent-Type: application/json\r\n" % status)
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    return answer


async def cutting(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
    writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(CHUNK), CHUNK))
    await writer.drain()
    writer.close()


async def stalling(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
    writer.write(HEAD + b"Content-Length: 1000\r\n\r\n" + CHUNK)
    await asyncio.Event().wait()


async def garbling(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
    writer.write(b"\x00\x01 no HTTP\r\n\r\n")


FINE = in_full(CHUNK, CHUNK, DONE)
ONCE = ("-m", "m", "--concurrency", "1", "--warmup", "0")


@pytest.mark.parametrize(
    ("failing", "kind"),
    [
        (refusing(429, "RATE_LIMITED"), "HTTP 429 RATE_LIMITED"), (cutting, "cut stream"), (stalling, "timeout"),
        (in_full(CHUNK, b'data: {"error": {"code": "ENGINE_FAILED"}}\n\n'), "in the stream: ENGINE_FAILED"),
        (in_full(CHUNK), "cut stream"), (garbling, "no HTTP"), (in_full(DONE), "no output"),
    ],
)  # fmt: skip
async def test_each_failure_is_counted_as_what_it_is_and_the_run_goes_on(
    failing: Answer, kind: str, llorch: CommandLine
) -> None:
    async with serving(FINE, FINE, failing, FINE) as server:
        (step,) = await steps(llorch, server.url, *ONCE, "--requests", "3", "--request-timeout", "200ms", code=1)
    assert step["requests"] == {"sent": 3, "ok": 2, "failed": 1}
    assert step["errors"] == {kind: 1}
    assert step["duration_s"] < 2.5  # also where the endpoint says no more
    assert step["tokens_counted_by"] == "chunks"


async def test_an_endpoint_that_refuses_to_count_tokens_is_measured_without(llorch: CommandLine) -> None:
    async def strict(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        await (refusing(400, "unknown_field") if "stream_options" in body else FINE)(writer, body)

    async with serving(strict) as server:
        ran = await llorch("bench", "run", server.url, *ONCE, "--requests", "2")
    assert ran.code == 0, ran.err
    assert "warning: the endpoint does not count tokens" in ran.err
    assert ["stream_options" in body for body in server.bodies] == [True, False, False, False]


async def test_a_connection_that_the_endpoint_closes_after_each_answer_is_no_failure(llorch: CommandLine) -> None:
    async with serving(in_full(CHUNK, DONE, close=True)) as server:
        (step,) = await steps(llorch, server.url, *ONCE, "--requests", "4")
    assert step["requests"]["ok"] == 4
    assert server.connections == 5


async def test_connections_are_kept(llorch: CommandLine) -> None:
    async with serving(FINE) as server:
        await steps(llorch, server.url, *ONCE, "--requests", "4")
    assert server.connections == 1


async def test_an_endpoint_with_a_certificate_is_measured_once_its_authority_is_given(
    llorch: CommandLine, tmp_path: Path
) -> None:
    certificate_file, key_file = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    async with serving(FINE, tls=context) as server:
        refused = await llorch("bench", "run", server.url, *ONCE, "--requests", "2")
        (step,) = await steps(llorch, server.url, *ONCE, "--requests", "2", "--tls-ca", str(certificate_file))
    assert (refused.code, "hint: its authority: --tls-ca FILE" in refused.err) == (5, True)
    assert step["requests"]["ok"] == 2


async def test_an_open_loop_counts_the_time_in_which_a_request_had_to_wait_to_be_sent(
    llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten are due at once, and this client takes 20 ms to make each: the last one has waited for 200 by then."""
    chat = bench_load.Endpoint.chat

    def slowly(*given: Any) -> bytes:
        time.sleep(0.02)
        return chat(*given)

    async with serving(FINE) as server:
        monkeypatch.setattr(bench_load.Endpoint, "chat", slowly)
        argv = ("-m", "m", "--rate", "1000", "--requests", "10", "--warmup", "0", "--seed", "1")
        ran = await llorch("bench", "run", server.url, *argv, "--json")
    (step,) = json.loads(ran.out)["steps"]
    assert step["ttft_ms"]["max"] >= 180
    assert step["late_ms"]["max"] >= 180
    assert "warning: at 1000/s requests were sent up to" in ran.err


# ---------------------------------------------------------------- what can't be measured


def errors_of(ran: Ran) -> list[str]:
    return [line for line in ran.err.splitlines() if line.startswith(("error:", "why:", "hint:"))]


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (refusing(401, "invalid_api_key"), 3, ["answered 401 invalid_api_key", "not now", "--token-file"]),
        (refusing(404, "MODEL_NOT_FOUND"), 4, ["answered 404 MODEL_NOT_FOUND", "not now", "-m MODEL"]),
        (refusing(503, "NO_CAPACITY", "a\x1b[31m\nerror: b"), 6, ["answered 503 NO_CAPACITY", "a[31m error: b"]),
        (refusing(307, "moved"), 1, ["answered 307", "not now", "leads to"]),
        (garbling, 5, ["did not answer", "no HTTP", "https://"]),
        (stalling, 8, ["did not finish its answer", "timeout", "--request-timeout"]),
        (in_full(b"{}"), 1, ["not answer with a stream", "cut stream", "OpenAI-compatible"]),
    ],
)
async def test_what_can_not_be_measured_is_told_before_any_load_is_sent(
    answer: Answer, code: int, said: list[str], llorch: CommandLine
) -> None:
    async with serving(answer) as server:
        ran = await llorch("bench", "run", server.url, "-m", "m", "--request-timeout", "200ms", "--json")
    lines = errors_of(ran)
    assert (ran.code, ran.out, len(lines)) == (code, "", len(said)), ran.err
    assert all(words in line for words, line in zip(said, lines, strict=True)), lines
    assert len(server.bodies) == 1


async def test_nobody_at_the_url_is_told_with_what_mends_it(llorch: CommandLine) -> None:
    ran = await llorch("bench", "run", "http://127.0.0.1:1/v1", "-m", "m")
    assert ran.code == 5
    assert "Connection refused" in ran.err
    assert "hint: check the host and the port" in ran.err


async def test_a_token_is_sent_if_there_is_one_and_is_in_nothing_that_is_printed(llorch: CommandLine) -> None:
    async with serving(FINE) as server:
        ran = await llorch("bench", "run", server.url, *ONCE, "--requests", "1", "--json")
        llorch.env(LLORCH_TOKEN="the-token-of-this-test")
        ran = await llorch("bench", "run", server.url, *ONCE, "--requests", "1", "--json")
    assert ran.code == 0, ran.err
    assert ["Authorization: Bearer the-token-of-this-test" in head for head in server.heads] == [False] * 2 + [True] * 2
    assert "the-token" not in ran.out + ran.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--concurrency", "1", "--rate", "1"], "two kinds of load"),
        (["--duration", "1s", "--requests", "1"], "both say when a step ends"),
        (["--concurrency", "0"], "--concurrency"), (["--rate", "x"], "--rate"), (["--duration", "soon"], "--duration"),
        (["--slo-ttft", "fast"], "--slo-ttft"), (["--plot", "of.pdf"], ".svg or .png"),
        (["--plot", "nowhere/of.svg"], "no directory"),
    ],
)  # fmt: skip
async def test_flags_that_can_not_be_are_refused_before_anything_is_asked(
    argv: list[str], said: str, llorch: CommandLine
) -> None:
    ran = await llorch("bench", "run", "http://127.0.0.1:1", *argv)
    assert ran.code == 2
    assert said in ran.err
    assert "hint:" in ran.err or "of.pdf" not in argv


async def test_more_connections_than_this_process_may_have_are_refused_with_what_mends_it(
    llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    ran = await llorch("bench", "run", "http://127.0.0.1:1", "--concurrency", "1,961")
    assert ran.code == 2
    assert "hint: ulimit -n 1025" in ran.err


async def test_without_matplotlib_the_command_that_installs_it_is_told(
    llorch: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = await llorch("bench", "run", "http://127.0.0.1:1", "--plot", "of.svg")
    assert ran.code == 2
    assert f"hint: {bench_picture.install()}" in ran.err
    assert "pip install" in bench_picture.install()


async def test_interrupted_it_prints_the_steps_that_had_ended(engine: str) -> None:
    argv = ["bench", "run", engine, "--concurrency", "1,2", "--duration", "100ms", "--output-tokens", "200", "--json"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llorch", *argv, "--warmup", "0",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(bench_load.__file__).parents[2])},
    )  # fmt: skip
    assert process.stderr is not None
    async with asyncio.timeout(30):
        while not (await process.stderr.readline()).startswith(b"2 at a time"):
            pass
    process.send_signal(signal.SIGINT)  # its answers take a second
    out, err = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 130, err
    found = json.loads(out)
    assert (found["complete"], [step["concurrency"] for step in found["steps"]]) == (False, [1])
    assert b"interrupted" in err
