"""The documents that the model reads: stories as they are, conversations, questions with their answers in plain text.

Every document depends on its seed and its number alone.
"""

from __future__ import annotations

from random import Random

import talk
from cast import Scene
from stories import told

SEED = "llorch demo model 2"
PLAIN, GIVEN = "", "given"
# (role, text): what somebody says in a conversation, plain text, or text that is given and then gone on with.
Document = list[tuple[str, str]]


def document(seed: str, number: int) -> Document:
    """Short answers are most of the documents and a third of the text: each fact has to be read often."""
    rng = Random(f"{seed}/{number}")
    draw = rng.random()
    if draw < 0.09:
        return [(PLAIN, _story(rng))]
    if draw < 0.20:
        return list(talk.conversation(rng))
    if draw < 0.48:
        return list(talk.one_answer(rng))
    question, answer = talk.exchange(rng) if draw < 0.87 else talk.story(rng)[0]
    if rng.random() < 0.4:
        return [(GIVEN, question), (PLAIN, f" {answer}")]
    return [("user", question), ("assistant", answer)]


def _story(rng: Random) -> str:
    """Most from the start; some from the middle, for a prompt may be any part of one."""
    hero = talk.wanted_hero(rng, made_up_too=False) if rng.random() < 0.1 else None
    text = told(Scene.drawn(rng, hero), short=rng.random() < 0.25)
    if rng.random() < 0.12:
        words = text.split(" ")
        text = " ".join(words[rng.randrange(len(words) * 2 // 3) :])
    return text
