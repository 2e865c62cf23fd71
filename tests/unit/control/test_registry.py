from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest

from llorch.control import report_limits
from llorch.control.placement import PoolFacts, Wish, pick
from llorch.control.registry import Claim, Node, Registration, Registry
from llorch.control.task_reports import MAX_TASKS_PER_NODE, TaskReports
from llorch.errors import Code, LlorchError
from llorch.messages import Heartbeat, PoolReport, Register, TaskReport

WALL, LATER = "2025-01-02T03:04:05Z", "2025-01-02T03:05:00Z"


def report(pool_id: str = "p0", **fields: Any) -> dict[str, Any]:
    return {"pool_id": pool_id, "model": "m", "ready": True, "slots_total": 2, "slots_free": 2, **fields}


def task(number: int, **fields: Any) -> dict[str, Any]:
    return {"task_id": f"00000000-0000-0000-0000-{number:012d}", **fields}


def register(registry: Registry, node_id: str = "n", *, now: float = 0.0, **fields: Any) -> Registration:
    peer, dead = fields.pop("peer", "10.0.0.1"), fields.pop("old_link_dead", False)
    lease_id = fields.pop("lease_id", "lease-1")
    message = {"node_id": node_id, "boot_id": "boot-1", "pools": [report()], **fields}
    return registry.register(
        Register.model_validate(message), now=now, wall=WALL, peer=peer, lease_id=lease_id, old_link_dead=dead
    )


def minimal(registry: Registry, *, now: float = 0.0, peer: str = "10.0.0.1", address: str = "10.0.0.1:9200") -> Node:
    message = {"node_id": "n", "address": address, "pools": ["p0"], "capabilities": {"gpus": []}}
    return registry.register(Register.model_validate(message), now=now, wall=WALL, peer=peer, lease_id="unused").node


def beat(registry: Registry, node_id: str = "n", *, now: float = 1.0, wall: str = WALL, **fields: Any):  # type: ignore[no-untyped-def]
    return registry.heartbeat(node_id, Heartbeat.model_validate(fields), now=now, wall=wall)


def leased(registry: Registry, *, seq: int | None = None, **fields: Any):  # type: ignore[no-untyped-def]
    return beat(registry, lease_id="lease-1", seq=seq, **fields)


def up(**fields: Any) -> Registry:
    """A registry with one node, its link up."""
    registry = Registry("epoch")
    node = register(registry, **fields).node
    registry.link_up("n", node.lease_id, 0.0)
    return registry


def facts(registry: Registry, now: float = 1.0, pool_id: str = "p0") -> PoolFacts:
    return next(each for each in registry.pool_facts(now) if each.pool_id == pool_id)


def code(call: Any, *args: Any, **kwargs: Any) -> Code:
    with pytest.raises(LlorchError) as caught:
        call(*args, **kwargs)
    return caught.value.code


# ---------------------------------------------------------------- registration


def test_a_registered_node_is_known_with_its_pools_at_once() -> None:
    registry = up()
    assert pick(Wish("m"), registry.pool_facts(1.0, "m")) == ("n", "p0")
    assert registry.models().resident == {"m"}


def test_there_are_so_many_nodes_and_no_more_and_the_one_longest_offline_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report_limits, "MOST_NODES", 3)
    registry = Registry("epoch")
    for place, node_id in enumerate("abc"):
        register(registry, node_id, now=float(place))
    assert code(register, registry, "d", now=10.0) is Code.NO_CAPACITY
    assert register(registry, "a", lease_id="lease-2", now=20.0).node.online  # known: it needs no room
    registry.expire(32.5)  # b and c are offline since then; of two, the first by name goes
    assert [node.node_id for node in registry.nodes.values() if not node.online] == ["b", "c"]
    register(registry, "d", now=33.0)
    assert set(registry.nodes) == {"a", "c", "d"}
    assert registry.models().nodes == {"a", "c", "d"}


def test_the_same_process_registers_again_freely_and_its_old_lease_is_stale() -> None:
    registry = up()
    again = register(registry, lease_id="lease-2", peer="10.9.9.9", now=1.0)
    assert not again.replaced
    assert again.node.reachable
    assert code(leased, registry) is Code.LEASE_STALE
    assert beat(registry, lease_id="lease-2").applied


