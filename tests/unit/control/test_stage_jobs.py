from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.control.stage_choices import DIGEST_WITHIN_S, OWN_DIGEST_WITHIN_S, SOURCE_FOR_S
from llorch.control.stage_jobs import (
    ABSENT_S,
    ENDED_KEPT_S,
    MAX_JOB_S,
    MAX_JOBS,
    MOST_ASKED,
    OFFLINE_FOR_S,
    ORDER_TRIES,
    SETTLES_S,
    StageJobs,
)
from llorch.control.stage_shares import STALLS_S, Job, Order, Pace, Phase, job_view
from llorch.control.stage_sources import MOST_PER_SOURCE, Machine, resolve
from llorch.errors import Code, LlorchError
from llorch.messages import ModelReport
from llorch.wishes import StageAnswer

REF, ID = "hf:org/repo:Q4_K_M", "org/repo:Q4_K_M"
DIGEST, OTHER = "ab" * 32, "cd" * 32
SIZE = 1_000_000


def report(state: str = "staged", **more: Any) -> ModelReport:
    digest = {"sha256": DIGEST} if state == "staged" else {}
    return ModelReport.model_validate({"id": ID, "ref": REF, "size_bytes": SIZE, "state": state} | digest | more)


@dataclass
class World:
    """Machines as the control knows them, one job, and the orders that came out and were not answered yet."""

    machines: dict[str, Machine] = field(default_factory=dict)
    jobs: StageJobs = field(default_factory=StageJobs)
    now: float = 1_000.0
    orders: list[Order] = field(default_factory=list)

    def add(self, *names: str, address: bool = True, **more: Any) -> World:
        for number, name in enumerate(names):
            url = f"http://10.0.0.{len(self.machines) + number + 1}:9200" if address else None
            self.machines[name] = Machine(
                name, True, **{"lease_id": f"{name}-1", "url": url, "peer": "10.0.0.9", "catalog": {}} | more
            )
        return self

    def change(self, name: str, **fields: Any) -> None:
        self.machines[name] = replace(self.machines[name], **fields)

    def reports(self, name: str, *listed: ModelReport) -> None:
        self.change(name, catalog={each.id: each for each in listed})

    def job(self, text: str = REF, nodes: Iterable[str] = (), source: str | None = None, everyone: bool = True) -> Job:
        named = list(nodes) or list(self.machines)
        job = self.jobs.create(
            f"job-{len(self.jobs.all)}",
            resolve(text, self.machines, source),
            {name: self.machines[name].online for name in named},
            everyone=everyone,
            now=self.now,
            wall="then",
        )
        self.step()
        return job

    def step(self, after_s: float = 0.0) -> list[Order]:
        """Time passes; the orders that come out now."""
        self.now += after_s
        new = self.jobs.step(self.now, self.machines)
        self.orders += new
        return new

    def taken(self, order: Order, state: str = "staging", **more: Any) -> None:
        self.orders.remove(order)
        answer = StageAnswer.model_validate({"model": ID, "state": state} | more)
        self.jobs.answered(order, answer, self.machines.get(order.node_id), self.now)

    def refused(self, order: Order, code: Code) -> None:
        self.orders.remove(order)
        self.jobs.refused(order, LlorchError(code, "no"), self.now)

    def asked(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(order.node_id, order.sources) for order in self.orders]


def phases(job: Job) -> dict[str, str]:
    return {name: share.phase.value for name, share in job.shares.items()}


# ---------------------------------------------------------------- from whom


def test_one_node_fetches_from_outside_and_the_others_wait_for_it_and_then_fetch_from_it() -> None:
    world = World().add("a", "b", "c")
    job = world.job()
    assert world.asked() == [("a", ())]
    assert job.shares["b"].waits_for == "a, which fetches it for the others"
    world.taken(world.orders[0])
    world.reports("a", report("staging", progress=0.5))
    assert world.step(1) == []
    world.reports("a", report())
    world.step(1)
    assert world.asked() == [("b", ("a",)), ("c", ("a",))]
    assert world.orders[0].wanted.sha256 == DIGEST  # what the first one has, byte for byte
    for order in list(world.orders):
        world.taken(order)
        world.reports(order.node_id, report())
    world.step(1)
    assert (job.state, phases(job)) == ("done", {"a": "staged", "b": "staged", "c": "staged"})


