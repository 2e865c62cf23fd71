from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch import messages
from llorch.errors import Code, LlorchError
from llorch.messages import (
    Head,
    Heartbeat,
    NodeCall,
    Open,
    Register,
    TaskBody,
    decode_json,
    decode_object,
    model_id_ok,
    parse,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_json_comes_back_as_it_was(value: Any) -> None:
    assert decode_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"  \n",
        b"{",
        b'{"a":1,"a":2}',
        b'{"x":{"a":1,"a":1}}',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b'"\\ud800"',
        b'{"\\udc00":1}',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe",
        b'{"a":"\xc3\x28"}',
        b"[" * 33 + b"]" * 33,
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"1" * 5_000,
        b"1e999",
        b"{} {}",
        b"{'a':1}",
        b'{"a":1,}',
        b"\x00",
    ],
)
def test_what_is_not_strict_json_is_refused_without_a_traceback(raw: bytes) -> None:
    with pytest.raises(LlorchError) as caught:
        decode_json(raw)
    assert caught.value.code is Code.INVALID_REQUEST


def test_depth_32_is_allowed_and_brackets_in_strings_do_not_count() -> None:
    assert decode_json(b"[" * 32 + b"]" * 32)
    assert decode_json(b'["' + b"[{" * 100 + b'"]')
    assert decode_json(b'["\\"' + b"[" * 100 + b'"]')


def test_a_surrogate_pair_is_a_character() -> None:
    assert decode_json(b'"\\ud83d\\ude00"') == "😀"


@pytest.mark.parametrize("raw", [b"[]", b'"x"', b"1", b"null"])
def test_a_body_is_an_object(raw: bytes) -> None:
    with pytest.raises(LlorchError, match="not a JSON object"):
        decode_object(raw)


def test_the_smallest_task_is_a_task() -> None:
    body = parse(TaskBody, {"prompt": "Hello", "model": "llama-3-8b"})
    assert (body.model, body.prompt, body.detach, body.priority) == ("llama-3-8b", "Hello", False, "interactive")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": 1}, "model"),
        ({"model": "../etc"}, "model"),
        ({"model": "a/../b"}, "model"),
        ({"model": "-x"}, "model"),
        ({"prompt": None}, None),
        ({"messages": [{"role": "user", "content": "x"}]}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "x"}, "stop"),
        ({"priority": "urgent"}, "priority"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"placement": {"pin": 1}}, "placement.pin"),
        ({"placement": {"pinn": "n"}}, "placement.pinn"),
        ({"task_id": "1"}, "task_id"),
        ({"n_discard": -1}, "n_discard"),
        ({"max_token": 5}, "max_token"),
        ({"detach": "yes"}, "detach"),
    ],
)
def test_a_bad_native_field_is_named(change: dict[str, Any], field: str | None) -> None:
    body = {"prompt": "Hello", "model": "m"} | change
    body = {name: value for name, value in body.items() if value is not None}
    with pytest.raises(LlorchError) as caught:
        parse(TaskBody, body)
    assert caught.value.code is Code.INVALID_REQUEST
    assert caught.value.param == field


def test_an_unknown_native_field_lists_the_known_ones() -> None:
    with pytest.raises(LlorchError) as caught:
        parse(TaskBody, {"prompt": "x", "model": "m", "max_token": 1})
    assert "max_tokens" in (caught.value.hint or "")


def test_a_bad_value_says_where_its_range_is_found() -> None:
    with pytest.raises(LlorchError, match=r"temperature: .* less than or equal to") as caught:
        parse(TaskBody, {"prompt": "x", "model": "m", "temperature": 99})
    assert "/openapi.json" in (caught.value.hint or "")


def test_an_unknown_field_of_any_length_makes_a_short_error() -> None:
    with pytest.raises(LlorchError) as caught:
        parse(TaskBody, {"prompt": "x", "model": "m", "x" * 100_000: 1})
    assert caught.value.param == "x" * 100
    assert len(json.dumps(caught.value.to_wire())) < 2_000


def test_an_error_never_quotes_a_prompt() -> None:
    with pytest.raises(LlorchError) as caught:
        parse(TaskBody, {"prompt": ["CANARY"], "model": "m"})
    assert "CANARY" not in json.dumps(caught.value.to_wire())


def test_the_minimal_registration_and_heartbeat_are_valid() -> None:
    register = parse(Register, {"node_id": "n", "address": "x:1", "pools": ["p0"], "capabilities": {"gpus": []}})
    assert [pool.pool_id for pool in register.pools] == ["p0"]
    beat = parse(Heartbeat, {"pools": [{"pool_id": "p0", "ready": True}]})
    assert beat.pools is not None
    assert (beat.pools[0].ready, beat.pools[0].model, beat.lease_id) == (True, None, None)


