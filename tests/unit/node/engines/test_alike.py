"""Chunks that are alike mean what a parser reads in them: with and without the short way, a log is the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.node.engines.alike import shape_of
from llorch.node.engines.chunks import Chunk, Meter
from llorch.node.engines.openai_api import NativeDecoder, OpenAiDecoder, TaskFacts
from llorch.node.engines.requests import encode_openai
from llorch.openai_paths import CHAT, COMPLETIONS

FACTS = TaskFacts("task-1", "node-1", "pool-1", "m", attempt=2, accepted_at=10.0, request_id="req-1")
DONE = b"data: [DONE]\n\n"


def block(value: object, **style: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(value, **style).encode("utf-8", "surrogatepass")


def chat(text: object, finish: str | None = None, key: str = "content", **more: Any) -> dict[str, Any]:
    return {"id": "c-1", "choices": [{"index": 0, "delta": {key: text}, "finish_reason": finish}], "created": 17} | more


def completion(text: object, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": finish}], "model": "m"} | more


def raw_chat(inside: bytes) -> bytes:
    """A chunk that has these bytes where the inside of its text would be."""
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % inside


def decoders() -> tuple[NativeDecoder | OpenAiDecoder, ...]:
    chat_request = encode_openai(CHAT, {"stream": True}, "m")
    completion_request = encode_openai(COMPLETIONS, {"stream": True, "stream_options": {"include_usage": True}}, "m")
    return NativeDecoder(FACTS), OpenAiDecoder(FACTS, chat_request), OpenAiDecoder(FACTS, completion_request)


def read(decoder: NativeDecoder | OpenAiDecoder, pieces: Iterable[bytes], *, shapes: bool) -> dict[str, Any]:
    """All that a decoder makes of an answer; `shapes`: whether it may look for them."""
    if not shapes:
        decoder._tries = 0
    given_out, log = [], b""
    for number, piece in enumerate(pieces):
        log += decoder.feed(piece, 11.0 + number)
        given_out.append((len(log), decoder.usage.tokens_out, decoder.first_content, decoder.done))
    log += decoder.finish(99.0)
    return {
        "log": log,
        "given out": given_out,
        "usage": decoder.usage,
        "finish_reason": decoder.finish_reason,
        "timings": decoder.timings,
        "error": decoder.error and decoder.error.to_wire(),
    }


def compare(*pieces: bytes) -> None:
    for one, other in zip(decoders(), decoders(), strict=True):
        assert read(one, pieces, shapes=True) == read(other, pieces, shapes=False)


def compare_splits(raw: bytes) -> None:
    """In one piece, line by line, in pieces of three bytes, and at some places within."""
    compare(raw)
    compare(*raw.splitlines(keepends=True))
    compare(*(raw[at : at + 3] for at in range(0, len(raw), 3)))
    for at in range(1, len(raw), max(1, len(raw) // 3)):
        compare(raw[:at], raw[at:])


class Parsed(list[int]):
    """One for each chunk that was parsed."""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Parsed:
    count, parse = Parsed(), Meter.read

    def counted(self: Meter, value: dict[str, Any]) -> Chunk:
        count.append(1)
        return parse(self, value)

    monkeypatch.setattr(Meter, "read", counted)
    return count


# ---------------------------------------------------------------- what is alike

STYLES: dict[str, dict[str, Any]] = {
    "as Python writes it": {},
    "as pydantic writes it": {"separators": (",", ":"), "ensure_ascii": False},
}
KINDS = {
    "chat": chat,
    "thoughts": lambda text: chat(text, key="reasoning_content", content=None) | {"usage": None},
    "vLLM's thoughts": lambda text: chat(text, key="reasoning"),
    "completion": completion,
    "a model with a path": lambda text: completion(text, model="C:\\models\\x.gguf"),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_of_chunks_that_are_alike_the_first_one_is_parsed(kind: str, style: str, parsed: Parsed) -> None:
    texts = [" one", "t\u00e9n", "\n", "\\", "\u2028", "\x7f", "\U0001f389"] * 20
    raw = b"".join(block(KINDS[kind](text), **STYLES[style]) for text in texts)
    for pieces in ([raw], [raw[at : at + 50] for at in range(0, len(raw), 50)]):
        decoder = NativeDecoder(FACTS)
        parsed.clear()
        log = b"".join(decoder.feed(piece, 11.0) for piece in pieces).decode()
        said = [json.loads(line[6:]) for line in log.split("\n") if line.startswith('data: {"t":')]
        assert said == [{"t": text, "i": number} for number, text in enumerate(texts)]
        assert len(parsed) == 1
        assert decoder.usage.tokens_out == len(texts)


def test_a_text_with_a_quote_in_it_is_parsed_and_those_after_it_are_not(parsed: Parsed) -> None:
    raw = b"".join(block(chat(text)) for text in ("a", "b", 'c"', "d", '"', "e"))
    NativeDecoder(FACTS).feed(raw, 11.0)
    assert len(parsed) == 3


def test_what_is_never_alike_is_soon_looked_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr("llorch.node.engines.openai_api.shape_of", lambda *given: looked.append(given))
    for number in range(100):
        NativeDecoder(FACTS).feed(block(chat("a", id=number)), 11.0)
    assert len(looked) == 100
    looked.clear()
    NativeDecoder(FACTS).feed(b"".join(block(chat("a", id=number)) for number in range(100)), 11.0)
    assert len(looked) == 8


def test_chunks_that_become_alike_again_are_recognised_again(parsed: Parsed) -> None:
    raw = b"".join(block(chat(text, id=number)) for number in range(50) for text in "ab")
    NativeDecoder(FACTS).feed(raw, 11.0)
    assert len(parsed) == 50


def test_a_run_has_the_texts_of_its_chunks_and_ends_where_they_do() -> None:
    first, unlike = block(chat("a")), block(chat("a", id="c-2"))
    shape = shape_of(first, "a")
    assert shape is not None
    run = first + block(chat("b\n")) + block(chat("\u00e9", id="c-1"))
    assert shape.run(b"xy" + run + unlike, 2) == ([b"a", b"b\\n", b"\\u00e9"], 2 + len(run))
    assert shape.run(run + first[:-1], 0) == ([b"a", b"b\\n", b"\\u00e9"], len(run))
    for none in (
        unlike,
        first[:-1],
        first[1:],
        b"\n" + first,
        block(chat("")),
        block(chat(None)),
        block(chat('"')),
    ):
        assert shape.run(none, 0) == ([], 0)
        assert shape.run(first + none + first, 0) == ([b"a"], len(first))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'data:{"choices":[{"text":"a"}]}\n\n', "a"),
        (b'data: {"choices":[{"text":"a"}]}\r\n\r\n', "a"),
        (b'data: {"choices":[{"text":"a"}]}\n\r\n', "a"),
        (b'data: {"choices":[{"text":\t"a"}]}\n\n', "a"),
        (b'data: {"choices":[{"text":  "a"}]}\n\n', "a"),
        (b'data: {"choices":[{"text" :"a"}]}\n\n', "a"),
        (b'data: {"choices":[{"text":"a"}]} \n\n', "a"),
        (b': a comment\ndata: {"choices":[{"text":"a"}]}\n\n', "a"),
        (b'data: {"choices":[{"text":"a"},{"text":"b"}]}\n\n', "ab"),
        (b'data: {"choices":[{"text":"a"},{"text":""}]}\n\n', "a"),
        (b'data: {"choices":[{"delta":{"content":"a","reasoning":"b"}}]}\n\n', "ba"),
        (b'data: {"choices":[{"delta":{"reasoning_content":"a","reasoning":"a"}}]}\n\n', "a"),
        (b'data: {"choices":[{"text":"b"}]}\n\n', "a"),
        (b'data: {"choices":[{"delta":{"words":"a"}}]}\n\n', "a"),
        # The text is somewhere else than where it seems to be.
        (b'data: {"choices":[{"delta":{"reasoning":  "a"}}],"content":"a"}\n\n', "a"),
        (b'data: {"choices":[{"delta":{"content" :"a"}}],"text":"a"}\n\n', "a"),
        (b'data: {"choices":[{"delta":{"content"\ndata: :"a"}}],"text":"a"}\n\n', "a"),
        (b'data: {"choices":[{"delta":{"c\\u006fntent":"a"}}],"text":"a"}\n\n', "a"),
        (b'data: {"choices":[{"delta":{"content":"a","c\\u006fntent":"a"}}]}\n\n', "a"),
        (b'data: {"choices":[{"delta":{"c\\u006fntent":"a","content":"a"}}]}\n\n', "a"),
        (b'data: {"choices":[{"delta":{"r\\u0065asoning":"a","x\\"content":"a"}}]}\n\n', "a"),
        (b'data: {"choices":[{"delta":{"x\\"content":"a","text":"b"}}]}\n\n', "a"),
        (b'data: {"choices":[{"text" :"a"}]}\nx: {"text":"a"}\n\n', "a"),
    ],
)  # fmt: skip
def test_a_chunk_whose_text_is_not_certain_has_no_shape(raw: bytes, text: str) -> None:
    assert shape_of(raw, text) is None
    other = raw.replace(b'"a"', b'"c"')
    compare_splits(raw + other + raw + DONE)
    for at in range(raw.count(b'"a"')):  # one of them changes, and the others do not
        parts = raw.split(b'"a"')
        compare(raw + b'"a"'.join(parts[: at + 1]) + b'"c"' + b'"a"'.join(parts[at + 1 :]) + DONE)


# ---------------------------------------------------------------- any stream

PLAIN = ["a", " the", "\u00e9", "\U0001f389", "\u2028", "\x85", "\x7f", "\ufeff", "u0041", "data: x", "[DONE]", "/", ""]
ODD = ['"', 'x"', '"x', "\\", "x\\", '\\"', "\\u0041", "\\n", "\n", "\r", "\t", "\x00", '"content":"b"', '"}}]}']
ODD += ["\ud83d", "\udf89", "\ud83d\ude00", "\udbff\ue000"]  # surrogates, alone and in pairs
MORE: list[dict[str, Any]] = [
    {},
    {},
    {"id": "c-\u00e9"},
    {"id": "content", "object": "text"},
    {"created": 1.5e300, "error": None},
    {"error": {}},
    {"error": "oops"},
    {"type": "error"},
    {"usage": None, "timings": []},
    {"note": {"content": None}},
    {"note": {"text": "a"}},
    {'x"content': "a"},
]
texts = st.one_of(st.sampled_from(PLAIN), st.sampled_from(ODD), st.text(max_size=4))


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """Chunks of which most are alike, others between them, and where all is cut."""
    style = draw(st.sampled_from(list(STYLES.values())))
    make = draw(st.sampled_from(list(KINDS.values())))
    more = draw(st.sampled_from(MORE))
    blocks = [block(make(text) | more, **style) for text in draw(st.lists(texts, min_size=2, max_size=8))]
    for at, other in draw(st.lists(st.tuples(st.integers(0, 8), disturbances), max_size=3)):
        blocks.insert(at, other)
    raw = b"".join(blocks) + draw(st.sampled_from([DONE, b"", b"\r\n", block(chat("", "stop")) + DONE]))
    cuts = sorted(int(cut * len(raw)) for cut in draw(st.lists(st.floats(0, 1), max_size=4)))
    return raw, cuts


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}, "timings": {"cache_n": 5}}
LOGPROBS = {"content": [{"token": "a", "logprob": -1.5, "bytes": [97]}]}
disturbances = st.sampled_from(
    [
        b": a comment\n\n",
        b": a comment\n",
        b"\n",
        b"\r\n",
        b"\r",
        b"event: x\n",
        b"id: 1\n",
        b"retry: 1\n\n",
        b"\xef\xbb\xbf",
        b"data: [DONE] \n\n",
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: " + b"[" * 2_000 + b"\n\n",
        block(USAGE),
        block(chat("a") | {"usage": USAGE["usage"]}),
        block(chat("a") | {"timings": USAGE["timings"]}),
        block(chat("a", "stop")),
        block(chat(None, "tool_calls")),
        block(chat("a", "abort")),
        block(chat(None)),
        block(chat("", role="assistant")),
        block(chat(["a"])),
        block(chat([{"type": "text", "text": "a"}])),
        block({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": '"content":"a"'}}]}}]}),
        block({"choices": [{"delta": {"content": "a", "tool_calls": [{"id": "content"}]}}]}),
        block({"choices": [{"delta": {"content": "a"}, "logprobs": LOGPROBS}]}),
        block({"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "text_offset": [0]}}]}),
        block({"choices": [{"delta": {"content": "a", "reasoning_content": "b"}}]}),
        block({"choices": [{"delta": {"content": "a"}, "message": {"content": "b"}}]}),
        block({"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]}),
        block({"error": {"code": 500, "message": "oops"}}),
        block(chat("a", error="oops")),
        block(chat("a")).replace(b"\n", b"\r\n"),
        block(chat("a")).replace(b"\n", b"\r"),
        block(completion("a")).replace(b", ", b",\ndata: "),
        b'data: {"choices":[{"delta":{"content":"a","content":"b"}}]}\n\n',
        raw_chat(b"\xff\xc3"),
        raw_chat(b"\xed\xa0\xbd"),
        raw_chat(b"\\x"),
        raw_chat(b"\\u12"),
        raw_chat(b"a\nb"),
        raw_chat(b"a\n\ndata: b"),
        raw_chat(b"\x01"),
        raw_chat(b"a\\"),
    ]
)


@given(streams())
@settings(max_examples=40, deadline=None)
def test_a_log_is_the_same_whether_chunks_that_are_alike_are_parsed_or_not(given_: tuple[bytes, list[int]]) -> None:
    raw, cuts = given_
    compare(raw)
    compare(*(raw[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)))


@given(st.lists(st.one_of(st.binary(max_size=6), st.sampled_from([b"a", b"\\", b'\\"', b'"', b"\\u00"])), max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_log_is_the_same_whatever_bytes_stand_where_a_text_would(insides: list[bytes]) -> None:
    raw = raw_chat(b"a") + b"".join(map(raw_chat, insides)) + DONE
    compare(raw)
    compare(raw[:90], raw[90:])


@pytest.mark.parametrize(
    "inside",
    [
        b'\\"content\\":\\"b\\"',
        b'"content":"b',
        b'b\\"',
        b'\\"',
        b"b\\\\",
        b'b\\\\\\"',
        b'b\\\\"',
        b'"},"delta":{"content":"b',
        b"\\u0062",
        b"\\u0022",
        b"\\u005c",
        b"\\ud83d\\ude00",
        b"\\ud83d",
        b"\\ude00\\ud83d",
        b"\\ud83d\\",
        b"\\u00e",
        b"\\U0062",
        b"\\x",
        b"\\/\\b\\f\\n\\r\\t",
        b"\\",
        b"",
        b"\xc3\xa9",
        b"\xc3",
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\xbd\xed\xb8\x80",
        b"\xe2\x80\xa8\xc2\x85",
        b"\xef\xbb\xbf",
        b"\x00",
        b"\x01",
        b"\t",
        b"\n",
        b"\n\n",
        b"\r",
        b"\r\n",
        b"\r\r",
        b"\r\n\r\n",
        b"\x1f",
        b"\x7f",
        b"\x80",
        b"\n\ndata: [DONE]\n\n",
        b"\ndata: ",
    ],
)
def test_no_text_makes_a_log_another_one(inside: bytes) -> None:
    """After a chunk of the same shape, between two, as the first of all, and as the one that ends a piece."""
    usual, odd = raw_chat(b"a"), raw_chat(inside)
    compare(usual + usual + odd + usual + usual + odd + odd + DONE)
    compare(usual, odd, usual, odd + DONE)
    compare(odd + usual + usual + odd + DONE)
    whole = usual + odd + usual + DONE
    compare(*(whole[at : at + 7] for at in range(0, len(whole), 7)))


@pytest.mark.parametrize(
    "between",
    [
        b": a comment\n\n",
        b": a comment\n",
        b"\n",
        b"\r",
        b"\r\n",
        b"event: x\n",
        block(USAGE),
        block(chat("z", "length")),
        block(chat("z", "error")),
        block({"error": {"code": 400, "message": "context size"}}),
        block({"error": "oops"}),
        block(chat(None)),
        block({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "x"}}]}}]}),
        block({"choices": [{"delta": {"content": "z"}, "logprobs": LOGPROBS}]}),
        block(chat("a")).replace(b"\n", b"\r\n"),
        block(chat("a")).replace(b"\n", b"\r"),
        b'data: {"choices":[{"delta":{"content":"a","content":"b"}}]}\n\n',
        b"data: no event\n\n",
        DONE,
    ],
)
def test_what_stands_between_chunks_that_are_alike_is_read_as_ever(between: bytes) -> None:
    alike = b"".join(block(chat(text)) for text in ("a", "b\\", "\u00e9"))
    compare_splits(alike + between + alike + between + alike + block(chat("", "stop")) + block(USAGE) + DONE)
    compare(alike + block(chat("", "stop")) + alike + between + DONE)
    compare(between + alike + DONE)


@pytest.mark.parametrize(
    ("alike", "between"),
    [
        (lambda text: chat(text, "stop"), chat(None, "length")),
        (lambda text: chat(text, usage={"prompt_tokens": 1, "completion_tokens": 1}), USAGE),
        (lambda text: chat(text, timings={"cache_n": 1, "predicted_per_second": 1.0}), USAGE),
    ],
    ids=["a finish reason", "usage", "timings"],
)
def test_what_a_chunk_says_beside_its_text_counts_each_time(alike: Any, between: dict[str, Any]) -> None:
    first = block(alike("a")) + block(alike("b"))
    compare(first + block(between) + block(alike("c")) + DONE)
    compare(first, block(between), first, block(between), block(alike("c")) + DONE)


@pytest.mark.parametrize("put", [b"", b"x", b'"', b"\\", b"\n", b" ", b"1"])
def test_a_byte_that_is_another_one_is_noticed_wherever_it_is(put: bytes) -> None:
    usual = raw_chat(b"ab")
    for at in range(len(usual)):
        spoilt = usual[:at] + put + usual[at + 1 :]
        raw = usual + usual + spoilt + usual + DONE
        for make in (lambda: NativeDecoder(FACTS), lambda: decoders()[1]):
            assert read(make(), [raw], shapes=True) == read(make(), [raw], shapes=False)
