"""Bytes and ages in few letters, for tables."""

from __future__ import annotations


def size(count: object) -> str:
    """1536 -> 1.5K: binary units, at most three digits that mean something."""
    value = float(count) if isinstance(count, (int, float)) else 0.0
    for unit in ("B", "K", "M", "G"):
        if abs(value) < 1024:
            return f"{value:.0f}{unit}" if unit == "B" or value >= 10 else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}T" if value < 10 else f"{value:.0f}T"


def age(milliseconds: object) -> str:
    """350 -> 350ms, 4200 -> 4s, 190000 -> 3m."""
    if not isinstance(milliseconds, (int, float)):
        return "-"
    if milliseconds < 1_000:
        return f"{milliseconds:.0f}ms"
    seconds = milliseconds / 1_000
    for unit, length in (("s", 60), ("m", 60), ("h", 24)):
        if seconds < length:
            return f"{seconds:.0f}{unit}"
        seconds /= length
    return f"{seconds:.0f}d"
