"""Templates: `(one|another)` is a choice, `{name}` a slot. Every choice is made by the generator that is handed in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random

_CHOICE = re.compile(r"\(([^()]*)\)")
# "a" before a vowel that is heard.
_ARTICLE = re.compile(r"\b([Aa]) (?=(?:o(?!ne\b|nce\b)|u(?!ni|se)|[aei])\w)")


def filled(template: str, slots: Mapping[str, str], rng: Random) -> str:
    """The template with its choices made and its slots filled; articles and spaces put right."""
    while _CHOICE.search(template):
        template = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), template)
    return tidy(template.format_map(slots))


def tidy(text: str) -> str:
    text = re.sub(r" {2,}", " ", text)
    text = re.sub(r" ([.,!?;])", r"\1", text)
    return _ARTICLE.sub(r"\1n ", text).strip()


def upper(text: str) -> str:
    """The first letter as at the start of a sentence."""
    for at, char in enumerate(text):
        if char.isalpha():
            return text[:at] + char.upper() + text[at + 1 :]
    return text


def one_of(listed: str, rng: Random) -> str:
    """One entry of a comma separated list."""
    return rng.choice([entry.strip() for entry in listed.split(",")])
