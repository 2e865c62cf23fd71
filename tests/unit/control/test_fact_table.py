"""The kept facts and the kept order, beside facts that are made fresh and the order that placement would find."""

from __future__ import annotations

from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llorch.control import fact_table
from llorch.control.nodes import Claim
from llorch.control.placement import PoolFacts, Wish, pick_serving
from llorch.control.registry import Registry
from llorch.control.strikes import Quarantine
from llorch.messages import Heartbeat, PoolReport, Register

WALL = "2025-01-02T03:04:05Z"
MODELS = ("m", "n")
NODES = st.sampled_from(["a", "b", "c", "d"])
SPARE = 3  # so that a heap is made anew often
SLOTS = 3
POOL = st.fixed_dictionaries(
    {
        "pool_id": st.sampled_from(["p0", "p1"]),
        "model": st.sampled_from([*MODELS, None]),
        "models": st.sampled_from([[], ["m", "n"], ["m"]]),
        "swappable": st.booleans(),
        "loading": st.sampled_from([None, None, None, *MODELS]),
        "ready": st.sampled_from([True, True, True, False]),
        "draining": st.sampled_from([False, False, False, True]),
        "slots_total": st.just(SLOTS),
        "slots_free": st.integers(0, SLOTS),
        "vram_free_bytes": st.sampled_from([0, 1_000, 2_000]),
    }
)
POOL = POOL.map(lambda pool: pool | {"loading": pool["loading"] if pool["loading"] in pool["models"] else None})
POOLS = st.lists(POOL, max_size=2, unique_by=lambda pool: pool["pool_id"])