@pytest.mark.parametrize("status", [99, 100, 101, 103, 204, 205, 304, 600, "x"])
def test_an_answer_begins_with_a_final_status_that_has_a_body(status: Any) -> None:
    with pytest.raises(LlorchError):
        parse(Head, {"status": status})


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/html\r\nSet-Cookie: a=b"}, {"a": "\0"}, {"a": "x" * 9_000}, {"a b": "x"}, {"": "x"},
     {"a\n": "x"}, {f"h{i}": "" for i in range(65)}],
)  # fmt: skip
def test_no_peer_can_write_headers_of_its_own(headers: dict[str, str]) -> None:
    for model in (Head, Open, NodeCall):
        rest = {"task_id": "0" * 8 + "-0000" * 3 + "-" + "0" * 12, "pool_id": "p", "method": "GET", "path": "/"}
        assert parse(model, {**rest, "headers": {"content-type": "text/plain; charset=utf-8"}}).headers
        with pytest.raises(LlorchError) as caught:
            parse(model, {**rest, "headers": headers})
        assert (caught.value.param or "").startswith("headers")


def test_between_roles_unknown_fields_are_ignored() -> None:
    assert parse(Register, {"node_id": "n", "from_the_future": 1}).node_id == "n"


COUNTS = ["rtt_ms", "slots_total", "slots_free", "vram_used_bytes"]


@pytest.mark.parametrize(
    ("field", "number"),
    [
        *((field, number) for field in (*COUNTS, "kv_usage", "utilization") for number in ("NaN", "-inf", "1e999")),
        *((field, -1) for field in COUNTS),
    ],
)
def test_no_report_has_a_number_that_json_cannot_say_or_a_count_below_nothing(field: str, number: Any) -> None:
    """Also as text, which lax parsing takes for numbers: what one node says is shown to everybody as JSON."""
    wrong = {field: number}
    beat = {"gpus": [{"index": 0, "uuid": "g", "name": "n", **wrong}], "pools": [{"pool_id": "p", **wrong}], **wrong}
    with pytest.raises(LlorchError) as caught:
        parse(Heartbeat, beat)
    assert caught.value.code is Code.INVALID_REQUEST


@pytest.mark.parametrize("node_id", ["", "-a", "a b", "a/b", "x" * 64, "n\n", "..", "a\r\nX: 1"])
def test_a_node_id_is_a_plain_word(node_id: str) -> None:
    with pytest.raises(LlorchError):
        parse(Register, {"node_id": node_id})


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("llama-3-8b", True),
        ("org/model:Q4_K_M", True),
        ("a@b", True),
        ("", False),
        ("a..b", False),
        ("x" * 129, False),
        ("m\n", False),
    ],
)
def test_model_ids(text: str, ok: bool) -> None:
    assert model_id_ok(text) is ok


@pytest.mark.parametrize(
    ("raw", "taken"),
    [
        ('{"a":[' + "0," * (1_000 - 3) + "0]}", True),
        ('{"a":[' + "0," * 1_000 + "0]}", False),
        ('{"a":[' + "[]," * (1_000 // 2) + "0]}", False),
        ('{"a":[' + "{}," * (1_000 // 2) + "0]}", False),
        ('{"a":"' + ",[{" * 1_000 + '"}', True),
        ('{"a":"' + ",[{\\" * 1_000 + '"}', True),
    ],
)
def test_so_many_values_that_they_would_fill_the_memory_are_refused_and_text_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, raw: str, taken: bool
) -> None:
    monkeypatch.setattr(messages, "MAX_VALUES", 1_000)
    raw = raw.replace("{\\", '{\\"')
    if taken:
        assert "a" in decode_json(raw.encode())
    else:
        with pytest.raises(LlorchError, match="values"):
            decode_json(raw.encode())


def test_a_long_text_beside_many_brackets_is_measured_in_little_memory() -> None:
    """It was a gigabyte for every eight megabytes of text."""
    raw = ('{"a":' + "[" * 20 + "]" * 20 + ',"b":' + "[" * 20 + "]" * 20 + ',"c":"' + "x, " * 1_000_000 + '"}').encode()
    tracemalloc.start()
    try:
        decode_json(raw)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(raw)
    finally:
        tracemalloc.stop()


def test_a_body_that_is_wrong_in_a_thousand_places_is_told_so_in_one_line() -> None:
    with pytest.raises(LlorchError, match="5001 fields are unknown or wrong") as caught:
        parse(TaskBody, {f"k{number}": 0 for number in range(5_000)})
    assert caught.value.details is None
