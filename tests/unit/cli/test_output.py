"""Tables, fields, and the lines of an error."""

from __future__ import annotations

import pytest

from llorch.cli.output import fields, report, table
from llorch.cli.units import age, size


def test_columns_are_as_wide_as_their_widest_cell_and_the_last_one_ends_where_it_ends() -> None:
    assert table(["node", "note"], [["a", "x"], ["a-long-one", ""]]) == (
        "NODE        NOTE\na           x\na-long-one  -\n"
    )
    assert table(["node"], []) == "NODE\n"


def test_cells_show_nothing_as_a_dash_truth_as_a_word_and_lists_with_commas() -> None:
    row = [None, "", [], True, False, 0, ["a", "b"], "x\ny\x1b[2J", "\x07"]
    assert table(["c"] * len(row), [row]).splitlines()[1].split() == [
        "-", "-", "-", "yes", "no", "0", "a,b", "x", "y[2J", "-",
    ]  # fmt: skip


def test_fields_stand_one_a_line_and_what_is_nested_is_json() -> None:
    assert fields({"a": 1, "nested": {"b": None}, "list": ["x", "y"], "objects": [{"c": 1}], "none": None}) == (
        'a:       1\nnested:  {"b": null}\nlist:    x,y\nobjects: [{"c": 1}]\nnone:    -\n'
    )
    assert fields({}) == ""


def test_an_error_has_only_the_lines_that_there_is_something_to_say_on(capsys: pytest.CaptureFixture[str]) -> None:
    report("it failed\x1b[2J", why="because [bold]", hint="do this", request_id="r1")
    report("alone")
    captured = capsys.readouterr()
    assert captured.err == ("error: it failed[2J\nwhy: because [bold]\nhint: do this\nrequest-id: r1\nerror: alone\n")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0B"), (1023, "1023B"), (1024, "1.0K"), (1536, "1.5K"), (10 * 1024, "10K"), (3 * 2**30, "3.0G"),
     (24 * 2**30, "24G"), (2**40, "1.0T"), (50 * 2**40, "50T"), ("x", "0B"), (None, "0B")],
)  # fmt: skip
def test_sizes_have_few_letters(count: object, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [(0, "0ms"), (350, "350ms"), (4_200, "4s"), (190_000, "3m"), (7_300_000, "2h"), (200_000_000, "2d"), (None, "-")],
)
def test_ages_have_few_letters(milliseconds: object, shown: str) -> None:
    assert age(milliseconds) == shown
