"""Text that others wrote, made fit for a terminal. Light to import: every message passes through here.

Surface:
    plain(text)      what a model or a log says: lines and tabs stay
    unbroken(text)   what stands inside a line: no line break either, however Unicode writes one
    one_line(text)   the same, with single blanks between its words

Control characters and the marks that turn text around are taken out of all three. A name also loses what can't be seen,
so that two that look alike are alike; text keeps it, for joiners are part of emoji and of several scripts.
"""

from __future__ import annotations

# C0 but tab and newline, DEL, and C1: what can move a cursor, ring, or start an escape sequence.
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
# Embeddings, overrides and isolates: what follows them is shown in another order than it is read in. The marks that
# only say the direction of their own place (U+200E, U+200F, U+061C) are ordinary text in Arabic and Hebrew.
_TURNING = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x2070)))
_BREAKS = dict.fromkeys((0x09, 0x0A, 0x2028, 0x2029), " ")
_UNSEEN = dict.fromkeys(
    (0xAD, 0x34F, 0x61C, 0x180E, *range(0x200B, 0x2010), *range(0x2060, 0x2065), 0xFEFF, *range(0xFFF9, 0xFFFC),
     *range(0xE0000, 0xE0080))
)  # fmt: skip
_PLAIN = _CONTROL | _TURNING
_UNBROKEN = _PLAIN | _UNSEEN | _BREAKS


def plain(text: str) -> str:
    """`text` without control characters."""
    return text.translate(_PLAIN)


def unbroken(text: str) -> str:
    """`text` as part of one line."""
    return text.translate(_UNBROKEN)


def one_line(text: str) -> str:
    """`text` as a peer wrote it, fit for one line of a message."""
    return " ".join(unbroken(text).split())
