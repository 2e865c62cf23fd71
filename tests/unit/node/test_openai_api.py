"""What reaches an engine, and what its answers become: at every split point, with every way to end."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from llorch import sse
from llorch.errors import Code, LlorchError
from llorch.messages import TaskBody
from llorch.node.engines.openai_api import (
    MAX_HELD_BYTES,
    Decoder,
    NativeDecoder,
    TaskFacts,
    normalise_error,
    openai_decoder,
)
from llorch.node.engines.requests import EngineRequest, encode_native, encode_openai
from llorch.openai_paths import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES

FACTS = TaskFacts("task-1", "node-1", "pool-1", "m", attempt=2, accepted_at=10.0, request_id="req-1")


def data(value: object) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"data: {text}\n\n".encode()


def chat(text: str | None, finish: str | None = None, **delta: Any) -> bytes:
    return data({"choices": [{"index": 0, "delta": {"content": text} | delta, "finish_reason": finish}]})


def completion(text: str, finish: str | None = None) -> bytes:
    return data({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


USAGE = data(
    {
        "choices": [],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}},
        "timings": {"cache_n": 5, "prompt_per_second": 100.0, "predicted_per_second": 50.0},
    }
)
DONE = data("[DONE]")
ROLE = chat(None, role="assistant")
PIECES = [chat("Hé"), chat("llo\n"), chat("\u2028 w\u0085🎉")]
TEXT = "Héllo\n\u2028 w\u0085🎉"
STREAM = ROLE + b"".join(PIECES) + chat(None, "stop") + USAGE + DONE


def run(decoder: Decoder, *parts: bytes, cut: bool = False) -> bytes:
    return b"".join(decoder.feed(part, 11.0) for part in parts) + decoder.finish(12.0, cut)


def native(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The events of a native log, their ids checked against where they end."""
    events, at = [], 0
    for block in sse.Splitter().feed(raw):
        at += len(block)
        event = sse.parse(block)
        assert event is not None and event.id == f"{at:012x}"
        events.append((event.event, json.loads(event.data)))
    assert at == len(raw)
    return events


def request(path: str = CHAT, **body: Any) -> EngineRequest:
    return encode_openai(path, {"stream": True} | body, "m")


ASKED: dict[str, Any] = {"stream_options": {"include_usage": True}}

# ---------------------------------------------------------------- native streams


def test_a_native_stream_has_started_tokens_and_one_end() -> None:
    decoder = NativeDecoder(FACTS)
    (first, started), *tokens, (last, end) = native(run(decoder, STREAM))
    assert (first, started) == (
        "started", {"task_id": "task-1", "node_id": "node-1", "pool_id": "pool-1", "model": "m", "attempt": 2},
    )  # fmt: skip
    assert [kind for kind, _ in tokens] == ["token"] * 3
    assert [token["i"] for _, token in tokens] == [0, 1, 2]
    assert "".join(token["t"] for _, token in tokens) == TEXT
    assert last == "end"
    assert end == {
        "finish_reason": "stop", "tokens_in": 7, "tokens_out": 3, "cached_tokens": 5, "ttft_ms": 1000.0,
        "decode_ms": 0.0, "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
    }  # fmt: skip
    assert decoder.done and decoder.error is None and decoder.finish_reason == "stop"
    assert decoder.timings.decode_tps == 50.0


def test_a_native_stream_is_the_same_at_every_split_point() -> None:
    whole = run(NativeDecoder(FACTS), STREAM)
    for at in range(len(STREAM) + 1):
        assert run(NativeDecoder(FACTS), STREAM[:at], STREAM[at:]) == whole
    assert run(NativeDecoder(FACTS), *(STREAM[at : at + 1] for at in range(len(STREAM)))) == whole


def test_offsets_go_on_from_where_the_log_stood() -> None:
    raw = NativeDecoder(FACTS, offset=0x100).feed(PIECES[0], 11.0)
    assert raw.startswith(f"id: {0x100 + raw.index(b'id: ', 1):012x}\n".encode())


