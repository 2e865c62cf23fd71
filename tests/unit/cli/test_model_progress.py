from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from llorch.cli.model import conflict_notes, conflict_of, node_list, rows_of, state_of
from llorch.cli.model_progress import LINE_EVERY_S, Bars, Lines, Nothing, progress, words
from llorch.cli.output import Failure


def job(**nodes: dict[str, Any]) -> dict[str, Any]:
    return {"job": "stage-1", "state": "running", "nodes": nodes}


STAGING = {
    "state": "staging", "progress": 0.45, "bytes_done": 1.2 * 2**30, "bytes_total": 2.6 * 2**30,
    "bytes_per_s": 110 * 2**20, "sources": ["n1", "n2"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("share", "line"),
    [
        (STAGING, "staging 45% 1.2G/2.6G 110M/s from n1"),
        (STAGING | {"bytes_total": None, "bytes_per_s": None, "sources": []}, "staging 45%"),
        ({"state": "staging", "progress": 7}, "staging 100%"),
        ({"state": "waiting", "waits_for": "n1, which fetches it"}, "waiting, waits for n1, which fetches it"),
        ({"state": "offline", "waits_for": "it to come back"}, "offline, waits for it to come back"),
        ({"state": "staged", "bytes_total": 2048, "sha256": "ab" * 32}, "staged 2.0K sha256 abababababab"),
        ({"state": "failed", "error": {"message": "no room\nerror: forged"}}, "failed: no room error: forged"),
        ({"state": "failed"}, "failed"),
        ({}, "unknown"),
        ({"state": "waiting", "waits_for": "\x1b[31mred"}, "waiting, waits for [31mred"),
    ],
)
def test_one_node_is_one_line_whatever_the_control_says(share: dict[str, Any], line: str) -> None:
    assert words(share) == line


def test_without_a_terminal_there_is_a_line_when_a_state_changes_and_every_five_seconds_while_bytes_come() -> None:
    said: list[str] = []
    now = [100.0]
    lines = Lines(said.append, lambda: now[0])

    def show(after_s: float, **nodes: dict[str, Any]) -> list[str]:
        now[0] += after_s
        said.clear()
        lines.show(job(**nodes))
        return list(said)

    waiting = {"state": "waiting", "waits_for": "n1"}
    assert show(0, n1=STAGING, n2=waiting) == [
        "n1: staging 45% 1.2G/2.6G 110M/s from n1\n",
        "n2: waiting, waits for n1\n",
    ]
    assert show(LINE_EVERY_S - 1, n1=STAGING | {"progress": 0.5}, n2=waiting) == []
    assert show(1, n1=STAGING | {"progress": 0.6}, n2=waiting) == ["n1: staging 60% 1.2G/2.6G 110M/s from n1\n"]
    assert show(100, n2=waiting, n3={"state": "waiting", "waits_for": None}) == []
    assert show(0, n1={"state": "staged"}, n2=waiting) == ["n1: staged 0B\n"]
    lines.show({"nodes": "nonsense"})
    lines.show({"nodes": {"n1": "nonsense"}})
    lines.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_for_each_node_and_what_nodes_say_is_no_markup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = progress(quiet=False)
    assert isinstance(shown, Bars)
    try:
        shown.show(job(n1=STAGING, n2={"state": "waiting", "waits_for": "[bold]n1[/foo]"}))
        shown.show(job(n1={"state": "staged", "bytes_total": 5, "sha256": "ab" * 32}, n2={"state": "failed"}))
    finally:
        shown.close()
        shown.close()
    text = terminal.getvalue()
    assert "n1" in text and "45%" in text and "100%" in text and "[bold]n1[/foo]" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor is back


def test_nothing_is_shown_where_only_names_are_wanted_and_lines_where_there_is_no_terminal() -> None:
    assert isinstance(progress(quiet=True), Nothing)
    assert isinstance(progress(quiet=False), Lines)


# ---------------------------------------------------------------- rows


def catalog(*reports: tuple[str, dict[str, Any]], **entry: Any) -> dict[str, Any]:
    nodes = {node_id: {"state": "online", "models": [{"id": "m"} | report]} for node_id, report in reports}
    return {"models": {"m": {"nodes": list(nodes), "ready_pools": 1} | entry}, "nodes": nodes}


MIXED = {"a": "staged", "b": "staging", "c": "failed", "d": "odd"}


def test_a_models_state_is_one_word_where_all_nodes_agree_and_else_says_who_is_how_far() -> None:
    for reports, state in (
        ([("a", {"state": "staged"}), ("b", {"state": "staged"})], "staged"),
        ([("a", {"state": "retired"})], "retired"),
        ([("a", {"state": "staging", "progress": 0.5})], "staging 50% on a"),
        (
            [(name, {"state": state}) for name, state in MIXED.items()],
            "staged 1, staging 0% on b, failed on c, odd on d",
        ),
        ([], None),
    ):  # fmt: skip
        (row,) = rows_of(catalog(*reports))
        assert state_of(row) == state


def test_an_id_that_stands_for_two_contents_says_which_nodes_have_which() -> None:
    digests = {"a" * 64: ["n1"], "b" * 64: ["n2", "n3"]}
    found = catalog(conflict=True, digests=digests)
    assert conflict_of(rows_of(found)[0]) == "aaaaaaaaaaaa on n1; bbbbbbbbbbbb on n2 n3"
    assert conflict_notes(found) == ["model m has several contents: aaaaaaaaaaaa on n1; bbbbbbbbbbbb on n2 n3"]
    assert conflict_notes(catalog(conflict=False, digests={"a" * 64: ["n1"]})) == []
    assert conflict_notes({}) == [] == rows_of({"models": [], "nodes": 5})


def test_nodes_are_all_or_ids_with_commas() -> None:
    assert node_list("all") == "all"
    assert node_list("a, b,a") == ["a", "b"]
    for wrong in ("", "a,,b", ","):
        with pytest.raises(Failure):
            node_list(wrong)
