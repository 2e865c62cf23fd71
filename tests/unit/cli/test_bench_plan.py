from __future__ import annotations

from itertools import islice, pairwise

import pytest

from llorch.cli.bench_plan import WISH, WORDS, Ask, Load, arrivals, base_url, prompt


@pytest.mark.parametrize("tokens", [1, 7, 22, 23, 128, 256, 267, 268, 4000])
def test_a_prompt_has_about_as_many_words_as_it_is_to_have_tokens(tokens: int) -> None:
    assert abs(len(prompt(1, 1, tokens).split()) - tokens) <= 1


def test_prompts_differ_from_their_first_words_on_and_are_the_same_for_the_same_seed() -> None:
    for tokens in (64, 1000):
        starts = {" ".join(prompt(3, number, tokens).split()[:8]) for number in range(2000)}
        assert len(starts) == 2000
    assert prompt(3, 5, 64) == prompt(3, 5, 64) != prompt(4, 5, 64)
    assert prompt(3, 5, 64).endswith(WISH)


def test_every_word_can_be_drawn_and_is_there_once() -> None:
    assert len(WORDS) == len(set(WORDS)) == 128


def test_arrivals_come_at_the_rate_that_was_asked_for_and_not_in_step() -> None:
    moments = list(islice(arrivals(1, 50.0), 20_000))
    gaps = [after - before for before, after in pairwise([0.0, *moments])]
    assert moments[-1] == pytest.approx(400, rel=0.03)
    assert min(gaps) >= 0
    # Exponential: the deviation is the mean, and 1 - 1/e of the gaps are shorter than it.
    assert sum(gap < 0.02 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.02)
    assert moments[:5] == list(islice(arrivals(1, 50.0), 5)) != list(islice(arrivals(2, 50.0), 5))


def test_a_body_has_no_field_that_a_strict_endpoint_may_refuse_unless_it_is_asked_for() -> None:
    body = Ask("m", 8, 64, seed=1, usage=False).body(0)
    assert set(body) == {"model", "messages", "max_tokens", "stream"}
    assert (body["model"], body["max_tokens"], body["stream"]) == ("m", 64, True)
    assert Ask("m", 8, 64, seed=1).body(0)["stream_options"] == {"include_usage": True}
    assert Ask("m", 8, 64, seed=1, ignore_eos=True).body(0, 4) | {"messages": []} == {
        "model": "m", "messages": [], "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"]
)
def test_an_endpoint_is_named_with_or_without_v1(url: str) -> None:
    assert base_url(url) == "http://h:1"
    assert base_url(url.replace("h:1", "h:1/team")) == "http://h:1/team"


def test_loads_are_named_by_what_they_are() -> None:
    assert (Load(concurrency=8).label, Load(rate_per_s=0.5).label) == ("8", "0.5/s")