def test_completions_chunks_are_tokens_too() -> None:
    events = native(run(NativeDecoder(FACTS), completion("t0 ") + completion("t1 ") + completion("", "length") + DONE))
    assert [event for event, _ in events] == ["started", "token", "token", "end"]
    assert (events[-1][1]["finish_reason"], events[-1][1]["tokens_out"]) == ("length", 2)


def test_nothing_is_given_out_before_the_first_content() -> None:
    for decoder in (NativeDecoder(FACTS), openai_decoder(FACTS, request())):
        assert decoder.feed(b": ping\n\n" + ROLE + b": ping\n\n", 11.0) == b""
        assert not decoder.first_content
        assert decoder.feed(PIECES[0], 11.0)
        assert decoder.first_content


def test_an_empty_answer_is_an_answer() -> None:
    assert [event for event, _ in native(run(NativeDecoder(FACTS), ROLE + chat("", "stop") + DONE))] == [
        "started",
        "end",
    ]
    raw = ROLE + chat("", "stop") + DONE
    assert run(openai_decoder(FACTS, request()), raw) == raw


def test_half_a_surrogate_pair_does_not_break_the_log() -> None:
    raw = data('{"choices":[{"delta":{"content":"a\\ud83d"}}]}') + chat(None, "stop") + DONE
    events = native(run(NativeDecoder(FACTS), raw))
    assert events[1][1]["t"] == "a?"
    assert events[2][1]["sha256"] == hashlib.sha256(b"a?").hexdigest()


# ---------------------------------------------------------------- /v1 streams


def test_a_v1_stream_passes_unchanged_at_every_split_point() -> None:
    for at in range(len(STREAM) + 1):
        assert run(openai_decoder(FACTS, request(**ASKED)), STREAM[:at], STREAM[at:]) == STREAM


def test_the_usage_chunk_goes_only_to_whom_asked_for_it() -> None:
    decoder = openai_decoder(FACTS, request())
    without = STREAM.replace(USAGE, b"")
    assert run(decoder, STREAM) == without != STREAM
    assert (decoder.usage.tokens_in, decoder.usage.tokens_out, decoder.usage.cached_tokens) == (7, 3, 5)
    for at in range(len(STREAM) + 1):
        assert run(openai_decoder(FACTS, request()), STREAM[:at], STREAM[at:]) == without


@pytest.mark.parametrize("ending", [b"\r\n\r\n", b"\r\r", b"\n\n"])
def test_other_line_ends_pass_too(ending: bytes) -> None:
    raw = STREAM.replace(b"\n\n", ending)
    assert run(openai_decoder(FACTS, request(**ASKED)), raw) == raw


def test_tool_calls_and_thoughts_are_content() -> None:
    for delta in ({"tool_calls": [{"index": 0}]}, {"reasoning_content": "hm"}, {"reasoning": "hm"}):
        decoder = openai_decoder(FACTS, request())
        assert decoder.feed(chat(None, **delta), 11.0)


def test_an_anthropic_stream_passes_and_is_read() -> None:
    def named(kind: str, **rest: Any) -> bytes:
        return f"event: {kind}\n".encode() + data({"type": kind} | rest)

    start = named("message_start", message={"usage": {"input_tokens": 2, "cache_read_input_tokens": 5}})
    delta = named("content_block_delta", delta={"type": "text_delta", "text": "hi"})
    last = named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3})
    stop = named("message_stop")
    decoder = openai_decoder(FACTS, request(MESSAGES))
    assert decoder.feed(start, 11.0) == b""
    assert decoder.feed(delta, 11.0) == start + delta
    assert decoder.feed(last + stop, 11.0) + decoder.finish(12.0) == last + stop
    assert (decoder.usage.tokens_in, decoder.usage.tokens_out, decoder.usage.cached_tokens) == (7, 3, 5)
    assert decoder.finish_reason == "end_turn" and decoder.error is None
    cut = openai_decoder(FACTS, request(MESSAGES))
    out = run(cut, start, delta, last, cut=True)
    assert out.endswith(b"\n\n") and b"event: error\ndata: " in out
    assert cut.error is not None and cut.error.code is Code.ENGINE_FAILED