def test_another_process_is_refused_while_the_node_is_online() -> None:
    registry = up()
    assert code(register, registry, boot_id="boot-2", peer="10.0.0.2", lease_id="x") is Code.NODE_ID_CONFLICT
    assert leased(registry).applied
    assert registry.nodes["n"].boot_id == "boot-1"


@pytest.mark.parametrize(
    ("fields", "now"),
    [
        ({"peer": "10.0.0.1"}, 1.0),
        ({"peer": "10.0.0.2", "old_link_dead": True}, 1.0),
        ({"peer": "10.0.0.2"}, 31.0),
    ],
    ids=["same address", "old link dead", "expired"],
)
def test_another_process_takes_the_id_over_when_the_first_is_surely_gone(fields: dict[str, Any], now: float) -> None:
    registry = up()
    registry.expire(now)
    taken = register(registry, boot_id="boot-2", lease_id="lease-2", now=now, **fields)
    assert taken.replaced
    assert not taken.node.reachable


def test_an_untrusted_address_registers_nothing() -> None:
    registry = Registry("epoch")
    assert code(register, registry, address="http://127.0.0.1:9200") is Code.UNTRUSTED_ADDRESS
    assert not registry.nodes


def test_a_node_that_could_be_reached_in_no_way_is_refused() -> None:
    assert code(register, Registry("epoch"), boot_id=None) is Code.INVALID_REQUEST


def test_an_advertised_address_gets_a_scheme() -> None:
    registry = Registry("epoch")
    minimal(registry)
    assert registry.address_of("n") == "http://10.0.0.1:9200"
    register(registry, "m", address="https://gpu:1/", boot_id="b")
    assert registry.address_of("m") == "https://gpu:1"
    assert registry.address_of("unknown") is None


# ---------------------------------------------------------------- heartbeats


def test_a_beat_of_an_unknown_or_expired_node_is_told_to_register() -> None:
    registry = up()
    assert code(beat, registry, "other") is Code.NODE_UNKNOWN
    registry.expire(31.0)
    assert code(leased, registry, now=32.0) is Code.NODE_UNKNOWN


def test_a_beat_without_the_lease_in_force_changes_nothing() -> None:
    registry = up()
    assert code(beat, registry, lease_id="old", draining=True) is Code.LEASE_STALE
    assert code(beat, registry, draining=True) is Code.LEASE_STALE
    assert code(beat, registry, lease_id="lease-1", boot_id="boot-2", draining=True) is Code.NODE_ID_CONFLICT
    assert not registry.nodes["n"].draining
    assert registry.nodes["n"].last_beat == 0.0


def test_an_overtaken_beat_is_ignored_and_a_new_lease_starts_counting_anew() -> None:
    registry = up()
    assert leased(registry, seq=5, draining=True).applied
    for seq in (5, 4):
        assert not leased(registry, seq=seq, draining=False, now=9.0).applied
    assert registry.nodes["n"].draining
    assert registry.nodes["n"].last_beat == 1.0
    register(registry)
    assert leased(registry, seq=0).applied


def test_a_full_beat_replaces_all_and_a_delta_only_what_it_names() -> None:
    registry = up(pools=[report("p0"), report("p1"), report("p2")], catalog=[{"id": "x"}, {"id": "y"}])
    delta = leased(registry, delta=True, pools=[report("p1", ready=False), {"pool_id": "p2", "gone": True}])
    assert delta.changed == {"p1", "p2"}
    assert sorted(registry.nodes["n"].pools) == ["p0", "p1"]
    leased(registry, delta=True, catalog=[{"id": "x", "gone": True}, {"id": "z"}])
    assert registry.models().catalogued == {"y", "z"}
    full = leased(registry, pools=[report("p1", ready=False), report("p3")], catalog=[])
    assert full.changed == {"p0", "p3"}
    assert sorted(registry.nodes["n"].pools) == ["p1", "p3"]
    assert registry.models().catalogued == set()


def test_a_delta_entry_is_whole_so_what_it_leaves_out_is_unknown() -> None:
    registry = up(pools=[report(last_error="boom", ctx=4096)])
    leased(registry, delta=True, pools=[report()])
    assert registry.nodes["n"].pools["p0"].report.last_error is None


def test_repeating_a_beat_changes_nothing() -> None:
    registry = up()
    assert leased(registry, pools=[report()]).changed == frozenset()


