"""A lost stream: how long it is looked for, how fast, and what ends the search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.client.events import Queued, Token, server_error
from llorch.client.faults import StreamBroken, Unreachable
from llorch.client.resume import FIND_FOR_S, HELD_S, MAX_OUTAGES, MOST_RETRY_AFTER_S, RESUME_FOR_S, Place, delay_s
from llorch.errors import Code

TASK = "00000000-0000-4000-8000-000000000001"
QUEUED = Queued(wire={}, position=1, eta_ms=None)


def token(index: int, id: str | None = None) -> Token:
    return Token(wire={"t": "x", "i": index}, id=id or f"{index + 1:012x}", text="x", index=index)


def place() -> Place:
    return Place("http://control", TASK)


def patience_s(known: Place, *, start_s: float = 100.0, answer_s: float = 0.0, taken: bool = False) -> float:
    """For how long it is looked for, where every attempt fails after `answer_s`."""
    now = start_s
    for _ in range(10_000):
        known.asked(now)
        now += answer_s
        delay = known.delay_s(known.lost(now, taken=taken), 0.5, None)
        if delay is None:
            return now - start_s - answer_s
        now += delay
    raise AssertionError("it is looked for without end")


def test_a_task_that_is_known_is_looked_for_longer_than_one_of_which_nothing_came() -> None:
    nothing, accepted, queued, begun = place(), place(), place(), place()
    accepted.accepted(TASK)
    queued.moved(QUEUED)
    begun.moved(token(0))
    assert patience_s(nothing) == pytest.approx(FIND_FOR_S, abs=1.5)
    for known in (accepted, queued, begun):
        assert patience_s(known) == pytest.approx(RESUME_FOR_S, abs=1.5)


def test_nothing_came_is_given_the_recovery_window_and_a_restart() -> None:
    assert FIND_FOR_S > 15 + 3, "a control is back within three seconds, and has 15 s to hear of its nodes"


def test_each_outage_has_its_own_time_where_something_came_between() -> None:
    known = place()
    for index in range(50):
        assert known.moved(token(index))
        known.asked(index * 50.0)
        since_s = known.lost(index * 50.0, taken=True)
        assert (since_s, known.delay_s(since_s, 0.5, None) is None) == (0.0, False)


def test_a_request_that_was_held_was_taken_and_its_loss_is_another_outage() -> None:
    waiting = place()
    assert patience_s(waiting, answer_s=HELD_S * 4, taken=True) > RESUME_FOR_S * 2
    assert patience_s(place(), answer_s=HELD_S * 4, taken=False) <= FIND_FOR_S + HELD_S * 4
    assert patience_s(place(), answer_s=HELD_S / 2, taken=True) <= FIND_FOR_S + HELD_S


def test_outages_without_an_event_between_them_come_to_an_end() -> None:
    assert patience_s(place(), answer_s=HELD_S, taken=True) <= (MAX_OUTAGES + 1) * (HELD_S + 1)


@given(failures=st.integers(1, 10_000), chance=st.floats(0, 0.999))
def test_whoever_waits_for_a_control_asks_at_least_once_a_second(failures: int, chance: float) -> None:
    assert 0.05 <= delay_s(failures, chance, None) <= 1.0
    assert 0.05 <= delay_s(failures, chance, 0) <= 1.0


@given(failures=st.integers(1, 20), chance=st.floats(0, 0.999), asked_ms=st.integers(0, 10**9))
def test_a_peer_that_names_a_time_is_heeded_within_reason_and_not_by_all_at_once(
    failures: int, chance: float, asked_ms: int
) -> None:
    waited = delay_s(failures, chance, asked_ms)
    assert waited >= min(asked_ms / 1_000, MOST_RETRY_AFTER_S)
    assert waited <= MOST_RETRY_AFTER_S * 1.25
    if asked_ms >= 1_000:
        assert delay_s(1, 0.9, asked_ms) > delay_s(1, 0.1, asked_ms)


def test_ids_are_offsets_and_an_event_that_was_there_is_not_shown_again() -> None:
    known = place()
    assert known.moved(token(0, "00000000000f"))
    assert not known.moved(token(0, "00000000000f"))
    assert not known.moved(token(0, "00000000000a"))
    assert known.moved(token(1, "000000000010"))
    assert known.last == "000000000010"


def test_a_token_that_is_missing_or_comes_twice_breaks_the_stream_at_its_place() -> None:
    for wrong in (0, 2):
        known = place()
        known.moved(token(0, "000000000010"))
        with pytest.raises(StreamBroken, match="not what the node wrote"):
            known.moved(token(wrong, "000000000020"))


def test_what_a_refusal_means_depends_on_how_far_the_task_had_come() -> None:
    new, accepted, begun = place(), place(), place()
    accepted.accepted(None)
    begun.moved(token(0))
    verdicts = {
        code: "".join(
            "wait " if each.may_wait(server_error({"code": code.value})) else "end " for each in (new, accepted, begun)
        )
        for code in Code
    }
    for code in (Code.RECOVERING, Code.DRAINING):
        assert verdicts.pop(code) == "wait wait wait "
    for code in (Code.QUEUE_FULL, Code.RATE_LIMITED, Code.NO_CAPACITY, Code.MODEL_NOT_AVAILABLE, Code.TASK_NOT_FOUND):
        assert verdicts.pop(code) == "end wait wait "
    assert verdicts.pop(Code.MODEL_NOT_FOUND) == "end wait end "
    for code, verdict in verdicts.items():
        lasting = "wait" if server_error({"code": code.value}).retriable else "end"
        assert verdict == f"end end {lasting} ", code


def test_what_a_stream_has_come_to_says_how_its_task_is_found() -> None:
    new, begun, odd = place(), place(), place()
    begun.moved(token(0))
    odd.moved(token(0, "; rm -rf /"))
    assert isinstance(new.fault("gone"), Unreachable)
    assert new.fault("gone").hint == f"the task may be running: llorch task show {TASK}"
    assert isinstance(begun.fault("gone"), StreamBroken)
    left = "what is left may still be there: llorch task logs"
    assert begun.fault("gone").hint == f"{left} {TASK} --after 000000000001"
    assert odd.fault("gone").hint == f"{left} {TASK}", "a hint is typed, so it holds no words of a peer's"
