"""An explanation in words: what, why, then each pool, the best first."""

from __future__ import annotations

from llorch.cli.explain import lines

GOOD = {
    "node_id": "a", "pool_id": "p0", "rank": 1, "facts_age_ms": 1200,
    "filters": [{"name": "model", "passed": True}, {"name": "slots", "passed": True}],
    "score": {"preferred": True, "load": 0.25, "vram_free_bytes": 3 * 2**30},
}  # fmt: skip
SECOND = {"node_id": "b", "pool_id": "p0", "rank": 2, "filters": [{"name": "model", "passed": True}], "score": {}}
BAD = {
    "node_id": "a", "pool_id": "p1", "rank": None,
    "filters": [{"name": "model", "passed": False, "reason": "it serves other"}, {"name": "zone", "passed": True}],
    "score": {"load": 0.0},
}  # fmt: skip


def test_a_placement_is_told_with_every_filters_verdict_and_every_score_term() -> None:
    decision = {"outcome": "placed", "node_id": "a", "pool_id": "p0", "model": "m", "pools": [BAD, SECOND, GOOD]}
    assert list(lines(decision)) == [
        "placed on a/p0 of m",
        "",
        "* a/p0: rank 1, facts 1s old",
        "    yes model, slots",
        "    score preferred yes, load 0.25, vram_free_bytes 3.0G",
        "",
        "  b/p0: rank 2",
        "    yes model",
        "",
        "  a/p1: not possible",
        "    no  model: it serves other",
        "    yes zone",
    ]


def test_a_refusal_is_told_with_its_reason_and_what_to_do() -> None:
    decision = {
        "task_id": "t", "state": "failed", "outcome": "refuse", "reason": "nobody can", "error": {"hint": "add a node"},
        "pools": [BAD],
    }  # fmt: skip
    assert list(lines(decision))[:3] == ["task t (failed): refuse", "  because: nobody can", "  hint: add a node"]


def test_what_a_control_leaves_out_or_garbles_is_left_out() -> None:
    assert list(lines({})) == ["unknown"]
    assert list(lines({"pools": [5, None], "error": "x", "picked": 7})) == ["unknown"]
    assert list(lines({"pools": [{"node_id": "a", "filters": [3], "score": 5}]})) == [
        "unknown",
        "",
        "  a/None: possible",
    ]
