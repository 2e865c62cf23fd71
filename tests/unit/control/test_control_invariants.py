"""Registry, placement and admission together, under any order of events, beside a model of what nodes really run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llorch.breaker import Phase
from llorch.control.admission import Admission
from llorch.control.decision import Outcome, decide
from llorch.control.line import BATCH, INTERACTIVE, Waiter
from llorch.control.placement import Wish, pick, pick_serving
from llorch.control.registry import Claim, Registry
from llorch.errors import Code, LlorchError
from llorch.messages import Heartbeat, Register, Tail

WALL = "2025-01-02T03:04:05Z"
SLOTS = 2
QUEUE_LIMIT = 8  # for one principal of two: 2
BODY_LIMIT = 1_000
QUEUE_TIMEOUT_S = 60.0
MODELS = {"p0": "m", "p1": "n"}
SHARED = "p1"  # it can load both models, one at a time
TASKS = st.tuples(
    st.sampled_from(["ann", "ann", "bob"]), st.sampled_from([INTERACTIVE, BATCH]), st.sampled_from([50, 400])
)
NODES = st.sampled_from(["a", "b"])
POOLS = st.sampled_from(list(MODELS))
WISHES = st.builds(
    Wish,
    st.sampled_from(["m", "m", "n"]),
    pin=st.sampled_from([None, None, "a", "b/p0"]),
    avoid=st.sampled_from([(), ("a",)]),
    allow_fallback=st.booleans(),
)


class RealNode:
    """What is true on a node, whatever the control believes."""

    def __init__(self) -> None:
        self.boot = 1
        self.lease_id = ""
        self.draining = False
        self.model = dict(MODELS)
        self.ready = dict.fromkeys(MODELS, True)
        self.others = dict.fromkeys(MODELS, 0)
        self.running: dict[str, set[Claim]] = {pool_id: set() for pool_id in MODELS}

    def free(self, pool_id: str) -> int:
        return SLOTS - self.others[pool_id] - len(self.running[pool_id])

    def swappable(self, pool_id: str) -> bool:
        return pool_id == SHARED and self.ready[pool_id] and self.free(pool_id) == SLOTS

    def takes(self, pool_id: str, model: str) -> bool:
        """An OPEN arrives; loading takes no time here."""
        if self.model[pool_id] != model and self.swappable(pool_id):
            self.model[pool_id] = model
        return self.model[pool_id] == model and self.free(pool_id) > 0

    def reports(self) -> list[dict[str, Any]]:
        return [
            {
                "pool_id": pool_id,
                "model": model if self.ready[pool_id] or pool_id != SHARED else None,
                "models": list(MODELS.values()) if pool_id == SHARED else [model],
                "swappable": self.swappable(pool_id),
                "ready": self.ready[pool_id],
                "slots_total": SLOTS,
                "slots_free": self.free(pool_id),
            }
            for pool_id, model in self.model.items()
        ]


class Control(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.serial = 0
        self.registry = Registry("epoch", listed_offline_s=60.0)
        self.admission = Admission(QUEUE_LIMIT, BODY_LIMIT)
        self.real = {"a": RealNode(), "b": RealNode()}
        self.opening: list[tuple[Waiter, Claim]] = []  # claimed, and the node has not answered yet
        self.held: dict[Claim, Waiter] = {}  # claimed, and accepted by the node
        self.released = 0

    def fresh(self) -> int:
        self.serial += 1
        return self.serial

    # ---- what dispatch does

    def place(self, waiter: Waiter) -> Claim | None:
        key = pick(waiter.wish, self.registry.pool_facts(self.now, waiter.wish.model))
        decision = decide(waiter.wish, self.registry.pool_facts(self.now), self.now, self.registry.models())
        assert decision.picked == key
        if key is None:
            return None
        node = self.registry.nodes[key[0]]
        pool = node.pools[key[1]]
        (fact,) = [each for each in self.registry.pool_facts(self.now) if each.key == key]
        assert node.online and node.reachable and not node.suspect(self.now) and not node.draining
        assert (
            pool.bound and pool.report.ready and (fact.takes == waiter.wish.model or fact.may_load(waiter.wish.model))
        )
        assert fact.takes == waiter.wish.model or pool.claimed == 0
        assert pool.breaker.takes
        return self.registry.claim(*key, waiter.task_id, self.fresh(), waiter.wish.model)

    def pump(self) -> None:
        placed = self.admission.match(self.place, self.now)
        assert len({waiter.task_id for waiter, _ in placed}) == len(placed)
        self.opening += placed

    @rule(arrivals=st.lists(st.tuples(WISHES, TASKS), min_size=1, max_size=6))
    def tasks_arrive(self, arrivals: list[tuple[Wish, tuple[str, str, int]]]) -> None:
        for wish, (owner, priority, size) in arrivals:
            self.a_task_arrives(Waiter(f"t{self.fresh()}", wish, owner, self.now, priority, size))

    def a_task_arrives(self, waiter: Waiter) -> None:
        outcome = decide(waiter.wish, self.registry.pool_facts(self.now), self.now, self.registry.models()).outcome
        claim = self.place(waiter)  # `pump` has run, so nobody who waits could use this slot
        if claim is not None:
            assert outcome is Outcome.PLACED
            self.admission.given(waiter, self.now)
            self.opening.append((waiter, claim))
        elif outcome is not Outcome.REFUSE:
            waiting = [other for other in self.admission._waiters.values() if not other.front]
            here = [other for other in waiting if other.wish.model == waiter.wish.model]
            own = [other for other in here if other.owner == waiter.owner]
            try:
                self.admission.enqueue(waiter, self.now, SLOTS)
            except LlorchError as error:
                assert error.code is Code.QUEUE_FULL
                bodies = sum(other.size for other in waiting) + waiter.size
                mine = sum(other.size for other in waiting if other.owner == waiter.owner)
                too_many_bytes = bodies > BODY_LIMIT or (mine > 0 and mine + waiter.size > BODY_LIMIT // 4)
                assert len(here) == QUEUE_LIMIT or len(own) >= QUEUE_LIMIT // 4 or too_many_bytes
            self.pump()

    @precondition(lambda self: self.opening)
    @rule(index=st.integers(0, 9))
    def a_node_answers_an_open(self, index: int) -> None:
        waiter, claim = self.opening.pop(index % len(self.opening))
        real = self.real[claim.node_id]
        if claim.node_id in self.registry.nodes and real.takes(claim.pool_id, waiter.wish.model):
            real.running[claim.pool_id].add(claim)
            self.held[claim] = waiter
            self.registry.accepted(claim)
            return
        self.registry.busy(claim, self.now, another=real.model[claim.pool_id] != waiter.wish.model)
        self.release(claim)
        self.admission.enqueue(replace(waiter, front=True), self.now, SLOTS)
        self.pump()

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), twice=st.booleans(), outcome=st.sampled_from(["well", "failed", "told nothing"]))
    def a_task_ends(self, index: int, twice: bool, outcome: str) -> None:
        claim = list(self.held)[index % len(self.held)]
        if outcome == "well":
            self.registry.succeeded(claim, self.now)
        for _ in range(5 if outcome == "failed" else 0):  # as if others before it had
            self.registry.failed(claim, self.now)
        del self.held[claim]
        self.admission.settle(claim.task_id, Tail(length=0, tokens_in=10, tokens_out=index), ran=True)
        self.real[claim.node_id].running[claim.pool_id].discard(claim)
        self.release(claim)
        if twice:
            self.registry.release(claim)
        self.pump()

    @rule(node_id=NODES, pool_id=POOLS)
    def tasks_fail_one_after_another(self, node_id: str, pool_id: str) -> None:
        if (node_id, pool_id) in {each.key for each in self.registry.pool_facts(self.now) if each.placeable}:
            claim = self.registry.claim(node_id, pool_id, f"t{self.fresh()}", 1)
            for _ in range(5):
                self.registry.failed(claim, self.now)
            self.release(claim)
            self.pump()

    def release(self, claim: Claim) -> None:
        self.registry.release(claim)
        self.released += 1

    @precondition(lambda self: len(self.admission))
    @rule(index=st.integers(0, 9))
    def a_waiting_client_leaves(self, index: int) -> None:
        waiting = [f"t{n}" for n in range(self.serial + 1) if f"t{n}" in self.admission]
        task_id = waiting[index % len(waiting)]
        self.admission.remove(task_id, self.now)
        self.admission.settle(task_id, None, ran=False)
        self.pump()

    # ---- what nodes do

    @initialize()
    def both_nodes_are_up(self) -> None:
        for node_id in self.real:
            self.a_node_registers(node_id, reboot=False)

    @rule(node_id=NODES, reboot=st.booleans())
    def a_node_registers(self, node_id: str, reboot: bool) -> None:
        real = self.real[node_id]
        if reboot:
            real.boot += 1
            real.running = {pool_id: set() for pool_id in MODELS}
            self.nodes_tasks_are_lost(node_id)
        lease_id = f"lease-{self.fresh()}"
        message = Register.model_validate(
            {"node_id": node_id, "boot_id": f"{real.boot}", "draining": real.draining, "pools": real.reports()}
        )
        self.registry.register(message, now=self.now, wall=WALL, peer="10.0.0.1", lease_id=lease_id)
        real.lease_id = lease_id
        self.registry.link_up(node_id, lease_id, self.now)
        self.pump()

    def nodes_tasks_are_lost(self, node_id: str) -> None:
        """Its link ended: what ran there goes back to the front, as dispatch does for tasks that had shown nothing."""
        self.registry.link_lost(node_id, self.now)
        lost = [(w, c) for w, c in self.opening if c.node_id == node_id]
        self.opening = [pair for pair in self.opening if pair not in lost]
        lost += [(self.held.pop(c), c) for c in list(self.held) if c.node_id == node_id]
        for waiter, claim in lost:
            self.release(claim)
            self.admission.enqueue(replace(waiter, front=True), self.now, SLOTS)

    @rule(node_id=NODES, delta=st.booleans(), stale=st.booleans())
    def a_node_beats(self, node_id: str, delta: bool, stale: bool) -> None:
        real = self.real[node_id]
        message = Heartbeat.model_validate(
            {
                "lease_id": "stale" if stale else real.lease_id,
                "delta": delta,
                "draining": real.draining,
                "pools": real.reports(),
            }
        )
        try:
            self.registry.heartbeat(node_id, message, now=self.now, wall=WALL)
        except LlorchError as error:
            node = self.registry.nodes.get(node_id)
            assert stale or node is None or not node.online
            assert error.code in (Code.NODE_UNKNOWN, Code.LEASE_STALE)
        self.pump()

    @rule(node_id=NODES)
    def a_link_ends(self, node_id: str) -> None:
        self.nodes_tasks_are_lost(node_id)
        self.pump()

    @rule(node_id=NODES, ok=st.booleans())
    def a_node_is_probed(self, node_id: str, ok: bool) -> None:
        self.registry.probed(node_id, ok, self.now)
        self.pump()

    @rule(node_id=NODES, pool_id=POOLS, ready=st.booleans(), draining=st.booleans(), others=st.integers(0, SLOTS))
    def a_node_changes(self, node_id: str, pool_id: str, ready: bool, draining: bool, others: int) -> None:
        real = self.real[node_id]
        real.ready[pool_id], real.draining = ready, draining
        real.others[pool_id] = min(others, SLOTS - len(real.running[pool_id]))

    @rule(node_id=NODES)
    def a_node_ends_tasks_that_nobody_reads(self, node_id: str) -> None:
        for running in self.real[node_id].running.values():
            running &= set(self.held)

    @rule(node_id=NODES, pool_id=POOLS)
    def a_pool_goes(self, node_id: str, pool_id: str) -> None:
        message = Heartbeat.model_validate(
            {
                "lease_id": self.real[node_id].lease_id,
                "delta": True,
                "pools": [{"pool_id": pool_id, "gone": True}],
            }
        )
        node = self.registry.nodes.get(node_id)
        if node is not None and node.online:
            self.registry.heartbeat(node_id, message, now=self.now, wall=WALL)
            self.pump()

    @rule(node_id=NODES)
    def a_node_leaves(self, node_id: str) -> None:
        self.nodes_tasks_are_lost(node_id)
        self.registry.deregister(node_id, self.now)
        self.pump()

    @rule(seconds=st.sampled_from([0.2, 1.0, 12.0, 16.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for node in self.registry.expire(self.now):
            assert self.now - node.last_beat > self.registry.offline_after_s
        for waiter in [w for w in self.admission._waiters.values() if w.enqueued_at + QUEUE_TIMEOUT_S <= self.now]:
            self.admission.remove(waiter.task_id, self.now)
            self.admission.settle(waiter.task_id, None, ran=False)
        self.pump()

    # ---- what is always true

    def claims(self) -> list[Claim]:
        return [claim for _, claim in self.opening] + list(self.held)

    @invariant()
    def claims_never_exceed_slots(self) -> None:
        held: dict[tuple[str, str], int] = {}
        for claim in self.claims():
            key = (claim.node_id, claim.pool_id)
            held[key] = held.get(key, 0) + 1
            assert held[key] <= SLOTS
        for node in self.registry.nodes.values():
            for pool in node.pools.values():
                assert pool.claimed == held.get((pool.node_id, pool.pool_id), 0)
                assert 0 <= pool.slots_free(self.now) <= SLOTS - pool.claimed

    @invariant()
    def a_task_is_never_both_queued_and_running(self) -> None:
        running = [claim.task_id for claim in self.claims()]
        assert len(running) == len(set(running))
        assert not any(task_id in self.admission for task_id in running)

    @invariant()
    def no_waiter_that_could_be_placed_is_left_waiting(self) -> None:
        for waiter in list(self.admission._waiters.values()):
            assert pick(waiter.wish, self.registry.pool_facts(self.now, waiter.wish.model)) is None

    @invariant()
    def the_queue_adds_up(self) -> None:
        depths = self.admission.depths()
        assert sum(depths.values()) == len(self.admission) == self.admission.depth()
        assert all(depths.values())
        for model in ("m", "n"):
            waiting = {w.task_id: w for w in self.admission._waiters.values() if w.wish.model == model}
            order = self.admission.order(model, self.now)
            assert sorted(order) == sorted(waiting)
            assert self.admission.depth(model) == sum(depths.get((model, p), 0) for p in (INTERACTIVE, BATCH))
            ranks = [self.rank(waiting[task_id]) for task_id in order]
            assert ranks == sorted(ranks)
            for task_id in order:
                assert 1 <= (self.admission.position(task_id, self.now) or 0) <= len(order)

    def rank(self, waiter: Waiter) -> int:
        """Who came back before who did not, interactive before batch, unless that has waited a minute."""
        if waiter.front:
            return 0
        return 1 if waiter.priority == INTERACTIVE or self.now - waiter.enqueued_at >= 60.0 else 2

    @invariant()
    def the_bounds_hold(self) -> None:
        waiting = [waiter for waiter in self.admission._waiters.values() if not waiter.front]
        bodies: dict[str, int] = {}
        for waiter in waiting:
            bodies[waiter.owner] = bodies.get(waiter.owner, 0) + waiter.size
        assert bodies == self.admission._bodies
        assert sum(bodies.values()) <= BODY_LIMIT
        for model in ("m", "n"):
            assert len([waiter for waiter in waiting if waiter.wish.model == model]) <= QUEUE_LIMIT

    @invariant()
    def who_holds_a_slot_is_charged_for_it_and_nobody_else_but_those_who_came_back(self) -> None:
        charged = set(self.admission._charges)
        back = {waiter.task_id for waiter in self.admission._waiters.values() if waiter.front}
        assert charged == {claim.task_id for claim in self.claims()} | back

    @invariant()
    def kept_facts_are_as_true_as_fresh_ones(self) -> None:
        kept = self.registry.pool_facts(self.now)
        for node in self.registry.nodes.values():
            for pool in node.pools.values():
                pool.forget_facts()
        assert self.registry.pool_facts(self.now) == kept
        for model in ("m", "n"):
            narrowed = [fact.key for fact in self.registry.pool_facts(self.now, model)]
            assert sorted(narrowed) == sorted(fact.key for fact in kept if model in fact.models)
            assert self.registry.best(model, self.now) == pick_serving(Wish(model), kept)
        assert self.registry.swappable(self.now) == any(fact.swappable for fact in kept)

    @invariant()
    def a_pledge_is_that_of_claims_which_are_held_or_was_accepted(self) -> None:
        for node in self.registry.nodes.values():
            for pool in node.pools.values():
                if pool.pledge is not None:
                    mine = {c.key for c in self.claims() if (c.node_id, c.pool_id) == (pool.node_id, pool.pool_id)}
                    assert pool.pledge.claims <= mine
                    assert pool.pledge.claims or pool.pledge.accepted

    @invariant()
    def at_most_half_of_a_models_pools_are_out(self) -> None:
        for model in MODELS.values():
            could = [
                pool
                for node in self.registry.nodes.values()
                for pool in node.pools.values()
                if pool.bound_model == model and not node.suspect(self.now)
            ]
            assert 2 * sum(pool.breaker.phase is not Phase.CLOSED for pool in could) <= len(could)

    @invariant()
    def a_pool_that_is_tried_is_tried_with_one_task(self) -> None:
        trials: dict[Any, int] = {}
        for claim in self.claims():
            if claim.trial and claim.breaker.trial == (claim.task_id, claim.attempt):
                trials[claim.breaker] = trials.get(claim.breaker, 0) + 1
        assert all(count == 1 for count in trials.values())

    @invariant()
    def bound_is_what_it_says(self) -> None:
        for node in self.registry.nodes.values():
            for pool in node.pools.values():
                ready = bool(pool.report.ready and not pool.report.draining)
                assert pool.bound == (node.online and not node.draining and ready)

    def teardown(self) -> None:
        """Once all has ended and every node has said so, every slot is free again."""
        for claim in self.claims():
            self.registry.release(claim)
            self.admission.settle(claim.task_id, None, ran=True)
        for task_id in list(self.admission._waiters):
            self.admission.remove(task_id, self.now)
            self.admission.settle(task_id, None, ran=False)
        assert (len(self.admission), self.admission._bodies, self.admission._charges) == (0, {}, {})
        for node_id, real in self.real.items():
            real.others, real.ready, real.draining = dict.fromkeys(MODELS, 0), dict.fromkeys(MODELS, True), False
            real.running = {pool_id: set() for pool_id in MODELS}
            real.model = dict(MODELS)
            self.registry.deregister(node_id, self.now)
            message = Register.model_validate({"node_id": node_id, "boot_id": "last", "pools": real.reports()})
            self.registry.register(message, now=self.now, wall=WALL, peer=None, lease_id="last")
        assert not self.registry._claims
        assert all(fact.slots_free == SLOTS for fact in self.registry.pool_facts(self.now))


Control.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestControl = Control.TestCase
