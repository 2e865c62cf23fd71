"""Planted bugs still fit the code that they are planted in. That each is caught: `python -m tests.faults.planted`."""

from __future__ import annotations

import ast

import pytest

from tests.faults.bugs import BUGS, Bug
from tests.faults.plans import PLANS
from tests.faults.planted import ROOT

LEAST = 20


def test_there_are_enough_and_each_has_a_name_and_a_plan_of_its_own() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= LEAST
    assert {bug.plan for bug in BUGS} <= set(PLANS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_it_changes_one_place_and_leaves_python(bug: Bug) -> None:
    texts: dict[str, str] = {}
    for change in bug.changes:
        text = texts.setdefault(change.file, (ROOT / "llorch" / change.file).read_text())
        assert text.count(change.old) == 1, change.old
        texts[change.file] = text.replace(change.old, change.new)
    for text in texts.values():
        ast.parse(text)
