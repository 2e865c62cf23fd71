"""JSON values from a random number generator: arbitrary ones, hostile ones, and those that a JSON Schema describes.

Owns what is worth trying in a field's place, and a writer that also writes what JSON has no room for: keys given twice,
NaN, half surrogate pairs, numbers of any length. Nothing here knows a parser.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

TEXTS = (
    "", " ", "a", "0", "-1", "1e999", "null", "true", "..", "../../etc/passwd", "/", "\\", "a" * 65, "a" * 129,
    "a" * 257, "x" * 5_000, "é", "\u2028", "\ufeff", "\u202e", "\x00", "\x1b[31m", "\r\nX: y", "\n", "'", '"', "{}",
    "[]", "%00", "%2e%2e", "%n%s", "𝕏" * 40, "\ud800", "\udfff\ud800", "ﬀ", "٣", "²", "127.0.0.1", "::1",
    "localhost", "NaN", "demo", "hf:org/repo", "file:/etc/passwd", "0x7f000001", "a:b@c/d.e", "t1 ", "sim", "m",
    "p0", "n0", "default",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 7, 10, 255, 256, 1_000, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**40, 10**401, 0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan,
)  # fmt: skip


_ESCAPED, _QUOTED = json.encoder.encode_basestring_ascii, json.encoder.encode_basestring
_LONE = re.compile("[\ud800-\udfff]")


class Pairs(tuple[Any, ...]):
    """An object as (key, value) pairs: a key may come twice."""

    __slots__ = ()


class Raw(str):
    """JSON text, written as it is."""

    __slots__ = ()


def text(rng: random.Random) -> str:
    pick = rng.random()
    if pick < 0.6:
        return rng.choice(TEXTS)
    if pick < 0.8:
        return rng.choice(TEXTS) + rng.choice(TEXTS)
    return "".join(
        chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x110000)))) for _ in range(rng.randrange(1, 12))
    )


def number(rng: random.Random) -> int | float:
    pick = rng.random()
    if pick < 0.6:
        return rng.choice(NUMBERS)
    return rng.randrange(-5, 100) if pick < 0.8 else rng.uniform(-2, 1e6)


def scalar(rng: random.Random) -> Any:
    pick = rng.randrange(7)
    if pick < 4:
        return text(rng) if pick < 2 else number(rng)
    return (None, True, False)[pick - 4]


def anything(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON value, and now and then what is none."""
    pick = rng.random()
    if depth <= 0 or pick < 0.55:
        return scalar(rng)
    if pick < 0.57:
        return deep(rng)
    if pick < 0.8:
        return [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    return Pairs((text(rng), anything(rng, depth - 1)) for _ in range(rng.randrange(4)))


def deep(rng: random.Random) -> Raw:
    """Nested to about a limit: the strict decoder's, the parser's own, or far beyond."""
    levels = rng.choice((2, 31, 32, 33, 64, 400, rng.randrange(900, 1_000), 5_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"":', "}]")))
    core = rng.choice(("1", "", '"x"', '"[[["', _long(rng)))
    return Raw(opening * levels + core + closing * (levels if rng.random() < 0.7 else rng.randrange(levels)))


def _long(rng: random.Random) -> str:
    """A long piece of something small: what is looked at again and again shows in the time it takes."""
    piece = rng.choice(
        ('"', "\\", '\\"', '"\\', "\\u", "[", "{", "]", ",", ":", " ", "1", "a", '"a",', '"a":1,', "\\ud800", "é")
    )
    return rng.choice(("", '"', "-", "0.", "1e")) + piece * rng.choice((1_000, 20_000)) + rng.choice(("", '"', "]"))


# ---------------------------------------------------------------- from a schema


def from_schema(
    rng: random.Random, schema: Mapping[str, Any], root: Mapping[str, Any], *, wild: float, depth: int = 6
) -> Any:
    """A value as `schema` says, each part replaced by something else with probability `wild`.

    Reads as much of JSON Schema as pydantic writes. `root` is where `$ref` leads into.
    """
    if rng.random() < wild:
        return anything(rng)
    if "$ref" in schema:
        target: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return from_schema(rng, target, root, wild=wild, depth=depth)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "anyOf" in schema:
        return from_schema(rng, rng.choice(schema["anyOf"]), root, wild=wild, depth=depth)
    kind = schema.get("type")
    if kind == "object" and depth > 0:
        return _object(rng, schema, root, wild, depth)
    if kind == "array":
        items = schema.get("items", {})
        lengths = (schema.get("minItems", 0), 1, 2, 3) + (
            (schema.get("maxItems", 4) + 1,) if rng.random() < wild else ()
        )
        count = min(rng.choice(lengths), 300) if depth > 0 else 0
        return [from_schema(rng, items, root, wild=wild, depth=depth - 1) for _ in range(count)]
    if kind == "string":
        return _string(rng, schema)
    if kind in ("integer", "number"):
        return _number(rng, schema, kind == "integer")
    if kind in ("boolean", "null"):
        return None if kind == "null" else rng.random() < 0.5
    return anything(rng, 2)


def _object(rng: random.Random, schema: Mapping[str, Any], root: Mapping[str, Any], wild: float, depth: int) -> Any:
    required, pairs = schema.get("required", ()), []
    keep = rng.random()
    for name, inner in schema.get("properties", {}).items():
        if (name in required and rng.random() >= wild / 2) or rng.random() < keep:
            pairs.append((name, from_schema(rng, inner, root, wild=wild, depth=depth - 1)))
    more = schema.get("additionalProperties")
    if more is not False or rng.random() < wild:
        inner = more if isinstance(more, Mapping) else {}
        if "properties" not in schema or rng.random() < wild:
            pairs += [
                (text(rng), from_schema(rng, inner, root, wild=wild, depth=depth - 1)) for _ in range(rng.randrange(3))
            ]
    if pairs and rng.random() < wild / 4:
        pairs.append(rng.choice(pairs))
    return Pairs(pairs)


def _string(rng: random.Random, schema: Mapping[str, Any]) -> str:
    pattern = schema.get("pattern", "")
    if "[0-9a-f]{8}-" in pattern:
        digits = f"{rng.randrange(16) if rng.random() < 0.7 else rng.getrandbits(128):032x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
    if pattern:
        return rng.choice(("sim", "m", "p0", "fz-a", "fz-b", "a.b_c-d", "demo", "Z" * 63, "org/repo:q4@v1", "x" * 128))
    most = schema.get("maxLength")
    if most is not None and rng.random() < 0.15:
        return "y" * min(most + rng.randrange(2), 20_000)
    return rng.choice((*("sim", "m", "p0", "ready", "ok", "1"), text(rng)))


def _number(rng: random.Random, schema: Mapping[str, Any], whole: bool) -> int | float:
    low, high = schema.get("minimum", 0), schema.get("maximum", 1_000_000)
    pick = rng.random()
    if pick < 0.3:
        return rng.choice((low, high, low - 1, high + 1) if pick < 0.1 else (low, high))
    if whole:
        return rng.randrange(int(low), min(int(high), int(low) + 1_000) + 1)
    return rng.uniform(low, min(high, low + 1_000))


# ---------------------------------------------------------------- writing


def write(value: Any, *, ascii_only: bool = False) -> bytes:
    """JSON, or what looks like it. Half a surrogate pair is an escape, as a client can send it."""
    out: list[str] = []
    _write(value, out, ascii_only)
    return "".join(out).encode("utf-8", "surrogatepass")


def _write(value: Any, out: list[str], ascii_only: bool) -> None:
    if isinstance(value, Raw):
        out.append(str(value))
    elif isinstance(value, str):
        out.append(_ESCAPED(value) if ascii_only or _LONE.search(value) else _QUOTED(value))
    elif isinstance(value, (Pairs, Mapping)):
        pairs: Sequence[tuple[Any, Any]] = value if isinstance(value, Pairs) else tuple(value.items())
        out.append("{")
        for at, (key, inner) in enumerate(pairs):
            out.append(", " if at else "")
            _write(str(key), out, ascii_only)
            out.append(": ")
            _write(inner, out, ascii_only)
        out.append("}")
    elif isinstance(value, (list, tuple)):
        out.append("[")
        for at, inner in enumerate(value):
            out.append("," if at else "")
            _write(inner, out, ascii_only)
        out.append("]")
    else:
        out.append(json.dumps(value))
