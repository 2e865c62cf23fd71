"""The plans that runs are made from: what clients ask, what breaks, how long. Each is for one family of faults."""

from __future__ import annotations

from dataclasses import replace

from tests.cluster import simulated
from tests.faults.harness import Plan
from tests.faults.tasks import USUAL, Mix

SLOW_START = simulated("p0", "sim", 12, "--tokens", "100000", "--ttft-ms", "600", "--delay-ms", "15")
STEADY = ("--tokens", "100000", "--ttft-ms", "60", "--delay-ms", "15")
QUIET = Mix({"native": 10}, cancel=0, vanish=0, leave=0, stall=0, mismatch=0, reread=0, script=0, keyed=0, deadline=0)

PLANS: dict[str, Plan] = {
    # Nothing breaks but what clients do themselves.
    "calm": Plan(1, 0, calm_first_s=5.0, mix=replace(USUAL, cancel=0.25, mismatch=0.2, reread=0.3)),
    "bulk": Plan(1, 0, calm_first_s=6.0, clients=6, min_rate=0.2, mix=replace(QUIET, stall=0.6, vanish=0.4)),
    "leavers": Plan(1, 0, calm_first_s=5.0, clients=12, min_rate=0.5, mix=replace(USUAL, leave=0.5, vanish=0.2)),
    "cuts": Plan(
        1, 10, weights={"client.cut": 2, "client.reset": 1}, gap_s=(0.2, 0.5), mix=replace(USUAL, vanish=0.5, keyed=0.9)
    ),
    "restarts": Plan(1, 3, weights={"control.kill": 1}, gap_s=(1.0, 1.5), mix=replace(USUAL, keyed=0.9)),
    "nodes": Plan(1, 4, weights={"node.kill": 1}, gap_s=(0.5, 1.0)),
    # Agents that go in the midst of tasks, and engines that are hit while nobody looks after them.
    "agents": Plan(
        1, 12, weights={"node.kill": 6, "node.term": 2, "engine.kill": 1, "engine.stop": 2}, gap_s=(0.3, 0.8),
        mix=replace(USUAL, shortest=60),
    ),
    "links": Plan(1, 12, weights={"link.cut": 1, "link.reset": 1}, gap_s=(0.2, 0.5)),
    "partitions": Plan(1, 5, weights={"link.half_open": 1, "link.partition": 2}, gap_s=(0.5, 1.0)),
    # One node with a slow start: where an attempt was lost, the next one goes to the same place.
    "lonely": Plan(
        1, 3, clients=8, weights={"link.cut": 1}, gap_s=(1.5, 2.0), min_rate=0.3,
        mix=replace(QUIET, shortest=150, longest=400),
        pools={"a": [simulated("p0", "sim", 16, "--tokens", "100000", "--ttft-ms", "1500", "--delay-ms", "15")]},
    ),
    # First attempts that run on where they were lost, and controls that hear of those before they hear of the second:
    # the node of the second is cut off as the control dies. Node ids of two lengths, for two logs of a task then
    # differ in every offset.
    "attempts": Plan(
        1, 12, clients=20, min_rate=0.3, mix=replace(QUIET, shortest=100, longest=200),
        in_turn=(
            ("link.cut_off", 4.0, "placed"), ("control.kill", 0.8, "streaming"), ("link.cut_off", 0.0, "streaming"),
        ),
        pools={"a": [SLOW_START], "other": [SLOW_START]},
    ),
    # Long enough for a pool that was ejected to be tried again; the others take what it fails.
    "ejections": Plan(
        1, 0, clients=12, calm_first_s=26.0, mix=replace(USUAL, script=0.6, deadline=0, stall=0),
        pools={
            "a": [simulated("p0", "sim", 4, *STEADY), simulated("p1", "odd", 1, *STEADY, "--obey")],
            "b": [simulated("p0", "sim", 4, *STEADY), simulated("p1", "odd", 3, *STEADY)],
            "c": [simulated("p1", "odd", 4, *STEADY)],
        },
    ),
    "crowd": Plan(
        1, 0, calm_first_s=6.0, mix=replace(USUAL, cancel=0.4, vanish=0.3, leave=0.2, stall=0, script=0),
        pools={"a": [simulated("p0", "sim", 2, *STEADY)], "b": [simulated("p0", "sim", 2, *STEADY)]},
    ),
}  # fmt: skip

# For a node in a network namespace: `a` is the one that can be cut off.
TWO_NODES = {"a": [simulated("p0", "sim", 4, *STEADY)], "b": [simulated("p0", "sim", 4, *STEADY)]}
PARTITIONED = {
    # One after the other, with time to find back in between: two that run together last longer than is waited for.
    "partition": Plan(
        1, 3, clients=12, min_rate=1.0, weights={"link.partition": 1}, gap_s=(6.5, 7.5), pools=TWO_NODES,
        mix=replace(USUAL, stall=0, script=0),
    ),
    # Long enough texts, and clients that see them through: what runs there when it comes is still to be told.
    "blackout": Plan(
        1, 1, clients=12, min_rate=1.0, in_turn=(("link.blackout", 10.0, "streaming"),), pools=TWO_NODES,
        mix=replace(USUAL, stall=0, script=0, cancel=0, leave=0, deadline=0, shortest=80),
    ),
}  # fmt: skip