def test_a_responses_stream_passes_and_is_read() -> None:
    def named(kind: str, **rest: Any) -> bytes:
        return f"event: {kind}\n".encode() + data({"type": kind} | rest)

    raw = (
        named("response.created", response={"error": None, "usage": None})
        + named("response.output_text.delta", delta="hi")
        + named("response.completed", response={"usage": {"input_tokens": 7, "output_tokens": 3}})
    )
    decoder = openai_decoder(FACTS, request(RESPONSES))
    assert run(decoder, raw) == raw
    assert (decoder.usage.tokens_in, decoder.usage.tokens_out, decoder.finish_reason) == (7, 3, "stop")


# ---------------------------------------------------------------- answers in one piece


def test_an_answer_in_one_piece_is_held_until_it_is_whole() -> None:
    body = json.dumps(
        {
            "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
        }
    ).encode()
    decoder = openai_decoder(FACTS, request(stream=False))
    assert decoder.feed(body[:20], 11.0) == b"" and not decoder.first_content
    assert decoder.feed(body[20:], 11.0) == b""
    assert decoder.finish(12.0) == body
    assert (decoder.usage.tokens_in, decoder.usage.tokens_out, decoder.finish_reason) == (7, 3, "stop")
    cut = openai_decoder(FACTS, request(stream=False))
    assert run(cut, body[:20], cut=True) == b"" and not cut.first_content
    assert cut.error is not None and cut.error.code is Code.ENGINE_FAILED


def test_an_answer_that_is_no_json_is_the_engines_failure() -> None:
    decoder = openai_decoder(FACTS, request(EMBEDDINGS))
    assert run(decoder, b"<html>") == b""
    assert decoder.error is not None and decoder.error.code is Code.ENGINE_FAILED


def test_a_huge_answer_passes_through_unread() -> None:
    decoder = openai_decoder(FACTS, request(EMBEDDINGS))
    body = b'{"data":"' + b"x" * MAX_HELD_BYTES + b'"}'
    assert decoder.feed(body[:100], 11.0) == b""
    assert decoder.feed(body[100:], 11.0) == body
    assert decoder.feed(b" ", 11.0) == b" " and decoder.finish(12.0) == b""
    assert decoder.error is None


# ---------------------------------------------------------------- bad ends

BAD_ENDS = {
    "cut": (b"", True),
    "closed": (b"", False),
    "half an event": (b'data: {"choices"', False),
    "garbage": (b"\x00\xff garbage\n\ndata: \xff\xfe\n\n", False),
    "not an object": (b"data: [1]\n\n", False),
    "deep": (b"data: " + b"[" * 100_000 + b"\n\n", False),
    "an error": (data({"error": {"code": 500, "message": "the prompt was: s3cret", "type": "server_error"}}), False),
}


@pytest.mark.parametrize("name", BAD_ENDS)
def test_a_bad_end_after_content_is_one_terminal_error(name: str) -> None:
    tail, cut = BAD_ENDS[name]
    decoder: Decoder = NativeDecoder(FACTS)
    events = native(run(decoder, ROLE + PIECES[0] + tail, cut=cut))
    assert [event for event, _ in events] == ["started", "token", "error"]
    error = events[-1][1]
    assert error["code"] == "ENGINE_FAILED" and (error["task_id"], error["request_id"]) == ("task-1", "req-1")
    assert "s3cret" not in json.dumps(error)
    assert decoder.done and decoder.error is not None

    decoder = openai_decoder(FACTS, request())
    out = run(decoder, ROLE + PIECES[0] + tail, cut=cut)
    assert out.startswith(ROLE + PIECES[0] + b'data: {"error":{"code":"ENGINE_FAILED"')
    assert out.endswith(b"}}\n\n") and out.count(b'"error"') == 1 and b"s3cret" not in out
    assert decoder.feed(PIECES[1], 12.0) == b"" and decoder.finish(12.0) == b""


@pytest.mark.parametrize("name", BAD_ENDS)
def test_a_bad_end_before_content_shows_nothing_so_that_it_can_be_retried(name: str) -> None:
    tail, cut = BAD_ENDS[name]
    for decoder in (NativeDecoder(FACTS), openai_decoder(FACTS, request())):
        assert run(decoder, ROLE + tail, cut=cut) == b""
        assert not decoder.first_content and decoder.done
        assert decoder.error is not None and decoder.error.code is Code.ENGINE_FAILED


