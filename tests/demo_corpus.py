"""The program that writes what the demo model reads, for tests. Its modules are a folder of scripts, not a package."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from pathlib import Path
from random import Random
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "examples" / "demo-model"


@cache
def module(name: str) -> ModuleType:
    """One of its modules. They import each other by their plain names, so they are forgotten again afterwards."""
    ours = {path.stem for path in FOLDER.glob("*.py")}
    before = {each: sys.modules.pop(each) for each in ours if each in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
        for each in ours:
            sys.modules.pop(each, None)
        sys.modules.update(before)


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


@cache
def vocabulary(documents: int = 8000) -> frozenset[str]:
    """Every word that the program says, without those that it makes up: they could be anything."""
    corpus = module("corpus")
    made_up = corpus.talk.made_up

    def marked(rng: Random) -> str:
        made_up(rng)  # for the draws that come after it
        return "Qqqq"

    corpus.talk.made_up = marked
    try:
        said = [
            text
            for number in range(documents)
            for role, text in corpus.document("words for tests", number)
            if role in (corpus.PLAIN, "assistant")
        ]
    finally:
        corpus.talk.made_up = made_up
    return frozenset(word for text in said for word in words(text)) - {"qqqq"}


def known_rate(text: str, asked: str = "") -> float:
    """How many of a text's words are words: the program's, or those that were asked with."""
    said, known = words(text), vocabulary() | set(words(asked))
    return sum(word in known for word in said) / len(said)
