"""Which paths of a client reach an engine: asked of a real control and of a real node, byte by byte."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from llorch.openai_paths import SERVED
from tests.component.control_harness import MODEL, TOKENS, a_control
from tests.component.node_harness import eventually, node_between
from tests.unit.test_openai_paths import ELSEWHERE

BODY = json.dumps({"model": MODEL, "messages": []}).encode()

# Request targets as they stand in a request line: (target, the path that the node is sent; None: nothing is sent).
TARGETS = [
    *((path, path) for path in sorted(SERVED)),
    ("/v1/chat/completions?beta=true&x=/../props", "/v1/chat/completions"),
    ("/v1/chat%2Fcompletions", "/v1/chat/completions"),
    ("/v1/%63hat/completions", "/v1/chat/completions"),
    ("/v1/models/../chat/completions", None),
    ("http://elsewhere/v1/chat/completions", None),
    ("/v1/../invocations", None),
    ("/v1/%2e%2e/invocations", None),
    ("/v1/..%2finvocations", None),
    ("/v1/%252e%252e/invocations", None),
    ("/v1/chat/completions/../../props", None),
    ("/v1/chat/completions/../../../props", None),
    ("/v1/chat/completions/%2e%2e/%2e%2e/props", None),
    ("/v1/chat/completions/..;/..;/props", None),
    ("/v1\\..\\invocations", None),
    ("//v1/chat/completions", None),
    ("/v1//chat/completions", None),
    ("/v1/chat/completions/", None),
    ("/v1/chat/completions%00", None),
    ("/v1/chat/completions%0d%0aX-Evil:%201", None),
    ("/v1/chat/completions%3fx", None),
    ("/V1/chat/completions", None),
    ("/v1/load_lora_adapter", None),
    ("/v1/audio/transcriptions", None),
    ("/v1/" + "a" * 4_000, None),
    ("/invocations", None),
    ("/props", None),
    ("/slots/0?action=erase", None),
    ("http://127.0.0.1:9/invocations", None),
    ("127.0.0.1:9", None),
    ("*", None),
    ("/v1/ü", None),
]


async def ask(port: int, target: str) -> bytes:
    """The first line of the answer to a POST, or nothing if the connection was closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"Host: x\r\nAuthorization: Bearer {TOKENS['alice']}\r\nContent-Length: {len(BODY)}\r\n"
        writer.write(f"POST {target} HTTP/1.1\r\n{head}\r\n".encode() + BODY)
        return await asyncio.wait_for(reader.readline(), 5)
    finally:
        writer.close()


async def test_a_control_sends_on_what_is_served_and_nothing_else() -> None:
    async with a_control() as control:
        node = await control.join("a")
        for target, path in TARGETS:
            asking = asyncio.ensure_future(ask(control.port, target))
            if path is None:
                answer = await asking
                assert answer == b"" or answer.split()[1] in (b"400", b"404", b"405"), (target, answer)
            else:
                attempt = await node.asked()
                assert attempt.header["path"] == path, target
                attempt.accept().head("application/json").data(b"{}").tail()
                assert (await asking).split()[1] == b"200", target
        assert len(node.opened) == sum(path is not None for _, path in TARGETS)


async def test_what_is_not_served_is_not_found_before_its_body_is_read() -> None:
    async with a_control() as control:
        answer = await control.ask("POST", "/v1/secrets", data=b"{not JSON").answer()
        assert (answer.status, answer.code) == (404, "NOT_FOUND")
        assert "/v1/chat/completions" in answer.json["error"]["hint"]


async def test_a_node_asks_its_engine_for_what_is_served_and_nothing_else(tmp_path: Path) -> None:
    async with node_between(tmp_path) as setup:
        link = await setup.control.linked()
        for path in ELSEWHERE:
            stream = link.open({"model": MODEL, "messages": []}, path=path[:4_000])
            await eventually(lambda stream=stream: stream.refused is not None)
            assert stream.refused is not None and stream.refused["code"] in ("NOT_FOUND", "INVALID_REQUEST"), path
        for path in sorted(SERVED):
            stream = link.open({"model": MODEL, "messages": []}, path=path)
            call = await setup.engine.asked()
            assert call.path == path
            call.reply(b"{}")
            await eventually(lambda stream=stream: stream.tail is not None)
        assert setup.engine.calls.empty()


@pytest.mark.parametrize("path", ["/v1/../invocations", "/invocations", "/v1/chat/completions?x", "//props", "/v1/ü"])
async def test_a_node_takes_no_other_path_over_http_either(tmp_path: Path, path: str) -> None:
    async with node_between(tmp_path, controls=0) as setup:
        async with setup.node.request("POST", "/v2/pools/p0/infer", data=BODY, headers={"X-Llorch-Path": path}) as got:
            assert (got.status, (await got.json())["error"]["code"]) == (404, "NOT_FOUND")
        assert setup.engine.calls.empty()