def test_gpus_are_known_by_uuid() -> None:
    def gpu(uuid: str, **fields: Any) -> dict[str, Any]:
        return {"uuid": uuid, "index": 0, "name": "card", **fields}

    registry = up(capabilities={"gpus": [gpu("a"), gpu("b")]})
    leased(registry, delta=True, gpus=[gpu("a", utilization=0.5), gpu("b", gone=True), gpu("c", gone=True)])
    assert {uuid: each.utilization for uuid, each in registry.nodes["n"].gpus.items()} == {"a": 0.5}


# ---------------------------------------------------------------- minimal nodes


def test_a_minimal_node_is_dialled_beats_without_a_lease_and_is_bound_once_its_pool_was_read() -> None:
    registry = Registry("epoch")
    node = minimal(registry)
    assert not node.reachable
    assert registry.probed("n", True, 1.0)
    beat(registry, pools=[{"pool_id": "p0", "ready": True}])
    assert not node.pools["p0"].bound
    assert pick(Wish("m"), registry.pool_facts(1.0, "m")) is None
    assert registry.merge_pool("n", PoolReport.model_validate(report(slots_total=4, slots_free=4)), 1.0)
    assert node.pools["p0"].bound
    assert pick(Wish("m"), registry.pool_facts(1.0, "m")) == ("n", "p0")


def test_beats_of_a_minimal_node_merge_by_field() -> None:
    registry = Registry("epoch")
    node = minimal(registry)
    registry.merge_pool("n", PoolReport.model_validate(report()), 1.0)
    beat(registry, pools=[{"pool_id": "p0", "ready": False}], now=2.0)
    assert (node.pools["p0"].report.model, node.pools["p0"].report.ready) == ("m", False)
    beat(registry, pools=[], now=3.0)
    assert "p0" in node.pools


def test_an_old_count_of_slots_does_not_turn_our_ended_tasks_into_somebody_elses() -> None:
    registry = Registry("epoch")
    minimal(registry)
    registry.probed("n", True, 0.0)
    registry.merge_pool("n", PoolReport.model_validate(report()), 0.0)
    claims = [registry.claim("n", "p0", "t", number) for number in (1, 2)]
    registry.merge_pool("n", PoolReport.model_validate(report(slots_free=0)), 1.0)
    for claim in claims:
        registry.release(claim)
    for now in (2.0, 3.0):
        beat(registry, pools=[{"pool_id": "p0", "ready": True}], now=now)
    assert facts(registry, 3.0).slots_free == 2


def test_a_minimal_node_that_went_offline_is_back_with_its_next_beat() -> None:
    registry = Registry("epoch")
    node = minimal(registry)
    registry.probed("n", True, 0.0)
    registry.expire(31.0)
    assert not node.online
    beat(registry, now=40.0, seq=1)
    beat(registry, now=41.0, seq=1)  # it restarted and counts anew: without a lease there is nothing to order by
    assert node.online
    assert node.last_beat == 41.0
    assert not node.reachable


def test_a_minimal_node_is_told_apart_by_its_address_alone() -> None:
    registry = Registry("epoch", node_cidr=(ip_network("10.0.0.0/24"),))
    minimal(registry)
    minimal(registry, peer="10.0.0.7")
    assert code(minimal, registry, peer="10.0.0.8", address="10.0.0.8:9200") is Code.NODE_ID_CONFLICT


# ---------------------------------------------------------------- three facts


def test_a_node_with_a_boot_id_is_not_reachable_before_its_link() -> None:
    registry = Registry("epoch")
    node = register(registry).node
    assert pick(Wish("m"), registry.pool_facts(1.0)) is None
    registry.link_up("n", "lease-1", 1.0)
    assert node.reachable
    assert pick(Wish("m"), registry.pool_facts(1.0)) == ("n", "p0")


def test_a_lost_link_stops_placement_at_once_and_leaves_the_lease() -> None:
    registry = up()
    assert registry.link_lost("n", 1.0)
    assert not registry.link_lost("n", 1.0)
    assert registry.nodes["n"].online
    assert pick(Wish("m"), registry.pool_facts(1.0)) is None
    assert registry.probed("n", True, 2.0)
    assert pick(Wish("m"), registry.pool_facts(2.0)) == ("n", "p0")


def test_a_link_needs_the_lease_in_force() -> None:
    registry = up()
    assert code(registry.link_up, "n", "old", 1.0) is Code.LEASE_STALE
    assert code(registry.link_up, "other", "lease-1", 1.0) is Code.NODE_UNKNOWN
    registry.expire(31.0)
    assert code(registry.check_lease, "n", "lease-1") is Code.NODE_UNKNOWN


