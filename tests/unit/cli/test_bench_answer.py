from __future__ import annotations

import json
from typing import Any

import pytest

from llorch.cli.bench_answer import CUT, NOT_A_STREAM, SILENT, TIMEOUT, Exchange, Sample, message_of, read_answer


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]} | more).encode() + b"\n\n"


ROLE = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}\n\n'
DONE = b"data: [DONE]\n\n"


def answer(
    *reads: tuple[float, bytes],
    status: int = 200,
    fault: str | None = None,
    kind: str = "text/event-stream; charset=utf-8",
) -> Sample:
    seen = Exchange(1.0, 1.5, reads[-1][0] if reads else 2.0, status, kind, fault)
    for at_s, part in reads:
        seen.times.append(at_s)
        seen.parts.append(part)
    return read_answer(seen)


def test_each_token_has_the_time_of_the_read_that_completed_it() -> None:
    whole = chunk("b")
    sample = answer(
        (2.0, ROLE),
        (3.0, chunk("a") + whole[:9]),
        (4.0, whole[9:]),
        (5.0, chunk("c") + chunk("d")),
        (6.0, chunk(finish="length") + DONE),
    )
    assert sample == Sample(1.0, 1.5, 6.0, (3.0, 4.0, 5.0, 5.0), tokens=4)


def test_usage_counts_if_the_endpoint_gives_it_in_a_chunk_without_choices() -> None:
    sample = answer((2.0, chunk("a") + chunk("b", "stop") + USAGE + DONE))
    assert (sample.tokens, sample.prompt_tokens, sample.counted, len(sample.token_s)) == (5, 9, True, 2)


@pytest.mark.parametrize("bad", [None, "5", -1, True, 1.5])
def test_a_usage_that_is_no_count_is_passed_over(bad: object) -> None:
    sample = answer((2.0, chunk("a", "stop", usage={"completion_tokens": bad}) + DONE))
    assert (sample.tokens, sample.counted, sample.error) == (1, False, None)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "tool_calls"])
def test_what_a_model_thinks_and_calls_is_output(field: str) -> None:
    part = b"data: " + json.dumps({"choices": [{"delta": {field: ["x"]}}]}).encode() + b"\n\n"
    assert len(answer((2.0, part + DONE)).token_s) == 1


@pytest.mark.parametrize(
    ("reads", "more", "error"),
    [
        ([(2.0, chunk("a"))], {}, CUT),
        ([(2.0, chunk("a") + DONE[:7])], {"fault": CUT}, CUT),
        ([(2.0, chunk("a"))], {"fault": TIMEOUT}, TIMEOUT),
        ([], {"status": 0, "fault": TIMEOUT}, TIMEOUT),
        ([(2.0, ROLE + chunk(finish="stop") + DONE)], {}, SILENT),
        ([(2.0, b'{"choices": []}')], {"kind": "application/json"}, NOT_A_STREAM),
        ([(2.0, b"data: {no\n\n" + DONE)], {}, NOT_A_STREAM),
        ([(2.0, b"data: " + b"[" * 100_000 + b"\n\n" + DONE)], {}, NOT_A_STREAM),
        ([(2.0, chunk("a") + b'data: {"error": {"code": "ENGINE_FAILED"}}\n\n')], {}, "in the stream: ENGINE_FAILED"),
        ([(2.0, b'{"error": {"code": "RATE_LIMITED"}}')], {"status": 429}, "HTTP 429 RATE_LIMITED"),
        ([(2.0, b'{"error": {"code": 503, "type": "loading"}}')], {"status": 503}, "HTTP 503 loading"),
        ([(2.0, b"<html>")], {"status": 502}, "HTTP 502"),
        ([(2.0, b"[" * 100_000)], {"status": 500}, "HTTP 500"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_whole_is_an_error_of_its_kind(
    reads: list[tuple[float, bytes]], more: dict[str, Any], error: str
) -> None:
    assert answer(*reads, **more).error == error


def test_an_answer_is_whole_with_its_last_reason_or_its_last_word() -> None:
    assert answer((2.0, chunk("a", "stop"))).error is None
    assert answer((2.0, chunk("a") + DONE)).error is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "no"}}', "no"), (b'{"error": "no"}', "no"), (b'{"detail": "no"}', "no"),
        (b'{"message": "no"}', "no"), (b'{"detail": [1]}', None), (b"no", None), (b"[1]", None),
    ],
)  # fmt: skip
def test_what_a_refusal_says_is_found_in_the_shapes_that_there_are(body: bytes, said: str | None) -> None:
    assert message_of(body) == said
