"""The whole of it in virtual time: a control, two nodes, their engines and clients, and all that may befall them.

The promises are checked where they are made: by each client for what it reads (cluster_clients), by the control's
claims and ends and the nodes' slots (cluster_parts), and here for what becomes of it all once nothing more goes wrong.
"""

from __future__ import annotations

from collections import deque

import aiohttp

from llorch.node import pool_events as ev
from tests.faults.cluster_clients import SimClient
from tests.faults.cluster_parts import Network, SimControl, SimNode
from tests.faults.moves import World, move
from tests.faults.virtual import Answer, Engine

SLOTS = {"a": 2, "b": 1}
MOST_CLIENTS = 8
CALM_S = 400.0  # longer than any timeout there is


class ClusterWorld(World):
    FAULTS = frozenset(
        {
            "an_engine_fails", "an_engine_goes_or_comes", "a_node_dies", "a_link_is_cut", "a_link_is_held_or_flows",
            "a_network_is_cut", "a_beat_will_go_astray", "a_pool_drains",
        }
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.network = Network(self.loop)
        self.engines = {node_id: Engine() for node_id in SLOTS}
        self.nodes: dict[str, SimNode] = {}
        self.clients: list[SimClient] = []
        self.left: dict[str, float] = {}  # when clients of /v1 left that nobody waits for
        self.died_at = -1.0
        self.came = self.boots = self.controls = self.runs = 0
        self.faults = 0  # of nodes, links, beats, pools and engines: without any, every native task ends well
        with self.loop:
            self.start_control()
            for node_id in SLOTS:
                self.start_node(node_id)
            self.loop.advance(0.1)

    def start_control(self) -> None:
        self.controls += 1
        self.network.control = SimControl(self.loop, self.controls, list(SLOTS) if self.controls > 1 else None)

    def start_node(self, node_id: str) -> None:
        self.boots += 1
        self.nodes[node_id] = SimNode(self.network, node_id, self.boots, SLOTS[node_id], self.engines[node_id])

    def node(self, which: int) -> SimNode:
        return list(self.nodes.values())[which % len(self.nodes)]

    # ---- clients

    @move(6, want=5, kind=3, by_key=1)
    def a_client_comes(self, want: int, kind: int, by_key: int) -> bool:
        self.clients = [each for each in self.clients if each.end is None]
        if len(self.clients) >= MOST_CLIENTS:
            return False
        self.came += 1
        made = SimClient(self.network, self.came, want=want + 1, native=kind < 3, by_key=bool(by_key))
        self.clients.append(made)
        return True

    def a_client(self, which: int, *, away: bool) -> SimClient | None:
        there = [each for each in self.clients if each.end is None and each.away is away]
        return there[which % len(there)] if there else None

    @move(2, which=7)
    def a_client_vanishes(self, which: int) -> bool:
        client = self.a_client(which, away=False)
        if client is None:
            return False
        client.leave()
        if not client.native and client.came_at > self.died_at:  # a control that died can't say that its clients left
            self.left[client.label] = self.loop.now
        return True

    @move(3, which=7)
    def a_client_returns(self, which: int) -> bool:
        client = self.a_client(which, away=True)
        if client is None:
            return False
        if not client.native:
            self.clients.remove(client)
            return False
        client.come_back()
        return True

    @move(1, which=7)
    def a_client_stalls_or_reads_on(self, which: int) -> bool:
        client = self.a_client(which, away=False)
        if client is None:
            return False
        client.stall(not client.stalled)
        return True

    @move(1, which=7)
    def a_client_cancels(self, which: int) -> bool:
        client, control = self.a_client(which, away=False), self.network.control
        if client is None or control is None or client.task_id is None:
            return False
        task = control.state.dispatcher.tasks.get(client.task_id)
        if task is None or task.ended:
            return False
        client.cancelled = True
        control.state.dispatcher.cancel(task)
        return True

    # ---- engines

    def answers(self) -> list[Answer]:
        return [answer for engine in self.engines.values() for answer in engine.answers]

    def say(self, answer: Answer, count: int) -> None:
        """Token i of a run says whose it is, which run, and which token."""
        if not answer.run:
            self.runs += 1
            answer.run = self.runs
        want = next((each.want for each in self.clients if each.label == answer.label), answer.sent)
        for _ in range(count):
            if answer.sent >= want:
                answer.end()
                return
            answer.token(f"{answer.label}:{answer.run}:{answer.sent}")

    @move(10, which=3, count=3)
    def an_engine_says(self, which: int, count: int) -> bool:
        answers = self.answers()
        if not answers:
            return False
        self.say(answers[which % len(answers)], count + 1)
        return True

    @move(1, which=3, how=2)
    def an_engine_fails(self, which: int, how: int) -> bool:
        answers = self.answers()
        if not answers:
            return False
        self.faults += 1
        answer = answers[which % len(answers)]
        if how == 0 and answer.status == 0:
            answer.begin(503)
            answer.stop(None)
        else:
            answer.stop(None if how == 1 else aiohttp.ClientPayloadError("cut"))
        return True

    @move(1, which=1)
    def an_engine_goes_or_comes(self, which: int) -> None:
        self.faults += 1
        engine = self.node(which).engine
        engine.down = not engine.down

    # ---- nodes, links, the network

    @move(1, which=1)
    def a_node_dies(self, which: int) -> bool:
        node = self.node(which)
        if not node.alive:
            return False
        self.kill(node)
        return True

    def kill(self, node: SimNode) -> None:
        self.faults += 1
        node.kill()
        for answer in node.engine.answers:
            answer.open = False

    @move(4, which=1)
    def a_node_starts(self, which: int) -> bool:
        node = self.node(which)
        if node.alive:
            return False
        self.start_node(node.node_id)
        return True

    @move(1, which=1, silent=2)
    def a_link_is_cut(self, which: int, silent: int) -> bool:
        wire = self.node(which).wire
        if wire is None or wire.dead:
            return False
        self.faults += 1
        wire.die()
        if silent == 0:
            wire.cut()
        elif silent == 1:
            wire.node.lose()
        else:
            wire.control.lose()
        return True

    @move(1, which=1)
    def a_link_is_held_or_flows(self, which: int) -> bool:
        wire = self.node(which).wire
        if wire is None or wire.dead:
            return False
        self.faults += 1
        wire.flow(not wire.flows)
        return True

    @move(1, which=1)
    def a_network_is_cut(self, which: int) -> bool:
        node = self.node(which)
        if node.node_id in self.network.cut:
            return False
        self.faults += 1
        self.network.cut.add(node.node_id)
        if node.wire is not None:
            node.wire.die()
        return True

    @move(3, which=1)
    def a_network_heals(self, which: int) -> bool:
        node = self.node(which)
        if node.node_id not in self.network.cut:
            return False
        self.network.cut.discard(node.node_id)
        return True

    @move(2, which=1, fate=3)
    def a_beat_will_go_astray(self, which: int, fate: int) -> None:
        self.faults += 1
        self.network.fates.setdefault(self.node(which).node_id, deque()).append(fate)

    @move(1, which=1, on=1)
    def a_pool_drains(self, which: int, on: int) -> None:
        self.faults += 1
        node = self.node(which)
        node.pools.handle(ev.Drain("p") if on else ev.Undrain("p"), self.loop.now)

    # ---- the control, and time

    @move(1)
    def the_control_dies(self) -> bool:
        control = self.network.control
        if control is None:
            return False
        control.kill()
        self.network.control = None
        self.left.clear()
        self.died_at = self.loop.now
        for client in self.clients:
            client.cut_off()
        return True

    @move(4)
    def the_control_starts(self) -> bool:
        if self.network.control is not None:
            return False
        self.start_control()
        return True

    @move(8, seconds=5)
    def time_passes(self, seconds: int) -> None:
        self.loop.advance((0.02, 0.3, 0.6, 1.5, 6.0, 13.0)[seconds])

    # ---- what is always true, and what comes true

    def check(self) -> None:
        if self.network.control is not None:
            self.network.control.check()
        for node in self.nodes.values():
            if node.alive:
                node.check()
        if not self.faults:
            labels = [answer.label for answer in self.answers()]
            assert len(labels) == len(set(labels)), "one task is run twice at a time"
            for label in labels:
                assert self.loop.now < self.left.get(label, self.loop.now) + 1.0, "its client has left, and it runs on"
        for client in self.clients:
            if client.failure is not None:
                raise client.failure
            if client.running.done() and not client.running.cancelled():
                client.running.result()

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        self.network.cut.clear()
        self.network.fates.clear()
        for node in list(self.nodes.values()):
            node.engine.down = False
            if not node.alive:
                self.start_node(node.node_id)
            else:
                node.pools.handle(ev.Undrain("p"), self.loop.now)
                if node.wire is not None and not node.wire.dead:
                    node.wire.flow(True)
        if self.network.control is None:
            self.start_control()
        for client in self.clients:
            if client.stalled:
                client.stall(False)
            if client.away and client.native and client.end is None:
                client.come_back()
        self.clients = [each for each in self.clients if not each.away]

    def finish(self) -> None:
        self.heal()
        self.loop.advance(45.0)
        here = {each.label for each in self.clients}
        for answer in self.answers():
            assert answer.label in here or answer.native, "nobody reads it, and it runs on"
        until = self.loop.now + CALM_S
        while self.loop.now < until and any(each.end is None for each in self.clients):
            self.loop.advance(0.5)
            for answer in self.answers():
                self.say(answer, 2)
            self.check()
        for client in self.clients:
            assert client.end is not None, "a client whose task never ends"
            if not self.faults and not client.cancelled and client.native:
                late = client.end in ("QUEUE_TIMEOUT", "ENGINE_STALLED") and client.ended_at >= client.came_at + 120.0
                assert client.end == "stop" or client.was_away or late, client.end
        for _ in range(8):  # tasks whose clients have left for good
            self.loop.advance(10.0)
            for answer in self.answers():
                self.say(answer, 100)
        self.loop.advance(12.0)
        control = self.network.control
        assert control is not None
        assert not control.admission._waiters and not control.state.dispatcher._audiences, "somebody waits for ever"
        assert not control.state.registry._claims, "a claim that nobody releases"
        for node in self.nodes.values():
            assert not node.runner._executions and node.pools.accepted() == 0, "a slot is held by nobody"
        for fact in control.state.registry.pool_facts(self.loop.now):
            assert fact.online and fact.reachable and fact.slots_free == fact.slots_total, fact
