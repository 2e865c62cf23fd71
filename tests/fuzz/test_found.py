"""What the fuzzers found, each as a test of its own. What took quadratic time would run into its time limit again."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path

import aiohttp.web
import pytest

from llorch import listen, pki, web
from llorch.auth import Scope, TokenRing
from llorch.config_kinds import MODEL_REF, BadValue
from llorch.control.addresses import check_address
from llorch.control.roster import FILE_NAME, Roster
from llorch.errors import Code, LlorchError
from llorch.messages import decode_json
from llorch.node.engines.chunks import Meter
from llorch.node.engines.openai_api import _value
from llorch.sse import SseError
from llorch.tls import NameReader
from tests.fuzz.seeds import greeting
from tests.fuzz.wire import Connection, Ending

LONG = 512 * 1024


@pytest.mark.timeout(10)
@pytest.mark.parametrize("piece", [b'\\"', b'"\\', b'"', b'"a\\"'])
def test_a_string_without_an_end_in_nested_json_is_read_once(piece: bytes) -> None:
    """From each of its quotes to the end again: 32 KiB took 4 s, and a control's loop stood still for as long."""
    with pytest.raises(LlorchError) as refused:
        decode_json(b"[" * 33 + b'"' + piece * (LONG // len(piece)))
    assert refused.value.code is Code.INVALID_REQUEST


@pytest.mark.timeout(5)
def test_an_engines_chunk_of_very_many_choices_is_read_once() -> None:
    chunk = Meter(0.0).read({"choices": [{"delta": {"content": "abcdefgh"}}] * 200_000})
    assert len(chunk.text) == 8 * 200_000


@pytest.mark.parametrize("address", [f"{'a' * 64}.example:80", "a..b:80", f"http://a.{'b' * 70}", "a.example..:80"])
def test_an_address_with_a_label_that_no_resolver_takes_is_refused(address: str) -> None:
    """`getaddrinfo` raises a UnicodeError for it, which was a 500."""
    with pytest.raises(LlorchError) as refused:
        check_address(address, "10.0.0.5")
    assert refused.value.code is Code.UNTRUSTED_ADDRESS


def test_labels_of_63_characters_and_a_dot_at_the_end_are_a_name() -> None:
    check_address(f"{'a' * 63}.example.:80", "10.0.0.5")


def test_a_deeply_nested_roster_is_one_that_cant_be_read(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"nodes": ' + "[" * 100_000)
    assert Roster(str(tmp_path)).saved is None


@pytest.mark.parametrize("ref", ["file:/models/../etc/passwd", "file:/..", "https://h/a/../b.gguf", "hf:o/r/../f.gguf"])
def test_a_model_reference_does_not_lead_through_a_parent(ref: str) -> None:
    with pytest.raises(BadValue):
        MODEL_REF.parse(ref)


def test_a_tls_greeting_whose_name_is_not_ascii_names_nobody_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    reader = NameReader()
    assert reader.read(greeting("llorch.control")) == (True, "llorch.control")
    assert reader.read(greeting("llorch.control").replace(b"llorch.", b"ll\xf2rch.")) == (True, None)
    assert printed == []
    assert sys.unraisablehook == printed.append


def test_an_error_in_an_engines_stream_is_read_however_deep_it_is() -> None:
    """Nested to where Python's parser just takes it, it could not be written again."""
    for depth in range(880, 1_000):
        raw = json.dumps({"error": {"code": 400, "message": "no"}})[:-2] + f', "x": {"[" * depth}{"]" * depth}}}}}'
        try:
            value = _value(raw)
        except SseError:
            break
        chunk = Meter(0.0).read(value)
        assert chunk.error is not None and chunk.error.code is Code.INVALID_REQUEST
    else:
        raise AssertionError("the parser's own limit was not reached")


def _altered(pem: bytes, old: bytes, new: bytes) -> bytes:
    """A PEM whose bytes have `new` where they had `old`."""
    begins, *lines, ends = pem.splitlines()
    der = base64.b64decode(b"".join(lines))
    assert old in der
    return b"\n".join((begins, base64.encodebytes(der.replace(old, new, 1)) + ends, b""))


def test_a_certificate_with_an_extension_twice_is_no_certificate() -> None:
    """`x509` raises a DuplicateExtension for it, which is no ValueError."""
    pem = pki.pem_of([pki.make_authority(pki.make_key(), 0.0)])
    key_id, constraints = b"\x06\x03\x55\x1d\x0e", b"\x06\x03\x55\x1d\x13"
    with pytest.raises(ValueError, match="no certificate"):
        pki.read_certs(_altered(pem, key_id, constraints))


@pytest.mark.parametrize("version", [1, 0x40])
def test_a_certificate_request_of_an_unknown_version_is_refused(version: int) -> None:
    """`x509` raises an InvalidVersion for it: a 500 for whoever had a join token."""
    pem = pki.make_request(pki.make_key(), "gpu-1")
    with pytest.raises(LlorchError) as refused:
        pki.read_request(_altered(pem, b"\x02\x01\x00\x30", bytes((2, 1, version, 0x30))))
    assert refused.value.code is Code.INVALID_REQUEST


async def test_to_be_told_to_go_on_is_no_answer() -> None:
    """Who sends a part of a body, is told to go on and hangs up has had no answer, and so none without an id."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    connection = Connection("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        raw = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n[]"
        answer = await connection.ask(raw, head_only=False, within_s=5, close_after=True, hang_up=True)
    finally:
        connection.close()
        server.close()
        await server.wait_closed()
    assert (answer.status, answer.ending) == (0, Ending.NONE)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("TRACE", "/x", 405), ("GET", "/y", 404), ("GET", "/x/%0a", 404)]
)
@pytest.mark.parametrize("expect", [b"\xed\xa0\x80", b"native", b"100-continue"])
async def test_an_expectation_on_no_route_is_answered_in_our_shape(
    method: str, path: str, status: int, expect: bytes
) -> None:
    """aiohttp answered 417 as text; and where it was not UTF-8, 500, with no credential asked for."""

    async def handler(_request: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
        raise AssertionError("no such request was sent")

    route = web.Route("GET", "/x", Scope.SUBMIT, handler, "a route")
    app = web.make_app([route], web.Gate(ring=TokenRing), max_body_bytes=1_000)
    server = await listen.serve(app, "127.0.0.1", 0, shutdown_timeout_s=0.1)
    connection = Connection("127.0.0.1", server.port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: r\r\nExpect: ".encode()
        answer = await connection.ask(
            head + expect + b"\r\n\r\n", head_only=False, within_s=5, close_after=True, hang_up=False
        )
    finally:
        connection.close()
        await server.close()
    assert answer.status == status
    assert json.loads(answer.body)["error"]["request_id"] == answer.headers["x-request-id"] == "r"