def test_two_missed_beats_make_a_node_suspect_and_the_next_one_clears_it() -> None:
    registry = up()
    assert pick(Wish("m"), registry.pool_facts(25.0)) == ("n", "p0")
    assert pick(Wish("m"), registry.pool_facts(25.1)) is None
    assert facts(registry, 25.1).suspect
    leased(registry, now=26.0)
    assert pick(Wish("m"), registry.pool_facts(26.0)) == ("n", "p0")


def test_three_missed_beats_expire_a_node_once() -> None:
    registry = up()
    assert registry.expire(30.0) == []
    assert [node.node_id for node in registry.expire(30.1)] == ["n"]
    assert registry.expire(30.2) == []
    assert not facts(registry, 30.2).online


def test_an_offline_node_stays_listed_for_a_day() -> None:
    registry = up(tasks=[task(1)])
    registry.expire(31.0)
    registry.expire(31.0 + 86_399)
    assert "n" in registry.nodes
    assert registry.models().resident == {"m"}
    registry.expire(31.0 + 86_400)
    assert not registry.nodes
    assert registry.models().resident == set()
    assert registry.task(task(1)["task_id"]) is None


def test_draining_is_the_nodes_own_word() -> None:
    registry = up()
    leased(registry, draining=True)
    assert pick(Wish("m"), registry.pool_facts(1.0)) is None
    leased(registry)
    assert registry.nodes["n"].draining
    leased(registry, draining=False)
    assert pick(Wish("m"), registry.pool_facts(1.0)) == ("n", "p0")


def test_a_deregistered_node_is_forgotten_at_once() -> None:
    registry = up()
    claim = registry.claim("n", "p0", "t", 1)
    assert registry.deregister("n", 1.0) is not None
    assert registry.deregister("n", 1.0) is None
    assert registry.pool_facts(1.0, "m") == []
    registry.release(claim)


# ---------------------------------------------------------------- slots and claims


def test_a_claim_takes_a_slot_at_once_and_its_release_gives_it_back_once() -> None:
    registry = up()
    claim = registry.claim("n", "p0", "t", 1)
    assert facts(registry).slots_free == 1
    registry.release(claim)
    registry.release(claim)
    assert facts(registry).slots_free == 2
    assert registry.claimed("n", "p0") == 0


def test_a_pool_never_has_more_claims_than_slots() -> None:
    registry = up()
    for number in (1, 2):
        registry.claim("n", "p0", "t", number)
    assert code(registry.claim, "n", "p0", "t", 3) is Code.ALL_SLOTS_BUSY
    assert code(registry.claim, "n", "p9", "t", 3) is Code.POOL_NOT_FOUND
    assert code(registry.claim, "z", "p0", "t", 3) is Code.NODE_NOT_FOUND


def test_an_attempt_holds_one_slot_at_most() -> None:
    registry = up()
    claim = registry.claim("n", "p0", "t", 1)
    assert code(registry.claim, "n", "p0", "t", 1) is Code.CONFLICT
    registry.release(claim)
    again = registry.claim("n", "p0", "t", 1)
    registry.release(claim)  # the first one's, twice: the second one's slot stays taken
    assert registry.claimed("n", "p0") == 1
    registry.release(again)


def test_slots_that_others_took_are_not_free() -> None:
    registry = up(pools=[report(slots_free=1)])
    assert facts(registry).slots_free == 1
    registry.claim("n", "p0", "t", 1)
    assert facts(registry).slots_free == 0


def test_a_report_of_our_own_running_task_does_not_count_it_twice() -> None:
    registry = up()
    claim = registry.claim("n", "p0", "t", 1)
    leased(registry, delta=True, pools=[report(slots_free=1)])
    assert facts(registry).slots_free == 1
    registry.release(claim)
    assert facts(registry).slots_free == 2


def test_a_report_that_crosses_the_end_of_our_task_does_not_take_its_slot_away() -> None:
    registry = up()
    registry.release(registry.claim("n", "p0", "t", 1))
    leased(registry, delta=True, pools=[report(slots_free=1)])
    assert facts(registry).slots_free == 2
    leased(registry, delta=True, pools=[report(slots_free=1)])
    assert facts(registry).slots_free == 1


