"""What one principal may ask for, and how often an address may fail."""

from __future__ import annotations

import pytest

from llorch.auth import ADMIN_SCOPES, CLIENT_SCOPES, Principal, Scope
from llorch.errors import Code, LlorchError
from llorch.quotas import BYTES_PER_TOKEN, TOKENS_OUT, Limit, Quotas, Rates
from llorch.web import error_headers

ALICE, BOB = Principal("alice", CLIENT_SCOPES), Principal("bob", CLIENT_SCOPES)
NOW = 1_000.0


def refusal(call: object, *args: object) -> LlorchError:
    with pytest.raises(LlorchError) as caught:
        call(*args)  # type: ignore[operator]
    assert (caught.value.code, caught.value.status) == (Code.RATE_LIMITED, 429)
    return caught.value


def test_requests_beyond_the_rate_are_told_when_the_next_one_passes() -> None:
    seen: list[Limit] = []
    quotas = Quotas(Rates(requests_per_s=10), seen.append)
    for _ in range(20):  # two seconds' worth at once
        quotas.request(ALICE, NOW)
    error = refusal(quotas.request, ALICE, NOW)
    assert error.retry_after_ms == 100
    assert error_headers(error) == {"Retry-After": "1", "X-Backoff-Ms": "100"}
    assert error.details == {"limit": "requests"}
    assert seen == [Limit.REQUESTS]
    refusal(quotas.request, ALICE, NOW + 0.099)
    quotas.request(ALICE, NOW + 0.1)
    quotas.request(BOB, NOW)


@pytest.mark.parametrize("scope", [Scope.NODE, Scope.CONTROL])
def test_nodes_and_controls_have_no_rate(scope: Scope) -> None:
    quotas = Quotas(Rates(requests_per_s=1))
    for _ in range(1_000):
        quotas.request(Principal("default", frozenset({scope})), NOW)
    for _ in range(2):
        quotas.request(Principal("default", ADMIN_SCOPES), NOW)
    refusal(quotas.request, Principal("default", ADMIN_SCOPES), NOW)


def test_an_address_may_fail_so_often_a_minute_and_a_prefix_counts_as_one() -> None:
    quotas = Quotas(Rates(failures_per_min=60))
    for last in range(60):
        quotas.failed(f"2001:db8::{last}", NOW)
    assert refusal(quotas.failed, "2001:db8::ffff", NOW).retry_after_ms == 1_000
    quotas.failed("2001:db8:0:1::1", NOW)
    quotas.failed("192.0.2.1", NOW)
    quotas.failed("2001:db8::1", NOW + 1)


def test_answers_at_a_time_are_counted_by_principal_and_freed_however_they_end() -> None:
    quotas = Quotas(Rates(streams=2))
    with quotas.stream("alice"), pytest.raises(ZeroDivisionError), quotas.stream("alice"):
        error = refusal(quotas.stream("alice").__enter__)
        assert error.details == {"limit": "streams"}
        assert error.retry_after_ms == 1_000
        with quotas.stream("bob"):
            raise ZeroDivisionError
    with quotas.stream("alice"), quotas.stream("alice"):
        refusal(quotas.stream("alice").__enter__)
    assert quotas._streams == {}


def test_a_task_is_charged_an_estimate_and_then_what_it_took() -> None:
    quotas = Quotas(Rates(tokens_per_min=1_000))
    quotas.charge("t1", "alice", 100 * BYTES_PER_TOKEN, 500, NOW)
    quotas.charge("t2", "alice", 0, 400, NOW)
    assert refusal(quotas.charge, "t3", "alice", 0, 100, NOW).retry_after_ms == 6_000
    quotas.settle("t1", 150, NOW)  # of 600
    quotas.charge("t3", "alice", 0, 450, NOW)
    refusal(quotas.charge, "t4", "alice", 0, 1, NOW)
    quotas.settle("t1", 150, NOW)  # once is enough
    refusal(quotas.charge, "t4", "alice", 0, 1, NOW)
    quotas.charge("t4", "bob", 0, 1_000, NOW)


def test_a_task_that_took_more_than_was_thought_is_paid_for_by_the_next() -> None:
    quotas = Quotas(Rates(tokens_per_min=600))
    quotas.charge("t1", "alice", 0, 100, NOW)
    quotas.settle("t1", 1_200, NOW)  # two minutes' worth
    assert refusal(quotas.charge, "t2", "alice", 0, 1, NOW).retry_after_ms == 60_100


def test_what_nobody_could_count_stays_charged_and_what_never_ran_is_given_back() -> None:
    quotas = Quotas(Rates(tokens_per_min=1_000))
    quotas.charge("t1", "alice", 0, None, NOW)
    quotas.settle("t1", None, NOW)
    refusal(quotas.charge, "t2", "alice", 0, 1_000 - TOKENS_OUT + 1, NOW)
    quotas.charge("t2", "alice", 0, 1_000 - TOKENS_OUT, NOW)
    quotas.settle("t2", 0, NOW)
    quotas.charge("t3", "alice", 0, 1_000 - TOKENS_OUT, NOW)


def test_a_task_larger_than_a_minute_is_taken_in_when_the_minute_is_unused() -> None:
    quotas = Quotas(Rates(tokens_per_min=1_000))
    quotas.charge("t1", "alice", 0, 1_000_000, NOW)
    assert refusal(quotas.charge, "t2", "alice", 0, 1_000_000, NOW).retry_after_ms == 60_000
    quotas.settle("t1", 1_000, NOW)
    assert refusal(quotas.charge, "t2", "alice", 0, 1_000_000, NOW).retry_after_ms == 60_000


def test_without_rates_nothing_is_refused_and_nothing_kept() -> None:
    quotas = Quotas()
    for number in range(1_000):
        quotas.request(ALICE, NOW)
        quotas.failed("192.0.2.1", NOW)
        quotas.charge(f"t{number}", "alice", 1 << 30, None, NOW)
        with quotas.stream("alice"):
            pass
    assert quotas._charged == {}
    assert quotas._streams == {}


def test_other_rates_hold_from_now_on_and_answers_stay_counted() -> None:
    quotas = Quotas(Rates(requests_per_s=1))
    with quotas.stream("alice"):
        quotas.adopt(Rates(streams=1))
        refusal(quotas.stream("alice").__enter__)
        for _ in range(10):
            quotas.request(ALICE, NOW)
    with quotas.stream("alice"):
        pass
