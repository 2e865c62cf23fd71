"""What the demo model reads: grammatical by construction, never the same, and nothing unfilled."""

from __future__ import annotations

import re

import pytest

from llorch import demo
from tests.demo_corpus import FOLDER, module, vocabulary

corpus = module("corpus")
DOCUMENTS = [corpus.document("for tests", number) for number in range(2000)]
LEARNT = [text for document in DOCUMENTS for role, text in document if role in (corpus.PLAIN, "assistant")]
STORIES = [text for text in LEARNT if len(text) > 250]


def test_the_same_seed_and_number_make_the_same_document() -> None:
    assert [corpus.document("for tests", number) for number in range(50)] == DOCUMENTS[:50]
    assert corpus.document("another seed", 0) != DOCUMENTS[0]


@pytest.mark.parametrize(
    "fault",
    [
        r"[{}|@()\[\]]",  # a choice that was not made, a slot that was not filled
        r"\b[Aa] [aeio]\w",  # an article
        r"\b[Aa]n [^aeiouAEIOUhx\W]",
        r"  |\s[.,!?]",
        r"[.,]{2}|[.?!],",
        r"\b(\w+) \1\b",
        r"[.!?] (?!llorch)[a-z]",
        r"\bNone\b",
    ],
)
def test_nothing_that_is_learnt_has(fault: str) -> None:
    found = [text for text in LEARNT if re.search(fault, text.replace("watering can can", ""))]
    assert found == [], f"{len(found)} of {len(LEARNT)}"


def test_every_answer_ends_as_a_sentence_does() -> None:
    assert [text for text in LEARNT if text[-1] not in '.!?"'] == []


def test_stories_are_many_and_not_the_same_one() -> None:
    assert len(STORIES) > 200
    assert len(set(STORIES)) == len(STORIES)
    starts = {" ".join(text.split()[:6]) for text in STORIES}
    assert len(starts) > len(STORIES) / 2
    assert len({plot.about for plot in module("stories").PLOTS}) > 20


def test_quotes_are_closed_in_all_that_begin_at_their_beginning() -> None:
    whole = [text for text in LEARNT if text.startswith(("Once upon", "One ", "Long ago", "It was a ", "In the "))]
    assert len(whole) > 200
    assert [text for text in whole if text.count('"') % 2] == []


def test_the_vocabulary_is_made_again_as_the_model_has_it() -> None:
    pytest.importorskip("sentencepiece")
    gguf = pytest.importorskip("gguf")
    made = module("tokens").trained()
    field = gguf.GGUFReader(demo.model_path()).fields["tokenizer.ggml.tokens"]
    in_the_box = [bytes(field.parts[at]).decode() for at in field.data]
    assert [made.id_to_piece(number) for number in range(made.get_piece_size())] == in_the_box
    assert module("tokens").digest(made) in (FOLDER / "training.log").read_text()


def test_most_conversations_answer_and_some_have_a_system_message() -> None:
    talks = [document for document in DOCUMENTS if document[0][0] in ("system", "user")]
    assert all(document[-1][0] == "assistant" for document in talks)
    assert 0.1 < sum(document[0][0] == "system" for document in talks) / len(talks) < 0.6
    assert sum(len(document) > 4 for document in talks) > len(talks) / 20


def test_it_has_the_words_of_a_small_world() -> None:
    assert 1200 < len(vocabulary()) < 4000


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a animal", "an animal"), ("A owl", "An owl"), ("a onion", "an onion"), ("a umbrella", "an umbrella"),
        ("a unicorn", "a unicorn"), ("a one-eyed cat", "a one-eyed cat"), ("a fox  sat .", "a fox sat."),
    ],
)  # fmt: skip
def test_articles_and_spaces_are_put_right(written: str, read: str) -> None:
    assert module("wording").tidy(written) == read