def test_a_claim_that_no_node_has_seen_hides_no_slot_that_somebody_else_took() -> None:
    registry = up()
    registry.release(registry.claim("n", "p0", "t", 1), used=False)
    assert facts(registry).slots_free == 2
    leased(registry, delta=True, pools=[report(slots_free=1)])
    assert facts(registry).slots_free == 1


def refuse(registry: Registry, claim: Claim, now: float) -> None:
    """What dispatch does with ALL_SLOTS_BUSY."""
    registry.busy(claim, now)
    registry.release(claim)


def test_a_pool_that_said_busy_is_full_until_a_second_has_passed() -> None:
    registry = up()
    refuse(registry, registry.claim("n", "p0", "t", 1), 1.0)
    assert facts(registry, 1.9).slots_free == 0
    assert facts(registry, 2.0).slots_free == 2


def test_a_pool_that_said_busy_has_a_slot_again_when_one_of_our_tasks_ends() -> None:
    registry = up(pools=[report(slots_total=4, slots_free=4)])
    running = registry.claim("n", "p0", "t", 1)
    refuse(registry, registry.claim("n", "p0", "t", 2), 1.0)
    assert facts(registry, 1.1).slots_free == 0
    registry.release(running)
    assert facts(registry, 1.1).slots_free == 1


def test_a_report_after_busy_is_believed_and_the_refused_claim_counts_for_nothing_in_it() -> None:
    registry = up()
    refuse(registry, registry.claim("n", "p0", "t", 1), 1.0)
    leased(registry, delta=True, pools=[report(slots_free=0)], now=1.1)
    assert facts(registry, 3.0).slots_free == 0
    leased(registry, delta=True, pools=[report(slots_free=1)], now=1.2)
    assert facts(registry, 1.2).slots_free == 1


def test_claims_outlive_a_pool_that_goes_and_comes_back() -> None:
    registry = up()
    claim = registry.claim("n", "p0", "t", 1)
    leased(registry, delta=True, pools=[{"pool_id": "p0", "gone": True}])
    leased(registry, delta=True, pools=[report()])
    assert registry.claimed("n", "p0") == 1
    registry.release(claim)
    assert facts(registry).slots_free == 2


def test_claims_outlive_a_node_that_comes_back_as_another_process() -> None:
    registry = up()
    claim = registry.claim("n", "p0", "t", 1)
    register(registry, boot_id="boot-2", lease_id="lease-2")
    assert facts(registry).slots_free == 1
    registry.release(claim)
    assert facts(registry).slots_free == 2


def test_a_new_control_sees_the_slots_that_its_predecessors_tasks_hold() -> None:
    registry = up(pools=[report(slots_free=0)], tasks=[task(1), task(2)])
    assert facts(registry).slots_free == 0
    leased(registry, delta=True, pools=[report(slots_free=1)])
    assert facts(registry).slots_free == 1


# ---------------------------------------------------------------- bound


def events(registry: Registry) -> list[tuple[str, bool, str | None]]:
    return [(event.fields["pool_id"], event.word == "pool.bound", event.fields["model"]) for event in registry.events()]


def test_a_pool_is_bound_while_its_model_is_resident_ready_and_nobody_drains_it() -> None:
    registry = up()
    assert events(registry) == [("p0", True, "m")]
    for change in ({"ready": False}, {"draining": True}, {"model": None}, {"state": "failed"}):
        leased(registry, pools=[report(**change)])
        assert events(registry) == [("p0", False, "m")]
        leased(registry, pools=[report()])
        assert events(registry) == [("p0", True, "m")]
    leased(registry, draining=True)
    assert events(registry) == [("p0", False, "m")]


def test_bound_since_is_when_it_was_bound_not_when_it_was_last_heard_of() -> None:
    registry = up()
    leased(registry, pools=[report(slots_free=1)], wall=LATER)
    register(registry, lease_id="lease-1")
    pool = registry.nodes["n"].pools["p0"]
    assert pool.bound_since == WALL
    leased(registry, pools=[report(model="other")], wall=LATER)
    assert (pool.bound_since, events(registry)[-2:]) == (LATER, [("p0", False, "m"), ("p0", True, "other")])


