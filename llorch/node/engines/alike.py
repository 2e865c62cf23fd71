"""Chunks of a stream that are alike: all but the text in them is the same, byte for byte, from one to the next.

What such a chunk means is known from the one that was parsed before: one more piece of text, and nothing else. So a
token costs a comparison in place of a JSON parser. Owns how that is recognised, so strictly that no other chunk can
pass for one. Pure.
"""

from __future__ import annotations

import json
import re

_KEYS = (b'"content"', b'"text"', b'"reasoning_content"', b'"reasoning"')
_STRING = re.compile(rb':[ ]?"((?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})++)"')
_NOTHING = re.compile(rb':[ ]?(?:null|"")')
_WHOLE = re.compile(rb'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})++')
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]++')
_ESCAPED = re.compile(rb'\\["u]')  # a key may be hidden by it, or made up
_UNUSUAL = re.compile(rb"[\x00-\x09\x0b-\x1f]")


class Shape:
    """What comes before and after the text."""

    __slots__ = ("_after", "_before", "_joint")

    def __init__(self, before: bytes, after: bytes) -> None:
        self._before, self._after, self._joint = before, after, after + before

    def run(self, data: bytes, at: int) -> tuple[list[bytes], int]:
        """The texts of the chunks of this shape that follow one another from `at` on, and where the last one ends.

        Each text is the inside of a JSON string, and none is empty. One with a quote in it ends the run.
        """
        before, joint = self._before, self._joint
        if not data.startswith(before, at):
            return [], at
        begin = at + len(before)
        stop = data.find(b'"', begin)
        if stop + len(self._after) == len(data) and data.endswith(self._after):  # one chunk, as tokens mostly come
            text = data[begin:stop]
            return ([text], len(data)) if _WHOLE.fullmatch(text) else ([], at)
        texts: list[bytes] = []
        while data.startswith(joint, stop):
            texts.append(data[begin:stop])
            begin = stop + len(joint)
            stop = data.find(b'"', begin)
        if stop > 0 and data.startswith(self._after, stop):
            texts.append(data[begin:stop])
        if b"" in texts or _PLAIN.fullmatch(b"".join(texts)) is None:
            good = 0
            while good < len(texts) and _WHOLE.fullmatch(texts[good]):
                good += 1
            del texts[good:]
        return texts, at + len(texts) * len(joint) + sum(map(len, texts))


def shape_of(block: bytes, text: str) -> Shape | None:
    """What chunks that are like `block` have in common, which was parsed and says `text`, nothing else; None if that
    can't be told for certain."""
    if not (block.startswith(b"data: ") and block.endswith(b"}\n\n")) or _UNUSUAL.search(block):
        return None
    found: tuple[int, int] | None = None
    for key in _KEYS:
        at = block.find(key)
        if at < 0:
            continue
        if block.find(key, at + 1) >= 0:
            return None
        string = _STRING.match(block, at + len(key))
        if string is None:
            if _NOTHING.match(block, at + len(key)) is None:
                return None
            continue
        if found is not None or json.loads(b'"%b"' % string[1].decode("utf-8", "replace").encode()) != text:
            return None
        found = string.span(1)
    if found is None:
        return None
    before, after = block[: found[0]], block[found[1] :]
    return None if _ESCAPED.search(before) or _ESCAPED.search(after) else Shape(before, after)
