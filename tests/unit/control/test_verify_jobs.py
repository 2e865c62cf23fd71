from __future__ import annotations

import pytest

from llorch.control.stage_sources import Machine
from llorch.control.verify_jobs import (
    ENDED_KEPT_S,
    MAX_JOBS,
    Check,
    Outcome,
    VerifyJob,
    answered,
    checks_of,
    make_room,
)
from llorch.errors import Code, LlorchError
from llorch.messages import ModelReport


def machine(name: str, **states: str) -> Machine:
    reports = [ModelReport.model_validate({"id": model, "state": state}) for model, state in states.items()]
    return Machine(name, True, "lease", catalog={each.id: each for each in reports})


def test_all_that_is_there_is_read_and_what_is_on_its_way_is_not() -> None:
    machines = {"a": machine("a", m="staged", x="staging", y="failed", old="retired"), "b": machine("b", m="staged")}
    found = [(check.node_id, check.model) for check in checks_of(None, machines, machines, everyone=True)]
    assert found == [("a", "m"), ("a", "old"), ("b", "m")]
    assert [check.node_id for check in checks_of("m", ["b"], machines, everyone=False)] == ["b"]
    for model, nodes in (("nothing", ["a"]), ("x", ["a"]), (None, [])):
        with pytest.raises(LlorchError) as refused:
            checks_of(model, nodes, machines, everyone=False)
        assert refused.value.code is Code.MODEL_NOT_FOUND


def test_a_node_says_whether_the_bytes_are_what_they_were_and_anything_else_is_no_answer() -> None:
    for answer, state, code in (
        ({"model": "m", "ok": True, "sha256": "ab"}, Outcome.OK, None),
        ({"model": "m", "ok": False, "sha256": "cd"}, Outcome.FAILED, Code.DIGEST_MISMATCH),
        ({"model": "m"}, Outcome.FAILED, Code.INTERNAL),
        ({"ok": "yes"}, Outcome.FAILED, Code.INTERNAL),
        (None, Outcome.FAILED, Code.INTERNAL),
    ):
        check = Check("a", "m")
        answered(check, answer)
        assert (check.state, check.error and check.error.code) == (state, code)
    check = Check("a", "m")
    answered(check, {"ok": False, "error": "part 2 differs"})
    assert check.error is not None and check.error.message == "part 2 differs"
    assert check.error.hint == "llorch model rm m --nodes a, and stage it again"


def test_ended_verifications_are_forgotten_and_running_ones_are_not() -> None:
    jobs = {f"j{n}": VerifyJob(f"j{n}", 0.0, "then", (), ()) for n in range(MAX_JOBS)}
    with pytest.raises(LlorchError) as refused:
        make_room(jobs, 1.0)
    assert refused.value.code is Code.QUEUE_FULL
    jobs["j3"].ended_at = 1.0
    make_room(jobs, 2.0)
    assert "j3" not in jobs and len(jobs) == MAX_JOBS - 1
    jobs["j4"].ended_at = 2.0
    make_room(jobs, 3.0 + ENDED_KEPT_S)
    assert "j4" not in jobs
