"""The pool state machine: what happens to a replica, who gets a slot, what is restarted and what is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llorch.config_pools import PoolSpec
from llorch.errors import Code, LlorchError
from llorch.node import pool_events as ev
from llorch.node.handoff import Handoff
from llorch.node.pools import Pools
from llorch.node.replicas import FAILURES, Lease


def spec(**changes: object) -> PoolSpec:
    return replace(PoolSpec(id="p", engine="simulated", model="m", slots=2), **changes)  # type: ignore[arg-type]


def pools_of(*specs: PoolSpec) -> Pools:
    return Pools(ev.Wanted(one, {one.model or "m": one.model or "m"}) for one in specs)


def own(run: int = 1, replica: str = "r0", **changes: object) -> Handoff:
    made = Handoff(
        pool_id="p", replica_id=replica, engine="simulated", url=f"http://127.0.0.1:{9000 + run}", model="m",
        slots=2, ctx=4096, pid=100 + run, api_key_file=f"/run/{run}.key",
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def foreign(pool: str = "hand", replica: str = "r0", **changes: object) -> Handoff:
    made = Handoff(pool_id=pool, replica_id=replica, engine="vllm", url="http://127.0.0.1:7000", model="big", slots=3)
    return replace(made, **changes)  # type: ignore[arg-type]


def only(actions: list[ev.Action], kind: type[ev.Action]) -> list[ev.Action]:
    return [action for action in actions if isinstance(action, kind)]


def bring_up(pools: Pools, now: float = 0.0, run: int = 1) -> None:
    if run == 1:
        pools.handle(ev.Start(), now)
    pools.handle(ev.Spawned(run, own(run)), now)
    [probe] = only(pools.handle(ev.HandoffSeen(own(run)), now), ev.Probe)
    assert isinstance(probe, ev.Probe)
    pools.handle(ev.ProbeOk("p", "r0", probe.probe), now)


def offer(pools: Pools, handoff: Handoff, now: float = 0.0, **says: int) -> None:
    [probe] = only(pools.handle(ev.HandoffSeen(handoff), now), ev.Probe)
    assert isinstance(probe, ev.Probe)
    pools.handle(ev.ProbeOk(handoff.pool_id, handoff.replica_id, probe.probe, **says), now)


def code_of(pools: Pools, pool_id: str = "p", task: str = "t", model: str | None = None) -> Code:
    with pytest.raises(LlorchError) as caught:
        pools.acquire(pool_id, task, model)
    return caught.value.code


def state(pools: Pools, pool_id: str = "p", replica: str = "r0") -> ev.ReplicaState:
    return next(s for p, r, s, _ in pools.replicas() if (p, r) == (pool_id, replica))


# ---------------------------------------------------------------- the way up


def test_a_spawned_replica_goes_from_spawn_to_handoff_to_probe_to_ready() -> None:
    pools = pools_of(spec())
    assert pools.pool_report("p")["state"] == "stopped"
    assert only(pools.handle(ev.Start(), 0), ev.Spawn) == [ev.Spawn("p", "r0", 1, "m", "m")]
    assert pools.pool_report("p")["state"] == "starting"
    assert pools.handle(ev.Spawned(1, own()), 1) == [ev.WriteHandoff(own())]
    assert pools.handle(ev.HandoffSeen(own()), 1) == [ev.Probe("p", "r0", 1, own())]
    assert pools.pool_report("p")["state"] == "loading"
    assert not pools.health("p")["ready"]
    pools.handle(ev.ProbeOk("p", "r0", 1, slots=99), 3)
    report = pools.pool_report("p")
    assert (report["state"], report["ready"], report["model"], report["slots_total"]) == ("ready", True, "m", 2)
    assert report["load_s"] == 3
    assert report["replicas"] == [{"id": "r0", "state": "ready", "owned": True, "slots_free": 2, "breaker": "closed"}]


def test_a_handed_off_engine_makes_a_pool_and_tells_its_own_slots() -> None:
    pools = pools_of()
    offer(pools, foreign(slots=None), slots=5, ctx=2048)
    report = pools.pool_report("hand")
    assert (report["slots_total"], report["ctx"], report["engine"], report["model"]) == (5, 2048, "vllm", "big")
    assert report["replicas"][0]["owned"] is False


def test_an_external_pool_is_offered_by_a_handoff_and_never_spawned_or_terminated() -> None:
    pools = pools_of(spec(engine="external", url="http://127.0.0.1:7000", api_key_file="/k"))
    [write] = only(pools.handle(ev.Start(), 0), ev.WriteHandoff)
    assert isinstance(write, ev.WriteHandoff)
    assert (write.handoff.url, write.handoff.pid, write.handoff.api_key_file) == ("http://127.0.0.1:7000", None, "/k")
    offer(pools, write.handoff)
    assert pools.health("p")["ready"]
    assert not only(pools.handle(ev.HandoffGone("p-r0.json"), 0), ev.Terminate)
    assert not pools.health("p")["ready"]
    assert only(pools.handle(ev.Load("p"), 1), ev.WriteHandoff) == [write]


def test_a_stale_probe_says_nothing() -> None:
    pools = pools_of()
    pools.handle(ev.HandoffSeen(foreign()), 0)
    pools.handle(ev.HandoffSeen(foreign(url="http://127.0.0.1:7001")), 0)
    pools.handle(ev.ProbeOk("hand", "r0", 1), 0)
    assert not pools.health("hand")["ready"]
    pools.handle(ev.ProbeOk("hand", "r0", 2), 0)
    assert pools.health("hand")["ready"]


def test_a_changed_handoff_is_probed_again_and_an_unchanged_one_is_not() -> None:
    pools = pools_of()
    offer(pools, foreign())
    assert pools.handle(ev.HandoffSeen(foreign()), 0) == []
    assert only(pools.handle(ev.HandoffSeen(foreign(slots=1)), 0), ev.Probe)
    assert not pools.health("hand")["ready"]


def test_an_engine_that_stops_answering_is_probed_again() -> None:
    pools = pools_of()
    offer(pools, foreign())
    assert only(pools.handle(ev.EngineLost("hand", "r0", "nothing listens"), 0), ev.Probe)
    assert pools.health("hand") == {
        "live": True, "ready": False, "draining": False, "slots_free": 0, "last_error": "nothing listens",
    }  # fmt: skip


# ---------------------------------------------------------------- handoffs of others


def test_foreign_content_under_a_spawned_id_is_reported_and_rewritten() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    note, write = pools.handle(ev.HandoffSeen(own(url="http://127.0.0.1:6666")), 0)
    assert isinstance(note, ev.Note) and note.event == "handoff.invalid"
    assert write == ev.WriteHandoff(own())
    assert pools.health("p")["ready"]
    note, write = pools.handle(ev.HandoffBad("p-r0.json", "the file is not JSON"), 0)
    assert write == ev.WriteHandoff(own())


def test_another_replica_id_joins_unowned_if_the_model_matches() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    offer(pools, foreign("p", "x", model="m"))
    assert pools.pool_report("p")["slots_total"] == 5
    [note] = pools.handle(ev.HandoffSeen(foreign("p", "y", model="other")), 0)
    assert isinstance(note, ev.Note) and note.event == "handoff.invalid"


def test_a_joined_replica_that_changes_its_model_is_not_used_any_more() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    offer(pools, foreign("p", "x", model="m"))
    pools.handle(ev.HandoffSeen(foreign("p", "x", model="other")), 0)
    assert state(pools, "p", "x") is ev.ReplicaState.EXITED


def test_a_handoff_that_goes_stops_the_engine_only_if_it_is_ours() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    offer(pools, foreign())
    assert only(pools.handle(ev.HandoffGone("hand-r0.json"), 0), ev.Terminate) == []
    assert only(pools.handle(ev.HandoffGone("p-r0.json"), 0), ev.Terminate) == [ev.Terminate("p", "r0")]
    assert not pools.health("p")["ready"] and not pools.health("hand")["ready"]
    actions = pools.handle(ev.Exited("p", "r0", 1, "killed", 0), 1)
    assert not only(actions + pools.handle(ev.Tick(), 100), ev.Spawn), "somebody removed it on purpose"
    assert pools.pool_report("p")["state"] == "stopped"


def test_one_file_is_about_one_replica_though_two_could_have_its_name() -> None:
    pools = pools_of()
    offer(pools, foreign("a-b", "c"))
    offer(pools, foreign("a", "b-c"))  # the same a-b-c.json, with other content
    assert not pools.health("a-b")["ready"] and pools.health("a")["ready"]
    pools.handle(ev.HandoffGone("a-b-c.json"), 1)
    assert not pools.health("a")["ready"]


def test_the_file_of_a_spawned_replica_can_be_no_others() -> None:
    pools = pools_of(spec(id="a-b"))
    pools.handle(ev.Start(), 0)
    written = own(pool_id="a-b")
    pools.handle(ev.Spawned(1, written), 0)
    (note, rewritten) = pools.handle(ev.HandoffSeen(foreign("a", "b-r0")), 0)
    assert isinstance(note, ev.Note) and note.event == "handoff.invalid"
    assert rewritten == ev.WriteHandoff(written)
    with pytest.raises(LlorchError):
        pools.health("a")


def test_an_engines_own_words_are_told_only_of_one_that_never_served() -> None:
    pools = pools_of(spec())
    pools.handle(ev.Start(), 0)
    pools.handle(ev.Spawned(1, own()), 0)
    (note,) = only(pools.handle(ev.Exited("p", "r0", 1, "exited with code 1", 0, "out of memory"), 0), ev.Note)
    assert note.reason == pools.pool_report("p")["last_error"] == "exited with code 1: out of memory"
    pools.handle(ev.Tick(), 100)
    bring_up(pools, 100, run=2)
    assert pools.health("p")["ready"]
    (note,) = only(pools.handle(ev.Exited("p", "r0", 2, "killed by SIGABRT", 0, "prompt: CANARY"), 200), ev.Note)
    assert note.reason == pools.pool_report("p")["last_error"] == "killed by SIGABRT"


def test_an_empty_handed_off_pool_may_come_back_with_another_model() -> None:
    pools = pools_of()
    offer(pools, foreign())
    pools.handle(ev.HandoffGone("hand-r0.json"), 0)
    offer(pools, foreign(model="small"))
    assert pools.pool_report("hand")["model"] == "small"


def test_pools_without_end_are_refused_once_none_is_empty() -> None:
    pools = pools_of()
    for number in range(256):
        offer(pools, foreign(f"hand{number}"))
    [note] = pools.handle(ev.HandoffSeen(foreign("more")), 0)
    assert isinstance(note, ev.Note) and "pools already" in note.reason
    pools.handle(ev.HandoffGone("hand7-r0.json"), 0)
    told: list[str] = []
    pools.subscribe(told.append)
    offer(pools, foreign("more"))
    assert "hand7" in told
    assert "hand7" not in pools.ids() and "more" in pools.ids()


# ---------------------------------------------------------------- ends


def test_an_engine_that_ends_is_started_again_after_a_backoff_that_doubles() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    now, waits = 0.0, []
    for run in range(1, FAILURES):
        pools.handle(ev.Exited("p", "r0", run, "exited with code 1", chance=0.999999), now)
        began = now
        while not (spawned := only(pools.handle(ev.Tick(), now), ev.Spawn)):
            now += 0.1
        assert spawned == [ev.Spawn("p", "r0", run + 1, "m", "m")]
        waits.append(round(now - began))
    assert waits == [1, 2, 4, 8]


def test_five_ends_in_five_minutes_fail_the_pool_until_it_is_loaded_again() -> None:
    pools = pools_of(spec())
    pools.handle(ev.Start(), 0)
    notes: list[ev.Action] = []
    for run in range(1, FAILURES + 1):
        notes = only(pools.handle(ev.Exited("p", "r0", run, f"exited with code {run}", 0), run * 50), ev.Note)
        pools.handle(ev.Tick(), run * 50 + 49)
    assert any(isinstance(note, ev.Note) and note.event == "pool.failed" for note in notes)
    report = pools.pool_report("p")
    assert (report["state"], report["last_error"]) == ("failed", "exited with code 5")
    assert pools.handle(ev.Tick(), 10_000) == []
    assert code_of(pools) is Code.MODEL_NOT_AVAILABLE
    assert only(pools.handle(ev.Load("p"), 10_000), ev.Spawn) == [ev.Spawn("p", "r0", 6, "m", "m")]


def test_what_went_before_is_forgotten_after_five_stable_minutes() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    now = 0.0
    for run in range(1, 12):
        now += 301
        pools.handle(ev.Exited("p", "r0", run, "gone", 0), now)
        now += 1
        assert only(pools.handle(ev.Tick(), now), ev.Spawn), run
        bring_up(pools, now, run + 1)


def test_ends_that_are_far_apart_are_never_too_many() -> None:
    pools = pools_of(spec())
    pools.handle(ev.Start(), 0)
    for run in range(1, 20):
        pools.handle(ev.Exited("p", "r0", run, "gone", 0), run * 76.0)
        assert only(pools.handle(ev.Tick(), run * 76.0 + 75), ev.Spawn), run


def test_the_end_of_an_earlier_run_is_no_news() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    pools.handle(ev.Exited("p", "r0", 1, "gone", 0), 0)
    pools.handle(ev.Tick(), 5)
    assert pools.handle(ev.Exited("p", "r0", 1, "gone", 0), 5) == []
    assert state(pools) is ev.ReplicaState.STARTING
    assert pools.handle(ev.Spawned(1, own(1)), 5) == []


def test_an_earlier_runs_file_read_late_is_neither_probed_nor_foreign() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    pools.handle(ev.Exited("p", "r0", 1, "gone", 0), 0)
    pools.handle(ev.Tick(), 5)
    pools.handle(ev.Spawned(2, own(2)), 5)
    assert pools.handle(ev.HandoffSeen(own(1)), 5) == []
    assert only(pools.handle(ev.HandoffSeen(own(2)), 5), ev.Probe)


def test_an_engine_that_never_gets_ready_is_ended_and_says_why() -> None:
    pools = pools_of(spec())
    pools.handle(ev.Start(), 0)
    pools.handle(ev.Spawned(1, own()), 0)
    pools.handle(ev.HandoffSeen(own()), 0)
    actions = pools.handle(ev.ProbeFailed("p", "r0", 1, "not ready within 300 s", gave_up=True), 300)
    assert actions == [ev.StopProbe("p", "r0"), ev.Terminate("p", "r0")]
    pools.handle(ev.Exited("p", "r0", 1, "killed by SIGTERM", 0), 301)
    assert pools.pool_report("p")["last_error"] == "not ready within 300 s"


def test_a_restart_waits_for_the_tasks_and_then_starts_again_at_once() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    pools.acquire("p", "t1")
    assert not only(pools.handle(ev.Restart("p"), 0), ev.Terminate)
    assert state(pools) is ev.ReplicaState.DRAINING
    assert code_of(pools, task="t2") is Code.MODEL_NOT_AVAILABLE
    assert pools.handle(ev.Tick(), 1) == []
    pools.release("t1")
    assert only(pools.handle(ev.Tick(), 2), ev.Terminate)
    assert only(pools.handle(ev.Exited("p", "r0", 1, "exited with code 0", 0), 3), ev.Spawn)


def test_an_unloaded_pool_stays_stopped_until_it_is_loaded() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    assert only(pools.handle(ev.Unload("p"), 0), ev.Terminate)
    assert not only(pools.handle(ev.Exited("p", "r0", 1, "", 0), 0), ev.Spawn)
    assert pools.handle(ev.Tick(), 1_000) == []
    assert pools.pool_report("p")["state"] == "stopped"
    assert only(pools.handle(ev.Load("p"), 0), ev.Spawn)


def test_an_illegal_step_raises() -> None:
    with pytest.raises(ev.IllegalStep):
        ev.step(ev.ReplicaState.EXITED, ev.Step.ANSWERED)


# ---------------------------------------------------------------- slots


def test_slots_go_to_the_least_busy_ready_replica_and_never_beyond() -> None:
    pools = pools_of(spec())
    bring_up(pools)
    offer(pools, foreign("p", "x", model="m"))
    leases = [pools.acquire("p", f"t{number}") for number in range(5)]
    assert [lease.replica_id for lease in leases].count("x") == 3
    assert leases[0].replica_id == "x" and leases[0].api_key_file is None
    assert next(lease for lease in leases if lease.replica_id == "r0").api_key_file == "/run/1.key"
    assert code_of(pools, task="t6") is Code.ALL_SLOTS_BUSY
    pools.release("t0")
    pools.release("t0")
    pools.release("never held")
    assert pools.pool_report("p")["slots_free"] == 1
    pools.acquire("p", "t6")
    assert pools.accepted() == pools.accepted("p") == 5


def test_refusals_say_which_kind() -> None:
    pools = pools_of(spec())
    assert code_of(pools, "nowhere") is Code.POOL_NOT_FOUND
    assert code_of(pools) is Code.MODEL_NOT_AVAILABLE
    bring_up(pools)
    assert code_of(pools, model="other") is Code.MODEL_NOT_AVAILABLE
    pools.acquire("p", "t", "m")
    assert code_of(pools, task="t") is Code.CONFLICT
    for scope in ("p", None):
        pools.handle(ev.Drain(scope), 0)
        assert code_of(pools, task="t2") is Code.DRAINING
        assert pools.health("p")["draining"] and pools.pool_report("p")["state"] == "draining"
        pools.handle(ev.Undrain(scope), 0)
    pools.acquire("p", "t2")


def test_every_change_raises_the_generation_and_is_told() -> None:
    told: list[str] = []
    pools = pools_of(spec(), spec(id="q"))
    pools.subscribe(told.append)
    bring_up(pools)
    before = pools.pool_report("p")["generation"]
    told.clear()
    pools.acquire("p", "t")
    pools.release("t")
    pools.release("t")
    assert told == ["p", "p"]
    assert pools.pool_report("p")["generation"] == before + 2


def test_measured_speeds_are_averaged() -> None:
    pools = pools_of(spec())
    pools.measured("p", prompt_tps=None, decode_tps=100.0)
    pools.measured("p", prompt_tps=None, decode_tps=50.0)
    assert pools.pool_report("p")["decode_tps"] == 90.0
    assert pools.pool_report("p")["prompt_tps"] is None


# ---------------------------------------------------------------- what others ask


def test_models_are_those_that_run_may_be_loaded_come_or_may_come_back() -> None:
    on_demand = spec(id="d", model=None, models=("a",))
    pools = Pools([ev.Wanted(spec(), {"m": "m"}), ev.Wanted(on_demand, {"a": "a"})])
    bring_up(pools)
    assert pools.models() == {"m", "a"}
    pools.handle(ev.Reload("p", "m2", "m2"), 0)
    assert pools.models() == {"m", "a", "m2"}, "it is fetched"
    pools.handle(ev.Prepared("p", "m2", False), 0)
    assert pools.models() == {"m", "a", "m2"}, "it may fail"
    pools.handle(ev.Exited("p", "r0", 1, "", 0), 0)
    assert pools.models() == {"m", "a", "m2"}
    pools.handle(ev.Exited("p", "r0", 2, "", 0), 0)
    assert pools.models() == {"m", "a"}, "it has failed"
    assert pools.ref_of("p", "m") == "m" and pools.ref_of("p", "m2") is None and pools.ref_of("d", "a") == "a"


def test_engines_are_known_by_their_processes_and_by_whether_tasks_are_there() -> None:
    pools = pools_of(spec())
    assert pools.pids() == [] and not pools.busy("p", "r0") and not pools.busy("p", "r1") and not pools.busy("q", "r0")
    bring_up(pools)
    offer(pools, foreign())
    assert pools.pids() == [101]
    pools.acquire("p", "t")
    assert pools.busy("p", "r0")


# ---------------------------------------------------------------- any order of events

IDS = st.sampled_from(["r0", "r1", "x", "y"])


class AnyOrder(RuleBasedStateMachine):
    """Events in any order, late and repeated, with tasks that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = pools_of(spec(replicas=2))
        self.now = 0.0
        self.runs: dict[str, int] = {}  # processes that run, by replica
        self.spawned: dict[str, int] = {}
        self.probes: dict[str, int] = {}
        self.leases: dict[str, Lease] = {}
        self.tasks = 0
        self.do(ev.Start())

    def do(self, event: ev.Event) -> None:
        generation = self.pools.pool_report("p")["generation"]
        report = {k: v for k, v in self.pools.pool_report("p").items() if k != "generation"}
        for action in self.pools.handle(event, self.now):
            if isinstance(action, ev.Spawn):
                assert action.replica_id not in self.runs, "started twice"
                assert action.run > self.spawned.get(action.replica_id, 0)
                self.runs[action.replica_id] = self.spawned[action.replica_id] = action.run
            elif isinstance(action, ev.Terminate):
                assert action.replica_id in ("r0", "r1"), "only what is ours is ended"
            elif isinstance(action, ev.Probe):
                self.probes[action.replica_id] = action.probe
        after = self.pools.pool_report("p")
        changed = report != {k: v for k, v in after.items() if k != "generation"}
        assert not changed or after["generation"] > generation, "a change that nobody was told of"

    @rule(seconds=st.sampled_from([0.1, 1, 30, 400]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do(ev.Tick())

    @rule(replica=st.sampled_from(["r0", "r1"]), back=st.integers(0, 1))
    def spawned_event(self, replica: str, back: int) -> None:
        if replica in self.spawned:
            run = self.spawned[replica] - back
            self.do(ev.Spawned(run, own(run, replica)))

    @rule(replica=st.sampled_from(["r0", "r1"]), back=st.integers(0, 1))
    def exited(self, replica: str, back: int) -> None:
        if replica in self.spawned and (back or replica in self.runs):
            run = self.spawned[replica] - back
            if not back:
                del self.runs[replica]
            self.do(ev.Exited("p", replica, run, "gone", 0.5))

    @rule(replica=IDS, back=st.integers(0, 2), slots=st.integers(1, 3), model=st.sampled_from(["m", "m", "other"]))
    def handoff_seen(self, replica: str, back: int, slots: int, model: str) -> None:
        if replica in ("r0", "r1"):
            made = own(max(0, self.spawned.get(replica, 1) - back), replica)
        else:
            made = foreign("p", replica, slots=slots, model=model)
        self.do(ev.HandoffSeen(made))

    @rule(replica=IDS, bad=st.booleans())
    def handoff_gone(self, replica: str, bad: bool) -> None:
        name = f"p-{replica}.json"
        self.do(ev.HandoffBad(name, "torn") if bad else ev.HandoffGone(name))

    @rule(replica=IDS, back=st.integers(0, 1))
    def probe_ok(self, replica: str, back: int) -> None:
        self.do(ev.ProbeOk("p", replica, self.probes.get(replica, 0) - back))

    @rule(replica=IDS)
    def comes_up(self, replica: str) -> None:
        """All that it takes, in the order in which it comes when nothing goes wrong."""
        self.spawned_event(replica, 0)
        self.handoff_seen(replica, 0, 3, "m")
        self.probe_ok(replica, 0)

    @rule(replica=IDS, gave_up=st.booleans())
    def probe_failed(self, replica: str, gave_up: bool) -> None:
        self.do(ev.ProbeFailed("p", replica, self.probes.get(replica, 0), "no", gave_up))

    @rule(replica=IDS)
    def lost(self, replica: str) -> None:
        self.do(ev.EngineLost("p", replica, "nothing listens"))

    @rule(pool=st.sampled_from(["p", None]), on=st.booleans())
    def drain(self, pool: str | None, on: bool) -> None:
        self.do(ev.Drain(pool) if on else ev.Undrain(pool))

    @rule(kind=st.sampled_from([ev.Load, ev.Unload, ev.Restart]))
    def control(self, kind: type[ev.Load | ev.Unload | ev.Restart]) -> None:
        self.do(kind("p"))

    @rule(count=st.integers(1, 4))
    def tasks_come(self, count: int) -> None:
        for _ in range(count):
            self.acquire()

    def acquire(self) -> None:
        self.tasks += 1
        task = f"t{self.tasks}"
        states = {replica: s for _, replica, s, _ in self.pools.replicas()}
        draining = self.pools.pool_report("p")["draining"]
        free = self.pools.pool_report("p")["slots_free"]
        try:
            lease = self.pools.acquire("p", task)
        except LlorchError as error:
            assert error.code in (Code.ALL_SLOTS_BUSY, Code.MODEL_NOT_AVAILABLE, Code.DRAINING)
            assert draining or free == 0
            return
        assert not draining and states[lease.replica_id] is ev.ReplicaState.READY
        self.leases[task] = lease
        held = sum(1 for other in self.leases.values() if other.replica_id == lease.replica_id)
        slots = 2 if lease.replica_id in ("r0", "r1") else 3
        assert held <= slots, "more accepted than there are slots"
        assert self.pools.pool_report("p")["slots_free"] == free - 1

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), twice=st.booleans())
    def release(self, data: st.DataObject, twice: bool) -> None:
        task = data.draw(st.sampled_from(sorted(self.leases)))
        del self.leases[task]
        for _ in range(1 + twice):
            self.pools.release(task)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), failed=st.booleans(), times=st.sampled_from([1, 5]))
    def told(self, data: st.DataObject, failed: bool, times: int) -> None:
        task = data.draw(st.sampled_from(sorted(self.leases)))
        before = self.pools.pool_report("p")
        for _ in range(times):
            self.pools.told(task, failed, self.now)
        after = self.pools.pool_report("p")
        assert after["slots_free"] == before["slots_free"] or after["generation"] > before["generation"]

    @rule()
    def tasks_fail_one_after_another(self) -> None:
        for replica in self.pools.pool_report("p")["replicas"]:
            if replica["slots_free"] and replica["breaker"] == "closed":
                lease = self.pools.acquire("p", "fails") if not self.pools.pool_report("p")["draining"] else None
                for _ in range(5 if lease else 0):
                    self.pools.told("fails", True, self.now)
                self.pools.release("fails")
                return

    @invariant()
    def at_most_half_of_the_ready_ones_are_out_and_those_that_are_take_nothing(self) -> None:
        self.do(ev.Tick())  # which comes a few times a second
        ready = [each for each in self.pools.pool_report("p")["replicas"] if each["state"] == "ready"]
        out = [each for each in ready if each["breaker"] != "closed"]
        assert 2 * len(out) <= len(ready)
        assert all(each["slots_free"] == 0 for each in out if each["breaker"] == "ejected")
        assert all(each["slots_free"] <= 1 for each in out)

    @invariant()
    def every_slot_is_accounted_for(self) -> None:
        assert self.pools.accepted() == len(self.leases)
        report = self.pools.pool_report("p")
        assert 0 <= report["slots_free"] <= report["slots_total"]

    def teardown(self) -> None:
        for task in list(self.leases):
            self.pools.release(task)
        report = self.pools.pool_report("p")
        ready = [r for _, r, s, _ in self.pools.replicas() if s is ev.ReplicaState.READY]
        assert self.pools.accepted() == 0
        out = [each for each in report["replicas"] if each["state"] == "ready" and each["breaker"] != "closed"]
        assert report["slots_free"] >= len(ready) - len(out)


