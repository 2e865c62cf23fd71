"""What a pid file says, and what it proves: no word of it is believed that the kernel does not confirm."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.node.engine_record import Facts, Left, Named, Record, Verdict, judge, parse

WIRE: dict[str, Any] = {
    "pid": 100, "start_time": 7, "argv_digest": "d", "port": 8000, "api_key_file": "/k", "log": "/l",
    "shim": {"pid": 99, "start_time": 6}, "agent": {"pid": 98, "start_time": 5}, "meta": {"model": "m"}, "new": 1,
}  # fmt: skip
RECORD = Record(Named(100, 7), Named(99, 6), Named(98, 5), "d", 8000, "/k", {"model": "m"})
FACTS = Facts(engine_started=7, engine_parent=99, engine_digest="d", shim_started=6)
NOBODY = frozenset[int]()


def wire(**changes: Any) -> bytes:
    return json.dumps(WIRE | changes).encode()


def test_a_pid_file_is_read_and_fields_of_a_later_version_are_passed_over() -> None:
    assert parse(wire(), NOBODY) == RECORD
    left = Left("p-r0.json", Verdict.OURS, "", RECORD)
    assert (left.pid, left.port, left.meta) == (100, 8000, {"model": "m"})


def test_a_pid_of_null_is_the_handoff_of_an_engine_that_somebody_else_runs() -> None:
    record = parse(b'{"pid": null}', NOBODY)
    assert record.engine is None and judge(record, Facts())[0] is Verdict.GONE


def test_one_that_an_older_version_wrote_has_no_shim() -> None:
    raw = json.dumps({key: WIRE[key] for key in list(WIRE)[:6]}).encode()
    record = parse(raw, NOBODY)
    assert (record.shim, record.agent, record.meta) == (None, None, {})
    assert judge(record, FACTS)[0] is Verdict.UNTENDED
    assert judge(record, replace(FACTS, engine_started=None))[0] is Verdict.GONE


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 1}, {"pid": 0}, {"pid": -5}, {"pid": True}, {"pid": "100"}, {"pid": 1.0}, {"pid": 2**31}, {"pid": []},
        {"start_time": None}, {"start_time": -1}, {"start_time": "7"}, {"port": 0}, {"port": 70_000}, {"port": "80"},
        {"port": True}, {"api_key_file": None}, {"api_key_file": 3}, {"meta": []}, {"pid": 50},
    ],
)  # fmt: skip
def test_one_with_a_field_that_can_not_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        parse(wire(**changes), frozenset({50}))


@pytest.mark.parametrize("shim", [None, 7, {"pid": 1, "start_time": 6}, {"pid": 50, "start_time": 6}, {"pid": 99}])
def test_a_shim_that_can_not_be_is_none(shim: Any) -> None:
    assert parse(wire(shim=shim), frozenset({50})).shim is None


@given(st.binary(max_size=40) | st.text(alphabet='{}[]":,0123456789-eE. ntrufalsepid', max_size=40))
def test_whatever_is_in_a_file_is_a_record_or_a_value_error(raw: bytes | str) -> None:
    raw = raw.encode() if isinstance(raw, str) else raw
    try:
        parse(raw, NOBODY)
    except ValueError:
        pass


@given(st.sampled_from(sorted(WIRE)), st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just([1]))
def test_whatever_one_field_is_nobody_is_named_that_must_not_be(name: str, value: Any) -> None:
    try:
        record = parse(wire(**{name: value}), frozenset({50}))
    except ValueError:
        return
    for named in (record.engine, record.shim):
        assert named is None or (named.pid > 1 and named.pid != 50)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, Verdict.OURS),
        ({"engine_started": None}, Verdict.GONE),
        ({"engine_started": 8}, Verdict.STRANGER),
        ({"engine_digest": "e"}, Verdict.STRANGER),
        ({"engine_digest": None}, Verdict.STRANGER),
        ({"engine_parent": 1}, Verdict.STRANGER),
        ({"engine_parent": None}, Verdict.STRANGER),
        ({"shim_started": None}, Verdict.UNTENDED),
        ({"shim_started": 7}, Verdict.UNTENDED),
        ({"shim_started": None, "engine_digest": "e"}, Verdict.STRANGER),
        ({"shim_started": None, "engine_started": 8}, Verdict.STRANGER),
        ({"shim_started": None, "engine_started": None}, Verdict.GONE),
    ],
)
def test_only_what_the_kernel_confirms_in_every_point_is_ours(changes: dict[str, Any], verdict: Verdict) -> None:
    assert judge(RECORD, replace(FACTS, **changes))[0] is verdict
