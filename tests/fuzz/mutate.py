"""Inputs from inputs: bytes flipped and cut, pieces repeated, words put in, and JSON changed where it is JSON.

Owns the mutations; which input they start from and whether it is kept is the caller's. The same random number generator
gives the same input.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from tests.fuzz.values import NUMBERS, TEXTS, Pairs, anything, deep, from_schema, scalar, write
from tests.fuzz.watch import Shape, Target

_NUMBERS = (*(str(number).encode() for number in NUMBERS), b"9" * 5_000, b"1e9999", b"-", b"0x10")
_TEXTS = tuple(text.encode("utf-8", "replace") for text in TEXTS)
_PIECES = (
    b'"',
    b"\\",
    b'\\"',
    b"\n",
    b"\r",
    b"\r\n",
    b"\r\r",
    b"\n\n",
    b"[",
    b"{",
    b"]",
    b"}",
    b",",
    b":",
    b"=",
    b" ",
    b"\0",
    b"\xff",
)
LARGEST_JSON_BYTES = 4_000  # a larger one is changed as bytes: to read and write it takes longer than what is tested
_INTERESTING = (0, 1, 0x0A, 0x0D, 0x20, 0x22, 0x5C, 0x7F, 0x80, 0xC0, 0xED, 0xFE, 0xFF)


class Mutator:
    """Inputs for one target."""

    def __init__(self, target: Target, rng: random.Random) -> None:
        self._rng = rng
        self._target = target
        self._words = (*target.words, *_PIECES)
        self._schemas = [(model.model_json_schema(), index) for index, model in enumerate(target.schemas)]

    def next(self, corpus: Sequence[bytes]) -> bytes:
        """One input, made from one or two of `corpus`, or from a schema."""
        rng = self._rng
        if self._schemas and rng.random() < 0.25:
            schema, _ = rng.choice(self._schemas)
            data = write(from_schema(rng, schema, schema, wild=rng.choice((0.0, 0.02, 0.1, 0.3))))
            if self._target.shape is Shape.LINES:
                lines = rng.choice(corpus).split(b"\n")
                lines[rng.randrange(len(lines))] = data
                data = b"\n".join(lines)
        else:
            data = rng.choice(corpus)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 5)) if data else 1):
            data = self._one(data, corpus)
        return data[: self._target.largest]

    def _one(self, data: bytes, corpus: Sequence[bytes]) -> bytes:
        rng = self._rng
        if self._target.shape is not Shape.BINARY and len(data) <= LARGEST_JSON_BYTES and rng.random() < 0.5:
            if self._target.shape is Shape.LINES and rng.random() < 0.8:
                lines = data.split(b"\n")
                at = rng.randrange(len(lines))
                lines[at] = changed_json(rng, lines[at])
                return b"\n".join(lines)
            return changed_json(rng, data)
        change = rng.choice(_CHANGES)
        return change(rng, data, self._words, corpus)


# ---------------------------------------------------------------- bytes


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 1, 2, 4, 8, rng.randrange(1, len(data) + 2))))


def _flip(rng: random.Random, data: bytes, _words: Sequence[bytes], _corpus: Sequence[bytes]) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    byte = data[at] ^ (1 << rng.randrange(8)) if rng.random() < 0.5 else rng.choice(_INTERESTING)
    return data[:at] + bytes([byte]) + data[at + 1 :]


def _cut(rng: random.Random, data: bytes, _words: Sequence[bytes], _corpus: Sequence[bytes]) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:] if rng.random() < 0.7 else data[:start]


def _insert(rng: random.Random, data: bytes, words: Sequence[bytes], _corpus: Sequence[bytes]) -> bytes:
    start, end = _span(rng, data)
    word = rng.choice((rng.choice(words), rng.choice(words), rng.choice(_TEXTS), rng.choice(_NUMBERS)))
    return data[:start] + word + data[end if rng.random() < 0.4 else start :]


def _repeat(rng: random.Random, data: bytes, words: Sequence[bytes], _corpus: Sequence[bytes]) -> bytes:
    """What costs more than its length shows when there is much of it."""
    start, end = _span(rng, data)
    piece = data[start : min(end, start + 64)] if rng.random() < 0.5 else rng.choice(words)
    times = rng.choice((2, 3, 10, 100)) if rng.random() < 0.99 else rng.choice((5_000, 60_000))
    return data[:start] + piece * times + data[start:]


def _splice(rng: random.Random, data: bytes, _words: Sequence[bytes], corpus: Sequence[bytes]) -> bytes:
    other = rng.choice(corpus)
    start, end = _span(rng, other)
    return data[: rng.randrange(len(data) + 1)] + (other[start:end] if rng.random() < 0.5 else other[start:])


def _count(rng: random.Random, data: bytes, _words: Sequence[bytes], _corpus: Sequence[bytes]) -> bytes:
    """Two, four or eight bytes, as a length or a count is written."""
    size = rng.choice((2, 4, 8))
    if len(data) < size:
        return data + bytes(size)
    at = rng.randrange(len(data) - size + 1)
    number = rng.choice(
        (0, 1, 2, 0x7F, 0xFF, 0xFFFF, len(data), len(data) + 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 65_527)
    )
    order: Any = rng.choice(("big", "little"))
    return data[:at] + (number & (1 << 8 * size) - 1).to_bytes(size, order) + data[at + size :]


def _digits(rng: random.Random, data: bytes, words: Sequence[bytes], corpus: Sequence[bytes]) -> bytes:
    """A run of digits becomes another number."""
    at = next((at for at in range(rng.randrange(len(data) + 1), len(data)) if 48 <= data[at] < 58), None)
    if at is None:
        return _insert(rng, data, words, corpus)
    end = at
    while end < len(data) and 48 <= data[end] < 58:
        end += 1
    return data[:at] + rng.choice(_NUMBERS) + data[end:]


_CHANGES: tuple[Callable[[random.Random, bytes, Sequence[bytes], Sequence[bytes]], bytes], ...] = (
    _flip, _flip, _cut, _insert, _insert, _repeat, _splice, _count, _digits,
)  # fmt: skip


# ---------------------------------------------------------------- JSON


def _pairs(pairs: list[tuple[str, Any]]) -> Pairs:
    return Pairs(pairs)


_READER = json.JSONDecoder(object_pairs_hook=_pairs)


def changed_json(rng: random.Random, data: bytes) -> bytes:
    """One place of a JSON text changed; text that is none stays, with something around it."""
    try:
        value = _READER.decode(data.decode("utf-8", "surrogatepass"))
        return write(_changed(rng, value, rng.randrange(6)), ascii_only=rng.random() < 0.1)
    except (ValueError, RecursionError):
        return rng.choice((b"[%s]", b'{"a": %s}', b"%s%s")).replace(b"%s", data)


def _changed(rng: random.Random, value: Any, depth: int) -> Any:
    """`value` with a part of it changed, at most `depth` below its top."""
    if isinstance(value, Pairs) and value:
        return _changed_object(rng, value, depth)
    if isinstance(value, list) and value:
        return _changed_list(rng, value, depth)
    pick = rng.randrange(8)
    if pick < 5:
        return scalar(rng) if pick < 3 else anything(rng)
    return [value] if pick == 5 else Pairs((("a", value),)) if pick == 6 else deep(rng)


def _changed_object(rng: random.Random, value: Pairs, depth: int) -> Pairs:
    at = rng.randrange(len(value))
    key, inner = value[at]
    before, after = value[:at], value[at + 1 :]
    if depth > 0 and rng.random() < 0.8:
        return Pairs((*before, (key, _changed(rng, inner, depth - 1)), *after))
    pick = rng.randrange(5)
    if pick == 0:
        return Pairs((*before, *after))
    if pick == 1:
        return Pairs((*value, (key, anything(rng, 2))))
    if pick == 2:
        return Pairs((*before, (str(scalar(rng)), inner), *after))
    if pick == 3:
        return Pairs((*before, (key, anything(rng)), *after))
    return Pairs((*value, (str(scalar(rng)), anything(rng, 2))))


def _changed_list(rng: random.Random, value: list[Any], depth: int) -> list[Any]:
    at = rng.randrange(len(value))
    before, after = value[:at], value[at + 1 :]
    if depth > 0 and rng.random() < 0.7:
        return [*before, _changed(rng, value[at], depth - 1), *after]
    pick = rng.randrange(4)
    if pick == 0:
        return before + after
    if pick == 1:
        return [*value, anything(rng)]
    return value * (3 if pick == 2 else 200)
