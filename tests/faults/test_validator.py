"""The validator itself, on hand-made histories: each rule is silent where all is well, and speaks where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import bugs_logged
from tests.faults.tale import PIDS, POOLS, WHOLE, Tale, log, text
from tests.faults.validator import judge


def begun(tokens: int = 3, **ask: object) -> Tale:
    """A native task that runs on a/p0, its answer just begun."""
    return Tale().task(tokens=tokens, **ask).send().engine("arrived").answer()


def done(tale: Tale) -> Tale:
    return tale.engine("finished").closed().over()


def test_a_task_with_nothing_wrong_breaks_no_rule() -> None:
    tale = Tale().whole()
    verdict = judge(tale.end().entries)
    assert (verdict.violations, verdict.invalid) == ([], [])
    assert (verdict.tasks, verdict.ended, dict(verdict.outcomes)) == (1, 1, {"end length": 1})


# ---------------------------------------------------------------- bytes


def test_a_token_that_is_lost() -> None:
    events = log(3)
    assert set(done(begun().show(events[:2] + events[3:])).rules()) >= {"order"}


def test_a_token_that_is_shown_twice() -> None:
    events = log(3)
    assert set(done(begun().show(events[:2] + events[1:])).rules()) >= {"order"}


def test_a_resume_goes_on_where_it_was() -> None:
    events = log(4)
    tale = begun(4).show(events[:3]).fault("client.cut", "clients").closed("broken")
    tale.send("events", events[2]["id"]).answer().show(events[3:])
    assert done(tale).rules() == []


@pytest.mark.parametrize(("said", "first"), [(2, 4), (2, 2)])
def test_a_resume_that_skips_or_repeats_an_event(said: int, first: int) -> None:
    events = log(4)
    tale = begun(4).show(events[: said + 1]).fault("client.cut", "clients").closed("broken")
    tale.send("events", events[said]["id"]).answer().show(events[first:])
    assert set(done(tale).rules()) >= {"order"}


def test_a_resume_that_is_off_by_a_byte() -> None:
    events = log(4)
    tale = begun(4).show(events[:3]).fault("client.cut", "clients").closed("broken")
    cut = {**events[3], "size": events[3]["size"] - 1}
    tale.send("events", events[2]["id"]).answer().show([cut, *events[4:]])
    assert "order" in done(tale).rules()


def test_other_bytes_at_the_same_offset() -> None:
    events = log(3)
    tale = begun().show(events).engine("finished").closed()
    other = [*events[:1], {**events[1], "crc": 1}, *events[2:]]
    assert tale.send("reread").answer().show(other).closed().over().rules() == ["bytes"]


def test_a_log_event_without_an_id() -> None:
    events = log(3)
    assert "ids" in done(begun().show([*events[:1], {**events[1], "id": None}, *events[1:]])).rules()


def test_an_answer_that_ends_early_as_if_it_were_whole() -> None:
    assert done(begun(4).show(log(3))).rules() == ["whole"]


def test_a_digest_that_is_not_the_text_s() -> None:
    events = log(3)
    wrong = {**events[-1], "data": {**events[-1]["data"], "sha256": "0" * 64}}
    assert done(begun().show([*events[:-1], wrong])).rules() == ["digest"]


def test_a_second_terminal_event_and_an_event_after_the_first() -> None:
    events = log(3)
    rules = done(begun().show([*events, events[-1]])).rules()
    assert {"nothing after the end", "one end"} <= set(rules)


def test_an_end_that_is_another_when_it_is_read_again() -> None:
    events = log(3)
    tale = begun().show(events).engine("finished").closed().send("reread").answer()
    other = {**events[-1], "data": {**events[-1]["data"], "finish_reason": "stop"}}
    assert "one end" in tale.show([*events[:-1], other]).closed().over().rules()


def test_a_stream_that_ends_in_order_without_a_terminal_event() -> None:
    assert begun().show(log(3)[:-1]).engine("finished").closed().over("left").rules() == ["cut or whole"]


def test_a_control_that_is_told_to_go_may_end_a_native_stream_in_order_but_not_a_v1_one() -> None:
    events = log(3)
    tale = begun().show(events[:2]).fault("control.term", "control", 1.0).closed()
    tale.send("events", events[1]["id"]).answer().show(events[2:])
    assert done(tale).rules() == []
    tale = Tale().task(form="v1").send().engine("arrived").answer().chunks(2, None)
    assert tale.fault("control.term", "control", 1.0).engine("finished").closed().over("broken").rules() == [
        "cut or whole"
    ]


def test_204_before_any_end_was_shown() -> None:
    events = log(3)
    tale = begun().show(events[:2]).fault("client.cut", "clients").closed("broken").engine("finished")
    assert tale.send("events", events[1]["id"]).answer(204).closed().over("left").rules() == ["lost end"]


@pytest.mark.parametrize(
    ("tokens", "end", "code", "rules"),
    [
        (3, "done", None, []),
        (2, "done", None, ["whole"]),
        (2, None, None, ["cut or whole"]),
        (2, "error", "NODE_LOST", ["unexplained error"]),
    ],
)
def test_a_v1_stream(tokens: int, end: str | None, code: str | None, rules: list[str]) -> None:
    tale = Tale().task(form="v1").send().engine("arrived").answer(node="a", pool="p0").chunks(tokens, end, code)
    assert done(tale).rules() == rules


def test_a_v1_stream_out_of_order_and_one_that_goes_on_after_its_end() -> None:
    tale = Tale().task(form="v1").send().engine("arrived").answer().chunks(3)
    tale.note("chunk", task="k1", conn=1, kind="text", text="t9 ")
    assert set(done(tale).rules()) == {"nothing after the end", "order"}


@pytest.mark.parametrize(
    ("said", "finish", "rules"),
    [("t0 t1 t2 ", "length", []), ("t0 t1 ", "length", ["whole"]), ("t0 t1 ", None, ["whole"])],
)
def test_an_answer_in_one_piece(said: str, finish: str | None, rules: list[str]) -> None:
    tale = Tale().task(form="v1-json").send().engine("arrived").answer()
    assert done(tale.note("body", task="k1", conn=1, text=said, finish=finish)).rules() == rules


# ---------------------------------------------------------------- errors


def failed(code: str, tokens: int = 2, **ask: object) -> Tale:
    return done(begun(9, **ask).show(log(tokens, end=None)).show([{**log(tokens, error=code)[-1]}]))


@pytest.mark.parametrize("code", ["NODE_LOST", "ENGINE_FAILED", "INTERNAL", "NO_CAPACITY", "DEADLINE_EXCEEDED", "GAP"])
def test_an_error_that_no_fault_explains(code: str) -> None:
    assert failed(code).rules() == ["unexplained error"]


def lost_with_output(kind: str, target: str, for_s: float) -> list[str]:
    events = log(2, error="NODE_LOST")
    tale = begun(9).show(events[:-1]).fault(kind, target, for_s).wait(for_s)
    return done(tale.show(events[-1:])).rules()


@pytest.mark.parametrize(
    ("kind", "target", "for_s", "rules"),
    [
        ("node.kill", "a", 1.0, []),
        ("link.partition", "a", 6.0, []),
        ("node.kill", "b", 1.0, ["unexplained error"]),
        ("link.cut", "a", 0.0, ["unexplained error"]),  # a link that is back at once costs nothing
        ("engine.kill", "a/p0", 1.0, ["unexplained error"]),
        ("control.kill", "control", 1.0, ["unexplained error"]),
    ],
)
def test_node_lost_only_where_the_node_was(kind: str, target: str, for_s: float, rules: list[str]) -> None:
    assert lost_with_output(kind, target, for_s) == rules


def test_a_task_with_no_output_is_not_lost_with_its_first_node() -> None:
    tale = Tale().task().send().engine("arrived").fault("node.kill", "a", 1.0).wait(0.1)
    tale.answer().show([{**log(0, error="NODE_LOST")[-1], "id": None}]).closed().over()
    assert tale.engine("serving", pid=99, marker=None).rules() == ["unexplained error"]


@pytest.mark.parametrize(
    ("form", "after_s", "rules"),
    [
        ("native-json", 0.5, []),  # its log had begun, though the client had not seen it
        ("native-json", 0.01, ["unexplained error"]),
        ("v1-json", 0.5, ["unexplained error"]),
    ],
)
def test_an_answer_in_one_piece_is_lost_with_its_node_once_its_log_has_begun(
    form: str, after_s: float, rules: list[str]
) -> None:
    tale = Tale().task(form=form).send().engine("arrived").wait(after_s).fault("node.kill", "a", 1.0).wait(5.0)
    assert (
        tale.answer(502, "NODE_LOST", node="a", pool="p0").closed().over("refused").engine("aborted").rules() == rules
    )


@pytest.mark.parametrize(
    ("kind", "tokens", "rules"),
    [
        ("node.term", 65, []),  # a node that drains lets it run until its grace is over
        ("node.term", 0, ["unexplained error"]),
        ("node.kill", 65, ["unexplained error"]),
    ],
)
def test_an_answer_in_one_piece_begins_on_a_node_that_drains(kind: str, tokens: int, rules: list[str]) -> None:
    tale = Tale().task(form="native-json").send().engine("arrived").wait(0.03).fault(kind, "a", 2.0).wait(1.0)
    tale.engine("aborted", tokens=tokens).answer(502, "NODE_LOST", node="a", pool="p0").closed().over("refused")
    assert tale.rules() == rules


@pytest.mark.parametrize(
    ("op", "after_s", "rules"),
    [
        ("events", 0.5, []),  # the run had its first byte before it was there to read it
        ("events", 0.01, ["unexplained error"]),
        ("post", 0.5, ["unexplained error"]),
    ],
)
def test_one_who_comes_back_may_lose_what_had_begun_without_having_seen_it(
    op: str, after_s: float, rules: list[str]
) -> None:
    tale = Tale().task().send().left(back=True).closed("left").send(op).engine("arrived").wait(after_s)
    tale = (
        tale.fault("node.kill", "a", 1.0)
        .wait(5.0)
        .answer(502, "NODE_LOST", node="a", pool="p0")
        .closed()
        .over("refused")
        .engine("aborted")
    )
    assert tale.rules() == rules


def test_engine_failed_where_the_engine_was_hit_or_told_to() -> None:
    events = log(2, error="ENGINE_FAILED")
    tale = begun(9).show(events[:-1]).fault("engine.kill", "a/p0", 1.0).show(events[-1:])
    assert done(tale).rules() == []
    events = log(2, error="ENGINE_FAILED", pool="a/p1")
    tale = Tale().task(tokens=9, model="odd", script="truncate@2").send().engine("arrived", "a/p1").answer()
    assert tale.show(events).engine("finished", "a/p1").closed().over().rules() == []


def test_an_engine_that_fails_ends_no_task_that_another_pool_could_take() -> None:
    tale = Tale().task().send().engine("arrived").fault("engine.kill", "a/p0", 1.0).wait(0.5)
    tale.answer(502, "ENGINE_FAILED", node="a", pool="p0").closed().over("refused").wait(1.0)
    assert tale.engine("serving", pid=99, marker=None).rules() == ["unexplained error"]


@pytest.mark.parametrize(("killed", "rules"), [("a", []), ("b", ["one end"])])
def test_a_failed_task_is_told_to_have_failed_when_its_log_is_gone(killed: str, rules: list[str]) -> None:
    events = log(2, error="ENGINE_FAILED")
    tale = begun(9).show(events[:-1]).fault("engine.kill", "a/p0", 1.0).show(events[-1:]).closed()
    tale.fault("node.kill", killed, 1.0).wait(0.5).send("reread").answer()
    assert done(tale.show([{**events[-1], "id": None}])).rules() == rules


@pytest.mark.parametrize(("shown", "rules"), [(0, []), (2, ["one execution"])])
def test_what_an_earlier_execution_has_shown_is_not_held_against_a_silent_one_on_the_same_pool(
    shown: int, rules: list[str]
) -> None:
    tale = begun(9, key="key").show(log(3)[:-1]).fault("node.kill", "a", 1.0).closed("broken").wait(20.0)
    tale.send().engine("arrived").answer()
    if shown:
        tale.show(log(shown)[:-1])
    tale.fault("engine.kill", "a/p0", 1.0).wait(1.0).engine("arrived", "b/p0").show(log(9, pool="b/p0", attempt=2))
    assert ("one execution" in tale.engine("finished", "b/p0").closed().over().rules()) is bool(rules)


def test_a_control_restart_is_blamed_for_nothing_but_what_it_may_be() -> None:
    for code, rules in (
        ("RECOVERING", []),
        ("INTERNAL", ["unexplained error"]),
        ("MODEL_NOT_FOUND", ["unexplained error"]),
    ):
        tale = Tale().fault("control.kill", "control", 1.0).wait(2.0)
        tale.task().send().answer(503, code).closed().over("refused")
        assert tale.rules() == rules, code
    tale = Tale().fault("control.kill", "control", 1.0).wait(12.0)
    assert tale.task().send().answer(503, "RECOVERING").closed().over("refused").rules() == ["unexplained error"]


@pytest.mark.parametrize("how", ["node.term", "node.kill"])
def test_what_a_node_had_is_not_there_once_it_has_signed_off_and_no_sooner(how: str) -> None:
    tale = Tale().wait(10.0).fault(how, "a", 2.0).wait(1.0)
    tale.task(model="odd").send().answer(404, "MODEL_NOT_FOUND").closed().over("refused")
    assert tale.rules() == ([] if how == "node.term" else ["unexplained error"])


@pytest.mark.parametrize(("model", "rules"), [("sim", []), ("odd", ["unexplained error"])])
def test_a_node_that_may_bring_a_task_back_is_one_that_serves_its_model(model: str, rules: list[str]) -> None:
    tale = Tale().wait(10.0).task(model=model, key="key").send().left(back=True).closed("left")
    tale.fault("node.kill", "b", 1.0).wait(1.0).send().answer(503, "RECOVERING").closed().over("refused")
    assert tale.rules() == rules


def test_a_deadline_is_not_over_before_its_time() -> None:
    for waited_s, rules in ((2.0, []), (0.1, ["unexplained error"])):
        events = log(2, error="DEADLINE_EXCEEDED")
        tale = begun(9, deadline_s=2.0).show(events[:-1]).wait(waited_s)
        assert done(tale.show(events[-1:])).rules() == rules


def test_a_connection_that_breaks_for_no_reason() -> None:
    events = log(3)
    tale = begun().show(events[:2]).closed("broken").send("events", events[1]["id"]).answer().show(events[2:])
    assert done(tale).rules() == ["unexplained break"]


@pytest.mark.parametrize(
    ("op", "replayed", "rules"), [("post", "true", []), ("events", None, []), ("post", None, ["unexplained break"])]
)
def test_only_one_that_came_back_is_let_go_with_its_node(op: str, replayed: str | None, rules: list[str]) -> None:
    events = log(3)
    tale = begun(key="key").fault("client.cut", "clients").closed("broken").wait(3.0).send(op, events[0]["id"])
    tale.answer(replayed=replayed).show(events[1:2]).fault("node.kill", "a", 0.2).wait(1.0).closed("broken")
    tale.engine("killed").send().answer().engine("arrived", "b/p0").show(log(3, pool="b/p0"))
    assert done(tale.engine("finished", "b/p0")).rules() == rules


def test_a_task_that_nobody_knows_any_more() -> None:
    events = log(3)

    def unknown(kind: str, target: str) -> list[str]:
        tale = begun().show(events[:2]).fault(kind, target, 1.0).closed("broken").wait(6.0)
        tale.send("events", events[1]["id"]).answer(404, "TASK_NOT_FOUND").closed().over("unknown")
        return tale.engine("finished").rules()

    assert unknown("node.kill", "a") == ["unexplained break"]
    assert set(unknown("control.kill", "control")) == {"unexplained error", "lost task"}


@pytest.mark.parametrize(("tokens", "unexplained"), [(0, False), (1, True)])
def test_a_task_that_waited_again_is_lost_with_its_control(tokens: int, unexplained: bool) -> None:
    """Its first attempt showed nothing in time, and was left behind: no node remembers it."""
    tale = Tale().task(tokens=3).send().engine("arrived").wait(3.0).answer().engine("aborted", tokens=tokens)
    tale.fault("control.kill", "control", 1.0).closed("broken").wait(6.0)
    tale.send("events").answer(404, "TASK_NOT_FOUND").closed().over("unknown")
    assert ("unexplained error" in tale.rules()) is unexplained


# ---------------------------------------------------------------- cancels, and readers that go


def canceled(after_s: float, end: str = "canceled") -> Tale:
    events = log(2, end=end)
    tale = begun(9 if end == "canceled" else 2).show(events[:-1]).ask("cancel", 202).wait(after_s)
    return tale.engine("aborted").show(events[-1:]).closed().over()


def test_a_cancel_ends_its_task_and_frees_the_slot_soon() -> None:
    assert canceled(0.5).rules() == []
    assert canceled(0.5, "length").rules() == []  # it had come before
    assert canceled(3.0).rules() == ["cancel"]
    assert canceled(3.0, "length").rules() == ["cancel", "cancel"]


def test_tokens_long_after_a_cancel() -> None:
    events = log(3, end="canceled")
    tale = begun(9).show(events[:-2]).ask("cancel", 202).engine("aborted").wait(3.0).show(events[-2:]).closed().over()
    assert tale.rules() == ["cancel"]


@pytest.mark.parametrize(
    ("end", "step", "wait_s", "rules"),
    [
        ("canceled", "aborted", 0.1, []),
        ("length", "finished", 0.1, []),  # it had ended when it was canceled
        ("length", "aborted", 0.1, ["cancel"]),
        ("length", "finished", 3.0, ["cancel", "cancel"]),
    ],
)
def test_who_comes_back_to_a_canceled_task_reads_what_came_before(
    end: str, step: str, wait_s: float, rules: list[str]
) -> None:
    events = log(3, end=end)
    tale = begun().show(events[:2]).left(back=True).closed("left").ask("cancel", 202).wait(wait_s).engine(step)
    tale.wait(2.5).send("events", after=events[1]["id"]).answer().show(events[2:]).closed().over()
    assert tale.rules() == rules


def test_a_cancel_by_nobody() -> None:
    assert done(begun(9).show(log(2, end="canceled"))).rules() == ["canceled by nobody"]


@pytest.mark.parametrize(("away_s", "rules"), [(1.0, ["canceled by nobody"]), (4.0, [])])
def test_a_reader_that_is_back_within_its_grace_finds_its_task_alive(away_s: float, rules: list[str]) -> None:
    events = log(2, end="canceled")
    tale = begun(9).show(events[:-1]).left(back=True).closed("left").wait(away_s)
    tale.send("events", events[-2]["id"]).answer().show(events[-1:])
    assert done(tale).rules() == rules


@pytest.mark.parametrize(
    ("form", "for_s", "rules"),
    [("native", 3.5, []), ("native", 8.0, ["reader gone"]), ("v1", 0.5, []), ("v1", 3.0, ["reader gone"])],
)
def test_a_client_that_goes_for_good_frees_its_slot(form: str, for_s: float, rules: list[str]) -> None:
    tale = Tale().task(form=form, tokens=99).send().engine("arrived").answer()
    tale = tale.chunks(2, None) if form == "v1" else tale.show(log(2, end=None))
    assert tale.left(back=False).closed("left").over("left").wait(for_s).engine("aborted").rules() == rules


# ---------------------------------------------------------------- executions and slots


def test_a_second_execution_after_a_replay() -> None:
    events = log(3)
    tale = begun(key="key").show(events[:2]).fault("client.cut", "clients").closed("broken").engine("finished")
    tale.send().engine("arrived", "b/p0").answer().show(log(3, pool="b/p0")).engine("finished", "b/p0").closed().over()
    assert tale.rules() == ["one execution", "one execution"]


def test_a_second_execution_is_right_where_the_first_died_with_its_node() -> None:
    tale = begun(key="key").show(log(3)[:2]).fault("node.kill", "a", 1.0).fault("control.kill", "control", 1.0)
    tale.closed("broken").wait(1.5).engine("serving", pid=99, marker=None)
    tale.send().engine("arrived", "b/p0").answer().show(log(3, pool="b/p0")).engine("finished", "b/p0").closed().over()
    assert tale.rules() == []


@pytest.mark.parametrize(
    ("fault", "step", "after_s", "shown", "rules"),
    [
        (("link.cut", "b"), "aborted", 0.1, "a/p0", []),  # the last on a link that was cut is seen after its successor
        (("link.cut", "b"), "finished", 0.1, "a/p0", []),  # before its node was told
        (("link.cut", "b"), "finished", 5.0, "a/p0", ["fence", "one execution"]),
        (("link.cut", "b"), "aborted", 0.1, "b/p0", ["one execution"]),
        (("link.cut", "c"), "aborted", 0.1, "a/p0", ["one execution"]),
    ],
)
def test_the_last_request_on_a_cut_link_is_seen_late(
    fault: tuple[str, str], step: str, after_s: float, shown: str, rules: list[str]
) -> None:
    """Its engine may have made a token or two, which nobody is shown."""
    tale = Tale().task().send().fault(*fault).wait(0.01).engine("arrived").wait(0.002).engine("arrived", "b/p0")
    tale.answer().show(log(3, pool=shown, attempt=3)).wait(after_s).engine(step, "b/p0", tokens=2)
    assert sorted(tale.engine("finished").closed().over().rules()) == rules


@pytest.mark.parametrize(
    ("look_s", "hit", "rules"),
    [(1.0, False, []), (0.5, False, ["one execution"]), (1.0, True, ["one execution"])],
)
def test_a_retry_without_a_fault_is_right_where_the_machine_could_not_keep_up(
    look_s: float, hit: bool, rules: list[str]
) -> None:
    """The control took that long to answer a look at its pools, and not because it was hit."""
    tale = Tale().task().send().note("sample", pools=WHOLE)
    if hit:
        tale.fault("control.kill", "control", 0.3)
    tale.wait(look_s - 0.1).engine("arrived").engine("finished").note("sample", pools=WHOLE)
    tale.engine("arrived", "b/p0").answer().show(log(3, pool="b/p0", attempt=2))
    assert tale.engine("finished", "b/p0").closed().over().rules() == rules


@pytest.mark.parametrize(("pool", "rules"), [("a/p0", []), ("b/p0", ["one execution"])])
def test_a_resume_that_goes_on_with_another_execution_s_log(pool: str, rules: list[str]) -> None:
    events, (node, _, pool_id) = log(5), pool.partition("/")
    tale = begun(5).show(events[:3]).fault("control.kill", "control", 1.0).closed("broken").engine("finished").wait(1.0)
    tale.send("events", after=events[2]["id"]).answer(node=node, pool=pool_id).show(events[3:]).closed().over()
    assert tale.rules() == rules


@pytest.mark.parametrize(
    ("fault", "rules"),
    [
        (("control.kill", "control", 1.0), ["one execution"]),  # its nodes keep a task whose control is gone
        (("client.cut", "clients"), []),
    ],
)
def test_a_v1_task_runs_again_if_its_client_left_and_not_if_its_control_did(
    fault: tuple[Any, ...], rules: list[str]
) -> None:
    tale = Tale().task(form="v1", key="key").send().engine("arrived").answer(node="a", pool="p0")
    tale.chunks(2, end=None).fault(*fault).closed("broken").engine("aborted").wait(2.5).send().engine(
        "arrived", "b/p0"
    ).answer()
    tale.chunks(3).engine("finished", "b/p0").closed().over()
    assert tale.rules() == rules


@pytest.mark.parametrize("noticed_late", [False, True])
@pytest.mark.parametrize(("kind", "rules"), [("client.reset", []), ("control.kill", ["one execution"])])
def test_an_answer_in_one_piece_runs_again_if_its_client_left_just_as_its_engine_ended(
    kind: str, rules: list[str], noticed_late: bool
) -> None:
    tale = Tale().task(form="v1-json", key="key").send().engine("arrived").wait(2.0)
    tale.fault(kind, "clients")
    if noticed_late:
        tale.engine("finished").closed("broken").wait(0.1)
    else:
        tale.closed("broken").engine("finished").wait(0.1)
    tale.send().engine("arrived", "b/p0").answer().note("body", task="k1", conn=2, text=text(3), finish="length")
    tale.engine("finished", "b/p0").closed().over()
    assert [rule for rule in tale.rules() if rule == "one execution"] == rules


@pytest.mark.parametrize(("control_s", "rules"), [(1.5, []), (0.3, ["one execution"])])
def test_a_second_execution_is_right_where_a_new_control_could_not_hear_of_the_first(
    control_s: float, rules: list[str]
) -> None:
    """Its node stood still for most of the recovery window, and for the rest of it the control did."""
    tale = begun(key="key").show(log(3)[:2]).engine("finished").fault("control.kill", "control", 1.0).closed("broken")
    tale.wait(1.0).fault("node.stop", "a", 2.2).wait(1.9).fault("control.stop", "control", control_s).wait(0.9)
    tale.fault("node.stop", "a", 2.0).wait(0.6).send().engine("arrived", "b/p0").answer().show(log(3, pool="b/p0"))
    tale.engine("finished", "b/p0").closed().over()
    assert [rule for rule in tale.rules() if rule == "one execution"][:1] == rules


@pytest.mark.parametrize(
    ("fault", "step", "rules"),
    [
        (("engine.stop", "a/p0", 6.0), "aborted", []),  # it is told when it goes on
        (("node.stop", "a", 6.0), "finished", []),  # it read the end of its engine after the word of its client's
        (("engine.stop", "b/p0", 6.0), "aborted", ["one execution"]),
        (("node.stop", "b", 6.0), "finished", ["one execution"]),
    ],
)
def test_what_stood_still_is_told_late_that_a_v1_client_left(
    fault: tuple[str, str, float], step: str, rules: list[str]
) -> None:
    tale = Tale().task(form="v1", key="key").send().engine("arrived").answer(node="a", pool="p0").chunks(2, end=None)
    tale.fault(*fault).wait(0.5)
    if step == "finished":
        tale.engine("finished").wait(0.5)
    tale.fault("client.cut", "clients").closed("broken").wait(2.0).send().engine("arrived", "b/p0")
    tale.answer(node="b", pool="p0").wait(2.0)
    if step == "aborted":
        tale.engine("aborted")
    tale.chunks(3).engine("finished", "b/p0").closed().over()
    assert tale.rules() == rules


def test_a_retry_after_something_was_shown() -> None:
    tale = begun().show(log(3)[:2]).engine("aborted").wait(2.0).engine("arrived", "b/p0")
    tale.show(log(3, pool="b/p0", attempt=2)).engine("finished", "b/p0").closed().over()
    assert "one execution" in tale.rules()


def test_a_retry_before_anything_was_shown_is_right_also_beside_a_node_that_is_away() -> None:
    tale = Tale().task().send().engine("arrived").fault("link.half_open", "a", 2.0).wait(1.0).engine("arrived", "b/p0")
    tale.answer().show(log(3, pool="b/p0", attempt=2)).engine("finished", "b/p0").closed().over().engine("aborted")
    assert tale.rules() == []
    tale = Tale().task().send().engine("arrived").wait(1.0).engine("arrived", "b/p0").wait(3.0).engine("aborted")
    tale.answer().show(log(3, pool="b/p0", attempt=2)).engine("finished", "b/p0").closed().over()
    assert tale.rules() == ["one execution"]


@pytest.mark.parametrize(
    ("fault", "step", "rules"),
    [
        (("engine.stop", "a/p0", 2.0), "aborted", []),
        (("node.stop", "a", 2.0), "aborted", []),
        (("link.throttle", "a", 2.0), "aborted", []),
        (("engine.stop", "a/p0", 2.0), "finished", ["one execution"]),  # it was not ended when it was overtaken
        (("engine.stop", "b/p0", 2.0), "aborted", ["one execution"]),
        (("client.delay", "clients", 2.0), "aborted", ["one execution"]),
    ],
)
def test_an_overtaken_attempt_that_was_held_up_is_seen_after_the_next_one(
    fault: tuple[str, str, float], step: str, rules: list[str]
) -> None:
    tale = Tale().fault(*fault).task().send().wait(1.0).engine("arrived", "b/p0").answer()
    tale.show(log(3, pool="b/p0", attempt=2)[:2]).wait(1.0).engine("arrived").engine(step)
    tale.show(log(3, pool="b/p0", attempt=2)[2:]).engine("finished", "b/p0").closed().over()
    assert tale.rules() == rules


@pytest.mark.parametrize(
    ("resent", "late_s", "step", "rules"),
    [
        (True, 0.2, "aborted", []),
        (True, 2.8, "aborted", []),  # as late after an outage as that was long, and as observers differ by
        (True, 0.2, "finished", []),  # of a token or two, before the cancel behind it was read
        (True, 3.3, "aborted", ["one execution"]),
        (False, 0.2, "aborted", ["one execution"]),  # nothing that a proxy swallows arrives
    ],
)
def test_what_was_sent_to_a_node_that_was_cut_off_arrives_once_the_network_is_whole(
    resent: bool, late_s: float, step: str, rules: list[str]
) -> None:
    tale = Tale().fault("link.partition", "b", 2.0, resent=resent).task().send().wait(1.1).engine("arrived").answer()
    tale.show(log(3, attempt=2)).engine("finished").closed().over().wait(0.8 + late_s)
    assert tale.engine("arrived", "b/p0").wait(0.04).engine(step, "b/p0").rules() == rules


@pytest.mark.parametrize(("for_s", "rules"), [(3.0, []), (9.0, ["fence"])])
def test_an_overtaken_attempt_ends_soon_after_its_node_is_back(for_s: float, rules: list[str]) -> None:
    tale = Tale().task().send().engine("arrived").fault("link.half_open", "a", 1.0).wait(0.5).engine("arrived", "b/p0")
    tale.answer().show(log(3, pool="b/p0", attempt=2)).engine("finished", "b/p0").closed().over()
    assert tale.wait(for_s).engine("aborted").rules() == rules


@pytest.mark.parametrize(("dead", "rules"), [(True, []), (False, ["fence"])])
def test_an_engine_that_dies_as_it_was_told_to_has_ended_all_that_it_ran(dead: bool, rules: list[str]) -> None:
    """Its node lets it rest for a while: the next one serves long after."""
    tale = Tale().task(model="odd", script="die@0").send().engine("arrived", "a/p1")
    if dead:
        tale.engine("dead", "a/p1", marker=None)
    tale.engine("arrived", "a/p1", pid=12)
    tale.answer().show(log(3, pool="a/p1", attempt=2)).engine("finished", "a/p1", pid=12).closed().over()
    assert tale.wait(9.0).engine("serving", "a/p1", pid=13, marker=None).rules() == rules


@pytest.mark.parametrize(("for_s", "rules"), [(0.5, []), (3.0, ["fence"])])
def test_an_overtaken_attempt_ends_at_once_where_the_next_one_runs(for_s: float, rules: list[str]) -> None:
    tale = Tale().task().send().engine("arrived").fault("link.cut", "a").wait(0.5).engine("arrived")
    tale.wait(for_s).engine("aborted")
    tale.answer().show(log(3, attempt=2)).engine("finished").closed().over()
    assert tale.rules() == rules


def test_more_requests_at_an_engine_than_it_has_slots() -> None:
    for for_s, rules in ((0.2, []), (4.0, ["slots"])):
        tale = Tale()
        for marker in ("k1", "k2", "k3"):
            tale.task(marker).send().engine("arrived").answer().show(log(3)).closed().over()
        tale.wait(for_s)
        for marker in ("k1", "k2", "k3"):
            tale.engine("finished", marker=marker)
        assert tale.rules() == rules


def test_more_claims_than_slots_at_the_control() -> None:
    tale = Tale().whole().note("sample", pools={**WHOLE, "a/p0": [2, 0, 3, True, "ready"]})
    assert tale.rules() == ["slots"]
    tale = Tale().whole().note("sample", pools={**WHOLE, "a/p0": [0, 0, 2, False, "starting"]})
    assert tale.rules() == []  # its engine has died under two tasks
    tale = Tale().whole().note("sample", pools={**WHOLE, "a/p0": [0, 1, 0, False, "starting"]})
    assert tale.rules() == ["slots"]


def test_another_body_under_a_key_is_refused() -> None:
    for status, code, rules in ((422, "IDEMPOTENCY_MISMATCH", []), (200, None, ["mismatch"])):
        events = log(3)
        tale = begun(key="key").show(events[:2]).ask("mismatch", status, code).show(events[2:])
        assert done(tale).rules() == rules


# ---------------------------------------------------------------- engines whose agent went


def agent_gone(*, keeps: bool, before: list[int], after: list[int], hit: str | None = None) -> Tale:
    tale = Tale().whole().note("life", node="a", number=1, keeps=keeps).fault("node.kill", "a", 1.0)
    tale.note("went", node="a", keeps=keeps, engines={"a/p0": before, "a/p1": [11]})
    if hit is not None:
        tale.fault("engine.kill", hit)
    tale.wait(1.0).note("life", node="a", number=2, keeps=keeps)
    return tale.note("back", node="a", engines={"a/p0": after, "a/p1": [11] if keeps else [12]})


@pytest.mark.parametrize(
    ("keeps", "before", "after", "rules"),
    [
        (True, [10], [10], []),
        (True, [10], [13], ["engines"]),  # loaded anew
        (True, [10], [10, 13], ["engines"]),
        (True, [10], [], ["engines"]),
        (True, [], [13], []),  # there was none yet
        (False, [10], [13], []),
        (False, [10], [10, 13], ["engines"]),  # an orphan
        (False, [10], [10], ["engines"]),
    ],
)
def test_an_engine_whose_agent_went_is_taken_over_or_ends_as_its_life_has_it(
    keeps: bool, before: list[int], after: list[int], rules: list[str]
) -> None:
    assert agent_gone(keeps=keeps, before=before, after=after).rules() == rules


def test_an_engine_that_was_hit_itself_need_not_be_taken_over() -> None:
    tale = agent_gone(keeps=True, before=[10], after=[13], hit="a/p0")
    assert tale.rules() == []
    assert judge(tale.entries).engines == {"hit itself": 1, "taken over": 1}
    assert agent_gone(keeps=True, before=[10], after=[13], hit="a/p1").rules() == ["engines"]


def test_an_agent_that_goes_again_before_its_return_was_noticed_is_judged_by_its_last_going() -> None:
    tale = agent_gone(keeps=True, before=[10], after=[10]).note("went", node="a", keeps=False, engines={"a/p0": [10]})
    tale.note("back", node="a", engines={"a/p0": [10]})
    assert tale.rules() == []
    again = tale.note("life", node="a", number=3, keeps=True).note("back", node="a", engines={"a/p0": [13]})
    assert again.rules() == []
    assert judge(again.entries).engines == {"taken over": 2, "ended with its agent": 1}


def test_a_process_that_does_not_end_when_it_is_told_to() -> None:
    for left, rules in (({}, []), ({"4711": ["python"]}, ["left over"])):
        assert Tale().whole().note("ended", asked=1, left=left).rules() == rules


# ---------------------------------------------------------------- what is left


@pytest.mark.parametrize(
    "left",
    [
        {"pools": {**WHOLE, "a/p0": [2, 2, 1, True, "ready"]}},
        {"pools": {**WHOLE, "a/p0": [2, 1, 0, True, "ready"]}},
        {"pools": {**WHOLE, "b/p0": [2, 0, 0, False, "ready"]}},
        {"pools": {pool: WHOLE[pool] for pool in POOLS if pool != "a/p0"}},
        {"queued": 1},
        {"tasks": ["id"]},
        {"engines": {**dict.fromkeys(POOLS, 1), "a/p0": 2}},
        {"strangers": [4711]},
    ],
)
def test_what_is_left_over(left: dict[str, object]) -> None:
    rules = Tale().whole().rules(**left)
    assert set(rules) == {"left over"}


def test_an_engine_that_runs_on_after_all_is_over() -> None:
    tale = begun().show(log(3)).closed().over()
    assert tale.rules() == ["left over"]
    given_up = {
        "pools": {**WHOLE, "a/p0": [0, 0, 0, False, "failed"]},
        "engines": dict.fromkeys(POOLS, 1) | {"a/p0": 0},
    }
    assert begun().show(log(3)).closed().over().rules(**given_up) == []


def test_a_task_that_does_not_end() -> None:
    assert begun().show(log(3)[:2]).engine("finished").wait(40.0).closed("left").over("abandoned").rules() == ["stuck"]


# ---------------------------------------------------------------- runs that show nothing


def test_a_run_that_is_slow_or_was_not_brought_to_its_end_is_invalid() -> None:
    tale = Tale().whole()
    tale.entries[0]["promises"] = {**tale.entries[0]["promises"], "min_rate": 3.0}
    assert [reason for reason in judge(tale.end().entries).invalid if "tasks/s" in reason]
    assert judge(Tale().whole().entries).invalid == ["the run was not brought to its end"]


def test_a_run_in_which_most_tasks_fail_is_invalid() -> None:
    verdict = judge(failed("NODE_LOST").end().entries)
    assert verdict.invalid
    assert not verdict.passed


def test_an_honest_node_is_never_struck() -> None:
    assert Tale().whole().note("struck", line="node.struck node_id=a kind=false_slots").rules() == ["struck"]


def test_an_engine_that_dies_as_told_after_it_was_taken_over_is_not_missed() -> None:
    tale = Tale().note("went", node="a", keeps=True, engines={"a/p0": [PIDS["a/p0"]]})
    tale.engine("dead", marker=None).note("back", node="a", engines={"a/p0": []})
    assert tale.whole().rules() == []


def test_no_role_logs_a_bug_of_its_own() -> None:
    assert Tale().whole().note("bug", line="a.log: ERROR task.fault: KeyError").rules() == ["bug"]


def test_what_a_role_logs_of_its_own_bugs_is_found(tmp_path: Path) -> None:
    (tmp_path / "a-1.log").write_text(
        "2026-11-30T07:00:00.000Z WARNING reader.lost task_id=t\n"
        "2026-11-30T07:00:01.000Z ERROR engine.gone node_id=a\n"  # an error, and no bug: it has no traceback
        "2026-11-30T07:00:02.000Z ERROR task.fault task_id=t\n"
        '  File "llorch/control/dispatch.py", line 1, in run\n    run()\nKeyError\n'
        "2026-11-30T07:00:03.000Z INFO task.ended task_id=t\n"
    )
    found = ["a-1.log: 2026-11-30T07:00:02.000Z ERROR task.fault task_id=t: KeyError"]
    assert bugs_logged(tmp_path) == found
