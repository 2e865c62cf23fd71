from __future__ import annotations

import pytest

from llorch.logs import MAX_VALUE_CHARS, printable, render_value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("n1/p0", "n1/p0"),
        (1.5, "1.5"),
        ("two words", '"two words"'),
        ("a\nnode.registered node_id=forged", '"a\\nnode.registered node_id=forged"'),
        ("\x1b[2J", '"\\x1b[2J"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("\u202egnp", '"\\u202egnp"'),
        ("", '""'),
    ],
)
def test_no_value_can_forge_a_line_or_move_a_cursor(value: object, shown: str) -> None:
    assert render_value(value) == shown


def test_a_long_value_is_cut() -> None:
    assert len(render_value("x" * 10_000)) < MAX_VALUE_CHARS + 10


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[31mb\tc\nd\x07\u202e") == "a[31mb\tc\nd"