def test_once_the_finish_reason_came_the_text_is_whole() -> None:
    raw = ROLE + PIECES[0] + chat(None, "length")
    assert native(run(NativeDecoder(FACTS), raw, cut=True))[-1][1]["finish_reason"] == "length"
    assert run(openai_decoder(FACTS, request()), raw, cut=True) == raw + DONE


def test_a_cancelled_native_stream_ends_with_end() -> None:
    for raw in (b"", ROLE + PIECES[0]):
        decoder = NativeDecoder(FACTS)
        events = native(decoder.feed(raw, 11.0) + decoder.cancel(12.0) + decoder.feed(PIECES[1], 13.0))
        assert events[-1][0] == "end" and events[-1][1]["finish_reason"] == "canceled"
        assert decoder.finish(14.0) == decoder.cancel(14.0) == b"" and decoder.error is None


def test_a_cancelled_v1_stream_ends_with_a_frame() -> None:
    decoder = openai_decoder(FACTS, request())
    decoder.feed(ROLE + PIECES[0], 11.0)
    assert decoder.cancel(12.0).startswith(b'data: {"error":{"code":"CANCELED"')
    decoder = openai_decoder(FACTS, request())
    assert decoder.cancel(12.0) == b"" and decoder.error is not None


def test_an_answer_that_is_whole_is_not_cancelled_any_more() -> None:
    asked = encode_openai("/v1/chat/completions", {"model": "m", "messages": []}, "m")
    decoder = openai_decoder(FACTS, asked)
    decoder.feed(b'{"choices": [{"finish_reason": "stop"}]}', 11.0)
    assert decoder.finish(12.0)
    assert decoder.cancel(13.0) == b""
    assert (decoder.finish_reason, decoder.error) == ("stop", None)


def test_a_failure_from_outside_ends_the_stream_too() -> None:
    stalled = LlorchError(Code.ENGINE_STALLED, "no token for 60 s")
    decoder = NativeDecoder(FACTS)
    events = native(decoder.feed(PIECES[0], 11.0) + decoder.fail(stalled, 12.0) + decoder.fail(stalled, 12.0))
    assert [event for event, _ in events] == ["started", "token", "error"]
    assert NativeDecoder(FACTS).fail(stalled, 12.0) == b""


# ---------------------------------------------------------------- requests


def body_of(made: EngineRequest) -> dict[str, Any]:
    wire = json.loads(made.body)
    assert isinstance(wire, dict)
    return wire


def test_a_native_prompt_becomes_a_streamed_completion() -> None:
    made = encode_native(TaskBody(model="alias", prompt="Hi", max_tokens=5, stop=["x"], metadata={"a": 1}), "m")
    assert (made.path, made.stream, made.client_asked_usage) == (COMPLETIONS, True, True)
    assert body_of(made) == {
        "model": "m", "prompt": "Hi", "max_tokens": 5, "stop": ["x"], "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_native_messages_become_a_chat_that_hides_no_thoughts() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    task = TaskBody(model="m", messages=messages, temperature=0.0, json_schema={"type": "object"})
    made = encode_native(task, "m", "llama-server")
    wire = body_of(made)
    assert made.path == CHAT and wire["messages"] == messages and wire["reasoning_format"] == "none"
    assert wire["temperature"] == 0.0 and wire["json_schema"] == {"type": "object"}


@pytest.mark.parametrize(
    ("engine", "chat", "wanted", "absent"),
    [
        ("vllm", False, {"repetition_penalty": 1.5, "structured_outputs": {"grammar": "g"}}, "grammar"),
        ("vllm", True, {"repetition_penalty": 1.5, "structured_outputs": {"grammar": "g"}}, "reasoning_format"),
        ("sglang", False, {"repetition_penalty": 1.5, "ebnf": "g"}, "repeat_penalty"),
        ("sglang", True, {"ebnf": "g", "separate_reasoning": False}, "reasoning_format"),
        ("llamacpp", True, {"repeat_penalty": 1.5, "grammar": "g", "reasoning_format": "none"}, "ebnf"),
        ("external", False, {"repeat_penalty": 1.5, "grammar": "g"}, "ebnf"),
    ],
)
def test_a_native_parameter_has_the_name_that_its_engine_knows(
    engine: str, chat: bool, wanted: dict[str, Any], absent: str
) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}
    wire = body_of(encode_native(TaskBody(model="m", repeat_penalty=1.5, grammar="g", **asked), "m", engine))
    assert wire.items() >= wanted.items() and absent not in wire