def test_a_node_that_others_can_not_reach_does_not_fetch_for_them() -> None:
    world = World().add("a", address=False).add("b")
    world.job()
    assert world.asked() == [("b", ())]
    world = World().add("a", "b", address=False)
    world.job()
    assert world.asked() == [("a", ()), ("b", ())]


def test_a_fetch_that_stalls_or_fails_or_is_lost_is_another_nodes_to_make() -> None:
    for end in ("stalls", "fails", "lost"):
        world = World().add("a", "b")
        world.job()
        world.taken(world.orders[0])
        world.reports("a", report("staging", progress=0.1))
        world.step(1)
        if end == "fails":
            world.reports("a", report("failed", error="DIGEST: no"))
        if end == "lost":
            world.change("a", online=False)
        assert [order.node_id for order in world.step(STALLS_S - 1 if end == "stalls" else 1)] == (
            [] if end == "stalls" else ["b"]
        )
        if end == "stalls":
            assert [order.node_id for order in world.step(2)] == ["b"]
        assert world.orders[-1].sources == ()


def test_a_fetch_that_moves_is_waited_for_however_long_it_takes() -> None:
    world = World().add("a", "b")
    world.job()
    world.taken(world.orders[0])
    for step in range(50):
        world.reports("a", report("staging", progress=step / 100))
        assert world.step(STALLS_S - 1) == []


def test_no_more_than_a_few_fetch_from_one_node_at_a_time_and_each_that_has_it_serves_more() -> None:
    world = World().add("a", "b", "c", "d", "e", "f")
    world.reports("a", report())
    job = world.job(ID)
    assert world.asked() == [("b", ("a",)), ("c", ("a",))]
    assert job.shares["d"].waits_for == "a, from which others fetch it now"
    for order in list(world.orders):
        world.taken(order)
        world.reports(order.node_id, report())
    world.step(1)
    used: dict[str, int] = {}
    for _, sources in world.asked():
        used[sources[0]] = used.get(sources[0], 0) + 1
        assert len(sources) <= 3
    assert [name for name, _ in world.asked()] == ["d", "e", "f"]
    assert max(used.values()) <= MOST_PER_SOURCE and len(used) == 3


def test_a_download_that_stalls_keeps_nobody_from_its_source() -> None:
    world = World().add("a", "b", "c", "d")
    world.reports("a", report())
    world.job(ID)
    for order in list(world.orders):
        world.taken(order)
        world.reports(order.node_id, report("staging", progress=0.1))
    world.step()
    assert world.step(STALLS_S - 1) == []
    assert [order.node_id for order in world.step(2)] == ["d"]


def test_a_node_whose_digest_is_not_told_yet_is_waited_for_a_while() -> None:
    world = World().add("a", "b")
    world.job()
    world.taken(world.orders[0], "staged")
    assert world.step(DIGEST_WITHIN_S - 1) == []
    assert [order.sources for order in world.step(2)] == [()]


def test_a_node_that_has_something_under_the_id_is_asked_when_it_has_read_what_that_is() -> None:
    world = World().add("a", "b", "c")
    world.reports("a", report())
    for name in ("b", "c"):
        world.reports(name, report(sha256=None))
    job = world.job(ID)
    assert world.orders == []
    assert job.shares["b"].waits_for == "its digest of what it has under that id"
    world.reports("b", report())
    assert world.step(1) == []
    assert phases(job) == {"a": "staged", "b": "staged", "c": "waiting"}
    assert [order.node_id for order in world.step(OWN_DIGEST_WITHIN_S)] == ["c"]


