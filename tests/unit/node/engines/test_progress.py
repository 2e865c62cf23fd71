"""Counters out of what engines show: their names as they write them, and whatever else may come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.node.engines import progress, simulated_answers
from llorch.node.engines.progress import Progress, read

LLAMA_CPP = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 12
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 34
llamacpp:n_decode_total 5
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
llamacpp:requests_deferred 1
"""
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a} 9 b\\"{x"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.2e+03
vllm:prompt_tokens_total{engine="1",model_name="m"} 1.0 1395066363000
vllm:prompt_tokens_created{engine="1",model_name="m"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="m"} 40.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 99.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 7.0
"""
SGLANG = """\
sglang:realtime_tokens_total{mode="decode",model_name="m",tp_rank="0"} 30.0
sglang:realtime_tokens_total{mode="prefill_compute",model_name="m",tp_rank="0"} 12.0
sglang:num_running_reqs{model_name="m"} 2.0
sglang:token_usage{model_name="m"} 0.28
"""


@pytest.mark.parametrize(
    ("engine", "text", "expected"),
    [
        ("llama-server", LLAMA_CPP, Progress((5, 34, 12), 2)),
        ("vllm", VLLM, Progress((7, 40, 1201), 3, 0.5)),
        ("sglang", SGLANG, Progress((42, 0, 0), 2, 0.28)),
    ],
)
def test_each_engines_words_are_read_also_where_nobody_said_whose_they_are(
    engine: str, text: str, expected: Progress
) -> None:
    assert read(engine, text) == read("external", text) == read("command", text) == expected
    assert read("vllm" if engine != "vllm" else "sglang", text) is None


def test_the_simulated_engine_counts_in_llama_cpps_words() -> None:
    assert read("simulated", simulated_answers.metrics(2, 1, 12, 34)) == Progress((34, 34, 12), 2)


def test_a_gauge_had_another_name_once() -> None:
    renamed = VLLM.replace("kv_cache_usage_perc", "gpu_cache_usage_perc")
    assert read("vllm", renamed) == read("vllm", VLLM)


def test_a_gauge_that_is_written_now_and_then_says_nothing_with_zero() -> None:
    idle = read("sglang", SGLANG.replace('reqs{model_name="m"} 2.0', 'reqs{model_name="m"} 0.0'))
    assert idle is not None and idle.busy is None
    of_vllm = read("vllm", VLLM.replace("} 3.0", "} 0.0"))
    assert of_vllm is not None and of_vllm.busy == 0


@pytest.mark.parametrize(
    "line",
    [
        "vllm:generation_tokens_total", "vllm:generation_tokens_total{", "vllm:generation_tokens_total} 1",
        "vllm:generation_tokens_total{}", "vllm:generation_tokens_total NaN", "vllm:generation_tokens_total +Inf",
        "vllm:generation_tokens_total -1", "vllm:generation_tokens_total 1_0", "vllm:generation_tokens_total 1e999",
        "vllm:generation_tokens_total 1 2 3", "vllm:generation_tokens_total 0x10", "#vllm:generation_tokens_total 1",
        "vllm:generation_tokens_total_created 1", "xvllm:generation_tokens_total 1", "vllm:generation_tokens_total ١",
        "vllm:num_requests_running 1", "", " ", "{} 1", "vllm:generation_tokens_total " + "9" * 10_000,
    ],
)  # fmt: skip
def test_what_is_no_counter_is_passed_over(line: str) -> None:
    assert read("vllm", f"{line}\n") is None
    assert read("vllm", f"{line}\r\n{VLLM}") == read("vllm", VLLM) or "num_requests" in line


def test_sums_stay_numbers_and_long_pages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = (
        "vllm:generation_tokens_total 1.7e308\n" * 3 + "vllm:num_requests_running 1e300\nvllm:kv_cache_usage_perc 7\n"
    )
    found = read("vllm", huge)
    assert found is not None and found.counters[1] < float("inf") and (found.busy, found.kv_usage) == (None, None)
    monkeypatch.setattr(progress, "MAX_TEXT_CHARS", 100)
    assert read("vllm", VLLM) is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["vllm:generation_tokens_total", "sglang:token_usage", "llamacpp:n_decode_total", "x"]),
            st.sampled_from(["", "{}", '{a="}"}', "{", "}", " "]),
            st.one_of(st.text(max_size=8), st.floats().map(str), st.integers().map(str)),
        ).map(lambda parts: f"{parts[0]}{parts[1]} {parts[2]}"),
        max_size=8,
    ).map("\n".join),
    st.sampled_from(["vllm", "sglang", "llamacpp", "external", ""]),
)
def test_whatever_comes_becomes_finite_numbers_or_nothing(text: str, engine: str) -> None:
    found = read(engine, text)
    if found is not None:
        assert len(found.counters) == 3 and all(0 <= count < float("inf") for count in found.counters)
        assert found.kv_usage is None or 0 <= found.kv_usage <= 1