class Facts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patched = mock.patch.object(fact_table, "SPARE_ENTRIES", SPARE)
        self.patched.start()
        self.now = 0.0
        self.serial = self.steps = 0
        self.registry = Registry("epoch", listed_offline_s=60.0)
        self.held: list[Claim] = []

    def teardown(self) -> None:
        self.patched.stop()

    def fresh(self) -> list[PoolFacts]:
        """Made from nothing that was kept, and kept by nobody."""
        made = []
        for node in self.registry.nodes.values():
            for pool in node.pools.values():
                kept = pool.facts, pool.facts_until
                made.append(pool.make_facts(node, self.now))
                pool.facts, pool.facts_until = kept
        return made

    # ---- what happens

    @initialize()
    def two_nodes_are_up(self) -> None:
        for node_id in ("a", "b"):
            self.a_node_registers(node_id, [{"pool_id": "p0", "model": "m", "ready": True, "slots_total": SLOTS}])

    @rule(node_id=NODES, pools=POOLS)
    def a_node_registers(self, node_id: str, pools: list[dict[str, Any]]) -> None:
        self.serial += 1
        lease_id = f"lease-{self.serial}"
        message = Register.model_validate({"node_id": node_id, "boot_id": "b", "pools": pools})
        self.registry.register(message, now=self.now, wall=WALL, peer="10.0.0.1", lease_id=lease_id)
        self.registry.link_up(node_id, lease_id, self.now)

    @rule(node_id=NODES, pools=POOLS, delta=st.booleans(), draining=st.sampled_from([False, False, True]))
    def a_node_beats(self, node_id: str, pools: list[dict[str, Any]], delta: bool, draining: bool) -> None:
        node = self.registry.nodes.get(node_id)
        if node is not None and node.online:
            fields = {"lease_id": node.lease_id, "delta": delta, "draining": draining, "pools": pools}
            self.registry.heartbeat(node_id, Heartbeat.model_validate(fields), now=self.now, wall=WALL)

    @rule(node_id=NODES, pool=POOL)
    def a_pool_is_read(self, node_id: str, pool: dict[str, Any]) -> None:
        self.registry.merge_pool(node_id, PoolReport.model_validate(pool), self.now, WALL)

    @rule(model=st.sampled_from(MODELS), count=st.integers(1, 4))
    def tasks_are_placed(self, model: str, count: int) -> None:
        for _ in range(count):
            key = self.registry.best(model, self.now)
            assert key == pick_serving(Wish(model), self.fresh())
            if key is not None:
                self.serial += 1
                self.held.append(self.registry.claim(*key, f"t{self.serial}", 1, model))

    @rule(index=st.integers(0, 9), times=st.integers(1, 9))
    def one_pool_is_used_again_and_again(self, index: int, times: int) -> None:
        """Also one that is not the best: what is kept of it is not passed over by who looks for that."""
        able = [facts.key for facts in self.fresh() if facts.placeable]
        for _ in range(times if able else 0):
            self.serial += 1
            claim = self.registry.claim(*able[index % len(able)], f"t{self.serial}", 1)
            self.registry.best("m", self.now)
            self.registry.release(claim)
            self.registry.best("n", self.now)

    @rule(node_id=NODES, model=st.sampled_from(MODELS))
    def one_is_placed_for_what_has_to_be_loaded(self, node_id: str, model: str) -> None:
        for facts in self.fresh():
            if facts.node_id == node_id and facts.may_load(model) and facts.placeable:
                self.serial += 1
                self.held.append(self.registry.claim(*facts.key, f"t{self.serial}", 1, model))
                return

    @rule(index=st.integers(0, 9), used=st.booleans())
    def one_ends(self, index: int, used: bool) -> None:
        if self.held:
            self.registry.release(self.held.pop(index % len(self.held)), used=used)

    @rule(index=st.integers(0, 9), another=st.booleans())
    def one_is_refused(self, index: int, another: bool) -> None:
        if self.held:
            claim = self.held.pop(index % len(self.held))
            self.registry.busy(claim, self.now, another=another)
            self.registry.release(claim)

    @rule(index=st.integers(0, 9), well=st.booleans())
    def many_fail_or_go_well(self, index: int, well: bool) -> None:
        if self.held:
            claim = self.held[index % len(self.held)]
            for _ in range(5):
                (self.registry.succeeded if well else self.registry.failed)(claim, self.now)

    @rule(node_id=NODES, what=st.sampled_from(["cut", "probed", "silent", "doubted", "believed", "shut out", "gone"]))
    def a_node_is_heard_of(self, node_id: str, what: str) -> None:
        registry = self.registry
        if what == "cut":
            registry.link_lost(node_id, self.now)
        elif what in ("probed", "silent"):
            registry.probed(node_id, what == "probed", self.now)
        elif what in ("doubted", "believed"):
            registry.doubt(node_id, what == "doubted")
        elif what == "shut out":
            registry.quarantine(node_id, mock.create_autospec(Quarantine, instance=True, reason="lies"), self.now)
        else:
            registry.deregister(node_id, self.now)

    @rule(seconds=st.sampled_from([0.2, 0.9, 1.0, 5.0, 16.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.registry.expire(self.now)

    @rule(seconds=st.sampled_from([0.5, 1.0, 13.0]))
    def time_passes_and_nobody_looks(self, seconds: float) -> None:
        self.now += seconds

    # ---- what is always true

    @invariant()
    def the_best_is_what_placement_would_pick(self) -> None:
        """Looked at after some steps only, so that much may have changed in between."""
        self.steps += 1
        if self.steps % 3:
            for model in (*MODELS, "other"):
                assert self.registry.best(model, self.now) == pick_serving(Wish(model), self.fresh())

    @invariant()
    def what_is_kept_is_as_if_it_were_fresh(self) -> None:
        if self.steps % 2:
            fresh = self.fresh()
            assert list(self.registry.pool_facts(self.now)) == fresh
            assert self.registry.swappable(self.now) == any(facts.swappable for facts in fresh)
            for model in MODELS:
                rows = self.registry.pool_facts(self.now, model)
                assert all(facts in fresh for facts in rows)
                assert {facts.key for facts in fresh if facts.takes == model} <= {facts.key for facts in rows}

    @invariant()
    def no_heap_grows_with_what_has_happened(self) -> None:
        table = self.registry._table
        for model, heap in (table._heaps if table is not None else {}).items():
            assert len(heap) <= 2 * len(table._of_model.get(model, ())) + SPARE + 1  # type: ignore[union-attr]


Facts.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestFacts = Facts.TestCase


def registry_of(*names: str, slots: int = 4) -> Registry:
    registry = Registry("epoch")
    for name in names:
        pool = {"pool_id": "p0", "model": "m", "ready": True, "slots_total": slots, "slots_free": slots}
        message = Register.model_validate({"node_id": name, "boot_id": "b", "pools": [pool]})
        registry.register(message, now=0.0, wall=WALL, peer=None, lease_id=f"lease-{name}")
        registry.link_up(name, f"lease-{name}", 0.0)
    return registry


def test_pools_that_are_used_and_never_the_best_leave_a_heap_as_large_as_a_few() -> None:
    """The best one stays at its top, so that nothing beneath it is ever passed over."""
    registry = registry_of("a", "b", "c")
    assert registry.best("m", 0.0) == ("a", "p0")
    for number in range(500):
        name = "bc"[number % 2]
        claim = registry.claim(name, "p0", f"t{number}", 1, "m")
        assert registry.best("m", 0.0) == ("a", "p0")
        if number % 3:
            registry.release(claim)
            registry.best("m", 0.0)
        else:
            registry.release(claim)
        assert registry._table is not None
        assert len(registry._table._heaps["m"]) <= 2 * 3 + fact_table.SPARE_ENTRIES + 1
        expected = pick_serving(Wish("m"), registry.pool_facts(0.0))
        assert registry.best("m", 0.0) == expected
    held = [registry.claim("a", "p0", f"a{number}", 1, "m") for number in range(2)]
    assert registry.best("m", 0.0) == ("b", "p0")  # nor was what is next lost
    held += [registry.claim("b", "p0", f"b{number}", 1, "m") for number in range(3)]
    assert registry.best("m", 0.0) == ("c", "p0")
    for claim in held:
        registry.release(claim)
    assert registry.best("m", 0.0) == ("a", "p0")


def test_whether_anything_may_be_loaded_follows_the_pools() -> None:
    registry = Registry("epoch")
    pool = {"pool_id": "p0", "model": "m", "models": ["m", "n"], "swappable": True, "ready": True, "slots_total": 2}
    message = Register.model_validate({"node_id": "a", "boot_id": "b", "pools": [pool]})
    registry.register(message, now=0.0, wall=WALL, peer=None, lease_id="l")
    registry.link_up("a", "l", 0.0)
    assert registry.swappable(0.0)
    claim = registry.claim("a", "p0", "t", 1, "m")
    assert not registry.swappable(0.0)
    registry.release(claim)
    assert registry.swappable(0.0)


def test_only_facts_that_have_changed_are_made_anew() -> None:
    registry = registry_of("a", "b", "c")
    before = {facts.key: facts for facts in registry.pool_facts(0.0)}
    registry.claim("b", "p0", "t", 1, "m")
    after = {facts.key: facts for facts in registry.pool_facts(0.0)}
    assert [key for key in after if after[key] is not before[key]] == [("b", "p0")]


def test_of_a_full_pool_nothing_is_picked_until_a_slot_is_free() -> None:
    registry = registry_of("a", slots=1)
    claim = registry.claim("a", "p0", "t", 1, "m")
    assert registry.best("m", 0.0) is None
    registry.release(claim)
    assert registry.best("m", 0.0) == ("a", "p0")
    registry.claim("a", "p0", "u", 1, "m")
    assert registry.best("m", 0.0) is None


def test_facts_that_grew_old_are_looked_at_once_and_then_no_sooner_than_the_next_grow_old() -> None:
    registry = registry_of("a", "b")
    registry.best("m", 0.0)
    table = registry._table
    assert table is not None
    assert 0.0 < table._until < 60.0
    old = table._until + 0.1
    registry.best("m", old)
    assert table._until > old