@pytest.mark.parametrize("how", ["expire", "deregister", "gone", "reboot"])
def test_a_pool_whose_node_or_self_is_gone_is_unbound(how: str) -> None:
    registry = up()
    registry.events()
    if how == "expire":
        registry.expire(31.0)
    elif how == "deregister":
        registry.deregister("n", 1.0)
    elif how == "gone":
        leased(registry, pools=[])
    else:
        register(registry, boot_id="boot-2", pools=[])
    assert events(registry) == [("p0", False, "m")]


# ---------------------------------------------------------------- models and facts


def test_models_are_known_as_resident_loadable_or_catalogued() -> None:
    registry = up(
        pools=[report(models=["m", "n"])],
        catalog=[{"id": "c"}, {"id": "old", "state": "retired"}, {"id": "coming", "state": "staging"}],
    )
    known = registry.models()
    assert known.resident == {"m"}
    assert known.loadable == {"m", "n"}
    assert known.catalogued == {"c", "coming"}
    assert known.nodes == {"n"}
    assert known.pools == {"n/p0"}
    assert [known.has_model(model) for model in ("m", "n", "c", "old")] == [True, True, True, False]


def test_facts_narrowed_to_a_model_hold_the_pools_that_have_or_can_load_it() -> None:
    registry = up(pools=[report("p0"), report("p1", model="n", models=["m"]), report("p2", model="n")])
    assert sorted(each.pool_id for each in registry.pool_facts(1.0, "m")) == ["p0", "p1"]
    assert registry.pool_facts(1.0, "x") == []
    leased(registry, delta=True, pools=[report("p2", model="m")])
    assert sorted(each.pool_id for each in registry.pool_facts(1.0, "m")) == ["p0", "p1", "p2"]


def test_facts_carry_what_placement_needs() -> None:
    registry = up(zone="east", pools=[report(vram_free_bytes=7, last_error="boom", state="ready", models=["n"])])
    fact = facts(registry)
    assert (fact.zone, fact.vram_free_bytes, fact.last_error, fact.state) == ("east", 7, "boom", "ready")
    assert fact.models == {"n"}
    assert fact.age_ms(2.5) == 2500


def test_a_pool_that_says_nothing_of_slots_has_one() -> None:
    registry = up(pools=[{"pool_id": "p0", "model": "m", "ready": True}])
    assert (facts(registry).slots_total, facts(registry).slots_free) == (1, 1)


# ---------------------------------------------------------------- tasks


def test_a_task_is_found_on_the_node_that_reports_it_and_its_highest_attempt_wins() -> None:
    registry = up(tasks=[task(1, attempt=1), task(2)])
    register(registry, "o", boot_id="b", tasks=[task(1, attempt=2)])
    node_id, found = registry.task(task(1)["task_id"]) or ("", None)
    assert node_id == "o"
    assert found is not None
    assert found.attempt == 2
    assert {report.task_id for _, report in registry.tasks()} == {task(1)["task_id"], task(2)["task_id"]}


def test_a_beat_tells_which_tasks_have_ended_once() -> None:
    registry = up(tasks=[task(1), task(2)])
    assert [t.task_id for t in leased(registry, delta=True, tasks=[task(1, state="sealed")]).ended] == [
        task(1)["task_id"]
    ]
    assert leased(registry, delta=True, tasks=[task(1, state="sealed")]).ended == ()
    leased(registry, delta=True, tasks=[task(2, gone=True)])
    assert registry.task(task(2)["task_id"]) is None
    leased(registry, tasks=[])
    assert registry.task(task(1)["task_id"]) is None


def test_a_task_on_an_online_node_is_preferred_over_the_same_attempt_on_an_offline_one() -> None:
    registry = Registry("epoch")
    register(registry, "z", tasks=[task(1)])
    register(registry, "a", tasks=[task(1)], now=20.0)
    registry.expire(31.0)
    assert (registry.task(task(1)["task_id"]) or ("",))[0] == "a"


def test_a_node_cannot_make_the_control_remember_tasks_without_end() -> None:
    reports = TaskReports()
    first = TaskReport.model_validate(task(0))
    reports.take("n", [first], whole=False)
    for start in range(1, 3 * MAX_TASKS_PER_NODE, 4_096):
        batch = [TaskReport.model_validate(task(n, state="sealed")) for n in range(start, start + 4_096)]
        reports.take("n", batch, whole=False)
        assert len(reports) <= MAX_TASKS_PER_NODE
    assert reports.find(first.task_id, lambda _: True) is not None  # it runs: sealed ones go first
    reports.forget("n")
    assert len(reports) == 0
    assert list(reports) == []
