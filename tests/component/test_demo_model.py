"""What the demo model writes can be read: measured over samples by real llama.cpp, as anybody would draw them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from tests.component.llama_process import Server, serving
from tests.demo_corpus import known_rate, module, vocabulary, words

pytest.importorskip("xllamacpp")
pytestmark = [pytest.mark.llama, pytest.mark.timeout(180)]

TEMPERATURE = 0.8
MAX_TOKENS = 400
OPENINGS = (
    "Once upon a time", "One day", "The little fox", "It was a dark night and", "There was once a king who",
    "Anna was afraid of", "Long ago", "The robot", "In the forest", "Tell me a story about a dragon",
)  # fmt: skip
QUESTIONS = (
    "Tell me a story about a fox and a bell", "Why is the sky blue?", "Hello! Who are you?",
    "Write a poem about the moon", "What does a rabbit eat?", "Tell me a joke",
    "I am sad", "What is the capital of Italy?", "How do you make bread?",
    "Tell me a story about a girl called Mia",
)  # fmt: skip
SEEDS = range(10)


@dataclass(frozen=True)
class Sample:
    asked: str
    text: str
    ended: bool  # by itself, not at MAX_TOKENS


def runs_of_four(text: str) -> list[tuple[str, ...]]:
    said = text.lower().split()
    return [tuple(said[at : at + 4]) for at in range(len(said) - 3)]


def loops(text: str) -> bool:
    """Whether a run of four words comes twice more within 24 words, or for a fourth time.

    Once more is no loop: a kind boy called Karl may meet a kind boy called Finn.
    """
    runs = runs_of_four(text)
    soon = any(runs[at + 1 : at + 25].count(run) > 1 for at, run in enumerate(runs))
    return soon or max(Counter(runs).values(), default=0) > 3


async def drawn(server: Server) -> list[Sample]:
    at_once = asyncio.Semaphore(4)

    async def one(session: aiohttp.ClientSession, path: str, asked: str, seed: int) -> Sample:
        chat = path.endswith("chat/completions")
        about = {"messages": [{"role": "user", "content": asked}]} if chat else {"prompt": asked}
        async with at_once:
            status, text = await server.post(
                session, path, {**about, "seed": seed, "temperature": TEMPERATURE, "max_tokens": MAX_TOKENS}
            )
        assert status == 200, text
        choice = json.loads(text)["choices"][0]
        said = choice["message"]["content"] if chat else choice["text"]
        return Sample(asked, said, choice["finish_reason"] == "stop")

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        samples = [
            group.create_task(one(session, path, asked, seed))
            for path, asks in (("/v1/completions", OPENINGS), ("/v1/chat/completions", QUESTIONS))
            for asked in asks
            for seed in SEEDS
        ]
    return [sample.result() for sample in samples]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("llama")) as running:
        yield running


@pytest.fixture(scope="module")
def samples(server: Server) -> list[Sample]:
    return asyncio.run(drawn(server))


@pytest.fixture(scope="module")
def trained() -> Any:
    """The vocabulary as it is made for the training."""
    pytest.importorskip("sentencepiece")
    return module("tokens").trained()


async def test_llama_cpp_reads_a_text_as_it_was_read_in_training(server: Server, trained: Any) -> None:
    corpus = module("corpus")
    texts = [text for number in range(40) for _, text in corpus.document("for tests", number)]
    texts += ["", "  two  blanks ", "a\nb\n", "Ünïcödé 漢字 🦙", "<|user|>", "1234567890", '{"a": [1.5e-3]}']
    async with aiohttp.ClientSession() as session:
        for text in texts:
            _, answer = await server.post(session, "/tokenize", {"content": text, "parse_special": False})
            assert json.loads(answer)["tokens"] == trained.encode(text), text


async def test_a_conversation_becomes_what_was_read_in_training(server: Server, trained: Any) -> None:
    tokens = module("tokens")
    talk = [("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hi!"), ("user", "Why is the sky blue?")]
    async with aiohttp.ClientSession() as session:
        messages = {"messages": [{"role": role, "content": text} for role, text in talk]}
        _, answer = await server.post(session, "/apply-template", messages)
        prompt = json.loads(answer)["prompt"]
        _, answer = await server.post(session, "/tokenize", {"content": prompt, "add_special": True})
    read, _ = tokens.encoded(talk, trained)
    assert json.loads(answer)["tokens"] == [*read, tokens.ROLES["assistant"]]


def test_there_are_two_hundred_and_they_differ(samples: list[Sample]) -> None:
    assert len(samples) == 200
    stories = [sample.text for sample in samples if sample.asked in OPENINGS]
    assert len(set(stories)) > 0.95 * len(stories)


def test_its_words_are_words(samples: list[Sample]) -> None:
    said = [(word, words(sample.asked)) for sample in samples for word in words(sample.text)]
    unknown = Counter(word for word, asked in said if word not in vocabulary() and word not in asked)
    assert len(said) > 5_000
    assert 1 - unknown.total() / len(said) >= 0.98, unknown.most_common(20)
    assert not [sample for sample in samples if "\ufffd" in sample.text]


def test_fragments_are_no_words() -> None:
    assert known_rate("The fox and the owl sat by the river.") == 1
    assert known_rate("The fo re la po da tor the bro and sa ho ken tra.") < 0.5


def test_it_stops_by_itself_at_the_end_of_a_sentence(samples: list[Sample]) -> None:
    odd = [sample for sample in samples if not (sample.ended and sample.text.strip()[-1:] in (".", "!", "?", '"'))]
    assert len(odd) <= 0.02 * len(samples), odd


def test_it_does_not_go_round_in_circles(samples: list[Sample]) -> None:
    assert [sample for sample in samples if loops(sample.text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "the the the the the the fox.",
        "1, 2, 1, 2, 1, 2, 1, 2, 1, 2.",
        "The fox saw the old owl. The fox saw the old owl. The fox saw the old owl.",
    ],
)
def test_a_loop_is_seen(text: str) -> None:
    assert loops(text)


def test_an_answer_is_about_what_was_asked(samples: list[Sample]) -> None:
    about = {
        "Tell me a story about a fox and a bell": "fox",
        "Tell me a story about a girl called Mia": "Mia",
        "Why is the sky blue?": "light",
        "Write a poem about the moon": "moon",
        "What does a rabbit eat?": "carrots",
        "What is the capital of Italy?": "Rome",
        "How do you make bread?": "flour",
        "Tell me a story about a dragon": "dragon",
    }
    asked = [sample for sample in samples if sample.asked in about]
    missed = [sample for sample in asked if about[sample.asked] not in sample.text]
    assert len(missed) <= 0.1 * len(asked), missed