def test_a_machines_own_file_is_asked_of_every_node_at_once_and_fetched_by_none() -> None:
    for ref in ("demo", "file:/models/x.gguf"):
        world = World().add("a", "b")
        world.job(ref)
        assert world.asked() == [("a", ()), ("b", ())]
        assert all(order.wanted.ref == ref and order.wanted.sha256 is None for order in world.orders)


def test_only_the_named_node_is_fetched_from() -> None:
    world = World().add("a", "b", "c")
    world.reports("a", report())
    world.reports("b", report(sha256=OTHER))
    world.job(ID, ["c"], source="b")
    assert world.asked() == [("c", ("b",))]
    assert world.orders[0].wanted.sha256 == OTHER


def test_a_node_with_other_content_under_the_id_is_not_asked_and_says_what_mends_it() -> None:
    world = World().add("a", "b")
    world.reports("a", report())
    world.reports("b", report(sha256=OTHER))
    job = world.job(ID, ["b"], source="a")
    world.step()
    error = job.shares["b"].error
    assert job.state == "failed" and world.orders == []
    assert error is not None and error.code is Code.CONFLICT
    assert error.message == f"b has other content as {ID}: sha256 {OTHER[:12]}, not {DIGEST[:12]}"
    assert error.hint == f"llorch model rm {ID} --nodes b, and stage it again"


def test_a_node_that_can_reach_none_of_those_that_have_it_fails_with_what_mends_it() -> None:
    world = World().add("a", address=False).add("b")
    world.reports("a", report(ref="file:/x.gguf"))
    job = world.job(ID, ["b"])
    error = job.shares["b"].error
    assert error is not None and error.code is Code.MODEL_NOT_AVAILABLE
    assert "can't fetch" in error.message and "--address" in str(error.hint)


def test_a_source_that_is_away_is_waited_for_and_then_given_up() -> None:
    world = World().add("a", "b")
    world.reports("a", report(ref="file:/x.gguf"))
    world.change("a", online=False)
    job = world.job(ID, ["b"])
    assert job.shares["b"].waits_for == "a, which has it, to come back"
    world.step(SOURCE_FOR_S - 1)
    assert job.state == "running"
    world.step(2)
    assert job.state == "failed"


def test_a_source_that_comes_back_is_fetched_from() -> None:
    world = World().add("a", "b")
    world.reports("a", report(ref="file:/x.gguf"))
    world.change("a", online=False)
    world.job(ID, ["b"])
    world.change("a", online=True)
    world.step(1)
    assert world.asked() == [("b", ("a",))]


# ---------------------------------------------------------------- what is reported


def test_a_node_that_has_it_already_is_not_asked() -> None:
    world = World().add("a", "b")
    for name in ("a", "b"):
        world.reports(name, report())
    job = world.job(ID)
    assert (job.state, world.orders) == ("done", [])


def test_a_report_from_before_the_order_says_nothing_of_it() -> None:
    world = World().add("a")
    old = report("failed", error="disk full")
    world.reports("a", old)
    job = world.job()
    world.taken(world.orders[0])
    world.step(1)
    assert phases(job) == {"a": "staging"}
    world.reports("a", report("failed", error="disk full"))  # sent before the order came, heard after it was taken
    world.step(SETTLES_S / 4)
    assert phases(job) == {"a": "staging"}
    world.reports("a", report("failed", error="disk full"))
    world.step(SETTLES_S)
    assert phases(job) == {"a": "failed"}


def test_what_a_node_says_of_its_failure_is_read_as_a_code_where_it_begins_with_one() -> None:
    for told, code, message, retriable in (
        ("INSUFFICIENT_STORAGE: 2 GiB are free, 5 GiB are needed", Code.INSUFFICIENT_STORAGE, "2 GiB are free", True),
        ("the origin answered 404", Code.MODEL_NOT_AVAILABLE, "the origin answered 404", True),
        ("NONE_OF_OURS: x", Code.MODEL_NOT_AVAILABLE, "NONE_OF_OURS: x", True),
        (None, Code.MODEL_NOT_AVAILABLE, "does not say why", True),
    ):
        world = World().add("a")
        job = world.job()
        world.taken(world.orders[0])
        world.reports("a", report("failed", error=told))
        world.step(1)
        error = job.shares["a"].error
        assert error is not None and (error.code, error.retriable) == (code, retriable)
        assert message in error.message and error.hint