@pytest.mark.parametrize(
    ("engine", "chat", "openai"),
    [("vllm", False, True), ("sglang", True, True), ("external", True, True), ("external", False, False),
     ("llama-server", True, False)],
)  # fmt: skip
def test_a_schema_goes_in_the_form_that_its_engine_knows(engine: str, chat: bool, openai: bool) -> None:
    schema = {"type": "object"}
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}
    wire = body_of(encode_native(TaskBody(model="m", json_schema=schema, **asked), "m", engine))
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    assert (wire.get("response_format"), wire.get("json_schema")) == ((form, None) if openai else (None, schema))


def test_thoughts_that_come_under_two_names_are_shown_once() -> None:
    log = run(NativeDecoder(FACTS), chat(None, reasoning="hm ", reasoning_content="hm "), chat("Hi", "stop"), DONE)
    assert [value["t"] for kind, value in native(log) if kind == "token"] == ["hm ", "Hi"]


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_its_engine_gave_up_is_no_whole_answer(reason: str) -> None:
    decoder = NativeDecoder(FACTS)
    log = run(decoder, completion("t0 "), completion("", reason), DONE)
    assert [kind for kind, _ in native(log)] == ["started", "token", "error"]
    assert decoder.error is not None and decoder.error.code is Code.ENGINE_FAILED


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (404, {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError"}}, "MODEL_NOT_AVAILABLE"),
        (404, {"object": "error", "message": "model 'x:1b' not found"}, "MODEL_NOT_AVAILABLE"),
        (404, {"error": {"message": "nope", "code": "model_not_found"}}, "MODEL_NOT_AVAILABLE"),
        (404, {"detail": "Not Found"}, "INVALID_REQUEST"),
        (401, {"error": "Unauthorized"}, "ENGINE_FAILED"),
        (400, {"object": "error", "message": "The input (9 tokens) is longer than the model's context length (8)."},
         "CONTEXT_LENGTH_EXCEEDED"),
        (400, {"error": {"message": "This model's maximum context length is 8 tokens. However, you"}},
         "CONTEXT_LENGTH_EXCEEDED"),
    ],
)  # fmt: skip
def test_the_errors_of_other_engines_are_read(status: int, body: dict[str, Any], code: str) -> None:
    assert normalise_error(status, json.dumps(body).encode()).code.value == code


def test_unknown_v1_fields_reach_the_engine_and_the_model_is_ours() -> None:
    wire = body_of(encode_openai(CHAT, {"model": "alias", "messages": [], "new_field": {"a": [1]}}, "m"))
    assert wire == {"model": "m", "messages": [], "new_field": {"a": [1]}}


