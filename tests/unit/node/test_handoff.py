"""One handoff file: what is accepted, what is refused and why, and that nothing torn passes for whole."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest

from llorch.node.handoff import MAX_HANDOFF_BYTES, Handoff, parse, render

WHOLE: dict[str, Any] = {
    "pool_id": "chat", "replica_id": "r1", "engine": "vllm", "engine_version": "0.11.2", "url": "http://127.0.0.1:8000",
    "model": "llama-3-8b", "slots": 4, "ctx": 8192, "pid": 4321, "device_mask": "0,1", "api_key_file": "/run/key",
}  # fmt: skip
NAME = "chat-r1.json"


def read(name: str = NAME, cidrs: tuple[str, ...] = (), **changes: Any) -> Handoff:
    wire = {field: value for field, value in (WHOLE | changes).items() if value is not ...}
    return parse(name, json.dumps(wire).encode(), [ipaddress.ip_network(cidr) for cidr in cidrs])


def reason(name: str = NAME, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        read(name, **changes)
    return str(caught.value)


def test_a_whole_handoff_is_read_and_rendered_back() -> None:
    handoff = read()
    assert handoff == Handoff(**WHOLE)
    assert handoff.file_name == NAME
    assert parse(NAME, render(handoff)) == handoff


def test_the_least_that_is_needed() -> None:
    wire = {"pool_id": "p", "engine": "vllm", "url": "http://localhost:8000/", "model": "org/m:q4"}
    handoff = parse("p-r0.json", json.dumps(wire).encode())
    assert (handoff.replica_id, handoff.slots, handoff.url) == ("r0", None, "http://localhost:8000")


def test_slots_has_two_names() -> None:
    assert read(slots=..., slots_total=7).slots == 7
    assert read(slots=7, slots_total=7).slots == 7
    assert reason(slots=7, slots_total=8) == "slots and slots_total differ"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pool_id": ...}, "it lacks pool_id"),
        ({"model": None}, "it lacks model"),
        ({"secret": 1}, "it has unknown fields: secret"),
        ({"pool_id": "../etc"}, "pool_id is not an id"),
        ({"pool_id": "other"}, "its name does not match its content: it should be other-r1.json"),
        ({"replica_id": "r2"}, "its name does not match"),
        ({"model": "a..b"}, "model is not a model id"),
        ({"model": "m\n"}, "model is not a model id"),
        ({"slots": 0}, "slots is not a whole number"),
        ({"slots": True}, "slots is not a whole number"),
        ({"slots": 2.0}, "slots is not a whole number"),
        ({"slots": "4"}, "slots is not a whole number"),
        ({"ctx": -1}, "ctx is not a whole number"),
        ({"pid": 2**40}, "pid is not a whole number"),
        ({"engine": ""}, "engine is not the name of an engine"),
        ({"engine_version": "1\x1b[2J"}, "engine_version is not"),
        ({"api_key_file": "key"}, "api_key_file is not an absolute path"),
        ({"url": "http://10.0.0.1:8000"}, "url is not loopback"),
        ({"url": "http://example.com:8000"}, "url is not loopback"),
        ({"url": "http://127.0.0.1.example.com"}, "url is not loopback"),
        ({"url": "http://2130706433:80"}, "url is not loopback"),
        ({"url": "http://user:pw@127.0.0.1:80"}, "url must not carry a user"),
        ({"url": "http://127.0.0.1:80@10.0.0.1"}, "url must not carry a user"),
        ({"url": "http://127.0.0.1:8000/v1"}, "url is more than"),
        ({"url": "http://127.0.0.1:8000?x"}, "url is more than"),
        ({"url": "http://127.0.0.1:99999"}, "url is not an http"),
        ({"url": "file:///etc/passwd"}, "url is not an http"),
        ({"url": "http://127.0.0.1:0"}, "url has no host and port"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], why: str) -> None:
    assert reason(**changes).startswith(why)


def test_a_network_can_be_allowed() -> None:
    assert read(cidrs=("10.0.0.0/8",), url="http://10.1.2.3:8000").url == "http://10.1.2.3:8000"
    assert read(url="http://[::1]:8000").url == "http://[::1]:8000"
    assert read(url="http://[::ffff:127.0.0.1]:8000").url.startswith("http://[::ffff")


def test_no_refusal_quotes_a_value() -> None:
    for field in WHOLE:
        assert "s3cret" not in reason(**{field: "s3cret\x00"})


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b"{", b'{"a":1,"a":2}', b"[" * 100, b"NaN", b"null"])
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"file|JSON"):
        parse(NAME, raw)


def test_a_huge_one_is_refused() -> None:
    with pytest.raises(ValueError, match="larger"):
        parse(NAME, render(Handoff(**WHOLE)) + b" " * MAX_HANDOFF_BYTES)


def test_cut_at_any_byte_it_is_refused() -> None:
    raw = render(Handoff(**WHOLE))
    whole = len(raw.rstrip())
    for end in range(whole):
        with pytest.raises(ValueError):
            parse(NAME, raw[:end])
    assert parse(NAME, raw[:whole])