def test_what_a_node_answers_is_how_far_it_is_until_it_reports() -> None:
    world = World().add("a", "b")
    world.reports("b", report())
    job = world.job(ID, ["a"])
    world.taken(world.orders[0], progress=0.4)
    shown = job_view(job, world.now)["nodes"]["a"]
    assert (shown["progress"], shown["bytes_done"], shown["bytes_total"]) == (0.4, 400_000, SIZE)


def test_progress_and_speed_are_what_the_reports_and_this_controls_clock_say() -> None:
    world = World().add("a")
    job = world.job()
    world.taken(world.orders[0])
    for progress in (0.1, 0.2, 0.3):
        world.reports("a", report("staging", progress=progress))
        world.step(1)
    shown = job_view(job, world.now)["nodes"]["a"]
    assert (shown["progress"], shown["bytes_done"], shown["bytes_total"]) == (0.3, 300_000, SIZE)
    assert shown["bytes_per_s"] == pytest.approx(100_000, rel=0.01)
    world.step(60)
    assert job_view(job, world.now)["nodes"]["a"]["bytes_per_s"] == 0


def test_a_speed_is_of_the_last_seconds_and_begins_anew_when_bytes_are_gone() -> None:
    pace = Pace()
    assert pace.bytes_per_s(0.0) is None
    for second in range(100):
        pace.heard(second * 10 if second < 50 else 500 + (second - 50) * 100, float(second))
    assert pace.bytes_per_s(99.0) == pytest.approx(100)
    pace.heard(5, 100.0)
    assert pace.bytes_per_s(100.0) is None


def test_a_model_that_a_node_reports_nothing_of_is_asked_for_again_and_given_up_in_the_end() -> None:
    world = World().add("a")
    job = world.job()
    asked = 0
    while world.orders:
        asked += 1
        world.taken(world.orders[0])
        assert world.step(ABSENT_S - 1) == []
        world.step(2)
    error = job.shares["a"].error
    assert asked == ORDER_TRIES and error is not None and "reports nothing of it" in error.message


def test_a_node_that_was_heard_of_again_has_all_its_tries_again() -> None:
    world = World().add("a")
    job = world.job()
    for _ in range(ORDER_TRIES - 1):
        world.refused(world.orders[0], Code.NODE_LOST)
        world.step(40)
    world.taken(world.orders[0])
    world.reports("a", report("staging", progress=0.1))
    world.step(1)
    world.reports("a")
    assert [order.node_id for order in world.step(ABSENT_S + 1)] == ["a"]
    assert job.state == "running"


def test_two_origins_that_give_different_bytes_are_a_conflict() -> None:
    world = World().add("a", "b", address=False)
    job = world.job()
    for order in list(world.orders):
        world.taken(order)
    world.reports("a", report())
    world.step(1)
    world.reports("b", report(sha256=OTHER))
    world.step(1)
    error = job.shares["b"].error
    assert job.state == "failed" and error is not None and error.code is Code.CONFLICT


# ---------------------------------------------------------------- losses and refusals


def test_a_node_that_registers_again_is_asked_again_at_once_and_goes_on() -> None:
    world = World().add("a", "b")
    job = world.job()
    world.taken(world.orders[0])
    world.reports("a", report("staging", progress=0.5))
    world.step(1)
    world.change("a", lease_id="a-2")
    assert [order.node_id for order in world.step(1)] == ["a"]
    assert phases(job) == {"a": "waiting", "b": "waiting"}


def test_a_node_that_is_lost_and_comes_back_is_asked_again_and_one_that_stays_away_has_failed() -> None:
    world = World().add("a")
    job = world.job()
    world.taken(world.orders[0])
    world.change("a", online=False)
    world.step(1)
    assert phases(job) == {"a": "offline"}
    assert job.shares["a"].waits_for == "it to come back"
    world.change("a", online=True, lease_id="a-2")
    assert [order.node_id for order in world.step(10)] == ["a"]
    world.taken(world.orders[0])
    world.change("a", online=False)
    world.step(1)
    world.step(OFFLINE_FOR_S)
    error = job.shares["a"].error
    assert job.state == "failed" and error is not None and error.code is Code.NODE_LOST and error.retriable