# ---------------------------------------------------------------- whatever anybody says

POOLS, REPLICAS, MODELS = st.sampled_from("pde"), st.sampled_from(["r0", "r1", "x"]), st.sampled_from("mab")
NUMBERS, FLAGS, WORDS = st.integers(0, 6), st.booleans(), st.sampled_from(["why", ""])
SPECS = (
    spec(), spec(replicas=2), spec(engine="external", url="http://127.0.0.1:7000"),
    spec(id="d", model=None, models=("a", "b")), spec(id="d", model="a", idle_unload_s=1.0), spec(id="d", model="a"),
    spec(id="e", engine="external", url="http://127.0.0.1:7001"),
)  # fmt: skip
HANDOFFS = st.builds(
    Handoff, POOLS, st.sampled_from(["simulated", "external"]), st.sampled_from(["http://127.0.0.1:7000"]), MODELS,
    REPLICAS, slots=st.sampled_from([None, 2]), ctx=st.just(4096),
)  # fmt: skip
NAMES = st.builds("{}-{}.json".format, POOLS, REPLICAS)
WANTED = st.lists(st.sampled_from(SPECS), unique_by=lambda each: each.id).map(
    lambda specs: tuple(
        ev.Wanted(each, {model: model for model in ([each.model] if each.model else []) + list(each.models)})
        for each in specs
    )
)
EVENTS = st.one_of(
    st.builds(ev.Start), st.builds(ev.Leave), st.builds(ev.Configure, WANTED),
    st.builds(ev.Adopted, MODELS, MODELS, HANDOFFS),
    st.builds(ev.Spawned, NUMBERS, HANDOFFS), st.builds(ev.Progress, POOLS, REPLICAS | st.none(), NUMBERS, WORDS),
    st.builds(ev.HandoffSeen, HANDOFFS), st.builds(ev.HandoffBad, NAMES, WORDS), st.builds(ev.HandoffGone, NAMES),
    st.builds(ev.ProbeFailed, POOLS, REPLICAS, NUMBERS, WORDS, FLAGS), st.builds(ev.EngineLost, POOLS, REPLICAS, WORDS),
    st.builds(ev.Stalled, POOLS, REPLICAS, WORDS),
    st.builds(ev.Drain, POOLS | st.none(), WORDS, st.sampled_from([None, 1.0])),
    st.builds(ev.Undrain, POOLS | st.none()), st.builds(ev.Hold, POOLS, WORDS, WORDS | st.none()),
    st.builds(ev.Load, POOLS, MODELS | st.none()), st.builds(ev.Unload, POOLS), st.builds(ev.Restart, POOLS),
    st.builds(ev.Reload, POOLS, MODELS, MODELS),
    st.builds(ev.Prepared, POOLS, MODELS, FLAGS), st.builds(ev.Purge, POOLS),
)  # fmt: skip


