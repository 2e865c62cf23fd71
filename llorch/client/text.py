"""Text that others wrote, made fit for a terminal. Light to import: every message passes through here."""

from __future__ import annotations

# C0 but tab and newline, DEL, and C1: what can move a cursor, ring, or start an escape sequence. Format characters such
# as the joiners inside emoji, and spaces other than U+0020, are text.
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def plain(text: str) -> str:
    """`text` without control characters."""
    return text.translate(_CONTROL)


def one_line(text: str) -> str:
    """`text` as a peer wrote it, fit for one line of a message."""
    return " ".join(plain(text).split())