def test_usage_is_always_asked_for_and_it_is_remembered_who_asked() -> None:
    made = encode_openai(CHAT, {"stream": True, "stream_options": {"x": 1}}, "m")
    assert body_of(made)["stream_options"] == {"x": 1, "include_usage": True}
    assert (made.stream, made.client_asked_usage) == (True, False)
    assert encode_openai(CHAT, {"stream": True} | ASKED, "m").client_asked_usage
    assert "stream_options" not in body_of(encode_openai(CHAT, {"stream": False}, "m"))
    assert "stream_options" not in body_of(encode_openai(MESSAGES, {"stream": True}, "m"))
    assert not encode_openai(EMBEDDINGS, {"stream": True}, "m").stream


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"n_discard": -1}, "n_discard"),
        (CHAT, {"id_slot": 0}, "id_slot"),
        (CHAT, {"speculative.n_max": 64}, "speculative.n_max"),
        (CHAT, {"chat_template": "{{ x }}"}, "chat_template"),
        (CHAT, {"kv_transfer_params": {"remote_host": "10.0.0.1"}}, "kv_transfer_params"),
        (CHAT, {"n": 2}, "n"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], [2]]}, "prompt"),
        (CHAT, {"stream": "yes"}, "stream"),
        (CHAT, {"stream": True, "stream_options": []}, "stream_options"),
    ],
)
def test_what_is_refused_is_named(path: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(LlorchError) as caught:
        encode_openai(path, body, "m")
    assert (caught.value.code, caught.value.param) == (Code.INVALID_REQUEST, param)


def test_one_prompt_in_a_list_or_as_tokens_is_one_prompt() -> None:
    for prompt in (["a"], [1, 2, 3], [1, "a", 2], "a", [[1, 2]]):
        encode_openai(COMPLETIONS, {"prompt": prompt, "n": 1}, "m")
    encode_openai(EMBEDDINGS, {"input": ["a", "b"]}, "m")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (
            400,
            {"error": {"code": 400, "message": "bad grammar", "type": "invalid_request_error"}},
            Code.INVALID_REQUEST,
        ),
        (400, {"error": {"type": "exceed_context_size_error", "message": "x"}}, Code.CONTEXT_LENGTH_EXCEEDED),
        (
            400,
            {"object": "error", "message": "This model's maximum context length is 10"},
            Code.CONTEXT_LENGTH_EXCEEDED,
        ),
        (401, {"error": {"message": "Invalid API Key"}}, Code.ENGINE_FAILED),
        (413, {}, Code.PAYLOAD_TOO_LARGE),
        (422, {"detail": "x"}, Code.INVALID_REQUEST),
        (429, {}, Code.MODEL_NOT_AVAILABLE),
        (500, {"error": {"message": "s3cret"}}, Code.ENGINE_FAILED),
        (501, {"error": {"message": "This server does not support embeddings"}}, Code.INVALID_REQUEST),
        (503, {"error": {"message": "Loading model", "type": "unavailable_error"}}, Code.MODEL_NOT_AVAILABLE),
        (302, {}, Code.ENGINE_FAILED),
    ],
)
def test_an_engines_errors_in_our_words(status: int, body: Any, code: Code) -> None:
    error = normalise_error(status, json.dumps(body).encode())
    assert error.code is code
    assert "s3cret" not in error.message


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (400, Code.INVALID_REQUEST),
        (500, Code.ENGINE_FAILED),
        (503, Code.MODEL_NOT_AVAILABLE),
        (True, Code.ENGINE_FAILED),
        (2**70, Code.ENGINE_FAILED),
        ("NOT_FOUND", Code.ENGINE_FAILED),
        (None, Code.ENGINE_FAILED),
    ],
)
def test_an_error_within_a_stream_has_a_number_for_a_code_and_none_of_ours(number: object, code: Code) -> None:
    decoder = openai_decoder(FACTS, request())
    shown = run(decoder, PIECES[0] + data({"error": {"code": number, "message": "x", "type": "y"}}))
    assert decoder.error is not None and decoder.error.code is code
    assert json.loads(shown.rpartition(b"data: ")[2])["error"]["code"] == code


def test_an_engines_words_are_cleaned_and_bounded() -> None:
    error = normalise_error(400, json.dumps({"error": {"message": "a\x1b[2J\nb" + "c" * 10_000}}).encode())
    assert error.message.startswith("a [2J b") and len(error.message) <= 500
    sizes = {"type": "exceed_context_size_error", "n_prompt_tokens": 9000, "n_ctx": 4096}
    error = normalise_error(400, json.dumps({"error": sizes}).encode())
    assert error.details == {"n_prompt_tokens": 9000, "n_ctx": 4096} and "9000" in error.message
    for raw in (b"", b"\xff", b"[" * 100_000, b"[]", b'"x"', b'{"error": 5}', b'{"error": "words"}'):
        assert normalise_error(400, raw).code is Code.INVALID_REQUEST
