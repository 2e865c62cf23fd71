"""The program that writes what the demo model reads, for tests. Its modules are a folder of scripts, not a package."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from pathlib import Path
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
def vocabulary(documents: int = 3000) -> frozenset[str]:
    """Every word that the program says. Not those that it lets people ask with: many of them are made up."""
    corpus = module("corpus")
    said = (
        text
        for number in range(documents)
        for role, text in corpus.document("words for tests", number)
        if role in (corpus.PLAIN, "assistant")
    )
    return frozenset(word for text in said for word in words(text))
