"""What of a client's body may reach an engine: field by field, from what clients send to what breaks engines."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.errors import Code, LlorchError
from llorch.messages import TaskBody, decode_object, parse
from llorch.node.engines import fields
from llorch.node.engines.requests import NATIVE_PARAMETERS, encode_native, encode_openai
from llorch.openai_paths import CHAT, COMPLETIONS, MESSAGES, RESPONSES, SERVED

HELLO = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def sent(body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    """What reaches the engine of `body`, as a client writes it. Raises LlorchError."""
    wire = json.loads(encode_openai(path, decode_object(json.dumps(body).encode()), "m").body)
    assert isinstance(wire, dict)
    return wire


def refused(body: dict[str, Any], path: str = CHAT) -> str | None:
    with pytest.raises(LlorchError) as caught:
        sent(body, path)
    assert caught.value.code is Code.INVALID_REQUEST and caught.value.message.isprintable()
    return caught.value.param


# ---------------------------------------------------------------- what clients send


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(CHAT, {
            "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7, "top_p": 1,
            "max_tokens": 512,
            "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {"50256": -100}, "logprobs": True,
            "top_logprobs": 5, "seed": 7, "user": "u", "stop": ["\n"], "n": 1, "store": False, "metadata": {"a": "b"},
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": "auto", "parallel_tool_calls": True, "reasoning_effort": "low", "service_tier": "auto",
            "prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low", "modalities": ["text"],
        }, id="the openai SDK"),
        pytest.param(CHAT, {
            "stream": True, "top_k": 40, "min_p": 0.05, "repeat_penalty": 1.1, "repeat_last_n": 64, "tfs_z": 1,
            "mirostat": 2, "mirostat_eta": 0.1, "mirostat_tau": 5, "num_ctx": 4096, "keep_alive": "5m",
            "max_completion_tokens": 100, "chat_id": "c", "features": {"web_search": False},
        }, id="Open WebUI"),
        pytest.param(CHAT, {
            "top_k": 50.0, "extra_headers": None, "repetition_penalty": 1.05, "stop": None, "logprobs": None,
            "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "high"}, "cache_salt": "s" * 43,
            "skip_special_tokens": True, "guided_json": {"type": "object"}, "lora_path": None, "priority": None,
        }, id="LangChain with vLLM"),
        pytest.param(COMPLETIONS, {
            "prompt": "def f", "suffix": "", "max_tokens": -1, "temperature": 0.01, "cache_prompt": True,
            "stop": ["<|endoftext|>", "\n\n"], "stream": True,
        }, id="Continue"),
        pytest.param(COMPLETIONS, {
            "prompt": "x", "n_predict": 300, "typical_p": 1, "top_n_sigma": -1, "xtc_probability": 0.5,
            "xtc_threshold": 0.1, "dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2,
            "dry_penalty_last_n": -1, "dry_sequence_breakers": ["\n", ":"], "samplers": ["top_k", "temperature"],
            "dynatemp_range": 0.5, "dynatemp_exponent": 1, "ignore_eos": False, "grammar": 'root ::= "a"',
            "logit_bias": [[15043, False], ["Hello", -0.5]], "n_probs": 10, "min_keep": 1, "seed": -1,
        }, id="SillyTavern"),
        pytest.param(COMPLETIONS, {
            "prompt": [1, 2, 3], "echo": True, "logprobs": 1, "max_tokens": 0, "prompt_logprobs": 1, "seed": 1234,
        }, id="lm-evaluation-harness"),
        pytest.param(MESSAGES, {
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}], "max_tokens": 1024,
            "stop_sequences": ["x"], "thinking": {"type": "enabled", "budget_tokens": 1024},
            "metadata": {"user_id": "u"}, "tools": [{"name": "t", "input_schema": {"type": "object"}}],
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "t",
                                                   "input": {"image_url": "https://example.com/a.png"}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "done"}]},
            ],
        }, id="the anthropic SDK"),
        pytest.param(RESPONSES, {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"},
                                                   {"type": "input_image", "image_url": PIXEL}]}],
            "instructions": "be brief", "store": False, "previous_response_id": None, "background": False,
            "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}, "truncation": "auto",
        }, id="the Responses API"),
    ],
)  # fmt: skip
def test_what_clients_send_goes_through(path: str, body: dict[str, Any]) -> None:
    ours = {"stream_options"}
    given, wire = ({n: v for n, v in one.items() if v is not None and n not in ours} for one in (
        HELLO | body, sent(HELLO | body, path)
    ))  # fmt: skip
    assert wire == given


# ---------------------------------------------------------------- what engines must not be given


@pytest.mark.parametrize("name", [
    *sorted(fields.REFUSED), "speculative.n_max", "bootstrap_host", "bootstrap_anything", "data_parallel_rank",
    "routed_dp_rank", "kv_transfer_params", "ec_transfer_params",
])  # fmt: skip
def test_an_engine_internal_field_is_refused_by_name_on_every_path(name: str) -> None:
    for path in SERVED:
        for value in (1, -1, "x", [], {}, False, "\x1b]0;x\x07"):
            assert refused({name: value}, path) == name
    assert name not in sent({name: None}), "some engines look only for the name"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n_predict": -2}, "n_predict"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "100"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"top_k": -2}, "top_k"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e308}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"repeat_last_n": -2}, "repeat_last_n"),
        ({"min_keep": -1}, "min_keep"),
        ({"n_probs": 2**31}, "n_probs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"mirostat": 3}, "mirostat"),
        ({"seed": 2**64}, "seed"),
        ({"n_indent": -1}, "n_indent"),
        ({"stop": ["x"] * 257}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": "x" * 4_097}, "stop"),
        ({"stop": {}}, "stop"),
        ({"grammar": {}}, "grammar"),
        ({"grammar": "x" * 1_048_577}, "grammar"),
        ({"samplers": [["top_k"]]}, "samplers"),
        ({"logit_bias": {str(n): 1 for n in range(4_097)}}, "logit_bias"),
        ({"logit_bias": [[-1, 1]]}, "logit_bias"),
        ({"logit_bias": [[2**31, 1]]}, "logit_bias"),
        ({"logit_bias": [[1]]}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"1": 1e300}}, "logit_bias"),
        ({"logit_bias": "x"}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"allowed_token_ids": [0] * 65_537}, "allowed_token_ids"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"background": True}, "background"),
        ({"cache_prompt": "yes"}, "cache_prompt"),
        ({"cache_salt": "s" * 1_025}, "cache_salt"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs.__class__"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs.a b"),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": {"a": "x" * 257}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"structured_outputs": {"regex": "(a+)+$"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": 1}}, "structured_outputs.grammar"),
        ({"structured_outputs": 1}, "structured_outputs"),
        ({"tools": [{"type": "function"}, {"type": "mcp", "server_label": "x"}]}, "tools.1"),
        ({"tools": [{"server_url": "http://10.0.0.1/"}]}, "tools.0"),
        ({"input": [{"text": "x", "image": "http://10.0.0.1/"}]}, "input.0.image"),
        ({"documents": {"content": [{"video": "file:///etc/passwd"}]}}, "documents.0.content.0.video"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"input": [[1], [-1]]}, "input"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    assert refused(body) == param


@pytest.mark.parametrize("url", [
    "http://169.254.169.254/latest/meta-data/", "https://example.com/a.png", "file:///etc/passwd", "FILE:x", "ftp://x",
    "//example.com/x", "/etc/passwd", "", 5, ["data:"], " data:image/png;base64,x",
])  # fmt: skip
def test_an_engine_is_asked_to_fetch_nothing(url: Any) -> None:
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "input_file", "file_url": url},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": url}}]},
        {"type": "function_call_output", "output": [{"type": "input_image", "image_url": url}]},
    ):
        for name, path in (("messages", CHAT), ("messages", MESSAGES), ("input", RESPONSES)):
            body = {name: [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, part]}]}
            param = refused(body, path)
            assert param is not None and param.startswith(f"{name}.0.content.1.")
        assert refused({"input": [part]}, RESPONSES) is not None
        with pytest.raises(LlorchError, match="fetch nothing"):
            encode_native(TaskBody(model="m", messages=[{"role": "user", "content": [part]}]), "m")
        with pytest.raises(LlorchError, match="fetch nothing"):
            encode_native(TaskBody(model="m", messages=[{"role": "user", "content": part}]), "m")


def test_what_comes_with_the_request_is_passed_on() -> None:
    content = [
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
        {"type": "text", "text": "https://example.com/ is only mentioned"},
        {"type": "image", "image": "/9j/4AAQSkZJRg=="},
        {"type": "image", "image": PIXEL},
    ]
    body = {"messages": [{"role": "user", "content": content}]}
    assert sent(body)["messages"] == body["messages"]
    assert json.loads(encode_native(TaskBody(model="m", **body), "m").body)["messages"] == body["messages"]


def test_pickled_tensors_are_no_content() -> None:
    part = {"type": "image_embeds", "image_embeds": "gAWV"}
    assert refused({"messages": [{"role": "user", "content": [part]}]}) == "messages.0.content.0.image_embeds"


def test_no_field_is_both_bounded_and_refused() -> None:
    assert [name for name in fields.BOUNDED if fields.why_refused(name)] == []


# ---------------------------------------------------------------- whatever is sent

NAMES = st.sampled_from(sorted({*fields.REFUSED, *fields.BOUNDED, *NATIVE_PARAMETERS, "speculative.x", "new_field"}))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-3, 200), st.floats(allow_nan=False),
    st.text(max_size=20), st.sampled_from(["data:,x", "http://h/"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(NAMES | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
NUMBERS = {
    "n_predict": (-1, 10**7), "max_tokens": (-1, 10**7), "top_k": (-1, 10**6), "repeat_last_n": (-1, 10**7),
    "min_keep": (0, 10**6), "n_probs": (0, 100), "temperature": (0, 100), "mirostat": (0, 2), "seed": (-(2**63), 2**64),
}  # fmt: skip


@given(st.dictionaries(NAMES, VALUES, max_size=5), st.sampled_from(sorted(SERVED)))
def test_nothing_refused_or_out_of_range_ever_reaches_an_engine(body: dict[str, Any], path: str) -> None:
    try:
        wire = sent(body, path)
    except LlorchError as error:
        assert error.code is Code.INVALID_REQUEST
        return
    assert not any(map(fields.why_refused, wire))
    for name, (low, high) in NUMBERS.items():
        value = wire.get(name)
        if value is not None:
            assert isinstance(value, int | float) and not isinstance(value, bool)
            assert math.isfinite(value) and low <= value <= high


NATIVE_RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 10**7), "temperature": (0, 10), "top_p": (0, 1), "top_k": (0, 10**6), "min_p": (0, 1),
    "repeat_penalty": (0, 10), "seed": (0, 2**32 - 1),
}  # fmt: skip
NATIVE_WIRE = {"model", "prompt", "messages", "reasoning_format", "stream", "stream_options", *NATIVE_PARAMETERS}
NATIVE_NAMES = st.sampled_from(sorted({*NATIVE_PARAMETERS, *TaskBody.model_fields, "n_discard", "id_slot", "model"}))


@given(st.dictionaries(NATIVE_NAMES, VALUES, max_size=4))
def test_of_a_native_body_only_typed_parameters_in_range_reach_an_engine(body: dict[str, Any]) -> None:
    try:
        raw = json.dumps({"model": "m", "prompt": "Hi"} | body).encode()
        wire = json.loads(encode_native(parse(TaskBody, decode_object(raw)), "m").body)
    except LlorchError as error:
        assert error.code is Code.INVALID_REQUEST
        return
    assert set(wire) <= NATIVE_WIRE
    assert wire["stream"] is True and wire["model"] == "m"
    for name, (low, high) in NATIVE_RANGES.items():
        value = wire.get(name, low)
        assert isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    assert isinstance(wire.get("grammar", ""), str) and isinstance(wire.get("json_schema", {}), dict)
    assert len(wire.get("stop", [])) <= 4 and all(0 < len(text) <= 256 for text in wire.get("stop", []))


@pytest.mark.parametrize("name", sorted(NATIVE_RANGES))
def test_native_ranges_are_those_of_the_contract(name: str) -> None:
    low, high = NATIVE_RANGES[name]
    for value in (low, high):
        assert getattr(parse(TaskBody, {"model": "m", "prompt": "x", name: value}), name) == value
    for value in (low - 1, high + 1, True, "1", [1]):
        with pytest.raises(LlorchError) as caught:
            parse(TaskBody, {"model": "m", "prompt": "x", name: value})
        assert caught.value.param == name