def test_an_answer_that_comes_when_its_node_was_lost_is_no_answer() -> None:
    world = World().add("a")
    job = world.job()
    world.change("a", online=False)
    world.step(1)
    world.taken(world.orders[0])
    assert phases(job) == {"a": "offline"}
    world.change("a", online=True)
    assert len(world.step(1)) == 1


def test_nodes_that_are_offline_are_passed_over_by_all_and_taken_in_when_they_come_back() -> None:
    world = World().add("a", "b")
    world.change("b", online=False)
    job = world.job()
    assert phases(job) == {"a": "waiting", "b": "offline"}
    assert job_view(job, world.now)["offline"] == ["b"]
    world.change("b", online=True)
    world.step(1)
    assert job_view(job, world.now)["offline"] == []
    assert phases(job)["b"] == "waiting"
    world = World().add("a", "b")
    world.change("b", online=False)
    world.reports("a", report())
    job = world.job(ID)
    assert job.state == "done" and job_view(job, world.now)["offline"] == ["b"]


def test_a_node_that_was_named_is_waited_for_though_it_is_offline() -> None:
    world = World().add("a")
    world.change("a", online=False)
    job = world.job(REF, ["a"], everyone=False)
    assert (job.state, job_view(job, world.now)["offline"]) == ("running", [])


def test_a_node_that_can_not_be_asked_is_asked_a_few_times_and_one_that_refuses_is_not() -> None:
    world = World().add("a")
    job = world.job()
    asked = 0
    while world.orders:
        asked += 1
        world.refused(world.orders[0], Code.NODE_LOST)
        if job.state == "running" and asked < ORDER_TRIES:
            assert str(job.shares["a"].waits_for).startswith("the next time it is asked")
        world.step(40)
    assert (asked, job.state) == (ORDER_TRIES, "failed")
    world = World().add("a")
    job = world.job()
    world.refused(world.orders[0], Code.INSUFFICIENT_STORAGE)
    world.step(1)
    assert job.state == "failed"


def test_what_was_removed_meanwhile_is_not_asked_for_again() -> None:
    world = World().add("a")
    job = world.job()
    world.taken(world.orders[0])
    world.jobs.removed("a", ID, world.now)
    world.step(1)
    error = job.shares["a"].error
    assert error is not None and error.code is Code.CANCELED


# ---------------------------------------------------------------- bounds


def test_the_same_wish_is_the_same_job_while_it_runs() -> None:
    world = World().add("a", "b")
    job = world.job()
    assert world.job() is job
    assert world.job(REF, ["a"]) is not job


def test_no_job_begins_where_no_node_is_online() -> None:
    world = World().add("a")
    world.change("a", online=False)
    with pytest.raises(LlorchError) as refused:
        world.job()
    assert refused.value.code is Code.NO_CAPACITY


def test_ended_jobs_are_forgotten_after_a_while_and_earlier_for_new_ones_and_running_ones_never() -> None:
    world = World().add("a")
    world.reports("a", report())
    first = world.job(ID)
    assert first.state == "done"
    world.step(ENDED_KEPT_S + 1)
    assert world.jobs.get(first.job_id) is None
    world = World().add(*(f"n{number}" for number in range(MAX_JOBS + 1)))
    for number in range(MAX_JOBS):
        world.job(REF, [f"n{number}"])
    with pytest.raises(LlorchError) as refused:
        world.job(REF, [f"n{MAX_JOBS}"])
    assert refused.value.code is Code.QUEUE_FULL
    world.refused(world.orders[0], Code.INVALID_REQUEST)
    world.step()
    world.job(REF, [f"n{MAX_JOBS}"])
    assert len(world.jobs.all) == MAX_JOBS


