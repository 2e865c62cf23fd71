"""What is left of text that others wrote: words, and never a way to move a cursor or to pose as a line of ours."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.client.text import one_line, plain, unbroken

TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
ANY = st.text(st.one_of(st.characters(), st.characters(categories=["Cc", "Cf", "Zl", "Zp"])))


@given(ANY)
def test_control_characters_and_marks_that_turn_text_around_never_stay(text: str) -> None:
    for clean in (plain(text), unbroken(text), one_line(text)):
        assert not any(unicodedata.category(char) == "Cc" and char not in "\t\n" for char in clean)
        assert not any(unicodedata.bidirectional(char) in TURNING for char in clean)
    for inside in (unbroken(text), one_line(text)):
        assert len(inside.splitlines()) <= 1 and "\t" not in inside
    assert one_line(text) == one_line(one_line(text)) == " ".join(unbroken(text).split())


@pytest.mark.parametrize(
    "text", ["👨\u200d👩\u200d👧", "می\u200cخواهم", "שלום\u200f!", "e\u0301", "a\u00a0b", "\tx\ny", "日本語"]
)
def test_writing_stays_as_it_is_written(text: str) -> None:
    assert plain(text) == text


def test_names_that_look_alike_are_alike() -> None:
    assert one_line("no\u200bde\ufeff-\u200e1\u00ad\U000e0041") == "node-1"
    assert unbroken("a  b\u2028c\nd") == "a  b c d"
