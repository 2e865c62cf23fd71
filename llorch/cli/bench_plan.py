"""What `llorch bench` sends, and when: prompts, request bodies, and at which moments an open loop's requests are due.

Everything follows from a seed, so a run can be repeated to the byte. The first words of a prompt are drawn for each
request: no two begin alike, so no cache of prefixes answers them. What follows in a long one is the same in all, as to
draw it would take longer than a token does, in the midst of the answers to others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Short and common, so that a tokenizer has each as one token, or nearly: 128 of them, for 7 bits of a digest.
WORDS = (
    "time", "year", "day", "way", "man", "thing", "life", "hand", "part", "child", "eye", "place", "work", "week",
    "case", "point", "home", "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right",
    "study", "book", "word", "issue", "side", "kind", "head", "house", "friend", "father", "power", "hour", "game",
    "line", "end", "member", "law", "car", "city", "name", "team", "minute", "idea", "kid", "body", "back", "face",
    "level", "office", "door", "health", "art", "war", "party", "result", "morning", "reason", "girl", "guy", "moment",
    "air", "teacher", "force", "foot", "boy", "age", "policy", "music", "sense", "plan", "rate", "view", "market",
    "land", "tree", "fire", "road", "sun", "sea", "light", "snow", "rain", "wind", "stone", "bread", "milk", "salt",
    "wood", "gold", "iron", "glass", "paper", "coat", "shoe", "boat", "train", "bird", "fish", "horse", "dog", "cat",
    "apple", "table", "chair", "bed", "wall", "floor", "window", "garden", "field", "hill", "river", "lake", "island",
    "beach", "cloud", "spring", "summer", "winter", "bridge", "tower",
)  # fmt: skip
OWN_WORDS = 256
WISH = "Tell a very long story with all of these words."
WISH_TOKENS = 11


@dataclass(frozen=True, slots=True)
class Load:
    """One step of a run: so many requests at a time, or so many a second, whatever becomes of those before."""

    concurrency: int | None = None
    rate_per_s: float | None = None

    @property
    def label(self) -> str:
        return f"{self.concurrency}" if self.rate_per_s is None else f"{self.rate_per_s:g}/s"

    @property
    def words(self) -> str:
        return f"{self.concurrency} at a time" if self.rate_per_s is None else f"{self.rate_per_s:g} a second"


@dataclass(frozen=True, slots=True)
class Ask:
    """What every request of a run asks for. `usage`: that the endpoint counts its tokens in the last chunk."""

    model: str
    prompt_tokens: int
    output_tokens: int
    seed: int
    usage: bool = True
    ignore_eos: bool = False

    def body(self, number: int, output_tokens: int | None = None) -> dict[str, Any]:
        """The chat completion with this number. Numbers of one seed give different prompts."""
        wire: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt(self.seed, number, self.prompt_tokens)}],
            "max_tokens": self.output_tokens if output_tokens is None else output_tokens,
            "stream": True,
        }
        if self.usage:
            wire["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            wire["ignore_eos"] = True
        return wire


def prompt(seed: int, number: int, tokens: int) -> str:
    """About `tokens` tokens; what is not drawn is the wish at its end, so that models do not answer in a sentence."""
    drawn = tokens - WISH_TOKENS if tokens > 2 * WISH_TOKENS else tokens
    words = _words(f"prompt {seed} {number}", min(drawn, OWN_WORDS))
    if drawn > OWN_WORDS:
        words += _common(seed, drawn - OWN_WORDS)
    return f"{words}\n{WISH}" if drawn < tokens else words


@lru_cache(maxsize=4)
def _common(seed: int, count: int) -> str:
    return " " + _words(f"common {seed}", count)


def _words(of: str, count: int) -> str:
    return " ".join([WORDS[byte & 127] for byte in hashlib.shake_128(of.encode()).digest(max(1, count))])


def arrivals(seed: int, rate_per_s: float) -> Iterator[float]:
    """Seconds since the start at which requests are due: independent of one another, `rate_per_s` on the average."""
    due_s, number = 0.0, 0
    while True:
        digest = hashlib.shake_128(f"arrival {seed} {number}".encode()).digest(8)
        chance = (int.from_bytes(digest) >> 11) / 2**53  # [0, 1)
        due_s -= math.log1p(-chance) / rate_per_s
        number += 1
        yield due_s


def base_url(url: str) -> str:
    """What stands before `/v1` in a URL that was given with it, without it, or down to the path of chat completions."""
    return url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1").rstrip("/")