class Whatever(RuleBasedStateMachine):
    """Events that make sense and events that don't. Ends of processes alone are true: nobody else can know them."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = pools_of(SPECS[1], SPECS[3], SPECS[6])
        self.now, self.runs, self.probes, self.tasks = (
            0.0,
            dict[tuple[str, str], int](),
            dict[tuple[str, str], int](),
            0,
        )

    def do(self, event: ev.Event) -> None:
        try:
            actions = self.pools.handle(event, self.now)
        except LlorchError as error:
            assert error.code in (Code.CONFLICT, Code.INVALID_REQUEST, Code.POOL_NOT_FOUND)
            return
        for action in actions:
            if isinstance(action, ev.Spawn | ev.TakeOver):
                key = (action.pool_id, action.replica_id)
                assert key not in self.runs, "it runs already"
                self.runs[key] = action.run
            elif isinstance(action, ev.Probe):
                self.probes[action.pool_id, action.replica_id] = action.probe
            elif isinstance(action, ev.Terminate):
                assert (action.pool_id, action.replica_id) in self.runs, "only what is ours is ended"
        for report in self.pools.report():
            assert 0 <= report["slots_free"] <= report["slots_total"] >= self.pools.accepted(report["pool_id"])

    @rule(event=EVENTS)
    def whatever(self, event: ev.Event) -> None:
        self.do(event)

    @rule(pool=POOLS)
    def reload(self, pool: str) -> None:
        self.do(ev.Reload(pool, "m", "m2"))
        self.do(ev.Prepared(pool, "m", True))

    @rule(seconds=st.sampled_from([0.0, 1.0, 40.0, 400.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.do(ev.Tick())

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), hopeless=FLAGS)
    def exits(self, data: st.DataObject, hopeless: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.runs)))
        self.do(ev.Exited(*key, self.runs.pop(key), "gone", 0.5, "last words", hopeless))

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), slots=st.sampled_from([None, 2]))
    def comes_up(self, data: st.DataObject, slots: int | None) -> None:
        key = data.draw(st.sampled_from(sorted(self.runs)))
        handoff = own(self.runs[key], key[1], pool_id=key[0], slots=slots)
        self.do(ev.Spawned(self.runs[key], handoff))
        self.do(ev.HandoffSeen(handoff))
        self.do(ev.ProbeOk(*key, self.probes.get(key, 0), 2))

    @rule(pool=POOLS, replica=REPLICAS)
    def answers(self, pool: str, replica: str) -> None:
        self.do(ev.ProbeOk(pool, replica, self.probes.get((pool, replica), 0), 2))

    @rule(pool=POOLS, model=MODELS | st.none())
    def task_comes(self, pool: str, model: str | None) -> None:
        self.tasks += 1
        try:
            self.pools.acquire(pool, f"t{self.tasks}", model)
        except LlorchError as error:
            assert error.code in (Code.ALL_SLOTS_BUSY, Code.MODEL_NOT_AVAILABLE, Code.DRAINING, Code.POOL_NOT_FOUND)

    @rule(number=st.integers(1, 20), failed=FLAGS)
    def task_ends(self, number: int, failed: bool) -> None:
        self.pools.told(f"t{number}", failed, self.now)
        self.pools.release(f"t{number}")


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
Whatever.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestWhatever = Whatever.TestCase
TestAnyOrder = AnyOrder.TestCase