def test_only_so_many_nodes_are_being_asked_at_a_time() -> None:
    world = World().add(*(f"n{number:03}" for number in range(100)), address=False)
    world.job()
    assert len(world.orders) == MOST_ASKED
    world.taken(world.orders[0])
    world.step()
    assert len(world.orders) == MOST_ASKED


# ---------------------------------------------------------------- whatever happens

NAMES = ("a", "b", "c", "d")
STATES = ("staged", "staging", "failed", "retired")
HAPPENINGS = st.one_of(
    st.tuples(st.just("online"), st.sampled_from(NAMES), st.booleans()),
    st.tuples(st.just("again"), st.sampled_from(NAMES), st.integers(2, 9)),
    st.tuples(st.just("gone"), st.sampled_from(NAMES), st.none()),
    st.tuples(
        st.just("report"), st.sampled_from(NAMES),
        st.tuples(st.sampled_from(STATES), st.floats(0, 1), st.sampled_from((DIGEST, OTHER, None))),
    ),
    st.tuples(st.just("silence"), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("taken"), st.integers(0, 9), st.sampled_from(STATES)),
    st.tuples(st.just("refused"), st.integers(0, 9), st.sampled_from((Code.NODE_LOST, Code.INSUFFICIENT_STORAGE))),
    st.tuples(st.just("time"), st.floats(0, 400), st.none()),
    st.tuples(st.just("removed"), st.sampled_from(NAMES), st.none()),
)  # fmt: skip


def happen(world: World, what: tuple[Any, ...]) -> None:
    kind, where, value = what
    if kind == "online" and where in world.machines:
        world.change(where, online=value)
    elif kind == "again":
        if where not in world.machines:
            world.add(where)
        world.change(where, online=True, lease_id=f"{where}-{value}")
    elif kind == "gone":
        world.machines.pop(where, None)
    elif kind == "report" and where in world.machines:
        state, progress, digest = value
        world.reports(where, report(state, progress=progress, sha256=digest))
    elif kind == "silence" and where in world.machines:
        world.reports(where)
    elif kind == "taken" and world.orders:
        world.taken(world.orders[where % len(world.orders)], value)
    elif kind == "refused" and world.orders:
        world.refused(world.orders[where % len(world.orders)], value)
    elif kind == "time":
        world.step(where)
    elif kind == "removed":
        world.jobs.removed(where, ID, world.now)


def check(world: World, job: Job) -> None:
    asked = {(order.job_id, order.node_id) for order in world.orders}
    assert len(asked) == len(world.orders)  # nobody is asked twice at a time
    for name, share in job.shares.items():
        if job.ended_at is not None or share.over:
            assert share.phase is not Phase.FAILED or share.error is not None
            continue
        told = share.waits_for or share.asking or share.phase is Phase.STAGING
        assert told, (name, share)  # whatever does not move says what it waits for
        if share.phase is Phase.OFFLINE:
            assert name not in world.machines or not world.machines[name].online
    job_view(job, world.now)


@settings(max_examples=150, deadline=None)
@given(
    text=st.sampled_from((REF, ID, "demo")),
    reachable=st.booleans(),
    happenings=st.lists(HAPPENINGS, max_size=40),
)
def test_whatever_nodes_report_and_in_whatever_order_a_job_ends_or_says_what_it_waits_for(
    text: str, reachable: bool, happenings: list[tuple[Any, ...]]
) -> None:
    world = World().add(*NAMES, address=reachable)
    if text == ID:
        world.reports("a", report())
    job = world.job(text)
    over: dict[str, Phase] = {}
    for what in happenings:
        happen(world, what)
        world.step()
        check(world, job)
        for name, share in job.shares.items():
            assert over.get(name) in (None, share.phase)  # what has ended stays so
            if share.over:
                over[name] = share.phase
    world.now = job.created_at + MAX_JOB_S
    for order in list(world.orders):
        world.refused(order, Code.NODE_LOST)
    world.step()
    assert world.jobs.get(job.job_id) is None or job.ended_at is not None
